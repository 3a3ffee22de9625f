//! A software GPU with its engines, memory that tests look into, and an `Events` that records and may answer.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "small numbers of tests"
)]

mod fairness;
mod faults;
mod models;
mod packets;
mod schedule;

use super::packet::Halt;
use super::packet::test_ops::{OP_HOLD, OP_PANIC};
use super::*;
use crate::device::{Access, Fault, JobEnd, JobId, Ticket};
use crate::memory::{Region, RegionIdentity};
use crate::protocol::job::*;
use crate::protocol::{PAGE_SIZE, errno};
use crate::quota::Charge;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

/// C: where tests map memory.
const C: u64 = 0x7_0000_0000;
/// A test that waits longer for an event has failed.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Event {
    Fault(Fault),
    Done(JobId, JobEnd),
    Flushed(Asid, Ticket),
    Retired(Asid),
}

/// The schedule of a GPU with one engine and one VM, without threads.
fn bare(parks: bool) -> (Sched, Arc<Vm>) {
    let mut sched = Sched::new(1, parks);
    sched.start();
    let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
    let vm = Arc::new(Vm { asid: Asid(1), label: label(1), memory, hurry: AtomicBool::new(false) });
    sched.vm_create(Arc::clone(&vm)).unwrap();
    (sched, vm)
}

/// The turn that the engine gets, of a job.
fn turn_of(sched: &mut Sched) -> Turn {
    match sched.next(0) {
        Some(Next::Run(turn)) => turn,
        _ => panic!("no job is ready"),
    }
}

type Answer = Box<dyn Fn(&SoftDevice, Fault) + Send + Sync>;

/// Records what the device says.
struct Recorder {
    device: Weak<SoftDevice>,
    log: Mutex<Vec<Event>>,
    news: Condvar,
    answer: OnceLock<Answer>,
}

impl Recorder {
    fn push(&self, event: Event) {
        self.log.lock().unwrap().push(event);
        self.news.notify_all();
    }
}

impl Events for Recorder {
    fn fault(&self, device: usize, fault: Fault) {
        assert_eq!(device, 3);
        self.push(Event::Fault(fault));
        if let Some(answer) = self.answer.get() {
            answer(&self.device.upgrade().unwrap(), fault);
        }
    }
    fn job_done(&self, _: usize, _: Asid, job: JobId, end: JobEnd) {
        self.push(Event::Done(job, end));
    }
    fn flushed(&self, _: usize, asid: Asid, ticket: Ticket) {
        self.push(Event::Flushed(asid, ticket));
    }
    fn retired(&self, _: usize, asid: Asid) {
        self.push(Event::Retired(asid));
    }
}

/// A device with threads for its engines.
struct Rig {
    device: Arc<SoftDevice>,
    events: Arc<Recorder>,
    engines: Vec<JoinHandle<()>>,
    jobs: AtomicU64,
}

impl Rig {
    /// A rig whose engines do not work before [`Rig::go`], so that what is submitted until then is scheduled at once.
    fn paused(engines: u8) -> Self {
        Self::limited(engines, None)
    }

    /// The same, with a limit of jobs' time.
    fn limited(engines: u8, job_limit: Option<Duration>) -> Self {
        Self::with(SoftConfig { job_limit, ..config(engines) })
    }

    /// A running rig without faults.
    fn without_faults(engines: u8) -> Self {
        let rig = Self::with(SoftConfig { fault_model: FaultModel::None, ..config(engines) });
        rig.go();
        rig
    }

    /// A running rig that asks for pages in groups.
    fn identity(engines: u8) -> Self {
        let rig = Self::with(SoftConfig { address_model: AddressModel::Identity, ..config(engines) });
        rig.go();
        rig
    }

    /// A paused rig of this configuration.
    fn with(config: SoftConfig) -> Self {
        let engines = config.engines;
        let device = SoftDevice::new(config);
        let events = Arc::new(Recorder {
            device: Arc::downgrade(&device),
            log: Mutex::default(),
            news: Condvar::new(),
            answer: OnceLock::new(),
        });
        let engines = (0..engines)
            .map(|engine| {
                let device = Arc::clone(&device);
                std::thread::spawn(move || device.run_engine(engine))
            })
            .collect();
        Self { device, events, engines, jobs: AtomicU64::new(0) }
    }

    fn go(&self) {
        let events: Arc<dyn Events> = self.events.clone();
        self.device.start(Arc::downgrade(&events));
    }

    fn new(engines: u8) -> Self {
        let rig = Self::paused(engines);
        rig.go();
        rig
    }

    fn vm(&self, asid: u32) -> Asid {
        self.device.vm_create(Asid(asid), label(asid), Charge::default()).unwrap();
        Asid(asid)
    }

    fn vm_of(&self, guest: &str, asid: u32) -> Asid {
        let label = VmLabel { guest: guest.into(), ..label(asid) };
        self.device.vm_create(Asid(asid), label, Charge::default()).unwrap();
        Asid(asid)
    }

    fn submit(&self, asid: Asid, ring_idx: u32, packets: &[Packet]) -> JobId {
        self.device.check_packets(packets).unwrap();
        let id = JobId(self.jobs.fetch_add(1, Ordering::Relaxed) + 1);
        self.device.submit(asid, Job { id, ring_idx, packets: packets.to_vec() }).unwrap();
        id
    }

    /// Submits to ring 0 and waits for the end.
    fn run(&self, asid: Asid, packets: &[Packet]) -> JobEnd {
        let job = self.submit(asid, 0, packets);
        self.end_of(job)
    }

    fn bind(&self, asid: Asid, addr: u64, memory: &Memory, page: u64, pages: u64) {
        self.device.bind(asid, GpuAddr(addr), &[memory.extent(page, pages, true)]).unwrap();
    }

    /// Waits until the log has what is looked for.
    fn wait<T>(&self, mut find: impl FnMut(&[Event]) -> Option<T>) -> T {
        let mut log = self.events.log.lock().unwrap();
        loop {
            if let Some(found) = find(&log) {
                return found;
            }
            let (guard, timeout) = self.events.news.wait_timeout(log, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "waited in vain; so far: {:#?}", &*guard);
            log = guard;
        }
    }

    fn end_of(&self, job: JobId) -> JobEnd {
        self.wait(|log| {
            log.iter().find_map(|e| match e {
                Event::Done(id, end) if *id == job => Some(*end),
                _ => None,
            })
        })
    }

    /// The n-th fault, from 0.
    fn fault(&self, n: usize) -> Fault {
        self.wait(|log| faults(log).get(n).copied())
    }

    fn wait_retired(&self, asid: Asid) {
        self.wait(|log| retired(log).contains(&asid).then_some(()));
    }

    fn wait_flushed(&self, asid: Asid, ticket: Ticket) {
        let covers = |e: &Event| matches!(e, Event::Flushed(a, t) if *a == asid && *t >= ticket);
        self.wait(|log| log.iter().any(covers).then_some(()));
    }

    fn log(&self) -> Vec<Event> {
        self.events.log.lock().unwrap().clone()
    }

    /// Answers every fault, on the engine that raised it.
    fn answer(&self, answer: impl Fn(&SoftDevice, Fault) + Send + Sync + 'static) {
        assert!(self.events.answer.set(Box::new(answer)).is_ok());
    }

    /// Occupies an engine in a slice of the VM. `memory` page 0 must be bound at [`C`].
    fn hold(&self, asid: Asid, memory: &Memory) -> JobId {
        self.hold_at(asid, 60, C, memory)
    }

    /// The same at another address, in another ring.
    fn hold_at(&self, asid: Asid, ring_idx: u32, addr: u64, memory: &Memory) -> JobId {
        memory.set(0, 0);
        memory.set(8, 0);
        let job = self.submit(asid, ring_idx, &[packet(OP_HOLD, |p| p.dst = addr.into())]);
        while memory.get(8) == 0 {
            std::thread::yield_now();
        }
        job
    }

    /// Lets go what [`Rig::hold`] holds.
    fn let_go(&self, memory: &Memory) {
        memory.set(0, 1);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.device.shutdown();
        if std::thread::panicking() {
            // The failed test may have left an engine in a slice that it holds.
            return;
        }
        for engine in self.engines.drain(..) {
            assert!(engine.join().is_ok(), "an engine panicked");
        }
    }
}

fn config(engines: u8) -> SoftConfig {
    SoftConfig { index: 3, name: "soft3".into(), engines, ledger: Some(1 << 20), ..SoftConfig::default() }
}

fn label(asid: u32) -> VmLabel {
    VmLabel { guest: "vm0".into(), ctx_id: asid * 10, generation: 7 }
}

fn faults(log: &[Event]) -> Vec<Fault> {
    let fault = |e: &Event| if let Event::Fault(fault) = e { Some(*fault) } else { None };
    log.iter().filter_map(fault).collect()
}

fn retired(log: &[Event]) -> Vec<Asid> {
    log.iter().filter_map(|e| if let Event::Retired(asid) = e { Some(*asid) } else { None }).collect()
}

fn done(log: &[Event]) -> Vec<JobId> {
    log.iter().filter_map(|e| if let Event::Done(job, _) = e { Some(*job) } else { None }).collect()
}

/// Guest memory.
#[derive(Clone)]
struct Memory(Arc<Region>);

impl Memory {
    fn new(pages: u64) -> Self {
        let size = pages * PAGE_SIZE;
        let identity = RegionIdentity { inode: (0, 0), offset: 0, size, gpa: 0 };
        Self(Region::new(identity, MmapRegion::new(size as usize).unwrap()))
    }

    fn extent(&self, page: u64, pages: u64, writable: bool) -> Extent<'_> {
        Extent { region: &self.0, offset: page * PAGE_SIZE, pages, writable }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        self.0.mapping().get_atomic_ref(offset as usize).unwrap()
    }

    fn get(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    fn set(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.0.mapping().as_volatile_slice().read_slice(&mut bytes, offset as usize).unwrap();
        bytes
    }

    /// Bytes that tell pages and places from each other.
    fn scribble(&self) {
        for offset in (0..self.0.size()).step_by(8) {
            self.set(offset, offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        }
    }
}

fn packet(opcode: u32, operands: impl FnOnce(&mut Packet)) -> Packet {
    let mut packet = Packet { opcode: opcode.into(), ..Packet::default() };
    operands(&mut packet);
    packet
}

fn fill(dst: u64, len: u64, value: u64) -> Packet {
    packet(OP_FILL, |p| (p.dst, p.len, p.value) = (dst.into(), len.into(), value.into()))
}

fn copy(dst: u64, src: u64, len: u64) -> Packet {
    packet(OP_COPY, |p| (p.dst, p.src, p.len) = (dst.into(), src.into(), len.into()))
}

fn reduce(dst: u64, src: u64, len: u64) -> Packet {
    packet(OP_REDUCE, |p| (p.dst, p.src, p.len) = (dst.into(), src.into(), len.into()))
}

fn axpy(dst: u64, src: u64, len: u64, a: f64) -> Packet {
    packet(OP_AXPY, |p| {
        (p.dst, p.src, p.len, p.value) = (dst.into(), src.into(), len.into(), a.to_bits().into())
    })
}

fn chase(dst: u64, src: u64, most: u64, arg: u64) -> Packet {
    packet(OP_CHASE, |p| (p.dst, p.src, p.value, p.arg) = (dst.into(), src.into(), most.into(), arg.into()))
}

fn word_op(opcode: u32, dst: u64, value: u64) -> Packet {
    packet(opcode, |p| (p.dst, p.value) = (dst.into(), value.into()))
}
