//! The embedded software GPU: fixed-function packets, and all kinds of faults and addresses by configuration. Always
//! built, several per daemon.
//!
//! * Replayable faults, any address: a fault asks for one page.
//! * Replayable faults, the CPU's own addresses: as with page requests of PCIe, a fault asks for a group of pages.
//! * No faults, any address: a job that lacks a translation ends, unless its VM is frozen meanwhile.
//!
//! Owns GPU VMs (`sched` says who runs, `mem` what they see), jobs (`packet`) and the device's own record of its
//! faults (`ledger`). The library has no threads: the daemon lends one thread per engine, which calls
//! [`SoftDevice::run_engine`] and stays there until [`SoftDevice::shutdown`].
//!
//! An engine runs a job for a *slice* of about 30 us. In a slice it uses translations freely; between slices, and so
//! while a job is parked at a fault or waits for a semaphore, it holds none: that is the checkpoint of every flush.
//!
//! # Locks
//! The scheduler's mutex: a few lines at a time, nothing is called under it. A VM's memory lock: an engine reads in it
//! for a slice; see `mem`. Never two at once. Events are called with neither.
//!
//! Ends of jobs of one ring are told in order: the next job starts when the end of the one before was told.
//! Nothing is reported when no engine runs, retirement of VMs included: engines are the only ones that call up.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod mem;
pub(in crate::device) mod packet;
mod sched;

use super::ledger::Ledger;
use super::operands;
use super::{
    AddressModel, Asid, Device, DeviceInfo, Error, Events, Extent, FaultModel, Flush, Job, LedgerEntry,
    ScatteredPage, StopId, Ticket, Verdict, VmLabel,
};
use crate::addr::{GpuAddr, PageRange};
use crate::busy_poll::BusyPoll;
use crate::memory::Region;
use crate::page_table::{NoTable, Spares};
use crate::protocol::job::{OPCODES, Packet};
use crate::quota::Charge;
use crate::seeded::{self, Bug};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, LookClock, Mutex, MutexGuard, OnceLock, PoisonError, Weak, preempt};
use mem::VmMemory;
use packet::{ActiveJob, SliceEnd};
use sched::{Nap, Next, Report, Sched, Turn, Vm};
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Most pages of a group that a device with the CPU's own addresses asks for in one fault.
pub const MAX_GROUP_PAGES: u8 = 8;

/// What a software GPU is to be.
#[derive(Clone, Debug)]
pub struct SoftConfig {
    /// Its index on this host, as it is named in events.
    pub index: usize,
    /// For people; at most 32 bytes.
    pub name: String,
    /// Engines, at least 1; each needs a thread.
    pub engines: u8,
    /// GPU addresses are below `1 << va_bits`; 22 to 57.
    pub va_bits: u32,
    /// What it does about an access without translation: parks the job, or ends it.
    pub fault_model: FaultModel,
    /// Which addresses it has; the CPU's own need faults.
    pub address_model: AddressModel,
    /// Keep a record of this many faults.
    pub ledger: Option<usize>,
    /// How long a job may be on engines and wait for semaphores in all; then it ends with -ETIMEDOUT.
    pub job_limit: Option<Duration>,
    /// How long an engine looks for work before it sleeps, at most; one of them at a time does. Semaphores that nobody on this
    /// device signals may be looked at so much later. Zero: none looks.
    pub busy_poll: Duration,
}

impl Default for SoftConfig {
    /// `soft0`: one engine, 48 bits, faults wherever a page is missing, any addresses; no ledger, no job limit.
    fn default() -> Self {
        Self {
            index: 0,
            name: "soft0".into(),
            engines: 1,
            va_bits: 48,
            fault_model: FaultModel::Replayable,
            address_model: AddressModel::Any,
            ledger: None,
            job_limit: None,
            busy_poll: Duration::ZERO,
        }
    }
}

/// A software GPU.
pub struct SoftDevice {
    index: usize,
    info: DeviceInfo,
    events: OnceLock<Weak<dyn Events>>,
    sched: Mutex<Sched>,
    /// Of all its GPU VMs.
    spares: Arc<Spares>,
    /// Sleeping engines.
    idle: Condvar,
    /// What the engine that looks for work looks at. Written under the scheduler's lock.
    called: AtomicBool,
    busy_poll: Duration,
    /// Kept apart from the scheduler, because a snapshot copies all of it.
    ledger: Option<Mutex<Ledger>>,
    job_limit: Option<Duration>,
    faults_raised: AtomicU64,
    panics: AtomicU64,
}

impl SoftDevice {
    /// A GPU that does nothing until it is started and has engines.
    ///
    /// # Panics
    /// If the configuration leaves the ranges that it names.
    pub fn new(config: SoftConfig) -> Arc<Self> {
        let SoftConfig {
            index,
            name,
            engines,
            va_bits,
            fault_model,
            address_model,
            ledger,
            job_limit,
            busy_poll,
        } = config;
        assert!(engines > 0, "a GPU without engines");
        assert!((22..=57).contains(&va_bits), "a GPU of {va_bits} address bits");
        let parks = match (fault_model, address_model) {
            (FaultModel::Replayable, AddressModel::Any | AddressModel::Identity) => true,
            (FaultModel::None, AddressModel::Any) => false,
            models => panic!("a software GPU cannot be {models:?}"),
        };
        let info = DeviceInfo {
            name,
            va_bits,
            num_engines: u32::from(engines),
            opcodes: OPCODES,
            fault_model,
            address_model,
            null_mappings: address_model == AddressModel::Any,
            exec: false,
        };
        Arc::new(Self {
            index,
            info,
            events: OnceLock::new(),
            sched: Mutex::new(Sched::new(engines, parks)),
            spares: Arc::default(),
            idle: Condvar::new(),
            called: AtomicBool::new(false),
            busy_poll,
            ledger: ledger.map(|capacity| Mutex::new(Ledger::new(capacity))),
            job_limit,
            faults_raised: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        })
    }

    /// Says who is told; engines work from now on. The device does not keep its owner alive.
    ///
    /// # Panics
    /// If it was started before.
    pub fn start(&self, events: Weak<dyn Events>) {
        assert!(self.events.set(events).is_ok(), "device {} was started twice", self.index);
        if self.sched().start() {
            self.idle.notify_all();
        }
    }

    /// Is an engine until [`SoftDevice::shutdown`]. The calling thread is lent for it.
    ///
    /// # Panics
    /// If there is no such engine, or another thread is it.
    pub fn run_engine(&self, engine: u8) {
        let mut sched = self.sched();
        sched.attach(engine);
        let mut poll = BusyPoll::new(LookClock::default(), self.busy_poll);
        loop {
            sched = match self.next(sched, engine, &mut poll) {
                Next::Run(turn) => self.run_turn(turn, engine),
                Next::Retire(vm) => self.run_retirement(&vm),
                Next::Exit => break,
            }
        }
        self.sched().detach(engine);
    }

    /// Makes every engine return after its slice. Jobs stay where they are; nothing is reported any more.
    pub fn shutdown(&self) {
        let mut sched = self.sched();
        let sleepers = sched.stop();
        self.release(sched);
        if sleepers {
            self.idle.notify_all();
        }
    }

    /// Faults raised so far.
    pub fn faults_raised(&self) -> u64 {
        self.faults_raised.load(Ordering::Relaxed)
    }

    /// Panics contained so far: of packets, and of whoever was told. Each one is a bug.
    pub fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }
}

impl SoftDevice {
    /// Runs a slice, passes the checkpoint, and reports.
    fn run_turn(&self, mut turn: Turn, engine: u8) -> MutexGuard<'_, Sched> {
        let end = self.run_slice(&mut turn);
        let mut sched = self.sched();
        let (report, over) = sched.end_turn(engine, turn, end);
        if report.is_none() && over.is_none() {
            return sched;
        }
        self.release(sched);
        drop(over);
        let told = report.as_ref().map(Report::told);
        if let Some(report) = report {
            self.deliver(report);
        }
        preempt();
        let mut sched = self.sched();
        if let Some(told) = told {
            sched.end_report(told);
        }
        sched
    }

    /// Takes a VM apart, as far as a slice goes, and tells when nothing is left of it.
    fn run_retirement(&self, vm: &Arc<Vm>) -> MutexGuard<'_, Sched> {
        let more = vm.memory.dismantle();
        let mut sched = self.sched();
        if sched.end_retirement(vm.asid, more) {
            drop(sched);
            self.emit(|events| events.retired(self.index, vm.asid));
            sched = self.sched();
        }
        sched
    }

    fn run_slice(&self, turn: &mut Turn) -> SliceEnd {
        let Turn { vm, job, .. } = turn;
        let (begin, end) = (Instant::now(), 1u64.wrapping_shl(self.info.va_bits));
        let slice = catch_unwind(AssertUnwindSafe(|| job.run(vm.memory.view().memory(), end, &vm.hurry)));
        vm.memory.reclaim();
        let mut slice = slice.unwrap_or_else(|_| {
            self.panics.fetch_add(1, Ordering::Relaxed);
            job.panicked()
        });
        job.bill(begin, &mut slice, self.job_limit);
        slice
    }

    /// Reports what a slice brought; no lock is held.
    fn deliver(&self, report: Report) {
        let Report { vm, fault, done, flushed, .. } = report;
        if let Some(fault) = fault {
            self.faults_raised.fetch_add(1, Ordering::Relaxed);
            if let Some(ledger) = &self.ledger {
                let (page, access) = (fault.addr.page(), fault.access);
                let entry = LedgerEntry { label: vm.label.clone(), asid: vm.asid, page, access };
                ledger.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
            }
            self.emit(|events| events.fault(self.index, fault));
        }
        if let Some((job, end)) = done {
            self.emit(|events| events.job_done(self.index, vm.asid, job, end));
        }
        if let Some(ticket) = flushed {
            self.emit(|events| events.flushed(self.index, vm.asid, ticket));
        }
    }

    /// Tells the core, if it is still there. Its panic is its own: the engine serves others.
    fn emit(&self, tell: impl FnOnce(&dyn Events)) {
        let Some(events) = self.events.get().and_then(Weak::upgrade) else { return };
        if catch_unwind(AssertUnwindSafe(|| tell(&*events))).is_err() {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The engine's next work. Until there is some, it looks for a while, and then sleeps.
    fn next<'a>(
        &'a self,
        mut sched: MutexGuard<'a, Sched>,
        engine: u8,
        poll: &mut BusyPoll<LookClock>,
    ) -> Next {
        poll.begin_visit();
        loop {
            if let Some(next) = sched.next(engine) {
                self.release(sched);
                return next;
            }
            let (found, back) = self.look(sched, poll);
            sched = if found { back } else { self.sleep(back) };
        }
    }

    /// Looks for work, if it is worth the while and no other engine does. Whether there is some.
    fn look<'a>(
        &'a self,
        mut sched: MutexGuard<'a, Sched>,
        poll: &mut BusyPoll<LookClock>,
    ) -> (bool, MutexGuard<'a, Sched>) {
        if self.busy_poll.is_zero() || !sched.begin_look() {
            return (false, sched);
        }
        self.called.store(false, Ordering::Relaxed);
        drop(sched);
        let Ok(_) = poll.wait(|| {
            preempt();
            Ok::<_, Infallible>(self.called.load(Ordering::Relaxed))
        });
        let mut sched = self.sched();
        sched.end_look();
        // It may have come when the look was over.
        (self.called.load(Ordering::Relaxed), sched)
    }

    fn sleep<'a>(&'a self, mut sched: MutexGuard<'a, Sched>) -> MutexGuard<'a, Sched> {
        let nap = sched.sleep();
        let mut sched = match nap {
            Nap(None) => self.idle.wait(sched).unwrap_or_else(PoisonError::into_inner),
            Nap(Some(time)) => self.idle.wait_timeout(sched, time).unwrap_or_else(PoisonError::into_inner).0,
        };
        sched.end_sleep(nap);
        sched
    }

    /// Changes the schedule, and wakes an engine if that gave it work.
    fn schedule<R>(&self, change: impl FnOnce(&mut Sched) -> R) -> R {
        let mut sched = self.sched();
        let result = change(&mut sched);
        self.release(sched);
        result
    }

    fn release(&self, mut sched: MutexGuard<'_, Sched>) {
        let wake = sched.calls_engine();
        if sched.calls_looker() {
            self.called.store(true, Ordering::Relaxed);
        }
        drop(sched);
        if wake {
            self.idle.notify_one();
        }
    }

    /// Nothing panics under this lock but a broken invariant of ours; others must be able to go on.
    fn sched(&self) -> MutexGuard<'_, Sched> {
        self.sched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for SoftDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn vm_create(&self, asid: Asid, label: VmLabel, tables: Charge) -> Result<(), Error> {
        let max_group = match self.info.address_model {
            AddressModel::Any => 1,
            AddressModel::Identity => MAX_GROUP_PAGES,
        };
        let memory = VmMemory::new(self.info.va_bits, max_group, tables, Arc::clone(&self.spares));
        let vm = Arc::new(Vm { asid, label, memory, hurry: AtomicBool::new(false) });
        self.sched().vm_create(vm)
    }

    fn vm_destroy(&self, asid: Asid) {
        drop(self.schedule(|sched| sched.vm_destroy(asid)));
    }

    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        assert_eq!(addr, addr.page_start(), "bind at an address within a page");
        let vm = self.sched().live_vm(asid)?;
        Ok(vm.memory.bind(addr.page(), extents)?)
    }

    fn bind_pages(
        &self,
        asid: Asid,
        addr: GpuAddr,
        region: &Arc<Region>,
        pages: &[ScatteredPage],
    ) -> Result<(), Error> {
        assert_eq!(addr, addr.page_start(), "bind at an address within a page");
        let vm = self.sched().live_vm(asid)?;
        Ok(vm.memory.bind_pages(addr.page(), region, pages)?)
    }

    fn bind_null(&self, asid: Asid, range: PageRange) -> Result<(), Error> {
        if !self.info.null_mappings {
            return Err(Error::Unsupported);
        }
        let vm = self.sched().live_vm(asid)?;
        Ok(vm.memory.bind_null(range)?)
    }

    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        let Some(vm) = self.sched().vm(asid) else { return Flush::Done };
        if seeded::on(Bug::SkipFlush) {
            vm.memory.unbind(range);
            return Flush::Done;
        }
        if seeded::on(Bug::FlushBeforeZap) {
            let flush = self.sched().flush(asid);
            preempt();
            vm.memory.unbind(range);
            return flush;
        }
        vm.memory.unbind(range);
        preempt();
        // Slices that begin from here on find the range empty; those that run may have translated before.
        self.sched().flush(asid)
    }

    fn flush(&self, asid: Asid) -> Flush {
        self.sched().flush(asid)
    }

    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        self.sched().has_flushed(asid, ticket)
    }

    fn drop_region(&self, asid: Asid, region_id: u64) {
        let Some(vm) = self.sched().vm(asid) else { return };
        // An engine that came in vain would wait with all its other guests.
        self.sched().set_barred(asid, true);
        vm.memory.drop_region(region_id);
        self.schedule(|sched| sched.set_barred(asid, false));
    }

    fn resident_pages(&self, asid: Asid) -> u64 {
        let vm = self.sched().vm(asid);
        vm.map_or(0, |vm| vm.memory.resident_pages())
    }

    fn resident_in(&self, asid: Asid, range: PageRange) -> u64 {
        let vm = self.sched().vm(asid);
        vm.map_or(0, |vm| vm.memory.resident_in(range))
    }

    fn table_bytes(&self, asid: Asid) -> u64 {
        let vm = self.sched().vm(asid);
        vm.map_or(0, |vm| vm.memory.table_bytes())
    }

    fn check_packets(&self, packets: &[Packet]) -> Result<(), Error> {
        operands::check(packets, 1u64.wrapping_shl(self.info.va_bits))
    }

    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error> {
        let ring = job.ring_idx;
        let job = Box::new(ActiveJob::new(job));
        self.schedule(|sched| sched.submit(asid, ring, job))
    }

    fn resume(&self, stop: StopId, verdict: Verdict) {
        self.schedule(|sched| sched.resume(stop, verdict));
    }

    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush {
        self.schedule(|sched| sched.set_frozen(asid, frozen))
    }

    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        let Some(ledger) = &self.ledger else { return (Vec::new(), 0) };
        ledger.lock().unwrap_or_else(PoisonError::into_inner).snapshot()
    }
}

impl From<NoTable> for Error {
    fn from(error: NoTable) -> Self {
        match error {
            NoTable::OutOfMemory => Self::OutOfMemory,
            NoTable::OverQuota(full) => Self::OverQuota(full),
        }
    }
}

#[cfg(test)]
mod tests;
