//! A ring's thread: runs its jobs one after the other, on the CPU's own translations.
//!
//! A thread for each ring that has had a job, so that one which is parked, or waits for a semaphore, holds up no other.

#![expect(unsafe_code, reason = "calls the access unit")]

use super::unit::{self, Loop, Registers, Stop};
use crate::hostmmu::message::{self, Report};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SendFlags;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use virtio_gpu_svm::device::Access;
use virtio_gpu_svm::device::operands::{NODE, Operands, WORD};
use virtio_gpu_svm::protocol::errno::{EFAULT, EINVAL, ETIMEDOUT};
use virtio_gpu_svm::protocol::job::{
    OP_ATOMIC_ADD, OP_AXPY, OP_CHASE, OP_COPY, OP_FILL, OP_NOP, OP_REDUCE, OP_SEM_SIGNAL, OP_SEM_WAIT, Packet,
};

/// Names no job: the daemon counts them up from 1.
pub const NO_JOB: u64 = u64::MAX;
/// Octets that a loop moves between two looks at whether its job was stopped: some tens of microseconds.
const STRETCH: u64 = 1 << 20;
/// How often a semaphore is looked at: at first, and at last.
const POLL: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));

/// A ring's side of its thread.
pub struct Ring {
    /// Its number.
    pub index: u32,
    /// First address beyond the GPU's.
    pub end: u64,
    /// To the daemon.
    pub socket: Arc<OwnedFd>,
    /// Jobs, in order. The thread ends when nobody can send any more.
    pub jobs: Receiver<(u64, Vec<Packet>)>,
    /// What becomes of an access that was denied: whether it is abandoned.
    pub verdicts: Receiver<bool>,
    /// The job that is to end, or [`NO_JOB`].
    pub stopped: Arc<AtomicU64>,
    /// Its thread, for whoever releases it.
    pub tid: Arc<OnceLock<i32>>,
}

/// Why a job ended before its end.
struct Failure {
    errno: i32,
    addr: u64,
    access: Access,
}

impl Ring {
    /// Runs jobs.
    pub fn run(self) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.tid.get_or_init(|| tid);
        self.report(Report::Thread { ring: self.index, tid: tid.cast_unsigned() });
        while let Ok((id, packets)) = self.jobs.recv() {
            let (mut packet, mut failure) = (0, None);
            for operation in &packets {
                let job = Job { ring: &self, id, dst: operation.dst.get() };
                if let Err(error) = job.execute(operation) {
                    failure = Some(error);
                    break;
                }
                packet += 1;
            }
            let ring = self.index;
            self.report(match failure {
                None => Report::Done { ring, errno: 0, packet: 0, addr: 0, access: Access::Read },
                Some(Failure { errno, addr, access }) => {
                    Report::Done { ring, errno: errno.cast_unsigned(), packet, addr, access }
                }
            });
        }
    }

    fn report(&self, report: Report) {
        // A report that is lost is a job without an end; a worker that is lost ends its jobs.
        if message::send(self.socket.as_fd(), &report.encode(), &[], None, SendFlags::empty()).is_err() {
            std::process::exit(1);
        }
    }
}

/// The job that a ring's thread is at.
struct Job<'r> {
    ring: &'r Ring,
    id: u64,
    /// Destination of the packet that it is at.
    dst: u64,
}

impl Job<'_> {
    /// One packet. Its operands were checked.
    fn execute(&self, packet: &Packet) -> Result<(), Failure> {
        let Operands { dst, src, len, value, arg } = Operands::of(packet);
        let words = len / WORD;
        match packet.opcode.get() {
            OP_NOP => Ok(()),
            OP_COPY => self.touch(Loop::Copy, dst, src, len, value).map(drop),
            OP_FILL => self.touch(Loop::Fill, dst, 0, words, value).map(drop),
            OP_REDUCE => {
                let sum = self.touch(Loop::Sum, 0, src, words, 0)?;
                self.store(dst, sum)
            }
            OP_AXPY => self.touch(Loop::Axpy, dst, src, words, value).map(drop),
            OP_CHASE => self.chase(dst, src, value, arg),
            OP_ATOMIC_ADD => self.touch(Loop::Add, dst, 0, 1, value).map(drop),
            OP_SEM_WAIT => self.wait(dst, value),
            OP_SEM_SIGNAL => self.store(dst, value),
            _ => Err(Failure { errno: EINVAL, addr: 0, access: Access::Read }),
        }
    }

    fn chase(&self, dst: u64, src: u64, most: u64, ahead: u64) -> Result<(), Failure> {
        let (mut node, mut count, mut sum) = (src, 0u64, 0u64);
        while node != 0 && count < most {
            let errno = match node.checked_add(NODE) {
                _ if !node.is_multiple_of(WORD) => Some(EINVAL),
                Some(last) if last <= self.ring.end => None,
                _ => Some(EFAULT),
            };
            if let Some(errno) = errno {
                return Err(Failure { errno, addr: node, access: Access::Read });
            }
            let next = self.load(node)?;
            sum = sum.wrapping_add(self.load(node + WORD)?);
            count += 1;
            node = if next == 0 { 0 } else { next.wrapping_add(ahead) };
        }
        self.store(dst, count)?;
        self.store(dst + WORD, sum)
    }

    fn wait(&self, addr: u64, value: u64) -> Result<(), Failure> {
        let (mut pause, longest) = POLL;
        while self.load(addr)? < value {
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
        Ok(())
    }

    fn load(&self, addr: u64) -> Result<u64, Failure> {
        self.touch(Loop::Sum, 0, addr, 1, 0)
    }

    fn store(&self, addr: u64, value: u64) -> Result<(), Failure> {
        self.touch(Loop::Fill, addr, 0, 1, value).map(drop)
    }

    /// Runs a loop to its end, with as many stops as it takes.
    fn touch(&self, which: Loop, to: u64, from: u64, left: u64, value: u64) -> Result<u64, Failure> {
        let size = if which == Loop::Copy { 1 } else { WORD };
        let inside = |addr: u64| {
            left.checked_mul(size)
                .and_then(|bytes| addr.checked_add(bytes))
                .is_some_and(|last| last <= self.ring.end)
        };
        assert!(inside(to) && inside(from), "packet at {to:#x} and {from:#x} leaves the GPU's space");
        let mut registers = Registers::new(to, from, 0, value);
        let mut left = left;
        while left > 0 {
            self.check_stopped()?;
            registers.left = left.min(STRETCH / size);
            left -= registers.left;
            self.finish_stretch(which, &mut registers)?;
        }
        Ok(registers.value)
    }

    fn finish_stretch(&self, which: Loop, registers: &mut Registers) -> Result<(), Failure> {
        loop {
            // SAFETY: all that is touched lies below `end`, which is the GPU's; signals were installed before any ring.
            match unsafe { unit::run(which, registers) } {
                Ok(()) => return Ok(()),
                Err(Stop::Denied { addr, write }) => {
                    self.ring.report(Report::Denied { ring: self.ring.index, addr, write });
                    let access = if write { Access::Write } else { Access::Read };
                    if self.ring.verdicts.recv().unwrap_or(true) {
                        return Err(Failure { errno: EFAULT, addr, access });
                    }
                }
                Err(Stop::Beyond { addr }) => {
                    self.ring.report(Report::Lost { addr });
                    return Err(Failure { errno: EFAULT, addr, access: Access::Read });
                }
                // Unless it was meant for the job before. The daemon knows what this one was parked at.
                Err(Stop::Abandoned) => self.check_stopped()?,
            }
        }
    }

    fn check_stopped(&self) -> Result<(), Failure> {
        if self.ring.stopped.load(Ordering::Acquire) != self.id {
            return Ok(());
        }
        Err(Failure { errno: ETIMEDOUT, addr: self.dst, access: Access::Read })
    }
}
