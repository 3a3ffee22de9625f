//! Who runs next, who waits for what, and which flushes are open: plain state under the device's one lock.
//!
//! * A VM is in `ready` once, if it is neither frozen nor dying and has a ready ring; engines take VMs in turn, and of a
//!   VM its ready rings in turn. So a VM with many jobs gets the share of a VM with one.
//! * A ring has a job in front and a queue; only the front is ever on an engine.
//! * `epoch` rises with each flush that must wait; `Engine::since` is the epoch at which its slice began. A flush of a
//!   VM is over when every engine in a slice of that VM began at its ticket or later.
//! * A VM retires when it is dying, no engine is in a slice of it, and none is still reporting about it: so nothing is
//!   reported of a VM after [`crate::device::Events::retired`].
//! * Where there are no faults, a slice that lacked a translation ends its job, unless its VM was frozen after it began
//!   (`freezes` rose), be it thawed again since: what it missed may have been unbound under that freeze, and the access
//!   is repeated.
//!
//! Nothing here calls out, touches guest memory, or takes another lock.

use super::mem::VmMemory;
use super::packet::{ActiveJob, Halt, SliceEnd};
use crate::addr::GpuAddr;
use crate::device::{Asid, Error, Fault, Flush, JobEnd, JobId, StopId, Ticket, Verdict, VmLabel};
use crate::sync::Arc;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque, btree_map, hash_map};
use std::ops::Bound;
use std::time::{Duration, Instant};

/// How often a semaphore is looked at that nobody on this device signals: the guest's CPU or another device may.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Most semaphores that are looked at in one interval; with more waiters each waits longer.
const POLL_BATCH: usize = 256;

/// What stays the same of a GPU VM.
pub struct Vm {
    /// As the core named it.
    pub asid: Asid,
    /// Whose it is.
    pub label: VmLabel,
    /// Its memory.
    pub memory: VmMemory,
}

/// A job's turn on an engine.
pub struct Turn {
    /// Its VM.
    pub vm: Arc<Vm>,
    /// Its ring.
    pub ring: u32,
    /// The job.
    pub job: Box<ActiveJob>,
    /// Signals of the device and writing slices of the VM, so far: with more at its end, a wait is tried again.
    seen: (u64, u64),
    /// Freezes of the VM so far.
    freezes: u64,
}

/// What an engine does next.
pub enum Next {
    /// Runs a slice, then calls [`Sched::end_turn`].
    Run(Turn),
    /// Drops the VM, then reports that it retired.
    Retire(Arc<Vm>),
    /// Returns.
    Exit,
}

/// Nothing to do: the engine sleeps until it is woken or this time is over, then calls [`Sched::end_sleep`].
pub struct Nap(pub Option<Duration>);

/// What an engine reports after a slice, with no lock held; then it drops it and calls [`Sched::end_report`].
pub struct Report {
    /// Whom it is about.
    pub vm: Arc<Vm>,
    /// The ring of the slice.
    ring: u32,
    /// A fault.
    pub fault: Option<Fault>,
    /// The end of a job.
    pub done: Option<(JobId, JobEnd)>,
    /// A flush that is over.
    pub flushed: Option<Ticket>,
}

impl Report {
    /// What the scheduler must know once the report is delivered.
    pub fn told(&self) -> Told {
        Told { asid: self.vm.asid, ended: self.done.map(|_| self.ring) }
    }
}

/// What was reported.
pub struct Told {
    asid: Asid,
    /// The ring whose front job ended.
    ended: Option<u32>,
}

/// The front job of a ring.
enum Front {
    Ready(Box<ActiveJob>),
    /// It is on an engine, or its end is being told.
    Running,
    Parked(StopId, Box<ActiveJob>),
    /// With the key under which it is in [`Sched::waiters`].
    Waiting(u64, Box<ActiveJob>),
}

struct Ring {
    front: Front,
    queue: VecDeque<Box<ActiveJob>>,
}

struct VmState {
    vm: Arc<Vm>,
    /// Rings with a job.
    rings: BTreeMap<u32, Ring>,
    /// Rings whose front is ready, in turn.
    ready: VecDeque<u32>,
    /// Whether it is in [`Sched::ready`].
    queued: bool,
    frozen: bool,
    /// How often it was frozen.
    freezes: u64,
    dying: bool,
    /// Engines in a slice of it.
    running: u32,
    /// Engines that report about it.
    reporting: u32,
    /// Rings that wait for a semaphore.
    waiting: usize,
    /// Slices that stored something.
    writes: u64,
    /// Flushes that are not over, by rising ticket.
    tickets: VecDeque<u64>,
}

#[derive(Clone, Copy, Default)]
struct Engine {
    /// The VM of its slice, and the epoch when that began.
    slice: Option<(Asid, u64)>,
    attached: bool,
}

/// The state of all GPU VMs and engines of a device.
pub struct Sched {
    /// Whether a job that lacks a translation is parked at a fault; else it ends.
    parks: bool,
    vms: HashMap<Asid, VmState>,
    ready: VecDeque<Asid>,
    retiring: VecDeque<Asid>,
    stops: HashMap<StopId, (Asid, u32)>,
    last_stop: u64,
    /// Rings that wait for a semaphore: its key, VM, ring.
    waiters: BTreeSet<(u64, Asid, u32)>,
    next_poll: Option<Instant>,
    /// The waiter after which the next poll begins.
    polled: (u64, Asid, u32),
    /// Semaphores signalled.
    signals: u64,
    epoch: u64,
    engines: Vec<Engine>,
    sleeping: usize,
    /// Whether one of the sleeping engines wakes for the next poll.
    poller: bool,
    started: bool,
    stopping: bool,
}

impl Sched {
    /// No VMs; engines sleep until [`Sched::start`]. `parks` says whether there are faults.
    pub fn new(engines: u8, parks: bool) -> Self {
        Self {
            parks,
            vms: HashMap::new(),
            ready: VecDeque::new(),
            retiring: VecDeque::new(),
            stops: HashMap::new(),
            last_stop: 0,
            waiters: BTreeSet::new(),
            next_poll: None,
            polled: (0, Asid(0), 0),
            signals: 0,
            epoch: 0,
            engines: vec![Engine::default(); usize::from(engines)],
            sleeping: 0,
            poller: false,
            started: false,
            stopping: false,
        }
    }

    /// Lets engines work.
    pub fn start(&mut self) {
        self.started = true;
    }

    /// Makes engines return at their next checkpoint.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// A thread becomes this engine.
    pub fn attach(&mut self, engine: u8) {
        let slot = self.engine_mut(engine);
        assert!(!slot.attached, "two threads run engine {engine}");
        slot.attached = true;
    }

    /// The thread that was this engine returns.
    pub fn detach(&mut self, engine: u8) {
        self.engine_mut(engine).attached = false;
    }

    /// Whether a sleeping engine should look for work.
    pub fn wants_engine(&self) -> bool {
        self.sleeping > 0 && self.started && !(self.ready.is_empty() && self.retiring.is_empty())
    }

    /// Adds a VM.
    pub fn vm_create(&mut self, vm: Arc<Vm>) -> Result<(), Error> {
        let hash_map::Entry::Vacant(free) = self.vms.entry(vm.asid) else {
            return Err(Error::VmExists(vm.asid.0));
        };
        free.insert(VmState::new(vm));
        Ok(())
    }

    /// A VM, also while it is dying.
    pub fn vm(&self, asid: Asid) -> Option<Arc<Vm>> {
        self.vms.get(&asid).map(|state| Arc::clone(&state.vm))
    }

    /// A VM that is not dying.
    pub fn live_vm(&self, asid: Asid) -> Result<Arc<Vm>, Error> {
        match self.vms.get(&asid) {
            Some(state) if !state.dying => Ok(Arc::clone(&state.vm)),
            _ => Err(Error::NoVm(asid.0)),
        }
    }

    /// Begins to destroy a VM. Returns its jobs, to be dropped without the lock.
    pub fn vm_destroy(&mut self, asid: Asid) -> impl Sized + use<> {
        let state = self.vms.get_mut(&asid).filter(|state| !state.dying)?;
        state.dying = true;
        state.ready.clear();
        let rings = std::mem::take(&mut state.rings);
        for (idx, ring) in &rings {
            match &ring.front {
                Front::Parked(stop, _) => drop(self.stops.remove(stop)),
                Front::Waiting(key, _) => drop(self.waiters.remove(&(*key, asid, *idx))),
                Front::Ready(_) | Front::Running => {}
            }
        }
        if state.queued {
            self.ready.retain(|queued| *queued != asid);
        }
        self.retire_if_idle(asid);
        Some(rings)
    }

    /// Queues a job.
    pub fn submit(&mut self, asid: Asid, ring: u32, job: Box<ActiveJob>) -> Result<(), Error> {
        let state = self.vms.get_mut(&asid).filter(|state| !state.dying).ok_or(Error::NoVm(asid.0))?;
        match state.rings.entry(ring) {
            btree_map::Entry::Occupied(mut busy) => busy.get_mut().queue.push_back(job),
            btree_map::Entry::Vacant(free) => {
                free.insert(Ring { front: Front::Ready(job), queue: VecDeque::new() });
                state.ready.push_back(ring);
                state.enqueue(&mut self.ready);
            }
        }
        Ok(())
    }

    /// Releases a parked job; an unknown stop is a late one.
    pub fn resume(&mut self, stop: StopId, verdict: Verdict) {
        let Some((asid, ring)) = self.stops.remove(&stop) else { return };
        let Some(state) = self.vms.get_mut(&asid) else { return };
        let Some(Front::Parked(_, mut job)) = state.take_front(ring) else { return };
        if let Verdict::Fail(errno) = verdict {
            job.doom(errno);
        }
        state.make_ready(ring, job);
        state.enqueue(&mut self.ready);
    }

    /// Stops or lets go a VM.
    pub fn set_frozen(&mut self, asid: Asid, frozen: bool) -> Flush {
        let Some(state) = self.vms.get_mut(&asid) else { return Flush::Done };
        state.frozen = frozen;
        if frozen {
            state.freezes = state.freezes.wrapping_add(1);
            // Nobody polls a frozen VM; its waiters look again after it is thawed.
            self.wake_vm(asid);
            return self.flush(asid);
        }
        state.enqueue(&mut self.ready);
        Flush::Done
    }

    /// Begins a flush of what was zapped before this call.
    pub fn flush(&mut self, asid: Asid) -> Flush {
        match self.vms.get_mut(&asid) {
            Some(state) if state.running > 0 => {
                self.epoch = self.epoch.saturating_add(1);
                state.tickets.push_back(self.epoch);
                Flush::Pending(Ticket(self.epoch))
            }
            _ => Flush::Done,
        }
    }

    /// Whether every engine has passed a ticket of a VM, or the VM is gone.
    pub fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        let first = self.vms.get(&asid).and_then(|state| state.tickets.front());
        first.is_none_or(|first| *first > ticket.0)
    }

    /// What the engine is to do.
    pub fn next(&mut self, engine: u8) -> Result<Next, Nap> {
        if self.stopping {
            return Ok(Next::Exit);
        }
        if !self.started {
            return Err(self.sleep());
        }
        if let Some(state) = self.retiring.pop_front().and_then(|asid| self.vms.remove(&asid)) {
            return Ok(Next::Retire(state.vm));
        }
        self.poll_waiters();
        while let Some(asid) = self.ready.pop_front() {
            let Some(state) = self.vms.get_mut(&asid) else { continue };
            state.queued = false;
            let Some(turn) = state.take_turn(self.signals) else { continue };
            state.enqueue(&mut self.ready);
            let epoch = self.epoch;
            self.engine_mut(engine).slice = Some((asid, epoch));
            return Ok(Next::Run(turn));
        }
        Err(self.sleep())
    }

    /// An engine woke up.
    pub fn end_sleep(&mut self, nap: Nap) {
        self.sleeping = self.sleeping.saturating_sub(1);
        self.poller &= nap.0.is_none();
    }

    /// The engine is out of a slice: its checkpoint. Also returns the job if it is over, to be dropped without the lock.
    pub fn end_turn(
        &mut self,
        engine: u8,
        turn: Turn,
        end: SliceEnd,
    ) -> (Option<Report>, Option<Box<ActiveJob>>) {
        self.engine_mut(engine).slice = None;
        let asid = turn.vm.asid;
        let state = self.state_mut(asid);
        state.running = state.running.saturating_sub(1);
        let (mut report, over) = self.settle(engine, turn, end.halt);
        self.wake_waiters(asid, &end);
        report.flushed = self.take_flushed(asid);

        let any = report.fault.is_some() || report.done.is_some() || report.flushed.is_some();
        let state = self.state_mut(asid);
        state.reporting = state.reporting.saturating_add(u32::from(any));
        self.enqueue(asid);
        self.retire_if_idle(asid);
        (any.then_some(report), over)
    }

    /// The engine has reported, and dropped the report.
    pub fn end_report(&mut self, told: Told) {
        let Told { asid, ended } = told;
        let state = self.state_mut(asid);
        state.reporting = state.reporting.saturating_sub(1);
        if let Some(ring) = ended
            && !state.dying
        {
            state.advance(ring);
            self.enqueue(asid);
        }
        self.retire_if_idle(asid);
    }

    /// Puts the job where it belongs after its slice.
    fn settle(&mut self, engine: u8, turn: Turn, halt: Halt) -> (Report, Option<Box<ActiveJob>>) {
        let Turn { vm, ring, mut job, seen, freezes } = turn;
        let (asid, signals, parks) = (vm.asid, self.signals, self.parks);
        let mut report = Report { vm, ring, fault: None, done: None, flushed: None };
        let state = self.state_mut(asid);
        if state.dying {
            return (report, Some(job));
        }
        match halt {
            Halt::Yield => state.make_ready(ring, job),
            // What it waits for may have happened since it looked.
            Halt::Wait(_) if state.frozen || seen != (signals, state.writes) => {
                job.end_wait();
                state.make_ready(ring, job);
            }
            Halt::Wait(key) => {
                state.waiting = state.waiting.saturating_add(1);
                state.set_front(ring, Front::Waiting(key, job));
                self.waiters.insert((key, asid, ring));
            }
            Halt::Fault(..) if !parks && state.freezes != freezes => state.make_ready(ring, job),
            Halt::Fault(missing, _) if !parks => {
                report.done = Some((job.id, job.refused(&missing)));
                return (report, Some(job));
            }
            Halt::Fault(missing, pages) => {
                self.last_stop = self.last_stop.saturating_add(1);
                let stop = StopId(self.last_stop);
                report.fault = Some(Fault {
                    asid,
                    stop,
                    job: job.id,
                    addr: GpuAddr(missing.addr),
                    pages,
                    length_hint: missing.len,
                    access: missing.access,
                    engine,
                    level: missing.level,
                });
                self.stops.insert(stop, (asid, ring));
                self.state_mut(asid).set_front(ring, Front::Parked(stop, job));
            }
            Halt::End(end) => {
                // The ring goes on when this is told: ends are told in the order of the jobs.
                report.done = Some((job.id, end));
                return (report, Some(job));
            }
        }
        (report, None)
    }

    /// The newest flush of a VM that is over, if one more is.
    fn take_flushed(&mut self, asid: Asid) -> Option<Ticket> {
        let inside = self.engines.iter().filter_map(|e| e.slice).filter(|(of, _)| *of == asid);
        let oldest = inside.map(|(_, since)| since).min().unwrap_or(self.epoch);
        let state = self.state_mut(asid);
        let mut over = None;
        while let Some(ticket) = state.tickets.pop_front_if(|ticket| *ticket <= oldest) {
            over = Some(Ticket(ticket));
        }
        over
    }

    fn retire_if_idle(&mut self, asid: Asid) {
        let state = self.state_mut(asid);
        if state.dying && state.running == 0 && state.reporting == 0 {
            self.retiring.push_back(asid);
        }
    }

    /// Lets semaphore waiters look again that this slice may concern.
    fn wake_waiters(&mut self, asid: Asid, end: &SliceEnd) {
        if end.written {
            let state = self.state_mut(asid);
            state.writes = state.writes.wrapping_add(1);
            self.wake_vm(asid);
        }
        if let Some(key) = end.signalled {
            self.signals = self.signals.wrapping_add(1);
            let all = (key, Asid(0), 0)..=(key, Asid(u32::MAX), u32::MAX);
            while let Some(waiter) = self.waiters.range(all.clone()).next().copied() {
                self.wake(waiter);
            }
        }
    }

    /// Lets every waiter of a VM look again.
    fn wake_vm(&mut self, asid: Asid) {
        let state = self.state_mut(asid);
        if state.waiting == 0 {
            return;
        }
        let key_of = |(idx, ring): (&u32, &Ring)| match ring.front {
            Front::Waiting(key, _) => Some((key, asid, *idx)),
            Front::Ready(_) | Front::Running | Front::Parked(..) => None,
        };
        while let Some(waiter) = self.state_mut(asid).rings.iter().find_map(key_of) {
            self.wake(waiter);
        }
    }

    fn wake(&mut self, waiter: (u64, Asid, u32)) {
        self.waiters.remove(&waiter);
        let (_, asid, ring) = waiter;
        let state = self.state_mut(asid);
        let Some(Front::Waiting(_, mut job)) = state.take_front(ring) else {
            panic!("ring {ring} does not wait")
        };
        job.end_wait();
        state.waiting = state.waiting.saturating_sub(1);
        state.make_ready(ring, job);
        self.enqueue(asid);
    }

    /// Once in an interval, lets the next waiters look again.
    fn poll_waiters(&mut self) {
        if self.waiters.is_empty() {
            self.next_poll = None;
            return;
        }
        let now = Instant::now();
        if self.next_poll.is_some_and(|time| time > now) {
            return;
        }
        if self.next_poll.is_some() {
            for _ in 0..self.waiters.len().min(POLL_BATCH) {
                let after = (Bound::Excluded(self.polled), Bound::Unbounded);
                let Some(waiter) = self.waiters.range(after).next().or(self.waiters.first()).copied() else {
                    break;
                };
                self.polled = waiter;
                self.wake(waiter);
            }
        }
        self.next_poll = now.checked_add(POLL_INTERVAL);
    }

    fn sleep(&mut self) -> Nap {
        self.sleeping = self.sleeping.saturating_add(1);
        if self.poller || self.waiters.is_empty() {
            return Nap(None);
        }
        self.poller = true;
        let left = self.next_poll.map(|time| time.saturating_duration_since(Instant::now()));
        Nap(Some(left.unwrap_or(POLL_INTERVAL)))
    }

    fn enqueue(&mut self, asid: Asid) {
        if let Some(state) = self.vms.get_mut(&asid) {
            state.enqueue(&mut self.ready);
        }
    }

    fn engine_mut(&mut self, engine: u8) -> &mut Engine {
        let count = self.engines.len();
        self.engines.get_mut(usize::from(engine)).unwrap_or_else(|| panic!("engine {engine} of {count}"))
    }

    /// A VM that is known to be here: it cannot retire while its asid is running, reporting, waiting or being changed.
    fn state_mut(&mut self, asid: Asid) -> &mut VmState {
        self.vms.get_mut(&asid).unwrap_or_else(|| panic!("{asid:?} has retired too early"))
    }
}

impl VmState {
    fn new(vm: Arc<Vm>) -> Self {
        Self {
            vm,
            rings: BTreeMap::new(),
            ready: VecDeque::new(),
            queued: false,
            frozen: false,
            freezes: 0,
            dying: false,
            running: 0,
            reporting: 0,
            waiting: 0,
            writes: 0,
            tickets: VecDeque::new(),
        }
    }

    /// Queues the VM if it has something to run. While too many of its tables are empty no second engine enters, so
    /// that the last to leave can free them.
    fn enqueue(&mut self, ready: &mut VecDeque<Asid>) {
        let crowded = self.running > 0 && self.vm.memory.wants_reclaim();
        if !self.queued && !self.frozen && !self.dying && !crowded && !self.ready.is_empty() {
            self.queued = true;
            ready.push_back(self.vm.asid);
        }
    }

    /// The next ready job, if the VM may run now.
    fn take_turn(&mut self, signals: u64) -> Option<Turn> {
        if self.frozen || (self.running > 0 && self.vm.memory.wants_reclaim()) {
            return None;
        }
        let ring = self.ready.pop_front()?;
        let Some(Front::Ready(job)) = self.take_front(ring) else { panic!("ring {ring} is not ready") };
        self.running = self.running.saturating_add(1);
        let seen = (signals, self.writes);
        Some(Turn { vm: Arc::clone(&self.vm), ring, job, seen, freezes: self.freezes })
    }

    /// Takes the front job; its ring counts as running until another front is set.
    fn take_front(&mut self, ring: u32) -> Option<Front> {
        let ring = self.rings.get_mut(&ring)?;
        Some(std::mem::replace(&mut ring.front, Front::Running))
    }

    fn set_front(&mut self, ring: u32, front: Front) {
        if let Some(ring) = self.rings.get_mut(&ring) {
            ring.front = front;
        }
    }

    fn make_ready(&mut self, ring: u32, job: Box<ActiveJob>) {
        self.set_front(ring, Front::Ready(job));
        self.ready.push_back(ring);
    }

    /// The front job is over: the next one of its ring is ready, or the ring is empty.
    fn advance(&mut self, ring: u32) {
        let next = self.rings.get_mut(&ring).and_then(|ring| ring.queue.pop_front());
        match next {
            Some(job) => self.make_ready(ring, job),
            None => drop(self.rings.remove(&ring)),
        }
    }
}
