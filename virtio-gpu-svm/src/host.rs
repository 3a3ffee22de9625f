//! All guests and all devices of one daemon. Here a device's events find the context that owns them.

use crate::backlog::Backlog;
use crate::clock::{Monotonic, Source};
use crate::context::{Context, Report};
use crate::device::{AddressModel, Asid, Device, Events, Fault, FaultModel, JobEnd, JobId, Ticket, Verdict};
use crate::fault::recent::Recent;
use crate::fault::router::{Owner, Router};
use crate::guest::{EventPort, Guest};
use crate::info::{Counters, DeviceStatus, FaultTrace, HostStats};
use crate::protocol::errno::ECANCELED;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use crate::fault::recent::RECENT_FAULTS;
pub use crate::quota::Limits;

/// Slices of what is left to the worker that are done before the clock is looked at again.
const WORK_SLICES: usize = 256;

struct Slot {
    device: Arc<dyn Device>,
    router: Router,
    faults_raised: AtomicU64,
}

/// How many there are, and the most there have been.
#[derive(Default)]
pub(crate) struct Gauge {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Gauge {
    pub(crate) fn enter(&self) {
        let now = self.now.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        self.peak.fetch_max(now, Ordering::Relaxed);
    }
    pub(crate) fn leave(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All guests and all devices of one daemon.
pub struct Host {
    slots: Vec<Slot>,
    /// Guards the list of guests; `past` may be locked under it, nothing else.
    guests: Mutex<BTreeMap<String, Arc<Guest>>>,
    /// Sums over guests that are gone, and faults that had no owner.
    past: Mutex<Counters>,
    pub(crate) pending_vms: Gauge,
    pub(crate) recent: Recent,
    backlog: Backlog,
    clock: Arc<dyn Source>,
    /// What the clock showed at the start.
    started: Duration,
    next_epoch: AtomicU64,
    next_generation: AtomicU64,
}

impl Host {
    /// A host with these devices; their index is their place in the list.
    pub fn new(devices: Vec<Arc<dyn Device>>) -> Arc<Self> {
        Self::with_clock(devices, Arc::new(Monotonic::default()))
    }
    /// The same with a time of its own: deadlines, and what records and people are told.
    pub fn with_clock(devices: Vec<Arc<dyn Device>>, clock: Arc<dyn Source>) -> Arc<Self> {
        let slot = |device| Slot { device, router: Router::default(), faults_raised: AtomicU64::new(0) };
        // Epochs must differ between two lives of the daemon: begin with the time of day.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = u64::try_from(now.as_nanos()).unwrap_or(1);
        Arc::new(Self {
            slots: devices.into_iter().map(slot).collect(),
            guests: Mutex::new(BTreeMap::new()),
            past: Mutex::new(Counters::default()),
            pending_vms: Gauge::default(),
            recent: Recent::default(),
            backlog: Backlog::default(),
            started: clock.now(),
            clock,
            next_epoch: AtomicU64::new(epoch),
            next_generation: AtomicU64::new(1),
        })
    }
    /// Begins a guest's session: its VMM has connected. `devices` are the host devices granted to it, in the order of
    /// its `dev_id`; `port` is told when the guest has records to deliver. The name is kept for as long as faults of the
    /// session are remembered: sessions of one guest should share it.
    pub fn open_guest(
        self: &Arc<Self>,
        name: impl Into<Arc<str>>,
        limits: Limits,
        devices: &[usize],
        port: Arc<dyn EventPort>,
    ) -> Arc<Guest> {
        let epoch = self.next_epoch.fetch_add(1, Ordering::Relaxed);
        let guest = Guest::new(Arc::clone(self), name.into(), epoch, limits, devices.to_vec(), port);
        self.lock_guests().insert(guest.name().to_owned(), Arc::clone(&guest));
        guest
    }
    /// A guest goes; its counts are kept.
    pub(crate) fn forget_guest(&self, guest: &Arc<Guest>, past: &Counters) {
        let mut guests = self.lock_guests();
        self.remember(past);
        if guests.get(guest.name()).is_some_and(|known| Arc::ptr_eq(known, guest)) {
            guests.remove(guest.name());
        }
    }
    fn lock_guests(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Guest>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The devices.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        let guests = self.guests();
        let alive = |device| guests.iter().map(|guest| guest.vms_on(device)).fold(0, usize::saturating_add);
        (0..).zip(&self.slots).map(|(index, slot)| slot.status(index, alive(index))).collect()
    }
    /// The device of an index.
    pub fn device(&self, index: usize) -> Option<&Arc<dyn Device>> {
        self.slots.get(index).map(|slot| &slot.device)
    }
    /// The device of an index that was taken from a GPU VM or a grant.
    pub(crate) fn device_of(&self, index: usize) -> &Arc<dyn Device> {
        &self.slot(index).device
    }
    pub(crate) fn router_of(&self, index: usize) -> &Router {
        &self.slot(index).router
    }
    fn slot(&self, index: usize) -> &Slot {
        let Some(slot) = self.slots.get(index) else {
            unreachable!("no device {index} of {}", self.slots.len())
        };
        slot
    }
    /// Guests connected now, by name.
    pub fn guests(&self) -> Vec<Arc<Guest>> {
        self.lock_guests().values().cloned().collect()
    }
    /// Counts of the whole host.
    pub fn stats(&self) -> HostStats {
        let (guests, past) = {
            let guests = self.lock_guests();
            (guests.values().cloned().collect::<Vec<_>>(), *self.lock_past())
        };
        let mut stats = HostStats {
            guests: guests.len(),
            pending_vms: self.pending_vms.now.load(Ordering::Relaxed),
            peak_pending_vms: self.pending_vms.peak.load(Ordering::Relaxed),
            counters: past,
            ..HostStats::default()
        };
        for guest in guests {
            guest.add_to(&mut stats);
        }
        stats
    }
    /// The last faults that came to an end, the newest last; at most `limit`.
    pub fn recent_faults(&self, limit: usize) -> Vec<FaultTrace> {
        self.recent.last(limit)
    }
    /// Leaves it to the worker to end the faults that their guests have not answered in time. To be called every now and
    /// then; costs nothing while no fault waits.
    pub fn expire_faults(&self) {
        if self.pending_vms.now.load(Ordering::Relaxed) > 0 {
            self.guests().iter().for_each(|guest| guest.leave_deadlines(&self.backlog));
        }
    }
    /// Leaves what may go on in a context to the worker.
    pub(crate) fn leave_work(&self, context: &Arc<Context>) {
        self.backlog.leave_work(context);
    }
    /// Waits until there is work, or [`Host::wake_worker`], or this time is over.
    pub fn wait_for_work(&self, timeout: Duration) {
        self.backlog.wait(timeout);
    }
    /// Ends a [`Host::wait_for_work`].
    pub fn wake_worker(&self) {
        self.backlog.wake();
    }
    /// Does what is left to the worker, until nothing is or the clock should be looked at: guests in turn, of a guest its
    /// contexts, a slice each. To be called by one thread of the daemon whenever there is work.
    pub fn work_off(&self) {
        for _ in 0..WORK_SLICES {
            if !self.backlog.work() {
                return;
            }
        }
    }
    /// Adds counts that no guest keeps.
    fn remember(&self, counters: &Counters) {
        self.lock_past().add(counters);
    }
    fn lock_past(&self) -> MutexGuard<'_, Counters> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(crate) fn clock(&self) -> &Arc<dyn Source> {
        &self.clock
    }
    /// Nanoseconds since the daemon's start.
    pub(crate) fn now_ns(&self) -> u64 {
        let passed = self.clock.now().saturating_sub(self.started);
        u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX)
    }
    pub(crate) fn next_generation(&self) -> u64 {
        self.next_generation.fetch_add(1, Ordering::Relaxed)
    }
    /// Misroutes the faults of neighbouring asids to each other. To show that checks fail.
    #[cfg(feature = "sabotage")]
    pub fn sabotage_swap_asids(&self) {
        self.slots.iter().for_each(|slot| slot.router.swap_neighbours());
    }
}

impl Slot {
    fn status(&self, device: usize, alive: usize) -> DeviceStatus {
        let info = self.device.info();
        DeviceStatus {
            device,
            name: info.name.clone(),
            va_bits: info.va_bits,
            engines: info.num_engines,
            fault_model: match info.fault_model {
                FaultModel::Replayable => "replayable",
                FaultModel::KernelResolved => "kernel-resolved",
                FaultModel::None => "none",
            },
            address_model: match info.address_model {
                AddressModel::Any => "any",
                AddressModel::Identity => "identity",
            },
            gpu_vms: alive,
            retiring: self.router.taken().saturating_sub(alive),
            faults_raised: self.faults_raised.load(Ordering::Relaxed),
        }
    }
}

/// What a thread that serves many guests does for one: a panic ends that guest's session, and goes on to whoever contains
/// it.
pub(crate) fn on_behalf<T>(fail_session: impl FnOnce(), act: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        fail_session();
        resume_unwind(panic)
    })
}

impl Owner {
    fn tell(&self, report: Report) {
        on_behalf(|| self.context.fail_session(), || self.context.tell(report));
    }
}

impl Events for Host {
    fn fault(&self, device: usize, fault: Fault) {
        let slot = self.slot(device);
        slot.faults_raised.fetch_add(1, Ordering::Relaxed);
        match slot.router.route(fault.asid) {
            Some(owner) => owner.tell(Report::Fault { device, vm_id: owner.vm_id, fault }),
            None => {
                self.remember(&Counters { faults_raised: 1, faults_dropped: 1, ..Counters::default() });
                slot.device.resume(fault.stop, Verdict::Fail(ECANCELED));
            }
        }
    }
    fn job_done(&self, device: usize, asid: Asid, job: JobId, end: JobEnd) {
        if let Some(owner) = self.slot(device).router.lookup_owner(asid) {
            owner.tell(Report::JobDone(job, end));
        }
    }
    fn flushed(&self, device: usize, asid: Asid, ticket: Ticket) {
        if let Some(owner) = self.slot(device).router.lookup_owner(asid) {
            owner.tell(Report::Flushed(device, asid, ticket));
            // Who waits for engines asks the device, and may do so now.
            owner.context.wake_guest();
        }
    }
    fn retired(&self, device: usize, asid: Asid) {
        if let Some(owner) = self.slot(device).router.free_asid(asid) {
            owner.tell(Report::Retired(device, asid));
        }
    }
}

impl Counters {
    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        let sum = |a: &mut u64, b: u64| *a = a.saturating_add(b);
        sum(&mut self.faults_raised, other.faults_raised);
        sum(&mut self.faults_served_locally, other.faults_served_locally);
        sum(&mut self.faults_answered, other.faults_answered);
        sum(&mut self.faults_refused, other.faults_refused);
        sum(&mut self.faults_dropped, other.faults_dropped);
        sum(&mut self.faults_throttled, other.faults_throttled);
        sum(&mut self.faults_reported, other.faults_reported);
        sum(&mut self.faults_coalesced, other.faults_coalesced);
        sum(&mut self.answers_stale, other.answers_stale);
        sum(&mut self.runs_installed, other.runs_installed);
        sum(&mut self.runs_refused, other.runs_refused);
        sum(&mut self.invalidations, other.invalidations);
        sum(&mut self.jobs_submitted, other.jobs_submitted);
        sum(&mut self.jobs_done, other.jobs_done);
        sum(&mut self.jobs_failed, other.jobs_failed);
        sum(&mut self.jobs_dropped, other.jobs_dropped);
    }
}
