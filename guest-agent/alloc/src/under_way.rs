//! Calls that go on without the heap's lock after they have looked at the table: they may take as long as a server of a file
//! does, which may be this very process. Waking waits for them, and they begin under that lock, or look with it.

use crate::others::pause;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

static CALLS: AtomicUsize = AtomicUsize::new(0);
/// How long calls are waited for while nobody can begin one.
const LOOKS: u32 = 20;
const LOOK: Duration = Duration::from_micros(100);

/// One of them, as long as it lives.
pub struct Call(());

impl Call {
    pub fn begin() -> Self {
        CALLS.fetch_add(1, Ordering::AcqRel);
        Self(())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // In a forked child there is none any more.
        CALLS.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |calls| calls.checked_sub(1)).ok();
    }
}

/// With the heap's lock held: whether all calls have ended, which those that are short get time for.
pub fn none() -> bool {
    for _ in 0..LOOKS {
        if CALLS.load(Ordering::Acquire) == 0 {
            return true;
        }
        pause(LOOK);
    }
    false
}

/// In a forked child: those were of threads that it does not have.
pub fn forget() {
    CALLS.store(0, Ordering::Release);
}
