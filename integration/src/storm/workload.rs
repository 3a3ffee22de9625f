//! One process' part of the storm: packets for each device, what they must leave behind, and which faults they raise.
//!
//! The arena is windows of [`WINDOW_PAGES`] pages: first one a device for its results, then those that are touched. All
//! devices touch the same windows, but each its own pages of them, so that what comes out does not depend on which is
//! faster. The first touch of a window decides how its fault is reported; further touches raise none.

use crate::guest::SimulatedProcess;
use crate::ledger::{Outcome, Touch, WINDOW_PAGES};
use crate::random::Random;
use anyhow::Result;
use std::collections::BTreeMap;
use std::sync::Arc;
use virtio_gpu_svm::device::Access;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, OP_COPY, OP_FILL, OP_REDUCE, Packet};

/// A: where the arena stands in every process.
pub const ARENA: u64 = 0x7f12_3450_0000;
/// C: where it stands in every GPU VM. Aligned as A is, so that windows of both are the same pages.
pub const GPU_ARENA: u64 = 0x0042_0000_0000;
/// Devices that can share a window: each has a page of its own at least.
pub const MAX_DEVICES: usize = 16;
const _: () = assert!(MAX_DEVICES as u64 == WINDOW_PAGES);

const WINDOW_BYTES: u64 = WINDOW_PAGES * PAGE_SIZE;
/// Words that one packet touches at most.
const MAX_WORDS: u64 = 32;
/// One window in so many is touched once more.
const AGAIN: u64 = 4;
/// Words that one copy brings into the result window at most; bounds what has to fit there.
const MAX_COPY_WORDS: u64 = 8;

/// A process' part.
pub struct Workload {
    /// Words before the first job.
    initial: BTreeMap<u64, u64>,
    /// Words after the last job, by address in A.
    expected: BTreeMap<u64, u64>,
    devices: Vec<DeviceWork>,
    windows: u64,
}

#[derive(Default)]
struct DeviceWork {
    packets: Vec<Packet>,
    /// Window and the access that touches it first.
    touches: Vec<(u64, Access)>,
}

impl Workload {
    /// Work that raises `faults[d]` faults on device d, at least 2 each.
    pub fn new(seed: u64, faults: &[u64]) -> Self {
        let result_windows = faults.len() as u64;
        let data_windows = faults.iter().map(|faults| faults - 1).max().unwrap_or(0);
        let (initial, expected) = (BTreeMap::new(), BTreeMap::new());
        let mut workload =
            Self { initial, expected, devices: vec![], windows: result_windows + data_windows };
        let mut random = Random::new(seed);
        for (device, faults) in faults.iter().enumerate() {
            let mut windows: Vec<u64> = (result_windows..result_windows + data_windows).collect();
            random.shuffle(&mut windows);
            windows.truncate(usize::try_from(faults - 1).unwrap_or(usize::MAX));
            let mut maker = Maker { workload: &mut workload, random: &mut random, device, results: 0 };
            let work = maker.make(&windows, result_windows);
            workload.devices.push(work);
        }
        workload
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> u64 {
        self.windows * WINDOW_BYTES
    }

    /// Puts the words that jobs read into the process' memory.
    pub fn write_initial(&self, process: &SimulatedProcess) -> Result<()> {
        self.initial.iter().try_for_each(|(va, word)| process.write(*va, &word.to_le_bytes()))
    }

    /// The packets of a device.
    pub fn packets(&self, device: usize) -> &[Packet] {
        self.devices.get(device).map_or(&[], |work| &work.packets)
    }

    /// Compares the process' memory with what must be there: words looked at, words that are wrong.
    pub fn check(&self, process: &SimulatedProcess) -> Result<(u64, u64)> {
        let mut wrong = 0;
        for (va, word) in &self.expected {
            wrong += u64::from(process.read_word(*va)? != *word);
        }
        Ok((self.expected.len() as u64, wrong))
    }

    /// The faults that must have been raised.
    pub fn touches(&self, guest: &Arc<str>, ctx_id: u32) -> Vec<Touch> {
        let touch = |device, (window, access): &(u64, Access)| Touch {
            guest: guest.clone(),
            ctx_id,
            device,
            page: GPU_ARENA / PAGE_SIZE + window * WINDOW_PAGES,
            cpu_page: ARENA / PAGE_SIZE + window * WINDOW_PAGES,
            access: *access,
            outcome: Outcome::Served,
        };
        let devices = self.devices.iter().enumerate();
        devices.flat_map(|(device, work)| work.touches.iter().map(move |t| touch(device, t))).collect()
    }
}

/// Makes the packets of one device and carries them out on paper.
struct Maker<'a> {
    workload: &'a mut Workload,
    random: &'a mut Random,
    device: usize,
    /// Words of the result window in use.
    results: u64,
}

impl Maker<'_> {
    fn make(&mut self, windows: &[u64], devices: u64) -> DeviceWork {
        let mut work = DeviceWork { packets: vec![], touches: vec![(self.device as u64, Access::Write)] };
        for window in windows {
            let (packet, access) = self.packet(*window, devices);
            work.packets.push(packet);
            work.touches.push((*window, access));
            if self.random.below(AGAIN) == 0 {
                work.packets.push(self.packet(*window, devices).0);
            }
        }
        let marker = self.random.next_u64();
        let dst = self.take_results(1);
        self.workload.expected.insert(dst, marker);
        work.packets.push(packet(OP_FILL, dst, 0, 8, marker));
        work
    }

    /// A packet that touches a window, and how it touches it first.
    fn packet(&mut self, window: u64, devices: u64) -> (Packet, Access) {
        let words = 1 + self.random.below(MAX_WORDS);
        let at = self.place(window, words, devices);
        match self.random.below(4) {
            0 => {
                let value = self.random.next_u64();
                for word in 0..words {
                    self.workload.expected.insert(at + 8 * word, value);
                }
                (packet(OP_FILL, at, 0, 8 * words, value), Access::Write)
            }
            1 => {
                let sum = (0..words).fold(0_u64, |sum, word| sum.wrapping_add(self.word(at + 8 * word)));
                let dst = self.take_results(1);
                self.workload.expected.insert(dst, sum);
                (packet(OP_REDUCE, dst, at, 8 * words, 0), Access::Read)
            }
            2 => {
                let words = words.min(MAX_COPY_WORDS);
                let dst = self.take_results(words);
                for word in 0..words {
                    let value = self.word(at + 8 * word);
                    self.workload.expected.insert(dst + 8 * word, value);
                }
                (packet(OP_COPY, dst, at, 8 * words, 0), Access::Read)
            }
            _ => {
                let value = self.random.next_u64();
                let sum = self.word(at).wrapping_add(value);
                self.workload.expected.insert(at, sum);
                (packet(OP_ATOMIC_ADD, at, 0, 0, value), Access::Atomic)
            }
        }
    }

    /// An address in this device's pages of a window, with room for some words in the page.
    fn place(&mut self, window: u64, words: u64, devices: u64) -> u64 {
        let pages = WINDOW_PAGES / devices;
        let page = window * WINDOW_PAGES + self.device as u64 * pages + self.random.below(pages);
        let word = self.random.below(PAGE_SIZE / 8 - words + 1);
        ARENA + page * PAGE_SIZE + 8 * word
    }

    /// What a word holds by now; if nobody has said so far, something random from the start.
    fn word(&mut self, va: u64) -> u64 {
        let Workload { initial, expected, .. } = &mut *self.workload;
        *expected.entry(va).or_insert_with(|| *initial.entry(va).or_insert_with(|| self.random.next_u64()))
    }

    fn take_results(&mut self, words: u64) -> u64 {
        let at = ARENA + self.device as u64 * WINDOW_BYTES + 8 * self.results;
        self.results += words;
        assert!(8 * self.results <= WINDOW_BYTES, "too many packets for one window of results");
        at
    }
}

/// A packet on addresses of the process, which stand at C..D for the device.
fn packet(opcode: u32, dst: u64, src: u64, len: u64, value: u64) -> Packet {
    let gpu = |va: u64| if va == 0 { 0 } else { va - ARENA + GPU_ARENA };
    Packet {
        opcode: opcode.into(),
        dst: gpu(dst).into(),
        src: gpu(src).into(),
        len: len.into(),
        value: value.into(),
        ..Packet::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_fault_is_of_another_window() {
        let workload = Workload::new(7, &[40, 39]);
        let touches = workload.touches(&"g".into(), 1);
        assert_eq!(touches.len(), 79);
        let windows: BTreeSet<_> = touches.iter().map(|t| (t.device, t.page / WINDOW_PAGES)).collect();
        assert_eq!(windows.len(), 79);
    }

    #[test]
    fn equal_seeds_give_equal_work() {
        let (a, b) = (Workload::new(3, &[20, 20]), Workload::new(3, &[20, 20]));
        assert_eq!(a.packets(1), b.packets(1));
        assert_eq!(a.expected, b.expected);
        assert_ne!(a.packets(0), Workload::new(4, &[20, 20]).packets(0));
    }

    #[test]
    fn devices_write_different_words() {
        let workload = Workload::new(11, &[60, 60]);
        let written = |device| {
            let packets = workload.packets(device).iter();
            packets.map(|p| p.dst.get() / PAGE_SIZE).collect::<BTreeSet<u64>>()
        };
        assert!(written(0).is_disjoint(&written(1)));
    }
}
