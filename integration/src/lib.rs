//! Drives the whole path in tests and demos: virtual machines, guests' processes, and the comparison of what devices,
//! agents and jobs say about the same faults.
//!
//! * [`frontend`]: virtual machines without QEMU: no CPU at all, or a real vCPU.
//! * [`qemu`]: virtual machines under QEMU; [`provision`] gets it and guest kernels, [`initramfs`] packs a guest's file
//!   system.
//! * [`binaries`]: builds the programs that run on the host and in guests; [`svmd`] starts the daemon.
//! * [`guest`]: guests whose agent and processes run in this process.
//! * [`ledger`]: whose fault was it, told three times and compared.
//! * [`story`]: the case that the project exists for, on any kind of guest; [`demo`] is its command.
//! * [`storm`]: many processes of many guests, all at the same addresses, fault at once.
//! * [`mod@bench`]: everything that is claimed about speed, beside its references.
//! * [`fairness`]: what a guest's operations cost beside hostile guests.
//! * [`costs`]: what a guest's programs pay, as `cargo bench-guest` reports it.
//! * [`instructions`]: what the parts of a fault cost, in instructions.
//! * [`library`]: the library without rings or daemon, for what is measured of it alone; [`wire`]: commands as bytes.
//! * [`random`]: repeatable randomness.

pub mod bench;
pub mod binaries;
pub mod costs;
pub mod demo;
pub mod fairness;
pub mod frontend;
pub mod guest;
pub mod initramfs;
pub mod instructions;
pub mod ledger;
pub mod library;
pub mod ordinary;
pub mod provision;
pub mod qemu;
pub mod random;
pub mod storm;
pub mod story;
pub mod svmd;
pub mod wire;
