//! `libgpusvm` as programs in C and C++ see it: the header, the library, the examples, and errors on purpose.
//!
//! The programs run with libsvm_alloc.so at a real broker; engines that the test plays execute their packets on the pages
//! that the agent answers ([`world`]).

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic, and its numbers are small"
)]

mod build;
mod errors;
mod examples;
mod header;
mod install;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/mock.rs"]
mod mock;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/ring.rs"]
mod ring;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/world.rs"]
mod world;

/// Says that a test is not run: not by `eprintln`, which the harness keeps to itself. Where CI is set, that fails.
fn lacking(what: &str) {
    use std::io::Write;
    std::io::stderr().write_all(format!("not tested: {what}\n").as_bytes()).unwrap();
    assert!(std::env::var_os("CI").is_none(), "{what}, and CI is set");
}
