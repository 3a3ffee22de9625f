//! fork: the child gets copies of the arenas at the same addresses before fork returns: in memory of its own, until it
//! asks for a device itself, or in arenas of a context of its own, if it is to be early.
//!
//! Arenas are shared memory, so until the copies are there whatever either process writes is seen by both. Hence:
//! * fork makes a pipe first, and fails where no descriptors are free for one;
//! * the parent's thread waits in its handler until the child has said that it is through, or is gone;
//! * these handlers are registered at the first allocation, so they run last before the fork and first after it, and no
//!   other handler of the child writes to memory that is still shared;
//! * what the C library writes in the child before them is not in arenas: its data, and the locks of streams
//!   ([`crate::streams`]);
//! * signals are held back, and the locks of the C library's list of streams and of the heap are held, in that order;
//! * a thread that stands in an arena forks from another stack; where the C library forks by itself, it takes its stack
//!   out of its arena before, and puts it back after, in both processes.
//!
//! Other threads of the parent go on meanwhile: what they write while the child copies may or may not be in the copy, as
//! with any memory that fork copies while it is written.
//!
//! `vfork`, `posix_spawn` and what stands on them run no handlers and need none: the child shares everything and only
//! executes another program. `clone` and `_Fork` by hand run no handlers and are not followed: such a child shares its
//! parent's arenas, and sends the agent nothing.

#![expect(unsafe_code, reason = "registers handlers with the C library, in two processes")]

use crate::fd::Fd;
use crate::globals::{self, Blocked, Turn};
use crate::heap::{self, Locked};
use crate::say::{give_up, say};
use crate::stack;
use crate::streams::LIST;
use crate::thread_word::ThreadWord;
use crate::under_way;
use rustix::pipe::PipeFlags;
use std::cell::UnsafeCell;

/// What is held from before the fork until after it.
struct Held {
    heap: Locked,
    /// Nobody else has the loader's lock through this library: the child would have it locked for ever.
    loader: Turn,
    /// The lock of the list of streams.
    list: bool,
    signals: Blocked,
    /// Whether arenas are shared until the child has copies.
    shared: bool,
    /// Ends when the child is through with its copies.
    pipe: Option<Pipe>,
    /// Whether the thread's stack is to go back into an arena.
    stack: Option<stack::Part>,
    /// What the child overwrites of its parent's.
    record: Option<stack::Record>,
}

/// Reading end and writing end.
pub type Pipe = (Fd, Fd);

/// The pipe of the thread that forks: its address, made before so that fork can say that there is none.
static PIPE: ThreadWord = ThreadWord::new();

/// Of the thread that forks, from `before` to the end of what comes after. Not in memory that the processes share.
struct Slot(UnsafeCell<Option<Held>>);

// SAFETY: only the thread that holds the heap's lock comes here.
unsafe impl Sync for Slot {}

static HELD: Slot = Slot(UnsafeCell::new(None));

/// Has the handlers run at each fork from now on.
pub fn watch() {
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(after_in_parent), Some(after_in_child)) };
}

/// Forks by `fork` with a pipe, if the child is to have copies. `None`: no descriptors are free for one.
pub fn with_pipe<T>(shared: bool, fork: impl FnOnce() -> T) -> Option<T> {
    let mut pipe = None;
    if shared {
        pipe = Some(make_pipe()?);
    }
    PIPE.make_once(None);
    // Where it cannot be kept, the handler makes another one.
    PIPE.set((&raw mut pipe).expose_provenance());
    let forked = fork();
    PIPE.set(0);
    Some(forked)
}

fn make_pipe() -> Option<Pipe> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).ok()?;
    Some((Fd::new(read), Fd::new(write)))
}

/// The pipe that [`with_pipe`] has made, in `before`.
fn take_pipe() -> Option<Pipe> {
    let pipe = std::ptr::with_exposed_provenance_mut::<Option<Pipe>>(PIPE.get());
    // SAFETY: it is null or the one in `with_pipe` of this thread, which waits for this.
    unsafe { pipe.as_mut() }.and_then(Option::take)
}

extern "C" fn before() {
    let signals = Blocked::all();
    let loader = globals::loaders_turn();
    let list = LIST.hold();
    let mut heap = heap::lock();
    let stack = stack::take_out(heap.space());
    let record = stack::Record::keep(heap.space());
    let shared = heap.space().is_shared();
    let pipe = shared.then(|| take_pipe().or_else(make_pipe)).flatten();
    // SAFETY: this thread holds the heap's lock.
    unsafe { *HELD.0.get() = Some(Held { heap, loader, list, signals, shared, pipe, stack, record }) };
}

/// What `before` has left.
fn held() -> Option<Held> {
    // SAFETY: this thread, or the one of the parent that it is a copy of, has held the heap's lock since `before`.
    unsafe { (*HELD.0.get()).take() }
}

extern "C" fn after_in_parent() {
    let Some(mut held) = held() else { return };
    if let Some((ours, theirs)) = held.pipe.take() {
        drop(theirs);
        // Ends when the child has written that it is through, or has died. The child waits for the agent no longer than
        // anybody does.
        rustix::io::retry_on_intr(|| rustix::io::read(&ours, &mut [0u8; 1])).ok();
    }
    held.record.iter().for_each(stack::Record::put_right);
    if held.list {
        LIST.let_go();
    }
    go_on(held);
}

extern "C" fn after_in_child() {
    under_way::forget();
    let Some(mut held) = held() else { return };
    if held.shared && held.pipe.is_none() {
        // The parent goes on already, and a copy would be of no moment of its memory.
        say(format_args!(
            "two descriptors are needed to fork with, and not free: the child ends; raise the limit of open files"
        ));
        give_up();
    }
    // SAFETY: a forked process has one thread, which stands in no arena; the parent waits.
    unsafe { held.heap.space().renew(&stack::mine()) };
    if let Some((_ours, theirs)) = held.pipe.take() {
        // Said, and not only by its end: a child that another thread has at the same time may have that open, too. Of its
        // own two ends one is the reader's, so nobody sends SIGPIPE.
        rustix::io::write(&theirs, &[1]).ok();
    }
    if held.list {
        LIST.reset();
    }
    go_on(held);
}

fn go_on(held: Held) {
    let Held { mut heap, loader, signals, stack, .. } = held;
    stack::put_back(heap.space(), stack);
    drop(heap);
    drop(loader);
    drop(signals);
}
