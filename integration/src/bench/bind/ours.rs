//! Our daemon and a guest whose process has pages told, bound and withdrawn.

use super::{DEPTH, memory_for, run, runs};
use crate::bench::Bench;
use crate::bench::events::{Events, Record};
use crate::bench::ring::{Driver, Wait};
use crate::bench::script::{Answer, Script};
use crate::bench::svm::{Daemon, accepted, create_process, property};
use crate::frontend::ram::GuestRam;
use crate::wire;
use anyhow::{Context, Result, bail, ensure};
use guest_agent::client::packet;
use rustix::thread::CpuSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::request::{BIND_IMMEDIATE, BIND_OP_MAP_USERPTR, BIND_OP_UNMAP, BindOp};
use vm_memory::VolatileMemory;

const CTX: u32 = 1;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Where a job is busy, apart from what is bound and withdrawn.
const JOB_A: u64 = 0x6000_0000_0000;
const JOB_C: u64 = 0x10_0000_0000;
/// What a VM_BIND may ask to be made resident.
const BIND_PAGES: u64 = 65_536;
/// Runs of a SUPPLY.
const RUNS: usize = 4096;
const LEAF: u64 = 2 << 20;
const ROOM: u64 = 128;
const RUN_WORDS: usize = size_of::<PageRun>() / size_of::<u64>();

/// What is bound, and how it is withdrawn.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Pages of an operation.
    pub pages: u64,
    /// Pages that are in one piece.
    pub run: u64,
    /// The last commands of it.
    pub withdrawal: Withdrawal,
}

/// How pages are withdrawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawal {
    /// One INVALIDATE of all.
    Whole,
    /// One of the middle half, and one of all.
    Overlapping,
    /// VM_BIND with UNMAP, and one INVALIDATE, which is not counted.
    Unmap,
}

/// See the module.
pub struct Ours {
    _daemon: Daemon,
    driver: Driver,
    script: Script,
    lists: Lists,
    shape: Shape,
    vm_id: u32,
    /// Of the script.
    operations: usize,
}

/// Where each `as_of` stands, so that it can be written.
struct Lists {
    ram: Arc<GuestRam>,
    /// By command.
    commands: Vec<Kind>,
    invalidations: u64,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Guest-physical address of the first `as_of`, and how many there are, a run apart.
    Supply {
        first: u64,
        count: usize,
    },
    Bind,
    Unmap,
    Invalidate,
}

/// Seconds of an operation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phases {
    /// SUPPLY and VM_BIND.
    pub bind: f64,
    /// What withdraws.
    pub withdraw: f64,
}

impl Lists {
    /// Of a command that comes next.
    fn prepare(&mut self, place: usize) -> Result<()> {
        match self.commands.get(place).copied().context("no such command")? {
            Kind::Bind | Kind::Unmap => {}
            Kind::Invalidate => self.invalidations += 1,
            Kind::Supply { first, count } => {
                let words = (count - 1) * RUN_WORDS + 1;
                let words = self.ram.slice(first, (words * size_of::<u64>()) as u64)?;
                let words = words.get_array_ref::<u64>(0, words.len() / size_of::<u64>())?;
                for word in (0..).step_by(RUN_WORDS).take(count) {
                    words.store(word, self.invalidations);
                }
            }
        }
        Ok(())
    }
}

impl Ours {
    /// A daemon on a core, and all operations carried out once.
    ///
    /// # Errors
    /// The daemon refuses, or pages are not bound when they should be.
    pub fn new(bench: &Bench, core: CpuSet, shape: Shape) -> Result<Self> {
        let daemon = Daemon::launch(bench, core, 1, "")?;
        let wait = if bench.cores.are_two() { Wait::Polling } else { Wait::Blocking };
        let mut driver = daemon.connect(0, memory_for(shape.run), wait)?;
        let vm_id = create_process(&mut driver, CTX)?;
        let lists = Lists { ram: driver.ram().clone(), commands: vec![], invalidations: 0 };
        let script = Script::default();
        let mut ours = Self { _daemon: daemon, driver, script, lists, shape, vm_id, operations: 0 };
        let bound = ours.add()?;
        for _ in 0..=DEPTH / ours.script.len() {
            ours.add()?;
        }
        ours.check(bound)?;
        Ok(ours)
    }

    /// Adds one operation. After how many of its commands all is bound.
    fn add(&mut self) -> Result<usize> {
        let Shape { pages, run, withdrawal } = self.shape;
        let bytes = pages * PAGE_SIZE;
        let from = self.operations as u64 * bytes.next_multiple_of(LEAF);
        for runs in runs(self.driver.ram(), A + from, pages, run).chunks(RUNS) {
            let supply = if run == 1 { wire::supply_list(CTX, runs) } else { wire::supply(CTX, runs) };
            let list = self.driver.place(&supply)?;
            self.script.add(&self.driver, &[list], ROOM, Answer::Accepted)?;
            let (first, count) = match run {
                1 => (wire::LIST_AS_OF, 1),
                _ => (wire::SUPPLY_RUNS + wire::AS_OF, runs.len()),
            };
            self.lists.commands.push(Kind::Supply { first: list.at + first, count });
        }
        for first in (0..pages).step_by(usize::try_from(BIND_PAGES)?) {
            let offset = from + first * PAGE_SIZE;
            let some = BIND_PAGES.min(pages - first) * PAGE_SIZE;
            let bind = map(C + offset, A + offset, some, BIND_IMMEDIATE);
            self.push(&wire::bind(CTX, self.vm_id, &[bind]), Kind::Bind)?;
        }
        let bound = self.script.len();
        match withdrawal {
            Withdrawal::Whole => {}
            Withdrawal::Overlapping => {
                let quarter = (pages / 4).max(1) * PAGE_SIZE;
                let middle = wire::invalidate(CTX, A + from + quarter, 2 * quarter);
                self.push(&middle, Kind::Invalidate)?;
            }
            Withdrawal::Unmap => {
                let (op, addr, range) = (BIND_OP_UNMAP.into(), (C + from).into(), bytes.into());
                let unmap = BindOp { op, addr, range, ..BindOp::default() };
                self.push(&wire::bind(CTX, self.vm_id, &[unmap]), Kind::Unmap)?;
            }
        }
        self.push(&wire::invalidate(CTX, A + from, bytes), Kind::Invalidate)?;
        self.operations += 1;
        Ok(bound)
    }

    fn push(&mut self, command: &[u8], kind: Kind) -> Result<()> {
        let command = self.driver.place(command)?;
        self.script.add(&self.driver, &[command], ROOM, Answer::Accepted)?;
        self.lists.commands.push(kind);
        Ok(())
    }

    /// Carries all out once, and looks whether all pages are there when they should be.
    fn check(&mut self, bound: usize) -> Result<()> {
        for place in 0..self.script.len() {
            if place == bound {
                let resident = property(&mut self.driver, CTX, self.vm_id)?.resident_pages.get();
                ensure!(resident == self.shape.pages, "{resident} of {} pages are bound", self.shape.pages);
            }
            self.lists.prepare(place)?;
            self.script.step(&mut self.driver.rings[0])?;
        }
        let resident = property(&mut self.driver, CTX, self.vm_id)?.resident_pages.get();
        ensure!(resident == 0, "{resident} pages are left");
        Ok(())
    }

    /// Pages a second, of whole operations.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn rate(&mut self, depth: usize, slice: Duration) -> Result<f64> {
        let lists = &mut self.lists;
        let ring = &mut self.driver.rings[0];
        let done = run(&mut self.script, ring, depth, slice, |place| lists.prepare(place))?;
        let commands = self.script.len() / self.operations;
        Ok(self.shape.pages as f64 / (done.seconds_each() * commands as f64))
    }

    /// What each phase of an operation takes, one command at a time.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn phases(&mut self, slice: Duration) -> Result<Phases> {
        let (begin, mut phases, mut passes) = (Instant::now(), Phases::default(), 0);
        while begin.elapsed() < slice {
            for place in 0..self.script.len() {
                self.lists.prepare(place)?;
                let seconds = self.script.step(&mut self.driver.rings[0])?.as_secs_f64();
                match (self.lists.commands[place], self.shape.withdrawal) {
                    (Kind::Supply { .. } | Kind::Bind, _) => phases.bind += seconds,
                    (Kind::Invalidate, Withdrawal::Unmap) => {}
                    (Kind::Unmap | Kind::Invalidate, _) => phases.withdraw += seconds,
                }
            }
            passes += self.operations;
        }
        let each = |seconds: f64| seconds / passes as f64;
        Ok(Phases { bind: each(phases.bind), withdraw: each(phases.withdraw) })
    }

    /// Starts a job that walks along a list which leads to itself, so that flushes have an engine to wait for. The event
    /// queue is posted, and given back.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn start_job(&mut self) -> Result<Events> {
        let events = Events::post(&mut self.driver)?;
        let gpa = self.driver.ram().take_pages(1)?[0] * PAGE_SIZE;
        self.driver.ram().store(gpa, JOB_C)?;
        let (va, gpa, pages, as_of) = (JOB_A.into(), gpa.into(), 1.into(), self.lists.invalidations.into());
        let run = PageRun { va, gpa, pages, as_of, ..PageRun::default() };
        accepted(&mut self.driver, &wire::supply(CTX, &[run]))?;
        let mapping = map(JOB_C, JOB_A, PAGE_SIZE, 0);
        accepted(&mut self.driver, &wire::bind(CTX, self.vm_id, &[mapping]))?;
        let endless = packet::chase(JOB_C + 64, JOB_C, u64::MAX, 0);
        accepted(&mut self.driver, &wire::exec(CTX, self.vm_id, 0, &[endless]))?;
        Ok(events)
    }

    /// Whether the job goes on.
    ///
    /// # Errors
    /// It does not.
    pub fn check_job(&mut self) -> Result<()> {
        let jobs = property(&mut self.driver, CTX, self.vm_id)?.num_jobs.get();
        ensure!(jobs == 1, "{jobs} jobs are there");
        Ok(())
    }

    /// Seconds from an INVALIDATE of what is bound to its INVAL_DONE record, of each operation.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn flush(&mut self, events: &mut Events, slice: Duration) -> Result<f64> {
        let (begin, mut seconds, mut flushes) = (Instant::now(), 0.0, 0);
        while begin.elapsed() < slice {
            for place in 0..self.script.len() {
                self.lists.prepare(place)?;
                let start = Instant::now();
                self.script.step(&mut self.driver.rings[0])?;
                if matches!(self.lists.commands[place], Kind::Invalidate) {
                    self.await_done(place, events)?;
                    seconds += start.elapsed().as_secs_f64();
                    flushes += 1;
                }
            }
        }
        Ok(seconds / f64::from(flushes))
    }

    /// Waits until the last invalidation, which was the command at `place`, is done: its answer says so, or a record.
    fn await_done(&mut self, place: usize, events: &mut Events) -> Result<()> {
        let mut done = self.script.answer_word(&self.driver.rings[0], place, wire::INVAL_DONE)?;
        while done < self.lists.invalidations {
            done = match events.next(&mut self.driver)? {
                Record::Done(record) => record.value.get(),
                other => bail!("not INVAL_DONE but {other:?}"),
            };
        }
        Ok(())
    }
}

/// Shows a CPU range of the process.
fn map(gpu: u64, cpu: u64, bytes: u64, flags: u32) -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        flags: flags.into(),
        addr: gpu.into(),
        range: bytes.into(),
        obj_offset: cpu.into(),
        ..BindOp::default()
    }
}
