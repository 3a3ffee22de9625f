//! Memory that malloc did not give: globals and the stacks of threads; and what is allocated before main.

use crate::program::{Program, compile};
use crate::world::World;
use std::process::Command;

fn start(world: &World) -> Program {
    let directory = world.directory.path();
    compile(directory, "library", &["-shared", "-fPIC"]);
    std::fs::rename(directory.join("library"), directory.join("liblibrary.so")).unwrap();
    let path = format!("-L{}", directory.display());
    let found = format!("-Wl,-rpath,{}", directory.display());
    let program = compile(directory, "places", &[&path, &found, "-llibrary"]);
    Program::spawn(Command::new(program).env("SVM_AGENT_SOCKET", world.socket()))
}

#[test]
fn globals_stacks_and_early_memory_are_reached() {
    let world = World::new();
    let mut program = start(&world);
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
    program.go_on();

    let before = world.arena_bytes(program.pid());
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
