//! Shared memory of the program, shown to the agent.
//!
//! The agent pins the pages of the file by itself. Which pages a mapping has is the program's affair: it may punch holes
//! by the file's descriptor, or let the file grow, and GPUs go on reaching what was there when it was mapped.
//!
//! The library keeps a descriptor of the file while it is mapped, for forked children: so a lock of it by `flock` lasts
//! as long, and record locks by `fcntl` end with the mapping at the latest.

use super::call::{self, Request};
use super::{Kind, fits};
use crate::fd::{Fd, Kept};
use crate::piece::PAGE;
use crate::space::Space;
use libc::off_t;
use rustix::fs::MemfdFlags;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

const TMPFS: i64 = 0x0102_1994;
const HUGETLBFS: i64 = 0x9584_58f6;

/// Gives shared memory that has no file one, which is to stay open until it is mapped.
pub fn give_file(space: &Space, request: &mut Request) -> Option<Fd> {
    if !matches!(request.kind(), Kind::SharedZeros) || !fits(space, request.len, request.flags) {
        return None;
    }
    let len = u64::try_from(request.len.checked_next_multiple_of(PAGE)?).ok()?;
    let file = Fd::new(rustix::fs::memfd_create(c"svm-alloc", MemfdFlags::CLOEXEC).ok()?);
    rustix::fs::ftruncate(&file, len).ok()?;
    request.flags &= !libc::MAP_ANONYMOUS;
    request.fd = file.as_fd().as_raw_fd();
    request.offset = 0;
    Some(file)
}

/// Shows a mapping to the agent, if its file is in memory.
pub fn import(space: &mut Space, range: &Range<usize>, fd: BorrowedFd<'_>, offset: off_t) -> bool {
    let at = u64::try_from(offset).ok().filter(|_| page_of(fd).is_some());
    at.zip(Kept::second(fd)).is_some_and(|(at, file)| import_kept(space, range, file, at))
}

/// As [`import`], by a descriptor that the library has.
pub fn import_kept(space: &mut Space, range: &Range<usize>, file: Kept, at: u64) -> bool {
    let len =
        file.get().and_then(|fd| call::len_in_file(range.len(), page_of(fd)?, fd, off_t::try_from(at).ok()?));
    let Some(len) = len else {
        file.close();
        return false;
    };
    space.import(range.start, len, file, at)
}

/// Bytes of a page of a file in memory; `None`: it is another kind of file.
fn page_of(fd: BorrowedFd<'_>) -> Option<usize> {
    let system = rustix::fs::fstatfs(fd).ok()?;
    match system.f_type {
        TMPFS => Some(PAGE),
        HUGETLBFS => usize::try_from(system.f_bsize).ok(),
        _ => None,
    }
}
