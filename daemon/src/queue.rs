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
//! What the driver writes is read once: each slot of the available ring, each descriptor of a chain, each byte of a
//! command. Read again are only its available index, which says what is new and is compared with our own position each
//! time, and `used_event`, which decides nothing but an interrupt. A chain that was put back is read anew as a whole.

mod chain;
mod reach;
mod split;

pub use chain::{ChainError, MAX_SPANS};
pub use reach::RingMemory;

use crate::ring::{FrameworkMemory, Ring};
use chain::{Chain, Walk};
use split::Split;
use std::ops::ControlFlow;
use std::sync::{Arc, MutexGuard};
use vhost_user_backend::{VringState, VringT};
use virtio_gpu_svm::busy_poll::{BusyPoll, Clock};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

/// What one turn may cost. What is over it waits until whatever else the thread has to do was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Most descriptors of one chain, its indirect table included; a chain with more is malformed.
    pub chain: u32,
    /// Chains given back.
    pub chains: u32,
    /// Descriptors copied from guest memory; the last chain may exceed it.
    pub descriptors: u32,
    /// Bytes of commands; the last one may exceed it.
    pub bytes: usize,
}

impl Budget {
    /// For queues that a guest's own thread serves. Linux describes a command page by page: a process that has it send 64
    /// MiB is told that this is too much, and one that has it send more is not answered.
    pub const COMMANDS: Self = Self { chain: 1 << 14, chains: 64, descriptors: 1 << 12, bytes: 1 << 20 };
    /// For the event queue, which engines serve, and with them other guests wait.
    pub const EVENTS: Self = Self { chain: 64, chains: 64, descriptors: 256, bytes: 0 };
}

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
    /// What the device writes of it, or of another running queue, lies in the other's rings.
    #[error("it shares memory with the rings of another queue, and one of them is written")]
    SharedRings,
    /// The VMM replaced its kick file while it ran.
    #[error("its kick file was replaced while it ran")]
    KickReplaced,
    /// A ring access failed although the rings were checked.
    #[error("its memory could not be accessed")]
    Inaccessible,
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

/// Why [`Turn::serve`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a ring that has more must be visited again"]
pub enum Served {
    /// Nothing is available.
    Empty,
    /// There may be more, but this turn is over: take another soon.
    Spent,
    /// A command was not carried out; its chain is where it was.
    Stopped,
}

/// A chain that must be given back before the next is taken: by [`Turn::complete`] or, unused, by [`Turn::put_back`].
#[derive(Debug)]
#[must_use = "the driver waits for this chain"]
pub struct Token {
    head: u16,
    room: usize,
    settled: bool,
}

impl Token {
    /// Bytes that the driver left for the answer, at most [`virtio_gpu_svm::protocol::MAX_RESPONSE_BYTES`].
    pub fn room(&self) -> usize {
        self.room
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        assert!(self.settled || std::thread::panicking(), "chain {} was not given back", self.head);
    }
}

/// Chains that are given back before the driver sees the first of them, at most.
const UNPUBLISHED: u16 = 16;

/// Bytes of commands, and of answers, for which a ring keeps room between two visits: twice the longest list of runs.
const KEPT_BYTES: usize = 1 << 18;

/// Empty lists with the room that earlier chains needed, so that a command that is like the one before allocates nothing.
#[derive(Default)]
pub(crate) struct Spare {
    /// The last chain.
    chain: Chain,
    command: Vec<u8>,
    answer: Vec<u8>,
}

/// One visit to a ring.
pub struct Turn<'a, M: RingMemory = GuestMemoryMmap> {
    /// Before the lock, so that an old map is let go while only this ring waits.
    split: Split<M>,
    state: MutexGuard<'a, VringState<FrameworkMemory>>,
    budget: Budget,
    /// Where this visit is counted when it ends.
    ring: &'a Ring,
    cost: Cost,
    spare: Spare,
    /// Whether a token is out: its chain is in `spare`.
    taken: bool,
    /// The first malformed chain of this turn.
    refused: Option<ChainError>,
}

/// What a turn has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Chains given back.
    pub chains: u32,
    /// Those of them that were malformed.
    pub refused: u32,
    /// Descriptors copied from guest memory.
    pub descriptors: u32,
    /// Bytes of commands.
    pub bytes: usize,
}

impl<'a, M: RingMemory> Turn<'a, M> {
    /// Begins a visit. `None` while the ring is not to be served: stopped, disabled or failed. `memory` is called under
    /// the ring's lock, so that whoever publishes a view and then takes that lock knows the old one unused.
    ///
    /// # Errors
    /// [`RingError::BadSize`], [`RingError::BadRings`], [`RingError::SharedRings`], [`RingError::KickReplaced`].
    pub fn begin(
        ring: &'a Ring,
        budget: Budget,
        memory: impl FnOnce() -> Arc<M>,
    ) -> Result<Option<Self>, RingError> {
        let state = ring.get_mut();
        if ring.failed() || !state.is_enabled() || !state.get_queue().ready() {
            return Ok(None);
        }
        ring.check_setup()?;
        let split = Split::enter(state.get_queue(), memory()).ok_or(RingError::BadRings)?;
        let (cost, spare) = (Cost::default(), ring.take_spare());
        Ok(Some(Self { state, split, budget, ring, cost, spare, taken: false, refused: None }))
    }

    /// Where the driver's index stands: 0 in a ring that has not been used since it was made.
    pub fn next_avail(&self) -> u16 {
        self.split.next_avail()
    }

    /// The first malformed chain of this turn, and how many there were.
    pub fn refused(&self) -> Option<(ChainError, u32)> {
        self.refused.map(|first| (first, self.cost.refused))
    }

    fn is_spent(&self) -> bool {
        let Budget { chains, descriptors, bytes, .. } = self.budget;
        // Without commands there are no bytes to be counted.
        self.cost.chains >= chains || self.cost.descriptors >= descriptors || self.cost.bytes > bytes
    }

    /// Has command after command carried out by `act`, which is given the command and the room for its answer, and gives each
    /// chain back with what it has written. When there is none, `poll` says how long it is looked for another. The driver
    /// need not notify meanwhile. It sees several answers at once, but none waits for a command that is not `brief`.
    ///
    /// # Errors
    /// [`RingError`]; the ring must be latched.
    pub fn serve<C: Clock>(
        &mut self,
        poll: &mut BusyPoll<C>,
        brief: impl Fn(&[u8]) -> bool,
        act: impl FnMut(&[u8], &mut Vec<u8>, usize) -> ControlFlow<()>,
    ) -> Result<Served, RingError> {
        let mut command = std::mem::take(&mut self.spare.command);
        let mut answer = std::mem::take(&mut self.spare.answer);
        poll.begin_visit();
        let served = self.serve_with((&mut command, &mut answer), poll, brief, act);
        (self.spare.command, self.spare.answer) = (command, answer);
        served
    }

    fn serve_with<C: Clock>(
        &mut self,
        (command, answer): (&mut Vec<u8>, &mut Vec<u8>),
        poll: &mut BusyPoll<C>,
        brief: impl Fn(&[u8]) -> bool,
        mut act: impl FnMut(&[u8], &mut Vec<u8>, usize) -> ControlFlow<()>,
    ) -> Result<Served, RingError> {
        self.disarm()?;
        loop {
            let token = match self.next(command)? {
                Next::Chain(token) => token,
                Next::Empty if self.await_more(poll)? => continue,
                Next::Empty => return Ok(Served::Empty),
                Next::Spent => return Ok(Served::Spent),
            };
            if !brief(command) {
                self.split.publish()?;
            }
            answer.clear();
            if act(command, answer, token.room()).is_break() {
                self.put_back(token);
                return Ok(Served::Stopped);
            }
            self.complete(token, answer)?;
        }
    }

    /// Looks for another chain while that is worth it, and then asks the driver to notify. `false`: there is none.
    fn await_more<C: Clock>(&mut self, poll: &mut BusyPoll<C>) -> Result<bool, RingError> {
        // Whoever waits for an answer may send the next command for it.
        self.interrupt()?;
        if poll.wait(|| self.split.has_more())? {
            return Ok(true);
        }
        let more = self.rearm()?;
        if more {
            self.disarm()?;
        }
        Ok(more)
    }

    /// Takes the next well-formed chain and copies its readable part, at most one byte more than a command may have,
    /// into `command`. Malformed chains before it are given back.
    ///
    /// # Errors
    /// [`RingError`]; the ring must be latched.
    ///
    /// # Panics
    /// If the chain before was not given back.
    pub fn next(&mut self, command: &mut Vec<u8>) -> Result<Next, RingError> {
        assert!(!self.taken, "the chain before was not given back");
        loop {
            if self.is_spent() {
                return Ok(Next::Spent);
            }
            let Some(head) = self.split.pop()? else { return Ok(Next::Empty) };
            match self.walk(head) {
                Ok(()) => {
                    self.copy_in(command)?;
                    self.taken = true;
                    let room = self.spare.chain.room;
                    return Ok(Next::Chain(Token { head, room, settled: false }));
                }
                Err(error) => {
                    self.refused.get_or_insert(error);
                    self.cost.refused = self.cost.refused.saturating_add(1);
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
        (token.settled, self.taken) = (true, false);
        let mut rest = answer;
        let mut written: usize = 0;
        for span in self.spare.chain.writable.iter().filter(|span| span.bytes > 0) {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(span.bytes.min(rest.len()));
            self.split.reach.write(span.at, now)?;
            written = written.saturating_add(now.len());
            rest = later;
        }
        self.give_back(token.head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Leaves the chain that was taken last where it was.
    pub fn put_back(&mut self, mut token: Token) {
        (token.settled, self.taken) = (true, false);
        self.split.put_back();
    }

    /// An empty list for answers, with the room of earlier ones; to be given to [`Turn::return_room`] afterwards.
    pub fn take_room(&mut self) -> Vec<u8> {
        let mut room = std::mem::take(&mut self.spare.answer);
        room.clear();
        room
    }

    /// Keeps the room of a list for later answers.
    pub fn return_room(&mut self, room: Vec<u8>) {
        self.spare.answer = room;
    }

    /// Asks the driver to notify again. `true`: something arrived meanwhile, go on.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn rearm(&mut self) -> Result<bool, RingError> {
        self.split.rearm()
    }

    /// Asks the driver not to notify while this visit lasts.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn disarm(&mut self) -> Result<(), RingError> {
        self.split.disarm()
    }

    /// Ends the visit: interrupts the driver if chains were given back and it wants to know.
    ///
    /// # Errors
    /// [`RingError::Inaccessible`].
    pub fn finish(mut self) -> Result<(), RingError> {
        self.interrupt()
    }

    fn interrupt(&mut self) -> Result<(), RingError> {
        if self.split.has_untold() && self.split.wants_interrupt()? {
            self.ring.interrupt();
        }
        Ok(())
    }

    fn give_back(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.cost.chains = self.cost.chains.saturating_add(1);
        self.split.give_back(head, written)?;
        if self.split.unpublished() < UNPUBLISHED { Ok(()) } else { self.split.publish() }
    }

    fn walk(&mut self, head: u16) -> Result<(), ChainError> {
        let table = self.split.table();
        let mut walk = Walk::new(&mut self.split.reach, self.budget.chain, &mut self.spare.chain);
        let outcome = walk.run(table, head);
        self.cost.descriptors = self.cost.descriptors.saturating_add(walk.copied());
        outcome
    }

    fn copy_in(&mut self, command: &mut Vec<u8>) -> Result<(), RingError> {
        let chain = &self.spare.chain;
        self.cost.bytes = self.cost.bytes.saturating_add(chain.command_bytes);
        command.clear();
        command.reserve(chain.command_bytes);
        for span in &chain.readable {
            self.split.reach.append(span.at, span.bytes, command)?;
        }
        Ok(())
    }
}

impl<M: RingMemory> Drop for Turn<'_, M> {
    fn drop(&mut self) {
        // A visit that failed has answered chains too. There is nobody left to be told if this fails.
        self.split.publish().ok();
        self.split.leave(self.state.get_queue_mut());
        self.ring.counts().add(self.cost);
        let mut spare = std::mem::take(&mut self.spare);
        for bytes in [&mut spare.command, &mut spare.answer] {
            if bytes.capacity() > KEPT_BYTES {
                *bytes = Vec::new();
            }
        }
        self.ring.return_spare(spare);
    }
}

#[cfg(test)]
mod tests;
