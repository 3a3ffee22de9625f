//! The agent's core, whatever way leads to the device: contexts, their memory, and answers to their faults.
//!
//! Owns every context of this guest, the table of each context's arenas (guest CPU address -> guest-physical pages) and
//! the ledger of answers. Called by the broker on behalf of processes; its own thread pumps the device.
//!
//! Rules that keep the device out of memory that is somebody else's:
//! * An arena is released only when no engine can use it: after the invalidation of its last part is done, after its
//!   context is retired, or, when the daemon has lost everything, after the next life has heard that all is quiet.
//! * An answer carries the invalidation sequence that its context held before the table was read. What is withdrawn is
//!   covered by no answer before its invalidation is sent. So an answer from an old table is refused by the device.
//! * An arena is owned by exactly one entry of `State`; whoever removes the entry releases it. It counts towards the
//!   limits until its maker has taken it back (`accounts`).
//! * A context is named by its key: numbers come back, and a process that knows one must not meet who has it next.
//!
//! The state's lock is never held over a command to the device or a call of [`ArenaMemory`].

mod accounts;
mod answer;
mod arenas;
mod epoch;
mod key;
mod lanes;
mod ledger;
mod pump;
mod status;
mod table;
mod turns;

pub use accounts::ARENA_OVERHEAD_BYTES;
pub use key::ContextKey;
pub use ledger::{Answer, Ledger, LedgerEntry, LedgerReport};
pub use status::{AgentStatus, ArenaReport, ContextReport, DeviceReport, MapReport, TrustLevel};
pub use table::{Arena, ArenaTable, Window, Withdrawal};

use crate::driver::{self, SvmDevice};
use crate::memory_file::MemoryFile;
use crate::message::{AgentLimit, Reached};
use crate::trust::Trust;
use accounts::Accounts;
use answer::PendingAnswer;
use epoch::Life;
use key::{Keys, Lease};
use lanes::Lanes;
use rustix::io::Errno;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use turns::Turns;
use virtio_gpu_svm::protocol::control::GetDeviceResp;
use virtio_gpu_svm::protocol::event::EVENT_RECORD_BYTES;
use virtio_gpu_svm::protocol::limit::Limit;

/// How long the first HELLO's predecessors may take to become quiet before [`Agent::start`] gives up.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);
/// Most host devices that are listed; a daemon has a handful.
const MAX_DEVICES: u32 = 64;

/// Memory that an [`ArenaMemory`] made: pinned, so that `pages` stay true until it is released.
#[derive(Debug)]
pub struct ArenaPages {
    /// Names it towards its maker.
    pub id: u64,
    /// Maps it.
    pub fd: OwnedFd,
    /// Where it begins in the file.
    pub offset: u64,
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
}

/// Memory of a process that an [`ArenaMemory`] has pinned, so that `pages` stay true until it is released.
#[derive(Debug)]
pub struct ImportedPages {
    /// Names it towards who pinned it.
    pub id: u64,
    /// Guest-physical address of each page.
    pub pages: Vec<u64>,
}

/// Makes memory that processes map and devices reach. In a guest the keeper does ([`crate::keeper`]).
pub trait ArenaMemory: Send + Sync {
    /// Makes `len` bytes of zeros, a multiple of the page size.
    ///
    /// # Errors
    /// When there is not enough memory, or the maker is gone.
    fn create(&self, len: u64) -> std::io::Result<ArenaPages>;

    /// Pins memory that a process brings.
    ///
    /// # Errors
    /// When it cannot be pinned, the maker is gone, or (`Unsupported`) the maker has no way to: one whose guest memory is
    /// all of its own making.
    fn import(&self, _file: &MemoryFile) -> std::io::Result<ImportedPages> {
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported))
    }

    /// Keeps what pins memory of a trusted process, so that it stays when this process ends. Returns its name.
    ///
    /// # Errors
    /// When the maker is gone, or (`Unsupported`) is one that cannot.
    fn hold(&self, _ring: OwnedFd) -> std::io::Result<u64> {
        Err(std::io::Error::from(std::io::ErrorKind::Unsupported))
    }

    /// Takes the memory back. Called once for each, when no engine can use it any more.
    fn release(&self, id: u64);
}

/// Takes the records of one context. Called with no lock held.
pub trait EventSink: Send + Sync {
    /// Takes a record. Must not wait.
    fn push(&self, record: &[u8; EVENT_RECORD_BYTES]);

    /// Whether the context's process has gone, so that nothing need be begun for it.
    fn has_left(&self) -> bool {
        false
    }
}

/// Who a context belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Owner {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// The program's name, for people.
    pub name: String,
}

/// What an operator may choose.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Pages that one answer covers: an aligned window around the fault, cut to the arena. A power of two up to 512.
    pub fault_around_pages: u32,
    /// Hold answers back until [`Agent::release_answers`].
    pub hold_answers: bool,
    /// Answers that the ledger remembers; older ones are only counted.
    pub ledger_entries: usize,
    /// Bytes of arenas that one context may have.
    pub context_arena_bytes: u64,
    /// Bytes of arenas that all contexts of one user may have, [`ARENA_OVERHEAD_BYTES`] for each included.
    pub user_arena_bytes: u64,
    /// Bytes of arenas in all, [`ARENA_OVERHEAD_BYTES`] for each included.
    pub total_arena_bytes: u64,
    /// Arenas that one context may have: each costs its maker a descriptor, whatever its size.
    pub context_arenas: usize,
    /// Arenas that all contexts of one user may have.
    pub user_arenas: usize,
    /// Arenas in all.
    pub total_arenas: usize,
    /// Parts that the arenas of one context may be in once something was cut away.
    pub context_parts: usize,
    /// Whose processes are trusted.
    pub trust: Trust,
    /// Threads that act on what the device says, the one that listens to it included.
    pub serving_threads: usize,
    /// How often a device with contexts is asked for a sign of life.
    pub pulse: Duration,
    /// Contexts have the numbers up to this one, by turns.
    pub last_ctx_id: u32,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            fault_around_pages: 16,
            hold_answers: false,
            ledger_entries: 65_536,
            context_arena_bytes: 256 << 20,
            user_arena_bytes: 3 << 30,
            total_arena_bytes: 4 << 30,
            context_arenas: 1024,
            user_arenas: (1 << 18) / 4 * 3,
            total_arenas: 1 << 18,
            context_parts: 8192,
            trust: Trust::default(),
            serving_threads: std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4)),
            pulse: Duration::from_secs(2),
            last_ctx_id: 0x00ff_ffff,
        }
    }
}

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver failed; the agent cannot go on.
    #[error("the device cannot be driven")]
    Driver(#[from] driver::Error),
    /// The device refused.
    #[error("the device refused {what}: {}", virtio_gpu_svm::protocol::errno::name(*.status))]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Negative errno.
        status: i32,
        /// The limit that it is about (PROTOCOL 9).
        limit: Option<Limit>,
    },
    /// No such context, or it has ended.
    #[error("context {0} is gone")]
    NoContext(u32),
    /// No such arena in this context.
    #[error("no arena {0} in this context")]
    NoArena(u64),
    /// A length or an address that is not page aligned, empty, or out of range.
    #[error("range {va:#x}+{len:#x} is unaligned, empty or out of range")]
    BadRange {
        /// First address.
        va: u64,
        /// Bytes.
        len: u64,
    },
    /// The range overlaps an arena of the context.
    #[error("range {va:#x}+{len:#x} overlaps an arena")]
    Overlap {
        /// First address.
        va: u64,
        /// Bytes.
        len: u64,
    },
    /// A quota is used up.
    #[error("{} ({limit} bytes)", .which.advice())]
    Quota {
        /// Whose it is.
        which: AgentLimit,
        /// The quota.
        limit: u64,
    },
    /// Some of the range was cut away before.
    #[error("not all of {offset:#x}+{len:#x} of the arena is left")]
    CutBefore {
        /// From the arena's beginning.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Too many of something.
    #[error("{} ({limit})", .which.advice())]
    TooMany {
        /// Of what.
        which: AgentLimit,
        /// The quota.
        limit: usize,
    },
    /// Memory could not be made.
    #[error("arena memory")]
    Memory(#[source] std::io::Error),
    /// Memory that a process brings could not be pinned.
    #[error("the process' memory cannot be pinned")]
    Import(#[source] std::io::Error),
    /// The daemon has lost this guest's state and has not opened a new life yet.
    #[error("the daemon is being asked for a new life")]
    NotOpen,
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// Result of the agent.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error as processes see it: a negative errno.
    pub fn status(&self) -> i32 {
        let errno = match self {
            Error::Driver(driver::Error::TooLarge { .. }) => Errno::MSGSIZE,
            Error::Driver(_) | Error::NoContext(_) | Error::NotOpen => Errno::PIPE,
            Error::Refused { status, .. } => return *status,
            Error::NoArena(_) | Error::CutBefore { .. } => Errno::NOENT,
            Error::BadRange { .. } => Errno::INVAL,
            Error::Overlap { .. } => Errno::EXIST,
            Error::Quota { .. } | Error::TooMany { .. } => Errno::NOSPC,
            Error::Memory(_) | Error::Thread(_) => Errno::NOMEM,
            Error::Import(error) if error.kind() == std::io::ErrorKind::Unsupported => Errno::OPNOTSUPP,
            Error::Import(error) => Errno::from_io_error(error).unwrap_or(Errno::NOMEM),
        };
        -errno.raw_os_error()
    }

    /// The limit that is reached, if that is it.
    pub fn reached(&self) -> Option<Reached> {
        match self {
            Self::Quota { which, .. } | Self::TooMany { which, .. } => Some(Reached::Agent(*which)),
            Self::Refused { limit, .. } => limit.map(Reached::Host),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContextState {
    /// CTX_CREATE is under way.
    Creating,
    Alive,
    /// CTX_DESTROY was sent; its arenas wait for CONTEXT_RETIRED.
    Retiring,
}

struct Context {
    key: ContextKey,
    lease: Lease,
    owner: Owner,
    state: ContextState,
    /// Negative errno of a CONTEXT_LOST record, else 0.
    lost: i32,
    sink: Arc<dyn EventSink>,
    arenas: ArenaTable,
    /// Bytes and number of arenas being made.
    reserved: (u64, usize),
    faults: u64,
    /// A group of page requests whose last record has not come: its cookie and first CPU address.
    group: Option<(u64, u64)>,
}

struct State {
    life: Life,
    contexts: HashMap<u32, Context>,
    keys: Keys,
    /// Arenas of contexts that the daemon has lost; they wait for quiet.
    orphans: Vec<Arena>,
    /// Answers on their way to the device, by token.
    answers: HashMap<u64, PendingAnswer>,
    /// Faults whose answers are held back; `None` when answers go at once.
    held: Option<Vec<answer::Asked>>,
    ledger: Ledger,
    /// Arenas that count towards the limits, wherever they are.
    accounts: Accounts,
}

/// The agent.
pub struct Agent {
    device: Arc<SvmDevice>,
    memory: Arc<dyn ArenaMemory>,
    options: AgentOptions,
    state: Mutex<State>,
    /// Signalled when `life` changes.
    life_changed: Condvar,
    next_token: AtomicU64,
    stopping: AtomicBool,
    releaser: Mutex<Option<Sender<Arena>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    lanes: Lanes,
    /// At whoever makes memory.
    turns: Turns,
    devices: Mutex<Devices>,
    /// As the last HELLO was answered.
    num_devices: AtomicU32,
}

/// Host devices as the daemon of `epoch` has described them.
#[derive(Default)]
struct Devices {
    epoch: u64,
    list: Vec<GetDeviceResp>,
}

impl Agent {
    /// Opens a life of the driver on `device` and starts the agent's threads. Returns when the daemon has nothing left
    /// of an earlier life.
    ///
    /// # Errors
    /// When the device does not answer, or refuses.
    pub fn start(
        device: Arc<SvmDevice>,
        memory: Arc<dyn ArenaMemory>,
        options: AgentOptions,
    ) -> Result<Arc<Self>> {
        let (releaser, released) = mpsc::channel();
        let held = options.hold_answers.then(Vec::new);
        let state = State {
            life: Life::begin(0),
            contexts: HashMap::new(),
            keys: Keys::new(options.last_ctx_id),
            orphans: Vec::new(),
            answers: HashMap::new(),
            held,
            ledger: Ledger::new(options.ledger_entries),
            accounts: Accounts::default(),
        };
        let agent = Arc::new(Self {
            device,
            memory,
            options,
            state: Mutex::new(state),
            life_changed: Condvar::new(),
            next_token: AtomicU64::new(1),
            stopping: AtomicBool::new(false),
            releaser: Mutex::new(Some(releaser)),
            threads: Mutex::new(Vec::new()),
            lanes: Lanes::default(),
            turns: Turns::default(),
            devices: Mutex::new(Devices::default()),
            num_devices: AtomicU32::new(0),
        });
        match agent.start_threads(released).and_then(|()| agent.open()) {
            Ok(()) => Ok(agent),
            Err(error) => {
                agent.stop();
                Err(error)
            }
        }
    }

    fn start_threads(self: &Arc<Self>, released: Receiver<Arena>) -> Result<()> {
        self.spawn("svm-release", move |agent| {
            for arena in released {
                agent.release_now(&arena);
            }
        })?;
        self.spawn("svm-pump", Self::pump)?;
        for _ in 0..self.helpers() {
            self.spawn("svm-serve", Self::help)?;
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, name: &str, body: impl FnOnce(&Self) + Send + 'static) -> Result<()> {
        // The thread of the pump holds the agent; `stop` ends it, so there is no cycle for ever.
        let agent = self.clone();
        let builder = std::thread::Builder::new().name(name.into()).stack_size(256 << 10);
        let handle = builder.spawn(move || body(&agent)).map_err(Error::Thread)?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
        Ok(())
    }

    fn open(&self) -> Result<()> {
        let incarnation = self.lock().life.incarnation();
        let hello = self.device.hello(incarnation)?;
        self.on_hello(&hello);
        let state = self.wait_life(OPEN_DEADLINE);
        match state.life {
            Life::Open { .. } => {}
            Life::Failed { status } => return Err(Error::Refused { what: "HELLO", status, limit: None }),
            Life::Opening { .. } => return Err(Error::NotOpen),
        }
        drop(state);
        self.look_at_devices()
    }

    /// Asks for the host devices, unless this daemon has described them already: another one may have others.
    fn look_at_devices(&self) -> Result<()> {
        let epoch = self.device.epoch();
        if self.devices_locked().epoch == epoch {
            return Ok(());
        }
        let mut list = Vec::new();
        for dev_id in 0..self.num_devices.load(Ordering::Acquire).min(MAX_DEVICES) {
            let device = self.device.get_device(dev_id)?;
            checked("GET_DEVICE", device.resp.status.get())?;
            list.push(device);
        }
        *self.devices_locked() = Devices { epoch, list };
        Ok(())
    }

    fn devices_locked(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_life(&self, timeout: Duration) -> MutexGuard<'_, State> {
        let opening = |state: &mut State| matches!(state.life, Life::Opening { .. });
        let waited = self.life_changed.wait_timeout_while(self.lock(), timeout, opening);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends the agent's threads. Contexts are left as they are; the next life of a driver drops them.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        drop(self.releaser.lock().unwrap_or_else(PoisonError::into_inner).take());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() {
                // A panic of that thread has been printed already.
                drop(thread.join());
            }
        }
    }

    /// Whether the device is lost for good; then the process should end and be started anew.
    pub fn has_failed(&self) -> bool {
        matches!(self.lock().life, Life::Failed { .. })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives memory back to its maker. It counts until the maker has it: else memory could be made faster than it goes.
    fn release_now(&self, arena: &Arena) {
        self.memory.release(arena.id);
        self.lock().accounts.discharge(arena.uid, arena.len);
    }

    /// The same, without waiting.
    fn release(&self, arenas: impl IntoIterator<Item = Arena>) {
        let releaser = self.releaser.lock().unwrap_or_else(PoisonError::into_inner);
        for arena in arenas {
            if let Some(releaser) = releaser.as_ref() {
                // Fails only when the agent is stopping; the memory's owner releases it then.
                releaser.send(arena).ok();
            }
        }
    }

    // Contexts.

    /// Host devices, in the order of their ids.
    pub fn devices(&self) -> Vec<GetDeviceResp> {
        self.devices_locked().list.clone()
    }

    /// Bytes of arenas that one context may have, as far as it is up to its own limit.
    pub fn context_arena_bytes(&self) -> u64 {
        self.options.context_arena_bytes
    }

    /// Whether processes of a user are trusted.
    pub fn trusts(&self, uid: u32) -> bool {
        self.options.trust.covers(uid)
    }

    /// Creates a context; its records go to `sink`.
    ///
    /// # Errors
    /// What the device says.
    pub fn create_context(&self, owner: Owner, sink: Arc<dyn EventSink>) -> Result<ContextKey> {
        self.check_open()?;
        self.look_at_devices()?;
        let name = format!("{} (pid {}, uid {})", owner.name, owner.pid, owner.uid);
        let uid = owner.uid;
        let (key, lease) = self.lock().begin_context(owner, sink, self.options.last_ctx_id)?;
        let ctx_id = key.ctx_id();
        let created =
            self.device.ctx_create(ctx_id, uid, &name).map_err(Error::from).and_then(|r| match r.status() {
                0 => Ok(()),
                status => {
                    let limit = Limit::from_wire(r.head.limit.get());
                    Err(Error::Refused { what: "CTX_CREATE", status, limit })
                }
            });
        let mut state = self.lock();
        let Some(context) = state.context(key) else {
            // The daemon has lost its state in the meantime; the new one may have been asked.
            drop(state);
            drop(self.device.ctx_destroy(ctx_id));
            drop(lease);
            return Err(Error::NoContext(ctx_id));
        };
        if let Err(error) = created {
            self.device.forget(ctx_id);
            state.end_context(ctx_id);
            return Err(error);
        }
        context.state = ContextState::Alive;
        Ok(key)
    }

    /// Destroys a context. Its memory is released when the device is through with it.
    pub fn destroy_context(&self, key: ContextKey) {
        let lease = {
            let mut state = self.lock();
            let Ok(context) = state.alive(key) else { return };
            context.state = ContextState::Retiring;
            context.lease.clone()
        };
        // A refusal or a failure leaves the context retiring: its memory stays pinned until a new life is quiet.
        drop(self.device.ctx_destroy(key.ctx_id()));
        drop(lease);
    }

    /// Passes a process' requests to the device: status, detail and reply area.
    ///
    /// # Errors
    /// The context is gone, or the request does not fit. A refusal by the device is a status.
    pub fn submit(&self, key: ContextKey, payload: &[u8], reply_len: usize) -> Result<driver::svm::Response> {
        let lease = self.lock().alive(key)?.lease.clone();
        let response = self.device.submit_3d(key.ctx_id(), payload, reply_len);
        drop(lease);
        Ok(response?)
    }

    fn token(&self) -> u64 {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }
}

impl State {
    fn begin_context(
        &mut self,
        owner: Owner,
        sink: Arc<dyn EventSink>,
        most: u32,
    ) -> Result<(ContextKey, Lease)> {
        if !matches!(self.life, Life::Open { .. }) {
            return Err(Error::NotOpen);
        }
        let limit = usize::try_from(most).unwrap_or(usize::MAX);
        let key = self.keys.next(|ctx_id| self.contexts.contains_key(&ctx_id));
        let key = key.ok_or(Error::TooMany { which: AgentLimit::Contexts, limit })?;
        let lease = Lease::default();
        let context = Context {
            key,
            lease: lease.clone(),
            owner,
            state: ContextState::Creating,
            lost: 0,
            sink,
            arenas: ArenaTable::default(),
            reserved: (0, 0),
            faults: 0,
            group: None,
        };
        self.contexts.insert(key.ctx_id(), context);
        Ok((key, lease))
    }

    /// The context of this name, and no other one that has its number by now.
    fn context(&mut self, key: ContextKey) -> Option<&mut Context> {
        self.contexts.get_mut(&key.ctx_id()).filter(|context| context.key == key)
    }

    /// Removes a context. Its number is not given to another one while a command may name it.
    fn end_context(&mut self, ctx_id: u32) -> Option<Context> {
        let mut context = self.contexts.remove(&ctx_id)?;
        self.keys.end(ctx_id, std::mem::take(&mut context.lease));
        Some(context)
    }

    /// The context while requests may use it.
    fn alive(&mut self, key: ContextKey) -> Result<&mut Context> {
        let context = self.context(key);
        context.filter(|context| context.state == ContextState::Alive).ok_or(Error::NoContext(key.ctx_id()))
    }
}

/// A status of the device as a result.
fn checked(what: &'static str, status: i32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::Refused { what, status, limit: None }) }
}
