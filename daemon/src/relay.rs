//! A vhost-user connection that was made before svmd began (`--fd`), brought to a framework that only accepts.
//!
//! The framework takes connections from a listening socket and from nowhere else. So a private socket is made, in a
//! folder that only this user can enter, the framework accepts a connection to it, and two threads carry bytes and
//! descriptors between that connection and the inherited one. Only messages of the vhost-user protocol pass here;
//! rings, kicks and calls do not.

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use tempfile::TempDir;
use vhost::vhost_user::Listener;

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
/// Where in it the size of the body stands.
const SIZE_AT: usize = 8;
/// Most bytes of a body. The framework refuses more than 4 KiB; this only bounds what is held here.
const MAX_BODY: usize = 64 << 10;
/// Most descriptors of one message.
const MAX_FDS: usize = 64;

/// The inherited connection and the way to the framework.
#[derive(Debug)]
pub struct Relay {
    outer: OwnedFd,
    inner: UnixStream,
    listener: UnixListener,
}

impl Relay {
    /// Connects an inherited socket to a listener that the framework can accept from. To be called before the daemon is
    /// confined, which then makes folders nowhere.
    ///
    /// # Errors
    /// When the private socket cannot be made.
    pub fn new(outer: OwnedFd) -> std::io::Result<Self> {
        let folder: TempDir = tempfile::Builder::new().prefix("svmd-").tempdir()?;
        let path = folder.path().join("fd");
        let listener = UnixListener::bind(&path)?;
        let inner = UnixStream::connect(&path)?;
        // The folder is removed here; both ends exist by now.
        folder.close()?;
        Ok(Self { outer, inner, listener })
    }

    /// The number of the inherited descriptor.
    pub(crate) fn number(&self) -> RawFd {
        self.outer.as_raw_fd()
    }

    /// Runs `serve` with the listener, carrying messages meanwhile. Returns when it has returned.
    pub(crate) fn run(self, serve: impl FnOnce(&mut Listener)) {
        let Self { outer, inner, listener } = self;
        std::thread::scope(|scope| {
            scope.spawn(|| carry(outer.as_fd(), inner.as_fd()));
            scope.spawn(|| carry(inner.as_fd(), outer.as_fd()));
            serve(&mut Listener::from(listener));
            // Either end may have been shut down already.
            shutdown(&outer, Shutdown::Both).ok();
            shutdown(&inner, Shutdown::Both).ok();
        });
    }
}

/// Carries until either end is shut down, then shuts down the other direction's end. Message by message: descriptors
/// belong to the first byte of theirs, and a reader that takes more at once would glue messages together.
fn carry(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    while let Some((message, fds)) = receive(from) {
        if send(to, &message, &fds).is_err() {
            break;
        }
    }
    shutdown(to, Shutdown::Write).ok();
}

/// One whole message; `None` when there will be none any more, or the next is longer than any can be.
fn receive(from: BorrowedFd<'_>) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut message, mut fds) = (vec![0; HEADER], Vec::new());
    fill(from, &mut message, &mut fds)?;
    let size = message.get(SIZE_AT..).and_then(|size| size.first_chunk())?;
    let size = usize::try_from(u32::from_le_bytes(*size)).ok().filter(|size| *size <= MAX_BODY)?;
    message.resize(HEADER.saturating_add(size), 0);
    fill(from, message.get_mut(HEADER..)?, &mut fds)?;
    Some((message, fds))
}

/// Reads until the buffer is full, and collects descriptors.
fn fill(from: BorrowedFd<'_>, mut rest: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
    while !rest.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            recvmsg(from, &mut [IoSliceMut::new(rest)], &mut control, RecvFlags::CMSG_CLOEXEC)
        });
        let bytes = received.ok()?.bytes;
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
                fds.extend(rights);
            }
        }
        rest = rest.get_mut(bytes..).filter(|_| bytes > 0)?;
    }
    Some(())
}

fn send(to: BorrowedFd<'_>, bytes: &[u8], fds: &[OwnedFd]) -> Result<(), Errno> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(Errno::TOOBIG);
    }
    let mut rest = bytes;
    while !rest.is_empty() {
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(to, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)
        })?;
        // Descriptors go with the first byte.
        control.clear();
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}
