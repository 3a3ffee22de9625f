//! Where every lock, wait and atomic of this crate comes from: the standard library.
//!
//! One door, so that a build for model checking can put its own primitives behind it (`tests/model/`) and run the same
//! code under schedules of its choice.

pub(crate) use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak, atomic,
};
