//! The geometry of the story: what each process' memory holds, which packets its jobs are made of, which windows they
//! touch, and what must stand in memory afterwards. Everything follows from a seed, so that the process and its judge
//! need not trust each other, nor what the memory holds.
//!
//! ```text
//!   window   0        1             2           3 ..           3 + D     4 + D
//!            words    linked list   floats      results of     counter   never touched
//!            (u64)    (pointers)    (f64)       device d       (shared)  until late
//! ```
//! A window is 64 KiB, aligned on both sides: the unit in which faults are served.

use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, OP_AXPY, OP_CHASE, OP_COPY, OP_FILL, OP_REDUCE, Packet};

/// Bytes of a window.
pub const WINDOW: u64 = 64 << 10;
/// Nodes of the linked list.
const NODES: u64 = 512;
/// Bytes of a node: {next, payload}.
const NODE: u64 = 16;
/// Within a device's results: the sum of the words.
const SUM: u64 = 0;
/// Nodes seen, then the sum of their payloads.
const CHASED: u64 = 16;
/// y of the axpy.
const Y: u64 = 4 << 10;
const FLOATS: u64 = 2048;
/// Filled with a word.
const FILLED: u64 = 24 << 10;
const FILL_BYTES: u64 = 8 << 10;
/// A copy of the first words.
const COPIED: u64 = 32 << 10;
const COPY_BYTES: u64 = 32 << 10;
/// a of the axpy.
const SCALE: f64 = 1.5;

/// Where a process has its memory, and where its GPUs see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// A.
    pub cpu: u64,
    /// C.
    pub gpu: u64,
    /// Devices, each with a GPU VM of the process.
    pub devices: u32,
    /// Makes the contents.
    pub seed: u64,
}

/// How a job touches a window first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Adds atomically.
    Atomic,
}

impl Geometry {
    /// Windows in all.
    pub fn windows(&self) -> u64 {
        u64::from(self.devices) + 5
    }
    /// Bytes in all: B - A, and D - C.
    pub fn bytes(&self) -> u64 {
        self.windows() * WINDOW
    }
    fn results(&self, device: u32) -> u64 {
        (3 + u64::from(device)) * WINDOW
    }
    fn counter(&self) -> u64 {
        (3 + u64::from(self.devices)) * WINDOW
    }
    /// Offset of the window that only late jobs touch.
    pub fn late(&self) -> u64 {
        (4 + u64::from(self.devices)) * WINDOW
    }
    /// Where the windows are that a device's job touches, by offset, in order, each with its first touch.
    pub fn touches(&self, device: u32) -> Vec<(u64, Touch)> {
        vec![
            (0, Touch::Read),
            (self.results(device), Touch::Write),
            (WINDOW, Touch::Read),
            (2 * WINDOW, Touch::Read),
            (self.counter(), Touch::Atomic),
        ]
    }
    /// The packets of a device's job in a round.
    pub fn packets(&self, device: u32, round: u64) -> Vec<Packet> {
        let at = |offset: u64| (self.gpu + offset).into();
        let results = self.results(device);
        let packet = |opcode: u32| Packet { opcode: opcode.into(), ..Packet::default() };
        vec![
            Packet { dst: at(results + SUM), src: at(0), len: WINDOW.into(), ..packet(OP_REDUCE) },
            Packet {
                dst: at(results + CHASED),
                src: at(WINDOW + self.slot(0) * NODE),
                value: (NODES * 2).into(),
                arg: self.gpu.wrapping_sub(self.cpu).into(),
                ..packet(OP_CHASE)
            },
            Packet {
                dst: at(results + Y),
                src: at(2 * WINDOW),
                len: (FLOATS * 8).into(),
                value: SCALE.to_bits().into(),
                ..packet(OP_AXPY)
            },
            Packet {
                dst: at(results + FILLED),
                len: FILL_BYTES.into(),
                value: self.fill_word(device, round).into(),
                ..packet(OP_FILL)
            },
            Packet { dst: at(results + COPIED), src: at(0), len: COPY_BYTES.into(), ..packet(OP_COPY) },
            Packet {
                dst: at(self.counter()),
                value: (u64::from(device) + 1).into(),
                ..packet(OP_ATOMIC_ADD)
            },
        ]
    }
    /// A job that reads a window and stores the sum in its first word.
    pub fn read_window(&self, offset: u64) -> Packet {
        let window = self.gpu + offset;
        Packet {
            opcode: OP_REDUCE.into(),
            dst: window.into(),
            src: window.into(),
            len: WINDOW.into(),
            ..Packet::default()
        }
    }
    fn fill_word(&self, device: u32, round: u64) -> u64 {
        mix(self.seed ^ mix(round << 32 | u64::from(device)))
    }
    /// Where the n-th node of the list stands, in nodes: every slot once, in an order that only the seed knows.
    fn slot(&self, n: u64) -> u64 {
        (n * 173).wrapping_add(self.seed) % NODES * (WINDOW / NODE / NODES)
    }

    /// What the memory holds before the first job.
    pub fn contents(&self) -> Memory {
        let mut memory = Memory(vec![0; usize::try_from(self.bytes()).unwrap_or(0)]);
        for offset in (0..self.bytes()).step_by(8) {
            memory.set(offset, mix(self.seed.wrapping_add(offset)));
        }
        for n in 0..NODES {
            let at = WINDOW + self.slot(n) * NODE;
            let next = if n + 1 < NODES { self.cpu + WINDOW + self.slot(n + 1) * NODE } else { 0 };
            memory.set(at, next);
        }
        for n in 0..FLOATS {
            memory.set(2 * WINDOW + n * 8, small_float(mix(self.seed ^ n)));
            for device in 0..self.devices {
                memory.set(self.results(device) + Y + n * 8, small_float(mix(!self.seed ^ n)));
            }
        }
        memory
    }
    /// Does in plain code what a device's job of a round does.
    pub fn apply(&self, memory: &mut Memory, device: u32, round: u64) {
        let results = self.results(device);
        let sum = (0..WINDOW).step_by(8).fold(0, |sum: u64, at| sum.wrapping_add(memory.get(at)));
        memory.set(results + SUM, sum);
        let payloads = (0..NODES).map(|n| memory.get(WINDOW + self.slot(n) * NODE + 8));
        let payloads = payloads.fold(0, u64::wrapping_add);
        memory.set(results + CHASED, NODES);
        memory.set(results + CHASED + 8, payloads);
        for n in 0..FLOATS {
            let (x, at) = (f64::from_bits(memory.get(2 * WINDOW + n * 8)), results + Y + n * 8);
            let y = f64::from_bits(memory.get(at));
            memory.set(at, (y + SCALE * x).to_bits());
        }
        for at in (0..FILL_BYTES).step_by(8) {
            memory.set(results + FILLED + at, self.fill_word(device, round));
        }
        for at in (0..COPY_BYTES).step_by(8) {
            memory.set(results + COPIED + at, memory.get(at));
        }
        memory.set(self.counter(), memory.get(self.counter()).wrapping_add(u64::from(device) + 1));
    }
    /// The sum that a device must have stored, for people.
    pub fn sum_of(&self, memory: &Memory, device: u32) -> u64 {
        memory.get(self.results(device) + SUM)
    }
}

/// A process' memory, from A on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory(pub Vec<u8>);

impl Memory {
    /// The word at an offset inside.
    pub fn get(&self, offset: u64) -> u64 {
        let word = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.first_chunk());
        word.map_or(0, |word| u64::from_le_bytes(*word))
    }
    fn set(&mut self, offset: u64, value: u64) {
        let word = usize::try_from(offset).ok().and_then(|at| self.0.get_mut(at..)?.first_chunk_mut());
        if let Some(word) = word {
            *word = value.to_le_bytes();
        }
    }
    /// Bytes that differ.
    pub fn differing(&self, other: &Self) -> usize {
        self.0.iter().zip(&other.0).filter(|(a, b)| a != b).count() + self.0.len().abs_diff(other.0.len())
    }
}

/// splitmix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// A float whose sums and products here are exact.
fn small_float(x: u64) -> u64 {
    f64::from(u16::try_from(x % 1024).unwrap_or(0)).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_visits_every_node_once() {
        let geometry = Geometry { cpu: 0x7000_0000_0000, gpu: 0x1_0000_0000, devices: 2, seed: 7 };
        let memory = geometry.contents();
        let (mut at, mut seen) = (geometry.cpu + WINDOW + geometry.slot(0) * NODE, 0);
        while at != 0 {
            assert!((WINDOW..2 * WINDOW).contains(&(at - geometry.cpu)));
            at = memory.get(at - geometry.cpu);
            seen += 1;
        }
        assert_eq!(seen, NODES);
    }

    #[test]
    fn seeds_and_rounds_make_different_results() {
        let of = |seed| {
            let geometry = Geometry { cpu: 0, gpu: 0, devices: 1, seed };
            let mut memory = geometry.contents();
            geometry.apply(&mut memory, 0, 0);
            geometry.sum_of(&memory, 0)
        };
        assert_ne!(of(1), of(2));
        let geometry = Geometry { cpu: 0, gpu: 0, devices: 1, seed: 1 };
        let mut memory = geometry.contents();
        let before = memory.clone();
        geometry.apply(&mut memory, 0, 1);
        let once = memory.clone();
        geometry.apply(&mut memory, 0, 2);
        assert!(before.differing(&once) > 0 && once.differing(&memory) > 0);
    }
}
