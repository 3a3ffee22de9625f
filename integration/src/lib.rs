//! Drives the whole path in tests and demos: virtual machines, guests' processes, and the comparison of what devices,
//! agents and jobs say about the same faults.
//!
//! * [`frontend`]: virtual machines without QEMU: no CPU at all, or a real vCPU.
//! * [`qemu`]: virtual machines under QEMU; [`provision`] gets it and guest kernels, [`initramfs`] packs a guest's file
//!   system.
//! * [`binaries`]: builds the programs that run on the host and in guests; [`svmd`] starts the daemon.
//! * [`ledger`]: whose fault was it, told three times and compared.
//! * [`random`]: repeatable randomness.

pub mod binaries;
pub mod frontend;
pub mod initramfs;
pub mod ledger;
pub mod provision;
pub mod qemu;
pub mod random;
pub mod svmd;
