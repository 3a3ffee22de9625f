//! Both ends of starting a worker: the daemon's own program, executed again with an empty environment, a socket as
//! standard input, and nothing else of the daemon's.

#![expect(unsafe_code, reason = "close_range has no safe wrapper")]

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The argument that makes `svmd` a worker; its value is the number of address bits.
pub const ARGUMENT: &str = "--hostmmu-worker";

/// Starts a worker.
///
/// # Errors
/// The machine has no process, socket or memory left.
pub fn start(program: &Path, va_bits: u32) -> std::io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let child = Command::new(program)
        .args([ARGUMENT, &va_bits.to_string()])
        .env_clear()
        .stdin(theirs)
        .stdout(Stdio::null())
        // A signal from the daemon's terminal is for the daemon, which ends its workers itself.
        .process_group(0)
        .spawn()?;
    Ok((child, ours))
}

/// Closes what the daemon did not mean to leave open: others' descriptors of guest memory, above all. To be called
/// before this process opens anything of its own.
///
/// # Errors
/// The kernel's.
pub fn close_inherited() -> std::io::Result<()> {
    // SAFETY: nothing in this process owns a descriptor but the standard three.
    match unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
