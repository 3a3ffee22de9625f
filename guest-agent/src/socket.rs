//! Unix sockets with message boundaries, and who is at their other end.
//!
//! Owns the system calls for sending and receiving messages with file descriptors and sender credentials, and the
//! identification of a peer by a pidfd. What the messages mean is in [`crate::message`] and [`crate::keeper`].

#![expect(
    unsafe_code,
    reason = "recvmsg with control messages and SO_PEERPIDFD have no safe wrapper that fits"
)]

use crate::wait;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use std::fs::Permissions;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

/// Most file descriptors that one message carries.
pub const MAX_FDS: usize = 8;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// A process as the kernel names it in a message or at connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id in this process' namespace; 0 if it has none there.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// The process that connected, held by a pidfd so that its id cannot come to mean another one.
#[derive(Debug)]
pub struct Peer {
    /// At connect.
    pub credentials: Credentials,
    /// Becomes readable when the process has exited.
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Whether the process has exited. What cannot be asked is not trusted.
    pub fn has_exited(&self) -> bool {
        wait::readable(&self.pidfd, Some(Duration::ZERO)) != Ok(false)
    }
}

/// A message that was received.
#[derive(Debug)]
pub struct Received {
    /// Its bytes; 0 at the end of the connection.
    pub len: usize,
    /// File descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// Its sender, where the socket asks for it ([`MessageSocket::pass_credentials`]).
    pub sender: Option<Credentials>,
    /// It was larger than the buffer, or carried more descriptors than expected.
    pub truncated: bool,
}

/// A connected `SOCK_SEQPACKET` socket.
#[derive(Debug)]
pub struct MessageSocket {
    fd: OwnedFd,
}

impl MessageSocket {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// What the kernel says; `ENOENT` and `ECONNREFUSED` where nobody listens.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = new_socket()?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self { fd })
    }

    /// Two sockets connected to each other.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// The descriptor, for another process.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Has the kernel name the sender of every message, on both ends' behalf.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pass_credentials(&self) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_socket_passcred(&self.fd, true)?)
    }

    /// Sends one message; waits for room only if `wait`.
    ///
    /// # Errors
    /// `WouldBlock` without room, `BrokenPipe` when the other end is gone, `EMSGSIZE` for a message that is too large.
    pub fn send(&self, parts: &[&[u8]], fds: &[BorrowedFd<'_>], wait: bool) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::from(rustix::io::Errno::TOOBIG));
        }
        let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let flags = if wait { SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL | SendFlags::DONTWAIT };
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&self.fd, &slices, &mut control, flags))?;
        Ok(())
    }

    /// Receives one message.
    ///
    /// # Errors
    /// `WouldBlock` without a message unless `wait`; what else the kernel says.
    pub fn receive(&self, buf: &mut [u8], wait: bool) -> io::Result<Received> {
        receive(self.fd.as_raw_fd(), buf, wait)
    }

    /// The process at the other end.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn peer(&self) -> io::Result<Peer> {
        let credentials = peer_credentials(&self.fd)?;
        let pidfd = match peer_pidfd(&self.fd) {
            // Before Linux 6.5. The id may have been taken by another process since; but then the one that connected
            // has exited, and its end has hung up unless it handed it on, which the sender check of each message meets.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => open_pidfd(credentials.pid)?,
            other => other?,
        };
        Ok(Peer { credentials, pidfd })
    }
}

impl AsFd for MessageSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for MessageSocket {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

/// A listening `SOCK_SEQPACKET` socket; its path is removed on drop.
#[derive(Debug)]
pub struct MessageListener {
    fd: OwnedFd,
    path: std::path::PathBuf,
}

impl MessageListener {
    /// Listens at `path`, replacing a socket there that nobody listens on. `mode`: its permissions.
    ///
    /// # Errors
    /// `AddrInUse` when somebody does, or the path is not a socket.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        Ok(Self { fd: listen(path, SocketType::SEQPACKET, mode)?, path: path.to_owned() })
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn accept(&self) -> io::Result<MessageSocket> {
        let accepted = rustix::io::retry_on_intr(|| rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC));
        Ok(MessageSocket { fd: accepted? })
    }
}

impl AsFd for MessageListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for MessageListener {
    fn drop(&mut self) {
        // Best effort: a path that is gone already needs no removal.
        drop(std::fs::remove_file(&self.path));
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path`; nobody can connect before the permissions are set.
///
/// # Errors
/// As [`unlink_dead`], and what else the kernel says.
pub(crate) fn listen(path: &Path, kind: SocketType, mode: u32) -> io::Result<OwnedFd> {
    unlink_dead(path, kind)?;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(fd)
}

/// Removes a socket at `path` on which nobody listens, and nothing else.
///
/// # Errors
/// `AddrInUse` when it is alive or not a socket.
pub fn unlink_dead(path: &Path, kind: SocketType) -> io::Result<()> {
    let file = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let alive = || {
        // Without waiting: EAGAIN says that so many wait to be accepted, so it is alive.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None);
        let probe = socket.and_then(|fd| rustix::net::connect(&fd, &SocketAddrUnix::new(path)?));
        // A socket of another type answers EPROTOTYPE, alive or not; its owner must remove it.
        probe != Err(rustix::io::Errno::CONNREFUSED)
    };
    if !file.is_socket() || alive() {
        return Err(io::Error::from(io::ErrorKind::AddrInUse));
    }
    std::fs::remove_file(path)
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::Error::from(io::ErrorKind::NotFound))?;
    Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
}

/// Control buffer with the alignment of `cmsghdr`.
#[repr(C, align(8))]
struct ControlBuffer([u8; 256]);

fn receive(fd: i32, buf: &mut [u8], wait: bool) -> io::Result<Received> {
    let mut control = ControlBuffer([0; 256]);
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: msghdr is plain data for which all zeros is a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len();
    let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
    let len = loop {
        // SAFETY: the header names `buf` and `control`, which live beyond the call, with their true lengths.
        let received = unsafe { libc::recvmsg(fd, &raw mut header, flags) };
        match usize::try_from(received) {
            Ok(len) => break len,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    let mut received = Received { len, fds: Vec::new(), sender: None, truncated: false };
    received.truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    parse_control(&header, &mut received);
    Ok(received)
}

fn parse_control(header: &libc::msghdr, received: &mut Received) {
    // SAFETY: the kernel filled in the header: control pointer and length describe what it wrote.
    let mut cursor = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !cursor.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return only pointers to a whole, aligned cmsghdr in the buffer.
        let cmsg = unsafe { cursor.read() };
        // SAFETY: as above; the data follow the header.
        let data = unsafe { libc::CMSG_DATA(cursor) };
        let bytes = cmsg.cmsg_len.saturating_sub(size_of::<libc::cmsghdr>());
        if cmsg.cmsg_level == libc::SOL_SOCKET && cmsg.cmsg_type == libc::SCM_RIGHTS {
            for index in 0..bytes / size_of::<i32>() {
                let at = data.wrapping_add(index * size_of::<i32>()).cast::<i32>();
                // SAFETY: `index` lies within the data that the kernel wrote.
                let raw = unsafe { at.read_unaligned() };
                // SAFETY: the kernel installed this descriptor for us, and nobody else owns it.
                received.fds.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        } else if cmsg.cmsg_level == libc::SOL_SOCKET
            && cmsg.cmsg_type == libc::SCM_CREDENTIALS
            && bytes >= size_of::<libc::ucred>()
        {
            // SAFETY: the data hold a whole ucred, plain data.
            let ucred = unsafe { data.cast::<libc::ucred>().read_unaligned() };
            received.sender = Some(Credentials { pid: ucred.pid, uid: ucred.uid, gid: ucred.gid });
        }
        // SAFETY: `cursor` came from CMSG_FIRSTHDR or CMSG_NXTHDR on this header.
        cursor = unsafe { libc::CMSG_NXTHDR(header, cursor) };
    }
}

/// The process at the other end of a connected socket: who connected, or who has listened.
///
/// # Errors
/// What the kernel says of a descriptor that is no such socket.
pub fn peer_credentials(fd: &impl AsFd) -> io::Result<Credentials> {
    let zero = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let ucred = socket_option(fd, libc::SO_PEERCRED, zero)?;
    Ok(Credentials { pid: ucred.pid, uid: ucred.uid, gid: ucred.gid })
}

fn peer_pidfd(fd: &impl AsFd) -> io::Result<OwnedFd> {
    let raw = socket_option(fd, libc::SO_PEERPIDFD, -1i32)?;
    // SAFETY: the kernel installed this descriptor for us, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Reads a socket option of a type that is plain data.
fn socket_option<T: Copy>(fd: &impl AsFd, option: i32, mut value: T) -> io::Result<T> {
    let mut len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0);
    let (out, raw) = ((&raw mut value).cast(), fd.as_fd().as_raw_fd());
    // SAFETY: `out` points to `len` writable bytes; the callers' types accept what the kernel writes for the option.
    let result = unsafe { libc::getsockopt(raw, libc::SOL_SOCKET, option, out, &raw mut len) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
