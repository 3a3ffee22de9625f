//! The system calls behind mmap and its relatives, with errno as the C library sets it.

#![expect(unsafe_code, reason = "makes system calls that change the address space")]

use super::shared::page_in_memory;
use super::{DEV_ZERO, Kind, READ_WRITE};
use crate::exports::{errno, set_errno};
use crate::left::Why;
use crate::numbered::KERNEL;
use crate::piece::{PAGE, Sharing};
use libc::{c_int, off_t};
use rustix::fs::{FileType, Stat};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bits of mmap's flags that say whether it is shared.
const MAP_TYPE: c_int = 0x0f;
/// Memory of which the library makes no arena, but which can be pinned where it is.
const PINNABLE: c_int = libc::MAP_STACK | libc::MAP_HUGETLB;
/// As above, and all of it.
const UNFIT: c_int = PINNABLE | libc::MAP_GROWSDOWN;

/// What is asked of mmap.
#[derive(Clone, Copy)]
pub struct Request {
    /// Of a file it is found out once and without any lock: its server may be this very process.
    pub kind: Kind,
    pub at: usize,
    pub len: usize,
    pub prot: c_int,
    pub flags: c_int,
    pub fd: c_int,
    pub offset: off_t,
}

impl Request {
    pub fn new(at: usize, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> Self {
        let request = Self { kind: Kind::Other, at, len, prot, flags, fd, offset };
        Self { kind: request.look(), ..request }
    }

    /// # Safety
    /// As mmap.
    pub unsafe fn carry_out(&self) -> Option<usize> {
        let Self { at, len, prot, flags, fd, offset, .. } = *self;
        // SAFETY: passed on.
        let mapped = unsafe { KERNEL(libc::SYS_mmap, at, len, prot, flags, fd, offset) };
        address(mapped)
    }

    /// Why anonymous memory is left as it is. `None`: it is not, or it is no such memory.
    pub fn why_left(&self) -> Option<Why> {
        let (prot, flags) = (self.prot, self.flags);
        if flags & (libc::MAP_ANONYMOUS | libc::MAP_HUGETLB) != libc::MAP_ANONYMOUS {
            return None;
        }
        match flags & UNFIT {
            _ if prot != READ_WRITE => Some(Why::Mapped { prot }),
            0 => None,
            grows if grows & libc::MAP_GROWSDOWN != 0 => Some(Why::GrowsDown),
            _ => Some(Why::Stack),
        }
    }

    /// Whether it is anonymous memory that only its protection keeps out of reach.
    pub fn may_wake(&self) -> bool {
        let wanted = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        self.prot != READ_WRITE && self.flags & (MAP_TYPE | libc::MAP_ANONYMOUS | UNFIT) == wanted
    }

    fn look(&self) -> Kind {
        if self.prot != READ_WRITE {
            return Kind::Other;
        }
        let shared = match self.flags & MAP_TYPE {
            libc::MAP_PRIVATE => false,
            libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE => true,
            _ => return Kind::Other,
        };
        let (pinnable, anonymous) =
            (self.flags & UNFIT & !PINNABLE == 0, self.flags & libc::MAP_ANONYMOUS != 0);
        if self.flags & UNFIT != 0 {
            let sharing = if shared { Sharing::Family } else { Sharing::Private };
            return if pinnable && anonymous { Kind::Pinned(sharing) } else { Kind::Other };
        }
        if anonymous {
            return if shared { Kind::SharedZeros } else { Kind::Zeros };
        }
        let Some(fd) = self.file() else { return Kind::Other };
        let Ok(stat) = rustix::fs::fstat(fd) else { return Kind::Other };
        let len = |page| len_in_file(self.len, page, &stat, self.offset);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile if shared => Kind::Shared { len: page_in_memory(fd).and_then(len) },
            FileType::RegularFile => Kind::Copy { len: len(PAGE) },
            FileType::CharacterDevice if !shared && is_dev_zero(stat.st_rdev) => Kind::Zeros,
            _ => Kind::Other,
        }
    }

    /// What the program names as its file.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: it is a number that the program takes for a descriptor; one that is not open is refused when it is used.
        (self.fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(self.fd) })
    }
}

fn is_dev_zero(device: u64) -> bool {
    (rustix::fs::major(device), rustix::fs::minor(device)) == DEV_ZERO
}

/// What a system call that returns an address has returned.
pub fn address(result: libc::c_long) -> Option<usize> {
    (result != -1).then_some(result.cast_unsigned()).and_then(|address| usize::try_from(address).ok())
}

/// The result of a call that fails here.
pub fn failed(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

fn result(result: libc::c_long) -> c_int {
    c_int::try_from(result).unwrap_or(-1)
}

/// # Safety
/// As munmap.
pub unsafe fn unmap(at: usize, len: usize) -> c_int {
    // SAFETY: passed on.
    result(unsafe { KERNEL(libc::SYS_munmap, at, len) })
}

/// # Safety
/// As mprotect.
pub unsafe fn protect(at: usize, len: usize, prot: c_int) -> c_int {
    // SAFETY: passed on.
    result(unsafe { KERNEL(libc::SYS_mprotect, at, len, prot) })
}

/// # Safety
/// As pkey_mprotect.
pub unsafe fn protect_by_key(at: usize, len: usize, prot: c_int, key: c_int) -> c_int {
    // SAFETY: passed on.
    result(unsafe { KERNEL(libc::SYS_pkey_mprotect, at, len, prot, key) })
}

/// # Safety
/// As madvise.
pub unsafe fn advise(range: &Range<usize>, advice: c_int) -> c_int {
    let len = range.end.wrapping_sub(range.start);
    // SAFETY: passed on.
    result(unsafe { KERNEL(libc::SYS_madvise, range.start, len, advice) })
}

/// # Safety
/// As remap_file_pages.
pub unsafe fn rearrange(at: usize, len: usize, prot: c_int, page: usize, flags: c_int) -> c_int {
    // SAFETY: passed on.
    result(unsafe { KERNEL(libc::SYS_remap_file_pages, at, len, prot, page, flags) })
}

/// Bytes of a mapping that have pages in its file; `None`: there are none.
pub fn len_in_file(len: usize, page: usize, file: &Stat, offset: off_t) -> Option<usize> {
    let rest = usize::try_from(file.st_size.checked_sub(offset)?).ok()?;
    let [rest, len] = [rest, len].map(|len| len.checked_next_multiple_of(page));
    Some(rest?.min(len?)).filter(|len| *len > 0)
}

/// Reads `len` bytes of a file to `to`; what is beyond the file's end stays as it is.
pub fn read_file(fd: BorrowedFd<'_>, to: usize, len: usize, offset: off_t) -> bool {
    let mut done = 0;
    while done < len {
        let (at, rest) = (to + done, len - done);
        let Ok(from) = off_t::try_from(done).map(|done| offset + done) else { return false };
        // SAFETY: the caller's memory is writable for `len` bytes.
        let read = unsafe { KERNEL(libc::SYS_pread64, fd.as_raw_fd(), at, rest, from) };
        match usize::try_from(read) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(_) => return false,
        }
    }
    true
}

/// Copies memory of this process that may not be readable, or not be there at all: a kernel that does not do that has it
/// copied as if it were.
///
/// # Safety
/// `to` is writable for `len` bytes.
pub unsafe fn copy(from: usize, to: usize, len: usize) -> bool {
    let mut done = 0;
    while done < len {
        let part = |at: usize| libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(at + done),
            iov_len: len - done,
        };
        let (source, target) = (part(from), part(to));
        let this = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: the vectors live here; the kernel checks what it reads, and the caller has the right to what it writes.
        let copied = unsafe { libc::process_vm_readv(this, &raw const target, 1, &raw const source, 1, 0) };
        match usize::try_from(copied) {
            Ok(copied) if copied > 0 => done += copied,
            Err(_) if done == 0 && matches!(errno(), libc::ENOSYS | libc::EPERM) => {
                let (from, to) = (part(from).iov_base.cast::<u8>(), part(to).iov_base.cast::<u8>());
                // SAFETY: as the caller says; what cannot be read ends the program, which allows no better.
                unsafe { to.copy_from_nonoverlapping(from, len) };
                return true;
            }
            _ => return false,
        }
    }
    true
}
