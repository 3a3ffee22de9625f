//! One descriptor chain: from its head to checked spans of guest memory.
//!
//! No descriptor is read twice: of the ring's own table each one is copied when the chain comes to it, which it does
//! once; an indirect table is copied whole before it is looked at. So a chain costs what was copied for it, whatever
//! order its descriptors have, and that is what a [`Budget`](super::Budget) counts.
//!
//! The chain is walked here and not by the crate's iterator, which cannot tell the end of a chain from a bad one.

use super::reach::{Missing, Reach, RingMemory};
use virtio_gpu_svm::protocol::{MAX_COMMAND_BYTES, MAX_QUEUE_SIZE, MAX_RESPONSE_BYTES};
use vm_memory::Permissions;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most spans that a command and the room for its answer may lie in. Page by page a command is 513 of them.
pub const MAX_SPANS: usize = 1024;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u32 = 16;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// A chain that was given back unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor, a table or a buffer outside guest memory.
    #[error("a descriptor or buffer at {0:#x} is not in guest memory")]
    OutsideMemory(u64),
    /// `next` is beyond the table, or the table's end was reached with `next` still set.
    #[error("descriptor {0} is beyond its table")]
    NextOutOfRange(u32),
    /// It comes to a descriptor again.
    #[error("the chain runs in a circle")]
    Cycle,
    /// An indirect table whose size is not a multiple of a descriptor's, or none.
    #[error("indirect table of {0} bytes")]
    IndirectLength(u32),
    /// An indirect table within an indirect table.
    #[error("nested indirect table")]
    NestedIndirect,
    /// A descriptor that is both indirect and continued.
    #[error("indirect descriptor with a successor")]
    IndirectAndNext,
    /// A device-readable buffer after a device-writable one.
    #[error("readable buffer after a writable one")]
    ReadableAfterWritable,
    /// More descriptors than a chain of this queue may have.
    #[error("more than {0} descriptors")]
    TooLong(u32),
    /// A command or answer in smaller pieces than any driver makes.
    #[error("more than {MAX_SPANS} pieces")]
    TooManySpans,
    /// Buffers of more than 4 GiB in sum.
    #[error("more than 4 GiB of buffers")]
    TooManyBytes,
}

/// A descriptor, as it lies in guest memory.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    addr: U64,
    len: U32,
    flags: U16,
    next: U16,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

impl Descriptor {
    fn has(&self, flag: u16) -> bool {
        self.flags.get() & flag != 0
    }
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) at: u64,
    pub(super) bytes: usize,
}

/// The buffers of one chain, checked against guest memory.
#[derive(Debug, Default)]
pub(super) struct Chain {
    pub(super) readable: Vec<Span>,
    /// Bytes of `readable`; one more than a command may have when there were more.
    pub(super) command_bytes: usize,
    pub(super) writable: Vec<Span>,
    /// Bytes of `writable`.
    pub(super) room: usize,
}

impl Chain {
    /// Forgets them, and keeps the lists' room.
    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        (self.command_bytes, self.room) = (0, 0);
    }
}

/// The table of a ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) start: u64,
    pub(super) entries: u16,
}

/// The way through one chain.
pub(super) struct Walk<'m, M> {
    reach: &'m mut Reach<M>,
    /// Most descriptors.
    most: u32,
    chain: &'m mut Chain,
    descriptors: u32,
    bytes: u32,
    copied: u32,
}

impl<'m, M: RingMemory> Walk<'m, M> {
    /// What is found is in `chain`, whatever that held. It is filled where it is: to move its lists would wait for all that was
    /// written before, answers on their way to the driver's CPU among it.
    pub(super) fn new(reach: &'m mut Reach<M>, most: u32, chain: &'m mut Chain) -> Self {
        chain.clear();
        Self { reach, most, chain, descriptors: 0, bytes: 0, copied: 0 }
    }

    /// Descriptors copied so far.
    pub(super) fn copied(&self) -> u32 {
        self.copied
    }

    /// Walks from `head` on.
    pub(super) fn run(&mut self, table: Table, head: u16) -> Result<(), ChainError> {
        let mut seen = Seen::default();
        let mut index = head;
        loop {
            if index >= table.entries {
                return Err(ChainError::NextOutOfRange(index.into()));
            }
            if !seen.insert(index) {
                return Err(ChainError::Cycle);
            }
            let descriptor = self.look_at(table, index)?;
            if descriptor.has(F_INDIRECT) {
                self.run_indirect(&descriptor)?;
                break;
            }
            match self.add(&descriptor)? {
                Some(next) => index = next,
                None => break,
            }
        }
        Ok(())
    }

    fn run_indirect(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        if descriptor.has(F_NEXT) {
            return Err(ChainError::IndirectAndNext);
        }
        let bytes = descriptor.len.get();
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::IndirectLength(bytes));
        }
        let entries = bytes / DESCRIPTOR_BYTES;
        // A driver makes a table for a chain, so its length is the chain's.
        if entries > self.most {
            return Err(ChainError::TooLong(self.most));
        }
        let mut table = vec![Descriptor::default(); usize::try_from(entries).unwrap_or(0)];
        self.copy(descriptor.addr.get(), &mut table, entries)?;
        let mut index = 0_u16;
        for _ in 0..entries {
            let descriptor = table.get(usize::from(index)).ok_or(ChainError::NextOutOfRange(index.into()))?;
            if descriptor.has(F_INDIRECT) {
                return Err(ChainError::NestedIndirect);
            }
            match self.add(descriptor)? {
                Some(next) => index = next,
                None => return Ok(()),
            }
        }
        // As many as the table has, and still one more: one of them was there before, or is beyond the table.
        let beyond = u32::from(index) >= entries;
        Err(if beyond { ChainError::NextOutOfRange(index.into()) } else { ChainError::Cycle })
    }

    fn look_at(&mut self, table: Table, index: u16) -> Result<Descriptor, ChainError> {
        let offset = u64::from(index).saturating_mul(u64::from(DESCRIPTOR_BYTES));
        let at = table.start.saturating_add(offset);
        self.copied = self.copied.saturating_add(1);
        let words = self.reach.load_descriptor(at).map_err(|Missing| ChainError::OutsideMemory(at))?;
        Ok(zerocopy::transmute!(words))
    }

    fn copy(&mut self, at: u64, into: &mut [Descriptor], count: u32) -> Result<(), ChainError> {
        self.copied = self.copied.saturating_add(count);
        self.reach.read(at, into.as_mut_bytes()).map_err(|Missing| ChainError::OutsideMemory(at))
    }

    /// Keeps what is needed of a buffer: a command's bytes up to one too many, an answer's room up to its most. What is
    /// beyond is not touched, so it need not be there. Returns the index of the next descriptor.
    fn add(&mut self, descriptor: &Descriptor) -> Result<Option<u16>, ChainError> {
        self.descriptors = self.descriptors.saturating_add(1);
        if self.descriptors > self.most {
            return Err(ChainError::TooLong(self.most));
        }
        let len = descriptor.len.get();
        self.bytes = self.bytes.checked_add(len).ok_or(ChainError::TooManyBytes)?;
        let at = descriptor.addr.get();
        let outside = ChainError::OutsideMemory(at);
        let bytes = usize::try_from(len).map_err(|_| outside)?;
        let kept = self.chain.readable.len().saturating_add(self.chain.writable.len());
        let (spans, total, most, access) = if descriptor.has(F_WRITE) {
            (&mut self.chain.writable, &mut self.chain.room, MAX_RESPONSE_BYTES, Permissions::Write)
        } else if self.chain.writable.is_empty() {
            let most = MAX_COMMAND_BYTES.saturating_add(1);
            (&mut self.chain.readable, &mut self.chain.command_bytes, most, Permissions::Read)
        } else {
            return Err(ChainError::ReadableAfterWritable);
        };
        let wanted = bytes.min(most.saturating_sub(*total));
        // An empty writable buffer still marks where the answer begins.
        if wanted > 0 || spans.is_empty() {
            if kept >= MAX_SPANS {
                return Err(ChainError::TooManySpans);
            }
            if bytes > 0 && !self.reach.holds(at, bytes, access) {
                return Err(outside);
            }
            spans.push(Span { at, bytes: wanted });
            *total = total.saturating_add(wanted);
        }
        Ok(descriptor.has(F_NEXT).then_some(descriptor.next.get()))
    }
}

/// Descriptors of a ring's table that a chain has come to.
#[derive(Default)]
struct Seen([u64; MAX_QUEUE_SIZE as usize / 64]);

impl Seen {
    /// `false`: it was there before, or is beyond any table.
    fn insert(&mut self, index: u16) -> bool {
        let Some(word) = self.0.get_mut(usize::from(index / 64)) else { return false };
        let bit = 1_u64 << (index % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}
