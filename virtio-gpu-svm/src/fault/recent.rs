//! The last faults of a host that came to an end, for people.
//!
//! Whoever ends a fault adds it, engines among them, so nobody holds the list for longer than a few entries: it is read
//! in pieces. What came after the reading began is not part of it; what went meanwhile, because others came, is left out.

use crate::info::FaultTrace;
use crate::sync::{Mutex, MutexGuard, PoisonError};
use std::collections::VecDeque;

/// Faults that are remembered.
pub const RECENT_FAULTS: usize = 1024;

/// Faults that are copied at one hold of the lock.
const PIECE: usize = 16;

#[derive(Default)]
struct List {
    last: VecDeque<FaultTrace>,
    /// How many are not remembered any more: the number of the first one in the list.
    gone: u64,
}

/// The last faults that came to an end.
#[derive(Default)]
pub(crate) struct Recent {
    /// Guards the list only.
    list: Mutex<List>,
}

impl Recent {
    /// Adds one, in place of the oldest if there are many.
    pub fn push(&self, trace: FaultTrace) {
        let oldest = {
            let mut list = self.lock();
            let oldest = if list.last.len() >= RECENT_FAULTS { list.last.pop_front() } else { None };
            list.gone = list.gone.saturating_add(u64::from(oldest.is_some()));
            list.last.push_back(trace);
            oldest
        };
        drop(oldest);
    }
    /// The last ones, the newest last; at most `limit`.
    pub fn last(&self, limit: usize) -> Vec<FaultTrace> {
        let (mut next, end) = self.span(limit);
        let mut copies = Vec::with_capacity(limit.min(RECENT_FAULTS));
        while next < end {
            next = self.copy(next, end, &mut copies);
        }
        copies
    }
    /// The numbers of the last ones.
    fn span(&self, limit: usize) -> (u64, u64) {
        let list = self.lock();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let skipped = list.last.len().saturating_sub(limit);
        (list.gone.saturating_add(count(skipped)), list.gone.saturating_add(count(list.last.len())))
    }
    /// Copies some of those that are left of these numbers, and says from which to go on.
    fn copy(&self, next: u64, end: u64, copies: &mut Vec<FaultTrace>) -> u64 {
        let list = self.lock();
        let first = next.max(list.gone);
        let index = |number: u64| usize::try_from(number.saturating_sub(list.gone)).unwrap_or(usize::MAX);
        let piece = index(end).saturating_sub(index(first)).min(PIECE);
        copies.extend(list.last.iter().skip(index(first)).take(piece).cloned());
        first.saturating_add(u64::try_from(piece).unwrap_or(u64::MAX))
    }
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(cookie: u64) -> FaultTrace {
        FaultTrace {
            time_ns: 0,
            guest: "g".into(),
            ctx_id: 1,
            device: 0,
            asid: 1,
            cookie,
            gpu_addr: 0,
            cpu_addr: 0,
            access: "read",
            outcome: "answered",
            wait_ns: 0,
        }
    }

    fn push(recent: &Recent, cookies: std::ops::Range<u64>) {
        cookies.for_each(|cookie| recent.push(trace(cookie)));
    }

    fn cookies(traces: &[FaultTrace]) -> Vec<u64> {
        traces.iter().map(|trace| trace.cookie).collect()
    }

    #[test]
    fn last_ones_are_told_in_order_and_no_more_than_asked_for() {
        let recent = Recent::default();
        assert!(recent.last(5).is_empty());
        push(&recent, 0..3);
        assert_eq!(cookies(&recent.last(5)), [0, 1, 2]);
        push(&recent, 3..2000);
        assert_eq!(cookies(&recent.last(3)), [1997, 1998, 1999]);
        assert_eq!(cookies(&recent.last(usize::MAX)), (2000 - 1024..2000).collect::<Vec<_>>());
        assert!(recent.last(0).is_empty());
    }

    #[test]
    fn hold_of_the_lock_copies_a_piece() {
        let recent = Recent::default();
        push(&recent, 0..1024);
        let (next, end) = recent.span(usize::MAX);
        let mut copies = Vec::new();
        assert_eq!(recent.copy(next, end, &mut copies), PIECE as u64);
        assert_eq!(copies.len(), PIECE);
    }

    #[test]
    fn faults_that_come_and_go_between_pieces_are_left_out_and_none_is_told_twice() {
        let recent = Recent::default();
        push(&recent, 0..1024);
        let (next, end) = recent.span(100);
        let mut copies = Vec::new();
        let next = recent.copy(next, end, &mut copies);
        // The first 970 go, among them some of those that are still to be copied.
        push(&recent, 1024..1024 + 970);
        let mut next = recent.copy(next, end, &mut copies);
        while next < end {
            next = recent.copy(next, end, &mut copies);
        }
        assert_eq!(cookies(&copies), (924..940).chain(970..1024).collect::<Vec<_>>());
    }
}
