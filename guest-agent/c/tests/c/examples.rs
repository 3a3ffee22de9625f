//! The examples, on devices of several kinds.

use crate::build::{build, compiler, library, program, run, source, text};
use crate::mock::Shape;
use crate::world::World;
use std::process::Command;
use virtio_gpu_svm::protocol::job::{OP_CHASE, OPCODES};

/// `name=value` of a line.
fn value<'a>(line: &'a str, name: &str) -> &'a str {
    let field = line.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    field.unwrap_or_else(|| panic!("no {name} in {line:?}"))
}

fn check_walk(line: &str, nodes: &str) {
    assert_eq!((value(line, "nodes"), line.ends_with(" ok")), (nodes, true), "{line}");
    assert_eq!(value(line, "sum"), value(line, "expected"), "{line}");
}

#[test]
fn list_is_walked_on_every_device_that_can() {
    let shapes = [
        Shape::default(),
        Shape { va_bits: 40, ..Shape::default() },
        Shape { va_bits: 32, ..Shape::default() },
        Shape { fault_model: 2, ..Shape::default() },
        Shape { opcodes: OPCODES & !(1 << OP_CHASE), ..Shape::default() },
        Shape { address_model: 1, ..Shape::default() },
    ];
    let world = World::new(&shapes);
    let list = build(world.directory.path(), "examples/list.c");
    for (nodes, seed) in [("1", "1"), ("1000", "7"), ("20000", "123456789")] {
        let told = text(&run(program(&world, &list).args([nodes, seed])));
        let lines: Vec<&str> = told.lines().collect();
        let devices: Vec<&str> = lines.iter().map(|line| value(line, "device")).collect();
        assert_eq!(devices, ["0", "1", "2", "4", "5"], "{told}");
        for index in [0, 1, 2, 4] {
            check_walk(lines[index], nodes);
            // At the process' own addresses, or on small devices in windows.
            let same = value(lines[index], "pointer") == value(lines[index], "address");
            assert_eq!(same, shapes[index].va_bits == 48, "{told}");
        }
        assert!(lines[3].ends_with("walks no lists"), "{told}");
    }
}

#[test]
fn program_that_links_the_archive_walks_too() {
    let world = World::new(&[Shape::default()]);
    let out = world.directory.path().join("archived");
    let template = std::fs::read_to_string(source("gpusvm.pc.in")).unwrap();
    let private = template.lines().find_map(|line| line.strip_prefix("Libs.private: ")).unwrap();
    let mut compiler = compiler("cc");
    compiler.arg("-std=gnu11").arg(source("examples/list.c")).arg(library("libgpusvm.a"));
    run(compiler.args(private.split(' ')).arg("-o").arg(&out));
    check_walk(text(&run(program(&world, &out).args(["500", "9"]))).trim_end(), "500");
}

#[test]
fn one_loop_waits_for_many_jobs() {
    let world = World::new(&[Shape::default()]);
    let program_path = build(world.directory.path(), "examples/async.c");
    for jobs in [0, 1, 8, 200] {
        let told = text(&run(program(&world, &program_path).arg(jobs.to_string())));
        let (last, ends) =
            told.lines().collect::<Vec<_>>().split_last().map(|(l, e)| (*l, e.to_vec())).unwrap();
        assert_eq!(last, format!("jobs={jobs} wrong=0"));
        let mut ended: Vec<u64> = ends.iter().map(|line| value(line, "job").parse().unwrap()).collect();
        ended.sort_unstable();
        assert_eq!(ended, (0..jobs).collect::<Vec<u64>>());
        assert!(ends.iter().all(|line| line.ends_with(" ok")), "{told}");
    }
}

#[test]
fn without_the_allocator_the_example_says_what_to_do() {
    let world = World::new(&[Shape::default()]);
    let list = build(world.directory.path(), "examples/list.c");
    let output = Command::new(list).env("LD_LIBRARY_PATH", world.directory.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("svm-agent run") && said.contains("LD_PRELOAD=libsvm_alloc.so"), "{said}");
}
