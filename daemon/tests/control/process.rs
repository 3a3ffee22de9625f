//! svmctl and svmd, both as processes.

use crate::harness::{Client, PATIENCE};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub struct Svmd {
    dir: TempDir,
    child: Child,
}

impl Svmd {
    fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    /// With what is done to its command, in a folder of its own.
    pub fn start_with(set_up: impl FnOnce(&mut Command, &Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
        command
            .arg(format!("--control-socket={}", dir.path().join("control.sock").display()))
            .arg(format!("--runtime-dir={}", dir.path().display()))
            .stdin(Stdio::null());
        set_up(&mut command, dir.path());
        let child = command.spawn().unwrap();
        let mut svmd = Self { dir, child };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(svmd.socket()).is_err() {
            assert_eq!(svmd.child.try_wait().unwrap(), None, "svmd ended");
            assert!(Instant::now() < deadline, "svmd does not listen");
            std::thread::sleep(Duration::from_millis(1));
        }
        svmd
    }

    fn socket(&self) -> PathBuf {
        self.path("control.sock")
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    pub fn take_stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().unwrap()
    }

    fn svmctl(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_svmctl"))
            .env("SVMD_SOCKET", self.socket())
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.svmctl(&[&["--json"], args].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "svmd does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        // It has ended already unless the test failed.
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

#[test]
fn guests_are_added_listed_and_removed() {
    let svmd = Svmd::start();
    assert_eq!(svmd.json(&["info"])["pid"], svmd.child.id());
    let mode = std::fs::metadata(svmd.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let guest_socket = svmd.dir.path().join("vm0.sock");
    let path = guest_socket.to_str().unwrap();
    assert_eq!(svmd.json(&["guest", "add", "vm0", path]), json!({"created": true}));
    assert_eq!(std::fs::metadata(&guest_socket).unwrap().permissions().mode() & 0o777, 0o600);
    let guests = svmd.json(&["guests"]);
    assert_eq!(
        (&guests["guests"][0]["name"], &guests["guests"][0]["connected"]),
        (&json!("vm0"), &json!(false))
    );
    assert_eq!(svmd.svmctl(&["guest", "add", "vm0", "/elsewhere/vm0.sock"]).status.code(), Some(1));
    assert_eq!(svmd.json(&["guest", "remove", "vm0"]), json!({"removed": true}));
    assert!(!guest_socket.exists());
}

/// So many guests that it would be seen if they were made while the control socket is there.
#[test]
fn control_socket_comes_after_those_of_the_guests() {
    const GUESTS: usize = 200;
    let svmd = Svmd::start_with(|command, dir| {
        let config = dir.join("svmd.toml");
        let guest =
            |n: usize| format!("[[guest]]\nname = 'vm{n}'\nsocket = '{}/vm{n}.sock'\n", dir.display());
        std::fs::write(&config, (0..GUESTS).map(guest).collect::<String>()).unwrap();
        command.arg("--log=warn");
        command.arg("--config").arg(config);
    });
    let missing: Vec<usize> = (0..GUESTS).filter(|n| !svmd.path(&format!("vm{n}.sock")).exists()).collect();
    assert_eq!(missing, [0; 0]);
}

#[test]
fn devices_have_ledgers_that_can_be_asked_for() {
    let svmd = Svmd::start();
    let devices = svmd.json(&["devices"]);
    let devices = devices["devices"].as_array().unwrap();
    assert!(!devices.is_empty());
    for device in devices {
        let ledger = svmd.json(&["ledger", device["name"].as_str().unwrap()]);
        assert_eq!(ledger["device"], device["device"]);
        assert_eq!(ledger["overwritten"], 0);
    }
}

#[test]
fn shutdown_ends_the_process_and_leaves_no_socket() {
    let mut svmd = Svmd::start();
    let guest_socket = svmd.dir.path().join("vm0.sock");
    svmd.json(&["guest", "add", "vm0", guest_socket.to_str().unwrap()]);
    // A client that only sits there holds nothing up.
    let mut idle = Client::connect(&svmd.socket());
    idle.result("events.subscribe", json!({}));
    assert_eq!(svmd.json(&["shutdown"]), json!({}));
    assert_eq!(svmd.wait().code(), Some(0));
    assert!(!guest_socket.exists() && !svmd.socket().exists());
    assert_eq!(svmd.svmctl(&["info"]).status.code(), Some(3));
}
