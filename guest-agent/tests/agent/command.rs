//! `svm-agent run`, `ps` and `map`, as people run them.

use crate::client::built;
use crate::mock::Shape;
use crate::world::World;
use guest_agent::client::{Client, packet};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const LIBRARY: &str = "libsvm_alloc.so";

fn agent() -> Command {
    command(Path::new(env!("CARGO_BIN_EXE_svm-agent")))
}

/// Without what the test itself was started with.
fn command(path: &Path) -> Command {
    let mut command = Command::new(path);
    for variable in ["LD_PRELOAD", "LD_LIBRARY_PATH", "SVM_ALLOC", "SVM_AGENT_SOCKET"] {
        command.env_remove(variable);
    }
    command
}

/// `run` with the library of this build, and a program that need not reach an agent.
fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    let mut command = agent();
    command.arg("run").arg("--library").arg(built(LIBRARY)).arg("--").args(arguments).output().unwrap()
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Fails with this code and words that say what to do.
fn check_refused(output: &Output, code: i32, words: &[&str]) {
    let (told, said) = texts(output);
    assert_eq!((output.status.code(), told.as_str()), (Some(code), ""), "{said}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
    assert!(said.starts_with("svm-agent: ") && said.lines().count() == 1, "{said}");
}

#[test]
fn program_runs_with_its_memory_in_reach() {
    let world = World::new(&[Shape::default()]);
    let mut command = agent();
    command.args(["run", "--require", "--library"]).arg(built(LIBRARY)).arg("--socket").arg(world.socket());
    let output = command.arg("--").arg(built("list")).args(["200", "5"]).output().unwrap();
    let (told, said) = texts(&output);
    assert!(output.status.success() && said.is_empty(), "{told}{said}");
    assert_eq!(told.lines().filter(|line| line.ends_with(" ok")).count(), 2, "{told}");
}

#[test]
fn program_has_its_own_arguments_and_exit_status() {
    let output = run(&["sh", "-c", "echo $0 $1 $#; exit 7", "--json", "-x"]);
    assert_eq!((output.status.code(), texts(&output).0.as_str()), (Some(7), "--json -x 1\n"));
    // Killed by a signal, as if it had been started directly.
    assert_eq!(run(&["sh", "-c", "kill -9 $$"]).status.code(), None);
}

#[test]
fn program_that_requires_an_agent_ends_without_one() {
    let mut command = agent();
    command.args(["run", "--require", "--socket", "/nowhere/agent.sock", "--library"]).arg(built(LIBRARY));
    let output = command.args(["--", "sh", "-c", "echo started"]).output().unwrap();
    let (told, said) = texts(&output);
    assert_eq!((output.status.code(), told.as_str()), (Some(1), ""), "{said}");
    assert!(said.contains("/nowhere/agent.sock") && said.contains("svm-agent serve"), "{said}");
}

#[test]
fn library_comes_before_those_that_are_preloaded_already() {
    let library = built(LIBRARY);
    let mut command = agent();
    command.args(["run", "--library"]).arg(&library).args(["--", "sh", "-c", "echo $LD_PRELOAD"]);
    let (told, _) = texts(&command.env("LD_PRELOAD", &library).output().unwrap());
    let library = library.display();
    assert_eq!(told, format!("{library}:{library}\n"));
}

/// Copies the agent to `bin` of an empty prefix.
fn installed() -> (tempfile::TempDir, PathBuf) {
    let prefix = tempfile::tempdir().unwrap();
    let bin = prefix.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::fs::create_dir(prefix.path().join("lib")).unwrap();
    let agent = bin.join("svm-agent");
    copy(Path::new(env!("CARGO_BIN_EXE_svm-agent")), &agent);
    (prefix, agent)
}

/// Copies a program, by another one: a child of another test could have this one's descriptor until it executes, and what
/// somebody has open for writing cannot be executed.
fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

#[test]
fn library_is_found_beside_the_agent_and_where_it_is_installed() {
    for (place, folder) in [("bin", ""), ("lib", ""), ("elsewhere", "elsewhere")] {
        let (prefix, agent) = installed();
        let library = prefix.path().join(place).join(LIBRARY);
        std::fs::create_dir_all(library.parent().unwrap()).unwrap();
        std::fs::copy(built(LIBRARY), &library).unwrap();
        let mut command = command(&agent);
        if !folder.is_empty() {
            command.env("LD_LIBRARY_PATH", prefix.path().join(folder));
        }
        let output = command.args(["run", "--", "sh", "-c", "echo $LD_PRELOAD"]).output().unwrap();
        assert_eq!(texts(&output).0, format!("{}\n", library.display()), "{place}");
    }
}

#[test]
fn absent_library_is_said_with_where_it_was_looked_for() {
    let (prefix, agent) = installed();
    let output = command(&agent).args(["run", "--", "true"]).output().unwrap();
    if output.status.success() {
        panic!("NOT RUN: this machine has {LIBRARY} where the loader looks; take it away");
    }
    let (bin, lib) = (prefix.path().join("bin"), prefix.path().join("lib"));
    let folders =
        [bin.to_str().unwrap(), lib.to_str().unwrap(), "/usr/lib", "--library", "guest-agent/install"];
    check_refused(&output, 126, &folders);
    let named = command(&agent).args(["run", "--library", "/nowhere.so", "--", "true"]).output().unwrap();
    check_refused(&named, 126, &["/nowhere.so", "--library"]);
    let blank = prefix.path().join("a b.so");
    std::fs::copy(built(LIBRARY), &blank).unwrap();
    let named = command(&agent).args(["run", "--library"]).arg(&blank).args(["--", "true"]).output().unwrap();
    check_refused(&named, 126, &["blank"]);
}

#[test]
fn absent_program_is_said() {
    check_refused(&run(&["no-such-program-anywhere"]), 127, &["PATH"]);
    check_refused(&run(&["./no/such/program"]), 127, &["no program"]);
    let directory = tempfile::tempdir().unwrap();
    check_refused(&run(&[directory.path()]), 126, &["cannot read"]);
}

fn executable(path: &Path, bytes: &[u8]) {
    let written = path.with_extension("written");
    std::fs::write(&written, bytes).unwrap();
    copy(&written, path);
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn program_that_the_loader_would_leave_alone_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    std::fs::write(file("still.c"), "void _start(void) { for (;;); }\n").unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-nostdlib", "-o"]).arg(file("still")).arg(file("still.c"));
    assert!(compiler.status().unwrap().success());
    check_refused(&run(&[file("still")]), 126, &["linked statically", "link it dynamically", "svm_map"]);
    let mut foreign = std::fs::read(file("still")).unwrap();
    foreign[18] = 183;
    executable(&file("foreign"), &foreign);
    check_refused(&run(&[file("foreign")]), 126, &["x86-64"]);
    executable(&file("text"), b"no program\n");
    check_refused(&run(&[file("text")]), 126, &["no program for this machine"]);
    // Of a script, its interpreter is what counts.
    executable(&file("script"), format!("#! {} -x\n", file("still").display()).as_bytes());
    check_refused(&run(&[file("script")]), 126, &["still is linked statically"]);
    executable(&file("round"), format!("#!{}\n", file("round").display()).as_bytes());
    check_refused(&run(&[file("round")]), 126, &["scripts"]);
    executable(&file("good"), b"#!/bin/sh\necho script $1\n");
    let output = run(&[file("good").as_os_str(), OsStr::new("runs")]);
    assert_eq!(texts(&output).0, "script runs\n");
}

#[test]
fn program_with_other_rights_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("true");
    copy(Path::new("/bin/true"), &program);
    assert!(run(&[&program]).status.success());
    let mode = |mode| std::fs::set_permissions(&program, std::fs::Permissions::from_mode(mode)).unwrap();
    // One's own rights are none.
    mode(0o4755);
    assert!(run(&[&program]).status.success());
    if chown(&program, Some(1), Some(1)).is_err() {
        eprintln!("NOT RUN: only root can give a file away; run this test as root");
        return;
    }
    for bits in [0o4755, 0o2755] {
        mode(bits);
        check_refused(&run(&[&program]), 126, &["setuid", "take the rights off a copy"]);
    }
}

// Who has what.

fn asked(world: &World, arguments: &[&str]) -> Output {
    agent().args(arguments).arg("--admin-socket").arg(world.admin_socket()).output().unwrap()
}

#[test]
fn ps_and_map_show_a_process_and_what_devices_asked_of_it() {
    let world = World::new(&[Shape::default()]);
    let client = Client::connect(world.socket()).unwrap();
    let low = client.arena(2 * 4096, None).unwrap();
    let high = client.arena(64 * 4096, Some(0x5252_0000_0000)).unwrap();
    let mirror = client.mirror(0).unwrap();
    let add = packet::atomic_add(high.address() + 20 * 4096, 1);
    mirror.exec(0, &[add], 0).unwrap().wait().unwrap();
    let pid = std::process::id().to_string();

    let (told, said) = texts(&asked(&world, &["ps", "--json"]));
    let processes: serde_json::Value = serde_json::from_str(&told).expect(&said);
    let process = &processes["processes"][0];
    assert_eq!(process["owner"]["pid"].to_string(), pid);
    assert_eq!((process["arenas"].as_u64(), process["arena_bytes"].as_u64()), (Some(2), Some(66 * 4096)));
    assert_eq!((process["state"].as_str(), process["faults"].as_u64()), (Some("alive"), Some(1)));
    let (told, _) = texts(&asked(&world, &["ps"]));
    let lines: Vec<Vec<&str>> = told.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["pid", "uid", "ctx", "state", "trust", "arenas", "bytes", "faults", "program"]);
    assert_eq!((lines.len(), lines[1][0], lines[1][6]), (2, pid.as_str(), "270336"));

    let (told, said) = texts(&asked(&world, &["map", &pid, "--json"]));
    let map: serde_json::Value = serde_json::from_str(&told).expect(&said);
    assert_eq!(map["pid"].to_string(), pid);
    let arenas = map["contexts"][0]["arenas"].as_array().unwrap();
    let of = |arena: &guest_agent::client::Arena| {
        let found = arenas.iter().find(|told| told["start"].as_u64() == Some(arena.address())).unwrap();
        let count = |name: &str| found[name].as_u64().unwrap();
        assert_eq!(count("end"), arena.address() + arena.len() as u64);
        (count("bytes"), count("faults"), count("answered_pages"))
    };
    assert_eq!((arenas.len(), of(&low), of(&high)), (2, (8192, 0, 0), (64 * 4096, 1, 16)));
    let (told, _) = texts(&asked(&world, &["map", &pid]));
    let row = told.lines().find(|line| line.contains("0x525200000000..0x525200040000")).unwrap();
    assert_eq!(row.split_whitespace().skip(2).collect::<Vec<_>>(), ["262144", "1", "16"]);
    assert!(told.ends_with("had a fault there\n") && told.contains("270336 bytes"), "{told}");
}

#[test]
fn ps_names_a_program_that_run_has_started() {
    let world = World::new(&[Shape::default()]);
    let mut command = agent();
    command.args(["run", "--require", "--library"]).arg(built(LIBRARY)).arg("--socket").arg(world.socket());
    command.args(["--", "sh", "-c", "echo started; read line"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "started\n");
    let (told, _) = texts(&asked(&world, &["ps"]));
    let row: Vec<&str> = told.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((row[0], row[3], row[8]), (child.id().to_string().as_str(), "alive", "sh"), "{told}");
    assert!(asked(&world, &["map", &child.id().to_string()]).status.success());
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn process_without_memory_and_an_absent_agent_are_said() {
    let world = World::new(&[Shape::default()]);
    check_refused(&asked(&world, &["map", "1"]), 1, &["svm-agent ps", "svm-agent run"]);
    assert_eq!(asked(&world, &["map", "me"]).status.code(), Some(2));
    assert_eq!(agent().arg("run").output().unwrap().status.code(), Some(2));
    for arguments in [&["ps"][..], &["map", "1"]] {
        let output =
            agent().args(arguments).args(["--admin-socket", "/nowhere/admin.sock"]).output().unwrap();
        check_refused(&output, 3, &["svm-agent serve", "--admin-socket"]);
    }
}
