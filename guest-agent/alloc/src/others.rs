//! The other threads of this process, held still while memory that they may be using is moved.
//!
//! Each is sent a signal and waits in its handler, where it touches no memory but a word in this library: its stack may
//! be moved, too. When it goes on, everything is where it was.
//!
//! The signal is the one that the C library keeps for changes of the user (SIGSETXID): so no program blocks it, waits for
//! it, or has a handler for it. It is told apart by what it carries; others go on to the C library's handler. What a thread
//! waits for in the kernel begins anew, but for the calls that every handler ends (poll, epoll_wait, nanosleep: EINTR).
//!
//! A thread may be unable to come until another one goes on that stands still already: one that makes a thread with an
//! affinity holds a lock of the C library's that the new one waits for, with all signals held back. So all are let go again
//! and asked anew, for as long as patience lasts.

#![expect(unsafe_code, reason = "handles a signal of the C library's, and waits without a stack")]

use crate::exports::{errno, set_errno};
use crate::numbered::KERNEL;
use crate::proc;
use crate::stack;
use libc::{c_int, c_void, siginfo_t};
use rustix::thread::{NanosleepRelativeResult, Timespec};
use std::fmt;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// As in nptl: the second of the signals that are real-time to the kernel, and none to programs.
const SIGNAL: c_int = 33;
/// Most threads.
const MAX_THREADS: usize = 4096;
/// How long all of them may take. One in a call that nothing interrupts takes as long as that.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long they stand still for those that do not come, at first; each time twice as long.
const ATTEMPT: Duration = Duration::from_millis(100);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);
/// How often those that have not come are looked for.
const LOOK: Duration = Duration::from_millis(2);

/// States of a slot. A thread that is asked takes it to `COMING`, and touches it last when that becomes `STILL`.
const FREE: u32 = 0;
const COMING: u32 = 2;
const STILL: u32 = 4;
const GONE: u32 = 6;

/// That its thread is asked, while `GO` is `go`: one that comes from an earlier attempt takes nobody's slot.
fn asked(go: u32) -> u32 {
    (go << 1) | 1
}

/// What there is of a thread.
struct Slot {
    thread: AtomicI32,
    state: AtomicU32,
    /// What is known of its stack ([`stack::word`]).
    word: AtomicUsize,
}

static SLOTS: [Slot; MAX_THREADS] =
    [const { Slot { thread: AtomicI32::new(0), state: AtomicU32::new(FREE), word: AtomicUsize::new(0) } };
        MAX_THREADS];
/// Changes when they may go on.
static GO: AtomicU32 = AtomicU32::new(0);
/// How many have come.
static CAME: AtomicU32 = AtomicU32::new(0);
/// The C library's handler.
static BEFORE: AtomicUsize = AtomicUsize::new(0);

/// Why they do not stand still.
pub enum Failure {
    /// The kernel does not tell which there are, or does not take the signal.
    Kernel,
    /// There are too many.
    Many,
    /// This one has not come.
    Thread(i32),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str(
                "its threads cannot be held still (/proc must be there and of its own pid namespace, and descriptors and signals be left: `ulimit -n`, `ulimit -i`)",
            ),
            Self::Many => write!(f, "it has more than {MAX_THREADS} threads"),
            Self::Thread(thread) => {
                write!(f, "its thread {thread} has not come out of the kernel for {} s", PATIENCE.as_secs())
            }
        }
    }
}

/// All others stand still as long as this lives.
pub struct Still(usize);

impl Still {
    /// What is known of each thread's stack.
    pub fn words(&self) -> impl Iterator<Item = usize> {
        let slots = SLOTS.iter().take(self.0).filter(|slot| slot.state.load(Ordering::Acquire) == STILL);
        slots.map(|slot| slot.word.load(Ordering::Relaxed))
    }
}

/// Lets all of them go on. Nothing is moved any more.
pub fn let_go() {
    GO.fetch_add(1, Ordering::Release);
    futex(&GO, libc::FUTEX_WAKE, u32::try_from(c_int::MAX).unwrap_or(0), None);
}

impl Drop for Still {
    fn drop(&mut self) {
        // First: who comes later finds its slot given up, and who came before finds that `GO` has changed.
        SLOTS.iter().take(self.0).for_each(Slot::give_up);
        let_go();
        // A thread on its way touches its slot once more.
        while SLOTS.iter().take(self.0).any(|slot| slot.state.load(Ordering::Acquire) == COMING) {
            pause(LOOK);
        }
    }
}

/// Holds them still. The caller holds what they must not hold then, and has signals held back.
pub fn hold_still() -> Result<Still, Failure> {
    let deadline = Instant::now() + PATIENCE;
    let mut patience = ATTEMPT;
    loop {
        match attempt(deadline.min(Instant::now() + patience)) {
            Err(Failure::Thread(_)) if Instant::now() < deadline => pause(PAUSE),
            done => return done,
        }
        patience *= 2;
    }
}

fn attempt(deadline: Instant) -> Result<Still, Failure> {
    let mut still = Still(0);
    // One that runs may make another.
    loop {
        let before = still.0;
        ask_new(&mut still, deadline)?;
        if before == still.0 {
            return Ok(still);
        }
        wait(&still, deadline)?;
    }
}

/// Asks the threads that are not known yet.
fn ask_new(still: &mut Still, deadline: Instant) -> Result<(), Failure> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let me = rustix::thread::gettid().as_raw_nonzero().get();
    let mut result = Ok(());
    // What is mounted there may be of another namespace, with other numbers.
    let mut is_ours = false;
    let told = proc::each_thread(|thread| {
        is_ours |= thread == me;
        let known = SLOTS.iter().take(still.0).any(|slot| slot.thread.load(Ordering::Relaxed) == thread);
        if thread == me || known || result.is_err() {
            return;
        }
        if still.0 == 0 && !handle() {
            result = Err(Failure::Kernel);
            return;
        }
        match SLOTS.get(still.0) {
            Some(slot) => {
                still.0 += 1;
                result = slot.ask(process, thread, deadline);
            }
            None => result = Err(Failure::Many),
        }
    });
    let told = told.map_err(|_| Failure::Kernel).and(result);
    if is_ours { told } else { Err(Failure::Kernel) }
}

/// Waits until all that were asked have come.
fn wait(still: &Still, deadline: Instant) -> Result<(), Failure> {
    let awaited = || {
        let on_the_way = |slot: &&Slot| {
            let state = slot.state.load(Ordering::Acquire);
            state == COMING || state == asked(GO.load(Ordering::Relaxed))
        };
        SLOTS.iter().take(still.0).filter(on_the_way)
    };
    loop {
        let came = CAME.load(Ordering::Acquire);
        let Some(first) = awaited().next() else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(Failure::Thread(first.thread.load(Ordering::Relaxed)));
        }
        if !futex(&CAME, libc::FUTEX_WAIT, came, Some(LOOK)) {
            awaited().filter(|slot| !proc::runs(slot.thread.load(Ordering::Relaxed))).for_each(Slot::give_up);
        }
    }
}

impl Slot {
    fn ask(&self, process: i32, thread: i32, deadline: Instant) -> Result<(), Failure> {
        self.thread.store(thread, Ordering::Relaxed);
        self.state.store(asked(GO.load(Ordering::Relaxed)), Ordering::Release);
        loop {
            match self.send(process, thread) {
                0 => return Ok(()),
                libc::ESRCH if !proc::runs(thread) => {
                    self.give_up();
                    return Ok(());
                }
                // It is ending; or the user has as many signals waiting as he may.
                libc::ESRCH | libc::EAGAIN if Instant::now() < deadline => pause(LOOK),
                libc::ESRCH | libc::EAGAIN => return Err(Failure::Thread(thread)),
                _ => return Err(Failure::Kernel),
            }
        }
    }

    /// Of a thread that does not come any more.
    fn give_up(&self) {
        let asked = asked(GO.load(Ordering::Relaxed));
        self.state.compare_exchange(asked, GONE, Ordering::Relaxed, Ordering::Relaxed).ok();
    }

    /// Sends the signal; returns errno.
    fn send(&self, process: i32, thread: i32) -> c_int {
        // SAFETY: what a signal carries is plain data for which all zeros is a value.
        let mut carried: siginfo_t = unsafe { std::mem::zeroed() };
        carried.si_signo = SIGNAL;
        carried.si_code = libc::SI_QUEUE;
        let value = Carried { process, user: 0, slot: std::ptr::from_ref(self).addr() };
        // SAFETY: the fields of a signal that a process sends lie there, and are shorter than what is kept for any.
        unsafe { (&raw mut carried).cast::<Carried>().wrapping_byte_add(CARRIED).write(value) };
        // SAFETY: the pointer is to what is carried, which lives here.
        let sent =
            unsafe { KERNEL(libc::SYS_rt_tgsigqueueinfo, process, thread, SIGNAL, &raw const carried) };
        if sent == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) }
    }
}

/// Where the fields of a signal that a process sends begin.
const CARRIED: usize = 16;

/// Those fields: si_pid, si_uid and si_value.
#[repr(C)]
struct Carried {
    process: i32,
    user: u32,
    slot: usize,
}

/// As the kernel has it.
#[repr(C)]
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Has the signal come here. The C library refuses to, so this is said to the kernel.
fn handle() -> bool {
    const SA_RESTORER: u64 = 0x0400_0000;
    let flags = u64::from((libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK).cast_unsigned());
    let Some(restorer) = restorer() else { return false };
    let action = Action {
        handler: on_signal as *const () as usize,
        flags: flags | SA_RESTORER,
        restorer,
        mask: u64::MAX,
    };
    let mut before = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
    let act = |new: *const Action, old: *mut Action| {
        // SAFETY: both pointers are null or to actions that live here; the handler is one for a signal that carries
        // something.
        unsafe { KERNEL(libc::SYS_rt_sigaction, SIGNAL, new, old, size_of::<u64>()) == 0 }
    };
    // Asked before: one may come as soon as ours stands there.
    if !act(std::ptr::null(), &raw mut before) {
        return false;
    }
    if before.handler != action.handler {
        BEFORE.store(before.handler, Ordering::Release);
    }
    act(&raw const action, std::ptr::null_mut())
}

/// What a handler returns to.
#[cfg(target_arch = "x86_64")]
fn restorer() -> Option<usize> {
    /// # Safety
    /// Only the kernel has it called.
    #[unsafe(naked)]
    unsafe extern "C" fn end_handler() {
        std::arch::naked_asm!("mov eax, 15", "syscall")
    }
    Some(end_handler as *const () as usize)
}

#[cfg(not(target_arch = "x86_64"))]
fn restorer() -> Option<usize> {
    None
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let errno = errno();
    // Before the slot is looked at: when it changes, nobody is waited for any more.
    let go = GO.load(Ordering::Acquire);
    if let Some(slot) = slot_of(info) {
        let word = stack::word();
        let came = slot.state.compare_exchange(asked(go), COMING, Ordering::AcqRel, Ordering::Relaxed);
        if came.is_ok() {
            slot.word.store(word, Ordering::Relaxed);
            // SAFETY: the words are this library's, which stays where it is.
            unsafe { stand_still(&slot.state, go) };
        }
    } else {
        hand_on(signal, info, context);
    }
    set_errno(errno);
}

/// The slot that the signal carries, if it is this thread's.
fn slot_of(info: *mut siginfo_t) -> Option<&'static Slot> {
    // SAFETY: the kernel passes what the signal carries.
    let code = unsafe { (*info).si_code };
    // SAFETY: as above; it is long enough for these fields, which only mean something else if it was sent otherwise.
    let carried = unsafe { info.cast::<Carried>().wrapping_byte_add(CARRIED).read() };
    let at = carried.slot.checked_sub(SLOTS.as_ptr().addr())?;
    let slot = SLOTS.get(at / size_of::<Slot>()).filter(|_| at.is_multiple_of(size_of::<Slot>()))?;
    let mine = slot.thread.load(Ordering::Acquire) == rustix::thread::gettid().as_raw_nonzero().get();
    let ours = code == libc::SI_QUEUE && carried.process == rustix::process::getpid().as_raw_nonzero().get();
    (mine && ours).then_some(slot)
}

/// To the C library's handler.
fn hand_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
    let before = BEFORE.load(Ordering::Acquire);
    if before != libc::SIG_DFL && before != libc::SIG_IGN {
        // SAFETY: it is the handler that stood there, and the C library's takes these.
        let before = unsafe {
            std::mem::transmute::<*const c_void, Handler>(std::ptr::with_exposed_provenance(before))
        };
        before(signal, info, context);
    }
}

/// Says that this thread stands still, and waits until `GO` is not `go` any more. From the first to the last, nothing is
/// read from the stack or written to it.
///
/// # Safety
/// `state` is in memory that is not moved.
#[cfg(target_arch = "x86_64")]
unsafe fn stand_still(state: &AtomicU32, go: u32) {
    // SAFETY: it writes to the two words, and calls the kernel with one of them, which keeps nothing.
    unsafe {
        std::arch::asm!(
            "mov dword ptr [{state}], {still}",
            "lock add dword ptr [{came}], 1",
            // futex(came, FUTEX_WAKE_PRIVATE, 1)
            "mov rdi, {came}",
            "mov esi, 129",
            "mov edx, 1",
            "mov eax, 202",
            "syscall",
            // futex(go, FUTEX_WAIT_PRIVATE, go, no time limit)
            "2:",
            "cmp dword ptr [{word}], {go:e}",
            "jne 3f",
            "mov rdi, {word}",
            "mov esi, 128",
            "mov edx, {go:e}",
            "xor r10d, r10d",
            "mov eax, 202",
            "syscall",
            "jmp 2b",
            "3:",
            state = in(reg) state.as_ptr(),
            still = const STILL,
            came = in(reg) CAME.as_ptr(),
            word = in(reg) GO.as_ptr(),
            go = in(reg) go,
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _, out("rsi") _, out("r10") _, out("r11") _,
            options(nostack),
        );
    }
}

/// # Safety
/// None: without a restorer there is no handler ([`restorer`]), so nobody calls it.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stand_still(_state: &AtomicU32, _go: u32) {}

/// Waits, but not by the C library's function, which is a point where a cancelled thread ends.
pub fn pause(length: Duration) {
    let mut rest = Timespec { tv_sec: 0, tv_nsec: i64::from(length.subsec_nanos()) };
    while let NanosleepRelativeResult::Interrupted(left) = rustix::thread::nanosleep(&rest) {
        rest = left;
    }
}

/// Whether it was woken, or had no need to wait.
fn futex(word: &AtomicU32, operation: c_int, value: u32, limit: Option<Duration>) -> bool {
    let limit = limit.map(|limit| libc::timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let operation = operation | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word and the time limit live as long as the call.
    let result = unsafe { KERNEL(libc::SYS_futex, word.as_ptr(), operation, value, limit) };
    result >= 0 || errno() != libc::ETIMEDOUT
}
