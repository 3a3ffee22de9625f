//! The access unit: the only code that touches GPU addresses, and what happens when the CPU refuses one.
//!
//! Every loop is a few instructions whose whole progress is in registers. A missing page needs no code here: the kernel
//! parks the thread and repeats the instruction. An access that a mapping forbids raises SIGSEGV, one beyond the end of
//! a file SIGBUS; the handler sends the thread to the *landing*, which stores the registers and returns why. So a loop
//! goes on later exactly where it stopped, as the hardware's own restartable instructions do.
//!
//! A parked thread is released by a signal: [`RETRY`] does nothing but end the wait, so that the instruction is
//! repeated; [`ABANDON`] goes to the landing.
//!
//! Guests write the same bytes at any time; nothing here is a Rust reference to them.

#![expect(unsafe_code, reason = "packets run on raw addresses, and signals decide about them")]

use libc::{REG_ERR, REG_R10, REG_R11, REG_RAX, REG_RIP, c_int, c_void, siginfo_t, ucontext_t};
use std::arch::global_asm;

/// Ends the wait of a parked thread.
pub const RETRY: c_int = libc::SIGUSR1;
/// Ends the access of a parked thread.
pub const ABANDON: c_int = libc::SIGUSR2;

/// What a loop works on; all of it moves on with the loop.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Registers {
    /// GPU address that is written.
    pub to: u64,
    /// GPU address that is read.
    pub from: u64,
    /// Octets ([`Loop::Copy`]) or words that are left.
    pub left: u64,
    /// Operand or result.
    pub value: u64,
    /// Of a landing: the address that was refused.
    addr: u64,
    /// Of a landing: the CPU's error code.
    error: u64,
}

impl Registers {
    /// At the beginning of a loop.
    pub fn new(to: u64, from: u64, left: u64, value: u64) -> Self {
        Self { to, from, left, value, addr: 0, error: 0 }
    }
}

/// Loops of the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// Octets from `from` to `to`, one after the other.
    Copy,
    /// `value` into the words at `to`.
    Fill,
    /// Adds the words at `from` to `value`.
    Sum,
    /// `to[i] += f64(value) * from[i]`.
    Axpy,
    /// Adds `value` to the word at `to`, atomically. Once.
    Add,
}

/// Why a loop stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A mapping forbids it.
    Denied {
        /// What was touched.
        addr: u64,
        /// Whether it was to be written.
        write: bool,
    },
    /// The file behind the mapping ends before.
    Beyond {
        /// What was touched.
        addr: u64,
    },
    /// It was to be abandoned.
    Abandoned,
}

/// What a landing returns; 0 is the end of the loop.
const DENIED: u32 = 1;
const BEYOND: u32 = 2;
const ABANDONED: u32 = 3;

// rdi `to`, rsi `from`, rdx `value`, rcx `left`, r8 where registers are stored at the end, r9 `value` as f64.
global_asm!(
    ".pushsection .text",
    ".hidden svmd_unit_begin, svmd_unit_end, svmd_unit_landing",
    ".globl svmd_unit_begin, svmd_unit_end, svmd_unit_landing",
    ".hidden svmd_unit_copy, svmd_unit_fill, svmd_unit_sum, svmd_unit_axpy, svmd_unit_add",
    ".globl svmd_unit_copy, svmd_unit_fill, svmd_unit_sum, svmd_unit_axpy, svmd_unit_add",
    "svmd_unit_begin:",
    "svmd_unit_copy:",
    "rep movsb",
    "jmp 9f",
    "svmd_unit_fill:",
    "mov rax, rdx",
    "rep stosq",
    "jmp 9f",
    "svmd_unit_sum:",
    "test rcx, rcx",
    "jz 9f",
    "add rdx, [rsi]",
    "add rsi, 8",
    "dec rcx",
    "jmp svmd_unit_sum",
    "svmd_unit_axpy:",
    "movq xmm0, r9",
    "2:",
    "test rcx, rcx",
    "jz 9f",
    "movsd xmm1, [rsi]",
    "mulsd xmm1, xmm0",
    "addsd xmm1, [rdi]",
    "movsd [rdi], xmm1",
    "add rsi, 8",
    "add rdi, 8",
    "dec rcx",
    "jmp 2b",
    "svmd_unit_add:",
    "lock add [rdi], rdx",
    "svmd_unit_end:",
    "9:",
    "xor eax, eax",
    "svmd_unit_landing:",
    "mov [r8], rdi",
    "mov [r8 + 8], rsi",
    "mov [r8 + 16], rcx",
    "mov [r8 + 24], rdx",
    "mov [r8 + 32], r10",
    "mov [r8 + 40], r11",
    "ret",
    ".popsection",
);

type Entry = unsafe extern "sysv64" fn(u64, u64, u64, u64, *mut Registers, u64) -> u32;

unsafe extern "sysv64" {
    fn svmd_unit_copy(to: u64, from: u64, value: u64, left: u64, out: *mut Registers, a: u64) -> u32;
    fn svmd_unit_fill(to: u64, from: u64, value: u64, left: u64, out: *mut Registers, a: u64) -> u32;
    fn svmd_unit_sum(to: u64, from: u64, value: u64, left: u64, out: *mut Registers, a: u64) -> u32;
    fn svmd_unit_axpy(to: u64, from: u64, value: u64, left: u64, out: *mut Registers, a: u64) -> u32;
    fn svmd_unit_add(to: u64, from: u64, value: u64, left: u64, out: *mut Registers, a: u64) -> u32;
    fn svmd_unit_begin();
    fn svmd_unit_end();
    fn svmd_unit_landing();
}

/// Runs a loop until its end, or until it must stop; `registers` tell how far it is.
///
/// # Safety
/// All that the loop may touch lies in the GPU's part of this process' address space, where nothing of Rust is; and
/// [`install`] was called.
pub unsafe fn run(which: Loop, registers: &mut Registers) -> Result<(), Stop> {
    let entry: Entry = match which {
        Loop::Copy => svmd_unit_copy,
        Loop::Fill => svmd_unit_fill,
        Loop::Sum => svmd_unit_sum,
        Loop::Axpy => svmd_unit_axpy,
        Loop::Add => svmd_unit_add,
    };
    let Registers { to, from, left, value, .. } = *registers;
    // SAFETY: the caller vouches for the addresses; the unit keeps to the calling convention, stores only into
    // `registers` besides, and uses no stack.
    let code = unsafe { entry(to, from, value, left, registers, value) };
    match code {
        0 => Ok(()),
        DENIED => Err(Stop::Denied { addr: registers.addr, write: registers.error & 2 != 0 }),
        BEYOND => Err(Stop::Beyond { addr: registers.addr }),
        _ => Err(Stop::Abandoned),
    }
}

/// Makes this process handle the signals of the unit. Before its first thread.
///
/// # Errors
/// The kernel refuses.
pub fn install() -> std::io::Result<()> {
    for signal in [libc::SIGSEGV, libc::SIGBUS, RETRY, ABANDON] {
        // SAFETY: zero is a valid value of every field.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `on_signal` is async-signal-safe: it touches its arguments, and calls `sigaction` at most.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a context that is this handler's to change, because of SA_SIGINFO.
    let context = unsafe { &mut *context.cast::<ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let at = |index: c_int| usize::try_from(index).unwrap_or(0);
    let [rip, rax, r10, r11, err] = [REG_RIP, REG_RAX, REG_R10, REG_R11, REG_ERR].map(at);
    let unit = [svmd_unit_begin, svmd_unit_end].map(|label| (label as *const ()).addr().cast_signed() as i64);
    let inside = registers.get(rip).is_some_and(|rip| (unit[0]..unit[1]).contains(rip));
    let code = match signal {
        libc::SIGSEGV => DENIED,
        libc::SIGBUS => BEYOND,
        ABANDON => ABANDONED,
        _ => return,
    };
    if !inside {
        if code != ABANDONED {
            // A bug of ours: the instruction is repeated, and then has its usual end.
            die_of(signal);
        }
        return;
    }
    // SAFETY: the kernel passes the cause, because of SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: SIGSEGV and SIGBUS have an address; of others it is a number that nobody looks at.
    let addr = unsafe { info.si_addr() }.addr().cast_signed() as i64;
    let error = registers.get(err).copied().unwrap_or(0);
    let landing = (svmd_unit_landing as *const ()).addr().cast_signed() as i64;
    for (register, value) in [(rip, landing), (rax, code.into()), (r10, addr), (r11, error)] {
        if let Some(register) = registers.get_mut(register) {
            *register = value;
        }
    }
}

fn die_of(signal: c_int) {
    // SAFETY: zero is a valid value of every field, and means the default action.
    let action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: async-signal-safe, with a valid action; nothing is to be done if it fails.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

/// Releases a thread of this process that is parked: with [`RETRY`] or [`ABANDON`].
pub fn release(tid: c_int, signal: c_int) {
    // SAFETY: no arguments.
    let process = unsafe { libc::getpid() };
    // SAFETY: the signal has a handler of ours, whenever it comes. A thread that is gone needs no release.
    unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) };
}
