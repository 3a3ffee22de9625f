//! Errors that a program can bring about.

use crate::build::{build, program};
use crate::mock::Shape;
use crate::world::World;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

#[test]
fn every_error_is_told_with_its_number_and_a_text() {
    let shapes = [
        Shape::default(),
        Shape { va_bits: 40, ..Shape::default() },
        Shape { fault_model: 2, ..Shape::default() },
        Shape { va_bits: 22, ..Shape::default() },
    ];
    let world = World::new(&shapes);
    let path = build(world.directory.path(), "tests/c/programs/errors.c");
    let mut command = program(&world, &path);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut last = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        last = line.unwrap();
        if let Some(paused) = [("pause", true), ("go on", false)].iter().find(|(name, _)| *name == last) {
            world.pause(paused.1);
            input.write_all(b"\n").unwrap();
        }
    }
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() && said.is_empty() && last == "through", "{status}: {said} (after {last:?})");
}
