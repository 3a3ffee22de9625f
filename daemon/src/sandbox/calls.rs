//! seccomp: which system calls this process, and workers that it starts, may make. What is not here kills the process.
//!
//! Written by hand, and compared with what the daemon was seen to call on each kind of device. C libraries differ in what they call for the
//! same thing, so glibc's and musl's ways are both here, and what a C library calls on its way to a message and an end.
//!
//! A worker inherits this filter and adds its own (`hostmmu::worker`), so what it takes to load, and what its own filter
//! allows, must be in the profile with workers.

use super::Profile;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Whatever their arguments. None of these opens, makes or names anything but memory, threads' own state and sockets of
/// a path, for which landlock and the folder's rights stand.
const ALLOWED: &[i64] = &[
    // Descriptors that are there.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_flock,
    libc::SYS_fchmod,
    libc::SYS_fstat,
    libc::SYS_eventfd2,
    // Event files that may be a VMM's trap.
    libc::SYS_preadv2,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    // Sockets.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Files by name; opening one is below.
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_getcwd,
    // Memory; mapping it is below.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads and time.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Signals of its own.
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    // Who it is.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    // See `clone_by_flags`.
    libc::SYS_clone3,
];
/// Older ways to the same, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];
/// Starting a program, and its way to `main`.
const WORKERS: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_pipe2,
    libc::SYS_dup3,
    libc::SYS_setpgid,
    libc::SYS_set_tid_address,
    libc::SYS_faccessat,
    libc::SYS_close_range,
    libc::SYS_userfaultfd,
    libc::SYS_tgkill,
];
#[cfg(target_arch = "x86_64")]
const OLDER_WORKERS: &[i64] = &[libc::SYS_arch_prctl, libc::SYS_access, libc::SYS_dup2];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_WORKERS: &[i64] = &[];

/// Numbers of which C libraries make different types.
const FIONBIO: u64 = 0x5421;
const TCGETS: u64 = 0x5401;
const PR_SET_NAME: u64 = 15;
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
/// Names for mappings, which some C libraries give to their heaps.
const PR_SET_VMA: u64 = 0x5356_4d41;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
/// `CLONE_NEW*`, every one.
const NAMESPACES: u64 = 0x7e02_0080;
/// `CLONE_VM | CLONE_SIGHAND | CLONE_THREAD`.
const THREAD: u64 = 0x0001_0900;
/// `CLONE_VM | CLONE_VFORK`.
const SPAWN: u64 = 0x0000_4100;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;
type Result<T> = std::result::Result<T, seccompiler::Error>;

/// Gives up all other system calls, for every thread of the process.
///
/// # Errors
/// The kernel refuses.
pub fn restrict(profile: &Profile) -> Result<()> {
    let filters = [clone_by_flags()?, allow_list(profile)?];
    for filter in filters {
        seccompiler::apply_filter_all_threads(&BpfProgram::try_from(filter)?)?;
    }
    Ok(())
}

/// `clone3` has its flags in memory, where no filter sees them. A kernel that lacks it is met by every C library with
/// `clone`, so that is what they are told.
fn clone_by_flags() -> Result<SeccompFilter> {
    let lacking = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let rules = Rules::from([(libc::SYS_clone3, vec![])]);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, lacking, architecture()?)?)
}

fn allow_list(profile: &Profile) -> Result<SeccompFilter> {
    let lists = [ALLOWED, OLDER]
        .into_iter()
        .chain(profile.workers.then_some([WORKERS, OLDER_WORKERS]).into_iter().flatten());
    let mut rules: Rules = lists.flatten().map(|call| (*call, vec![])).collect();
    limit_files(&mut rules, profile.workers)?;
    limit_memory(&mut rules, profile.workers)?;
    limit_processes(&mut rules, profile.workers)?;
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        one_of(&mut rules, call, 0, &[number(libc::AF_UNIX)])?;
    }
    Ok(SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture()?)?)
}

/// Opening for reading only, by landlock's leave; a worker's standard output is /dev/null, opened for writing.
fn limit_files(rules: &mut Rules, workers: bool) -> Result<()> {
    let making = number(libc::O_CREAT | libc::O_TRUNC | libc::O_RDWR | libc::O_APPEND | libc::O_TMPFILE)
        & !number(libc::O_DIRECTORY);
    let refused = if workers { making } else { making | number(libc::O_WRONLY) };
    add(rules, libc::SYS_openat, vec![masked(2, refused, 0)?])?;
    #[cfg(target_arch = "x86_64")]
    add(rules, libc::SYS_open, vec![masked(1, refused, 0)?])?;

    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_DUPFD,
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_GET_SEALS,
    ];
    one_of(rules, libc::SYS_fcntl, 1, &commands.map(number))?;
    // The second asks whether a descriptor is a terminal.
    let mut requests = vec![FIONBIO, TCGETS];
    #[cfg(target_arch = "x86_64")]
    if workers {
        requests.extend(crate::hostmmu::CALLS_OF_WORKERS.map(u64::from));
    }
    one_of(rules, libc::SYS_ioctl, 1, &requests)
}

/// Nothing that is written becomes code. Without workers nothing becomes code at all.
fn limit_memory(rules: &mut Rules, workers: bool) -> Result<()> {
    let (write, exec) = (number(libc::PROT_WRITE), number(libc::PROT_EXEC));
    add(rules, libc::SYS_mmap, vec![masked(2, exec, 0)?])?;
    if workers {
        add(rules, libc::SYS_mmap, vec![masked(2, exec | write, exec)?])?;
    }
    add(rules, libc::SYS_mprotect, vec![masked(2, exec, 0)?])
}

fn limit_processes(rules: &mut Rules, workers: bool) -> Result<()> {
    add(rules, libc::SYS_clone, vec![masked(0, THREAD | NAMESPACES, THREAD)?])?;
    // What a C library calls to end the process; musl by the thread's number alone.
    one_of(rules, libc::SYS_tkill, 1, &[number(libc::SIGABRT)])?;
    let mut names = vec![PR_SET_NAME, PR_SET_VMA];
    if workers {
        add(rules, libc::SYS_clone, vec![masked(0, SPAWN | THREAD | NAMESPACES, SPAWN)?])?;
        one_of(rules, libc::SYS_kill, 1, &[number(libc::SIGKILL)])?;
        one_of(rules, libc::SYS_prlimit64, 0, &[0])?;
        one_of(rules, libc::SYS_seccomp, 0, &[SECCOMP_SET_MODE_FILTER])?;
        names.extend([PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS]);
    } else {
        one_of(rules, libc::SYS_tgkill, 0, &[u64::from(std::process::id())])?;
    }
    one_of(rules, libc::SYS_prctl, 0, &names)
}

/// One more way to make a call: all conditions hold.
fn add(rules: &mut Rules, call: i64, conditions: Vec<SeccompCondition>) -> Result<()> {
    rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
    Ok(())
}

/// An argument has one of these values.
fn one_of(rules: &mut Rules, call: i64, argument: u8, values: &[u64]) -> Result<()> {
    values.iter().try_for_each(|value| {
        let equal = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        add(rules, call, vec![equal])
    })
}

/// These bits of an argument are so.
fn masked(argument: u8, mask: u64, value: u64) -> std::result::Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

/// A constant of the C library, all of which are positive.
fn number(constant: i32) -> u64 {
    u64::from(constant.cast_unsigned())
}

fn architecture() -> std::result::Result<TargetArch, BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}
