//! The faults of one context that wait for the guest. Owned by [`crate::context::Context`], under its lock.
//!
//! An entry is one cache line and holds what an answer, a deadline and the record need; the record itself is built when
//! there is a buffer for it. Entries stand in the order in which they were raised. So cookies rise along the list and are
//! found by halving it, the late ones are its beginning, and those that the guest has not been told are its end: no list
//! of waiting records is kept. What has ended stays in its place, and is dropped where the list would else grow.
//!
//! By page they are found through a tree whose links are places in the list: a treap ([`order`]), which is as deep as the
//! logarithm of what it holds whatever pages a guest chooses.

mod entry;
mod order;

use super::perm_name;
use crate::addr::PageRange;
use crate::context::KEPT;
use crate::device::StopId;
use crate::info::PendingStatus;
use crate::protocol::PAGE_SHIFT;
use crate::protocol::limit::Limit;
use crate::quota::{Charge, Full, Quota};
use crate::sync::Arc;
use entry::nanos;
use order::{Order, Place};
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) use entry::NewPending;
pub use entry::Pending;

/// Most pending faults of a GPU VM that are shown one by one.
pub const SHOWN_FAULTS: usize = 16;

/// A fault that has ended.
pub(crate) struct Taken {
    pub(crate) pending: Pending,
    /// Who joined it, but for the first.
    others: Vec<StopId>,
}

impl Taken {
    /// Parked accesses: the first one, unless it is a prefetch, and those that joined, in that order.
    pub(crate) fn waiters(&self) -> impl Iterator<Item = StopId> {
        self.pending.first().into_iter().chain(self.others.iter().copied())
    }
}

/// The faults of one context that wait for the guest. A context that has had none has no table.
#[derive(Debug, Default)]
pub struct PendingFaults {
    table: Option<Box<Table>>,
}

#[derive(Debug)]
struct Table {
    /// The upper half of cookies.
    generation: u64,
    list: Vec<Pending>,
    order: Order,
    /// Of those in the list, how many have not ended; and of these, of how many the guest has not been told all.
    live: usize,
    untold: usize,
    /// No place before this one has a fault that the guest was not told of.
    told_before: usize,
    /// The number given last.
    last: u32,
    /// Whether numbers have begun anew since the first of the list: they do not rise along it then.
    wrapped: bool,
    /// By number: who joined, but for the first.
    joined: BTreeMap<u32, Vec<StopId>>,
    charge: Charge,
}

impl PendingFaults {
    /// Has room for one more in the guest.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn reserve(&mut self, generation: u64, quota: &Arc<Quota>) -> Result<(), Full> {
        let new = || Box::new(Table::new(generation, quota.charge(Limit::TotalPendingFaults)));
        self.table.get_or_insert_with(new).charge.grow(1)
    }
    /// How many there are.
    pub fn count(&self) -> usize {
        self.table.as_ref().map_or(0, |table| table.live)
    }
    /// The pending fault of a cookie.
    pub fn get(&self, cookie: u64) -> Option<&Pending> {
        let table = self.table.as_ref()?;
        table.list.get(table.place(cookie)?)
    }
    /// Whether nothing waits for the pages of a fault but advice.
    pub(crate) fn is_advice(&self, cookie: u64) -> bool {
        // Who joins a prefetch first is its first.
        self.get(cookie).is_some_and(|pending| pending.is_prefetch() && pending.first().is_none())
    }
    /// Makes pending what there was room for ([`Self::reserve`]). Returns its cookie: the generation of the context, and a
    /// number that is not used again while a fault has it.
    pub(crate) fn insert(&mut self, new: &NewPending) -> u64 {
        let Some(table) = &mut self.table else { unreachable!("room was reserved") };
        table.insert(new)
    }
    /// Joins an access to the fault that asks for its page, if there is one.
    pub(crate) fn join(&mut self, vm_id: u32, page: u64, stop: StopId, perm: u16) -> bool {
        self.table.as_mut().is_some_and(|table| table.join(vm_id, page, stop, perm).is_some())
    }
    /// Takes those who joined a fault, but for its first.
    pub(crate) fn take_joined(&mut self, cookie: u64) -> Vec<StopId> {
        let number = self.get(cookie).map(|pending| pending.number);
        let joined = self.table.as_mut().zip(number).and_then(|(table, number)| table.joined.remove(&number));
        joined.unwrap_or_default()
    }
    /// Pages from `page` on that nobody has asked for: behind what covers it, up to what is asked for next.
    pub(crate) fn free_from(&self, vm_id: u32, page: u64) -> PageRange {
        let free = PageRange { start: page, end: u64::MAX };
        self.table.as_ref().map_or(free, |table| table.free_from(vm_id, page))
    }
    /// Ends the pending fault of a cookie.
    pub(crate) fn take(&mut self, cookie: u64) -> Option<Taken> {
        self.table.as_mut()?.take(cookie)
    }
    /// Whether the guest is to be told of a fault.
    pub(crate) fn has_untold(&self) -> bool {
        self.table.as_ref().is_some_and(|table| table.untold > 0)
    }
    /// The number given last: says when something else came ([`Self::is_next`]).
    pub(crate) fn mark(&self) -> u32 {
        self.table.as_ref().map_or(0, |table| table.last)
    }
    /// Whether the guest is to be told of a fault that was raised no later than this mark was taken.
    pub(crate) fn is_next(&mut self, mark: u32) -> bool {
        self.table.as_mut().is_some_and(|table| table.is_next(mark))
    }
    /// Writes the next record of the first fault of which the guest has not been told all. `write` gets its cookie, how
    /// many accesses wait for it, and the record's number; with the last one the guest knows all.
    pub(crate) fn report<T>(&mut self, write: impl FnOnce(u64, &Pending, usize) -> T) -> Option<T> {
        self.table.as_mut()?.report(write)
    }
    /// Those of a GPU VM that have waited longest, for people.
    pub fn oldest(&self, vm_id: u32, now_ns: u64) -> Vec<PendingStatus> {
        let Some(table) = &self.table else { return Vec::new() };
        let of_vm = table.live().filter(|pending| pending.vm_id == vm_id);
        of_vm.take(SHOWN_FAULTS).map(|pending| table.status(pending, now_ns)).collect()
    }
    /// CPU pages that are waited for, of each fault the first and the last; one may come up more than once.
    pub fn cpu_pages(&self) -> impl Iterator<Item = u64> {
        let last = |p: &Pending| p.cpu_page().saturating_add(p.pages().saturating_sub(1));
        self.live().flat_map(move |p| [p.cpu_page(), last(p)])
    }
    /// Pending faults that were raised at `run` of the guest's own time or before: cookie, GPU VM, GPU page.
    pub(crate) fn raised_until(&self, run: Duration) -> Vec<(u64, u32, u64)> {
        let Some(table) = &self.table else { return Vec::new() };
        let old = table.live().take_while(|pending| pending.raised_run <= nanos(run));
        old.map(|pending| (table.cookie(pending.number), pending.vm_id, pending.page())).collect()
    }
    /// Cookies of a GPU VM's pending faults in ranges of it, which are sorted and apart.
    pub(crate) fn cookies_in(&self, vm_id: u32, ranges: &[PageRange]) -> Vec<u64> {
        let Some(table) = self.table.as_ref().filter(|_| !ranges.is_empty()) else { return Vec::new() };
        let hit = |asked: PageRange| {
            let before = ranges.partition_point(|range| range.start < asked.end);
            let last = before.checked_sub(1).and_then(|at| ranges.get(at));
            last.is_some_and(|range| range.intersect(asked).is_some())
        };
        let inside = table.live().filter(|p| p.vm_id == vm_id && hit(p.range()));
        inside.map(|p| table.cookie(p.number)).collect()
    }
    fn live(&self) -> impl Iterator<Item = &Pending> {
        self.table.iter().flat_map(|table| table.live())
    }
}

impl Table {
    fn new(generation: u64, charge: Charge) -> Self {
        Self {
            generation,
            list: Vec::new(),
            order: Order::default(),
            live: 0,
            untold: 0,
            told_before: 0,
            last: 0,
            wrapped: false,
            joined: BTreeMap::new(),
            charge,
        }
    }
    fn live(&self) -> impl Iterator<Item = &Pending> {
        self.list.iter().filter(|pending| !pending.has_ended())
    }
    fn cookie(&self, number: u32) -> u64 {
        (self.generation << 32) | u64::from(number)
    }
    /// Where the pending fault of a cookie stands.
    fn place(&self, cookie: u64) -> Option<usize> {
        let number = u32::try_from(cookie & u64::from(u32::MAX)).ok()?;
        if self.cookie(number) != cookie {
            return None;
        }
        let first = self.list.first()?.number;
        let place = if self.wrapped {
            self.list.iter().position(|pending| pending.number == number && !pending.has_ended())?
        } else {
            let age = |number: u32| number.wrapping_sub(first);
            self.list.partition_point(|pending| age(pending.number) < age(number))
        };
        let is_it = |pending: &&Pending| pending.number == number && !pending.has_ended();
        self.list.get(place).filter(is_it).map(|_| place)
    }
    fn insert(&mut self, new: &NewPending) -> u64 {
        self.make_room();
        let before = self.last;
        loop {
            self.last = self.last.wrapping_add(1);
            // After four thousand million faults one of the first may still be pending.
            if !self.live_has(self.last) {
                break;
            }
        }
        let age = |number: u32| self.list.first().map_or(0, |first| number.wrapping_sub(first.number));
        self.wrapped |= age(self.last) < age(before) && !self.list.is_empty();
        let place = Place::of(self.list.len());
        self.list.push(Pending::new(new, self.last));
        self.order.insert(&mut self.list, place);
        self.live = self.live.saturating_add(1);
        self.untold = self.untold.saturating_add(1);
        self.cookie(self.last)
    }
    fn live_has(&self, number: u32) -> bool {
        self.place(self.cookie(number)).is_some()
    }
    /// Drops what has ended where that is a quarter of the list, and lets it grow where not: by an eighth, since there may
    /// be very many of these lists.
    fn make_room(&mut self) {
        let len = self.list.len();
        if len < self.list.capacity() {
            return;
        }
        if len.saturating_sub(self.live) > len / 4 {
            self.pack();
        } else {
            self.list.reserve_exact(len.clamp(1, 8).max(len / 8));
        }
    }
    fn pack(&mut self) {
        let told = self.list.iter().take(self.told_before);
        self.told_before = told.filter(|pending| !pending.has_ended()).count();
        self.list.retain(|pending| !pending.has_ended());
        self.order = Order::default();
        for place in 0..self.list.len() {
            self.order.insert(&mut self.list, Place::of(place));
        }
    }
    /// The pending fault that asks for a page.
    fn covering(&self, vm_id: u32, page: u64) -> Option<usize> {
        let place = self.order.last_until(&self.list, (vm_id, page))?;
        let pending = self.list.get(place)?;
        (pending.vm_id == vm_id && pending.range().contains(page)).then_some(place)
    }
    fn join(&mut self, vm_id: u32, page: u64, stop: StopId, perm: u16) -> Option<()> {
        let place = self.covering(vm_id, page)?;
        let pending = self.list.get_mut(place)?;
        if !pending.join_first(stop) {
            self.joined.entry(pending.number).or_default().push(stop);
        }
        // Of several pages the answer must grant what the first one needs, and this may be another: it asks again.
        if pending.pages() == 1 && !pending.is_prefetch() {
            pending.add_perm(perm);
        }
        Some(())
    }
    fn free_from(&self, vm_id: u32, page: u64) -> PageRange {
        let covering = self.covering(vm_id, page).and_then(|place| self.list.get(place));
        let start = covering.map_or(page, |pending| pending.range().end);
        let next = self.order.first_from(&self.list, (vm_id, start)).and_then(|place| self.list.get(place));
        let next = next.filter(|pending| pending.vm_id == vm_id);
        PageRange { start, end: next.map_or(u64::MAX, Pending::page) }
    }
    fn take(&mut self, cookie: u64) -> Option<Taken> {
        let place = self.place(cookie)?;
        self.order.remove(&mut self.list, Place::of(place));
        let entry = self.list.get_mut(place)?;
        let pending = entry.clone();
        entry.end();
        self.charge.shrink(1);
        self.live = self.live.saturating_sub(1);
        self.untold = self.untold.saturating_sub(usize::from(pending.told().is_none()));
        let others = if self.joined.is_empty() { None } else { self.joined.remove(&pending.number) };
        if self.live == 0 {
            self.list.clear();
            (self.told_before, self.wrapped) = (0, false);
            if self.list.capacity() > KEPT {
                self.list = Vec::new();
            }
        }
        Some(Taken { pending, others: others.unwrap_or_default() })
    }
    /// The place of the first fault of which the guest has not been told all.
    fn first_untold(&mut self) -> Option<usize> {
        if self.untold == 0 {
            return None;
        }
        let is_done = |pending: &Pending| pending.has_ended() || pending.told().is_some();
        while self.list.get(self.told_before).is_some_and(is_done) {
            self.told_before = self.told_before.saturating_add(1);
        }
        Some(self.told_before)
    }
    fn is_next(&mut self, mark: u32) -> bool {
        let first = self.first_untold().and_then(|place| self.list.get(place));
        let age = |number: u32| self.last.wrapping_sub(number);
        first.is_some_and(|pending| age(pending.number) >= age(mark))
    }
    fn report<T>(&mut self, write: impl FnOnce(u64, &Pending, usize) -> T) -> Option<T> {
        let place = self.first_untold()?;
        let pending = self.list.get(place)?;
        let written = write(self.cookie(pending.number), pending, self.waiters(pending));
        let pending = self.list.get_mut(place)?;
        if pending.tell() {
            self.untold = self.untold.saturating_sub(1);
        }
        Some(written)
    }
    /// How many accesses wait for a fault.
    fn waiters(&self, pending: &Pending) -> usize {
        let joined = if self.joined.is_empty() { None } else { self.joined.get(&pending.number) };
        joined.map_or(0, Vec::len).saturating_add(pending.first().is_some().into())
    }
    fn status(&self, pending: &Pending, now_ns: u64) -> PendingStatus {
        PendingStatus {
            cookie: self.cookie(pending.number),
            gpu_addr: pending.page() << PAGE_SHIFT,
            cpu_addr: pending.cpu_page() << PAGE_SHIFT,
            pages: pending.pages(),
            access: perm_name(pending.perm()),
            prefetch: pending.is_prefetch(),
            told: pending.told().is_some(),
            waiters: self.waiters(pending),
            wait_ns: now_ns.saturating_sub(pending.raised_ns()),
        }
    }
}

#[cfg(test)]
mod tests;
