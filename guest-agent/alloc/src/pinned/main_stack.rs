//! The main thread's stack: its upper part, as of the stacks of other threads. Deeper frames are out of the reach of GPUs.

use crate::piece::{PAGE, Sharing};
use crate::proc;
use crate::space::Space;
use crate::stack::MAX_BYTES;
use rustix::process::Resource;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Where the main thread's stack is, whole pages.
pub struct MainStack(Range<usize>);

impl MainStack {
    /// What lies [`MAX_BYTES`] below the caller's frame, and twice that above it, where the frames of `main` are. For a caller on another
    /// stack: of what there is of that one as much, at its upper end.
    pub fn of_caller() -> Self {
        // The kernel puts the program's name at the upper end of the stack, and a word behind it. Looking for it may allocate.
        let name = rustix::param::linux_execfn();
        let top = name.as_ptr().addr().saturating_add(name.to_bytes_with_nul().len()).next_multiple_of(PAGE);
        let here = (&raw const top).addr();
        let Some(stack) = proc::mapping_of(top - 1) else { return Self(0..0) };
        if !stack.contains(&here) {
            return Self(stack.start.max(top.saturating_sub(2 * MAX_BYTES))..top);
        }
        // A stack may be shorter than that, and much of it used.
        let limit = rustix::process::getrlimit(Resource::Stack).current;
        let limit = limit.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(usize::MAX);
        let left = here.saturating_sub(top.saturating_sub(limit));
        let lowest = descend(MAX_BYTES.min(left / 4) / PAGE);
        // Whoever asks for a device may stand deep already, and above the frames is the environment, which may be large.
        let end = top.min(here.saturating_add(2 * MAX_BYTES) & !(PAGE - 1));
        let range = lowest.next_multiple_of(PAGE)..end;
        Self(if range.contains(&here) { range } else { 0..0 })
    }

    /// Pins it, if the process is trusted.
    pub fn pin(&self, space: &mut Space) {
        let wanted = space.is_trusted() && !self.0.is_empty() && !space.has(&self.0);
        if wanted && !space.pin(&self.0, Sharing::Private) {
            space.leave(self.0.len());
        }
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
