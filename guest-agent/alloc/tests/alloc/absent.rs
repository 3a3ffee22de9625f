//! Programs whose memory GPUs do not reach, or not all of it.

use crate::mock::eventually;
use crate::program::{Program, compile, library};
use crate::world::{World, is_root};
use guest_agent::agent::AgentOptions;
use guest_agent::client::{Client, Error};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

fn list(directory: &Path, socket: &str, allocation: &str) -> Command {
    let mut command = Command::new(compile(directory, "large", &[]));
    command.env("SVM_AGENT_SOCKET", socket).env("SVM_ALLOC", allocation);
    command
}

/// Lets it run to its end.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let mut program = Program::spawn(command);
    program.go_on();
    program.told("through");
    program.go_on();
    let (status, said) = program.end();
    (status.code(), said)
}

#[test]
fn without_an_agent_the_program_works_and_says_so_once() {
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("nowhere.sock");
    let (code, said) = run(&mut list(directory.path(), nowhere.to_str().unwrap(), "early"));
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    for part in ["GPUs do not reach", "nowhere.sock", "ENOENT", "start `svm-agent serve`", "SVM_AGENT_SOCKET"]
    {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn program_that_requires_an_agent_ends_without_one() {
    let directory = tempfile::tempdir().unwrap();
    let long = "x".repeat(300);
    let nowhere = directory.path().join("nowhere.sock");
    for socket in [nowhere.to_str().unwrap(), &long] {
        let (status, said) = Program::spawn(&mut list(directory.path(), socket, "require")).end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("start `svm-agent serve`") && said.contains("SVM_ALLOC=require"), "{said}");
    }
}

/// Of the limits the one that is reached is named.
#[test]
fn beyond_the_quota_the_program_works_and_says_so_once() {
    let options = AgentOptions::default;
    let cases = [
        (AgentOptions { context_arena_bytes: 4 << 20, ..options() }, "--process-memory"),
        (AgentOptions { user_arena_bytes: 4 << 20, ..options() }, "--user-memory"),
        (AgentOptions { total_arena_bytes: 4 << 20, ..options() }, "--total-memory"),
        (AgentOptions { context_arenas: 3, ..options() }, "limit of arenas"),
    ];
    for (limits, name) in cases {
        let world = World::with(limits);
        let socket = world.socket();
        let (code, said) = run(&mut list(world.directory.path(), socket.to_str().unwrap(), "early"));
        assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
        assert!(said.contains("ENOSPC") && said.contains(name), "{said}");
        assert_eq!(said.contains("--process-memory"), name == "--process-memory", "{said}");
    }
}

/// Not as a connection that has ended: the program has closed nothing.
#[test]
fn limit_of_connections_is_named() {
    for (name, of_user) in [("--max-clients of", false), ("--max-clients-per-user of", true)] {
        let world = World::limited(AgentOptions::default(), |serving| {
            *(if of_user { &mut serving.max_clients_per_uid } else { &mut serving.max_clients }) = 1;
        });
        let socket = world.socket();
        let only = Client::connect(&socket).unwrap();
        let (code, said) = run(&mut list(world.directory.path(), socket.to_str().unwrap(), "early"));
        assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
        assert!(said.contains("ENOSPC") && said.contains(name) && !said.contains("close"), "{said}");
        drop(only);
    }
}

#[test]
fn program_that_requires_arenas_ends_beyond_the_quota() {
    let world = World::with(AgentOptions { context_arena_bytes: 4 << 20, ..AgentOptions::default() });
    let socket = world.socket();
    let mut program = Program::spawn(&mut list(world.directory.path(), socket.to_str().unwrap(), "require"));
    program.go_on();
    let (status, said) = program.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("--process-memory"), "{said}");
}

#[test]
fn program_that_closes_every_descriptor_keeps_working() {
    let world = World::new();
    let mut program = Program::start(&world, "closer", &[]);
    program.told("closed");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success(), "{status} {said}");
    assert!(said.contains("the connection has ended"), "{said}");
}

/// Whoever starts a program with more rights than he has would else give it its memory, and with that all of its rights.
#[test]
fn program_with_more_rights_than_its_caller_does_not_go_by_his_environment() {
    if !is_root("program with more rights than its caller does not go by his environment") {
        return;
    }
    let world = World::new();
    let program = compile(world.directory.path(), "rights", &[library().to_str().unwrap()]);
    let mut program = Program::spawn_plain(Command::new(program).env("SVM_AGENT_SOCKET", world.socket()));
    program.told("executed");
    // The one that it had before it executed itself ends.
    eventually("no context", || world.agent.status().contexts.is_empty());
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success(), "{status}: {said}");
    assert!(!said.contains(world.socket().to_str().unwrap()), "{said}");
}

/// Somebody who listens as a user.
fn listener(directory: &Path, user: u32) -> Program {
    std::fs::set_permissions(directory, Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(compile(directory, "listener", &[]));
    let socket = directory.join("agent.sock");
    let mut listener = Program::spawn_plain(command.arg(socket).arg(user.to_string()));
    listener.told("listens");
    listener
}

#[test]
fn agent_of_another_user_is_none() {
    if !is_root("agent of another user is none") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let _listener = listener(directory.path(), 54_321);
    let socket = directory.path().join("agent.sock");
    let (code, said) = run(&mut list(directory.path(), socket.to_str().unwrap(), "early"));
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert!(said.contains("user 54321, neither root"), "{said}");
    let connected = Client::connect(&socket);
    assert!(matches!(connected, Err(Error::NotTheAgent { uid: 54_321, .. })), "{connected:?}");
}

/// It takes as long as the library waits.
#[test]
fn agent_that_does_not_answer_delays_a_program_once() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = listener(directory.path(), rustix::process::geteuid().as_raw());
    let socket = directory.path().join("agent.sock");
    let (code, said) = run(&mut list(directory.path(), socket.to_str().unwrap(), "early"));
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert!(said.contains("has not answered for 90 s"), "{said}");
}

#[test]
fn program_that_has_lost_its_context_works_and_says_so_once() {
    let world = World::new();
    let mut program = Program::start(&world, "large", &[]);
    let pid = program.pid();
    // It has one.
    world.gpu(pid);
    world.mock.script(|script| script.lose_state());
    // Any answer tells of it.
    Client::connect(world.socket()).ok();
    let alive = || {
        let contexts = world.agent.status().contexts;
        contexts.iter().any(|context| context.owner.pid == pid && context.state == "alive")
    };
    eventually("the context is lost", || !alive());
    program.go_on();
    program.told("through");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success() && said.lines().count() == 1, "{status}: {said}");
    assert!(
        said.contains("the context is lost") && said.contains("(EPIPE): start the program again"),
        "{said}"
    );
}

#[test]
fn program_that_changes_its_user_works_and_says_so_once() {
    if !is_root("program that changes its user works and says so once") {
        return;
    }
    let world = World::new();
    let mut program = Program::start(&world, "other_user", &[]);
    program.told("begun");
    world.gpu(program.pid());
    program.go_on();
    program.told("through");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success() && said.lines().count() == 1, "{status}: {said}");
    assert!(said.contains("has changed its user"), "{said}");
}

#[test]
fn program_at_its_limit_of_open_files_goes_on_and_has_arenas_again_below_it() {
    const BLOCK: u64 = 2 << 20;
    let world = World::new();
    let mut program = Program::start(&world, "descriptors", &[]);
    let pid = program.pid();
    let first = program.told("first");
    let bytes = world.arena_bytes(pid);
    program.go_on();
    let [second, third] = ["second", "third"].map(|name| program.told(name));
    let gpu = world.gpu(pid);
    assert_eq!([first, second, third].map(|block| gpu.reaches(block)), [true, false, true]);
    assert_eq!(world.arena_bytes(pid), bytes + BLOCK, "what could not be taken is given back");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success(), "{status}: {said}");
    for part in ["EMFILE", "limit of open files", "fork fails"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn program_with_more_pieces_than_there_is_room_for_goes_on() {
    let world = World::new();
    let mut program = Program::start(&world, "guards", &[]);
    program.told("through");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success(), "{status}: {said}");
}
