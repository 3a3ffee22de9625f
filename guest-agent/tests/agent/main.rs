//! The agent against a device that is played by a thread over real rings in shared memory.
//!
//! * `ring`: the device's side of a split virtqueue.
//! * `mock`: a device that answers commands and raises faults as a test tells it to.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic, and its numbers are small"
)]

mod agent;
mod broker;
mod driver;
mod keeper;
mod mock;
mod ring;
mod virtqueue;
