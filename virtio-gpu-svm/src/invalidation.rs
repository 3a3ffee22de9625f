//! Taking pages away from a context, in two steps.
//!
//! *Accepted*: the address space drops the range and bumps its sequence, and every GPU VM over it is zapped; nothing
//! waits. *Done*: no engine can still use an old translation; published as `inval_done_seq` in every response and by a
//! record. Only then may the guest reuse a page. PROTOCOL 4.5.

use crate::addr::PageRange;
use crate::address_space::LEAF_PAGES;
use crate::context::{After, Context, Life, State, add};
use crate::device::{Asid, Flush, Ticket};
use crate::event::Waiting;
use crate::gpu_vm;
use crate::memory::{MemoryTable, Region};
use crate::population::{hold, lacks_faults, take_away};
use crate::protocol::PAGE_SHIFT;
use crate::seeded::{self, Bug};
use crate::seldom::Seldom;
use crate::sync::Arc;
use std::collections::VecDeque;

/// Most ranges of a GPU VM that are dropped one by one.
pub(crate) const ONE_BY_ONE: usize = 64;

/// What engines still have to pass before an invalidation is done.
#[derive(Debug)]
struct Unfinished {
    seq: u64,
    flushes: Vec<(usize, Asid, Ticket)>,
}

/// The invalidations of one context that were accepted and are not done.
#[derive(Debug, Default)]
pub struct Invalidations {
    unfinished: Seldom<VecDeque<Unfinished>>,
    done: u64,
}

impl Invalidations {
    /// Done up to this sequence.
    pub fn done_seq(&self) -> u64 {
        self.done
    }
    fn begin(&mut self, seq: u64, flushes: Vec<(usize, Asid, Ticket)>) {
        let flushes = if seeded::on(Bug::DoneBeforeFlush) { Vec::new() } else { flushes };
        if flushes.is_empty() && self.unfinished.get().is_none_or(VecDeque::is_empty) {
            self.done = seq;
            return;
        }
        self.unfinished.obtain().push_back(Unfinished { seq, flushes });
        self.advance();
    }
    /// A device has passed `ticket` for a GPU VM, or let go of it altogether (`None`). Whether `done` has moved.
    fn passed(&mut self, device: usize, asid: Asid, ticket: Option<Ticket>) -> bool {
        for inval in self.unfinished.get_mut().into_iter().flatten() {
            inval
                .flushes
                .retain(|(d, a, t)| (*d, *a) != (device, asid) || ticket.is_some_and(|ticket| *t > ticket));
        }
        self.advance()
    }
    fn advance(&mut self) -> bool {
        let before = self.done;
        let Some(unfinished) = self.unfinished.get_mut() else { return false };
        while let Some(first) = unfinished.front().filter(|inval| inval.flushes.is_empty()) {
            self.done = first.seq;
            unfinished.pop_front();
        }
        self.done != before
    }
}

/// Ranges merged, and many of them taken as one with all that is between them: the lock of a context is not held for
/// thousands of calls into a device.
pub(crate) fn bounded(ranges: Vec<PageRange>) -> Vec<PageRange> {
    let ranges = PageRange::merge(ranges);
    match (ranges.first(), ranges.last()) {
        (Some(first), Some(last)) if ranges.len() > ONE_BY_ONE => {
            vec![PageRange { start: first.start, end: last.end }]
        }
        _ => ranges,
    }
}

impl Context {
    /// Withdraws CPU pages from the context: accepted on return. Returns the sequence.
    pub fn invalidate(self: &Arc<Self>, range: PageRange) -> u64 {
        let mut after = After::default();
        let seq = self.invalidate_locked(&mut self.lock(), range, &mut after);
        self.settle(after);
        seq
    }

    fn invalidate_locked(&self, state: &mut State, range: PageRange, after: &mut After) -> u64 {
        let seq = state.space.invalidate(range);
        // An emptied leaf is gone; answers on their way still race with invalidations of their own leaf only.
        let leaf = |page: &u64| PageRange {
            start: page & !(LEAF_PAGES.saturating_sub(1)),
            end: (page | LEAF_PAGES.saturating_sub(1)).saturating_add(1),
        };
        for cpu_page in state.faults.cpu_pages().filter(|page| leaf(page).intersect(range).is_some()) {
            state.space.keep_leaf(cpu_page);
        }
        // Engines may be in a slice of a GPU VM that was destroyed: nothing of it is sure before it has retired.
        let mut flushes: Vec<_> =
            state.retiring().map(|(device, asid)| (device, asid, Ticket(u64::MAX))).collect();
        for vm in state.vms.values_mut().take(if seeded::on(Bug::ZapOneVm) { 1 } else { usize::MAX }) {
            let device = self.host.device_of(vm.device).as_ref();
            let shown = vm.mappings.showing(range);
            // What shows nothing of the range may have shown it before an UNMAP that engines have not passed.
            let flush = if shown.is_empty() { device.flush(vm.asid) } else { take_away(device, vm, shown) };
            if let Flush::Pending(ticket) = flush {
                flushes.push((vm.device, vm.asid, ticket));
            }
        }
        state.invalidations.begin(seq, flushes);
        add(&mut state.counters.obtain().invalidations, 1);
        after.more |= state.has_more();
        seq
    }

    /// Guest memory has changed: forgets what stood on regions that are gone, and returns the GPU VMs whose
    /// translations to them must still be dropped (by the caller, who may wait).
    pub(crate) fn change_memory(&self, table: &Arc<MemoryTable>, gone: &[Arc<Region>]) -> Vec<(usize, Asid)> {
        let mut guard = self.lock();
        let State { memory, space, vms, .. } = &mut *guard;
        *memory = Arc::clone(table);
        let inside = |gpa_page: u64, region: &Region| {
            let first = region.gpa().page();
            (first..first.saturating_add(region.size() >> PAGE_SHIFT)).contains(&gpa_page)
        };
        if !gone.is_empty() {
            space.forget(|gpa_page| gone.iter().any(|region| inside(gpa_page, region)));
            for vm in vms.values_mut() {
                let device = self.host.device_of(vm.device).as_ref();
                if lacks_faults(device) && vm.state == gpu_vm::State::Usable {
                    // Their pages may be anywhere; the caller waits for the engines.
                    let (Flush::Done | Flush::Pending(_)) = hold(device, vm);
                    vm.population.want(vm.mappings.iter().map(|va| va.range));
                }
            }
        }
        vms.values().map(|vm| (vm.device, vm.asid)).collect()
    }
}

impl State {
    /// A device has passed a ticket of one of our GPU VMs, or has retired it (`None`).
    pub(crate) fn on_flushed(
        &mut self,
        device: usize,
        asid: Asid,
        ticket: Option<Ticket>,
        after: &mut After,
    ) {
        // Records of a destroyed context would be taken for the next one's of its id.
        if self.invalidations.passed(device, asid, ticket)
            && self.life == Life::Alive
            && !self.waiting.iter().any(|(_, waiting)| *waiting == Waiting::InvalDone)
        {
            self.tell(Waiting::InvalDone);
            after.announce = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn done_moves_in_order_and_only_when_all_have_passed() {
        let mut invals = Invalidations::default();
        let (a, b) = (Asid(1), Asid(2));
        invals.begin(1, vec![(0, a, Ticket(5)), (1, b, Ticket(9))]);
        invals.begin(2, vec![]);
        invals.begin(3, vec![(0, a, Ticket(6))]);
        assert_eq!(invals.done_seq(), 0);
        assert!(!invals.passed(0, a, Some(Ticket(5))));
        assert!(!invals.passed(1, b, Some(Ticket(8))));
        assert!(invals.passed(1, b, Some(Ticket(9))));
        assert_eq!(invals.done_seq(), 2);
        assert!(invals.passed(0, a, None));
        assert_eq!(invals.done_seq(), 3);
    }
}
