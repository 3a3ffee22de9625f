//! What the running program has given up, as the kernel tells it.

#![expect(unsafe_code, reason = "a program is started on a kernel that seems to lack something")]

use super::{IDLE_THREADS, Svmd, Vmm, rpc, run, stderr, svmd, until};
use rustix::process::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What the kernel says of a process, thread by thread.
fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // One that has just ended has nothing to say.
    tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok()).collect()
}

fn assert_confined(pid: u32) {
    let statuses = threads(pid);
    assert!(!statuses.is_empty());
    for status in statuses {
        for field in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
            assert!(status.contains(field), "{field} in {status}");
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000000000")), "{set} in {status}");
        }
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_ascii_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
}

/// Whether this kernel can do all of it; a word on the real stderr where it cannot.
fn in_full() -> bool {
    let output = run(&["--print-sandbox"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("seccomp") && text.contains("landlock"), "{text}");
    let full = !text.contains("NOT in force");
    if !full {
        assert!(std::env::var_os("CI").is_none(), "this kernel cannot confine in full:\n{text}");
        std::io::stderr().write_all(b"SKIPPED a test of the sandbox: this kernel lacks a part\n").unwrap();
    }
    full
}

/// svmd on a kernel that has no landlock.
fn without_landlock(mut command: Command) -> Command {
    let lacking = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let rules = [(libc::SYS_landlock_create_ruleset, vec![])].into();
    let machine = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, lacking, machine).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    let apply = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
    // SAFETY: two system calls, with a program that was made before.
    unsafe { command.pre_exec(apply) };
    command
}

#[test]
fn every_thread_is_confined_with_a_session_live() {
    if !in_full() {
        return;
    }
    let options = ["--socket-path=DIR/vm0.sock", "--control-socket=DIR/control", "--sandbox=strict"];
    let daemon = Svmd::start(&options, &["vm0.sock", "control"]);
    let mut vmm = Vmm::start(&daemon.path("vm0.sock"));
    assert!(!vmm.command(&[0; 24]).is_empty());
    let list = r#"{"jsonrpc":"2.0","id":1,"method":"guest.list"}"#;
    assert!(rpc(&daemon.path("control"), list).contains("vm0"));
    let info = r#"{"jsonrpc":"2.0","id":2,"method":"server.info"}"#;
    assert!(rpc(&daemon.path("control"), info).contains(r#""sandbox":"full""#));
    assert!(daemon.threads() > IDLE_THREADS);
    assert_confined(daemon.child.id());
}

/// The daemon's own check goes by the path, the kernel by the folder: only the kernel finds out that it is another one.
#[test]
fn folder_in_the_place_of_a_runtime_folder_takes_no_socket() {
    if !in_full() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (folder, control) = (path("run"), path("control/svmd.sock"));
    fs::create_dir(&folder).unwrap();
    fs::create_dir(path("control")).unwrap();
    let (first, second) = (folder.join("vm0.sock"), folder.join("vm1.sock"));
    let mut command = svmd();
    command.arg("--control-socket").arg(&control).arg("--runtime-dir").arg(&folder);
    let _daemon = Svmd { child: command.spawn().unwrap(), dir: tempfile::tempdir().unwrap() };
    until("its socket", || UnixStream::connect(&control).is_ok());
    let add = |name: &str, socket: &Path| {
        let params = format!(r#"{{"name":"{name}","socket":{socket:?}}}"#);
        let head = r#""jsonrpc":"2.0","id":1,"method":"guest.add""#;
        rpc(&control, &format!(r#"{{{head},"params":{params}}}"#))
    };
    assert!(add("vm0", &first).contains("result"));
    fs::rename(&folder, path("gone")).unwrap();
    fs::create_dir(&folder).unwrap();
    let answer = add("vm1", &second);
    assert!(answer.contains("error") && answer.contains("Permission denied"), "{answer}");
    assert!(!second.exists());
}

#[test]
fn strict_is_refused_and_best_effort_warns_where_a_measure_is_lacking() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vm0.sock");
    let with = |mode: &str| {
        let mut command = without_landlock(svmd());
        command.arg("--sandbox").arg(mode).arg("--socket-path").arg(&socket);
        command
    };
    let refused = with("strict").output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("landlock"), "{}", stderr(&refused));
    assert!(!socket.exists());

    let mut daemon = Svmd { child: with("best-effort").spawn().unwrap(), dir };
    until("its socket", || UnixStream::connect(&socket).is_ok());
    assert_confined(daemon.child.id());
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let mut log = String::new();
    daemon.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("WARN") && log.contains("landlock"), "{log}");

    let printed = without_landlock(svmd()).arg("--print-sandbox").output().unwrap();
    let text = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(printed.status.success() && text.contains("NOT in force"), "{text}");
}

#[test]
fn off_confines_nothing_and_says_so() {
    let options = ["--socket-path=DIR/vm0.sock", "--control-socket=DIR/control", "--sandbox=off"];
    let mut daemon = Svmd::start(&options, &["vm0.sock", "control"]);
    let info = r#"{"jsonrpc":"2.0","id":1,"method":"server.info"}"#;
    assert!(rpc(&daemon.path("control"), info).contains(r#""sandbox":"none""#));
    assert!(threads(daemon.child.id()).iter().all(|status| status.contains("Seccomp:\t0")));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let mut log = String::new();
    daemon.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("not confined"), "{log}");
}
