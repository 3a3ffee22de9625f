//! Compiles programs against the header and the library of this build, and runs them.

use crate::world::World;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file of this crate.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A library that cargo has put beside this test.
pub fn library(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "no {}", path.display());
    path
}

/// A compiler with the flags that every program must bear.
pub fn compiler(name: &str) -> Command {
    let mut compiler = Command::new(name);
    compiler.args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-pthread", "-I"]).arg(source("include"));
    compiler
}

/// Runs to a good end.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Compiles a program with the shared library, which lies in the folder by the name that programs look for.
pub fn build(directory: &Path, file: &str) -> PathBuf {
    let out = directory.join(Path::new(file).file_stem().unwrap());
    let major = env!("CARGO_PKG_VERSION_MAJOR");
    let linked = directory.join(format!("libgpusvm.so.{major}"));
    if !linked.exists() {
        std::os::unix::fs::symlink(library("libgpusvm.so"), &linked).unwrap();
    }
    let mut compiler = compiler("cc");
    compiler.args(["-std=gnu11", "-O1"]).arg(source(file)).arg(&linked).arg("-o").arg(&out);
    run(&mut compiler);
    out
}

/// A program that will run at the world's agent, with its memory in arenas.
pub fn program(world: &World, path: &Path) -> Command {
    let mut command = Command::new(path);
    command
        .env("LD_LIBRARY_PATH", world.directory.path())
        .env("LD_PRELOAD", library("libsvm_alloc.so"))
        .env("SVM_AGENT_SOCKET", world.socket())
        .env("SVM_ALLOC", "require");
    command
}

pub fn text(output: &Output) -> String {
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}
