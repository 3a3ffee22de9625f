//! The guest's side of virtio-gpu-svm: an agent that owns the device and serves the guest's processes, and the library
//! that those processes link.

pub mod driver;
pub mod mapping;
