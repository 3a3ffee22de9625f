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
//! A connection is one context, which ends with the [`Client`] and does not survive fork or exec; or it joins the context of
//! the allocator library ([`Client::of_process`]). Calls block until the agent has answered; a [`Job`] may also be asked,
//! awaited or followed by an event loop ([`Events`]). Everything may be used by several threads.

mod arena;
mod connection;
mod job;
mod mirror;
mod readiness;
mod remedy;
mod session;
mod vm;

pub use arena::Arena;
pub use job::{Job, JobError};
pub use mirror::{Mirror, Window};
pub use readiness::Events;
pub use session::{SOCKET_NAME, Session};
pub use virtio_gpu_svm::protocol::request::FencePoint;
pub use vm::{Submission, Vm, VmState, packet};

use crate::message::{
    DEFAULT_SOCKET, DEVICES, DeviceEntry, HELLO, Hello, HelloReply, MESSAGE_VERSION, Reached,
};
use connection::{Connection, parsed};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virtio_gpu_svm::protocol::errno;
use zerocopy::{FromBytes, IntoBytes};

/// Names the agent's socket where it is not [`DEFAULT_SOCKET`].
pub const SOCKET_VARIABLE: &str = "SVM_AGENT_SOCKET";

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
    /// Whoever listens is not trusted with this process' memory.
    #[error(
        "who listens at {path} is user {uid}, neither root nor this program's own user: name the socket of `svm-agent serve`"
    )]
    NotTheAgent {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The program runs without the allocator library.
    #[error(
        "this program's memory is not in arenas: start it by `svm-agent run`, or with LD_PRELOAD=libsvm_alloc.so, where an agent listens"
    )]
    NoAllocator,
    /// The connection broke, and the context with it.
    #[error("the agent hung up, this context is gone: connect again")]
    HungUp,
    /// The socket failed.
    #[error("the connection to the agent failed")]
    Socket(#[source] io::Error),
    /// The agent refused.
    #[error("{what}: {} ({})", errno::name(*.status), advice(what, *.status, *.limit))]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Negative errno.
        status: i32,
        /// Index of the operation that it is about, where there are several.
        detail: u32,
        /// The limit that is reached.
        limit: Option<Reached>,
    },
    /// The agent sent something else than was agreed.
    #[error("the agent's reply to {what} is not understood: is it another version?")]
    BadReply {
        /// What was asked.
        what: &'static str,
    },
    /// The agent made memory, and this process has no descriptor free to take it by.
    #[error("no descriptor is free to take an arena by (EMFILE): raise the limit of open files (ulimit -n)")]
    NoDescriptor,
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
    /// This process was forked from the one that connected.
    #[error("this connection is the parent process': connect again after a fork")]
    Forked,
    /// No such device.
    #[error("this guest has no device {dev_id}: `svm-agent status` lists those that it has")]
    NoDevice {
        /// As it was asked for.
        dev_id: u32,
    },
    /// No device can mirror.
    #[error(
        "this guest has no device that can mirror a process: bind arenas, or have the operator of the host grant one with faults"
    )]
    NothingToMirrorOn,
    /// The device cannot follow a process' memory.
    #[error("{device} has no page faults, so it cannot mirror a process: bind each arena with bind_userptr")]
    NoFaults {
        /// Its name.
        device: String,
    },
    /// The process' memory stands too far apart, or is too much.
    #[error(
        "{device} has {va_bits} address bits, which {used:#x} bytes of arenas and what comes next do not fit at the addresses where they stand: bind the arenas that it needs with bind_userptr, or take a device with more bits"
    )]
    DoesNotFit {
        /// Its name.
        device: String,
        /// GPU addresses are below `1 << va_bits`.
        va_bits: u32,
        /// Bytes of arenas.
        used: u64,
    },
    /// A pointer that a mirror does not show.
    #[error(
        "{device} does not see address {address:#x}: it came after the mirror was made, beyond its windows. End the mirror and make it again"
    )]
    OutOfReach {
        /// The address.
        address: u64,
        /// The device's name.
        device: String,
    },
    /// It cannot be told where this process has memory.
    #[error("cannot read /proc/self/maps: mount /proc")]
    Maps(#[source] io::Error),
    /// A job ended with an error.
    #[error(transparent)]
    Job(#[from] JobError),
}

/// Result of the library.
pub type Result<T> = std::result::Result<T, Error>;

/// What to do about a refusal, with the limit that it is about.
fn advice(what: &str, status: i32, limit: Option<Reached>) -> String {
    limit.map_or_else(|| hint(what, -status).to_owned(), |limit| limit.to_string())
}

/// What to do about a refusal.
fn hint(what: &str, errno: i32) -> &'static str {
    match (what, errno) {
        ("HELLO", errno::EACCES) => {
            "svm-agent may not look at this process' memory (/proc/PID/pagemap): have it run as root with CAP_SYS_PTRACE, and with a /proc that hides no process (hidepid)"
        }
        ("HELLO", errno::EBUSY) => {
            "another part of this process has joined its context, which one at a time can: use that one's handle, or have it closed first"
        }
        ("HELLO", errno::ENOENT) => {
            "the context that libsvm_alloc.so opened for this process is gone, as when the agent was started anew: start the program again"
        }
        ("HELLO", errno::ENOSPC) => {
            "the host or the agent has as many contexts as it may have: end a program that uses GPUs, or ask the operator for more"
        }
        ("HELLO", errno::EPIPE) => "the agent has no device at the moment: connect again in a while",
        ("HELLO", errno::EOPNOTSUPP) => {
            "this library and the agent are of different versions: install both from one"
        }
        ("VM_CREATE", errno::EEXIST) => {
            "this process has a mirror or a GPU VM on that device already: use that one, or end it first"
        }
        (_, errno::EINVAL) => {
            "an address, length or flag is not allowed; addresses and lengths are whole pages"
        }
        (_, errno::ENOENT) => "no such object in this context",
        (_, errno::EEXIST) => "it is there already, or overlaps what is there; choose another range",
        (_, errno::ENOSPC) => "a quota is used up; free something or ask the operator for more",
        (_, errno::ENOMEM) => "the guest has not enough memory to pin, or the device none for its tables",
        (_, errno::EBUSY) => "a mirror window has pages there; free or move that CPU memory first",
        (_, errno::EPIPE) => "the GPU VM or the context is dead; make a new one",
        (_, errno::EACCES) => "this process has no right to it",
        (_, errno::EOPNOTSUPP) => "the device or agent cannot do this",
        _ => "see the protocol's list of errors",
    }
}

/// A connection to the agent: one context, with its own address space on every device.
#[derive(Clone, Debug)]
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
    /// Where an agent listens: what `SVM_AGENT_SOCKET` names, or [`DEFAULT_SOCKET`]. A program with more rights than
    /// whoever started it (setuid) does not look at the variable.
    pub fn default_socket() -> PathBuf {
        let named = if session::is_secure() { None } else { std::env::var_os(SOCKET_VARIABLE) };
        named.map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
    }

    /// Connects and opens a context.
    ///
    /// # Errors
    /// [`Error::NotReachable`] where no agent listens, [`Error::NotTheAgent`] where somebody else does; or what it says.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::open(path.as_ref(), 0)
    }

    /// Joins the context in which the allocator library (svm-alloc) has this process' memory: from here on what malloc
    /// gives, globals and the stacks of threads are arenas, and [`Self::mirror`] is all that plain pointers need. A forked
    /// child has a context of its own to join.
    ///
    /// The first call of a process brings what memory it has by then into reach, at the same addresses: other threads
    /// stand still meanwhile, and calls of theirs that the handler of any signal ends (poll, nanosleep, sem_timedwait) end
    /// with EINTR. Nothing may be under way that goes by pages and not by addresses (O_DIRECT, operations of an io_uring,
    /// vmsplice), and what is registered by pages before (buffers of an io_uring, RDMA) goes on with the old ones.
    ///
    /// # Errors
    /// [`Error::NoAllocator`] where the library is not loaded or has no agent; what the agent says, EBUSY if another part
    /// of the program has joined.
    pub fn of_process() -> Result<Self> {
        let session = Session::of_process().ok_or(Error::NoAllocator)?;
        Self::open(session.path(), session.ctx_id)
    }

    fn open(path: &Path, join: u32) -> Result<Self> {
        let connection = Connection::open(path, join != 0)?;
        let hello = Hello { version: MESSAGE_VERSION.into(), join: join.into() };
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

    /// This process' memory on a device, at its own addresses where the device has room for them: a pointer means the same
    /// on both sides then, and no call is needed for each. On a device with fewer address bits it is shown elsewhere, and
    /// [`Mirror::device_address`] says where. What is no arena stays out of reach.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::NoFaults`] or [`Error::DoesNotFit`] where the device cannot, what it says, EEXIST where
    /// the context has a GPU VM there.
    pub fn mirror(&self, dev_id: u32) -> Result<Mirror> {
        let device = self.devices()?.into_iter().find(|device| device.dev_id == dev_id);
        Mirror::create(self, device.ok_or(Error::NoDevice { dev_id })?)
    }

    /// This process' memory on every device that can mirror it, in the order of their ids: all, or none and an error.
    /// Devices without page faults are left out.
    ///
    /// # Errors
    /// [`Error::NothingToMirrorOn`] where there is none; as [`Self::mirror`].
    pub fn mirror_all(&self) -> Result<Vec<Mirror>> {
        let mut mirrors: Vec<Mirror> = Vec::new();
        for device in self.devices()?.into_iter().filter(mirror::can_mirror) {
            match Mirror::create(self, device) {
                Ok(mirror) => mirrors.push(mirror),
                Err(error) => {
                    // The first error is the one that matters; what is left ends with the context.
                    mirrors.into_iter().for_each(|mirror| drop(mirror.end()));
                    return Err(error);
                }
            }
        }
        if mirrors.is_empty() { Err(Error::NothingToMirrorOn) } else { Ok(mirrors) }
    }

    /// What an event loop waits for, so that no call has to block: see [`Events`].
    ///
    /// # Errors
    /// When descriptors are used up.
    pub fn events(&self) -> Result<Events> {
        Events::new(&self.connection)
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
