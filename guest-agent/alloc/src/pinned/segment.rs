//! System V shared memory: pinned when it is attached, cut before it is detached.

#![expect(unsafe_code, reason = "takes the place of shmat and shmdt")]

use crate::exports::set_errno;
use crate::heap;
use crate::numbered::KERNEL;
use crate::piece::{Backing, PAGE, Sharing, Wakes};
use libc::{c_int, c_void};
use std::ops::Range;

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmat(id: c_int, at: *const c_void, flags: c_int) -> *mut c_void {
    // A segment that may not be looked at may not be attached either, and has no size.
    let len = bytes_of(id).unwrap_or(0);
    let mut heap = heap::lock();
    let space = heap.space();
    space.start();
    // It is attached over other memory.
    let replaced =
        (flags & libc::SHM_REMAP != 0).then(|| whole_pages(at.addr() & !(PAGE - 1), len)).flatten();
    if replaced.is_some_and(|range| space.withdraw(&range).is_err()) {
        set_errno(libc::ENOMEM);
        return std::ptr::without_provenance_mut(usize::MAX);
    }
    // SAFETY: passed on.
    let attached = unsafe { KERNEL(libc::SYS_shmat, id, at, flags) };
    let base = usize::try_from(attached).ok();
    if let Some((base, range)) = base.and_then(|base| Some((base, whole_pages(base, len)?))) {
        let vacant = space.vacate(&range).is_ok();
        let wanted = (space.is_dormant() || space.is_trusted()) && flags & libc::SHM_RDONLY == 0;
        if wanted && !(vacant && space.pin_or_remember(&range, Sharing::Segment(base))) {
            space.leave(range.len());
        }
    }
    std::ptr::with_exposed_provenance_mut(base.unwrap_or(usize::MAX))
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn shmdt(at: *const c_void) -> c_int {
    let mut heap = heap::lock();
    let space = heap.space();
    space.each_in(&(0..usize::MAX), |space, piece| {
        let of = |sharing: Sharing| sharing == Sharing::Segment(at.addr());
        let (Backing::Pinned { sharing, .. } | Backing::Dormant(Wakes::Pinned(sharing))) = piece.backing
        else {
            return;
        };
        if of(sharing) {
            // It is a piece as a whole, so there is nothing to split.
            space.vacate(&piece.range()).ok();
        }
    });
    // SAFETY: passed on.
    let detached = unsafe { KERNEL(libc::SYS_shmdt, at) };
    c_int::try_from(detached).unwrap_or(-1)
}

fn bytes_of(id: c_int) -> Option<usize> {
    // SAFETY: a segment's state is plain data for which all zeros is a value.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a state that lives here.
    let told = unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut state) };
    (told == 0).then_some(state.shm_segsz)
}

fn whole_pages(base: usize, len: usize) -> Option<Range<usize>> {
    let end = base.checked_add(len.checked_next_multiple_of(PAGE)?)?;
    (base < end).then_some(base..end)
}
