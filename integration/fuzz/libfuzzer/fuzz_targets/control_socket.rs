//! See `fuzz::control_socket`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::control_socket::run(bytes));
