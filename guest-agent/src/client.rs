//! The library for programs: share memory with GPUs by plain pointers.
//!
//! ```no_run
//! use guest_agent::client::Client;
//! use guest_agent::message::DEFAULT_SOCKET;
//! # fn main() -> Result<(), guest_agent::client::Error> {
//! let client = Client::connect(DEFAULT_SOCKET)?;
//! let mut arena = client.arena(1 << 20, None)?;
//! let vm = client.vm(0)?;
//! vm.bind_userptr(0x4000_0000, arena.address(), arena.len() as u64, 0)?;
//! # Ok(())
//! # }
//! ```
//!
//! Owns the connection to the agent and the matching of replies and job records to those who wait for them: of several
//! threads that wait, one reads and hands out. All calls block. A connection is one context; it ends with the
//! [`Client`], and does not survive fork or exec.

mod arena;
mod job;
mod vm;

pub use arena::Arena;
pub use job::{Job, JobError};
pub use virtio_gpu_svm::protocol::request::FencePoint;
pub use vm::{Submission, Vm, VmState, packet};

use crate::message::{
    self, ARENA_CREATE, ARENA_FREE, ArenaCreate, ArenaFree, ArenaReply, DEVICES, DeviceEntry, HELLO, Head,
    Hello, HelloReply, MAX_MESSAGE_BYTES, MESSAGE_VERSION, SUBMIT, Submit, SubmitReply,
};
use crate::socket::{MessageSocket, Received};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{
    EVENT_BIND_DONE, EVENT_CONTEXT_LOST, EVENT_JOB_DONE, EVENT_RECORD_BYTES, JobRecord, NoticeRecord,
};
use virtio_gpu_svm::protocol::limit::Limit;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Why a call failed, in words that say what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No agent listens.
    #[error("no agent listens at {path}: start `svm-agent serve` as root, or name its socket")]
    NotReachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The connection broke, and the context with it.
    #[error("the agent hung up, this context is gone: connect again")]
    HungUp,
    /// The socket failed.
    #[error("the connection to the agent failed")]
    Socket(#[source] io::Error),
    /// The agent refused.
    #[error("{what}: {} ({})", errno::name(*.status), advice(*.status, *.limit))]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Negative errno.
        status: i32,
        /// Index of the operation that it is about, where there are several.
        detail: u32,
        /// The limit that is reached.
        limit: Option<Limit>,
    },
    /// The agent sent something else than was agreed.
    #[error("the agent's reply to {what} is not understood: is it another version?")]
    BadReply {
        /// What was asked.
        what: &'static str,
    },
    /// The address range is occupied, or the kernel has no room.
    #[error("cannot map {len:#x} bytes at {at:#x}: something else is there; choose another address")]
    Map {
        /// Wanted address; 0 for any.
        at: usize,
        /// Bytes.
        len: usize,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The context was lost.
    #[error("the device has dropped this context ({}): connect again", errno::name(*.status))]
    Lost {
        /// Negative errno.
        status: i32,
    },
    /// A job ended with an error.
    #[error(transparent)]
    Job(#[from] JobError),
}

/// Result of the library.
pub type Result<T> = std::result::Result<T, Error>;

/// What to do about a refusal, with the limit that it is about.
fn advice(status: i32, limit: Option<Limit>) -> String {
    match limit {
        Some(limit) if limit.is_configured() => format!(
            "the {}'s limit of {limit} is reached: raise limits.{limit} in svmd.toml, or free some",
            limit.scope()
        ),
        Some(limit) => format!("the {}'s limit of {limit} is reached: free some", limit.scope()),
        None => hint(status).to_owned(),
    }
}

/// What to do about a refusal.
fn hint(status: i32) -> &'static str {
    match -status {
        errno::EINVAL => "an address, length or flag is not allowed; addresses and lengths are whole pages",
        errno::ENOENT => "no such object in this context",
        errno::EEXIST => "it is there already, or overlaps what is there; choose another range",
        errno::ENOSPC => "a quota is used up; free something or ask the operator for more",
        errno::ENOMEM => "the guest has not enough memory to pin, or the device none for its tables",
        errno::EBUSY => "a mirror window has pages there; free or move that CPU memory first",
        errno::EPIPE => "the GPU VM or the context is dead; make a new one",
        errno::EACCES => "this process has no right to it",
        errno::EOPNOTSUPP => "the device or agent cannot do this",
        _ => "see the protocol's list of errors",
    }
}

/// What became of a payload.
struct SubmitStatus {
    status: i32,
    detail: u32,
    limit: Option<Limit>,
}

/// A message from the agent that was waited for.
struct Reply {
    status: i32,
    body: Vec<u8>,
    fd: Option<OwnedFd>,
}

#[derive(Default)]
struct Inbox {
    /// A thread is reading on everybody's behalf.
    reading: bool,
    /// Replies that nobody has taken yet, by the request's number.
    replies: HashMap<u32, Reply>,
    jobs: HashMap<u64, JobRecord>,
    /// Jobs whose end nobody will ask for.
    forgotten: HashSet<u64>,
    /// Why the context is lost: negative errno.
    lost: Option<i32>,
    hung_up: bool,
}

/// What the parts of a client share.
struct Connection {
    socket: MessageSocket,
    /// Held while a request is sent and until its reply is there: the agent takes one at a time.
    sending: Mutex<u32>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
}

/// A connection to the agent: one context, with its own address space on every device.
#[derive(Clone)]
pub struct Client {
    connection: Arc<Connection>,
    hello: HelloReply,
}

/// A host device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Names it in [`Client::vm`].
    pub dev_id: u32,
    /// For people.
    pub name: String,
    /// GPU addresses are below `1 << va_bits`.
    pub va_bits: u32,
    /// 0 replayable, 1 resolved by the host kernel, 2 none.
    pub fault_model: u32,
    /// 0 any, 1 identity only.
    pub address_model: u32,
    /// Bit n: packet opcode n is executed.
    pub opcodes: u64,
    /// Engines.
    pub num_engines: u32,
    /// `DEVICE_*` of PROTOCOL 4.2.
    pub flags: u64,
}

impl Client {
    /// Connects and opens a context.
    ///
    /// # Errors
    /// [`Error::NotReachable`] where no agent listens, or what it says.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let not_reachable = |source| Error::NotReachable { path: path.to_owned(), source };
        let socket = MessageSocket::connect(path).map_err(not_reachable)?;
        // The agent asks for the sender of each message; this covers the first ones too.
        socket.pass_credentials().map_err(Error::Socket)?;
        let connection = Arc::new(Connection {
            socket,
            sending: Mutex::new(0),
            inbox: Mutex::new(Inbox::default()),
            arrived: Condvar::new(),
        });
        let hello = Hello { version: MESSAGE_VERSION.into(), reserved: 0.into() };
        let reply = connection.ask("HELLO", HELLO, &[hello.as_bytes()])?;
        let hello = parsed("HELLO", &reply.body)?;
        Ok(Self { connection, hello })
    }

    /// The context's number in this guest, for people and logs.
    pub fn ctx_id(&self) -> u32 {
        self.hello.ctx_id.get()
    }

    /// Bytes of arenas that this process may have.
    pub fn max_arena_bytes(&self) -> u64 {
        self.hello.max_arena_bytes.get()
    }

    /// Host devices.
    ///
    /// # Errors
    /// When the agent hangs up.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let reply = self.connection.ask("DEVICES", DEVICES, &[])?;
        let entries =
            <[DeviceEntry]>::ref_from_bytes(&reply.body).map_err(|_| Error::BadReply { what: "DEVICES" });
        match entries {
            Ok(entries) => Ok(entries.iter().map(device).collect()),
            // The body may stand anywhere in memory; entries are bytes, so only its length can be wrong.
            Err(error) => Err(error),
        }
    }

    /// Memory that both this process and GPUs reach, mapped at `at`, or where the kernel likes. Zeroed. `len` is rounded
    /// up to whole pages.
    ///
    /// # Errors
    /// [`Error::Map`] when something else is at the address; what the agent says.
    pub fn arena(&self, len: usize, at: Option<usize>) -> Result<Arena> {
        Arena::create(&self.connection, len, at)
    }

    /// As [`Self::arena`], but registered at the guest address `as_if_at` while it is mapped elsewhere: lets one program
    /// play several processes that all use the same addresses.
    ///
    /// # Errors
    /// As [`Self::arena`].
    pub fn arena_as_if_at(&self, len: usize, as_if_at: u64) -> Result<Arena> {
        Arena::create_as_if_at(&self.connection, len, as_if_at)
    }

    /// Creates this context's GPU VM on a device.
    ///
    /// # Errors
    /// What the device says.
    pub fn vm(&self, dev_id: u32) -> Result<Vm> {
        Vm::create(&self.connection, dev_id)
    }

    /// Sends a raw SUBMIT_3D payload (PROTOCOL 5): the status, its detail, and the reply area.
    ///
    /// # Errors
    /// When the agent hangs up.
    pub fn submit(&self, payload: &[u8], reply_len: u32) -> Result<(i32, u32, Vec<u8>)> {
        let (told, area) = self.connection.submit(&[payload], reply_len)?;
        Ok((told.status, told.detail, area))
    }
}

fn device(entry: &DeviceEntry) -> Device {
    let name: Vec<u8> = entry.name.iter().copied().take_while(|&byte| byte != 0).collect();
    Device {
        dev_id: entry.dev_id.get(),
        name: String::from_utf8_lossy(&name).into_owned(),
        va_bits: entry.va_bits.get(),
        fault_model: entry.fault_model.get(),
        address_model: entry.address_model.get(),
        opcodes: entry.opcodes.get(),
        num_engines: entry.num_engines.get(),
        flags: entry.flags.get(),
    }
}

impl Connection {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request and its reply; a refusal is an error.
    fn ask(&self, what: &'static str, kind: u32, body: &[&[u8]]) -> Result<Reply> {
        let reply = self.exchange(what, kind, body)?;
        if reply.status == 0 {
            Ok(reply)
        } else {
            Err(Error::Refused { what, status: reply.status, detail: 0, limit: None })
        }
    }

    fn exchange(&self, what: &'static str, kind: u32, body: &[&[u8]]) -> Result<Reply> {
        let mut last = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        *last = last.wrapping_add(1);
        let seqno = *last;
        let head = Head { kind: kind.into(), seqno: seqno.into(), status: 0.into(), reserved: 0.into() };
        let mut parts = vec![head.as_bytes()];
        parts.extend_from_slice(body);
        match self.socket.send(&parts, &[], true) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(self.ended()),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Err(Error::Refused { what, status: -errno::ENOBUFS, detail: 0, limit: None });
            }
            Err(error) => return Err(Error::Socket(error)),
        }
        self.wait_for(|inbox| inbox.replies.remove(&seqno))
    }

    fn submit(&self, payload: &[&[u8]], reply_len: u32) -> Result<(SubmitStatus, Vec<u8>)> {
        let submit = Submit { reply_len: reply_len.into(), reserved: 0.into() };
        let mut body = vec![submit.as_bytes()];
        body.extend_from_slice(payload);
        let reply = self.exchange("SUBMIT", SUBMIT, &body)?;
        match SubmitReply::read_from_prefix(&reply.body) {
            Ok((head, area)) => {
                let (detail, limit) = (head.detail.get().into(), Limit::from_wire(head.limit.get()));
                Ok((SubmitStatus { status: reply.status, detail, limit }, area.to_vec()))
            }
            // The agent itself refused, before the device was asked.
            Err(_) if reply.status != 0 => {
                Ok((SubmitStatus { status: reply.status, detail: 0, limit: None }, Vec::new()))
            }
            Err(_) => Err(Error::BadReply { what: "SUBMIT" }),
        }
    }

    /// The error of a connection that has ended.
    fn ended(&self) -> Error {
        self.inbox().lost.map_or(Error::HungUp, |status| Error::Lost { status })
    }

    /// Waits until `take` finds what it wants. One waiting thread reads the socket for all.
    fn wait_for<T>(&self, mut take: impl FnMut(&mut Inbox) -> Option<T>) -> Result<T> {
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = take(&mut inbox) {
                return Ok(found);
            }
            if inbox.hung_up {
                drop(inbox);
                return Err(self.ended());
            }
            if inbox.reading {
                inbox = self.arrived.wait(inbox).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            inbox.reading = true;
            drop(inbox);
            let mut buf = vec![0; MAX_MESSAGE_BYTES];
            let received = self.socket.receive(&mut buf, true);
            inbox = self.inbox();
            inbox.reading = false;
            inbox.on_received(received, &buf);
            self.arrived.notify_all();
        }
    }

    fn create_arena(&self, len: u64, va: u64) -> Result<(ArenaReply, OwnedFd)> {
        let request = ArenaCreate { len: len.into(), va: va.into() };
        let reply = self.ask("ARENA_CREATE", ARENA_CREATE, &[request.as_bytes()])?;
        let fd = reply.fd.ok_or(Error::BadReply { what: "ARENA_CREATE" })?;
        Ok((parsed("ARENA_CREATE", &reply.body)?, fd))
    }

    fn free_arena(&self, arena_id: u64) -> Result<()> {
        let request = ArenaFree { arena_id: arena_id.into() };
        self.ask("ARENA_FREE", ARENA_FREE, &[request.as_bytes()]).map(|_| ())
    }
}

impl Inbox {
    fn on_received(&mut self, received: io::Result<Received>, buf: &[u8]) {
        let Ok(mut received) = received else {
            self.hung_up = true;
            return;
        };
        let message = buf.get(..received.len).unwrap_or_default();
        let Ok((head, body)) = Head::read_from_prefix(message) else {
            self.hung_up = true;
            return;
        };
        if head.kind.get() == message::EVENTS {
            for record in body.chunks_exact(EVENT_RECORD_BYTES) {
                self.on_record(record);
            }
            return;
        }
        let reply = Reply { status: head.status.get(), body: body.to_vec(), fd: received.fds.pop() };
        self.replies.insert(head.seqno.get(), reply);
    }

    fn on_record(&mut self, record: &[u8]) {
        let Ok(notice) = NoticeRecord::read_from_bytes(record) else { return };
        match notice.kind.get() {
            EVENT_JOB_DONE | EVENT_BIND_DONE => {
                if let Ok(job) = JobRecord::read_from_bytes(record)
                    && !self.forgotten.remove(&job.job_id.get())
                {
                    self.jobs.insert(job.job_id.get(), job);
                }
            }
            // Of a GPU VM that became unusable the ends of its work tell, and the others go on.
            EVENT_CONTEXT_LOST if notice.value.get() == 0 => self.lost = Some(notice.status.get()),
            // Kinds of later versions.
            _ => {}
        }
    }
}

fn parsed<T: FromBytes + Immutable + KnownLayout>(what: &'static str, body: &[u8]) -> Result<T> {
    T::read_from_bytes(body).map_err(|_| Error::BadReply { what })
}
