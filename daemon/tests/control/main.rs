//! The control socket from outside: real sockets, a real registry, and svmctl as a process.

mod events;
mod harness;
mod methods;
mod protocol;
mod svmctl;
