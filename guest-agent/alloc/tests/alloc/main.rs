//! C programs with the library, at a real broker whose device is played ([`mock`]).
//!
//! What a GPU would see is looked at as a device does it: a fault at a CPU address, the agent's answer, and the bytes of
//! the page that it names ([`world::Gpu`]). So an address is right only if the agent knows it, for this process, now.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic, and its numbers are small"
)]

mod absent;
mod asking;
mod family;
mod forks;
#[path = "../../../tests/agent/lacking.rs"]
mod lacking;
mod maps;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/mock.rs"]
mod mock;
#[path = "../../../tests/agent/pages.rs"]
mod pages;
#[path = "../../../tests/agent/pinning.rs"]
mod pinning;
mod places;
mod plugins;
mod program;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/ring.rs"]
mod ring;
mod shared;
mod signals;
mod stress;
mod trusted;
mod world;
