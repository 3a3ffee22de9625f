//! The writable data of the program and its libraries, moved into arenas where it stands.
//!
//! Three objects keep theirs:
//! * this library, whose table must stay the child's own when a fork copies arenas by it;
//! * the loader and the C library: between the fork and the first handler in the child, the C library writes to both
//!   (thread lists, locks of streams). If they were shared, it would write to its parent's.
//!
//! What the loader has made read-only after relocation (PT_GNU_RELRO) is nobody's variable and stays as well.
//!
//! That happens when the process first asks for a device ([`crate::waking`]). Libraries that are loaded later have theirs
//! moved when dlopen returns, while there is one thread ([`crate::loaded`]).

#![expect(unsafe_code, reason = "asks the loader for segments and moves them")]

use crate::heap;
use crate::piece::{PAGE, Purpose};
use crate::space::Space;
use crate::stack::Work;
use libc::{c_int, c_void, dl_phdr_info, size_t};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most segments of one object.
const MAX_SEGMENTS: usize = 64;

/// What is being moved.
struct Moving<'a> {
    space: &'a mut Space,
    /// Objects that stay as they are, in the order in which they were loaded.
    skipped: usize,
    /// Objects from here on may be unloaded.
    first_loaded: usize,
    /// How many there have been.
    seen: usize,
}

/// Moves them. Those of objects that were loaded after the first `first_loaded` may be unloaded.
///
/// # Safety
/// There is one thread, or the others stand still; this one has the loader's lock and stands on none of them.
pub unsafe fn adopt(space: &mut Space, first_loaded: usize) {
    let mut moving = Moving { space, skipped: 0, first_loaded, seen: 0 };
    // SAFETY: the callback takes what it is given here, and its signature is the one that is asked for.
    unsafe { libc::dl_iterate_phdr(Some(adopt_object), (&raw mut moving).cast()) };
}

/// Moves those of libraries that were loaded after the first `before` objects, if there is one thread and the process has
/// asked for a device.
pub fn adopt_loaded(before: usize) {
    let blocked = Blocked::all();
    with_loaders_lock(&mut |(): ()| {
        let mut heap = heap::lock();
        let space = heap.space();
        if is_single_threaded() && !space.is_dormant() {
            let mut moving = Moving { space, skipped: before, first_loaded: before, seen: 0 };
            // SAFETY: as in `adopt`.
            unsafe { libc::dl_iterate_phdr(Some(adopt_object), (&raw mut moving).cast()) };
        }
    });
    drop(blocked);
}

/// Whose turn it is to have the loader's lock through this library. It comes before that, and before what fork holds.
pub type Turn = MutexGuard<'static, ()>;

pub fn loaders_turn() -> Turn {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` with the loader's lock held, which comes before the heap's.
pub fn with_loaders_lock(work: Work<'_>) {
    let _turn = loaders_turn();
    extern "C" fn run(_info: *mut dl_phdr_info, _size: size_t, work: *mut c_void) -> c_int {
        // SAFETY: it is what is passed below, which waits for this.
        let work = unsafe { &mut *work.cast::<Work<'_>>() };
        work(());
        1
    }
    let mut work = work;
    // SAFETY: the callback takes what it is given here, and its signature is the one that is asked for.
    unsafe { libc::dl_iterate_phdr(Some(run), (&raw mut work).cast()) };
}

/// Signals held back, so that no handler sees or changes memory that is on its way.
pub struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    pub fn all() -> Self {
        // SAFETY: a signal set is plain data for which all zeros is a value.
        let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a set that lives here.
        unsafe { libc::sigfillset(&raw mut all) };
        // SAFETY: both pointers are to sets that live here.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
        Self { before }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by the C library; no old set is asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

fn is_single_threaded() -> bool {
    // Without allocating: the number of links of the directory is the number of threads and 2.
    rustix::fs::stat(c"/proc/self/task").is_ok_and(|stat| stat.st_nlink == 3)
}

/// What the loader says of an object: where its program headers put it, and those headers.
pub fn headers_of(info: &dl_phdr_info) -> &[libc::Elf64_Phdr] {
    let count = usize::from(info.dlpi_phnum).min(MAX_SEGMENTS);
    // SAFETY: the loader's pointer is to as many headers, which stay as long as the object is loaded.
    unsafe { std::slice::from_raw_parts(info.dlpi_phdr, count) }
}

/// Where a part of an object stands.
pub fn place_of(info: &dl_phdr_info, header: &libc::Elf64_Phdr) -> Range<usize> {
    let start = usize::try_from(info.dlpi_addr.wrapping_add(header.p_vaddr)).unwrap_or(0);
    start..start.saturating_add(usize::try_from(header.p_memsz).unwrap_or(0))
}

extern "C" fn adopt_object(info: *mut dl_phdr_info, _size: size_t, moving: *mut c_void) -> c_int {
    // SAFETY: it is what `adopt` passes, which waits for this.
    let moving = unsafe { &mut *moving.cast::<Moving<'_>>() };
    let place = moving.seen;
    moving.seen += 1;
    if place < moving.skipped {
        return 0;
    }
    let purpose = if place < moving.first_loaded { Purpose::Globals } else { Purpose::Loaded };
    // SAFETY: the loader passes a whole structure that lives until this returns.
    let info = unsafe { info.read() };
    let headers = headers_of(&info);
    let at = |header: &libc::Elf64_Phdr| place_of(&info, header);
    let segments = || headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
    // Code of each object that keeps its data.
    let kept = [adopt_object as *const () as usize, libc::getpid as *const () as usize, loader()];
    if segments().any(|segment| kept.iter().any(|address| at(segment).contains(address))) {
        return 0;
    }
    let relro = headers.iter().find(|header| header.p_type == libc::PT_GNU_RELRO).map(at);
    // The loader protects whole pages only.
    let fixed = relro.map_or(0..0, |relro| floor(relro.start)..floor(relro.end));
    for segment in segments().filter(|segment| segment.p_flags & libc::PF_W != 0) {
        for part in without(pages_of(at(segment)), &fixed) {
            // SAFETY: these are the object's writable pages; whoever calls keeps others away from them.
            unsafe { moving.space.adopt_plain(&part, purpose) };
        }
    }
    0
}

/// A segment is mapped in whole pages.
pub fn pages_of(segment: Range<usize>) -> Range<usize> {
    floor(segment.start)..segment.end.next_multiple_of(PAGE)
}

fn floor(address: usize) -> usize {
    address - address % PAGE
}

/// What is left of `range`, in at most two parts.
fn without(range: Range<usize>, hole: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let before = range.start..range.end.min(hole.start);
    let after = range.start.max(hole.end)..range.end;
    let parts = if hole.is_empty() { [range, 0..0] } else { [before, after] };
    parts.into_iter().filter(|part| !part.is_empty())
}

/// An address in the loader's code.
fn loader() -> usize {
    // SAFETY: any type may be asked for; one that is not there gives 0.
    let base = unsafe { libc::getauxval(libc::AT_BASE) };
    usize::try_from(base).unwrap_or(0)
}
