//! A guest process and what it is owed: a program of requests, and for each job the words that it writes.
//!
//! All processes of all guests have their memory at the same A and show it at the same C; what tells them apart is what
//! stands in it. Each job has words of its own, and adds to one of them, so a job that ran twice shows too.

use crate::driver::{Driver, Turn};
use crate::mock::map;
use crate::ram::{Ram, mix};
use crate::random::Random;
use std::collections::BTreeMap;
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::JobRecord;
use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, OP_COPY, Packet};
use virtio_gpu_svm::protocol::request::{BindOp, FencePoint};

/// Shortly before a boundary of leaves.
pub const A: u64 = 0x7f00_001f_d000;
/// Where devices with addresses of their own show it, and show it once more.
const C: u64 = 0x4_0002_0000;
const ALIAS: u64 = 0x5_0000_7000;
/// Pages of a process.
pub const PAGES: u64 = 5;
/// Words from here on are written, each by one job; those before are only read.
const WRITTEN: u64 = 256;
const WORDS: u64 = 512;
/// Words that a job copies.
const COPIED: u64 = 3;

/// The device whose addresses are the CPU's own.
const IDENTITY: usize = 2;

/// A request of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Create,
    Vm(usize),
    Map(usize),
    /// A job on a ring, behind the last point of another one.
    Exec(usize, u32, Option<(usize, u32)>),
    /// The same through the second window.
    ExecAlias(u32),
    /// Maps the second window, in turn on this ring.
    MapAlias(u32),
    /// Withdraws a page and moves it as soon as no engine uses it.
    Move(u64),
    /// All jobs have ended and nothing is on the move.
    Await,
    CloseVm(usize),
    Exit,
}

/// A program that uses the first device and another one.
pub fn program(other: usize) -> Vec<Op> {
    vec![
        Op::Create,
        Op::Vm(0),
        Op::Map(0),
        Op::Exec(0, 0, None),
        Op::Exec(0, 3, None),
        Op::Exec(0, 4, None),
        Op::Exec(0, 1, Some((0, 0))),
        Op::Vm(other),
        Op::Map(other),
        Op::Exec(other, 0, Some((0, 1))),
        Op::Await,
        Op::Exec(other, 1, None),
        Op::Move(1),
        Op::Exec(0, 0, None),
        Op::MapAlias(2),
        Op::ExecAlias(2),
        Op::Await,
        Op::Move(3),
        Op::Exec(0, 1, Some((other, 1))),
        Op::CloseVm(other),
        Op::Await,
        Op::Exit,
    ]
}

/// What a process may expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// Every request is accepted, and every job ends well.
    Results,
    /// Every job ends once, and has written its words or left them.
    Ends,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    Lives,
    /// Its context was destroyed, and engines may still use it.
    Leaves,
    Gone,
}

/// A page of it: where it is, and until which invalidation is done it may not be told again.
pub struct PageOf {
    pub gpa: u64,
    pub moving: Option<u64>,
}

pub struct Vm {
    pub vm_id: u32,
    pub asid: u32,
    points: BTreeMap<u32, u64>,
}

struct Effect {
    job: u64,
    page: u64,
    word: u64,
    after: u64,
}

pub struct Process {
    pub ctx_id: u32,
    pub generation: u64,
    salt: u64,
    pub pages: Vec<PageOf>,
    pub vms: [Option<Vm>; 3],
    program: Vec<Op>,
    at: usize,
    /// Last invalidation, and up to which they are done.
    pub seq: u64,
    pub done_seq: u64,
    effects: Vec<Effect>,
    /// Jobs and binds, and how they ended.
    pub jobs: BTreeMap<u64, Option<i32>>,
    next_word: u64,
    pub owed: Owed,
    pub life: Life,
}

impl Process {
    pub fn new(ctx_id: u32, salt: u64, program: Vec<Op>, ram: &mut Ram) -> Self {
        let pages: Vec<_> = (0..PAGES).map(|_| PageOf { gpa: ram.take(), moving: None }).collect();
        for (page, n) in pages.iter().zip(0..) {
            let words: Vec<u64> = (0..WORDS).map(|word| tag(salt, n, word)).collect();
            ram.write(page.gpa, &words);
        }
        Self {
            ctx_id,
            generation: 0,
            salt,
            pages,
            vms: [None, None, None],
            program,
            at: 0,
            seq: 0,
            done_seq: 0,
            effects: Vec::new(),
            jobs: BTreeMap::new(),
            next_word: WRITTEN,
            owed: Owed::Results,
            life: Life::Lives,
        }
    }
    pub fn has_begun(&self) -> bool {
        self.at > 0
    }
    /// What it is about to ask for.
    pub fn next(&self) -> Option<Op> {
        self.program.get(self.at).copied().filter(|_| self.life == Life::Lives)
    }
    fn is_idle(&self) -> bool {
        self.jobs.values().all(Option::is_some) && self.pages.iter().all(|page| page.moving.is_none())
    }
    pub fn can_go(&self) -> bool {
        self.next().is_some_and(|op| op != Op::Await || self.is_idle())
    }
    /// The GPU VM of an asid on a device, if it has it now.
    pub fn vm_of(&self, device: usize, asid: u32) -> Option<&Vm> {
        self.vms[device].as_ref().filter(|vm| vm.asid == asid)
    }
    /// A CPU address for a GPU address of its GPU VM on a device.
    pub fn cpu_addr(device: usize, addr: u64) -> u64 {
        let window = |base: u64| (base..base + PAGES * 4096).contains(&addr).then(|| addr - base + A);
        if device == IDENTITY { addr } else { window(C).or(window(ALIAS)).unwrap() }
    }

    /// Makes its next request.
    pub fn go(&mut self, driver: &Driver, random: &mut Random) {
        let Some(op) = self.next() else { return };
        self.at += 1;
        let status = self.ask(op, driver, random);
        if status != 0 {
            assert_eq!(self.owed, Owed::Ends, "{op:?} of context {} is refused: {status}", self.ctx_id);
            // It gives up; without a context there is nothing to leave.
            self.at = self.program.len() - 1;
            if op == Op::Create {
                (self.at, self.life) = (self.program.len(), Life::Gone);
            }
        }
    }
    fn ask(&mut self, op: Op, driver: &Driver, random: &mut Random) -> i32 {
        let ctx = self.ctx_id;
        match op {
            Op::Create => {
                let status = driver.create_context(ctx);
                self.generation = driver.0.context(ctx).map_or(0, |context| context.generation);
                status
            }
            Op::Vm(device) => match driver.create_vm(ctx, u32::try_from(device).unwrap()) {
                Ok((vm_id, asid)) => {
                    self.vms[device] = Some(Vm { vm_id, asid, points: BTreeMap::new() });
                    0
                }
                Err(status) => status,
            },
            Op::Map(device) => {
                let Some(vm) = &self.vms[device] else { return -EPIPE };
                driver.bind(ctx, vm.vm_id, &[map(base(device), A, PAGES)])
            }
            Op::Exec(device, ring, behind) => self.exec(driver, random, (device, base(device)), ring, behind),
            Op::ExecAlias(ring) => self.exec(driver, random, (0, ALIAS), ring, Some((0, ring))),
            Op::MapAlias(ring) => self.map_alias(driver, ring),
            Op::Move(page) => {
                self.withdraw(driver, page);
                0
            }
            Op::Await => 0,
            Op::CloseVm(device) => match self.vms[device].take() {
                // Jobs of it may still run, where it was told that they will never end well.
                Some(vm) => driver.destroy_vm(ctx, vm.vm_id),
                None => -EPIPE,
            },
            Op::Exit => {
                let status = driver.destroy_context(ctx);
                self.left();
                status
            }
        }
    }
    /// Its context is destroyed, whoever did it.
    pub fn left(&mut self) {
        self.life = Life::Leaves;
        self.vms = [None, None, None];
    }
    /// Withdraws a page; whether it is moved is up to [`Process::settle`].
    fn withdraw(&mut self, driver: &Driver, page: u64) {
        (self.seq, self.done_seq) = driver.invalidate(self.ctx_id, A + page * 4096, 4096);
        let seq = self.seq;
        self.pages[usize::try_from(page).unwrap()].moving = Some(seq);
    }
    /// Withdraws a page that stays where it is.
    pub fn touch(&mut self, driver: &Driver, page: u64) {
        (self.seq, self.done_seq) = driver.invalidate(self.ctx_id, A + page * 4096, 4096);
    }
    /// Moves what no engine can use any more; returns where it was.
    pub fn settle(&mut self, ram: &mut Ram) -> Vec<u64> {
        let mut freed = Vec::new();
        for page in &mut self.pages {
            if page.moving.is_some_and(|seq| seq <= self.done_seq) {
                page.moving = None;
                let to = ram.take();
                ram.write(to, &ram.read(page.gpa));
                freed.push(std::mem::replace(&mut page.gpa, to));
            }
        }
        freed
    }

    fn point(&self, (device, ring): (usize, u32)) -> Option<FencePoint> {
        let vm = self.vms[device].as_ref()?;
        let seqno = *vm.points.get(&ring)?;
        Some(FencePoint { vm_id: vm.vm_id.into(), ring_idx: ring.into(), seqno: seqno.into() })
    }
    fn turn(&mut self, device: usize, ring: u32, behind: Option<(usize, u32)>) -> Option<(u32, Turn)> {
        let waits = behind.and_then(|behind| self.point(behind)).into_iter().collect();
        let vm = self.vms[device].as_mut()?;
        let signal = vm.points.get(&ring).map_or(1, |point| point + 1);
        vm.points.insert(ring, signal);
        Some((vm.vm_id, Turn { ring, waits, signal }))
    }
    fn exec(
        &mut self,
        driver: &Driver,
        random: &mut Random,
        (device, base): (usize, u64),
        ring: u32,
        behind: Option<(usize, u32)>,
    ) -> i32 {
        let Some((vm_id, turn)) = self.turn(device, ring, behind) else { return -EPIPE };
        let [from, to, add] = [0; 3].map(|_| random.below(PAGES));
        let (word, source) = (self.next_word, random.below(WRITTEN - COPIED));
        self.next_word += COPIED + 1;
        let at = |page: u64, word: u64| (base + page * 4096 + word * 8).into();
        let value = mix(self.salt, word, 0) >> 1;
        let packets = [
            Packet {
                opcode: OP_COPY.into(),
                dst: at(to, word),
                src: at(from, source),
                len: (COPIED * 8).into(),
                ..Packet::default()
            },
            Packet {
                opcode: OP_ATOMIC_ADD.into(),
                dst: at(add, word + COPIED),
                value: value.into(),
                ..Packet::default()
            },
        ];
        let job = match driver.exec(self.ctx_id, vm_id, &turn, &packets) {
            Ok(job) => job,
            Err(status) => return status,
        };
        self.jobs.insert(job, None);
        for n in 0..COPIED {
            let after = tag(self.salt, from, source + n);
            self.effects.push(Effect { job, page: to, word: word + n, after });
        }
        let after = tag(self.salt, add, word + COPIED).wrapping_add(value);
        self.effects.push(Effect { job, page: add, word: word + COPIED, after });
        0
    }
    fn map_alias(&mut self, driver: &Driver, ring: u32) -> i32 {
        let Some((vm_id, turn)) = self.turn(0, ring, None) else { return -EPIPE };
        let op: BindOp = map(ALIAS, A, PAGES);
        match driver.bind_async(self.ctx_id, vm_id, &turn, &[op]) {
            Ok(job) => {
                self.jobs.insert(job, None);
                0
            }
            Err(status) => status,
        }
    }

    /// A job or bind of it has ended.
    pub fn ended(&mut self, record: &JobRecord) {
        let (job, status) = (record.job_id.get(), record.status.get());
        let end = self.jobs.get_mut(&job);
        let end = end.unwrap_or_else(|| panic!("context {} is told of job {job}, not its own", self.ctx_id));
        assert_eq!(end.replace(status), None, "job {job} ends twice");
        let may = [0, EFAULT, EINVAL, EPIPE, ECANCELED, ENOMEM, ETIMEDOUT];
        match self.owed {
            Owed::Results => assert_eq!(status, 0, "job {job} of context {}: {record:?}", self.ctx_id),
            Owed::Ends => assert!(may.contains(&-status), "job {job} of context {}: {record:?}", self.ctx_id),
        }
    }
    /// Its memory holds what its jobs have written, and nothing else was touched.
    pub fn check(&self, ram: &Ram) {
        for (page, n) in self.pages.iter().zip(0_u64..) {
            let words = ram.read(page.gpa);
            let mut plain = vec![true; words.len()];
            for effect in self.effects.iter().filter(|effect| effect.page == n) {
                let at = usize::try_from(effect.word).unwrap();
                plain[at] = false;
                let (found, before) = (words[at], tag(self.salt, n, effect.word));
                let wrote = found == effect.after;
                match self.jobs.get(&effect.job) {
                    Some(Some(0)) => assert!(
                        wrote,
                        "job {} has not written word {at} of page {n}: {found:#x}, was {before:#x}, jobs {:?} {} {:?} {:x?}",
                        effect.job,
                        self.jobs,
                        self.at,
                        self.life,
                        self.pages.iter().map(|p| (p.gpa, p.moving)).collect::<Vec<_>>()
                    ),
                    _ => assert!(wrote || found == before, "word {at} of page {n} is nobody's: {found:#x}"),
                }
            }
            for at in (0..words.len()).filter(|at| plain[*at]) {
                let tag = tag(self.salt, n, u64::try_from(at).unwrap());
                assert_eq!(words[at], tag, "word {at} of page {n} of context {} was written", self.ctx_id);
            }
        }
        if self.owed == Owed::Results && self.life == Life::Gone {
            assert!(self.jobs.values().all(|end| *end == Some(0)), "ends are missing: {:?}", self.jobs);
        }
    }
}

fn base(device: usize) -> u64 {
    if device == IDENTITY { A } else { C }
}

fn tag(salt: u64, page: u64, word: u64) -> u64 {
    mix(salt, page * WORDS + word, 1)
}
