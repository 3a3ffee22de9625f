//! Memory modules: files of their own that a VMM plugs into a running guest, takes out again, and puts elsewhere.
//!
//! A [`Dimm`] is the file and its contents, [`Plugged`] the claim that it stands somewhere. Nothing here remembers what
//! the daemon was told; that is the test's part.

use super::ram::sealed_memfd;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

/// A module.
#[derive(Debug)]
pub struct Dimm {
    file: Arc<File>,
    mapping: MmapRegion<()>,
    bytes: u64,
}

/// A module at a place.
#[derive(Clone, Copy, Debug)]
pub struct Plugged<'a> {
    /// The module.
    pub dimm: &'a Dimm,
    /// Guest-physical address of its first byte.
    pub gpa: u64,
}

impl Dimm {
    /// A module of so many bytes, zeroed.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(bytes: u64) -> Result<Self> {
        let file = sealed_memfd(bytes)?;
        let mapping =
            MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), usize::try_from(bytes)?)
                .context("cannot map a memory module")?;
        Ok(Self { file, mapping, bytes })
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Everything in it.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn contents(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.mapping.size()];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Beyond its end.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.mapping.as_volatile_slice().write_slice(bytes, usize::try_from(offset)?)?)
    }

    /// Reads a word.
    ///
    /// # Errors
    /// Beyond its end.
    pub fn read_word(&self, offset: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.mapping.as_volatile_slice().read_slice(&mut bytes, usize::try_from(offset)?)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Plugged<'_> {
    /// The region as the frontend announces it.
    pub(super) fn vhost_region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: self.dimm.bytes,
            userspace_addr: self.dimm.mapping.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: self.dimm.file.as_raw_fd(),
        }
    }
}
