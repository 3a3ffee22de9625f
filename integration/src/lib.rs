//! Drives the whole path in tests and demos: frontends that stand for virtual machines, guests' processes, and the
//! comparison of what devices, agents and jobs say about the same faults.
//!
//! * [`frontend`]: virtual machines without QEMU: no CPU at all, or a real vCPU.
//! * [`ledger`]: whose fault was it, told three times and compared.

pub mod frontend;
pub mod ledger;
pub mod random;
pub mod svmd;
