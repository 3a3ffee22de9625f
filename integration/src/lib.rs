//! Frontends, guests and stories that drive the whole path from a guest process to a device and back.

pub mod binaries;
pub mod initramfs;
pub mod provision;
pub mod qemu;
