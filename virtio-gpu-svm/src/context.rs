//! A context: one guest process on this daemon.
//!
//! Owns the process' address space (A side), its GPU VMs (C side, one a device at most), its pending faults, its jobs
//! in flight and the records that wait for it, **all under one lock**: whatever touches two of them is atomic by that,
//! and the lock is held by one process' work only. Under it only short calls into [`crate::device::Device`] are made;
//! resumes and the announcement of records are collected in [`After`] and done when it is released.

mod bind;
mod inbox;
mod jobs;
mod status;
mod vms;

pub use bind::{Bind, Refused};
pub(crate) use inbox::Report;
pub use jobs::Launch;
pub(crate) use vms::Vms;

use crate::addr::PageRange;
use crate::address_space::AddressSpace;
use crate::device::{self, Asid, Device, Extent, Flush, StopId, Ticket, Verdict, VmLabel};
use crate::event::{Record, Stamp, ToldFault, Waiting, fault_record, job_record, notice_record};
use crate::fault::router::Owner;
use crate::fault::{Outcome, PendingFaults, Throttled};
use crate::few::Few;
use crate::gpu_vm::{GpuVm, Mappings, State as VmState};
use crate::guest::Guest;
use crate::host::Host;
use crate::info::Counters;
use crate::invalidation::Invalidations;
use crate::memory::MemoryTable;
use crate::numbered::Numbered;
use crate::population::{Populating, Population, take_away};
use crate::protocol::errno::{EACCES, EBUSY, ECANCELED, EEXIST, EINVAL, ENOENT, ENOSPC, EPIPE};
use crate::protocol::event::{EVENT_CONTEXT_LOST, EVENT_INVAL_DONE};
use crate::protocol::limit::Limit;
use crate::quota::{Charge, Full, Quota};
use crate::seeded::{self, Bug};
use crate::seldom::Seldom;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, Weak};
use crate::timeline::{self, Timelines};
use inbox::Inbox;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

/// Slices of what may go on that a thread does which serves other guests too.
const SHARED_SLICES: usize = 4;

/// Elements for which the empty lists of a context may keep their room.
pub(crate) const KEPT: usize = 16;

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
    /// Over what a GPU VM without faults may map.
    #[error("the device has no faults, and so a GPU VM maps at most {0} pages")]
    TooManyPages(u64),
    /// A mirror window would be cut where it has pages.
    #[error("the mirror window has pages there; invalidate them first")]
    MirrorBusy,
    /// Over the quota of operations that wait for their turn.
    #[error("more than {0} operations would be queued")]
    TooManyQueued(u32),
    /// A blob was detached before the operation's turn came.
    #[error("the blob resource is not attached any more")]
    Detached,
    /// A promise or a wait.
    #[error(transparent)]
    Point(timeline::Error),
    /// Over a quota of the guest.
    #[error(transparent)]
    Full(#[from] Full),
    /// The device refused.
    #[error("the device refused")]
    Device(#[source] crate::device::Error),
}

impl Error {
    /// The limit that -ENOSPC is about. PROTOCOL 9.
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::NoAsid => Some(Limit::Asids),
            Self::TooManyJobs(_) => Some(Limit::Jobs),
            Self::TooManyMappings(_) | Self::TooManyQueued(_) => Some(Limit::Mappings),
            Self::TooManyPages(_) => Some(Limit::ResidentPages),
            Self::Full(Full(limit)) => Some(*limit),
            Self::Device(device::Error::TooManyVms) => Some(Limit::DeviceGpuVms),
            Self::Device(device::Error::OverQuota(Full(limit))) => Some(*limit),
            Self::NoVm(_)
            | Self::VmExists(_)
            | Self::VmUnusable(_)
            | Self::MirrorBusy
            | Self::Detached
            | Self::Point(_)
            | Self::Device(_) => None,
        }
    }
    /// Whether a charge has counted the refusal.
    fn is_counted(&self) -> bool {
        matches!(self, Self::Full(_) | Self::Device(device::Error::OverQuota(_)))
    }
    /// On the wire. PROTOCOL 8.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoVm(_) => ENOENT,
            Self::VmExists(_) => EEXIST,
            Self::VmUnusable(_) => EPIPE,
            Self::MirrorBusy => EBUSY,
            Self::NoAsid
            | Self::TooManyJobs(_)
            | Self::TooManyMappings(_)
            | Self::TooManyPages(_)
            | Self::TooManyQueued(_)
            | Self::Full(_) => ENOSPC,
            Self::Detached => EACCES,
            Self::Point(timeline::Error::NoVm { .. }) => ENOENT,
            Self::Point(timeline::Error::Backwards { .. } | timeline::Error::Future { .. }) => EINVAL,
            Self::Device(error) => match error {
                crate::device::Error::NoVm(_) => EPIPE,
                crate::device::Error::VmExists(_) => EBUSY,
                other => crate::fault::device_errno(*other),
            },
        }
    }
}

/// What must be done once the context's lock is released.
#[derive(Default)]
pub struct After {
    resumes: Few<(usize, StopId, Verdict)>,
    /// Records wait for the guest.
    pub announce: bool,
    /// Something may go on: jobs or binds can start, or GPU VMs want pages ([`crate::population`]).
    pub more: bool,
    /// Accesses were let in that are going to take room for pending faults.
    pub let_in: bool,
    /// A device has let go of a GPU VM that was destroyed.
    pub let_go: bool,
    /// It was the last one of a context that was destroyed.
    pub gone: bool,
}

impl After {
    /// Releases a parked access later.
    pub fn resume(&mut self, device: usize, stop: StopId, verdict: Verdict) {
        self.resumes.push((device, stop, verdict));
    }
}

/// Everything about a context that changes. Guarded by the context's lock.
pub struct State {
    pub(crate) life: Life,
    /// Whether the guest's rings are stopped.
    pub(crate) frozen: bool,
    pub(crate) space: AddressSpace,
    pub(crate) vms: Vms,
    next_vm: u32,
    /// Counted for each context alone: what a process sees of it must not tell what others do.
    pub(crate) next_job: u64,
    pub(crate) faults: PendingFaults,
    /// Parked accesses beyond the limit of pending faults: raised again as others end.
    pub(crate) throttled: Seldom<VecDeque<Throttled>>,
    pub(crate) invalidations: Invalidations,
    /// GPU VMs destroyed that their device has not retired.
    pub(crate) retiring: Seldom<Numbered<(usize, Asid), Charge>>,
    /// Jobs and asynchronous binds that have not ended.
    pub(crate) timelines: Timelines,
    /// Binds that have started and wait for pages.
    pub(crate) populating: Vec<Populating>,
    /// Records that wait, but those of faults, which their table keeps: each with the mark of the faults that go before it.
    pub(crate) waiting: VecDeque<(u32, Waiting)>,
    pub(crate) memory: Arc<MemoryTable>,
    pub(crate) counters: Seldom<Counters>,
    /// Empty; its room is lent, so that serving a fault allocates nothing.
    pub(crate) extents: Vec<Extent<'static>>,
}

/// One guest process.
pub struct Context {
    /// Its id in the guest.
    pub ctx_id: u32,
    /// Tells it from earlier contexts of that id; unique on the host.
    pub generation: u64,
    /// As the guest calls it.
    pub name: Box<str>,
    /// Its capset.
    pub capset_id: u32,
    pub(crate) label: VmLabel,
    pub(crate) quota: Arc<Quota>,
    pub(crate) host: Arc<Host>,
    guest: Weak<Guest>,
    pub(crate) me: Weak<Self>,
    /// Whether it stands in its guest's list of contexts with records; changed under that list's lock.
    pub(crate) queued: AtomicBool,
    /// Whether something of it is left to the host's worker.
    pub(crate) left: AtomicBool,
    /// The same for the list of contexts that wait for their guest's room.
    pub(crate) starved: AtomicBool,
    /// Whether it has ended; set under its lock.
    ended: AtomicBool,
    /// Whether its guest must still hear that it is gone.
    farewell: AtomicBool,
    /// What is to be done when the lock is free.
    inbox: Inbox,
    /// Guards all of [`State`]. The guest's threads wait for it; engines that fault for this context and the host's
    /// worker try ([`inbox`]). Under it a router's table, the inbox or the list of starved contexts may be locked,
    /// nothing else.
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
        let quota = Arc::clone(guest.quota());
        let label = VmLabel { guest: guest.shared_name(), ctx_id: new.ctx_id, generation };
        let state = State {
            life: Life::Alive,
            frozen: false,
            space: AddressSpace::new(quota.charge(Limit::TableBytes)),
            vms: Vms::default(),
            next_vm: 1,
            next_job: 1,
            faults: PendingFaults::default(),
            throttled: Seldom::default(),
            invalidations: Invalidations::default(),
            retiring: Seldom::default(),
            timelines: Timelines::default(),
            populating: Vec::new(),
            waiting: VecDeque::new(),
            memory,
            counters: Seldom::default(),
            extents: Vec::new(),
        };
        Arc::new_cyclic(|me| Self {
            ctx_id: new.ctx_id,
            generation,
            name: new.name.into_boxed_str(),
            capset_id: new.capset_id,
            label,
            quota,
            host,
            guest: Arc::downgrade(guest),
            me: Weak::clone(me),
            queued: AtomicBool::new(false),
            left: AtomicBool::new(false),
            starved: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            farewell: AtomicBool::new(false),
            inbox: Inbox::default(),
            state: Mutex::new(state),
        })
    }
    /// Does what had to wait for the lock's release, and then, slice by slice, what may go on; then what was reported
    /// meanwhile. For threads that serve this guest alone.
    pub(crate) fn settle(self: &Arc<Self>, after: After) {
        self.settle_slices(after, usize::MAX, false);
        self.catch_up();
    }
    /// The same on a thread that serves other guests too: after a few slices, or where the lock is held, the host's
    /// worker goes on.
    pub(crate) fn settle_shared(self: &Arc<Self>, after: After) {
        if self.settle_slices(after, SHARED_SLICES, true) {
            self.host.leave_work(self);
        }
    }
    /// Gives the turn to a context that waits for the guest's room, if there is some.
    fn pass_turn(&self) {
        while self.quota.starved.any()
            && self.quota.room(Limit::TotalPendingFaults) > 0
            && let Some(next) = self.quota.starved.take(|context| &context.starved)
        {
            // One that ends passes the turn on itself, but perhaps it has done so before it was given the turn.
            if !next.ended.load(Ordering::SeqCst) {
                return self.host.leave_work(&next);
            }
        }
    }
    /// `shared` says whether others need this thread too. Returns whether there is more.
    fn settle_slices(self: &Arc<Self>, mut after: After, mut slices: usize, shared: bool) -> bool {
        // Who was let in takes the room that there seems to be, or makes it somebody's by faulting no more.
        let mut let_in = false;
        loop {
            let_in |= after.let_in;
            for (device, stop, verdict) in after.resumes {
                self.host.device_of(device).resume(stop, verdict);
            }
            if after.announce
                && let Some(guest) = self.guest.upgrade()
            {
                guest.announce(self);
            }
            if after.let_go
                && let Some(guest) = self.guest.upgrade()
            {
                if after.gone && !guest.try_context_retired(self) {
                    self.farewell.store(true, Ordering::SeqCst);
                    self.host.leave_work(self);
                }
                guest.wake_waiters();
            }
            if !let_in {
                self.pass_turn();
            }
            if !after.more || slices == 0 {
                return after.more;
            }
            slices = slices.saturating_sub(1);
            let state = if shared { self.try_lock() } else { Some(self.lock()) };
            let Some(mut state) = state else { return true };
            after = After::default();
            self.populate(&mut state, &mut after);
            self.advance(&mut state, &mut after);
            self.let_throttled_in(&mut state, false, &mut after);
        }
    }
    /// Counts what was refused for a limit that has no charge.
    pub(crate) fn count_refusal(&self, error: &Error) {
        if let Some(limit) = error.limit().filter(|_| !error.is_counted()) {
            self.quota.refuse(limit);
        }
    }
    /// Invalidations done so far.
    pub fn inval_done_seq(&self) -> u64 {
        self.lock().invalidations.done_seq()
    }

    /// Creates the GPU VM on a device. Returns its id and asid. PROTOCOL 5.1.
    ///
    /// # Errors
    /// [`Error::VmExists`], [`Error::Full`], [`Error::NoAsid`], [`Error::Device`].
    pub fn vm_create(self: &Arc<Self>, dev_id: u32, device: usize) -> Result<(u32, Asid), Error> {
        let created = self.vm_create_locked(&mut self.lock(), dev_id, device);
        created.inspect_err(|error| self.count_refusal(error))
    }

    fn vm_create_locked(
        self: &Arc<Self>,
        state: &mut State,
        dev_id: u32,
        device: usize,
    ) -> Result<(u32, Asid), Error> {
        if state.vms.values().any(|vm| vm.device == device) {
            return Err(Error::VmExists(dev_id));
        }
        let tables = self.quota.charge(Limit::TableBytes);
        let mappings = Mappings::of_new_vm(self.host.device_of(device).info());
        let (mut charge, mut mappings_charge) =
            (self.quota.charge(Limit::GpuVms), self.quota.charge(Limit::TotalMappings));
        charge.grow(1)?;
        mappings_charge.grow(mappings.count())?;
        let vm_id = state.next_vm;
        let owner = Owner { context: Arc::clone(self), vm_id };
        let router = self.host.router_of(device);
        let asid = router.take_asid(owner).ok_or(Error::NoAsid)?;
        let device_of = self.host.device_of(device);
        // Who has an asid is known for as long as it is taken, so one that a panic forgot would stay for ever. A device
        // that has it all the same refuses it when its turn comes again.
        match catch_unwind(AssertUnwindSafe(|| device_of.vm_create(asid, self.label.clone(), tables))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                router.free_asid(asid);
                return Err(Error::Device(error));
            }
            Err(panic) => {
                router.free_asid(asid);
                resume_unwind(panic);
            }
        }
        state.next_vm = state.next_vm.wrapping_add(1).max(1);
        let vm = GpuVm {
            device,
            dev_id,
            asid,
            state: VmState::Usable,
            mappings,
            jobs: 0,
            pending_faults: 0,
            population: Population::of_new_vm(
                self.host.device_of(device).as_ref(),
                self.quota.charge(Limit::QueueBytes),
            ),
            charge,
            mappings_charge,
        };
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
            state.cancel_jobs(vm_id, dev_id);
            after.announce = true;
            after.more = true;
        }
        self.settle(after);
        Ok(())
    }

    /// Takes a GPU VM out of the context and begins to destroy it on its device.
    fn close_vm(&self, state: &mut State, vm_id: u32, after: &mut After) {
        // Its device drops their jobs; here they would only keep others waiting.
        if let Some(throttled) = state.throttled.get_mut() {
            throttled.retain(|throttled| throttled.vm_id() != vm_id);
        }
        // Who destroys it need not be told that it was lost.
        state
            .waiting
            .retain(|(_, waiting)| !matches!(waiting, Waiting::Lost { vm_id: lost, .. } if *lost == vm_id));
        let end = if seeded::on(Bug::ResumeAfterTeardown) { 0 } else { u64::MAX };
        for cookie in state.faults.cookies_in(vm_id, &[PageRange { start: 0, end }]) {
            self.end_pending(state, cookie, Outcome::Dropped, Verdict::Fail(ECANCELED), after);
        }
        let Some(vm) = state.vms.remove(&vm_id) else { return };
        state.retiring.obtain().insert((vm.device, vm.asid), vm.charge);
        self.host.device_of(vm.device).vm_destroy(vm.asid);
    }

    /// Ends the context: pending faults and jobs are dropped, its GPU VMs are destroyed on their devices. Returns
    /// whether nothing is left to retire.
    pub(crate) fn destroy(self: &Arc<Self>) -> bool {
        let mut after = After::default();
        let retired = {
            let mut state = self.lock();
            state.life = Life::Destroyed;
            self.ended.store(true, Ordering::SeqCst);
            let vms: Vec<u32> = state.vms.keys().copied().collect();
            for vm_id in vms {
                self.close_vm(&mut state, vm_id, &mut after);
            }
            let dropped = u64::try_from(state.timelines.len()).unwrap_or(u64::MAX);
            add(&mut state.counters.obtain().jobs_dropped, dropped);
            state.timelines = Timelines::default();
            state.populating.clear();
            state.throttled = Seldom::default();
            state.waiting = VecDeque::new();
            state.space = AddressSpace::default();
            !state.is_retiring()
        };
        after.announce = false;
        self.settle(after);
        retired
    }

    /// Ends what can be ended of a state that a panic may have left half changed. Each step stands alone; devices ignore
    /// the end of a GPU VM that has ended.
    pub(crate) fn abandon(self: &Arc<Self>) {
        // What is contained was told where it panicked first, or is a consequence of that.
        catch_unwind(AssertUnwindSafe(|| self.destroy())).ok();
        let left: Vec<_> = self.lock().retiring().collect();
        for (device, asid) in left {
            catch_unwind(AssertUnwindSafe(|| self.host.device_of(device).vm_destroy(asid))).ok();
        }
    }

    /// Whether a device still holds something of a GPU VM that was destroyed.
    pub(crate) fn is_retiring(&self) -> bool {
        self.lock().is_retiring()
    }

    /// The GPU VMs alive, as (device, asid).
    pub(crate) fn asids(&self) -> Vec<(usize, Asid)> {
        self.lock().vms.values().map(|vm| (vm.device, vm.asid)).collect()
    }

    /// Stops or lets go on the jobs of its GPU VMs. Returns what engines must still pass.
    pub(crate) fn set_frozen(&self, frozen: bool) -> Vec<(usize, Asid, Ticket)> {
        let mut state = self.lock();
        state.frozen = frozen;
        let flush = |vm: &GpuVm| {
            // A GPU VM that is held goes on when it has what it wants.
            let held = vm.population.is_held() && !seeded::on(Bug::ThawHeld);
            match self.host.device_of(vm.device).set_frozen(vm.asid, frozen || held) {
                Flush::Done => None,
                Flush::Pending(ticket) => Some((vm.device, vm.asid, ticket)),
            }
        };
        state.vms.values().filter_map(flush).collect()
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
    /// A thread that serves others too has panicked in what it did for this context.
    pub(crate) fn fail_session(&self) {
        if let Some(guest) = self.guest.upgrade() {
            guest.fail_session();
        }
    }
    /// Wakes who waits for engines on behalf of its guest.
    pub(crate) fn wake_guest(&self) {
        if let Some(guest) = self.guest.upgrade() {
            guest.wake_waiters();
        }
    }

    /// Drops the translations of its GPU VMs on one host device or on all. Returns the pages that had one.
    pub(crate) fn evict(self: &Arc<Self>, device: Option<usize>) -> u64 {
        let mut evicted = 0_u64;
        {
            let mut state = self.lock();
            for vm in state.vms.values_mut().filter(|vm| device.is_none_or(|device| device == vm.device)) {
                let gpu = self.host.device_of(vm.device).as_ref();
                evicted = evicted.saturating_add(gpu.resident_pages(vm.asid));
                let ranges = vm.mappings.iter().map(|va| va.range).collect();
                // Pages stay the guest's; nobody frees them because of an eviction.
                let (Flush::Done | Flush::Pending(_)) = take_away(gpu, vm, ranges);
            }
        }
        // Whoever evicts is an operator's thread: what must be asked of the guest is not for it to write.
        self.host.leave_work(self);
        evicted
    }

    /// The next record that waits, as bytes, and whether more wait. None if the lock is held: then they are announced
    /// anew when it is free.
    pub(crate) fn take_record(&self, stamp: impl FnOnce() -> Stamp) -> Option<(Option<Record>, bool)> {
        let mut guard = self.lock_or_leave()?;
        let state = &mut *guard;
        let record = if state.is_fault_next() {
            self.fault_record(state, stamp)
        } else {
            let waiting = state.waiting.pop_front();
            waiting.map(|(_, waiting)| match waiting {
                Waiting::Job(job) => {
                    state.timelines.delivered();
                    job_record(self.ctx_id, &job, stamp())
                }
                Waiting::InvalDone => {
                    let value = state.invalidations.done_seq();
                    notice_record(self.notice(EVENT_INVAL_DONE, value, 0), stamp())
                }
                Waiting::Lost { vm_id, errno } => {
                    notice_record(self.notice(EVENT_CONTEXT_LOST, vm_id.into(), errno), stamp())
                }
            })
        };
        trim(&mut state.waiting, KEPT);
        Some((record, state.has_records()))
    }
    /// The next record of the first fault of which the guest has not been told all.
    fn fault_record(&self, state: &mut State, stamp: impl FnOnce() -> Stamp) -> Option<Record> {
        let State { faults, vms, counters, .. } = state;
        add(&mut counters.obtain().faults_reported, 1);
        faults.report(|cookie, fault, waiters| {
            let (dev_id, asid) = vms.get(&fault.vm_id).map_or((0, Asid(0)), |vm| (vm.dev_id, vm.asid));
            let told = ToldFault { ctx_id: self.ctx_id, cookie, dev_id, asid, waiters };
            fault_record(&told, fault, stamp())
        })
    }
    fn notice(&self, kind: u32, value: u64, errno: i32) -> crate::event::Notice {
        crate::event::Notice { kind, ctx_id: self.ctx_id, value, errno }
    }

    /// Its counts.
    pub(crate) fn counters(&self) -> Counters {
        self.lock().counters()
    }
    /// GPU VMs alive and faults pending.
    pub(crate) fn load(&self) -> (usize, usize) {
        let state = self.lock();
        (state.vms.len(), state.faults.count())
    }
    /// The device of a GPU VM: its index on the host.
    ///
    /// # Errors
    /// [`Error::NoVm`].
    pub(crate) fn vm_device(&self, vm_id: u32) -> Result<usize, Error> {
        Ok(self.lock().vms.get(&vm_id).ok_or(Error::NoVm(vm_id))?.device)
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
}

impl State {
    /// What was counted.
    pub(crate) fn counters(&self) -> Counters {
        self.counters.get().copied().unwrap_or_default()
    }
    /// Whether parked accesses wait for their turn.
    pub(crate) fn has_throttled(&self) -> bool {
        self.throttled.get().is_some_and(|throttled| !throttled.is_empty())
    }
    /// GPU VMs destroyed that their device has not retired.
    pub(crate) fn retiring(&self) -> impl Iterator<Item = (usize, Asid)> {
        self.retiring.get().into_iter().flat_map(|retiring| retiring.keys().copied())
    }
    /// Whether there is one.
    pub(crate) fn is_retiring(&self) -> bool {
        self.retiring().next().is_some()
    }
    /// A record waits; those of faults that were raised before go before it.
    pub(crate) fn tell(&mut self, waiting: Waiting) {
        self.waiting.push_back((self.faults.mark(), waiting));
    }
    /// Whether any record waits.
    pub(crate) fn has_records(&self) -> bool {
        self.faults.has_untold() || !self.waiting.is_empty()
    }
    /// Whether the next record is a fault's.
    fn is_fault_next(&mut self) -> bool {
        match self.waiting.front() {
            Some((mark, _)) => self.faults.is_next(*mark),
            None => self.faults.has_untold(),
        }
    }
}

/// Counts.
pub(crate) fn add(counter: &mut u64, more: u64) {
    *counter = counter.saturating_add(more);
}

/// Lets an empty list that was long go of its room: what a context has had once is not what it holds.
pub(crate) fn trim<T>(list: &mut VecDeque<T>, kept: usize) {
    if list.is_empty() && list.capacity() > kept {
        *list = VecDeque::new();
    }
}
