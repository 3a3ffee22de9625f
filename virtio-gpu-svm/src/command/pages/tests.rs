use super::*;
use crate::memory::GUEST_PA_END;
use crate::random;
use zerocopy::IntoBytes;

fn run(va: u64, gpa: u64, pages: u32, flags: u32, as_of: u64) -> PageRun {
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), flags: flags.into(), as_of: as_of.into() }
}

/// Lists of runs at, about and beyond what is allowed, together and one by one.
#[test]
fn bounds_are_of_lists_without_a_bad_run() {
    let seed = random::seed();
    let mut next = random::numbers(seed);
    let most = u32::try_from(MAX_RUN_PAGES).unwrap();
    let places = [0, PAGE_SIZE, 1 << 42, GUEST_PA_END, GUEST_VA_END, 1 << 63, 0];
    let (mut good, mut bad, mut far) = (0, 0, 0);
    for _ in 0..20_000 {
        let mut runs = Vec::new();
        for _ in 0..1 + next(4) {
            let mut place = || {
                let odd = if next(40) == 0 { next(PAGE_SIZE) } else { 0 };
                let at = places[(next(2) * next(7) % 7) as usize];
                at.wrapping_add((next(6) * PAGE_SIZE).wrapping_sub(3 * PAGE_SIZE * next(2))).wrapping_add(odd)
            };
            let (va, gpa) = (place(), place());
            let pages = [1, 1, 2, 3, 0, most, most / 2, u32::MAX][(next(2) * next(8) % 8) as usize];
            let flags =
                if next(40) == 0 { RUN_READONLY << 1 } else { RUN_READONLY * u32::from(next(2) == 0) };
            runs.push(run(va, gpa, pages, flags, next(9)));
        }
        let bounds = bounds_of_good(&runs);
        let checked = checked_runs(&runs);
        // Guest-physical addresses that no memory has are left to who looks at each run.
        let is_far = runs.iter().any(|run| run.gpa.get() >= GUEST_VA_END);
        match checked {
            Err(_) => assert!(bounds.is_none(), "{runs:?}"),
            Ok(_) => assert_eq!(bounds.is_none(), is_far, "{runs:?}"),
        }
        if let Some(Bounds { gpa_pages, newest }) = bounds {
            let pages =
                |run: &PageRun| (run.gpa.get() >> 12, (run.gpa.get() >> 12) + u64::from(run.pages.get()));
            assert_eq!(runs.iter().map(|run| pages(run).0).min(), Some(gpa_pages.start));
            assert_eq!(runs.iter().map(|run| pages(run).1).max(), Some(gpa_pages.end));
            assert_eq!(runs.iter().map(|run| run.as_of.get()).max(), Some(newest));
            good += 1;
        } else if checked_runs(&runs).is_ok() {
            far += 1;
        } else {
            bad += 1;
        }
    }
    assert!(good > 500 && bad > 500 && far > 100, "{good} good, {bad} bad, {far} far out");
}

fn list(va: u64, as_of: u64, entries: &[u64]) -> Vec<u8> {
    let head = PageList { va: va.into(), as_of: as_of.into() };
    let entries: Vec<U64> = entries.iter().map(|entry| U64::new(*entry)).collect();
    [head.as_bytes(), entries.as_bytes()].concat()
}

/// Of a run of one page: it, where it is, whether it is read-only, and its sequence.
type Parts = (u64, u64, bool, u64);

/// What is wrong with a list, or its runs and what they are within.
fn listed(bytes: &[u8], count: u16) -> Result<(Vec<Parts>, Bounds)> {
    let Pages::List(head, entries) = Pages::read(bytes, count.into(), SUPPLY_LIST.into())? else {
        panic!("the flag says that it is a list")
    };
    let Runs { each, bounds } = checked_list(head, entries)?;
    let of = |run: Run| {
        assert_eq!(run.va.pages(), 1);
        (run.va.start, run.first.gpa_page, run.first.readonly, run.as_of)
    };
    Ok((each.map(of).collect(), bounds.unwrap()))
}

#[test]
fn list_is_runs_of_one_page() {
    let far = u64::MAX << PAGE_SHIFT;
    let (runs, bounds) = listed(&list(5 << 12, 9, &[7 << 12, 3 << 12 | 1, far]), 3).unwrap();
    assert_eq!(runs, [(5, 7, false, 9), (6, 3, true, 9), (7, far >> 12, false, 9)]);
    assert_eq!((bounds.gpa_pages.start, bounds.gpa_pages.end, bounds.newest), (3, (far >> 12) + 1, 9));
}

#[test]
fn list_that_leaves_the_space_or_has_odd_entries_is_refused() {
    let last = GUEST_VA_END - PAGE_SIZE;
    assert!(listed(&list(last, 0, &[0]), 1).is_ok());
    for (va, entries) in [(last, vec![0, 0]), (1, vec![0]), (u64::MAX << 12, vec![0, 0]), (0, vec![])] {
        let count = u16::try_from(entries.len()).unwrap();
        let error = listed(&list(va, 0, &entries), count).unwrap_err();
        assert!(matches!(error, Error::At { index: 0, .. }), "{va:#x}: {error}");
    }
    for bit in 1..12 {
        let error = listed(&list(0, 0, &[1, 1 << 12, 1 << bit]), 3).unwrap_err();
        assert!(matches!(error, Error::At { index: 2, .. }), "{bit}: {error}");
    }
}

#[test]
fn list_is_as_long_as_it_says() {
    let bytes = list(0, 0, &[0, 0]);
    for (length, count) in [(32, 1), (32, 3), (31, 2), (24, 2), (16, 2), (15, 0), (0, 0)] {
        assert!(matches!(listed(&bytes[..length], count), Err(Error::Length)), "{length} bytes, {count}");
    }
    assert!(matches!(listed(&bytes, 4097), Err(Error::Count)));
    for flags in [3, 0x8001] {
        assert!(Pages::read(&bytes, 2.into(), flags.into()).is_err());
    }
}
