//! A guest in a scenario: its memory, its driver and agent, its processes, and what the device tells it.

use crate::agent::{Habit, Open};
use crate::driver::Driver;
use crate::machine::Machine;
use crate::process::{Life, Owed, Process, program};
use crate::ram::{Ram, mix};
use crate::random::Random;
use std::collections::BTreeMap;
use std::sync::Arc;
use virtio_gpu_svm::guest::EventPort;
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::protocol::event::*;
use zerocopy::FromBytes;

/// Few pending faults, so that accesses are throttled.
pub const LIMITS: Limits = Limits {
    contexts: 16,
    pending_faults: 3,
    jobs: 16,
    mappings: 16,
    resources: 4,
    fault_deadline_ms: 5000,
    ..Limits::DEFAULT
};

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

/// How far its driver has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boot {
    NoMemory,
    NoHello,
    Up,
}

/// One guest.
pub struct Sim {
    pub name: String,
    pub ram: Ram,
    driver: Driver,
    pub boot: Boot,
    incarnation: u64,
    quiet_due: bool,
    pub processes: Vec<Process>,
    /// Of earlier lives, until no engine uses them.
    old: Vec<Process>,
    /// Faults to be answered.
    pub open: Vec<Open>,
    /// By context, the first record of a group that is not told to its end, and how many there were.
    building: BTreeMap<u32, (FaultRecord, u64)>,
    /// (context, cookie) of what was answered.
    pub stale: Vec<(u32, u64)>,
    pub habit: Habit,
    /// The agent does nothing until nothing else can go on.
    pub asleep: bool,
    /// And then another takes its place.
    pub dying: bool,
    pub paused: bool,
    /// Its agent gave pages of one process to another.
    spoilt: bool,
    /// Pages that nobody owns.
    freed: Vec<u64>,
    salt: u64,
}

impl Sim {
    pub fn new(host: &Arc<Host>, index: u64, ram: &Ram, processes: u32) -> Self {
        let name = format!("guest{index}");
        let driver = Driver(host.open_guest(name.as_str(), LIMITS, &[0, 1, 2], Arc::new(Silent)));
        let mut sim = Self {
            name,
            ram: ram.again(),
            driver,
            boot: Boot::NoMemory,
            incarnation: 0,
            quiet_due: false,
            processes: Vec::new(),
            old: Vec::new(),
            open: Vec::new(),
            building: BTreeMap::new(),
            stale: Vec::new(),
            habit: Habit::Honest,
            asleep: false,
            dying: false,
            paused: false,
            spoilt: false,
            freed: Vec::new(),
            salt: mix(index, 7, 7),
        };
        sim.make_processes(processes);
        sim
    }
    fn make_processes(&mut self, count: u32) {
        for ctx_id in 1..=count {
            let salt = mix(self.salt, ctx_id.into(), self.incarnation);
            let other =
                if (ctx_id + u32::try_from(self.incarnation & 1).unwrap()).is_multiple_of(2) { 2 } else { 1 };
            let process = Process::new(ctx_id, salt, program(other), &mut self.ram);
            self.processes.push(process);
        }
    }
    pub fn driver(&self) -> &Driver {
        &self.driver
    }
    pub fn is_spoilt(&self) -> bool {
        self.spoilt
    }
    pub fn is_up(&self) -> bool {
        self.boot == Boot::Up && !self.paused
    }
    pub fn process(&self, ctx_id: u32) -> Option<&Process> {
        self.processes.iter().find(|process| process.ctx_id == ctx_id)
    }
    pub fn process_mut(&mut self, ctx_id: u32) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.ctx_id == ctx_id)
    }
    pub fn is_over(&self) -> bool {
        let gone = |process: &Process| process.life == Life::Gone;
        self.processes.iter().all(gone) && self.old.is_empty() && !self.quiet_due
    }
    /// A process, or all, can count on ends only.
    pub fn owe_nothing_more(&mut self, ctx_id: u32, all: bool) {
        self.spoilt |= all;
        for process in self.processes.iter_mut().filter(|process| all || process.ctx_id == ctx_id) {
            process.owed = Owed::Ends;
        }
    }
    pub fn owe_nobody(&mut self) {
        self.processes.iter_mut().for_each(|process| process.owed = Owed::Ends);
    }

    /// The next step of its start.
    pub fn go_up(&mut self) {
        match self.boot {
            Boot::NoMemory => {
                self.driver.0.set_memory(self.ram.table());
                self.boot = Boot::NoHello;
            }
            Boot::NoHello => {
                self.greet();
                self.boot = Boot::Up;
            }
            Boot::Up => {}
        }
    }
    /// A driver's first word. Nothing of an earlier life is there any more, or QUIET will tell.
    fn greet(&mut self) {
        self.incarnation += 1;
        self.quiet_due = self.driver.hello(self.incarnation) > 0;
        if !self.quiet_due {
            self.bury_old();
        }
    }
    /// Its driver begins anew: with HELLO at once, or as a guest that starts.
    pub fn begin_anew(&mut self, boot: Boot) {
        let count = u32::try_from(self.processes.len()).unwrap();
        let left =
            std::mem::take(&mut self.processes).into_iter().filter(|process| process.life != Life::Gone);
        for mut process in left {
            process.owed = Owed::Ends;
            process.life = Life::Leaves;
            self.old.push(process);
        }
        self.open.clear();
        self.building.clear();
        (self.asleep, self.dying, self.paused) = (false, false, false);
        if self.boot != Boot::NoMemory {
            self.boot = boot;
        }
        if self.boot == Boot::Up {
            self.greet();
        }
        self.make_processes(count);
        if !self.habit.serves() {
            self.owe_nobody();
        }
    }
    /// Its session is over, and the next one begins.
    pub fn reconnect(&mut self, host: &Arc<Host>) {
        self.quiet_due = false;
        self.boot = Boot::NoMemory;
        self.begin_anew(Boot::NoMemory);
        self.bury_old();
        self.driver = Driver(host.open_guest(self.name.as_str(), LIMITS, &[0, 1, 2], Arc::new(Silent)));
    }
    fn bury_old(&mut self) {
        for process in std::mem::take(&mut self.old) {
            self.bury(&process);
        }
    }
    /// No engine uses a process' memory any more: what it holds must be its own, and stays untouched from now on.
    fn bury(&mut self, process: &Process) {
        if self.spoilt {
            return;
        }
        process.check(&self.ram);
        for page in &process.pages {
            self.ram.free(page.gpa);
            self.freed.push(page.gpa);
        }
    }
    pub fn assert_freed_untouched(&self) {
        if !self.spoilt {
            self.freed.iter().for_each(|gpa| self.ram.assert_free(*gpa));
        }
    }

    /// A process makes its next request.
    pub fn go(&mut self, at: usize, random: &mut Random) {
        self.processes[at].go(&self.driver, random);
        self.settle();
    }
    fn settle(&mut self) {
        for process in &mut self.processes {
            for gpa in process.settle(&mut self.ram) {
                self.ram.free(gpa);
                self.freed.push(gpa);
            }
        }
    }

    /// Takes what the device has to tell.
    pub fn fetch(&mut self, machines: &[Arc<Machine>; 3], random: &mut Random) {
        let room = size_of::<EventHdr>() + EVENT_RECORD_BYTES * (1 + random.index(4));
        for record in self.driver.fetch(room) {
            let notice = NoticeRecord::read_from_bytes(&record).unwrap();
            match notice.kind.get() {
                EVENT_FAULT => self.on_fault(FaultRecord::read_from_bytes(&record).unwrap(), machines),
                EVENT_JOB_DONE | EVENT_BIND_DONE => {
                    let job = JobRecord::read_from_bytes(&record).unwrap();
                    self.living(job.ctx_id.get()).ended(&job);
                }
                _ => self.on_notice(&notice),
            }
        }
        self.settle();
    }
    fn living(&mut self, ctx_id: u32) -> &mut Process {
        let name = self.name.clone();
        let process = self.process_mut(ctx_id).filter(|process| process.life == Life::Lives);
        process.unwrap_or_else(|| panic!("{name} is told of context {ctx_id}, which it has not"))
    }
    /// What the device says of the asid decides whose fault it is.
    fn on_fault(&mut self, record: FaultRecord, machines: &[Arc<Machine>; 3]) {
        let device = usize::try_from(record.dev_id.get()).unwrap();
        let owner =
            machines[device].owner(record.asid.get()).unwrap_or_else(|| panic!("no owner: {record:?}"));
        let (ctx_id, name) = (record.ctx_id.get(), self.name.clone());
        let process = self.living(ctx_id);
        let of = (&*owner.guest, owner.ctx_id, owner.generation);
        assert_eq!((&*name, ctx_id, process.generation), of, "told of another's fault: {record:?}");
        let vm =
            process.vm_of(device, record.asid.get()).unwrap_or_else(|| panic!("no such GPU VM: {record:?}"));
        assert_eq!(vm.vm_id, record.vm_id.get());
        assert_eq!(Process::cpu_addr(device, record.addr.get()), record.cpu_addr.get(), "{record:?}");
        let (first, count) = match self.building.remove(&ctx_id) {
            Some((first, count)) if first.cookie == record.cookie => (first, count + 1),
            _ => (record, 1),
        };
        if record.flags.get() & FAULT_LAST_PAGE == 0 {
            self.building.insert(ctx_id, (first, count));
            return;
        }
        let again = self.open.iter().any(|open| open.record.cookie == record.cookie);
        assert!(!again && !self.stale.contains(&(ctx_id, record.cookie.get())), "told twice: {record:?}");
        self.open.push(Open::new(first, count));
    }
    fn on_notice(&mut self, notice: &NoticeRecord) {
        let (ctx_id, value) = (notice.ctx_id.get(), notice.value.get());
        match notice.kind.get() {
            EVENT_INVAL_DONE => {
                let process = self.living(ctx_id);
                assert!((process.done_seq..=process.seq).contains(&value), "{notice:?}");
                process.done_seq = value;
            }
            EVENT_CONTEXT_LOST => {
                assert_eq!(self.living(ctx_id).owed, Owed::Ends, "lost: {notice:?}");
            }
            EVENT_CONTEXT_RETIRED => {
                let at = self.processes.iter().position(|process| process.ctx_id == ctx_id).unwrap();
                let mut process = self.processes.remove(at);
                assert_eq!(process.life, Life::Leaves, "retired: {notice:?}");
                process.life = Life::Gone;
                self.bury(&process);
                self.processes.insert(at, process);
            }
            EVENT_QUIET => {
                assert!(std::mem::take(&mut self.quiet_due), "quiet, and nobody asked");
                assert_eq!(value, self.incarnation);
                self.bury_old();
            }
            kind => panic!("a record of kind {kind}"),
        }
    }
}
