//! Windows for processes of many shapes on devices of few address bits.

use super::*;

const GIB: u64 = 1 << 30;
/// Where Linux puts a program, and where its memory.
const PROGRAM: u64 = 0x5555_5540_0000;
const MEMORY: u64 = 0x7fff_f7c0_0000;

/// What must hold of any plan: what is used is shown, nothing twice, all of it within the device's space and beyond its
/// first leaf, each address at its place in a leaf.
fn check(windows: &[Window], used: &[Range<u64>], next: u64, space: u64) {
    let of = |cpu: u64| windows.iter().find(|w| (w.cpu..w.cpu + w.len).contains(&cpu));
    for address in used.iter().flat_map(|range| [range.start, range.end - 1]).chain([next]) {
        assert!(of(address).is_some(), "{address:#x} is in none of {windows:x?}");
    }
    for window in windows {
        assert!(window.gpu >= LEAF_SIZE && window.gpu + window.len <= space, "{window:x?}");
        assert!((window.cpu | window.gpu | window.len).is_multiple_of(LEAF_SIZE) && window.len > 0);
    }
    for pair in windows.windows(2) {
        assert!(pair[0].cpu + pair[0].len <= pair[1].cpu, "{windows:x?}");
        assert!(pair[0].gpu + pair[0].len <= pair[1].gpu, "{windows:x?}");
    }
}

#[test]
fn program_and_memory_far_apart_have_windows_of_their_own() {
    let used = [PROGRAM..PROGRAM + 0x3000, MEMORY..MEMORY + 0x10_0000, MEMORY + GIB..MEMORY + GIB + 0x1000];
    for bits in [32, 36, 40, 46] {
        let windows = plan(&used, MEMORY - 0x1000, 1 << bits).unwrap();
        check(&windows, &used, MEMORY - 0x1000, 1 << bits);
        assert_eq!(windows.len(), 2, "{bits} bits: {windows:x?}");
        // Room for what comes: a quarter of the space at least.
        assert!(windows[1].cpu <= MEMORY - (1 << bits) / 4, "{bits} bits: {windows:x?}");
    }
}

#[test]
fn what_is_close_shares_a_window_as_far_as_half_the_space_goes() {
    let used = [MEMORY..MEMORY + 0x1000, MEMORY + 3 * GIB..MEMORY + 3 * GIB + 0x1000];
    assert_eq!(plan(&used, MEMORY, 1 << 33).unwrap().len(), 1);
    assert_eq!(plan(&used, MEMORY, 1 << 32).unwrap().len(), 2);
}

#[test]
fn what_does_not_fit_has_no_plan() {
    let used: Vec<_> = std::iter::once(MEMORY..MEMORY + GIB).collect();
    assert_eq!(plan(&used, MEMORY, GIB), None);
    assert_eq!(plan(&used, MEMORY - 0x1000, GIB + 2 * LEAF_SIZE).map(|windows| windows.len()), Some(1));
    assert_eq!(plan(&used, MEMORY - 0x1000, GIB + LEAF_SIZE), None, "the next arena needs room");
}

#[test]
fn any_process_gets_windows_that_hold_it_or_none() {
    let seed = std::env::var("SVM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).unwrap();
        u64::from_le_bytes(seed)
    });
    println!("SVM_SEED={seed}");
    let mut state = seed | 1;
    let mut below = |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    let mut fitted = 0;
    for _ in 0..2000 {
        let bits = 22 + u32::try_from(below(25)).unwrap();
        let mut used: Vec<Range<u64>> = Vec::new();
        let mut at = (1 + below(1 << 20)) << 12;
        for _ in 0..below(12) {
            let (gap_bits, len_bits) = (below(34), below(12));
            at += below(1 << gap_bits) << 12;
            let len = (1 + below(1 << len_bits)) << 12;
            if at + len >= 1 << 47 {
                break;
            }
            used.push(at..at + len);
            at += len;
        }
        let next = (1 + below((1 << 35) - 1)) << 12;
        let leaves = |range: &Range<u64>| range.end.div_ceil(LEAF_SIZE) - range.start / LEAF_SIZE;
        let bound = LEAF_SIZE * (2 + used.iter().map(leaves).sum::<u64>());
        match plan(&used, next, 1 << bits) {
            Some(windows) => {
                fitted += 1;
                check(&windows, &used, next, 1 << bits);
            }
            None => assert!(bound > 1 << bits, "{used:x?} and {next:#x} fit {bits} bits"),
        }
    }
    assert!(fitted > 200, "only {fitted} fitted");
}

#[test]
fn shared_writable_mappings_are_found_in_maps() {
    let maps = "\
555555554000-555555556000 r--p 00000000 08:01 17 /usr/bin/program
555555558000-555555559000 rw-s 00000000 00:01 99 /memfd:svm-arena (deleted)
555555559000-55555557a000 rw-p 00000000 00:00 0 [heap]
7ffff7c00000-7ffff7d00000 rw-s 00000000 00:01 98 /memfd:svm-arena (deleted)
7ffff7d00000-7ffff7e00000 r--s 00000000 00:01 98 /a file
nonsense
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
";
    assert_eq!(parse_maps(maps), [0x5555_5555_8000..0x5555_5555_9000, 0x7fff_f7c0_0000..0x7fff_f7d0_0000]);
}
