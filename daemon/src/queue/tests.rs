//! Rings written by hand, legal and hostile, against [`Turn`].

use super::*;
use std::time::Duration;
use virtio_gpu_svm::busy_poll::Monotonic;
use virtio_gpu_svm::protocol::MAX_COMMAND_BYTES;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x40_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The next chain, which must be there.
fn chain(turn: &mut Turn<'_>, command: &mut Vec<u8>) -> Token {
    match turn.next(command).unwrap() {
        Next::Chain(token) => token,
        other => panic!("{other:?}"),
    }
}

/// Sleeps as soon as a ring is empty.
fn at_once() -> BusyPoll {
    BusyPoll::new(Monotonic::default(), Duration::ZERO)
}

struct Driver {
    memory: Arc<GuestMemoryMmap>,
    ring: Ring,
    avail: u16,
    size: u16,
}

impl Driver {
    fn new() -> Self {
        Self::cut_at(&[])
    }
    /// In memory of several regions, which begin at 0 and at these addresses.
    fn cut_at(cuts: &[u64]) -> Self {
        let starts = [&[0], cuts].concat();
        let ends = [cuts, &[MEMORY_END]].concat();
        let region =
            |(start, end): (&u64, &u64)| (GuestAddress(*start), usize::try_from(end - start).unwrap());
        let regions: Vec<_> = starts.iter().zip(&ends).map(region).collect();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let ring = Ring::new(GuestMemoryAtomic::from(Arc::clone(&memory)), 1024).unwrap();
        ring.set_queue_size(SIZE);
        ring.set_queue_info(DESC, AVAIL, USED).unwrap();
        ring.set_queue_ready(true);
        ring.set_enabled(true);
        Self { memory, ring, avail: 0, size: SIZE }
    }
    fn put(&self, table: u64, index: u64, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(table + 16 * index)).unwrap();
    }
    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.put(DESC, index.into(), Descriptor::new(addr, len, flags, next));
    }
    fn offer(&mut self, head: u16) {
        let slot = AVAIL + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }
    fn set_avail(&mut self, idx: u16) {
        self.avail = idx;
        self.memory.write_obj(idx, GuestAddress(AVAIL + 2)).unwrap();
    }
    fn turn(&self) -> Turn<'_> {
        self.try_turn().unwrap().unwrap()
    }
    fn try_turn(&self) -> Result<Option<Turn<'_>>, RingError> {
        self.turn_within(Budget::COMMANDS)
    }
    fn turn_within(&self, budget: Budget) -> Result<Option<Turn<'_>>, RingError> {
        Turn::begin(&self.ring, budget, || Arc::clone(&self.memory))
    }
    /// (id, len) of the used entries.
    fn used(&self) -> Vec<(u32, u32)> {
        let idx: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let entry = |i: u16| {
            let at = USED + 4 + 8 * u64::from(i % self.size);
            (
                self.memory.read_obj(GuestAddress(at)).unwrap(),
                self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
            )
        };
        (0..idx).map(entry).collect()
    }
    /// Offers chain 0, which must be given back unread for this cause.
    fn refuses(mut self, cause: ChainError) {
        self.offer(0);
        let mut command = Vec::new();
        let mut turn = self.turn();
        assert!(matches!(turn.next(&mut command), Ok(Next::Empty | Next::Spent)));
        assert_eq!(turn.refused(), Some((cause, 1)));
        drop(turn);
        assert_eq!(self.used(), [(0, 0)]);
    }
}

#[test]
fn command_and_answer_pass_through_scattered_buffers() {
    let mut driver = Driver::new();
    driver.memory.write_slice(b"hello ", GuestAddress(DATA)).unwrap();
    driver.memory.write_slice(b"world", GuestAddress(DATA + 0x1000)).unwrap();
    driver.descriptor(3, DATA, 6, NEXT, 7);
    driver.descriptor(7, DATA + 0x1000, 5, NEXT, 1);
    driver.descriptor(1, DATA + 0x2000, 2, NEXT | WRITE, 2);
    driver.descriptor(2, DATA + 0x3000, 4, WRITE, 0);
    driver.offer(3);

    let mut command = Vec::new();
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut command);
    assert_eq!((command.as_slice(), token.room()), (&b"hello world"[..], 6));
    turn.complete(token, b"abcde").unwrap();
    assert!(matches!(turn.next(&mut command), Ok(Next::Empty)));
    turn.finish().unwrap();

    assert_eq!(driver.used(), [(3, 5)]);
    let mut written = [0; 3];
    driver.memory.read_slice(&mut written, GuestAddress(DATA + 0x3000)).unwrap();
    assert_eq!(&written, b"cde");
}

/// Where regions end shows in nothing that a driver sees.
#[test]
fn rings_and_buffers_across_regions_are_served_like_others() {
    let parts = [DESC + 16, AVAIL, AVAIL + 4 + 6, AVAIL + 6 + 2 * u64::from(SIZE), USED, USED + 4 + 8 + 4];
    for cut in parts.into_iter().chain([DATA, DATA + 3, DATA + 0x1000, DATA + 0x1002, MEMORY_END / 2]) {
        let mut driver = Driver::cut_at(&[cut]);
        driver.ring.set_queue_event_idx(true);
        driver.memory.write_slice(b"abcdef", GuestAddress(DATA)).unwrap();
        driver.descriptor(0, DATA, 6, NEXT, 3);
        driver.descriptor(3, DATA + 0x1000, 4, WRITE, 0);
        for round in 1..=2 * SIZE + 1 {
            driver.offer(0);
            let mut turn = driver.turn();
            let mut commands = Vec::new();
            let served = turn.serve(
                &mut at_once(),
                |_| true,
                |command, answer, _| {
                    commands.push(command.to_vec());
                    answer.extend(b"wxyz");
                    ControlFlow::Continue(())
                },
            );
            assert_eq!(served, Ok(Served::Empty), "{cut:#x}");
            turn.finish().unwrap();
            assert_eq!(commands, [b"abcdef"], "{cut:#x}");
            let mut answer = [0; 4];
            driver.memory.read_slice(&mut answer, GuestAddress(DATA + 0x1000)).unwrap();
            assert_eq!(&answer, b"wxyz", "{cut:#x}");
            let index: u16 = driver.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            let event: u16 = driver.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
            let element = USED + 4 + 8 * u64::from((round - 1) % SIZE);
            let element: [u32; 2] = driver.memory.read_obj(GuestAddress(element)).unwrap();
            assert_eq!((index, event, element), (round, round, [0, 4]), "{cut:#x}");
        }
    }
}

/// GET_VRING_BASE answers with what the framework's queue says.
#[test]
fn positions_are_the_frameworks_after_each_visit() {
    let mut driver = Driver::new();
    driver.ring.set_queue_next_avail(7);
    driver.ring.set_queue_next_used(9);
    driver.avail = 7;
    driver.descriptor(0, DATA, 4, 0, 0);
    let positions = |driver: &Driver| {
        let state = driver.ring.get_ref();
        (state.get_queue().next_avail(), state.get_queue().next_used())
    };
    for _ in 0..3 {
        driver.offer(0);
    }
    let mut turn = driver.turn();
    let first = chain(&mut turn, &mut Vec::new());
    turn.complete(first, b"").unwrap();
    let second = chain(&mut turn, &mut Vec::new());
    turn.put_back(second);
    drop(turn);
    assert_eq!(positions(&driver), (8, 10));

    let mut turn = driver.turn();
    assert_eq!(turn.serve(&mut at_once(), |_| true, |_, _, _| ControlFlow::Continue(())), Ok(Served::Empty));
    turn.finish().unwrap();
    assert_eq!(positions(&driver), (10, 12));
}

#[test]
fn visit_leaves_room_to_the_next_and_not_too_much() {
    let mut driver = Driver::new();
    let mut visit = |bytes: u32| {
        driver.descriptor(0, DATA, bytes, 0, 0);
        driver.offer(0);
        let mut turn = driver.turn();
        let served = turn.serve(
            &mut at_once(),
            |_| true,
            |_, answer, _| {
                answer.resize(usize::try_from(bytes).unwrap(), 0);
                ControlFlow::Continue(())
            },
        );
        assert_eq!(served, Ok(Served::Empty));
        drop(turn);
        let spare = driver.ring.take_spare();
        let room = [spare.command.capacity(), spare.answer.capacity(), spare.chain.readable.capacity()];
        driver.ring.return_spare(spare);
        room
    };
    let small = visit(100);
    assert!(small.iter().all(|room| *room > 0), "{small:?}");
    assert_eq!(visit(50), small);
    let most = u32::try_from(KEPT_BYTES).unwrap();
    assert!(visit(most).iter().take(2).all(|room| *room >= KEPT_BYTES));
    assert_eq!(visit(most + 1)[..2], [0, 0]);
}

#[test]
fn answer_is_cut_to_the_room() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, 1);
    driver.descriptor(1, DATA + 0x1000, 3, WRITE, 0);
    driver.offer(0);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"abcdef").unwrap();
    drop(turn);
    assert_eq!(driver.used(), [(0, 3)]);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(DATA + 0x1003)).unwrap(), 0);
}

#[test]
fn no_writable_buffer_is_answered_with_length_zero() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 4, 0, 0);
    driver.offer(0);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    assert_eq!(token.room(), 0);
    turn.complete(token, b"answer").unwrap();
    drop(turn);
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn put_back_chain_is_taken_again() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 64, WRITE, 0);
    driver.offer(0);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.put_back(token);
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"x").unwrap();
    drop(turn);
    assert_eq!(driver.used(), [(0, 1)]);
}

#[test]
#[should_panic(expected = "was not given back")]
fn dropped_token_is_a_fault() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 64, WRITE, 0);
    driver.offer(0);
    let mut turn = driver.turn();
    drop(chain(&mut turn, &mut Vec::new()));
}

#[test]
fn malformed_chain_does_not_stop_the_next() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, 0);
    driver.descriptor(5, DATA, 4, 0, 0);
    driver.offer(0);
    driver.offer(5);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"").unwrap();
    assert_eq!(turn.refused(), Some((ChainError::Cycle, 1)));
    drop(turn);
    assert_eq!(driver.used(), [(0, 0), (5, 0)]);
}

#[test]
fn self_loop_and_two_cycle_are_refused() {
    let driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, 0);
    driver.refuses(ChainError::Cycle);

    let driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, 1);
    driver.descriptor(1, DATA, 4, NEXT, 0);
    driver.refuses(ChainError::Cycle);
}

#[test]
fn next_beyond_the_table_is_refused() {
    let driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, SIZE);
    driver.refuses(ChainError::NextOutOfRange(SIZE.into()));
}

#[test]
fn readable_after_writable_is_refused() {
    let driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT | WRITE, 1);
    driver.descriptor(1, DATA, 4, 0, 0);
    driver.refuses(ChainError::ReadableAfterWritable);
}

#[test]
fn empty_writable_buffer_still_orders_the_chain() {
    let driver = Driver::new();
    driver.descriptor(0, DATA, 0, NEXT | WRITE, 1);
    driver.descriptor(1, DATA, 4, 0, 0);
    driver.refuses(ChainError::ReadableAfterWritable);
}

#[test]
fn buffers_outside_memory_are_refused() {
    for (addr, len) in
        [(MEMORY_END - 2, 4), (MEMORY_END, 1), (u64::MAX, 1), (u64::MAX - 1, 4), (DATA, u32::MAX)]
    {
        for flags in [0, WRITE] {
            let driver = Driver::new();
            driver.descriptor(0, addr, len, flags, 0);
            driver.refuses(ChainError::OutsideMemory(addr));
        }
    }
}

#[test]
fn last_byte_of_memory_is_a_buffer() {
    let mut driver = Driver::new();
    driver.descriptor(0, MEMORY_END - 1, 1, 0, 0);
    driver.offer(0);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"").unwrap();
}

#[test]
fn more_than_4_gib_of_buffers_are_refused() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xffff_f000)]).unwrap();
    let mut driver = Driver::new();
    driver.memory = Arc::new(memory);
    driver.descriptor(0, DATA, 0xf000_0000, NEXT, 1);
    driver.descriptor(1, DATA, 0x1000_0000, 0, 0);
    driver.refuses(ChainError::TooManyBytes);
}

#[test]
fn indirect_table_is_walked() {
    let mut driver = Driver::new();
    driver.memory.write_slice(b"abcd", GuestAddress(DATA)).unwrap();
    driver.put(0x8000, 0, Descriptor::new(DATA, 4, NEXT, 1));
    driver.put(0x8000, 1, Descriptor::new(DATA + 0x1000, 8, WRITE, 0));
    driver.descriptor(4, 0x8000, 32, INDIRECT, 0);
    driver.offer(4);
    let mut command = Vec::new();
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut command);
    assert_eq!((command.as_slice(), token.room()), (&b"abcd"[..], 8));
    turn.complete(token, b"ok").unwrap();
    drop(turn);
    assert_eq!(driver.used(), [(4, 2)]);
}

#[test]
fn malformed_indirect_tables_are_refused() {
    let driver = Driver::new();
    driver.descriptor(0, 0x8000, 24, INDIRECT, 0);
    driver.refuses(ChainError::IndirectLength(24));

    let driver = Driver::new();
    driver.descriptor(0, 0x8000, 0, INDIRECT, 0);
    driver.refuses(ChainError::IndirectLength(0));

    let driver = Driver::new();
    driver.descriptor(0, 0x8000, 32, INDIRECT | NEXT, 1);
    driver.refuses(ChainError::IndirectAndNext);

    let driver = Driver::new();
    driver.descriptor(0, 0x8000, 32, INDIRECT, 0);
    driver.put(0x8000, 0, Descriptor::new(0x9000, 16, INDIRECT, 0));
    driver.refuses(ChainError::NestedIndirect);

    let driver = Driver::new();
    driver.descriptor(0, 0x8000, 32, INDIRECT, 0);
    driver.put(0x8000, 0, Descriptor::new(DATA, 4, NEXT, 2));
    driver.refuses(ChainError::NextOutOfRange(2));

    let driver = Driver::new();
    driver.descriptor(0, MEMORY_END, 32, INDIRECT, 0);
    driver.refuses(ChainError::OutsideMemory(MEMORY_END));
}

/// A stock driver describes a large buffer of an unprivileged process like this: it is answered, not refused.
#[test]
fn over_long_command_is_read_in_part_and_answered() {
    let mut driver = Driver::new();
    let entries = Budget::COMMANDS.chain;
    for i in 0..u64::from(entries - 1) {
        driver.put(0x10_0000, i, Descriptor::new(DATA, 4096, NEXT, u16::try_from(i + 1).unwrap()));
    }
    driver.put(0x10_0000, u64::from(entries - 1), Descriptor::new(DATA + 0x8000, 64, WRITE, 0));
    driver.descriptor(0, 0x10_0000, entries * 16, INDIRECT, 0);
    driver.offer(0);

    let mut command = Vec::new();
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut command);
    assert_eq!((command.len(), token.room()), (MAX_COMMAND_BYTES + 1, 64));
    turn.complete(token, b"no").unwrap();
    // Its cost counts: the rest of the ring waits for the next turn.
    assert!(matches!(turn.next(&mut command), Ok(Next::Spent)));
    drop(turn);
    assert_eq!(driver.used(), [(0, 2)]);
}

#[test]
fn chains_of_more_descriptors_than_their_queue_allows_are_refused_uncopied() {
    for budget in [Budget::COMMANDS, Budget::EVENTS] {
        let mut driver = Driver::new();
        driver.descriptor(0, 0x10_0000, (budget.chain + 1) * 16, INDIRECT, 0);
        driver.offer(0);
        let mut turn = driver.turn_within(budget).unwrap().unwrap();
        assert!(matches!(turn.next(&mut Vec::new()), Ok(Next::Empty)));
        assert_eq!(turn.refused(), Some((ChainError::TooLong(budget.chain), 1)));
        assert_eq!(turn.cost.descriptors, 1);
    }
}

#[test]
fn commands_in_smaller_pieces_than_any_driver_makes_are_refused() {
    for (pieces, refused) in [(1023_u16, None), (1024, Some((ChainError::TooManySpans, 1)))] {
        let mut driver = Driver::new();
        for i in 0..pieces {
            driver.put(0x8000, i.into(), Descriptor::new(DATA + u64::from(i), 1, NEXT, i + 1));
        }
        driver.put(0x8000, pieces.into(), Descriptor::new(DATA, 1, WRITE, 0));
        driver.descriptor(0, 0x8000, 16 * (u32::from(pieces) + 1), INDIRECT, 0);
        driver.offer(0);
        let mut turn = driver.turn();
        let mut command = Vec::new();
        if let Next::Chain(token) = turn.next(&mut command).unwrap() {
            turn.complete(token, b"").unwrap();
            assert_eq!(command.len(), usize::from(pieces));
        }
        assert_eq!(turn.refused(), refused, "{pieces}");
    }
}

#[test]
fn bytes_of_commands_end_the_turn() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 1 << 20, 0, 0);
    driver.descriptor(1, DATA, 1, 0, 0);
    for head in [0, 1, 1] {
        driver.offer(head);
    }
    let mut turn = driver.turn();
    for _ in 0..2 {
        let token = chain(&mut turn, &mut Vec::new());
        turn.complete(token, b"").unwrap();
    }
    assert!(matches!(turn.next(&mut Vec::new()), Ok(Next::Spent)));
}

/// Many heads on the longest malformed table: each turn pays for one of them.
#[test]
fn expensive_malformed_chains_end_the_turn() {
    let mut driver = Driver::new();
    for i in 0..16_383_u64 {
        driver.put(0x10_0000, i, Descriptor::new(DATA, 4096, NEXT, u16::try_from(i + 1).unwrap()));
    }
    driver.put(0x10_0000, 16_383, Descriptor::new(DATA, 4096, NEXT, 0));
    driver.descriptor(0, 0x10_0000, 16_384 * 16, INDIRECT, 0);
    for _ in 0..SIZE {
        driver.offer(0);
    }
    for turns in 1..=u32::from(SIZE) {
        let mut turn = driver.turn();
        assert!(matches!(turn.next(&mut Vec::new()), Ok(Next::Spent)));
        assert_eq!(turn.refused(), Some((ChainError::Cycle, 1)));
        drop(turn);
        assert_eq!(driver.used().len(), turns as usize);
    }
}

#[test]
fn turn_ends_with_its_budget() {
    let mut driver = Driver::new();
    let most = Budget::COMMANDS.chains;
    driver.size = 2 * u16::try_from(most).unwrap();
    driver.ring.set_queue_size(driver.size);
    driver.descriptor(0, DATA, 1, 0, 0);
    for _ in 0..=most {
        driver.offer(0);
    }
    let mut served = Vec::new();
    for _ in 0..2 {
        let mut turn = driver.turn();
        while let Next::Chain(token) = turn.next(&mut Vec::new()).unwrap() {
            turn.complete(token, b"").unwrap();
        }
        served.push(turn.cost.chains);
    }
    assert_eq!(served, [most, 1]);
}

#[test]
fn available_index_that_jumps_breaks_the_ring() {
    for idx in [SIZE + 1, 0x8000, u16::MAX] {
        let mut driver = Driver::new();
        driver.set_avail(idx);
        let mut turn = driver.turn();
        assert_eq!(turn.next(&mut Vec::new()).unwrap_err(), RingError::AvailIndex);
    }
}

#[test]
fn head_beyond_the_ring_breaks_it() {
    let mut driver = Driver::new();
    driver.offer(SIZE);
    let mut turn = driver.turn();
    assert_eq!(turn.next(&mut Vec::new()).unwrap_err(), RingError::HeadOutOfRange(SIZE));
}

#[test]
fn rings_outside_memory_or_on_each_other_are_not_served() {
    let rings = [
        (MEMORY_END - 16, AVAIL, USED),
        (DESC, MEMORY_END - 2, USED),
        (DESC, AVAIL, MEMORY_END - 4),
        (DESC, AVAIL, MEMORY_END),
        (DESC, 0, USED),
        (DESC, DESC, USED),
        (DESC, AVAIL, AVAIL),
        (DESC, AVAIL, DESC + 16),
        (DESC, AVAIL, AVAIL + 32),
    ];
    for (desc, avail, used) in rings {
        let driver = Driver::new();
        driver.ring.set_queue_info(desc, avail, used).unwrap();
        assert!(matches!(driver.try_turn(), Err(RingError::BadRings)), "{desc:#x} {avail:#x} {used:#x}");
    }
}

#[test]
fn size_that_is_none_is_not_served() {
    let driver = Driver::new();
    driver.ring.set_queue_size(3);
    assert!(matches!(driver.try_turn(), Err(RingError::BadSize)));
    driver.ring.set_queue_size(SIZE);
    assert!(driver.try_turn().unwrap().is_some());
}

/// A VMM's own doing: the framework would go on watching the file that it has closed.
#[test]
fn kick_file_replaced_while_the_ring_runs_fails_it() {
    use rustix::event::{EventfdFlags, eventfd};
    let file = || Some(std::fs::File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
    let driver = Driver::new();
    driver.ring.set_enabled(false);
    for _ in 0..2 {
        driver.ring.set_kick(file());
    }
    driver.ring.set_enabled(true);
    assert!(driver.try_turn().unwrap().is_some());
    let watched = driver.ring.get_ref().get_kick().as_ref().map(std::os::fd::AsRawFd::as_raw_fd);
    for replacement in [file(), None] {
        driver.ring.set_kick(replacement);
        assert!(matches!(driver.try_turn(), Err(RingError::KickReplaced)));
        let kept = driver.ring.get_ref().get_kick().as_ref().map(std::os::fd::AsRawFd::as_raw_fd);
        assert_eq!(kept, watched);
    }
    // As GET_VRING_BASE does it, and a start.
    driver.ring.set_queue_ready(false);
    driver.ring.set_kick(None);
    driver.ring.set_kick(file());
    driver.ring.set_queue_ready(true);
    assert!(driver.try_turn().unwrap().is_some());
}

#[test]
fn rings_of_two_queues_may_share_only_what_is_read() {
    const OTHER: u64 = 0x20_0000;
    // Places of the other ring, and whether they are of use.
    let places = [
        (OTHER, OTHER + 0x1000, OTHER + 0x2000, true),
        (DESC, OTHER + 0x1000, OTHER + 0x2000, true),
        (DESC, AVAIL, OTHER + 0x2000, true),
        (OTHER, OTHER + 0x1000, USED, false),
        (OTHER, OTHER + 0x1000, AVAIL, false),
        (OTHER, OTHER + 0x1000, DESC + 16, false),
        (USED, OTHER + 0x1000, OTHER + 0x2000, false),
        (OTHER, USED + 4 + 8 * u64::from(SIZE), OTHER + 0x2000, false),
        (OTHER, USED + 6 + 8 * u64::from(SIZE), OTHER + 0x2000, true),
    ];
    for (desc, avail, used, fine) in places {
        let (one, other) = (Driver::new(), Driver::new());
        let rings = [one.ring.clone(), other.ring.clone()];
        rings.iter().for_each(|ring| ring.set_peers(&rings));
        other.ring.set_queue_info(desc, avail, used).unwrap();
        for ring in [&one, &other] {
            let outcome = ring.try_turn().map(|turn| turn.is_some());
            let wanted = if fine { Ok(true) } else { Err(RingError::SharedRings) };
            assert_eq!(outcome, wanted, "{desc:#x} {avail:#x} {used:#x}");
        }
        // What does not run is not in the way.
        other.ring.set_enabled(false);
        assert!(one.try_turn().unwrap().is_some());
        other.ring.set_enabled(true);
        other.ring.set_queue_ready(false);
        assert!(one.try_turn().unwrap().is_some());
    }
}

#[test]
fn visits_are_counted() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 4, NEXT, 0);
    driver.descriptor(5, DATA, 4, 0, 0);
    driver.offer(0);
    driver.offer(5);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"").unwrap();
    drop(turn);
    drop(driver.turn());
    driver.ring.fail();
    let expected = crate::ring::RingStatus {
        failed: true,
        failures: 1,
        turns: 2,
        chains: 2,
        refused: 1,
        descriptors: 2,
        most_chains: 2,
        most_descriptors: 2,
    };
    assert_eq!(driver.ring.status(), expected);
}

#[test]
fn stopped_disabled_and_failed_rings_rest() {
    let driver = Driver::new();
    driver.ring.set_enabled(false);
    assert!(driver.try_turn().unwrap().is_none());
    driver.ring.set_enabled(true);
    driver.ring.set_queue_ready(false);
    assert!(driver.try_turn().unwrap().is_none());
    driver.ring.set_queue_ready(true);
    driver.ring.fail();
    assert!(driver.try_turn().unwrap().is_none());
    driver.ring.clear_failure();
    assert!(driver.try_turn().unwrap().is_some());
}

#[test]
fn rearming_sees_what_arrived_meanwhile() {
    let mut driver = Driver::new();
    driver.ring.set_queue_event_idx(true);
    driver.descriptor(0, DATA, 4, 0, 0);
    let memory = Arc::clone(&driver.memory);
    driver.offer(0);
    let mut turn = driver.turn();
    let token = chain(&mut turn, &mut Vec::new());
    turn.complete(token, b"").unwrap();
    assert!(!turn.rearm().unwrap());
    memory.write_obj(2u16, GuestAddress(AVAIL + 2)).unwrap();
    assert!(turn.rearm().unwrap());
    // The event index asks for the very next buffer.
    let avail_event: u16 = memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
    assert_eq!(avail_event, 1);
}

/// The call file is used only when the driver asked for it, and a full one stops nobody.
#[test]
fn driver_is_interrupted_where_it_asked() {
    use rustix::event::{EventfdFlags, eventfd};
    let mut driver = Driver::new();
    // A blocking eventfd: the ring must make it non-blocking.
    let call = std::fs::File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    driver.ring.set_queue_event_idx(true);
    driver.ring.set_call(Some(call.try_clone().unwrap()));
    let signalled = || {
        let mut count = [0; 8];
        rustix::io::read(&call, &mut count).map(|_| u64::from_ne_bytes(count)).unwrap_or(0)
    };
    let serve = |driver: &mut Driver| {
        driver.descriptor(0, DATA, 4, 0, 0);
        driver.offer(0);
        let mut turn = driver.turn();
        let token = chain(&mut turn, &mut Vec::new());
        turn.complete(token, b"").unwrap();
        turn.finish().unwrap();
    };
    let used_event = GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE));
    driver.memory.write_obj(0u16, used_event).unwrap();
    serve(&mut driver);
    assert_eq!(signalled(), 1);
    driver.memory.write_obj(5u16, used_event).unwrap();
    serve(&mut driver);
    assert_eq!(signalled(), 0);

    driver.memory.write_obj(2u16, used_event).unwrap();
    rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    serve(&mut driver);
    assert_eq!(driver.used().len(), 3);
}

/// A driver that does something whenever the clock is looked at; each time a microsecond passes.
struct Beside<F>(Duration, F);

impl<F: FnMut()> Clock for Beside<F> {
    fn now(&mut self) -> Duration {
        self.0 += Duration::from_micros(1);
        (self.1)();
        self.0
    }
}

/// The driver waits for each answer with the next command: it is interrupted before the ring is looked at again, and need
/// not notify.
#[test]
fn commands_that_come_while_the_ring_is_looked_at_are_served_in_the_same_visit() {
    use rustix::event::{EventfdFlags, eventfd};
    let mut driver = Driver::new();
    let call = std::fs::File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
    driver.ring.set_queue_event_idx(true);
    driver.ring.set_call(Some(call.try_clone().unwrap()));
    driver.descriptor(0, DATA, 4, 0, 0);
    driver.offer(0);
    let memory = Arc::clone(&driver.memory);
    let avail_event = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
    memory.write_obj(0xffff_u16, avail_event).unwrap();
    let mut interrupts = 0;
    let beside = Beside(Duration::ZERO, || {
        let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        if interrupts < 3 && rustix::io::read(&call, &mut [0; 8]).is_ok() {
            interrupts += 1;
            assert_eq!(used, interrupts);
            assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), 0xffff);
            memory.write_obj(used, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
            memory.write_obj(0_u16, GuestAddress(AVAIL + 4 + 2 * u64::from(used))).unwrap();
            memory.write_obj(used + 1, GuestAddress(AVAIL + 2)).unwrap();
        }
    });
    let mut poll = BusyPoll::new(beside, Duration::from_micros(10));
    let mut commands = 0;
    let mut turn = driver.turn();
    let served = turn.serve(
        &mut poll,
        |_| true,
        |_, _, _| {
            commands += 1;
            ControlFlow::Continue(())
        },
    );
    assert_eq!((served, commands), (Ok(Served::Empty), 4));
    turn.finish().unwrap();
    assert_eq!(interrupts, 3);
    assert_eq!(memory.read_obj::<u16>(avail_event).unwrap(), 4);
}

/// What the driver sees when each of `commands` is carried out: chains that were given back.
fn seen_before_each(commands: &[&[u8; 4]]) -> Vec<u16> {
    let mut driver = Driver::new();
    driver.ring.set_queue_size(64);
    driver.size = 64;
    for (index, command) in (0_u16..).zip(commands) {
        let at = DATA + 16 * u64::from(index);
        driver.memory.write_slice(*command, GuestAddress(at)).unwrap();
        driver.descriptor(index, at, 4, 0, 0);
        driver.offer(index);
    }
    let mut seen = Vec::new();
    let mut turn = driver.turn();
    let served = turn.serve(
        &mut at_once(),
        |command| command != b"long",
        |_, _, _| {
            seen.push(driver.memory.read_obj(GuestAddress(USED + 2)).unwrap());
            ControlFlow::Continue(())
        },
    );
    assert_eq!(served, Ok(Served::Empty));
    assert_eq!(driver.used().len(), commands.len(), "before the visit ends");
    turn.finish().unwrap();
    seen
}

#[test]
fn driver_sees_answers_to_brief_commands_together() {
    let seen = seen_before_each(&[b"tiny"; 40]);
    let expected: Vec<u16> = (0..40).map(|before| before / UNPUBLISHED * UNPUBLISHED).collect();
    assert_eq!(seen, expected);
}

#[test]
fn no_answer_waits_for_a_command_that_may_be_long() {
    let seen = seen_before_each(&[b"tiny", b"tiny", b"long", b"long", b"tiny", b"tiny"]);
    assert_eq!(seen, [0, 0, 2, 3, 3, 3]);
}

/// A ring that breaks has answered what came before.
#[test]
fn answers_before_a_broken_head_are_seen() {
    let mut driver = Driver::new();
    driver.descriptor(0, DATA, 4, 0, 0);
    driver.offer(0);
    driver.offer(SIZE);
    let mut turn = driver.turn();
    let served = turn.serve(&mut at_once(), |_| true, |_, _, _| ControlFlow::Continue(()));
    assert_eq!(served, Err(RingError::HeadOutOfRange(SIZE)));
    drop(turn);
    assert_eq!(driver.used(), [(0, 0)]);
}

/// What the dearest visits cost. Nothing is asserted:
/// `cargo test -p daemon --lib dearest_visits -- --ignored --nocapture`
#[test]
#[ignore = "measures; prints processor time"]
fn dearest_visits() {
    use rustix::time::{ClockId, clock_gettime};
    use std::time::Duration;
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x80_0000)]).unwrap());
    let shapes: [(&str, u32, u64, bool); 5] = [
        ("pages", 4096, 1, true),
        ("pages, in scattered order", 4096, 40_503, true),
        ("pages, no end", 4096, 40_503, false),
        ("bytes", 1, 1, true),
        ("nothing", 0, 40_503, false),
    ];
    for (name, len, step, ends) in shapes {
        let mut driver = Driver::new();
        driver.memory = Arc::clone(&memory);
        for i in 0..16_384_u64 {
            let (at, next) = (i * step % 16_384, (i + 1) * step % 16_384);
            driver.put(0x10_0000, at, Descriptor::new(DATA, len, NEXT, u16::try_from(next).unwrap()));
        }
        if ends {
            let last = 16_383 * step % 16_384;
            driver.put(0x10_0000, last, Descriptor::new(DATA + 0x8000, 64, WRITE, 0));
        }
        driver.descriptor(0, 0x10_0000, 16_384 * 16, INDIRECT, 0);
        driver.descriptor(1, 0x10_0000, 4094 * 16, INDIRECT, 0);
        // As near to the budget as a chain leads, and then the longest there is.
        let (mut times, mut descriptors) = (Vec::new(), 0);
        for _ in 0..8 {
            let mut command = Vec::new();
            driver.offer(1);
            driver.offer(0);
            let time = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
            let before = time();
            let mut turn = driver.turn();
            while let Next::Chain(token) = turn.next(&mut command).unwrap() {
                turn.complete(token, b"no").unwrap();
            }
            descriptors = turn.cost.descriptors;
            drop(turn);
            times.push(time() - before);
        }
        times.sort_unstable();
        println!("{name}: {descriptors} descriptors, {:?} to {:?}", times[0], times[7]);
    }
}
