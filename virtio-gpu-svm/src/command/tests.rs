use super::*;

fn run(va: u64, gpa: u64, pages: u32, flags: u32, as_of: u64) -> PageRun {
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), flags: flags.into(), as_of: as_of.into() }
}

/// Lists of runs at, about and beyond what is allowed, together and one by one.
#[test]
fn bounds_are_of_lists_without_a_bad_run() {
    let seed = std::env::var("SVM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_u64);
    println!("seed {seed} (set SVM_SEED to repeat)");
    let mut x = seed | 1;
    let mut next = move |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    };
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
