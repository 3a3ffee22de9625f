//! The connection to the agent, without allocating: what [`guest_agent::client`] does for programs, as far as memory
//! needs it.
//!
//! One connection, one context; whoever launches jobs joins the context by a connection of its own. So records never
//! come here unless nobody has joined, and are dropped then.

use crate::fd::{Fd, Kept};
use guest_agent::message::{
    ARENA_CREATE, ARENA_CUT, ARENA_FREE, ARENA_IMPORT, ARENA_PIN, ArenaCreate, ArenaCut, ArenaFree,
    ArenaImport, ArenaPin, ArenaReply, EVENTS, HELLO, HELLO_TRUSTED, Head, Hello, HelloReply,
    MESSAGE_VERSION,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::ffi::CStr;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use virtio_gpu_svm::protocol::errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest message of ours; and of a reply as far as it is looked at.
const MESSAGE: usize = 64;

/// Why the agent did not do it.
pub enum Failure {
    /// No agent listens.
    NotReachable(Errno),
    /// The connection broke, or the program has closed it.
    Broken,
    /// The agent said no: negative errno.
    Refused(i32),
    /// Something else came than was agreed.
    NotUnderstood,
}

impl Failure {
    /// Whether there is no use in asking again.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReachable(error) => write!(
                f,
                "no agent listens there ({}): start `svm-agent serve` as root, or name its socket in SVM_AGENT_SOCKET",
                errno::name(-error.raw_os_error())
            ),
            Self::Broken => {
                f.write_str("the connection has ended: start the program again, and let it not close descriptors of others")
            }
            Self::Refused(status) if *status == -errno::ENOSPC => f.write_str(
                "the agent's limit of memory, of arenas or of parts of them is reached (ENOSPC): raise --process-memory of `svm-agent serve`, or map less in pieces",
            ),
            Self::Refused(status) => {
                write!(f, "the agent refuses it ({}): see its messages", errno::name(*status))
            }
            Self::NotUnderstood => f.write_str("its answer is not understood: is it another version?"),
        }
    }
}

pub type Result<T> = std::result::Result<T, Failure>;

/// An arena as the agent made it.
pub struct Made {
    pub id: u64,
    pub fd: Fd,
    pub offset: u64,
}

/// A connection with its context.
pub struct Link {
    socket: Kept,
    seqno: u32,
    ctx_id: u32,
    max_arena_bytes: u64,
    trusted: bool,
}

impl Link {
    /// Connects and opens a context.
    pub fn open(path: &CStr) -> Result<Self> {
        let socket = connect(path).and_then(Kept::new).map_err(Failure::NotReachable)?;
        let mut link = Self { socket, seqno: 0, ctx_id: 0, max_arena_bytes: 0, trusted: false };
        let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
        let (reply, _) = link.ask::<HelloReply>(HELLO, hello.as_bytes(), None)?;
        link.ctx_id = reply.ctx_id.get();
        link.max_arena_bytes = reply.max_arena_bytes.get();
        link.trusted = reply.flags.get() & HELLO_TRUSTED != 0;
        Ok(link)
    }

    /// The context's number in this guest.
    pub fn ctx_id(&self) -> u32 {
        self.ctx_id
    }

    /// Bytes of arenas that the process may have.
    pub fn max_arena_bytes(&self) -> u64 {
        self.max_arena_bytes
    }

    /// Whether the process may show memory that it has pinned itself.
    pub fn is_trusted(&self) -> bool {
        self.trusted
    }

    /// Asks for memory that will stand at `va`.
    pub fn create(&mut self, va: u64, len: u64) -> Result<Made> {
        let request = ArenaCreate { len: len.into(), va: va.into() };
        let (reply, fd) = self.ask::<ArenaReply>(ARENA_CREATE, request.as_bytes(), None)?;
        let fd = fd.ok_or(Failure::NotUnderstood)?;
        Ok(Made { id: reply.arena_id.get(), fd, offset: reply.offset.get() })
    }

    /// Shows memory of the process' own, a file that stands at `va` from `offset` on. Returns the arena's name.
    pub fn import(&mut self, va: u64, len: u64, file: BorrowedFd<'_>, offset: u64) -> Result<u64> {
        let request = ArenaImport { len: len.into(), va: va.into(), offset: offset.into() };
        let (reply, _) = self.ask::<ArenaReply>(ARENA_IMPORT, request.as_bytes(), Some(file))?;
        Ok(reply.arena_id.get())
    }

    /// Shows memory that stands at `va` and is registered in an io_uring, of which the agent takes a descriptor of its own.
    /// Returns the arena's name.
    pub fn pin(&mut self, va: u64, len: u64, ring: BorrowedFd<'_>) -> Result<u64> {
        let request =
            ArenaPin { va: va.into(), len: len.into(), ring: ring.as_raw_fd().into(), reserved: 0.into() };
        let (reply, _) = self.ask::<ArenaReply>(ARENA_PIN, request.as_bytes(), None)?;
        Ok(reply.arena_id.get())
    }

    /// Gives memory back; returns when no GPU can reach it any more.
    pub fn free(&mut self, id: u64) -> Result<()> {
        let request = ArenaFree { arena_id: id.into() };
        self.ask::<[u8; 0]>(ARENA_FREE, request.as_bytes(), None).map(|_| ())
    }

    /// As [`Self::free`], for a part of an arena.
    pub fn cut(&mut self, id: u64, offset: u64, len: u64) -> Result<()> {
        let request = ArenaCut { arena_id: id.into(), offset: offset.into(), len: len.into() };
        self.ask::<[u8; 0]>(ARENA_CUT, request.as_bytes(), None).map(|_| ())
    }

    /// One request and its reply.
    fn ask<T>(&mut self, kind: u32, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(T, Option<Fd>)>
    where
        T: FromBytes + Immutable + KnownLayout,
    {
        let socket = self.socket;
        let socket = socket.get().ok_or(Failure::Broken)?;
        self.seqno = self.seqno.wrapping_add(1);
        let head = Head { kind: kind.into(), seqno: self.seqno.into(), status: 0.into(), reserved: 0.into() };
        let mut message = [0; MESSAGE];
        let parts = head.as_bytes().iter().chain(body);
        let len = message.iter_mut().zip(parts).map(|(to, from)| *to = *from).count();
        let bytes = message.get(..len).unwrap_or_default();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if file.is_some() && !control.push(SendAncillaryMessage::ScmRights(file.as_slice())) {
            return Err(Failure::NotUnderstood);
        }
        let parts = [IoSlice::new(bytes)];
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL))
            .map_err(|_| Failure::Broken)?;
        loop {
            let (len, fd) = receive(socket, &mut message)?;
            let received = message.get(..len).unwrap_or_default();
            let (head, body) = Head::read_from_prefix(received).map_err(|_| Failure::Broken)?;
            if head.kind.get() == EVENTS {
                continue;
            }
            if head.status.get() != 0 {
                return Err(Failure::Refused(head.status.get()));
            }
            let reply = T::read_from_bytes(body).map_err(|_| Failure::NotUnderstood)?;
            return Ok((reply, fd));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.socket.close();
    }
}

fn receive(socket: BorrowedFd<'_>, message: &mut [u8]) -> Result<(usize, Option<Fd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(message)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received.map_err(|_| Failure::Broken)?,
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last().map(Fd::new);
        }
    }
    Ok((received.bytes, fd))
}

fn connect(path: &CStr) -> rustix::io::Result<Fd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = Fd::new(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?);
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    // The agent asks for the sender of each message; this covers the first ones too.
    rustix::net::sockopt::set_socket_passcred(&socket, true)?;
    Ok(socket)
}
