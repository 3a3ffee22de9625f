//! userfaultfd: the kernel parks a thread that touches a missing page, and tells whoever holds the descriptor.
//!
//! The worker makes it and registers its GPU address space; the daemon reads it. User-mode faults are all that packets
//! make, and for those no privilege is needed.

#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: UserfaultfdFlags = UserfaultfdFlags::from_bits_retain(1);
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EXACT_ADDRESS`: who faulted, and where within the page.
const FEATURES: u64 = 1 << 8 | 1 << 11;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_PAGEFAULT_FLAG_WRITE`.
const FLAG_WRITE: u64 = 1;
/// Events read at once.
const BATCH: usize = 16;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiCall {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterCall {
    start: u64,
    bytes: u64,
    mode: u64,
    ioctls: u64,
}

/// Request number of `UFFDIO_REGISTER`.
pub const REGISTER: u32 = opcode::read_write::<RegisterCall>(0xaa, 0x00);
/// Request number of `UFFDIO_API`.
const HANDSHAKE: u32 = opcode::read_write::<ApiCall>(0xaa, 0x3f);
/// All ioctl requests that a worker makes.
pub const CALLS: [u32; 2] = [HANDSHAKE, REGISTER];

/// `struct uffd_msg` as a page fault fills it.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Event {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    unused: u32,
}
const _: () = assert!(size_of::<Event>() == 32);

/// A thread that the kernel has parked.
#[derive(Clone, Copy, Debug)]
pub struct PageFault {
    /// Which thread.
    pub tid: u32,
    /// What it touched.
    pub addr: u64,
    /// Whether it was to be written.
    pub write: bool,
}

/// Makes one for the memory of this process.
///
/// # Errors
/// The kernel has none, or lacks a feature that is needed (Linux 5.18).
pub fn create() -> rustix::io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | USER_MODE_ONLY;
    // SAFETY: a new descriptor changes nothing of this process until memory is registered with it.
    let fd = unsafe { userfaultfd(flags) }?;
    let mut call = ApiCall { api: API, features: FEATURES, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes a `struct uffdio_api`, which `ApiCall` is.
    let call = unsafe { Updater::<HANDSHAKE, ApiCall>::new(&mut call) };
    // SAFETY: the handshake concerns this descriptor alone.
    unsafe { ioctl(&fd, call) }?;
    Ok(fd)
}

/// From now on, whoever touches a page of this range that is missing is parked.
///
/// # Errors
/// The range is not private anonymous memory of the process that made the descriptor.
pub fn register(fd: impl AsFd, start: u64, bytes: u64) -> rustix::io::Result<()> {
    let mut call = RegisterCall { start, bytes, mode: MISSING, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes a `struct uffdio_register`, which `RegisterCall` is.
    let call = unsafe { Updater::<REGISTER, RegisterCall>::new(&mut call) };
    // SAFETY: what faults in a registered range is parked and not changed; who registers wants that.
    unsafe { ioctl(fd, call) }
}

/// Faults that nobody was told of yet; does not wait.
///
/// # Errors
/// The descriptor's. The end of the process is none: there are no faults any more.
pub fn read(fd: impl AsFd, faults: &mut Vec<PageFault>) -> rustix::io::Result<()> {
    let mut events = [Event::default(); BATCH];
    let bytes = match retry_on_intr(|| rustix::io::read(&fd, events.as_mut_bytes())) {
        Ok(bytes) => bytes,
        Err(Errno::AGAIN) => 0,
        Err(error) => return Err(error),
    };
    let events = events.iter().take(bytes / size_of::<Event>());
    faults.extend(events.filter(|event| event.event == EVENT_PAGEFAULT).map(|event| PageFault {
        tid: event.thread,
        addr: event.address,
        write: event.flags & FLAG_WRITE != 0,
    }));
    Ok(())
}
