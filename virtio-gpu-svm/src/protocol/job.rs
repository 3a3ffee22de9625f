//! Packets: what an engine executes, in order, every address a GPU address of the job's VM. PROTOCOL 6.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Nothing.
pub const OP_NOP: u32 = 0;
/// `len` bytes from `src` to `dst`.
pub const OP_COPY: u32 = 1;
/// `len` bytes at `dst` with the 64-bit `value`; `dst` and `len` are multiples of 8.
pub const OP_FILL: u32 = 2;
/// The wrapping sum of the 64-bit words in `len` bytes at `src`, stored at `dst`; all multiples of 8.
pub const OP_REDUCE: u32 = 3;
/// `y[i] += a * x[i]` in f64: y at `dst`, x at `src`, `a` the bits in `value`; all multiples of 8.
pub const OP_AXPY: u32 = 4;
/// Walks a list: a node is {next: u64, payload: u64}; starts at `src`, adds `arg` to every `next` that is not 0, ends
/// at 0 or after `value` nodes. Stores at `dst` the nodes seen and at `dst + 8` the wrapping sum of their payloads.
pub const OP_CHASE: u32 = 5;
/// Adds `value` to the 64-bit word at `dst`, atomically.
pub const OP_ATOMIC_ADD: u32 = 6;
/// Waits until the 64-bit word at `dst` is at least `value`.
pub const OP_SEM_WAIT: u32 = 7;
/// Stores `value` at `dst`, after everything before it in the job.
pub const OP_SEM_SIGNAL: u32 = 8;
/// Bit mask of the opcodes above.
pub const OPCODES: u64 = 0x1ff;

wire! {
    /// One packet. Fields that an opcode does not name are zero.
    Packet, 64 {
        /// `OP_*`.
        opcode: U32,
        /// Zero.
        flags: U32,
        /// Destination.
        dst: U64,
        /// Source.
        src: U64,
        /// Bytes.
        len: U64,
        /// Operand.
        value: U64,
        /// Second operand.
        arg: U64,
        /// Zero.
        reserved: [U64; 2],
    }
}
