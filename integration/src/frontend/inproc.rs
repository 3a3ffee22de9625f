//! A guest without a CPU: its driver runs in this process, a doorbell is an eventfd that it writes, an interrupt one
//! that it reads.

use super::vmm::Wiring;
use anyhow::{Context, Result};
use virtio_gpu_svm::protocol::NUM_QUEUES;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Eventfds between driver and daemon, and nothing else.
pub struct Direct {
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

impl Direct {
    /// An eventfd a queue, each way.
    ///
    /// # Errors
    /// The host has no file descriptors left.
    pub fn new() -> Result<Self> {
        let make = || {
            (0..NUM_QUEUES).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>().context("eventfd")
        };
        Ok(Self { kicks: make()?, calls: make()? })
    }
}

impl Wiring for Direct {
    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }
    fn calls(&self) -> &[EventFd] {
        &self.calls
    }
    fn wakes(&self) -> &[EventFd] {
        &self.calls
    }
    fn ring(&self, queue: usize) -> Result<()> {
        let kick = self.kicks.get(queue).with_context(|| format!("no queue {queue}"))?;
        kick.write(1).context("cannot write a kick")
    }
    fn check(&self) -> Result<()> {
        Ok(())
    }
}
