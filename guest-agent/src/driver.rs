//! The device, driven from user space: rings, commands and event records over any transport.
//!
//! * [`dma`]: memory that the device can reach, and its device addresses.
//! * [`virtqueue`]: one split virtqueue, driver side.
//! * [`transport`]: what a way to the device must offer: doorbell, interrupt.
//! * [`hardware`]: a device that can be reset and started again.
//! * [`svm`]: typed commands, answers and event records over the three queues.
//! * [`pci`]: the transport of a real guest.
//!
//! The device is not trusted with more than its own memory: whatever it writes is checked before use.

pub mod dma;
pub mod hardware;
pub mod pci;
pub mod svm;
pub mod transport;
pub mod virtqueue;

pub use dma::DmaRegion;
pub use hardware::Hardware;
pub use svm::{Completion, Event, Posted, Pump, RingConfig, Rings, SvmDevice};
pub use transport::Transport;

/// Why the device cannot be driven.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// DMA memory could not be mapped or reached.
    #[error("DMA memory")]
    Memory(#[from] crate::mapping::Error),
    /// The transport failed.
    #[error("transport: {what}")]
    Transport {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The device wrote something that no device may write. Its queue is not used any more.
    #[error("the device broke the queue protocol: {0}")]
    Protocol(virtqueue::Violation),
    /// An earlier violation or a failed transport ended the use of the device.
    #[error("the device is not in use any more after an earlier error")]
    Broken,
    /// The device left a command unanswered. Commands never wait in the device, so the daemon is gone or stuck.
    #[error("no answer to command {kind:#06x} within {seconds} s")]
    Timeout {
        /// Command number.
        kind: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A command or its answer does not fit the rings.
    #[error("a command of {request} bytes with an answer of {response} bytes does not fit the rings")]
    TooLarge {
        /// Bytes of the command.
        request: usize,
        /// Bytes of the answer.
        response: usize,
    },
    /// Ring sizes or memory that cannot work.
    #[error("ring set-up: {0}")]
    Setup(&'static str),
    /// An answer is shorter than its command's answers are.
    #[error("an answer of {got} bytes to command {kind:#06x}, which has answers of {need}")]
    ShortResponse {
        /// Command number.
        kind: u32,
        /// Bytes that came.
        got: usize,
        /// Bytes that such answers have.
        need: usize,
    },
}

/// Result of the driver.
pub type Result<T> = std::result::Result<T, Error>;

/// A number that no earlier life of a driver has used: random, not 0.
pub fn new_incarnation() -> u64 {
    let mut bytes = [0; 8];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // A guest whose random pool is not ready yet still has a clock that does not stand still.
    let clock =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_nanos());
    let random = if filled.is_ok() { u64::from_le_bytes(bytes) } else { u64::try_from(clock).unwrap_or(1) };
    random.max(1)
}
