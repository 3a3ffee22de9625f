//! A job that was launched, and how it ended.

use super::{Connection, Error, Result};
use std::sync::{Arc, PoisonError};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{JobRecord, PERM_ATOMIC, PERM_WRITE};

/// A job that ended with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "packet {packet} failed at GPU address {addr:#x} ({}): {}{}",
    access_name(*.access),
    errno::name(*.errno),
    advice(*.errno)
)]
pub struct JobError {
    /// Positive errno.
    pub errno: i32,
    /// Index of the packet.
    pub packet: u32,
    /// GPU address of the access.
    pub addr: u64,
    /// `PERM_*` of the access.
    pub access: u32,
}

fn access_name(access: u32) -> &'static str {
    match access {
        _ if access & PERM_ATOMIC != 0 => "atomic",
        _ if access & PERM_WRITE != 0 => "write",
        0 => "no access",
        _ => "read",
    }
}

fn advice(errno: i32) -> &'static str {
    match errno {
        errno::EFAULT => "; the CPU address behind it is in no arena of this process",
        errno::EINVAL => "; nothing is bound there",
        errno::EPERM => "; it is bound read-only",
        errno::ECANCELED => "; the context or GPU VM was destroyed meanwhile",
        _ => "",
    }
}

/// A job that was launched. Dropping it forgets how it ends.
pub struct Job {
    connection: Arc<Connection>,
    job_id: u64,
    taken: bool,
}

impl Job {
    pub(super) fn new(connection: Arc<Connection>, job_id: u64) -> Self {
        Self { connection, job_id, taken: false }
    }

    /// Its number in the context.
    pub fn id(&self) -> u64 {
        self.job_id
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Job`] when it failed, [`Error::Lost`] or [`Error::HungUp`] when the context ended first.
    pub fn wait(mut self) -> Result<()> {
        let record = self.record()?;
        match record.status.get() {
            0 => Ok(()),
            status => Err(Error::Job(JobError {
                errno: -status,
                packet: record.packet.get(),
                addr: record.addr.get(),
                access: record.perm.get(),
            })),
        }
    }

    /// Waits for its end and returns the record as the device wrote it.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::HungUp`] when the context ended first.
    pub fn record(&mut self) -> Result<JobRecord> {
        let job_id = self.job_id;
        let ended = self.connection.wait_for(|inbox| match (inbox.jobs.remove(&job_id), inbox.lost) {
            (Some(record), _) => Some(Ok(record)),
            (None, Some(status)) => Some(Err(Error::Lost { status })),
            (None, None) => None,
        })?;
        self.taken = true;
        ended
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let mut inbox = self.connection.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.taken && inbox.jobs.remove(&self.job_id).is_none() {
            inbox.forgotten.insert(self.job_id);
        }
    }
}
