//! A process' address space: whether it is still there, and where pages of it are.
//!
//! The pagemap is opened when the process connects, and names the address space of that moment: once nobody has that any
//! more, because of an exec or the end of the process, it reads as empty, whatever program has the same id by then.
//!
//! A trusted process' anonymous memory is looked up in it: the io_uring with which the process pinned it, and where its
//! pages are. What the process says is checked against mistakes, not against malice: that is what trust is for
//! ([`crate::message::ARENA_PIN`]).

use crate::pin;
use crate::socket::Peer;
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// What /proc calls the descriptor of an io_uring.
const IO_URING: &str = "anon_inode:[io_uring]";
/// The line of an io_uring's fdinfo before its buffers.
const BUFFERS: &str = "UserBufs:";

/// A process' address space.
pub struct ProcessMemory {
    pagemap: File,
}

/// Memory that its process has pinned.
pub struct PinnedRange {
    /// Holds the pages.
    pub ring: OwnedFd,
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
}

impl ProcessMemory {
    /// That of the process at the other end of a connection. Waits while that process is in the midst of an exec, which
    /// it can draw out as long as it likes.
    ///
    /// # Errors
    /// An errno for the process: EACCES where this one may not look at its memory; ESRCH when it has ended.
    pub fn open(peer: &Peer) -> Result<Self, Errno> {
        let mut found = Err(Errno::SRCH);
        let threads = std::fs::read_dir(format!("/proc/{}/task", peer.credentials.pid));
        // Of any thread: the first one may end before the others, and has no memory then.
        for thread in threads.map_err(|error| not_shown(&error))? {
            let opened = thread.and_then(|thread| File::open(thread.path().join("pagemap")));
            found = opened.map(|pagemap| Self { pagemap }).map_err(|error| not_shown(&error));
            if found.as_ref().is_ok_and(|memory| !memory.has_gone()) {
                break;
            }
        }
        // While it lives its id names no other process, and so it did before.
        if peer.has_exited() { Err(Errno::SRCH) } else { found }
    }

    /// Whether nobody has the address space any more: its process has executed another program, or has ended. A process
    /// that shares it with another one (CLONE_VM without CLONE_THREAD) takes it out of the world only with that one.
    pub fn has_gone(&self) -> bool {
        // Of one that is there the first entry can be read, whether anything is mapped or not.
        matches!(self.pagemap.read_at(&mut [0; 8], 0), Ok(0))
    }

    /// Takes the io_uring that `peer` calls `ring`, in which it has registered the range.
    ///
    /// # Errors
    /// An errno for the process ([`crate::message::ARENA_PIN`]).
    pub fn pinned(&self, peer: &Peer, ring: i32, va: u64, len: u64) -> Result<PinnedRange, Errno> {
        let ring = take(peer.pidfd.as_fd(), ring)?;
        let registered = buffers_of(&ring)?;
        if !covers(registered, va..va.saturating_add(len)) {
            return Err(Errno::FAULT);
        }
        let count = usize::try_from(len / PAGE_SIZE).map_err(|_| Errno::INVAL)?;
        // After the pin: what is registered does not move.
        let pages = pin::look_up(&self.pagemap, va, count).map_err(|error| match error {
            pin::Error::Absent { .. } | pin::Error::Pagemap(_) => Errno::FAULT,
            other => other.errno(),
        })?;
        Ok(PinnedRange { ring, pages })
    }
}

/// Why /proc does not show a process. Of one that it hides (hidepid) it says that it is not there.
fn not_shown(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound => Errno::ACCESS,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}

/// A descriptor of an io_uring of the process.
fn take(pidfd: BorrowedFd<'_>, ring: i32) -> Result<OwnedFd, Errno> {
    if ring < 0 {
        return Err(Errno::BADF);
    }
    let ring = pidfd_getfd(pidfd, ring, PidfdGetfdFlags::empty())?;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", ring.as_raw_fd()));
    // No path of a file begins like that.
    if name.is_ok_and(|name| name.as_os_str() == IO_URING) { Ok(ring) } else { Err(Errno::INVAL) }
}

/// The buffers that are registered in an io_uring.
fn buffers_of(ring: &OwnedFd) -> Result<Vec<Range<u64>>, Errno> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", ring.as_raw_fd()));
    let info = info.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    // The kernel leaves them out while somebody uses the io_uring.
    parse_buffers(&info).ok_or(Errno::AGAIN)
}

/// Lines such as `    0: 0x7f0000000000/4096`; `None`: no buffers are listed, be it none.
fn parse_buffers(info: &str) -> Option<Vec<Range<u64>>> {
    let mut lines = info.lines().skip_while(|line| !line.starts_with(BUFFERS));
    let count: usize = lines.next()?.strip_prefix(BUFFERS)?.trim().parse().ok()?;
    let buffer = |line: &str| {
        let (address, len) = line.split_once(": 0x")?.1.split_once('/')?;
        let start = u64::from_str_radix(address, 16).ok()?;
        Some(start..start.checked_add(len.trim().parse().ok()?)?)
    };
    // A slot without a buffer is `<none>`.
    Some(lines.take(count).filter_map(buffer).collect())
}

/// Whether the buffers hold all of a range between them.
fn covers(mut buffers: Vec<Range<u64>>, range: Range<u64>) -> bool {
    buffers.sort_unstable_by_key(|buffer| buffer.start);
    let mut covered = range.start;
    for buffer in buffers {
        if buffer.start <= covered {
            covered = covered.max(buffer.end);
        }
    }
    covered >= range.end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t02000002\nSqThread:\t-1\nUserFiles:\t0\nUserBufs:\t3\n    0: 0x7f1230000000/4096\n    \
                    1: <none>\n    2: 0x5000/1073741824\nPollList:\n";
        let buffers = parse_buffers(info).unwrap();
        assert_eq!(buffers, [0x7f12_3000_0000..0x7f12_3000_1000, 0x5000..0x4000_5000]);
        assert_eq!(parse_buffers("UserBufs:\t0\nPollList:\n    0: 0x5000/4096\n"), Some(vec![]));
        assert_eq!(parse_buffers("pos:\t0\nPollList:\n"), None);
    }

    #[test]
    fn range_is_covered_only_without_a_gap() {
        let buffers = || vec![0x5000..0x6000, 0x1000..0x3000, 0x2000..0x5000, 0x8000..0x9000];
        for (range, covered) in [
            (0x1000..0x6000, true),
            (0x2000..0x2001, true),
            (0x0fff..0x2000, false),
            (0x5000..0x6001, false),
            (0x5000..0x9000, false),
            (0x7000..0x8000, false),
        ] {
            assert_eq!(covers(buffers(), range.clone()), covered, "{range:x?}");
        }
        assert!(!covers(Vec::new(), 0..1));
    }
}
