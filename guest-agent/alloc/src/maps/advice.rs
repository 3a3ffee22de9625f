//! madvise: advice that changes what a program finds in its memory means the same for arenas as for anonymous memory.

#![expect(unsafe_code, reason = "makes system calls that change memory")]

use super::{call, part_of};
use crate::left::Why;
use crate::piece::{InChild, Piece, Purpose};
use crate::space::Space;
use libc::c_int;
use std::ops::Range;

const MADV_DONTNEED_LOCKED: c_int = 24;
const MADV_GUARD_INSTALL: c_int = 102;

/// Whether the kernel does all that is to be done; what the table must know of it, it does then.
pub fn is_the_kernels(space: &mut Space, range: &Range<usize>, advice: c_int) -> bool {
    if space.is_dormant() && matches!(advice, MADV_GUARD_INSTALL | libc::MADV_DONTDUMP) {
        // An arena would have neither guards nor secrets.
        space.let_be(range, Why::Advised);
        return true;
    }
    if let Some(in_child) = in_child(advice) {
        space.take_advice(range, in_child);
    }
    let mut plain = in_child(advice).is_none();
    space.each_in(range, |_, piece| plain &= !piece.was_files());
    plain && space.is_dormant() || !space.knows(range)
}

/// What advice says of forked children.
fn in_child(advice: c_int) -> Option<InChild> {
    match advice {
        libc::MADV_DONTFORK => Some(InChild::Nothing),
        libc::MADV_WIPEONFORK => Some(InChild::Zeros),
        libc::MADV_DOFORK | libc::MADV_KEEPONFORK => Some(InChild::Copy),
        _ => None,
    }
}

/// # Safety
/// As madvise.
pub unsafe fn advise(space: &mut Space, range: &Range<usize>, advice: c_int) -> c_int {
    // SAFETY: passed on.
    let pass_on = |range: &Range<usize>| unsafe { call::advise(range, advice) };
    match advice {
        libc::MADV_DONTNEED | MADV_DONTNEED_LOCKED => {
            // SAFETY: the caller needs the contents no more.
            return each_part(space, range, false, pass_on, |space, piece, part| unsafe {
                clear(space, piece, part)
            });
        }
        // These pages may be freed at any time, so it may as well be never.
        libc::MADV_FREE => return each_part(space, range, false, pass_on, |_, _, _| 0),
        libc::MADV_REMOVE => return remove(space, range, pass_on),
        MADV_GUARD_INSTALL => {
            return each_part(space, range, false, pass_on, |space, _, part| {
                // SAFETY: the caller needs the contents no more.
                let forgotten = unsafe { space.forget(part) };
                if forgotten.is_ok() { pass_on(part) } else { call::failed(libc::ENOMEM) }
            });
        }
        _ => {}
    }
    let Some(in_child) = in_child(advice) else { return pass_on(range) };
    if space.change(range, |piece| piece.in_child = in_child).is_err() {
        return call::failed(libc::ENOMEM);
    }
    // The kernel is told for memory that it copies by itself.
    let kept = |_: &mut Space, piece: &Piece, part: &Range<usize>| {
        if piece.backing.is_agents() { 0 } else { pass_on(part) }
    };
    each_part(space, range, true, pass_on, kept)
}

/// Holes in a file: the agent has the pages that were there, and the process gets others. To private memory this advice
/// cannot be given.
fn remove(space: &mut Space, range: &Range<usize>, pass_on: impl Fn(&Range<usize>) -> c_int) -> c_int {
    let mut private = false;
    space.each_in(range, |_, piece| private |= piece.backing.keeps_pages());
    if private {
        return call::failed(libc::EINVAL);
    }
    if space.withdraw(range).is_err() {
        return call::failed(libc::ENOMEM);
    }
    pass_on(range)
}

/// Calls `kept` for each part of a range whose pages must stay, and `others` for what lies between, in order.
/// `for_child`: it is about what a forked child has.
/// Returns the first failure.
fn each_part(
    space: &mut Space,
    range: &Range<usize>,
    for_child: bool,
    others: impl Fn(&Range<usize>) -> c_int,
    mut kept: impl FnMut(&mut Space, &Piece, &Range<usize>) -> c_int,
) -> c_int {
    let mut done = range.start;
    let mut result = 0;
    let mut add = |new: c_int| result = if result == 0 { new } else { result };
    let between = |gap: Range<usize>| if gap.is_empty() { 0 } else { others(&gap) };
    space.each_in(range, |space, piece| {
        if piece.backing.keeps_pages() || piece.was_files() && !for_child {
            let part = part_of(&piece, range);
            add(between(done..part.start));
            add(kept(space, &piece, &part));
            done = part.end;
        }
    });
    add(between(done..range.end));
    result
}

/// Zeros in a part of a piece whose pages stay. A file's contents stay as they are: the file may be closed.
///
/// # Safety
/// Nobody needs the contents.
unsafe fn clear(space: &mut Space, piece: &Piece, part: &Range<usize>) -> c_int {
    if piece.purpose == Purpose::File {
        return 0;
    }
    if piece.prot & libc::PROT_WRITE != 0 {
        let at = std::ptr::with_exposed_provenance_mut::<u8>(part.start);
        // SAFETY: the part is mapped and writable.
        unsafe { at.write_bytes(0, part.len()) };
        return 0;
    }
    // GPUs do not reach it, so there is nothing to lose by taking other memory.
    // SAFETY: nobody needs the contents.
    let forgotten = unsafe { space.forget(part) };
    if forgotten.is_ok() { 0 } else { call::failed(libc::ENOMEM) }
}
