//! One guest: a VMM's session. Owns its contexts, its blob resources (`resources`), its view of guest memory, and the order
//! in which records leave (`records`). `life` begins and ends what belongs to one driver, `engines` knows when engines have
//! let go of it, `status` tells people.
//!
//! Commands come from one queue thread; engines announce records; the vhost-user thread changes memory and stops and
//! starts the rings. Locks are taken in the order guest -> context; engines never wait for
//! either.

mod engines;
mod life;
mod records;
mod resources;
mod status;

pub use life::Greeting;

use crate::backlog::Backlog;
use crate::clock::RunClock;
use crate::context::{Context, NewContext};
use crate::event::Notice;
use crate::host::{Host, Limits};
use crate::info::Counters;
use crate::memory::MemoryTable;
use crate::numbered::Numbered;
use crate::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_QUIET, EVENT_RECORD_BYTES};
use crate::protocol::gpu::GpuConfig;
use crate::protocol::limit::Limit;
use crate::protocol::{
    CONFIG_SIZE, MAX_BINDS, MAX_COMMAND_BYTES, MAX_PACKETS, MAX_RUNS, SVM_CONFIG_OFFSET, SVM_MAGIC,
    SvmConfig, VERSION_MAJOR, VERSION_MINOR,
};
use crate::quota::{Charge, Full, Quota};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TRIES, TryLockError};
use records::Outbox;
use resources::Resource;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Contexts whose deadlines are looked at in a slice.
const LOOKS: usize = 64;

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

#[derive(Default)]
struct Inner {
    contexts: BTreeMap<u32, Arc<Context>>,
    resources: HashMap<u32, Resource>,
    /// Destroyed, but a device still holds something of them; by generation.
    retiring: Numbered<u64, (Arc<Context>, Farewell)>,
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

/// One guest.
pub struct Guest {
    name: Arc<str>,
    host: Arc<Host>,
    epoch: u64,
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
    /// What engines have let go of, and who waits for that; nothing is locked under it.
    passed: Mutex<engines::Passed>,
    waiters: Condvar,
    /// A panic may have left its state half changed: what is waited for may never come.
    broken: AtomicBool,
}

impl Guest {
    pub(crate) fn new(
        host: Arc<Host>,
        name: Arc<str>,
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
            name,
            host,
            epoch,
            quota,
            devices,
            port,
            inner: Mutex::new(inner),
            outbox: Mutex::new(outbox),
            sequence: AtomicU64::new(0),
            clock,
            expiring: AtomicBool::new(false),
            passed: Mutex::default(),
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
    /// Whether a command's own work is done within microseconds whatever it holds, so that answers before it may wait for
    /// its own. What it lets go on (pages of a prefetch) is done in a few slices at most.
    pub fn is_brief(request: &[u8]) -> bool {
        crate::command::is_brief(request)
    }
    /// The protocol's part of config space and the contents of the capset.
    pub(crate) fn capset(&self) -> SvmConfig {
        SvmConfig {
            magic: SVM_MAGIC.into(),
            version_major: VERSION_MAJOR.into(),
            version_minor: VERSION_MINOR.into(),
            daemon_epoch: self.epoch.into(),
            num_devices: self.num_devices().into(),
            max_contexts: self.quota.limits().contexts.into(),
            max_runs: MAX_RUNS.into(),
            max_binds: MAX_BINDS.into(),
            max_packets: MAX_PACKETS.into(),
            max_mappings: self.quota.limits().mappings.into(),
            max_pending_faults: self.quota.limits().pending_faults.into(),
            max_jobs: self.quota.limits().jobs.into(),
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
        let deadline = Duration::from_millis(self.quota.limits().fault_deadline_ms.into());
        let run = self.run_time().checked_sub(deadline).filter(|_| !deadline.is_zero())?;
        let behind = (after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let some: Vec<_> =
            self.lock().contexts.range(behind).take(LOOKS).map(|(_, c)| Arc::clone(c)).collect();
        // Where faults end the slice ends too.
        let busy = some.iter().find(|context| context.expire_faults(run));
        let last = busy.or(some.get(LOOKS.wrapping_sub(1)))?;
        Some(last.ctx_id)
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
