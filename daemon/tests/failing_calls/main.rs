//! The n-th system call of a kind fails, for every kind and n: while svmd starts it ends with a word and leaves nothing,
//! or serves; later a session or one connection of the operator is lost at most, and everything after it is as before.
//!
//! A quick look by default, at `SVM_SEED`; everything: `SVM_SWEEP=all cargo test -p daemon --test failing_calls --
//! --nocapture`, which also prints a table.

#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small constants of the tests")]
#![expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]

mod calls;
mod guest;
mod intercept;
#[path = "../session/vmm.rs"]
#[expect(dead_code, reason = "shared with the session tests, which use more of it")]
mod vmm;

use calls::{CLASSES, Class};
use guest::{SILENCE, live};
use intercept::{Intercepted, possible};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmm::PATIENCE;

const GUESTS: [&str; 2] = ["vm0", "vm1"];
/// A soft one and a hostmmu one.
const DEVICES: u32 = 2;

struct Daemon {
    process: Intercepted,
    dir: TempDir,
    class: &'static Class,
    n: u32,
    /// The dead socket in the place of a guest's.
    dead: u64,
    /// What went wrong for somebody outside: the failed call may cost one of these.
    losses: Vec<String>,
}

impl Daemon {
    fn start(class: &'static Class, n: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut text = format!("[daemon]\ncontrol_socket = {:?}\nlog = 'info'\n", path("control"));
        text +=
            "[[device]]\nkind = 'soft'\nname = 'soft0'\n[[device]]\nkind = 'hostmmu'\nname = 'hostmmu0'\n";
        for guest in GUESTS {
            text += &format!("[[guest]]\nname = '{guest}'\nsocket = {:?}\n", path(guest));
        }
        fs::write(path("svmd.toml"), text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
        command.arg("--config").arg(path("svmd.toml"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(path("log")).unwrap());
        drop(UnixListener::bind(path("vm1")).unwrap());
        let dead = fs::metadata(path("vm1")).unwrap().ino();
        let process = Intercepted::start(command, class, n);
        Self { process, dir, class, n, dead, losses: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }
    fn exited(&mut self) -> Option<ExitStatus> {
        self.process.child.try_wait().unwrap()
    }

    fn fail(&self, what: &str) -> ! {
        let Self { class, n, losses, .. } = self;
        panic!("{} call {n}: {what}\nlosses: {losses:?}\nlog: {}", class.name, self.log());
    }

    fn until(&mut self, what: &str, mut there: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !there(self) {
            if Instant::now() > deadline {
                self.fail(&format!("waited in vain for {what}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn lose(&mut self, what: String) {
        self.losses.push(what);
        if self.losses.len() > 1 || !self.process.failed() {
            self.fail("more was lost than one call can cost");
        }
    }

    /// `Some(status)`: it ended in place of serving.
    fn wait_for_start(&mut self) -> Option<ExitStatus> {
        let mut ended = None;
        self.until("svmd to serve or to end", |daemon| {
            ended = daemon.exited();
            ended.is_some() || daemon.try_ask("guest.list").is_ok()
        });
        ended
    }

    /// Asks once, and again if that was the one that was lost.
    fn ask(&mut self, method: &str) -> Value {
        for _ in 0..2 {
            match self.try_ask(method) {
                Ok(answer) => return answer,
                Err(cause) => self.lose(format!("{method}: {cause}")),
            }
        }
        self.fail("the control socket does not answer")
    }

    fn try_ask(&self, method: &str) -> Result<Value, String> {
        let told = |cause: std::io::Error| match cause.kind() {
            std::io::ErrorKind::WouldBlock => self.fail("silence on the control socket"),
            _ => cause.to_string(),
        };
        let mut stream = UnixStream::connect(self.path("control")).map_err(told)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(told)?;
        let request = format!("{{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"{method}\"}}\n");
        stream.write_all(request.as_bytes()).map_err(told)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).map_err(told)?;
        let answer: Value = serde_json::from_str(&line).map_err(|_| format!("{line:?} is no answer"))?;
        if answer["result"].is_null() { Err(line) } else { Ok(answer) }
    }

    /// A guest's life; if that was what the failed call cost, another one.
    fn guest(&mut self, name: &str, value: u64) {
        for attempt in 0..2 {
            match live(&self.path(name), DEVICES, value + attempt) {
                Ok(()) => return,
                Err(cause) if cause.contains(SILENCE) => self.fail(&format!("{name}: {cause}")),
                Err(cause) => self.lose(format!("{name}: {cause}")),
            }
        }
        self.fail("a guest is not served again")
    }

    /// Threads and descriptors that a daemon without sessions and requests has. The threads of requests stay for a while.
    fn held(&self) -> (usize, Option<usize>) {
        let process = format!("/proc/{}", self.process.child.id());
        let tasks = fs::read_dir(format!("{process}/task")).map(Iterator::flatten).into_iter().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        let threads = names.filter(|name| !name.starts_with("tokio-rt")).count();
        // Of a process that is not dumpable only root may know.
        (threads, fs::read_dir(format!("{process}/fd")).ok().map(Iterator::count))
    }

    /// Everything that is asked of a daemon that has started.
    fn scenario(&mut self) {
        self.ask("guest.list");
        let idle = self.held();
        for (guest, value) in [("vm0", 0x100), ("vm1", 0x200), ("vm0", 0x300)] {
            self.guest(guest, value);
        }
        self.until("all guests to be gone", |daemon| {
            let listed = daemon.ask("guest.list");
            listed["result"]["guests"].as_array().unwrap().iter().all(|guest| guest["connected"] == false)
        });
        let stats = self.ask("stats.get");
        assert_eq!(stats["result"]["contexts"], 0);
        self.until("what sessions held to be given back", |daemon| daemon.held() <= idle);
    }

    /// Asks it to end; nothing may be left.
    fn end(mut self) -> Option<&'static str> {
        self.ask("shutdown");
        let mut status = None;
        self.until("svmd to end", |daemon| {
            status = daemon.exited();
            status.is_some()
        });
        if status.and_then(|status| status.code()) != Some(0) {
            self.fail(&format!("it ends with {status:?}"));
        }
        let failed = self.process.failed();
        // One, if it was its removal that failed.
        self.check_remains(usize::from(failed && ["unlink", "fstat"].contains(&self.class.name)));
        failed.then_some(if self.losses.is_empty() {
            "nobody noticed"
        } else {
            "one session or request lost"
        })
    }

    /// No panic, and of sockets no more than these.
    fn check_remains(&self, may_be_left: usize) {
        let log = self.log();
        if log.contains("panicked") || log.contains("internal fault") {
            self.fail("a panic");
        }
        let mut left = vec!["control"];
        left.extend(GUESTS);
        left.retain(|name| fs::metadata(self.path(name)).is_ok_and(|file| file.ino() != self.dead));
        if left.len() > may_be_left {
            self.fail(&format!("left: {left:?}"));
        }
    }

    /// It has ended in place of serving: with a word.
    fn check_refusal(&mut self, status: ExitStatus) {
        if !self.process.failed() {
            self.fail("it does not start though no call failed");
        }
        let log = self.log();
        let told = match status.code() {
            Some(1 | 2) => log.lines().any(|line| line.starts_with("svmd: ") && line.len() > 12),
            // The loader's own.
            Some(127) => log.contains("error while loading shared libraries"),
            _ => false,
        };
        if !told {
            self.fail(&format!("it ends with {status:?} and no word"));
        }
        self.check_remains(0);
    }
}

/// Calls of a class until svmd listens, and until it has served all that the scenario asks, when none fails.
fn counts(class: &'static Class) -> (u32, u32) {
    static COUNTED: Mutex<BTreeMap<&str, (u32, u32)>> = Mutex::new(BTreeMap::new());
    let mut counted = COUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    *counted.entry(class.name).or_insert_with(|| count(class))
}

fn count(class: &'static Class) -> (u32, u32) {
    let mut daemon = Daemon::start(class, 0);
    assert!(daemon.wait_for_start().is_none(), "{}: {}", class.name, daemon.log());
    let started = daemon.process.seen();
    daemon.scenario();
    let served = daemon.process.seen();
    daemon.end();
    (started, served)
}

/// What came of the n-th call's failure; `None`: there was no n-th call.
fn run(class: &'static Class, n: u32) -> Option<&'static str> {
    let mut daemon = Daemon::start(class, n);
    if let Some(status) = daemon.wait_for_start() {
        daemon.check_refusal(status);
        return Some("svmd refused to start");
    }
    daemon.scenario();
    daemon.end()
}

/// Whether this machine can do this; a word on the real stderr where it cannot.
fn ready() -> bool {
    let Err(cause) = possible() else { return true };
    assert!(std::env::var_os("CI").is_none(), "calls cannot be intercepted here: {cause}");
    std::io::stderr().write_all(b"SKIPPED a sweep over failing calls: no seccomp listener here\n").unwrap();
    false
}

fn all() -> bool {
    std::env::var("SVM_SWEEP").is_ok_and(|sweep| sweep == "all")
}

/// `count` numbers of a range, or all of it.
fn some(range: std::ops::RangeInclusive<u32>, count: usize, seed: &mut u64) -> Vec<u32> {
    let mut numbers: Vec<u32> = range.collect();
    while numbers.len() > count && !all() {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        numbers.remove((*seed >> 33) as usize % numbers.len());
    }
    numbers
}

/// Fails calls of each class in turn, and tells what came of it.
fn sweep(what: &str, numbers: impl Fn(&Class, u32, u32, &mut u64) -> Vec<u32>) {
    let mut seed = std::env::var("SVM_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("SVM_SEED={seed}");
    let mut wrong = Vec::new();
    for class in CLASSES {
        let (started, served) = counts(class);
        let numbers = numbers(class, started, served, &mut seed);
        let mut outcomes = BTreeMap::<&str, u32>::new();
        for n in &numbers {
            // All that is wrong is told, and not only the first.
            let outcome = std::panic::catch_unwind(|| run(class, *n).unwrap_or("not called so often"));
            let outcome = outcome.unwrap_or_else(|panic| {
                wrong.push(panic.downcast_ref::<String>().cloned().unwrap_or_default());
                "WRONG"
            });
            *outcomes.entry(outcome).or_default() += 1;
        }
        println!(
            "| {what} | {} | {started} + {} | {} | {outcomes:?} |",
            class.name,
            served - started,
            numbers.len()
        );
    }
}

#[test]
fn failing_call_while_starting_ends_svmd_with_a_word_or_is_not_noticed() {
    if ready() {
        // The first program that is executed is svmd itself.
        let first = |class: &Class| 1 + u32::from(class.name == "execve");
        sweep("start", |class, started, _, seed| some(first(class)..=started, 3, seed));
    }
}

#[test]
fn failing_call_later_costs_one_session_or_request_at_most() {
    if ready() {
        // Beyond what was seen once: how often some are called differs a little.
        sweep("sessions", |_, started, served, seed| some(started + 1..=served + 2, 2, seed));
    }
}

#[test]
fn daemon_that_ends_in_the_middle_is_noticed() {
    if !ready() {
        return;
    }
    let mut daemon = Daemon::start(&CLASSES[0], 0);
    assert!(daemon.wait_for_start().is_none());
    daemon.process.child.kill().unwrap();
    daemon.process.child.wait().unwrap();
    let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| daemon.scenario()));
    assert!(noticed.is_err());
}
