//! One guest's vhost-user face, from the moment its VMM connects until it leaves.
//!
//! [`serve`] runs a session on the calling thread (the guest's own, see [`crate::registry`]). The framework adds two
//! threads: one that answers the VMM's messages, and one queue thread on which all three rings are served; both call
//! [`Session`], which implements [`VhostUserBackend`]. Engines come in through [`EventQueue`] only.
//!
//! A framework object lives for one connection and is never used again. `handle_event` never fails, because the
//! framework would end the queue thread without telling anybody; should that thread end all the same, a guard on it
//! blows the session's fuse. A panic ends the session and nothing else.
//!
//! # When rings stop and start again
//! A device reset, a pause and a migration all look alike from here: GET_VRING_BASE (or RESET_DEVICE). When the control
//! queue stops, the guest is frozen: no engine touches its memory. When it starts again, the framework calls
//! `handle_event` for it once even without a kick (so that no kick is lost), and that is where it is noticed:
//! * the ring goes on at an index other than 0: the same driver goes on, and the guest is thawed at once;
//! * it goes on at 0: the first command decides. HELLO drops an old incarnation and thaws what is left; any other
//!   command is from a driver that does not know HELLO and began anew: everything is dropped.
//!
//! A driver that is paused after a multiple of 65,536 commands cannot be told from one that began anew; it loses its
//! contexts, as after a restart of the daemon. Until it is decided no event record is delivered: it could be meant for
//! the driver that is gone.

use crate::eventq::{EventQueue, Waker};
use crate::exit::ExitEvent;
use crate::fuse::{Failure, Fuse};
use crate::guest_memory::{self, GuestMemory};
use crate::log_budget::LogBudget;
use crate::queue::{Budget, RingError, Served, Turn};
use crate::ring::{FrameworkMemory, Ring, RingStatus};
use crate::sigbus::Loss;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as FrameworkError, VhostUserBackend, VhostUserDaemon, VringT};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_gpu_svm::busy_poll::{BusyPoll, Monotonic};
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::protocol::control::VIRTIO_GPU_CMD_SVM_HELLO;
use virtio_gpu_svm::protocol::gpu::{
    VIRTIO_GPU_F_CONTEXT_INIT, VIRTIO_GPU_F_RESOURCE_BLOB, VIRTIO_GPU_F_VIRGL,
};
use virtio_gpu_svm::protocol::{CONTROLQ, CURSORQ, EVENTQ, MAX_QUEUE_SIZE, NUM_QUEUES};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// Virtio features that are offered. A VMM may take fewer; cloud-hypervisor never forwards bits 0..=23, which is why
/// the protocol does not depend on them.
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_IN_ORDER
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_GPU_F_VIRGL
    | 1 << VIRTIO_GPU_F_RESOURCE_BLOB
    | 1 << VIRTIO_GPU_F_CONTEXT_INIT
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The waker's id in the framework's event loop: ids up to the number of queues are its own.
const WAKER_ID: u16 = 4;

/// Queues as people know them, by index.
const QUEUE_NAMES: [&str; NUM_QUEUES] = ["control", "cursor", "event"];

/// What a session needs to know.
pub struct Setup {
    /// Where its guest is opened.
    pub host: Arc<Host>,
    /// The guest's name.
    pub name: Arc<str>,
    /// What it may use.
    pub limits: Limits,
    /// The host devices granted, in the order of its `dev_id`.
    pub devices: Vec<usize>,
    /// Accept memory that its VMM could shrink.
    pub allow_unsealed: bool,
    /// How long its queue thread looks for the next command before it sleeps.
    pub busy_poll: Duration,
    /// Lines of the log that it may cause.
    pub log: Arc<LogBudget>,
}

/// What stands behind the rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    /// The driver that the guest's state belongs to.
    Known,
    /// Rings stopped. `reset`: where the control queue stands does not tell who starts it again, because the VMM said
    /// that the device was reset, or a first HELLO was refused.
    Stopped { reset: bool },
}

/// A [`Driver`] that the message thread and the queue thread change. It is looked at before each command: a lock would make
/// that wait for the answer before, which is on its way to the driver's CPU.
struct DriverCell(AtomicU8);

impl DriverCell {
    const KNOWN: u8 = 0;
    const STOPPED: u8 = 1;
    const RESET: u8 = 2;

    fn get(&self) -> Driver {
        match self.0.load(Ordering::SeqCst) {
            Self::KNOWN => Driver::Known,
            code => Driver::Stopped { reset: code == Self::RESET },
        }
    }

    fn set(&self, driver: Driver) {
        let code = match driver {
            Driver::Known => Self::KNOWN,
            Driver::Stopped { reset: false } => Self::STOPPED,
            Driver::Stopped { reset: true } => Self::RESET,
        };
        self.0.store(code, Ordering::SeqCst);
    }
}

/// One session.
pub struct Session {
    me: Weak<Self>,
    guest: Arc<Guest>,
    events: Arc<EventQueue>,
    memory: Arc<GuestMemory>,
    waker: Arc<Waker>,
    loss: Arc<Loss>,
    fuse: Arc<Fuse>,
    exit: ExitEvent,
    rings: OnceLock<Vec<Ring>>,
    driver: DriverCell,
    /// The queue thread's, which takes it for a visit of the control queue.
    busy_poll: Mutex<BusyPoll>,
    allow_unsealed: bool,
}

/// Serves the VMM that is waiting on `listener`, until it leaves or the session's fuse is blown. `begun` is told of the
/// session as soon as it can be ended from outside.
///
/// # Errors
/// Why the session ended, unless the VMM just left.
pub fn serve(
    setup: &Setup,
    listener: &mut Listener,
    begun: impl FnOnce(&Arc<Session>),
) -> Result<(), Arc<Failure>> {
    let session = Session::open(setup)?;
    let outcome = session.run(setup, listener, begun);
    session.events.set_open(false);
    // The framework's threads have ended; what is left are engines, which the core stops here.
    let sound = !matches!(outcome.as_ref().err().map(|failure| &**failure), Some(Failure::Panicked(_)));
    let closed = sound && catch_unwind(AssertUnwindSafe(|| session.guest.close())).is_ok();
    if !closed {
        session.guest.abandon();
    }
    session.exit.close();
    if sound && !closed { Err(Arc::new(Failure::Panicked("closing the guest"))) } else { outcome }
}

impl Session {
    fn open(setup: &Setup) -> Result<Arc<Self>, Arc<Failure>> {
        let waker = Waker::new().map_err(|e| Failure::start("make an event", &e))?;
        let exit = ExitEvent::new().map_err(|e| Failure::start("make the exit event", &e))?;
        let (waker, memory, fuse) = (
            Arc::new(waker),
            Arc::new(GuestMemory::default()),
            Arc::new(Fuse::new(Arc::clone(&setup.name), Arc::clone(&setup.log))),
        );
        let events = Arc::new(EventQueue::new(Arc::clone(&memory), Arc::clone(&waker), Arc::clone(&fuse)));
        let (name, port) = (Arc::clone(&setup.name), Arc::clone(&events) as _);
        let guest = setup.host.open_guest(name, setup.limits, &setup.devices, port);
        events.attach_guest(&guest);
        Ok(Arc::new_cyclic(|me| Self {
            me: me.clone(),
            guest,
            events,
            memory,
            loss: Loss::new(Arc::clone(&waker)),
            waker,
            fuse,
            exit,
            rings: OnceLock::new(),
            driver: DriverCell(AtomicU8::new(DriverCell::KNOWN)),
            busy_poll: Mutex::new(BusyPoll::new(Monotonic::default(), setup.busy_poll)),
            allow_unsealed: setup.allow_unsealed,
        }))
    }

    /// The core's view of it.
    pub fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    /// How its rings fare, by queue; none before the framework has shown them.
    pub fn rings(&self) -> Vec<RingStatus> {
        self.rings.get().into_iter().flatten().map(Ring::status).collect()
    }

    /// Ends it from outside; [`serve`] returns soon after.
    pub fn end(&self) {
        self.fuse.blow(Failure::Removed);
    }

    fn run(
        self: &Arc<Self>,
        setup: &Setup,
        listener: &mut Listener,
        begun: impl FnOnce(&Arc<Self>),
    ) -> Result<(), Arc<Failure>> {
        let mapped = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new(setup.name.to_string(), Arc::clone(self), mapped)
            .map_err(|e| Failure::start("start the queue thread", &e))?;
        for handler in daemon.get_epoll_handlers() {
            handler
                .register_listener(self.waker.as_fd().as_raw_fd(), EventSet::IN, u64::from(WAKER_ID))
                .map_err(|e| Failure::start("watch the waker", &e))?;
        }
        // The first visit shows us the framework's rings and puts the guard on its thread.
        self.waker.wake();
        daemon.start(listener).map_err(|e| Failure::start("accept the connection", &e))?;
        self.fuse.arm(daemon.shutdown_handle());
        begun(self);
        let waited = daemon.wait();
        // From here on the end of the queue thread is no failure.
        let left = self.outcome(waited);
        self.fuse.blow(Failure::Removed);
        drop(daemon);
        left
    }

    /// Why the message thread ended: our own reason first, then the framework's.
    fn outcome(&self, waited: Result<(), FrameworkError>) -> Result<(), Arc<Failure>> {
        if let Some(reason) = self.fuse.reason() {
            return Err(reason);
        }
        match waited {
            // A VMM that closes its socket shows as either of these.
            Ok(())
            | Err(FrameworkError::HandleRequest(
                VhostUserError::Disconnected
                | VhostUserError::PartialMessage
                | VhostUserError::SocketBroken(_),
            )) => Ok(()),
            Err(FrameworkError::WaitDaemon(_)) => Err(Arc::new(Failure::Panicked("answering the VMM"))),
            Err(error) => Err(Arc::new(Failure::Protocol(error.to_string()))),
        }
    }

    fn driver(&self) -> Driver {
        self.driver.get()
    }

    fn set_driver(&self, driver: Driver) {
        self.driver.set(driver);
        self.events.set_open(driver == Driver::Known);
    }

    /// The control queue's rings stopped: the guest rests until it is known who starts them again.
    fn rest(&self, reset: bool) {
        let reset = reset || self.driver() == Driver::Stopped { reset: true };
        self.set_driver(Driver::Stopped { reset });
        self.guest.freeze();
    }

    fn ring(&self, queue: u16) -> Option<&Ring> {
        self.rings.get().and_then(|rings| rings.get(usize::from(queue)))
    }

    /// On the queue thread.
    fn on_event(&self, event: u16, rings: &[Ring]) {
        self.rings.get_or_init(|| {
            for (ring, queue) in rings.iter().zip(QUEUE_NAMES) {
                ring.set_peers(rings);
                ring.set_fuse(&self.fuse, queue);
            }
            rings.to_vec()
        });
        if let Some(ring) = self.ring(EVENTQ) {
            self.events.attach_ring(ring);
        }
        guard_thread(&self.me);
        match event {
            CONTROLQ | CURSORQ => self.visit(event),
            EVENTQ => self.events.deliver(),
            _ => {
                self.waker.consume();
                self.check_loss();
                self.visit(CONTROLQ);
                self.visit(CURSORQ);
                self.events.deliver();
            }
        }
    }

    /// Memory that has gone ends the session. Until then whoever is in it goes on with zeros.
    fn check_loss(&self) {
        let Some((gpa, thread)) = self.loss.found() else { return };
        if self.fuse.reason().is_none() {
            let thread = thread.map_or("worker".to_owned(), |thread| thread.to_string());
            let (guest, gpa) = (self.guest.name(), format_args!("{gpa:#x}"));
            tracing::info!(%guest, %gpa, %thread, "lost memory was touched");
        }
        self.fuse.blow(Failure::MemoryLost { gpa });
    }

    /// Carries out what the driver has queued.
    fn visit(&self, queue: u16) {
        let Some(ring) = self.ring(queue) else { return };
        let name = if queue == CONTROLQ { "control" } else { "cursor" };
        let before = self.driver();
        if let Err(error) = self.take_turn(queue, ring, name) {
            ring.fail();
            self.fuse.report_ring(name, error);
        }
        for limit in self.guest.quota().newly_reached() {
            self.fuse.report_limit(limit);
        }
        if before != self.driver() {
            // It has just become clear who is there: what waited for that goes out now.
            self.events.deliver();
        }
    }

    fn take_turn(&self, queue: u16, ring: &Ring, name: &'static str) -> Result<(), RingError> {
        let Some(mut turn) = Turn::begin(ring, Budget::COMMANDS, || self.memory.view().rings())? else {
            return Ok(());
        };
        if queue == CONTROLQ && self.driver() == (Driver::Stopped { reset: false }) && turn.next_avail() != 0
        {
            self.guest.thaw();
            self.set_driver(Driver::Known);
        }
        let outcome = self.drain(queue, &mut turn);
        if let Some((error, count)) = turn.refused() {
            self.fuse.report_chain(name, error, count);
        }
        turn.finish().and(outcome)
    }

    fn drain(&self, queue: u16, turn: &mut Turn<'_>) -> Result<(), RingError> {
        // Nobody else asks for it. The cursor queue has nothing that anybody waits for.
        let mut own = self.busy_poll.lock().unwrap_or_else(PoisonError::into_inner);
        let mut none = BusyPoll::new(Monotonic::default(), Duration::ZERO);
        let poll = if queue == CONTROLQ { &mut *own } else { &mut none };
        let served = turn.serve(poll, Guest::is_brief, |command, answer, room| {
            // The ring's lock must not be poisoned by a fault of the core.
            match catch_unwind(AssertUnwindSafe(|| self.carry_out(queue, command, answer, room))) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        match served {
            Served::Empty => {}
            Served::Spent => self.waker.wake(),
            Served::Stopped => self.fuse.blow(Failure::Panicked("carrying out a command")),
        }
        Ok(())
    }

    fn carry_out(&self, queue: u16, command: &[u8], answer: &mut Vec<u8>, room: usize) {
        if queue != CONTROLQ {
            return self.guest.cursor(command, answer, room);
        }
        let hello = is_hello(command);
        if self.driver() != Driver::Known && !hello {
            self.guest.reset();
            self.set_driver(Driver::Known);
        }
        self.guest.control(command, answer, room);
        if hello {
            // A record that was taken before may still be on its way; behind the answer it would seem to be of this life.
            self.events.wait_for_delivery();
            if self.driver() != Driver::Known {
                // Accepted, it has dropped what is not this driver's and let the rest run. Refused, the next command
                // decides; that the queue has moved on from 0 says nothing then.
                let undecided = self.guest.is_frozen();
                self.set_driver(if undecided { Driver::Stopped { reset: true } } else { Driver::Known });
            }
        }
    }
}

/// Whether a command opens a driver's life.
fn is_hello(command: &[u8]) -> bool {
    command.first_chunk().is_some_and(|kind| u32::from_le_bytes(*kind) == VIRTIO_GPU_CMD_SVM_HELLO)
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = Ring;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }
    fn max_queue_size(&self) -> usize {
        usize::from(MAX_QUEUE_SIZE)
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    /// Never STATUS, INFLIGHT_SHMFD or LOG_SHMFD: the framework drops a connection that uses the first two and does
    /// not implement the third as migration needs it.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
    }
    /// The framework has disabled all rings. It does not call `stop_vring`.
    fn reset_device(&self) {
        for ring in self.rings.get().into_iter().flatten() {
            ring.clear_failure();
        }
        self.rest(true);
    }
    fn set_event_idx(&self, _enabled: bool) {
        // The framework has told the rings.
    }
    /// Exactly `size` bytes whatever is asked for: cloud-hypervisor does not survive less.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.guest.config_space();
        let byte = |at: u32| usize::try_from(at).ok().and_then(|at| space.get(at)).copied().unwrap_or(0);
        (0..size).map(|i| byte(offset.saturating_add(i))).collect()
    }
    /// The one writable field, `events_clear`, clears events of which this device has none; all else is ignored, as
    /// the virtio specification allows.
    fn set_config(&self, _offset: u32, _buf: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
    fn update_memory(&self, mapped: FrameworkMemory) -> std::io::Result<()> {
        let old = self.memory.view();
        let accepted =
            guest_memory::accept(mapped.memory().into_inner(), &old.table, self.allow_unsealed, &self.loss);
        let view = match accepted {
            Ok(view) => view,
            Err(error) => {
                let reply = std::io::Error::other(error.to_string());
                self.fuse.blow(error.into());
                return Err(reply);
            }
        };
        let table = Arc::clone(&view.table);
        self.memory.publish(view);
        // Turns take their view under the ring's lock: once each lock was free, nobody uses the old one.
        for ring in self.rings.get().into_iter().flatten() {
            drop(ring.get_ref());
        }
        self.guest.set_memory(table);
        Ok(())
    }
    fn queues_per_thread(&self) -> Vec<u64> {
        // One thread: control commands and deliveries are short, and the engines deliver most records themselves.
        vec![(1 << NUM_QUEUES) - 1]
    }
    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.take()
    }
    /// The framework has taken the ring out of service under the ring's lock, so no turn is under way and none begins.
    fn stop_vring(&self, queue_index: u32) -> std::io::Result<()> {
        let stopped = u16::try_from(queue_index).ok();
        if let Some(ring) = stopped.and_then(|queue| self.ring(queue)) {
            ring.clear_failure();
        }
        if stopped == Some(CONTROLQ) {
            self.rest(false);
        }
        Ok(())
    }
    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        rings: &[Ring],
        _thread: usize,
    ) -> std::io::Result<()> {
        if catch_unwind(AssertUnwindSafe(|| self.on_event(event, rings))).is_err() {
            self.fuse.blow(Failure::Panicked("serving its queues"));
        }
        Ok(())
    }
}

thread_local! {
    static GUARD: RefCell<Option<ThreadGuard>> = const { RefCell::new(None) };
}

/// Blows the fuse when the framework's queue thread ends, for whatever reason.
struct ThreadGuard(Weak<Session>);

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        if let Some(session) = self.0.upgrade() {
            session.fuse.blow(Failure::QueueThread);
        }
    }
}

fn guard_thread(session: &Weak<Session>) {
    GUARD.with_borrow_mut(|guard| {
        guard.get_or_insert_with(|| ThreadGuard(session.clone()));
    });
}
