//! The storm: many processes of many guests, all at the same addresses, fault at random on all devices at once; then
//! three ledgers are compared and every word that a job wrote is checked.
//!
//! One seed decides everything: which pages, in which order, with which accesses and lengths. `workload` makes a
//! process' share of it and says what must come out.

mod workload;

use crate::frontend::Profile;
use crate::frontend::ram::{GuestRam, LOW_RESERVED, Layout};
use crate::frontend::vmm::Vmm;
use crate::guest::{SimulatedGuest, SimulatedProcess};
use crate::ledger::{Answered, Comparison, Touch, compare};
use crate::svmd::{DeviceKind, Options, Svmd};
use anyhow::{Context, Result, ensure};
use guest_agent::agent::AgentOptions;
use guest_agent::driver::Rings;
use std::fmt;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use workload::{ARENA, GPU_ARENA, Workload};

/// Jobs' packets at most, so that a GPU VM has several jobs behind each other.
const JOB_PACKETS: usize = 64;

/// How large a storm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Guests.
    pub guests: usize,
    /// Contexts of each.
    pub contexts: usize,
    /// Host devices; each context has a GPU VM on all.
    pub devices: usize,
    /// What the devices are.
    pub kind: DeviceKind,
    /// Faults in all.
    pub faults: u64,
}

impl Default for Size {
    fn default() -> Self {
        Self { guests: 4, contexts: 64, devices: 2, kind: DeviceKind::Soft, faults: 100_000 }
    }
}

impl Size {
    /// Faults of a GPU VM, counted over all guests, contexts and devices.
    fn share(&self, guest: usize, context: usize, device: usize) -> u64 {
        let vms = (self.guests * self.contexts * self.devices) as u64;
        let index = ((guest * self.contexts + context) * self.devices + device) as u64;
        self.faults / vms + u64::from(index < self.faults % vms)
    }
}

/// What came of a storm.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What decided it.
    pub seed: u64,
    /// How large it was.
    pub size: Size,
    /// The ledgers.
    pub comparison: Comparison,
    /// Words that jobs wrote or left alone and that were looked at.
    pub words_checked: u64,
    /// Words that were not as they must be.
    pub mismatches: u64,
    /// Most GPU VMs at any time that waited for their guests.
    pub peak_pending_vms: u64,
    /// Accesses that joined a fault that was pending already; by construction none can.
    pub coalesced: u64,
    /// Faults sent back because too many were pending.
    pub throttled: u64,
    /// Answers that the daemon had no fault for.
    pub stale_answers: u64,
    /// From the first job's launch to the last one's end.
    pub elapsed: Duration,
}

impl Summary {
    /// Whether everything was as it must be.
    pub fn is_clean(&self) -> bool {
        self.comparison.agrees()
            && self.comparison.raised == self.size.faults
            && self.mismatches == 0
            && self.stale_answers == 0
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Size { guests, contexts, devices, faults, .. } = self.size;
        writeln!(
            f,
            "storm, seed {}: {guests} guests x {contexts} contexts x {devices} devices, {faults} faults in {:.1} s",
            self.seed,
            self.elapsed.as_secs_f64()
        )?;
        writeln!(f, "{}", self.comparison)?;
        writeln!(
            f,
            "{} words checked, {} wrong; at most {} GPU VMs waited at once",
            self.words_checked, self.mismatches, self.peak_pending_vms
        )?;
        write!(
            f,
            "{} joined, {} throttled, {} stale answers",
            self.coalesced, self.throttled, self.stale_answers
        )
    }
}

/// Runs a storm against a daemon of its own.
///
/// # Errors
/// Something did not come up, or a job failed. Wrong results are in the summary, not an error.
pub fn run(seed: u64, size: Size) -> Result<Summary> {
    ensure!(
        (1..=workload::MAX_DEVICES).contains(&size.devices),
        "1 to {} devices can share a window",
        workload::MAX_DEVICES
    );
    ensure!(size.share(size.guests - 1, size.contexts - 1, size.devices - 1) >= 2, "too few faults for all");
    let names: Vec<String> = (0..size.guests).map(|guest| format!("vm{guest}")).collect();
    let ledger = usize::try_from(size.faults * 2)?;
    let engines = if size.kind == DeviceKind::Soft { 2 } else { 1 };
    let (guests, devices, kind) = (names.clone(), size.devices, size.kind);
    let options = Options { guests, devices, kind, engines, ledger, ..Options::default() };
    let daemon = Svmd::launch(&options)?;
    storm(&daemon, seed, size, &names)
        .with_context(|| format!("seed {seed}; the daemon's log:\n{}", daemon.log()))
}

fn storm(daemon: &Svmd, seed: u64, size: Size, names: &[String]) -> Result<Summary> {
    let start = Barrier::new(size.guests + 1);
    let (outcomes, elapsed) = std::thread::scope(|scope| {
        let guests: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(guest, name)| {
                let start = &start;
                scope.spawn(move || {
                    let running = Running::set_up(daemon, name, guest, seed, size);
                    // The others must not wait for one that could not be set up.
                    start.wait();
                    running?.finish(size)
                })
            })
            .collect();
        start.wait();
        let begin = Instant::now();
        let outcomes: Result<Vec<Outcome>> = guests
            .into_iter()
            .map(|guest| guest.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a guest's thread panicked"))))
            .collect();
        outcomes.map(|outcomes| (outcomes, begin.elapsed()))
    })?;

    let mut all = Outcome::default();
    for outcome in outcomes {
        all.answers.extend(outcome.answers);
        all.touches.extend(outcome.touches);
        all.words += outcome.words;
        all.mismatches += outcome.mismatches;
    }
    Ok(Summary {
        seed,
        size,
        comparison: compare(&daemon.ledgers()?, &all.answers, &all.touches),
        words_checked: all.words,
        mismatches: all.mismatches,
        peak_pending_vms: daemon.stat("/peak_pending_vms")?,
        coalesced: daemon.stat("/counters/faults_coalesced")?,
        throttled: daemon.stat("/counters/faults_throttled")?,
        stale_answers: daemon.stat("/counters/answers_stale")?,
        elapsed,
    })
}

/// What one guest saw.
#[derive(Default)]
struct Outcome {
    answers: Vec<Answered>,
    touches: Vec<Touch>,
    words: u64,
    mismatches: u64,
}

/// A guest with its processes, ready to launch jobs.
struct Running {
    guest: SimulatedGuest,
    processes: Vec<(SimulatedProcess, Workload)>,
}

impl Running {
    fn set_up(daemon: &Svmd, name: &str, guest: usize, seed: u64, size: Size) -> Result<Self> {
        let share = |context| -> Vec<u64> {
            (0..size.devices).map(|device| size.share(guest, context, device)).collect()
        };
        let workloads: Vec<Workload> = (0..size.contexts)
            .map(|context| {
                let own = seed ^ ((guest as u64) << 48) ^ ((context as u64 + 1) << 24);
                Workload::new(own, &share(context))
            })
            .collect();
        let arenas: u64 = workloads.iter().map(Workload::arena_bytes).sum();
        // A quarter is the drivers' zone; what nobody touches costs nothing.
        let bytes = (arenas * 3 / 2).next_multiple_of(LOW_RESERVED) + 16 * Rings::BYTES as u64;
        let (low_bytes, high_bytes) =
            (bytes / 2 / LOW_RESERVED * LOW_RESERVED, bytes.next_multiple_of(LOW_RESERVED));
        let low_bytes = low_bytes.clamp(8 * LOW_RESERVED, 3 << 30);
        let ram = GuestRam::new(Layout::WithHole { low_bytes, high_bytes }, seed)?;
        let profile = [Profile::Qemu, Profile::CloudHypervisor][guest % 2];
        let vmm = Vmm::without_cpu(&daemon.socket(name), &ram, profile)?;
        let options = AgentOptions {
            ledger_entries: usize::try_from(size.faults * 2)?,
            total_arena_bytes: u64::MAX,
            context_arena_bytes: u64::MAX,
            ..AgentOptions::default()
        };
        let guest = SimulatedGuest::start(name, vmm, options)?;
        let mut processes = vec![];
        for (index, workload) in workloads.into_iter().enumerate() {
            let mut process = guest.spawn(&format!("storm-{index}"))?;
            process.map_memory(ARENA, workload.arena_bytes())?;
            workload.write_initial(&process)?;
            for device in 0..size.devices {
                let dev_id = u32::try_from(device)?;
                process.create_vm(dev_id)?;
                process.bind(dev_id, GPU_ARENA, ARENA, workload.arena_bytes())?;
            }
            processes.push((process, workload));
        }
        Ok(Self { guest, processes })
    }

    /// Launches everything, waits for it, and looks at what came out.
    fn finish(self, size: Size) -> Result<Outcome> {
        let mut jobs = vec![0; self.processes.len()];
        for device in 0..size.devices {
            for ((process, workload), jobs) in self.processes.iter().zip(&mut jobs) {
                for packets in workload.packets(device).chunks(JOB_PACKETS) {
                    process.exec(u32::try_from(device)?, 0, *jobs, packets)?;
                    *jobs += 1;
                }
            }
        }
        let mut outcome = Outcome::default();
        for ((process, workload), jobs) in self.processes.iter().zip(jobs) {
            for _ in 0..jobs {
                process.finish_job()?;
            }
            let (words, mismatches) = workload.check(process)?;
            outcome.words += words;
            outcome.mismatches += mismatches;
            outcome.touches.extend(workload.touches(self.guest.name(), process.ctx_id()));
        }
        let devices: Vec<usize> = (0..size.devices).collect();
        outcome.answers = self.guest.answers(&devices)?;
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_all_faults() {
        let size = Size { guests: 3, contexts: 5, devices: 2, faults: 1003, ..Size::default() };
        let mut sum = 0;
        for guest in 0..3 {
            for context in 0..5 {
                for device in 0..2 {
                    sum += size.share(guest, context, device);
                }
            }
        }
        assert_eq!(sum, 1003);
    }
}
