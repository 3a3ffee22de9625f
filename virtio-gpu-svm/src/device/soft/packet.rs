//! What each packet does, in steps that can stop and go on: at the end of a slice, at a fault, at a semaphore.
//!
//! Called by an engine with one job and one view of its VM. Progress is kept in the job and moves only after all that
//! a step touches was translated, so a step that faults has had no effect and is repeated as it was. A packet's result
//! is stored in one step at its end.
//!
//! * COPY of overlapping ranges is a copy byte by byte from the first to the last.
//! * CHASE ends at a node with address 0, read from memory or after `arg` was added. A node that is not 8-byte aligned
//!   ends the job with EINVAL, one outside the VM's space with EFAULT, both with the node's address.
//! * A null translation reads as zero and swallows what is stored: SEM_WAIT there waits like at any word that is 0, until
//!   something else is bound; SEM_SIGNAL wakes nobody; CHASE takes it for a list's last node, with payload 0.
//! * A panic in a packet is our bug and costs the job alone: EFAULT without an address.

use super::mem::{Memory, Missing};
use crate::addr::GpuAddr;
use crate::device::operands::{NODE, Operands, WORD};
use crate::device::{Access, Job, JobEnd, JobId};
use crate::protocol::errno::{EFAULT, EINVAL, EPERM, ETIMEDOUT};
use crate::protocol::job::{
    OP_ATOMIC_ADD, OP_AXPY, OP_CHASE, OP_COPY, OP_FILL, OP_NOP, OP_REDUCE, OP_SEM_SIGNAL, OP_SEM_WAIT, Packet,
};
use crate::seeded;
use crate::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Work of one slice, in bytes moved: about 30 us.
const SLICE: u64 = 256 << 10;
/// Of that, what is done of a slice at least when somebody waits for its end.
const LEAST: u64 = SLICE / 16;
/// What a node of a list costs, and what each packet costs at least: a cache miss or two.
const STEP: u64 = 1 << 10;

/// A job and how far it is.
#[derive(Debug)]
pub struct ActiveJob {
    /// Its name.
    pub id: JobId,
    packets: Vec<Packet>,
    /// The packet that is next.
    index: usize,
    progress: Progress,
    /// Where it faulted last.
    fault: Option<Missing>,
    /// Ends with this errno as soon as it is on an engine.
    doom: Option<i32>,
    /// Time on engines and at semaphores; none counts at faults, in the queue, or frozen.
    spent: Duration,
    /// When it began to wait for the semaphore that it waits for.
    waiting_since: Option<Instant>,
}

/// How far a packet is.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Whether the packet was begun.
    begun: bool,
    /// Bytes or nodes that are behind.
    done: u64,
    /// Wrapping sum over them.
    sum: u64,
    /// The node that is next, 0 at the end of the list.
    node: u64,
}

/// Why a job left its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// Its slice is over.
    Yield,
    /// It needs a translation, and translations of as many pages together.
    Fault(Missing, u64),
    /// It waits for the semaphore with this [`super::mem::Span::key`].
    Wait(u64),
    /// It ended.
    End(JobEnd),
}

/// What a slice did.
#[derive(Clone, Copy, Debug)]
pub struct SliceEnd {
    /// Why it ended.
    pub halt: Halt,
    /// Whether it may have stored anything.
    pub written: bool,
    /// [`super::mem::Target::key`] of a semaphore that it signalled. A signal ends a slice, so there is one at most.
    pub signalled: Option<u64>,
}

impl ActiveJob {
    /// A job before its first packet.
    pub fn new(job: Job) -> Self {
        Self {
            id: job.id,
            packets: job.packets,
            index: 0,
            progress: Progress::default(),
            fault: None,
            doom: None,
            spent: Duration::ZERO,
            waiting_since: None,
        }
    }

    /// Adds a slice that began at `begin` to the time it has spent, and ends the job if that is beyond `limit`.
    pub fn bill(&mut self, begin: Instant, slice: &mut SliceEnd, limit: Option<Duration>) {
        let now = Instant::now();
        let from = self.waiting_since.take().unwrap_or(begin);
        self.spent = self.spent.saturating_add(now.saturating_duration_since(from));
        let goes_on = matches!(slice.halt, Halt::Yield | Halt::Wait(_));
        if goes_on && limit.is_some_and(|limit| self.spent >= limit) {
            let addr = self.packets.get(self.index).map_or(0, |packet| packet.dst.get());
            slice.halt = self.failed(Failure { errno: ETIMEDOUT, addr, access: Access::Read });
        }
        self.waiting_since = matches!(slice.halt, Halt::Wait(_)).then_some(now);
    }

    /// It waits no more, whether for the queue or because it is frozen.
    pub fn end_wait(&mut self) {
        let since = self.waiting_since.take();
        self.spent = self.spent.saturating_add(since.map_or(Duration::ZERO, |since| since.elapsed()));
    }

    /// The job is to end with this errno.
    pub fn doom(&mut self, errno: i32) {
        self.doom = Some(errno);
    }

    /// How the job ends at an access that lacks a translation, on a device that cannot raise a fault.
    pub fn refused(&self, missing: &Missing) -> JobEnd {
        let errno = if missing.denied { EPERM } else { EFAULT };
        self.end(&Failure { errno, addr: missing.addr, access: missing.access })
    }

    /// Runs the job until its slice is over or it must stop. `end` is the first address beyond the VM's space. While `hurry`
    /// is set the slice is over after a part.
    pub fn run(&mut self, memory: Memory<'_>, end: u64, hurry: &AtomicBool) -> SliceEnd {
        let mut slice = Slice { memory, end, hurry, budget: SLICE, signalled: None };
        let halt = match self.doom {
            Some(errno) => {
                let (addr, access) = self.fault.map_or((0, Access::Read), |f| (f.addr, f.access));
                self.failed(Failure { errno, addr, access })
            }
            None => self.run_packets(&mut slice),
        };
        seeded::end_slice(matches!(halt, Halt::Fault(..)));
        SliceEnd { halt, written: slice.memory.written(), signalled: slice.signalled }
    }

    /// How the job ends after its slice panicked.
    pub fn panicked(&self) -> SliceEnd {
        let halt = self.failed(Failure { errno: EFAULT, addr: 0, access: Access::Read });
        // What it stored before is unknown.
        SliceEnd { halt, written: true, signalled: None }
    }

    fn run_packets(&mut self, slice: &mut Slice<'_>) -> Halt {
        while let Some(packet) = self.packets.get(self.index) {
            match slice.step(packet, &mut self.progress) {
                Ok(()) => {
                    self.index = self.index.saturating_add(1);
                    self.progress = Progress::default();
                }
                Err(Stop::Yield) => return Halt::Yield,
                Err(Stop::Wait(key)) => return Halt::Wait(key),
                Err(Stop::Fail(failure)) => return self.failed(failure),
                Err(Stop::Missing(missing)) => {
                    self.fault = Some(missing);
                    return Halt::Fault(missing, slice.memory.group(&missing));
                }
            }
        }
        Halt::End(JobEnd { errno: 0, packet: 0, addr: GpuAddr(0), access: Access::Read })
    }

    fn failed(&self, failure: Failure) -> Halt {
        Halt::End(self.end(&failure))
    }

    fn end(&self, failure: &Failure) -> JobEnd {
        let packet = u32::try_from(self.index).unwrap_or(u32::MAX);
        let Failure { errno, addr, access } = *failure;
        JobEnd { errno, packet, addr: GpuAddr(addr), access }
    }
}

/// A packet that cannot be carried out.
struct Failure {
    errno: i32,
    addr: u64,
    access: Access,
}

/// Why a packet is not complete.
enum Stop {
    Yield,
    Wait(u64),
    Missing(Missing),
    Fail(Failure),
}

impl From<Missing> for Stop {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

/// One turn of a job on an engine.
struct Slice<'v> {
    memory: Memory<'v>,
    end: u64,
    hurry: &'v AtomicBool,
    budget: u64,
    signalled: Option<u64>,
}

impl Slice<'_> {
    /// Goes on with a packet until it is complete or must stop.
    fn step(&mut self, packet: &Packet, progress: &mut Progress) -> Result<(), Stop> {
        self.check_budget()?;
        self.spend(STEP);
        let ops = Operands::of(packet);
        match packet.opcode.get() {
            OP_NOP => Ok(()),
            OP_COPY => self.copy(&ops, progress),
            OP_FILL => self.fill(&ops, progress),
            OP_REDUCE => self.reduce(&ops, progress),
            OP_AXPY => self.axpy(&ops, progress),
            OP_CHASE => self.chase(&ops, progress),
            OP_ATOMIC_ADD => {
                self.memory.target(ops.dst, WORD, Access::Atomic)?.fetch_add(ops.value);
                Ok(())
            }
            OP_SEM_WAIT => self.wait(&ops),
            OP_SEM_SIGNAL => {
                let word = self.memory.target(ops.dst, WORD, Access::Write)?;
                word.store(ops.value);
                self.signalled = word.key();
                self.budget = 0;
                Ok(())
            }
            #[cfg(test)]
            test_ops::OP_PANIC => panic!("a packet that panics, on purpose"),
            #[cfg(test)]
            test_ops::OP_HOLD => test_ops::hold(self, &ops),
            // Submitted without `check`.
            _ => Err(Stop::Fail(Failure { errno: EINVAL, addr: 0, access: Access::Read })),
        }
    }

    fn copy(&mut self, ops: &Operands, progress: &mut Progress) -> Result<(), Stop> {
        while let Some(left) = self.left(ops, progress)? {
            let source = self.memory.source(ops.src.saturating_add(progress.done), left)?;
            let target = self.memory.target(ops.dst.saturating_add(progress.done), left, Access::Write)?;
            let bytes = self.grant(source.bytes().min(target.bytes()));
            target.copy_from(&source, bytes);
            progress.done = progress.done.saturating_add(bytes);
        }
        Ok(())
    }

    fn fill(&mut self, ops: &Operands, progress: &mut Progress) -> Result<(), Stop> {
        while let Some(left) = self.left(ops, progress)? {
            let target = self.memory.target(ops.dst.saturating_add(progress.done), left, Access::Write)?;
            let bytes = self.grant(target.bytes());
            target.fill(bytes, ops.value);
            progress.done = progress.done.saturating_add(bytes);
        }
        Ok(())
    }

    fn reduce(&mut self, ops: &Operands, progress: &mut Progress) -> Result<(), Stop> {
        while let Some(left) = self.left(ops, progress)? {
            let source = self.memory.source(ops.src.saturating_add(progress.done), left)?;
            let bytes = self.grant(source.bytes());
            progress.sum = progress.sum.wrapping_add(source.sum(bytes));
            progress.done = progress.done.saturating_add(bytes);
        }
        self.memory.target(ops.dst, WORD, Access::Write)?.store(progress.sum);
        Ok(())
    }

    fn axpy(&mut self, ops: &Operands, progress: &mut Progress) -> Result<(), Stop> {
        while let Some(left) = self.left(ops, progress)? {
            let x = self.memory.source(ops.src.saturating_add(progress.done), left)?;
            let y = self.memory.target(ops.dst.saturating_add(progress.done), left, Access::Write)?;
            let bytes = self.grant(x.bytes().min(y.bytes()));
            y.axpy(bytes, f64::from_bits(ops.value), &x);
            progress.done = progress.done.saturating_add(bytes);
        }
        Ok(())
    }

    fn chase(&mut self, ops: &Operands, progress: &mut Progress) -> Result<(), Stop> {
        if !progress.begun {
            *progress = Progress { begun: true, node: ops.src, ..Progress::default() };
        }
        while progress.node != 0 && progress.done < ops.value {
            self.check_budget()?;
            self.spend(STEP);
            let node = self.check_node(progress.node)?;
            let next = self.memory.source(node, NODE)?;
            // A node may lie across a page boundary.
            let payload = self.memory.source(node.saturating_add(WORD), WORD)?;
            progress.sum = progress.sum.wrapping_add(payload.load());
            progress.done = progress.done.saturating_add(1);
            progress.node = match next.load() {
                0 => 0,
                next => next.wrapping_add(ops.arg),
            };
        }
        // Both are translated before either is stored.
        let nodes = self.memory.target(ops.dst, NODE, Access::Write)?;
        let sum = self.memory.target(ops.dst.saturating_add(WORD), WORD, Access::Write)?;
        nodes.store(progress.done);
        sum.store(progress.sum);
        Ok(())
    }

    fn wait(&mut self, ops: &Operands) -> Result<(), Stop> {
        let word = self.memory.source(ops.dst, WORD)?;
        if word.load() >= ops.value { Ok(()) } else { Err(Stop::Wait(word.key())) }
    }

    fn check_node(&self, addr: u64) -> Result<u64, Stop> {
        let errno = match addr.checked_add(NODE) {
            _ if !addr.is_multiple_of(WORD) => EINVAL,
            Some(last) if last <= self.end => return Ok(addr),
            _ => EFAULT,
        };
        Err(Stop::Fail(Failure { errno, addr, access: Access::Read }))
    }

    /// Bytes of the packet that are left, if any.
    fn left(&self, ops: &Operands, progress: &Progress) -> Result<Option<u64>, Stop> {
        let left = ops.len.saturating_sub(progress.done);
        if left == 0 {
            return Ok(None);
        }
        self.check_budget()?;
        Ok(Some(left))
    }

    fn check_budget(&self) -> Result<(), Stop> {
        let over = self.budget == 0
            || (self.budget <= SLICE.saturating_sub(LEAST) && self.hurry.load(Ordering::Relaxed));
        if over { Err(Stop::Yield) } else { Ok(()) }
    }

    /// How many of these bytes the slice may move; they are spent. Whole words unless the packet ends.
    fn grant(&mut self, bytes: u64) -> u64 {
        let granted = bytes.min(self.budget.next_multiple_of(WORD));
        self.spend(granted.max(WORD));
        granted
    }

    fn spend(&mut self, cost: u64) {
        self.budget = self.budget.saturating_sub(cost);
    }
}

/// Opcodes that only tests have.
#[cfg(test)]
pub mod test_ops {
    use super::{Access, Operands, Slice, Stop, WORD};

    /// Panics.
    pub const OP_PANIC: u32 = 0xdead;
    /// Stores 1 at `dst + 8`, then stays in its slice until the word at `dst` is not 0.
    pub const OP_HOLD: u32 = 0xd01d;

    pub(super) fn hold(slice: &mut Slice<'_>, ops: &Operands) -> Result<(), Stop> {
        let gate = slice.memory.source(ops.dst, WORD)?;
        slice.memory.target(ops.dst.saturating_add(WORD), WORD, Access::Write)?.store(1);
        while gate.load() == 0 {
            std::thread::yield_now();
        }
        Ok(())
    }
}
