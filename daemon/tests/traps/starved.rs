//! E7: a daemon that runs out of descriptors at any step of a session's begin. What the framework lacks it would wait for
//! for ever, so nothing may be left of the attempt.

use crate::raw::{GET_FEATURES, Raw};
use crate::vmm::PATIENCE;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Descriptors that suffice for a session and those of the daemon itself.
const ENOUGH: u64 = 64;
/// Failures at each step.
const FAILURES: usize = 4;

struct Starved {
    child: Child,
    socket: PathBuf,
    log: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Starved {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm0.sock");
        // Each refusal is looked for in the log.
        let config = dir.path().join("svmd.toml");
        std::fs::write(&config, "[limits]\nlog_lines = 100000\n").unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_svmd"))
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--config={}", config.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (tell, log) = channel();
        let reader = std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).all(|line| tell.send(line).is_ok());
        });
        let daemon = Self { child, socket, log, reader: Some(reader), _dir: dir };
        let deadline = Instant::now() + PATIENCE;
        while !daemon.log.try_iter().any(|line| line.contains("guest added")) {
            assert!(Instant::now() < deadline, "it does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        daemon
    }
    fn limit(&self, most: u64) {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let limit = Rlimit { current: Some(most), maximum };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit).unwrap();
    }
    fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }
    /// Threads of the daemon when no session is live: their number stands still.
    fn threads_when_idle(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        while !self.log.try_iter().any(|line| line.contains("VMM disconnected")) {
            assert!(Instant::now() < deadline, "the session does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Who has been joined may be listed a moment longer.
        let (mut count, mut looks) = (self.threads(), 0);
        while looks < 20 {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.threads();
            (count, looks) = if now == count { (count, looks + 1) } else { (now, 0) };
        }
        count
    }
    fn wait_threads(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.threads() != count {
            assert!(Instant::now() < deadline, "{} threads, not {count}", self.threads());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    /// Whether a VMM that comes now is served; else what the log says.
    fn serves(&self) -> Result<(), String> {
        while self.log.try_recv().is_ok() {}
        let raw = Raw::connect(&self.socket);
        let (tell, answered) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| tell.send(raw.ask(GET_FEATURES, &[]).is_some()));
            let deadline = Instant::now() + PATIENCE;
            loop {
                assert!(Instant::now() < deadline, "neither served nor refused");
                if answered.try_recv() == Ok(true) {
                    return Ok(());
                }
                match self.log.recv_timeout(Duration::from_millis(1)) {
                    Ok(line) if line.contains("session ended") => {
                        raw.hang_up();
                        return Err(line);
                    }
                    Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => panic!("svmd has ended"),
                }
            }
        })
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        // It has a descriptor of this process open, which the next test would count.
        self.reader.take().map(JoinHandle::join);
    }
}

#[test]
fn e07_session_that_cannot_begin_for_want_of_descriptors_leaves_nothing() {
    let _alone = crate::alone();
    let daemon = Starved::start();
    daemon.serves().unwrap();
    let idle = daemon.threads_when_idle();
    // From the fewest with which it is served downwards: each step of the beginning fails once.
    daemon.limit(ENOUGH);
    let mut least = ENOUGH;
    while daemon.serves().is_ok() {
        daemon.wait_threads(idle);
        least -= 1;
        daemon.limit(least);
    }
    let mut refusals = Vec::new();
    for most in (1..=least).rev().take(16) {
        daemon.limit(most);
        for _ in 0..FAILURES {
            if let Err(line) = daemon.serves() {
                refusals.push(line.split("reason=").last().unwrap_or_default().to_owned());
            }
            daemon.wait_threads(idle);
        }
        // What was refused before it was accepted waits in the socket's backlog, which is short.
        daemon.limit(ENOUGH);
        daemon.serves().unwrap();
        daemon.wait_threads(idle);
    }
    refusals.dedup();
    println!("{refusals:#?}");
    assert!(refusals.len() > 3, "{refusals:?}");
    // One more than was too few.
    daemon.limit(least + 1);
    daemon.serves().unwrap();
}
