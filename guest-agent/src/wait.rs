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

/// Waits until the other end has hung up, at most so long (`None`: for ever). False: it has not.
///
/// # Errors
/// As [`readable`].
pub(crate) fn hung_up(fd: &impl AsFd, timeout: Option<Duration>) -> rustix::io::Result<bool> {
    let timeout = timeout.and_then(|timeout| timeout.try_into().ok());
    // What it tells without being asked: a hang-up, and errors.
    Ok(rustix::event::poll(&mut [PollFd::new(fd, PollFlags::empty())], timeout.as_ref())? > 0)
}
