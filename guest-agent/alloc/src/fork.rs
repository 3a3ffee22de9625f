//! fork: the child gets copies of the arenas at the same addresses, under a context of its own, before fork returns.
//!
//! Arenas are shared memory, so until the copies are there whatever either process writes is seen by both. Hence:
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
//! executes another program. `clone` and `_Fork` by hand run no handlers and are not followed.

#![expect(unsafe_code, reason = "registers handlers with the C library, in two processes")]

use crate::fd::Fd;
use crate::globals::Blocked;
use crate::heap::{self, Heap};
use crate::say::{give_up, say};
use crate::stack;
use crate::streams::LIST;
use rustix::pipe::PipeFlags;
use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::sync::MutexGuard;

/// What is held from before the fork until after it.
struct Held {
    heap: MutexGuard<'static, Heap>,
    /// The lock of the list of streams.
    list: bool,
    signals: Blocked,
    /// Whether arenas are shared until the child has copies.
    shared: bool,
    /// Ends when the child is through with its copies.
    pipe: Option<(Fd, Fd)>,
    /// Whether the thread's stack is to go back into an arena.
    stack: Option<stack::Part>,
    /// What the child overwrites of its parent's.
    record: Option<stack::Record>,
}

thread_local! {
    // Never dropped by the thread's end: registering that would allocate.
    static HELD: Cell<Option<ManuallyDrop<Held>>> = const { Cell::new(None) };
}

/// Has the handlers run at each fork from now on.
pub fn watch() {
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(after_in_parent), Some(after_in_child)) };
}

extern "C" fn before() {
    let signals = Blocked::all();
    let list = LIST.hold();
    let mut heap = heap::lock();
    let stack = stack::take_out(heap.space());
    let record = stack::Record::keep(heap.space());
    let shared = heap.space().is_shared();
    let ends = shared.then(|| rustix::pipe::pipe_with(PipeFlags::CLOEXEC).ok()).flatten();
    let pipe = ends.map(|(read, write)| (Fd::new(read), Fd::new(write)));
    HELD.set(Some(ManuallyDrop::new(Held { heap, list, signals, shared, pipe, stack, record })));
}

/// What `before` has left. It stays there until parent and child have different memory: a thread on a stack of the
/// program's own has its thread-local variables in memory that they share.
fn held() -> Option<Held> {
    // SAFETY: the pointer is to this thread's cell, and of the two processes each has the value once: `go_on` clears it.
    let held = HELD.with(|held| unsafe { held.as_ptr().read() });
    held.map(ManuallyDrop::into_inner)
}

extern "C" fn after_in_parent() {
    let Some(mut held) = held() else { return };
    if let Some((ours, theirs)) = held.pipe.take() {
        drop(theirs);
        // Ends when the child has closed its end, by being through or by dying. There is nothing to read.
        rustix::io::retry_on_intr(|| rustix::io::read(&ours, &mut [0u8; 1])).ok();
    }
    held.record.iter().for_each(stack::Record::put_right);
    if held.list {
        LIST.let_go();
    }
    go_on(held);
}

extern "C" fn after_in_child() {
    let Some(mut held) = held() else { return };
    if held.shared && held.pipe.is_none() {
        // The parent goes on already, and a copy would be of no moment of its memory.
        say(format_args!(
            "no descriptor is free to fork with: the child ends; raise the limit of open files"
        ));
        give_up();
    }
    // SAFETY: a forked process has one thread, which stands in no arena; the parent waits.
    unsafe { held.heap.space().renew(&stack::mine()) };
    drop(held.pipe.take());
    if held.list {
        LIST.reset();
    }
    go_on(held);
}

fn go_on(held: Held) {
    HELD.set(None);
    let Held { mut heap, signals, stack, .. } = held;
    stack::put_back(heap.space(), stack);
    drop(heap);
    drop(signals);
}
