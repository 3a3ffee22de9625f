//! A virtqueue's contents: chains of the driver become owned bytes and a [`Token`] that must be answered.
//!
//! Used by the queue thread (control, cursor) and by whoever has event records to deliver. A [`Turn`] is one visit to
//! a ring: it holds the ring's lock and one view of guest memory, so every chain is read, carried out and answered
//! within it. Nothing is in flight between turns, which is why tokens need no epoch.
//!
//! Who is to blame decides what happens:
//! * a malformed chain is the driver's: it gets the chain back with nothing written ([`ChainError`], counted);
//! * a chain longer than a command may be is read in part and answered: an unprivileged process can cause it through a
//!   stock driver, so it must not cost more than itself;
//! * a broken ring ([`RingError`]) says nothing reliable any more: the ring is latched as failed until it is stopped.
//!
//! The chain is walked here and not by the crate's iterator, which cannot tell the end of a chain from a bad one.

use crate::ring::{FrameworkMemory, Ring};
use std::sync::{Arc, MutexGuard};
use vhost_user_backend::{VringState, VringT};
use virtio_gpu_svm::protocol::{MAX_COMMAND_BYTES, MAX_RESPONSE_BYTES};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Most descriptors of one chain. Linux describes a buffer page by page: this is 256 MiB.
pub const MAX_DESCRIPTORS: u32 = 65_536;
/// Chains given back in one turn. The rest waits until whatever else the thread has to do was done.
pub const CHAIN_BUDGET: u32 = 64;
/// Descriptors walked in one turn, for the same reason; the last chain may exceed it.
pub const DESCRIPTOR_BUDGET: u32 = 1 << 16;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u32 = 16;

/// A ring that cannot be served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two.
    #[error("its size is no queue size")]
    BadSize,
    /// Descriptor table, available ring or used ring is not in guest memory, or they overlap.
    #[error("its rings are not in guest memory or overlap")]
    BadRings,
    /// More buffers were made available than the ring has, or the index went back.
    #[error("its available index jumped")]
    AvailIndex,
    /// A head that is no descriptor.
    #[error("chain head {0} is beyond its size")]
    HeadOutOfRange(u16),
    /// A ring access failed although the rings were checked.
    #[error("its memory could not be accessed")]
    Inaccessible,
}

/// A chain that was given back unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor or a buffer outside guest memory.
    #[error("a descriptor or buffer at {0:#x} is not in guest memory")]
    OutsideMemory(u64),
    /// `next` is beyond the table, or the table's end was reached with `next` still set.
    #[error("descriptor {0} is beyond its table")]
    NextOutOfRange(u32),
    /// More descriptors than the table has: a cycle.
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
    /// More descriptors than any legal buffer has.
    #[error("more than {MAX_DESCRIPTORS} descriptors")]
    TooLong,
    /// Buffers of more than 4 GiB in sum.
    #[error("more than 4 GiB of buffers")]
    TooManyBytes,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    addr: GuestAddress,
    bytes: usize,
}

/// The buffers of one chain, checked against guest memory.
#[derive(Debug, Default)]
struct Chain {
    readable: Vec<Span>,
    /// Bytes of `readable`; one more than a command may have when there were more.
    command_bytes: usize,
    writable: Vec<Span>,
    /// Bytes of `writable`.
    room: usize,
}

/// What a turn finds.
#[derive(Debug)]
#[must_use = "a chain must be given back"]
pub enum Next {
    /// A chain; its readable part was copied.
    Chain(Token),
    /// Nothing is available.
    Empty,
    /// There may be more, but this turn is over: take another soon.
    Spent,
}

/// A chain that must be given back: by [`Turn::complete`] or, unused, by [`Turn::put_back`].
#[derive(Debug)]
#[must_use = "the driver waits for this chain"]
pub struct Token {
    head: u16,
    writable: Vec<Span>,
    room: usize,
    settled: bool,
}

impl Token {
    /// Bytes that the driver left for the answer, at most [`MAX_RESPONSE_BYTES`].
    pub fn room(&self) -> usize {
        self.room
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        assert!(self.settled || std::thread::panicking(), "chain {} was not given back", self.head);
    }
}

/// One visit to a ring.
pub struct Turn<'a> {
    state: MutexGuard<'a, VringState<FrameworkMemory>>,
    memory: Arc<GuestMemoryMmap>,
    /// Chains given back in this turn.
    used: u32,
    /// Descriptors walked in this turn.
    descriptors: u32,
    /// The first malformed chain of this turn, and how many there were.
    refused: Option<(ChainError, u32)>,
}

impl<'a> Turn<'a> {
    /// Begins a visit. `None` while the ring is not to be served: stopped, disabled or failed. `memory` is called under
    /// the ring's lock, so that whoever publishes a view and then takes that lock knows the old one unused.
    ///
    /// # Errors
    /// [`RingError::BadSize`], [`RingError::BadRings`].
    pub fn begin(
        ring: &'a Ring,
        memory: impl FnOnce() -> Arc<GuestMemoryMmap>,
    ) -> Result<Option<Self>, RingError> {
        let state = ring.get_mut();
        if ring.failed() || !state.is_enabled() || !state.get_queue().ready() {
            return Ok(None);
        }
        if ring.has_bad_size() {
            return Err(RingError::BadSize);
        }
        let turn = Self { state, memory: memory(), used: 0, descriptors: 0, refused: None };
        if turn.rings_are_sound() { Ok(Some(turn)) } else { Err(RingError::BadRings) }
    }

    /// Where the driver's index stands: 0 in a ring that has not been used since it was made.
    pub fn next_avail(&self) -> u16 {
        self.state.get_queue().next_avail()
    }

    /// The first malformed chain of this turn, and how many there were.
    pub fn refused(&self) -> Option<(ChainError, u32)> {
        self.refused
    }

    /// Takes the next well-formed chain and copies its readable part, at most one byte more than a command may have,
    /// into `command`. Malformed chains before it are given back.
    ///
    /// # Errors
    /// [`RingError`]; the ring must be latched.
    pub fn next(&mut self, command: &mut Vec<u8>) -> Result<Next, RingError> {
        loop {
            if self.used >= CHAIN_BUDGET || self.descriptors >= DESCRIPTOR_BUDGET {
                return Ok(Next::Spent);
            }
            let Some(head) = self.pop()? else { return Ok(Next::Empty) };
            match self.walk(head) {
                Ok(chain) => {
                    self.copy_in(&chain, command)?;
                    let (writable, room) = (chain.writable, chain.room);
                    return Ok(Next::Chain(Token { head, writable, room, settled: false }));
                }
                Err(error) => {
                    let (first, count) = self.refused.unwrap_or((error, 0));
                    self.refused = Some((first, count.saturating_add(1)));
                    self.give_back(head, 0)?;
                }
            }
        }
    }

    /// Writes the answer, as much of it as there is room for, and gives the chain back.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn complete(&mut self, mut token: Token, answer: &[u8]) -> Result<(), RingError> {
        token.settled = true;
        let mut rest = answer;
        let mut written: usize = 0;
        for span in token.writable.iter().filter(|span| span.bytes > 0) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(span.bytes.min(rest.len()));
            self.memory.write_slice(now, span.addr).map_err(|_| RingError::Inaccessible)?;
            written = written.saturating_add(now.len());
            rest = later;
        }
        self.give_back(token.head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Leaves the chain that was taken last where it was.
    pub fn put_back(&mut self, mut token: Token) {
        token.settled = true;
        self.state.get_queue_mut().go_to_previous_position();
    }

    /// Asks the driver to notify again. `true`: something arrived meanwhile, go on.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn rearm(&mut self) -> Result<bool, RingError> {
        let memory = Arc::clone(&self.memory);
        self.state.get_queue_mut().enable_notification(&*memory).map_err(|_| RingError::Inaccessible)
    }

    /// Asks the driver not to notify while this visit lasts.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn disarm(&mut self) -> Result<(), RingError> {
        let memory = Arc::clone(&self.memory);
        self.state.get_queue_mut().disable_notification(&*memory).map_err(|_| RingError::Inaccessible)
    }

    /// Ends the visit: interrupts the driver if chains were given back and it wants to know.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn finish(mut self) -> Result<(), RingError> {
        if self.used == 0 {
            return Ok(());
        }
        let memory = Arc::clone(&self.memory);
        let wanted =
            self.state.get_queue_mut().needs_notification(&*memory).map_err(|_| RingError::Inaccessible)?;
        if wanted {
            // Nothing to be done about a call file that is full (the driver will be interrupted anyway) or broken
            // (the VMM's own loss).
            self.state.signal_used_queue().ok();
        }
        Ok(())
    }

    fn size(&self) -> u16 {
        self.state.get_queue().size()
    }

    /// Whether the three areas of the ring lie in guest memory and apart from each other.
    fn rings_are_sound(&self) -> bool {
        let queue = self.state.get_queue();
        let entries = u64::from(queue.size());
        // Sizes of the specification, with the event fields: 16 n, 6 + 2 n, 6 + 8 n.
        let areas = [
            (queue.desc_table(), entries.saturating_mul(16), Permissions::Read),
            (queue.avail_ring(), entries.saturating_mul(2).saturating_add(6), Permissions::Read),
            (queue.used_ring(), entries.saturating_mul(8).saturating_add(6), Permissions::Write),
        ];
        let inside = areas.iter().all(|&(start, bytes, access)| {
            usize::try_from(bytes).is_ok_and(|n| self.memory.check_range(GuestAddress(start), n, access))
        });
        let [a, b, c] = areas.map(|(start, bytes, _)| (start, start.saturating_add(bytes)));
        let apart = |x: (u64, u64), y: (u64, u64)| x.1 <= y.0 || y.1 <= x.0;
        // The crate takes an available ring at 0 for one that was never set.
        inside && queue.avail_ring() != 0 && apart(a, b) && apart(a, c) && apart(b, c)
    }

    fn pop(&mut self) -> Result<Option<u16>, RingError> {
        let size = self.size();
        let memory = Arc::clone(&self.memory);
        let mut available = self.state.get_queue_mut().iter(&*memory).map_err(|_| RingError::AvailIndex)?;
        let Some(head) = available.next().map(|chain| chain.head_index()) else { return Ok(None) };
        if head < size { Ok(Some(head)) } else { Err(RingError::HeadOutOfRange(head)) }
    }

    fn give_back(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let memory = Arc::clone(&self.memory);
        self.used = self.used.saturating_add(1);
        self.state.get_queue_mut().add_used(&*memory, head, written).map_err(|_| RingError::Inaccessible)
    }

    fn walk(&mut self, head: u16) -> Result<Chain, ChainError> {
        let queue = self.state.get_queue();
        let mut table =
            Table { start: queue.desc_table(), entries: u32::from(queue.size()), indirect: false };
        let mut chain = Chain::default();
        let mut index = u32::from(head);
        // Descriptors visited in the current table: more than it has entries means a cycle.
        let mut visited: u32 = 0;
        let (mut descriptors, mut bytes): (u32, u32) = (0, 0);
        loop {
            if index >= table.entries {
                return Err(ChainError::NextOutOfRange(index));
            }
            if visited >= table.entries {
                return Err(ChainError::Cycle);
            }
            visited = visited.saturating_add(1);
            self.descriptors = self.descriptors.saturating_add(1);
            let descriptor = self.read_descriptor(&table, index)?;
            if descriptor.refers_to_indirect_table() {
                table = table.enter(&descriptor)?;
                (index, visited) = (0, 0);
                continue;
            }
            descriptors = descriptors.saturating_add(1);
            if descriptors > MAX_DESCRIPTORS {
                return Err(ChainError::TooLong);
            }
            bytes = bytes.checked_add(descriptor.len()).ok_or(ChainError::TooManyBytes)?;
            self.add_buffer(&mut chain, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = u32::from(descriptor.next());
        }
    }

    fn read_descriptor(&self, table: &Table, index: u32) -> Result<Descriptor, ChainError> {
        let at = table.start.saturating_add(u64::from(index).saturating_mul(u64::from(DESCRIPTOR_BYTES)));
        self.memory.read_obj(GuestAddress(at)).map_err(|_| ChainError::OutsideMemory(at))
    }

    /// Keeps what is needed of a buffer: a command's bytes up to one too many, an answer's room up to its most.
    fn add_buffer(&self, chain: &mut Chain, descriptor: &Descriptor) -> Result<(), ChainError> {
        let addr = descriptor.addr();
        let outside = ChainError::OutsideMemory(addr.0);
        let bytes = usize::try_from(descriptor.len()).map_err(|_| outside)?;
        let (spans, total, most, access) = if descriptor.is_write_only() {
            (&mut chain.writable, &mut chain.room, MAX_RESPONSE_BYTES, Permissions::Write)
        } else if chain.writable.is_empty() {
            let most = MAX_COMMAND_BYTES.saturating_add(1);
            (&mut chain.readable, &mut chain.command_bytes, most, Permissions::Read)
        } else {
            return Err(ChainError::ReadableAfterWritable);
        };
        let wanted = bytes.min(most.saturating_sub(*total));
        if bytes > 0 && !self.memory.check_range(addr, bytes, access) {
            return Err(outside);
        }
        // An empty writable buffer still marks where the answer begins.
        if wanted > 0 || spans.is_empty() {
            spans.push(Span { addr, bytes: wanted });
            *total = total.saturating_add(wanted);
        }
        Ok(())
    }

    fn copy_in(&self, chain: &Chain, command: &mut Vec<u8>) -> Result<(), RingError> {
        command.clear();
        command.resize(chain.command_bytes, 0);
        let mut rest = command.as_mut_slice();
        for span in &chain.readable {
            let (now, later) = rest.split_at_mut(span.bytes);
            self.memory.read_slice(now, span.addr).map_err(|_| RingError::Inaccessible)?;
            rest = later;
        }
        Ok(())
    }
}

/// A descriptor table: the ring's own, or an indirect one.
struct Table {
    start: u64,
    entries: u32,
    indirect: bool,
}

impl Table {
    fn enter(&self, descriptor: &Descriptor) -> Result<Self, ChainError> {
        if self.indirect {
            return Err(ChainError::NestedIndirect);
        }
        if descriptor.has_next() {
            return Err(ChainError::IndirectAndNext);
        }
        let bytes = descriptor.len();
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::IndirectLength(bytes));
        }
        Ok(Self { start: descriptor.addr().0, entries: bytes / DESCRIPTOR_BYTES, indirect: true })
    }
}

#[cfg(test)]
mod tests;
