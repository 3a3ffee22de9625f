//! The device's own record of the faults that it raised, below every router: what tests compare the other ledgers with.

use crate::device::LedgerEntry;
use std::collections::VecDeque;

/// The newest entries, and how many older ones they have overwritten.
#[derive(Debug, Default)]
pub struct Ledger {
    capacity: usize,
    entries: VecDeque<LedgerEntry>,
    overwritten: u64,
}

impl Ledger {
    /// A ledger of at most this many entries; 0 switches it off.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Whether entries are kept at all.
    pub fn is_on(&self) -> bool {
        self.capacity > 0
    }

    /// Records a fault.
    pub fn push(&mut self, entry: LedgerEntry) {
        if !self.is_on() {
            return;
        }
        if self.entries.len() >= self.capacity {
            self.entries.pop_front();
            self.overwritten = self.overwritten.saturating_add(1);
        }
        self.entries.push_back(entry);
    }

    /// The entries, oldest first, and the count of those overwritten.
    pub fn snapshot(&self) -> (Vec<LedgerEntry>, u64) {
        (self.entries.iter().cloned().collect(), self.overwritten)
    }
}
