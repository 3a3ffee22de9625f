//! Memory of the program break: what is added is pinned, in whole pages, and what is given back is cut before.
//!
//! Each step has an arena of its own, so a program that takes many small ones comes to the agent's limit of arenas.

#![expect(unsafe_code, reason = "takes the place of brk and sbrk")]

use crate::exports::set_errno;
use crate::heap;
use crate::numbered::KERNEL;
use crate::piece::{PAGE, Sharing};
use crate::real::Real;
use crate::space::{Full, Space};
use libc::{c_int, c_long, c_void, intptr_t};
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
    let mut heap = heap::lock();
    let space = heap.space();
    let before = current();
    // The C library goes by the break that it has set itself.
    // SAFETY: it changes nothing.
    let after = unsafe { real(0) }.addr().wrapping_add_signed(increment);
    if give_back(space, before, after).is_err() {
        set_errno(libc::ENOMEM);
        return failed;
    }
    // SAFETY: passed on.
    let result = unsafe { real(increment) };
    if result != failed {
        add(space, before, after);
    }
    result
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
    let mut heap = heap::lock();
    let space = heap.space();
    let before = current();
    if give_back(space, before, end.addr()).is_err() {
        set_errno(libc::ENOMEM);
        return -1;
    }
    // SAFETY: passed on.
    let result = unsafe { real(end) };
    if result == 0 {
        add(space, before, end.addr());
    }
    result
}

/// As the kernel has it: returns the break as it then is.
///
/// # Safety
/// As `brk`.
pub unsafe fn change_break(end: usize) -> c_long {
    let mut heap = heap::lock();
    let space = heap.space();
    let before = current();
    // Who asks for none looks where it is.
    if end != 0 && give_back(space, before, end).is_ok() {
        // SAFETY: passed on.
        unsafe { KERNEL(libc::SYS_brk, end) };
    }
    let after = current();
    add(space, before, after);
    c_long::try_from(after).unwrap_or(-1)
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

/// Before the break goes down. Below where it was first stand the program's globals, which are none of it: the kernel
/// refuses to go there.
fn give_back(space: &mut Space, before: usize, after: usize) -> Result<(), Full> {
    static LOWEST: AtomicUsize = AtomicUsize::new(usize::MAX);
    let lowest = LOWEST.fetch_min(before, Ordering::Relaxed).min(before);
    let range = page_behind(after.max(lowest))..page_behind(before);
    if range.is_empty() { Ok(()) } else { space.vacate(&range) }
}

/// When the break has gone up.
fn add(space: &mut Space, before: usize, after: usize) {
    let range = page_behind(before)..page_behind(after);
    space.start();
    if range.is_empty() || !(space.is_dormant() || space.is_trusted()) {
        return;
    }
    if space.vacate(&range).is_err() || !space.pin_or_remember(&range, Sharing::Private) {
        space.leave(range.len());
    }
    space.join(range.start);
}
