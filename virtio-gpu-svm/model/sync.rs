//! What `src/sync.rs` is to the library: shuttle's locks and condition variables, each use of which is a point where
//! another thread may go on.
//!
//! Atomics and `OnceLock` are the standard library's. None of them is waited for, words of page tables are entered
//! through pointers, which shuttle's atomics cannot be, and what may come between two of them is said by [`preempt`].
//! So schedules are sequentially consistent, and the order of single atomics is not searched.

pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
pub(crate) use std::sync::{Arc, OnceLock, PoisonError, TryLockError, Weak, atomic};

use crate::busy_poll::Clock;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Each try is a point where others go on; more of them would only hide what becomes of who is turned away.
pub(crate) const TRIES: usize = 1;

/// By which engines look for work: goes on by itself when it is asked, since nothing may depend on time.
#[derive(Debug, Default)]
pub(crate) struct LookClock(Duration);

impl Clock for LookClock {
    fn now(&mut self) -> Duration {
        self.0 += Duration::from_micros(100);
        self.0
    }
}

/// One in so many points is a long one.
const RARE: u32 = 8;
/// Steps of a long one: enough for others to carry out a command and hear of its end.
const LONG: u32 = 200;

thread_local! {
    /// Shuttle has no plain scheduling point; an access to one of its atomics is one. All threads of a schedule are
    /// coroutines of one thread of the system.
    static POINT: AtomicBool = const { AtomicBool::new(false) };
}

/// Lets others go on here: for a step, or for long. Were each step drawn alone, next to no schedule would hold this
/// thread up for as long as an invalidation takes.
pub(crate) fn preempt() {
    let steps = if thread_rng().gen_ratio(1, RARE) { LONG } else { 1 };
    POINT.with(|point| (0..steps).for_each(|_| _ = point.load(Ordering::SeqCst)));
}
