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
#[expect(dead_code, reason = "shared with other tests, which need huge pages")]
#[path = "../../../tests/agent/lacking.rs"]
mod lacking;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/mock.rs"]
mod mock;
#[path = "../../../tests/agent/pages.rs"]
mod pages;
mod remedies;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/ring.rs"]
mod ring;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/world.rs"]
mod world;
