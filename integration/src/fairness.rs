//! What one guest's operations cost beside guests that do the worst they may: each operation timed alone, and then beside
//! each kind of hostile guest, on a daemon of its own with one soft device of one engine.
//!
//! Figures, not tests: how long something takes on this machine now. What holds on any machine (whose turn it is) is
//! tested by counting. Hostile drivers run at the lowest priority; what the daemon spends is told apart.

mod hostile;
mod victim;

pub use hostile::{HOSTILE, Hostility, be_hostile};

use crate::svmd::{Options, Svmd};
use anyhow::{Context, Result, ensure};
use hostile::Crowd;
use rustix::process::{Pid, Signal, kill_process};
use std::fmt;
use std::time::Duration;
use victim::{Operation, Victim};

/// The longest that another guest's slice may delay an operation by, beside half of what it takes alone.
pub const SLICE: Duration = Duration::from_micros(30);
/// Clock ticks of /proc a second, on every Linux that runs this.
const TICKS: u64 = 100;

/// Times of one operation.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    count: usize,
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Times {
    fn of(mut samples: Vec<Duration>) -> Result<Self> {
        samples.sort_unstable();
        let count = samples.len();
        let at = |share: usize| samples.get((count * share / 100).min(count.saturating_sub(1))).copied();
        let (p50, p99) = (at(50), at(99));
        let (p50, p99, max) = (p50.context("no samples")?, p99.context("no samples")?, samples[count - 1]);
        Ok(Self { count, p50, p99, max })
    }
}

/// One operation beside one kind of company.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    hostility: Hostility,
    operation: Operation,
    times: Times,
    alone: Times,
    /// CPU time of the daemon, in hundredths of one CPU.
    daemon_cpu: u64,
}

/// The slowest but one in a hundred.
#[derive(Clone, Copy, Debug)]
pub struct Slow {
    /// Of which operation.
    pub operation: &'static str,
    /// Beside which company.
    pub hostility: &'static str,
    /// Beside it.
    pub beside: Duration,
    /// Alone.
    pub alone: Duration,
}

impl Slow {
    /// Whether both are about the same operation beside the same company.
    pub fn is_about(&self, other: &Self) -> bool {
        (self.operation, self.hostility) == (other.operation, other.hostility)
    }
}

impl Row {
    /// What [`Self::holds`] judges by.
    pub fn p99(&self) -> Slow {
        let (operation, hostility) = (self.operation.name(), self.hostility.name());
        Slow { operation, hostility, beside: self.times.p99, alone: self.alone.p99 }
    }

    /// Whether the slow ones are no slower than 1.5 times those alone and a slice.
    pub fn holds(&self) -> bool {
        self.times.p99 <= self.alone.p99.mul_f64(1.5) + SLICE
    }
}

/// What stands above rows.
pub const HEADER: &str =
    "beside       operation    times    p50 us    p99 us    max us   ratio  cpu %  within";

/// Measures the operations alone and beside each of these, each for so long, and tells each row as it comes. In short
/// rounds, alone and beside in turn: a machine's moods last longer than one of these.
///
/// # Errors
/// The daemon, or one of the guests, fails.
pub fn run(
    hostilities: &[Hostility],
    each: Duration,
    engines: u32,
    mut tell: impl FnMut(&Row),
) -> Result<()> {
    for hostility in [Hostility::None].iter().chain(hostilities) {
        let mut alone = Scene::set(Hostility::None, engines)?;
        let mut beside = Scene::set(*hostility, engines)?;
        for _ in 0..ROUNDS {
            beside.signal(Signal::STOP)?;
            alone.measure(each / ROUNDS)?;
            beside.signal(Signal::CONT)?;
            beside.measure(each / ROUNDS)?;
        }
        let daemon_cpu = beside.cpu_share()?;
        for ((operation, times), (_, alone)) in beside.samples.into_iter().zip(alone.samples) {
            let (times, alone) = (Times::of(times)?, Times::of(alone)?);
            tell(&Row { hostility: *hostility, operation, times, alone, daemon_cpu });
        }
    }
    Ok(())
}

/// Rounds of each measurement, alone and beside.
const ROUNDS: u32 = 10;

/// A daemon, the guest that is measured, and its company.
struct Scene {
    victim: Victim,
    samples: Vec<(Operation, Vec<Duration>)>,
    measured: Duration,
    ticks: u64,
    crowd: Crowd,
    daemon: Svmd,
}

impl Scene {
    fn set(hostility: Hostility, engines: u32) -> Result<Self> {
        let guests = hostile::guests().chain(["victim".to_owned()]).collect();
        let options = Options { guests, devices: 1, engines, ledger: 0, ..Options::default() };
        let daemon = Svmd::launch(&options)?;
        // It answers when all guests' sockets are there.
        daemon.call("guest.list", serde_json::json!({}))?;
        let victim = Victim::connect(&daemon.socket("victim"))?;
        let crowd = Crowd::gather(&daemon, hostility)?;
        Ok(Self { victim, samples: vec![], measured: Duration::ZERO, ticks: 0, crowd, daemon })
    }
    fn signal(&mut self, signal: Signal) -> Result<()> {
        self.crowd.signal(signal)?;
        let pid = Pid::from_raw(self.daemon.pid().cast_signed()).context("no process")?;
        kill_process(pid, signal).context("cannot signal svmd")
    }
    fn measure(&mut self, how_long: Duration) -> Result<()> {
        // Caches and sleeping threads are not what is measured.
        self.victim.run(how_long / 10)?;
        let before = cpu_ticks(self.daemon.pid())?;
        for (n, (operation, times)) in self.victim.run(how_long)?.into_iter().enumerate() {
            match self.samples.get_mut(n) {
                Some((_, all)) => all.extend(times),
                None => self.samples.push((operation, times)),
            }
        }
        self.ticks += cpu_ticks(self.daemon.pid())?.saturating_sub(before);
        self.measured += how_long;
        Ok(())
    }
    /// CPU time of the daemon, in hundredths of one CPU.
    fn cpu_share(&self) -> Result<u64> {
        Ok(self.ticks * 100 * 1000 / TICKS / u64::try_from(self.measured.as_millis())?.max(1))
    }
}

/// What a process has used so far.
fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15; the second one, the name, is in brackets and may contain anything.
    let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
    let times: Vec<u64> = fields.split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    ensure!(times.len() == 2, "no times in {stat:?}");
    Ok(times.iter().sum())
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Times { count, p50, p99, max } = self.times;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        write!(
            f,
            "{:<12} {:<10} {:>7} {:>9.0} {:>9.0} {:>9.0} {:>7.2} {:>6}  {}",
            self.hostility.name(),
            self.operation.name(),
            count,
            us(p50),
            us(p99),
            us(max),
            p99.as_secs_f64() / self.alone.p99.as_secs_f64(),
            self.daemon_cpu,
            if self.holds() { "yes" } else { "no" },
        )
    }
}
