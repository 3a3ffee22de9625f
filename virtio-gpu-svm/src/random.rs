//! Numbers for random tests: the same ones for the same seed.

/// `SVM_SEED`, or what is always taken; it is printed, so that a failure can be repeated.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("SVM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed);
    println!("seed {seed} (set SVM_SEED to repeat)");
    seed
}

/// Each call draws a number below its argument (xorshift).
pub(crate) fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut x = seed | 1;
    move |below| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    }
}
