//! What the vhost-user framework gets wrong or leaves open, and that the daemon closes it: [`rows`] has a test for each
//! row, by its number; [`messages`] sends every request in every form, and every message cut at every byte.
//!
//! | row | what the framework does | tests |
//! |---|---|---|
//! | E1 | its queue thread ends on any error, silently | `session::rings::queue_thread_that_ends_..`, `rows::e01_..` |
//! | E2 | maps a region longer than its file | `session::memory::{region_beyond_its_file_..,unsealed_..}`, `rows::e02_..` |
//! | E3, E4, E4b | has bits of protocol that it does not serve | `session::sessions::handshake_..`, `rows::e03_..` |
//! | E5 | serves one connection only | `session::sessions::second_connection_..`, `rows::e05_..` |
//! | E6 | loses an eventfd a session | `rows::e06_..`, `svmd::sessions_leave_no_descriptor_..` |
//! | E7 | hangs for ever without an exit event | `starved::e07_..` |
//! | E8 | overlaps, too many regions, odd ring sizes | `session::memory::{overlap_..,too_many_..}`, `rows::e08_..`; rings: `queue::tests` |
//! | E9 | stray descriptors | `rows::e09_..`, `messages` |
//! | E10 | sizes, ids, versions and flags that are none | `rows::e10_..` |
//! | E11 to E13 | chains and indices | `queue::tests`, `session::rings` |
//! | | files of rings that cannot be made non-blocking | `rows::files_that_..` |
//!
//! Descriptors and threads of this process are counted, so the tests run one at a time, and nothing else belongs here.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small constants of the tests")]
#![expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]

mod brittle;
mod messages;
mod raw;
mod rows;
mod starved;
#[path = "../session/vmm.rs"]
#[expect(dead_code, reason = "shared with the session tests, which use more of it")]
mod vmm;

use brittle::Brittle;
use daemon::limits::Limits;
use daemon::registry::{Endpoint, GuestSpec, Options, Registry, RegistryEvent};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use virtio_gpu_svm::device::{Device, Events};
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::host::Host;
use vmm::{PATIENCE, Vmm};

/// Each test holds this while it has anything open: descriptors and threads of this process are counted.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest "vm0" is the one that misbehaves, "vm1" the one that must not notice.
struct Scene {
    registry: Arc<Registry>,
    device: Arc<Brittle>,
    events: mpsc::Receiver<RegistryEvent>,
    dir: TempDir,
    /// Goes last: all of the above is closed when the next test begins to count.
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    fn start() -> Self {
        Self::with_deadline(0)
    }
    /// Faults that are not answered for so many milliseconds end, where a housekeeper looks after them; 0: never.
    fn with_deadline(fault_deadline_ms: u32) -> Self {
        let alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            contexts: 16,
            pending_faults: 16,
            jobs: 16,
            mappings: 64,
            resources: 16,
            sessions: 1 << 20,
            fault_deadline_ms,
            ..Limits::DEFAULT
        };
        let device = Brittle::new();
        let host = Host::new(vec![Arc::clone(&device) as Arc<dyn Device>]);
        device.start(Arc::<Host>::downgrade(&host) as std::sync::Weak<dyn Events>);
        let runtime_dirs = vec![dir.path().to_owned()];
        let registry = Registry::new(host, Options { runtime_dirs, limits, allow_unsealed: false }).unwrap();
        let (tell, events) = mpsc::channel();
        registry.subscribe(Box::new(move |event| tell.send(event.clone()).unwrap_or(())));
        let scene = Self { registry, device, events, dir, _alone: alone };
        for name in ["vm0", "vm1"] {
            let spec = GuestSpec {
                name: name.into(),
                socket: Endpoint::Path(scene.socket(name)),
                devices: None,
                limits: daemon::limits::Overrides::default(),
            };
            assert!(scene.registry.add(spec).unwrap());
            // What a guest's thread keeps open from its first session on is there before anything is counted.
            drop(Vmm::start(&scene.socket(name)));
            scene.wait_disconnected(name);
        }
        scene
    }
    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }
    /// What a guest has while its VMM is connected. The registry hears of a session a moment after its VMM is served.
    fn guest(&self, name: &str) -> Arc<Guest> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(guest) = self.registry.guest(name) {
                return guest;
            }
            assert!(Instant::now() < deadline, "no VMM of {name} is connected");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    /// Waits until a guest's VMM is gone, and says why it went.
    fn wait_disconnected(&self, guest: &str) -> String {
        loop {
            match self.events.recv_timeout(PATIENCE).unwrap() {
                RegistryEvent::GuestDisconnected { name, reason } if name == guest => return reason,
                _ => {}
            }
        }
    }
    /// A VMM that comes to "vm0" now is served.
    fn serves_the_next(&self) {
        assert!(!Vmm::start(&self.socket("vm0")).command(&[0; 24]).is_empty());
        self.wait_disconnected("vm0");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.registry.shutdown();
        self.device.stop();
    }
}

/// What this process has open, and the daemon's threads in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Footprint {
    descriptors: usize,
    threads: Vec<String>,
}

impl Footprint {
    fn now() -> Self {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        // One that has just ended has no name any more. Names of test threads are those of the tests.
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
        let ours = |name: &String| ["vm", "vring", "guest "].iter().any(|start| name.starts_with(start));
        let mut threads: Vec<_> = names.map(|name| name.trim().to_owned()).filter(ours).collect();
        threads.sort_unstable();
        Self { descriptors, threads }
    }
    /// The same, once it stands still: threads that have just been made have their maker's name, and those that end are
    /// told of before they are gone.
    fn settled() -> Self {
        let (mut last, mut same) = (Self::now(), 0);
        while same < 20 {
            std::thread::sleep(Duration::from_millis(2));
            let now = Self::now();
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        last
    }
    /// Its threads but one of this name.
    fn threads_without(&self, name: &str) -> Vec<String> {
        let mut threads = self.threads.clone();
        threads.remove(threads.iter().position(|thread| thread == name).unwrap());
        threads
    }
    /// Waits until all is as it was: who is told of a session's end is told before its last thread is gone.
    fn wait_restored(&self) {
        let deadline = Instant::now() + PATIENCE;
        while Self::now() != *self {
            assert!(Instant::now() < deadline, "left behind: {self:?} became {:?}", Self::now());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
