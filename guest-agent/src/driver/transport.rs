//! What a way to the device must offer. Implemented by [`super::pci`] in a guest, and by harnesses that play a VMM.

use std::io;
use std::time::Duration;

/// Doorbell and interrupt of one device whose queues are set up and running.
pub trait Transport: Send + Sync {
    /// Tells the device that `queue` has new buffers.
    ///
    /// # Errors
    /// When the device cannot be reached any more.
    fn notify(&self, queue: u16) -> io::Result<()>;

    /// Waits for an interrupt, at most `timeout`. True: there may be used buffers. One interrupt may stand for several
    /// and for all queues. Called by one thread at a time.
    ///
    /// # Errors
    /// When no interrupt can come any more.
    fn wait(&self, timeout: Duration) -> io::Result<bool>;
}
