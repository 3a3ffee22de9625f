//! mmap and its relatives: what a program maps by itself is brought into the reach of GPUs, and leaves it in time.
//!
//! * Private anonymous memory is an arena at the same address, unless it is a stack's (MAP_STACK, MAP_GROWSDOWN), of huge
//!   pages, or larger than any arena may be; reservations (MAP_NORESERVE) up to [`MAX_RESERVED`].
//! * Shared memory (memfd, POSIX and tmpfs files, hugetlbfs, MAP_SHARED | MAP_ANONYMOUS) stays the program's own, and
//!   the agent is shown the file.
//! * Private mappings of regular files are read into an arena, up to [`MAX_FILE`].
//!
//! Before the process asks for a device, mappings are what the kernel makes of them; the table says what they become, and
//! what is readable and writable by then does ([`Wakes`]).
//!
//! All this for memory that is readable and writable when it is mapped. Everything else is left: mappings that are
//! protected otherwise, files on disk that are shared, devices. GPUs do not reach it. What else no arena can take the
//! place of, a trusted process pins ([`crate::pinned`]).
//!
//! A private file mapping that is an arena does not grow (mremap says ENOMEM), and MADV_DONTNEED leaves its contents.
//! All pages of an arena are there from the first, so userfaultfd finds none missing; what a userfaultfd watches when the
//! process first asks for a device stays out of reach.
//!
//! Whatever the program unmaps, maps over, moves, rearranges, or protects leaves GPUs before the call does anything. Memory
//! whose protection is changed stays out of their reach when it is readable and writable again.
//!
//! The table is changed under the heap's lock. Like malloc, none of these may be called by the handler of a signal that
//! came while the same thread was in one of them: the program ends then. Nothing is asked of a file under the lock.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

mod advice;
mod call;
mod contents;
mod remap;
mod shared;

use crate::exports::set_errno;
use crate::fd::Kept;
use crate::heap;
use crate::left::{TOO_LARGE, Why};
use crate::piece::{Backing, PAGE, Piece, Purpose, READ_WRITE, Sharing, Wakes};
use crate::space::Space;
use crate::stack;
use crate::under_way::Call;
pub use call::copy as copy_mapped;
use call::{Request, failed};
use contents::Contents;
use libc::{c_int, c_void, off_t, size_t};
pub use shared::import_kept;
use std::ops::Range;

/// Most bytes of memory that is mapped without reserving any: such mappings are made to be used in small parts.
const MAX_RESERVED: usize = 64 << 20;
/// Most bytes of a file that are read because the program maps it privately.
const MAX_FILE: usize = 64 << 20;
/// Major and minor number of /dev/zero.
const DEV_ZERO: (u32, u32) = (1, 5);

/// What a mapping is to the library. Of a file it says how many bytes of the mapping have pages in it; `None`: there are
/// none, or the file is not in memory but is to be shared.
#[derive(Clone, Copy)]
enum Kind {
    Zeros,
    SharedZeros,
    Shared {
        len: Option<usize>,
    },
    Copy {
        len: Option<usize>,
    },
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
    let request = Request::new(at.expose_provenance(), len, prot, flags, fd, offset);
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
    if heap.space().is_dormant() || !heap.space().knows(&range) {
        heap.space().forget_notes(&range);
        // What the kernel has still, if it refuses this, is out of reach then.
        if heap.space().vacate(&range).is_err() {
            return failed(libc::ENOMEM);
        }
        let _call = without(heap);
        // SAFETY: passed on.
        return unsafe { call::unmap(range.start, range.len()) };
    }
    // SAFETY: passed on.
    unsafe { unmap(heap.space(), &range) }
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(at: *mut c_void, len: size_t, prot: c_int) -> c_int {
    let plainly = |range: &Range<usize>| {
        // SAFETY: passed on.
        unsafe { call::protect(range.start, range.len(), prot) }
    };
    // SAFETY: passed on.
    unsafe { protect(at.addr(), len, prot, plainly) }
}

/// As in Linux. Protection keys are the process' own affair: GPUs do not go by them.
///
/// # Safety
/// As in Linux.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pkey_mprotect(at: *mut c_void, len: size_t, prot: c_int, key: c_int) -> c_int {
    let by_key = |range: &Range<usize>| {
        // SAFETY: passed on.
        unsafe { call::protect_by_key(range.start, range.len(), prot, key) }
    };
    if key > 0
        && let Some(range) = pages(at.addr(), len)
    {
        let mut heap = heap::lock();
        if heap.space().is_dormant() {
            // An arena would have no key.
            heap.space().let_be(&range, Why::Protected);
        }
    }
    // SAFETY: passed on.
    unsafe { protect(at.addr(), len, prot, by_key) }
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
    if advice::is_the_kernels(heap.space(), &range, advice) {
        let _call = without(heap);
        // SAFETY: passed on.
        return unsafe { call::advise(&range, advice) };
    }
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
    let moved = if heap.space().is_dormant() {
        // SAFETY: the caller has the right to what it names.
        unsafe { remap::remap_dormant(heap, &request) }
    } else {
        // SAFETY: as above.
        unsafe { remap::remap(heap, &request) }
    };
    std::ptr::with_exposed_provenance_mut(moved.unwrap_or(usize::MAX))
}

/// As in Linux, for shared memory; what is there then is out of the reach of GPUs.
///
/// # Safety
/// As in Linux.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn remap_file_pages(
    at: *mut c_void,
    len: size_t,
    prot: c_int,
    page: size_t,
    flags: c_int,
) -> c_int {
    // The kernel takes the pages that both lie in.
    let (start, whole) = (at.addr() / PAGE * PAGE, len / PAGE * PAGE);
    // It takes no protection, either.
    if prot == 0
        && let Some(range) = pages(start, whole)
    {
        let mut heap = heap::lock();
        let space = heap.space();
        let (mut known, mut shared) = (false, true);
        space.each_in(&range, |_, piece| {
            known |= !piece.is_let_be();
            shared &= piece.backing.is_shared() || piece.is_let_be();
        });
        if !shared {
            return failed(libc::EINVAL);
        }
        if known {
            if space.vacate(&range).is_err() {
                return failed(libc::ENOMEM);
            }
            space.keep(&range, Why::Rearranged);
            space.leave(range.len());
        }
    }
    // SAFETY: passed on.
    unsafe { call::rearrange(at.addr(), len, prot, page, flags) }
}

/// Lets go of the lock for a call that may take its time, as when the server of a file is asked, or whoever reads a
/// userfaultfd. Nothing is moved until it has ended.
fn without(heap: heap::Locked) -> Call {
    let call = Call::begin();
    drop(heap);
    call
}

/// The pages that a call is about; `None`: the kernel refuses it, or there are none.
fn pages(at: usize, len: usize) -> Option<Range<usize>> {
    let end = at.checked_add(len.checked_next_multiple_of(PAGE)?)?;
    (at.is_multiple_of(PAGE) && at < end).then_some(at..end)
}

/// What of a mapping is got ready before the lock is taken.
struct Ready {
    contents: Option<Contents>,
    /// A descriptor of the file that is shared.
    file: Option<Kept>,
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.file.take().into_iter().for_each(Kept::close);
    }
}

/// # Safety
/// As mmap.
unsafe fn map(mut request: Request) -> Option<usize> {
    let replaces = request.flags & libc::MAP_FIXED != 0;
    let replaced = replaces.then(|| pages(request.at, request.len)).flatten();
    let mut heap = heap::lock();
    heap.space().start();
    let dormant = heap.space().is_dormant();
    let fits = unfit(heap.space(), request.len, request.flags).is_none();
    drop(heap);
    // Open until the mapping is there.
    let _file = if fits { shared::give_file(&mut request) } else { None };
    let mut ready = Ready { contents: None, file: None };
    if fits {
        let contents = if dormant { None } else { Contents::read(&request) };
        ready = Ready { contents, file: shared::keep(&request) };
    }
    if let Some(range) = replaced {
        let mut heap = heap::lock();
        let dormant = heap.space().is_dormant();
        let vacant = if dormant { heap.space().vacate(&range) } else { heap.space().withdraw(&range) };
        if vacant.is_err() {
            set_errno(libc::ENOMEM);
            return None;
        }
        let base;
        if dormant {
            let call = without(heap);
            // SAFETY: passed on.
            base = unsafe { request.carry_out() }?;
            heap = heap::lock();
            drop(call);
        } else {
            // SAFETY: passed on.
            base = unsafe { request.carry_out() }?;
        }
        let space = heap.space();
        on_mapped(space, &request, &range, &mut ready);
        // Of what was reserved, and comes part by part.
        space.join(range.start);
        space.join(range.end);
        return Some(base);
    }
    // Without the lock: nobody else knows yet what is mapped, and it may take its time.
    // SAFETY: passed on.
    let base = unsafe { request.carry_out() }?;
    if let Some(range) = pages(base, request.len) {
        on_mapped(heap::lock().space(), &request, &range, &mut ready);
    }
    Some(base)
}

/// Brings what has been mapped just now into the reach of GPUs.
fn on_mapped(space: &mut Space, request: &Request, range: &Range<usize>, ready: &mut Ready) {
    // Whatever the table says of the range has gone without its knowing, or by this call.
    let vacant = space.vacate(range).is_ok();
    space.forget_notes(range);
    let kind = request.kind;
    let dormant = space.is_dormant();
    let beyond = matches!(kind, Kind::Pinned(_)) && !space.is_trusted();
    if beyond || matches!(kind, Kind::Other) {
        request.why_left().into_iter().for_each(|why| space.note(range, why));
        if !dormant || matches!(kind, Kind::Other) && !request.may_wake() {
            return;
        }
    }
    let unfit = unfit(space, range.len(), request.flags);
    unfit.into_iter().for_each(|why| space.note(range, why));
    let reached = vacant
        && unfit.is_none()
        && match kind {
            _ if dormant => remember(space, request, range, ready),
            // SAFETY: the mapping is new, so nobody needs what is in it.
            Kind::Zeros => unsafe { space.cover(range.start, range.len(), Purpose::Mapping) },
            Kind::Shared { len } => {
                let at = u64::try_from(request.offset).ok();
                let shown = |(len, at)| {
                    ready.file.take().is_some_and(|file| space.import(range.start, len, file, at))
                };
                len.zip(at).is_some_and(shown)
            }
            Kind::Copy { .. } => ready.contents.as_ref().is_some_and(|contents| {
                let piece = Piece::new(range.start, contents.len(), Purpose::File, Backing::Own);
                // SAFETY: the arena has as many bytes.
                let copy = |to| unsafe { contents.copy_to(to) };
                // SAFETY: the mapping is new, so nobody uses it yet.
                unsafe { space.adopt_piece(&piece, copy) }
            }),
            Kind::Pinned(sharing) => {
                let part = upper_part(range, request.flags);
                if part != *range {
                    space.note(&(range.start..part.start), Why::DeepStack);
                }
                space.pin(&part, sharing)
            }
            // Without a file there is nothing to show.
            Kind::SharedZeros | Kind::Other => false,
        };
    if !reached && !matches!(kind, Kind::Other) {
        space.leave(range.len());
    }
}

/// Takes note of what has been mapped just now, as long as the process has asked for no device. False: it stays out of
/// reach.
fn remember(space: &mut Space, request: &Request, range: &Range<usize>, ready: &mut Ready) -> bool {
    let upper = upper_part(range, request.flags);
    let (part, purpose, wakes) = match request.kind {
        Kind::Zeros => (range.clone(), Purpose::Mapping, Wakes::Arena),
        Kind::Copy { len: Some(len) } if len <= MAX_FILE => {
            (range.start..range.start + len, Purpose::File, Wakes::Copy)
        }
        Kind::Shared { len: Some(len) } => {
            let (Ok(at), file @ Some(_)) = (u64::try_from(request.offset), ready.file) else { return false };
            (range.start..range.start + len, Purpose::Mapping, Wakes::Shared { file, at })
        }
        Kind::Pinned(sharing) => (upper, Purpose::Mapping, Wakes::Pinned(sharing)),
        // It may be readable and writable by then.
        Kind::Other => (range.clone(), Purpose::Mapping, Wakes::Arena),
        _ => return false,
    };
    let known = space.add_dormant(&part, purpose, request.prot, wakes);
    if known && matches!(wakes, Wakes::Shared { .. }) {
        ready.file = None;
    }
    known
}

/// Why memory of that size is not worth asking for. `None`: it is.
fn unfit(space: &Space, len: usize, flags: c_int) -> Option<Why> {
    // Before there is an agent its limits are not known.
    let within = space.is_dormant() || u64::try_from(len).is_ok_and(|len| len <= space.max_arena_bytes());
    if flags & libc::MAP_NORESERVE != 0 && len > MAX_RESERVED {
        Some(Why::Reserved)
    } else {
        (!within).then_some(TOO_LARGE)
    }
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
    space.forget_notes(range);
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

/// Changes a protection by `call`, piece by piece and gap by gap: where the kernel stops in the middle, the table has what
/// has been changed by then, and fork goes by that.
///
/// # Safety
/// The caller has the right to the range, and `call` changes nothing else.
unsafe fn protect(at: usize, len: usize, prot: c_int, call: impl Fn(&Range<usize>) -> c_int) -> c_int {
    let Some(range) = pages(at, len) else { return call(&(at..at.wrapping_add(len))) };
    let mut heap = heap::lock();
    let space = heap.space();
    if !space.has(&range) {
        let _call = without(heap);
        return call(&range);
    }
    let prot = prot & (READ_WRITE | libc::PROT_EXEC);
    // Of what stays in the table, the table knows it.
    let (mut same, mut forgotten) = (true, false);
    space.each_in(&range, |_, piece| {
        same &= piece.prot == prot;
        forgotten |= matches!(piece.backing, Backing::Shared { .. } | Backing::Pinned { .. });
    });
    if same {
        return call(&range);
    }
    let split = if prot == READ_WRITE { space.change(&range, |_| {}) } else { space.withdraw(&range) };
    if split.is_err() {
        return failed(libc::ENOMEM);
    }
    if forgotten && prot != READ_WRITE {
        space.note(&range, Why::Protected);
    }
    let (mut done, mut result) = (range.start, 0);
    let gap = |gap: Range<usize>| if gap.is_empty() { 0 } else { call(&gap) };
    space.each_in(&range, |space, piece| {
        if result == 0 {
            result = gap(done..piece.base);
        }
        if result == 0 {
            result = call(&piece.range());
            done = piece.end();
        }
        if result == 0 {
            // It is one piece, so there is nothing to split.
            space.change(&piece.range(), |piece| piece.prot = prot).ok();
            space.join(piece.base);
        }
    });
    space.join(range.end);
    if result == 0 { gap(done..range.end) } else { result }
}

/// The part of a piece that lies in a range.
fn part_of(piece: &Piece, range: &Range<usize>) -> Range<usize> {
    piece.base.max(range.start)..piece.end().min(range.end)
}
