//! All guests of the daemon: their names, their sockets, what they are granted.
//!
//! Called by the command line, the configuration and the control socket, from any thread. Each guest has a seat
//! with a thread of its own (`attendant`) that serves one VMM after the other. Adding and removing are
//! idempotent, and refused before anything is changed.

use crate::attendant::{Attendant, Door, Seat};
use crate::event_file;
use crate::eventq::Waker;
use crate::housekeeper::Housekeeper;
use crate::limits::{self, Limits, Overrides};
use crate::log_budget::LogBudget;
use crate::rate::Rate;
use crate::relay::Relay;
use crate::ring::RingStatus;
use crate::session::Setup;
use crate::socket::{Folder, ListeningSocket, RuntimeDirs};
use serde::Serialize;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::host::Host;
use virtio_gpu_svm::info::GuestStatus;
use virtio_gpu_svm::quota::{LimitStatus, Quota};

/// Most bytes of a guest's name.
pub const MAX_NAME: usize = 64;

/// What holds for every guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guest sockets may be made only below these folders.
    pub runtime_dirs: Vec<PathBuf>,
    /// What one guest may use at once, unless it has limits of its own.
    pub limits: Limits,
    /// Accept guest memory that its VMM could shrink under us.
    pub allow_unsealed: bool,
}

/// Where a guest's VMM reaches the daemon.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that the daemon makes.
    Path(PathBuf),
    /// A listening vhost-user socket that was inherited.
    Listener(OwnedFd),
    /// A connected vhost-user socket that was inherited: one session, then the guest stays without.
    Connected(Relay),
}

impl Endpoint {
    fn label(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Listener(fd) => format!("fd:{}", fd.as_raw_fd()),
            Self::Connected(relay) => format!("fd:{}", relay.number()),
        }
    }
}

/// A guest to be added.
#[derive(Debug)]
pub struct GuestSpec {
    /// Its name: 1 to 64 of `[A-Za-z0-9._-]`, not `.` or `..`.
    pub name: String,
    /// Its socket.
    pub socket: Endpoint,
    /// Names of the host devices granted to it, in the order of its `dev_id`; all when absent.
    pub devices: Option<Vec<String>>,
    /// Limits of its own.
    pub limits: Overrides,
}

/// Why a guest was not added. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The name has other characters than it may have, or too many.
    #[error("guest name {0:?} is not 1 to 64 of A-Z a-z 0-9 . _ -")]
    BadName(String),
    /// A guest of that name has another socket, other devices or other limits.
    #[error("guest {name:?} is there already, with socket {socket:?}")]
    NameTaken {
        /// The name.
        name: String,
        /// The socket of the guest that is there.
        socket: String,
    },
    /// The path leads elsewhere than below a runtime folder.
    #[error("socket {0:?} is not below a runtime folder of this daemon (--runtime-dir)")]
    SocketOutsideRuntimeDirs(PathBuf),
    /// Another guest, a live program or something that is no socket has that path.
    #[error("socket {0:?} is in use")]
    SocketInUse(PathBuf),
    /// No host device has that name.
    #[error("no device {0:?} on this host")]
    UnknownDevice(String),
    /// One device was named twice: a context has one GPU VM on each device at most, so the second is of no use.
    #[error("device {0:?} is named twice")]
    DeviceTwice(String),
    /// The daemon is ending.
    #[error("the daemon is ending")]
    ShuttingDown,
    /// The host kernel refused.
    #[error("cannot {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A guest, as it is listed.
#[derive(Clone, Debug, Serialize)]
pub struct GuestEntry {
    /// Its name.
    pub name: String,
    /// Its socket's path, or `fd:N` of an inherited one.
    pub socket: String,
    /// Names of the host devices granted to it, in the order of its `dev_id`.
    pub devices: Vec<String>,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Sessions begun so far.
    pub sessions: u64,
    /// Why the last session ended, unless the VMM just left.
    pub last_error: Option<String>,
    /// What it may use, and what its session uses, has used and was refused: 0 while no VMM is connected.
    pub limits: Vec<LimitStatus>,
    /// Milliseconds in which it must answer a fault; 0: any time will do.
    pub fault_deadline_ms: u32,
    /// Microseconds that its queue thread looks for the next command; 0: it does not.
    pub busy_poll_us: u32,
    /// Lines of the log that it may cause, and has caused in all its sessions.
    pub log_lines: LimitStatus,
    /// Sessions that have begun in the last minute; "refused" are those that had to wait.
    pub session_rate: LimitStatus,
    /// The core's view of it while a VMM is connected.
    pub status: Option<GuestStatus>,
    /// How its rings fare, by queue, while a VMM is connected.
    pub queues: Vec<RingStatus>,
}

/// What happened to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryEvent {
    /// It was added.
    GuestAdded {
        /// Its name.
        name: String,
    },
    /// It was removed.
    GuestRemoved {
        /// Its name.
        name: String,
    },
    /// Its VMM connected.
    GuestConnected {
        /// Its name.
        name: String,
    },
    /// Its VMM left or was dropped.
    GuestDisconnected {
        /// Its name.
        name: String,
        /// Why, for people.
        reason: String,
    },
}

/// Called with each event, from the thread that caused it and with no lock held. Must not wait.
pub type Subscriber = Box<dyn Fn(&RegistryEvent) + Send + Sync>;

/// All guests of the daemon.
pub struct Registry {
    host: Arc<Host>,
    options: Options,
    runtime_dirs: RuntimeDirs,
    /// Names of the host's devices, by index.
    device_names: Vec<String>,
    /// Guards the list of guests; never held while a socket is made, or while a session begins or ends.
    guests: Mutex<Guests>,
    subscribers: Arc<Subscribers>,
    /// Lines of the log about guests that come and go.
    log: LogBudget,
    /// Does what engines leave, which no guest's thread comes for.
    housekeeper: Housekeeper,
}

#[derive(Default)]
struct Guests {
    by_name: BTreeMap<String, Arc<Seat>>,
    closed: bool,
}

/// A guest that is to be added, checked as far as others do not matter.
struct Wanted {
    name: String,
    label: String,
    devices: Vec<usize>,
    overrides: Overrides,
}

impl Wanted {
    /// Whether the same guest is there already.
    fn is_in(&self, guests: &Guests) -> Result<bool, AddError> {
        if guests.closed {
            return Err(AddError::ShuttingDown);
        }
        if let Some(there) = guests.by_name.get(&self.name) {
            let same = there.socket == self.label
                && there.devices == self.devices
                && there.overrides == self.overrides;
            let taken = || AddError::NameTaken { name: self.name.clone(), socket: there.socket.clone() };
            return if same { Ok(true) } else { Err(taken()) };
        }
        let path = Path::new(&self.label);
        // Labels of inherited sockets are no paths, and may come again.
        if path.is_absolute() && guests.by_name.values().any(|seat| seat.socket == self.label) {
            return Err(AddError::SocketInUse(path.to_owned()));
        }
        Ok(false)
    }
}

impl Registry {
    /// A registry without guests, and the housekeeper of those that come.
    ///
    /// # Errors
    /// The housekeeper's thread cannot be started.
    pub fn new(host: Arc<Host>, options: Options) -> std::io::Result<Arc<Self>> {
        let device_names = host.devices().into_iter().map(|device| device.name).collect();
        let runtime_dirs = RuntimeDirs::new(&options.runtime_dirs);
        let (guests, subscribers) = (Mutex::default(), Arc::default());
        let log = LogBudget::new("guests added and removed".to_owned(), options.limits.log_lines);
        let housekeeper = Housekeeper::start(Arc::clone(&host))?;
        event_file::prepare();
        Ok(Arc::new(Self {
            host,
            options,
            runtime_dirs,
            device_names,
            guests,
            subscribers,
            log,
            housekeeper,
        }))
    }

    /// Adds a guest and listens for its VMM. `Ok(false)`: the same guest was there already.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, spec: GuestSpec) -> Result<bool, AddError> {
        if !is_guest_name(&spec.name) {
            return Err(AddError::BadName(spec.name));
        }
        let devices = self.resolve_devices(spec.devices.as_deref())?;
        let endpoint = match spec.socket {
            Endpoint::Path(path) => Endpoint::Path(self.runtime_dirs.resolve(&path)?),
            inherited => inherited,
        };
        let label = endpoint.label();

        let wanted = Wanted { name: spec.name, label, devices, overrides: spec.limits };
        if wanted.is_in(&self.lock())? {
            return Ok(false);
        }
        match endpoint {
            Endpoint::Path(path) => {
                // Others may hold the folder for a while, so this is not waited for under our own lock. Whoever adds the
                // same guest meanwhile waits here too, and then finds it.
                let folder = Folder::lock(&path)?;
                if wanted.is_in(&self.lock())? {
                    return Ok(false);
                }
                let socket = ListeningSocket::make(&path, &folder)?;
                let door = Door::listening(socket, &wanted.label)?;
                self.seat_guest(wanted, door)
            }
            Endpoint::Listener(fd) => {
                let door = Door::listening(ListeningSocket::inherited(fd), &wanted.label)?;
                self.seat_guest(wanted, door)
            }
            Endpoint::Connected(relay) => self.seat_guest(wanted, Door::Connected(relay)),
        }
    }

    /// Gives a guest its seat, unless somebody else has taken the name since.
    fn seat_guest(&self, wanted: Wanted, door: Door) -> Result<bool, AddError> {
        let (name, label) = (wanted.name.clone(), wanted.label.clone());
        let failed = |action, source| AddError::Io { action, path: PathBuf::from(&label), source };
        let stop = Waker::new().map_err(|e| failed("make an event for", e))?;
        let attendant = self.attendant(&wanted, stop);
        let seat = Arc::clone(&attendant.seat);
        // The attendant begins when its guest was announced: what it tells of the guest comes after that.
        let (begin, begun) = std::sync::mpsc::sync_channel(1);
        let attend = move || {
            if begun.recv().is_ok() {
                attendant.run(door);
            }
        };
        let mut guests = self.lock();
        if wanted.is_in(&guests)? {
            return Ok(false);
        }
        let thread = std::thread::Builder::new()
            .name(format!("guest {name}"))
            .spawn(attend)
            .map_err(|e| failed("start a thread for", e))?;
        *lock(&seat.thread) = Some(thread);
        guests.by_name.insert(name.clone(), seat);
        drop(guests);
        self.log.log(|| tracing::info!(guest = %name, socket = %label, "guest added"));
        self.subscribers.tell(&RegistryEvent::GuestAdded { name });
        // It waits for this and nothing else.
        begin.send(()).ok();
        Ok(true)
    }

    fn attendant(&self, wanted: &Wanted, stop: Waker) -> Attendant {
        let limits = self.options.limits.with(&wanted.overrides);
        let core_limits = limits::of(&limits);
        let log = Arc::new(LogBudget::new(format!("guest {}", wanted.name), limits.log_lines));
        let seat = Seat {
            name: wanted.name.clone(),
            socket: wanted.label.clone(),
            devices: wanted.devices.clone(),
            overrides: wanted.overrides.clone(),
            limits: core_limits,
            busy_poll_us: limits.busy_poll_us,
            log: Arc::clone(&log),
            pace: Mutex::new(Rate::new(limits.sessions, Instant::now())),
            stop,
            live: Mutex::default(),
            thread: Mutex::default(),
        };
        let setup = Setup {
            host: Arc::clone(&self.host),
            name: wanted.name.as_str().into(),
            limits: core_limits,
            devices: wanted.devices.clone(),
            allow_unsealed: self.options.allow_unsealed,
            busy_poll: Duration::from_micros(limits.busy_poll_us.into()),
            log,
        };
        Attendant { seat: Arc::new(seat), setup, subscribers: Arc::clone(&self.subscribers) }
    }

    /// Removes a guest: ends its session and removes the socket that was made for it. On return nothing of it is left.
    /// `false`: it was not there.
    pub fn remove(&self, name: &str) -> bool {
        let Some(seat) = self.lock().by_name.remove(name) else { return false };
        seat.stop_and_join();
        self.log.log(|| tracing::info!(guest = %name, "guest removed"));
        self.subscribers.tell(&RegistryEvent::GuestRemoved { name: name.to_owned() });
        true
    }

    /// All guests by name.
    pub fn list(&self) -> Vec<GuestEntry> {
        let seats: Vec<_> = self.lock().by_name.values().cloned().collect();
        seats.iter().map(|seat| self.describe(seat)).collect()
    }

    /// One guest.
    pub fn get(&self, name: &str) -> Option<GuestEntry> {
        self.seat(name).map(|seat| self.describe(&seat))
    }

    /// The core's guest of that name, while a VMM is connected.
    pub fn guest(&self, name: &str) -> Option<Arc<Guest>> {
        self.seat(name)?.session().map(|session| Arc::clone(session.guest()))
    }

    /// Lines of the log that anybody may cause in a minute who has no number of their own.
    pub fn log_lines(&self) -> u32 {
        self.options.limits.log_lines
    }

    /// The host.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Ends all sessions, removes all sockets, and stops the housekeeper; nothing can be added any more.
    pub fn shutdown(&self) {
        let seats = {
            let mut guests = self.lock();
            guests.closed = true;
            std::mem::take(&mut guests.by_name)
        };
        for seat in seats.values() {
            seat.stop();
        }
        for (name, seat) in seats {
            seat.stop_and_join();
            self.subscribers.tell(&RegistryEvent::GuestRemoved { name });
        }
        self.housekeeper.stop();
    }

    /// Has `subscriber` called with every event from now on.
    pub fn subscribe(&self, subscriber: Subscriber) {
        self.subscribers.0.write().unwrap_or_else(PoisonError::into_inner).push(subscriber);
    }

    fn lock(&self) -> MutexGuard<'_, Guests> {
        lock(&self.guests)
    }

    fn seat(&self, name: &str) -> Option<Arc<Seat>> {
        self.lock().by_name.get(name).cloned()
    }

    fn resolve_devices(&self, names: Option<&[String]>) -> Result<Vec<usize>, AddError> {
        let Some(names) = names else { return Ok((0..self.device_names.len()).collect()) };
        let index = |name: &String| {
            let found = self.device_names.iter().position(|device| device == name);
            found.ok_or_else(|| AddError::UnknownDevice(name.clone()))
        };
        if let Some((_, twice)) =
            names.iter().enumerate().find(|(i, name)| names.iter().take(*i).any(|n| n == *name))
        {
            return Err(AddError::DeviceTwice(twice.clone()));
        }
        names.iter().map(index).collect()
    }

    fn describe(&self, seat: &Seat) -> GuestEntry {
        let (session, sessions, last_error) = {
            let live = lock(&seat.live);
            (live.session.clone(), live.sessions, live.last_error.clone())
        };
        let device_name = |index: &usize| self.device_names.get(*index).cloned();
        let mut status = session.as_ref().map(|session| session.guest().status());
        let limits = match &mut status {
            Some(status) => std::mem::take(&mut status.limits),
            None => Quota::new(&seat.limits).status(|_| 0),
        };
        GuestEntry {
            name: seat.name.clone(),
            socket: seat.socket.clone(),
            devices: seat.devices.iter().filter_map(device_name).collect(),
            connected: session.is_some(),
            sessions,
            last_error,
            queues: session.as_ref().map(|session| session.rings()).unwrap_or_default(),
            limits,
            fault_deadline_ms: seat.limits.fault_deadline_ms,
            busy_poll_us: seat.busy_poll_us,
            log_lines: seat.log.status(),
            session_rate: lock(&seat.pace).status("sessions", Instant::now()),
            status,
        }
    }
}

fn is_guest_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name != "."
        && name != ".."
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sections are single assignments; a panic cannot leave them half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
pub(crate) struct Subscribers(RwLock<Vec<Subscriber>>);

impl Subscribers {
    pub(crate) fn tell(&self, event: &RegistryEvent) {
        for subscriber in self.0.read().unwrap_or_else(PoisonError::into_inner).iter() {
            subscriber(event);
        }
    }
}
