//! What one guest may make this daemon hold at once, and what it holds.
//!
//! One [`Quota`] a guest, one gauge for each [`Limit`] that an operator sets. Whoever is about to hold something grows a
//! [`Charge`] first, and is refused there, before anything has changed; what is held goes back when the charge shrinks
//! or is dropped, on whatever path. A collection has one charge for all that is in it, and not one for each element, so
//! that a fault costs an addition and a subtraction.
//!
//! Limits of one context or GPU VM are compared with its own tables by whoever has their lock; here they are only
//! counted: the most that any has had, and how often one was refused.
//!
//! No lock but the list of `Starved` contexts, under which nothing is called.

use crate::context::Context;
use crate::protocol::limit::Limit;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::collections::VecDeque;

/// Limits that an operator sets.
const GAUGES: usize = 12;

/// What one guest may use at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Contexts.
    pub contexts: u32,
    /// Blob resources.
    pub resources: u32,
    /// Bytes that describe them.
    pub resource_bytes: u64,
    /// GPU VMs.
    pub gpu_vms: u32,
    /// Mappings of one GPU VM.
    pub mappings: u32,
    /// Mappings of all.
    pub total_mappings: u32,
    /// Bytes of page tables, of address spaces and of GPU VMs.
    pub table_bytes: u64,
    /// Faults of one context that wait for an answer.
    pub pending_faults: u32,
    /// Faults of all contexts that wait for an answer.
    pub total_pending_faults: u32,
    /// Jobs of one context in flight.
    pub jobs: u32,
    /// Jobs of all contexts in flight.
    pub total_jobs: u32,
    /// Bytes of what waits for its turn.
    pub queue_bytes: u64,
    /// Milliseconds of the guest's own time ([`crate::clock`]) in which a fault must be answered; 0: any time will do.
    pub fault_deadline_ms: u32,
}

impl Limits {
    /// What a guest has unless its operator says otherwise.
    pub const DEFAULT: Self = Self {
        contexts: 4096,
        resources: 4096,
        resource_bytes: 64 << 20,
        gpu_vms: 8192,
        mappings: 65_536,
        total_mappings: 262_144,
        table_bytes: 512 << 20,
        pending_faults: 256,
        total_pending_faults: 16_384,
        jobs: 256,
        total_jobs: 16_384,
        queue_bytes: 64 << 20,
        fault_deadline_ms: 60_000,
    };

    /// The number behind a name; none of a limit that is not an operator's.
    pub fn of(&self, limit: Limit) -> Option<u64> {
        Some(match limit {
            Limit::Contexts => self.contexts.into(),
            Limit::Resources => self.resources.into(),
            Limit::ResourceBytes => self.resource_bytes,
            Limit::GpuVms => self.gpu_vms.into(),
            Limit::Mappings => self.mappings.into(),
            Limit::TotalMappings => self.total_mappings.into(),
            Limit::TableBytes => self.table_bytes,
            Limit::PendingFaults => self.pending_faults.into(),
            Limit::TotalPendingFaults => self.total_pending_faults.into(),
            Limit::Jobs => self.jobs.into(),
            Limit::TotalJobs => self.total_jobs.into(),
            Limit::QueueBytes => self.queue_bytes,
            Limit::Leaves | Limit::ResidentPages | Limit::Asids | Limit::DeviceGpuVms => return None,
        })
    }
}

/// A limit of the guest is reached. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's limit {0} is reached")]
pub struct Full(pub Limit);

/// How far a limit is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct LimitStatus {
    /// Its name, as in the configuration.
    pub name: &'static str,
    /// Whose: `"guest"`, `"context"` or `"gpu vm"`.
    pub scope: &'static str,
    /// Held now; of a context's or GPU VM's, the most that any holds.
    pub used: u64,
    /// The most that was held in this session.
    pub peak: u64,
    /// The most that may be.
    pub limit: u64,
    /// How often more was asked for.
    pub refused: u64,
}

struct Gauge {
    limit: u64,
    used: AtomicU64,
    peak: AtomicU64,
    refused: AtomicU64,
}

impl Gauge {
    fn new(limit: u64) -> Self {
        Self { limit, used: AtomicU64::new(0), peak: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }
    /// Adds, unless that is too much. A loop and not an addition that is taken back: that would refuse somebody else.
    fn add(&self, amount: u64) -> bool {
        let more = |used: u64| used.checked_add(amount).filter(|used| *used <= self.limit);
        // Sequentially consistent, as the list of starved contexts needs it ([`Starved`]).
        let added = self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        if let Ok(before) = added {
            self.note(before.saturating_add(amount));
        }
        added.is_ok()
    }
    fn sub(&self, amount: u64) {
        let before = self.used.fetch_sub(amount, Ordering::SeqCst);
        debug_assert!(before >= amount, "{amount} of {before} given back");
    }
    fn note(&self, now: u64) {
        if now > self.peak.load(Ordering::Relaxed) {
            self.peak.fetch_max(now, Ordering::Relaxed);
        }
    }
    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used.load(Ordering::SeqCst))
    }
}

/// What a guest holds.
pub struct Quota {
    /// What was allowed; those of a context or GPU VM are compared by whoever has its lock.
    limits: Limits,
    gauges: [Gauge; GAUGES],
    /// Bit n: limit n was reached, and nobody has been told.
    reached: AtomicU32,
    /// Bit n: somebody has.
    told: AtomicU32,
    pub(crate) starved: Starved,
}

impl Quota {
    /// Nothing is held.
    pub fn new(limits: &Limits) -> Arc<Self> {
        let mut all = Limit::ALL.into_iter().filter_map(|limit| limits.of(limit));
        Arc::new(Self {
            limits: *limits,
            gauges: std::array::from_fn(|_| Gauge::new(all.next().unwrap_or(u64::MAX))),
            reached: AtomicU32::new(0),
            told: AtomicU32::new(0),
            starved: Starved::default(),
        })
    }
    /// What may be held.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
    fn gauge(&self, limit: Limit) -> Option<&Gauge> {
        self.gauges.get(usize::from(limit.to_wire()).checked_sub(1)?)
    }
    /// A charge of nothing.
    pub fn charge(self: &Arc<Self>, limit: Limit) -> Charge {
        Charge { of: Some((Arc::clone(self), limit)), amount: 0 }
    }
    /// How much more may be held.
    pub fn room(&self, limit: Limit) -> u64 {
        self.gauge(limit).map_or(u64::MAX, Gauge::room)
    }
    /// What is held.
    pub fn used(&self, limit: Limit) -> u64 {
        self.gauge(limit).map_or(0, |gauge| gauge.used.load(Ordering::Relaxed))
    }
    /// Counts a refusal, of a limit that is not counted here as well.
    pub fn refuse(&self, limit: Limit) {
        if let Some(gauge) = self.gauge(limit) {
            gauge.refused.fetch_add(1, Ordering::Relaxed);
        }
        self.reached.fetch_or(1_u32.wrapping_shl(limit.to_wire().into()), Ordering::Relaxed);
    }
    /// A context or GPU VM holds so much of its own limit.
    pub(crate) fn note(&self, limit: Limit, now: usize) {
        if let Some(gauge) = self.gauge(limit) {
            gauge.note(u64::try_from(now).unwrap_or(u64::MAX));
        }
    }
    /// Limits that were reached for the first time since this was asked last.
    pub fn newly_reached(&self) -> Vec<Limit> {
        if self.reached.load(Ordering::Relaxed) & !self.told.load(Ordering::Relaxed) == 0 {
            return Vec::new();
        }
        let reached = self.reached.load(Ordering::Relaxed);
        let told = self.told.fetch_or(reached, Ordering::Relaxed);
        let is_new = |limit: &Limit| reached & !told & 1_u32.wrapping_shl(limit.to_wire().into()) != 0;
        Limit::ALL.into_iter().filter(is_new).collect()
    }
    /// All limits that an operator sets. `most` tells what the context or GPU VM that holds most of one holds.
    pub fn status(&self, most: impl Fn(Limit) -> u64) -> Vec<LimitStatus> {
        let row = |limit: Limit| {
            let gauge = self.gauge(limit)?;
            let used =
                if limit.scope() == "guest" { gauge.used.load(Ordering::Relaxed) } else { most(limit) };
            Some(LimitStatus {
                name: limit.name(),
                scope: limit.scope(),
                used,
                peak: gauge.peak.load(Ordering::Relaxed),
                limit: gauge.limit,
                refused: gauge.refused.load(Ordering::Relaxed),
            })
        };
        Limit::ALL.into_iter().filter_map(row).collect()
    }
}

/// So much of a limit. Given back when dropped. The default belongs to nobody and is never refused.
#[derive(Default)]
pub struct Charge {
    of: Option<(Arc<Quota>, Limit)>,
    amount: u64,
}

impl Charge {
    /// How much.
    pub fn amount(&self) -> u64 {
        self.amount
    }
    /// A charge of nothing, for the same.
    pub fn sibling(&self) -> Self {
        Self { of: self.of.clone(), amount: 0 }
    }
    fn gauge(&self) -> Option<&Gauge> {
        self.of.as_ref().and_then(|(quota, limit)| quota.gauge(*limit))
    }
    /// How much it could have in all.
    pub fn most(&self) -> u64 {
        self.gauge().map_or(u64::MAX, |gauge| gauge.room().saturating_add(self.amount))
    }
    /// Takes more.
    ///
    /// # Errors
    /// [`Full`].
    pub fn grow(&mut self, amount: u64) -> Result<(), Full> {
        if amount > 0
            && let Some((quota, limit)) = &self.of
            && !self.gauge().is_none_or(|gauge| gauge.add(amount))
        {
            quota.refuse(*limit);
            return Err(Full(*limit));
        }
        self.amount = self.amount.saturating_add(amount);
        Ok(())
    }
    /// Gives so much back.
    pub fn shrink(&mut self, amount: u64) {
        debug_assert!(amount <= self.amount, "{amount} of {} given back", self.amount);
        let amount = amount.min(self.amount);
        if amount > 0
            && let Some(gauge) = self.gauge()
        {
            gauge.sub(amount);
        }
        self.amount = self.amount.saturating_sub(amount);
    }
    /// Gives back what is more than this.
    pub fn shrink_to(&mut self, amount: u64) {
        self.shrink(self.amount.saturating_sub(amount));
    }
    /// Takes more or gives back.
    ///
    /// # Errors
    /// [`Full`]; never where it gives back.
    pub fn resize(&mut self, amount: u64) -> Result<(), Full> {
        match amount.checked_sub(self.amount) {
            Some(more) => self.grow(more),
            None => {
                self.shrink_to(amount);
                Ok(())
            }
        }
    }
    /// Takes over so much of another charge for the same.
    pub fn take_from(&mut self, other: &mut Self, amount: u64) {
        debug_assert_eq!(
            self.of.as_ref().map(|(quota, limit)| (Arc::as_ptr(quota), limit)),
            other.of.as_ref().map(|(quota, limit)| (Arc::as_ptr(quota), limit)),
            "charges for different things"
        );
        let amount = amount.min(other.amount);
        other.amount = other.amount.saturating_sub(amount);
        self.amount = self.amount.saturating_add(amount);
    }
    /// Takes over all of it.
    pub fn absorb(&mut self, mut other: Self) {
        let amount = other.amount;
        self.take_from(&mut other, amount);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.shrink(self.amount);
    }
}

impl std::fmt::Debug for Charge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Charge({})", self.amount)
    }
}

/// Contexts that have something to ask of the guest, and found its limit of pending faults reached.
///
/// Nobody is forgotten: who enters the list looks for room afterwards, who makes room looks into the list afterwards,
/// and all of that is sequentially consistent.
#[derive(Default)]
pub(crate) struct Starved {
    count: AtomicUsize,
    /// Guards the list; each context is in it once.
    list: Mutex<VecDeque<Weak<Context>>>,
}

impl Starved {
    /// Whether there is one.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }
    /// Puts a context at the end, unless it is there.
    pub fn enter(&self, listed: &AtomicBool, context: &Weak<Context>) {
        let mut list = self.lock();
        if !listed.swap(true, Ordering::Relaxed) {
            list.push_back(Weak::clone(context));
            self.count.store(list.len(), Ordering::SeqCst);
        }
    }
    /// Takes the first one that is still there.
    pub fn take(&self, listed: impl Fn(&Context) -> &AtomicBool) -> Option<Arc<Context>> {
        let mut list = self.lock();
        let mut found = None;
        while found.is_none()
            && let Some(context) = list.pop_front()
        {
            found = context.upgrade();
        }
        self.count.store(list.len(), Ordering::SeqCst);
        if let Some(context) = &found {
            listed(context).store(false, Ordering::Relaxed);
        }
        found
    }
    fn lock(&self) -> MutexGuard<'_, VecDeque<Weak<Context>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
