//! Globals of libraries that come by dlopen, and go.
//!
//! The loader looks at who calls dlopen: a name without a slash, or with a `$`, is looked for where the calling object
//! says. So such calls are handed on as they come, and what they load is moved with the next library, or never. Nor is
//! what is loaded while there are other threads, or by dlmopen. All that is once the process has asked for a device: then
//! those of all that is loaded are moved.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

use crate::globals::{adopt_loaded, headers_of, pages_of, place_of};
use crate::heap;
use crate::piece::{Piece, Purpose};
use crate::real::Real;
use libc::{c_char, c_int, c_void, dl_phdr_info, size_t};
use std::ffi::CStr;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

static DLOPEN: Real = Real::new(c"dlopen");
/// Objects that have been seen: those behind are new.
static SEEN: AtomicUsize = AtomicUsize::new(usize::MAX);
/// Objects that the program began with, which stay.
static BEGAN: AtomicUsize = AtomicUsize::new(usize::MAX);

type Open = unsafe extern "C-unwind" fn(*const c_char, c_int) -> *mut c_void;
type Close = unsafe extern "C-unwind" fn(*mut c_void) -> c_int;

/// As in POSIX. On other processors libraries that are loaded later keep their globals out of reach.
///
/// # Safety
/// As in POSIX.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void {
    // Goes on to the function that is chosen, with the caller's arguments and as if the caller had called that one.
    std::arch::naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {choose}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        choose = sym choose,
    )
}

/// # Safety
/// As `dlopen`.
#[cfg(target_arch = "x86_64")]
unsafe extern "C" fn choose(path: *const c_char, _flags: c_int) -> *const c_void {
    // SAFETY: the caller's name ends with a zero.
    let name = if path.is_null() { &[] } else { unsafe { CStr::from_ptr(path) }.to_bytes() };
    if name.contains(&b'/') && !name.contains(&b'$') {
        load as Open as *const c_void
    } else {
        DLOPEN.address()
    }
}

unsafe extern "C-unwind" fn load(path: *const c_char, flags: c_int) -> *mut c_void {
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    let open = unsafe { std::mem::transmute::<*const c_void, Option<Open>>(DLOPEN.address()) };
    let Some(open) = open else { return std::ptr::null_mut() };
    // SAFETY: passed on.
    let opened = unsafe { open(path, flags) };
    let now = count();
    let before = SEEN.swap(now, Ordering::AcqRel);
    if before < now {
        adopt_loaded(before);
    }
    opened
}

/// Takes note of what the program begins with.
pub fn begin() {
    BEGAN.store(count(), Ordering::Release);
}

/// How many objects that is.
pub fn began() -> usize {
    BEGAN.load(Ordering::Acquire)
}

/// Takes note of what is loaded by now, whose globals have been moved.
pub fn all_seen() {
    SEEN.store(count(), Ordering::Release);
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dlclose(handle: *mut c_void) -> c_int {
    static REAL: Real = Real::new(c"dlclose");
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    let close = unsafe { std::mem::transmute::<*const c_void, Option<Close>>(REAL.address()) };
    let Some(close) = close else { return -1 };
    // SAFETY: passed on.
    let closed = unsafe { close(handle) };
    forget_unloaded();
    // Those that are left are among the first ones still, so a new one is never taken for an old one, or twice.
    SEEN.fetch_min(count(), Ordering::AcqRel);
    closed
}

/// Takes globals out of the table of which the library is gone: the loader has unmapped them.
fn forget_unloaded() {
    let mut rest = 0..usize::MAX;
    while let Some(piece) = next_loaded(&mut rest) {
        // Without the heap's lock: the loader has one of its own, under which globals are moved.
        if !is_loaded(piece.base) {
            let mut heap = heap::lock();
            // Another thread may have something there already, and its mapping has put that in the table.
            if heap.space().find(piece.base).is_some_and(|found| found.purpose == Purpose::Loaded) {
                // It begins and ends with pieces, so it cannot fail.
                heap.space().vacate(&piece.range()).ok();
            }
        }
    }
}

fn next_loaded(rest: &mut Range<usize>) -> Option<Piece> {
    let mut heap = heap::lock();
    while let Some(piece) = heap.space().first_in(rest) {
        rest.start = piece.end();
        if piece.purpose == Purpose::Loaded {
            return Some(piece);
        }
    }
    None
}

fn count() -> usize {
    extern "C" fn one_more(_info: *mut dl_phdr_info, _size: size_t, count: *mut c_void) -> c_int {
        // SAFETY: it is what is passed below, which waits for this.
        unsafe { *count.cast::<usize>() += 1 };
        0
    }
    let mut count = 0usize;
    // SAFETY: the callback takes what it is given here, and its signature is the one that is asked for.
    unsafe { libc::dl_iterate_phdr(Some(one_more), (&raw mut count).cast()) };
    count
}

/// Whether an address is one of an object that is loaded.
fn is_loaded(address: usize) -> bool {
    extern "C" fn holds(info: *mut dl_phdr_info, _size: size_t, address: *mut c_void) -> c_int {
        // SAFETY: it is what is passed below, which waits for this.
        let address = unsafe { address.cast::<usize>().read() };
        // SAFETY: the loader passes a whole structure that lives until this returns.
        let info = unsafe { info.read() };
        let segments = headers_of(&info).iter().filter(|header| header.p_type == libc::PT_LOAD);
        let mut pages = segments.map(|header| pages_of(place_of(&info, header)));
        c_int::from(pages.any(|pages| pages.contains(&address)))
    }
    let mut address = address;
    // SAFETY: as above.
    unsafe { libc::dl_iterate_phdr(Some(holds), (&raw mut address).cast()) != 0 }
}
