//! Processes that leave while their request for memory is in line behind another one's: nothing is made for them.
//!
//! Where it takes another process, a test starts itself again; what was its socket is another program's output then, and is
//! not hung up.

use crate::broker::Served;
use crate::hostile::{PAGE, Session, create, this_test};
use crate::mock::eventually;
use guest_agent::agent::AgentOptions;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Where the agent listens, in the environment of a process that a test has started.
const SOCKET: &str = "SVM_TEST_SOCKET";
/// How that process leaves.
const DEED: &str = "SVM_TEST_DEED";
const TEST: &str = "line::nothing_is_made_for_processes_that_leave_the_line";
const VA: u64 = 0x4000_0000;

fn asking(path: &Path) -> Session {
    let session = Session::open(path);
    session.socket.send(&[&create(VA, PAGE)], &[], true).unwrap();
    session
}

/// Asks, and leaves at a word. `cat` stays until the test closes its input.
fn ask_and_leave(path: &Path) {
    let session = asking(path);
    std::io::stdin().read_exact(&mut [0]).unwrap();
    let mut other = Command::new("cat");
    other.stdout(session.socket.as_fd().try_clone_to_owned().unwrap());
    match std::env::var(DEED).unwrap().as_str() {
        "executes" => panic!("{}", other.exec()),
        _ => drop(other.spawn().unwrap()),
    }
}

fn start(served: &Served, deed: &str) -> Child {
    let mut command = this_test(TEST);
    command.env(SOCKET, served.socket()).env(DEED, deed);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

/// Whoever is in line leaves it, in one of three ways, while `first` has the turn.
fn leave_line<T>(served: &Served, first: &Session, leave: impl FnOnce(&dyn Fn()) -> T) -> T {
    let (memory, agent) = (&served.bench.memory, &served.bench.agent);
    let made = memory.made();
    memory.entrance.set_closed(true);
    first.socket.send(&[&create(VA + made * PAGE, PAGE)], &[], true).unwrap();
    eventually("a turn", || memory.entrance.waiting() == 1);
    let before = agent.status().pinned_bytes;
    let left = leave(&|| eventually("in line", || agent.status().pinned_bytes == before + PAGE));
    memory.entrance.set_closed(false);
    assert_eq!(first.hear().unwrap().status, 0);
    eventually("nobody is in line", || agent.status().pinned_bytes == before);
    assert_eq!(memory.made() - made, 1, "the first one's alone");
    left
}

#[test]
fn nothing_is_made_for_processes_that_leave_the_line() {
    if let Some(path) = std::env::var_os(SOCKET).map(PathBuf::from) {
        return ask_and_leave(&path);
    }
    let served = Served::new(AgentOptions::default());
    let first = Session::open(&served.socket());
    leave_line(&served, &first, |in_line| {
        let session = asking(&served.socket());
        in_line();
        drop(session);
    });
    // Other programs have their sockets until their input is closed.
    let ended = leave_line(&served, &first, |in_line| {
        let mut child = start(&served, "ends");
        in_line();
        child.stdin.as_ref().unwrap().write_all(&[0]).unwrap();
        // Not by `wait`, which closes its input.
        eventually("it ends", || child.try_wait().unwrap().is_some());
        child
    });
    let mut executed = leave_line(&served, &first, |in_line| {
        let child = start(&served, "executes");
        in_line();
        child.stdin.as_ref().unwrap().write_all(&[0]).unwrap();
        let name = || std::fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap();
        eventually("it executes", || name() == "cat\n");
        child
    });
    drop(ended);
    executed.wait().unwrap();
}
