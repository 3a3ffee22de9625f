//! Descriptors of the library in a program that knows nothing of them.
//!
//! [`Fd`] is closed by the system call itself. The C library's `close`, which [`OwnedFd`] calls, is a point at which a
//! cancelled thread ends. Allocating is none: a thread that ended there would take the heap with it. All other system
//! calls here are made by `rustix`, which goes past the C library.
//!
//! [`Kept`] stays open for long, so the program may close its number and open something of its own there.

#![expect(unsafe_code, reason = "closes descriptors by number")]

use rustix::process::Resource;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What is kept goes at least this high, out of the way of programs that count on low numbers.
const HIGH: u64 = 900;

/// A descriptor that nobody else closes.
pub struct Fd(ManuallyDrop<OwnedFd>);

impl Fd {
    pub fn new(fd: OwnedFd) -> Self {
        Self(ManuallyDrop::new(fd))
    }

    /// Not closed when this value ends.
    fn leak(self) -> RawFd {
        ManuallyDrop::new(self).0.as_raw_fd()
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: the descriptor is owned by this value, which ends here and does not drop what it holds.
        unsafe { rustix::io::close(self.0.as_raw_fd()) };
    }
}

/// A descriptor with a high number. Whoever has it closes it by [`Kept::close`].
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    number: RawFd,
    /// Device and inode of what it was opened for.
    identity: (u64, u64),
}

impl Kept {
    /// The descriptor again, with a high number; where none is free, `fd` itself.
    pub fn new(fd: Fd) -> rustix::io::Result<Self> {
        let identity = identity(&fd)?;
        let fd = high(&fd).unwrap_or(fd);
        Ok(Self { number: fd.leak(), identity })
    }

    /// A second descriptor of the program's. Without closing any: that would end the program's locks of the file.
    pub fn second(fd: BorrowedFd<'_>) -> Option<Self> {
        Some(Self { identity: identity(&fd).ok()?, number: high(&fd)?.leak() })
    }

    /// The descriptor, if it is still what it was.
    pub fn get(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the number is not -1. If the program has closed it, the next line finds out.
        let fd = unsafe { BorrowedFd::borrow_raw(self.number) };
        (identity(&fd) == Ok(self.identity)).then_some(fd)
    }

    /// Another one for the same file.
    pub fn again(&self) -> Option<Self> {
        self.get().and_then(Self::second)
    }

    /// Closes it, unless the program has done so.
    pub fn close(self) {
        if self.get().is_some() {
            // SAFETY: the number is what was opened for this value, and its owner gives it up.
            unsafe { rustix::io::close(self.number) };
        }
    }
}

fn high(fd: &impl AsFd) -> Option<Fd> {
    let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let at_least = i32::try_from(HIGH.min(limit / 2)).unwrap_or(0);
    rustix::io::fcntl_dupfd_cloexec(fd, at_least).ok().map(Fd::new)
}

fn identity(fd: &impl AsFd) -> rustix::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
