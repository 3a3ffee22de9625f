//! One schedule's machine: memory, devices with their engines, the core, and the thread of the guest that takes records
//! off the event queue.

use crate::process::{Asked, Mm};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use virtio_gpu_svm_model::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm_model::device::{AddressModel, Device, Events, FaultModel};
use virtio_gpu_svm_model::guest::{EventPort, Guest};
use virtio_gpu_svm_model::host::{Host, Limits};
use virtio_gpu_svm_model::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm_model::protocol::PAGE_SIZE;
use virtio_gpu_svm_model::protocol::event::*;
use virtio_gpu_svm_model::shuttle::rand::{Rng, thread_rng};
use virtio_gpu_svm_model::shuttle::sync::{Condvar, Mutex};
use virtio_gpu_svm_model::shuttle::thread::{self, JoinHandle};
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegion;
use zerocopy::FromBytes;

/// Where guest memory begins.
const GPA: u64 = 0x10_0000;
/// Pages of guest memory.
const PAGES: u64 = 1024;
/// Pages behind them, of a region that can be taken away.
const MORE: u64 = 8;
/// Owned by nobody.
const CANARY: u64 = 0xdead_dead_dead_dead;
/// Words of a page that are looked at.
const WORDS: u64 = 8;

pub const LIMITS: Limits = Limits {
    contexts: 16,
    pending_faults: 8,
    jobs: 32,
    mappings: 8,
    resources: 4,
    // Nothing may depend on time.
    fault_deadline_ms: 0,
    ..Limits::DEFAULT
};

/// Guest memory, kept from schedule to schedule. What a page holds says whose it is.
pub struct Ram {
    region: Arc<Region>,
    more: Arc<Region>,
    /// The page that is taken next; none is taken twice, so that what is free stays as it was left.
    next: AtomicU64,
    free: std::sync::Mutex<Vec<u64>>,
}

impl Ram {
    pub fn new() -> Self {
        let region = |first, pages| {
            let size = pages * PAGE_SIZE;
            let identity = RegionIdentity { inode: (0, first), offset: 0, size, gpa: Self::gpa(first) };
            Region::new(identity, MmapRegion::new(usize::try_from(size).unwrap()).unwrap())
        };
        Self {
            region: region(0, PAGES),
            more: region(PAGES, MORE),
            next: AtomicU64::new(0),
            free: std::sync::Mutex::default(),
        }
    }
    /// Nobody owns anything.
    pub fn clear(&self) {
        self.next.store(0, Ordering::Relaxed);
        self.free.lock().unwrap().clear();
    }
    fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        let (region, first) = if page < PAGES { (&self.region, 0) } else { (&self.more, PAGES) };
        let at = usize::try_from((page - first) * PAGE_SIZE + word * 8).unwrap();
        region.mapping().get_atomic_ref(at).unwrap()
    }
    pub fn get(&self, page: u64, word: u64) -> u64 {
        self.word(page, word).load(Ordering::Acquire)
    }
    /// Pages of a context, the first of them. Each begins with a tag of its owner, the rest is 0.
    pub fn take(&self, ctx_id: u32, pages: u64) -> u64 {
        let first = self.next.fetch_add(pages, Ordering::Relaxed);
        assert!(first + pages <= PAGES, "a scenario that needs more memory");
        self.own(ctx_id, first..first + pages);
        first
    }
    /// A page of the region that can be taken away.
    pub fn take_more(&self, ctx_id: u32) -> u64 {
        self.own(ctx_id, PAGES..PAGES + 1);
        PAGES
    }
    fn own(&self, ctx_id: u32, pages: std::ops::Range<u64>) {
        for page in pages {
            (0..WORDS).for_each(|word| self.word(page, word).store(0, Ordering::Release));
            self.word(page, 0).store(tag(ctx_id, 0), Ordering::Release);
        }
    }
    /// What the VMM tells: all memory, or without the region that can be taken away.
    fn table(&self, all: bool) -> Arc<MemoryTable> {
        let mut regions = vec![Arc::clone(&self.region)];
        regions.extend(all.then(|| Arc::clone(&self.more)));
        Arc::new(MemoryTable::new(regions).unwrap())
    }
    /// Another tag for a page.
    pub fn mark(&self, page: u64, tag: u64) {
        self.word(page, 0).store(tag, Ordering::Release);
    }
    /// Lets a page go: from here on nobody may write to it, and nothing that reads it may be believed.
    pub fn free(&self, page: u64) {
        (0..WORDS).for_each(|word| self.word(page, word).store(CANARY, Ordering::Release));
        self.free.lock().unwrap().push(page);
    }
    pub fn gpa(page: u64) -> u64 {
        GPA + page * PAGE_SIZE
    }
    /// All words of all pages that were taken.
    pub fn snapshot(&self) -> Vec<u64> {
        let taken = self.next.load(Ordering::Relaxed);
        (0..taken).flat_map(|page| (0..WORDS).map(move |word| self.get(page, word))).collect()
    }
    fn check(&self) {
        for page in self.free.lock().unwrap().iter() {
            for word in 0..WORDS {
                let found = self.get(*page, word);
                assert_eq!(found, CANARY, "violation: a page was written after it was let go: {found:#x}");
            }
        }
    }
}

/// What a process of a context writes.
pub fn tag(ctx_id: u32, n: u32) -> u64 {
    u64::from(ctx_id) << 32 | u64::from(n)
}

/// What records have told.
#[derive(Default)]
pub struct Ledger {
    /// Status of jobs that have ended, by `user_data`.
    pub jobs: BTreeMap<u64, i32>,
    /// Invalidations done, by context.
    done: BTreeMap<u32, u64>,
    pub retired: BTreeSet<u32>,
    /// Of the last QUIET.
    pub quiet: u64,
    /// Of the last HELLO that was answered.
    pub incarnation: u64,
    /// Points that jobs and binds wait for, by `user_data`: (GPU VM, ring, point).
    pub waits: BTreeMap<u64, Vec<(u32, u32, u64)>>,
    /// The last end that was told of each ring, and the point that it reached, by (context, GPU VM, ring).
    told: BTreeMap<(u32, u32, u32), (u64, u64)>,
    /// GPU VMs that became unusable.
    pub lost: BTreeSet<(u32, u32)>,
    /// The incarnation of each context that was made.
    lives: BTreeMap<u32, u64>,
}

impl Ledger {
    /// A job or an asynchronous bind has ended.
    fn end(&mut self, end: &JobRecord) {
        let (ctx_id, item, status) = (end.ctx_id.get(), end.user_data.get(), end.status.get());
        let before = self.jobs.insert(item, status);
        assert_eq!(before, None, "violation: a job ended twice");
        let ring = self.told.entry((ctx_id, end.vm_id.get(), end.ring_idx.get())).or_default();
        assert!(ring.0 < item, "violation: ends of a ring out of their order");
        *ring = (item, ring.1.max(end.point.get()));
        for (vm, on, point) in self.waits.remove(&item).unwrap_or_default() {
            let reached = self.told.get(&(ctx_id, vm, on)).map_or(0, |told| told.1);
            assert!(status != 0 || reached >= point, "violation: work was done before what it waits for");
        }
    }
}

/// The control queue's turn.
#[derive(Default)]
pub struct Queue {
    pub jobs: u64,
    /// (context, GPU VM)
    pub destroyed: BTreeSet<(u32, u32)>,
    /// The session has ended: what is still to be answered is answered to nobody.
    pub closed: bool,
}

/// The interrupt of the event queue.
#[derive(Default)]
struct Bell {
    rung: Mutex<(bool, bool)>,
    cond: Condvar,
}

impl Bell {
    fn ring(&self, last: bool) {
        let mut rung = self.rung.lock().unwrap();
        rung.0 = true;
        rung.1 |= last;
        self.cond.notify_one();
    }
    /// Waits; returns whether it was the last time.
    fn wait(&self) -> bool {
        let mut rung = self.rung.lock().unwrap();
        while !rung.0 {
            rung = self.cond.wait(rung).unwrap();
        }
        rung.0 = false;
        rung.1
    }
}

impl EventPort for Bell {
    fn ready(&self) {
        self.ring(false);
    }
}

/// A kind of device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Faults, any address.
    Faults,
    /// No faults, any address.
    Rigid,
    /// Faults in groups, the CPU's own addresses.
    Identity,
}

/// What a scenario needs.
#[derive(Clone, Copy)]
pub struct Needs {
    pub devices: &'static [Kind],
    /// Of each device.
    pub engines: u8,
    /// Whether engines look for work before they sleep.
    pub looks: bool,
    pub limits: Limits,
    /// Whether a fault may be gone when its answer comes.
    pub faults_vanish: bool,
    /// Whether a process may be asked for pages that it does not have.
    pub holes: bool,
}

pub const NEEDS: Needs = Needs {
    devices: &[Kind::Faults],
    engines: 1,
    looks: false,
    limits: LIMITS,
    faults_vanish: false,
    holes: false,
};

pub struct Machine {
    pub ram: Arc<Ram>,
    pub guest: Arc<Guest>,
    pub queue: Mutex<Queue>,
    pub mm: Mutex<Mm>,
    pub ledger: Mutex<Ledger>,
    news: Condvar,
    pub needs: Needs,
    host: Arc<Host>,
    devices: Vec<Arc<SoftDevice>>,
    bell: Arc<Bell>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    over: AtomicBool,
}

impl Machine {
    /// A machine whose driver has said HELLO. Engines work once it is started.
    pub fn new(ram: &Arc<Ram>, needs: Needs) -> Arc<Self> {
        let device = |(index, kind): (usize, &Kind)| {
            let (name, engines) = (format!("soft{index}"), needs.engines);
            let (fault_model, address_model, va_bits) = match kind {
                Kind::Faults => (FaultModel::Replayable, AddressModel::Any, 24),
                Kind::Rigid => (FaultModel::None, AddressModel::Any, 24),
                Kind::Identity => (FaultModel::Replayable, AddressModel::Identity, 48),
            };
            SoftDevice::new(SoftConfig {
                index,
                name,
                engines,
                va_bits,
                fault_model,
                address_model,
                busy_poll: if needs.looks { Duration::from_micros(50) } else { Duration::ZERO },
                ..SoftConfig::default()
            })
        };
        let devices: Vec<_> = needs.devices.iter().enumerate().map(device).collect();
        let host = Host::new(devices.iter().map(|d| Arc::clone(d) as Arc<dyn Device>).collect());
        let bell = Arc::new(Bell::default());
        let granted: Vec<_> = (0..needs.devices.len()).collect();
        let guest = host.open_guest("g", needs.limits, &granted, Arc::clone(&bell) as Arc<dyn EventPort>);
        guest.set_memory(ram.table(true));
        let machine = Self {
            ram: Arc::clone(ram),
            guest,
            queue: Mutex::default(),
            mm: Mutex::default(),
            ledger: Mutex::default(),
            news: Condvar::new(),
            needs,
            host,
            devices,
            bell,
            threads: Mutex::default(),
            over: AtomicBool::new(false),
        };
        machine.hello(1);
        Arc::new(machine)
    }
    /// Engines, the thread for records and the housekeeper begin.
    pub fn start(self: &Arc<Self>) {
        let events = Arc::downgrade(&self.host);
        let mut threads = self.threads.lock().unwrap();
        for device in &self.devices {
            device.start(events.clone() as std::sync::Weak<dyn Events>);
            for engine in 0..device.info().num_engines {
                let device = Arc::clone(device);
                threads.push(thread::spawn(move || device.run_engine(u8::try_from(engine).unwrap())));
            }
        }
        let machine = Arc::clone(self);
        threads.push(thread::spawn(move || machine.take_records()));
        let machine = Arc::clone(self);
        threads.push(thread::spawn(move || machine.keep_house()));
    }
    /// What is left to the host's worker.
    fn keep_house(&self) {
        while !self.over.load(Ordering::SeqCst) {
            self.host.wait_for_work(Duration::MAX);
            self.host.work_off();
        }
    }
    /// The VMM takes the region away that can be.
    pub fn unplug(&self) {
        self.guest.set_memory(self.ram.table(false));
    }
    /// The operator drops the translations of a context.
    pub fn evict(&self, ctx_id: u32) {
        self.guest.evict(ctx_id, None).unwrap();
    }
    /// The rings stop, and nothing of the guest is touched until they go on. No command is carried out meanwhile, and
    /// the guest itself must not write.
    pub fn stop_rings(&self) {
        let _turn = self.queue.lock().unwrap();
        self.guest.freeze();
        let before = self.ram.snapshot();
        // At times long enough for an engine to take a job that it must not.
        let steps = if thread_rng().gen_ratio(1, 4) { 100 } else { 4 };
        (0..steps).for_each(|_| thread::yield_now());
        assert_eq!(self.ram.snapshot(), before, "violation: memory of a frozen guest was written");
        self.guest.thaw();
    }
    /// Something that goes on beside everything else.
    pub fn spawn(self: &Arc<Self>, run: impl FnOnce(&Arc<Self>) + Send + 'static) -> JoinHandle<()> {
        let machine = Arc::clone(self);
        thread::spawn(move || run(&machine))
    }
    /// The session ends; then everything must have come to its end.
    pub fn finish(&self) {
        self.queue.lock().unwrap().closed = true;
        self.guest.close();
        self.bell.ring(true);
        self.over.store(true, Ordering::SeqCst);
        self.host.wake_worker();
        self.devices.iter().for_each(|device| device.shutdown());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap());
        for thread in threads {
            thread.join().unwrap();
        }
        self.ram.check();
        let stats = self.host.stats();
        let sum = stats.counters;
        let ended = sum.faults_served_locally + sum.faults_answered + sum.faults_refused;
        let ended = ended + sum.faults_dropped + sum.faults_throttled;
        assert_eq!(sum.faults_raised, ended, "violation: faults without an end, or with two: {sum:?}");
        assert_eq!(stats.pending_vms, 0, "violation: a fault is pending after the end");
        let ends = sum.jobs_done + sum.jobs_failed + sum.jobs_dropped;
        assert_eq!(sum.jobs_submitted, ends, "violation: jobs without an end, or with two: {sum:?}");
        for (device, status) in self.devices.iter().zip(self.host.devices()) {
            assert_eq!(device.panics(), 0, "violation: an engine panicked");
            assert_eq!(status.retiring, 0, "violation: an asid was not given back");
            assert_eq!(device.faults_raised(), status.faults_raised, "violation: a fault was not heard");
        }
    }

    /// The thread of the guest that takes records off the event queue. Faults are answered in any order.
    fn take_records(&self) {
        let (mut buf, mut asked) = (Vec::new(), Vec::new());
        while !self.bell.wait() {
            loop {
                let incarnation = self.ledger.lock().unwrap().incarnation;
                self.guest.fill_events(&mut buf, size_of::<EventHdr>() + 2 * EVENT_RECORD_BYTES);
                let records = buf.get(size_of::<EventHdr>()..).unwrap_or_default();
                for record in records.chunks(EVENT_RECORD_BYTES) {
                    self.take_record(record, incarnation, &mut asked);
                }
                if !self.answer_one(&mut asked) && buf.is_empty() {
                    break;
                }
            }
        }
    }
    /// Whether there was one to answer.
    fn answer_one(&self, asked: &mut Vec<Asked>) -> bool {
        // A group that does not go on has been dropped.
        let early = asked.iter().find(|fault| !fault.whole);
        early.into_iter().for_each(|fault| self.answer_early(fault));
        let whole: Vec<_> = (0..asked.len()).filter(|at| asked[*at].whole).collect();
        let nth = if whole.len() > 1 { thread_rng().gen_range(0..whole.len()) } else { 0 };
        let chosen = whole.get(nth).map(|at| asked.swap_remove(*at));
        chosen.iter().for_each(|fault| self.answer(fault));
        chosen.is_some()
    }
    /// The group that a record belongs to has it; others of its context that are not whole were dropped.
    fn note_fault(record: FaultRecord, asked: &mut Vec<Asked>) {
        let (ctx_id, cookie) = (record.ctx_id, record.cookie);
        let whole = record.flags.get() & FAULT_LAST_PAGE != 0;
        let prefetch = record.flags.get() & FAULT_PREFETCH != 0;
        asked.retain(|group| group.whole || group.fault.ctx_id != ctx_id || group.fault.cookie == cookie);
        if let Some(group) = asked.iter_mut().find(|group| group.fault.cookie == cookie) {
            let next = group.fault.cpu_addr.get() + group.pages * PAGE_SIZE;
            assert!(!group.whole, "violation: a cookie was reported twice");
            assert_eq!(record.cpu_addr.get(), next, "violation: pages of a group out of their order");
            group.pages += 1;
            group.whole = whole;
        } else {
            let pages = if prefetch { u64::from(record.length_hint.get()) / PAGE_SIZE } else { 1 };
            asked.push(Asked { fault: record, pages, whole });
        }
    }
    fn take_record(&self, record: &[u8], incarnation: u64, asked: &mut Vec<Asked>) {
        let notice = NoticeRecord::read_from_bytes(record).unwrap();
        let (kind, ctx_id, value) = (notice.kind.get(), notice.ctx_id.get(), notice.value.get());
        {
            let mut ledger = self.ledger.lock().unwrap();
            let life = ledger.lives.get(&ctx_id).copied().unwrap_or(incarnation);
            assert!(life >= incarnation, "violation: a record of an earlier incarnation");
            match kind {
                EVENT_FAULT => {}
                EVENT_JOB_DONE | EVENT_BIND_DONE => ledger.end(&JobRecord::read_from_bytes(record).unwrap()),
                EVENT_CONTEXT_LOST => drop(ledger.lost.insert((ctx_id, u32::try_from(value).unwrap()))),
                EVENT_INVAL_DONE => {
                    // A response that came later may have told more.
                    let done = ledger.done.entry(ctx_id).or_default();
                    *done = value.max(*done);
                }
                EVENT_CONTEXT_RETIRED => drop(ledger.retired.insert(ctx_id)),
                EVENT_QUIET => ledger.quiet = value,
                other => panic!("violation: a record of kind {other}"),
            }
        }
        self.news.notify_all();
        if kind == EVENT_FAULT {
            Self::note_fault(FaultRecord::read_from_bytes(record).unwrap(), asked);
        }
    }

    /// Waits until records have told what is looked for.
    pub fn wait<T>(&self, find: impl Fn(&Ledger) -> Option<T>) -> T {
        let mut ledger = self.ledger.lock().unwrap();
        loop {
            if let Some(found) = find(&ledger) {
                return found;
            }
            ledger = self.news.wait(ledger).unwrap();
        }
    }
    /// The status of a job.
    pub fn end_of(&self, job: u64) -> i32 {
        self.wait(|ledger| ledger.jobs.get(&job).copied())
    }
    pub fn wait_done(&self, ctx_id: u32, seq: u64) {
        self.wait(|ledger| ledger.done.get(&ctx_id).is_some_and(|done| *done >= seq).then_some(()));
    }
    /// A response has told how far the invalidations of a context are done.
    pub fn note_done(&self, ctx_id: u32, seq: u64) {
        let mut ledger = self.ledger.lock().unwrap();
        let done = ledger.done.entry(ctx_id).or_default();
        if seq > *done {
            *done = seq;
            drop(ledger);
            self.news.notify_all();
        }
    }
    /// A context was made in this incarnation.
    pub fn note_context(&self, ctx_id: u32) {
        let mut ledger = self.ledger.lock().unwrap();
        let incarnation = ledger.incarnation;
        ledger.lives.insert(ctx_id, incarnation);
    }
}
