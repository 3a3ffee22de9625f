//! Messages between a process and the agent, over a `SOCK_SEQPACKET` socket: one message a packet.
//!
//! A process sends requests, each opening with [`Head`], and gets one reply to each, in order, with the request's `kind`
//! and `seqno`. Records ([`EVENTS`]) are pushed in between. A SUBMIT's payload is passed to the device as it is; it
//! cannot hold guest-physical addresses, and neither can anything else here.
//!
//! A refusal is a reply whose status is not 0. Where a limit is reached (-ENOSPC) its body is [`Refusal`], which names the
//! limit; other refusals have no body.

use std::fmt;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::wire;
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the agent listens for processes.
pub const DEFAULT_SOCKET: &str = "/run/svm-agent.sock";
/// Where the agent listens for its operator.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/svm-agent-admin.sock";

/// Version of these messages; another one is not compatible.
pub const MESSAGE_VERSION: u32 = 1;
/// Most bytes of a message, either way. Fits the largest VM_BIND, and the default socket buffer.
pub const MAX_MESSAGE_BYTES: usize = 204_800;
/// Most bytes of a SUBMIT's reply area.
pub const MAX_REPLY_BYTES: u32 = 32 << 10;
/// Most records in one [`EVENTS`] message.
pub const MAX_RECORDS: usize = 128;

/// Opens a connection's context, or joins one. Body: [`Hello`]; reply: [`HelloReply`].
///
/// -EOPNOTSUPP: another version; -EACCES: the agent may not look at the process' memory (`/proc/PID/pagemap`), without
/// which it would not see the process execute another program. After both, and after whatever is no message, the
/// connection ends.
pub const HELLO: u32 = 1;
/// Lists host devices. No body; reply: [`DeviceEntry`] each.
pub const DEVICES: u32 = 2;
/// Creates memory that the GPU can reach. Body: [`ArenaCreate`]; reply: [`ArenaReply`] and a file descriptor.
pub const ARENA_CREATE: u32 = 3;
/// Gives it back. Body: [`ArenaFree`]; no reply body.
pub const ARENA_FREE: u32 = 4;
/// Passes requests to the device. Body: [`Submit`], then the payload; reply: [`SubmitReply`], then the reply area.
pub const SUBMIT: u32 = 5;
/// Makes memory of the process' own that GPUs can reach: a file in memory, whose descriptor, and no other, comes with the
/// message (SCM_RIGHTS). Body: [`ArenaImport`]; reply: [`ArenaReply`] with the offset of the request, and no descriptor.
///
/// The file is one of tmpfs (memfd, POSIX shared memory) or of hugetlbfs: any other is -EOPNOTSUPP, because pages of a
/// disk or of a server may be written back or waited for. The descriptor is open for reading and writing (-EACCES), and
/// a seal against writing is -EPERM. The range is in the file, in whole pages, on hugetlbfs in whole huge pages: -EINVAL,
/// or -EFAULT where the file has become too short. -EAGAIN: pages of it were taken out of the file meanwhile.
///
/// Pages that the file does not have yet it gets, and all of the range stays in memory until the arena is gone. Who cuts
/// the file short or punches a hole leaves GPUs with the pages that were there, and itself with others. Several processes
/// may bring the same file, and so share memory through GPUs too.
pub const ARENA_IMPORT: u32 = 6;
/// Takes a part of it away from GPUs. Body: [`ArenaCut`]; no reply body. The reply says that no GPU uses the part any
/// more, and that its addresses are free for another arena; its pages stay in memory, and count, until nothing of its
/// arena is left. Then it is as after [`ARENA_FREE`]. -EINVAL: unaligned, empty or not all of it in the arena;
/// -ENOENT: no such arena, or a part of the range was cut before; -ENOSPC: the context's arenas are in too many parts.
pub const ARENA_CUT: u32 = 7;
/// Makes anonymous memory of the process memory that GPUs can reach, where it stands. Only for processes of users that
/// the operator trusts: else -EACCES. Body: [`ArenaPin`]; reply: [`ArenaReply`] with offset 0, and no descriptor.
///
/// The process has registered all of the range as buffers of an io_uring, which pins it, and names that io_uring; the
/// agent takes a descriptor of it, so the pages stay when the process closes its own, or ends. -EBADF: no such
/// descriptor; -EINVAL: it is no io_uring, or the range is unaligned; -EFAULT: not all of the range is registered and in
/// memory; -EAGAIN: the io_uring is in use just now.
///
/// **Trust** is needed because the agent cannot see which pages are registered, only which stand there now. A process that
/// maps something else there after it registered, or that takes the registration back before the reply to [`ARENA_FREE`],
/// has GPUs write to memory that is anybody's.
pub const ARENA_PIN: u32 = 8;
/// In [`HelloReply`]: the process is trusted, so it may send [`ARENA_PIN`].
pub const HELLO_TRUSTED: u32 = 1;
/// Pushed: records of 96 bytes (PROTOCOL 7), of this context.
pub const EVENTS: u32 = 0x100;

wire! {
    /// Opens every message.
    Head, 16 {
        /// [`HELLO`] to [`EVENTS`].
        kind: U32,
        /// The request's number, chosen by the process.
        seqno: U32,
        /// 0 or a negative errno; 0 in a request.
        status: I32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// Body of a reply with -ENOSPC; SUBMIT's is [`SubmitReply`].
    Refusal, 8 {
        /// [`Reached::to_wire`].
        limit: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// Body of [`HELLO`].
    Hello, 8 {
        /// [`MESSAGE_VERSION`].
        version: U32,
        /// 0: a context of its own. Else the context that another connection of the same process opened: from now on its
        /// records come here. It ends with the connection that opened it, and one connection at a time may join: -EBUSY.
        /// -ENOENT: this process has no such context.
        join: U32,
    }
}
wire! {
    /// Reply to [`HELLO`].
    HelloReply, 24 {
        /// The connection's context, for people.
        ctx_id: U32,
        /// Host devices.
        num_devices: U32,
        /// Bytes of arenas that the process may have.
        max_arena_bytes: U64,
        /// [`HELLO_TRUSTED`]; other bits are zero.
        flags: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// A host device.
    DeviceEntry, 72 {
        /// Names it in VM_CREATE.
        dev_id: U32,
        /// GPU addresses are below `1 << va_bits`.
        va_bits: U32,
        /// 0 replayable, 1 resolved by the host kernel, 2 none.
        fault_model: U32,
        /// 0 any, 1 identity only.
        address_model: U32,
        /// Bit n: packet opcode n is executed.
        opcodes: U64,
        /// UTF-8, zero padded.
        name: [u8; 32],
        /// Engines.
        num_engines: U32,
        /// log2 of the smallest page.
        page_shift: U32,
        /// `DEVICE_*` of PROTOCOL 4.2.
        flags: U64,
    }
}
wire! {
    /// Body of [`ARENA_CREATE`].
    ArenaCreate, 16 {
        /// Bytes, a multiple of the page size.
        len: U64,
        /// Where the process has it in its address space (A), page aligned.
        va: U64,
    }
}
wire! {
    /// Reply to [`ARENA_CREATE`], with a file descriptor, and to [`ARENA_IMPORT`] and [`ARENA_PIN`], without.
    ArenaReply, 16 {
        /// Names it in [`ARENA_FREE`] and [`ARENA_CUT`].
        arena_id: U64,
        /// Offset of the memory in the file.
        offset: U64,
    }
}
wire! {
    /// Body of [`ARENA_IMPORT`]. The file comes with the message, open for reading and writing.
    ArenaImport, 24 {
        /// Bytes, a multiple of the page size.
        len: U64,
        /// Where the process has it in its address space (A), page aligned.
        va: U64,
        /// Where it begins in the file, page aligned.
        offset: U64,
    }
}
wire! {
    /// Body of [`ARENA_PIN`].
    ArenaPin, 24 {
        /// First address (A), page aligned.
        va: U64,
        /// Bytes, a multiple of the page size.
        len: U64,
        /// The descriptor of the io_uring, as the process names it.
        ring: I32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// Body of [`ARENA_FREE`].
    ArenaFree, 8 {
        /// From the reply.
        arena_id: U64,
    }
}
wire! {
    /// Body of [`ARENA_CUT`].
    ArenaCut, 24 {
        /// From the reply.
        arena_id: U64,
        /// Where the part begins, from the arena's beginning, page aligned.
        offset: U64,
        /// Bytes, a multiple of the page size.
        len: U64,
    }
}
wire! {
    /// Body of [`SUBMIT`]; the payload follows (PROTOCOL 5).
    Submit, 8 {
        /// Bytes of the reply area.
        reply_len: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// Reply to [`SUBMIT`]; the reply area follows.
    SubmitReply, 8 {
        /// Index of the request that the status is about.
        detail: U16,
        /// The limit that -ENOSPC is about (PROTOCOL 9); else 0.
        limit: U16,
        /// Zero.
        reserved: U32,
    }
}

/// A limit of the agent's own, on processes of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AgentLimit {
    /// Bytes of arenas of one process.
    ProcessMemory = 1,
    /// Bytes of arenas of a user's processes.
    UserMemory = 2,
    /// Bytes of arenas in all.
    TotalMemory = 3,
    /// Arenas of one process.
    Arenas = 4,
    /// Parts that the arenas of one process are in.
    Parts = 5,
    /// Connections at once.
    Clients = 6,
    /// Connections of one user at once.
    UserClients = 7,
    /// Arenas of a user's processes.
    UserArenas = 8,
    /// Arenas in all.
    TotalArenas = 9,
    /// Numbers of contexts.
    Contexts = 10,
}

impl AgentLimit {
    /// All, by number.
    pub const ALL: [Self; 10] = [
        Self::ProcessMemory,
        Self::UserMemory,
        Self::TotalMemory,
        Self::Arenas,
        Self::Parts,
        Self::Clients,
        Self::UserClients,
        Self::UserArenas,
        Self::TotalArenas,
        Self::Contexts,
    ];

    /// What is limited, and what to do.
    pub fn advice(self) -> &'static str {
        match self {
            Self::ProcessMemory => {
                "the agent's limit of memory for one process is reached: free some, or have --process-memory of `svm-agent serve` raised"
            }
            Self::UserMemory => {
                "the agent's limit of memory for all processes of one user is reached: free some or end another one of them, or have --user-memory of `svm-agent serve` raised"
            }
            Self::TotalMemory => {
                "the agent's limit of memory for all processes is reached: free some or end one of them, or have --total-memory of `svm-agent serve` raised"
            }
            Self::Arenas => {
                "the agent's limit of arenas for one process is reached: map or allocate less often, and more at once"
            }
            Self::Parts => {
                "the agent's limit of parts of arenas for one process is reached: unmap and protect memory less in pieces"
            }
            Self::Clients => {
                "the agent has as many connections as it may have: end a program that uses GPUs, or have --max-clients of `svm-agent serve` raised"
            }
            Self::UserArenas => {
                "the agent's limit of arenas for all processes of one user is reached: end another one of them, or allocate more at once"
            }
            Self::TotalArenas => {
                "the agent's limit of arenas for all processes is reached: end one of them, or allocate more at once"
            }
            Self::Contexts => "all numbers of contexts are in use: end a program that uses GPUs",
            Self::UserClients => {
                "this user has as many connections to the agent as one may have: end a program of this user's that uses GPUs, or have --max-clients-per-user of `svm-agent serve` raised"
            }
        }
    }
}

/// The limit that a refusal is about: its text says whose it is and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// One of the host's (PROTOCOL 9).
    Host(Limit),
    /// One of the agent's.
    Agent(AgentLimit),
}

/// Numbers of the host's limits are below this one.
const AGENT_LIMITS: u32 = 1 << 16;

impl Reached {
    /// Its number in [`Refusal`]; 0 is none.
    pub fn to_wire(self) -> u32 {
        match self {
            Self::Host(limit) => limit.to_wire().into(),
            Self::Agent(limit) => AGENT_LIMITS | u32::from(limit as u8),
        }
    }

    /// The limit of a number. `None`: there is none, or it is one of a later version.
    pub fn from_wire(number: u32) -> Option<Self> {
        match u16::try_from(number) {
            Ok(number) => Limit::from_wire(number).map(Self::Host),
            Err(_) => AgentLimit::ALL.into_iter().map(Self::Agent).find(|limit| limit.to_wire() == number),
        }
    }
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(limit) if limit.is_configured() => write!(
                f,
                "the {}'s limit of {limit} is reached: raise limits.{limit} in svmd.toml, or free some",
                limit.scope()
            ),
            Self::Host(limit) => {
                write!(f, "the {}'s limit of {limit} is reached: free some", limit.scope())
            }
            Self::Agent(limit) => f.write_str(limit.advice()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_number_of_its_own() {
        let host = Limit::ALL.into_iter().map(Reached::Host);
        let all: Vec<Reached> = host.chain(AgentLimit::ALL.into_iter().map(Reached::Agent)).collect();
        for limit in all {
            assert_eq!(Reached::from_wire(limit.to_wire()), Some(limit));
        }
        for unknown in [0, 13, AGENT_LIMITS, AGENT_LIMITS + 11, u32::MAX] {
            assert_eq!(Reached::from_wire(unknown), None, "{unknown:#x}");
        }
    }
}
