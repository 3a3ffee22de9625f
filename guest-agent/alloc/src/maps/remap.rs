//! mremap: arenas do not move. Where the kernel would move memory, there are new arenas and copies; another thread that
//! writes meanwhile does so at its own risk, as ever.

#![expect(unsafe_code, reason = "copies and unmaps memory")]

use super::{READ_WRITE, call, pages, part_of, shared, unfit, unmap, without};
use crate::exports::{errno, set_errno};
use crate::fd::Kept;
use crate::heap::{self, Locked};
use crate::numbered::KERNEL;
use crate::piece::{Backing, InChild, PAGE, Piece, Purpose, Sharing, Wakes};
use crate::space::{Space, copy_piece, map_anonymous};
use libc::c_int;
use rustix::mm::MapFlags;
use std::ops::Range;

/// What is asked of mremap.
#[derive(Clone, Copy)]
pub struct Request {
    pub at: usize,
    pub len: usize,
    pub new_len: usize,
    pub flags: c_int,
    pub to: usize,
}

/// Memory that is to have another size, or place.
struct Old {
    range: Range<usize>,
    purpose: Purpose,
    prot: c_int,
    in_child: InChild,
}

/// All that there are.
const FLAGS: c_int = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;

impl Request {
    fn has(&self, flag: c_int) -> bool {
        self.flags & flag != 0
    }

    /// Whether memory stays where it is, and loses its end at most.
    fn shortens(&self) -> bool {
        let shorter = self.new_len.div_ceil(PAGE) <= self.len.div_ceil(PAGE);
        shorter && !self.has(libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP)
    }

    /// # Safety
    /// As mremap.
    unsafe fn carry_out(&self) -> Option<usize> {
        let Self { at, len, new_len, flags, to } = *self;
        // SAFETY: passed on.
        call::address(unsafe { KERNEL(libc::SYS_mremap, at, len, new_len, flags, to) })
    }
}

fn refused<T>(errno: c_int) -> Option<T> {
    set_errno(errno);
    None
}

/// # Safety
/// As mremap.
pub unsafe fn remap(mut heap: Locked, request: &Request) -> Option<usize> {
    let (Some(old), Some(new)) = (pages(request.at, request.len), pages(request.at, request.new_len)) else {
        // Either the kernel refuses it, or it makes a second mapping of memory that is the program's own.
        // SAFETY: passed on.
        return unsafe { request.carry_out() };
    };
    if request.flags & !FLAGS != 0 {
        return refused(libc::EINVAL);
    }
    let target = if request.has(libc::MREMAP_FIXED) { pages(request.to, new.len()) } else { None };
    if request.has(libc::MREMAP_FIXED) {
        let apart = |target: &Range<usize>| target.end <= old.start || old.end <= target.start;
        if !request.has(libc::MREMAP_MAYMOVE) || !target.as_ref().is_some_and(apart) {
            return refused(libc::EINVAL);
        }
    }
    let space = heap.space();
    if target.as_ref().is_some_and(|target| space.withdraw(target).is_err()) {
        return refused(libc::ENOMEM);
    }
    let first = match space.first_in(&old) {
        Some(first) if !first.is_let_be() => first,
        _ if request.shortens() && space.knows(&old) => {
            // SAFETY: passed on.
            return unsafe { shorten(space, request, &old, new.len()) };
        }
        // SAFETY: passed on.
        _ => return unsafe { remap_unknown(heap, request, &old, new.len()) },
    };
    match first.backing {
        // SAFETY: passed on.
        Backing::Shared { .. } if request.shortens() => unsafe { shorten(space, request, &old, new.len()) },
        // SAFETY: passed on.
        Backing::Shared { .. } => unsafe { remap_shared(space, request, &first, &old, new.len()) },
        // SAFETY: passed on.
        Backing::Pinned { sharing, .. } => unsafe { remap_pinned(space, request, sharing, &old, new.len()) },
        // SAFETY: passed on.
        _ => unsafe { remap_own(space, request, old, new.len(), target) },
    }
}

/// The kernel moves memory of a process that has asked for no device, and the table follows: without the lock, because
/// whoever reads a userfaultfd is waited for.
///
/// # Safety
/// As mremap.
pub unsafe fn remap_dormant(mut heap: Locked, request: &Request) -> Option<usize> {
    let (Some(old), Some(new)) = (pages(request.at, request.len), pages(request.at, request.new_len)) else {
        let _call = without(heap);
        // SAFETY: passed on.
        return unsafe { request.carry_out() };
    };
    let space = heap.space();
    let target = if request.has(libc::MREMAP_FIXED) { pages(request.to, new.len()) } else { None };
    // The old range begins with a piece then, if it lies in any.
    if space.change(&old, |_| {}).is_err() {
        return refused(libc::ENOMEM);
    }
    let mut first = space.find(old.start);
    // A copy of a file does not grow: what is further on in it is not known any more.
    if new.len() > old.len() && first.as_ref().is_some_and(Piece::was_files) {
        return refused(libc::ENOMEM);
    }
    if let Some(first) = &mut first {
        first.backing.file().into_iter().for_each(|file| *file = file.and_then(|file| file.again()));
    }
    let gone = if request.has(libc::MREMAP_DONTUNMAP) { 0..0 } else { old.clone() };
    for range in [Some(gone), target].into_iter().flatten() {
        space.vacate(&range).ok();
    }
    let call = without(heap);
    // SAFETY: passed on.
    let moved = unsafe { request.carry_out() };
    // Waiting for the lock may set another one.
    let errno = errno();
    let mut heap = heap::lock();
    drop(call);
    let now = moved.map_or(old.clone(), |moved| moved..moved + new.len());
    follow(heap.space(), first, &old, &now);
    if moved.is_none() {
        set_errno(errno);
    }
    moved
}

/// Takes note that what a piece began with is at another place, or of another length.
fn follow(space: &mut Space, first: Option<Piece>, old: &Range<usize>, now: &Range<usize>) {
    let vacant = space.vacate(now).is_ok();
    let Some(mut first) = first else { return };
    // Of a file that is shorter than its mapping there is no more than that.
    let known = if first.len < old.len() { first.len.min(now.len()) } else { now.len() };
    // A System V segment that was moved would not be found when it is detached.
    let lost = matches!(first.backing, Backing::Dormant(Wakes::Pinned(Sharing::Segment(_))));
    if lost || !vacant || !space.add_as(&(now.start..now.start + known), &first) {
        first.backing.file().and_then(Option::take).into_iter().for_each(Kept::close);
    }
}

/// The kernel takes the end away, of what the program has mapped itself.
///
/// # Safety
/// As mremap.
unsafe fn shorten(space: &mut Space, request: &Request, old: &Range<usize>, new_len: usize) -> Option<usize> {
    let end = old.start + new_len..old.end;
    if space.withdraw(&end).is_err() {
        return refused(libc::ENOMEM);
    }
    // SAFETY: passed on.
    let same = unsafe { request.carry_out() }?;
    // It was split already, so it cannot fail.
    space.vacate(&end).ok();
    Some(same)
}

/// The kernel moves memory that is none of the library's matter, without the lock: whoever reads a userfaultfd is waited
/// for.
///
/// # Safety
/// As mremap.
unsafe fn remap_unknown(
    mut heap: Locked,
    request: &Request,
    old: &Range<usize>,
    new_len: usize,
) -> Option<usize> {
    if heap.space().knows(old) {
        // The kernel moves one mapping at a time.
        return refused(libc::EFAULT);
    }
    // Before the call: afterwards another thread may have memory there.
    if heap.space().vacate(old).is_err() {
        return refused(libc::ENOMEM);
    }
    let call = without(heap);
    // SAFETY: passed on.
    let moved = unsafe { request.carry_out() };
    let errno = errno();
    let mut heap = heap::lock();
    drop(call);
    match moved {
        // Where there is no room to split a piece, it stays: the memory has moved all the same.
        Some(moved) => drop(heap.space().vacate(&(moved..moved + new_len))),
        None => set_errno(errno),
    }
    moved
}

/// The kernel moves the program's own mapping, and the agent is shown it anew.
///
/// # Safety
/// As mremap.
unsafe fn remap_shared(
    space: &mut Space,
    request: &Request,
    first: &Piece,
    old: &Range<usize>,
    new_len: usize,
) -> Option<usize> {
    let Backing::Shared { id, offset, file, at } = first.backing else { return refused(libc::EFAULT) };
    // Of a file that is shorter than its mapping there is no more than that.
    let (mut whole, mut alone, mut end) = (true, true, old.start);
    space.each_in(old, |_, piece| {
        let expected = (id, offset + (piece.base - first.base));
        let found = match piece.backing {
            Backing::Shared { id, offset, .. } => Some((id, offset)),
            _ => None,
        };
        whole &= piece.base <= end && found == Some(expected);
        alone &= found.is_some() || piece.is_let_be();
        end = piece.end().min(old.end);
    });
    if !alone {
        // Arenas do not move, and the kernel moves one mapping at a time.
        return refused(libc::EFAULT);
    }
    // Where the range begins in the file.
    let at = at + u64::try_from(old.start.saturating_sub(first.base)).unwrap_or(0);
    let again = file.filter(|_| whole).and_then(|file| file.again());
    if space.withdraw(old).is_err() {
        again.into_iter().for_each(Kept::close);
        return refused(libc::ENOMEM);
    }
    // SAFETY: passed on.
    let moved = unsafe { request.carry_out() };
    let errno = errno();
    let range = moved.map_or(old.start..end, |moved| moved..moved + new_len);
    let vacant = moved.is_none() || space.vacate(&range).is_ok();
    if again.is_some_and(|file| vacant && shared::import_kept(space, &range, file, at)) {
        // It is one piece, so there is nothing to split.
        space.change(&range, |piece| piece.in_child = first.in_child).ok();
    } else {
        space.leave(range.len());
    }
    if moved.is_none() {
        set_errno(errno);
    }
    moved
}

/// The kernel moves what the library had pinned, and private memory is pinned anew. A System V segment that was moved is
/// not: the library would not find it when it is detached.
///
/// # Safety
/// As mremap.
unsafe fn remap_pinned(
    space: &mut Space,
    request: &Request,
    sharing: Sharing,
    old: &Range<usize>,
    new_len: usize,
) -> Option<usize> {
    if space.withdraw(old).is_err() {
        return refused(libc::ENOMEM);
    }
    if space.has(old) {
        // Arenas do not move, and the kernel moves one mapping at a time.
        return refused(libc::EFAULT);
    }
    // SAFETY: passed on.
    let moved = unsafe { request.carry_out() };
    let range = moved.map_or(old.clone(), |moved| moved..moved + new_len);
    let vacant = moved.is_none() || space.vacate(&range).is_ok();
    if !(vacant && sharing == Sharing::Private && space.pin(&range, sharing)) {
        space.leave(range.len());
    }
    moved
}

/// # Safety
/// As mremap.
unsafe fn remap_own(
    space: &mut Space,
    request: &Request,
    range: Range<usize>,
    new_len: usize,
    target: Option<Range<usize>>,
) -> Option<usize> {
    let (keep, may_move) = (request.has(libc::MREMAP_DONTUNMAP), request.has(libc::MREMAP_MAYMOVE));
    if keep && (!may_move || new_len != range.len()) {
        return refused(libc::EINVAL);
    }
    let Some(old) = look(space, range) else { return refused(libc::EFAULT) };
    if old.purpose == Purpose::File && new_len > old.range.len() {
        // What is further on in the file is not known any more.
        return refused(libc::ENOMEM);
    }
    if target.is_none() && !keep {
        let end = old.range.start + new_len;
        // SAFETY: the caller has no use for what is behind the new end.
        if end < old.range.end && unsafe { unmap(space, &(end..old.range.end)) } != 0 {
            return None;
        }
        if end <= old.range.end || extend(space, &old, end) {
            return Some(old.range.start);
        }
        if !may_move {
            return refused(libc::ENOMEM);
        }
    }
    // What GPUs write must not be lost between the copy and the end of the old memory; where that stays, it goes on.
    let split = if keep { space.change(&old.range, |_| {}) } else { space.withdraw(&old.range) };
    if split.is_err() {
        return refused(libc::ENOMEM);
    }
    // SAFETY: passed on.
    let new = unsafe { moved(space, &old, new_len, target) }?;
    if keep {
        // SAFETY: the contents have moved.
        unsafe { super::advice::advise(space, &old.range, libc::MADV_DONTNEED) };
    } else {
        // SAFETY: as above.
        unsafe { unmap(space, &old.range) };
    }
    Some(new)
}

/// What is in a range, if it is one mapping of the program's.
fn look(space: &mut Space, range: Range<usize>) -> Option<Old> {
    let first = space.first_in(&range)?;
    let mut alike = true;
    space.each_in(&range, |_, piece| {
        let mapped = matches!(piece.purpose, Purpose::Mapping | Purpose::File);
        let own = !matches!(piece.backing, Backing::Shared { .. }) && !piece.is_let_be();
        alike &= mapped && own && piece.prot == first.prot;
    });
    let Piece { purpose, prot, in_child, .. } = first;
    alike.then_some(Old { range, purpose, prot, in_child })
}

/// Maps what is missing behind the old memory, if nothing is there.
fn extend(space: &mut Space, old: &Old, end: usize) -> bool {
    let more = old.range.end..end;
    // SAFETY: FIXED_NOREPLACE replaces nothing.
    let mapped = unsafe { map_anonymous(more.start, more.len(), old.prot, MapFlags::FIXED_NOREPLACE) };
    match mapped {
        Some(at) if at == more.start => {
            cover(space, &more, old);
            true
        }
        // Kernels before 4.17 take the address as a hint.
        Some(at) => {
            crate::space::unmap(at, more.len());
            false
        }
        None => false,
    }
}

/// New memory with what the old one has.
///
/// # Safety
/// Nobody needs what is at `target`.
unsafe fn moved(space: &mut Space, old: &Old, new_len: usize, target: Option<Range<usize>>) -> Option<usize> {
    let (at, flags) = target.map_or((0, MapFlags::empty()), |target| (target.start, MapFlags::FIXED));
    // SAFETY: as the caller says.
    let Some(at) = (unsafe { map_anonymous(at, new_len, READ_WRITE, flags) }) else {
        return refused(libc::ENOMEM);
    };
    let new = at..at + new_len;
    cover(space, &new, old);
    let from = old.range.start..old.range.end.min(old.range.start + new_len);
    // SAFETY: the new memory is writable, and nobody else knows it.
    let copied = unsafe { copy(space, &from, at) };
    // SAFETY: as above.
    let protected = old.prot == READ_WRITE || unsafe { call::protect(at, new_len, old.prot) } == 0;
    if copied && protected {
        return Some(at);
    }
    // SAFETY: as above.
    unsafe { unmap(space, &new) };
    refused(libc::EFAULT)
}

/// Has GPUs reach new memory, if it may be written.
fn cover(space: &mut Space, new: &Range<usize>, old: &Old) {
    if space.vacate(new).is_err() {
        return space.leave(new.len());
    }
    let wanted = old.prot == READ_WRITE;
    let unfit = unfit(space, new.len(), 0);
    unfit.filter(|_| wanted).into_iter().for_each(|why| space.note(new, why));
    // SAFETY: the memory was mapped just now, and nobody else knows it.
    let covered = wanted && unfit.is_none() && unsafe { space.cover(new.start, new.len(), old.purpose) };
    if covered {
        // It is one piece, so there is nothing to split.
        space.change(new, |piece| piece.in_child = old.in_child).ok();
        return;
    }
    space.add_own(new, old.purpose, old.prot);
    if wanted {
        space.leave(new.len());
    }
}

/// # Safety
/// `to` is writable for as many bytes as the range has.
unsafe fn copy(space: &mut Space, range: &Range<usize>, to: usize) -> bool {
    let mut done = range.start;
    let mut good = true;
    // SAFETY: as the caller says; what is not in the table may be anything.
    let gap = |gap: Range<usize>| unsafe { call::copy(gap.start, to + (gap.start - range.start), gap.len()) };
    space.each_in(range, |_, piece| {
        let part = part_of(&piece, range);
        let piece = Piece { base: part.start, len: part.len(), ..piece };
        // SAFETY: as the caller says; the piece is mapped as the table says.
        good = good
            && gap(done..part.start)
            && unsafe { copy_piece(&piece, to + (part.start - range.start), piece.len) };
        done = part.end;
    });
    good && gap(done..range.end)
}
