//! Memory that no arena can take the place of, pinned where it stands: the main thread's stack, the program break, System
//! V segments, mappings of huge pages (MAP_HUGETLB) and those for stacks (MAP_STACK).
//!
//! Only processes that the operator trusts do this ([`guest_agent::message::ARENA_PIN`]); for others such memory is out of
//! the reach of GPUs. It happens once, when the memory comes to be or the process first asks for a device, and whatever the program does with it later is
//! preceded by a cut, as with arenas.
//!
//! The pages are registered in an io_uring, one for each range. The agent takes the io_uring, and with it the
//! registration, so the process keeps no descriptor. The kernel charges the pages to the user (RLIMIT_MEMLOCK).
//!
//! fork: the kernel gives the child copies of private pages that are pinned, at once, so the parent's stay its own; the
//! child pins its copies in its own context, if it asks for a device. For huge pages that takes as many free ones as are pinned, or fork fails.

#![expect(unsafe_code, reason = "registers memory with io_uring")]

mod brk;
mod main_stack;
mod segment;

pub use brk::change_break;
pub use main_stack::MainStack;
pub use segment::{shmat, shmdt};

use crate::fd::Fd;
use crate::link::{self, Link};
use rustix::io::Errno;
use rustix::io_uring::{IoringRegisterOp, io_uring_params, io_uring_register, io_uring_setup};
use rustix::process::Resource;
use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use virtio_gpu_svm::protocol::errno;

/// Most bytes of one buffer of an io_uring.
const MAX_BUFFER: usize = 1 << 30;
/// Most buffers of a range: no agent allows more memory.
const MAX_BUFFERS: usize = 256;
/// How often the agent is asked while it cannot look into the io_uring.
const MAX_ATTEMPTS: u32 = 4;

/// Why memory is not pinned.
pub enum Failure {
    /// There is no io_uring.
    Ring(Errno),
    /// It does not take the pages.
    Register(Errno),
    /// The agent does not.
    Agent(link::Failure),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |error: &Errno| errno::name(-error.raw_os_error());
        match self {
            Self::Ring(error @ (Errno::PERM | Errno::NOSYS)) => write!(
                f,
                "io_uring is not to be had ({}): set kernel.io_uring_disabled to 0 (sysctl), or let the container have it",
                name(error)
            ),
            // The io_uring itself is charged too.
            Self::Ring(error @ Errno::NOMEM) | Self::Register(error @ (Errno::NOMEM | Errno::PERM)) => {
                write!(f, "RLIMIT_MEMLOCK is too low ({}; it is ", name(error))?;
                match rustix::process::getrlimit(Resource::Memlock).current {
                    Some(bytes) => write!(f, "{bytes} bytes for all processes of the user")?,
                    None => f.write_str("not set, so memory is short")?,
                }
                f.write_str("): raise it by `ulimit -l`, or by memlock in /etc/security/limits.conf")
            }
            Self::Ring(error) => write!(f, "no io_uring ({})", name(error)),
            Self::Register(error) => write!(f, "io_uring does not take it ({})", name(error)),
            Self::Agent(failure) => failure.fmt(f),
        }
    }
}

/// Pins whole pages, which are mapped readable and writable, and shows them to the agent. Returns the arena's name.
pub fn pin(link: &mut Link, range: &Range<usize>) -> Result<u64, Failure> {
    let ring = registered(range)?;
    let as_u64 = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
    let mut attempts = 1;
    loop {
        match link.pin(as_u64(range.start), as_u64(range.len()), ring.as_fd()) {
            Err(link::Failure::Refused { status, .. })
                if status == -errno::EAGAIN && attempts < MAX_ATTEMPTS =>
            {
                attempts += 1;
            }
            shown => return shown.map_err(Failure::Agent),
        }
    }
}

/// An io_uring that holds the pages of a range.
fn registered(range: &Range<usize>) -> Result<Fd, Failure> {
    let mut parameters = io_uring_params::default();
    // SAFETY: the parameters ask for nothing but the io_uring itself.
    let ring = unsafe { io_uring_setup(1, &mut parameters) }.map(Fd::new).map_err(Failure::Ring)?;
    let mut buffers = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_BUFFERS];
    let mut count = 0;
    for (buffer, at) in buffers.iter_mut().zip(range.clone().step_by(MAX_BUFFER)) {
        let iov_base = std::ptr::with_exposed_provenance_mut(at);
        *buffer = libc::iovec { iov_base, iov_len: MAX_BUFFER.min(range.end - at) };
        count += 1;
    }
    let operation = IoringRegisterOp::RegisterBuffers;
    // SAFETY: the first `count` buffers are filled in; the kernel takes references to their pages, which it looks up
    // itself, and nobody ever submits an operation on them.
    let taken = unsafe { io_uring_register(&ring, operation, buffers.as_ptr().cast(), count) };
    taken.map(|_| ring).map_err(Failure::Register)
}
