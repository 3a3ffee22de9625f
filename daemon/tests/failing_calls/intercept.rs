//! A process whose system calls of one class are seen, and of which one fails.
//!
//! The child installs a seccomp filter that hands such calls to a supervisor (SECCOMP_RET_USER_NOTIF), before it
//! becomes svmd; its threads and workers inherit it. The supervisor, a thread here, lets them go on, but for the one
//! that is to fail. svmd's own filters stand beside it: what they kill or deny they kill or deny all the same, what they
//! allow is asked of us first.

#![expect(
    unsafe_code,
    reason = "a filter is installed and its listener is served by system calls without wrappers"
)]

use super::calls::{Class, Limit};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const X86_64: u32 = 0xc000_003e;
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// What was seen so far, and what is to fail.
#[derive(Debug, Default)]
pub struct Injection {
    /// Calls of the class.
    pub seen: AtomicU32,
    /// The number of the one that fails, from 1 on; 0 for none.
    pub fails: u32,
    /// It has failed.
    pub done: AtomicBool,
}

/// A running process, with its supervisor.
pub struct Intercepted {
    pub child: Child,
    pub injection: Arc<Injection>,
    supervisor: Option<JoinHandle<()>>,
}

impl Intercepted {
    /// Starts a command whose `fails`-th call of the class fails.
    pub fn start(mut command: Command, class: &'static Class, fails: u32) -> Self {
        let injection = Arc::new(Injection { fails, ..Injection::default() });
        let (filter, desk) = (filter(class), Arc::new(Desk::new()));
        let (of_child, of_supervisor) = (Arc::clone(&desk), Arc::clone(&injection));
        let install = move || of_child.hand_over(install(&filter)?);
        // SAFETY: system calls and atomics, nothing that allocates or locks; the filter was made before.
        unsafe { command.pre_exec(install) };
        // The child waits for this thread before it is executed, and `spawn` for the child.
        let supervisor = std::thread::spawn(move || {
            let listener = desk.take();
            supervise(&listener, class, &of_supervisor);
        });
        let child = command.spawn().unwrap();
        Self { child, injection, supervisor: Some(supervisor) }
    }

    pub fn failed(&self) -> bool {
        self.injection.done.load(Ordering::SeqCst)
    }
    pub fn seen(&self) -> u32 {
        self.injection.seen.load(Ordering::SeqCst)
    }
}

impl Drop for Intercepted {
    fn drop(&mut self) {
        // It may have ended as it should.
        self.child.kill().ok();
        self.child.wait().ok();
        // With its last process the listener hangs up.
        self.supervisor.take().map(JoinHandle::join);
    }
}

/// Memory that the child shares, by which it tells the number of its listener.
struct Desk(NonNull<[AtomicI32; 3]>);

// SAFETY: what it points to is atomics that live as long as it does.
unsafe impl Send for Desk {}
// SAFETY: as above.
unsafe impl Sync for Desk {}

impl Desk {
    fn new() -> Self {
        let (rights, how) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever there is room.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, how, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        Self(NonNull::new(page.cast()).unwrap())
    }

    fn words(&self) -> &[AtomicI32; 3] {
        // SAFETY: the page is mapped until `self` is dropped, aligned, and zero at first; all access is atomic.
        unsafe { self.0.as_ref() }
    }

    /// In the child: tells, and waits until the listener was taken.
    fn hand_over(&self, listener: RawFd) -> Result<()> {
        let [pid, number, taken] = self.words();
        number.store(listener, Ordering::SeqCst);
        pid.store(std::process::id().cast_signed(), Ordering::SeqCst);
        while taken.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// In the supervisor: waits for the child and takes its listener.
    fn take(&self) -> OwnedFd {
        let [pid, number, taken] = self.words();
        while pid.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_micros(100));
        }
        let child = Pid::from_raw(pid.load(Ordering::SeqCst)).unwrap();
        let child = pidfd_open(child, PidfdFlags::empty()).unwrap();
        let listener = pidfd_getfd(child, number.load(Ordering::SeqCst), PidfdGetfdFlags::empty()).unwrap();
        taken.store(1, Ordering::SeqCst);
        listener
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's own, and nobody has a reference into it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), 4096) };
    }
}

fn statement(code: u16, jump_true: u8, jump_false: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: jump_true, jf: jump_false, k: value }
}

/// Hands the class to the supervisor and allows everything else.
fn filter(class: &Class) -> Vec<libc::sock_filter> {
    let arch = std::mem::offset_of!(libc::seccomp_data, arch) as u32;
    let args = std::mem::offset_of!(libc::seccomp_data, args) as u32;
    let (allow, ask) = (libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_USER_NOTIF);
    let mut program = vec![
        statement(LOAD, 0, 0, arch),
        statement(JUMP_IF_EQUAL, 1, 0, X86_64),
        statement(RETURN, 0, 0, allow),
        statement(LOAD, 0, 0, 0),
    ];
    for call in class.calls {
        let number = u32::try_from(*call).unwrap();
        let (argument, value, equal, other) = match class.limit {
            Limit::All => {
                program.extend([statement(JUMP_IF_EQUAL, 0, 1, number), statement(RETURN, 0, 0, ask)]);
                continue;
            }
            Limit::Only(argument, value) => (argument, value, ask, allow),
            Limit::AllBut(argument, value) => (argument, value, allow, ask),
        };
        program.extend([
            statement(JUMP_IF_EQUAL, 0, 4, number),
            statement(LOAD, 0, 0, args + 8 * argument),
            statement(JUMP_IF_EQUAL, 0, 1, value),
            statement(RETURN, 0, 0, equal),
            statement(RETURN, 0, 0, other),
        ]);
    }
    program.push(statement(RETURN, 0, 0, allow));
    program
}

/// In the child: installs the filter for itself and all that comes of it. Returns the listener's number.
fn install(filter: &[libc::sock_filter]) -> Result<RawFd> {
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::last_os_error());
    }
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    let (operation, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the kernel reads the program, which has as many statements as it says.
    let listener = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program) };
    if listener < 0 { Err(Error::last_os_error()) } else { Ok(listener as RawFd) }
}

/// Until the last process with the filter has ended.
fn supervise(listener: &OwnedFd, class: &Class, injection: &Injection) {
    while let Some(call) = receive(listener) {
        let number = injection.seen.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = number == injection.fails;
        if fails {
            injection.done.store(true, Ordering::SeqCst);
        }
        let flags = if fails { 0 } else { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 };
        let error = if fails { -class.errno } else { 0 };
        let mut answer = libc::seccomp_notif_resp { id: call.id, val: 0, error, flags };
        // SAFETY: the kernel reads an answer of this type. Who asked may have been killed meanwhile, which is no matter.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
    }
}

fn receive(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which is there.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        if poll.revents & libc::POLLIN == 0 {
            if poll.revents & libc::POLLHUP != 0 {
                return None;
            }
            continue;
        }
        // SAFETY: all zero is a value of it, and the one that the kernel wants to find.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes a notification, which `call` has room for.
        if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } == 0 {
            return Some(call);
        }
        // It was interrupted, or who asked has been killed.
    }
}

/// Whether this kernel and its rights let us do this at all.
pub fn possible() -> Result<()> {
    let nothing = Class { name: "none", calls: &[libc::SYS_swapoff], limit: Limit::All, errno: libc::EPERM };
    let probe = filter(&nothing);
    let mut command = Command::new("true");
    let install = move || install(&probe).map(drop);
    // SAFETY: two system calls, with a program that was made before.
    unsafe { command.pre_exec(install) };
    command.status().map(drop)
}
