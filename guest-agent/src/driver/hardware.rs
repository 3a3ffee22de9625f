//! What there must be of a device for a keeper of it ([`crate::keeper`]). Implemented by [`super::pci`] in a guest, and by
//! harnesses.

use super::{DmaRegion, Rings, Transport};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Why the device does not do it.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A device that can be reset and started again. [`super::pci::PciDevice`] in a guest.
pub trait Hardware {
    /// Resets the device and starts it on empty rings in `dma`. Between the reset and the start it writes nowhere.
    ///
    /// # Errors
    /// When the device does not reset, or lacks something.
    fn restart(&mut self, dma: &DmaRegion) -> Result<Rings, Failure>;

    /// Resets the device: it writes nowhere afterwards.
    ///
    /// # Errors
    /// When the device does not reset.
    fn stop(&mut self) -> Result<(), Failure>;

    /// The way to the running device.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    fn transport(&self) -> io::Result<Arc<dyn Transport>>;

    /// What another process needs for a transport of its own: a description and descriptors.
    fn handover(&self) -> (serde_json::Value, Vec<BorrowedFd<'_>>);
}
