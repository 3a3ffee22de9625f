//! Guests work while every connection of both sockets is in the hands of a greedy client: each of their commands, faults
//! and jobs comes to its right end, and the daemon needs no more threads and memory than are bounded.

use crate::guest::live;
use crate::harness::{Client, PATIENCE};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GUESTS: [&str; 2] = ["vm0", "vm1"];
/// Of soft devices, which are the default.
const DEVICES: u32 = 2;
/// Connections that are left of the control socket's 64 for those who come and go, and for the polite one.
const GREEDY: usize = 48;
/// The daemon's own, its engines, housekeeper, guests, both sessions' and those of methods.
const MOST_THREADS: usize = 1 + 2 + 1 + 2 + 4 + 16;
const MOST_KIB: u64 = 96 << 10;

struct Svmd {
    child: Child,
    dir: TempDir,
}

impl Svmd {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
        for (option, name) in [("control-socket", "control"), ("control-socket-ro", "ro")] {
            command.arg(format!("--{option}={}", dir.path().join(name).display()));
        }
        command.args(GUESTS.map(|name| format!("--socket-path={}", dir.path().join(name).display())));
        let child = command.args(["--log", "error"]).stdin(Stdio::null()).spawn().unwrap();
        let svmd = Self { child, dir };
        let deadline = Instant::now() + PATIENCE;
        while GUESTS.iter().chain(&["control", "ro"]).any(|name| !svmd.path(name).exists()) {
            assert!(Instant::now() < deadline, "svmd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        svmd
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }
    /// The most memory that it has had, in KiB.
    fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

/// How a client is greedy.
#[derive(Clone, Copy)]
enum Way {
    /// Sends as far ahead as it can and takes nothing.
    Ahead,
    /// Subscribes and takes nothing.
    Subscribed,
    /// Asks for batches and takes all of it.
    Batches,
    /// Sends single bytes of a request that never ends.
    Bytes,
}

const WAYS: [Way; 4] = [Way::Ahead, Way::Subscribed, Way::Batches, Way::Bytes];

fn request(method: &str) -> String {
    json!({"jsonrpc": "2.0", "id": 1, "method": method}).to_string()
}

/// One client's doings, connecting anew whenever it is cut off, until `enough`.
fn be_greedy(socket: &Path, way: Way, enough: &AtomicBool, done: &AtomicU64) {
    let text = match way {
        Way::Ahead => (request("rpc.discover") + "\n").repeat(100),
        Way::Subscribed => request("events.subscribe") + "\n",
        Way::Batches => format!("[{}]\n", vec![request("device.list"); 128].join(",")),
        Way::Bytes => "[".to_owned(),
    };
    while !enough.load(Ordering::Relaxed) {
        let Ok(stream) = UnixStream::connect(socket) else { continue };
        stream.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while !enough.load(Ordering::Relaxed) {
            match (&stream).write(&text.as_bytes()[sent..]) {
                Ok(count) => sent = (sent + count) % text.len(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
            if matches!(way, Way::Batches) {
                while (&stream).read(&mut [0; 1 << 16]).is_ok_and(|count| count > 0) {}
            }
            done.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Connects and leaves, as fast as it can.
fn come_and_go(socket: &Path, enough: &AtomicBool, done: &AtomicU64) {
    while !enough.load(Ordering::Relaxed) {
        drop(UnixStream::connect(socket));
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the greedy clients when it is dropped.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn guests_work_on_while_operators_clients_are_greedy() {
    let rounds = std::env::var("SVM_GREEDY").map_or(20, |rounds| rounds.parse::<u64>().unwrap() / 100);
    let svmd = Svmd::start();
    let mut polite = Client::connect(&svmd.path("control"));
    let (enough, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let (enough, done) = (&enough, &done);
    let sockets = [svmd.path("control"), svmd.path("ro")];
    std::thread::scope(|scope| {
        // Also when the test fails: the scope waits for them.
        let stop = Stop(enough);
        for socket in &sockets {
            for n in 0..GREEDY {
                scope.spawn(move || be_greedy(socket, WAYS[n % WAYS.len()], enough, done));
            }
            scope.spawn(move || come_and_go(socket, enough, done));
        }
        let guests = GUESTS.map(|name| {
            let socket = svmd.path(name);
            scope.spawn(move || (0..rounds).try_for_each(|round| live(&socket, DEVICES, round * 16)))
        });
        let mut most_threads = 0;
        while guests.iter().any(|guest| !guest.is_finished()) || done.load(Ordering::Relaxed) < 1000 {
            polite.result("guest.list", json!({}));
            most_threads = most_threads.max(svmd.threads());
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(stop);
        for guest in guests {
            assert_eq!(guest.join().unwrap(), Ok(()));
        }
        assert!(most_threads <= MOST_THREADS, "{most_threads} threads");
    });
    let stats = polite.result("stats.get", json!({}));
    let jobs = rounds * u64::from(DEVICES) * GUESTS.len() as u64;
    let counters = &stats["counters"];
    assert_eq!(
        (counters["jobs_done"].as_u64(), counters["faults_answered"].as_u64()),
        (Some(jobs), Some(jobs))
    );
    assert!(svmd.peak() < MOST_KIB, "{} KiB", svmd.peak());
    println!("{jobs} jobs, {} greedy steps, {} KiB at most", done.load(Ordering::Relaxed), svmd.peak());
}
