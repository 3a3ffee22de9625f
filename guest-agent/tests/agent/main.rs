//! The agent against a device that is played by a thread over real rings in shared memory.
//!
//! * `ring`: the device's side of a split virtqueue.
//! * `mock`: a device that answers commands and raises faults as a test tells it to.
//! * `pages`: memory of processes, as such a device has it.
//! * `world`: devices of it whose engines execute packets.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic, and its numbers are small"
)]

mod agent;
mod broker;
mod client;
mod command;
mod driver;
mod exec;
mod hostile;
mod hostile_files;
mod hostile_lives;
mod hostile_walk;
mod keeper;
#[expect(dead_code, reason = "shared with other tests, which need huge pages")]
mod lacking;
mod line;
mod mock;
mod pages;
mod pinning;
mod ring;
mod serving;
mod table;
mod trusted;
mod unseen;
mod virtqueue;
mod world;
