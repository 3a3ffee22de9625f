//! Who runs next, who waits for what, and which flushes are open: plain state under the device's one lock.
//!
//! * Guests take turns, of a guest its VMs, and of a VM its ready rings. So a guest with many VMs gets the share of a
//!   guest with one, and a VM with many jobs that of a VM with one. What a VM needs to go away are turns too.
//! * A VM is in `turns` once, if it has something to run and may, or is to retire.
//! * Under this lock nothing is done that grows with what a guest has: its VMs, jobs, waiters.
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

mod waiters;

use super::mem::VmMemory;
use super::packet::{ActiveJob, Halt, SliceEnd};
use crate::addr::GpuAddr;
use crate::device::{Asid, Error, Fault, Flush, JobEnd, JobId, StopId, Ticket, Verdict, VmLabel};
use crate::numbered::Numbered;
use crate::sleepers::Sleepers;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::turns::{Place, Turns};
use std::collections::{BTreeMap, HashMap, VecDeque, btree_map, hash_map};
use std::time::{Duration, Instant};
use waiters::{Waiter, Waiters};

/// How often a semaphore is looked at that nobody on this device signals: the guest's CPU or another device may.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Most semaphores that are looked at in one interval, and most waiters that a signal wakes; with more of them each
/// waits longer.
const POLL_BATCH: usize = 256;

/// What stays the same of a GPU VM.
pub struct Vm {
    /// As the core named it.
    pub asid: Asid,
    /// Whose it is.
    pub label: VmLabel,
    /// Its memory.
    pub memory: VmMemory,
    /// Somebody waits for the engines in slices of it. A hint: a turn that another engine begins takes it back.
    pub hurry: AtomicBool,
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
    /// Takes the VM apart, as far as a slice goes, then calls [`Sched::end_retirement`].
    Retire(Arc<Vm>),
    /// Returns.
    Exit,
}

/// Until when an engine sleeps that has nothing to do: until it is woken or this time is over; then it calls
/// [`Sched::end_sleep`].
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
    /// Where it is in [`Sched::turns`].
    place: Option<Place>,
    frozen: bool,
    /// Threads that wait for the engines to leave its memory.
    barred: u32,
    /// Whether an engine takes it apart.
    retiring: bool,
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

/// Semaphores signalled by one guest.
#[derive(Default)]
struct Signals {
    /// GPU VMs of the guest: with the last one this goes too.
    vms: usize,
    sent: u64,
}

/// The state of all GPU VMs and engines of a device.
pub struct Sched {
    /// Whether a job that lacks a translation is parked at a fault; else it ends.
    parks: bool,
    vms: Numbered<Asid, VmState>,
    turns: Turns<Asid>,
    stops: Numbered<StopId, (Asid, u32)>,
    last_stop: u64,
    waiters: Waiters,
    next_poll: Option<Instant>,
    /// Semaphores signalled, by guest.
    signals: HashMap<Arc<str>, Signals>,
    epoch: u64,
    engines: Vec<Engine>,
    sleepers: Sleepers,
    /// An engine that is awake looks for work, and need not be woken for the first there is.
    looking: bool,
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
            vms: Numbered::default(),
            turns: Turns::default(),
            stops: Numbered::default(),
            last_stop: 0,
            waiters: Waiters::default(),
            next_poll: None,
            signals: HashMap::new(),
            epoch: 0,
            engines: vec![Engine::default(); usize::from(engines)],
            sleepers: Sleepers::default(),
            looking: false,
            poller: false,
            started: false,
            stopping: false,
        }
    }

    /// Lets engines work. Whether any sleep, who are to be woken.
    pub fn start(&mut self) -> bool {
        self.started = true;
        self.sleepers.call_all()
    }

    /// Makes engines return at their next checkpoint. Whether any sleep, who are to be woken.
    pub fn stop(&mut self) -> bool {
        self.stopping = true;
        self.sleepers.call_all()
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

    /// Whether a sleeping engine is to be woken for what there is to do.
    pub fn calls_engine(&mut self) -> bool {
        let needed = self.turns.len().saturating_sub(usize::from(self.looking));
        self.started && self.sleepers.call(needed)
    }

    /// Whether there is something for the engine that looks.
    pub fn calls_looker(&self) -> bool {
        self.looking && (self.stopping || !self.turns.is_empty())
    }

    /// An engine that found nothing is about to look for work, unless another one does or none may work yet.
    pub fn begin_look(&mut self) -> bool {
        self.started && !std::mem::replace(&mut self.looking, true)
    }

    /// It has looked.
    pub fn end_look(&mut self) {
        self.looking = false;
    }

    /// Adds a VM.
    pub fn vm_create(&mut self, vm: Arc<Vm>) -> Result<(), Error> {
        let hash_map::Entry::Vacant(free) = self.vms.entry(vm.asid) else {
            return Err(Error::VmExists(vm.asid.0));
        };
        let guest = self.signals.entry(Arc::clone(&vm.label.guest)).or_default();
        guest.vms = guest.vms.saturating_add(1);
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
        state.hurry();
        state.ready.clear();
        state.leave(&mut self.turns);
        let rings = std::mem::take(&mut state.rings);
        for (idx, ring) in &rings {
            match &ring.front {
                Front::Parked(stop, _) => drop(self.stops.remove(stop)),
                Front::Waiting(key, _) => self.waiters.remove(&state.vm.label.guest, (*key, asid, *idx)),
                Front::Ready(_) | Front::Running => {}
            }
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
                state.enqueue(&mut self.turns);
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
        state.enqueue(&mut self.turns);
    }

    /// Stops or lets go a VM.
    pub fn set_frozen(&mut self, asid: Asid, frozen: bool) -> Flush {
        let Some(state) = self.vms.get_mut(&asid) else { return Flush::Done };
        state.frozen = frozen;
        if frozen {
            state.freezes = state.freezes.wrapping_add(1);
            state.leave(&mut self.turns);
            // Nobody polls a frozen VM; its waiters look again after it is thawed.
            self.wake_vm(asid);
            return self.flush(asid);
        }
        state.enqueue(&mut self.turns);
        Flush::Done
    }

    /// Lets no engine into a VM's memory while its caller waits for those that are inside, or lets them in again.
    pub fn set_barred(&mut self, asid: Asid, barred: bool) {
        let Some(state) = self.vms.get_mut(&asid) else { return };
        if barred {
            state.barred = state.barred.saturating_add(1);
            state.hurry();
            state.leave(&mut self.turns);
        } else {
            state.barred = state.barred.saturating_sub(1);
            state.enqueue(&mut self.turns);
        }
        self.retire_if_idle(asid);
    }

    /// Whether somebody waits for engines to leave a VM's memory.
    #[cfg(test)]
    pub fn is_barred(&self, asid: Asid) -> bool {
        self.vms.get(&asid).is_some_and(|state| state.barred > 0)
    }

    /// Begins a flush of what was zapped before this call.
    pub fn flush(&mut self, asid: Asid) -> Flush {
        match self.vms.get_mut(&asid) {
            Some(state) if state.running > 0 => {
                self.epoch = self.epoch.saturating_add(1);
                state.tickets.push_back(self.epoch);
                state.hurry();
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

    /// What the engine is to do, if there is anything.
    pub fn next(&mut self, engine: u8) -> Option<Next> {
        if self.stopping {
            return Some(Next::Exit);
        }
        if !self.started {
            return None;
        }
        self.poll_waiters();
        while let Some(asid) = self.turns.pop() {
            let Some(state) = self.vms.get_mut(&asid) else { continue };
            state.place = None;
            if state.dying {
                state.retiring = true;
                return Some(Next::Retire(Arc::clone(&state.vm)));
            }
            let signals = self.signals.get(&state.vm.label.guest).map_or(0, |guest| guest.sent);
            let Some(turn) = state.take_turn(signals) else { continue };
            state.enqueue(&mut self.turns);
            let epoch = self.epoch;
            self.engine_mut(engine).slice = Some((asid, epoch));
            return Some(Next::Run(turn));
        }
        None
    }

    /// An engine that found nothing is about to sleep.
    pub fn sleep(&mut self) -> Nap {
        self.sleepers.lie_down();
        if self.poller || self.waiters.is_empty() {
            return Nap(None);
        }
        self.poller = true;
        let left = self.next_poll.map(|time| time.saturating_duration_since(Instant::now()));
        Nap(Some(left.unwrap_or(POLL_INTERVAL)))
    }

    /// An engine woke up.
    pub fn end_sleep(&mut self, nap: Nap) {
        self.sleepers.get_up();
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

    /// The engine has taken a VM apart; not all of it, if there is `more`. Whether it has retired.
    pub fn end_retirement(&mut self, asid: Asid, more: bool) -> bool {
        if more {
            self.state_mut(asid).retiring = false;
            self.retire_if_idle(asid);
            return false;
        }
        let Some(state) = self.vms.remove(&asid) else { return false };
        let guest = &state.vm.label.guest;
        if let Some(signals) = self.signals.get_mut(guest) {
            signals.vms = signals.vms.saturating_sub(1);
            if signals.vms == 0 {
                self.signals.remove(guest);
            }
        }
        true
    }

    /// Puts the job where it belongs after its slice.
    fn settle(&mut self, engine: u8, turn: Turn, halt: Halt) -> (Report, Option<Box<ActiveJob>>) {
        let Turn { vm, ring, mut job, seen, freezes } = turn;
        let (asid, parks) = (vm.asid, self.parks);
        let signals = self.signals.get(&vm.label.guest).map_or(0, |guest| guest.sent);
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
                self.waiters.insert(&report.vm.label.guest, (key, asid, ring));
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
        let Some(state) = self.vms.get_mut(&asid) else { return };
        if state.may_retire() {
            // Before others of its guest, which may be waiting for it.
            state.place = Some(self.turns.push_first(&state.vm.label.guest, asid));
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
            let guest = Arc::clone(&self.state_mut(asid).vm.label.guest);
            if let Some(signals) = self.signals.get_mut(&guest) {
                signals.sent = signals.sent.wrapping_add(1);
            }
            self.waiters.of_key(&guest, key, POLL_BATCH).into_iter().for_each(|waiter| self.wake(waiter));
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
        let waiters: Vec<_> = state.rings.iter().filter_map(key_of).collect();
        waiters.into_iter().for_each(|waiter| self.wake(waiter));
    }

    fn wake(&mut self, waiter: Waiter) {
        let (_, asid, ring) = waiter;
        let guest = Arc::clone(&self.state_mut(asid).vm.label.guest);
        self.waiters.remove(&guest, waiter);
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
            for _ in 0..POLL_BATCH {
                let Some(waiter) = self.waiters.next_look() else { break };
                self.wake(waiter);
            }
        }
        self.next_poll = now.checked_add(POLL_INTERVAL);
    }

    fn enqueue(&mut self, asid: Asid) {
        if let Some(state) = self.vms.get_mut(&asid) {
            state.enqueue(&mut self.turns);
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
            place: None,
            frozen: false,
            barred: 0,
            retiring: false,
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
    fn enqueue(&mut self, turns: &mut Turns<Asid>) {
        if self.place.is_none() && self.may_run() && !self.ready.is_empty() {
            self.place = Some(turns.push(&self.vm.label.guest, self.vm.asid));
        }
    }

    /// Takes the VM out of the queue.
    fn leave(&mut self, turns: &mut Turns<Asid>) {
        if let Some(place) = self.place.take() {
            turns.remove(&self.vm.label.guest, place);
        }
    }

    /// Asks its engines to end their slices soon.
    fn hurry(&self) {
        self.vm.hurry.store(true, Ordering::Relaxed);
    }

    fn may_run(&self) -> bool {
        let crowded = self.running > 0 && self.vm.memory.wants_reclaim();
        !self.frozen && self.barred == 0 && !self.dying && !crowded
    }

    fn may_retire(&self) -> bool {
        let quiet = self.running == 0 && self.reporting == 0 && self.barred == 0;
        self.dying && quiet && !self.retiring && self.place.is_none()
    }

    /// The next ready job, if the VM may run now.
    fn take_turn(&mut self, signals: u64) -> Option<Turn> {
        if !self.may_run() {
            return None;
        }
        let ring = self.ready.pop_front()?;
        let Some(Front::Ready(job)) = self.take_front(ring) else { panic!("ring {ring} is not ready") };
        self.running = self.running.saturating_add(1);
        self.vm.hurry.store(false, Ordering::Relaxed);
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
