//! Guest memory as one visit to a ring reaches it: regions are looked up once, and what lies in one that is known costs
//! a comparison.
//!
//! Two regions are known: the one that the ring lies in, and the one that the last buffer lay in. Whatever is not in one
//! piece there (an area or a buffer across two regions, an index whose place is not aligned, memory that is no plain
//! memory) goes vm-memory's way, a search for each access, with the same outcome. Either way an access is one access:
//! what is read once here is read once there.
//!
//! The memory is the framework's map, watched over by [`crate::sigbus`]: it stays mapped as long as this is held, and
//! pages of it that go away read as zeros.

#![expect(
    unsafe_code,
    reason = "vm-memory looks its region up for every access, which is four fifths of what a command cost"
)]

use super::RingError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, Permissions,
};
use zerocopy::IntoBytes;

/// Guest memory that a ring may lie in.
pub trait RingMemory: GuestMemory<Bitmap = ()> {
    /// These bytes are about to be read or written where they lie, and not by way of [`GuestMemory::get_slices`]: for
    /// memory that keeps count of what is done to it.
    #[inline]
    fn touch(&self, _at: u64, _bytes: usize, _access: Permissions) {}
}

impl RingMemory for GuestMemoryMmap {}

/// What was asked for is not in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing;

impl From<Missing> for RingError {
    fn from(_: Missing) -> Self {
        Self::Inaccessible
    }
}

/// A region of guest memory in this process. Its bytes at `host` may be read and written as long as the memory is held
/// that it was found in.
#[derive(Clone, Copy)]
struct Piece {
    start: u64,
    bytes: usize,
    host: *mut u8,
}

impl Piece {
    const NONE: Self = Self { start: 0, bytes: 0, host: std::ptr::null_mut() };

    /// The region that an address lies in.
    fn find<M: GuestMemory>(memory: &M, at: u64) -> Option<Self> {
        let region = memory.physical_memory()?.find_region(GuestAddress(at))?;
        let bytes = usize::try_from(region.len()).ok()?;
        let all = region.get_slice(MemoryRegionAddress(0), bytes).ok()?;
        Some(Self { start: region.start_addr().0, bytes: all.len(), host: all.ptr_guard_mut().as_ptr() })
    }

    /// Where these bytes are, if all of them are in here.
    #[inline]
    fn host(&self, at: u64, bytes: usize) -> Option<*mut u8> {
        let offset = usize::try_from(at.checked_sub(self.start)?).ok()?;
        (self.bytes.checked_sub(offset)? >= bytes).then(|| self.host.wrapping_add(offset))
    }

    /// The same of one value, if it is aligned there.
    #[inline]
    fn host_of<T>(&self, at: u64) -> Option<*mut T> {
        self.host(at, size_of::<T>()).map(<*mut u8>::cast::<T>).filter(|place| place.is_aligned())
    }
}

/// See the module.
pub(super) struct Reach<M> {
    memory: Arc<M>,
    ring: Piece,
    buffers: Piece,
}

// Nothing here tells a bitmap what was written, so there must be none.
impl<M: RingMemory> Reach<M> {
    /// For a ring that lies about here.
    pub(super) fn new(memory: Arc<M>, ring: u64) -> Self {
        let ring = Piece::find(&*memory, ring).unwrap_or(Piece::NONE);
        Self { memory, ring, buffers: ring }
    }

    /// Whether an area of the ring is in guest memory.
    pub(super) fn holds_area(&self, at: u64, bytes: usize, access: Permissions) -> bool {
        self.ring.host(at, bytes).is_some() || self.memory.check_range(GuestAddress(at), bytes, access)
    }

    /// An index or flag of the ring.
    #[inline]
    pub(super) fn load(&self, at: u64, order: Ordering) -> Result<u16, Missing> {
        let word = match self.ring.host_of::<u16>(at) {
            Some(place) => {
                self.memory.touch(at, size_of::<u16>(), Permissions::Read);
                // SAFETY: aligned, as `host_of` found, and in a piece of `self.memory`, which is held: valid for both.
                // Whoever else in this process comes to rings uses atomics too; the guest is no thread of this process.
                let word = unsafe { AtomicU16::from_ptr(place) };
                word.load(order)
            }
            None => self.memory.load(GuestAddress(at), order).map_err(|_| Missing)?,
        };
        Ok(u16::from_le(word))
    }

    /// Sets an index or flag of the ring.
    #[inline]
    pub(super) fn store(&self, at: u64, value: u16, order: Ordering) -> Result<(), Missing> {
        match self.ring.host_of::<u16>(at) {
            Some(place) => {
                self.memory.touch(at, size_of::<u16>(), Permissions::Write);
                // SAFETY: as in `load`: aligned, in a piece of memory that is held, mapped for writing as all of it is.
                let word = unsafe { AtomicU16::from_ptr(place) };
                word.store(value.to_le(), order);
                Ok(())
            }
            None => self.memory.store(value.to_le(), GuestAddress(at), order).map_err(|_| Missing),
        }
    }

    /// The two words of a descriptor of the ring's own table, as they lie there.
    #[inline]
    pub(super) fn load_descriptor(&self, at: u64) -> Result<[u64; 2], Missing> {
        match self.ring.host_of::<[u64; 2]>(at) {
            Some(place) => {
                self.memory.touch(at, size_of::<[u64; 2]>(), Permissions::Read);
                // SAFETY: aligned and whole in a piece of memory that is held; any bytes are a value of two words.
                Ok(unsafe { place.read_volatile() })
            }
            None => {
                let mut words = [0; 2];
                let read = self.memory.read_slice(words.as_mut_bytes(), GuestAddress(at));
                read.map(|()| words).map_err(|_| Missing)
            }
        }
    }

    /// Writes an element of the used ring; nobody looks at it before the used index says so.
    #[inline]
    pub(super) fn store_element(&self, at: u64, element: [u32; 2]) -> Result<(), Missing> {
        let element = element.map(u32::to_le);
        match self.ring.host_of::<[u32; 2]>(at) {
            Some(place) => {
                self.memory.touch(at, size_of::<[u32; 2]>(), Permissions::Write);
                // SAFETY: aligned and whole in a piece of memory that is held, mapped for writing as all of it is.
                unsafe { place.write_volatile(element) };
                Ok(())
            }
            None => self.memory.write_slice(element.as_bytes(), GuestAddress(at)).map_err(|_| Missing),
        }
    }

    /// Whether a buffer is in guest memory.
    #[inline]
    pub(super) fn holds(&mut self, at: u64, bytes: usize, access: Permissions) -> bool {
        let known = self.buffer(at, bytes);
        if let Some(host) = known.filter(|_| access == Permissions::Write) {
            fetch_to_write(host);
        }
        known.is_some() || self.memory.check_range(GuestAddress(at), bytes, access)
    }

    /// Fills `into` from a buffer.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Missing> {
        self.memory.read_slice(into, GuestAddress(at)).map_err(|_| Missing)
    }

    /// Adds a buffer's bytes to `into`.
    pub(super) fn append(&mut self, at: u64, bytes: usize, into: &mut Vec<u8>) -> Result<(), Missing> {
        let Some(from) = self.buffer(at, bytes) else {
            let copied = self.memory.write_all_volatile_to(GuestAddress(at), into, bytes);
            return copied.map_err(|_| Missing);
        };
        self.memory.touch(at, bytes, Permissions::Read);
        into.reserve(bytes);
        let room = into.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        // SAFETY: `from` is whole in a piece of memory that is held, `room` was reserved, and no list lies in guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, room, bytes) };
        let filled = into.len().saturating_add(bytes);
        // SAFETY: so many were reserved, and those behind the old length have just been copied there.
        unsafe { into.set_len(filled) };
        Ok(())
    }

    /// Writes to a buffer.
    pub(super) fn write(&mut self, at: u64, from: &[u8]) -> Result<(), Missing> {
        let Some(into) = self.buffer(at, from.len()) else {
            return self.memory.write_slice(from, GuestAddress(at)).map_err(|_| Missing);
        };
        self.memory.touch(at, from.len(), Permissions::Write);
        // SAFETY: `into` is whole in a piece of memory that is held and mapped for writing, in which nothing of Rust's lies.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        Ok(())
    }

    #[inline]
    fn buffer(&mut self, at: u64, bytes: usize) -> Option<*mut u8> {
        if let Some(host) = self.buffers.host(at, bytes) {
            return Some(host);
        }
        self.buffers = Piece::find(&*self.memory, at)?;
        self.buffers.host(at, bytes)
    }
}

/// Has this CPU fetch the line of an answer while the command is carried out. The driver's CPU wrote it last, and a store
/// that waits for it holds up all that follow.
#[inline]
fn fetch_to_write(host: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a hint: it reads and writes nothing, and the address may be any.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(host.cast_const().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = host;
}
