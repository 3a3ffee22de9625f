//! What fuzzers run: one plain function a target, which libFuzzer (`libfuzzer/`, a workspace of its own) and
//! `cargo test` (the saved inputs of `corpus/`) both call. A function returns or panics; what it holds the code to
//! stands in its module. `daemon/DESIGN.md` says how they are run, and what was.
//!
//! * [`command`]: any bytes as one command, on devices whose engines run.
//! * [`controlq`]: a guest's whole life on devices that the input plays: commands, faults, answers, checkpoints.
//! * [`control_socket`]: any bytes on the operator's socket.
//! * [`vhost_user`]: messages and descriptors of a VMM, good and bad, and a guest behind it, on devices whose engines run.
//! * [`pack`]: many inputs in one file.

pub mod command;
pub mod control_socket;
pub mod controlq;
mod engines;
mod input;
pub mod pack;
mod puppet;
mod script;
mod shadow;
pub mod vhost_user;

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// A target by its name.
pub fn target(name: &str) -> Option<fn(&[u8])> {
    match name {
        "command" => Some(command::run),
        "controlq" => Some(controlq::run),
        "control_socket" => Some(control_socket::run),
        "vhost_user" => Some(vhost_user::run),
        _ => None,
    }
}

/// What the inputs of a target share, for one input at a time.
fn exclusive<T>(shared: &'static LazyLock<Mutex<T>>) -> MutexGuard<'static, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The value, where a scene cannot do without it.
fn must<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the scene cannot be set: {error:?}"),
    }
}
