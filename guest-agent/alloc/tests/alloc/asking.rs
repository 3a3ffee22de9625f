//! Programs that have memory and threads before they ask for a device.

use crate::lacking::lacking;
use crate::maps::{PAGE, add_to_words, assert_out_of_reach, assert_words};
use crate::program::{Program, compile, late, library};
use crate::world::{World, is_root};
use guest_agent::agent::AgentOptions;
use std::process::Command;

const KINDS: u64 = 13;

#[test]
fn threads_of_all_kinds_go_on_and_their_stacks_are_reached() {
    late();
    let world = World::new();
    let mut program = Program::start(&world, "standing", &[]);
    let locals: Vec<u64> = (0..KINDS).map(|_| program.told("local")).collect();
    let (global, block) = (program.told("global"), program.told("block"));
    let gpu = world.gpu(program.pid());
    // COUNTS is the first kind.
    assert!(gpu.word(global) > 0 && gpu.word(block) == gpu.word(global));
    for (kind, local) in (0..).zip(locals) {
        gpu.set_word(local, 1000 + kind);
    }
    program.go_on();
    program.end_well();
}

#[test]
fn memory_is_reached_as_it_is_by_then() {
    late();
    let world = World::new();
    let mut program = Program::start(&world, "prior", &[world.directory.path().to_str().unwrap()]);
    let names = [
        "cut", "over", "grown", "memory", "parts", "copy", "dirty", "only", "data", "guarded", "reserved",
        "hidden", "untold", "wiped", "absent", "dumped", "block", "watched",
    ];
    let [
        cut,
        over,
        grown,
        memory,
        parts,
        copy,
        dirty,
        only,
        data,
        guarded,
        reserved,
        hidden,
        untold,
        wiped,
        absent,
        dumped,
        block,
        watched,
    ] = names.map(|name| program.told(name));
    let gpu = world.gpu(program.pid());
    assert_words(&gpu, cut, 0..2, 100);
    assert_out_of_reach(&gpu, cut, 2..3);
    assert_words(&gpu, cut, 3..6, 100);
    assert_words(&gpu, over, 0..3, 200);
    assert_words(&gpu, grown, 0..4, 300);
    assert_words(&gpu, grown, 499..500, 300);
    assert_out_of_reach(&gpu, grown, 500..501);
    assert_words(&gpu, memory, 0..7, 400);
    assert_eq!(gpu.word(memory + 7 * PAGE), 4321);
    assert_words(&gpu, parts, 0..3, 503);
    assert_words(&gpu, copy, 0..2, 600);
    assert_eq!([2, 7].map(|page| gpu.word(copy + page * PAGE)), [7777, 607]);
    assert_eq!([0, 1].map(|page| gpu.word(dirty + page * PAGE)), [8888, 601]);
    assert_eq!([0, 1, 2].map(|page| gpu.reaches(only + page * PAGE)), [false, true, false]);
    assert_eq!([0, 1, 2].map(|page| gpu.reaches(data + page * PAGE)), [true, false, true]);
    assert_words(&gpu, reserved, 0..2500, 1000);
    assert_out_of_reach(&gpu, reserved, 2500..2501);
    assert_out_of_reach(&gpu, hidden, 0..2);
    assert_out_of_reach(&gpu, untold, 0..1);
    assert_words(&gpu, wiped, 0..3, 1200);
    assert_words(&gpu, absent, 0..3, 1300);
    assert_eq!([0, 1, 2].map(|page| gpu.reaches(dumped + page * PAGE)), [true, false, true]);
    if watched == 0 {
        lacking("memory that a userfaultfd watches (the kernel gives none)");
    } else {
        assert_eq!(gpu.word(watched), 1100);
        assert_out_of_reach(&gpu, watched, 1..3);
        assert_out_of_reach(&gpu, block, 1..3);
        assert!(gpu.reaches(block) && gpu.reaches(block + 3 * PAGE));
    }
    assert!(gpu.reaches(guarded) && gpu.reaches(guarded + 2 * PAGE));
    add_to_words(&gpu, copy, 2..3, 1000);
    add_to_words(&gpu, copy, 7..8, 1000);
    add_to_words(&gpu, data, 2..3, 1000);
    add_to_words(&gpu, wiped, 0..3, 1000);
    add_to_words(&gpu, absent, 0..3, 1000);
    program.go_on();
    program.end_well();
}

/// What cannot be moved stays; what comes later is in reach.
#[test]
fn thread_that_does_not_come_has_memory_stay_where_it_is() {
    late();
    let world = World::new();
    let mut program = Program::start(&world, "away", &[]);
    let [before, after] = ["before", "after"].map(|name| program.told(name));
    let gpu = world.gpu(program.pid());
    assert!(!gpu.reaches(before) && gpu.word(after) == 8);
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success(), "{status}: {said}");
    assert!(said.contains("has not come out of the kernel") && said.lines().count() == 1, "{said}");
}

/// Where /proc tells of other numbers than threads have, none is taken for gone.
#[test]
fn program_in_a_pid_namespace_without_its_proc_goes_on() {
    if !is_root("program in a pid namespace without its proc goes on") {
        return;
    }
    let world = World::new();
    let program = compile(world.directory.path(), "standing", &[]);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "env"]).arg(format!("LD_PRELOAD={}", library().display()));
    command.arg(program).env("SVM_AGENT_SOCKET", world.socket()).env("TOLD_ASKS", "");
    let mut program = Program::spawn_plain(&mut command);
    assert!((0..KINDS + 2).all(|_| !program.next("an address").0.is_empty()));
    let (status, said) = program.end();
    // It misses what no GPU has written.
    assert_eq!(status.code(), Some(4), "{said}");
    assert!(said.contains("of its own pid namespace"), "{said}");
}

/// Memory in more pieces than there is room for in the table, which it then knows nothing of.
#[test]
fn memory_in_too_many_pieces_is_left_alone() {
    late();
    let world = World::new();
    let mut program =
        Program::start(&world, "prior", &[world.directory.path().to_str().unwrap(), "scattered"]);
    assert!((0..18).all(|_| !program.next("an address").0.is_empty()));
    let (status, said) = program.end();
    // It misses what no GPU has written; and what the table had room for was more than the agent allows.
    assert_eq!((status.code(), said.lines().count()), (Some(4), 1), "{said}");
    assert!(said.contains("limit of arenas"), "{said}");
}

/// Where the agent has no room, or there is none, the program has its memory as it was.
#[test]
fn program_that_asks_in_vain_goes_on() {
    late();
    let limits = AgentOptions { context_arena_bytes: 256 << 10, ..AgentOptions::default() };
    for world in [None, Some(World::with(limits))] {
        let folder = tempfile::tempdir().unwrap();
        let program = compile(folder.path(), "prior", &[]);
        let socket = world.as_ref().map_or(folder.path().join("nowhere.sock"), World::socket);
        let mut program =
            Program::spawn(Command::new(program).arg(folder.path()).env("SVM_AGENT_SOCKET", socket));
        assert!((0..18).all(|_| !program.next("an address").0.is_empty()));
        let (status, said) = program.end();
        // It misses what no GPU has written.
        assert_eq!(status.code(), Some(4), "{said}");
        assert!(said.contains("GPUs do not reach") && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn threads_that_fork_and_map_meanwhile_go_on_in_both_processes() {
    late();
    let world = World::new();
    let mut program = Program::start(&world, "crowd", &[]);
    program.told("end");
    program.go_on();
    program.end_well();
}
