//! What a job that touched memory out of reach says, and what limits say.

use crate::build::{build, program, run, text};
use crate::mock::Shape;
use crate::world::World;
use guest_agent::agent::AgentOptions;
use guest_agent::client::Client;
use std::collections::HashMap;
use std::process::Command;

/// What a program says of each kind, and on standard error.
fn said(world: &World, mode: &str) -> (HashMap<String, String>, String) {
    let path = build(world.directory.path(), "tests/c/programs/remedies.c");
    let output = run(program(world, &path).arg(mode).env("SVM_ALLOC", ""));
    let lines = String::from_utf8(output.stdout).unwrap();
    let pairs = lines.lines().map(|line| line.split_once(": ").unwrap());
    let pairs = pairs.map(|(kind, said)| (kind.to_owned(), said.to_owned()));
    (pairs.collect(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn each_kind_of_memory_out_of_reach_has_its_remedy() {
    let world = World::new(&[Shape::default()]);
    let (mut kinds, complaints) = said(&world, "kinds");
    assert_eq!(complaints, "");
    let expected: [(&str, &[&str]); 15] = [
        ("plain", &["works"]),
        ("none", &["PROT_NONE", "map it readable and writable", "malloc"]),
        ("read-only", &["read-only", "map it readable and writable", "malloc"]),
        ("executable", &["PROT_EXEC", "map it readable and writable", "malloc"]),
        ("reserved", &["MAP_NORESERVE", "64 MiB", "malloc"]),
        ("reserved, few", &["works"]),
        ("for a stack", &["MAP_STACK", "malloc"]),
        ("grows down", &["MAP_GROWSDOWN", "malloc"]),
        ("plain again", &["works"]),
        ("beside it", &["works"]),
        ("protected", &["mprotect", "readable and writable", "malloc"]),
        ("not seen", &["anonymous", "system calls", "malloc"]),
        ("not writable", &["mapped read-only", "malloc"]),
        ("top of a stack", &["top of a thread's stack", "malloc"]),
        ("deep stack", &["256 KiB", "malloc"]),
    ];
    for (kind, words) in expected {
        let said = kinds.remove(kind).unwrap();
        assert!(words.iter().all(|word| said.contains(word)), "{kind}: {said}");
        assert!(said == "works" || said.contains("packet 0 failed at GPU address"), "{kind}: {said}");
    }
    assert!(kinds.is_empty(), "{kinds:?}");
}

/// The library says it once, and each job that meets it says it.
#[test]
fn memory_beyond_a_limit_names_the_limit() {
    let options = AgentOptions::default;
    let cases = [
        (AgentOptions { context_arena_bytes: 6 << 20, ..options() }, "--process-memory"),
        (AgentOptions { user_arena_bytes: 6 << 20, ..options() }, "--user-memory"),
        (AgentOptions { total_arena_bytes: 6 << 20, ..options() }, "--total-memory"),
    ];
    for (limits, name) in cases {
        let world = World::limited(&[Shape::default()], limits, |_| {});
        let expected: [(&str, &[&str]); 2] = [("shared", &["memfd"]), ("private", &["malloc", "mmap"])];
        for (mode, expected) in expected {
            let (kinds, complaints) = said(&world, mode);
            for kind in expected {
                let said = &kinds[*kind];
                assert!(said.contains(name) && !said.contains("tmpfs"), "{kind}: {said}");
            }
            assert!(complaints.contains(name) && complaints.lines().count() == 1, "{mode}: {complaints}");
            crate::mock::eventually("what it had is given back", || world.agent.status().contexts.is_empty());
        }
    }
}

/// As the header promises, and not as a connection that breaks.
#[test]
fn connection_beyond_a_limit_is_refused_with_its_name() {
    let world = World::limited(&[Shape::default()], AgentOptions::default(), |broker| broker.max_clients = 1);
    let path = build(world.directory.path(), "tests/c/programs/connect.c");
    let connect = || {
        let mut command = Command::new(&path);
        let command = command.env("LD_LIBRARY_PATH", world.directory.path());
        text(&run(command.env("SVM_AGENT_SOCKET", world.socket())))
    };
    assert_eq!(connect(), "0 connected\n");
    // The one before may not have left yet, and is waited for.
    let mut only = Client::connect(world.socket());
    crate::mock::eventually("room for a client", || {
        let full = only.is_err();
        if full {
            only = Client::connect(world.socket());
        }
        !full
    });
    let told = connect();
    assert!(told.starts_with("-28 HELLO: ENOSPC") && told.contains("--max-clients"), "{told}");
    world.mock.script(|script| script.max_contexts = 0);
    drop(only);
    crate::mock::eventually("the host's limit", || connect().contains("limits.contexts"));
    assert!(connect().starts_with("-28 "));
}
