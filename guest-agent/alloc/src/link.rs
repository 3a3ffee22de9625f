//! The connection to the agent, without allocating: what [`guest_agent::client`] does for programs, as far as memory
//! needs it.
//!
//! One connection, one context; whoever launches jobs joins the context by a connection of its own. So records never
//! come here unless nobody has joined, and are dropped then.

use crate::fd::{Fd, Kept};
use guest_agent::message::{
    ARENA_CREATE, ARENA_CUT, ARENA_FREE, ARENA_IMPORT, ARENA_PIN, ArenaCreate, ArenaCut, ArenaFree,
    ArenaImport, ArenaPin, ArenaReply, EVENTS, HELLO, HELLO_TRUSTED, Head, Hello, HelloReply,
    MESSAGE_VERSION, Reached, Refusal,
};
use guest_agent::socket::peer_credentials;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::{Gid, Pid, Uid, geteuid, getgid, getpid, getuid};
use std::ffi::CStr;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How long the agent may take for anything that it is asked. All of the process' allocations wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(90);
/// Longest message of ours; and of a reply as far as it is looked at.
const MESSAGE: usize = 64;

/// Why the agent did not do it.
pub enum Failure {
    /// No agent listens.
    NotReachable(Errno),
    /// Somebody else does: a user who is not trusted with this process' memory.
    NotTheAgent(u32),
    /// The connection broke, or the program has closed it.
    Broken,
    /// Nothing came for [`PATIENCE`].
    Silent,
    /// The process runs under another user than when it connected, and the agent hangs up on such.
    OtherUser,
    /// The agent made memory, and the process has no descriptor free to take it by.
    NoDescriptor,
    /// The agent said no: negative errno, and the limit that is reached if that is why.
    Refused { status: i32, limit: Option<Reached> },
    /// Something else came than was agreed.
    NotUnderstood,
}

impl Failure {
    /// Whether there is no use in asking again.
    pub fn is_final(&self) -> bool {
        match self {
            Self::NoDescriptor => false,
            Self::Refused { status, .. } => *status == -errno::EPIPE,
            _ => true,
        }
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
            Self::NotTheAgent(uid) => write!(
                f,
                "who listens there is user {uid}, neither root nor this program's own user: name the socket of `svm-agent serve` in SVM_AGENT_SOCKET"
            ),
            Self::Silent => write!(
                f,
                "the agent has not answered for {} s: see its messages, and start the program again",
                PATIENCE.as_secs()
            ),
            Self::OtherUser => f.write_str(
                "this process has changed its user or group, which ends its context: start it as that user, or have it execute itself again after the change",
            ),
            Self::NoDescriptor => {
                f.write_str("no descriptor is free to take memory by (EMFILE): raise the limit of open files (`ulimit -n`)")
            }
            Self::Refused { status, limit: Some(limit) } => {
                write!(f, "{limit} ({})", errno::name(*status))
            }
            // Of an agent that does not say which.
            Self::Refused { status, .. } if *status == -errno::ENOSPC => f.write_str(
                "a limit of the agent or the host is reached (ENOSPC): see `svm-agent serve --help` (--process-memory, --user-memory, --max-clients), or use less",
            ),
            Self::Refused { status, .. } if *status == -errno::ENOMEM => {
                f.write_str("the guest has no memory left to pin (ENOMEM): free some, or give the guest more")
            }
            Self::Refused { status, .. } if *status == -errno::EPIPE => f.write_str(
                "the context is lost, or the agent has no device at the moment (EPIPE): start the program again when `svm-agent status` shows one",
            ),
            Self::Refused { status, .. } if *status == -errno::EACCES => f.write_str(
                "the agent may not look at this process' memory (EACCES): have `svm-agent serve` run as root with CAP_SYS_PTRACE, and with a /proc that hides no process (hidepid)",
            ),
            Self::Refused { status, .. } => {
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
    /// Who connected. A child that the library does not know of has no right to it, and would end its parent's context.
    process: Pid,
    /// As the kernel tells the agent with each message.
    user: (Uid, Gid),
}

impl Link {
    /// Connects and opens a context.
    pub fn open(path: &CStr) -> Result<Self> {
        let socket = connect(path)?;
        let socket = Kept::new(socket).map_err(Failure::NotReachable)?;
        let (process, user) = (getpid(), (getuid(), getgid()));
        let mut link =
            Self { socket, seqno: 0, ctx_id: 0, max_arena_bytes: 0, trusted: false, process, user };
        let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
        let (reply, _) = link.ask::<HelloReply>(HELLO, hello.as_bytes(), None)?;
        link.ctx_id = reply.ctx_id.get();
        link.max_arena_bytes = reply.max_arena_bytes.get();
        link.trusted = reply.flags.get() & HELLO_TRUSTED != 0;
        Ok(link)
    }

    /// Whether this process is the one that connected.
    pub fn is_mine(&self) -> bool {
        getpid() == self.process
    }

    /// The context's number in this guest.
    pub fn ctx_id(&self) -> u32 {
        self.ctx_id
    }

    /// Whether the agent has hung up, which a program that asks for nothing does not hear.
    pub fn has_ended(&self) -> bool {
        let socket = self.socket;
        let Some(socket) = socket.get() else { return true };
        let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Only hang-up and errors are told.
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(told) if told > 0)
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
        let id = reply.arena_id.get();
        let Some(fd) = fd else {
            // The kernel drops a descriptor for which the process has no number free.
            self.free(id)?;
            return Err(Failure::NoDescriptor);
        };
        Ok(Made { id, fd, offset: reply.offset.get() })
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
        if (getuid(), getgid()) != self.user {
            return Err(Failure::OtherUser);
        }
        let deadline = Instant::now() + PATIENCE;
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
        in_time(deadline, || rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL))?;
        loop {
            let (len, fd) = receive(socket, &mut message, deadline)?;
            let received = message.get(..len).unwrap_or_default();
            let (head, body) = Head::read_from_prefix(received).map_err(|_| Failure::Broken)?;
            if head.kind.get() == EVENTS {
                if Instant::now() > deadline {
                    return Err(Failure::Silent);
                }
                continue;
            }
            if head.status.get() != 0 {
                let refusal = Refusal::read_from_bytes(body).ok();
                let limit = refusal.and_then(|refusal| Reached::from_wire(refusal.limit.get()));
                return Err(Failure::Refused { status: head.status.get(), limit });
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

/// Calls again what a signal has interrupted, until a deadline; the socket's own time limit ends what nothing interrupts.
fn in_time<T>(deadline: Instant, mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) if Instant::now() < deadline => {}
            Err(Errno::INTR | Errno::AGAIN) => return Err(Failure::Silent),
            done => return done.map_err(|_| Failure::Broken),
        }
    }
}

fn receive(socket: BorrowedFd<'_>, message: &mut [u8], deadline: Instant) -> Result<(usize, Option<Fd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = in_time(deadline, || {
        let mut parts = [IoSliceMut::new(message)];
        rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last().map(Fd::new);
        }
    }
    Ok((received.bytes, fd))
}

fn connect(path: &CStr) -> Result<Fd> {
    let socket = new_socket().map_err(Failure::NotReachable)?;
    let address = SocketAddrUnix::new(path).map_err(Failure::NotReachable)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::INTR) if Instant::now() < deadline => {}
            // Nobody accepts connections.
            Err(Errno::INTR | Errno::AGAIN) => return Err(Failure::Silent),
            Err(error) => return Err(Failure::NotReachable(error)),
        }
    }
    // Whoever answers gives this process its memory.
    let uid = peer_credentials(&socket).map_err(|_| Failure::Broken)?.uid;
    if uid != 0 && uid != geteuid().as_raw() {
        return Err(Failure::NotTheAgent(uid));
    }
    Ok(socket)
}

fn new_socket() -> rustix::io::Result<Fd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = Fd::new(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?);
    // The agent asks for the sender of each message; this covers the first ones too.
    sockopt::set_socket_passcred(&socket, true)?;
    // The time to send bounds the one to connect, too.
    for side in [Timeout::Recv, Timeout::Send] {
        sockopt::set_socket_timeout(&socket, side, Some(PATIENCE))?;
    }
    Ok(socket)
}
