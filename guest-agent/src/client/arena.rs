//! Memory that a process shares with GPUs: a mapping of what the agent made.

#![expect(unsafe_code, reason = "maps memory at an address and lends it as slices")]

use super::connection::Connection;
use super::{Error, Result};
use crate::driver::dma::PAGE_BYTES;
use crate::mapping::{self, Placement, SharedMapping};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Memory at an address of this process, zeroed at first, that bound GPU VMs reach.
///
/// A GPU may write to it at any time while a job runs that was told to. So slices are lent by `unsafe` functions whose
/// callers promise that no job touches the range meanwhile; [`Arena::read`] and [`Arena::write`] need no promise.
#[derive(Debug)]
pub struct Arena {
    mapping: SharedMapping,
    /// What the agent and the device know it by.
    va: u64,
    id: u64,
    connection: Arc<Connection>,
}

/// An address range that nothing else can take while the agent is asked; the real mapping takes its place.
pub(super) struct Reservation {
    at: usize,
    len: usize,
}

impl Reservation {
    pub(super) fn new(at: Option<usize>, len: usize) -> Result<Self> {
        let wanted = at.unwrap_or(0);
        let flags = if at.is_some() { MapFlags::FIXED_NOREPLACE } else { MapFlags::empty() };
        let flags = flags | MapFlags::PRIVATE | MapFlags::NORESERVE;
        let hint = std::ptr::without_provenance_mut(wanted);
        // SAFETY: without MAP_FIXED no existing mapping is replaced; FIXED_NOREPLACE fails instead.
        let mapped = unsafe { rustix::mm::mmap_anonymous(hint, len, ProtFlags::empty(), flags) };
        let taken = |errno: rustix::io::Errno| Error::Map { at: wanted, len, source: errno.into() };
        let reservation = Self { at: mapped.map_err(taken)?.expose_provenance(), len };
        // Kernels before 4.17 take the address as a hint only.
        if at.is_some_and(|at| at != reservation.at) {
            return Err(taken(rustix::io::Errno::EXIST));
        }
        Ok(reservation)
    }

    /// Where it is.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Maps a file in its place. Where that fails the range is given up and stays taken, if the kernel has left it so:
    /// to unmap it might hit what others have mapped there by then.
    fn replace(self, fd: BorrowedFd<'_>, offset: u64) -> mapping::Result<SharedMapping> {
        let Self { at, len } = self;
        std::mem::forget(self);
        // SAFETY: the range was this reservation's own mapping, which nothing points into and nobody else unmaps.
        unsafe { SharedMapping::in_place_of(at, fd, offset, len) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is this reservation's own mapping, which nothing points into.
        let unmapped =
            unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(self.at), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an owned reservation: {unmapped:?}");
    }
}

impl Arena {
    pub(super) fn create(connection: &Arc<Connection>, len: usize, at: Option<usize>) -> Result<Self> {
        let len = len.next_multiple_of(PAGE_BYTES);
        let reservation = Reservation::new(at, len)?;
        let place = reservation.at;
        let va = u64::try_from(place).unwrap_or(u64::MAX);
        let (reply, fd) = connection.create_arena(u64::try_from(len).unwrap_or(u64::MAX), va)?;
        let id = reply.arena_id.get();
        let mapping = reservation.replace(fd.as_fd(), reply.offset.get());
        Self::mapped(connection, mapping, va, id, place)
    }

    pub(super) fn create_as_if_at(connection: &Arc<Connection>, len: usize, va: u64) -> Result<Self> {
        let len = len.next_multiple_of(PAGE_BYTES);
        let (reply, fd) = connection.create_arena(u64::try_from(len).unwrap_or(u64::MAX), va)?;
        let mapping = SharedMapping::new(fd.as_fd(), reply.offset.get(), len, Placement::Anywhere);
        Self::mapped(connection, mapping, va, reply.arena_id.get(), 0)
    }

    fn mapped(
        connection: &Arc<Connection>,
        mapping: mapping::Result<SharedMapping>,
        va: u64,
        id: u64,
        at: usize,
    ) -> Result<Self> {
        match mapping {
            Ok(mapping) => Ok(Self { mapping, va, id, connection: connection.clone() }),
            Err(error) => {
                // The mapping's error is the one that matters; if this fails too, the context's end frees the arena.
                connection.free_arena(id).ok();
                let len = match &error {
                    mapping::Error::Map { len, .. } | mapping::Error::OutOfRange { len, .. } => *len,
                };
                Err(Error::Map { at, len, source: io::Error::other(error) })
            }
        }
    }

    /// A: the address that GPU VMs bind and faults name.
    pub fn address(&self) -> u64 {
        self.va
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Whether it is empty; the agent makes no such one.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// First byte in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.mapping.address())
    }

    /// Copies bytes out; they may be torn if a job writes them meanwhile.
    ///
    /// # Panics
    /// When the range lies outside the arena.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let copied = self.mapping.read(offset, out);
        assert!(copied.is_ok(), "{copied:?}");
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// When the range lies outside the arena.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let copied = self.mapping.write(offset, data);
        assert!(copied.is_ok(), "{copied:?}");
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// When the range lies outside the arena.
    pub fn word(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Sets the 64-bit word at `offset`.
    ///
    /// # Panics
    /// When the range lies outside the arena.
    pub fn set_word(&self, offset: usize, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    /// The memory as a slice of 64-bit floats from byte `offset`.
    ///
    /// # Safety
    /// No job writes the range while the slice is in use.
    ///
    /// # Panics
    /// When the range lies outside the arena or is not a multiple of 8.
    pub unsafe fn floats(&self, offset: usize, count: usize) -> &[f64] {
        let pointer = self.float_pointer(offset, count);
        // SAFETY: in range and aligned as just checked; every bit pattern is an f64; the caller keeps writers away.
        unsafe { std::slice::from_raw_parts(pointer, count) }
    }

    /// As [`Self::floats`], writable.
    ///
    /// # Safety
    /// No job touches the range while the slice is in use.
    ///
    /// # Panics
    /// When the range lies outside the arena or is not a multiple of 8.
    pub unsafe fn floats_mut(&mut self, offset: usize, count: usize) -> &mut [f64] {
        let pointer = self.float_pointer(offset, count);
        // SAFETY: in range and aligned as just checked; `self` is borrowed mutably, so no other slice of this process
        // exists; the caller keeps jobs away.
        unsafe { std::slice::from_raw_parts_mut(pointer, count) }
    }

    fn float_pointer(&self, offset: usize, count: usize) -> *mut f64 {
        let end = count.checked_mul(8).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            end.is_some_and(|end| end <= self.len()) && offset.is_multiple_of(8),
            "{offset:#x} + {count} words"
        );
        self.as_ptr().wrapping_add(offset).cast()
    }

    /// Gives the memory back; returns when no GPU can reach it any more. On a device without faults unbind it first: a GPU
    /// VM that still maps it becomes unusable. A dropped arena stays pinned until the context
    /// ends.
    ///
    /// # Errors
    /// When the agent hangs up.
    pub fn free(self) -> Result<()> {
        self.connection.free_arena(self.id)
    }
}
