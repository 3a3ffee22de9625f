//! What ends one guest's session, and only that: a fuse that any thread may blow.
//!
//! A session has threads of the framework, its guest's queue thread, and visits from engines. Whichever of them finds
//! that it cannot go on blows the fuse: the first reason is kept, the connection is shut down, and the thread that
//! serves the guest tidies up. Also the one place where faults of a guest are logged, at a bounded rate.

use crate::guest_memory;
use crate::log_budget::LogBudget;
use crate::queue::{ChainError, RingError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vhost_user_backend::ShutdownHandle;
use virtio_gpu_svm::protocol::limit::Limit;

/// Why a session ended, other than that its VMM left.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The operator removed the guest, or the daemon is ending.
    #[error("removed")]
    Removed,
    /// A fault of ours.
    #[error("internal fault while {0}; the session's state was dropped")]
    Panicked(&'static str),
    /// The framework's queue thread ended: a kick file that cannot be read.
    #[error("its queue thread ended (a kick file could not be read)")]
    QueueThread,
    /// A file of a ring could block us, so the ring would have to do without it: silent for ever.
    #[error("the {file} file of its {queue} queue cannot be used without waiting")]
    RingFile {
        /// Which: kick or call.
        file: &'static str,
        /// Of which queue.
        queue: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Its memory was refused.
    #[error(transparent)]
    Memory(#[from] guest_memory::Error),
    /// Its memory went away after it was accepted.
    #[error(
        "guest memory was lost under running work: the file behind the region at {gpa:#x} was truncated by its VMM, or \
         has no page there (hugetlbfs), or the host's memory has failed"
    )]
    MemoryLost {
        /// Where the region stands.
        gpa: u64,
    },
    /// It broke the vhost-user protocol, or used a part of it that was not offered.
    #[error("vhost-user: {0}")]
    Protocol(String),
    /// The session could not be set up.
    #[error("cannot {action}: {reason}")]
    Start {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl Failure {
    /// A step of the start that failed.
    pub fn start(action: &'static str, error: &dyn std::fmt::Display) -> Self {
        Self::Start { action, reason: error.to_string() }
    }
}

/// See the module.
pub struct Fuse {
    guest: Arc<str>,
    reason: OnceLock<Arc<Failure>>,
    /// Guards the handle until it is used; a section is one move.
    shutdown: Mutex<Option<ShutdownHandle>>,
    budget: Arc<LogBudget>,
    log: LogLimit,
    ring_log: LogLimit,
    chains_refused: AtomicU64,
}

impl Fuse {
    /// A fuse for a guest of this name, with its budget of lines.
    pub fn new(guest: Arc<str>, budget: Arc<LogBudget>) -> Self {
        Self {
            guest,
            reason: OnceLock::new(),
            shutdown: Mutex::new(None),
            budget,
            log: LogLimit::default(),
            ring_log: LogLimit::default(),
            chains_refused: AtomicU64::new(0),
        }
    }

    /// Names the connection to be shut down; at once if the fuse has blown before.
    pub fn arm(&self, handle: Option<ShutdownHandle>) {
        *self.lock() = handle;
        if self.reason.get().is_some() {
            self.cut();
        }
    }

    /// Ends the session for this reason, unless it has one already.
    pub fn blow(&self, failure: Failure) {
        if self.reason.set(Arc::new(failure)).is_ok() {
            self.cut();
        }
    }

    /// The reason, if it has blown.
    pub fn reason(&self) -> Option<Arc<Failure>> {
        self.reason.get().cloned()
    }

    /// Chains that were given back unread so far.
    pub fn chains_refused(&self) -> u64 {
        self.chains_refused.load(Ordering::Relaxed)
    }

    /// Tells of a queue that is not served any more. Once per stop of the ring, as the ring is latched; but a driver may
    /// reset its device as often as it likes.
    pub fn report_ring(&self, queue: &'static str, error: RingError) {
        if self.ring_log.admits() {
            self.budget.log(|| {
                tracing::warn!(guest = %self.guest, queue, %error, "queue failed; it is ignored until the driver resets it");
            });
        }
    }

    /// Tells of malformed chains.
    pub fn report_chain(&self, queue: &'static str, error: ChainError, count: u32) {
        let total = self.chains_refused.fetch_add(u64::from(count), Ordering::Relaxed);
        if self.log.admits() {
            let total = total.saturating_add(u64::from(count));
            self.budget.log(|| {
                tracing::warn!(guest = %self.guest, queue, %error, total, "malformed chains given back unread");
            });
        }
    }

    /// Tells of a limit that was reached for the first time in the session.
    pub fn report_limit(&self, limit: Limit) {
        self.budget.log(|| {
            tracing::warn!(guest = %self.guest, %limit, "limit reached; what is beyond it is refused, or waits");
        });
    }

    fn cut(&self) {
        let handle = self.lock().take();
        if let Some(handle) = handle {
            handle.shutdown();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<ShutdownHandle>> {
        self.shutdown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Admits one line in [`LogLimit::PAUSE`].
#[derive(Default)]
pub(crate) struct LogLimit {
    /// Guards the time of the last line; a section is one comparison.
    last: Mutex<Option<Instant>>,
}

impl LogLimit {
    const PAUSE: Duration = Duration::from_secs(10);

    pub fn admits(&self) -> bool {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let admitted = last.is_none_or(|then| now.duration_since(then) >= Self::PAUSE);
        if admitted {
            *last = Some(now);
        }
        admitted
    }
}
