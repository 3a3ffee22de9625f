//! The operands of packets, and what can be said of them before memory is touched: the same on every device that
//! executes them. Devices call this from [`Device::check_packets`](super::Device::check_packets).

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use super::Error;
use crate::protocol::job::{
    OP_ATOMIC_ADD, OP_AXPY, OP_CHASE, OP_COPY, OP_FILL, OP_NOP, OP_REDUCE, OP_SEM_SIGNAL, OP_SEM_WAIT, Packet,
};

/// Bytes of a word: what word operations are aligned to.
pub const WORD: u64 = 8;
/// Bytes of a list's node, and of what CHASE stores.
pub const NODE: u64 = 2 * WORD;

/// Static checks of a job's packets; `end` is the first address beyond the VM's space.
///
/// # Errors
/// [`Error::UnknownOpcode`], [`Error::BadOperand`].
pub fn check(packets: &[Packet], end: u64) -> Result<(), Error> {
    for (index, packet) in (0u32..).zip(packets) {
        let known = check_operands(packet, end).ok_or(Error::UnknownOpcode { index })?;
        if !known || packet.flags.get() != 0 || packet.reserved.iter().any(|r| r.get() != 0) {
            return Err(Error::BadOperand { index });
        }
    }
    Ok(())
}

/// Whether the operands suit the opcode; `None` if there is no such opcode.
fn check_operands(packet: &Packet, end: u64) -> Option<bool> {
    let Operands { dst, src, len, value, arg } = Operands::of(packet);
    let inside = |addr: u64, bytes: u64| bytes > 0 && addr.checked_add(bytes).is_some_and(|last| last <= end);
    let words = |addr: u64, bytes: u64| {
        addr.is_multiple_of(WORD) && bytes.is_multiple_of(WORD) && inside(addr, bytes)
    };
    Some(match packet.opcode.get() {
        OP_NOP => [dst, src, len, value, arg] == [0; 5],
        OP_COPY => inside(src, len) && inside(dst, len) && value == 0 && arg == 0,
        OP_FILL => words(dst, len) && src == 0 && arg == 0,
        OP_REDUCE => words(src, len) && words(dst, WORD) && value == 0 && arg == 0,
        OP_AXPY => words(src, len) && words(dst, len) && arg == 0,
        OP_CHASE => words(src, NODE) && words(dst, NODE) && len == 0,
        OP_ATOMIC_ADD | OP_SEM_WAIT | OP_SEM_SIGNAL => words(dst, WORD) && src == 0 && len == 0 && arg == 0,
        #[cfg(test)]
        super::soft::packet::test_ops::OP_PANIC | super::soft::packet::test_ops::OP_HOLD => true,
        _ => return None,
    })
}

/// The operands of a packet as numbers of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    /// Destination.
    pub dst: u64,
    /// Source.
    pub src: u64,
    /// Bytes.
    pub len: u64,
    /// Operand.
    pub value: u64,
    /// Second operand.
    pub arg: u64,
}

impl Operands {
    /// Those of this packet.
    pub fn of(packet: &Packet) -> Self {
        Self {
            dst: packet.dst.get(),
            src: packet.src.get(),
            len: packet.len.get(),
            value: packet.value.get(),
            arg: packet.arg.get(),
        }
    }
}
