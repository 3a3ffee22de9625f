//! svmd as a library: everything but the command line, so that tests can run a daemon inside their process.
//!
//! [`registry`] owns the guests, whose [`socket`]s it makes; on a thread for each, `attendant` waits for a VMM and
//! [`session`] serves it. Within a session
//! [`ring`] and [`queue`] turn virtqueues into commands and look for the next of them before they sleep, [`eventq`] turns
//! records into used buffers, [`guest_memory`] decides which memory is accepted, [`sigbus`] what happens when it goes away
//! all the same, and [`fuse`] ends the session when something in it cannot go on; [`limits`] and [`log_budget`] say how much
//! of all this one guest may cause, and [`panic_log`] what is told of panics.
//! [`devices`] are what it is all about, `hostmmu` one kind of them; [`housekeeper`] does what no guest's thread is there
//! for; [`control`] is the door for whoever operates all this, and [`sandbox`] what the process gives up before any of it.

mod attendant;
pub mod control;
pub mod devices;
pub mod event_file;
pub mod eventq;
pub mod exit;
pub mod fuse;
pub mod guest_memory;
#[cfg(target_arch = "x86_64")]
pub mod hostmmu;
pub mod housekeeper;
pub mod limits;
pub mod log_budget;
pub mod panic_log;
pub mod queue;
mod rate;
pub mod registry;
pub mod relay;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod sigbus;
pub mod socket;
