//! svmd as a process: what the kernel says that it holds. Unconfined, where its descriptors can be counted; confined,
//! where only root could, with room for few, so that one left behind by each would be too many.

use crate::growth::{live_and_die, times};
use crate::rig::{exclusive, play};
use crate::script::{create, fault_often, handshake, hello, session, up};
use crate::vmm::Vmm;
use crate::{PATIENCE, control};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Room for descriptors of a daemon with a guest and a session, and not for many more.
const DESCRIPTORS: u64 = 64;
/// Bytes that the resident set may grow by each time, and by in all: pages and arenas are not given back one by one.
const BYTES_EACH: u64 = 16;
const BYTES_IN_ALL: u64 = 512 << 10;
/// Looks at what it holds, all the same, before it is at rest.
const LOOKS: u32 = 50;
/// Before anything is counted: arenas of threads are there then.
const WARM_UP: u32 = 5;

struct Svmd {
    child: Child,
    dir: TempDir,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holds {
    /// Where they can be counted.
    descriptors: Option<usize>,
    threads: usize,
    /// Worker processes.
    children: usize,
}

impl Svmd {
    fn start(first: &str, sandbox: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "[daemon]\nlog = 'error'\ncontrol_socket = {:?}\n[[device]]\nkind = '{first}'\nname = 'first'\n\
             [[device]]\nkind = 'soft'\nname = 'none'\nfault_model = 'none'\n[[guest]]\nname = 'vm0'\nsocket = {:?}\n",
            dir.path().join("control.sock"),
            dir.path().join("vm0.sock"),
        );
        let file = dir.path().join("svmd.toml");
        fs::write(&file, config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
        command.arg("--config").arg(&file).arg(format!("--sandbox={sandbox}")).stdin(Stdio::null());
        let daemon = Self { child: command.spawn().unwrap(), dir };
        daemon.until("its sockets", || {
            ["control", "vm0"].iter().all(|name| UnixStream::connect(daemon.path(name)).is_ok())
        });
        daemon
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }
    fn until(&self, what: &str, mut there: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !there() {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.child.id()).into()
    }
    fn status(&self, field: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').split_ascii_whitespace().next().unwrap().parse().unwrap()
    }
    fn resident(&self) -> u64 {
        self.status("VmRSS") << 10
    }
    fn holds(&self) -> Holds {
        let parent = format!("PPid:\t{}\n", self.child.id());
        // A process that has just ended is nobody's.
        let status =
            |entry: fs::DirEntry| fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let children = processes.map(status).filter(|status| status.contains(&parent)).count();
        let descriptors = fs::read_dir(self.proc("fd")).ok().map(Iterator::count);
        // The pool that carries out operators' requests has as many as it needs, for as long as it likes.
        let name = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let threads = fs::read_dir(self.proc("task")).unwrap().flatten().map(name);
        let threads = threads.filter(|name| !name.is_empty() && !name.starts_with("tokio")).count();
        Holds { descriptors, threads, children }
    }
    fn call(&self, method: &str, params: &str) -> Value {
        let answer = control(&self.path("control"), method, params);
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }
    /// No GPU VM, no asid that waits for engines, no context.
    fn is_idle(&self) -> bool {
        let devices = self.call("device.list", "{}");
        let free = |device: &Value| device["gpu_vms"] == 0 && device["retiring"] == 0;
        let stats = self.call("stats.get", "{}");
        devices["devices"].as_array().unwrap().iter().all(free)
            && stats["guests"] == 0
            && stats["contexts"] == 0
    }
    fn session(&self, act: impl FnOnce(&mut Vmm)) {
        act(&mut Vmm::connect(&self.path("vm0")));
    }
    /// What it holds when that has not changed for a while: the last connection is let go of by itself.
    fn at_rest(&self) -> Holds {
        let (mut last, mut looks) = (self.holds(), 0);
        self.until("rest", || {
            let now = self.holds();
            looks = if now == last { looks + 1 } else { 0 };
            last = now;
            looks == LOOKS
        });
        last
    }
    /// Whatever is done leaves it holding what it held before.
    fn leaving_nothing(&self, times: u32, what: &str, act: impl Fn(&Self)) {
        (0..WARM_UP).for_each(|_| act(self));
        self.until("sessions to end", || self.is_idle());
        let before = self.at_rest();
        let resident = self.resident();
        (0..times).for_each(|_| act(self));
        let mut now = before;
        self.until(&format!("{before:?} after {times} times {what}"), || {
            now = self.holds();
            now == before && self.is_idle()
        });
        let more = self.resident().saturating_sub(resident);
        println!("{times} times {what}: {now:?} as before, {more} bytes resident more");
        let limit = BYTES_IN_ALL + BYTES_EACH * u64::from(times);
        assert!(more <= limit, "{more} bytes resident more after {times} times {what}");
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing left to end.
        kill_process(Pid::from_child(&self.child), Signal::KILL).ok();
        self.child.wait().ok();
    }
}

/// All kinds of what may come and go.
fn everything_comes_and_goes(first: &str, sandbox: &str, seldom: u32) {
    let _one = exclusive();
    let daemon = Svmd::start(first, sandbox);
    if sandbox != "off" {
        let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
        prlimit(Some(Pid::from_child(&daemon.child)), Resource::Nofile, limit).unwrap();
    }
    let (often, seldom) = (times(2 * u32::try_from(DESCRIPTORS).unwrap()), times(seldom));
    assert!(sandbox != "off" || daemon.holds().descriptors.is_some(), "descriptors cannot be counted");
    if first == "soft" {
        // What is remembered for people is bounded: it is full before anything is counted.
        daemon.session(|vmm| {
            play(vmm, up());
            hello(vmm, 7);
            create(vmm, 1);
            fault_often(vmm, 1);
        });
    }
    daemon.leaving_nothing(seldom, "a session with contexts, faults and jobs", |daemon| {
        daemon.session(|vmm| play(vmm, session()));
    });
    daemon.leaving_nothing(often, "connect and leave", |daemon| daemon.session(|_| ()));
    daemon.leaving_nothing(often, "a handshake", |daemon| daemon.session(|vmm| play(vmm, handshake())));
    daemon.leaving_nothing(1, &format!("{seldom} contexts in a session"), |daemon| {
        daemon.session(|vmm| {
            play(vmm, up());
            hello(vmm, 7);
            (0..seldom).for_each(|_| live_and_die(vmm));
        });
    });
    daemon.leaving_nothing(often, "guest.add and guest.remove", |daemon| {
        let socket = daemon.path("vm1");
        daemon.call("guest.add", &format!(r#"{{"name":"vm1","socket":{socket:?}}}"#));
        daemon.call("guest.remove", r#"{"name":"vm1"}"#);
    });
    daemon.leaving_nothing(often, "a control connection", |daemon| _ = daemon.call("stats.get", "{}"));
}

#[test]
fn unconfined_daemon_holds_what_it_held() {
    everything_comes_and_goes("soft", "off", 40);
}

#[test]
fn confined_daemon_holds_what_it_held() {
    everything_comes_and_goes("soft", "best-effort", 40);
}

#[test]
fn workers_leave_nothing() {
    everything_comes_and_goes("hostmmu", "off", 5);
}
