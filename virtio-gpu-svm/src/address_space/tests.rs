use super::*;
use std::collections::HashMap;

fn range(start: u64, end: u64) -> PageRange {
    PageRange { start, end }
}
fn run(start: u64, pages: u64, gpa_page: u64, as_of: u64) -> Run {
    Run { va: range(start, start + pages), first: Page { gpa_page, readonly: false }, as_of }
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
fn agrees_with_a_page_map() {
    let seed = std::env::var("SVM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_u64);
    println!("seed {seed} (set SVM_SEED to repeat)");
    let mut x = seed | 1;
    let mut next = move |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    };
    let (mut space, mut model) = (AddressSpace::default(), HashMap::new());
    for _ in 0..3000 {
        let (start, pages) = (next(4000), 1 + next(1100));
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
                let gpa = next(1 << 30);
                if space.install(&run(start, pages, gpa, space.seq())) == Install::Conflict {
                    assert!((start..start + pages).any(|p| model.contains_key(&p)));
                    continue;
                }
                let as_of = space.seq();
                assert_eq!(space.install(&run(start, pages, gpa, as_of)), Install::Done);
                model.extend((0..pages).map(|n| (start + n, gpa + n)));
            }
        }
        assert_eq!(space.known_pages(), model.len() as u64);
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
}

/// Lists of short runs, some stale, weaker or contradictory, by [`AddressSpace::install_all`] and one by one.
#[test]
fn runs_in_a_row_become_what_they_become_one_by_one() {
    let seed = std::env::var("SVM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_u64);
    println!("seed {seed} (set SVM_SEED to repeat)");
    let mut x = seed | 1;
    let mut next = move |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    };
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
            let first = Page { gpa_page: 10_000 + start + u64::from(odd), readonly: next(3) == 0 };
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
