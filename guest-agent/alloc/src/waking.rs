//! The first time that the process asks for a device: what memory it has by then is brought into the reach of GPUs, while
//! its other threads stand still. What comes later is, as it comes.
//!
//! Order: the loader's lock, the heap's, and then the threads, so that none of them stands still with either.

#![expect(unsafe_code, reason = "moves memory that is in use")]

use crate::globals::Blocked;
use crate::left::Why;
use crate::pinned::MainStack;
use crate::space::Space;
use crate::{globals, heap, loaded, others, say, stack, under_way};
use rustix::mm::Advice;
use std::ops::Range;
use std::time::Duration;

/// Of the stack on which it is done: this thread's own is moved, too.
const ROOM: usize = 256 << 10;

/// How often calls of other threads are waited for, and how long.
const WAITS: u32 = 2000;
const WAIT: Duration = Duration::from_millis(1);

/// Does it, unless it has been done.
pub fn wake() {
    if !heap::lock().space().is_dormant() {
        return;
    }
    read_files();
    let blocked = Blocked::all();
    let main_stack = MainStack::of_caller();
    let mut waits = 0;
    while !try_to_wake(&main_stack) {
        // Of a handler of this thread's own fork it does not end.
        if waits == WAITS {
            say::say(format_args!(
                "GPUs do not reach this program's memory, because a fork or a change of mappings has been under way for too long: ask for a device when it has ended"
            ));
            break;
        }
        others::pause(WAIT);
        waits += 1;
    }
    drop(blocked);
}

/// Has private mappings of files be in memory before anything is locked: a file may take its time, or its server be this
/// very process. They are as arenas to the program from then on, so that it does not give the pages up.
fn read_files() {
    let mut rest = 0..usize::MAX;
    while let Some(range) = next_copy(&mut rest) {
        let at = std::ptr::with_exposed_provenance_mut(range.start);
        // SAFETY: pages come to be, with the contents that they have, if the mapping is there still.
        let there = unsafe { rustix::mm::madvise(at, range.len(), Advice::LinuxPopulateWrite) };
        if there.is_err() {
            heap::lock().space().let_be(&range, Why::Changed);
        }
    }
}

fn next_copy(rest: &mut Range<usize>) -> Option<Range<usize>> {
    heap::lock().space().take_copy(rest)
}

/// False: another thread is in the middle of a call.
fn try_to_wake(main_stack: &MainStack) -> bool {
    let mut done = None;
    stack::aside(ROOM, &mut |(): ()| {
        globals::with_loaders_lock(&mut |(): ()| done = bring(main_stack));
    });
    done.iter().for_each(say::print);
    done.is_some()
}

/// Returns what is to be said.
fn bring(main_stack: &MainStack) -> Option<say::Lines> {
    let mut heap = heap::lock();
    if !under_way::none() {
        return None;
    }
    say::keep();
    let space = heap.space();
    // Else another thread was faster.
    if space.is_dormant() {
        move_all(space, main_stack);
    }
    loaded::all_seen();
    Some(say::take())
}

fn move_all(space: &mut Space, main_stack: &MainStack) {
    // Before anybody stands still: whoever answers those faults may be one of them.
    space.let_watched_be();
    // What was mapped since files were read.
    space.let_copies_be();
    let still = if space.connect() { others::hold_still().map(Some) } else { Ok(None) };
    if let Err(failure) = &still {
        space.complain_of_threads(failure);
        space.let_all_be(Why::Threads);
    }
    space.let_changed_be();
    // SAFETY: all other threads stand still if there is an agent, and this one is on a stack that nothing knows.
    unsafe { space.awaken() };
    if let Ok(Some(still)) = &still {
        // SAFETY: as above; the caller has the loader's lock.
        unsafe { globals::adopt(space, loaded::began()) };
        // SAFETY: as above.
        still.words().chain([stack::word()]).for_each(|word| unsafe { stack::adopt_used(space, word) });
        main_stack.pin(space);
    }
}
