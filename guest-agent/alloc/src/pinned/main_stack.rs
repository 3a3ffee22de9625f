//! The main thread's stack: its upper part, as of the stacks of other threads. Deeper frames are out of the reach of GPUs.

use crate::heap;
use crate::piece::{PAGE, Sharing};
use crate::stack::MAX_BYTES;
use rustix::process::Resource;
use std::hint::black_box;
use std::mem::MaybeUninit;

/// Pins what lies [`MAX_BYTES`] below the frame of the caller, and what lies above it, where the frames of `main` are going to
/// be. The caller is the main thread, as the library is loaded.
pub fn pin_main_stack() {
    let main = rustix::thread::gettid() == rustix::process::getpid();
    // The kernel puts the program's name at the upper end of the stack, and a word behind it. Looking for it may allocate.
    let name = rustix::param::linux_execfn();
    let top = name.as_ptr().addr().saturating_add(name.to_bytes_with_nul().len()).next_multiple_of(PAGE);
    let mut heap = heap::lock();
    if !main || !heap.space().is_trusted() {
        return;
    }
    // A stack may be shorter than that.
    let limit = rustix::process::getrlimit(Resource::Stack).current;
    let limit = limit.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
    let lowest = descend(MAX_BYTES.min(limit / 4) / PAGE);
    let here = (&raw const limit).addr();
    // Below a large environment the frames come first.
    let end = top.min(here.saturating_add(MAX_BYTES) & !(PAGE - 1));
    let range = lowest.next_multiple_of(PAGE)..end;
    if range.contains(&here) && !heap.space().pin(&range, Sharing::Private) {
        heap.space().leave(range.len());
    }
}

/// Has as many pages of stack be there below the caller's frame; returns an address in the last.
#[inline(never)]
fn descend(pages: usize) -> usize {
    let mut frame = [MaybeUninit::<u8>::uninit(); PAGE];
    black_box(&mut frame)[0].write(0);
    let lowest = if pages == 0 { frame.as_ptr().addr() } else { descend(pages - 1) };
    // Keeps the frame until now.
    black_box(&frame);
    lowest
}
