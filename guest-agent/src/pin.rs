//! Pinned memory: a sealed memfd whose pages cannot move, and where they are.
//!
//! The order is the point. The file is made here, so nobody else can change it; sealed, so that it can neither shrink nor
//! grow; mapped and filled; pinned by an io_uring registration; and only then looked up in this process' pagemap, without
//! touching the memory in between. A present entry is then the pinned page, and stays it until the pin is dropped.
//! mlock is not enough: compaction moves locked pages.
//!
//! The process that the file is for can write to it, so F_SEAL_FUTURE_WRITE is not set, and it may punch holes. That
//! harms nobody else: the hole's pages leave the file but stay pinned, so the device keeps reaching memory that is
//! nobody's, while the process sees fresh pages that no device knows.
//!
//! A file that a process brings ([`Pinner::import`]) is its own to change, at any moment: so nothing here reads or writes
//! a byte of it, faults come back as errors of madvise and of io_uring and never as a signal, and a page that is absent
//! after the pin, because the file was cut short or a hole was punched, makes all of it be done again. What is present
//! then was pinned: an entry that goes comes back only with a touch, and there is none.
//!
//! Memory is pinned a slice at a time ([`Pinning`]): a process decides how long a slice takes, since its pages may have
//! been swapped out, and the keeper serves others in between. A slice is pinned and looked up before anything else is
//! touched, so what holds for the whole holds for each.
//!
//! Dropping a [`Pinned`] lets the pages go. Its owner ([`crate::keeper`]) does so only when the device cannot use them.

#![expect(unsafe_code, reason = "registers memory with io_uring")]

use crate::driver::dma::PAGE_BYTES;
use crate::mapping::{self, Placement, SharedMapping};
use io_uring::IoUring;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// Bytes of a slice, each a buffer of the io_uring; more where there would be more than [`MAX_SLICES`].
const SLICE: usize = 2 << 20;
/// Most slices. The kernel takes twice as many buffers.
const MAX_SLICES: usize = 1 << 13;
/// How often slices of an import are pinned again, in all, because a page went away after it was pinned.
const MAX_ATTEMPTS: u32 = 4;
/// Pagemap entry: the page is in memory.
const PAGEMAP_PRESENT: u64 = 1 << 63;
/// Pagemap entry: the page frame number.
const PAGEMAP_PFN: u64 = (1 << 55) - 1;

/// Why memory could not be pinned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be made.
    #[error("cannot make {len} bytes of memory")]
    Create {
        /// Bytes asked for.
        len: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It could not be mapped or filled.
    #[error("cannot map the memory")]
    Map(#[from] mapping::Error),
    /// It could not be pinned.
    #[error(
        "cannot pin {len} bytes with io_uring: is kernel.io_uring_disabled set, or RLIMIT_MEMLOCK too low?"
    )]
    Pin {
        /// Bytes asked for.
        len: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The pagemap could not be read.
    #[error("cannot read /proc/self/pagemap: is /proc mounted?")]
    Pagemap(#[source] io::Error),
    /// A page is not in memory though it was pinned.
    #[error(
        "page {index} is not in memory though it was pinned: is the file being cut short, or a hole punched?"
    )]
    Absent {
        /// Its index.
        index: usize,
    },
    /// The kernel hides page frame numbers.
    #[error("the kernel hides page frame numbers from this process: run as root")]
    Hidden,
    /// Not by this pinner.
    #[error(
        "memory of a process' own cannot be pinned here: only a kernel with a pagemap can tell where it is"
    )]
    NoImports,
}

impl Error {
    /// The error as the process hears it that asked for the memory.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Map(mapping::Error::Map { source, .. }) => *source,
            Self::Create { source, .. } | Self::Pin { source, .. } => {
                Errno::from_io_error(source).unwrap_or(Errno::NOMEM)
            }
            Self::Absent { .. } => Errno::AGAIN,
            Self::NoImports => Errno::OPNOTSUPP,
            Self::Map(mapping::Error::OutOfRange { .. }) | Self::Pagemap(_) | Self::Hidden => Errno::IO,
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Memory whose pages stay where they are until it is dropped.
pub struct Pinned {
    /// Maps it.
    pub fd: OwnedFd,
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
    /// They stay until it is dropped.
    pub hold: Hold,
}

/// What holds pages in place: they stay until it is dropped.
pub type Hold = Box<dyn Any + Send>;

/// Pages of somebody's file, and what holds them in place.
pub struct Held {
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
    /// They stay until it is dropped.
    pub hold: Hold,
}

/// Memory on its way to be pinned. Dropped before its end, nothing of it stays pinned.
pub trait Pinning: Send {
    /// Pins a slice more.
    ///
    /// # Errors
    /// When it cannot be pinned.
    fn advance(self: Box<Self>) -> Result<Progress>;
}

/// How far memory has come.
pub enum Progress {
    /// There is more to pin.
    Going(Box<dyn Pinning>),
    /// All of it is pinned.
    Done(Held),
}

/// Pins all that is left.
///
/// # Errors
/// As [`Pinning::advance`].
pub fn finish(mut pinning: Box<dyn Pinning>) -> Result<Held> {
    loop {
        match pinning.advance()? {
            Progress::Going(rest) => pinning = rest,
            Progress::Done(held) => return Ok(held),
        }
    }
}

/// Makes pinned memory. The kernel does ([`KernelPinner`]), and harnesses have their own.
pub trait Pinner: Send {
    /// Makes `len` bytes of zeros, a multiple of the page size, and begins to pin them.
    ///
    /// # Errors
    /// When there is not enough memory, or it cannot be pinned.
    fn make(&self, len: usize) -> Result<(OwnedFd, Box<dyn Pinning>)>;

    /// Begins to pin `len` bytes of a file in memory from `offset`, both multiples of its page size. Whoever else has the
    /// file may change it meanwhile in any way.
    ///
    /// # Errors
    /// When the range is not in the file, cannot be written, or cannot be pinned.
    fn import(&self, _file: BorrowedFd<'_>, _offset: u64, _len: usize) -> Result<Box<dyn Pinning>> {
        Err(Error::NoImports)
    }

    /// Makes `len` bytes of zeros and pins them.
    ///
    /// # Errors
    /// As [`Self::make`].
    fn pin(&self, len: usize) -> Result<Pinned> {
        let (fd, pinning) = self.make(len)?;
        let Held { pages, hold } = finish(pinning)?;
        Ok(Pinned { fd, pages, hold })
    }
}

/// Pins by io_uring, looks up in the pagemap. Needs root.
#[derive(Debug, Default)]
pub struct KernelPinner;

impl KernelPinner {
    /// Raises RLIMIT_MEMLOCK, which pins are charged to.
    ///
    /// # Errors
    /// Without CAP_SYS_RESOURCE.
    pub fn raise_limit() -> io::Result<()> {
        let unlimited = Rlimit { current: None, maximum: None };
        Ok(rustix::process::setrlimit(Resource::Memlock, unlimited)?)
    }
}

impl Pinner for KernelPinner {
    fn make(&self, len: usize) -> Result<(OwnedFd, Box<dyn Pinning>)> {
        let fd = sealed_memfd(len).map_err(|source| Error::Create { len, source })?;
        let pinning = KernelPinning::begin(fd.as_fd(), 0, len)?;
        Ok((fd, Box::new(pinning)))
    }

    fn import(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Box<dyn Pinning>> {
        Ok(Box::new(KernelPinning::begin(file, offset, len)?))
    }
}

/// What has just been done to a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Populated,
    Pinned,
}

struct KernelPinning {
    mapping: SharedMapping,
    slice: usize,
    /// Has a place for the buffer of each slice.
    ring: IoUring,
    pagemap: File,
    /// Of the slices that are pinned.
    pages: Vec<u64>,
    attempts: u32,
}

impl Pinning for KernelPinning {
    fn advance(mut self: Box<Self>) -> Result<Progress> {
        let all = self.pin_slice(&mut |_| {})?;
        Ok(if all { Progress::Done(self.held()) } else { Progress::Going(self) })
    }
}

impl KernelPinning {
    fn begin(file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self> {
        Self::in_slices(file, offset, len, slice_of(len))
    }

    fn in_slices(file: BorrowedFd<'_>, offset: u64, len: usize, slice: usize) -> Result<Self> {
        let mapping = SharedMapping::new(file, offset, len, Placement::Anywhere)?;
        mapping.keep_from_children()?;
        let ring = empty_ring(len.div_ceil(slice)).map_err(|source| Error::Pin { len, source })?;
        let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
        Ok(Self { mapping, slice, ring, pagemap, pages: Vec::new(), attempts: 1 })
    }

    /// The registration holds the pages: the mapping is not needed any more.
    fn held(self) -> Held {
        Held { pages: self.pages, hold: Box::new(self.ring) }
    }

    /// Pins the next slice. True: it was the last one. `after` is told of each step; a test changes the file there.
    fn pin_slice(&mut self, after: &mut dyn FnMut(Step)) -> Result<bool> {
        match self.pin_next(after) {
            Ok(pages) => self.pages.extend(pages),
            Err(Error::Absent { .. }) if self.attempts < MAX_ATTEMPTS => self.attempts += 1,
            Err(error) => return Err(error),
        }
        Ok(self.pages.len() * PAGE_BYTES == self.mapping.len())
    }

    /// Pins what comes after the pages that are known, and finds its pages.
    fn pin_next(&self, after: &mut dyn FnMut(Step)) -> Result<Vec<u64>> {
        let offset = self.pages.len() * PAGE_BYTES;
        let len = self.slice.min(self.mapping.len() - offset);
        self.mapping.populate(offset, len)?;
        after(Step::Populated);
        let slice = offset / self.slice;
        register(&self.ring, slice, &self.mapping, offset, len)
            .map_err(|source| Error::Pin { len, source })?;
        // From here to the end of the lookup nothing touches the memory.
        after(Step::Pinned);
        let address = u64::try_from(self.mapping.address() + offset).unwrap_or(u64::MAX);
        look_up(&self.pagemap, address, len / PAGE_BYTES).map_err(|error| match error {
            Error::Absent { index } => Error::Absent { index: self.pages.len() + index },
            other => other,
        })
    }
}

/// Bytes of each slice but the last one.
fn slice_of(len: usize) -> usize {
    len.div_ceil(MAX_SLICES).next_multiple_of(SLICE)
}

fn sealed_memfd(len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("svm-arena", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let bytes = u64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// An io_uring with places for so many buffers. No operation is ever submitted on it.
fn empty_ring(places: usize) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    // SAFETY: no buffer names any memory.
    unsafe { ring.submitter().register_buffers(&vec![nothing; places]) }?;
    Ok(ring)
}

/// Pins `len` bytes of the mapping until the ring is dropped, or its place gets something else.
fn register(
    ring: &IoUring,
    place: usize,
    mapping: &SharedMapping,
    offset: usize,
    len: usize,
) -> io::Result<()> {
    let place = u32::try_from(place).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let base = std::ptr::with_exposed_provenance_mut(mapping.address() + offset);
    let buffer = [libc::iovec { iov_base: base, iov_len: len }];
    // SAFETY: the buffer lies in `mapping`, which is mapped now; the kernel takes references to the pages and needs the
    // address no more. No operation is ever submitted on this ring.
    unsafe { ring.submitter().register_buffers_update(place, &buffer, None) }
}

/// Guest-physical addresses of `count` pages from `address`.
pub(crate) fn look_up(pagemap: &File, address: u64, count: usize) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    pagemap.read_exact_at(&mut bytes, address / PAGE_SIZE * 8).map_err(Error::Pagemap)?;
    let entries = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
    let address = |(index, entry): (usize, u64)| match entry & PAGEMAP_PFN {
        _ if entry & PAGEMAP_PRESENT == 0 => Err(Error::Absent { index }),
        0 => Err(Error::Hidden),
        frame => Ok(frame * PAGE_SIZE),
    };
    entries.enumerate().map(address).collect()
}

#[cfg(test)]
mod tests;
