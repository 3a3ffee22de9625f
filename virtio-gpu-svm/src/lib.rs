//! virtio-gpu with shared virtual memory: a GPU device for virtual machines in which every guest process has its own
//! GPU VM per host device, so that every device fault has exactly one owner.
//!
//! The library has no sockets and no threads of its own; `svmd` gives it both. PROTOCOL.md is its normative text.
//!
//! A request goes down this list, a fault comes up from the bottom and leaves by [`fault`]:
//! bytes -> [`command`] -> [`context`] -> [`address_space`] (the A side), [`gpu_vm`] (the C side) -> [`page_table`] ->
//! [`device`].

#![cfg_attr(not(test), deny(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

pub mod protocol;

#[cfg(feature = "device")]
pub mod addr;
#[cfg(feature = "device")]
pub mod address_space;
#[cfg(feature = "device")]
mod backlog;
#[cfg(feature = "device")]
pub mod busy_poll;
#[cfg(feature = "device")]
pub mod clock;
#[cfg(feature = "device")]
pub mod command;
#[cfg(feature = "device")]
pub mod context;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
pub mod event;
#[cfg(feature = "device")]
pub mod fault;
#[cfg(feature = "device")]
pub mod few;
#[cfg(feature = "device")]
pub mod gpu_vm;
#[cfg(feature = "device")]
pub mod guest;
#[cfg(feature = "device")]
pub mod host;
#[cfg(feature = "device")]
pub mod info;
#[cfg(feature = "device")]
pub mod invalidation;
#[cfg(feature = "device")]
pub mod memory;
#[cfg(feature = "device")]
mod numbered;
#[cfg(feature = "device")]
pub mod page_table;
#[cfg(feature = "device")]
pub mod population;
#[cfg(feature = "device")]
pub mod quota;
#[cfg(all(test, feature = "device"))]
mod random;
#[cfg(feature = "device")]
pub mod resource;
#[cfg(feature = "device")]
mod seeded;
#[cfg(feature = "device")]
mod seldom;
#[cfg(feature = "device")]
mod sleepers;
#[cfg(feature = "device")]
mod sync;
#[cfg(feature = "device")]
pub mod timeline;
#[cfg(feature = "device")]
mod turns;
