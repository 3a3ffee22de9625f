//! A socket that was open when the program began.

#![expect(unsafe_code, reason = "a descriptor is known by its number only, as the command line names it")]

use anyhow::Context;
use daemon::registry::Endpoint;
use daemon::relay::Relay;
use std::fs;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

/// Takes over descriptor `number`. To be called once, before the program opens anything of its own.
///
/// # Errors
/// When it is not an open stream socket.
pub fn take(number: i32) -> anyhow::Result<Endpoint> {
    let kind = fs::metadata(format!("/proc/self/fd/{number}"))
        .map_err(|_| anyhow::anyhow!("--fd {number}: no such descriptor was inherited"))?;
    anyhow::ensure!(kind.file_type().is_socket(), "--fd {number}: it is no socket");
    // SAFETY: the descriptor is open (it was just found), and no other owner exists: the program has opened nothing
    // that is still open, so this is the one that its starter passed to it, and it is taken once.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    let listening = rustix::net::sockopt::socket_acceptconn(&socket)?;
    if listening {
        return Ok(Endpoint::Listener(socket));
    }
    Ok(Endpoint::Connected(
        Relay::new(socket).with_context(|| format!("--fd {number}: cannot take it over"))?,
    ))
}
