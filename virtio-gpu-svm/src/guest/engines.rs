//! Guest memory that changes, and the wait until engines have let go of what is not the device's any more.
//!
//! Only the guest's own threads wait, for at most a slice of each engine; whoever lets go wakes them.

use super::Guest;
use crate::context::Context;
use crate::device::{Asid, Ticket};
use crate::memory::{MemoryTable, Region};
use crate::sleepers::Sleepers;
use crate::sync::{Arc, MutexGuard, PoisonError};
use std::collections::HashSet;
use std::time::Duration;

/// Longest wait for an engine to pass a checkpoint before it is looked at again; a guard against a lost wake-up, not a
/// deadline.
const RECHECK: Duration = Duration::from_millis(10);

/// What engines have let go of.
#[derive(Default)]
pub(super) struct Passed {
    /// How often they did.
    count: u64,
    waiters: Sleepers,
}

impl Guest {
    /// Publishes a new memory table: what stood on removed regions is invalidated; waits for at most one slice of each
    /// engine.
    pub fn set_memory(&self, table: Arc<MemoryTable>) {
        let (gone, contexts) = {
            let mut inner = self.lock();
            let kept: HashSet<u64> = table.regions().iter().map(|region| region.id()).collect();
            let old = std::mem::replace(&mut inner.memory, Arc::clone(&table));
            let gone: Vec<Arc<Region>> =
                old.regions().iter().filter(|region| !kept.contains(&region.id())).cloned().collect();
            (gone, inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        for context in &contexts {
            let vms = context.change_memory(&table, &gone);
            for (device, asid) in vms {
                gone.iter().for_each(|region| self.host.device_of(device).drop_region(asid, region.id()));
            }
            context.refill();
        }
        if !gone.is_empty() {
            // GPU VMs on their way out hold regions too.
            self.wait_retired(&contexts);
        }
    }
    /// The memory table now.
    pub fn memory(&self) -> Arc<MemoryTable> {
        Arc::clone(&self.lock().memory)
    }

    /// Wakes who waits for engines.
    pub(crate) fn wake_waiters(&self) {
        let mut passed = self.passed();
        passed.count = passed.count.wrapping_add(1);
        if passed.waiters.call_all() {
            drop(passed);
            self.waiters.notify_all();
        }
    }
    /// Waits until engines have passed tickets of GPU VMs: at most one slice each.
    pub(super) fn wait_flushed(&self, flushes: Vec<(usize, Asid, Ticket)>) {
        self.wait_until(|| {
            flushes
                .iter()
                .all(|(device, asid, ticket)| self.host.device_of(*device).has_flushed(*asid, *ticket))
        });
    }
    /// Waits until engines have let go of destroyed contexts, and of destroyed GPU VMs of these.
    pub(super) fn wait_retired(&self, contexts: &[Arc<Context>]) {
        self.wait_until(|| {
            contexts.iter().for_each(Context::catch_up);
            self.have_retired() && contexts.iter().all(|context| !context.is_retiring())
        });
    }
    /// Whether engines have let go of all destroyed contexts. What devices have told of them counts: who waits for it
    /// does not wait for the host's worker.
    pub(super) fn have_retired(&self) -> bool {
        let told: Vec<_> = {
            let inner = self.lock();
            let retiring = inner.retiring.values().map(|(context, _)| context);
            retiring.filter(|context| context.has_news()).cloned().collect()
        };
        for context in told {
            context.catch_up();
            context.say_farewell();
        }
        self.lock().retiring.is_empty()
    }
    pub(super) fn wait_until(&self, done: impl Fn() -> bool) {
        self.wait_while(|| !self.is_broken() && !done());
    }
    pub(super) fn wait_while(&self, waits: impl Fn() -> bool) {
        loop {
            let before = self.passed().count;
            if !waits() {
                return;
            }
            let mut passed = self.passed();
            if passed.count == before {
                passed.waiters.lie_down();
                // Both ends of the wait lead to another look at what is waited for.
                let woken = self.waiters.wait_timeout(passed, RECHECK);
                woken.unwrap_or_else(PoisonError::into_inner).0.waiters.get_up();
            }
        }
    }
    fn passed(&self) -> MutexGuard<'_, Passed> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
