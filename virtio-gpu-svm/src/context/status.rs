//! What a context looks like from outside, for people and tools.

use super::Context;
use crate::addr::{GpuAddr, PageRange};
use crate::device::Asid;
use crate::gpu_vm::{Backing, GpuVa, GpuVm, State as VmState};
use crate::info::{ContextStatus, ContextSummary, Holding, MappingStatus, VmStatus, VmSummary};
use crate::protocol::PAGE_SHIFT;
use crate::protocol::limit::Limit;

impl Context {
    /// What it looks like.
    pub fn status(&self) -> ContextStatus {
        let mut status = self.status_locked();
        status.limits = self.holdings();
        // There may be very many mappings: a device is not asked about each while others wait for the context.
        for vm in &mut status.vms {
            let device = self.host.device_of(vm.device);
            for mapping in &mut vm.mappings {
                let pages = |addr: u64| GpuAddr(addr).page();
                let range = PageRange { start: pages(mapping.gpu_start), end: pages(mapping.gpu_end) };
                mapping.resident_pages = device.resident_in(Asid(vm.asid), range);
            }
        }
        status
    }
    fn status_locked(&self) -> ContextStatus {
        let state = self.lock();
        let now_ns = self.host.now_ns();
        ContextStatus {
            guest: self.label.guest.to_string(),
            ctx_id: self.ctx_id,
            generation: self.generation,
            name: self.name.to_string(),
            capset_id: self.capset_id,
            known_pages: state.space.known_pages(),
            inval_seq: state.space.seq(),
            inval_done_seq: state.invalidations.done_seq(),
            pending_faults: state.faults.count(),
            jobs: state.timelines.len(),
            limits: Vec::new(),
            vms: state
                .vms
                .iter()
                .map(|(vm_id, vm)| VmStatus {
                    faults: state.faults.oldest(*vm_id, now_ns),
                    ..self.vm_status(*vm_id, vm)
                })
                .collect(),
            counters: state.counters(),
        }
    }
    /// The same without mappings.
    pub fn summary(&self) -> ContextSummary {
        let (mappings, table_bytes) = (self.held(Limit::TotalMappings), self.held(Limit::TableBytes));
        let state = self.lock();
        let vms: Vec<_> = state.vms.iter().map(|(vm_id, vm)| self.vm_summary(*vm_id, vm)).collect();
        ContextSummary {
            guest: self.label.guest.to_string(),
            ctx_id: self.ctx_id,
            generation: self.generation,
            name: self.name.to_string(),
            known_pages: state.space.known_pages(),
            resident_pages: vms.iter().map(|vm| vm.resident_pages).fold(0, u64::saturating_add),
            pending_faults: state.faults.count(),
            jobs: state.timelines.len(),
            mappings,
            table_bytes,
            vms,
            counters: state.counters(),
        }
    }
    fn holdings(&self) -> Vec<Holding> {
        let held = |limit: Limit| {
            Some(Holding {
                name: limit.name(),
                used: self.held(limit),
                limit: self.quota.limits().of(limit)?,
            })
        };
        let shown = [
            Limit::Mappings,
            Limit::TotalMappings,
            Limit::TableBytes,
            Limit::PendingFaults,
            Limit::Jobs,
            Limit::QueueBytes,
        ];
        shown.into_iter().filter_map(held).collect()
    }
    /// What it holds of a limit, counted from the objects themselves; of a limit of GPU VMs, the most that any holds.
    pub(crate) fn recount(&self, limit: Limit) -> u64 {
        self.count_held(limit, true)
    }
    /// The same, as its charges say.
    pub(crate) fn held(&self, limit: Limit) -> u64 {
        self.count_held(limit, false)
    }
    fn count_held(&self, limit: Limit, from_objects: bool) -> u64 {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let state = self.lock();
        let vms = || state.vms.values();
        let (queued, adding) = if from_objects { state.timelines.weigh() } else { state.timelines.charged() };
        let wishes = |vm: &GpuVm| if from_objects { vm.population.weigh() } else { vm.population.bytes() };
        match limit {
            Limit::GpuVms => count(state.vms.len().saturating_add(state.retiring().count())),
            Limit::Mappings => vms().map(|vm| vm.mappings.count()).max().unwrap_or(0),
            Limit::TotalMappings => vms().map(|vm| vm.mappings.count()).fold(adding, u64::saturating_add),
            Limit::TableBytes => {
                let retiring = state.retiring();
                let all = vms().map(|vm| (vm.device, vm.asid)).chain(retiring);
                let bytes = all.map(|(device, asid)| self.host.device_of(device).table_bytes(asid));
                let known = if from_objects { state.space.weigh() } else { state.space.bytes() };
                bytes.fold(known, u64::saturating_add)
            }
            Limit::PendingFaults | Limit::TotalPendingFaults => count(state.faults.count()),
            Limit::Jobs | Limit::TotalJobs => count(state.timelines.in_flight()),
            Limit::QueueBytes => vms().map(wishes).fold(queued, u64::saturating_add),
            Limit::Contexts
            | Limit::Resources
            | Limit::ResourceBytes
            | Limit::Leaves
            | Limit::ResidentPages
            | Limit::Asids
            | Limit::DeviceGpuVms => 0,
        }
    }
    fn vm_summary(&self, vm_id: u32, vm: &GpuVm) -> VmSummary {
        VmSummary {
            vm_id,
            device: vm.device,
            asid: vm.asid.0,
            state: state_name(vm.state),
            mappings: vm.mappings.len(),
            resident_pages: self.host.device_of(vm.device).resident_pages(vm.asid),
        }
    }
    fn vm_status(&self, vm_id: u32, vm: &GpuVm) -> VmStatus {
        let (error, error_op, error_addr) = match vm.state {
            VmState::Usable => (0, 0, 0),
            VmState::Unusable { errno, op, addr } => (errno, op, addr),
        };
        VmStatus {
            vm_id,
            device: vm.device,
            asid: vm.asid.0,
            state: state_name(vm.state),
            error,
            error_op,
            error_addr,
            mappings: vm.mappings.iter().map(mapping_status).collect(),
            resident_pages: self.host.device_of(vm.device).resident_pages(vm.asid),
            wanted_pages: vm.population.wanted_pages(),
            held: vm.population.is_held(),
            jobs: vm.jobs,
            pending_faults: vm.pending_faults,
            faults: Vec::new(),
        }
    }
}

/// For people.
fn state_name(state: VmState) -> &'static str {
    match state {
        VmState::Usable => "usable",
        VmState::Unusable { .. } => "unusable",
    }
}

fn mapping_status(va: &GpuVa) -> MappingStatus {
    let (gpu_start, gpu_end) = (va.range.start_addr(), va.range.end_addr());
    let none = MappingStatus {
        gpu_start,
        gpu_end,
        kind: "userptr",
        cpu_start: None,
        cpu_end: None,
        resource_id: None,
        offset: None,
        readonly: va.readonly,
        resident_pages: 0,
    };
    let cpu = va.cpu_range();
    let (cpu_start, cpu_end) = (cpu.map(PageRange::start_addr), cpu.map(PageRange::end_addr));
    match &va.backing {
        Backing::Userptr(_) => MappingStatus { cpu_start, cpu_end, ..none },
        Backing::Mirror(_) => MappingStatus { kind: "mirror", cpu_start, cpu_end, ..none },
        Backing::Null => MappingStatus { kind: "null", ..none },
        Backing::Blob(blob, page) => MappingStatus {
            kind: "blob",
            resource_id: Some(blob.resource_id),
            offset: Some(page << PAGE_SHIFT),
            ..none
        },
    }
}
