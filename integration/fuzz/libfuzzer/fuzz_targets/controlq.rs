//! See `fuzz::controlq`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::controlq::run(bytes));
