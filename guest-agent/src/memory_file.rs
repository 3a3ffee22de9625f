//! A file in memory that a process brings: what must hold before anybody maps it.
//!
//! The one boundary for descriptors from processes ([`crate::broker`]); who has a [`MemoryFile`] asks no more. The file
//! stays the process' own, to be changed or cut short at any moment, so its size is only an early word to those who err.
//!
//! Only tmpfs (memfd, POSIX shared memory) and hugetlbfs: pages of another file system may be written back or replaced
//! under the device, and asking it for a page may wait for a disk, for a server, or for the process itself.

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// `f_type` of tmpfs, and of what has no mount: memfd, shared memory.
const TMPFS_MAGIC: i128 = 0x0102_1994;
/// `f_type` of hugetlbfs, memfd with MFD_HUGETLB included.
const HUGETLBFS_MAGIC: i128 = 0x9584_58f6;

/// Why a file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not say what the file is.
    #[error("cannot look at the file")]
    Stat(#[from] Errno),
    /// Only who may write to memory may have it written to.
    #[error("the file is not open for reading and writing")]
    Access,
    /// Not a regular file of tmpfs or hugetlbfs.
    #[error("not a file in memory: bring a memfd, or a file of tmpfs or hugetlbfs")]
    NotMemory,
    /// Unaligned, empty, or beyond the end of the file.
    #[error(
        "{offset:#x}+{len:#x} is unaligned to pages of {page:#x}, empty, or not in the file of {size:#x} bytes"
    )]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of a page.
        page: u64,
        /// Bytes of the file.
        size: u64,
    },
}

impl Error {
    /// The error as processes see it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Stat(errno) => *errno,
            Self::Access => Errno::ACCESS,
            Self::NotMemory => Errno::OPNOTSUPP,
            Self::Range { .. } => Errno::INVAL,
        }
    }
}

/// A range of a file in memory that its sender may write to.
#[derive(Debug)]
pub struct MemoryFile {
    fd: OwnedFd,
    offset: u64,
    len: u64,
}

impl MemoryFile {
    /// Takes `len` bytes of a file from `offset`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(fd: OwnedFd, offset: u64, len: u64) -> Result<Self, Error> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(Error::Access);
        }
        let page = page_of(fd.as_fd())?.ok_or(Error::NotMemory)?;
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::NotMemory);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let aligned = offset.is_multiple_of(page) && len.is_multiple_of(page) && len > 0;
        // A file's last page is whole, whatever part of it the file has.
        let whole = size.checked_next_multiple_of(page).unwrap_or(size);
        if !aligned || offset.checked_add(len).is_none_or(|end| end > whole) {
            return Err(Error::Range { offset, len, page, size });
        }
        Ok(Self { fd, offset, len })
    }

    /// First byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the range is empty, which it never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Bytes of a page of a file in memory; `None`: it is another kind of file.
///
/// # Errors
/// When the kernel does not say what the file is.
pub fn page_of(file: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
    let system = rustix::fs::fstatfs(file)?;
    Ok(match i128::from(system.f_type) {
        TMPFS_MAGIC => Some(PAGE_SIZE),
        // The block is the huge page, and nothing smaller can be mapped.
        HUGETLBFS_MAGIC => u64::try_from(system.f_bsize).ok(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lacking::lacking;
    use rustix::fs::MemfdFlags;
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;

    const LEN: u64 = 4 * PAGE_SIZE;

    fn four_pages() -> File {
        let file = File::from(rustix::fs::memfd_create("brought", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LEN).unwrap();
        file
    }

    fn refusal(file: impl Into<OwnedFd>, offset: u64, len: u64) -> Errno {
        MemoryFile::new(file.into(), offset, len).map(|_| ()).unwrap_err().errno()
    }

    /// The same file, opened anew.
    fn reopened(file: &File, flags: OFlags) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::open(path, flags | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
    }

    #[test]
    fn part_of_a_memfd_is_taken() {
        let file = MemoryFile::new(four_pages().into(), PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
        assert_eq!((file.offset(), file.len()), (PAGE_SIZE, 3 * PAGE_SIZE));
    }

    #[test]
    fn range_that_is_not_in_the_file_in_whole_pages_is_refused() {
        let page = PAGE_SIZE;
        for (offset, len) in [
            (0, 0),
            (0, 1),
            (1, page),
            (0, LEN + page),
            (LEN, page),
            (u64::MAX - page + 1, page),
            (page, u64::MAX - page + 1),
            (1 << 63, page),
        ] {
            assert_eq!(refusal(four_pages(), offset, len), Errno::INVAL, "{offset:#x}+{len:#x}");
        }
    }

    #[test]
    fn descriptor_without_the_right_to_read_and_write_is_refused() {
        let file = four_pages();
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::PATH, OFlags::PATH | OFlags::RDWR] {
            assert_eq!(refusal(reopened(&file, flags), 0, LEN), Errno::ACCESS, "{flags:?}");
        }
        MemoryFile::new(reopened(&file, OFlags::RDWR), 0, LEN).unwrap();
    }

    #[test]
    fn what_is_no_file_in_memory_is_refused() {
        let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
        assert_eq!(refusal(zero, 0, PAGE_SIZE), Errno::OPNOTSUPP);
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(refusal(a, 0, PAGE_SIZE), Errno::OPNOTSUPP);
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(refusal(event, 0, PAGE_SIZE), Errno::OPNOTSUPP);
    }

    /// The folder of the test's program is on a disk, as far as can be known.
    #[test]
    fn file_on_a_disk_is_refused() {
        let program = std::env::current_exe().unwrap();
        let file = tempfile::tempfile_in(program.parent().unwrap()).unwrap();
        file.set_len(LEN).unwrap();
        if i128::from(rustix::fs::fstatfs(&file).unwrap().f_type) == TMPFS_MAGIC {
            return lacking(
                "a file on a disk is refused (the build is on tmpfs: choose another CARGO_TARGET_DIR)",
            );
        }
        assert_eq!(refusal(file, 0, LEN), Errno::OPNOTSUPP);
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        // Making such a file takes no huge page.
        let file = match rustix::fs::memfd_create("brought", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
            Ok(file) => File::from(file),
            Err(errno) => {
                return lacking(&format!("huge pages are taken whole (MFD_HUGETLB: {errno})"));
            }
        };
        let huge = u64::try_from(rustix::fs::fstatfs(&file).unwrap().f_bsize).unwrap();
        assert!(huge > PAGE_SIZE, "{huge:#x}");
        file.set_len(2 * huge).unwrap();
        let again = || file.try_clone().unwrap();
        for (offset, len) in [(0, PAGE_SIZE), (PAGE_SIZE, huge), (0, huge + PAGE_SIZE)] {
            assert_eq!(refusal(again(), offset, len), Errno::INVAL, "{offset:#x}+{len:#x}");
        }
        MemoryFile::new(again().into(), huge, huge).unwrap();
    }
}
