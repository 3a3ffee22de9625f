//! Messages between a process and the agent, over a `SOCK_SEQPACKET` socket: one message a packet.
//!
//! A process sends requests, each opening with [`Head`], and gets one reply to each, in order, with the request's `kind`
//! and `seqno`. Records ([`EVENTS`]) are pushed in between. A SUBMIT's payload is passed to the device as it is; it
//! cannot hold guest-physical addresses, and neither can anything else here.

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

/// Opens a connection's context. Body: [`Hello`]; reply: [`HelloReply`].
pub const HELLO: u32 = 1;
/// Lists host devices. No body; reply: [`DeviceEntry`] each.
pub const DEVICES: u32 = 2;
/// Creates memory that the GPU can reach. Body: [`ArenaCreate`]; reply: [`ArenaReply`] and a file descriptor.
pub const ARENA_CREATE: u32 = 3;
/// Gives it back. Body: [`ArenaFree`]; no reply body.
pub const ARENA_FREE: u32 = 4;
/// Passes requests to the device. Body: [`Submit`], then the payload; reply: [`SubmitReply`], then the reply area.
pub const SUBMIT: u32 = 5;
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
    /// Body of [`HELLO`].
    Hello, 8 {
        /// [`MESSAGE_VERSION`].
        version: U32,
        /// Zero.
        reserved: U32,
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
        /// Zero.
        reserved: U64,
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
    /// Reply to [`ARENA_CREATE`]; the file descriptor comes with the message.
    ArenaReply, 16 {
        /// Names it in [`ARENA_FREE`].
        arena_id: U64,
        /// Offset of the memory in the file.
        offset: U64,
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
