//! A daemon in this process, and what it holds.

use crate::heap::live;
use crate::{PATIENCE, script, vmm::Vmm};
use daemon::control::{self, ControlState};
use daemon::devices::Devices;
use daemon::limits::Limits;
use daemon::registry::{Endpoint, GuestSpec, Options, Registry, RegistryEvent};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::Notify;
use virtio_gpu_svm::host::RECENT_FAULTS;

/// Counts of this process mean something for one test at a time.
static ONE: Mutex<()> = Mutex::new(());

const DEVICES: &str = "[[device]]\nkind = 'soft'\nname = 'faults'\nengines = 2\n\
                       [[device]]\nkind = 'soft'\nname = 'none'\nfault_model = 'none'\n";
const LIMITS: Limits = Limits {
    contexts: 16,
    pending_faults: 16,
    jobs: 16,
    mappings: 64,
    resources: 16,
    fault_deadline_ms: 0,
    sessions: 1 << 20,
    ..Limits::DEFAULT
};
/// Looks at the heap before what was done is done again.
const LOOKS: u32 = 200;
/// Times that it is done: what is made once and kept is not made again, and lists that are kept have now more room and now
/// less, as threads meet. What leaks never comes back to where it was.
const TRIES: u32 = 24;

/// For as long as it is held, no other test runs.
pub fn exclusive() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
}

fn held() -> Held {
    let count = |folder| std::fs::read_dir(folder).unwrap().count();
    Held { descriptors: count("/proc/self/fd"), threads: count("/proc/self/task") }
}

/// What is held when nothing has changed for a while: threads that end let go of their last things by themselves.
fn at_rest() -> Held {
    let (mut last, mut looks) = (held(), 0);
    while looks < LOOKS {
        std::thread::sleep(Duration::from_millis(1));
        let now = held();
        looks = if now == last { looks + 1 } else { 0 };
        last = now;
    }
    last
}

pub struct Daemon {
    pub registry: Arc<Registry>,
    pub dir: TempDir,
    /// Sessions that have ended.
    ended: Arc<(Mutex<u64>, Condvar)>,
    parts: Option<(Devices, JoinHandle<()>)>,
    stop: Arc<Notify>,
    /// What an idle daemon holds.
    idle: Held,
    _one: MutexGuard<'static, ()>,
}

impl Daemon {
    pub fn start() -> Self {
        let one = exclusive();
        let dir = tempfile::tempdir().unwrap();
        let devices = config::Config::parse(DEVICES, "test").unwrap().devices();
        let (host, devices) = Devices::start(&devices, 8).unwrap();
        let runtime_dirs = vec![dir.path().to_owned()];
        let registry =
            Registry::new(host, Options { runtime_dirs, limits: LIMITS, allow_unsealed: false }).unwrap();
        let ended = Arc::new((Mutex::new(0), Condvar::new()));
        let tell = Arc::clone(&ended);
        registry.subscribe(Box::new(move |event| {
            if let RegistryEvent::GuestDisconnected { .. } = event {
                *tell.0.lock().unwrap() += 1;
                tell.1.notify_all();
            }
        }));
        let stop = Arc::new(Notify::new());
        let state = ControlState::new(Arc::clone(&registry), Arc::new(Notify::new()));
        let (socket, stopped) = (dir.path().join("control.sock"), Arc::clone(&stop));
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let control = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                tokio::select! {
                    () = control::serve(listener, state, control::Options::default()) => {}
                    () = stopped.notified() => {}
                }
            });
        });
        let parts = Some((devices, control));
        let mut daemon = Self { registry, dir, ended, parts, stop, idle: held(), _one: one };
        assert!(daemon.add("vm0"));
        daemon.fill_memories();
        daemon.idle = at_rest();
        daemon
    }
    /// What a host remembers for people is bounded: it is full before anything is counted.
    fn fill_memories(&self) {
        self.session(|vmm| {
            play(vmm, script::session());
            script::create(vmm, 3);
            script::fault_often(vmm, 3);
        });
        let remembered = self.registry.host().recent_faults(RECENT_FAULTS).len();
        assert_eq!(remembered, RECENT_FAULTS);
    }
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }
    pub fn add(&self, name: &str) -> bool {
        let socket = Endpoint::Path(self.path(name));
        self.registry
            .add(GuestSpec {
                name: name.into(),
                socket,
                devices: None,
                limits: daemon::limits::Overrides::default(),
            })
            .unwrap()
    }
    /// A VMM that comes, does something and leaves; on return the daemon has noticed.
    pub fn session(&self, act: impl FnOnce(&mut Vmm)) {
        let before = *self.ended.0.lock().unwrap();
        let mut vmm = Vmm::connect(&self.path("vm0"));
        act(&mut vmm);
        drop(vmm);
        let ended = self.ended.0.lock().unwrap();
        let (ended, wait) = self.ended.1.wait_timeout_while(ended, PATIENCE, |n| *n == before).unwrap();
        assert!(!wait.timed_out(), "the session does not end");
        assert_eq!(*ended, before + 1);
    }

    /// Whatever is done leaves the process as it was before. What is made once may stay: then it is done again, until the
    /// heap is as it was at the beginning of a try.
    pub fn leaving_nothing(&self, what: &str, act: impl Fn(&Self)) {
        let (mut left, mut before) = (Vec::new(), Vec::new());
        for _ in 0..TRIES {
            let heap = live();
            before.push(heap);
            act(self);
            let deadline = Instant::now() + PATIENCE;
            while held() != self.idle {
                let now = held();
                assert!(Instant::now() < deadline, "{what}: {:?} before, {now:?} after", self.idle);
                std::thread::sleep(Duration::from_millis(1));
            }
            // The daemon's threads have come to rest but for the last lines of the guest's.
            for _ in 0..LOOKS {
                if before.contains(&live()) {
                    self.assert_idle(what);
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            left.push(live().wrapping_sub(heap).cast_signed());
        }
        panic!("{what}: each time so many bytes are left on the heap: {left:?}");
    }
    fn assert_idle(&self, what: &str) {
        let stats = self.registry.host().stats();
        assert_eq!((stats.guests, stats.contexts, stats.gpu_vms, stats.pending_vms), (0, 0, 0, 0), "{what}");
        for device in self.registry.host().devices() {
            assert_eq!((device.gpu_vms, device.retiring), (0, 0), "{what}: asids of {}", device.name);
        }
        let n = stats.counters;
        let faults = n.faults_served_locally + n.faults_answered + n.faults_refused + n.faults_dropped;
        assert_eq!(n.faults_raised, faults + n.faults_throttled, "{what}: a fault without an end");
        assert_eq!(
            n.jobs_submitted,
            n.jobs_done + n.jobs_failed + n.jobs_dropped,
            "{what}: a job without one"
        );
    }
}

/// Does steps to the last one.
pub fn play(vmm: &mut Vmm, steps: Vec<script::Step>) {
    for step in steps {
        match step {
            script::Step::Message(message) => _ = vmm.exchange(&message),
            script::Step::Late(message) => {
                let message = message(vmm);
                vmm.exchange(&message);
            }
            script::Step::Deed(deed) => deed(vmm),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.notify_one();
        self.registry.shutdown();
        let Some((devices, control)) = self.parts.take() else { return };
        devices.stop();
        let ended = control.join();
        // A second panic while the first unwinds would hide what went wrong.
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}
