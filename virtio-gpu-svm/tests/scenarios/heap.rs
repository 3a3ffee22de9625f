//! Counts what is alive on the heap, of the process and of this thread, so that a test can say that nothing is left.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator, and the counts.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Constant and without a destructor: to look at it allocates nothing, at any point of a thread's life.
    static HERE: Cell<usize> = const { Cell::new(0) };
}

/// Bytes alive in the process.
#[must_use]
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Bytes that this thread has allocated less those that it has freed; wraps.
#[must_use]
pub fn live_here() -> usize {
    HERE.get()
}

fn add(bytes: usize) {
    LIVE.fetch_add(bytes, Ordering::Relaxed);
    HERE.set(HERE.get().wrapping_add(bytes));
}

fn sub(bytes: usize) {
    LIVE.fetch_sub(bytes, Ordering::Relaxed);
    HERE.set(HERE.get().wrapping_sub(bytes));
}

// SAFETY: every call goes to the system's allocator as it is; counting touches no memory of its blocks.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout is handed on.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            add(layout.size());
        }
        block
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        sub(layout.size());
        // SAFETY: the caller's promise that the block is of `alloc` with this layout is handed on.
        unsafe { System.dealloc(block, layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise about block, layout and size is handed on.
        let moved = unsafe { System.realloc(block, layout, size) };
        if !moved.is_null() {
            sub(layout.size());
            add(size);
        }
        moved
    }
}
