//! Sessions and the registry from outside: real sockets, a real frontend, real rings.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small constants of the tests")]
#![expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]

mod hostile;
mod memory;
mod registry;
mod rings;
mod sessions;
mod vmm;

use daemon::limits::{Limits, Overrides};
use daemon::registry::{Endpoint, GuestSpec, Options, Registry, RegistryEvent};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::host::Host;
use vmm::PATIENCE;

/// A registry without devices in a folder of its own, and what it tells.
pub(crate) struct Daemon {
    pub(crate) registry: Arc<Registry>,
    pub(crate) events: mpsc::Receiver<RegistryEvent>,
    pub(crate) dir: TempDir,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_with(false)
    }

    pub(crate) fn start_with(allow_unsealed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            contexts: 16,
            pending_faults: 16,
            jobs: 16,
            mappings: 64,
            resources: 16,
            fault_deadline_ms: 0,
            ..Limits::DEFAULT
        };
        let runtime_dirs = vec![dir.path().to_owned()];
        let registry =
            Registry::new(Host::new(Vec::new()), Options { runtime_dirs, limits, allow_unsealed }).unwrap();
        let (tell, events) = mpsc::channel();
        registry.subscribe(Box::new(move |event| tell.send(event.clone()).unwrap_or(())));
        Self { registry, events, dir }
    }

    /// Adds guest `name` with socket `name.sock` and returns the socket's path.
    pub(crate) fn add(&self, name: &str) -> PathBuf {
        let path = self.path(&format!("{name}.sock"));
        assert!(self.registry.add(spec(name, &path)).unwrap());
        path
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    pub(crate) fn event(&self) -> RegistryEvent {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    /// What a guest has while its VMM is connected. The registry hears of a session a moment after its VMM is served.
    pub(crate) fn guest(&self, name: &str) -> Arc<Guest> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(guest) = self.registry.guest(name) {
                return guest;
            }
            assert!(Instant::now() < deadline, "no VMM of {name} is connected");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the guest's VMM is gone, and says why it went.
    pub(crate) fn wait_disconnected(&self) -> String {
        loop {
            if let RegistryEvent::GuestDisconnected { reason, .. } = self.event() {
                return reason;
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.registry.shutdown();
    }
}

pub(crate) fn spec(name: &str, path: &std::path::Path) -> GuestSpec {
    GuestSpec {
        name: name.to_owned(),
        socket: Endpoint::Path(path.to_owned()),
        devices: None,
        limits: Overrides::default(),
    }
}
