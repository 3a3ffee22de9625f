//! Devices without faults: what is not bound ends the job, unless the GPU VM is frozen.

use crate::packets::{copy, fill, packet, reduce, word_op};
use crate::rig::{C, Memory, Random, Rig, pages};
use crate::{NO_FAULTS, on_each_with};
use std::time::Duration;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::{Access, Asid, Flush, JobId};
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::{PAGE_SIZE, errno};

#[test]
fn a_missing_page_ends_the_job_at_its_address() {
    on_each_with(NO_FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        rig.bind(vm, C, &memory, 0, 1);
        let read = copy(C, C + 5 * PAGE_SIZE + 3, 16);
        let bad = rig.submit(vm, 0, &[fill(C, 8, 1), packet(OP_NOP, |_| ()), read, fill(C + 8, 8, 9)]);
        let next = rig.submit(vm, 0, &[fill(C + 16, 8, 2)]);
        let other = rig.submit(vm, 1, &[word_op(OP_SEM_WAIT, C, 1)]);
        let end = rig.end_of(bad);
        assert_eq!((end.errno, end.packet), (errno::EFAULT, 2));
        assert_eq!((end.addr.0, end.access), (C + 5 * PAGE_SIZE + 3, Access::Read));
        assert_eq!((rig.end_of(next).errno, rig.end_of(other).errno), (0, 0));
        assert_eq!([0, 8, 16].map(|offset| memory.get(offset)), [1, 0, 2]);
        assert_eq!((rig.faults().len(), rig.device.ledger()), (0, (vec![], 0)));
    });
}

/// What came before the missing page was done; the page itself tells the address, not the packet's begin.
#[test]
fn a_packet_that_runs_out_of_pages_ends_where_they_end() {
    on_each_with(NO_FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(3));
        rig.bind(vm, C, &memory, 0, 3);
        let end = rig.run(vm, &[fill(C + 8, 4 * PAGE_SIZE, 3)]);
        assert_eq!((end.errno, end.addr.0, end.access), (errno::EFAULT, C + 3 * PAGE_SIZE, Access::Write));
        assert_eq!(memory.words().sum::<u64>(), 3 * (3 * PAGE_SIZE / 8 - 1));
    });
}

#[test]
fn a_read_only_page_ends_writes_with_eperm() {
    on_each_with(NO_FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        memory.set(8, 40);
        rig.device.bind(vm, GpuAddr(C), &[memory.extent(0, 1, false)]).unwrap();
        rig.bind(vm, C + PAGE_SIZE, &memory, 1, 1);
        assert_eq!(rig.run(vm, &[reduce(C + PAGE_SIZE, C, 16)]).errno, 0);
        assert_eq!(memory.get(PAGE_SIZE), 40);
        for (packet, access) in
            [(fill(C + 8, 8, 1), Access::Write), (word_op(OP_ATOMIC_ADD, C + 8, 1), Access::Atomic)]
        {
            let end = rig.run(vm, &[packet]);
            assert_eq!((end.errno, end.addr.0, end.access), (errno::EPERM, C + 8, access));
        }
        assert_eq!(memory.get(8), 40);
        rig.bind(vm, C, &memory, 0, 1);
        assert_eq!((rig.run(vm, &[fill(C + 8, 8, 2)]).errno, memory.get(8)), (0, 2));
    });
}

#[test]
fn unbound_pages_end_jobs_until_they_are_bound_again() {
    on_each_with(NO_FAULTS, |rig| {
        let (vm, memory, other) = (rig.vm(1), Memory::new(3), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 3);
        let flush = rig.device.unbind(vm, pages(C + PAGE_SIZE, 1));
        rig.wait_flush(vm, flush);
        let end = rig.run(vm, &[fill(C, 3 * PAGE_SIZE, 1)]);
        assert_eq!((end.errno, end.addr.0), (errno::EFAULT, C + PAGE_SIZE));
        rig.bind(vm, C + PAGE_SIZE, &other, 0, 1);
        assert_eq!(rig.run(vm, &[fill(C, 3 * PAGE_SIZE, 2)]).errno, 0);
        let words = [0, PAGE_SIZE, 2 * PAGE_SIZE].map(|offset| memory.get(offset));
        assert_eq!((words, other.get(0)), ([2, 0, 2], 2));
    });
}

#[test]
fn a_frozen_vm_may_be_bound_elsewhere() {
    on_each_with(NO_FAULTS, |rig| {
        let (vm, old, new) = (rig.vm(1), Memory::new(2), Memory::new(2));
        rig.bind(vm, C, &old, 0, 2);
        let waits = rig.submit(vm, 0, &[word_op(OP_SEM_WAIT, C, 1), fill(C + PAGE_SIZE, 8, 5)]);
        let flush = rig.device.set_frozen(vm, true);
        rig.wait_flush(vm, flush);
        let flush = rig.device.unbind(vm, rig.all());
        rig.wait_flush(vm, flush);
        let queued = rig.submit(vm, 1, &[word_op(OP_ATOMIC_ADD, C, 1)]);
        old.set(0, 1);
        rig.bind(vm, C, &new, 0, 2);
        assert_eq!(rig.device.set_frozen(vm, false), Flush::Done);
        assert_eq!((rig.end_of(queued).errno, rig.end_of(waits).errno), (0, 0));
        assert_eq!((old.get(PAGE_SIZE), new.get(PAGE_SIZE)), (0, 5));
    });
}

/// Half the bytes that move about; they are copied from the first half to the second.
const HALF: u64 = 32 * PAGE_SIZE;
/// Pages that are bound: as small ones, or with what comes after them as a large leaf.
const SMALL: u64 = 2 * HALF / PAGE_SIZE;
const LARGE: u64 = 512;
/// Where they are bound, and where results are.
const MOVES: u64 = C;
const RESULTS: u64 = C + (1 << 24);
/// What every word of it holds, and what is left behind where it was.
const LIVE: u64 = 0x0101_0101_0101_0101;
const POISON: u64 = 0x00dd_0000_0000_dead;

/// A GPU VM whose memory is moved from place to place while its jobs copy and add it up.
struct Moving {
    rig: Rig,
    vm: Asid,
    /// The first is bound; the others are all poison.
    places: Vec<Memory>,
    /// How many pages of it.
    bound: u64,
    results: Memory,
    jobs: Vec<JobId>,
    /// How many of them have surely ended.
    ended: usize,
}

impl Moving {
    const ROUNDS: u64 = 1000;
    const ADDITIONS: u64 = 4;
    /// Jobs in flight, so that engines are busy.
    const BUSY: usize = 4;
    const MOST_JOBS: u64 = 1 << 14;

    fn new(rig: Rig) -> Self {
        let vm = rig.vm(1);
        let places: Vec<_> = (0..3).map(|_| Memory::new(LARGE)).collect();
        let results = Memory::new(Self::MOST_JOBS * Self::ADDITIONS * 8 / PAGE_SIZE);
        places.iter().for_each(|place| fill_place(place, POISON));
        fill_place(&places[0], LIVE);
        rig.bind(vm, MOVES, &places[0], 0, LARGE);
        rig.bind(vm, RESULTS, &results, 0, results.0.size() / PAGE_SIZE);
        Self { rig, vm, places, bound: LARGE, results, jobs: vec![], ended: 0 }
    }

    /// A job that copies the first half to the second and adds that up, a few times.
    fn submit(&mut self) {
        let first = self.jobs.len() as u64 * Self::ADDITIONS;
        let add =
            |n: u64| [copy(MOVES + HALF, MOVES, HALF), reduce(RESULTS + 8 * (first + n), MOVES + HALF, HALF)];
        let packets: Vec<_> = (0..Self::ADDITIONS).flat_map(add).collect();
        self.jobs.push(self.rig.submit(self.vm, first as u32 / 8 % 3, &packets));
    }

    /// Submits jobs until enough are in flight. Those have ended whose last result is there.
    fn keep_busy(&mut self) {
        let last = |job: usize| 8 * ((job as u64 + 1) * Self::ADDITIONS - 1);
        while self.ended < self.jobs.len() && self.results.get(last(self.ended)) != 0 {
            self.ended += 1;
        }
        while self.jobs.len() - self.ended < Self::BUSY && (self.jobs.len() as u64) < Self::MOST_JOBS {
            self.submit();
        }
    }

    /// Freezes, if it can be met while an engine is in a slice.
    fn freeze(&mut self, random: &mut Random) -> Flush {
        for _ in 0..10 {
            self.keep_busy();
            // An engine that is woken by a thaw needs time to begin.
            std::thread::sleep(Duration::from_micros(random.below(100)));
            let flush = self.rig.device.set_frozen(self.vm, true);
            if flush != Flush::Done {
                return flush;
            }
            assert_eq!(self.rig.device.set_frozen(self.vm, false), Flush::Done);
        }
        self.rig.device.set_frozen(self.vm, true)
    }

    /// Freezes, unbinds some pages, binds them again where they were and thaws, a few times without waiting for a flush:
    /// slices that run on come to the gap, and are over when it is there no more.
    fn rebind(&mut self, random: &mut Random) {
        let mut flushes = [Flush::Done; 2];
        for _ in 0..1 + random.below(4) {
            let first = random.below(self.bound);
            let count = 1 + random.below(self.bound - first);
            let frozen = self.freeze(random);
            let unbound = self.rig.device.unbind(self.vm, pages(MOVES + first * PAGE_SIZE, count));
            flushes = [frozen, unbound];
            match random.below(3) {
                0 => {}
                1 => spin(random.below(1000)),
                _ => (0..=random.below(4)).for_each(|_| std::thread::yield_now()),
            }
            // A large leaf went whole.
            self.rig.bind(self.vm, MOVES, &self.places[0], 0, self.bound);
            assert_eq!(self.rig.device.set_frozen(self.vm, false), Flush::Done);
        }
        flushes.into_iter().for_each(|flush| self.rig.wait_flush(self.vm, flush));
    }

    /// Freezes, unbinds all, and binds it elsewhere after the flush. Then nothing may be read from or written to the
    /// place where it was.
    fn move_away(&mut self, random: &mut Random) {
        let frozen = self.freeze(random);
        let device = &self.rig.device;
        let unbound = device.unbind(self.vm, pages(MOVES, self.bound));
        self.rig.wait_flush(self.vm, frozen);
        self.rig.wait_flush(self.vm, unbound);
        fill_place(&self.places[0], POISON);
        let new = &self.places[1];
        assert!(is_poison(new), "a store to memory that was let go");
        fill_place(new, LIVE);
        self.bound = [SMALL, LARGE][random.below(2) as usize];
        self.rig.bind(self.vm, MOVES, new, 0, self.bound);
        assert_eq!(device.set_frozen(self.vm, false), Flush::Done);
        self.places.rotate_left(1);
    }

    fn check(&self) {
        for job in &self.jobs {
            let end = self.rig.end_of(*job);
            assert_eq!(end.errno, 0, "{job:?}: {end:?}");
        }
        let wanted = LIVE.wrapping_mul(HALF / 8);
        for n in 0..self.jobs.len() as u64 * Self::ADDITIONS {
            assert_eq!(self.results.get(8 * n), wanted, "addition {n}");
        }
        assert!(self.rig.faults().is_empty());
        assert!(self.places[1..].iter().all(is_poison));
    }
}

/// Sets what moves, backwards, towards the copies that run.
fn fill_place(place: &Memory, value: u64) {
    (0..2 * HALF / 8).rev().for_each(|word| place.set(8 * word, value));
}

fn is_poison(place: &Memory) -> bool {
    (0..2 * HALF).step_by(8).all(|offset| place.get(offset) == POISON)
}

fn spin(times: u64) {
    (0..times).for_each(|_| std::hint::spin_loop());
}

#[test]
fn jobs_that_race_with_freezes_neither_fail_nor_see_stale_memory() {
    on_each_with(NO_FAULTS, |rig| {
        let seed = 0xf10_25ee_d5ee_d001;
        println!("seed {seed:#x}");
        let (mut random, mut moving) = (Random(seed), Moving::new(rig));
        for _ in 0..Moving::ROUNDS {
            match random.below(2) {
                0 => moving.rebind(&mut random),
                _ => moving.move_away(&mut random),
            }
        }
        moving.check();
    });
}
