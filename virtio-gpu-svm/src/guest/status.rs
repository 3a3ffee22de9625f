//! What a guest looks like from outside: snapshots and sums, taken without its lock where a context is asked.

use super::Guest;
use super::resources::Resource;
use crate::context::Context;
use crate::info::{ContextStatus, ContextSummary, GuestStatus, HostStats};
use crate::protocol::event::EVENT_CONTEXT_RETIRED;
use crate::protocol::limit::Limit;
use crate::sync::Arc;

impl Guest {
    /// GPU VMs alive on a host device.
    pub(crate) fn vms_on(&self, device: usize) -> usize {
        self.list().iter().flat_map(|context| context.asids()).filter(|(on, _)| *on == device).count()
    }
    /// Adds this guest's counts.
    pub(crate) fn add_to(&self, stats: &mut HostStats) {
        let (alive, mut sum, all) = {
            let inner = self.lock();
            let retiring = inner.retiring.values().map(|(context, _)| Arc::clone(context));
            let all: Vec<_> = inner.contexts.values().cloned().chain(retiring).collect();
            (inner.contexts.len(), inner.past, all)
        };
        stats.contexts = stats.contexts.saturating_add(alive);
        for context in all {
            stats.gpu_vms = stats.gpu_vms.saturating_add(context.load().0);
            sum.add(&context.counters());
        }
        stats.counters.add(&sum);
    }
    /// What it looks like.
    pub fn status(&self) -> GuestStatus {
        let (mut status, contexts) = {
            let inner = self.lock();
            let regions = inner.memory.regions();
            let status = GuestStatus {
                name: self.name.to_string(),
                epoch: self.epoch,
                incarnation: inner.incarnation,
                devices: self.devices.clone(),
                contexts: inner.contexts.len(),
                retiring: inner.retiring.len(),
                resources: inner.resources.len(),
                memory_bytes: regions.iter().map(|region| region.size()).fold(0, u64::saturating_add),
                memory_regions: regions.len(),
                pending_faults: 0,
                frozen: inner.frozen,
                limits: Vec::new(),
            };
            (status, inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        // Without the guest's lock: one of them may be held for a whole command.
        status.pending_faults =
            contexts.iter().map(|context| context.load().1).fold(0, usize::saturating_add);
        let most = |limit| contexts.iter().map(|context| context.held(limit)).max().unwrap_or(0);
        status.limits = self.quota.status(most);
        status
    }
    /// What it holds, counted from the objects themselves: while nothing happens, what its quota says. For checks.
    pub fn recount(&self) -> Vec<(Limit, u64)> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let inner = self.lock();
        let outbox = self.lock_outbox();
        let untold = outbox.notices.iter().filter(|notice| notice.kind == EVENT_CONTEXT_RETIRED).count();
        let attached =
            |resource: &Resource| count(resource.attached.len()).saturating_mul(Resource::ATTACHMENT_BYTES);
        let bytes = |resource: &Resource| resource.blob.bytes().saturating_add(attached(resource));
        let mut sums = vec![
            (
                Limit::Contexts,
                count(inner.contexts.len().saturating_add(inner.retiring.len()).saturating_add(untold)),
            ),
            (Limit::Resources, count(inner.resources.len())),
            (Limit::ResourceBytes, inner.resources.values().map(bytes).fold(0, u64::saturating_add)),
        ];
        let retiring = inner.retiring.values().map(|(context, _)| Arc::clone(context));
        let contexts: Vec<_> = inner.contexts.values().cloned().chain(retiring).collect();
        drop((inner, outbox));
        for limit in [
            Limit::GpuVms,
            Limit::TotalMappings,
            Limit::TableBytes,
            Limit::TotalPendingFaults,
            Limit::TotalJobs,
            Limit::QueueBytes,
        ] {
            let of = |context: &Arc<Context>| context.recount(limit);
            sums.push((limit, contexts.iter().map(of).fold(0, u64::saturating_add)));
        }
        sums
    }
    /// Its contexts with all their mappings, by id.
    pub fn contexts(&self) -> Vec<ContextStatus> {
        self.list().iter().map(|context| context.status()).collect()
    }
    /// Its contexts without their mappings, by id.
    pub fn context_summaries(&self) -> Vec<ContextSummary> {
        self.list().iter().map(|context| context.summary()).collect()
    }
    fn list(&self) -> Vec<Arc<Context>> {
        self.lock().contexts.values().cloned().collect()
    }
}
