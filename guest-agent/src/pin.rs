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
//! Dropping a [`Pinned`] lets the pages go. Its owner ([`crate::keeper`]) does so only when the device cannot use them.

#![expect(unsafe_code, reason = "registers memory with io_uring")]

use crate::driver::dma::PAGE_BYTES;
use crate::mapping::{self, Placement, SharedMapping};
use io_uring::IoUring;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Resource, Rlimit};
use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Most bytes of one io_uring buffer.
const MAX_BUFFER: usize = 1 << 30;
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
    #[error("page {index} is not in memory though it was pinned")]
    Absent {
        /// Its index.
        index: usize,
    },
    /// The kernel hides page frame numbers.
    #[error("the kernel hides page frame numbers from this process: run as root")]
    Hidden,
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

/// Makes pinned memory. The kernel does ([`KernelPinner`]), and harnesses have their own.
pub trait Pinner: Send {
    /// Makes `len` bytes of zeros, a multiple of the page size.
    ///
    /// # Errors
    /// When there is not enough memory, or it cannot be pinned.
    fn pin(&self, len: usize) -> Result<Pinned>;
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
        let mapping = SharedMapping::new(fd.as_fd(), 0, len, Placement::Anywhere)?;
        mapping.populate()?;
        let hold = register(&mapping).map_err(|source| Error::Pin { len, source })?;
        // From here to the end of the lookup nothing touches the memory.
        let pages = look_up(&mapping)?;
        // The registration holds the pages, and the file its contents: this mapping is not needed any more.
        drop(mapping);
        Ok(Pinned::new(fd, pages, Box::new(hold)))
    }
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

/// Guest-physical addresses of the mapping's pages.
fn look_up(mapping: &SharedMapping) -> Result<Vec<u64>> {
    let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
    let count = mapping.len() / PAGE_BYTES;
    let mut bytes = vec![0; count * 8];
    let first = u64::try_from(mapping.address() / PAGE_BYTES * 8).unwrap_or(u64::MAX);
    pagemap.read_exact_at(&mut bytes, first).map_err(Error::Pagemap)?;
    let entries = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
    let address = |(index, entry): (usize, u64)| match entry & PAGEMAP_PFN {
        _ if entry & PAGEMAP_PRESENT == 0 => Err(Error::Absent { index }),
        0 => Err(Error::Hidden),
        frame => Ok(frame * 4096),
    };
    entries.enumerate().map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where page frame numbers are hidden, or io_uring is forbidden, nothing can be pinned: that is said, and no more
    /// can be asked for.
    fn pin_or_say_why_not(len: usize) -> Option<Pinned> {
        use std::io::Write;
        let why = match KernelPinner.pin(len) {
            Ok(pinned) => return Some(pinned),
            Err(Error::Hidden) if !sees_frames() => "needs CAP_SYS_ADMIN".to_owned(),
            Err(Error::Pin { source, .. }) if forbidden(&source) => format!("io_uring: {source}"),
            Err(other) => panic!("{other}: {other:?}"),
        };
        // Not by eprintln, which the test harness captures.
        writeln!(io::stderr(), "not tested: pages are looked up after the pin ({why})").unwrap();
        None
    }

    fn forbidden(error: &io::Error) -> bool {
        matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
    }

    /// CAP_SYS_ADMIN, and not only in a user namespace.
    fn sees_frames() -> bool {
        const CAP_SYS_ADMIN: u32 = 21;
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
        let users = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        let first = users.split_whitespace().eq(["0", "0", "4294967295"]);
        first && mask & 1 << CAP_SYS_ADMIN != 0
    }

    /// A second lookup, through another mapping, finds the same pages, all distinct.
    #[test]
    fn pages_are_looked_up_after_the_pin() {
        let Some(pinned) = pin_or_say_why_not(64 * PAGE_BYTES) else { return };
        let mut pages = pinned.pages.clone();
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages.len(), 64);
        let again = SharedMapping::new(pinned.fd.as_fd(), 0, 64 * PAGE_BYTES, Placement::Anywhere).unwrap();
        again.populate().unwrap();
        assert_eq!(look_up(&again).unwrap(), pinned.pages);
    }

    #[test]
    fn the_file_can_neither_shrink_nor_grow() {
        let fd = sealed_memfd(2 * PAGE_BYTES).unwrap();
        for len in [PAGE_BYTES as u64, 3 * PAGE_BYTES as u64] {
            assert_eq!(rustix::fs::ftruncate(&fd, len), Err(rustix::io::Errno::PERM));
        }
    }

    /// The process that the file is for writes through it, so this seal must not be there.
    #[test]
    fn the_file_can_be_mapped_writable_later() {
        let fd = sealed_memfd(PAGE_BYTES).unwrap();
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap();
        assert_eq!(seals, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
        SharedMapping::new(fd.as_fd(), 0, PAGE_BYTES, Placement::Anywhere).unwrap();
    }
}
