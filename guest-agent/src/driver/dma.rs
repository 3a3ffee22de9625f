//! Memory that the device reaches by its own addresses.
//!
//! A region is mapped here and stands in the device's address space page by page, in any order. It is set up once, by
//! somebody who knows where its pages are and that they stay there ([`crate::pin`] in a guest).

use crate::mapping::{Error, Placement, Result, SharedMapping};
use std::os::fd::BorrowedFd;
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// Bytes of a page, as a memory size.
pub const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE);

/// A piece of DMA memory as a descriptor names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Device address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// Mapped DMA memory and the device address of each of its pages.
#[derive(Debug)]
pub struct DmaRegion {
    mapping: SharedMapping,
    pages: Vec<u64>,
}

impl DmaRegion {
    /// Maps `pages.len()` pages of `fd` from `offset`. `pages` holds the device address of each; they must stay there
    /// while the device may use the region.
    ///
    /// # Errors
    /// What mmap says.
    pub fn from_fd(fd: BorrowedFd<'_>, offset: u64, pages: Vec<u64>) -> Result<Self> {
        let mapping = SharedMapping::new(fd, offset, pages.len() * PAGE_BYTES, Placement::Anywhere)?;
        Ok(Self { mapping, pages })
    }

    /// The memory.
    pub fn memory(&self) -> &SharedMapping {
        &self.mapping
    }

    /// Pages.
    pub fn num_pages(&self) -> usize {
        self.pages.len()
    }

    /// Device address of each page.
    pub fn pages(&self) -> &[u64] {
        &self.pages
    }

    /// Device address of the byte at `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn address(&self, offset: usize) -> Result<u64> {
        let page = self.pages.get(offset / PAGE_BYTES);
        let within = offset % PAGE_BYTES;
        match (page, u64::try_from(within)) {
            (Some(page), Ok(within)) => Ok(page + within),
            _ => Err(Error::OutOfRange { offset, bytes: 1, len: self.mapping.len() }),
        }
    }

    /// Overwrites the region with zeros.
    ///
    /// # Errors
    /// None in practice; the signature is the mapping's.
    pub fn clear(&self) -> Result<()> {
        let zeros = [0; PAGE_BYTES];
        for page in 0..self.pages.len() {
            self.mapping.write(page * PAGE_BYTES, &zeros)?;
        }
        Ok(())
    }
}
