//! C programs: compiled here, started with the library, and talked to in lines.
//!
//! A program tells values by `tell(name, value)` and waits in `await()` until [`Program::go_on`] (see `programs/told.h`).

use crate::world::World;
use std::cell::Cell;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

/// The library, which lies beside this test.
pub fn library() -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().join("libsvm_alloc.so");
    assert!(path.exists(), "no {}", path.display());
    path
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/alloc/programs").join(name)
}

/// Compiles `name`.c to a file in `directory`.
pub fn compile(directory: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let out = directory.join(name);
    let mut compiler = Command::new("cc");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    compiler.arg("-I").arg(include);
    compiler.args(["-O1", "-Wall", "-Werror", "-pthread", "-o"]).arg(&out).arg(source(&format!("{name}.c")));
    assert!(compiler.args(flags).status().unwrap().success(), "{name}.c does not compile");
    out
}

thread_local! {
    static LATE: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test with programs whose memory is in reach as it comes; and with programs that first have it, and then ask for
/// a device.
pub fn twice(test: impl Fn()) {
    for late in [false, true] {
        LATE.set(late);
        test();
    }
}

/// Programs of this test have memory before they ask for a device.
pub fn late() {
    LATE.set(true);
}

/// Whether they do.
pub fn is_late() -> bool {
    LATE.get()
}

/// Its memory is in reach at once or, in the second run of [`twice`], from its first line on.
pub fn as_wanted(command: &mut Command) -> &mut Command {
    if LATE.get() {
        command.env("TOLD_ASKS", "");
    } else if !command.get_envs().any(|(name, _)| name == "SVM_ALLOC") {
        command.env("SVM_ALLOC", "early");
    }
    command
}

/// A program that is running.
pub struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Reads what it says on standard error: a program that says much would wait for room.
    said: JoinHandle<String>,
}

impl Program {
    /// Starts it with the library and the world's agent.
    pub fn start(world: &World, name: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(compile(world.directory.path(), name, &[]));
        Self::spawn(command.args(arguments).env("SVM_AGENT_SOCKET", world.socket()))
    }

    /// With the library.
    pub fn spawn(command: &mut Command) -> Self {
        Self::spawn_plain(as_wanted(command.env("LD_PRELOAD", library())))
    }

    /// Without the library.
    pub fn spawn_plain(command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut errors = child.stderr.take().unwrap();
        let said = std::thread::spawn(move || {
            let mut said = String::new();
            errors.read_to_string(&mut said).unwrap();
            said
        });
        Self { child, input, output: BufReader::new(output), said }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The value that it tells next, which must have this name.
    pub fn told(&mut self, name: &str) -> u64 {
        let (told, value) = self.next(name);
        assert_eq!(told, name);
        value
    }

    /// What it tells next. `awaited`: for people.
    pub fn next(&mut self, awaited: &str) -> (String, u64) {
        let mut line = String::new();
        if self.output.read_line(&mut line).unwrap() == 0 {
            let said = std::mem::replace(&mut self.said, std::thread::spawn(String::new)).join().unwrap();
            panic!("ended before it told {awaited}: {:?} {said}", self.child.wait());
        }
        let (told, value) = line.trim().split_once(' ').unwrap();
        (told.to_owned(), value.parse().unwrap())
    }

    /// Lets it leave `await()`.
    pub fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// Waits for its end: how it ended, and what it said on standard error.
    pub fn end(mut self) -> (ExitStatus, String) {
        drop(self.input);
        let said = self.said.join().unwrap();
        (self.child.wait().unwrap(), said)
    }

    /// Waits for an end without complaints.
    pub fn end_well(self) {
        let (status, said) = self.end();
        assert!(status.success() && said.is_empty(), "{status}: {said}");
    }
}
