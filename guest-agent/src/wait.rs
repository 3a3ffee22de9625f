//! Waiting for a descriptor.

use rustix::event::{PollFd, PollFlags};
use std::os::fd::AsFd;
use std::time::Duration;

/// Waits until there is something to read, or an end to be noticed; at most so long (`None`: for ever). False: there is
/// not.
///
/// # Errors
/// What the kernel says; `EINTR` after a signal.
pub(crate) fn readable(fd: &impl AsFd, timeout: Option<Duration>) -> rustix::io::Result<bool> {
    let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
    Ok(rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], timeout.as_ref())? > 0)
}
