//! The table against a page-by-page model, its bounds, and readers beside an editor.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "small numbers of tests"
)]

use super::*;
use std::collections::HashMap;

const UNBOUNDED: usize = usize::MAX;

/// xorshift64*; enough to choose cases.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

fn run(host_page: u64, pages: u64) -> Run {
    Run { host: host_page << PAGE_SHIFT, pages, writable: true }
}

fn bind(table: &PageTable, page: u64, run: Run) -> Result<(), NoTable> {
    let mut edit = table.edit();
    edit.prepare(page, run.pages)?;
    edit.commit(page, [run]);
    Ok(())
}

fn bind_null(table: &PageTable, range: PageRange) -> Result<(), NoTable> {
    let mut edit = table.edit();
    let made = edit.prepare(range.start, range.pages());
    match made {
        Ok(()) => edit.commit_null(range),
        Err(_) => edit.abandon(range),
    }
    made
}

/// Pages at these offsets from a host page.
fn bind_scattered(table: &PageTable, page: u64, host_page: u64, pages: &[ScatteredPage]) {
    let mut edit = table.edit();
    edit.prepare_leaves(PageRange { start: page, end: page + pages.len() as u64 }).unwrap();
    edit.commit_scattered(page, host_page << PAGE_SHIFT, pages);
}

fn clear(table: &PageTable, start: u64, end: u64) {
    table.edit().clear(PageRange { start, end });
}

fn host_page(table: &PageTable, page: u64) -> Option<u64> {
    table.walk().lookup(page).ok().map(|t| t.host >> PAGE_SHIFT)
}

/// What a table must say, page by page.
#[derive(Default)]
struct Model {
    /// Page -> host page (0 if null), writable.
    pages: HashMap<u64, (u64, bool)>,
    /// Blocks that are one large leaf.
    large: HashMap<u64, ()>,
}

impl Model {
    fn clear(&mut self, range: PageRange) {
        for block in range.start / BLOCK_PAGES..range.end.div_ceil(BLOCK_PAGES) {
            if self.large.remove(&block).is_some() {
                self.pages.retain(|page, _| page / BLOCK_PAGES != block);
            }
        }
        self.pages.retain(|page, _| !range.contains(*page));
    }

    fn bind(&mut self, page: u64, run: Run) {
        self.insert(PageRange { start: page, end: page + run.pages }, |i| {
            ((run.host >> PAGE_SHIFT) + i, run.writable)
        });
    }

    fn bind_scattered(&mut self, page: u64, host_page: u64, pages: &[ScatteredPage]) {
        self.clear(PageRange { start: page, end: page + pages.len() as u64 });
        for (page, scattered) in (page..).zip(pages) {
            let host_page = host_page + (scattered.offset() >> PAGE_SHIFT);
            self.pages.insert(page, (host_page, scattered.is_writable()));
        }
    }

    /// Gives the i-th page of the range a value.
    fn insert(&mut self, range: PageRange, value: impl Fn(u64) -> (u64, bool)) {
        let page = range.start;
        self.clear(range);
        for block in page.div_ceil(BLOCK_PAGES)..range.end / BLOCK_PAGES {
            self.large.insert(block, ());
        }
        for i in 0..range.pages() {
            self.pages.insert(page + i, value(i));
        }
    }
}

fn assert_same(table: &PageTable, model: &Model, near: u64, seed: u64, step: u32) {
    assert_eq!(table.resident_pages(), model.pages.len() as u64, "seed {seed:#x} step {step}");
    let mut walk = table.walk();
    for page in near..(near + 4 * BLOCK_PAGES).min(table.end()) {
        let found = walk.lookup(page).ok().map(|t| {
            assert_eq!(t.null, t.host == 0, "page {page:#x}, seed {seed:#x} step {step}");
            (t.host >> PAGE_SHIFT, t.writable)
        });
        assert_eq!(found, model.pages.get(&page).copied(), "page {page:#x}, seed {seed:#x} step {step}");
    }
}

fn exercise(va_bits: u32, seed: u64) {
    let mut random = Random(seed);
    let mut table = PageTable::new(va_bits, UNBOUNDED);
    let mut model = Model::default();
    let bases: Vec<u64> =
        (0..3).map(|_| random.below(table.end() - 4 * BLOCK_PAGES) / BLOCK_PAGES * BLOCK_PAGES).collect();
    for step in 0..300 {
        let base = bases[random.below(3) as usize];
        let start = base + random.below(3 * BLOCK_PAGES);
        let most = [4, 80, 900][random.below(3) as usize];
        let pages = 1 + random.below(most);
        let range = PageRange { start, end: (start + pages).min(base + 4 * BLOCK_PAGES) };
        match random.below(8) {
            0..=2 => {
                let run = Run {
                    host: (1 + random.below(1 << 30)) << PAGE_SHIFT,
                    pages: range.pages(),
                    writable: random.below(2) == 0,
                };
                bind(&table, range.start, run).unwrap();
                model.bind(range.start, run);
            }
            3 => {
                clear(&table, range.start, range.end);
                model.clear(range);
            }
            4 => {
                bind_null(&table, range).unwrap();
                model.insert(range, |_| (0, true));
            }
            5 | 6 => {
                let mut page =
                    || ScatteredPage::new(random.below(1 << 20) << PAGE_SHIFT, random.below(2) == 0);
                let pages: Vec<_> = (0..range.pages()).map(|_| page()).collect();
                bind_scattered(&table, range.start, 7, &pages);
                model.bind_scattered(range.start, 7, &pages);
            }
            _ => table.reclaim(usize::MAX),
        }
        assert_same(&table, &model, base, seed, step);
    }
    clear(&table, 0, table.end());
    table.reclaim(usize::MAX);
    assert_eq!((table.resident_pages(), table.table_bytes()), (0, 0), "seed {seed:#x}");
}

#[test]
fn random_edits_agree_with_model() {
    for va_bits in [25, 39, 48, 57] {
        for round in 0..3 {
            let seed = 0x5eed_0000 + u64::from(va_bits) * 16 + round;
            println!("va_bits {va_bits} seed {seed:#x}");
            exercise(va_bits, seed);
        }
    }
}

#[test]
fn whole_block_becomes_large_leaf() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 512, run(3, 512)).unwrap();
    let found = table.walk().lookup(512 + 5).unwrap();
    assert_eq!(
        found,
        Translation { host: 8 << PAGE_SHIFT, pages: 507, writable: true, null: false, level: 1 }
    );
    assert!(table.table_bytes() < (3 * BLOCKS_BYTES + 1) as u64, "no leaf table under a large leaf");
}

#[test]
fn pages_that_follow_each_other_are_found_as_one_run() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 10, run(100, 5)).unwrap();
    bind(&table, 15, run(105, 4)).unwrap();
    bind(&table, 19, Run { writable: false, ..run(109, 1) }).unwrap();
    bind(&table, 20, run(111, 2)).unwrap();
    bind_null(&table, PageRange { start: 30, end: 33 }).unwrap();
    bind(&table, 511, run(200, 3)).unwrap();
    let found = |page, most| table.walk().lookup_run(page, most).map(|found| found.pages);
    // The right to write ends; so does what was asked for, and the block.
    assert_eq!([found(10, 16), found(12, 16), found(10, 3), found(18, 16)], [Ok(9), Ok(7), Ok(3), Ok(1)]);
    assert_eq!([found(19, 16), found(20, 16), found(30, 16), found(511, 16)], [Ok(1), Ok(2), Ok(1), Ok(1)]);
    assert_eq!(found(22, 16), Err(Miss { level: 0 }));
}

#[test]
fn scattered_pages_of_a_whole_block_are_small() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 512, run(3, 512)).unwrap();
    let pages: Vec<_> = (0..512_u64).map(|i| ScatteredPage::new(i << PAGE_SHIFT, i != 9)).collect();
    bind_scattered(&table, 512, 1, &pages);
    let found = table.walk().lookup(512 + 9).unwrap();
    assert_eq!((found.host, found.writable, found.level), (10 << PAGE_SHIFT, false, 0));
    assert_eq!(table.resident_pages(), 512);
}

#[test]
fn cut_large_leaf_goes_whole() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 512, run(3, 512)).unwrap();
    clear(&table, 600, 601);
    assert_eq!(table.resident_pages(), 0);
    assert_eq!(table.walk().lookup(512), Err(Miss { level: 1 }));
}

#[test]
fn page_over_large_leaf_drops_the_rest() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 512, run(3, 512)).unwrap();
    bind(&table, 700, run(9, 1)).unwrap();
    assert_eq!((table.resident_pages(), host_page(&table, 700), host_page(&table, 701)), (1, Some(9), None));
}

#[test]
fn large_leaf_over_pages_replaces_them() {
    let mut table = PageTable::new(48, UNBOUNDED);
    bind(&table, 700, run(9, 3)).unwrap();
    bind(&table, 512, run(0x1000, 512)).unwrap();
    assert_eq!((table.resident_pages(), host_page(&table, 701)), (512, Some(0x1000 + 189)));
    let before = table.table_bytes();
    table.reclaim(usize::MAX);
    assert_eq!(before - table.table_bytes(), LEAF_BYTES as u64);
    assert_eq!(host_page(&table, 701), Some(0x1000 + 189));
}

#[test]
fn miss_tells_the_level() {
    let table = PageTable::new(57, UNBOUNDED);
    assert_eq!(table.walk().lookup(0), Err(Miss { level: 4 }));
    bind(&table, 0, run(1, 1)).unwrap();
    assert_eq!(table.walk().lookup(1), Err(Miss { level: 0 }));
    assert_eq!(table.walk().lookup(512), Err(Miss { level: 1 }));
    assert_eq!(table.walk().lookup(1 << 18), Err(Miss { level: 2 }));
    assert_eq!(table.walk().lookup(1 << 36), Err(Miss { level: 4 }));
    assert_eq!(table.walk().lookup(u64::MAX), Err(Miss { level: 4 }));
}

#[test]
fn bound_on_tables_refuses_and_abandon_gives_back() {
    let mut table = PageTable::new(48, 3 * DIRECTORY_BYTES + LEAF_BYTES);
    let range = PageRange { start: 511, end: 513 };
    let mut edit = table.edit();
    assert_eq!(edit.prepare(range.start, range.pages()), Err(NoTable::OutOfMemory));
    edit.abandon(range);
    drop(edit);
    assert_eq!(table.resident_pages(), 0);
    table.reclaim(usize::MAX);
    assert_eq!(table.table_bytes(), 0);
    bind(&table, 511, run(1, 1)).unwrap();
    assert_eq!(host_page(&table, 511), Some(1));
}

#[test]
fn failed_prepare_leaves_no_directory_behind() {
    let mut table = PageTable::new(48, 2 * DIRECTORY_BYTES);
    assert_eq!(bind(&table, 0, run(1, 1)), Err(NoTable::OutOfMemory));
    table.reclaim(usize::MAX);
    assert_eq!(table.table_bytes(), 0);
}

#[test]
fn sparse_pages_cost_nothing_once_unbound() {
    let mut table = PageTable::new(57, UNBOUNDED);
    for i in 0..200 {
        let page = i << 20;
        bind(&table, page, run(1, 1)).unwrap();
        clear(&table, page, page + 1);
    }
    assert_eq!(table.emptied_blocks(), 200);
    table.reclaim(usize::MAX);
    assert_eq!((table.table_bytes(), table.emptied_blocks()), (0, 0));
}

#[test]
fn block_is_noted_once() {
    let table = PageTable::new(48, UNBOUNDED);
    for _ in 0..100 {
        bind(&table, 7, run(1, 1)).unwrap();
        clear(&table, 0, 512);
    }
    assert_eq!(table.emptied_blocks(), 1);
}

#[test]
fn reclaim_keeps_what_was_bound_again() {
    let mut table = PageTable::new(48, UNBOUNDED);
    bind(&table, 7, run(1, 1)).unwrap();
    clear(&table, 7, 8);
    bind(&table, 8, run(2, 1)).unwrap();
    table.reclaim(usize::MAX);
    assert_eq!(host_page(&table, 8), Some(2));
    clear(&table, 8, 9);
    table.reclaim(usize::MAX);
    assert_eq!(table.table_bytes(), 0);
}

#[test]
fn clear_hosts_drops_small_and_large() {
    let table = PageTable::new(48, UNBOUNDED);
    bind(&table, 3, run(0x100, 4)).unwrap();
    bind(&table, 9, run(0x900, 4)).unwrap();
    bind(&table, 512, run(0x200, 512)).unwrap();
    bind(&table, 1024, run(0x2000, 512)).unwrap();
    table.edit().clear_hosts(0x100 << PAGE_SHIFT, 0x500 << PAGE_SHIFT);
    let left = [3, 9, 512, 1024].map(|page| host_page(&table, page));
    assert_eq!((table.resident_pages(), left), (516, [None, Some(0x900), None, Some(0x2000)]));
}

#[test]
fn dense_pages_cost_little_more_than_their_words() {
    let table = PageTable::new(48, UNBOUNDED);
    let pages = 1u64 << 18;
    for page in 0..pages {
        bind(&table, page, run(2 * page + 1, 1)).unwrap();
    }
    let bytes_per_page = table.table_bytes() as f64 / pages as f64;
    assert!(bytes_per_page < 8.2, "{bytes_per_page}");
}

#[test]
fn null_pages_are_found_small_and_large() {
    let table = PageTable::new(48, UNBOUNDED);
    bind_null(&table, PageRange { start: 510, end: 1026 }).unwrap();
    assert_eq!(table.resident_pages(), 516);
    let null = |pages, level| Translation { host: 0, pages, writable: true, null: true, level };
    let found = [510, 511, 512, 1000, 1024].map(|page| table.walk().lookup(page).unwrap());
    assert_eq!(found, [null(1, 0), null(1, 0), null(512, 1), null(24, 1), null(1, 0)]);
    assert_eq!(table.walk().lookup(1026), Err(Miss { level: 0 }));
    table.edit().clear_hosts(0, u64::MAX);
    assert_eq!(table.resident_pages(), 516, "they are at no host address");
}

#[test]
fn null_and_bound_pages_replace_each_other() {
    let mut table = PageTable::new(48, UNBOUNDED);
    bind(&table, 510, run(7, 4)).unwrap();
    bind_null(&table, PageRange { start: 511, end: 513 }).unwrap();
    let null = |page| table.walk().lookup(page).unwrap().null;
    assert_eq!([510, 511, 512, 513].map(null), [false, true, true, false]);
    bind(&table, 512, run(0x100, 512)).unwrap();
    bind_null(&table, PageRange { start: 512, end: 1024 }).unwrap();
    bind(&table, 512, run(0x100, 512)).unwrap();
    let found = table.walk().lookup(600).unwrap();
    assert_eq!((found.null, found.host >> PAGE_SHIFT, table.resident_pages()), (false, 0x100 + 88, 514));
    clear(&table, 0, table.end());
    table.reclaim(usize::MAX);
    assert_eq!((table.resident_pages(), table.table_bytes()), (0, 0));
}

#[test]
fn large_null_range_costs_block_tables_and_one_note_each() {
    let mut table = PageTable::new(48, UNBOUNDED);
    // Eight GiB, from within a block to within a block.
    let range = PageRange { start: 100, end: (8 << 18) + 100 };
    bind_null(&table, range).unwrap();
    let expected = 2 * DIRECTORY_BYTES + 9 * BLOCKS_BYTES + 2 * LEAF_BYTES;
    assert_eq!((table.table_bytes(), table.resident_pages()), (expected as u64, 8 << 18));
    clear(&table, 0, table.end());
    // The two leaves may be the ones that stand for their tables.
    assert!(table.emptied_blocks() <= 9 + 2, "{} notes", table.emptied_blocks());
    table.reclaim(usize::MAX);
    assert_eq!(table.table_bytes(), 0);
}

#[test]
fn null_range_that_cannot_fit_makes_no_table() {
    let mut table = PageTable::new(57, 100 * BLOCKS_BYTES);
    assert_eq!(bind_null(&table, PageRange { start: 0, end: table.end() }), Err(NoTable::OutOfMemory));
    assert_eq!(table.table_bytes(), 0);
    // Alone it would fit.
    assert_eq!(bind_null(&table, PageRange { start: 0, end: 100 << 18 }), Err(NoTable::OutOfMemory));
    assert_eq!(table.resident_pages(), 0);
    table.reclaim(usize::MAX);
    assert_eq!(table.table_bytes(), 0);
    bind_null(&table, PageRange { start: 1, end: 90 << 18 }).unwrap();
    assert_eq!(table.resident_pages(), (90 << 18) - 1);
}

/// Readers see, of pages that are rebound all the time, the old or the new translation and nothing else.
#[test]
fn readers_beside_an_editor_see_whole_translations() {
    let table = PageTable::new(48, UNBOUNDED);
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0u64;
            while stop.load(Ordering::Relaxed) == 0 || seen == 0 {
                let mut walk = table.walk();
                for page in 500..1100 {
                    if let Ok(found) = walk.lookup(page) {
                        let host = found.host >> PAGE_SHIFT;
                        assert!(
                            host == page + (1 << 20) || host == page + (1 << 21),
                            "page {page:#x} at {host:#x}"
                        );
                        seen += 1;
                    }
                }
            }
        });
        for i in 0..500u64 {
            let offset = 1 << (20 + i % 2);
            bind(&table, 490, run(490 + offset, 600 + i)).unwrap();
            clear(&table, 520 + i % 7, 900);
        }
        stop.store(1, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

/// Tables that one GPU VM has emptied serve another, with nothing in them.
#[test]
fn emptied_tables_are_used_again_and_are_empty() {
    let spares = Arc::new(Spares::default());
    let table = || PageTable::charged(48, UNBOUNDED, Charge::default(), Arc::clone(&spares));
    let (mut first, second) = (table(), table());
    let page = 0x12_3456;
    let run = Run { host: 0x7000_0000, pages: 3, writable: true };
    let mut edit = first.edit();
    edit.prepare(page, 3).unwrap();
    edit.commit(page, [run]);
    let leaf =
        std::ptr::from_ref(first.lookup_block(page >> FANOUT_BITS).unwrap().leaf.get().unwrap().as_ref());
    edit.clear(PageRange { start: page, end: page + 3 });
    drop(edit);
    first.reclaim(usize::MAX);
    assert_eq!(first.table_bytes(), 0);

    let mut edit = second.edit();
    edit.prepare(page, 1).unwrap();
    drop(edit);
    let again = second.lookup_block(page >> FANOUT_BITS).unwrap().leaf.get().unwrap();
    assert_eq!(std::ptr::from_ref(again.as_ref()), leaf);
    assert!((0..BLOCK_PAGES).all(|slot| second.walk().lookup((page & !(BLOCK_PAGES - 1)) + slot).is_err()));
    assert!(second.table_bytes() > 0);
}

/// However many are emptied, few are kept.
#[test]
fn few_emptied_tables_are_kept() {
    let spares = Arc::new(Spares::default());
    let mut table = PageTable::charged(48, UNBOUNDED, Charge::default(), Arc::clone(&spares));
    let mut edit = table.edit();
    for block in 0..100 {
        edit.prepare(block << FANOUT_BITS, 1).unwrap();
    }
    edit.abandon(PageRange { start: 0, end: 100 << FANOUT_BITS });
    drop(edit);
    table.reclaim(usize::MAX);
    let kept = std::iter::from_fn(|| spares.take_leaf()).count();
    assert!((1..=16).contains(&kept), "{kept}");
}

/// For people; nothing here depends on time.
#[test]
#[ignore = "measures; run it in release with --nocapture"]
fn what_lookups_take() {
    const PAGES: u64 = 1 << 18;
    let (table, mut random) = (PageTable::new(48, UNBOUNDED), Random(1));
    let mut flat = vec![0_u64; PAGES as usize];
    for page in 0..PAGES {
        // No page follows the one before.
        let host = 1 + 2 * random.below(1 << 30);
        bind(&table, page, run(host, 1)).unwrap();
        flat[page as usize] = host << PAGE_SHIFT;
    }
    let order: Vec<u64> = (0..PAGES).map(|_| random.below(PAGES)).collect();
    let through_table = |pages: &mut dyn Iterator<Item = u64>| {
        let (begin, mut walk) = (std::time::Instant::now(), table.walk());
        let sum = pages.fold(0, |sum, page| walk.lookup(page).ok().unwrap().host ^ sum);
        (begin.elapsed().as_nanos() as f64 / PAGES as f64, sum)
    };
    let through_flat = |pages: &mut dyn Iterator<Item = u64>| {
        let begin = std::time::Instant::now();
        let sum = pages.fold(0, |sum, page| flat[page as usize] ^ sum);
        (begin.elapsed().as_nanos() as f64 / PAGES as f64, sum)
    };
    for round in 0..5 {
        let (table_in_order, sum) = through_table(&mut (0..PAGES));
        let (flat_in_order, same) = through_flat(&mut (0..PAGES));
        assert_eq!(sum, same);
        let (table_random, sum) = through_table(&mut order.iter().copied());
        let (flat_random, same) = through_flat(&mut order.iter().copied());
        assert_eq!(sum, same);
        println!(
            "round {round}: ns a lookup: in order {table_in_order:.1}, a flat array {flat_in_order:.1}; at random \
             {table_random:.1}, a flat array {flat_random:.1}"
        );
    }
}
