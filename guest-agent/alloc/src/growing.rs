//! Memory for dlmalloc that only grows.

#![expect(unsafe_code, reason = "gives dlmalloc raw memory")]

use dlmalloc::Allocator;

/// Where the memory comes from.
///
/// # Safety
/// What [`Self::more`] returns is mapped, of zeros, of the length that it says, and used for nothing else for ever.
pub unsafe trait Source {
    /// What comes at once is a multiple of this many bytes.
    const CHUNK: usize;

    /// At least `size` bytes: where, and how many.
    fn more(&self, size: usize) -> Option<(*mut u8, usize)>;
}

/// As dlmalloc asks for it. Nothing is ever taken back, moved or cut.
pub struct Growing<S>(pub S);

// SAFETY: the source's promise is passed on.
unsafe impl<S: Source + Send> Allocator for Growing<S> {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let (base, len) = self.0.more(size).unwrap_or((std::ptr::null_mut(), 0));
        (base, len, 0)
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
        S::CHUNK
    }
}
