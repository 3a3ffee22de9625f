//! A job or an asynchronous bind that was launched, and how it ended.

use super::connection::Connection;
use super::{Error, Result, Window, remedy};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{EVENT_BIND_DONE, JobRecord, PERM_ATOMIC, PERM_WRITE};

/// A job or an asynchronous bind that ended with an error.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Where a mirror shows what no GPU reaches: what it is, and what to do.
    pub remedy: Option<String>,
}

impl std::error::Error for JobError {}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { errno, packet, addr, .. } = *self;
        if let Some(remedy) = &self.remedy {
            let access = access_name(self.access);
            return write!(f, "packet {packet} failed at GPU address {addr:#x} ({access}): {remedy}");
        }
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
///
/// Its end can be waited for ([`Self::wait`], [`Self::wait_timeout`]), asked for ([`Self::try_wait`]) or awaited: a job is
/// a future, which is woken by whoever reads the connection: a thread that waits, or the program's event loop through
/// [`Events`](super::Events).
#[derive(Debug)]
pub struct Job {
    connection: Arc<Connection>,
    job_id: u64,
    /// What its GPU VM mirrors.
    shown: Arc<[Window]>,
    /// How it ended, once that was asked for and known.
    end: OnceLock<JobRecord>,
}

impl Job {
    pub(super) fn new(connection: Arc<Connection>, job_id: u64, shown: Arc<[Window]>) -> Self {
        Self { connection, job_id, shown, end: OnceLock::new() }
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
        let end = self.record()?;
        self.verdict(&end)
    }

    /// Waits for its end, at most so long. False: it has not ended.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_timeout(&self, timeout: Duration) -> Result<bool> {
        // A deadline beyond what a clock can say is none.
        let deadline = Instant::now().checked_add(timeout);
        let end = self.connection.wait_for_end(self.job_id, &self.end, deadline)?;
        end.map_or(Ok(false), |end| self.verdict(&end).map(|()| true))
    }

    /// Whether it has ended by now; does not wait.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn try_wait(&self) -> Result<bool> {
        let end = self.connection.poll_end(self.job_id, &self.end)?;
        end.map_or(Ok(false), |end| self.verdict(&end).map(|()| true))
    }

    /// Waits for its end and returns the record as the device wrote it.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::HungUp`] when the context ended first.
    pub fn record(&mut self) -> Result<JobRecord> {
        let end = self.connection.wait_for_end(self.job_id, &self.end, None)?;
        // Nothing but an end or an error ends a wait for ever.
        end.ok_or(Error::BadReply { what: "EXEC" })
    }

    /// What its record says.
    fn verdict(&self, end: &JobRecord) -> Result<()> {
        let (status, addr) = (end.status.get(), end.addr.get());
        if status == 0 {
            return Ok(());
        }
        let behind = || self.shown.iter().find_map(|window| window.cpu_address(addr));
        let out_of_reach = status == -errno::EFAULT;
        Err(Error::Job(JobError {
            bind: end.kind.get() == EVENT_BIND_DONE,
            errno: status.saturating_neg(),
            packet: end.packet.get(),
            addr,
            access: end.perm.get(),
            remedy: if out_of_reach { behind().map(remedy::of) } else { None },
        }))
    }
}

impl Future for Job {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Self::Output> {
        let end = self.connection.poll_end_with(self.job_id, &self.end, task);
        end.map(|end| end.and_then(|end| self.verdict(&end)))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.connection.forget(self.job_id, self.end.get().is_some());
    }
}
