//! All guests of a scenario on one host with three devices: what may happen next, what must hold, and the end.
//!
//! One thread and a clock that is moved by hand. An action is a request of a process, a step of a device, a look at the
//! event queue, an answer; the seed picks among those that are possible. When none is, time passes: what waits for
//! somebody who never comes runs out of it, paused guests go on, and who was late comes.

use crate::agent::{Habit, Lie};
use crate::driver::Driver;
use crate::guest::{Boot, LIMITS, Sim};
use crate::machine::Machine;
use crate::mock::{table, unmap};
use crate::process::{Life, Owed, PAGES, Process};
use crate::ram::Ram;
use crate::random::Random;
use std::sync::Arc;
use std::time::Duration;
use virtio_gpu_svm::clock::{Manual, Source};
use virtio_gpu_svm::device::{AddressModel, Device, FaultModel, VmLabel};
use virtio_gpu_svm::host::Host;

/// Times that nothing can go on before a scenario has failed.
const PATIENCE: u32 = 40;
/// Actions between two looks at everything.
const LOOK: u64 = 24;
/// Where processes show their memory on the first device.
const WINDOW: u64 = 0x4_0002_0000;

#[derive(Clone, Copy, Debug)]
enum Action {
    Boot(usize),
    Ask(usize, usize),
    Fetch(usize),
    Answer(usize),
    Step(usize),
    Pass(usize),
    Retire(usize),
}

/// What comes in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// HELLO of a new incarnation.
    NewLife,
    /// The rings stop for longer than the deadline and go on.
    Pause,
    /// The rings start from nothing, and not with HELLO.
    RingsAnew,
    /// The VMM resets the device; HELLO follows.
    DeviceReset,
    SessionEnds,
    /// The same memory table once more.
    SameMemory,
    /// All memory is taken away, and given back.
    MemoryComesBack,
    /// The operator drops all translations.
    Evict,
    /// From now on engines are late with their checkpoints.
    EnginesLate,
    /// A call into the first device for the first process fails: the n-th from now.
    DeviceRefuses(u32),
    /// The agent comes back when the deadline has passed.
    AgentLate,
    AgentDies,
    /// Of the first process.
    Exit,
    CloseVm,
    Unmap,
    /// About a fault that waits for its answer, or about none.
    Lie(Lie),
}

impl Disturbance {
    pub fn all() -> Vec<Self> {
        use Disturbance::*;
        let plain = [
            NewLife,
            Pause,
            RingsAnew,
            DeviceReset,
            SessionEnds,
            SameMemory,
            MemoryComesBack,
            Evict,
            EnginesLate,
            DeviceRefuses(0),
            DeviceRefuses(1),
            DeviceRefuses(3),
            AgentLate,
            AgentDies,
            Exit,
            CloseVm,
            Unmap,
        ];
        plain.into_iter().chain(crate::agent::Lie::ALL.map(Lie)).collect()
    }
}

/// What was seen, so that a run can show that it has met what it is about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub actions: u64,
    pub faults: u64,
    pub failed_jobs: u64,
    pub stale_answers: u64,
    pub throttled: u64,
}

/// A host with its devices and its time.
#[derive(Clone)]
pub struct Stage {
    host: Arc<Host>,
    clock: Arc<Manual>,
    machines: [Arc<Machine>; 3],
}

impl Stage {
    pub fn new() -> Self {
        use {AddressModel::*, FaultModel::*};
        let machines = [(0, Replayable, Any), (1, None, Any), (2, Replayable, Identity)]
            .map(|(index, faults, addresses)| Arc::new(Machine::new(index, faults, addresses)));
        let clock = Arc::new(Manual::default());
        let devices = machines.iter().map(|machine| Arc::clone(machine) as Arc<dyn Device>).collect();
        let host = Host::with_clock(devices, Arc::clone(&clock) as Arc<dyn Source>);
        Self { host, clock, machines }
    }
}

pub struct World {
    host: Arc<Host>,
    clock: Arc<Manual>,
    machines: [Arc<Machine>; 3],
    pub guests: Vec<Sim>,
    pub random: Random,
    actions: u64,
    idle: u32,
}

impl World {
    /// Guests on these memories, with so many processes each.
    pub fn new(seed: u64, stage: &Stage, rams: &[Ram], processes: &[u32]) -> Self {
        let Stage { host, clock, machines } = stage.clone();
        let guests = (1..).zip(processes).zip(rams);
        let guests = guests.map(|((index, count), ram)| Sim::new(&host, index, ram, *count)).collect();
        Self { host, clock, machines, guests, random: Random::new(seed), actions: 0, idle: 0 }
    }

    fn possible(&self) -> Vec<Action> {
        let mut possible = Vec::new();
        for (at, guest) in self.guests.iter().enumerate() {
            if guest.boot != Boot::Up && !guest.paused {
                possible.push(Action::Boot(at));
            }
            if !guest.is_up() {
                continue;
            }
            let asking = (0..guest.processes.len()).filter(|n| guest.processes[*n].can_go());
            possible.extend(asking.map(|n| Action::Ask(at, n)));
            if guest.driver().0.has_events() {
                possible.push(Action::Fetch(at));
            }
            if guest.can_answer() {
                possible.push(Action::Answer(at));
            }
        }
        for (at, machine) in self.machines.iter().enumerate() {
            let may = [machine.is_ready(), machine.has_unpassed(), machine.has_dying()];
            let actions = [Action::Step(at), Action::Pass(at), Action::Retire(at)];
            possible.extend(actions.into_iter().zip(may).filter(|(_, may)| *may).map(|(action, _)| action));
        }
        possible
    }

    /// Does one of the things that are possible, or lets time pass. Whether there is more to do.
    pub fn go(&mut self) -> bool {
        let possible = self.possible();
        if possible.is_empty() {
            return self.let_time_pass();
        }
        let action = self.random.pick(&possible);
        self.act(action);
        self.host.work_off();
        self.actions += 1;
        if self.actions.is_multiple_of(LOOK) {
            self.look();
        }
        true
    }
    fn act(&mut self, action: Action) {
        let Self { host, machines, guests, random, .. } = self;
        match action {
            Action::Boot(at) => guests[at].go_up(),
            Action::Ask(at, process) => guests[at].go(process, random),
            Action::Fetch(at) => guests[at].fetch(machines, random),
            Action::Answer(at) => {
                let elsewhere = elsewhere(guests, at);
                guests[at].answer(elsewhere.as_ref(), random);
            }
            Action::Step(at) => machines[at].step(host, random.index(8)),
            Action::Pass(at) => machines[at].pass(host),
            Action::Retire(at) => machines[at].retire(host),
        }
    }
    fn let_time_pass(&mut self) -> bool {
        if self.guests.iter().all(Sim::is_over) {
            return false;
        }
        self.idle += 1;
        assert!(self.idle < PATIENCE, "nothing can go on: {:?}", self.stuck());
        self.clock.advance(Duration::from_millis(LIMITS.fault_deadline_ms.into()));
        self.host.expire_faults();
        self.host.work_off();
        for guest in &mut self.guests {
            if std::mem::take(&mut guest.paused) {
                guest.driver().0.thaw();
            }
            guest.asleep = false;
            if std::mem::take(&mut guest.dying) {
                guest.habit = Habit::Honest;
                guest.begin_anew(Boot::Up);
            }
        }
        true
    }
    fn stuck(&self) -> Vec<String> {
        let of = |guest: &Sim| {
            let contexts = guest.driver().0.contexts();
            let waits: Vec<_> = guest.processes.iter().map(|p| (p.ctx_id, p.life, p.next())).collect();
            format!("{} {:?} {waits:?} {} open, {contexts:?}", guest.name, guest.boot, guest.open.len())
        };
        self.guests.iter().map(of).collect()
    }

    /// What waits for engines is done with all checkpoints passed.
    fn waits(&mut self, act: impl FnOnce(&mut Self)) {
        let busy = self.machines.each_ref().map(|machine| machine.set_busy(false));
        self.pass_all();
        act(self);
        for (machine, busy) in self.machines.iter().zip(busy) {
            machine.set_busy(busy);
        }
    }
    fn pass_all(&self) {
        for machine in &self.machines {
            machine.pass(&self.host);
            machine.retire(&self.host);
        }
    }

    /// Disturbs a guest.
    pub fn disturb(&mut self, at: usize, disturbance: Disturbance) {
        use Disturbance::*;
        match disturbance {
            NewLife if self.guests[at].boot == Boot::Up => self.guests[at].begin_anew(Boot::Up),
            NewLife => {}
            Pause => {
                self.waits(|world| world.guests[at].driver().0.freeze());
                self.guests[at].paused = true;
            }
            RingsAnew => {
                self.waits(|world| world.guests[at].driver().0.freeze());
                self.guests[at].driver().0.reset();
                self.guests[at].begin_anew(Boot::NoHello);
            }
            DeviceReset => {
                self.waits(|world| world.guests[at].driver().0.freeze());
                self.guests[at].begin_anew(Boot::NoHello);
            }
            SessionEnds => self.end_session(at, true),
            SameMemory => self.waits(|world| {
                let guest = &world.guests[at];
                guest.driver().0.set_memory(guest.driver().0.memory());
            }),
            MemoryComesBack => self.waits(|world| {
                let guest = &world.guests[at].driver().0;
                let memory = guest.memory();
                guest.set_memory(table(&[]));
                guest.set_memory(memory);
            }),
            AgentLate => self.guests[at].asleep = true,
            AgentDies => {
                (self.guests[at].asleep, self.guests[at].dying) = (true, true);
                self.guests[at].owe_nobody();
            }
            EnginesLate => self.machines.iter().for_each(|machine| _ = machine.set_busy(true)),
            Lie(lie) => {
                let elsewhere = elsewhere(&self.guests, at);
                let open = self.guests[at].open.first().copied();
                let open = open.filter(|open| self.guests[at].can_be_told(open));
                let pending = self.guests[at].lie(lie, open.as_ref(), elsewhere.as_ref(), &mut self.random);
                if open.is_some() && !pending {
                    self.guests[at].open.remove(0);
                }
            }
            Evict | DeviceRefuses(_) | Exit | CloseVm | Unmap => self.disturb_process(at, disturbance),
        }
        if disturbance == AgentLate {
            self.guests[at].owe_nobody();
        }
        self.host.work_off();
        self.look();
    }
    /// What concerns the first process, or its translations.
    fn disturb_process(&mut self, at: usize, disturbance: Disturbance) {
        let Self { host, machines, guests, .. } = self;
        let guest = &mut guests[at];
        let driver = Driver(Arc::clone(&guest.driver().0));
        let process = &mut guest.processes[0];
        let (ctx_id, generation) = (process.ctx_id, process.generation);
        let label = VmLabel { guest: guest.name.as_str().into(), ctx_id, generation };
        if guest.boot != Boot::Up || process.life != Life::Lives || !process.has_begun() {
            return;
        }
        match disturbance {
            Disturbance::Evict => _ = driver.0.evict(process.ctx_id, None).unwrap(),
            Disturbance::DeviceRefuses(calls) => {
                process.owed = Owed::Ends;
                machines[0].fail_after(label, calls);
            }
            Disturbance::Exit => exit(process, &driver),
            Disturbance::CloseVm => close_vm(process, &driver),
            _ => unmap_all(process, &driver),
        }
        host.work_off();
    }
    /// The VMM leaves. As a session does it, but that engines let go in between.
    fn end_session(&mut self, at: usize, again: bool) {
        self.waits(|world| {
            let guest = Arc::clone(&world.guests[at].driver().0);
            guest.reset();
            world.pass_all();
            guest.close();
        });
        if again {
            self.guests[at].reconnect(&self.host);
        }
    }

    /// What must hold between any two actions.
    pub fn look(&self) {
        let stats = self.host.stats();
        let n = stats.counters;
        let contexts: Vec<_> = self.guests.iter().flat_map(|guest| guest.driver().0.contexts()).collect();
        let vms = || contexts.iter().flat_map(|context| &context.vms);
        let waiters: usize = vms().flat_map(|vm| &vm.faults).map(|fault| fault.waiters).sum();
        let jobs: usize = contexts.iter().map(|context| context.jobs).sum();
        let count = |n: usize| u64::try_from(n).unwrap();
        let ended = n.faults_served_locally + n.faults_answered + n.faults_refused + n.faults_dropped;
        let ended = ended + n.faults_throttled;
        assert_eq!(n.faults_raised, ended + count(waiters), "faults raised, and ended or waiting: {n:?}");
        let raised: u64 = self.machines.iter().map(|machine| machine.raised()).sum();
        assert_eq!(n.faults_raised, raised, "faults counted, and raised by devices");
        let ended = n.jobs_done + n.jobs_failed + n.jobs_dropped;
        assert_eq!(n.jobs_submitted, ended + count(jobs), "jobs submitted, and ended or in flight: {n:?}");
        assert_eq!(stats.pending_vms, vms().filter(|vm| vm.pending_faults > 0).count());
        for context in &contexts {
            self.look_at(context);
        }
    }
    /// A device holds only pages that the process has.
    fn look_at(&self, context: &virtio_gpu_svm::info::ContextStatus) {
        let guest = self.guests.iter().find(|guest| guest.name == context.guest).unwrap();
        let Some(process) = guest.process(context.ctx_id) else { return };
        // A life that was not told yet that it is over has contexts of the same ids.
        if guest.is_spoilt() || process.generation != context.generation {
            return;
        }
        for vm in &context.vms {
            for (page, gpa_page, _) in self.machines[vm.device].bound(vm.asid) {
                let cpu = Process::cpu_addr(vm.device, page * 4096);
                let at = usize::try_from((cpu - crate::process::A) / 4096).unwrap();
                let has = process.pages[at].gpa / 4096;
                assert_eq!(gpa_page, has, "page {at} of {} {}", context.guest, context.ctx_id);
                assert!(process.pages[at].moving.is_none(), "page {at} is bound and was withdrawn");
            }
        }
    }

    /// Runs to the end, takes everything down, and looks for what is left.
    pub fn finish(mut self) -> Seen {
        while self.go() {}
        self.look();
        assert_eq!(self.machines.iter().map(|machine| machine.parked()).sum::<usize>(), 0);
        (0..self.guests.len()).for_each(|at| self.end_session(at, false));
        self.machines.iter().for_each(|machine| machine.assert_empty());
        for device in self.host.devices() {
            assert_eq!((device.gpu_vms, device.retiring), (0, 0), "asids that do not come back: {device:?}");
        }
        let stats = self.host.stats();
        assert_eq!((stats.guests, stats.contexts, stats.gpu_vms, stats.pending_vms), (0, 0, 0, 0));
        self.guests.iter().for_each(Sim::assert_freed_untouched);
        let n = stats.counters;
        let ended = n.faults_served_locally + n.faults_answered + n.faults_refused + n.faults_dropped;
        assert_eq!(n.faults_raised, ended + n.faults_throttled, "a fault has no end: {n:?}");
        assert_eq!(n.jobs_submitted, n.jobs_done + n.jobs_failed + n.jobs_dropped, "a job has no end: {n:?}");
        Seen {
            actions: self.actions,
            faults: n.faults_raised,
            failed_jobs: n.jobs_failed,
            stale_answers: n.answers_stale,
            throttled: n.faults_throttled,
        }
    }
}

fn elsewhere(guests: &[Sim], at: usize) -> Option<Driver> {
    let other = (0..guests.len()).find(|other| *other != at)?;
    Some(Driver(Arc::clone(&guests[other].driver().0)))
}

/// A process' context is destroyed, whatever it waits for.
pub fn exit(process: &mut Process, driver: &Driver) {
    process.owed = Owed::Ends;
    assert_eq!(driver.destroy_context(process.ctx_id), 0);
    process.left();
}

/// Its GPU VM on the first device goes, with all that runs there.
pub fn close_vm(process: &mut Process, driver: &Driver) {
    process.owed = Owed::Ends;
    if let Some(vm) = process.vms[0].take() {
        assert_eq!(driver.destroy_vm(process.ctx_id, vm.vm_id), 0);
    }
}

/// Its memory is taken out of its GPU VM on the first device, with faults there that wait.
pub fn unmap_all(process: &mut Process, driver: &Driver) {
    process.owed = Owed::Ends;
    if let Some(vm) = &process.vms[0] {
        assert_eq!(driver.bind(process.ctx_id, vm.vm_id, &[unmap(WINDOW, PAGES)]), 0);
    }
}
