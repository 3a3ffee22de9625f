//! Eight threads at random, with and without forks. The seed is printed with a failure; SVM_ALLOC_SEED sets it.

use crate::program::{Program, is_late, twice};
use crate::world::World;
use guest_agent::agent::AgentOptions;
use std::time::{SystemTime, UNIX_EPOCH};

fn seed() -> u64 {
    let set = std::env::var("SVM_ALLOC_SEED").ok().map(|seed| seed.parse().unwrap());
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    set.unwrap_or_else(now) | 1
}

fn stress(rounds: &str, forks: &[&str]) -> u64 {
    let seed = seed();
    println!("SVM_ALLOC_SEED={seed}");
    let world = World::new();
    let mut program = Program::start(&world, "stress", &[&[&seed.to_string(), rounds], forks].concat());
    let forks = program.told("forks");
    program.end_well();
    forks
}

#[test]
fn blocks_of_eight_threads_stay_whole() {
    twice(|| {
        stress("40000", &[]);
    });
}

#[test]
fn children_of_a_busy_process_find_their_memory_whole() {
    twice(|| {
        assert!(stress("40000", &["forks"]) > 0);
    });
}

/// Lets it run through; it then tells what there is.
fn storm_in(world: &World, rounds: &str, forks: &[&str]) -> (Program, u64) {
    let seed = seed();
    println!("SVM_ALLOC_SEED={seed}");
    let mut program = Program::start(world, "storm", &[&[&seed.to_string(), rounds], forks].concat());
    let forks = program.told("forks");
    (program, forks)
}

/// After it, GPUs must find each page as the program does, and none that was taken from them.
fn storm(rounds: &str, forks: &[&str]) -> u64 {
    let world = World::new();
    let (mut program, forks) = storm_in(&world, rounds, forks);
    let gpu = world.gpu(program.pid());
    let mut reached = 0;
    loop {
        let (kind, address) = program.next("an address");
        match kind.as_str() {
            "reached" => assert_eq!(gpu.word(address), program.told("value")),
            // In reach only if it was readable and writable again when the program asked.
            "hidden" => {
                let value = program.told("value");
                assert!(!gpu.reaches(address) || is_late() && gpu.word(address) == value, "{address:#x}");
            }
            end => break assert_eq!(end, "end"),
        }
        reached += 1;
    }
    assert!(reached > 0);
    program.go_on();
    program.end_well();
    forks
}

#[test]
fn mappings_of_six_threads_stay_whole() {
    twice(|| {
        storm("1200", &[]);
    });
}

#[test]
fn children_of_a_busy_process_find_their_mappings_whole() {
    twice(|| {
        assert!(storm("600", &["forks"]) > 0);
    });
}

/// Where the agent gives some memory and refuses other, mappings are of both kinds in parts.
#[test]
fn mappings_that_are_reached_in_parts_stay_whole() {
    twice(|| {
        let options =
            AgentOptions { context_arena_bytes: 3 << 20, context_parts: 40, ..AgentOptions::default() };
        let world = World::with(options);
        let (mut program, forks) = storm_in(&world, "1200", &["forks", "in parts"]);
        assert!(forks > 0);
        let gpu = world.gpu(program.pid());
        loop {
            let (kind, address) = program.next("an address");
            if kind == "end" {
                break;
            }
            let value = program.told("value");
            assert!(
                !gpu.reaches(address) || (kind == "reached" || is_late()) && gpu.word(address) == value,
                "{address:#x}"
            );
        }
        program.go_on();
        let (status, said) = program.end();
        assert!(status.success() && said.contains("ENOSPC"), "{status} {said}");
    });
}
