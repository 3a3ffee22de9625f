//! Handlers of signals that came while their thread was inside the library.

use crate::program::{Program, compile};
use crate::world::World;
use std::process::Command;

#[test]
fn fork_by_a_handler_inside_an_allocation_fails() {
    let world = World::new();
    let program = compile(world.directory.path(), "handler", &[]);
    let mut command = Command::new(program);
    let mut program =
        Program::spawn(command.env("SVM_AGENT_SOCKET", world.socket()).env("HANDLER_FORKS", "1"));
    program.told("through");
    program.go_on();
    let (status, said) = program.end();
    assert!(status.success() && said.contains("fork fails"), "{status}: {said}");
}

/// With other C libraries it may hang or destroy memory.
#[test]
fn allocation_by_a_handler_inside_an_allocation_ends_the_program() {
    let world = World::new();
    let (status, said) = Program::start(&world, "handler", &[]).end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("the handler of a signal") && said.lines().count() == 1, "{said}");
}
