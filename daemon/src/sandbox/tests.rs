//! From inside: each try is made by a forked child that has entered the sandbox, and ends as the sandbox has it.

#![expect(unsafe_code, reason = "forks, and makes system calls that are refused")]

use super::*;
use rustix::process::{Pid, WaitOptions, waitpid};
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Ends a child in which a measure is not in force.
const LACKING: i32 = 99;
/// Ends a child that was let.
const LET: i32 = 0;

/// How a child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    Signal(i32),
}
const KILLED: End = End::Signal(libc::SIGSYS);
const DENIED: End = End::Exit(libc::EACCES);

/// A folder for sockets, and a daemon's profile with it.
struct Place {
    dir: TempDir,
    soft: Profile,
    hostmmu: Profile,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let soft = Profile { folders: vec![dir.path().to_owned()], workers: false };
    let hostmmu = Profile { workers: true, ..soft.clone() };
    Place { dir, soft, hostmmu }
}

/// What becomes of a try in the sandbox; `None`, with a word on the real stderr, where the kernel lacks a measure.
fn attempt(profile: &Profile, body: impl FnOnce() -> i32) -> Option<End> {
    // SAFETY: the child has one thread. It allocates, which the C library provides for, takes no lock that a thread of
    // the parent could hold, and leaves without unwinding.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let report = enter(profile);
        let code = if report.lacking().next().is_some() { LACKING } else { body() };
        // SAFETY: ends this process and runs nothing.
        unsafe { libc::_exit(code) };
    }
    let status = waitpid(Pid::from_raw(pid), WaitOptions::empty()).unwrap().unwrap().1;
    let end = status.exit_status().map(End::Exit).or(status.terminating_signal().map(End::Signal)).unwrap();
    if end == End::Exit(LACKING) {
        assert!(std::env::var_os("CI").is_none(), "this kernel cannot confine in full");
        std::io::stderr().write_all(b"SKIPPED a test of the sandbox: this kernel lacks a part\n").unwrap();
        return None;
    }
    Some(end)
}

fn assert_end(profile: &Profile, expected: &End, body: impl FnOnce() -> i32) {
    if let Some(end) = attempt(profile, body) {
        assert_eq!(end, *expected);
    }
}

fn outcome<T>(result: std::io::Result<T>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| LET)
}

/// A call with numbers for arguments, none of which names memory that matters.
fn call(number: i64, arguments: [usize; 4]) -> i32 {
    let [a, b, c, d] = arguments;
    // SAFETY: every call of these tests is refused, or changes nothing that this process uses later.
    let done = unsafe { libc::syscall(number, a, b, c, d) };
    outcome(if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) })
}

/// A program that runs until it is killed.
fn bystander() -> Child {
    Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn flags(constant: i32) -> usize {
    usize::try_from(constant).unwrap()
}

#[test]
fn files_outside_are_denied_and_making_one_kills() {
    let Place { dir, soft, hostmmu } = place();
    for profile in [&soft, &hostmmu] {
        assert_end(profile, &DENIED, || outcome(std::fs::read("/etc/passwd")));
        assert_end(profile, &DENIED, || outcome(std::fs::read_dir("/")));
        assert_end(profile, &KILLED, || outcome(std::fs::write(dir.path().join("file"), "")));
        assert_end(profile, &KILLED, || outcome(std::fs::create_dir(dir.path().join("folder"))));
        assert_end(profile, &KILLED, || outcome(std::fs::rename(dir.path(), "/tmp/elsewhere")));
    }
}

#[test]
fn sockets_are_made_and_removed_below_the_folder_only() {
    let (Place { dir, soft, hostmmu }, other) = (place(), tempfile::tempdir().unwrap());
    let below = dir.path().join("sub");
    std::fs::create_dir(&below).unwrap();
    let (inside, outside) = (below.join("vm0.sock"), other.path().join("vm0.sock"));
    for profile in [&soft, &hostmmu] {
        let make_and_remove =
            || outcome(UnixListener::bind(&inside).and_then(|_| std::fs::remove_file(&inside)));
        assert_end(profile, &End::Exit(LET), make_and_remove);
        assert_end(profile, &DENIED, || outcome(UnixListener::bind(&outside)));
        let standing = UnixListener::bind(&outside).unwrap();
        assert_end(profile, &DENIED, || outcome(std::fs::remove_file(&outside)));
        drop(standing);
        std::fs::remove_file(&outside).unwrap();
    }
}

#[test]
fn sockets_of_networks_kill() {
    let Place { soft, hostmmu, .. } = place();
    for profile in [&soft, &hostmmu] {
        for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_VSOCK] {
            let socket = [flags(family), flags(libc::SOCK_DGRAM), 0, 0];
            assert_end(profile, &KILLED, || call(libc::SYS_socket, socket));
        }
    }
}

#[test]
fn programs_are_executed_with_workers_only_and_not_others() {
    let Place { soft, hostmmu, .. } = place();
    let path = c"/bin/sh".as_ptr().addr();
    let execve = || call(libc::SYS_execve, [path, 0, 0, 0]);
    assert_end(&soft, &KILLED, execve);
    assert_end(&hostmmu, &DENIED, execve);
    let itself = || outcome(Command::new("/proc/self/exe").arg("--help").stdout(Stdio::null()).status());
    assert_end(&hostmmu, &End::Exit(LET), itself);
}

#[test]
fn processes_and_namespaces_kill() {
    let Place { soft, hostmmu, .. } = place();
    for profile in [&soft, &hostmmu] {
        for forked in [libc::SIGCHLD, libc::CLONE_NEWUSER | libc::SIGCHLD] {
            assert_end(profile, &KILLED, || call(libc::SYS_clone, [flags(forked), 0, 0, 0]));
        }
        assert_end(profile, &KILLED, || call(libc::SYS_unshare, [flags(libc::CLONE_NEWUSER), 0, 0, 0]));
        assert_end(profile, &KILLED, || call(libc::SYS_ptrace, [0; 4]));
        assert_end(profile, &KILLED, || call(libc::SYS_process_vm_readv, [1, 0, 0, 0]));
        assert_end(profile, &KILLED, || call(libc::SYS_io_uring_setup, [1, 0, 0, 0]));
        assert_end(profile, &KILLED, || call(libc::SYS_bpf, [0; 4]));
        assert_end(profile, &End::Exit(libc::ENOSYS), || call(libc::SYS_clone3, [0; 4]));
    }
    assert_end(&soft, &KILLED, || call(libc::SYS_userfaultfd, [1, 0, 0, 0]));
}

#[test]
fn code_is_not_made_of_data() {
    let Place { soft, hostmmu, .. } = place();
    let map = |rights: i32| {
        call(libc::SYS_mmap, [0, 4096, flags(rights), flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)])
    };
    let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    assert_end(&soft, &KILLED, || map(read | exec));
    for profile in [&soft, &hostmmu] {
        assert_end(profile, &KILLED, || map(read | write | exec));
        assert_end(profile, &KILLED, || call(libc::SYS_mprotect, [0, 4096, flags(read | exec), 0]));
    }
}

#[test]
fn others_are_neither_signalled_nor_reached() {
    let Place { soft, hostmmu, .. } = place();
    let mut other = bystander();
    let kill = [usize::try_from(other.id()).unwrap(), flags(libc::SIGKILL), 0, 0];
    assert_end(&soft, &KILLED, || call(libc::SYS_kill, kill));
    assert_end(&hostmmu, &End::Exit(libc::EPERM), || call(libc::SYS_kill, kill));
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();

    let address = SocketAddr::from_abstract_name(format!("svmd-test-{}", std::process::id())).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    for profile in [&soft, &hostmmu] {
        assert_end(profile, &End::Exit(libc::EPERM), || outcome(UnixStream::connect_addr(&address)));
    }
}

#[test]
fn threads_run_a_backtrace_is_taken_and_an_abort_is_an_abort() {
    let Place { soft, hostmmu, .. } = place();
    for profile in [&soft, &hostmmu] {
        let thread = || std::thread::spawn(|| vec![1u8; 1 << 20].len()).join().map_or(1, |_| LET);
        assert_end(profile, &End::Exit(LET), thread);
        // It looks for its symbols in files that it may not open.
        let backtrace = || std::backtrace::Backtrace::force_capture().to_string().len().min(1);
        assert_end(profile, &End::Exit(1), || i32::try_from(backtrace()).unwrap());
        assert_end(profile, &End::Signal(libc::SIGABRT), || std::process::abort());
    }
}

#[test]
fn second_thread_is_reported() {
    let Place { soft, .. } = place();
    // SAFETY: as in `attempt`.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let (_hold, held) = std::sync::mpsc::channel::<()>();
        let _waiting = std::thread::spawn(move || held.recv());
        let told = enter(&soft).lacking().any(|measure| measure.name == "every thread");
        // SAFETY: as there.
        unsafe { libc::_exit(i32::from(told)) };
    }
    let status = waitpid(Pid::from_raw(pid), WaitOptions::empty()).unwrap().unwrap().1;
    assert_eq!(status.exit_status(), Some(1));
}
