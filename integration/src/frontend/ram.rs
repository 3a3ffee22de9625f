//! Guest memory: one memfd, sealed against shrinking and growing (unless a test means to), mapped here, by the daemon, and by KVM.
//!
//! Owns the memory, its place in guest-physical space, and who uses which page of it: the first MiB is left to the
//! vCPU's boot structures, a zone above is for rings and buffers of drivers (contiguous), the rest are pages of guest
//! processes (handed out in random order, so that what is contiguous for a process is not so in guest memory).

use crate::random::Random;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::VhostUserMemoryRegionInfo;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, AtomicInteger, Bytes, FileOffset, VolatileMemory, VolatileSlice};

/// Guest-physical addresses below this are the boot structures' of a vCPU.
pub const LOW_RESERVED: u64 = 1 << 20;
/// First guest-physical address of memory above the hole.
const HIGH_START: u64 = 1 << 32;

/// How memory lies in guest-physical space.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// From 0.
    Flat {
        /// Bytes.
        bytes: u64,
    },
    /// From 0, a hole, and again from 4 GiB, as q35 does it. Both are the same file.
    WithHole {
        /// Bytes below the hole.
        low_bytes: u64,
        /// Bytes above.
        high_bytes: u64,
    },
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Where it stands.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u64,
    /// Where it stands in the file.
    pub offset: u64,
}

/// Guest memory.
#[derive(Debug)]
pub struct GuestRam {
    file: Arc<File>,
    mapping: MmapRegion<()>,
    regions: Vec<RamRegion>,
    /// Guards which memory is free, and nothing else.
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    /// Next free address of the drivers' zone, and its end.
    dma: (u64, u64),
    /// Free pages of processes, as page numbers.
    pages: Vec<u64>,
}

impl GuestRam {
    /// Memory of a new guest, zeroed. `seed` decides the order in which processes get pages.
    ///
    /// # Errors
    /// The host has no memory, or the layout is too small.
    pub fn new(layout: Layout, seed: u64) -> Result<Arc<Self>> {
        let ram = Self::unsealed(layout, seed)?;
        seal(&ram.file)?;
        Ok(ram)
    }

    /// The same, of a file that can be truncated. Memory that is not there must not be touched here either.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn unsealed(layout: Layout, seed: u64) -> Result<Arc<Self>> {
        let regions = match layout {
            Layout::Flat { bytes } => vec![RamRegion { gpa: 0, bytes, offset: 0 }],
            Layout::WithHole { low_bytes, high_bytes } => vec![
                RamRegion { gpa: 0, bytes: low_bytes, offset: 0 },
                RamRegion { gpa: HIGH_START, bytes: high_bytes, offset: low_bytes },
            ],
        };
        let low_bytes = regions[0].bytes;
        let total: u64 = regions.iter().map(|r| r.bytes).sum();
        ensure!(low_bytes >= 8 * LOW_RESERVED, "guest memory below the hole is under 8 MiB");
        ensure!(regions.iter().all(|r| r.bytes % PAGE_SIZE == 0), "guest memory is not whole pages");

        let file = memfd(total)?;
        let mapping = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), usize::try_from(total)?)
            .context("cannot map guest memory")?;
        let dma_end = LOW_RESERVED + (low_bytes - LOW_RESERVED) / 4 / PAGE_SIZE * PAGE_SIZE;
        let mut pages: Vec<u64> = regions
            .iter()
            .flat_map(|r| r.gpa / PAGE_SIZE..(r.gpa + r.bytes) / PAGE_SIZE)
            .filter(|page| page * PAGE_SIZE >= dma_end)
            .collect();
        Random::new(seed).shuffle(&mut pages);
        let free = Mutex::new(Free { dma: (LOW_RESERVED, dma_end), pages });
        Ok(Arc::new(Self { file, mapping, regions, free }))
    }

    /// The file; pages of it can be mapped by host processes that stand for guest processes.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where it stands in guest-physical space.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The regions as the frontend announces them.
    pub fn vhost_regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |r: &RamRegion| VhostUserMemoryRegionInfo {
            guest_phys_addr: r.gpa,
            memory_size: r.bytes,
            userspace_addr: self.host_base() + r.offset,
            mmap_offset: r.offset,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.regions.iter().map(region).collect()
    }

    /// Address of the file's first byte in this process.
    pub fn host_base(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Offset in the file of `bytes` bytes at a guest-physical address.
    ///
    /// # Errors
    /// They are not all in one region.
    pub fn offset(&self, gpa: u64, bytes: u64) -> Result<u64> {
        for region in &self.regions {
            let Some(within) = gpa.checked_sub(region.gpa) else { continue };
            if within.checked_add(bytes).is_some_and(|end| end <= region.bytes) {
                return Ok(region.offset + within);
            }
        }
        bail!("{gpa:#x}+{bytes:#x} is not guest memory")
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Not guest memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        let offset = self.offset(gpa, bytes.len() as u64)?;
        Ok(self.mapping.as_volatile_slice().write_slice(bytes, usize::try_from(offset)?)?)
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Not guest memory.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        let offset = self.offset(gpa, bytes.len() as u64)?;
        Ok(self.mapping.as_volatile_slice().read_slice(bytes, usize::try_from(offset)?)?)
    }

    /// First guest-physical address that is no driver's: of processes, as far as there is memory.
    pub fn drivers_end(&self) -> u64 {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).dma.1
    }

    /// Where guest-physical memory ends.
    pub fn end(&self) -> u64 {
        self.regions.iter().map(|region| region.gpa + region.bytes).max().unwrap_or(0)
    }

    /// Everything, as it lies in the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn contents(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.mapping.size()];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Stores an aligned integer, visible to other threads and processes in order.
    ///
    /// # Errors
    /// Not guest memory, or not aligned.
    pub fn store<T: AtomicAccess>(&self, gpa: u64, value: T) -> Result<()> {
        let offset = self.offset(gpa, size_of::<T>() as u64)?;
        Ok(self.mapping.as_volatile_slice().store(value, usize::try_from(offset)?, Ordering::SeqCst)?)
    }

    /// Loads an aligned integer.
    ///
    /// # Errors
    /// Not guest memory, or not aligned.
    pub fn load<T: AtomicAccess>(&self, gpa: u64) -> Result<T> {
        let offset = self.offset(gpa, size_of::<T>() as u64)?;
        Ok(self.mapping.as_volatile_slice().load(usize::try_from(offset)?, Ordering::SeqCst)?)
    }

    /// Memory in one piece.
    ///
    /// # Errors
    /// Not guest memory.
    pub fn slice(&self, gpa: u64, bytes: u64) -> Result<VolatileSlice<'_>> {
        let offset = self.offset(gpa, bytes)?;
        Ok(self.mapping.get_slice(usize::try_from(offset)?, usize::try_from(bytes)?)?)
    }

    /// An aligned integer, to be accessed in whatever order its user says.
    ///
    /// # Errors
    /// Not guest memory, or not aligned.
    pub fn atomic<T: AtomicInteger>(&self, gpa: u64) -> Result<&T> {
        let offset = self.offset(gpa, size_of::<T>() as u64)?;
        Ok(self.mapping.get_atomic_ref(usize::try_from(offset)?)?)
    }

    /// Contiguous zeroed memory for a driver, page aligned. It is never given back: a driver's life is the guest's.
    ///
    /// # Errors
    /// None is left.
    pub fn take_dma(&self, bytes: u64) -> Result<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, end) = free.dma;
        let next = start + bytes.next_multiple_of(PAGE_SIZE);
        ensure!(next <= end, "{bytes} bytes more do not fit into the drivers' zone of guest memory");
        free.dma.0 = next;
        Ok(start)
    }

    /// Zeroed pages for a process, as page numbers, scattered over guest memory.
    ///
    /// # Errors
    /// Not enough are left.
    pub fn take_pages(&self, count: usize) -> Result<Vec<u64>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let left = free.pages.len();
        ensure!(count <= left, "{count} pages wanted, {left} are left in guest memory");
        Ok(free.pages.split_off(left - count))
    }

    /// Gives pages of a process back. They read as zeros from then on.
    ///
    /// # Errors
    /// The host cannot free them.
    pub fn give_pages(&self, pages: &[u64]) -> Result<()> {
        for page in pages {
            let offset = self.offset(page * PAGE_SIZE, PAGE_SIZE)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&*self.file, flags, offset, PAGE_SIZE)
                .context("cannot free guest memory")?;
        }
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pages.extend_from_slice(pages);
        Ok(())
    }
}

/// A file of zeros in memory that can neither shrink nor grow.
pub(super) fn sealed_memfd(bytes: u64) -> Result<Arc<File>> {
    let file = memfd(bytes)?;
    seal(&file)?;
    Ok(file)
}

fn memfd(bytes: u64) -> Result<Arc<File>> {
    let fd: OwnedFd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .context("cannot create guest memory")?;
    rustix::fs::ftruncate(&fd, bytes).context("cannot size guest memory")?;
    Ok(Arc::new(File::from(fd)))
}

fn seal(file: &File) -> Result<()> {
    rustix::fs::fcntl_add_seals(file, SealFlags::SHRINK | SealFlags::GROW).context("cannot seal guest memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_above_the_hole_follows_in_the_file() {
        let ram = GuestRam::new(Layout::WithHole { low_bytes: 16 * MIB, high_bytes: 8 * MIB }, 1).unwrap();
        assert_eq!(ram.offset(HIGH_START, 8 * MIB).unwrap(), 16 * MIB);
        assert!(ram.offset(16 * MIB, 1).is_err());
        assert!(ram.offset(16 * MIB - 4, 8).is_err());
        assert!(ram.offset(u64::MAX, 2).is_err());
    }

    #[test]
    fn bytes_written_are_read_back() {
        let ram = GuestRam::new(Layout::Flat { bytes: 16 * MIB }, 1).unwrap();
        ram.write(5 * MIB + 3, b"guest").unwrap();
        let mut bytes = [0; 5];
        ram.read(5 * MIB + 3, &mut bytes).unwrap();
        assert_eq!(&bytes, b"guest");
    }

    #[test]
    fn pages_given_back_are_zero() {
        let ram = GuestRam::new(Layout::Flat { bytes: 16 * MIB }, 1).unwrap();
        let pages = ram.take_pages(3).unwrap();
        ram.write(pages[1] * PAGE_SIZE, &[7; 64]).unwrap();
        ram.give_pages(&pages).unwrap();
        assert_eq!(ram.load::<u64>(pages[1] * PAGE_SIZE).unwrap(), 0);
    }

    #[test]
    fn the_file_cannot_shrink() {
        let ram = GuestRam::new(Layout::Flat { bytes: 16 * MIB }, 1).unwrap();
        assert!(ram.file().set_len(4096).is_err());
    }

    #[test]
    fn pages_of_processes_are_scattered_and_never_the_drivers() {
        let ram = GuestRam::new(Layout::Flat { bytes: 16 * MIB }, 7).unwrap();
        let dma = ram.take_dma(10_000).unwrap();
        let pages = ram.take_pages(100).unwrap();
        assert!(pages.iter().all(|page| page * PAGE_SIZE >= dma + 12_288));
        assert!(pages.windows(2).filter(|w| w[0] + 1 == w[1]).count() < 50);
        assert!(ram.take_pages(1 << 20).is_err());
    }
}
