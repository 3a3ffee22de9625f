//! Virtual machines without QEMU, for tests, the demo and benches. The guest side (rings, driver, agent, processes) is
//! the product's own code; what stands here is what a VMM does between a guest and the daemon.
//!
//! * [`ram`]: guest memory, a sealed memfd that the daemon maps too.
//! * [`hotplug`]: memory modules that come and go while the guest runs.
//! * [`vhost_user`]: the frontend's half of vhost-user, behaving as one VMM or another ([`Profile`]).
//! * [`vmm`]: both together, with one of two wirings of doorbells and interrupts.
//! * [`inproc`]: the wiring of a guest without a CPU: this process is the guest.
//! * [`kvm`]: the wiring with a real vCPU between driver and doorbell, and between interrupt and driver.
//! * [`raw`]: rings written by hand, for inputs that no driver makes.

pub mod hotplug;
pub mod inproc;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod ram;
pub mod raw;
pub mod vhost_user;
pub mod vmm;

/// Which VMM's habits a frontend has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// QEMU's `vhost-user-test-device-pci`: every feature bit reaches the driver; each config access fetches the
    /// whole config space.
    Qemu,
    /// cloud-hypervisor's `--generic-vhost-user`: the device's own feature bits 0..23 never reach the driver, config
    /// accesses go through with the offset and size that the guest used, the connection may be dropped and made anew.
    CloudHypervisor,
}

/// Where the driver has put a ring, in guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptors in it.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}
