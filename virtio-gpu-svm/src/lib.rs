//! virtio-gpu with shared virtual memory: a GPU device for virtual machines in which every guest process has its own
//! GPU VM per host device, so that every device fault has exactly one owner.
//!
//! The library has no sockets and no threads of its own; `svmd` gives it both. PROTOCOL.md is its normative text.
//!
//! A request goes down this list, a fault comes up from the bottom and leaves by [`fault`]:
//! bytes -> [`command`] -> [`context`] -> [`address_space`] (the A side), [`gpu_vm`] (the C side) -> [`page_table`] ->
//! [`device`].

pub mod protocol;

#[cfg(feature = "device")]
pub mod addr;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
pub mod guest;
#[cfg(feature = "device")]
pub mod host;
#[cfg(feature = "device")]
pub mod info;
#[cfg(feature = "device")]
pub mod memory;
#[cfg(feature = "device")]
pub mod page_table;
