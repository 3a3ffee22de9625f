//! `guest-agent/install`, and programs that are built against what it has installed.
//!
//! Apart from the other tests, because the script has cargo build: that may put other files where they look for libraries.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a test that cannot go on should panic, and its numbers are small"
)]

#[expect(dead_code, reason = "shared with the library's tests, which use more of it")]
#[path = "../c/build.rs"]
mod build;
#[expect(dead_code, reason = "shared with other tests, which need huge pages")]
#[path = "../../../tests/agent/lacking.rs"]
mod lacking;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/mock.rs"]
mod mock;
#[path = "../../../tests/agent/pages.rs"]
mod pages;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/ring.rs"]
mod ring;
#[expect(dead_code, reason = "shared with the agent's tests, which use more of it")]
#[path = "../../../tests/agent/world.rs"]
mod world;

use crate::build::{run, source, text};
use crate::mock::Shape;
use crate::world::World;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn script() -> Command {
    Command::new(source("../install"))
}

/// The flags of a .pc file, by its lines alone.
fn flags(pc: &str, names: &[&str]) -> Vec<String> {
    let field = |name: &str| pc.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    let prefix = field("prefix=");
    let resolve = |text: String| {
        let text =
            text.replace("${libdir}", &field("libdir=")).replace("${includedir}", &field("includedir="));
        text.replace("${prefix}", &prefix)
    };
    names
        .iter()
        .flat_map(|name| resolve(field(name)).split(' ').map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// What pkg-config says; `None`, loudly, where there is none.
fn pkg_config(prefix: &Path, arguments: &[&str]) -> Option<Vec<String>> {
    let mut command = Command::new("pkg-config");
    command.args(arguments).arg("gpusvm").env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    if Command::new("pkg-config").arg("--version").output().is_err() {
        crate::lacking::lacking("there is no pkg-config; the flags of gpusvm.pc are read by hand alone");
        return None;
    }
    Some(text(&run(&mut command)).split_whitespace().map(str::to_owned).collect())
}

/// Builds the example with these flags.
fn compile(prefix: &Path, name: &str, flags: &[String]) -> PathBuf {
    let out = prefix.join(name);
    let mut compiler = Command::new("cc");
    compiler.args(["-std=gnu11", "-Wall", "-Werror"]).arg(source("examples/list.c")).arg("-o").arg(&out);
    run(compiler.args(flags));
    out
}

/// Builds the example with these flags and runs it as the installed agent does.
fn check_program(world: &World, prefix: &Path, name: &str, flags: &[String]) {
    let out = compile(prefix, name, flags);
    let mut command = Command::new(prefix.join("bin/svm-agent"));
    command
        .args(["run", "--require", "--socket"])
        .arg(world.socket())
        .arg("--")
        .arg(&out)
        .args(["300", "11"]);
    let told = text(&run(command.env("LD_LIBRARY_PATH", prefix.join("lib")).env_remove("LD_PRELOAD")));
    assert!(told.contains(" nodes=300 ") && told.ends_with(" ok\n"), "{name}: {told}");
}

/// As [`check_program`], linked with the allocator library and so run by nobody.
fn check_linked(world: &World, prefix: &Path, flags: &[String]) {
    let mut flags = flags.to_vec();
    flags.push("-lsvm_alloc".into());
    let mut command = Command::new(compile(prefix, "linked", &flags));
    command.args(["300", "11"]).env("LD_LIBRARY_PATH", prefix.join("lib")).env_remove("LD_PRELOAD");
    let told = text(&run(command.env("SVM_AGENT_SOCKET", world.socket()).env("SVM_ALLOC", "require")));
    assert!(told.contains(" nodes=300 ") && told.ends_with(" ok\n"), "{told}");
}

fn install(prefix: &Path) -> Output {
    run(script().arg("--prefix").arg(prefix))
}

#[test]
fn installed_library_is_found_by_programs_in_c() {
    let world = World::new(&[Shape::default()]);
    let directory = tempfile::tempdir().unwrap();
    let prefix = directory.path().join("a+prefix");
    install(&prefix);
    // Again, over what is there: as an upgrade does.
    let told = String::from_utf8(install(&prefix).stdout).unwrap();
    for next in
        ["svm-agent serve", "svm-agent run -- PROGRAM", "-lsvm_alloc", "pkg-config --cflags --libs gpusvm"]
    {
        assert!(told.contains(next), "{told}");
    }
    let version = env!("CARGO_PKG_VERSION");
    let shared = std::fs::canonicalize(prefix.join("lib/libgpusvm.so")).unwrap();
    assert_eq!(shared.file_name().unwrap().to_str().unwrap(), format!("libgpusvm.so.{version}"));
    for file in
        ["bin/svm-agent", "lib/libsvm_alloc.so", "lib/libgpusvm.a", "include/gpusvm.h", "include/svm_alloc.h"]
    {
        assert!(prefix.join(file).is_file(), "no {file}");
        assert!(told.contains(&format!("installed {}", prefix.join(file).display())), "{told}");
    }
    let left = std::fs::read_dir(prefix.join("lib")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<String> =
        left.map(|name| name.into_string().unwrap()).filter(|n| n.contains("new")).collect();
    assert!(left.is_empty(), "{left:?}");

    let pc = std::fs::read_to_string(prefix.join("lib/pkgconfig/gpusvm.pc")).unwrap();
    assert!(pc.contains(&format!("Version: {version}\n")) && !pc.contains('@'), "{pc}");
    let by_hand = flags(&pc, &["Cflags:", "Libs:"]);
    check_program(&world, &prefix, "by-hand", &by_hand);
    check_linked(&world, &prefix, &by_hand);
    if let Some(flags) = pkg_config(&prefix, &["--cflags", "--libs"]) {
        check_program(&world, &prefix, "by-pkg-config", &flags);
    }
}

#[test]
fn wrong_usage_is_said_before_anything_is_built() {
    let cases: [(&[&str], &str); 5] = [
        (&["--bogus"], "no option --bogus"),
        (&["--prefix"], "needs a folder"),
        (&["--prefix="], "needs a folder"),
        (&["--prefix", "/a b"], "blanks or colons"),
        (&["--prefix", "/a:b"], "blanks or colons"),
    ];
    for (arguments, words) in cases {
        let output = script().args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
    let output = script().args(["--prefix", "/dev/null/nowhere"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("choose another folder with --prefix"), "{said}");
    assert!(text(&run(script().arg("--help"))).contains("usage: guest-agent/install"));
}
