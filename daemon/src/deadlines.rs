//! The clock of faults that nobody answers: a thread of its own, because what expires is written into guests' event
//! queues, which the control socket's runtime must never touch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::host::Host;

/// How often is looked; a fault expires so much later at most.
const INTERVAL: Duration = Duration::from_millis(250);

/// The thread.
pub struct Deadlines {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Deadlines {
    /// Begins to look after a host's deadlines.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(host: Arc<Host>) -> std::io::Result<Self> {
        let ending = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&ending);
        let run = move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::park_timeout(INTERVAL);
                host.expire_faults();
            }
        };
        let thread = std::thread::Builder::new().name("deadlines".into()).spawn(run)?;
        Ok(Self { ending, thread })
    }
    /// Ends the thread.
    pub fn stop(self) {
        self.ending.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            tracing::error!("the deadlines' thread had panicked");
        }
    }
}
