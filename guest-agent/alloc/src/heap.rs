//! malloc's blocks: small ones by dlmalloc in arenas that grow, large ones with an arena each.
//!
//! Owns the one lock of the library ([`lock`]). dlmalloc asks [`Source`] for memory and never gives any back
//! ([`growing`]): pinning anew costs more than keeping. A large block goes back to the agent when it is freed. Blocks of
//! streams come from memory of their own ([`streams`]).

#![expect(unsafe_code, reason = "hands out raw memory")]

use crate::growing::{self, Growing};
use crate::piece::{PAGE, Purpose};
use crate::say::{give_up, say};
use crate::space::Space;
use crate::streams;
use dlmalloc::Dlmalloc;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

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
/// The thread that has the lock, as the C library names it; else 0.
static OWNER: AtomicUsize = AtomicUsize::new(0);

/// The heap, locked. It may live across a fork, in both processes.
pub struct Locked(MutexGuard<'static, Heap>);

impl Deref for Locked {
    type Target = Heap;

    fn deref(&self) -> &Heap {
        &self.0
    }
}

impl DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut Heap {
        &mut self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        OWNER.store(0, Ordering::Relaxed);
    }
}

/// Locks the heap. The handler of a signal that came while its thread had the lock would wait for ever, so it ends the
/// program.
#[inline]
pub fn lock() -> Locked {
    let guard = match HEAP.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => wait(),
    };
    OWNER.store(this_thread(), Ordering::Relaxed);
    Locked(guard)
}

#[cold]
fn wait() -> MutexGuard<'static, Heap> {
    if is_mine() {
        say(format_args!(
            "the handler of a signal allocates, forks or maps memory while its thread is doing so, which never ends: the program ends; have the handler only take note"
        ));
        give_up();
    }
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this thread has the lock: it is in the handler of a signal, then.
pub fn is_mine() -> bool {
    OWNER.load(Ordering::Relaxed) == this_thread()
}

/// Where the C library keeps its record of the thread: told without a call, and the same in a forked child.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn this_thread() -> usize {
    let record;
    // SAFETY: there the record begins with its own address.
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) record, options(pure, readonly, nostack, preserves_flags));
    }
    record
}

#[cfg(not(target_arch = "x86_64"))]
fn this_thread() -> usize {
    // SAFETY: it has no precondition.
    usize::try_from(unsafe { libc::pthread_self() }).unwrap_or(0)
}

/// Where dlmalloc's memory comes from.
pub struct Source {
    /// A cell because dlmalloc asks with a shared reference; the heap's lock makes it exclusive.
    space: RefCell<Space>,
    next: RefCell<usize>,
}

// SAFETY: an arena is mapped as long as it was asked for, and its piece is dlmalloc's.
unsafe impl growing::Source for Source {
    const CHUNK: usize = PAGE;

    fn more(&self, size: usize) -> Option<(*mut u8, usize)> {
        let mut next = self.next.borrow_mut();
        let wanted = size.next_multiple_of(PAGE).max(*next);
        *next = (*next * 2).min(LAST_ARENA);
        let base = self.space.borrow_mut().create(wanted, PAGE, Purpose::Heap)?;
        Some((base, wanted))
    }
}

/// Everything under the lock.
pub struct Heap {
    small: Dlmalloc<Growing<Source>>,
    large: usize,
    streams: Dlmalloc<Growing<streams::Source>>,
}

impl Heap {
    const fn new() -> Self {
        let source = Source { space: RefCell::new(Space::new()), next: RefCell::new(FIRST_ARENA) };
        let streams = Dlmalloc::new_with_allocator(Growing(streams::Source::new()));
        Self { small: Dlmalloc::new_with_allocator(Growing(source)), large: 0, streams }
    }

    /// The arenas.
    pub fn space(&mut self) -> &mut Space {
        self.small.allocator_mut().0.space.get_mut()
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
        self.streams.allocator().0.holds(block)
    }

    /// Bytes of a block that has a piece of its own.
    fn large_len(&self, block: *mut u8) -> Option<usize> {
        if !block.addr().is_multiple_of(PAGE) {
            return None;
        }
        let piece = self.small.allocator().0.space.borrow().find(block.addr())?;
        (piece.block > 0).then_some(piece.block)
    }
}
