//! Libraries that are loaded by dlopen, and unloaded.

use crate::program::{Program, compile, twice};
use crate::world::{Gpu, World};
use std::process::Command;

/// Compiles a library and gives it another name.
fn library(world: &World, name: &str) -> String {
    let made = compile(world.directory.path(), "library", &["-shared", "-fPIC"]);
    let path = made.with_file_name(name);
    std::fs::rename(made, &path).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn globals_of_loaded_libraries_are_reached_until_they_go() {
    twice(|| {
        let world = World::new();
        let path = library(&world, "loaded.so");
        library(&world, "libplugin.so");
        let directory = world.directory.path().display();
        let program = compile(
            world.directory.path(),
            "plugins",
            &[&format!("-Wl,-rpath,{directory}"), "-Wl,--no-as-needed"],
        );
        let mut program =
            Program::spawn(Command::new(program).arg(path).env("SVM_AGENT_SOCKET", world.socket()));
        let pid = program.pid();
        let told = |program: &mut Program| (program.told("data"), program.told("zeros"));
        let assert_out_of_reach = |gpu: &Gpu<'_>, (data, zeros)| {
            assert!(!gpu.reaches(data) && !gpu.reaches(zeros));
        };
        let are_reached = |gpu: &Gpu<'_>, (data, zeros)| {
            assert_eq!((gpu.word(data), gpu.word(zeros)), (103, 106));
        };
        let globals = told(&mut program);
        let gpu = world.gpu(pid);
        are_reached(&gpu, globals);
        gpu.set_word(globals.0, 1103);
        program.go_on();

        let page = program.told("page");
        let gpu = world.gpu(pid);
        assert_eq!(gpu.word(page), 200);
        assert!(!gpu.reaches(globals.1));
        program.go_on();

        let left = told(&mut program);
        assert_out_of_reach(&world.gpu(pid), left);
        program.go_on();
        let (kept, globals) = (told(&mut program), told(&mut program));
        are_reached(&world.gpu(pid), kept);
        are_reached(&world.gpu(pid), globals);
        program.go_on();
        let beside_threads = told(&mut program);
        assert_out_of_reach(&world.gpu(pid), beside_threads);
        program.go_on();
        program.end_well();
    });
}

#[test]
fn libraries_with_thread_local_variables_come_and_go_beside_threads_that_allocate() {
    twice(|| {
        let world = World::new();
        let library = compile(world.directory.path(), "thread_local", &["-shared", "-fPIC"]);
        // More than the C library has made room for before the first.
        let copies: Vec<_> = (0..150).map(|copy| world.directory.path().join(format!("{copy}.so"))).collect();
        for copy in &copies {
            std::fs::copy(&library, copy).unwrap();
        }
        let program = compile(world.directory.path(), "thread_locals", &[]);
        let mut program =
            Program::spawn(Command::new(program).args(copies).env("SVM_AGENT_SOCKET", world.socket()));
        program.told("end");
        program.go_on();
        program.end_well();
    });
}
