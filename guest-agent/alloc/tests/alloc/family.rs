//! malloc and its relatives.

use crate::mock::eventually;
use crate::program::{Program, compile, twice};
use crate::world::World;
use std::process::Command;

#[test]
fn list_of_an_unmodified_program_is_walked() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "list", &[]);
        let (first, expected) = (program.told("first"), program.told("sum"));
        let gpu = world.gpu(program.pid());
        let (mut node, mut count, mut sum) = (first, 0, 0u64);
        while node != 0 {
            sum = sum.wrapping_add(gpu.word(node + 8));
            node = gpu.word(node);
            count += 1;
        }
        assert_eq!((count, sum), (3000, expected));
        gpu.set_word(first + 8, 12345);
        program.go_on();
        program.told("changed");
        assert_eq!(gpu.word(gpu.word(first) + 8), 54321);
        program.go_on();
        program.end_well();
        eventually("its context ends", || world.agent.status().contexts.is_empty());
    });
}

#[test]
fn every_relative_of_malloc_serves_arenas() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "family", &[]);
        let mut addresses = Vec::new();
        // Two, five powers of three per size, and so on: as many as it tells before its end.
        for _ in 0..2 + 12 + 19 * 3 + 3 + 3 {
            addresses.push(program.told("block"));
        }
        program.told("end");
        let gpu = world.gpu(program.pid());
        let freed_at_once = |index: usize| (14..14 + 57).contains(&index) && (index - 14) % 3 == 1;
        for (index, address) in addresses.iter().enumerate().filter(|(index, _)| !freed_at_once(*index)) {
            assert_eq!(gpu.word(*address), index as u64 + 1, "block {index}");
        }
        program.go_on();
        program.end_well();
    });
}

#[test]
fn large_blocks_go_back_to_the_agent() {
    let world = World::new();
    let mut program = Program::start(&world, "large", &[]);
    let pid = program.pid();
    world.gpu(pid);
    program.go_on();
    program.told("through");
    // Without them: small blocks and globals.
    eventually("they are given back", || world.arena_bytes(pid) < 1 << 20);
    program.go_on();
    program.end_well();
}

#[test]
fn streams_lie_outside_of_arenas_and_their_buffers_inside() {
    twice(|| {
        let world = World::new();
        let mut program = Program::start(&world, "makers", &[]);
        let mut streams: Vec<u64> = (0..7).map(|_| program.told("stream")).collect();
        let [small, grown] = ["small", "grown"].map(|name| program.told(name));
        streams.push(program.told("stream"));
        let wide = program.told("wide");
        let gpu = world.gpu(program.pid());
        for stream in streams {
            assert!(!gpu.reaches(stream), "{stream:#x}");
        }
        assert_eq!(gpu.word(small), u64::from_le_bytes(*b"eight by"));
        assert_eq!(gpu.word(grown), u64::from_le_bytes(*b"longer l"));
        assert_eq!(gpu.word(wide), u64::from('w') | u64::from('i') << 32);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn streams_that_are_opened_before_the_library_is_ready_lie_outside_of_arenas() {
    twice(|| {
        let world = World::new();
        let early = compile(world.directory.path(), "early", &["-shared", "-fPIC"]);
        let program = compile(world.directory.path(), "early_stream", &[early.to_str().unwrap()]);
        let mut program = Program::spawn(Command::new(program).env("SVM_AGENT_SOCKET", world.socket()));
        let stream = program.told("stream");
        assert!(!world.gpu(program.pid()).reaches(stream));
        program.go_on();
        program.end_well();
    });
}
