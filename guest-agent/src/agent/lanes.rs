//! Records between the pump and the threads that act on them: a lane for each context, so that its records keep their
//! order whoever acts on them, and contexts do not wait for each other.
//!
//! A lane is with one thread at a time, from [`Lanes::take`] until [`Lanes::give_back`]; what comes for it meanwhile waits
//! in it. Who takes it gets a few records and puts the lane behind the others that are ready: a context with thousands of
//! faults delays those of another one by a few of its own.
//!
//! The pump serves too, and so answers the fault that it has just heard of without a change of thread; others are woken
//! only when there is enough for them.

use crate::driver::Event;
use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Records beyond which another thread is woken: acting on so many takes longer than waking it.
const WORTH_A_THREAD: usize = 8;
/// Most records of a lane that are acted on before those of others: as many as are worth a command to the device at once.
const TURN: usize = 32;
/// Most records that wait. Then the pump takes no more from the device, which keeps what it has.
const MAX_WAITING: usize = 8192;

/// A record.
pub(super) struct Record {
    /// The daemon epoch that it came under.
    pub(super) epoch: u64,
    /// When it was found in the ring.
    pub(super) found: Instant,
    pub(super) event: Event,
}

#[derive(Default)]
struct Lane {
    records: VecDeque<Record>,
    taken: bool,
}

#[derive(Default)]
struct Inner {
    /// Of contexts with records that wait, or with a thread.
    lanes: HashMap<u32, Lane>,
    /// Lanes with records and without a thread.
    ready: VecDeque<u32>,
    waiting: usize,
    ended: bool,
}

/// The lanes.
#[derive(Default)]
pub(super) struct Lanes {
    inner: Mutex<Inner>,
    /// There is a ready lane, or this is the end.
    ready: Condvar,
    /// Fewer records wait, or this is the end.
    drained: Condvar,
}

impl Lanes {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds records in the order of the device, and wakes as many of `helpers` as what waits is worth. Waits while too much
    /// is there and all of it is with others; those who serve never wait for anything, so that ends.
    pub(super) fn add(&self, records: Vec<Record>, helpers: usize) {
        let full = |inner: &mut Inner| inner.is_full() && inner.ready.is_empty() && !inner.ended;
        let mut inner = self.drained.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        inner.waiting += records.len();
        for record in records {
            inner.add(record);
        }
        // One lane is for the thread that is here. What it gave back counts too.
        let others = (inner.waiting / WORTH_A_THREAD).min(inner.ready.len().saturating_sub(1)).min(helpers);
        drop(inner);
        for _ in 0..others {
            self.ready.notify_one();
        }
    }

    /// Whether there is something to take.
    pub(super) fn are_ready(&self) -> bool {
        !self.lock().ready.is_empty()
    }

    /// Whether so much waits that it must be acted on before more is added.
    pub(super) fn are_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Takes a lane that is ready, with the first records that wait in it.
    pub(super) fn take(&self) -> Option<(u32, VecDeque<Record>)> {
        self.lock().take()
    }

    /// Waits for a lane that is ready. `None`: the end.
    pub(super) fn wait(&self) -> Option<(u32, VecDeque<Record>)> {
        let idle = |inner: &mut Inner| inner.ready.is_empty() && !inner.ended;
        let mut inner = self.ready.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if inner.ended { None } else { inner.take() }
    }

    /// Gives lanes back, when all that was taken with them is done. Who does so takes others next, or the same again.
    pub(super) fn give_back(&self, lanes: &[u32]) {
        let mut inner = self.lock();
        for ctx_id in lanes {
            inner.give_back(*ctx_id);
        }
        drop(inner);
        self.drained.notify_all();
    }

    /// Nobody serves any more.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.ready.notify_all();
        self.drained.notify_all();
    }
}

impl Inner {
    fn is_full(&self) -> bool {
        self.waiting > MAX_WAITING
    }

    fn add(&mut self, record: Record) {
        let ctx_id = record.event.ctx_id();
        let lane = self.lanes.entry(ctx_id).or_default();
        if lane.records.is_empty() && !lane.taken {
            self.ready.push_back(ctx_id);
        }
        lane.records.push_back(record);
    }

    fn take(&mut self) -> Option<(u32, VecDeque<Record>)> {
        let ctx_id = self.ready.pop_front()?;
        let lane = self.lanes.get_mut(&ctx_id)?;
        lane.taken = true;
        let rest = lane.records.split_off(lane.records.len().min(TURN));
        let records = std::mem::replace(&mut lane.records, rest);
        self.waiting -= records.len();
        Some((ctx_id, records))
    }

    fn give_back(&mut self, ctx_id: u32) {
        let Some(lane) = self.lanes.get_mut(&ctx_id) else { return };
        lane.taken = false;
        if lane.records.is_empty() {
            self.lanes.remove(&ctx_id);
        } else {
            self.ready.push_back(ctx_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use virtio_gpu_svm::protocol::event::NoticeRecord;

    fn record(ctx_id: u32, value: u64) -> Record {
        let notice = NoticeRecord { ctx_id: ctx_id.into(), value: value.into(), ..NoticeRecord::default() };
        Record { epoch: 0, found: Instant::now(), event: Event::Notice(notice) }
    }

    fn values(records: &VecDeque<Record>) -> Vec<u64> {
        let value = |record: &Record| match &record.event {
            Event::Notice(notice) => notice.value.get(),
            _ => u64::MAX,
        };
        records.iter().map(value).collect()
    }

    #[test]
    fn lane_is_with_one_thread_and_keeps_its_order() {
        let lanes = Lanes::default();
        lanes.add(vec![record(1, 10), record(2, 20), record(1, 11)], 0);
        let (first, records) = lanes.take().unwrap();
        assert_eq!((first, values(&records)), (1, vec![10, 11]));
        lanes.add(vec![record(1, 12)], 0);
        let (second, records) = lanes.take().unwrap();
        assert_eq!((second, values(&records)), (2, vec![20]));
        assert!(lanes.take().is_none(), "what came for the first lane waits for who has it");
        lanes.give_back(&[2, 1]);
        let (first, records) = lanes.take().unwrap();
        assert_eq!((first, values(&records)), (1, vec![12]));
        lanes.give_back(&[1]);
        assert!(lanes.lock().lanes.is_empty(), "nothing is kept of contexts that are silent");
    }

    /// A lane that is as long as it can be delays another one by a turn.
    #[test]
    fn lanes_take_turns() {
        let lanes = Lanes::default();
        lanes.add((0..1000).map(|value| record(1, value)).chain([record(2, 0)]).collect(), 0);
        let mut seen = Vec::new();
        while let Some((ctx_id, records)) = lanes.take() {
            seen.extend(values(&records).into_iter().map(|value| (ctx_id, value)));
            lanes.give_back(&[ctx_id]);
        }
        assert_eq!(seen.iter().position(|(ctx_id, _)| *ctx_id == 2), Some(TURN));
        let first = seen.iter().filter(|(ctx_id, _)| *ctx_id == 1).map(|(_, value)| *value);
        assert!(first.eq(0..1000), "all of it, in its order");
        assert!(!lanes.are_ready() && lanes.lock().waiting == 0);
    }

    #[test]
    fn end_wakes_all_who_wait() {
        let lanes = Lanes::default();
        std::thread::scope(|scope| {
            let waiting = [(); 3].map(|()| scope.spawn(|| lanes.wait().is_none()));
            lanes.end();
            assert!(waiting.into_iter().all(|thread| thread.join().unwrap()));
        });
        let many = (0..=(MAX_WAITING + TURN) as u64).map(|value| record(1, value)).collect();
        lanes.add(many, 0);
        assert!(lanes.take().is_some() && !lanes.are_ready() && lanes.are_full());
        // Would wait for ever for who took the lane, had nobody said that this is the end.
        lanes.add(vec![record(1, 0)], 0);
    }

    /// One adds, three take: every record comes once, in the order of its context, and no lane is with two.
    #[test]
    fn threads_share_the_lanes() {
        const CONTEXTS: usize = 5;
        const RECORDS: u64 = 60_000;
        let lanes = Lanes::default();
        let next = [const { AtomicU64::new(0) }; CONTEXTS];
        let busy = [const { AtomicBool::new(false) }; CONTEXTS];
        let serve = |(ctx_id, records): (u32, VecDeque<Record>)| {
            let index = ctx_id as usize;
            assert!(!busy[index].swap(true, Ordering::SeqCst), "lane {ctx_id} is with two");
            for value in values(&records) {
                assert_eq!(next[index].fetch_add(1, Ordering::SeqCst), value);
            }
            busy[index].store(false, Ordering::SeqCst);
            lanes.give_back(&[ctx_id]);
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while let Some(lane) = lanes.wait() {
                        serve(lane);
                    }
                });
            }
            let mut sent = [0; CONTEXTS];
            for batch in 0..RECORDS / 20 {
                let records = (0..20).map(|n| {
                    let ctx_id = u32::try_from((batch * 7 + n * n) % CONTEXTS as u64).unwrap();
                    let sent = &mut sent[ctx_id as usize];
                    *sent += 1;
                    record(ctx_id, *sent - 1)
                });
                lanes.add(records.collect(), 3);
                if let Some(lane) = lanes.take() {
                    serve(lane);
                }
            }
            while let Some(lane) = lanes.take() {
                serve(lane);
            }
            let all = || next.iter().map(|next| next.load(Ordering::SeqCst)).sum::<u64>();
            while all() < RECORDS {
                std::thread::yield_now();
            }
            lanes.end();
            assert_eq!(sent, next.each_ref().map(|next| next.load(Ordering::SeqCst)));
        });
        assert!(lanes.lock().lanes.is_empty());
    }
}
