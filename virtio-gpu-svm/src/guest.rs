//! One guest: a VMM's session. Owns its contexts, its blob resources, its view of guest memory, and the order in which
//! records leave.
//!
//! Commands come from one queue thread; engines announce records; the vhost-user thread changes memory and stops and
//! starts the rings. Locks are taken in the order guest -> context; engines never wait for
//! either.

use crate::backlog::Backlog;
use crate::clock::RunClock;
use crate::context::{Context, NewContext};
use crate::device::Ticket;
use crate::event::{Notice, Record, Stamp, notice_record};
use crate::host::{Host, Limits};
use crate::info::{ContextStatus, ContextSummary, Counters, GuestStatus, HostStats};
use crate::memory::{MemoryTable, Region};
use crate::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_QUIET, EVENT_RECORD_BYTES, EventHdr};
use crate::protocol::gpu::GpuConfig;
use crate::protocol::limit::Limit;
use crate::protocol::{
    CONFIG_SIZE, MAX_BINDS, MAX_COMMAND_BYTES, MAX_PACKETS, MAX_RUNS, SVM_CONFIG_OFFSET, SVM_MAGIC,
    SvmConfig, VERSION_MAJOR, VERSION_MINOR,
};
use crate::quota::{Charge, Full, Quota};
use crate::resource::Blob;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TRIES, TryLockError};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Longest wait for an engine to pass a checkpoint before it is looked at again; a guard against a lost wake-up, not a
/// deadline.
const RECHECK: Duration = Duration::from_millis(10);
/// Contexts whose deadlines are looked at in a slice.
const LOOKS: usize = 64;
/// How long a device may take to retire what a panic has left behind; engines need a slice.
const GRACE: Duration = Duration::from_secs(1);

/// Told when a guest has records to deliver. Called from engine and queue threads, with no lock of the core held.
pub trait EventPort: Send + Sync {
    /// There may be records; fetch them with [`Guest::fill_events`].
    fn ready(&self);
    /// A thread that serves others too has panicked in what it did for this guest: its session must end.
    fn failed(&self) {}
}

/// Why a request about a context or a resource was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not there.
    #[error("no context {0}")]
    NoContext(u32),
    /// There already.
    #[error("context {0} exists")]
    ContextExists(u32),
    /// Not there.
    #[error("no resource {0}")]
    NoResource(u32),
    /// There already.
    #[error("resource {0} exists")]
    ResourceExists(u32),
    /// There, but not attached.
    #[error("resource {0} is not attached to the context")]
    NotAttached(u32),
    /// Over the quota.
    #[error(transparent)]
    Full(#[from] Full),
}

/// What a HELLO found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Contexts of earlier incarnations that engines may still use.
    pub retiring: u32,
    /// Host devices of this guest.
    pub num_devices: u32,
}

struct Resource {
    blob: Arc<Blob>,
    /// Contexts that may use it. Each an entry of its own: a hash table would keep the room of the most that there were.
    attached: BTreeSet<u32>,
    /// Of the resource itself, which goes with it.
    _one: Charge,
    /// Of what describes the blob, and of attachments.
    bytes: Charge,
}

impl Resource {
    /// What an attachment takes: an entry of a tree.
    const ATTACHMENT_BYTES: u64 = 16;

    fn attach(&mut self, ctx_id: u32) -> Result<(), Full> {
        if !self.attached.contains(&ctx_id) {
            self.bytes.grow(Self::ATTACHMENT_BYTES)?;
            self.attached.insert(ctx_id);
        }
        Ok(())
    }
    fn detach(&mut self, ctx_id: u32) -> bool {
        let was_attached = self.attached.remove(&ctx_id);
        if was_attached {
            self.bytes.shrink(Self::ATTACHMENT_BYTES);
        }
        was_attached
    }
}

#[derive(Default)]
struct Inner {
    contexts: BTreeMap<u32, Arc<Context>>,
    resources: HashMap<u32, Resource>,
    /// Destroyed, but a device still holds something of them; by generation.
    retiring: HashMap<u64, (Arc<Context>, Farewell)>,
    /// Of the contexts in both lists.
    contexts_charge: Charge,
    memory: Arc<MemoryTable>,
    /// Of the driver; 0 before its HELLO.
    incarnation: u64,
    /// A QUIET record is due when nothing retires any more.
    quiet_due: bool,
    frozen: bool,
    /// Sums over contexts that have retired.
    past: Counters,
}

impl Inner {
    /// Contexts of earlier incarnations that engines may still use.
    fn retiring_of_earlier(&self) -> usize {
        self.retiring.values().filter(|(_, farewell)| *farewell == Farewell::None).count()
    }
}

/// Whether the driver is told when a context has retired.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Farewell {
    /// It asked for the context's end, and waits for it.
    Record,
    /// The context ended with its incarnation or session.
    None,
}

#[derive(Default)]
struct Outbox {
    notices: VecDeque<Notice>,
    /// Contexts whose CONTEXT_RETIRED is among them: such records would pile up in front of a driver that fetches none.
    retired_charge: Charge,
    /// Contexts with a record that waits, each once: one record a turn.
    ready: VecDeque<Arc<Context>>,
}

/// One guest.
pub struct Guest {
    name: Arc<str>,
    host: Arc<Host>,
    epoch: u64,
    limits: Limits,
    quota: Arc<Quota>,
    devices: Vec<usize>,
    port: Arc<dyn EventPort>,
    /// Guards contexts, resources, memory and the driver's life. Contexts and the outbox may be locked under it.
    inner: Mutex<Inner>,
    /// Guards the order of records; nothing is locked under it.
    outbox: Mutex<Outbox>,
    sequence: AtomicU64,
    /// Passes while the rings run.
    clock: RunClock,
    /// Whether its deadlines are being looked at.
    expiring: AtomicBool,
    /// Counts what engines have let go of, for those who wait for it.
    passed: Mutex<u64>,
    waiters: Condvar,
    /// A panic may have left its state half changed: what is waited for may never come.
    broken: AtomicBool,
}

impl Guest {
    pub(crate) fn new(
        host: Arc<Host>,
        name: &str,
        epoch: u64,
        limits: Limits,
        devices: Vec<usize>,
        port: Arc<dyn EventPort>,
    ) -> Arc<Self> {
        let clock = RunClock::new(Arc::clone(host.clock()));
        let quota = Quota::new(&limits);
        let inner = Inner { contexts_charge: quota.charge(Limit::Contexts), ..Inner::default() };
        let outbox = Outbox { retired_charge: quota.charge(Limit::Contexts), ..Outbox::default() };
        Arc::new(Self {
            name: name.into(),
            host,
            epoch,
            limits,
            quota,
            devices,
            port,
            inner: Mutex::new(inner),
            outbox: Mutex::new(outbox),
            sequence: AtomicU64::new(0),
            clock,
            expiring: AtomicBool::new(false),
            passed: Mutex::new(0),
            waiters: Condvar::new(),
            broken: AtomicBool::new(false),
        })
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Changes whenever state of this guest was lost: with each session.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }
    /// What it holds.
    pub fn quota(&self) -> &Arc<Quota> {
        &self.quota
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn lock_outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out one command of the control queue and writes the response, at most `room` bytes. Waits for nothing
    /// but, on RESOURCE_UNREF, one slice of each engine.
    pub fn control(self: &Arc<Self>, request: &[u8], response: &mut Vec<u8>, room: usize) {
        crate::command::control(self, request, response, room);
    }
    /// The same for the cursor queue.
    pub fn cursor(self: &Arc<Self>, request: &[u8], response: &mut Vec<u8>, room: usize) {
        crate::command::cursor(self, request, response, room);
    }
    /// The protocol's part of config space and the contents of the capset.
    pub(crate) fn capset(&self) -> SvmConfig {
        SvmConfig {
            magic: SVM_MAGIC.into(),
            version_major: VERSION_MAJOR.into(),
            version_minor: VERSION_MINOR.into(),
            daemon_epoch: self.epoch.into(),
            num_devices: self.num_devices().into(),
            max_contexts: self.limits.contexts.into(),
            max_runs: MAX_RUNS.into(),
            max_binds: MAX_BINDS.into(),
            max_packets: MAX_PACKETS.into(),
            max_mappings: self.limits.mappings.into(),
            max_pending_faults: self.limits.pending_faults.into(),
            max_jobs: self.limits.jobs.into(),
            event_record_bytes: u32::try_from(EVENT_RECORD_BYTES).unwrap_or(u32::MAX).into(),
            max_command_bytes: u32::try_from(MAX_COMMAND_BYTES).unwrap_or(u32::MAX).into(),
            reserved: 0.into(),
        }
    }
    /// Config space now. PROTOCOL 2.2.
    pub fn config_space(&self) -> [u8; CONFIG_SIZE] {
        let gpu = GpuConfig { num_capsets: 1.into(), ..GpuConfig::default() };
        let mut space = [0; CONFIG_SIZE];
        let capset = self.capset();
        let (head, tail) = space.split_at_mut(SVM_CONFIG_OFFSET);
        if gpu.write_to_prefix(head).is_err() || capset.write_to_prefix(tail).is_err() {
            unreachable!("config space has room for both structs");
        }
        space
    }
    fn num_devices(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(u32::MAX)
    }
    /// The host device behind the guest's number of it.
    pub fn host_device(&self, dev_id: u32) -> Option<usize> {
        self.devices.get(usize::try_from(dev_id).ok()?).copied()
    }
    /// Whether its rings are stopped and its jobs with them.
    pub fn is_frozen(&self) -> bool {
        self.lock().frozen
    }
    /// Whether the driver has said HELLO in this session.
    pub(crate) fn greeted(&self) -> bool {
        self.lock().incarnation != 0
    }

    /// Opens a driver's life: contexts and resources of an earlier incarnation are dropped, and what is left runs if it
    /// was frozen. PROTOCOL 4.1.
    pub(crate) fn hello(self: &Arc<Self>, incarnation: u64) -> Greeting {
        if self.lock().incarnation != incarnation {
            self.drop_everything();
        }
        if self.is_frozen() {
            self.thaw();
        }
        let mut inner = self.lock();
        inner.incarnation = incarnation;
        let retiring = inner.retiring_of_earlier();
        inner.quiet_due = retiring > 0;
        let retiring = u32::try_from(retiring).unwrap_or(u32::MAX);
        Greeting { retiring, num_devices: self.num_devices() }
    }

    /// PROTOCOL 3.4.
    pub(crate) fn context_create(self: &Arc<Self>, new: NewContext) -> Result<(), Error> {
        let mut inner = self.lock();
        if inner.contexts.contains_key(&new.ctx_id) {
            return Err(Error::ContextExists(new.ctx_id));
        }
        inner.contexts_charge.grow(1)?;
        let memory = Arc::clone(&inner.memory);
        inner.contexts.insert(new.ctx_id, Context::new(new, self, memory));
        Ok(())
    }
    /// A context of an id.
    ///
    /// # Errors
    /// [`Error::NoContext`].
    pub fn context(&self, ctx_id: u32) -> Result<Arc<Context>, Error> {
        self.lock().contexts.get(&ctx_id).cloned().ok_or(Error::NoContext(ctx_id))
    }
    /// PROTOCOL 3.4: answered at once; a CONTEXT_RETIRED record tells when engines have let go.
    pub(crate) fn context_destroy(self: &Arc<Self>, ctx_id: u32) -> Result<(), Error> {
        let context = {
            let mut inner = self.lock();
            let context = inner.contexts.remove(&ctx_id).ok_or(Error::NoContext(ctx_id))?;
            for resource in inner.resources.values_mut() {
                resource.detach(ctx_id);
            }
            // Records are for drivers of this protocol; another one posts no buffers for them.
            let farewell = if inner.incarnation == 0 { Farewell::None } else { Farewell::Record };
            inner.retiring.insert(context.generation, (Arc::clone(&context), farewell));
            context
        };
        self.end_context(&context);
        Ok(())
    }
    /// Destroys a context that stands in the list of retiring ones.
    fn end_context(self: &Arc<Self>, context: &Arc<Context>) {
        if context.destroy() {
            self.on_context_retired(context);
        }
    }
    /// No device holds anything of a destroyed context any more.
    pub(crate) fn on_context_retired(&self, context: &Arc<Context>) {
        self.part_from(self.lock(), context);
    }
    /// The same for a thread that serves others too. Returns whether it is done: not where the lock is held.
    pub(crate) fn try_context_retired(&self, context: &Arc<Context>) -> bool {
        for _ in 0..TRIES {
            let inner = match self.inner.try_lock() {
                Ok(inner) => inner,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    std::hint::spin_loop();
                    continue;
                }
            };
            self.part_from(inner, context);
            return true;
        }
        false
    }
    fn part_from(&self, mut inner: MutexGuard<'_, Inner>, context: &Arc<Context>) {
        {
            let Some((_, farewell)) = inner.retiring.remove(&context.generation) else { return };
            let quiet = inner.quiet_due && inner.retiring_of_earlier() == 0;
            inner.quiet_due &= !quiet;
            let retired = Notice { kind: EVENT_CONTEXT_RETIRED, ctx_id: context.ctx_id, value: 0, errno: 0 };
            let value = inner.incarnation;
            let quiet = quiet.then_some(Notice { kind: EVENT_QUIET, ctx_id: 0, value, errno: 0 });
            let told = farewell == Farewell::Record;
            let notices = [told.then_some(retired), quiet];
            // Queued before the guest's lock is released, so that a new incarnation drops it or never sees it.
            let mut outbox = self.lock_outbox();
            outbox.notices.extend(notices.into_iter().flatten());
            if told {
                outbox.retired_charge.take_from(&mut inner.contexts_charge, 1);
            } else {
                inner.contexts_charge.shrink(1);
            }
            drop(outbox);
            // In the same step as it leaves the list, so that sums count it once at any time.
            inner.past.add(&context.counters());
        }
        drop(inner);
        self.port.ready();
    }

    /// PROTOCOL 3.5.
    pub(crate) fn resource_create(&self, blob: Blob) -> Result<(), Error> {
        let mut inner = self.lock();
        let id = blob.resource_id;
        if inner.resources.contains_key(&id) {
            return Err(Error::ResourceExists(id));
        }
        let mut one = self.quota.charge(Limit::Resources);
        one.grow(1)?;
        let mut bytes = self.quota.charge(Limit::ResourceBytes);
        bytes.grow(blob.bytes())?;
        let resource = Resource { blob: Arc::new(blob), attached: BTreeSet::new(), _one: one, bytes };
        inner.resources.insert(id, resource);
        Ok(())
    }
    /// PROTOCOL 3.5.
    pub(crate) fn resource_attach(&self, ctx_id: u32, resource_id: u32) -> Result<(), Error> {
        let mut inner = self.lock();
        if !inner.contexts.contains_key(&ctx_id) {
            return Err(Error::NoContext(ctx_id));
        }
        let resource = inner.resources.get_mut(&resource_id).ok_or(Error::NoResource(resource_id))?;
        Ok(resource.attach(ctx_id)?)
    }
    /// PROTOCOL 3.5: its mappings in the context are unmapped.
    pub(crate) fn resource_detach(&self, ctx_id: u32, resource_id: u32) -> Result<(), Error> {
        let context = {
            let mut inner = self.lock();
            let context = inner.contexts.get(&ctx_id).cloned().ok_or(Error::NoContext(ctx_id))?;
            let resource = inner.resources.get_mut(&resource_id).ok_or(Error::NoResource(resource_id))?;
            if !resource.detach(ctx_id) {
                return Err(Error::NotAttached(resource_id));
            }
            context
        };
        context.unmap_blob(resource_id);
        Ok(())
    }
    /// PROTOCOL 3.5: the guest frees the pages after the answer, so it waits until engines have let go.
    pub(crate) fn resource_unref(&self, resource_id: u32) -> Result<(), Error> {
        let (attached, contexts) = {
            let mut inner = self.lock();
            let resource = inner.resources.remove(&resource_id).ok_or(Error::NoResource(resource_id))?;
            let attached = resource.attached.iter().filter_map(|ctx_id| inner.contexts.get(ctx_id).cloned());
            (attached.collect::<Vec<_>>(), inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        attached.iter().for_each(|context| context.unmap_blob(resource_id));
        let flushes = contexts.iter().flat_map(|context| context.flush_all()).collect();
        self.wait_flushed(flushes);
        self.wait_retired(&contexts);
        Ok(())
    }
    /// The blob of a resource that is attached to a context.
    pub(crate) fn attached_blob(&self, ctx_id: u32, resource_id: u32) -> Result<Arc<Blob>, Error> {
        let inner = self.lock();
        let resource = inner.resources.get(&resource_id).ok_or(Error::NoResource(resource_id))?;
        if !resource.attached.contains(&ctx_id) {
            return Err(Error::NotAttached(resource_id));
        }
        Ok(Arc::clone(&resource.blob))
    }

    /// A context has records for the guest.
    pub(crate) fn announce(&self, context: &Arc<Context>) {
        self.lock_outbox().queue(context);
        self.port.ready();
    }
    /// Whether there is a record to deliver.
    pub fn has_events(&self) -> bool {
        let outbox = self.lock_outbox();
        !outbox.notices.is_empty() || !outbox.ready.is_empty()
    }
    /// Moves records into an event buffer of `room` bytes: clears `buf` and fills it with a header and as many records
    /// as fit, one of each context in turn. Leaves `buf` empty when there is no record, or room for none. To be called
    /// by one thread at a time. PROTOCOL 7.
    pub fn fill_events(&self, buf: &mut Vec<u8>, room: usize) {
        buf.clear();
        let fits = room.saturating_sub(size_of::<EventHdr>()) / EVENT_RECORD_BYTES;
        let first = self.sequence.load(Ordering::Relaxed);
        let mut records = 0_u32;
        while usize::try_from(records).is_ok_and(|records| records < fits) {
            let Some(record) = self.next_record() else { break };
            if buf.is_empty() {
                buf.extend_from_slice(EventHdr::default().as_bytes());
            }
            buf.extend_from_slice(&record);
            records = records.saturating_add(1);
        }
        let hdr = EventHdr {
            num_records: records.into(),
            flags: 0.into(),
            daemon_epoch: self.epoch.into(),
            sequence: first.into(),
        };
        if records > 0 && hdr.write_to_prefix(buf).is_err() {
            unreachable!("the header was put there");
        }
    }
    fn next_record(&self) -> Option<Record> {
        let stamp = || Stamp {
            timestamp: self.host.now_ns(),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
        };
        loop {
            let context = {
                let mut outbox = self.lock_outbox();
                if let Some(notice) = outbox.notices.pop_front() {
                    outbox.retired_charge.shrink((notice.kind == EVENT_CONTEXT_RETIRED).into());
                    return Some(notice_record(notice, stamp()));
                }
                outbox.next()?
            };
            // One that is being changed is announced anew; the ring's lock is not held for as long as that takes.
            let Some((record, more)) = context.take_record(stamp) else { continue };
            if more {
                self.lock_outbox().queue(&context);
            }
            if record.is_some() {
                return record;
            }
        }
    }

    /// Publishes a new memory table: what stood on removed regions is invalidated; waits for at most one slice of each
    /// engine.
    pub fn set_memory(&self, table: Arc<MemoryTable>) {
        let (gone, contexts) = {
            let mut inner = self.lock();
            let kept: HashSet<u64> = table.regions().iter().map(|region| region.id()).collect();
            let old = std::mem::replace(&mut inner.memory, Arc::clone(&table));
            let gone: Vec<Arc<Region>> =
                old.regions().iter().filter(|region| !kept.contains(&region.id())).cloned().collect();
            (gone, inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        for context in &contexts {
            let vms = context.change_memory(&table, &gone);
            for (device, asid) in vms {
                gone.iter().for_each(|region| self.host.device_of(device).drop_region(asid, region.id()));
            }
            context.refill();
        }
        if !gone.is_empty() {
            // GPU VMs on their way out hold regions too.
            self.wait_retired(&contexts);
        }
    }
    /// The memory table now.
    pub fn memory(&self) -> Arc<MemoryTable> {
        Arc::clone(&self.lock().memory)
    }
    /// The rings stopped: stops this guest's jobs; on return no engine touches its memory. Until [`Guest::thaw`],
    /// [`Guest::reset`] or a HELLO no other command may be carried out.
    pub fn freeze(&self) {
        let contexts: Vec<Arc<Context>> = {
            let mut inner = self.lock();
            inner.frozen = true;
            self.clock.stop();
            inner.contexts.values().cloned().collect()
        };
        let flushes = contexts.iter().flat_map(|context| context.set_frozen(true)).collect();
        self.wait_flushed(flushes);
        self.wait_retired(&contexts);
    }
    /// The rings run again with the driver that left them.
    pub fn thaw(&self) {
        let contexts: Vec<Arc<Context>> = {
            let mut inner = self.lock();
            inner.frozen = false;
            self.clock.start();
            inner.contexts.values().cloned().collect()
        };
        for context in contexts {
            context.set_frozen(false);
        }
        self.port.ready();
    }
    /// The rings run again from nothing: the driver began anew; drops every context and resource.
    pub fn reset(self: &Arc<Self>) {
        self.drop_everything();
        let mut inner = self.lock();
        inner.incarnation = 0;
        inner.frozen = false;
        self.clock.start();
    }
    /// The session ended: as [`Guest::reset`], and the guest leaves the host's list. On return no engine touches its
    /// memory. A panic in this is the caller's to catch; [`Guest::abandon`] is left then.
    pub fn close(self: &Arc<Self>) {
        self.reset();
        self.wait_until(|| self.have_retired());
        if self.is_broken() {
            return self.abandon();
        }
        let past = self.lock().past;
        self.host.forget_guest(self, &past);
    }
    /// The same after a panic in what was done for it: every GPU VM is given up, and its device has a while to retire it.
    /// What does not retire is left behind; engines that are still in it touch memory that they keep mapped themselves.
    pub fn abandon(self: &Arc<Self>) {
        self.fail();
        let contexts = {
            let mut inner = self.lock();
            inner.resources.clear();
            let alive = std::mem::take(&mut inner.contexts).into_values();
            let retiring = std::mem::take(&mut inner.retiring).into_values().map(|(context, _)| context);
            alive.chain(retiring).collect::<Vec<_>>()
        };
        contexts.iter().for_each(Context::abandon);
        *self.lock_outbox() = Outbox::default();
        let until = Instant::now().checked_add(GRACE);
        let over = || until.is_none_or(|until| Instant::now() >= until);
        self.wait_while(|| {
            for context in &contexts {
                catch_unwind(AssertUnwindSafe(|| context.catch_up())).ok();
            }
            contexts.iter().any(|context| context.is_retiring()) && !over()
        });
        let past = self.lock().past;
        self.host.forget_guest(self, &past);
    }
    /// Its state may be half changed: who waits for it waits no longer.
    pub(crate) fn fail(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.wake_waiters();
    }
    /// The same, found by a thread that serves others too.
    pub(crate) fn fail_session(&self) {
        self.fail();
        self.port.failed();
    }
    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }
    /// Drops contexts and resources, and every record that waits.
    fn drop_everything(self: &Arc<Self>) {
        let contexts = {
            let mut inner = self.lock();
            inner.resources.clear();
            inner.quiet_due = false;
            for (_, farewell) in inner.retiring.values_mut() {
                *farewell = Farewell::None;
            }
            let contexts: Vec<_> = std::mem::take(&mut inner.contexts).into_values().collect();
            for context in &contexts {
                inner.retiring.insert(context.generation, (Arc::clone(context), Farewell::None));
            }
            contexts
        };
        contexts.iter().for_each(|context| self.end_context(context));
        self.lock_outbox().clear();
    }

    /// Its own time: what has passed while its rings ran.
    pub(crate) fn run_time(&self) -> Duration {
        self.clock.now()
    }
    /// Leaves a look at its deadlines to the host's worker, unless one is under way.
    pub(crate) fn leave_deadlines(self: &Arc<Self>, backlog: &Backlog) {
        if !self.expiring.swap(true, Ordering::SeqCst) {
            backlog.leave_deadlines(self);
        }
    }
    /// Ends faults that this guest has not answered in time: a slice of the contexts behind `after`. Returns the last one
    /// that was looked at, unless that was all.
    pub(crate) fn expire_some(&self, after: Option<u32>) -> Option<u32> {
        let last = self.expire_slice(after);
        self.expiring.store(last.is_some(), Ordering::SeqCst);
        last
    }
    fn expire_slice(&self, after: Option<u32>) -> Option<u32> {
        let deadline = Duration::from_millis(self.limits.fault_deadline_ms.into());
        let run = self.run_time().checked_sub(deadline).filter(|_| !deadline.is_zero())?;
        let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let some: Vec<_> =
            self.lock().contexts.range(behind).take(LOOKS).map(|(_, c)| Arc::clone(c)).collect();
        // Where faults end the slice ends too.
        let busy = some.iter().find(|context| context.expire_faults(run));
        let last = busy.or(some.get(LOOKS.wrapping_sub(1)))?;
        Some(last.ctx_id)
    }
    /// Wakes who waits for engines.
    pub(crate) fn wake_waiters(&self) {
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        *passed = passed.wrapping_add(1);
        self.waiters.notify_all();
    }
    /// Waits until engines have passed tickets of GPU VMs: at most one slice each.
    fn wait_flushed(&self, flushes: Vec<(usize, crate::device::Asid, Ticket)>) {
        self.wait_until(|| {
            flushes
                .iter()
                .all(|(device, asid, ticket)| self.host.device_of(*device).has_flushed(*asid, *ticket))
        });
    }
    /// Waits until engines have let go of destroyed contexts, and of destroyed GPU VMs of these.
    fn wait_retired(&self, contexts: &[Arc<Context>]) {
        self.wait_until(|| {
            contexts.iter().for_each(Context::catch_up);
            self.have_retired() && contexts.iter().all(|context| !context.is_retiring())
        });
    }
    /// Whether engines have let go of all destroyed contexts. What devices have told of them counts: who waits for it
    /// does not wait for the host's worker.
    fn have_retired(&self) -> bool {
        let told: Vec<_> = {
            let inner = self.lock();
            let retiring = inner.retiring.values().map(|(context, _)| context);
            retiring.filter(|context| context.has_news()).cloned().collect()
        };
        for context in told {
            context.catch_up();
            context.say_farewell();
        }
        self.lock().retiring.is_empty()
    }
    fn wait_until(&self, done: impl Fn() -> bool) {
        self.wait_while(|| !self.is_broken() && !done());
    }
    fn wait_while(&self, waits: impl Fn() -> bool) {
        loop {
            let before = *self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            if !waits() {
                return;
            }
            let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            if *passed == before {
                // Both ends of the wait lead to another look at what is waited for.
                drop(self.waiters.wait_timeout(passed, RECHECK).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// GPU VMs alive on a host device.
    pub(crate) fn vms_on(&self, device: usize) -> usize {
        self.list().iter().flat_map(|context| context.asids()).filter(|(on, _)| *on == device).count()
    }
    /// Adds this guest's counts.
    pub(crate) fn add_to(&self, stats: &mut HostStats) {
        let (alive, mut sum, all) = {
            let inner = self.lock();
            let retiring = inner.retiring.values().map(|(context, _)| Arc::clone(context));
            let all: Vec<_> = inner.contexts.values().cloned().chain(retiring).collect();
            (inner.contexts.len(), inner.past, all)
        };
        stats.contexts = stats.contexts.saturating_add(alive);
        for context in all {
            stats.gpu_vms = stats.gpu_vms.saturating_add(context.load().0);
            sum.add(&context.counters());
        }
        stats.counters.add(&sum);
    }
    /// What it looks like.
    pub fn status(&self) -> GuestStatus {
        let (mut status, contexts) = {
            let inner = self.lock();
            let regions = inner.memory.regions();
            let status = GuestStatus {
                name: self.name.to_string(),
                epoch: self.epoch,
                incarnation: inner.incarnation,
                devices: self.devices.clone(),
                contexts: inner.contexts.len(),
                retiring: inner.retiring.len(),
                resources: inner.resources.len(),
                memory_bytes: regions.iter().map(|region| region.size()).fold(0, u64::saturating_add),
                memory_regions: regions.len(),
                pending_faults: 0,
                frozen: inner.frozen,
                limits: Vec::new(),
            };
            (status, inner.contexts.values().cloned().collect::<Vec<_>>())
        };
        // Without the guest's lock: one of them may be held for a whole command.
        status.pending_faults =
            contexts.iter().map(|context| context.load().1).fold(0, usize::saturating_add);
        let most = |limit| contexts.iter().map(|context| context.held(limit)).max().unwrap_or(0);
        status.limits = self.quota.status(most);
        status
    }
    /// What it holds, counted from the objects themselves: while nothing happens, what its quota says. For checks.
    pub fn recount(&self) -> Vec<(Limit, u64)> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let inner = self.lock();
        let outbox = self.lock_outbox();
        let untold = outbox.notices.iter().filter(|notice| notice.kind == EVENT_CONTEXT_RETIRED).count();
        let attached =
            |resource: &Resource| count(resource.attached.len()).saturating_mul(Resource::ATTACHMENT_BYTES);
        let bytes = |resource: &Resource| resource.blob.bytes().saturating_add(attached(resource));
        let mut sums = vec![
            (
                Limit::Contexts,
                count(inner.contexts.len().saturating_add(inner.retiring.len()).saturating_add(untold)),
            ),
            (Limit::Resources, count(inner.resources.len())),
            (Limit::ResourceBytes, inner.resources.values().map(bytes).fold(0, u64::saturating_add)),
        ];
        let retiring = inner.retiring.values().map(|(context, _)| Arc::clone(context));
        let contexts: Vec<_> = inner.contexts.values().cloned().chain(retiring).collect();
        drop((inner, outbox));
        for limit in [
            Limit::GpuVms,
            Limit::TotalMappings,
            Limit::TableBytes,
            Limit::TotalPendingFaults,
            Limit::TotalJobs,
            Limit::QueueBytes,
        ] {
            let of = |context: &Arc<Context>| context.recount(limit);
            sums.push((limit, contexts.iter().map(of).fold(0, u64::saturating_add)));
        }
        sums
    }
    /// Its contexts with all their mappings, by id.
    pub fn contexts(&self) -> Vec<ContextStatus> {
        self.list().iter().map(|context| context.status()).collect()
    }
    /// Its contexts without their mappings, by id.
    pub fn context_summaries(&self) -> Vec<ContextSummary> {
        self.list().iter().map(|context| context.summary()).collect()
    }
    fn list(&self) -> Vec<Arc<Context>> {
        self.lock().contexts.values().cloned().collect()
    }
    /// Drops the translations of a context, on one host device or on all; the next accesses fault. Returns the pages
    /// that had a translation.
    ///
    /// # Errors
    /// [`Error::NoContext`].
    pub fn evict(&self, ctx_id: u32, device: Option<usize>) -> Result<u64, Error> {
        Ok(self.context(ctx_id)?.evict(device))
    }
}

impl Outbox {
    fn clear(&mut self) {
        *self = Self { retired_charge: self.retired_charge.sibling(), ..Self::default() };
    }
    fn queue(&mut self, context: &Arc<Context>) {
        if !context.queued.swap(true, Ordering::Relaxed) {
            self.ready.push_back(Arc::clone(context));
        }
    }
    fn next(&mut self) -> Option<Arc<Context>> {
        let context = self.ready.pop_front()?;
        context.queued.store(false, Ordering::Relaxed);
        Some(context)
    }
}
