//! Processes that execute another program and keep their socket: the context ends with the program that had it, and the
//! next one may have one of its own.
//!
//! A test starts itself again as such a process, which does so once more; the socket is its standard input by then, which
//! no exec closes.

#![expect(unsafe_code, reason = "ends the first thread of a process, which no safe call does")]

use crate::hostile::{EACCES, ENOENT, PAGE, Scene, Session, alone, bind, create, hello, message, this_test};
use crate::mock::eventually;
use guest_agent::message::*;
use guest_agent::socket::MessageSocket;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the agent listens, in the environment of a process that a test has started.
const SOCKET: &str = "SVM_TEST_SOCKET";
/// What the second program does first.
const DEED: &str = "SVM_TEST_DEED";
/// The context of the first program, in the environment of the second one.
const CONTEXT: &str = "SVM_TEST_CONTEXT";
const VA: u64 = 0x4000_0000;

const DEEDS: [&str; 3] = ["speaks", "waits", "joins"];

fn started() -> Option<PathBuf> {
    std::env::var_os(SOCKET).map(PathBuf::from)
}

fn start(scene: &Scene, test: &str, deed: &str) {
    let mut command = this_test(test);
    let output = command.env(SOCKET, scene.socket()).env(DEED, deed).output().unwrap();
    assert!(output.status.success(), "{deed}: {output:?}");
}

fn execute(test: &str, path: &Path) {
    let session = Session::open(path);
    session.arena(VA, 4 * PAGE);
    rustix::stdio::dup2_stdin(&session.socket).unwrap();
    // In this very process, unlike `spawn`.
    let failed = Command::exec(this_test(test).env(CONTEXT, session.ctx_id.to_string()));
    panic!("it does not execute: {failed}");
}

/// The second program: what it has of the first one is worth nothing.
fn act(deed: &str, ctx_id: u32, path: &Path) {
    let socket = MessageSocket::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let left = Session { socket, ctx_id };
    match deed {
        "speaks" => assert_eq!(left.status(&create(VA + 64 * PAGE, PAGE), &[]), Some(EACCES)),
        "waits" => {}
        "joins" => {
            let joining = Session::silent(path);
            assert_eq!(joining.status(&hello(ctx_id), &[]), Some(ENOENT));
        }
        other => panic!("{other}"),
    }
    assert!(left.hear().is_none(), "it is hung up on");
    let own = Session::open(path);
    assert_ne!(own.ctx_id, ctx_id);
    own.arena(VA, 4 * PAGE);
    assert_eq!(own.status(&bind(VA), &[]), Some(0));
}

#[test]
fn context_ends_at_exec_though_its_socket_lives_on() {
    const TEST: &str = "exec::context_ends_at_exec_though_its_socket_lives_on";
    if let Some(path) = started() {
        return match std::env::var(CONTEXT) {
            Ok(ctx_id) => act(&std::env::var(DEED).unwrap(), ctx_id.parse().unwrap(), &path),
            Err(_) => execute(TEST, &path),
        };
    }
    if !alone(TEST) {
        return;
    }
    let scene = Scene::new();
    for deed in DEEDS {
        start(&scene, TEST, deed);
        scene.only_victim_is_left();
        scene.check(&deed);
    }
    scene.end();
}

extern "C" fn end_thread(_signal: i32) {
    // SAFETY: ends the thread that runs this, and no other one; nobody waits for what it holds.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Ends the thread by whose id the process goes; the one that calls this is another one.
fn end_first_thread() {
    let handler = end_thread as extern "C" fn(i32);
    // SAFETY: the handler only makes a system call.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    let pid = std::process::id();
    // SAFETY: sends a signal, for which there is a handler, to a thread of this process.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR1) };
    let stat = || std::fs::read_to_string(format!("/proc/self/task/{pid}/stat")).unwrap();
    eventually("the first thread has ended", || stat().contains(") Z "));
}

/// The thread by whose id the process goes has no memory any more; the others have.
#[test]
fn process_whose_first_thread_has_ended_is_served() {
    const TEST: &str = "exec::process_whose_first_thread_has_ended_is_served";
    if let Some(path) = started() {
        end_first_thread();
        let session = Session::open(&path);
        session.arena(VA, PAGE);
        assert_eq!(session.status(&message(DEVICES, &[]), &[]), Some(0));
        std::process::exit(7);
    }
    if !alone(TEST) {
        return;
    }
    let scene = Scene::new();
    let ended = this_test(TEST).env(SOCKET, scene.socket()).output().unwrap();
    assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    scene.only_victim_is_left();
    scene.end();
}
