//! Shared memory of the program, shown to the agent.
//!
//! The agent pins the pages of the file by itself. Which pages a mapping has is the program's affair: it may punch holes
//! by the file's descriptor, or let the file grow, and GPUs go on reaching what was there when it was mapped.
//!
//! The library keeps a descriptor of the file while it is mapped, for when the process asks for a device, and for forked
//! children: so a lock of it by `flock` lasts
//! as long, and record locks by `fcntl` end with the mapping at the latest.

use super::Kind;
use super::call::{self, Request};
use crate::fd::{Fd, Kept};
use crate::piece::PAGE;
use crate::space::Space;
use guest_agent::memory_file;
use libc::off_t;
use rustix::fs::MemfdFlags;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Gives shared memory that has no file one, which is to stay open until it is mapped.
pub fn give_file(request: &mut Request) -> Option<Fd> {
    if !matches!(request.kind, Kind::SharedZeros) {
        return None;
    }
    let len = request.len.checked_next_multiple_of(PAGE)?;
    let file = Fd::new(rustix::fs::memfd_create(c"svm-alloc", MemfdFlags::CLOEXEC).ok()?);
    rustix::fs::ftruncate(&file, u64::try_from(len).ok()?).ok()?;
    request.kind = Kind::Shared { len: Some(len) };
    request.flags &= !libc::MAP_ANONYMOUS;
    request.fd = file.as_fd().as_raw_fd();
    request.offset = 0;
    Some(file)
}

/// A descriptor of the library's own for what is to be shared, if that is in memory.
pub fn keep(request: &Request) -> Option<Kept> {
    if !matches!(request.kind, Kind::Shared { len: Some(_) }) {
        return None;
    }
    request.file().and_then(Kept::second)
}

/// Shows a mapping to the agent, by a descriptor that the library has: of a file in memory, which answers at once.
pub fn import_kept(space: &mut Space, range: &Range<usize>, file: Kept, at: u64) -> bool {
    let len = file.get().and_then(|fd| {
        let (page, stat) = (page_in_memory(fd)?, rustix::fs::fstat(fd).ok()?);
        call::len_in_file(range.len(), page, &stat, off_t::try_from(at).ok()?)
    });
    let Some(len) = len else {
        file.close();
        return false;
    };
    space.import(range.start, len, file, at)
}

/// Bytes of a page of a file in memory; `None`: it is another kind of file.
pub fn page_in_memory(fd: BorrowedFd<'_>) -> Option<usize> {
    usize::try_from(memory_file::page_of(fd).ok()??).ok()
}
