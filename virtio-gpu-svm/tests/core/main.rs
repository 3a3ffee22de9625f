//! The core on a device that does nothing by itself: every step of a fault, of an end and of a mapping is made by hand.
#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a failed step is a failed test")]

mod backlog;
mod brief;
mod deadlines;
mod ends;
mod faults;
mod fences;
mod inbox;
mod kinds;
mod limits;
mod mirrors;
mod mock;
mod named;
mod populate;
mod refusals;
