//! The control socket from outside: real sockets, a real registry, and svmctl as a process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]
#![expect(clippy::cast_possible_truncation, reason = "small constants of the tests")]
#![expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]

mod contexts;
mod data_plane;
mod device;
mod events;
mod greedy;
#[path = "../failing_calls/guest.rs"]
mod guest;
mod harness;
mod limits;
mod methods;
mod process;
mod protocol;
mod rights;
mod sockets;
mod svmctl;
#[path = "../session/vmm.rs"]
#[expect(dead_code, reason = "shared with the session tests, which use more of it")]
mod vmm;
