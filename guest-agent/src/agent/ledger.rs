//! The record of answers: what the agent told the device about whose access. Compared with the device's own ledger by
//! whoever checks that no fault went astray.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What a fault was answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Pages were supplied.
    Success,
    /// The address belongs to no memory of the process.
    Invalid,
}

/// One answer, written when the device has taken or refused it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Counts from 0.
    pub index: u64,
    /// The context that the fault was addressed to.
    pub ctx_id: u32,
    /// The fault's name.
    pub cookie: u64,
    /// The host device.
    pub dev_id: u32,
    /// The GPU VM within the context.
    pub vm_id: u32,
    /// The id that the device reported.
    pub asid: u32,
    /// GPU address of the page.
    pub gpu_addr: u64,
    /// Guest CPU address of the page.
    pub cpu_addr: u64,
    /// `PERM_*` of the access.
    pub perm: u32,
    /// The answer.
    pub code: Answer,
    /// Pages supplied.
    pub pages: u32,
    /// Runs that they came in.
    pub runs: u32,
    /// The device's answer: 0, or a negative errno (-22: it knew no such fault any more).
    pub status: i32,
    /// How often the answer was made again because it raced with an invalidation.
    pub retries: u32,
    /// Process that owns the context; 0 if there was none.
    pub pid: i32,
    /// Nanoseconds from when the agent found the fault's record in its ring to when it had put this answer into the
    /// device's and rung its doorbell. What was held back counts; the interrupt's wake-up before does not.
    pub answer_ns: u64,
}

/// Counts and the newest entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerReport {
    /// Fault records that came.
    pub faults: u64,
    /// Answered with pages.
    pub answered: u64,
    /// Answered as an error of the process.
    pub refused: u64,
    /// Of both: those that the device knew no more.
    pub stale: u64,
    /// Answers made again.
    pub retries: u64,
    /// Faults of contexts that are not there.
    pub unowned: u64,
    /// Faults that wait for an answer to be made or taken.
    pub pending: u64,
    /// Faults held back.
    pub held: u64,
    /// Entries that are not remembered any more.
    pub forgotten: u64,
    /// The newest entries, oldest first.
    pub entries: Vec<LedgerEntry>,
}

/// The ledger: bounded, counts are not.
#[derive(Debug)]
pub struct Ledger {
    capacity: usize,
    next_index: u64,
    entries: VecDeque<LedgerEntry>,
    counts: LedgerReport,
}

impl Ledger {
    /// Remembers `capacity` entries.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, next_index: 0, entries: VecDeque::new(), counts: LedgerReport::default() }
    }

    /// Counts; for the agent alone to change.
    pub(super) fn counts(&mut self) -> &mut LedgerReport {
        &mut self.counts
    }

    /// Adds an entry; its index is set here.
    pub(super) fn record(&mut self, mut entry: LedgerEntry) {
        entry.index = self.next_index;
        self.next_index += 1;
        match entry.code {
            Answer::Success => self.counts.answered += 1,
            Answer::Invalid => self.counts.refused += 1,
        }
        if entry.status != 0 {
            self.counts.stale += 1;
        }
        self.entries.push_back(entry);
        while self.entries.len() > self.capacity {
            self.entries.pop_front();
            self.counts.forgotten += 1;
        }
    }

    /// Counts, and entries if `with_entries`.
    pub fn report(&self, with_entries: bool) -> LedgerReport {
        let entries = if with_entries { self.entries.iter().cloned().collect() } else { Vec::new() };
        LedgerReport { entries, ..self.counts.clone() }
    }
}
