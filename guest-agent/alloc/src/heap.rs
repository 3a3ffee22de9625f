//! malloc's blocks: small ones by dlmalloc in arenas that grow, large ones with an arena each.
//!
//! Owns the one lock of the library ([`lock`]). dlmalloc asks [`Source`] for memory and never gives any back: pinning
//! anew costs more than keeping. A large block goes back to the agent when it is freed. Blocks of streams come from
//! memory of their own ([`streams`]).

#![expect(unsafe_code, reason = "hands out raw memory")]

use crate::piece::{PAGE, Purpose};
use crate::space::Space;
use crate::streams;
use dlmalloc::{Allocator, Dlmalloc};
use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// First arena for small blocks. Each further one is twice as large, up to the last.
const FIRST_ARENA: usize = 64 << 10;
const LAST_ARENA: usize = 8 << 20;
/// From here on a block has an arena of its own.
const LARGE: usize = 1 << 20;
/// Blocks with arenas of their own; the agent limits arenas, so further ones share.
const MAX_LARGE: usize = 256;
/// What every block is aligned to.
pub const ALIGN: usize = 16;
/// No program has more.
const MAX_BYTES: usize = 1 << 46;

static HEAP: Mutex<Heap> = Mutex::new(Heap::new());

/// The heap, locked. The guard may live across a fork, in both processes.
pub fn lock() -> MutexGuard<'static, Heap> {
    // A thread's first look at its own variables after a library has gone may free what that one had there.
    streams::touch();
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where dlmalloc's memory comes from.
pub struct Source {
    /// A cell because dlmalloc asks with a shared reference; the heap's lock makes it exclusive.
    space: RefCell<Space>,
    next: RefCell<usize>,
}

// SAFETY: `alloc` returns memory that is mapped, of the size that it says, and used for nothing else; none is ever taken
// back, moved or cut.
unsafe impl Allocator for Source {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let mut next = self.next.borrow_mut();
        let wanted = size.next_multiple_of(PAGE).max(*next);
        *next = (*next * 2).min(LAST_ARENA);
        match self.space.borrow_mut().create(wanted, PAGE, Purpose::Heap) {
            Some(base) => (base, wanted, 0),
            None => (std::ptr::null_mut(), 0, 0),
        }
    }

    fn remap(&self, _ptr: *mut u8, _oldsize: usize, _newsize: usize, _can_move: bool) -> *mut u8 {
        std::ptr::null_mut()
    }

    fn free_part(&self, _ptr: *mut u8, _oldsize: usize, _newsize: usize) -> bool {
        false
    }

    fn free(&self, _ptr: *mut u8, _size: usize) -> bool {
        false
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE
    }
}

/// Everything under the lock.
pub struct Heap {
    small: Dlmalloc<Source>,
    large: usize,
    streams: Dlmalloc<streams::Source>,
}

impl Heap {
    const fn new() -> Self {
        let source = Source { space: RefCell::new(Space::new()), next: RefCell::new(FIRST_ARENA) };
        let streams = Dlmalloc::new_with_allocator(streams::Source::new());
        Self { small: Dlmalloc::new_with_allocator(source), large: 0, streams }
    }

    /// The arenas.
    pub fn space(&mut self) -> &mut Space {
        self.small.allocator_mut().space.get_mut()
    }

    /// A block, or null. `align` is a power of two.
    pub fn allocate(&mut self, size: usize, align: usize) -> *mut u8 {
        if size > MAX_BYTES || align > MAX_BYTES {
            return std::ptr::null_mut();
        }
        if streams::asks() {
            // SAFETY: any size is accepted.
            let block = unsafe { self.streams.c_memalign(align.max(ALIGN), size) };
            if !block.is_null() {
                return block;
            }
        }
        if size >= LARGE && self.large < MAX_LARGE {
            let len = size.next_multiple_of(PAGE);
            if let Some(base) = self.space().create(len, align, Purpose::Block) {
                self.large += 1;
                return base;
            }
        }
        if align <= ALIGN {
            // SAFETY: any size is accepted.
            unsafe { self.small.c_malloc(size) }
        } else {
            // SAFETY: the alignment is a power of two.
            unsafe { self.small.c_memalign(align, size) }
        }
    }

    /// A block of zeros.
    pub fn allocate_zeroed(&mut self, size: usize) -> *mut u8 {
        let block = self.allocate(size, ALIGN);
        if !block.is_null() && self.large_len(block).is_none() {
            // SAFETY: the block has that many bytes, and nobody else knows it yet.
            unsafe { block.write_bytes(0, size) };
        }
        block
    }

    /// # Safety
    /// `block` is one of this heap's and not freed.
    pub unsafe fn free(&mut self, block: *mut u8) {
        if self.is_stream(block) {
            // SAFETY: it lies where streams do, so it is theirs.
            unsafe { self.streams.c_free(block) };
        } else if self.large_len(block).is_some() {
            self.large -= 1;
            // SAFETY: the caller gives the block up, and it is the whole piece.
            unsafe { self.space().release(block.addr()) };
        } else {
            // SAFETY: it is no large block, so it is dlmalloc's.
            unsafe { self.small.c_free(block) };
        }
    }

    /// # Safety
    /// `block` is one of this heap's and not freed. If the result is not null, it is freed.
    pub unsafe fn resize(&mut self, block: *mut u8, size: usize) -> *mut u8 {
        let large = self.large_len(block);
        if large.is_none() && size < LARGE && !self.is_stream(block) {
            // SAFETY: it is no large block, so it is dlmalloc's.
            return unsafe { self.small.c_realloc(block, size) };
        }
        if large.is_some_and(|len| size <= len && size > len / 2) {
            return block;
        }
        // SAFETY: the caller's promise is passed on.
        let old = unsafe { self.usable(block) };
        let moved = self.allocate(size, ALIGN);
        if !moved.is_null() {
            // SAFETY: both blocks have that many bytes, and they are two.
            unsafe { std::ptr::copy_nonoverlapping(block, moved, old.min(size)) };
            // SAFETY: the caller gives it up.
            unsafe { self.free(block) };
        }
        moved
    }

    /// Bytes that a block has room for.
    ///
    /// # Safety
    /// `block` is one of this heap's and not freed.
    pub unsafe fn usable(&self, block: *mut u8) -> usize {
        const FLAGS: usize = 7;
        const WORD: usize = size_of::<usize>();
        if let Some(len) = self.large_len(block) {
            return len;
        }
        // dlmalloc has no function for this. It keeps the size of a block, head included, in the word before it, with
        // flags in the lowest bits; the version is pinned for that reason.
        // SAFETY: the caller's block is dlmalloc's, so the word is there, and aligned.
        let head = unsafe { block.wrapping_sub(WORD).cast::<usize>().read() };
        (head & !FLAGS).saturating_sub(WORD)
    }

    fn is_stream(&self, block: *mut u8) -> bool {
        self.streams.allocator().holds(block)
    }

    /// Bytes of a block that has a piece of its own.
    fn large_len(&self, block: *mut u8) -> Option<usize> {
        if !block.addr().is_multiple_of(PAGE) {
            return None;
        }
        let piece = self.small.allocator().space.borrow().find(block.addr())?;
        (piece.block > 0).then_some(piece.block)
    }
}
