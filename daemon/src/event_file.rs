//! Kick and call files, used so that nobody can make us wait at one.
//!
//! The VMM has the same open file and may clear its O_NONBLOCK at any time. A full eventfd that is written then, or an
//! empty one that is read, would hold the thread up for ever: an engine, perhaps, which serves others. So the flag of the
//! file decides nothing here:
//! * a kick is read with RWF_NOWAIT, which belongs to the call;
//! * an interrupt is the end of an asynchronous poll (io_submit with IOCB_FLAG_RESFD) of a file that is always ready: the
//!   kernel adds to the call file itself, and does not wait for room. What is full stays full, and that it is is seen.
//!
//! Only eventfds are taken: at another file even these could wait, as at one of a file system that its owner serves.

#![expect(unsafe_code, reason = "asynchronous I/O has no safe wrapper")]

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read, write};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// Operations that may be in flight; each ends before it is submitted.
const IN_FLIGHT: libc::c_long = 1024;
/// Ends that are taken off at once: more than one comes by each submission of this thread and those beside it.
const TAKEN: usize = 8;
const COMMAND_POLL: u16 = 5;
const SIGNAL_WHEN_DONE: u32 = 1;
const FILE_TYPE: u32 = libc::S_IFMT;

/// Makes an event file of the VMM's fit for use.
///
/// # Errors
/// It is none, or cannot be made non-blocking.
pub fn accept(file: File) -> io::Result<File> {
    let flags = fcntl_getfl(file.as_fd())?;
    // For those who read or write it without this module: the framework.
    fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK)?;
    // An eventfd is nameless, as few files are, none of which can be read or written at its maker's pleasure.
    if fstat(file.as_fd())?.st_mode & FILE_TYPE != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no eventfd"));
    }
    Ok(file)
}

/// Takes what was signalled. `false`: nothing was.
///
/// # Errors
/// It cannot be read.
pub fn take(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut count = [0; 8];
    let current_position = u64::MAX;
    let taken =
        match preadv2(file, &mut [IoSliceMut::new(&mut count)], current_position, ReadWriteFlags::NOWAIT) {
            // A kernel that cannot read eventfds so.
            Err(Errno::OPNOTSUPP) => read(file, &mut count),
            other => other,
        };
    match taken {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Signals it, unless it is full.
///
/// # Errors
/// It cannot be signalled.
pub fn raise(file: BorrowedFd<'_>) -> io::Result<()> {
    match signals() {
        Some(signals) => signals.raise(file),
        None => Ok(write(file, &1_u64.to_ne_bytes()).map(drop)?),
    }
}

/// Makes what interrupts need, once, so that no session is the first to need it.
pub fn prepare() {
    signals();
}

fn signals() -> Option<&'static Signals> {
    static SIGNALS: OnceLock<Option<Signals>> = OnceLock::new();
    let made = SIGNALS.get_or_init(|| {
        Signals::new()
            .inspect_err(|error| tracing::warn!(%error, "no asynchronous I/O: a VMM can hold up engines"))
            .ok()
    });
    made.as_ref()
}

/// An operation, as the kernel takes it (linux/aio_abi.h).
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    key_and_flags: [u32; 2],
    command: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    signalled: u32,
}

/// How one has ended.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct End {
    data: u64,
    operation: u64,
    results: [i64; 2],
}

const _: () = assert!(size_of::<Operation>() == 64 && size_of::<End>() == 32);

/// The process' asynchronous operations.
struct Signals {
    context: libc::c_ulong,
    /// Never read.
    ready: OwnedFd,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let ready = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word, whose place is this variable.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, IN_FLIGHT, &raw mut context) };
        if made == 0 { Ok(Self { context, ready }) } else { Err(io::Error::last_os_error()) }
    }

    fn raise(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX);
        let mut operation = Operation {
            command: COMMAND_POLL,
            file: number(self.ready.as_fd()),
            buffer: u64::from(libc::POLLIN.unsigned_abs()),
            flags: SIGNAL_WHEN_DONE,
            signalled: number(file),
            ..Operation::default()
        };
        let mut list = [&raw mut operation];
        // SAFETY: a list of one operation, which the kernel reads and whose key it writes before it returns. It has no
        // buffer of ours.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_i64, list.as_mut_ptr()) };
        let outcome = if submitted == 1 { Ok(()) } else { Err(io::Error::last_os_error()) };
        self.take_ends();
        outcome
    }

    /// So that there is room for more.
    fn take_ends(&self) {
        let mut ends = [End::default(); TAKEN];
        let mut at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let most = libc::c_long::try_from(TAKEN).unwrap_or(1);
        // SAFETY: the kernel writes at most so many ends to the list, which has room for them, and reads the time.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0_i64,
                most,
                ends.as_mut_ptr(),
                &raw mut at_once,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// One that would make whoever reads or writes it wait.
    fn waiting(count: u64) -> File {
        let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        if count > 0 {
            write(&file, &count.to_ne_bytes()).unwrap();
        }
        File::from(file)
    }

    /// Fails instead of waiting for ever.
    fn in_time<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(act()));
        told.recv_timeout(Duration::from_secs(30)).expect("it waits")
    }

    #[test]
    fn full_one_is_signalled_without_a_wait() {
        let file = waiting(u64::MAX - 1);
        let copy = file.try_clone().unwrap();
        in_time(move || (0..3).for_each(|_| raise(copy.as_fd()).unwrap()));
        let mut count = [0; 8];
        read(&file, &mut count).unwrap();
        assert!(u64::from_ne_bytes(count) >= u64::MAX - 1);
    }

    #[test]
    fn signals_add_up_and_are_taken_at_once() {
        let file = waiting(0);
        // More than are in flight at most.
        for _ in 0..5000 {
            raise(file.as_fd()).unwrap();
        }
        let mut count = [0; 8];
        read(&file, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 5000);
        raise(file.as_fd()).unwrap();
        assert!(take(file.as_fd()).unwrap());
    }

    #[test]
    fn empty_one_is_read_without_a_wait() {
        let file = waiting(0);
        assert!(!in_time(move || take(file.as_fd()).unwrap()));
    }

    #[test]
    fn only_an_eventfd_is_accepted() {
        assert!(accept(waiting(0)).is_ok());
        let (reader, writer) = std::io::pipe().unwrap();
        for other in
            [File::from(OwnedFd::from(reader)), OwnedFd::from(writer).into(), tempfile::tempfile().unwrap()]
        {
            assert_eq!(accept(other).unwrap_err().to_string(), "it is no eventfd");
        }
        let file = accept(waiting(0)).unwrap();
        assert!(fcntl_getfl(file.as_fd()).unwrap().contains(OFlags::NONBLOCK));
    }
}
