//! Memory comes and goes under running jobs. Two processes fill and copy without end, each in its part of the guest's
//! own memory (A) and of a module (B) that is plugged in, taken out, moved, and replaced by another at its place.

use crate::{PATIENCE, connect, ram, take_pages};
use guest_agent::client::packet;
use guest_agent::driver::Transport;
use integration::frontend::hotplug::{Dimm, Plugged};
use integration::frontend::ram::GuestRam;
use integration::frontend::raw::{RawGuest, RawVm, Record, userptr};
use integration::random::Random;
use integration::svmd::{DeviceKind, Options, Svmd};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno::EFAULT;
use virtio_gpu_svm::protocol::event::{FaultRecord, JobRecord};
use virtio_gpu_svm::protocol::job::Packet;

const CHANGES: usize = 60;
/// Where the module may stand: in the hole below 4 GiB, and above.
const PLACES: [u64; 3] = [2 << 30, 8 << 30, 12 << 30];
const CANARY: u8 = 0xc5;

const A: u64 = 0x7000_0000_0000;
const B: u64 = 0x7100_0000_0000;
const GPU_A: u64 = 0x20_0000_0000;
const GPU_B: u64 = 0x30_0000_0000;
/// Pages that are answered for and bound together.
const WINDOW: u64 = 16;
/// Four windows that jobs write, and a page for results.
const A_PAGES: u64 = 4 * WINDOW + 1;
const RESULT: u64 = 4 * WINDOW * PAGE_SIZE;
/// A process' part of the module. Its first page is only read.
const B_PAGES: u64 = 4 * WINDOW;
const B_BYTES: u64 = B_PAGES * PAGE_SIZE;

/// Timelines, and what names their jobs.
const IN_A: u32 = 0;
const IN_B: u32 = 1;
const PROBE: u32 = 2;
/// Jobs of a timeline in flight: more than engines finish while a message is under way.
const DEPTH: u64 = 12;

#[test]
fn memory_that_goes_is_let_go_and_what_stays_is_not_noticed() {
    change_memory(DeviceKind::Soft, 1);
}

#[test]
fn memory_that_goes_is_let_go_on_hostmmu_too() {
    change_memory(DeviceKind::Hostmmu, 2);
}

fn change_memory(kind: DeviceKind, seed: u64) {
    println!("seed {seed}");
    let mut rig = Rig::set_up(kind, seed);
    let known = rig.faults_in_a();
    let mut changes = BTreeMap::<_, usize>::new();
    for number in 0..CHANGES {
        let change = rig.change();
        *changes.entry(change).or_default() += 1;
        println!("{number}: {change}");
        rig.go_on(change);
        assert_eq!(rig.faults_in_a(), known, "{change}: memory that stayed was asked for again");
    }
    assert_eq!(changes.len(), 5, "{changes:?}");
    assert!(rig.refused > 0 && rig.held > 0, "{} refused, {} held", rig.refused, rig.held);
}

struct Process {
    vm: RawVm,
    /// Guest-physical addresses of its pages in A.
    pages: Vec<u64>,
    /// Jobs that ended well.
    rounds_a: u64,
    rounds_b: u64,
    /// Jobs of B in flight.
    running_b: u64,
    /// Faults of B that it was asked for.
    faults_b: u64,
    /// Faults of B that wait for the module to come back.
    held: Vec<FaultRecord>,
    probed: bool,
    /// The word in the part of the module that is only read.
    word: u64,
}

/// A module and its place.
#[derive(Clone)]
struct Module {
    dimm: Arc<Dimm>,
    gpa: u64,
}

impl Module {
    fn plugged(&self) -> Plugged<'_> {
        Plugged { dimm: &self.dimm, gpa: self.gpa }
    }
}

struct Rig {
    daemon: Svmd,
    guest: RawGuest,
    ram: Arc<GuestRam>,
    random: Random,
    processes: Vec<Process>,
    /// The module that is plugged in.
    plugged: Option<Module>,
    /// A module that was plugged in before.
    spare: Option<Arc<Dimm>>,
    /// While the module is out: whether its faults are refused, or held back until it comes again.
    refuses: bool,
    refused: usize,
    held: usize,
}

impl Rig {
    fn set_up(kind: DeviceKind, seed: u64) -> Self {
        let engines = if kind == DeviceKind::Soft { 2 } else { 1 };
        let daemon = Svmd::launch(&Options { devices: 1, kind, engines, ..Options::default() }).unwrap();
        let ram = ram(seed);
        let mut guest = connect(&daemon, "vm0", &ram);
        let mut processes = vec![];
        for ctx_id in 1..=2 {
            guest.create_context(ctx_id).unwrap();
            let vm = guest.create_vm(ctx_id, 0).unwrap();
            let ops = [userptr(GPU_A, A, A_PAGES * PAGE_SIZE), userptr(GPU_B, B, B_BYTES)];
            assert_eq!(guest.bind(vm, &ops).unwrap(), 0);
            processes.push(Process {
                vm,
                pages: take_pages(&ram, usize::try_from(A_PAGES).unwrap()),
                rounds_a: 0,
                rounds_b: 0,
                running_b: 0,
                faults_b: 0,
                held: vec![],
                probed: false,
                word: 0,
            });
        }
        let mut rig = Self {
            daemon,
            guest,
            ram,
            random: Random::new(seed),
            processes,
            plugged: None,
            spare: None,
            refuses: false,
            refused: 0,
            held: 0,
        };
        rig.plugged = Some(Module { dimm: rig.another(), gpa: PLACES[0] });
        rig.announce(None, true);
        for process in 0..rig.processes.len() {
            (0..DEPTH).for_each(|_| rig.launch(process, IN_A));
        }
        // The page for results is of A too.
        rig.go_on("set up");
        rig
    }

    /// Tells the daemon what is plugged in now, with one table or region by region.
    fn announce(&mut self, old: Option<&Module>, by_table: bool) {
        let (old, new) = (old.map(Module::plugged), self.plugged.as_ref().map(Module::plugged));
        let mut connection = self.guest.vmm().connection();
        if by_table {
            return connection.announce_memory_with(new.as_slice()).unwrap();
        }
        if let Some(old) = &old {
            connection.remove_memory(old).unwrap();
        }
        if let Some(new) = &new {
            connection.add_memory(new).unwrap();
        }
    }

    /// Makes a change, and sees that what went away is left alone. Returns what it was.
    fn change(&mut self) -> &'static str {
        self.turn();
        let old = self.plugged.clone();
        let by_table = self.random.below(2) == 0;
        let change = match (&old, self.random.below(4)) {
            (None, _) => "add",
            (Some(_), 0) => "remove",
            (Some(_), 1) => "replace",
            (Some(_), 2) => "move",
            (Some(_), _) => "same",
        };
        match (&old, change) {
            (Some(old), "replace") => self.plugged = Some(Module { dimm: self.another(), gpa: old.gpa }),
            (Some(old), "move") => {
                let elsewhere: Vec<_> = PLACES.into_iter().filter(|place| *place != old.gpa).collect();
                let gpa = elsewhere[self.random.index(elsewhere.len())];
                self.plugged = Some(Module { gpa, ..old.clone() });
            }
            (_, "add") => {
                let gpa = PLACES[self.random.index(PLACES.len())];
                self.plugged = Some(Module { dimm: self.another(), gpa });
            }
            (_, "remove") => (self.plugged, self.refuses) = (None, self.refused <= self.held),
            _ => return self.announce_the_same(),
        }
        let faults: Vec<u64> = self.processes.iter().map(|process| process.faults_b).collect();
        self.announce(old.as_ref(), by_table);
        if let Some(Module { dimm, .. }) = old {
            let stays = self.plugged.as_ref().is_some_and(|now| Arc::ptr_eq(&now.dimm, &dimm));
            if !stays {
                self.assert_left_alone(&dimm, change);
                self.spare = Some(dimm);
            }
            self.until(&format!("{change}: all are asked again"), |rig| {
                rig.processes.iter().zip(&faults).all(|(process, before)| process.faults_b > *before)
            });
        }
        if self.plugged.is_none() {
            return self.without_module();
        }
        change
    }

    /// A table that changes nothing: no fault at all may come of it.
    fn announce_the_same(&mut self) -> &'static str {
        let before = self.daemon.ledgers().unwrap().len();
        self.announce(None, true);
        self.all_go_on("same");
        assert_eq!(self.daemon.ledgers().unwrap().len(), before, "faults after a table that changes nothing");
        "same"
    }

    /// The module is out: the jobs that need it end, or wait.
    fn without_module(&mut self) -> &'static str {
        if self.refuses {
            self.refused += 1;
            self.until("jobs without memory end", |rig| rig.processes.iter().all(|p| p.running_b == 0));
        } else {
            self.held += 1;
            self.until("jobs without memory wait", |rig| rig.processes.iter().all(|p| !p.held.is_empty()));
        }
        "remove"
    }

    /// A module that is not plugged in, new or used before, with other words in it.
    fn another(&mut self) -> Arc<Dimm> {
        let used = self.spare.take_if(|_| self.random.below(2) == 0);
        let dimm = used.unwrap_or_else(|| Arc::new(Dimm::new(2 * B_BYTES).unwrap()));
        for (part, process) in (0..).zip(&mut self.processes) {
            process.word = self.random.next_u64();
            dimm.write(part * B_BYTES, &process.word.to_le_bytes()).unwrap();
        }
        dimm
    }

    /// What is acknowledged is not written any more, while jobs go on in A.
    fn assert_left_alone(&mut self, gone: &Dimm, change: &str) {
        gone.write(0, &vec![CANARY; usize::try_from(gone.bytes()).unwrap()]).unwrap();
        for look in 1..=3 {
            let changed = gone.contents().unwrap().iter().position(|byte| *byte != CANARY);
            assert_eq!(changed, None, "{change}: memory taken away was written before look {look}");
            self.jobs_in_a_go_on(change);
        }
    }

    fn jobs_in_a_go_on(&mut self, change: &str) {
        let before: Vec<u64> = self.processes.iter().map(|process| process.rounds_a).collect();
        self.until(&format!("{change}: jobs in A go on"), |rig| {
            rig.processes.iter().zip(&before).all(|(process, before)| process.rounds_a > *before)
        });
    }

    /// Everything that can go on does, and sees the module that is plugged in now.
    fn go_on(&mut self, change: &str) {
        if self.plugged.is_none() {
            return self.jobs_in_a_go_on(change);
        }
        for index in 0..self.processes.len() {
            for fault in std::mem::take(&mut self.processes[index].held) {
                self.answer(&fault);
            }
            while self.processes[index].running_b < DEPTH {
                self.launch(index, IN_B);
            }
            self.launch(index, PROBE);
        }
        self.until(&format!("{change}: probes end"), |rig| rig.processes.iter().all(|p| p.probed));
        self.all_go_on(change);
        for process in &mut self.processes {
            process.probed = false;
            let seen: u64 = self.ram.load(process.pages[usize::try_from(A_PAGES - 1).unwrap()]).unwrap();
            assert_eq!(seen, process.word, "{change}: {seen:#x} is not of the module that is plugged in");
        }
    }

    /// All jobs go on, in A and in B.
    fn all_go_on(&mut self, change: &str) {
        let before: Vec<_> = self.processes.iter().map(|p| (p.rounds_a, p.rounds_b)).collect();
        self.until(&format!("{change}: all jobs go on"), |rig| {
            let rounds = rig.processes.iter().map(|p| (p.rounds_a, p.rounds_b));
            rounds.zip(&before).all(|(now, then)| now.0 > then.0 + 1 && now.1 > then.1 + 1)
        });
    }

    fn launch(&mut self, index: usize, timeline: u32) {
        let first = self.random.next_u64();
        let packets = match timeline {
            IN_A => fill_and_copy(GPU_A, 0, first),
            IN_B => fill_and_copy(GPU_B, 1, first),
            _ => vec![packet::copy(GPU_A + RESULT, GPU_B, 8)],
        };
        let process = &mut self.processes[index];
        process.running_b += u64::from(timeline == IN_B);
        self.guest.exec(process.vm, timeline, timeline.into(), &packets).unwrap();
    }

    /// Looks after the guest until something has come true.
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.turn();
            if done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: not yet\n{}", self.daemon.log());
            self.guest.vmm().wait(Duration::from_millis(20)).unwrap();
        }
    }

    fn turn(&mut self) {
        for record in self.guest.take_records().unwrap() {
            match record {
                Record::Fault(fault) => self.on_fault(&fault),
                Record::Job(job) => self.on_job(&job),
                Record::Notice(notice) => panic!("nobody asked for {notice:?}"),
            }
        }
    }

    fn on_fault(&mut self, fault: &FaultRecord) {
        let process = &mut self.processes[usize::try_from(fault.ctx_id.get() - 1).unwrap()];
        let in_b = fault.cpu_addr.get() >= B;
        process.faults_b += u64::from(in_b);
        if in_b && self.plugged.is_none() {
            if self.refuses {
                assert_eq!(self.guest.refuse(fault).unwrap(), 0);
            } else {
                process.held.push(*fault);
            }
            return;
        }
        self.answer(fault);
    }

    /// Translates as an agent would, a window at once.
    fn answer(&mut self, fault: &FaultRecord) {
        let part = u64::from(fault.ctx_id.get() - 1);
        let process = &self.processes[usize::try_from(part).unwrap()];
        let at = fault.cpu_addr.get();
        let (base, count) = if at >= B { (B, B_PAGES) } else { (A, A_PAGES) };
        let first = (at - base) / PAGE_SIZE / WINDOW * WINDOW;
        let pages: Vec<_> = (first..count.min(first + WINDOW))
            .map(|page| {
                let gpa = match &self.plugged {
                    Some(module) if base == B => module.gpa + part * B_BYTES + page * PAGE_SIZE,
                    _ => process.pages[usize::try_from(page).unwrap()],
                };
                (base + page * PAGE_SIZE, gpa)
            })
            .collect();
        assert_eq!(self.guest.answer(fault, &pages, 0).unwrap(), 0, "{fault:?}");
    }

    fn on_job(&mut self, job: &JobRecord) {
        let index = usize::try_from(job.ctx_id.get() - 1).unwrap();
        let process = &mut self.processes[index];
        let (timeline, status) = (job.ring_idx.get(), job.status.get());
        match timeline {
            IN_A => process.rounds_a += 1,
            IN_B if status == -EFAULT && self.plugged.is_none() && self.refuses => {
                process.running_b -= 1;
                return;
            }
            IN_B => (process.rounds_b, process.running_b) = (process.rounds_b + 1, process.running_b - 1),
            _ => process.probed = true,
        }
        assert_eq!(status, 0, "{job:?}");
        if timeline != PROBE {
            self.launch(index, timeline);
        }
    }

    /// Faults in A that the device says it raised.
    fn faults_in_a(&self) -> usize {
        let pages = GPU_A / PAGE_SIZE..GPU_A / PAGE_SIZE + A_PAGES;
        self.daemon.ledgers().unwrap().iter().filter(|raised| pages.contains(&raised.page)).count()
    }
}

/// Fills two windows and copies each to another one, over and over, each time with other words.
fn fill_and_copy(base: u64, spared_pages: u64, first: u64) -> Vec<Packet> {
    let len = (WINDOW - spared_pages) * PAGE_SIZE;
    let window = |number: u64| base + (number % 4 * WINDOW + spared_pages) * PAGE_SIZE;
    let step = |number: u64| match number % 2 {
        0 => packet::fill(window(number), len, first.wrapping_add(number)),
        _ => packet::copy(window(number), window(number - 1), len),
    };
    (0..128).map(step).collect()
}
