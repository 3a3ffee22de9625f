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

/// Most bytes of one io_uring buffer.
const MAX_BUFFER: usize = 1 << 30;
/// How often an import begins again because a page went away after it was pinned.
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
    hold: Hold,
}

/// What holds pages in place: they stay until it is dropped.
pub type Hold = Box<dyn Any + Send>;

impl Pinned {
    /// Memory that `hold` keeps in place.
    pub fn new(fd: OwnedFd, pages: Vec<u64>, hold: Hold) -> Self {
        Self { fd, pages, hold }
    }

    /// The hold alone, once those who need them have the file and the addresses.
    pub fn into_hold(self) -> Hold {
        self.hold
    }
}

/// Pages of somebody's file, and what holds them in place.
pub struct Held {
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
    /// They stay until it is dropped.
    pub hold: Hold,
}

/// Makes pinned memory. The kernel does ([`KernelPinner`]), and harnesses have their own.
pub trait Pinner: Send {
    /// Makes `len` bytes of zeros, a multiple of the page size.
    ///
    /// # Errors
    /// When there is not enough memory, or it cannot be pinned.
    fn pin(&self, len: usize) -> Result<Pinned>;

    /// Pins `len` bytes of a file in memory from `offset`, both multiples of its page size. Whoever else has the file may
    /// change it meanwhile in any way.
    ///
    /// # Errors
    /// When the range is not in the file, cannot be written, or cannot be pinned.
    fn import(&self, _file: BorrowedFd<'_>, _offset: u64, _len: usize) -> Result<Held> {
        Err(Error::NoImports)
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
    fn pin(&self, len: usize) -> Result<Pinned> {
        let fd = sealed_memfd(len).map_err(|source| Error::Create { len, source })?;
        let Held { pages, hold } = hold(fd.as_fd(), 0, len, &mut |_| {})?;
        Ok(Pinned::new(fd, pages, hold))
    }

    fn import(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Held> {
        import(file, offset, len, &mut |_| {})
    }
}

/// What has just been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Mapped,
    Populated,
    Pinned,
}

fn import(file: BorrowedFd<'_>, offset: u64, len: usize, after: &mut dyn FnMut(Step)) -> Result<Held> {
    let mut attempts = 1;
    loop {
        match hold(file, offset, len, after) {
            Err(Error::Absent { .. }) if attempts < MAX_ATTEMPTS => attempts += 1,
            held => return held,
        }
    }
}

/// Pins a range of a file. `after` is told of each step; a test changes the file there.
fn hold(file: BorrowedFd<'_>, offset: u64, len: usize, after: &mut dyn FnMut(Step)) -> Result<Held> {
    let mapping = SharedMapping::new(file, offset, len, Placement::Anywhere)?;
    after(Step::Mapped);
    mapping.populate()?;
    after(Step::Populated);
    let ring = register(&mapping).map_err(|source| Error::Pin { len, source })?;
    // From here to the end of the lookup nothing touches the memory.
    after(Step::Pinned);
    let pages = look_up_mapping(&mapping)?;
    // The registration holds the pages: this mapping is not needed any more.
    drop(mapping);
    Ok(Held { pages, hold: Box::new(ring) })
}

fn sealed_memfd(len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("svm-arena", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let bytes = u64::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Pins every page of the mapping until the ring is dropped.
fn register(mapping: &SharedMapping) -> io::Result<IoUring> {
    let ring = IoUring::new(1)?;
    let mut buffers = Vec::new();
    for offset in (0..mapping.len()).step_by(MAX_BUFFER) {
        let base = std::ptr::with_exposed_provenance_mut(mapping.address() + offset);
        buffers.push(libc::iovec { iov_base: base, iov_len: MAX_BUFFER.min(mapping.len() - offset) });
    }
    // SAFETY: the buffers lie in `mapping`, which is mapped now; the kernel takes references to the pages and needs the
    // addresses no more. No operation is ever submitted on this ring.
    unsafe { ring.submitter().register_buffers(&buffers) }?;
    Ok(ring)
}

fn look_up_mapping(mapping: &SharedMapping) -> Result<Vec<u64>> {
    let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
    let address = u64::try_from(mapping.address()).unwrap_or(u64::MAX);
    look_up(&pagemap, address, mapping.len() / PAGE_BYTES)
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
