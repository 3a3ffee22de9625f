//! Memory shared with somebody else: the device, a process of this guest, or the registers of a PCI function.
//!
//! Owns the mapping and every access to it. Nothing here hands out a reference into the memory, because the other side
//! may write at any time; bytes are copied with relaxed atomic accesses, fields with the ordering that the caller
//! names, registers with volatile accesses. Every access is checked against the length of the mapping.
//!
//! Used by [`crate::driver::dma`], [`crate::driver::pci`], [`crate::pin`] and [`crate::client`].

#![expect(unsafe_code, reason = "maps shared memory and accesses it through raw pointers")]

use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Why shared memory could not be mapped or reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused the mapping.
    #[error("cannot map {len} bytes of shared memory")]
    Map {
        /// Bytes asked for.
        len: usize,
        /// What the kernel said.
        #[source]
        source: rustix::io::Errno,
    },
    /// An access beyond the mapping, or one that is not naturally aligned.
    #[error("access of {bytes} bytes at {offset:#x} does not fit a mapping of {len:#x} bytes")]
    OutOfRange {
        /// Offset of the access.
        offset: usize,
        /// Bytes of the access.
        bytes: usize,
        /// Bytes of the mapping.
        len: usize,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a mapping must stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Wherever the kernel likes.
    Anywhere,
    /// At this address, which nothing may occupy yet.
    At(usize),
}

/// A `MAP_SHARED` mapping, unmapped on drop.
#[derive(Debug)]
pub struct SharedMapping {
    /// Kept as an address so that the type is `Send` and `Sync` by itself: all accesses are atomic or volatile.
    base: usize,
    len: usize,
}

impl SharedMapping {
    /// Maps `len` bytes of `fd` from `offset`, readable and writable.
    ///
    /// # Errors
    /// What mmap says; `EEXIST` where the place is taken.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: usize, place: Placement) -> Result<Self> {
        let (hint, flags) = match place {
            Placement::Anywhere => (std::ptr::null_mut(), MapFlags::SHARED),
            Placement::At(addr) => {
                (std::ptr::without_provenance_mut(addr), MapFlags::SHARED | MapFlags::FIXED_NOREPLACE)
            }
        };
        // SAFETY: without MAP_FIXED the kernel replaces no mapping that exists (FIXED_NOREPLACE fails instead), so no
        // memory that Rust knows is affected.
        let base =
            unsafe { rustix::mm::mmap(hint, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset) }
                .map_err(|source| Error::Map { len, source })?;
        let mapping = Self { base: base.expose_provenance(), len };
        match place {
            // Kernels before 4.17 take the address as a hint only.
            Placement::At(addr) if addr != mapping.base => {
                Err(Error::Map { len, source: rustix::io::Errno::EXIST })
            }
            _ => Ok(mapping),
        }
    }

    /// Maps `len` bytes of `fd` from `offset`, readable and writable, in place of what is mapped at `address`: there is no
    /// moment at which something else could be mapped there.
    ///
    /// # Errors
    /// What mmap says. Then nothing may be mapped there any more.
    ///
    /// # Safety
    /// All of the range is mapped by the caller, nothing points into it, and the caller unmaps none of it any more.
    pub unsafe fn in_place_of(address: usize, fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self> {
        let hint = std::ptr::with_exposed_provenance_mut(address);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: what is replaced is the caller's, and nothing points into it.
        let base =
            unsafe { rustix::mm::mmap(hint, len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, offset) }
                .map_err(|source| Error::Map { len, source })?;
        Ok(Self { base: base.expose_provenance(), len })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty; the kernel never makes such a one.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte in this process.
    pub fn address(&self) -> usize {
        self.base
    }

    /// Faults `len` bytes from `offset` in, whole pages.
    ///
    /// # Errors
    /// What madvise says; `EFAULT` or `ENOMEM` when memory runs out. [`Error::OutOfRange`].
    pub fn populate(&self, offset: usize, len: usize) -> Result<()> {
        self.advise(offset, len, Advice::LinuxPopulateWrite)
    }

    /// Forked children do not get the mapping.
    ///
    /// # Errors
    /// What madvise says.
    pub fn keep_from_children(&self) -> Result<()> {
        self.advise(0, self.len, Advice::LinuxDontFork)
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<()> {
        let start = self.checked(offset, len, 1)?;
        // SAFETY: `checked` proved that the range lies in this mapping; neither advice changes the contents of its
        // pages.
        unsafe { rustix::mm::madvise(start.cast(), len, advice) }.map_err(|source| Error::Map { len, source })
    }

    fn pointer(&self, offset: usize) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.base + offset)
    }

    fn checked(&self, offset: usize, bytes: usize, align: usize) -> Result<*mut u8> {
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.len);
        if !fits || !(self.base + offset).is_multiple_of(align) {
            return Err(Error::OutOfRange { offset, bytes, len: self.len });
        }
        Ok(self.pointer(offset))
    }

    /// Copies bytes out of the memory.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.checked(offset, out.len(), 1)?;
        let (head, words) = out.split_at_mut(self.bytes_to_word(offset, out.len()));
        self.read_bytes(offset, head)?;
        let mut at = offset + head.len();
        let (words, tail) = words.as_chunks_mut::<8>();
        for word in words {
            *word = self.u64_at(at)?.load(Ordering::Relaxed).to_ne_bytes();
            at += 8;
        }
        self.read_bytes(at, tail)
    }

    fn read_bytes(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        for (at, byte) in out.iter_mut().enumerate() {
            *byte = self.u8_at(offset + at)?.load(Ordering::Relaxed);
        }
        Ok(())
    }

    /// Bytes from `offset` up to the next aligned word, at most `len`.
    fn bytes_to_word(&self, offset: usize, len: usize) -> usize {
        let at = self.base + offset;
        (at.next_multiple_of(8) - at).min(len)
    }

    /// Copies bytes into the memory.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.checked(offset, data.len(), 1)?;
        let (head, words) = data.split_at(self.bytes_to_word(offset, data.len()));
        self.write_bytes(offset, head)?;
        let mut at = offset + head.len();
        let (words, tail) = words.as_chunks::<8>();
        for word in words {
            self.u64_at(at)?.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
            at += 8;
        }
        self.write_bytes(at, tail)
    }

    fn write_bytes(&self, offset: usize, data: &[u8]) -> Result<()> {
        for (at, byte) in data.iter().enumerate() {
            self.u8_at(offset + at)?.store(*byte, Ordering::Relaxed);
        }
        Ok(())
    }

    fn u8_at(&self, offset: usize) -> Result<&AtomicU8> {
        let pointer = self.checked(offset, 1, 1)?;
        // SAFETY: `checked` proved that the byte lies in the mapping, which lives as long as `self`; every access of
        // this process to it is atomic.
        Ok(unsafe { AtomicU8::from_ptr(pointer) })
    }

    fn u64_at(&self, offset: usize) -> Result<&AtomicU64> {
        let pointer = self.checked(offset, 8, 8)?;
        // SAFETY: `checked` proved that eight aligned bytes lie in the mapping, which lives as long as `self`; every
        // access of this process to them is atomic.
        Ok(unsafe { AtomicU64::from_ptr(pointer.cast()) })
    }

    /// Loads a little-endian 16-bit field.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn load_u16(&self, offset: usize, order: Ordering) -> Result<u16> {
        let pointer = self.checked(offset, 2, 2)?;
        // SAFETY: `checked` proved that two aligned bytes lie in the mapping, which lives as long as `self`; every
        // access of this process to them is atomic.
        let cell = unsafe { AtomicU16::from_ptr(pointer.cast()) };
        Ok(u16::from_le(cell.load(order)))
    }

    /// Stores a little-endian 16-bit field.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) -> Result<()> {
        let pointer = self.checked(offset, 2, 2)?;
        // SAFETY: as in `load_u16`: in range, aligned, and only ever accessed atomically.
        let cell = unsafe { AtomicU16::from_ptr(pointer.cast()) };
        cell.store(value.to_le(), order);
        Ok(())
    }

    /// Loads a little-endian 32-bit field.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn load_u32(&self, offset: usize, order: Ordering) -> Result<u32> {
        let pointer = self.checked(offset, 4, 4)?;
        // SAFETY: `checked` proved that four aligned bytes lie in the mapping, which lives as long as `self`; every
        // access of this process to them is atomic.
        let cell = unsafe { AtomicU32::from_ptr(pointer.cast()) };
        Ok(u32::from_le(cell.load(order)))
    }

    /// Stores a little-endian 32-bit field.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) -> Result<()> {
        let pointer = self.checked(offset, 4, 4)?;
        // SAFETY: as in `load_u32`: in range, aligned, and only ever accessed atomically.
        let cell = unsafe { AtomicU32::from_ptr(pointer.cast()) };
        cell.store(value.to_le(), order);
        Ok(())
    }

    /// Reads a register.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn register<T: Register>(&self, offset: usize) -> Result<T> {
        let pointer = self.checked(offset, size_of::<T>(), size_of::<T>())?;
        // SAFETY: `checked` proved that the register lies in the mapping and is aligned; `Register` is implemented
        // only for integers, for which every bit pattern is a value.
        let raw: T = unsafe { pointer.cast::<T>().read_volatile() };
        Ok(raw.from_le())
    }

    /// Writes a register.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn set_register<T: Register>(&self, offset: usize, value: T) -> Result<()> {
        let pointer = self.checked(offset, size_of::<T>(), size_of::<T>())?;
        // SAFETY: `checked` proved that the register lies in the mapping and is aligned; a volatile write of an
        // integer has no other precondition.
        unsafe { pointer.cast::<T>().write_volatile(value.to_le()) };
        Ok(())
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of a mapping that this value owns; no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.pointer(0).cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an owned mapping: {unmapped:?}");
    }
}

/// Integers that registers hold.
pub trait Register: Copy + sealed::Sealed {
    /// From the little-endian bytes of the bus.
    #[expect(clippy::wrong_self_convention, reason = "mirrors the name of the integers' own function")]
    fn from_le(self) -> Self;
    /// To the little-endian bytes of the bus.
    fn to_le(self) -> Self;
}

mod sealed {
    /// Keeps [`super::Register`] to integers.
    pub trait Sealed {}
}

macro_rules! register {
    ($($int:ty),*) => {$(
        impl sealed::Sealed for $int {}
        impl Register for $int {
            fn from_le(self) -> Self { <$int>::from_le(self) }
            fn to_le(self) -> Self { <$int>::to_le(self) }
        }
    )*};
}
register!(u8, u16, u32);
