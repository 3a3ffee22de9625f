//! A device of any kind, guest memory in a file as VMMs have it, and an `Events` that records and may answer.

use daemon::hostmmu::{DEFAULT_BUDGET, HostMmuConfig, HostMmuDevice};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::*;
use virtio_gpu_svm::memory::{Region, RegionIdentity};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::{PAGE_SIZE, errno};
use virtio_gpu_svm::quota::Charge;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

/// C: where tests map memory.
pub const C: u64 = 0x4000_0000;
/// A test that waits longer for an event has failed.
const PATIENCE: Duration = Duration::from_secs(20);
/// Its index, as events name it.
const INDEX: usize = 3;

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Soft,
    SoftNoFaults,
    SoftIdentity,
    SoftNarrow { va_bits: u32 },
    HostMmu { budget: usize },
}

/// What a device said.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    Fault(Fault),
    Done(JobId, JobEnd),
    Flushed(Asid, Ticket),
    Retired(Asid),
}

type Answer = Box<dyn Fn(&dyn Device, Fault) + Send + Sync>;

struct Recorder {
    device: Weak<dyn Device>,
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
        assert_eq!(device, INDEX);
        self.push(Event::Fault(fault));
        if let Some(answer) = self.answer.get() {
            answer(&*self.device.upgrade().unwrap(), fault);
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

/// A running device.
pub struct Rig {
    pub device: Arc<dyn Device>,
    stop: Option<Box<dyn FnOnce()>>,
    events: Arc<Recorder>,
    engines: Vec<JoinHandle<()>>,
    jobs: AtomicU64,
}

impl Rig {
    pub fn new(kind: Kind) -> Self {
        Self::limited(kind, None)
    }

    /// One whose jobs may take so long.
    pub fn limited(kind: Kind, job_limit: Option<Duration>) -> Self {
        match kind {
            Kind::Soft => Self::soft(46, FaultModel::Replayable, AddressModel::Any, job_limit),
            Kind::SoftNoFaults => Self::soft(46, FaultModel::None, AddressModel::Any, job_limit),
            Kind::SoftIdentity => Self::soft(46, FaultModel::Replayable, AddressModel::Identity, job_limit),
            Kind::SoftNarrow { va_bits } => {
                Self::soft(va_bits, FaultModel::Replayable, AddressModel::Any, job_limit)
            }
            Kind::HostMmu { budget } => {
                Self::with_workers(HostMmuConfig { budget, job_limit, ..hostmmu_config() })
            }
        }
    }

    fn soft(
        va_bits: u32,
        fault_model: FaultModel,
        address_model: AddressModel,
        job_limit: Option<Duration>,
    ) -> Self {
        let config = SoftConfig {
            index: INDEX,
            name: "soft3".into(),
            engines: 2,
            va_bits,
            fault_model,
            address_model,
            ledger: Some(1 << 20),
            job_limit,
            busy_poll: Duration::from_micros(50),
        };
        let device = SoftDevice::new(config);
        let mut rig = Self::with(device.clone());
        device.start(rig.listener());
        for engine in 0..2 {
            let device = Arc::clone(&device);
            rig.engines.push(std::thread::spawn(move || device.run_engine(engine)));
        }
        rig.stop = Some(Box::new(move || device.shutdown()));
        rig
    }

    /// One whose workers have this many address bits and may map this many runs.
    pub fn hostmmu(va_bits: u32, budget: usize) -> Self {
        Self::with_workers(HostMmuConfig { va_bits, budget, ..hostmmu_config() })
    }

    pub fn with_workers(config: HostMmuConfig) -> Self {
        let device = HostMmuDevice::new(config).unwrap();
        let mut rig = Self::with(device.clone());
        device.start(rig.listener());
        rig.stop = Some(Box::new(move || device.shutdown()));
        rig
    }

    fn with(device: Arc<dyn Device>) -> Self {
        let events = Arc::new(Recorder {
            device: Arc::downgrade(&device),
            log: Mutex::default(),
            news: Condvar::new(),
            answer: OnceLock::new(),
        });
        Self { device, stop: None, events, engines: vec![], jobs: AtomicU64::new(0) }
    }

    fn listener(&self) -> Weak<dyn Events> {
        let events: Arc<dyn Events> = self.events.clone();
        Arc::downgrade(&events)
    }

    pub fn vm(&self, asid: u32) -> Asid {
        self.device.vm_create(Asid(asid), label(asid), Charge::default()).unwrap();
        Asid(asid)
    }

    pub fn submit(&self, asid: Asid, ring_idx: u32, packets: &[Packet]) -> JobId {
        self.device.check_packets(packets).unwrap();
        let id = JobId(self.jobs.fetch_add(1, Ordering::Relaxed) + 1);
        self.device.submit(asid, Job { id, ring_idx, packets: packets.to_vec() }).unwrap();
        id
    }

    /// Submits to ring 0 and waits for the end.
    pub fn run(&self, asid: Asid, packets: &[Packet]) -> JobEnd {
        self.run_on(asid, 0, packets)
    }

    /// Submits and waits for the end.
    pub fn run_on(&self, asid: Asid, ring_idx: u32, packets: &[Packet]) -> JobEnd {
        let job = self.submit(asid, ring_idx, packets);
        self.end_of(job)
    }

    /// Runs a job that misses one translation and gets none: it ends with -EFAULT there, told by a fault or not.
    pub fn run_missing(&self, asid: Asid, packets: &[Packet]) -> JobEnd {
        let job = self.submit(asid, 0, packets);
        if self.device.info().fault_model == FaultModel::Replayable {
            let fault = self.wait(|log| faults(log).into_iter().find(|fault| fault.job == job));
            self.device.resume(fault.stop, Verdict::Fail(errno::EFAULT));
            let end = self.end_of(job);
            assert_eq!((end.addr, end.access), (fault.addr, fault.access));
        }
        let end = self.end_of(job);
        assert_eq!(end.errno, errno::EFAULT);
        end
    }

    /// The first address beyond the space.
    pub fn end(&self) -> u64 {
        1 << self.device.info().va_bits
    }

    /// Every page of the space.
    pub fn all(&self) -> PageRange {
        PageRange { start: 0, end: self.end() / PAGE_SIZE }
    }

    pub fn bind(&self, asid: Asid, addr: u64, memory: &Memory, page: u64, pages: u64) {
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

    pub fn end_of(&self, job: JobId) -> JobEnd {
        self.wait(|log| {
            log.iter().find_map(|e| match e {
                Event::Done(id, end) if *id == job => Some(*end),
                _ => None,
            })
        })
    }

    /// The n-th fault, from 0.
    pub fn fault(&self, n: usize) -> Fault {
        self.wait(|log| faults(log).get(n).copied())
    }

    /// The n-th fault, or none if the job ended before.
    pub fn fault_or_end(&self, n: usize, job: JobId) -> Option<Fault> {
        let ended = |e: &Event| matches!(e, Event::Done(id, _) if *id == job);
        self.wait(|log| match faults(log).get(n) {
            Some(fault) => Some(Some(*fault)),
            None => log.iter().any(ended).then_some(None),
        })
    }

    pub fn faults(&self) -> Vec<Fault> {
        faults(&self.log())
    }

    pub fn wait_retired(&self, asid: Asid) {
        self.wait(|log| log.iter().any(|e| matches!(e, Event::Retired(a) if *a == asid)).then_some(()));
    }

    /// Waits for a flush, and checks that the device says so when it is asked.
    pub fn wait_flush(&self, asid: Asid, flush: Flush) {
        if let Flush::Pending(ticket) = flush {
            let covers = |e: &Event| matches!(e, Event::Flushed(a, t) if *a == asid && *t >= ticket);
            self.wait(|log| log.iter().any(covers).then_some(()));
            assert!(self.device.has_flushed(asid, ticket));
        }
    }

    pub fn log(&self) -> Vec<Event> {
        self.events.log.lock().unwrap().clone()
    }

    /// Answers every fault, on the thread that tells it.
    pub fn answer(&self, answer: impl Fn(&dyn Device, Fault) + Send + Sync + 'static) {
        assert!(self.events.answer.set(Box::new(answer)).is_ok());
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop();
        }
        for engine in self.engines.drain(..) {
            assert!(engine.join().is_ok() || std::thread::panicking(), "an engine panicked");
        }
    }
}

/// A `hostmmu` without limits.
pub fn hostmmu_config() -> HostMmuConfig {
    HostMmuConfig {
        index: INDEX,
        name: "hostmmu3".into(),
        va_bits: 46,
        ledger: Some(1 << 20),
        program: env!("CARGO_BIN_EXE_svmd").into(),
        budget: DEFAULT_BUDGET,
        job_limit: None,
        workers: usize::MAX,
    }
}

/// Whose VM it is.
pub fn label(asid: u32) -> VmLabel {
    VmLabel { guest: "vm0".into(), ctx_id: asid * 10, generation: 7 }
}

fn faults(log: &[Event]) -> Vec<Fault> {
    let fault = |e: &Event| if let Event::Fault(fault) = e { Some(*fault) } else { None };
    log.iter().filter_map(fault).collect()
}

/// Pages of the space from an address on.
pub fn pages(addr: u64, count: u64) -> PageRange {
    let start = addr / PAGE_SIZE;
    PageRange { start, end: start + count }
}

/// xorshift64*; enough to choose cases.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

/// Guest memory.
#[derive(Clone)]
pub struct Memory(pub Arc<Region>);

impl Memory {
    /// The file begins with a page that is not the guest's, so that nobody forgets the region's offset in it.
    pub fn new(pages: u64) -> Self {
        let size = pages * PAGE_SIZE;
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size + PAGE_SIZE).unwrap();
        let file = FileOffset::new(File::from(file), PAGE_SIZE);
        let identity = RegionIdentity { inode: (0, 0), offset: PAGE_SIZE, size, gpa: 0 };
        Self(Region::new(identity, MmapRegion::from_file(file, size as usize).unwrap()))
    }

    pub fn extent(&self, page: u64, pages: u64, writable: bool) -> Extent<'_> {
        Extent { region: &self.0, offset: page * PAGE_SIZE, pages, writable }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        self.0.mapping().get_atomic_ref(offset as usize).unwrap()
    }

    pub fn get(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    pub fn set(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Every word.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.0.size()).step_by(8).map(|offset| self.get(offset))
    }

    /// Sets every word.
    pub fn fill(&self, value: u64) {
        (0..self.0.size()).step_by(8).for_each(|offset| self.set(offset, value));
    }
}
