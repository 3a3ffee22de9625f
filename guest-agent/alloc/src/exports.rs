//! The C functions of the library, and what runs when it is loaded.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

use crate::heap::{self, ALIGN};
use crate::piece::PAGE;
use crate::say::Line;
use crate::space::PATH;
use crate::{loaded, stack, streams, waking};
use guest_agent::client::Session;
use libc::{c_char, c_int, c_void, size_t};

#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

extern "C" fn at_load() {
    streams::watch();
    stack::watch();
    loaded::begin();
    let mut heap = heap::lock();
    heap.space().start();
    let early = heap.space().is_early();
    drop(heap);
    if early {
        waking::wake();
    }
}

/// For the C library's callers.
pub fn set_errno(errno: c_int) {
    // SAFETY: the C library returns a valid place of this thread.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

pub fn errno() -> c_int {
    // SAFETY: the C library returns a valid place of this thread.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.read() }
}

/// A block for the caller: without one, errno says so.
fn given(block: *mut u8) -> *mut c_void {
    if block.is_null() {
        set_errno(libc::ENOMEM);
    }
    block.cast()
}

fn aligned(align: size_t, size: size_t) -> *mut c_void {
    if !align.is_power_of_two() {
        set_errno(libc::EINVAL);
        return std::ptr::null_mut();
    }
    given(heap::lock().allocate(size, align))
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: size_t) -> *mut c_void {
    given(heap::lock().allocate(size, ALIGN))
}

/// As in C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(block: *mut c_void) {
    if !block.is_null() {
        // SAFETY: the caller gives up a block that this library gave out.
        unsafe { heap::lock().free(block.cast()) };
    }
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    match count.checked_mul(size) {
        Some(bytes) => given(heap::lock().allocate_zeroed(bytes)),
        None => given(std::ptr::null_mut()),
    }
}

/// As in C; size 0 frees.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(block: *mut c_void, size: size_t) -> *mut c_void {
    if block.is_null() {
        return malloc(size);
    }
    if size == 0 {
        // SAFETY: the caller gives it up.
        unsafe { free(block) };
        return std::ptr::null_mut();
    }
    // SAFETY: the caller's block is one that this library gave out.
    given(unsafe { heap::lock().resize(block.cast(), size) })
}

/// As in C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(block: *mut c_void, count: size_t, size: size_t) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: passed on.
        Some(bytes) => unsafe { realloc(block, bytes) },
        None => given(std::ptr::null_mut()),
    }
}

/// As in C.
///
/// # Safety
/// `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: size_t, size: size_t) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<usize>()) {
        return libc::EINVAL;
    }
    let block = heap::lock().allocate(size, align);
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's pointer is writable.
    unsafe { out.write(block.cast()) };
    0
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    aligned(align, size)
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    aligned(align, size)
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn valloc(size: size_t) -> *mut c_void {
    aligned(PAGE, size)
}

/// As in C.
#[unsafe(no_mangle)]
pub extern "C" fn pvalloc(size: size_t) -> *mut c_void {
    match size.checked_next_multiple_of(PAGE) {
        Some(size) => aligned(PAGE, size),
        None => given(std::ptr::null_mut()),
    }
}

/// As in C.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(block: *mut c_void) -> size_t {
    if block.is_null() {
        return 0;
    }
    // SAFETY: the caller's block is one that this library gave out.
    unsafe { heap::lock().usable(block.cast()) }
}

/// Says which context has this process' memory, which is brought into the reach of GPUs at the first call. 0, or ENOTCONN
/// where GPUs do not reach it. A forked child has another one.
///
/// # Safety
/// `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_alloc_session(out: *mut Session) -> c_int {
    heap::lock().space().start();
    waking::wake();
    let mut heap = heap::lock();
    let space = heap.space();
    let Some(ctx_id) = space.ctx_id() else { return libc::ENOTCONN };
    let mut session = Session { ctx_id, socket: [0; PATH] };
    for (to, from) in session.socket.iter_mut().take(PATH - 1).zip(space.socket().to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    // SAFETY: the caller's pointer is writable.
    unsafe { out.write(session) };
    0
}

/// What GPUs do not reach of the memory that the program has mapped. `struct svm_alloc_left` in C.
#[repr(C)]
pub struct LeftOut {
    /// Calls of mmap, mremap and remap_file_pages that made it since the program began, and mappings that stayed so when it first asked.
    pub mappings: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Says how much shared or private memory the program has mapped readable and writable that GPUs do not reach.
///
/// # Safety
/// `out` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_alloc_left(out: *mut LeftOut) {
    let left = heap::lock().space().left();
    // SAFETY: the caller's pointer is writable.
    unsafe { out.write(LeftOut { mappings: left.mappings, bytes: left.bytes }) };
}

/// Says why GPUs do not reach an address of this process, and what to do: text for people, ended by a zero. `start` and
/// `end`: the kernel's mapping that holds it, as `/proc/self/maps` has it. Returns its bytes, or 0: it is not known.
///
/// # Safety
/// `out` is writable for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_alloc_why(
    address: *const c_void,
    start: *const c_void,
    end: *const c_void,
    out: *mut c_char,
    room: size_t,
) -> size_t {
    let why = heap::lock().space().why(address.addr(), &(start.addr()..end.addr()));
    let (Some(why), Some(last)) = (why, room.checked_sub(1)) else { return 0 };
    let line = Line::of(format_args!("{why}"));
    let text = line.bytes();
    let text = text.get(..last).unwrap_or(text);
    // SAFETY: the caller's memory is writable, and longer than the text; the text is another's.
    unsafe { out.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
    // SAFETY: as above: the text is shorter by a byte at least.
    unsafe { out.wrapping_add(text.len()).write(0) };
    text.len()
}
