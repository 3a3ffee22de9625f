//! A descriptor for programs that wait for many things at once: poll(2), epoll, tokio's `AsyncFd`.

use super::connection::Connection;
use super::{Error, Result};
use crate::socket::MessageSocket;
use crate::wait;
use rustix::event::EventfdFlags;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Readable while there is something to read from the agent, or something that was read and nobody has taken.
///
/// The second is what the socket alone could not tell: another thread that waits for its own reply may read an end on the
/// way. Set under the inbox's lock only.
#[derive(Debug)]
pub(super) struct Readiness {
    /// Of the socket and of `untaken`.
    epoll: OwnedFd,
    /// Not 0 while something is untaken.
    untaken: OwnedFd,
    is_set: AtomicBool,
}

impl Readiness {
    pub(super) fn new(socket: &MessageSocket) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let untaken = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, socket, EventData::new_u64(0), EventFlags::IN)?;
        epoll::add(&epoll, &untaken, EventData::new_u64(1), EventFlags::IN)?;
        Ok(Self { epoll, untaken, is_set: AtomicBool::new(false) })
    }

    /// Says whether something is untaken. `missed`: readable once more in any case, also for those who are told of changes
    /// only (edge-triggered).
    pub(super) fn set(&self, untaken: bool, missed: bool) {
        let was = self.is_set.load(Ordering::Relaxed);
        let raise = missed || (untaken && !was);
        if raise {
            // Fails only when the counter is full, and then it is readable.
            rustix::io::write(&self.untaken, &1u64.to_ne_bytes()).ok();
        } else if !untaken && was {
            // Only empties the counter.
            rustix::io::read(&self.untaken, &mut [0u8; 8]).ok();
        }
        self.is_set.store(untaken || raise, Ordering::Relaxed);
    }
}

/// What an event loop waits for, in place of a call that blocks ([`Client::events`](super::Client::events)).
///
/// ```no_run
/// # use guest_agent::client::{Client, packet};
/// # fn main() -> Result<(), guest_agent::client::Error> {
/// let client = Client::of_process()?;
/// let mirror = client.mirror(0)?;
/// let events = client.events()?;
/// let job = mirror.exec(0, &[packet::fill(0x1000, 8, 0)], 0)?;
/// while !job.try_wait()? {
///     // Or poll(2) with the program's other descriptors, and `events.dispatch()`.
///     events.wait(None)?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// Its descriptor is readable while a job has ended whose [`Job`](super::Job) has not told it yet, or when something may
/// have arrived. Then call [`Self::dispatch`] and ask the jobs ([`Job::try_wait`](super::Job::try_wait)), or let an
/// executor poll those that were woken. Once the agent has hung up it stays readable, as a socket does.
///
/// Works level- and edge-triggered, so `tokio::io::unix::AsyncFd::new(client.events()?)` does. Several threads may wait.
#[derive(Clone, Debug)]
pub struct Events {
    connection: Arc<Connection>,
    readiness: Arc<Readiness>,
}

impl Events {
    pub(super) fn new(connection: &Arc<Connection>) -> Result<Self> {
        Ok(Self { connection: connection.clone(), readiness: connection.readiness()? })
    }

    /// Takes in what has arrived, without waiting, and wakes the tasks whose jobs have ended.
    pub fn dispatch(&self) {
        self.connection.dispatch();
    }

    /// Waits until there is something to do, at most so long (`None`: for ever), and does [`Self::dispatch`]. May also
    /// return for nothing. Nothing runs meanwhile: no thread, no timer.
    ///
    /// # Errors
    /// When the kernel cannot wait.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        match wait::readable(self, timeout) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::Socket(errno.into())),
        }
        self.dispatch();
        Ok(())
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readiness.epoll.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.readiness.epoll.as_raw_fd()
    }
}
