//! A context: one guest process on this daemon.
//!
//! Owns the process' address space (A side), its GPU VMs (C side, one a device at most), its pending faults, its jobs
//! in flight and the records that wait for it, **all under one lock**: whatever touches two of them is atomic by that,
//! and the lock is held by one process' work only. Under it only short calls into [`crate::device::Device`] are made;
//! resumes, submissions and the announcement of records are collected in [`After`] and done when it is released.

use crate::addr::PageRange;
use crate::address_space::AddressSpace;
use crate::device::{Asid, Device, Extent, Flush, Job, JobEnd, JobId, StopId, Ticket, Verdict, VmLabel};
use crate::event::{DoneJob, Record, Stamp, Waiting, fault_record, job_record, notice_record};
use crate::fault::router::Owner;
use crate::fault::{Outcome, PendingFaults, Throttled};
use crate::gpu_vm::{Backing, Change, GpuVa, GpuVm, Mappings, State as VmState};
use crate::guest::Guest;
use crate::host::{Host, Limits};
use crate::info::{ContextStatus, ContextSummary, Counters, MappingStatus, VmStatus, VmSummary};
use crate::invalidation::{Invalidations, bounded, zap};
use crate::memory::MemoryTable;
use crate::protocol::PAGE_SHIFT;
use crate::protocol::errno::{EBUSY, ECANCELED, EEXIST, EINVAL, ENOENT, ENOSPC, EPIPE};
use crate::protocol::event::{EVENT_CONTEXT_LOST, EVENT_INVAL_DONE};
use crate::protocol::job::Packet;
use crate::seeded::{self, Bug};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

/// Whether a context still lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It does.
    Alive,
    /// Destroyed; devices may still hold something of it.
    Destroyed,
}

/// Why a request about a context was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not this context's.
    #[error("no GPU VM {0} in this context")]
    NoVm(u32),
    /// The context has one there.
    #[error("the context has a GPU VM on device {0}")]
    VmExists(u32),
    /// The GPU VM is unusable.
    #[error("GPU VM {0} is unusable; destroy it and create another")]
    VmUnusable(u32),
    /// No asid is free on the device.
    #[error("the device has no asid left")]
    NoAsid,
    /// Over the quota of jobs.
    #[error("{0} jobs are in flight, which is the limit")]
    TooManyJobs(u32),
    /// Over the quota of mappings.
    #[error("the GPU VM would have more than {0} mappings")]
    TooManyMappings(u32),
    /// A mirror window would be cut where it has pages.
    #[error("the mirror window has pages there; invalidate them first")]
    MirrorBusy,
    /// The device refused.
    #[error("the device refused")]
    Device(#[source] crate::device::Error),
}

impl Error {
    /// On the wire. PROTOCOL 8.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoVm(_) => ENOENT,
            Self::VmExists(_) => EEXIST,
            Self::VmUnusable(_) => EPIPE,
            Self::MirrorBusy => EBUSY,
            Self::NoAsid | Self::TooManyJobs(_) | Self::TooManyMappings(_) => ENOSPC,
            Self::Device(error) => match error {
                crate::device::Error::NoVm(_) => EPIPE,
                crate::device::Error::VmExists(_) => EBUSY,
                crate::device::Error::UnknownOpcode { .. } | crate::device::Error::BadOperand { .. } => {
                    EINVAL
                }
                crate::device::Error::OutOfMemory => crate::protocol::errno::ENOMEM,
                crate::device::Error::Unsupported => crate::protocol::errno::EOPNOTSUPP,
            },
        }
    }
}

/// One checked operation of a VM_BIND.
#[derive(Clone, Debug)]
pub enum Bind {
    /// Map.
    Map(GpuVa),
    /// Unmap.
    Unmap(PageRange),
    /// Unmap every mapping of a blob resource.
    UnmapAll(u32),
}

/// What must be done once the context's lock is released.
#[derive(Default)]
pub struct After {
    resumes: Vec<(usize, StopId, Verdict)>,
    /// Records wait for the guest.
    pub announce: bool,
}

impl After {
    /// Releases a parked access later.
    pub fn resume(&mut self, device: usize, stop: StopId, verdict: Verdict) {
        self.resumes.push((device, stop, verdict));
    }
}

struct JobInFlight {
    vm_id: u32,
    ring_idx: u32,
    user_data: u64,
}

/// Everything about a context that changes. Guarded by the context's lock.
pub struct State {
    pub(crate) life: Life,
    pub(crate) space: AddressSpace,
    pub(crate) vms: BTreeMap<u32, GpuVm>,
    next_vm: u32,
    pub(crate) faults: PendingFaults,
    /// Parked accesses beyond the limit of pending faults: raised again as others end.
    pub(crate) throttled: VecDeque<Throttled>,
    pub(crate) invalidations: Invalidations,
    /// GPU VMs destroyed that their device has not retired.
    pub(crate) retiring: HashSet<(usize, Asid)>,
    jobs: HashMap<JobId, JobInFlight>,
    /// Jobs that have ended and whose records wait.
    undelivered_jobs: usize,
    pub(crate) waiting: VecDeque<Waiting>,
    pub(crate) memory: Arc<MemoryTable>,
    pub(crate) counters: Counters,
    /// Scratch, so that serving a fault allocates nothing.
    pub(crate) extents: Vec<Extent>,
}

/// One guest process.
pub struct Context {
    /// Its id in the guest.
    pub ctx_id: u32,
    /// Tells it from earlier contexts of that id; unique on the host.
    pub generation: u64,
    /// As the guest calls it.
    pub name: String,
    /// Its capset.
    pub capset_id: u32,
    pub(crate) label: VmLabel,
    pub(crate) limits: Limits,
    pub(crate) host: Arc<Host>,
    guest: Weak<Guest>,
    /// Whether it stands in its guest's list of contexts with records; changed under that list's lock.
    pub(crate) queued: AtomicBool,
    /// Guards all of [`State`]. Taken by the guest's queue thread and by engines that fault for this context. Under it
    /// a router's table may be locked, nothing else.
    state: Mutex<State>,
}

/// What a new context is.
pub struct NewContext {
    /// Its id.
    pub ctx_id: u32,
    /// Its name.
    pub name: String,
    /// Its capset.
    pub capset_id: u32,
}

impl Context {
    /// A context without anything.
    pub fn new(new: NewContext, guest: &Arc<Guest>, memory: Arc<MemoryTable>) -> Arc<Self> {
        let host = Arc::clone(guest.host());
        let generation = host.next_generation();
        let label = VmLabel { guest: guest.shared_name(), ctx_id: new.ctx_id, generation };
        let state = State {
            life: Life::Alive,
            space: AddressSpace::default(),
            vms: BTreeMap::new(),
            next_vm: 1,
            faults: PendingFaults::default(),
            throttled: VecDeque::new(),
            invalidations: Invalidations::default(),
            retiring: HashSet::new(),
            jobs: HashMap::new(),
            undelivered_jobs: 0,
            waiting: VecDeque::new(),
            memory,
            counters: Counters::default(),
            extents: Vec::new(),
        };
        Arc::new(Self {
            ctx_id: new.ctx_id,
            generation,
            name: new.name,
            capset_id: new.capset_id,
            label,
            limits: guest.limits(),
            host,
            guest: Arc::downgrade(guest),
            queued: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Does what had to wait for the lock's release.
    pub(crate) fn settle(self: &Arc<Self>, after: After) {
        for (device, stop, verdict) in after.resumes {
            self.host.device_of(device).resume(stop, verdict);
        }
        if after.announce
            && let Some(guest) = self.guest.upgrade()
        {
            guest.announce(self);
        }
    }
    /// Invalidations done so far.
    pub fn inval_done_seq(&self) -> u64 {
        self.lock().invalidations.done_seq()
    }

    /// Creates the GPU VM on a device. Returns its id and asid. PROTOCOL 5.1.
    ///
    /// # Errors
    /// [`Error::VmExists`], [`Error::NoAsid`], [`Error::Device`].
    pub fn vm_create(self: &Arc<Self>, dev_id: u32, device: usize) -> Result<(u32, Asid), Error> {
        let mut state = self.lock();
        if state.vms.values().any(|vm| vm.device == device) {
            return Err(Error::VmExists(dev_id));
        }
        let vm_id = state.next_vm;
        let owner = Owner { context: Arc::clone(self), vm_id };
        let router = self.host.router_of(device);
        let asid = router.take_asid(owner).ok_or(Error::NoAsid)?;
        if let Err(error) = self.host.device_of(device).vm_create(asid, self.label.clone()) {
            router.free_asid(asid);
            return Err(Error::Device(error));
        }
        state.next_vm = state.next_vm.wrapping_add(1).max(1);
        let mappings = Mappings::default();
        let vm = GpuVm { device, dev_id, asid, state: VmState::Usable, mappings, jobs: 0, pending_faults: 0 };
        state.vms.insert(vm_id, vm);
        Ok((vm_id, asid))
    }

    /// Destroys a GPU VM; its jobs end with -ECANCELED. PROTOCOL 5.2.
    ///
    /// # Errors
    /// [`Error::NoVm`].
    pub fn vm_destroy(self: &Arc<Self>, vm_id: u32) -> Result<(), Error> {
        let mut after = After::default();
        {
            let mut state = self.lock();
            let Some(vm) = state.vms.get(&vm_id) else { return Err(Error::NoVm(vm_id)) };
            let dev_id = vm.dev_id;
            self.close_vm(&mut state, vm_id, &mut after);
            let dropped: Vec<JobId> =
                state.jobs.iter().filter(|(_, job)| job.vm_id == vm_id).map(|(id, _)| *id).collect();
            for id in dropped {
                let Some(job) = state.jobs.remove(&id) else { continue };
                let end = JobEnd {
                    errno: ECANCELED,
                    packet: 0,
                    addr: crate::addr::GpuAddr(0),
                    access: crate::device::Access::Read,
                };
                state.counters.jobs_dropped = state.counters.jobs_dropped.saturating_add(1);
                state.push_job(id, &job, dev_id, end);
            }
            after.announce = true;
        }
        self.settle(after);
        Ok(())
    }

    /// Takes a GPU VM out of the context and begins to destroy it on its device.
    fn close_vm(&self, state: &mut State, vm_id: u32, after: &mut After) {
        // Its device drops their jobs; here they would only keep others waiting.
        state.throttled.retain(|throttled| throttled.vm_id() != vm_id);
        let end = if seeded::on(Bug::ResumeAfterTeardown) { 0 } else { u64::MAX };
        for cookie in state.faults.cookies_in(vm_id, &[PageRange { start: 0, end }]) {
            self.end_pending(state, cookie, Outcome::Dropped, Verdict::Fail(ECANCELED), after);
        }
        let Some(vm) = state.vms.remove(&vm_id) else { return };
        state.retiring.insert((vm.device, vm.asid));
        self.host.device_of(vm.device).vm_destroy(vm.asid);
    }

    /// Carries out operations, all or none. PROTOCOL 5.3.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::VmUnusable`] for a MAP, [`Error::TooManyMappings`].
    pub fn bind(self: &Arc<Self>, vm_id: u32, binds: &[Bind]) -> Result<(), Error> {
        let mut after = After::default();
        let result = self.bind_locked(&mut self.lock(), vm_id, binds, &mut after);
        self.settle(after);
        result
    }

    fn bind_locked(
        &self,
        state: &mut State,
        vm_id: u32,
        binds: &[Bind],
        after: &mut After,
    ) -> Result<(), Error> {
        let limit = self.limits.mappings;
        let vm = state.vms.get_mut(&vm_id).ok_or(Error::NoVm(vm_id))?;
        if vm.state != VmState::Usable && binds.iter().any(|bind| matches!(bind, Bind::Map(_))) {
            return Err(Error::VmUnusable(vm_id));
        }
        let mut change = Change::default();
        for bind in binds {
            match bind {
                Bind::Map(va) => vm.mappings.map(va.clone(), &mut change),
                Bind::Unmap(range) => vm.mappings.unmap(*range, &mut change),
                Bind::UnmapAll(resource_id) => vm.mappings.unmap_blob(*resource_id, &mut change),
            }
        }
        if vm.mappings.len() > usize::try_from(limit).unwrap_or(usize::MAX) {
            vm.mappings.undo(change);
            return Err(Error::TooManyMappings(limit));
        }
        let (device, asid) = (self.host.device_of(vm.device), vm.asid);
        let (mut carved, mut zapped) = (Vec::new(), Vec::new());
        change.out_of_mirrors(|range| carved.push(range));
        if bounded(carved).into_iter().any(|range| device.is_resident(asid, range)) {
            vm.mappings.undo(change);
            return Err(Error::MirrorBusy);
        }
        change.zapped(|range| zapped.push(range));
        let zapped = PageRange::merge(zapped);
        // A fault whose mapping is gone is raised again, and judged by what stands there then.
        for cookie in state.faults.cookies_in(vm_id, &zapped) {
            self.end_pending(state, cookie, Outcome::Dropped, Verdict::Retry, after);
        }
        // What engines still have in hand is theirs for one slice; who frees memory invalidates and waits.
        let (Flush::Done | Flush::Pending(_)) = zap(device.as_ref(), asid, zapped);
        Ok(())
    }

    /// Launches a job. Returns its id. PROTOCOL 5.4.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::VmUnusable`], [`Error::TooManyJobs`], [`Error::Device`].
    pub fn exec(
        &self,
        vm_id: u32,
        ring_idx: u32,
        user_data: u64,
        packets: Vec<Packet>,
    ) -> Result<JobId, Error> {
        let mut state = self.lock();
        let in_flight = state.jobs.len().saturating_add(state.undelivered_jobs);
        let vm = state.vms.get_mut(&vm_id).ok_or(Error::NoVm(vm_id))?;
        if vm.state != VmState::Usable {
            return Err(Error::VmUnusable(vm_id));
        }
        if in_flight >= usize::try_from(self.limits.jobs).unwrap_or(usize::MAX) {
            return Err(Error::TooManyJobs(self.limits.jobs));
        }
        let device = self.host.device_of(vm.device);
        device.check_packets(&packets).map_err(Error::Device)?;
        let id = self.host.next_job();
        device.submit(vm.asid, Job { id, ring_idx, packets }).map_err(Error::Device)?;
        vm.jobs = vm.jobs.saturating_add(1);
        state.jobs.insert(id, JobInFlight { vm_id, ring_idx, user_data });
        state.counters.jobs_submitted = state.counters.jobs_submitted.saturating_add(1);
        Ok(id)
    }

    /// A device has ended a job.
    pub(crate) fn on_job_done(self: &Arc<Self>, id: JobId, end: JobEnd) {
        let mut after = After::default();
        {
            let mut state = self.lock();
            let Some(job) = state.jobs.remove(&id) else { return };
            let Some(vm) = state.vms.get_mut(&job.vm_id) else { return };
            vm.jobs = vm.jobs.saturating_sub(1);
            let dev_id = vm.dev_id;
            let counters = &mut state.counters;
            let counter = if end.errno == 0 { &mut counters.jobs_done } else { &mut counters.jobs_failed };
            *counter = counter.saturating_add(1);
            state.push_job(id, &job, dev_id, end);
            after.announce = true;
        }
        self.settle(after);
    }

    /// Ends the context: pending faults and jobs are dropped, its GPU VMs are destroyed on their devices. Returns
    /// whether nothing is left to retire.
    pub(crate) fn destroy(self: &Arc<Self>) -> bool {
        let mut after = After::default();
        let retired = {
            let mut state = self.lock();
            state.life = Life::Destroyed;
            let vms: Vec<u32> = state.vms.keys().copied().collect();
            for vm_id in vms {
                self.close_vm(&mut state, vm_id, &mut after);
            }
            let dropped = u64::try_from(state.jobs.len()).unwrap_or(u64::MAX);
            state.counters.jobs_dropped = state.counters.jobs_dropped.saturating_add(dropped);
            state.jobs.clear();
            state.waiting.clear();
            state.space = AddressSpace::default();
            state.retiring.is_empty()
        };
        after.announce = false;
        self.settle(after);
        retired
    }

    /// A device has retired one of our GPU VMs.
    pub(crate) fn on_retired(self: &Arc<Self>, device: usize, asid: Asid) {
        let gone = {
            let mut state = self.lock();
            state.retiring.remove(&(device, asid));
            state.life == Life::Destroyed && state.retiring.is_empty()
        };
        // Only now: an invalidation that still found it retiring would wait for a flush that has been.
        self.on_flushed(device, asid, None);
        if let Some(guest) = self.guest.upgrade() {
            if gone {
                guest.on_context_retired(self);
            }
            guest.wake_waiters();
        }
    }

    /// Whether a device still holds something of a GPU VM that was destroyed.
    pub(crate) fn is_retiring(&self) -> bool {
        !self.lock().retiring.is_empty()
    }

    /// The GPU VMs alive, as (device, asid).
    pub(crate) fn asids(&self) -> Vec<(usize, Asid)> {
        self.lock().vms.values().map(|vm| (vm.device, vm.asid)).collect()
    }

    /// Stops or lets go on the jobs of its GPU VMs. Returns what engines must still pass.
    pub(crate) fn set_frozen(&self, frozen: bool) -> Vec<(usize, Asid, Ticket)> {
        self.flushes(|device, asid| device.set_frozen(asid, frozen))
    }
    /// What engines must still pass before translations dropped earlier are surely unused.
    pub(crate) fn flush_all(&self) -> Vec<(usize, Asid, Ticket)> {
        self.flushes(|device, asid| device.flush(asid))
    }
    fn flushes(&self, act: impl Fn(&dyn Device, Asid) -> Flush) -> Vec<(usize, Asid, Ticket)> {
        let flush = |(device, asid)| match act(self.host.device_of(device).as_ref(), asid) {
            Flush::Done => None,
            Flush::Pending(ticket) => Some((device, asid, ticket)),
        };
        self.asids().into_iter().filter_map(flush).collect()
    }
    /// The guest's own time now.
    pub(crate) fn run_time(&self) -> Duration {
        self.guest.upgrade().map_or(Duration::ZERO, |guest| guest.run_time())
    }
    /// Wakes who waits for engines on behalf of its guest.
    pub(crate) fn wake_guest(&self) {
        if let Some(guest) = self.guest.upgrade() {
            guest.wake_waiters();
        }
    }

    /// Unmaps a blob resource from every GPU VM of the context.
    pub(crate) fn unmap_blob(self: &Arc<Self>, resource_id: u32) {
        let vms: Vec<u32> = self.lock().vms.keys().copied().collect();
        for vm_id in vms {
            match self.bind(vm_id, &[Bind::UnmapAll(resource_id)]) {
                // The session may end meanwhile, and the GPU VM with it.
                Ok(()) | Err(Error::NoVm(_)) => {}
                Err(error) => unreachable!("an unmap was refused: {error}"),
            }
        }
    }

    /// Drops the translations of its GPU VMs on one host device or on all. Returns the pages that had one.
    pub(crate) fn evict(&self, device: Option<usize>) -> u64 {
        let state = self.lock();
        let mut evicted = 0_u64;
        for vm in state.vms.values().filter(|vm| device.is_none_or(|device| device == vm.device)) {
            let gpu = self.host.device_of(vm.device);
            evicted = evicted.saturating_add(gpu.resident_pages(vm.asid));
            let ranges = vm.mappings.iter().map(|va| va.range).collect();
            // Pages stay the guest's; nobody frees them because of an eviction.
            let (Flush::Done | Flush::Pending(_)) = zap(gpu.as_ref(), vm.asid, ranges);
        }
        evicted
    }

    /// The next record that waits, as bytes, and whether more wait.
    pub(crate) fn take_record(&self, mut stamp: impl FnMut() -> Stamp) -> (Option<Record>, bool) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut record = None;
        while record.is_none() {
            let Some(waiting) = state.waiting.pop_front() else { break };
            record = match waiting {
                Waiting::Fault(cookie) => state.faults.get_mut(cookie).map(|fault| {
                    fault.told = Some(fault.perm);
                    state.counters.faults_reported = state.counters.faults_reported.saturating_add(1);
                    let dev_id = state.vms.get(&fault.vm_id).map_or(0, |vm| vm.dev_id);
                    fault_record(self.ctx_id, dev_id, fault, stamp())
                }),
                Waiting::Job(job) => {
                    state.undelivered_jobs = state.undelivered_jobs.saturating_sub(1);
                    Some(job_record(self.ctx_id, &job, stamp()))
                }
                Waiting::InvalDone => {
                    let value = state.invalidations.done_seq();
                    Some(notice_record(self.notice(EVENT_INVAL_DONE, value, 0), stamp()))
                }
                Waiting::Lost(errno) => {
                    Some(notice_record(self.notice(EVENT_CONTEXT_LOST, 0, errno), stamp()))
                }
            };
        }
        (record, !state.waiting.is_empty())
    }
    fn notice(&self, kind: u32, value: u64, errno: i32) -> crate::event::Notice {
        crate::event::Notice { kind, ctx_id: self.ctx_id, value, errno }
    }

    /// Its counts.
    pub(crate) fn counters(&self) -> Counters {
        self.lock().counters
    }
    /// GPU VMs alive and faults pending.
    pub(crate) fn load(&self) -> (usize, usize) {
        let state = self.lock();
        (state.vms.len(), state.faults.count())
    }
    /// The state of a GPU VM. PROTOCOL 5.5.
    ///
    /// # Errors
    /// [`Error::NoVm`].
    pub fn vm_property<T>(&self, vm_id: u32, read: impl FnOnce(&GpuVm, u64) -> T) -> Result<T, Error> {
        let state = self.lock();
        let vm = state.vms.get(&vm_id).ok_or(Error::NoVm(vm_id))?;
        Ok(read(vm, self.host.device_of(vm.device).resident_pages(vm.asid)))
    }
    /// What it looks like.
    pub fn status(&self) -> ContextStatus {
        let state = self.lock();
        ContextStatus {
            guest: self.label.guest.to_string(),
            ctx_id: self.ctx_id,
            generation: self.generation,
            name: self.name.clone(),
            capset_id: self.capset_id,
            known_pages: state.space.known_pages(),
            inval_seq: state.space.seq(),
            inval_done_seq: state.invalidations.done_seq(),
            pending_faults: state.faults.count(),
            jobs: state.jobs.len(),
            vms: state.vms.iter().map(|(vm_id, vm)| self.vm_status(*vm_id, vm)).collect(),
            counters: state.counters,
        }
    }
    /// The same without mappings.
    pub fn summary(&self) -> ContextSummary {
        let state = self.lock();
        let vms: Vec<_> = state.vms.iter().map(|(vm_id, vm)| self.vm_summary(*vm_id, vm)).collect();
        ContextSummary {
            guest: self.label.guest.to_string(),
            ctx_id: self.ctx_id,
            generation: self.generation,
            name: self.name.clone(),
            known_pages: state.space.known_pages(),
            resident_pages: vms.iter().map(|vm| vm.resident_pages).fold(0, u64::saturating_add),
            pending_faults: state.faults.count(),
            jobs: state.jobs.len(),
            vms,
            counters: state.counters,
        }
    }
    fn vm_summary(&self, vm_id: u32, vm: &GpuVm) -> VmSummary {
        VmSummary {
            vm_id,
            device: vm.device,
            asid: vm.asid.0,
            state: state_name(vm.state).0,
            mappings: vm.mappings.len(),
            resident_pages: self.host.device_of(vm.device).resident_pages(vm.asid),
        }
    }
    fn vm_status(&self, vm_id: u32, vm: &GpuVm) -> VmStatus {
        let (state, error) = state_name(vm.state);
        VmStatus {
            vm_id,
            device: vm.device,
            asid: vm.asid.0,
            state,
            error,
            mappings: vm.mappings.iter().map(mapping_status).collect(),
            resident_pages: self.host.device_of(vm.device).resident_pages(vm.asid),
        }
    }
}

impl State {
    fn push_job(&mut self, id: JobId, job: &JobInFlight, dev_id: u32, end: JobEnd) {
        self.undelivered_jobs = self.undelivered_jobs.saturating_add(1);
        self.waiting.push_back(Waiting::Job(DoneJob {
            job_id: id.0,
            user_data: job.user_data,
            dev_id,
            vm_id: job.vm_id,
            ring_idx: job.ring_idx,
            end,
        }));
    }
}

/// For people, and the errno that made it so.
fn state_name(state: VmState) -> (&'static str, i32) {
    match state {
        VmState::Usable => ("usable", 0),
        VmState::Unusable { errno, .. } => ("unusable", errno),
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
    };
    let cpu = va.cpu_range();
    let (cpu_start, cpu_end) = (cpu.map(PageRange::start_addr), cpu.map(PageRange::end_addr));
    match &va.backing {
        Backing::Userptr(_) => MappingStatus { cpu_start, cpu_end, ..none },
        Backing::Mirror(_) => MappingStatus { kind: "mirror", cpu_start, cpu_end, ..none },
        Backing::Blob(blob, page) => MappingStatus {
            kind: "blob",
            resource_id: Some(blob.resource_id),
            offset: Some(page << PAGE_SHIFT),
            ..none
        },
    }
}
