//! Programs whose memory GPUs do not reach, or not all of it.

use crate::program::{Program, compile};
use crate::world::World;
use guest_agent::agent::AgentOptions;
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
    let (code, said) = run(&mut list(directory.path(), nowhere.to_str().unwrap(), ""));
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

#[test]
fn beyond_the_quota_the_program_works_and_says_so_once() {
    let world = World::with(AgentOptions { context_arena_bytes: 4 << 20, ..AgentOptions::default() });
    let socket = world.socket();
    let (code, said) = run(&mut list(world.directory.path(), socket.to_str().unwrap(), ""));
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert!(said.contains("ENOSPC") && said.contains("--process-memory"), "{said}");
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
