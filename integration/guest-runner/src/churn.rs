//! Load that never rests: jobs that write to memory on every device, from the first round until the connection is cut.
//!
//! A round: a new arena is shown to every device, on each a job fills a part of it, which faults on every window of it,
//! because nothing of it is resident; what the jobs wrote is checked; the arena goes. Meanwhile a second thread keeps jobs
//! in flight that fill another arena, which stays. So there is always something that writes to pinned memory, something
//! that waits for an answer, and memory on its way in or out.

use guest_agent::client::{Arena, Client, Error, Vm, packet};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of the arena that stays; every job there fills it whole.
pub const LASTING_BYTES: usize = 4 << 20;
/// Bytes of the arena of a round.
const PASSING_BYTES: usize = 1 << 20;
/// Jobs in flight that fill the arena that stays, on each device.
const DEPTH: usize = 2;
/// How often each of them fills it: together they outlast whoever kills the agent.
const FILLS: usize = 512;
/// Where GPU VMs show the arenas; nothing else is near.
const LASTING_GPU: u64 = 0x20_0000_0000;
const PASSING_GPU: u64 = 0x21_0000_0000;
/// Timelines.
const LASTING_RING: u32 = 2;
const PASSING_RING: u32 = 3;

/// Why it came to an end.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The connection or the context has ended: what a killed agent looks like.
    #[error("cut off")]
    CutOff(#[source] Error),
    /// Something else.
    #[error(transparent)]
    Refused(Error),
    /// A job has ended well, and its bytes are not there.
    #[error("round {round}: the word at {offset:#x} is {found:#x}, not {expected:#x}")]
    Wrong {
        /// The round.
        round: u64,
        /// In the arena.
        offset: usize,
        /// What stands there.
        found: u64,
        /// What the job wrote.
        expected: u64,
    },
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        match error {
            Error::HungUp | Error::Socket(_) | Error::Lost { .. } => Self::CutOff(error),
            other => Self::Refused(other),
        }
    }
}

/// Works until it cannot go on; says after which round, and why. `begun` is called after the first round.
pub fn run(client: &Client, vms: &[Vm], begun: impl FnOnce()) -> (u64, End) {
    let over = AtomicBool::new(false);
    let (mut begun, mut rounds) = (Some(begun), 0);
    std::thread::scope(|scope| {
        let filler = scope.spawn(|| keep_filling(client, vms, &over));
        let end = loop {
            if let Err(end) = round(client, vms, rounds) {
                break end;
            }
            rounds += 1;
            if let Some(begun) = begun.take() {
                begun();
            }
        };
        over.store(true, Ordering::Relaxed);
        match (end, filler.join()) {
            (End::CutOff(_), Ok(Err(other))) => (rounds, other),
            (end, _) => (rounds, end),
        }
    })
}

fn round(client: &Client, vms: &[Vm], round: u64) -> Result<(), End> {
    let arena = client.arena(PASSING_BYTES, None)?;
    let part = PASSING_BYTES / vms.len().max(1) / 8 * 8;
    let mut jobs = Vec::new();
    for (vm, start) in vms.iter().zip((0..).step_by(part)) {
        vm.bind_userptr(PASSING_GPU, arena.address(), bytes(PASSING_BYTES), 0)?;
        let word = u64::from(client.ctx_id()) << 48 | u64::from(vm.dev_id()) << 32 | (round + 1);
        let fill = packet::fill(PASSING_GPU + bytes(start), bytes(part), word);
        jobs.push((start, word, vm.exec(PASSING_RING, &[fill], 0)?));
    }
    for (start, word, job) in jobs {
        job.wait()?;
        check(&arena, round, start..start + part, word)?;
    }
    for vm in vms {
        vm.unbind(PASSING_GPU, bytes(PASSING_BYTES))?;
    }
    Ok(arena.free()?)
}

fn check(arena: &Arena, round: u64, range: std::ops::Range<usize>, expected: u64) -> Result<(), End> {
    let mut found = vec![0; range.len()];
    arena.read(range.start, &mut found);
    let words = found.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    match range.step_by(8).zip(words).find(|(_, found)| *found != expected) {
        None => Ok(()),
        Some((offset, found)) => Err(End::Wrong { round, offset, found, expected }),
    }
}

/// Keeps jobs in flight on the arena that stays, on every device.
fn keep_filling(client: &Client, vms: &[Vm], over: &AtomicBool) -> Result<(), End> {
    let arena = client.arena(LASTING_BYTES, None)?;
    for vm in vms {
        vm.bind_userptr(LASTING_GPU, arena.address(), bytes(LASTING_BYTES), 0)?;
    }
    let fill = packet::fill(LASTING_GPU, bytes(LASTING_BYTES), u64::from(client.ctx_id()));
    let mut in_flight = VecDeque::new();
    while !over.load(Ordering::Relaxed) {
        for vm in vms {
            in_flight.push_back(vm.exec(LASTING_RING, &[fill; FILLS], 0)?);
        }
        while in_flight.len() > DEPTH * vms.len()
            && let Some(oldest) = in_flight.pop_front()
        {
            oldest.wait()?;
        }
    }
    Ok(())
}

fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
