//! Guest memory whose driver is as quick as can be: what was handed out for reading has changed as soon as anything else
//! is asked for. It remembers what was handed out.

use daemon::queue::RingMemory;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use vm_memory::bitmap::WithBitmapSlice;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryResult, Permissions};

/// See the module.
pub struct Changing {
    memory: GuestMemoryMmap,
    /// Whether it can be reached where it lies, as a session's is.
    in_place: bool,
    /// May be read again, and is left alone: the available index.
    index: Range<u64>,
    /// Guards the log; a section is a few lines.
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    read: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    /// Handed out and not changed yet.
    last: Option<Range<u64>>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Changing {
    /// Both ways to reach it.
    pub const IN_PLACE: [bool; 2] = [false, true];

    pub fn new(memory: GuestMemoryMmap, index: Range<u64>, in_place: bool) -> Self {
        Self { memory, in_place, index, log: Mutex::default() }
    }

    /// Ranges that were handed out twice for reading, or once for reading and once for writing.
    pub fn repeated(&self) -> Vec<(Range<u64>, Range<u64>)> {
        let log = self.lock();
        let mut repeated = Vec::new();
        for (at, range) in log.read.iter().enumerate() {
            let others = log.read[..at].iter().chain(&log.written).filter(|other| overlap(range, other));
            repeated.extend(others.map(|other| (range.clone(), other.clone())));
        }
        repeated
    }

    /// Bytes of a range that were read.
    pub fn bytes_read(&self, within: &Range<u64>) -> u64 {
        let inside = |range: &&Range<u64>| within.start <= range.start && range.end <= within.end;
        self.lock().read.iter().filter(inside).map(|range| range.end - range.start).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    fn hand_out(&self, range: Range<u64>, access: Permissions) {
        let mut log = self.lock();
        if let Some(last) = log.last.take() {
            let mut bytes = vec![0; usize::try_from(last.end - last.start).unwrap()];
            self.memory.read_slice(&mut bytes, GuestAddress(last.start)).unwrap();
            bytes.iter_mut().for_each(|byte| *byte ^= 0xa5);
            self.memory.write_slice(&bytes, GuestAddress(last.start)).unwrap();
        }
        match access {
            Permissions::Write => log.written.push(range),
            _ if range == self.index => {}
            _ => {
                log.read.push(range.clone());
                log.last = Some(range);
            }
        }
    }
}

impl GuestMemory for Changing {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.memory, addr, count, access)
    }
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, <() as WithBitmapSlice<'a>>::S>> {
        self.hand_out(addr.0..addr.0 + count as u64, access);
        GuestMemory::get_slices(&self.memory, addr, count, access)
    }
    fn physical_memory(&self) -> Option<&GuestMemoryMmap> {
        self.in_place.then_some(&self.memory)
    }
}

impl RingMemory for Changing {
    fn touch(&self, at: u64, bytes: usize, access: Permissions) {
        assert!(self.in_place);
        self.hand_out(at..at + bytes as u64, access);
    }
}
