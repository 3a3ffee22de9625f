//! Memory of the program break: what is added is pinned, in whole pages, and what is given back is cut before.
//!
//! Each step has an arena of its own, so a program that takes many small ones comes to the agent's limit of arenas.

#![expect(unsafe_code, reason = "takes the place of brk and sbrk")]

use crate::exports::{errno, set_errno};
use crate::heap;
use crate::numbered::KERNEL;
use crate::piece::{PAGE, Sharing};
use crate::real::Real;
use crate::space::Space;
use libc::{c_int, c_long, c_void, intptr_t};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

type Sbrk = unsafe extern "C" fn(intptr_t) -> *mut c_void;
type Brk = unsafe extern "C" fn(*mut c_void) -> c_int;

fn real_sbrk() -> Option<Sbrk> {
    static REAL: Real = Real::new(c"sbrk");
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    unsafe { std::mem::transmute::<*const c_void, Option<Sbrk>>(REAL.address()) }
}

fn real_brk() -> Option<Brk> {
    static REAL: Real = Real::new(c"brk");
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    unsafe { std::mem::transmute::<*const c_void, Option<Brk>>(REAL.address()) }
}

/// As in Unix.
///
/// # Safety
/// As in Unix.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sbrk(increment: intptr_t) -> *mut c_void {
    let failed = std::ptr::without_provenance_mut(usize::MAX);
    let Some(real) = real_sbrk() else {
        set_errno(libc::ENOMEM);
        return failed;
    };
    if increment == 0 {
        // SAFETY: it changes nothing.
        return unsafe { real(0) };
    }
    // The C library goes by the break that it has set itself.
    // SAFETY: as above.
    let wanted = || unsafe { real(0) }.addr().wrapping_add_signed(increment);
    // SAFETY: passed on.
    move_break(wanted, || unsafe { real(increment) }).unwrap_or(failed)
}

/// As in Unix.
///
/// # Safety
/// As in Unix.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn brk(end: *mut c_void) -> c_int {
    let Some(real) = real_brk() else {
        set_errno(libc::ENOMEM);
        return -1;
    };
    // SAFETY: passed on.
    move_break(|| end.addr(), || unsafe { real(end) }).unwrap_or(-1)
}

/// As the kernel has it: returns the break as it then is.
///
/// # Safety
/// As `brk`.
pub unsafe fn change_break(end: usize) -> c_long {
    // Who asks for none looks where it is.
    if end != 0 {
        // SAFETY: passed on.
        move_break(|| end, || unsafe { KERNEL(libc::SYS_brk, end) });
    }
    c_long::try_from(current()).unwrap_or(-1)
}

/// Goes to the kernel with what may move the break to where `wanted` says, under the lock as the call itself. What is given
/// up leaves GPUs before, and what is there afterwards comes to them, be it because the kernel has refused. `None`, and
/// errno: there is no room in the table.
fn move_break<T>(wanted: impl FnOnce() -> usize, call: impl FnOnce() -> T) -> Option<T> {
    static LOWEST: AtomicUsize = AtomicUsize::new(usize::MAX);
    let mut heap = heap::lock();
    let space = heap.space();
    let before = current();
    // Below where it was first stand the program's globals, which are none of it: the kernel refuses to go there.
    let lowest = LOWEST.fetch_min(before, Ordering::Relaxed).min(before);
    let kept = page_behind(wanted().max(lowest).min(before));
    let gone = kept..page_behind(before);
    if !gone.is_empty() && space.vacate(&gone).is_err() {
        set_errno(libc::ENOMEM);
        return None;
    }
    let result = call();
    let said = errno();
    add(space, &(kept..page_behind(current())));
    set_errno(said);
    Some(result)
}

/// The kernel's break. The C library does not know of what is done by number.
fn current() -> usize {
    // SAFETY: it changes nothing.
    let told = unsafe { KERNEL(libc::SYS_brk, 0_usize) };
    usize::try_from(told).unwrap_or(0)
}

/// The first page that a break leaves alone.
fn page_behind(end: usize) -> usize {
    end.checked_next_multiple_of(PAGE).unwrap_or(end)
}

fn add(space: &mut Space, range: &Range<usize>) {
    space.start();
    if range.is_empty() || !(space.is_dormant() || space.is_trusted()) {
        return;
    }
    if space.vacate(range).is_err() || !space.pin_or_remember(range, Sharing::Private) {
        space.leave(range.len());
    }
    space.join(range.start);
}
