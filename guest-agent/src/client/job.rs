//! A job or an asynchronous bind that was launched, and how it ended.

use super::{Connection, Error, Result};
use std::fmt;
use std::sync::{Arc, PoisonError};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{EVENT_BIND_DONE, JobRecord, PERM_ATOMIC, PERM_WRITE};

/// A job or an asynchronous bind that ended with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobError {
    /// Whether it was a bind.
    pub bind: bool,
    /// Positive errno.
    pub errno: i32,
    /// Index of the packet, or of the bind's operation.
    pub packet: u32,
    /// GPU address of the access, or of the operation.
    pub addr: u64,
    /// `PERM_*` of the access; of a bind 0.
    pub access: u32,
}

impl std::error::Error for JobError {}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { errno, packet, addr, .. } = *self;
        let name = errno::name(errno);
        if self.bind {
            let advice = bind_advice(errno);
            write!(f, "operation {packet} failed at GPU address {addr:#x}: {name}{advice}")
        } else {
            let (access, advice) = (access_name(self.access), advice(errno));
            write!(f, "packet {packet} failed at GPU address {addr:#x} ({access}): {name}{advice}")
        }
    }
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
        errno::EFAULT => {
            "; the CPU address behind it is in no arena of this process, or nothing is bound there"
        }
        errno::EINVAL => "; nothing is bound there, or it is no node of a list",
        errno::EPERM => "; it is bound read-only",
        errno::ENOMEM => "; the device has no memory for its tables: unbind something",
        errno::ENOSPC => {
            "; the guest's limit of table_bytes is reached: raise limits.table_bytes in svmd.toml, or unbind something"
        }
        errno::EPIPE => "; the GPU VM had become unusable: make a new one",
        errno::ETIMEDOUT => "; it ran too long, or a fault was not answered in time",
        errno::ECANCELED => "; the context or GPU VM was destroyed meanwhile, or the device has lost it",
        _ => "",
    }
}

fn bind_advice(errno: i32) -> &'static str {
    match errno {
        errno::ENOSPC => "; the GPU VM would have too many mappings or pages, and is unusable now",
        errno::EFAULT => {
            "; a page that it wants is in no arena of this process, and the GPU VM is unusable now"
        }
        errno::ENOMEM => "; the device has no memory for its tables, and the GPU VM is unusable now",
        errno::ETIMEDOUT => "; a page was not supplied in time, and the GPU VM is unusable now",
        errno::EBUSY => "; a mirror window has pages there, and the GPU VM is unusable now",
        errno::EACCES => "; its blob was detached meanwhile, and the GPU VM is unusable now",
        errno::EPIPE => "; the GPU VM had become unusable: make a new one",
        errno::ECANCELED => "; the context or GPU VM was destroyed meanwhile",
        _ => "",
    }
}

/// A job or an asynchronous bind that was launched. Dropping it forgets how it ends.
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
                bind: record.kind.get() == EVENT_BIND_DONE,
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
