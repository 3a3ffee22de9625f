//! One virtqueue as the framework sees it: its own vring, with the gaps closed that a VMM or driver could use.
//!
//! Created and configured by the vhost-user thread, worked on by whoever begins a [`Turn`](crate::queue::Turn). The
//! framework's lock around the vring is the queue's lock: a turn holds it from begin to end, so once the framework has
//! taken a ring out of service, nothing of it is in flight.
//!
//! What this adds to the framework's vring:
//! * kick and call files are used by way of [`crate::event_file`], so that a full or stolen one cannot stop a thread (an
//!   engine thread signals too, and serves other guests); one that cannot ends the session, since the ring would be
//!   silent for ever;
//! * a queue size that the framework would silently ignore is remembered and fails the ring;
//! * a kick file that is replaced while the ring runs fails it too: the framework would close the old one and still
//!   watch it, for ever if the VMM keeps it readable, and never watch the new one;
//! * rings of two queues may not lie on each other where the device writes: what it gives back in one would be made
//!   available in the other, and they could keep each other busy without the driver. (Where it only reads they may.)
//! * a ring whose driver broke the queue's rules is latched as failed until it is stopped.

use crate::event_file;
use crate::fuse::{Failure, Fuse};
use crate::queue::{Cost, RingError, Spare};
use crate::registry::lock;
use serde::Serialize;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The framework's own view of guest memory. Nothing here reads rings through it; see
/// [`GuestMemory`](crate::guest_memory::GuestMemory).
pub type FrameworkMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A vring. Clones are the same ring.
#[derive(Clone)]
pub struct Ring {
    vring: VringMutex<FrameworkMemory>,
    shared: Arc<Shared>,
}

/// What is known of a ring without its lock: an engine that holds one ring must not wait for another.
#[derive(Default)]
struct Shared {
    failed: AtomicBool,
    bad_size: AtomicBool,
    kick_replaced: AtomicBool,
    ready: AtomicBool,
    enabled: AtomicBool,
    size: AtomicU16,
    desc: AtomicU64,
    avail: AtomicU64,
    used: AtomicU64,
    /// The guest's other rings.
    peers: OnceLock<Vec<Weak<Self>>>,
    /// Guards who is told of a file that cannot be used, and what nobody could be told yet; a section is a few moves.
    unusable: Mutex<Unusable>,
    counts: Counts,
    /// Our own descriptors of the files that the framework has too. A section is one call that does not wait.
    kick: Mutex<Option<File>>,
    call: Mutex<Option<File>>,
    /// What visits leave to the next one. Changed under the ring's lock too.
    spare: Mutex<Spare>,
}

/// Files that cannot be used.
#[derive(Default)]
struct Unusable {
    /// The session's fuse, and which queue this is.
    told: Option<(Arc<Fuse>, &'static str)>,
    found: Option<(&'static str, io::Error)>,
}

impl Shared {
    fn runs(&self) -> bool {
        self.ready.load(Ordering::Relaxed) && self.enabled.load(Ordering::Relaxed)
    }
    fn areas(&self) -> Areas {
        let at = |place: &AtomicU64| place.load(Ordering::Relaxed);
        Areas::new(at(&self.desc), at(&self.avail), at(&self.used), self.size.load(Ordering::Relaxed))
    }
    /// Ends the session for a file that cannot be used, as soon as both are known.
    fn tell(&self, learn: impl FnOnce(&mut Unusable)) {
        let mut unusable = lock(&self.unusable);
        learn(&mut unusable);
        let Some((fuse, queue)) = unusable.told.clone() else { return };
        let found = unusable.found.take();
        drop(unusable);
        if let Some((file, source)) = found {
            fuse.blow(Failure::RingFile { file, queue, source });
        }
    }
}

/// Where the parts of a ring lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Areas {
    pub(crate) desc: Range<u64>,
    pub(crate) avail: Range<u64>,
    pub(crate) used: Range<u64>,
}

impl Areas {
    /// Sizes of the specification, with the event fields: 16 n, 6 + 2 n, 6 + 8 n.
    pub(crate) fn new(desc: u64, avail: u64, used: u64, size: u16) -> Self {
        let area = |start: u64, entry: u64, fixed: u64| {
            let bytes = u64::from(size).saturating_mul(entry).saturating_add(fixed);
            start..start.saturating_add(bytes)
        };
        Self { desc: area(desc, 16, 0), avail: area(avail, 2, 6), used: area(used, 8, 6) }
    }
    pub(crate) fn are_apart(&self) -> bool {
        apart(&self.desc, &self.avail) && apart(&self.desc, &self.used) && apart(&self.avail, &self.used)
    }
    /// Whether what the device writes of either ring lies in the other.
    fn written_into(&self, other: &Self) -> bool {
        let within = |used: &Range<u64>, ring: &Self| {
            [&ring.desc, &ring.avail, &ring.used].into_iter().any(|area| !apart(used, area))
        };
        within(&self.used, other) || within(&other.used, self)
    }
}

fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

/// What a ring's turns have cost.
#[derive(Default)]
pub(crate) struct Counts {
    turns: AtomicU64,
    chains: AtomicU64,
    refused: AtomicU64,
    descriptors: AtomicU64,
    most_chains: AtomicU32,
    most_descriptors: AtomicU32,
    failures: AtomicU64,
}

impl Counts {
    pub(crate) fn add(&self, cost: Cost) {
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.chains.fetch_add(cost.chains.into(), Ordering::Relaxed);
        self.refused.fetch_add(cost.refused.into(), Ordering::Relaxed);
        self.descriptors.fetch_add(cost.descriptors.into(), Ordering::Relaxed);
        self.most_chains.fetch_max(cost.chains, Ordering::Relaxed);
        self.most_descriptors.fetch_max(cost.descriptors, Ordering::Relaxed);
    }
}

/// How a ring fares, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RingStatus {
    /// Its driver broke the queue's rules; it is ignored until it is stopped.
    pub failed: bool,
    /// How often that happened.
    pub failures: u64,
    /// Visits.
    pub turns: u64,
    /// Chains given back.
    pub chains: u64,
    /// Those of them that were malformed.
    pub refused: u64,
    /// Descriptors copied.
    pub descriptors: u64,
    /// Most chains of one visit.
    pub most_chains: u32,
    /// Most descriptors of one visit.
    pub most_descriptors: u32,
}

impl Ring {
    /// Whether the driver broke the queue's rules since the ring was last stopped.
    pub fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }
    /// Latches the ring as failed: it is not served until it is stopped and started anew.
    pub fn fail(&self) {
        self.shared.failed.store(true, Ordering::Relaxed);
        self.shared.counts.failures.fetch_add(1, Ordering::Relaxed);
    }
    /// Forgets a failure: the ring was stopped.
    pub fn clear_failure(&self) {
        self.shared.failed.store(false, Ordering::Relaxed);
    }
    /// Names the guest's rings, this one among them.
    pub fn set_peers(&self, rings: &[Self]) {
        let others = rings.iter().filter(|ring| !Arc::ptr_eq(&ring.shared, &self.shared));
        self.shared.peers.get_or_init(|| others.map(|ring| Arc::downgrade(&ring.shared)).collect());
    }
    /// Names the session's fuse and the queue: a VMM may have brought a file that cannot be used before.
    pub fn set_fuse(&self, fuse: &Arc<Fuse>, queue: &'static str) {
        self.shared.tell(|unusable| unusable.told = Some((Arc::clone(fuse), queue)));
    }
    /// The file, if it cannot block us; and kept as our own.
    fn usable(&self, name: &'static str, file: Option<File>, own: &Mutex<Option<File>>) -> Option<File> {
        let accepted = file.map(|file| {
            let file = event_file::accept(file)?;
            Ok((file.try_clone()?, file))
        });
        let accepted = accepted.transpose();
        let (ours, file) = accepted
            .map_err(|error: io::Error| self.shared.tell(|unusable| unusable.found = Some((name, error))))
            .ok()
            .flatten()
            .unzip();
        *lock(own) = ours;
        file
    }
    /// Interrupts the driver. Nothing is to be done about a call file that is broken: it is the VMM's own loss.
    pub(crate) fn interrupt(&self) {
        if let Some(call) = &*lock(&self.shared.call) {
            event_file::raise(call.as_fd()).ok();
        }
    }
    /// How it fares.
    pub fn status(&self) -> RingStatus {
        let counts = &self.shared.counts;
        RingStatus {
            failed: self.failed(),
            failures: counts.failures.load(Ordering::Relaxed),
            turns: counts.turns.load(Ordering::Relaxed),
            chains: counts.chains.load(Ordering::Relaxed),
            refused: counts.refused.load(Ordering::Relaxed),
            descriptors: counts.descriptors.load(Ordering::Relaxed),
            most_chains: counts.most_chains.load(Ordering::Relaxed),
            most_descriptors: counts.most_descriptors.load(Ordering::Relaxed),
        }
    }
    /// What the visit before has left.
    pub(crate) fn take_spare(&self) -> Spare {
        std::mem::take(&mut *lock(&self.shared.spare))
    }
    /// Leaves it to the next visit.
    pub(crate) fn return_spare(&self, spare: Spare) {
        *lock(&self.shared.spare) = spare;
    }
    pub(crate) fn counts(&self) -> &Counts {
        &self.shared.counts
    }
    /// Whether the VMM has set it up so that it can be served, as far as guest memory need not be known for that.
    pub(crate) fn check_setup(&self) -> Result<(), RingError> {
        if self.shared.bad_size.load(Ordering::Relaxed) {
            return Err(RingError::BadSize);
        }
        if self.shared.kick_replaced.load(Ordering::Relaxed) {
            return Err(RingError::KickReplaced);
        }
        // One that does not run may still have the places of an earlier driver.
        let mut running = self.shared.peers.get().into_iter().flatten().filter_map(Weak::upgrade);
        let areas = self.shared.areas();
        if running.any(|peer| peer.runs() && peer.areas().written_into(&areas)) {
            return Err(RingError::SharedRings);
        }
        Ok(())
    }
}

impl<'a> VringStateGuard<'a, FrameworkMemory> for Ring {
    type G = MutexGuard<'a, VringState<FrameworkMemory>>;
}

impl<'a> VringStateMutGuard<'a, FrameworkMemory> for Ring {
    type G = MutexGuard<'a, VringState<FrameworkMemory>>;
}

impl VringT<FrameworkMemory> for Ring {
    fn new(mem: FrameworkMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let shared = Shared { size: max_queue_size.into(), ..Shared::default() };
        Ok(Self { vring: VringMutex::new(mem, max_queue_size)?, shared: Arc::new(shared) })
    }
    fn get_ref(&self) -> <Self as VringStateGuard<'_, FrameworkMemory>>::G {
        self.vring.get_ref()
    }
    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, FrameworkMemory>>::G {
        self.vring.get_mut()
    }
    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.vring.add_used(desc_index, len)
    }
    fn signal_used_queue(&self) -> io::Result<()> {
        self.interrupt();
        Ok(())
    }
    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.vring.enable_notification()
    }
    fn disable_notification(&self) -> Result<(), QueueError> {
        self.vring.disable_notification()
    }
    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.vring.needs_notification()
    }
    fn set_enabled(&self, enabled: bool) {
        self.shared.enabled.store(enabled, Ordering::Relaxed);
        self.vring.set_enabled(enabled);
    }
    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        self.shared.desc.store(desc_table, Ordering::Relaxed);
        self.shared.avail.store(avail_ring, Ordering::Relaxed);
        self.shared.used.store(used_ring, Ordering::Relaxed);
        self.vring.set_queue_info(desc_table, avail_ring, used_ring)
    }
    fn queue_next_avail(&self) -> u16 {
        self.vring.queue_next_avail()
    }
    fn set_queue_next_avail(&self, base: u16) {
        self.vring.set_queue_next_avail(base);
    }
    fn set_queue_next_used(&self, idx: u16) {
        self.vring.set_queue_next_used(idx);
    }
    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.vring.queue_used_idx()
    }
    fn set_queue_size(&self, num: u16) {
        self.shared.bad_size.store(!num.is_power_of_two(), Ordering::Relaxed);
        self.shared.size.store(num, Ordering::Relaxed);
        self.vring.set_queue_size(num);
    }
    fn set_queue_event_idx(&self, enabled: bool) {
        self.vring.set_queue_event_idx(enabled);
    }
    fn set_queue_ready(&self, ready: bool) {
        self.shared.ready.store(ready, Ordering::Relaxed);
        self.vring.set_queue_ready(ready);
    }
    /// Of a ring that runs the file is kept: the framework watches it, and must be able to tell it to be forgotten.
    fn set_kick(&self, file: Option<File>) {
        let running = self.shared.runs() && self.vring.get_ref().get_kick().is_some();
        self.shared.kick_replaced.store(running, Ordering::Relaxed);
        if running {
            return;
        }
        self.vring.set_kick(self.usable("kick", file, &self.shared.kick));
    }
    /// An empty kick file is no error: it was read by someone else, or a notification was taken back.
    fn read_kick(&self) -> io::Result<bool> {
        let signalled =
            lock(&self.shared.kick).as_ref().map_or(Ok(true), |kick| event_file::take(kick.as_fd()))?;
        Ok(signalled && self.shared.enabled.load(Ordering::Relaxed))
    }
    fn set_call(&self, file: Option<File>) {
        self.vring.set_call(self.usable("call", file, &self.shared.call));
    }
    fn set_err(&self, file: Option<File>) {
        self.vring.set_err(file);
    }
}
