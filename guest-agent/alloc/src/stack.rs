//! Stacks of threads: their upper part is an arena, put over the stack that the C library made, as the thread begins or, if
//! the process has asked for no device by then, when it does.
//!
//! So the size of a stack, its guard and its attributes stay as the program and the C library have them, and a deep
//! recursion goes on below the arena, where GPUs do not reach. The thread's first frames and the C library's record of
//! the thread (which other threads write to) lie above the arena and are not moved. A stack that the program brought
//! itself is left alone: it is the program's memory.
//!
//! A thread that stands in an arena forks from another stack ([`fork`]): parent and child must not write their frames to
//! the same memory, and the child puts a copy in its place. See also `record`.
//!
//! When the thread ends, anonymous memory takes the arena's place again, because the C library keeps stacks for other
//! threads or unmaps them without telling.

#![expect(unsafe_code, reason = "takes the place of pthread_create and moves stacks")]

mod record;

pub use record::Record;

use crate::exports::{free, malloc, set_errno};
use crate::fork;
use crate::heap;
use crate::piece::{PAGE, Purpose};
use crate::real::Real;
use crate::say::say;
use crate::space::Space;
use crate::thread_word::ThreadWord;
use crate::under_way::Call;
use libc::{c_int, c_void, pid_t, pthread_attr_t, pthread_t};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Most bytes of a stack that are in an arena: pinned memory is scarce, and few threads go deeper.
pub const MAX_BYTES: usize = 256 << 10;
/// Room for the frames between the thread's start and the arena.
const ABOVE: usize = 16 << 10;
/// Of a stack that things are done on while a thread's own is moved.
const ASIDE: usize = 64 << 10;
/// As above, for forks: handlers of the program run on it.
const ASIDE_FORK: usize = 1 << 20;

/// As the program's function: a thread may end by unwinding through it.
type Start = unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void;
type Create = unsafe extern "C" fn(*mut pthread_t, *const pthread_attr_t, Start, *mut c_void) -> c_int;

/// Part of a stack that is in an arena, or is to be again. Whole pages.
#[derive(Clone, Copy)]
pub struct Part {
    base: usize,
    len: usize,
}

impl Part {
    /// One word: the base with the number of pages in the bits that are 0 in it.
    fn word(self) -> usize {
        self.base | (self.len / PAGE)
    }

    fn of_word(word: usize) -> Option<Self> {
        let (base, pages) = (word & !(PAGE - 1), word & PAGES);
        (word != 0).then_some(Self { base, len: pages * PAGE })
    }

    fn range(&self) -> Range<usize> {
        self.base..self.base + self.len
    }

    fn may_be_moved(&self, space: &Space) -> bool {
        !space.is_dormant() && !space.has(&self.range())
    }
}

/// The part of this thread's stack that is in an arena, or is to be.
static MINE: ThreadWord = ThreadWord::new();
/// Beside it, in the word: the thread is in [`fork`], on another stack.
const FORKS_ASIDE: usize = PAGE / 2;
/// The bits of the number of pages.
const PAGES: usize = FORKS_ASIDE - 1;
const _: () = assert!(MAX_BYTES / PAGE <= PAGES);

/// Makes ready for threads.
pub fn watch() {
    MINE.make_once(Some(thread_ends));
}

/// What a thread begins with.
struct Begin {
    start: Start,
    arg: *mut c_void,
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut pthread_t,
    attr: *const pthread_attr_t,
    start: Start,
    arg: *mut c_void,
) -> c_int {
    let Some(create) = real_create() else { return libc::ENOSYS };
    if has_own_stack(attr) {
        // SAFETY: passed on as it came.
        return unsafe { create(thread, attr, start, arg) };
    }
    let begin = malloc(size_of::<Begin>()).cast::<Begin>();
    if begin.is_null() {
        return libc::EAGAIN;
    }
    // SAFETY: the block was allocated for this just now.
    unsafe { begin.write(Begin { start, arg }) };
    // SAFETY: the caller's pointers are passed on; `thread_begins` takes what it is given here.
    let created = unsafe { create(thread, attr, thread_begins, begin.cast()) };
    if created != 0 {
        // SAFETY: no thread has it.
        unsafe { free(begin.cast()) };
    }
    created
}

fn real_create() -> Option<Create> {
    static REAL: Real = Real::new(c"pthread_create");
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    unsafe { std::mem::transmute::<*const c_void, Option<Create>>(REAL.address()) }
}

/// Whether the program has set a stack in `attr`.
fn has_own_stack(attr: *const pthread_attr_t) -> bool {
    if attr.is_null() {
        return false;
    }
    let (mut base, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: the caller's attributes are initialised; the other pointers are to variables here.
    let told = unsafe { libc::pthread_attr_getstack(attr, &raw mut base, &raw mut len) };
    // Without one the end of the stack is told to be 0.
    told == 0 && base.addr().wrapping_add(len) != 0
}

unsafe extern "C-unwind" fn thread_begins(begin: *mut c_void) -> *mut c_void {
    let begin = begin.cast::<Begin>();
    // SAFETY: `pthread_create` wrote it for this thread.
    let Begin { start, arg } = unsafe { begin.read() };
    // SAFETY: nobody else has it.
    unsafe { free(begin.cast()) };
    // Told first, so that whoever holds this thread still knows it. Without it nothing would give the part back.
    if let Some(part) = place()
        && MINE.set(part.word())
    {
        let mut heap = heap::lock();
        // SAFETY: the part lies below all frames of this thread, which is the only one that uses this stack.
        unsafe { adopt(heap.space(), part.word()) };
    }
    // SAFETY: the program's function gets the program's argument.
    unsafe { run_below(start, arg) }
}

/// Runs `start` with its frames below the part that is not in the arena.
///
/// # Safety
/// As `start`.
#[inline(never)]
unsafe extern "C-unwind" fn run_below(start: Start, arg: *mut c_void) -> *mut c_void {
    let above = MaybeUninit::<[u8; ABOVE + PAGE]>::uninit();
    black_box(&raw const above);
    // SAFETY: passed on.
    let result = unsafe { start(arg) };
    // Keeps the frame where it is until now.
    black_box(&raw const above);
    result
}

/// The part of this thread's stack that an arena takes: below the frames in use, above the guard.
#[inline(never)]
fn place() -> Option<Part> {
    // SAFETY: attributes are plain data for which all zeros is a value; they are filled in next.
    let mut attr: pthread_attr_t = unsafe { std::mem::zeroed() };
    // SAFETY: it has no precondition.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: the thread is this one; the pointer is to attributes that live here.
    if unsafe { libc::pthread_getattr_np(this, &raw mut attr) } != 0 {
        return None;
    }
    let (mut base, mut len) = (std::ptr::null_mut(), 0);
    // SAFETY: the attributes were filled in; the other pointers are to variables here.
    let told = unsafe { libc::pthread_attr_getstack(&raw const attr, &raw mut base, &raw mut len) };
    // SAFETY: the attributes were filled in.
    unsafe { libc::pthread_attr_destroy(&raw mut attr) };
    let here = (&raw const attr).addr();
    let end = here.checked_sub(ABOVE / 2)? & !(PAGE - 1);
    // A page more: some C libraries count the guard in.
    let lowest = base.addr().checked_add(2 * PAGE - 1)? & !(PAGE - 1);
    let start = lowest.max(end.saturating_sub(MAX_BYTES));
    (told == 0 && start < end).then(|| Part { base: start, len: end - start })
}

/// What is known of this thread's stack; 0: nothing.
pub fn word() -> usize {
    MINE.get()
}

/// Puts the part of a stack that a word names into an arena, if it is in none and the process has asked for a device.
///
/// # Safety
/// Nobody uses the stack meanwhile, and the caller does not stand on the part.
pub unsafe fn adopt(space: &mut Space, word: usize) {
    if let Some(part) = Part::of_word(word).filter(|part| part.may_be_moved(space)) {
        // SAFETY: as the caller says.
        unsafe { space.adopt(part.base, part.len, Purpose::Stack) };
    }
}

/// As [`adopt`], of a thread that may have protected some of it meanwhile.
///
/// # Safety
/// As there.
pub unsafe fn adopt_used(space: &mut Space, word: usize) {
    if let Some(part) = Part::of_word(word).filter(|_| !space.is_dormant()) {
        // SAFETY: as the caller says.
        unsafe { space.adopt_plain(&part.range(), Purpose::Stack) };
    }
}

unsafe extern "C" fn thread_ends(word: *mut c_void) {
    if let Some(part) = Part::of_word(word.addr()) {
        // SAFETY: the thread's function has ended, so its frames are gone; this one is above the part.
        unsafe { heap::lock().space().forget(&part.range()) }.ok();
    }
}

/// As in POSIX.
///
/// # Safety
/// As in POSIX.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fork() -> pid_t {
    static REAL: Real = Real::new(c"fork");
    // SAFETY: it is null or the C library's function of that name, whose type this is.
    let real = unsafe {
        std::mem::transmute::<*const c_void, Option<unsafe extern "C" fn() -> pid_t>>(REAL.address())
    };
    let Some(real) = real else {
        set_errno(libc::ENOSYS);
        return -1;
    };
    // Where it stands must not change until it has forked.
    let _call = Call::begin();
    if heap::is_mine() {
        say(format_args!(
            "the handler of a signal forks while its thread allocates or maps memory: fork fails (ENOMEM)"
        ));
        set_errno(libc::ENOMEM);
        return -1;
    }
    let (in_arena, shared) = stands_in_arena();
    let fork = || {
        if !in_arena {
            // SAFETY: passed on.
            return Some(unsafe { real() });
        }
        let mut forked = None;
        aside(ASIDE_FORK, &mut |(): ()| {
            let word = MINE.get();
            // A stack of the program's own is in an arena, but no part of a stack.
            let mark = |aside| if word != 0 { MINE.set(word | aside) } else { false };
            mark(FORKS_ASIDE);
            // SAFETY: passed on.
            forked = Some(unsafe { real() });
            mark(0);
        });
        forked
    };
    let forked = fork::with_pipe(shared, fork);
    if forked.is_none() {
        say(format_args!(
            "two descriptors are needed to fork with, and not free, so fork fails: raise the limit of open files"
        ));
    }
    forked.flatten().unwrap_or_else(|| {
        set_errno(libc::ENOMEM);
        -1
    })
}

/// Whether this thread does; and whether any memory is in one.
fn stands_in_arena() -> (bool, bool) {
    let here = 0u8;
    let here = (&raw const here).addr();
    let mut heap = heap::lock();
    let piece = heap.space().first_in(&(here..here + 1));
    (piece.is_some_and(|piece| piece.backing.is_agents()), heap.space().is_shared())
}

/// Where this thread's stack is in an arena, or is to be.
pub fn mine() -> Range<usize> {
    Part::of_word(MINE.get()).map_or(0..0, |part| part.range())
}

/// Takes this thread's stack out of its arena, if it is in one and the thread stands there: the C library forks by itself
/// too (`daemon`, `forkpty`). Returns what [`put_back`] needs.
pub fn take_out(space: &mut Space) -> Option<Part> {
    let word = MINE.get();
    let part = Part::of_word(word).filter(|_| word & FORKS_ASIDE == 0)?;
    if !space.has(&part.range()) {
        return None;
    }
    let mut done = false;
    aside(ASIDE, &mut |(): ()| {
        // SAFETY: this runs on another stack, and only this thread uses this one.
        done = unsafe { space.disown(&part.range()) };
    });
    done.then_some(part)
}

/// The reverse of [`take_out`].
pub fn put_back(space: &mut Space, part: Option<Part>) {
    let Some(part) = part else { return };
    aside(ASIDE, &mut |(): ()| {
        // SAFETY: this runs on another stack, and only this thread uses this one.
        unsafe { adopt_used(space, part.word()) };
    });
}

pub type Work<'a> = &'a mut dyn FnMut(());

/// Runs `work` on another stack, of `len` bytes, while this one stands still. It does not run if there is no memory.
pub fn aside(len: usize, work: Work<'_>) {
    let anonymous = rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::STACK;
    let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    // SAFETY: without MAP_FIXED no existing mapping is replaced.
    let Ok(stack) = (unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, anonymous) })
    else {
        return;
    };
    // SAFETY: a context is plain data for which all zeros is a value.
    let mut here: libc::ucontext_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut there: libc::ucontext_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a context that lives here.
    if unsafe { libc::getcontext(&raw mut there) } == 0 {
        there.uc_stack.ss_sp = stack;
        there.uc_stack.ss_size = len;
        there.uc_link = &raw mut here;
        let mut work = work;
        let address = (&raw mut work).expose_provenance();
        let [low, high] = [address & 0xffff_ffff, address >> 32].map(|half| u32::try_from(half).unwrap_or(0));
        // SAFETY: `makecontext` takes a function without a type and calls it with the ints that follow: two halves.
        let entry = unsafe { std::mem::transmute::<extern "C" fn(u32, u32), extern "C" fn()>(run_aside) };
        // SAFETY: the context was filled in by `getcontext` and has a stack; two arguments follow.
        unsafe { libc::makecontext(&raw mut there, entry, 2, low, high) };
        // SAFETY: both contexts live until it comes back by `uc_link`.
        unsafe { libc::swapcontext(&raw mut here, &raw const there) };
    }
    // SAFETY: the stack is this function's own, and nothing runs on it any more.
    unsafe { rustix::mm::munmap(stack, len) }.ok();
}

extern "C" fn run_aside(low: u32, high: u32) {
    let halves = [u64::from(low), u64::from(high) << 32];
    let address = usize::try_from(halves[0] | halves[1]).unwrap_or(0);
    let work = std::ptr::with_exposed_provenance_mut::<Work<'_>>(address);
    // SAFETY: the address is that of the work in `aside`, which waits for it.
    let work = unsafe { &mut *work };
    work(());
}
