//! What no guest's thread is there for: the clock of faults that nobody answers, and work that engines leave because they
//! serve others too. A thread of its own, because both are written into guests' event queues, which the control socket's
//! runtime must never touch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_gpu_svm::host::Host;

/// How often deadlines are looked at; a fault expires so much later, and the worker's turns take their time too.
const INTERVAL: Duration = Duration::from_millis(250);

/// A panic costs the session that it is about, which the core tells; this thread serves all.
fn contained(act: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(act)).is_err() {
        tracing::error!("the housekeeper has panicked, and goes on");
    }
}

/// The thread.
pub struct Housekeeper {
    host: Arc<Host>,
    ending: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Housekeeper {
    /// Begins to look after a host.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(host: Arc<Host>) -> std::io::Result<Self> {
        let ending = Arc::new(AtomicBool::new(false));
        let (stop, kept) = (Arc::clone(&ending), Arc::clone(&host));
        let run = move || {
            let mut looked = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                kept.wait_for_work(INTERVAL.saturating_sub(looked.elapsed()));
                contained(|| kept.work_off());
                if looked.elapsed() >= INTERVAL {
                    looked = Instant::now();
                    contained(|| kept.expire_faults());
                }
            }
        };
        let thread = std::thread::Builder::new().name("housekeeper".into()).spawn(run)?;
        Ok(Self { host, ending, thread: Mutex::new(Some(thread)) })
    }
    /// Ends the thread, if that has not been done.
    pub fn stop(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.host.wake_worker();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the housekeeper had panicked");
        }
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        self.stop();
    }
}
