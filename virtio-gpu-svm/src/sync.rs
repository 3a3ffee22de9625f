//! Where every lock, wait and atomic of this crate comes from: the standard library.
//!
//! One door, so that a build for model checking can put its own primitives behind it (`model/`) and run the same
//! code under schedules of its choice.

pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError, Weak,
    atomic,
};

/// By which engines look for work.
pub(crate) use crate::busy_poll::Monotonic as LookClock;

/// How often a thread that may not wait tries for a lock: a few microseconds.
pub(crate) const TRIES: usize = 64;

/// Where much could happen if this thread were held up (a translation is in hand, a table is changed and the flush has
/// not begun): the model lets others go on here.
#[inline(always)]
pub(crate) const fn preempt() {}
