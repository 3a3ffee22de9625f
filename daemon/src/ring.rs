//! One virtqueue as the framework sees it: its own vring, with the gaps closed that a VMM or driver could use.
//!
//! Created and configured by the vhost-user thread, worked on by whoever begins a [`Turn`](crate::queue::Turn). The
//! framework's lock around the vring is the queue's lock: a turn holds it from begin to end, so once the framework has
//! taken a ring out of service, nothing of it is in flight.
//!
//! What this adds to the framework's vring:
//! * kick and call files become non-blocking, so that a full or stolen one cannot stop a thread (an engine thread
//!   signals too, and serves other guests);
//! * a queue size that the framework would silently ignore is remembered and fails the ring;
//! * a ring whose driver broke the queue's rules is latched as failed until it is stopped.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, Ordering};
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
    flags: Arc<Flags>,
}

#[derive(Default)]
struct Flags {
    failed: AtomicBool,
    bad_size: AtomicBool,
}

impl Ring {
    /// Whether the driver broke the queue's rules since the ring was last stopped.
    pub fn failed(&self) -> bool {
        self.flags.failed.load(Ordering::Relaxed)
    }
    /// Latches the ring as failed: it is not served until it is stopped and started anew.
    pub fn fail(&self) {
        self.flags.failed.store(true, Ordering::Relaxed);
    }
    /// Forgets a failure: the ring was stopped.
    pub fn clear_failure(&self) {
        self.flags.failed.store(false, Ordering::Relaxed);
    }
    /// Whether the VMM named a size that is no queue size.
    pub fn has_bad_size(&self) -> bool {
        self.flags.bad_size.load(Ordering::Relaxed)
    }
}

/// Sets O_NONBLOCK. The flag belongs to the open file, which the VMM shares; event files of VMMs have it already.
fn nonblocking(file: File) -> Option<File> {
    let set = fcntl_getfl(file.as_fd()).and_then(|flags| fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK));
    // A file that refuses the flag could block us: the ring does without it.
    set.ok().map(|()| file)
}

impl<'a> VringStateGuard<'a, FrameworkMemory> for Ring {
    type G = MutexGuard<'a, VringState<FrameworkMemory>>;
}

impl<'a> VringStateMutGuard<'a, FrameworkMemory> for Ring {
    type G = MutexGuard<'a, VringState<FrameworkMemory>>;
}

impl VringT<FrameworkMemory> for Ring {
    fn new(mem: FrameworkMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self { vring: VringMutex::new(mem, max_queue_size)?, flags: Arc::default() })
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
        self.vring.signal_used_queue()
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
        self.vring.set_enabled(enabled);
    }
    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
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
        self.flags.bad_size.store(!num.is_power_of_two(), Ordering::Relaxed);
        self.vring.set_queue_size(num);
    }
    fn set_queue_event_idx(&self, enabled: bool) {
        self.vring.set_queue_event_idx(enabled);
    }
    fn set_queue_ready(&self, ready: bool) {
        self.vring.set_queue_ready(ready);
    }
    fn set_kick(&self, file: Option<File>) {
        self.vring.set_kick(file.and_then(nonblocking));
    }
    /// An empty kick file is no error: it was read by someone else, or a notification was taken back.
    fn read_kick(&self) -> io::Result<bool> {
        match self.vring.read_kick() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other,
        }
    }
    fn set_call(&self, file: Option<File>) {
        self.vring.set_call(file.and_then(nonblocking));
    }
    fn set_err(&self, file: Option<File>) {
        self.vring.set_err(file);
    }
}
