//! Guest memory that shrinks under running work (`--allow-unsealed`), at moments of a random generator. Guest X loses its
//! session each time, with the reason, and comes again; guest Y, with memory of its own, sums and compares all the while.
//!
//! The long version: `SVM_MOMENTS=1000 cargo test -p integration --test shrinking_memory -- --nocapture`; other moments:
//! `SVM_SEED=n`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use guest_agent::agent::AgentOptions;
use guest_agent::client::packet;
use guest_agent::driver::Transport;
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::{RawGuest, RawVm, userptr};
use integration::frontend::vmm::Vmm;
use integration::guest::{SimulatedGuest, SimulatedProcess};
use integration::random::Random;
use integration::svmd::{Options, Svmd};
use rustix::fs::FallocateFlags;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::{CONTROLQ, EVENTQ, PAGE_SIZE};

const MIB: u64 = 1 << 20;
/// Bytes of X's memory. What its jobs work on is at the end, its rings are far below.
const MEMORY: u64 = 48 * MIB;
const WORK: u64 = 8 * MIB;
const WORK_GPA: u64 = MEMORY - WORK;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Devices, by `dev_id`.
const SOFT: u32 = 0;
const HOSTMMU: u32 = 1;
/// X's contexts: on each device one that knows all of its pages at once, and one that is asked for each.
const KNOWN: [u32; 2] = [1, 2];
const ASKED: u32 = 3;

/// After so long without what is waited for a test has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// A truncation comes up to so long after X's last step.
const LONGEST_PAUSE_US: u64 = 3000;
/// Descriptors of the daemon: room for two sessions and their workers, not for what a hundred leave behind.
const DESCRIPTORS: u64 = 96;
/// More than allocators and caches come to; mappings that were left would be 96 MiB a moment.
const GROWTH_KIB: u64 = 2 << 20;
const LOST: &str = "guest memory was lost under running work";

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not yet");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn launch(allow_unsealed: bool) -> Svmd {
    let devices = ["soft\"\nengines = 2", "hostmmu\""];
    let device = |kind: &str| format!("[[device]]\nname = \"{}\"\nkind = \"{kind}\n", &kind[..4]);
    let arguments = if allow_unsealed { vec!["--allow-unsealed".into()] } else { vec![] };
    // Who found a loss is read from the log.
    let more = devices.map(device).concat() + "[limits]\nlog_lines = 100000\nsessions = 100000\n";
    let guests = vec!["x".into(), "y".into()];
    Svmd::launch(&Options { guests, devices: 0, more, arguments, ..Options::default() }).unwrap()
}

/// Guest Y: sums numbers on both devices in turn, with its memory mapped anew each time, and compares.
struct Bystander {
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Words that Y sums.
const WORDS: u64 = 20_000;

impl Bystander {
    fn start(daemon: &Svmd) -> Self {
        let ram = GuestRam::new(Layout::Flat { bytes: MEMORY }, 7).unwrap();
        let vmm = Vmm::without_cpu(&daemon.socket("y"), &ram, Profile::CloudHypervisor).unwrap();
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let guest = SimulatedGuest::start("y", vmm, AgentOptions::default()).unwrap();
            let mut process = guest.spawn("sums").unwrap();
            process.map_memory(A, MIB).unwrap();
            for word in 0..WORDS {
                process.write(A + 8 * word, &(word * word).to_le_bytes()).unwrap();
            }
            for dev_id in [SOFT, HOSTMMU] {
                process.create_vm(dev_id).unwrap();
            }
            for round in 0.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                Self::round(&process, if round % 2 == 0 { SOFT } else { HOSTMMU }, round);
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        let bystander = Self { rounds, stop, thread };
        bystander.go_on();
        bystander
    }

    fn round(process: &SimulatedProcess, dev_id: u32, round: u64) {
        let result = 8 * WORDS;
        process.bind(dev_id, C, A, MIB).unwrap();
        let packets = [packet::reduce(C + result, C, result), packet::fill(C + result + 8, 8, round)];
        process.exec(dev_id, 0, round, &packets).unwrap();
        process.finish_job().unwrap();
        let expected = (0..WORDS).map(|word| word * word).sum::<u64>();
        let found = [result, result + 8].map(|at| process.read_word(A + at).unwrap());
        assert_eq!(found, [expected, round], "guest Y on device {dev_id}");
        process.write(A + result, &[0; 16]).unwrap();
        process.unbind(dev_id, C, MIB).unwrap();
    }

    /// Waits for two rounds more: one that began after now, on each device.
    fn go_on(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        wait_until("guest Y goes on", || {
            assert!(!self.thread.is_finished(), "guest Y has failed");
            self.rounds.load(Ordering::SeqCst) > before + 2
        });
    }

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
        self.rounds.load(Ordering::SeqCst)
    }
}

/// How far X is when its memory shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Its rings run, and nothing was said.
    Connected,
    /// It has contexts and GPU VMs.
    Prepared,
    /// Jobs wait for pages.
    Asking,
    /// Jobs run over all of its memory.
    Running,
    /// And others ask for page after page, and are answered.
    Answering,
}

/// What is left of X's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Nothing,
    Middle,
    AllButAPage,
    /// It is all there again, empty, soon after: whether anybody has noticed is a matter of luck.
    ThereAndBack,
}

/// What is seen of the daemon's process from outside.
#[derive(Debug)]
struct Seen {
    threads: usize,
    memory_kib: u64,
    resident_kib: u64,
    most_resident_kib: u64,
}

impl Seen {
    fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let threads = usize::try_from(number("Threads:")).unwrap();
        let [memory_kib, resident_kib, most_resident_kib] = ["VmSize:", "VmRSS:", "VmHWM:"].map(number);
        Self { threads, memory_kib, resident_kib, most_resident_kib }
    }
}

/// Names of the daemon's threads.
fn names_of_threads(pid: u32) -> HashMap<String, String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let named = tasks.filter_map(|task| {
        // One that ends meanwhile has no name any more.
        let name = fs::read_to_string(task.join("comm")).ok()?;
        Some((task.file_name()?.to_str()?.to_owned(), name.trim_end().to_owned()))
    });
    named.collect()
}

struct Rig {
    daemon: Svmd,
    random: Random,
    sessions: usize,
    /// Who found memory missing first, how often.
    found: BTreeMap<String, usize>,
}

impl Rig {
    fn start(seed: u64) -> Self {
        let daemon = launch(true);
        let (pid, most) = (Pid::from_raw(daemon.pid().cast_signed()).unwrap(), Some(DESCRIPTORS));
        prlimit(Some(pid), Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
        Self { daemon, random: Random::new(seed), sessions: 0, found: BTreeMap::new() }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random.below(end)
    }

    /// One life of X, and its end.
    fn moment(&mut self, number: usize) -> String {
        use Stage::{Answering, Asking, Connected, Prepared, Running};
        let stage = [Connected, Prepared, Asking, Running, Running, Running, Answering, Answering]
            [self.random.index(8)];
        let cuts = [Cut::Nothing, Cut::ThereAndBack, Cut::Middle, Cut::AllButAPage];
        // What nobody touches nobody misses: before jobs run, that is all but the rings.
        let cut = cuts[self.random.index(if stage < Running { 2 } else { 4 })];
        let ram = GuestRam::unsealed(Layout::Flat { bytes: MEMORY }, number as u64).unwrap();
        let mut guest = RawGuest::connect(&self.daemon.socket("x"), &ram, Profile::Qemu).unwrap();
        self.advance(&mut guest, stage);
        let names = names_of_threads(self.daemon.pid());
        let busy = self.below(2) == 0;
        if busy {
            // The queue thread is at it when the memory goes.
            guest.control_ring().publish_command(&[0; 24], 64, 0).unwrap();
            guest.vmm().notify(CONTROLQ).unwrap();
        }
        let pause = self.below(LONGEST_PAUSE_US);
        std::thread::sleep(Duration::from_micros(pause));
        self.cut(&ram, cut);
        // From here on X touches no memory.
        if cut == Cut::Nothing {
            for queue in [CONTROLQ, EVENTQ] {
                guest.vmm().notify(queue).unwrap();
            }
        }
        if cut == Cut::ThereAndBack {
            drop(guest);
        }
        let reason = self.end_of_session();
        let lost = reason.contains(LOST);
        assert!(lost || cut == Cut::ThereAndBack, "moment {number}, {stage:?}, {cut:?}: {reason}");
        let finder = if lost { self.finder(&names) } else { "nobody".into() };
        *self.found.entry(finder.clone()).or_default() += 1;
        format!("{stage:?}, {cut:?}, {pause} us, command in flight: {busy}; found by {finder}")
    }

    fn advance(&mut self, guest: &mut RawGuest, stage: Stage) {
        if stage == Stage::Connected {
            return;
        }
        guest.hello(1).unwrap();
        // On either device, or on both.
        let devices: &[u32] = [&[SOFT][..], &[HOSTMMU], &[SOFT, HOSTMMU]][self.random.index(3)];
        let mut vms = vec![];
        for (ctx_id, dev_id) in KNOWN.into_iter().zip([SOFT, HOSTMMU]) {
            if devices.contains(&dev_id) {
                vms.push(make_vm(guest, ctx_id, dev_id));
            }
        }
        let asked = make_vm(guest, ASKED, devices[0]);
        if stage == Stage::Prepared {
            return;
        }
        for vm in &vms {
            guest.exec(*vm, 0, 1, &work()).unwrap();
        }
        if stage == Stage::Asking {
            return;
        }
        for vm in &vms {
            let fault = guest.wait_fault(vm.ctx_id).unwrap();
            let pages = u32::try_from(WORK / PAGE_SIZE).unwrap();
            assert_eq!(guest.answer_run(&fault, A, WORK_GPA, pages).unwrap(), 0);
            for ring in 1..3 {
                guest.exec(*vm, ring, 1, &work()).unwrap();
            }
        }
        if stage == Stage::Running {
            return;
        }
        guest.exec(asked, 0, 1, &work()).unwrap();
        for _ in 0..=self.below(20) {
            let fault = guest.wait_fault(ASKED).unwrap();
            let offset = fault.cpu_addr.get() - A;
            assert_eq!(guest.answer(&fault, &[(A + offset, WORK_GPA + offset)], 0).unwrap(), 0);
        }
    }

    fn cut(&mut self, ram: &GuestRam, cut: Cut) {
        let left = match cut {
            Cut::Nothing | Cut::ThereAndBack => 0,
            Cut::Middle => WORK_GPA + self.below(WORK),
            Cut::AllButAPage => MEMORY - PAGE_SIZE,
        };
        ram.file().set_len(left).unwrap();
        if cut == Cut::ThereAndBack {
            std::thread::sleep(Duration::from_micros(self.below(300)));
            ram.file().set_len(MEMORY).unwrap();
        }
    }

    /// Waits until the daemon tells of the end of X's session, and why it ended.
    fn end_of_session(&mut self) -> String {
        let mut line = None;
        wait_until("end of X's session", || {
            let log = self.daemon.log();
            let mut ends =
                log.lines().filter(|line| line.contains("VMM disconnected") && line.contains("guest=x "));
            line = ends.nth(self.sessions).map(str::to_owned);
            line.is_some()
        });
        self.sessions += 1;
        line.unwrap()
    }

    /// The thread that the daemon's last word of lost memory names.
    fn finder(&self, names: &HashMap<String, String>) -> String {
        let log = self.daemon.log();
        let line = log.lines().rfind(|line| line.contains("lost memory was touched")).unwrap();
        let thread = line.split_once("thread=").unwrap().1;
        match thread {
            "worker" => "worker".into(),
            thread => names.get(thread).cloned().unwrap_or_else(|| format!("unknown thread {thread}")),
        }
    }
}

fn make_vm(guest: &mut RawGuest, ctx_id: u32, dev_id: u32) -> RawVm {
    guest.create_context(ctx_id).unwrap();
    let vm = guest.create_vm(ctx_id, dev_id).unwrap();
    assert_eq!(guest.bind(vm, &[userptr(C, A, WORK)]).unwrap(), 0);
    vm
}

/// Much more than can be done until the memory has gone, over all of it again and again.
fn work() -> Vec<Packet> {
    let half = WORK / 2;
    let round = [
        packet::fill(C, WORK, 0x5ca1_ab1e),
        packet::copy(C + half, C, half),
        packet::axpy(C, C + half, half, 1.5),
        packet::reduce(C, C, WORK),
    ];
    round.iter().cycle().take(400).copied().collect()
}

#[test]
fn memory_that_shrinks_at_any_moment_ends_its_own_session_only() {
    let seed = from_environment("SVM_SEED").unwrap_or(1);
    let moments = usize::try_from(from_environment("SVM_MOMENTS").unwrap_or(100)).unwrap();
    println!("seed {seed}, {moments} moments");
    let mut rig = Rig::start(seed);
    let bystander = Bystander::start(&rig.daemon);
    let (pid, at_rest) = (rig.daemon.pid(), Seen::of(rig.daemon.pid()));
    let mut settled = None;
    for number in 0..moments {
        let what = rig.moment(number);
        println!("{number}: {what}");
        bystander.go_on();
        wait_until("threads of X's session end", || Seen::of(pid).threads <= at_rest.threads);
        if number == moments / 4 {
            settled = Some(Seen::of(pid));
        }
    }
    let (settled, end) = (settled.unwrap(), Seen::of(pid));
    let rounds = bystander.finish();
    println!("found by: {:?}; {rounds} rounds of guest Y", rig.found);
    println!("at rest {at_rest:?}, after a quarter {settled:?}, at the end {end:?}");
    assert!(end.memory_kib < settled.memory_kib + GROWTH_KIB, "mappings are left");
    // Zeros of ours stand in X's mapping until its session has ended, as far as engines write them.
    let most = at_rest.resident_kib + 8 * WORK / 1024;
    assert!(end.most_resident_kib < most, "a loss, or all of them, took memory");
    let x = rig.daemon.guest("x").unwrap();
    assert_eq!((&x["sessions"], &x["connected"]), (&json!(moments), &json!(false)));
    let y = rig.daemon.guest("y").unwrap();
    assert_eq!((&y["sessions"], &y["last_error"]), (&json!(1), &json!(null)));
    let found = |kind: &str| rig.found.iter().any(|(finder, _)| finder.starts_with(kind));
    assert!(
        found("worker") && found("vring") && found("soft"),
        "one kind of finder is missing: {:?}",
        rig.found
    );
    rig.daemon.stop().unwrap();
}

#[test]
fn punched_memory_is_zeros_under_jobs_and_no_loss() {
    let daemon = launch(false);
    let ram = GuestRam::new(Layout::Flat { bytes: MEMORY }, 1).unwrap();
    let mut guest = RawGuest::connect(&daemon.socket("x"), &ram, Profile::Qemu).unwrap();
    guest.hello(1).unwrap();
    for (ctx_id, dev_id) in KNOWN.into_iter().zip([SOFT, HOSTMMU]) {
        let vm = make_vm(&mut guest, ctx_id, dev_id);
        let (result, summed) = (WORK - PAGE_SIZE, WORK - PAGE_SIZE);
        guest.exec(vm, 0, 1, &[packet::fill(C, summed, 1), packet::reduce(C + result, C, summed)]).unwrap();
        let fault = guest.wait_fault(ctx_id).unwrap();
        let pages = u32::try_from(WORK / PAGE_SIZE).unwrap();
        assert_eq!(guest.answer_run(&fault, A, WORK_GPA, pages).unwrap(), 0);
        let sum = |guest: &mut RawGuest| {
            assert_eq!(guest.wait_job(ctx_id).unwrap().status.get(), 0);
            ram.load::<u64>(WORK_GPA + result).unwrap()
        };
        assert_eq!(sum(&mut guest), summed / 8);

        // The seals do not forbid it.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&**ram.file(), flags, WORK_GPA, summed).unwrap();
        guest.exec(vm, 0, 2, &[packet::reduce(C + result, C, summed)]).unwrap();
        assert_eq!(sum(&mut guest), 0);
        guest.exec(vm, 0, 3, &[packet::fill(C, summed, 2), packet::reduce(C + result, C, summed)]).unwrap();
        assert_eq!(sum(&mut guest), summed / 4);
    }
    let x = daemon.guest("x").unwrap();
    assert_eq!((&x["connected"], &x["last_error"]), (&json!(true), &json!(null)));
}
