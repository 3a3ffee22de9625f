//! A guest's memory: one region, the same guest-physical addresses in every guest, pages handed out one after the other.

use crate::mock::{region, table};
use std::sync::Arc;
use virtio_gpu_svm::memory::{MemoryTable, Region};
use vm_memory::{Bytes, VolatileMemory};

/// Where it begins.
pub const GPA: u64 = 0x10_0000;
/// Its pages: enough for four processes that live three times and move.
pub const PAGES: u64 = 128;
/// What stands in pages that nobody owns: no engine writes there.
const NOBODY: u64 = 0xdead_f4ee_dead_f4ee;

pub struct Ram {
    region: Arc<Region>,
    next: u64,
}

impl Ram {
    pub fn new(inode: u64) -> Self {
        Self { region: region(inode, GPA, PAGES * 4096), next: 0 }
    }
    /// The same region, all pages free.
    pub fn again(&self) -> Self {
        Self { region: Arc::clone(&self.region), next: 0 }
    }
    pub fn table(&self) -> Arc<MemoryTable> {
        table(&[Arc::clone(&self.region)])
    }
    /// Guest-physical address of a page that was not taken before.
    pub fn take(&mut self) -> u64 {
        assert!(self.next < PAGES, "no page is left");
        self.next += 1;
        GPA + (self.next - 1) * 4096
    }
    fn at(gpa: u64) -> usize {
        usize::try_from(gpa - GPA).unwrap()
    }
    pub fn write(&self, gpa: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.region.mapping().as_volatile_slice().write_slice(&bytes, Self::at(gpa)).unwrap();
    }
    pub fn read(&self, gpa: u64) -> Vec<u64> {
        let mut bytes = vec![0; 4096];
        self.region.mapping().as_volatile_slice().read_slice(&mut bytes, Self::at(gpa)).unwrap();
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
    }
    /// A page belongs to nobody from now on.
    pub fn free(&self, gpa: u64) {
        self.write(gpa, &[NOBODY; 512]);
    }
    pub fn assert_free(&self, gpa: u64) {
        let written = self.read(gpa).iter().position(|word| *word != NOBODY);
        assert_eq!(written, None, "a word of page {gpa:#x} was written after it was let go");
    }
}

/// A number made of three.
pub fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ (c << 56);
    z = (z ^ (z >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
