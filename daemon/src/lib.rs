//! svmd as a library: everything but the command line, so that tests can run a daemon inside their process.

pub mod control;
pub mod registry;
