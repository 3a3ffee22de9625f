//! A driver's ring, and the device's side of it as a session serves it.

use daemon::queue::{Budget, ChainError, Next, RingMemory, Turn};
use daemon::ring::Ring;
use std::ops::Range;
use std::sync::Arc;
use vhost_user_backend::VringT;
use virtio_gpu_svm::guest::Guest;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

const QUEUE_SIZE: u16 = 128;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLES: u64 = 0x8000;
/// The available index, which says what is new and is read until nothing is.
pub const AVAIL_INDEX: Range<u64> = AVAIL + 2..AVAIL + 4;
/// Where commands lie.
pub const COMMANDS: Range<u64> = 0x10_0000..0x20_0000;
const ANSWERS: u64 = 0x20_0000;
const MEMORY: usize = 0x40_0000;
/// Room for a command, and for an answer.
const STRIDE: u64 = 0x2000;
const ROOM: u32 = 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// How a chain is laid out.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// A command and an answer in one piece each.
    Plain,
    /// In pieces, with an empty one among them.
    Pieces,
    /// The same in an indirect table.
    Indirect,
    /// The same in an indirect table in backward order.
    Backward,
}

impl Layout {
    pub const ALL: [Self; 4] = [Self::Plain, Self::Pieces, Self::Indirect, Self::Backward];
}

pub struct Driver {
    pub memory: GuestMemoryMmap,
    ring: Ring,
    /// Chains made available so far.
    offered: u16,
    /// Descriptors in use.
    described: u16,
    taken: u16,
}

impl Driver {
    pub fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let ring = Ring::new(GuestMemoryAtomic::from(Arc::new(memory.clone())), QUEUE_SIZE).unwrap();
        ring.set_queue_size(QUEUE_SIZE);
        ring.set_queue_info(DESC, AVAIL, USED).unwrap();
        ring.set_queue_event_idx(true);
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        Self { memory, ring, offered: 0, described: 0, taken: 0 }
    }

    /// Makes a command and room for its answer available.
    pub fn offer(&mut self, layout: Layout, command: &[u8]) {
        let at = COMMANDS.start + STRIDE * u64::from(self.offered);
        self.memory.write_slice(command, GuestAddress(at)).unwrap();
        let bytes = u32::try_from(command.len()).unwrap();
        let read = match layout {
            Layout::Plain => vec![(at, bytes)],
            _ => vec![(at, 1), (at + 1, 0), (at + 1, bytes - 2), (at + u64::from(bytes) - 1, 1)],
        };
        self.make_available(layout, &read);
    }

    /// Makes a buffer available that holds no command.
    pub fn post(&mut self, layout: Layout) {
        self.make_available(layout, &[]);
    }

    fn make_available(&mut self, layout: Layout, read: &[(u64, u32)]) {
        let at = self.answer_at(self.offered);
        let written = match layout {
            Layout::Plain => vec![(at, ROOM)],
            _ => vec![(at, 24), (at + 24, ROOM - 24)],
        };
        let read = read.iter().map(|(at, bytes)| (*at, *bytes, 0));
        let chain: Vec<_> = read.chain(written.iter().map(|(at, bytes)| (*at, *bytes, WRITE))).collect();
        let head = self.described;
        let count = u16::try_from(chain.len()).unwrap();
        match layout {
            Layout::Plain | Layout::Pieces => {
                self.describe(DESC, &chain, &(head..head + count).collect::<Vec<_>>());
                self.described += count;
            }
            Layout::Indirect | Layout::Backward => {
                let table = TABLES + 0x100 * u64::from(self.offered);
                let mut order: Vec<_> = (0..count).collect();
                if matches!(layout, Layout::Backward) {
                    // The walk begins at entry 0.
                    order[1..].reverse();
                }
                self.describe(table, &chain, &order);
                self.put(DESC, head, Descriptor::new(table, 16 * u32::from(count), INDIRECT, 0));
                self.described += 1;
            }
        }
        self.publish(head);
    }

    /// Makes a chain available that comes back to its head.
    pub fn offer_circle(&mut self, length: u16) {
        for index in 0..length {
            self.put(DESC, index, Descriptor::new(COMMANDS.start, 4, NEXT, (index + 1) % length));
        }
        self.publish(0);
    }

    fn publish(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.offered);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered += 1;
        self.memory.write_obj(self.offered, GuestAddress(AVAIL_INDEX.start)).unwrap();
    }

    /// Writes a chain to the entries of a table that `order` names.
    fn describe(&self, table: u64, chain: &[(u64, u32, u16)], order: &[u16]) {
        for (position, (at, bytes, flags)) in chain.iter().enumerate() {
            let (next, more) = order.get(position + 1).map_or((0, 0), |next| (*next, NEXT));
            self.put(table, order[position], Descriptor::new(*at, *bytes, flags | more, next));
        }
    }

    fn put(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    fn answer_at(&self, chain: u16) -> u64 {
        ANSWERS + STRIDE * u64::from(chain)
    }

    /// One visit of the device, which answers everything.
    pub fn serve<M: RingMemory>(&self, memory: &Arc<M>, carry_out: impl Fn(&[u8], &mut Vec<u8>, usize)) {
        let (mut command, mut answer) = (Vec::new(), Vec::new());
        let mut turn = Turn::begin(&self.ring, Budget::COMMANDS, || Arc::clone(memory)).unwrap().unwrap();
        turn.disarm().unwrap();
        loop {
            let token = match turn.next(&mut command).unwrap() {
                Next::Chain(token) => token,
                Next::Empty if turn.rearm().unwrap() => continue,
                Next::Empty => break,
                Next::Spent => panic!("more than a visit may cost"),
            };
            answer.clear();
            carry_out(&command, &mut answer, token.room());
            turn.complete(token, &answer).unwrap();
        }
        assert_eq!(turn.refused(), None);
        turn.finish().unwrap();
    }

    /// One visit of the device, which finds nothing but a malformed chain.
    pub fn refuse<M: RingMemory>(&self, memory: &Arc<M>) -> ChainError {
        let mut turn = Turn::begin(&self.ring, Budget::COMMANDS, || Arc::clone(memory)).unwrap().unwrap();
        assert!(matches!(turn.next(&mut Vec::new()), Ok(Next::Empty)));
        let (error, count) = turn.refused().unwrap();
        assert_eq!(count, 1);
        error
    }

    /// One delivery of records.
    pub fn deliver<M: RingMemory>(&self, memory: &Arc<M>, guest: &Guest) {
        let mut turn = Turn::begin(&self.ring, Budget::EVENTS, || Arc::clone(memory)).unwrap().unwrap();
        let mut records = Vec::new();
        while guest.has_events() {
            let Next::Chain(token) = turn.next(&mut Vec::new()).unwrap() else { panic!("no buffer") };
            records.clear();
            guest.fill_events(&mut records, token.room());
            turn.complete(token, &records).unwrap();
        }
        turn.finish().unwrap();
    }

    /// What was written for the next chain that came back.
    pub fn take_answer(&mut self) -> Vec<u8> {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert!(self.taken < used, "nothing has come back");
        let length: u32 = self.memory.read_obj(GuestAddress(USED + 8 + 8 * u64::from(self.taken))).unwrap();
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(self.answer_at(self.taken))).unwrap();
        self.taken += 1;
        bytes
    }
}
