//! The header against the library: layouts, constants, names.

use crate::build::{compiler, library, run, source, text};
use gpusvm::{Device, Failure, Packet};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;
use virtio_gpu_svm::protocol::{MAX_PACKETS, MAX_RINGS, event, job};

/// Names in C and what they are in Rust.
fn expected() -> BTreeMap<String, u64> {
    let mut told = BTreeMap::new();
    let mut put = |name: &str, value: usize| told.insert(name.to_owned(), value as u64);
    macro_rules! fields {
        ($c:literal, $ty:ty, $($field:ident),*) => {
            put(concat!("sizeof(struct ", $c, ")"), size_of::<$ty>());
            $(put(concat!("offsetof(struct ", $c, ", ", stringify!($field), ")"), offset_of!($ty, $field));)*
        };
    }
    fields!(
        "svm_device",
        Device,
        dev_id,
        va_bits,
        fault_model,
        address_model,
        num_engines,
        reserved,
        opcodes,
        flags,
        name
    );
    fields!("svm_packet", Packet, opcode, flags, dst, src, len, value, arg, reserved);
    fields!("svm_failure", Failure, error, packet, address, access, reserved);
    let constants = [
        ("SVM_OP_NOP", job::OP_NOP),
        ("SVM_OP_COPY", job::OP_COPY),
        ("SVM_OP_FILL", job::OP_FILL),
        ("SVM_OP_REDUCE", job::OP_REDUCE),
        ("SVM_OP_AXPY", job::OP_AXPY),
        ("SVM_OP_CHASE", job::OP_CHASE),
        ("SVM_OP_ATOMIC_ADD", job::OP_ATOMIC_ADD),
        ("SVM_OP_SEM_WAIT", job::OP_SEM_WAIT),
        ("SVM_OP_SEM_SIGNAL", job::OP_SEM_SIGNAL),
        ("SVM_MAX_PACKETS", MAX_PACKETS),
        ("SVM_MAX_RINGS", MAX_RINGS),
        ("SVM_ACCESS_READ", event::PERM_READ),
        ("SVM_ACCESS_WRITE", event::PERM_WRITE),
        ("SVM_ACCESS_ATOMIC", event::PERM_ATOMIC),
        ("SVM_VERSION_MAJOR << 16 | SVM_VERSION_MINOR", gpusvm::svm_version()),
    ];
    for (name, value) in constants {
        put(name, value as usize);
    }
    told
}

/// A program that tells them as the header has them.
fn probe() -> String {
    let mut program = String::from("#include <gpusvm.h>\n#include <stdio.h>\nint main(void)\n{\n");
    for name in expected().keys() {
        writeln!(program, "\tprintf(\"%s=%lu\\n\", \"{name}\", (unsigned long)({name}));").unwrap();
    }
    program + "\treturn 0;\n}\n"
}

fn check_probe(compiler_name: &str, standard: &str, language: &str) {
    let directory = tempfile::tempdir().unwrap();
    let (file, out) = (directory.path().join("probe"), directory.path().join("out"));
    std::fs::write(&file, probe()).unwrap();
    let mut compiler = compiler(compiler_name);
    run(compiler.args([standard, "-x", language]).arg(&file).arg("-o").arg(&out));
    let told = text(&run(&mut Command::new(&out)));
    let told: BTreeMap<String, u64> = told
        .lines()
        .map(|line| line.rsplit_once('=').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect();
    assert_eq!(told, expected());
}

#[test]
fn layouts_and_constants_are_the_librarys_in_c() {
    check_probe("cc", "-std=c99", "c");
    check_probe("cc", "-std=c11", "c");
}

#[test]
fn layouts_and_constants_are_the_librarys_in_cpp() {
    let missing = Command::new("c++").arg("--version").output().is_err();
    if missing {
        crate::lacking::lacking("there is no C++ compiler (c++); install g++");
        return;
    }
    check_probe("c++", "-std=c++11", "c++");
    check_probe("c++", "-std=c++20", "c++");
}

/// Functions that the header declares and does not define.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(source("include/gpusvm.h")).unwrap();
    let mut code = String::new();
    for part in header.split("/*") {
        code.push_str(part.split_once("*/").map_or(part, |(_, code)| code));
    }
    let declaration = |line: &str| {
        let (before, _) = line.split_once('(')?;
        let name = before.rsplit([' ', '*']).next()?;
        (name.starts_with("svm_") && before.trim() != name && !line.starts_with('\t'))
            .then(|| name.to_owned())
    };
    code.lines().filter(|line| !line.starts_with("static inline")).filter_map(declaration).collect()
}

/// Functions of a library; of an archive those that begin with `svm_`, since all of Rust is in there.
fn defined(file: &Path, flag: &str) -> BTreeSet<String> {
    let out = run(Command::new("nm").args([flag, "--defined-only", "-g"]).arg(file)).stdout;
    let out = String::from_utf8_lossy(&out).into_owned();
    let symbol = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        (fields.next() == Some("T")).then(|| fields.next().unwrap().to_owned())
    };
    out.lines().filter_map(symbol).collect()
}

#[test]
fn libraries_have_what_the_header_declares_and_nothing_else() {
    let declared = declared();
    assert!(declared.len() >= 20 && declared.contains("svm_error"), "{declared:?}");
    assert_eq!(defined(&library("libgpusvm.so"), "-D"), declared);
    let in_archive = defined(&library("libgpusvm.a"), "-A");
    let of_archive: BTreeSet<String> =
        in_archive.into_iter().filter(|name| name.starts_with("svm_")).collect();
    assert_eq!(of_archive, declared);
}

#[test]
fn library_names_itself_by_its_major_version() {
    let out = run(Command::new("readelf").arg("-d").arg(library("libgpusvm.so"))).stdout;
    let wanted = format!("[libgpusvm.so.{}]", env!("CARGO_PKG_VERSION_MAJOR"));
    assert!(String::from_utf8_lossy(&out).contains(&wanted), "no soname {wanted}");
}
