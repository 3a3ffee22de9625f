//! What a worker may ask of the kernel once it is set up: nothing that opens, connects, executes or signals others.

use crate::hostmmu::uffd;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;

/// For the main thread and those of rings, including what starting a thread takes.
const ALLOWED: &[i64] = &[
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
/// `PR_SET_NAME`: a thread's own name.
const PR_SET_NAME: u64 = 15;

/// Gives everything else up, for all threads to come. A violation ends the process.
///
/// # Errors
/// The kernel refuses.
pub fn enter() -> anyhow::Result<()> {
    let equal =
        |argument, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let not_executable = || {
        let prot_exec = u64::from(libc::PROT_EXEC.cast_unsigned());
        SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(prot_exec), 0)
    };
    let only = |condition| SeccompRule::new(vec![condition]).map(|rule| vec![rule]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, vec![])).collect();
    rules.insert(libc::SYS_mmap, only(not_executable()?)?);
    rules.insert(libc::SYS_mprotect, only(not_executable()?)?);
    rules.insert(libc::SYS_ioctl, only(equal(1, u64::from(uffd::REGISTER))?)?);
    // Asked by the standard library before it closes a descriptor, in builds with assertions.
    rules.insert(libc::SYS_fcntl, only(equal(1, u64::from(libc::F_GETFD.cast_unsigned()))?)?);
    rules.insert(libc::SYS_prctl, only(equal(0, PR_SET_NAME)?)?);
    rules.insert(libc::SYS_tgkill, only(equal(0, u64::from(std::process::id()))?)?);
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?;
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}
