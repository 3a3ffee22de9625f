//! mmap and its relatives: what a program maps by itself is brought into the reach of GPUs, and leaves it in time.
//!
//! * Private anonymous memory is an arena at the same address, unless it is a stack's (MAP_STACK, MAP_GROWSDOWN), of huge
//!   pages, or larger than any arena may be; reservations (MAP_NORESERVE) up to [`MAX_RESERVED`].
//! * Shared memory (memfd, POSIX and tmpfs files, hugetlbfs, MAP_SHARED | MAP_ANONYMOUS) stays the program's own, and
//!   the agent is shown the file.
//! * Private mappings of regular files are read into an arena, up to [`MAX_FILE`].
//!
//! All this for memory that is readable and writable when it is mapped. Everything else is left: mappings that are
//! protected otherwise, files on disk that are shared, devices. GPUs do not reach it. What else no arena can take the
//! place of, a trusted process pins ([`crate::pinned`]).
//!
//! A private file mapping that is an arena does not grow (mremap says ENOMEM), and MADV_DONTNEED leaves its contents.
//! All pages of an arena are there from the first, so userfaultfd finds none missing.
//!
//! Whatever the program unmaps, maps over, moves, or protects leaves GPUs before the call does anything. Memory whose
//! protection is changed stays out of their reach when it is readable and writable again.
//!
//! The table is changed under the heap's lock. Like malloc, none of these may be called by the handler of a signal that
//! came while the same thread was in one of them.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

mod advice;
mod call;
mod contents;
mod remap;
mod shared;

use crate::exports::set_errno;
use crate::heap;
use crate::piece::{PAGE, Piece, Purpose, Sharing};
use crate::space::Space;
use crate::stack;
use call::{Request, failed};
use contents::Contents;
use libc::{c_int, c_void, off_t, size_t};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Most bytes of memory that is mapped without reserving any: such mappings are made to be used in small parts.
const MAX_RESERVED: usize = 64 << 20;
/// Most bytes of a file that are read because the program maps it privately.
const MAX_FILE: usize = 64 << 20;
const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
/// Major and minor number of /dev/zero.
const DEV_ZERO: (u32, u32) = (1, 5);

/// What a mapping is to the library.
enum Kind<'a> {
    Zeros,
    SharedZeros,
    Shared(BorrowedFd<'a>),
    Copy(BorrowedFd<'a>),
    /// Pinned where it is, if the process is trusted, and else left.
    Pinned(Sharing),
    /// Left as it is.
    Other,
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    at: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let request = Request { at: at.expose_provenance(), len, prot, flags, fd, offset };
    // SAFETY: the caller has the right to what it names.
    let mapped = unsafe { map(request) };
    std::ptr::with_exposed_provenance_mut(mapped.unwrap_or(usize::MAX))
}

/// As `mmap`.
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    at: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: passed on.
    unsafe { mmap(at, len, prot, flags, fd, offset) }
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(at: *mut c_void, len: size_t) -> c_int {
    let Some(range) = pages(at.addr(), len) else {
        // SAFETY: passed on.
        return unsafe { call::unmap(at.addr(), len) };
    };
    let mut heap = heap::lock();
    // SAFETY: passed on.
    unsafe { unmap(heap.space(), &range) }
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(at: *mut c_void, len: size_t, prot: c_int) -> c_int {
    // SAFETY: the caller has the right to the range.
    let protect = || unsafe { call::protect(at.addr(), len, prot) };
    let Some(range) = pages(at.addr(), len) else { return protect() };
    let mut heap = heap::lock();
    let space = heap.space();
    if !space.has(&range) {
        drop(heap);
        return protect();
    }
    let prot = prot & (READ_WRITE | libc::PROT_EXEC);
    let mut same = true;
    space.each_in(&range, |_, piece| same &= piece.prot == prot);
    if same {
        return protect();
    }
    if prot != READ_WRITE && space.withdraw(&range).is_err() {
        return failed(libc::ENOMEM);
    }
    let result = protect();
    if result == 0 && space.change(&range, |piece| piece.prot = prot).is_err() {
        return failed(libc::ENOMEM);
    }
    result
}

/// As in Linux.
///
/// # Safety
/// As in Linux.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(at: *mut c_void, len: size_t, advice: c_int) -> c_int {
    let Some(range) = pages(at.addr(), len) else {
        // SAFETY: passed on.
        return unsafe { call::advise(&(at.addr()..at.addr().wrapping_add(len)), advice) };
    };
    let mut heap = heap::lock();
    // SAFETY: the caller has the right to the range.
    unsafe { advice::advise(heap.space(), &range, advice) }
}

/// As in Linux, where the last argument is left out when it is not needed.
///
/// # Safety
/// As in Linux.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    at: *mut c_void,
    len: size_t,
    new_len: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let request =
        remap::Request { at: at.expose_provenance(), len, new_len, flags, to: to.expose_provenance() };
    let mut heap = heap::lock();
    // SAFETY: the caller has the right to what it names.
    let moved = unsafe { remap::remap(heap.space(), &request) };
    std::ptr::with_exposed_provenance_mut(moved.unwrap_or(usize::MAX))
}

/// The pages that a call is about; `None`: the kernel refuses it, or there are none.
fn pages(at: usize, len: usize) -> Option<Range<usize>> {
    let end = at.checked_add(len.checked_next_multiple_of(PAGE)?)?;
    (at.is_multiple_of(PAGE) && at < end).then_some(at..end)
}

/// # Safety
/// As mmap.
unsafe fn map(mut request: Request) -> Option<usize> {
    let replaces = request.flags & libc::MAP_FIXED != 0;
    let replaced = replaces.then(|| pages(request.at, request.len)).flatten();
    let mut heap = heap::lock();
    heap.space().start();
    // Open until the mapping is there.
    let _file = shared::give_file(heap.space(), &mut request);
    let fits = fits(heap.space(), request.len, request.flags);
    drop(heap);
    let contents = if fits { Contents::read(&request) } else { None };
    if let Some(range) = replaced {
        let mut heap = heap::lock();
        let space = heap.space();
        if space.withdraw(&range).is_err() {
            set_errno(libc::ENOMEM);
            return None;
        }
        // SAFETY: passed on.
        let base = unsafe { request.carry_out() }?;
        on_mapped(space, &request, &range, contents.as_ref());
        return Some(base);
    }
    // Without the lock: nobody else knows yet what is mapped, and it may take its time.
    // SAFETY: passed on.
    let base = unsafe { request.carry_out() }?;
    if let Some(range) = pages(base, request.len) {
        on_mapped(heap::lock().space(), &request, &range, contents.as_ref());
    }
    Some(base)
}

/// Brings what has been mapped just now into the reach of GPUs.
fn on_mapped(space: &mut Space, request: &Request, range: &Range<usize>, contents: Option<&Contents>) {
    // Whatever the table says of the range has gone without its knowing, or by this call.
    let vacant = space.vacate(range).is_ok();
    let kind = request.kind();
    let beyond = matches!(kind, Kind::Pinned(_)) && !space.is_trusted();
    if beyond || matches!(kind, Kind::Other) {
        return;
    }
    let reached = vacant
        && fits(space, range.len(), request.flags)
        && match kind {
            // SAFETY: the mapping is new, so nobody needs what is in it.
            Kind::Zeros => unsafe { space.cover(range.start, range.len(), Purpose::Mapping) },
            Kind::Shared(fd) => shared::import(space, range, fd, request.offset),
            Kind::Copy(_) => contents.is_some_and(|contents| {
                // SAFETY: the arena has as many bytes.
                let copy = |to| unsafe { contents.copy_to(to) };
                // SAFETY: the mapping is new, so nobody uses it yet.
                unsafe { space.adopt_file(range.start, contents.len(), copy) }
            }),
            Kind::Pinned(sharing) => space.pin(&upper_part(range, request.flags), sharing),
            // Without a file there is nothing to show.
            Kind::SharedZeros | Kind::Other => false,
        };
    if !reached {
        space.leave(range.len());
    }
}

/// Whether memory of that size is worth asking for.
fn fits(space: &Space, len: usize, flags: c_int) -> bool {
    let within = u64::try_from(len).is_ok_and(|len| len <= space.max_arena_bytes());
    within && (flags & libc::MAP_NORESERVE == 0 || len <= MAX_RESERVED)
}

/// The part of a mapping that is pinned: of a stack what it begins with, as of the stacks of threads.
fn upper_part(range: &Range<usize>, flags: c_int) -> Range<usize> {
    let len = if flags & libc::MAP_STACK == 0 { range.len() } else { range.len().min(stack::MAX_BYTES) };
    range.end - len..range.end
}

/// # Safety
/// As munmap.
unsafe fn unmap(space: &mut Space, range: &Range<usize>) -> c_int {
    // SAFETY: passed on.
    let unmap = || unsafe { call::unmap(range.start, range.len()) };
    if !space.has(range) {
        return unmap();
    }
    if space.withdraw(range).is_err() {
        return failed(libc::ENOMEM);
    }
    let result = unmap();
    if result == 0 {
        // It was split already, so it cannot fail.
        space.vacate(range).ok();
    }
    result
}

/// The part of a piece that lies in a range.
fn part_of(piece: &Piece, range: &Range<usize>) -> Range<usize> {
    piece.base.max(range.start)..piece.end().min(range.end)
}
