//! Builds and finds the programs of this workspace that tests and the demo start: the daemon's for the host, and
//! statically linked ones for guests, whose file system has no libraries.
//!
//! `cargo` is run from within `cargo test` and `cargo run`, which hold no lock while they run a program, into the same
//! target folder and profile. The paths come from cargo's own messages, so no layout is assumed.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::provision::progress;

const GUEST_PACKAGES: [&str; 2] = ["guest-agent", "guest-runner"];
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Symbols stay for backtraces; line tables of the standard library would be most of the file.
const GUEST_FLAGS: &str = "-C target-feature=+crt-static -C strip=debuginfo";
/// Set by the cargo that runs us for its own child; some would make build scripts run again.
const INHERITED: [&str; 3] = ["CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_BIN_"];

/// Built programs by name, and shared libraries by file name.
#[derive(Clone, Debug, Default)]
pub struct Binaries(HashMap<String, PathBuf>);

impl Binaries {
    /// The path of a program, or of a shared library as `libNAME.so`.
    ///
    /// # Errors
    /// Fails when no such one was built.
    pub fn get(&self, name: &str) -> Result<&Path> {
        self.0.get(name).map(PathBuf::as_path).with_context(|| format!("{name} was not built"))
    }

    /// Every one with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.0.iter().map(|(name, path)| (name.as_str(), path.as_path()))
    }
}

/// Builds all programs, examples and shared libraries of the workspace for this host, with these features
/// (`PACKAGE/FEATURE`) besides the default.
///
/// The whole workspace is selected, as by `cargo test --workspace` and `cargo demo`: the features of dependencies depend
/// on the selection, and with another one everything that they reach would be compiled a second time.
///
/// # Errors
/// Fails when they do not compile; the compiler's messages are on stderr.
pub fn build_host(features: &[&str]) -> Result<Binaries> {
    let mut command = cargo()?;
    command.args(["--workspace", "--lib", "--examples"]);
    if !features.is_empty() {
        command.args(["--features", &features.join(",")]);
    }
    build(command, "programs for the host")
}

/// Builds the programs of guests as static executables, once: the first process, the agent, what they run.
///
/// # Errors
/// Fails when they do not compile; the compiler's messages are on stderr.
pub fn build_guest() -> Result<Binaries> {
    static BUILT: Mutex<Option<Binaries>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(programs) = &*built {
        return Ok(programs.clone());
    }
    let mut command = cargo()?;
    for package in GUEST_PACKAGES {
        command.args(["--package", package]);
    }
    // With an explicit target, flags reach neither build scripts nor procedural macros. The general variables would
    // take precedence over the one for the target.
    command.args(["--target", GUEST_TARGET]);
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    command.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", GUEST_FLAGS);
    Ok(built.insert(build(command, "programs for guests")?).clone())
}

/// The target folder that the running program was built into.
///
/// # Errors
/// Fails when the program was moved out of it.
pub fn target_folder() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    // cargo marks the folder as a cache, for the benefit of backup programs.
    let folder = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    folder.map(Path::to_owned).with_context(|| {
        format!("{} is not inside a cargo target folder: start it with cargo", program.display())
    })
}

fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--quiet", "--bins", "--message-format=json-render-diagnostics"]);
    command.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
    command.arg("--target-dir").arg(target_folder()?);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    for (name, _) in std::env::vars_os() {
        if INHERITED.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

fn build(mut command: Command, what: &str) -> Result<Binaries> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{:?} does not start: is cargo installed?", command.get_program()))?;
    let stdout = child.stdout.take().context("cargo has no stdout")?;
    let mut programs = HashMap::new();
    let mut compiled = 0u32;
    let mut next_report = Instant::now() + PROGRESS_INTERVAL;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        programs.extend(built(&line));
        compiled += u32::from(is_compiled(&line));
        if Instant::now() >= next_report {
            progress!("building {what} ... {compiled} crates compiled");
            next_report = Instant::now() + PROGRESS_INTERVAL;
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo build failed ({status}); its messages are above");
    Ok(Binaries(programs))
}

/// The program or shared library that a message of cargo announces.
fn built(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    if let Some(path) = message.get("executable")?.as_str() {
        let name = message.get("target")?.get("name")?.as_str()?;
        return Some((name.to_owned(), PathBuf::from(path)));
    }
    let mut files = message.get("filenames")?.as_array()?.iter().filter_map(Value::as_str).map(PathBuf::from);
    let library = files.find(|file| file.extension().is_some_and(|extension| extension == "so"))?;
    let name = library.file_name()?.to_str()?.to_owned();
    // Procedural macros are shared libraries too, with a number in their names.
    (!name.contains('-')).then_some((name, library))
}

/// Whether a message of cargo says that a crate was compiled, rather than found.
fn is_compiled(line: &str) -> bool {
    let message: Option<Value> = serde_json::from_str(line).ok();
    message.and_then(|message| message.get("fresh")?.as_bool()) == Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_shared_libraries_are_taken_from_artifact_messages_only() {
        let artifact = |executable: &str, files: &str| {
            let target = r#"{"name":"svmd"}"#;
            format!(
                r#"{{"reason":"compiler-artifact","target":{target},"executable":{executable},"filenames":[{files}]}}"#
            )
        };
        let program = artifact(r#""/t/debug/svmd""#, r#""/t/debug/svmd""#);
        assert_eq!(built(&program), Some(("svmd".into(), "/t/debug/svmd".into())));
        let library = artifact("null", r#""/t/debug/libgpusvm.so","/t/debug/libgpusvm.rlib""#);
        assert_eq!(built(&library), Some(("libgpusvm.so".into(), "/t/debug/libgpusvm.so".into())));
        let rust = artifact("null", r#""/t/debug/libdaemon.rlib""#);
        let procedural_macro = artifact("null", r#""/t/debug/deps/libclap_derive-0123.so""#);
        for nothing in [rust.as_str(), procedural_macro.as_str(), "not json"] {
            assert_eq!(built(nothing), None);
        }
    }

    #[test]
    fn crate_counts_as_compiled_when_it_was_not_found() {
        assert!(is_compiled(r#"{"reason":"compiler-artifact","fresh":false}"#));
        assert!(!is_compiled(r#"{"reason":"compiler-artifact","fresh":true}"#));
        assert!(!is_compiled(r#"{"reason":"build-finished","success":true}"#));
    }
}
