//! Where threads run, and how they wait: the placement that stands beside each figure.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fmt;

/// Two cores, as far as this process may have them.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// The frontend's, or the guest's.
    pub here: usize,
    /// The backend's.
    pub there: usize,
    /// Of all that this process may use.
    all: CpuSet,
}

impl Cores {
    /// The first two that this process may use; the same one twice where it has no more.
    ///
    /// # Errors
    /// The kernel tells none.
    pub fn find() -> Result<Self> {
        let all = sched_getaffinity(None).context("affinity")?;
        let mut usable = (0..CpuSet::MAX_CPU).filter(|core| all.is_set(*core));
        let here = usable.next().context("no core")?;
        Ok(Self { here, there: usable.next().unwrap_or(here), all })
    }
    /// Whether there are two.
    pub fn are_two(&self) -> bool {
        self.here != self.there
    }
    /// Does something, and what it starts, on one core; then this thread is back on the frontend's.
    ///
    /// # Errors
    /// What is done fails, or the kernel refuses the core.
    pub fn on<T>(&self, core: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        pin(core)?;
        let done = act();
        pin(self.here)?;
        done
    }
    /// This thread may run anywhere again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn release(&self) -> Result<()> {
        sched_setaffinity(None, &self.all).context("affinity")
    }
    /// The backend's core in a placement.
    pub fn of(&self, place: Place) -> usize {
        match place {
            Place::SameCore => self.here,
            Place::TwoCores | Place::Polled => self.there,
        }
    }
}

/// From now on this thread, and what it starts, runs on one core.
///
/// # Errors
/// The kernel refuses.
pub fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("cannot run on core {core}"))
}

/// How two sides stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A core each; who waits sleeps.
    TwoCores,
    /// One core for both; who waits sleeps.
    SameCore,
    /// A core each; the frontend looks until something is there.
    Polled,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::TwoCores, Self::SameCore, Self::Polled];
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoCores => "blocking, two cores",
            Self::SameCore => "blocking, same core",
            Self::Polled => "polled, two cores",
        })
    }
}
