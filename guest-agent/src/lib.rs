//! The guest's side of virtio-gpu-svm: an agent that owns the device and serves the guest's processes, and the library
//! that those processes link.

pub mod agent;
pub mod broker;
pub mod client;
pub mod driver;
pub mod keeper;
#[cfg(test)]
#[path = "../tests/agent/lacking.rs"]
mod lacking;
pub mod mapping;
pub mod memory_file;
pub mod message;
pub mod pin;
#[cfg(test)]
#[path = "../tests/agent/pinning.rs"]
mod pinning;
pub mod process_memory;
pub mod socket;
pub mod trust;
mod wait;
