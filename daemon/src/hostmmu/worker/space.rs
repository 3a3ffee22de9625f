//! The GPU's part of this process' address space: `[LOWEST, end)`, taken whole at the start, so that nothing of the
//! worker itself is ever there. Image, heap and stacks lie above.
//!
//! What is not mapped is anonymous memory that is registered with userfaultfd and that nobody ever fills. Changes are
//! made by one thread, while others run packets.

#![expect(unsafe_code, reason = "mappings at given addresses have no safe wrapper")]

use crate::hostmmu::uffd;
use rustix::fd::{AsFd, OwnedFd};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect};
use std::ffi::c_void;

/// No process may map anything below (vm.mmap_min_addr).
pub const LOWEST: u64 = 64 << 10;

/// The space.
pub struct Space {
    end: u64,
    faults: OwnedFd,
}

impl Space {
    /// Takes all addresses below `end`.
    ///
    /// # Errors
    /// The kernel refuses, as it does if something is there.
    pub fn new(end: u64) -> rustix::io::Result<Self> {
        let space = Self { end, faults: uffd::create()? };
        let (start, bytes) = (LOWEST, end.saturating_sub(LOWEST));
        // SAFETY: NOREPLACE: nothing that stands there is changed.
        unsafe { reserve(start, bytes, MapFlags::FIXED_NOREPLACE) }?;
        space.open(start, bytes)?;
        Ok(space)
    }

    /// First address beyond.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Where the daemon reads the faults.
    pub fn faults(&self) -> &OwnedFd {
        &self.faults
    }

    /// Maps a part of a file.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn map(
        &self,
        addr: u64,
        bytes: u64,
        file: impl AsFd,
        offset: u64,
        writable: bool,
    ) -> rustix::io::Result<()> {
        self.assert_inside(addr, bytes);
        let rights = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: nothing of Rust is in this space, so nothing of Rust is replaced.
        unsafe {
            mmap(pointer(addr), length(bytes), rights, MapFlags::SHARED | MapFlags::FIXED, file, offset)
        }?;
        Ok(())
    }

    /// Maps nothing. On return no CPU uses what was there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmap(&self, addr: u64, bytes: u64) -> rustix::io::Result<()> {
        self.assert_inside(addr, bytes);
        // SAFETY: as in `map`.
        unsafe { reserve(addr, bytes, MapFlags::FIXED) }?;
        self.open(addr, bytes)
    }

    /// Makes a reserved range raise faults. Accessible only once it is registered: no packet ever finds memory here.
    fn open(&self, addr: u64, bytes: u64) -> rustix::io::Result<()> {
        uffd::register(&self.faults, addr, bytes)?;
        // SAFETY: the range is reserved memory of this space.
        unsafe { mprotect(pointer(addr), length(bytes), MprotectFlags::READ | MprotectFlags::WRITE) }
    }

    fn assert_inside(&self, addr: u64, bytes: u64) {
        let inside = LOWEST <= addr && addr.checked_add(bytes).is_some_and(|last| last <= self.end);
        assert!(inside, "{addr:#x}+{bytes:#x} is not the GPU's");
    }
}

/// Puts inaccessible memory somewhere.
///
/// # Safety
/// With [`MapFlags::FIXED`], nothing of Rust may be there.
unsafe fn reserve(addr: u64, bytes: u64, place: MapFlags) -> rustix::io::Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | place;
    // SAFETY: as the caller vouches.
    unsafe { mmap_anonymous(pointer(addr), length(bytes), ProtFlags::empty(), flags) }.map(drop)
}

fn pointer(addr: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(length(addr))
}

#[expect(clippy::cast_possible_truncation, reason = "this module is for machines of 64 bits")]
fn length(bytes: u64) -> usize {
    bytes as usize
}
