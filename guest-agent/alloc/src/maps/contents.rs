//! What is in a file that the program maps privately, read before any lock is taken: a file may take its time, or its
//! server be this very process.

#![expect(unsafe_code, reason = "reads into memory of its own")]

use super::call::{self, Request};
use super::{Kind, MAX_FILE, READ_WRITE};
use crate::space::{map_anonymous, unmap};
use rustix::mm::MapFlags;
use std::os::fd::BorrowedFd;

/// Whole pages.
pub struct Contents {
    base: usize,
    len: usize,
}

impl Contents {
    /// Of what is to be mapped; `None`: there is nothing to read, or too much.
    pub fn read(request: &Request) -> Option<Self> {
        let (Kind::Copy { len: Some(len) }, Some(fd)) = (request.kind, request.file()) else { return None };
        if len > MAX_FILE {
            return None;
        }
        // SAFETY: without MAP_FIXED no existing mapping is replaced.
        let base = unsafe { map_anonymous(0, len, READ_WRITE, MapFlags::empty()) }?;
        let contents = Self { base, len };
        contents.fill(fd, request).then_some(contents)
    }

    fn fill(&self, fd: BorrowedFd<'_>, request: &Request) -> bool {
        call::read_file(fd, self.base, self.len, request.offset)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// `to` is writable for [`Self::len`] bytes.
    pub unsafe fn copy_to(&self, to: usize) -> bool {
        let (from, to) =
            (std::ptr::with_exposed_provenance(self.base), std::ptr::with_exposed_provenance_mut(to));
        // SAFETY: the contents are this value's own; for the target as the caller says.
        unsafe { std::ptr::copy_nonoverlapping::<u8>(from, to, self.len) };
        true
    }
}

impl Drop for Contents {
    fn drop(&mut self) {
        unmap(self.base, self.len);
    }
}
