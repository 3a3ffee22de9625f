use super::*;
use crate::protocol::limit::Limit;
use crate::quota::{Limits, Quota};
use crate::random;
use std::collections::HashMap;

/// The first page beyond 4 TiB, and the last that guest memory may have.
const EDGE: u64 = 1 << 30;
const LAST: u64 = (crate::memory::GUEST_PA_END >> PAGE_SHIFT) - 1;
/// What a leaf with pages is charged.
const NARROW: u64 = 96 + 2048;
const WIDE: u64 = 96 + 4096;

fn range(start: u64, end: u64) -> PageRange {
    PageRange { start, end }
}
fn run(start: u64, pages: u64, gpa_page: u64, as_of: u64) -> Run {
    Run { va: range(start, start + pages), first: Page { gpa_page, readonly: false }, as_of }
}

/// A run that the process may only read.
fn readonly(run: Run) -> Run {
    Run { first: Page { readonly: true, ..run.first }, ..run }
}
/// One whose leaves may take so many bytes.
fn limited(table_bytes: u64) -> AddressSpace {
    let quota = Quota::new(&Limits { table_bytes, ..Limits::DEFAULT });
    AddressSpace::new(quota.charge(Limit::TableBytes))
}
/// Installs by way of a list.
fn install_listed(space: &mut AddressSpace, run: Run) -> Install {
    let mut became = None;
    space.install_all([run].into_iter(), |install, _| {
        became = Some(install);
        ControlFlow::Continue(())
    });
    became.unwrap()
}
fn gpa_of(space: &AddressSpace, page: u64) -> Option<u64> {
    space.lookup(page).map(|page| page.gpa_page)
}
/// What is charged, which must be what is there.
fn charged(space: &AddressSpace) -> u64 {
    assert_eq!(space.bytes(), space.weigh());
    space.bytes()
}
/// Pages from a place on in guest memory: near, about 4 TiB, or far.
fn any_gpa(next: &mut impl FnMut(u64) -> u64) -> u64 {
    match next(4) {
        0 | 1 => next(EDGE - 2000),
        2 => EDGE - 1200 + next(1400),
        _ => EDGE + next(LAST - EDGE - 2000),
    }
}

#[test]
fn translation_older_than_its_leaf_raced() {
    let mut space = AddressSpace::default();
    assert_eq!(space.install(&run(10, 4, 100, 0)), Install::Done);
    let seq = space.invalidate(range(11, 12));
    assert_eq!(space.install(&run(10, 1, 7, seq - 1)), Install::Raced);
    assert_eq!(space.lookup(10), Some(Page { gpa_page: 100, readonly: false }));
    assert_eq!(space.lookup(11), None);
    assert_eq!(space.install(&run(11, 1, 7, seq)), Install::Done);
    assert_eq!(space.known_pages(), 4);
}

#[test]
fn absent_leaf_remembers_its_invalidation() {
    let mut space = AddressSpace::default();
    let seq = space.invalidate(range(0, 1 << 40));
    assert_eq!(space.install(&run(5000, 1, 1, seq - 1)), Install::Raced);
    assert_eq!(space.install(&run(5000, 1, 1, seq)), Install::Done);
}

#[test]
fn emptied_leaf_remembers_its_invalidation() {
    let mut space = AddressSpace::default();
    space.install(&run(0, 8, 1, 0));
    let seq = space.invalidate(range(0, 512));
    assert_eq!(space.install(&run(0, 8, 1, seq - 1)), Install::Raced);
}

#[test]
fn expected_leaf_is_not_starved_by_others() {
    let mut space = AddressSpace::default();
    space.keep_leaf(3);
    space.invalidate(range(1 << 20, 1 << 21));
    assert_eq!(space.install(&run(3, 1, 1, 0)), Install::Done);
}

#[test]
fn run_across_leaves_is_installed_whole_or_not_at_all() {
    let mut space = AddressSpace::default();
    space.install(&run(512, 1, 9, 0));
    space.invalidate(range(512, 513));
    space.keep_leaf(0);
    assert_eq!(space.install(&run(500, 30, 40, 0)), Install::Raced);
    assert_eq!(space.lookup(500), None);
}

#[test]
fn contradiction_needs_an_invalidation_first() {
    let mut space = AddressSpace::default();
    space.install(&run(4, 4, 100, 0));
    assert_eq!(space.install(&run(0, 8, 96, 0)), Install::Done);
    assert_eq!(space.install(&run(4, 1, 99, 0)), Install::Conflict);
    let weaker = Run { first: Page { gpa_page: 100, readonly: true }, ..run(4, 1, 0, 0) };
    assert_eq!(space.install(&weaker), Install::Conflict);
}

#[test]
fn whole_leaf_is_large_until_it_is_cut() {
    let mut space = AddressSpace::default();
    space.install(&run(512, 512, 4096, 0));
    assert_eq!(space.lookup_large(700).map(|p| p.gpa_page), Some(4096));
    space.invalidate(range(600, 601));
    assert_eq!(space.lookup_large(700), None);
    assert_eq!(space.lookup(599).map(|p| p.gpa_page), Some(4096 + 87));
    assert_eq!((space.lookup(600), space.known_pages()), (None, 511));
}

#[test]
fn page_at_4_tib_takes_a_wide_leaf() {
    for (gpa_page, bytes) in [(0, NARROW), (EDGE - 1, NARROW), (EDGE, WIDE), (LAST, WIDE)] {
        for install in
            [AddressSpace::install as fn(&mut _, &_) -> _, |space, run| install_listed(space, *run)]
        {
            let mut space = AddressSpace::default();
            assert_eq!(install(&mut space, &readonly(run(700, 1, gpa_page, 0))), Install::Done);
            assert_eq!(space.lookup(700), Some(Page { gpa_page, readonly: true }));
            assert_eq!(charged(&space), bytes);
            space.invalidate(range(700, 701));
            assert_eq!(charged(&space), 0);
        }
    }
}

#[test]
fn run_across_4_tib_takes_wide_leaves_from_there_on() {
    for (start, gpa_page, pages, bytes) in [
        (600, EDGE - 2, 4, WIDE),
        (500, EDGE - 11, 30, 2 * WIDE),
        (500, EDGE - 12, 30, NARROW + WIDE),
        (500, EDGE - 13, 30, NARROW + WIDE),
        (500, EDGE - 600, 550, 3 * NARROW),
        (500, EDGE - 12 - 512, 1500, 2 * NARROW + 2 * WIDE),
    ] {
        let mut space = AddressSpace::default();
        assert_eq!(space.install(&run(start, pages, gpa_page, 0)), Install::Done);
        for page in start..start + pages {
            assert_eq!(gpa_of(&space, page), Some(gpa_page + page - start));
        }
        assert_eq!(charged(&space), bytes, "{pages} pages from {gpa_page:#x}");
        space.invalidate(range(0, 1 << 20));
        assert_eq!((charged(&space), space.known_pages()), (0, 0));
    }
}

#[test]
fn leaf_with_pages_is_widened_and_keeps_them() {
    for install in [AddressSpace::install as fn(&mut _, &_) -> _, |space, run| install_listed(space, *run)] {
        let mut space = AddressSpace::default();
        space.install(&run(100, 50, EDGE - 50, 0));
        space.install(&readonly(run(200, 1, 7, 0)));
        assert_eq!(charged(&space), NARROW);
        assert_eq!(install(&mut space, &run(150, 1, EDGE, 0)), Install::Done);
        assert_eq!((charged(&space), space.known_pages()), (WIDE, 52));
        for page in 100..151 {
            assert_eq!(space.lookup(page), Some(Page { gpa_page: EDGE - 150 + page, readonly: false }));
        }
        assert_eq!(space.lookup(200), Some(Page { gpa_page: 7, readonly: true }));
        assert_eq!(space.walk().run(100, 512).map(|(_, pages)| pages), Some(51));
        // It stays wide as long as it has a page.
        space.invalidate(range(150, 151));
        assert_eq!((charged(&space), space.known_pages()), (WIDE, 51));
        space.invalidate(range(0, 512));
        assert_eq!(install(&mut space, &run(100, 1, 9, 1 << 20)), Install::Done);
        assert_eq!(charged(&space), NARROW);
    }
}

#[test]
fn refused_widening_leaves_all_as_it_was() {
    let mut space = limited(NARROW + WIDE - 1);
    space.install(&run(100, 2, EDGE - 2, 0));
    space.install(&run(600, 1, 5, 0));
    assert_eq!(charged(&space), 2 * NARROW);
    let far = [run(102, 1, EDGE, 0), run(300, 9, LAST - 8, 0), run(510, 10, EDGE, 0), run(512, 512, EDGE, 0)];
    for run in far {
        let expected = if run.va.start == 512 { Install::Conflict } else { Install::OverQuota };
        assert_eq!(space.install(&run), expected);
        assert_eq!(install_listed(&mut space, run), expected);
        assert_eq!((charged(&space), space.known_pages()), (2 * NARROW, 3));
        let known: Vec<_> = (0..1024).filter_map(|page| Some((page, gpa_of(&space, page)?))).collect();
        assert_eq!(known, [(100, EDGE - 2), (101, EDGE - 1), (600, 5)]);
    }
    // One byte more would do for one of them.
    space.invalidate(range(600, 601));
    assert_eq!(install_listed(&mut space, run(102, 1, EDGE, 0)), Install::Done);
    assert_eq!(charged(&space), WIDE);
}

#[test]
fn large_leaf_is_charged_what_it_takes_when_it_is_cut() {
    for (gpa_page, bytes) in [(EDGE - 512, NARROW), (EDGE - 511, WIDE), (EDGE, WIDE)] {
        let mut space = limited(bytes);
        assert_eq!(space.install(&run(512, 512, gpa_page, 0)), Install::Done);
        assert_eq!(space.lookup_large(600).map(|first| first.gpa_page), Some(gpa_page));
        assert_eq!(charged(&space), bytes);
        space.invalidate(range(600, 601));
        assert_eq!((charged(&space), space.known_pages()), (bytes, 511));
        for page in 512..1024 {
            assert_eq!(gpa_of(&space, page), (page != 600).then_some(gpa_page + page - 512));
        }
        space.forget(|gpa| gpa != gpa_page);
        assert_eq!((charged(&space), space.known_pages()), (bytes, 1));
        space.forget(|_| true);
        assert_eq!((charged(&space), space.known_pages()), (96, 0));
        space.invalidate(range(600, 601));
        assert_eq!(charged(&space), 0);
        let mut space = limited(bytes - 1);
        assert_eq!(space.install(&run(512, 512, gpa_page, 0)), Install::OverQuota);
        assert_eq!(install_listed(&mut space, run(512, 512, gpa_page, 0)), Install::OverQuota);
        assert_eq!(charged(&space), 0);
    }
}

#[test]
fn one_run_in_place_of_a_wide_table_gives_back() {
    for install in [AddressSpace::install as fn(&mut _, &_) -> _, |space, run| install_listed(space, *run)] {
        let mut space = limited(WIDE);
        space.install(&run(512, 3, 1000, 0));
        space.install(&run(700, 1, LAST, 0));
        let as_of = space.invalidate(range(700, 701));
        assert_eq!(charged(&space), WIDE);
        assert_eq!(install(&mut space, &run(512, 512, 1000, as_of)), Install::Done);
        assert_eq!((charged(&space), space.known_pages()), (NARROW, 512));
        // And the other way round: its pages are those of one run, which is cut at once.
        assert_eq!(install(&mut space, &run(600, 1, 1088, as_of)), Install::Done);
        assert_eq!((charged(&space), gpa_of(&space, 1023)), (NARROW, Some(1511)));
    }
}

#[test]
fn numbers_with_the_same_low_bits_are_different_pages() {
    for (known, other) in [(3, EDGE + 3), (EDGE + 3, 3), (3, 2 * EDGE + 3), (EDGE - 1, LAST)] {
        let mut space = AddressSpace::default();
        space.install(&run(9, 1, known, 0));
        for run in [run(9, 1, other, 0), readonly(run(9, 1, other, 0)), run(8, 3, other - 1, 0)] {
            assert_eq!(space.install(&run), Install::Conflict);
            assert_eq!(install_listed(&mut space, run), Install::Conflict);
        }
        assert_eq!((gpa_of(&space, 9), space.known_pages()), (Some(known), 1));
    }
    // Nor does page 0 follow the last one below 4 TiB, whose entry and 1 are a page 0 that is only read.
    let mut space = AddressSpace::default();
    space.install(&run(9, 1, EDGE - 1, 0));
    space.install(&readonly(run(10, 1, 0, 0)));
    assert_eq!(space.walk().run(9, 2).map(|(_, pages)| pages), Some(1));
}

#[test]
fn small_pages_are_read_until_nothing_is_made_of_one() {
    for base in [40, EDGE + 40] {
        let mut space = AddressSpace::default();
        space.install(&run(500, 8, base, 0));
        space.install(&run(509, 3, base + 9, 0));
        space.install(&run(512, 512, base + 512, 0));
        let read = |page, most: usize, below: u64| {
            let mut to = vec![0; most];
            let make = |page: Page| (page.gpa_page < base + below).then_some(page.gpa_page);
            let count = space.walk().small(page, &mut to, make);
            assert!(
                to.iter()
                    .enumerate()
                    .all(|(n, gpa)| *gpa == if n < count { base + page - 500 + n as u64 } else { 0 })
            );
            count
        };
        assert_eq!((read(500, 100, 100), read(500, 5, 100), read(502, 100, 5)), (8, 5, 3));
        assert_eq!(
            (read(508, 9, 100), read(509, 9, 100), read(600, 9, 1000), read(3000, 9, 9)),
            (0, 3, 0, 0)
        );
    }
}

#[test]
fn agrees_with_a_page_map() {
    let seed = random::seed();
    let mut next = random::numbers(seed);
    let quota = 6 * WIDE;
    let (mut space, mut model) = (limited(quota), HashMap::new());
    let (mut over, mut widest) = (0, 0);
    for _ in 0..3000 {
        let (start, pages) = (next(4000), [1 + next(20), 1 + next(1100)][(next(3) / 2) as usize]);
        match next(3) {
            0 => {
                space.invalidate(range(start, start + pages));
                model.retain(|page, _| !(start..start + pages).contains(page));
            }
            1 if next(20) == 0 => {
                let odd = next(2);
                space.forget(|gpa| gpa % 2 == odd);
                model.retain(|_, gpa| *gpa % 2 != odd);
            }
            _ => {
                let gpa = any_gpa(&mut next);
                let run = run(start, pages, gpa, space.seq());
                let before = space.bytes();
                match if next(2) == 0 { space.install(&run) } else { install_listed(&mut space, run) } {
                    Install::Conflict => {
                        assert!((start..start + pages).any(|p| model.contains_key(&p)));
                        assert_eq!(space.bytes(), before);
                    }
                    Install::OverQuota => {
                        over += 1;
                        assert_eq!(space.bytes(), before);
                        assert!(before + WIDE * (2 + pages / 512) > quota);
                    }
                    Install::Done => {
                        assert_eq!(space.install(&run), Install::Done);
                        model.extend((0..pages).map(|n| (start + n, gpa + n)));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(space.known_pages(), model.len() as u64);
        widest = widest.max(charged(&space));
        let mut walk = space.walk();
        for _ in 0..20 {
            let (page, most) = (next(5200), 1 + next(40));
            assert_eq!(space.lookup(page).map(|p| p.gpa_page), model.get(&page).copied());
            let leaf_end = (page | (LEAF_PAGES - 1)) + 1;
            let pages = page..leaf_end.min(page + most);
            let run = walk.run(page, most).map(|(first, run)| (first.gpa_page, run));
            let follows =
                |first: u64| pages.clone().zip(first..).take_while(|(p, gpa)| model.get(p) == Some(gpa));
            let expected = model.get(&page).map(|first| (*first, follows(*first).count() as u64));
            assert_eq!(run, expected, "page {page} of at most {most}");
            let unknown = pages.take_while(|p| !model.contains_key(p)).count() as u64;
            assert_eq!(walk.gap(page, most), unknown, "page {page} of at most {most}");
        }
    }
    assert!(over > 20 && widest > quota - WIDE, "over quota {over} times, at most {widest} bytes");
    space.invalidate(range(0, 6000));
    assert_eq!(charged(&space), 0);
}

/// Lists of short runs, some stale, weaker or contradictory, by [`AddressSpace::install_all`] and one by one.
#[test]
fn runs_in_a_row_become_what_they_become_one_by_one() {
    let seed = random::seed();
    let mut next = random::numbers(seed);
    let (mut all, mut single) = (AddressSpace::default(), AddressSpace::default());
    let mut seen = [0_u32; 3];
    for _ in 0..2000 {
        let seq = all.seq();
        let mut at = next(1500);
        let mut runs = Vec::new();
        for _ in 0..next(40) {
            let (start, pages) = (at, [1, 1, 1, 3, 700][(next(5) % 5) as usize]);
            at = start + pages * next(2) + next(3);
            let odd = next(30) == 0;
            // In the second leaf 4 TiB are passed.
            let first = Page { gpa_page: EDGE - 700 + start + u64::from(odd), readonly: next(3) == 0 };
            let as_of = seq.saturating_sub(u64::from(next(20) == 0));
            runs.push(Run { va: range(start, start + pages), first, as_of });
        }
        let mut became = Vec::new();
        all.install_all(runs.iter().copied(), |install, count| {
            became.extend((0..count).map(|_| install));
            ControlFlow::Continue(())
        });
        let one_by_one: Vec<_> = runs.iter().map(|run| single.install(run)).collect();
        assert_eq!(became, one_by_one);
        for install in became {
            let kind =
                [Install::Done, Install::Raced, Install::Conflict].iter().position(|kind| *kind == install);
            seen[kind.unwrap()] += 1;
        }
        let gone = next(2200);
        let gone = range(gone, gone + 1 + next(60));
        assert_eq!(all.invalidate(gone), single.invalidate(gone));
        assert_eq!(
            (all.known_pages(), all.bytes(), all.weigh()),
            (single.known_pages(), single.bytes(), single.bytes())
        );
        for page in 0..2300 {
            assert_eq!(all.lookup(page), single.lookup(page), "page {page}");
        }
    }
    assert!(seen.iter().all(|times| *times > 100), "{seen:?}");
}

#[test]
fn runs_behind_one_that_ends_the_list_are_left() {
    let mut space = AddressSpace::default();
    space.install(&run(5, 1, 99, 0));
    let mut heard = Vec::new();
    space.install_all(
        [run(4, 1, 10, 0), run(5, 1, 11, 0), run(6, 1, 12, 0)].into_iter(),
        |install, count| {
            heard.push((install, count));
            if install == Install::Conflict { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    );
    assert_eq!(heard, [(Install::Done, 1), (Install::Conflict, 1)]);
    assert_eq!((space.lookup(4).is_some(), space.lookup(6)), (true, None));
}
