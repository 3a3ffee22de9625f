//! Mappings as such: system calls, and moving contents from one to another.

#![expect(unsafe_code, reason = "maps memory over memory that is in use")]

use crate::link::Made;
use crate::piece::{Backing, Piece, READ_WRITE};
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

/// Zeros, with PROT_* of the caller's choice.
///
/// # Safety
/// With `FIXED`, nobody needs what is in the range.
pub unsafe fn map_anonymous(at: usize, len: usize, prot: i32, flags: MapFlags) -> Option<usize> {
    let hint = std::ptr::without_provenance_mut(at);
    let prot = ProtFlags::from_bits_retain(prot.cast_unsigned());
    let flags = flags | MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the caller has the right to the range, if it names one.
    let mapped = unsafe { rustix::mm::mmap_anonymous(hint, len, prot, flags) };
    mapped.ok().map(|base| base.expose_provenance())
}

/// # Safety
/// Nobody needs what is in the range.
pub unsafe fn map_arena(made: &Made, at: usize, len: usize) -> bool {
    // SAFETY: passed on.
    unsafe { map_arena_with(made, at, len, MapFlags::empty()) }
}

/// # Safety
/// As [`map_arena`].
unsafe fn map_arena_with(made: &Made, at: usize, len: usize, flags: MapFlags) -> bool {
    let (hint, prot) = (std::ptr::without_provenance_mut(at), ProtFlags::READ | ProtFlags::WRITE);
    let flags = flags | MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the caller has the right to the range.
    unsafe { rustix::mm::mmap(hint, len, prot, flags, &made.fd, made.offset) }.is_ok()
}

pub fn unmap(base: usize, len: usize) {
    if len > 0 {
        // SAFETY: the callers own the range, and nobody uses it.
        let unmapped = unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(base), len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Memory of this module's own until it takes the place of other memory.
struct Fresh {
    base: usize,
    len: usize,
}

impl Fresh {
    fn new(made: Option<&Made>, len: usize) -> Option<Self> {
        // SAFETY: without MAP_FIXED no existing mapping is replaced.
        let base = unsafe { map_anonymous(0, len, READ_WRITE, MapFlags::empty()) }?;
        let fresh = Self { base, len };
        // All of it is going to be written, and all its pages are there: rather in one call than in a fault for each.
        // SAFETY: the range was mapped just now, and nobody else knows it.
        let map = |made| unsafe { map_arena_with(made, base, len, MapFlags::POPULATE) };
        made.is_none_or(map).then_some(fresh)
    }

    /// Puts it where other memory is.
    ///
    /// # Safety
    /// Nobody needs what is there, and the caller does not stand on it.
    unsafe fn take_place(self, base: usize, prot: i32) -> bool {
        let at = std::ptr::with_exposed_provenance_mut(self.base);
        if prot != READ_WRITE {
            let flags = MprotectFlags::from_bits_retain(prot.cast_unsigned());
            // SAFETY: the memory is this value's own, and nobody uses it yet.
            if unsafe { rustix::mm::mprotect(at, self.len, flags) }.is_err() {
                return false;
            }
        }
        let to = std::ptr::with_exposed_provenance_mut(base);
        // SAFETY: the memory is this value's own; as the caller says for what it replaces.
        let moved = unsafe { rustix::mm::mremap_fixed(at, self.len, self.len, MremapFlags::MAYMOVE, to) };
        if moved.is_ok() {
            std::mem::forget(self);
        }
        moved.is_ok()
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        unmap(self.base, self.len);
    }
}

/// Puts an arena, or else anonymous memory, in the place of a piece, with the same contents.
///
/// # Safety
/// The piece is mapped as it says, nobody writes to it meanwhile, and the caller does not stand on it.
pub unsafe fn copy_over(made: Option<&Made>, piece: &Piece) -> bool {
    let Some(fresh) = Fresh::new(made, piece.len) else { return false };
    // SAFETY: as the caller says; the copy was mapped for as many bytes.
    if !unsafe { copy_piece(piece, fresh.base, piece.len) } {
        return false;
    }
    // SAFETY: what was there is needed no more, because its contents are in the copy.
    unsafe { fresh.take_place(piece.base, piece.prot) }
}

/// Puts an arena in the place of memory, with contents that `fill` writes to the address that it is given.
///
/// # Safety
/// Nobody uses the memory meanwhile.
pub unsafe fn fill_over(made: &Made, base: usize, len: usize, fill: impl FnOnce(usize) -> bool) -> bool {
    let Some(fresh) = Fresh::new(Some(made), len) else { return false };
    // SAFETY: nobody uses what it replaces.
    fill(fresh.base) && unsafe { fresh.take_place(base, READ_WRITE) }
}

/// Copies the first `len` bytes of a piece.
///
/// # Safety
/// The piece is mapped as it says, and `to` is writable for as many bytes and lies elsewhere.
pub unsafe fn copy_piece(piece: &Piece, to: usize, len: usize) -> bool {
    let from = std::ptr::with_exposed_provenance_mut(piece.base);
    if piece.prot & libc::PROT_READ != 0 {
        // SAFETY: the piece is readable, and the rest is as the caller says.
        unsafe { copy(piece.base, to, len) };
        return true;
    }
    if matches!(piece.backing, Backing::Own) {
        // SAFETY: the memory is the process' own, and only becomes readable; for the rest as the caller says.
        return unsafe { copy_hidden(piece, to, len) };
    }
    // Shared memory may be mapped a second time.
    // SAFETY: with an old length of 0 nothing is moved, and without FIXED nothing is replaced.
    let second = unsafe { rustix::mm::mremap(from, 0, len, MremapFlags::MAYMOVE) };
    let Ok(second) = second else { return false };
    // SAFETY: it was mapped just now, and nobody else knows it.
    let readable = unsafe { rustix::mm::mprotect(second, len, MprotectFlags::READ) }.is_ok();
    if readable {
        // SAFETY: it is readable, and the rest is as the caller says.
        unsafe { copy(second.expose_provenance(), to, len) };
    }
    unmap(second.expose_provenance(), len);
    readable
}

/// Makes memory readable for as long as it is copied.
///
/// # Safety
/// As [`copy_piece`].
unsafe fn copy_hidden(piece: &Piece, to: usize, len: usize) -> bool {
    let from = std::ptr::with_exposed_provenance_mut(piece.base);
    // SAFETY: it only becomes readable.
    if unsafe { rustix::mm::mprotect(from, len, MprotectFlags::READ) }.is_err() {
        return false;
    }
    // SAFETY: it is readable, and the rest is as the caller says.
    unsafe { copy(piece.base, to, len) };
    let prot = MprotectFlags::from_bits_retain(piece.prot.cast_unsigned());
    // SAFETY: it becomes what it was.
    unsafe { rustix::mm::mprotect(from, len, prot) }.is_ok()
}

/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and they are apart.
unsafe fn copy(from: usize, to: usize, len: usize) {
    let (from, to) = (std::ptr::with_exposed_provenance(from), std::ptr::with_exposed_provenance_mut(to));
    // SAFETY: as the caller says.
    unsafe { std::ptr::copy_nonoverlapping::<u8>(from, to, len) };
}
