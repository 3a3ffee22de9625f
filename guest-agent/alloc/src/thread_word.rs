//! A word that each thread has of its own, under a key of the C library.
//!
//! Thread-local variables of a loaded library are no choice: where libraries have come or gone, a look at one may have the
//! loader allocate or free, which would come back here, without end or with the heap's lock held.

#![expect(unsafe_code, reason = "keeps words with the C library")]

use libc::c_void;
use std::sync::atomic::{AtomicU32, Ordering};

const NO_KEY: u32 = u32::MAX;

/// Called with the word of a thread that ends, unless it is 0.
pub type AtEnd = unsafe extern "C" fn(*mut c_void);

/// A word of each thread; 0 until it is set.
pub struct ThreadWord(AtomicU32);

impl ThreadWord {
    pub const fn new() -> Self {
        Self(AtomicU32::new(NO_KEY))
    }

    /// Before the first call, and where the C library has no key left, nothing is kept. Later calls do nothing.
    pub fn make_once(&self, at_end: Option<AtEnd>) {
        if self.is_made() {
            return;
        }
        let mut key = 0;
        // SAFETY: the pointer is to a key that lives here; what runs at the end is in this library, which stays.
        if unsafe { libc::pthread_key_create(&raw mut key, at_end) } != 0 {
            return;
        }
        if self.0.compare_exchange(NO_KEY, key, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            // Another thread was faster.
            // SAFETY: nobody else knows the key.
            unsafe { libc::pthread_key_delete(key) };
        }
    }

    pub fn is_made(&self) -> bool {
        self.0.load(Ordering::Acquire) != NO_KEY
    }

    pub fn get(&self) -> usize {
        let key = self.0.load(Ordering::Acquire);
        // SAFETY: the key was made, and is never deleted.
        if key == NO_KEY { 0 } else { unsafe { libc::pthread_getspecific(key) }.addr() }
    }

    /// Whether it is kept. May allocate where a thread has had no word.
    pub fn set(&self, word: usize) -> bool {
        let key = self.0.load(Ordering::Acquire);
        // SAFETY: as in `get`. The C library only keeps the word.
        key != NO_KEY && unsafe { libc::pthread_setspecific(key, std::ptr::without_provenance(word)) } == 0
    }
}
