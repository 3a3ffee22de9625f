//! Timelines: what may start when. One for each ring of each GPU VM of a context.
//!
//! Owned by [`crate::context::Context`], under its lock; knows neither devices nor mappings. An *item* is a job or an
//! asynchronous bind. It is *queued* until its turn has come and the points it waits for are reached, then *started*
//! (on the device, or applied) until it has ended, and ends are told in the order of the ring, whatever the order in
//! which a device reports them. A job starts behind started jobs, because devices keep a ring's order; a bind starts
//! when nothing before it is left, and nothing starts behind a bind that has not ended.
//!
//! A *point* is promised by an item and reached by its end. Only points that are promised can be waited for, so waits
//! lead from later submissions to earlier ones, and no loop can be built.
//!
//! Only the front of a ring's queue waits, and for one point at a time. So a point that is reached wakes at most one
//! queue a ring, found by the timeline it waits for; who is awake is *ready*, and is looked at by whoever next has the
//! lock, a slice at a time ([`Timelines::take_ready`]).

use crate::context::{Bind, KEPT, trim};
use crate::device::{JobEnd, JobId};
use crate::numbered::Numbered;
use crate::protocol::job::Packet;
use crate::protocol::limit::Limit;
use crate::quota::{Charge, Full, Quota};
use crate::seeded::{self, Bug};
use crate::seldom::Seldom;
use crate::sync::Arc;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a ring takes from its first item on until its GPU VM goes: its entry, and the room that its lists keep.
const RING_BYTES: u64 = 2048;
/// Items for which its empty lists may keep their room.
const KEPT_IN_RING: usize = 4;
/// What an item takes besides its lists.
const ITEM_BYTES: u64 = 512;

/// A ring of a GPU VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timeline {
    /// The GPU VM in the context.
    pub vm_id: u32,
    /// The ring in it.
    pub ring_idx: u32,
}

/// A point of a timeline. Timelines begin at 0, which is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// Whose.
    pub timeline: Timeline,
    /// How far.
    pub seqno: u64,
}

/// Why points were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A promise that is not beyond the last one.
    #[error("point {signal} is promised after {promised}: timelines do not go backwards")]
    Backwards {
        /// Promised now.
        signal: u64,
        /// Promised last.
        promised: u64,
    },
    /// A point of a GPU VM that is not this context's.
    #[error("wait {index} names a GPU VM that is not this context's")]
    NoVm {
        /// Which wait.
        index: u32,
    },
    /// A point that nobody has promised.
    #[error("wait {index} names a point that nobody has promised")]
    Future {
        /// Which wait.
        index: u32,
    },
}

/// What names an item, and what its end is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its id.
    pub id: JobId,
    /// Whether it is a bind.
    pub bind: bool,
    /// The process' own value.
    pub user_data: u64,
    /// The point that it promises, or 0.
    pub signal: u64,
    /// What it holds of the guest's quota.
    pub weight: Weight,
}

/// What an item holds until it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weight {
    /// Bytes of its lists, here or at the device.
    pub bytes: u64,
    /// Mappings that it may add; only until it starts.
    pub mappings: u64,
}

/// Charges for items of a context's timelines.
#[derive(Debug, Default)]
pub struct QueueCharges {
    /// Of the items themselves, until their record has left.
    pub items: Charge,
    /// Of all bytes.
    pub bytes: Charge,
    /// Of mappings that queued binds may add.
    pub mappings: Charge,
}

impl QueueCharges {
    fn new(quota: &Arc<Quota>) -> Self {
        let charge = |limit| quota.charge(limit);
        Self {
            items: charge(Limit::TotalJobs),
            bytes: charge(Limit::QueueBytes),
            mappings: charge(Limit::TotalMappings),
        }
    }
    /// Charges of nothing, for the same.
    fn siblings(&self) -> Self {
        Self { items: self.items.sibling(), bytes: self.bytes.sibling(), mappings: self.mappings.sibling() }
    }
    fn absorb(&mut self, other: Self) {
        self.items.absorb(other.items);
        self.bytes.absorb(other.bytes);
        self.mappings.absorb(other.mappings);
    }
}

/// What an item does.
#[derive(Debug)]
pub enum Work {
    /// Packets for the device.
    Job(Vec<Packet>),
    /// Changes of mappings, all or none.
    Bind {
        /// They.
        binds: Vec<Bind>,
        /// The first that maps a blob which has been detached meanwhile.
        detached: Option<usize>,
    },
}

impl Work {
    /// How much is done at once when it starts: calls of a device, operations.
    pub fn cost(&self) -> usize {
        self.operations().max(1)
    }
    /// Whether it fails in an unusable GPU VM, come what may.
    fn needs_usable(&self) -> bool {
        match self {
            Self::Job(_) => true,
            Self::Bind { binds, .. } => binds.iter().any(Bind::needs_usable),
        }
    }
    /// What it holds with so many points that it waits for. A MAP into the middle of a mapping makes three of one.
    pub fn weight(&self, waits: usize) -> Weight {
        let bytes = match self {
            Self::Job(packets) => size_of::<Packet>().saturating_mul(packets.len()),
            Self::Bind { binds, .. } => size_of::<Bind>().saturating_mul(binds.len()),
        };
        let bytes = bytes.saturating_add(size_of::<Point>().saturating_mul(waits));
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Weight {
            bytes: count(bytes).saturating_add(ITEM_BYTES),
            mappings: count(self.operations()).saturating_mul(2),
        }
    }
    fn operations(&self) -> usize {
        match self {
            Self::Job(_) => 0,
            Self::Bind { binds, .. } => binds.len(),
        }
    }
    /// A blob is detached: what would map it fails, and what would unmap it has nothing left to do. The next blob of
    /// that id is another one.
    fn detach(&mut self, resource_id: u32) {
        let Self::Bind { binds, detached } = self else { return };
        for (op, bind) in binds.iter_mut().enumerate() {
            if let Some(range) = bind.maps_blob(resource_id) {
                *detached = Some(detached.map_or(op, |first| first.min(op)));
                // It keeps its place and lets go of the blob.
                *bind = Bind::Prefetch(range);
            } else if matches!(bind, Bind::UnmapAll(id) if *id == resource_id) {
                *bind = Bind::NOTHING;
            }
        }
    }
}

/// A job or an asynchronous bind that has not started.
#[derive(Debug)]
pub struct Item {
    /// Its name.
    pub turn: Turn,
    /// Points that it waits for; those that were seen to be reached are gone.
    pub waits: Vec<Point>,
    /// What it does.
    pub work: Work,
}

/// An item that has started. It stands here until it and all before it have ended.
struct Started {
    turn: Turn,
    end: Option<JobEnd>,
}

#[derive(Default)]
struct Ring {
    promised: u64,
    reached: u64,
    started: VecDeque<Started>,
    queued: VecDeque<Item>,
    /// The point that the front of the queue waits for, as in [`Lines::waiting`].
    waits_for: Option<Point>,
    /// Whether it stands in [`Lines::ready`].
    listed: bool,
}

impl Ring {
    /// Whether work of a kind has its turn.
    fn has_turn(&self, bind: bool) -> bool {
        let behind_bind = self.started.back().is_some_and(|last| last.turn.bind);
        if bind { self.started.is_empty() } else { !behind_bind || seeded::on(Bug::StartBehindBind) }
    }
}

/// The timelines of one context; nothing before the first item.
#[derive(Default)]
pub struct Timelines(Seldom<Lines>);

/// The timelines of a context that has had an item.
#[derive(Default)]
struct Lines {
    /// Those that were ever used.
    rings: BTreeMap<Timeline, Ring>,
    /// Where a started item stands.
    started: Numbered<JobId, Timeline>,
    /// (timeline waited for, its point, timeline that waits); each timeline waits at most once.
    waiting: BTreeSet<(Timeline, u64, Timeline)>,
    /// Timelines whose queue may have something to start.
    ready: VecDeque<Timeline>,
    items: usize,
    queued_operations: usize,
    /// Items that have ended and whose record has not left.
    undelivered: usize,
    /// For all items and rings.
    charges: QueueCharges,
}

impl Timelines {
    /// Charges for an item that is going to stand on a timeline.
    ///
    /// # Errors
    /// [`Full`].
    pub fn hold(&self, quota: &Arc<Quota>, timeline: Timeline, weight: Weight) -> Result<QueueCharges, Full> {
        let is_used = self.0.get().is_some_and(|lines| lines.rings.contains_key(&timeline));
        let ring = if is_used { 0 } else { RING_BYTES };
        let mut charges = QueueCharges::new(quota);
        charges.items.grow(1)?;
        charges.bytes.grow(weight.bytes.saturating_add(ring))?;
        charges.mappings.grow(weight.mappings)?;
        Ok(charges)
    }
    /// What the charges are: bytes and mappings.
    pub fn charged(&self) -> (u64, u64) {
        let charges = self.0.get().map(|lines| &lines.charges);
        charges.map_or((0, 0), |charges| (charges.bytes.amount(), charges.mappings.amount()))
    }
    /// What the charges must be, counted from the items and rings themselves: bytes and mappings.
    pub fn weigh(&self) -> (u64, u64) {
        self.0.get().map_or((0, 0), Lines::weigh)
    }
    /// What queued binds have put by for their mappings.
    pub(crate) fn mappings_charge(&mut self) -> Option<&mut Charge> {
        self.0.get_mut().map(|lines| &mut lines.charges.mappings)
    }
    /// Jobs and asynchronous binds that have not ended.
    pub fn len(&self) -> usize {
        self.0.get().map_or(0, |lines| lines.items)
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The same, and those whose record has not left.
    pub fn in_flight(&self) -> usize {
        self.0.get().map_or(0, |lines| lines.items.saturating_add(lines.undelivered))
    }
    /// The record of one that has ended has left.
    pub fn delivered(&mut self) {
        if let Some(lines) = self.0.get_mut() {
            lines.undelivered = lines.undelivered.saturating_sub(1);
            lines.charges.items.shrink(1);
        }
    }
    /// Operations of the binds that are queued.
    pub fn queued_operations(&self) -> usize {
        self.0.get().map_or(0, |lines| lines.queued_operations)
    }
    /// Whether a queue may have something to start.
    pub fn has_ready(&self) -> bool {
        self.0.get().is_some_and(|lines| !lines.ready.is_empty())
    }
    /// Checks what an item promises and waits for; `is_alive` tells GPU VMs of the context.
    ///
    /// # Errors
    /// [`Error`].
    pub fn check(
        &self,
        timeline: Timeline,
        signal: u64,
        waits: &[Point],
        is_alive: impl Fn(u32) -> bool,
    ) -> Result<(), Error> {
        let ring = |timeline: &Timeline| self.0.get().and_then(|lines| lines.rings.get(timeline));
        let promised = |timeline: &Timeline| ring(timeline).map_or(0, |ring| ring.promised);
        let last = promised(&timeline);
        if signal != 0 && signal <= last {
            return Err(Error::Backwards { signal, promised: last });
        }
        for (index, point) in (0..).zip(waits) {
            if !is_alive(point.timeline.vm_id) {
                return Err(Error::NoVm { index });
            }
            if point.seqno > promised(&point.timeline) {
                return Err(Error::Future { index });
            }
        }
        Ok(())
    }
    /// Whether a job need not be queued.
    pub fn starts_at_once(&self, timeline: Timeline, waits: &[Point]) -> bool {
        self.0.get().is_none_or(|lines| lines.starts_at_once(timeline, waits))
    }
    /// Puts an item at the end of its ring's queue.
    pub fn queue(&mut self, timeline: Timeline, item: Item, charges: QueueCharges) {
        self.obtain(charges).queue(timeline, item);
    }
    /// A job has started without having been queued.
    pub fn start(&mut self, timeline: Timeline, turn: Turn, charges: QueueCharges) {
        self.obtain(charges).start(timeline, turn);
    }
    /// Takes what may start now, one item a call, rings in turn; it counts as started. In GPU VMs that are not usable
    /// that includes what can only fail, at the front of its queue: it waits for no point any more, but its end has its
    /// place.
    pub fn take_ready(&mut self, is_usable: impl Fn(u32) -> bool) -> Option<(Timeline, Turn, Work)> {
        self.0.get_mut()?.take_ready(is_usable)
    }
    /// A started item has ended. Tells every end whose turn it is now, in the order of the ring, and wakes who waited.
    pub fn end(&mut self, id: JobId, end: JobEnd, tell: impl FnMut(Timeline, Turn, JobEnd)) {
        if let Some(lines) = self.0.get_mut() {
            lines.end(id, end, tell);
        }
    }
    /// A GPU VM goes: takes its timelines out, and reaches all their points. Returns what had not ended, in the order of
    /// the rings.
    pub fn remove_vm(&mut self, vm_id: u32) -> Vec<(Timeline, Turn)> {
        self.0.get_mut().map(|lines| lines.remove_vm(vm_id)).unwrap_or_default()
    }
    /// A GPU VM has become unusable: what can only fail there waits no longer.
    pub fn wake_vm(&mut self, vm_id: u32) {
        if let Some(lines) = self.0.get_mut() {
            lines.of_vm(vm_id).into_iter().for_each(|timeline| lines.list(timeline));
        }
    }
    /// A blob is detached from the context: no queued bind may map it any more.
    pub fn detach(&mut self, resource_id: u32) {
        let rings = self.0.get_mut().into_iter().flat_map(|lines| lines.rings.values_mut());
        rings.flat_map(|ring| &mut ring.queued).for_each(|item| item.work.detach(resource_id));
    }
    fn obtain(&mut self, charges: QueueCharges) -> &mut Lines {
        let none = || Lines { charges: charges.siblings(), ..Lines::default() };
        let lines = self.0.obtain_with(none);
        lines.charges.absorb(charges);
        lines
    }
}

impl Lines {
    fn weigh(&self) -> (u64, u64) {
        let mut sum = (0_u64, 0_u64);
        for ring in self.rings.values() {
            let queued = ring.queued.iter().map(|item| item.turn.weight.bytes);
            let started = ring.started.iter().map(|started| started.turn.weight.bytes);
            sum.0 = queued.chain(started).fold(sum.0, u64::saturating_add).saturating_add(RING_BYTES);
            let mappings = ring.queued.iter().map(|item| item.turn.weight.mappings);
            sum.1 = mappings.fold(sum.1, u64::saturating_add);
        }
        sum
    }
    fn starts_at_once(&self, timeline: Timeline, waits: &[Point]) -> bool {
        let free = |ring: &Ring| ring.queued.is_empty() && ring.has_turn(false);
        self.rings.get(&timeline).is_none_or(free) && waits.iter().all(|point| self.is_reached(*point))
    }
    fn queue(&mut self, timeline: Timeline, item: Item) {
        self.items = self.items.saturating_add(1);
        self.queued_operations = self.queued_operations.saturating_add(item.work.operations());
        let ring = self.rings.entry(timeline).or_default();
        ring.promised = ring.promised.max(item.turn.signal);
        ring.queued.push_back(item);
        self.list(timeline);
    }
    fn start(&mut self, timeline: Timeline, turn: Turn) {
        self.items = self.items.saturating_add(1);
        let ring = self.rings.entry(timeline).or_default();
        ring.promised = ring.promised.max(turn.signal);
        ring.started.push_back(Started { turn, end: None });
        self.started.insert(turn.id, timeline);
    }
    fn take_ready(&mut self, is_usable: impl Fn(u32) -> bool) -> Option<(Timeline, Turn, Work)> {
        while let Some(timeline) = self.ready.pop_front() {
            if let Some(Item { turn, work, .. }) = self.take_front(timeline, is_usable(timeline.vm_id)) {
                self.ready.push_back(timeline);
                return Some((timeline, turn, work));
            }
            if let Some(ring) = self.rings.get_mut(&timeline) {
                ring.listed = false;
            }
        }
        None
    }
    fn take_front(&mut self, timeline: Timeline, usable: bool) -> Option<Item> {
        let ring = self.rings.get_mut(&timeline)?;
        if let Some(point) = ring.waits_for.take() {
            self.waiting.remove(&(point.timeline, point.seqno, timeline));
        }
        let mut item = ring.queued.pop_front()?;
        let doomed = !usable && item.work.needs_usable();
        let has_turn = ring.has_turn(item.turn.bind);
        while let Some(point) = item.waits.last()
            && (self.is_reached(*point) || seeded::on(Bug::SkipWait))
        {
            item.waits.pop();
        }
        let ring = self.rings.get_mut(&timeline)?;
        if doomed || (has_turn && item.waits.is_empty()) {
            ring.started.push_back(Started { turn: item.turn, end: None });
            self.started.insert(item.turn.id, timeline);
            self.queued_operations = self.queued_operations.saturating_sub(item.work.operations());
            return Some(item);
        }
        // Without its turn it is looked at again when something before it ends.
        if let Some(point) = item.waits.last().filter(|_| has_turn) {
            ring.waits_for = Some(*point);
            self.waiting.insert((point.timeline, point.seqno, timeline));
        }
        ring.queued.push_front(item);
        None
    }
    fn end(&mut self, id: JobId, end: JobEnd, mut tell: impl FnMut(Timeline, Turn, JobEnd)) {
        let Some(timeline) = self.started.remove(&id) else { return };
        let Some(ring) = self.rings.get_mut(&timeline) else { return };
        // Ids rise along a ring.
        let at = ring.started.partition_point(|started| started.turn.id < id);
        if let Some(started) = ring.started.get_mut(at) {
            started.end = Some(end);
        }
        let before = ring.reached;
        while let Some(Started { turn, end: Some(end) }) = ring.started.front() {
            tell(timeline, *turn, *end);
            self.charges.bytes.shrink(turn.weight.bytes);
            ring.reached = ring.reached.max(turn.signal);
            self.items = self.items.saturating_sub(1);
            self.undelivered = self.undelivered.saturating_add(1);
            ring.started.pop_front();
        }
        trim(&mut ring.started, KEPT_IN_RING);
        trim(&mut ring.queued, KEPT_IN_RING);
        if self.started.is_empty() && self.started.capacity() > KEPT {
            self.started = Numbered::default();
        }
        let reached = ring.reached;
        self.list(timeline);
        if reached > before {
            self.wake(timeline, reached);
        }
    }
    fn remove_vm(&mut self, vm_id: u32) -> Vec<(Timeline, Turn)> {
        let mut dropped = Vec::new();
        for timeline in self.of_vm(vm_id) {
            let Some(ring) = self.rings.remove(&timeline) else { continue };
            self.charges.bytes.shrink(RING_BYTES);
            if let Some(point) = ring.waits_for {
                self.waiting.remove(&(point.timeline, point.seqno, timeline));
            }
            for started in ring.started {
                self.started.remove(&started.turn.id);
                self.charges.bytes.shrink(started.turn.weight.bytes);
                dropped.push((timeline, started.turn));
            }
            for item in ring.queued {
                self.queued_operations = self.queued_operations.saturating_sub(item.work.operations());
                self.charges.bytes.shrink(item.turn.weight.bytes);
                self.charges.mappings.shrink(item.turn.weight.mappings);
                dropped.push((timeline, item.turn));
            }
            if !seeded::on(Bug::LosePoint) {
                self.wake(timeline, u64::MAX);
            }
        }
        self.ready.retain(|timeline| timeline.vm_id != vm_id);
        self.items = self.items.saturating_sub(dropped.len());
        self.undelivered = self.undelivered.saturating_add(dropped.len());
        dropped
    }
    /// Timelines that are gone, or were never used, have reached every point that was promised.
    fn is_reached(&self, point: Point) -> bool {
        self.rings.get(&point.timeline).is_none_or(|ring| ring.reached >= point.seqno)
    }
    fn of_vm(&self, vm_id: u32) -> Vec<Timeline> {
        let end = Timeline { vm_id, ring_idx: u32::MAX };
        self.rings.range(Timeline { vm_id, ring_idx: 0 }..=end).map(|(timeline, _)| *timeline).collect()
    }
    fn wake(&mut self, timeline: Timeline, reached: u64) {
        let first = Timeline { vm_id: 0, ring_idx: 0 };
        let last = Timeline { vm_id: u32::MAX, ring_idx: u32::MAX };
        let woken: Vec<_> =
            self.waiting.range((timeline, 0, first)..=(timeline, reached, last)).copied().collect();
        for entry in woken {
            self.waiting.remove(&entry);
            if let Some(ring) = self.rings.get_mut(&entry.2) {
                ring.waits_for = None;
            }
            self.list(entry.2);
        }
    }
    /// Has the queue of a timeline looked at.
    fn list(&mut self, timeline: Timeline) {
        let Some(ring) = self.rings.get_mut(&timeline) else { return };
        if !ring.listed && !ring.queued.is_empty() {
            ring.listed = true;
            self.ready.push_back(timeline);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::GpuAddr;
    use crate::device::Access;

    const DONE: JobEnd = JobEnd { errno: 0, packet: 0, addr: GpuAddr(0), access: Access::Read };

    fn turn(id: u64, signal: u64) -> Turn {
        Turn { id: JobId(id), bind: false, user_data: 0, signal, weight: Weight::default() }
    }

    #[test]
    fn what_has_ended_leaves_nothing_behind() {
        let (gate, waiter) = (Timeline { vm_id: 1, ring_idx: 0 }, Timeline { vm_id: 2, ring_idx: 0 });
        let mut lines = Lines::default();
        for round in 1..=3 {
            lines.start(gate, turn(2 * round, round));
            let waits = vec![Point { timeline: gate, seqno: round }];
            let item = Item { turn: turn(2 * round + 1, 0), waits, work: Work::Job(Vec::new()) };
            lines.queue(waiter, item);
            assert!(lines.take_ready(|_| true).is_none());
            assert_eq!(lines.waiting.len(), 1);
            lines.end(JobId(2 * round), DONE, |_, _, _| {});
            assert!(lines.take_ready(|_| true).is_some());
            lines.end(JobId(2 * round + 1), DONE, |_, _, _| {});
            assert!(lines.take_ready(|_| true).is_none());
            assert!(lines.items == 0 && lines.ready.is_empty());
            assert!(lines.waiting.is_empty() && lines.started.is_empty());
        }
    }
}
