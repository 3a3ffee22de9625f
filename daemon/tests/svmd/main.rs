//! The program from outside: command line, exit status, signals, and what it leaves behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small constants of the tests")]
#![expect(clippy::too_many_arguments, reason = "a descriptor has that many fields")]

mod sandbox;
#[path = "../session/vmm.rs"]
#[expect(dead_code, reason = "shared with the session tests, which use more of it")]
mod vmm;

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;
use vmm::{PATIENCE, Vmm, connect, negotiate};

/// Looks again this often at what has no event to wait for.
const LOOK: Duration = Duration::from_millis(2);

/// Threads of a daemon with one guest and no session: its own, one for methods, two engines, the housekeeper, the
/// guest's.
const IDLE_THREADS: usize = 6;

/// Room for descriptors of a daemon with one guest and a session.
const DESCRIPTORS: u64 = 64;

fn svmd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_svmd"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running svmd, killed when a test fails.
struct Svmd {
    child: Child,
    dir: TempDir,
}

impl Svmd {
    /// With these sockets in a folder of its own, once all of them are there.
    fn start(options: &[&str], sockets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = svmd();
        for option in options {
            command.arg(option.replace("DIR", dir.path().to_str().unwrap()));
        }
        let daemon = Self { child: command.spawn().unwrap(), dir };
        until("its sockets", || {
            sockets.iter().all(|socket| UnixStream::connect(daemon.path(socket)).is_ok())
        });
        daemon
    }
    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
    fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }
    /// Leaves it room for this many descriptors in all. They cannot be counted from outside: that takes root.
    fn limit_descriptors(&self, most: u64) {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit).unwrap();
    }
    fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap().count()
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        // It may have ended as it should.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(LOOK);
    }
}

fn wait(child: &mut Child) -> ExitStatus {
    let mut status = None;
    until("svmd to end", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

fn run(options: &[&str]) -> Output {
    svmd().args(options).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// One request on the control socket.
fn rpc(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

#[test]
fn capabilities_are_json_alone() {
    let output = run(&["--print-capabilities"]);
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["type"], "gpu");
}

#[test]
fn bad_command_lines_exit_with_2_and_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = |file: &str| dir.path().join(file).to_str().unwrap().to_owned();
    fs::write(path("bad.toml"), "[limits]\njobs = 0\n").unwrap();
    let sub = path("sub");
    fs::create_dir(&sub).unwrap();
    let (inside, outside) =
        (format!("--socket-path={sub}/vm0.sock"), format!("--socket-path={}", path("vm0.sock")));
    let cases: [(&[&str], &str); 9] = [
        (&[], "--socket-path"),
        (&["--colour"], "--colour"),
        (&["--log", "loud", "--fd", "3"], "loud"),
        (&["--config", &path("bad.toml")], "limits.jobs"),
        (&["--config", &path("missing.toml")], "missing.toml"),
        (&[&outside, "--runtime-dir", &sub], "--runtime-dir"),
        (&[&inside, "--runtime-dir", &path("missing")], "missing"),
        (&[&inside, &inside], "named twice"),
        (&["--fd", "77"], "77"),
    ];
    for (options, words) in cases {
        let output = run(options);
        assert_eq!(output.status.code(), Some(2), "{options:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{options:?}: {}", stderr(&output));
    }
    assert!(fs::read_dir(&sub).unwrap().next().is_none(), "a refused start leaves no socket");
}

#[test]
fn socket_in_use_exits_with_1_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm0.sock");
    let _other = UnixListener::bind(&path).unwrap();
    let output = run(&["--socket-path", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("in use"), "{}", stderr(&output));
    assert!(path.exists());
}

#[test]
fn signals_end_it_cleanly_with_a_session_live() {
    for signal in [Signal::TERM, Signal::INT] {
        let options =
            ["--socket-path=DIR/vm0.sock", "--socket-path=DIR/vm1.sock", "--control-socket=DIR/control"];
        let mut daemon = Svmd::start(&options, &["vm0.sock", "vm1.sock", "control"]);
        let mut vmm = Vmm::start(&daemon.path("vm0.sock"));
        assert!(!vmm.command(&[0; 24]).is_empty());
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(fs::read_dir(daemon.dir.path()).unwrap().next().is_none(), "sockets are removed");
        assert!(vmm.frontend.get_features().is_err());
    }
}

#[test]
fn operator_adds_a_guest_and_shuts_down() {
    let mut daemon = Svmd::start(&["--control-socket=DIR/control"], &["control"]);
    let (control, socket) = (daemon.path("control"), daemon.path("vm0.sock"));
    let add = format!(
        r#"{{"jsonrpc":"2.0","id":1,"method":"guest.add","params":{{"name":"vm0","socket":{socket:?}}}}}"#
    );
    assert!(rpc(&control, &add).contains("result"));
    assert!(!Vmm::start(&socket).command(&[0; 24]).is_empty());
    let outside = add.replace(socket.to_str().unwrap(), "/nonexistent/vm0.sock");
    assert!(rpc(&control, &outside).contains("error"));
    assert!(rpc(&control, r#"{"jsonrpc":"2.0","id":2,"method":"shutdown"}"#).contains("result"));
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!socket.exists() && !control.exists());
}

#[test]
fn configuration_file_makes_guests_and_devices() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("svmd.toml"), dir.path().join("vm0.sock"));
    let control = dir.path().join("control");
    let text = format!(
        "[daemon]\ncontrol_socket = {control:?}\nlog = 'error'\n[[device]]\nkind = 'soft'\nname = 'left'\n\
         [[device]]\nkind = 'soft'\nname = 'right'\nengines = 2\n\
         [[guest]]\nname = 'one'\nsocket = {socket:?}\ndevices = ['right']\n"
    );
    fs::write(&file, text).unwrap();
    let daemon = Svmd { child: svmd().arg("--config").arg(&file).spawn().unwrap(), dir };
    until("its sockets", || socket.exists() && UnixStream::connect(&control).is_ok());
    let listed = rpc(&control, r#"{"jsonrpc":"2.0","id":1,"method":"guest.list"}"#);
    assert!(
        listed.contains(r#""one""#) && listed.contains(r#""right""#) && !listed.contains(r#""left""#),
        "{listed}"
    );
    assert!(!Vmm::start(&daemon.path("vm0.sock")).command(&[0; 24]).is_empty());
}

/// svmd with `socket` as descriptor 3, by way of a shell that has it as its input.
fn with_descriptor_3(socket: impl Into<OwnedFd>) -> Child {
    let line = format!("exec {} --fd=3 --log=error 3<&0 </dev/null", env!("CARGO_BIN_EXE_svmd"));
    Command::new("sh").args(["-c", &line]).stdin(socket.into()).spawn().unwrap()
}

#[test]
fn connected_descriptor_is_served_and_ends_the_daemon() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = with_descriptor_3(theirs);
    let mut vmm = Vmm::start_on(negotiate(Frontend::from_stream(ours, 3)));
    assert!(!vmm.command(&[0; 24]).is_empty());
    drop(vmm);
    assert_eq!(wait(&mut child).code(), Some(0));
}

#[test]
fn listening_descriptor_is_served_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm0.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let child = with_descriptor_3(listener);
    let mut daemon = Svmd { child, dir };
    for _ in 0..2 {
        assert!(!Vmm::start(&path).command(&[0; 24]).is_empty());
    }
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(path.exists());
}

/// One of four kinds of session.
fn session(path: &Path, kind: u64) {
    match kind % 4 {
        0 => drop(UnixStream::connect(path).unwrap()),
        1 => drop(connect(path)),
        2 => drop(Vmm::start(path)),
        _ => {
            let mut vmm = Vmm::start(path);
            vmm.command(&[0; 24]);
            vmm.corrupt_avail(0, 999);
        }
    }
}

#[test]
fn sessions_leave_no_descriptor_and_no_thread() {
    let daemon = Svmd::start(&["--socket-path=DIR/vm0.sock", "--log=error"], &["vm0.sock"]);
    let path = daemon.path("vm0.sock");
    let idle = || until("the session's threads to end", || daemon.threads() == IDLE_THREADS);
    (0..4).for_each(|kind| session(&path, kind));
    idle();
    // Fewer than sessions of one kind, so that one left behind by each would be too many.
    daemon.limit_descriptors(DESCRIPTORS);
    // A daemon that has none left does not answer: that is for whoever waits to find out.
    let sessions = std::thread::spawn(move || (0..=4 * DESCRIPTORS).for_each(|kind| session(&path, kind)));
    until("all sessions to be served", || sessions.is_finished());
    sessions.join().unwrap();
    idle();
}

#[test]
fn help_explains() {
    let output = run(&["--help"]);
    let mut text = String::new();
    output.stdout.as_slice().read_to_string(&mut text).unwrap();
    for words in [
        "--socket-path",
        "--control-socket",
        "--control-socket-ro",
        "--runtime-dir",
        "--fd",
        "--sandbox",
        "--print-sandbox",
        "Exit status",
    ] {
        assert!(text.contains(words), "{words}");
    }
}
