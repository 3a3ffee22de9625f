//! All guests of the daemon: their names, their sockets, and the thread that serves each of them.

use serde::Serialize;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::info::GuestStatus;

/// What holds for every guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guest sockets may be made only below these folders.
    pub runtime_dirs: Vec<PathBuf>,
    /// What one guest may use at once.
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
    Connected(OwnedFd),
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
}

/// Why a guest was not added. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The name has other characters than it may have, or too many.
    #[error("guest name {0:?} is not 1 to 64 of A-Z a-z 0-9 . _ -")]
    BadName(String),
    /// A guest of that name has another socket or other devices.
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
    /// The core's view of it while a VMM is connected.
    pub status: Option<GuestStatus>,
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
    _host: Arc<Host>,
    _guests: BTreeMap<String, ()>,
}

impl Registry {
    /// A registry without guests.
    pub fn new(_host: Arc<Host>, _options: Options) -> Arc<Self> {
        todo!()
    }
    /// Adds a guest and listens for its VMM. `Ok(false)`: the same guest was there already.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&self, _spec: GuestSpec) -> Result<bool, AddError> {
        todo!()
    }
    /// Removes a guest: ends its session and removes the socket that was made for it. On return nothing of it is left.
    /// `false`: it was not there.
    pub fn remove(&self, _name: &str) -> bool {
        todo!()
    }
    /// All guests by name.
    pub fn list(&self) -> Vec<GuestEntry> {
        todo!()
    }
    /// One guest.
    pub fn get(&self, _name: &str) -> Option<GuestEntry> {
        todo!()
    }
    /// The core's guest of that name, while a VMM is connected.
    pub fn guest(&self, _name: &str) -> Option<Arc<Guest>> {
        todo!()
    }
    /// The host.
    pub fn host(&self) -> &Arc<Host> {
        todo!()
    }
    /// Ends all sessions and removes all sockets; nothing can be added any more.
    pub fn shutdown(&self) {
        todo!()
    }
    /// Has `subscriber` called with every event from now on.
    pub fn subscribe(&self, _subscriber: Subscriber) {
        todo!()
    }
}
