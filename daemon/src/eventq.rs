//! The hop into the guest: event records go from the core into buffers that the driver has posted.
//!
//! [`EventQueue`] is the core's [`EventPort`]. The thread that has something to report (an engine that faulted, the
//! queue thread) writes the record itself, straight into the guest's buffer, and interrupts the guest: no thread of
//! the daemon is woken in between.
//!
//! Rules:
//! * A buffer is taken only when a record is ready, and given back with whole records in it.
//! * A buffer with room for no record is given back empty, so that a driver's mistake shows instead of hanging.
//! * Nothing is delivered while it is open whether the driver behind the rings is still the one that the records are
//!   meant for ([`EventQueue::set_open`]).
//! * No record is left behind: a delivery goes on until there is no record or no buffer. The records are made before
//!   [`EventPort::ready`] is called, and deliveries exclude each other by the ring's lock, so the last caller sees all
//!   of them; without a buffer the queue asks to be kicked and looks once more.
//! * An engine serves many guests, so a delivery that a driver could prolong for ever ends with the turn's budget and
//!   is handed to the guest's own queue thread.

use crate::fuse::{Failure, Fuse};
use crate::guest_memory::GuestMemory;
use crate::queue::{Budget, Next, RingError, Turn};
use crate::ring::Ring;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use vhost_user_backend::VringT;
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::protocol::event::EVENT_RECORD_BYTES;

/// Bytes of the smallest buffer that holds a record.
const SMALLEST_BUFFER: usize = EVENT_RECORD_BYTES + size_of::<virtio_gpu_svm::protocol::event::EventHdr>();

/// An eventfd that makes the queue thread visit its rings without a kick.
#[derive(Debug)]
pub struct Waker(OwnedFd);

impl Waker {
    /// A waker that is not set.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }
    /// Sets it. Async-signal-safe.
    pub fn wake(&self) {
        // Fails only when it is set 2^64 - 2 times already, and then it is set.
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).ok();
    }
    /// Takes it back.
    pub fn consume(&self) {
        // Fails only when it is not set.
        rustix::io::read(&self.0, &mut [0; 8]).ok();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One guest's event queue.
pub struct EventQueue {
    guest: OnceLock<Weak<Guest>>,
    ring: OnceLock<Ring>,
    memory: Arc<GuestMemory>,
    waker: Arc<Waker>,
    fuse: Arc<Fuse>,
    open: AtomicBool,
}

impl EventQueue {
    /// An event queue that delivers nothing until [`Self::attach_guest`] and [`Self::attach_ring`].
    pub fn new(memory: Arc<GuestMemory>, waker: Arc<Waker>, fuse: Arc<Fuse>) -> Self {
        Self {
            guest: OnceLock::new(),
            ring: OnceLock::new(),
            memory,
            waker,
            fuse,
            open: AtomicBool::new(true),
        }
    }
    /// Names the guest whose records are delivered. The core's guest owns this port, so it is held weakly.
    pub fn attach_guest(&self, guest: &Arc<Guest>) {
        self.guest.get_or_init(|| Arc::downgrade(guest));
    }
    /// Names the ring.
    pub fn attach_ring(&self, ring: &Ring) {
        self.ring.get_or_init(|| ring.clone());
    }
    /// Whether records may be delivered now. Opening does not deliver.
    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::SeqCst);
    }

    /// Waits for a delivery that is under way, if there is one.
    pub fn wait_for_delivery(&self) {
        drop(self.ring.get().map(VringT::get_ref));
    }

    /// Delivers what there is.
    pub fn deliver(&self) {
        let (Some(guest), Some(ring)) = (self.guest.get().and_then(Weak::upgrade), self.ring.get()) else {
            return;
        };
        // Cheap for the frequent case that someone else has delivered already.
        if ring.failed() || !guest.has_events() {
            return;
        }
        if let Err(error) = self.deliver_to(&guest, ring) {
            ring.fail();
            self.fuse.report_ring("event", error);
        }
    }

    fn deliver_to(&self, guest: &Guest, ring: &Ring) -> Result<(), RingError> {
        let Some(mut turn) = Turn::begin(ring, Budget::EVENTS, || self.memory.view().rings())? else {
            return Ok(());
        };
        // Looked at when the ring is known to run: a ring that began anew waits for the driver to show itself.
        if !self.open.load(Ordering::SeqCst) {
            return Ok(());
        }
        let outcome = self.fill(guest, &mut turn);
        if let Some((error, count)) = turn.refused() {
            self.fuse.report_chain("event", error, count);
        }
        turn.finish().and(outcome)
    }

    fn fill(&self, guest: &Guest, turn: &mut Turn<'_>) -> Result<(), RingError> {
        let mut records = turn.take_room();
        let filled = self.fill_with(&mut records, guest, turn);
        turn.return_room(records);
        filled
    }

    fn fill_with(&self, records: &mut Vec<u8>, guest: &Guest, turn: &mut Turn<'_>) -> Result<(), RingError> {
        let mut none = Vec::new();
        while guest.has_events() {
            let token = match turn.next(&mut none)? {
                Next::Chain(token) => token,
                Next::Empty if turn.rearm()? => continue,
                Next::Empty => return Ok(()),
                Next::Spent => {
                    self.waker.wake();
                    return Ok(());
                }
            };
            records.clear();
            // The ring's lock must not be poisoned by a fault of the core.
            let filled = catch_unwind(AssertUnwindSafe(|| guest.fill_events(records, token.room())));
            if filled.is_err() {
                turn.put_back(token);
                self.fuse.blow(Failure::Panicked("delivering events"));
                return Ok(());
            }
            if records.is_empty() && token.room() >= SMALLEST_BUFFER {
                // The record was withdrawn; keep the buffer for the next one.
                turn.put_back(token);
                return Ok(());
            }
            turn.complete(token, records)?;
        }
        Ok(())
    }
}

impl EventPort for EventQueue {
    fn failed(&self) {
        self.fuse.blow(Failure::Panicked("serving its faults and jobs"));
    }
    fn ready(&self) {
        // The caller may be an engine, which serves other guests.
        if catch_unwind(AssertUnwindSafe(|| self.deliver())).is_err() {
            self.fuse.blow(Failure::Panicked("delivering events"));
        }
    }
}
