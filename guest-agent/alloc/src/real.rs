//! Functions of the C library that this library stands before.

#![expect(unsafe_code, reason = "asks the loader for functions by name")]

use libc::c_void;
use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The next function of that name behind this library's own.
pub struct Real {
    name: &'static CStr,
    found: AtomicUsize,
}

impl Real {
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, found: AtomicUsize::new(0) }
    }

    /// As [`Self::address`], and null if it was not looked for.
    pub fn found(&self) -> *const c_void {
        std::ptr::with_exposed_provenance(self.found.load(Ordering::Relaxed))
    }

    /// Null if there is none. Looked for at the first call, which may allocate.
    pub fn address(&self) -> *const c_void {
        let mut found = self.found.load(Ordering::Relaxed);
        if found == 0 {
            // SAFETY: the name ends with a zero.
            found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) }.expose_provenance();
            self.found.store(found, Ordering::Relaxed);
        }
        std::ptr::with_exposed_provenance(found)
    }
}
