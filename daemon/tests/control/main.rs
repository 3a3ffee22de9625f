//! The control socket from outside: real sockets, a real registry, and svmctl as a process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

mod contexts;
mod device;
mod events;
mod harness;
mod methods;
mod process;
mod protocol;
mod svmctl;
