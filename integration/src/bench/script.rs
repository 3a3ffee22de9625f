//! A list of commands that is offered over and over, so many in flight. Backends answer in order here, and each answer is
//! looked at.

use super::ring::{Buffer, Driver, Ring};
use anyhow::{Context, Result, ensure};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::gpu::{VIRTIO_GPU_RESP_OK_CAPSET_INFO, VIRTIO_GPU_RESP_OK_NODATA};

/// What an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This word first.
    Kind(u32),
    /// A response of ours without data, with status 0.
    Accepted,
}

impl Answer {
    /// To a no-op of ours.
    pub const CAPSET_INFO: Self = Self::Kind(VIRTIO_GPU_RESP_OK_CAPSET_INFO);
    /// To anything that virtio-gpu carries out.
    pub const NO_DATA: Self = Self::Kind(VIRTIO_GPU_RESP_OK_NODATA);
}

struct Command {
    head: u16,
    request_at: u64,
    answer_at: u64,
    answer: Answer,
}

/// A list of commands.
#[derive(Default)]
pub struct Script {
    commands: Vec<Command>,
    offered: usize,
    reaped: usize,
}

/// What a script has done.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Commands.
    pub commands: usize,
    /// In this time.
    pub elapsed: Duration,
}

impl Done {
    /// Of each.
    pub fn seconds_each(&self) -> f64 {
        self.elapsed.as_secs_f64() / self.commands as f64
    }
}

impl Script {
    /// Adds a command for ring 0. Its bytes are in buffers that were placed.
    ///
    /// # Errors
    /// Guest memory or the ring is full.
    pub fn add(&mut self, driver: &Driver, buffers: &[Buffer], room: u64, answer: Answer) -> Result<()> {
        let request_at = buffers.first().context("a command without bytes")?.at;
        let (head, answer_at) = driver.place_chain(self.commands.len(), buffers, room)?;
        self.commands.push(Command { head, request_at, answer_at, answer });
        Ok(())
    }

    /// How many commands there are.
    pub fn len(&self) -> usize {
        self.commands.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// Keeps `depth` commands in flight for so long, and until the script has come to its end again. `prepare` is told
    /// each command's place before it is offered.
    ///
    /// # Errors
    /// A command fails.
    pub fn run(
        &mut self,
        ring: &mut Ring,
        depth: usize,
        how_long: Duration,
        mut prepare: impl FnMut(usize) -> Result<()>,
    ) -> Result<Done> {
        let depth = depth.min(self.commands.len());
        let (begin, before) = (Instant::now(), self.reaped);
        loop {
            let over = begin.elapsed() >= how_long;
            while self.offered - self.reaped < depth && !(over && self.offered.is_multiple_of(self.len())) {
                prepare(self.offered % self.len())?;
                self.offer(ring)?;
            }
            ring.publish()?;
            if self.offered == self.reaped {
                return Ok(Done { commands: self.reaped - before, elapsed: begin.elapsed() });
            }
            ring.await_used()?;
            while self.reap(ring)? {}
        }
    }

    /// Carries out the next command alone, and times it.
    ///
    /// # Errors
    /// It fails.
    pub fn step(&mut self, ring: &mut Ring) -> Result<Duration> {
        let begin = Instant::now();
        self.offer(ring)?;
        ring.publish()?;
        ring.await_used()?;
        let elapsed = begin.elapsed();
        ensure!(self.reap(ring)?, "nothing was given back");
        Ok(elapsed)
    }

    /// Sends the next command and waits for none, unless `most` are in flight.
    ///
    /// # Errors
    /// A command fails.
    pub fn send(&mut self, ring: &mut Ring, most: usize) -> Result<()> {
        while self.reap(ring)? {}
        while self.offered - self.reaped >= most {
            ring.await_used()?;
            self.reap(ring)?;
        }
        self.offer(ring)?;
        ring.publish()
    }

    /// The same with other bytes in place of the next command's, which had one buffer, and one with room for them.
    ///
    /// # Errors
    /// A command fails.
    pub fn send_new(&mut self, ring: &mut Ring, bytes: &[u8]) -> Result<()> {
        while self.offered - self.reaped >= self.commands.len() {
            ring.await_used()?;
            self.reap(ring)?;
        }
        let command = &self.commands[self.offered % self.commands.len()];
        ring.ram().write(command.request_at, bytes)?;
        ring.set_len(command.head, u32::try_from(bytes.len())?)?;
        self.send(ring, self.commands.len())
    }

    /// Takes what was given back, and sends as much as makes `depth` in flight; waits for nothing.
    ///
    /// # Errors
    /// A command fails.
    pub fn pump(&mut self, ring: &mut Ring, depth: usize) -> Result<()> {
        while self.reap(ring)? {}
        while self.offered - self.reaped < depth {
            self.offer(ring)?;
        }
        ring.want_interrupts(false)?;
        ring.publish()
    }

    /// Commands that were answered.
    pub fn done(&self) -> usize {
        self.reaped
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// A command fails.
    pub fn drain(&mut self, ring: &mut Ring) -> Result<()> {
        while self.offered > self.reaped {
            ring.await_used()?;
            self.reap(ring)?;
        }
        Ok(())
    }

    /// A word of the answer to a command, at this offset.
    ///
    /// # Errors
    /// There is no such command.
    pub fn answer_word(&self, ring: &Ring, place: usize, offset: u64) -> Result<u64> {
        let command = self.commands.get(place).context("no such command")?;
        Ok(ring.ram().atomic::<AtomicU64>(command.answer_at + offset)?.load(Ordering::Relaxed))
    }

    fn offer(&mut self, ring: &mut Ring) -> Result<()> {
        let command = &self.commands[self.offered % self.commands.len()];
        let kind: &AtomicU32 = ring.ram().atomic(command.answer_at)?;
        kind.store(0, Ordering::Relaxed);
        ring.offer(command.head)?;
        self.offered += 1;
        Ok(())
    }

    fn reap(&mut self, ring: &mut Ring) -> Result<bool> {
        let Some((head, _)) = ring.take_used()? else { return Ok(false) };
        let command = &self.commands[self.reaped % self.commands.len()];
        ensure!(head == u32::from(command.head), "chain {head} comes before {}", command.head);
        let word =
            |at: u64| Ok::<u32, anyhow::Error>(ring.ram().atomic::<AtomicU32>(at)?.load(Ordering::Relaxed));
        let (kind, status) = (word(command.answer_at)?, word(command.answer_at + 24)?);
        let good = match command.answer {
            Answer::Kind(wanted) => kind == wanted,
            Answer::Accepted => kind == VIRTIO_GPU_RESP_OK_NODATA && status == 0,
        };
        let place = self.reaped % self.commands.len();
        ensure!(good, "command {place} is answered {kind:#x}, status {}", status.cast_signed());
        self.reaped += 1;
        Ok(true)
    }
}
