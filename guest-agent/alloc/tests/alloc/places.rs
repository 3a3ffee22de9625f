//! Memory that malloc did not give: globals and the stacks of threads; and what is allocated before main.

use crate::program::{Program, as_wanted, compile, library, twice};
use crate::world::World;
use std::process::Command;

/// How a program comes by the library.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Loading,
    Linking,
}

fn start(world: &World, by: By) -> Program {
    let directory = world.directory.path();
    compile(directory, "library", &["-shared", "-fPIC"]);
    std::fs::rename(directory.join("library"), directory.join("liblibrary.so")).unwrap();
    let path = format!("-L{}", directory.display());
    let found = format!("-Wl,-rpath,{}", directory.display());
    let mut flags = vec![path.as_str(), &found, "-llibrary"];
    // As README has it of an installed one.
    let folder = format!("-L{}", library().parent().unwrap().display());
    let found = format!("-Wl,-rpath,{}", library().parent().unwrap().display());
    if by == By::Linking {
        flags.extend([folder.as_str(), "-lsvm_alloc", &found]);
    }
    let mut command = Command::new(compile(directory, "places", &flags));
    command.env("SVM_AGENT_SOCKET", world.socket());
    match by {
        By::Loading => Program::spawn(&mut command),
        By::Linking => Program::spawn_plain(as_wanted(command.env_remove("LD_PRELOAD"))),
    }
}

#[test]
fn globals_stacks_and_early_memory_are_reached() {
    twice(|| {
        check(By::Loading);
    });
}

#[test]
fn program_that_links_the_library_needs_no_preload() {
    twice(|| {
        check(By::Linking);
    });
}

fn check(by: By) {
    let world = World::new();
    let mut program = start(&world, by);
    let names = [
        "early",
        "data",
        "zeros",
        "library_data",
        "library_zeros",
        "library_block",
        "constant",
        "main_stack",
    ];
    let told = names.map(|name| program.told(name));
    let [early, data, zeros, library_data, library_zeros, library_block, constant, main_stack] = told;
    let gpu = world.gpu(program.pid());
    assert_eq!([early, data, zeros].map(|at| gpu.word(at)), [100, 101, 102]);
    assert_eq!([library_data, library_block, library_zeros].map(|at| gpu.word(at)), [103, 105, 106]);
    assert!(!gpu.reaches(constant) && !gpu.reaches(main_stack));
    gpu.set_word(data, 1101);
    let before = world.arena_bytes(program.pid());
    program.go_on();

    let local = program.told("local");
    let gpu = world.gpu(program.pid());
    assert!(world.arena_bytes(program.pid()) > before);
    assert_eq!(gpu.word(local), 104);
    gpu.set_word(local, 1104);
    program.go_on();
    program.told("ended");
    // The heap may have grown meanwhile, the stack is gone.
    assert!(!world.gpu(program.pid()).reaches(local));
    program.go_on();
    // A small stack and one that the program brought, which lies in its globals.
    for name in ["small", "own"] {
        let local = program.told(name);
        let gpu = world.gpu(program.pid());
        assert_eq!(gpu.word(local), 104);
        gpu.set_word(local, 1104);
        program.go_on();
    }
    program.told("end");
    program.go_on();
    program.end_well();
}
