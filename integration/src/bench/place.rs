//! Where threads run, and how they wait: the placement that stands beside each figure.

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::collections::HashSet;
use std::fmt;

/// Cores of both sides, as far as this process may have them.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// The frontend's, or the guest's.
    pub here: CpuSet,
    /// The backend's.
    there: CpuSet,
    /// The backend's where it has two.
    two: CpuSet,
    /// How many there are for both sides, up to 3.
    count: usize,
    /// Of all that this process may use.
    all: CpuSet,
}

impl Cores {
    /// The first ones that this process may use; the same ones for both sides where it has no more.
    ///
    /// # Errors
    /// The kernel tells none.
    pub fn find() -> Result<Self> {
        let all = sched_getaffinity(None).context("affinity")?;
        let usable: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| all.is_set(*core)).collect();
        let usable = apart(usable, siblings);
        let (first, last) = (*usable.first().context("no core")?, usable.len() - 1);
        let set = |cores: &[usize]| {
            let mut set = CpuSet::new();
            cores.iter().for_each(|core| set.set(*core));
            set
        };
        let there = set(&[usable[last.min(1)]]);
        let two = set(&[usable[last.min(1)], usable[last]]);
        Ok(Self { here: set(&[first]), there, two, count: usable.len(), all })
    }
    /// Both sides' cores, for people.
    pub fn describe(&self) -> String {
        let list = |set: &CpuSet| {
            let cores = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).map(|core| core.to_string());
            cores.collect::<Vec<_>>().join(" and ")
        };
        let Self { here, there, two, all, .. } = self;
        format!(
            "frontends on CPU {}, backends on CPU {} (three cores: {}), of {} CPUs",
            list(here),
            list(there),
            list(two),
            all.count()
        )
    }
    /// Whether there is one for each side.
    pub fn are_two(&self) -> bool {
        self.count > 1
    }
    /// Why there is no such placement here.
    pub fn lack(&self, place: Place) -> Option<String> {
        let lacks = self.count < place.cores();
        lacks.then(|| format!("this process may use {} of {} cores only", self.count, place.cores()))
    }
    /// Does something, and what it starts, there; then this thread is back on the frontend's.
    ///
    /// # Errors
    /// What is done fails, or the kernel refuses the core.
    pub fn on<T>(&self, core: CpuSet, act: impl FnOnce() -> Result<T>) -> Result<T> {
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
    pub fn of(&self, place: Place) -> CpuSet {
        match place {
            Place::SameCore => self.here,
            Place::TwoCores | Place::Polled => self.there,
            Place::ThreeCores => self.two,
        }
    }
}

/// Three of these at most, and of those that are threads of one core only the first, as long as others are left.
fn apart(usable: Vec<usize>, core: impl Fn(usize) -> String) -> Vec<usize> {
    let mut cores = HashSet::new();
    let (mut firsts, others): (Vec<_>, Vec<_>) =
        usable.into_iter().partition(|thread| cores.insert(core(*thread)));
    firsts.extend(others);
    firsts.truncate(3);
    firsts
}

/// The threads of a core, as the kernel names them.
fn siblings(thread: usize) -> String {
    let file = format!("/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list");
    std::fs::read_to_string(file).unwrap_or_else(|_| thread.to_string())
}

/// From now on this thread, and what it starts, runs there.
///
/// # Errors
/// The kernel refuses.
pub fn pin(core: CpuSet) -> Result<()> {
    sched_setaffinity(None, &core).context("affinity")
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
    /// The same, and the backend has a core for its engine and one for its queues.
    ThreeCores,
}

impl Place {
    /// Those in which each side has one core.
    pub const ALL: [Self; 3] = [Self::TwoCores, Self::SameCore, Self::Polled];

    /// Whether the frontend looks until something is there.
    pub fn polls(self) -> bool {
        matches!(self, Self::Polled | Self::ThreeCores)
    }

    fn cores(self) -> usize {
        match self {
            Self::SameCore => 1,
            Self::TwoCores | Self::Polled => 2,
            Self::ThreeCores => 3,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoCores => "blocking, two cores",
            Self::SameCore => "blocking, same core",
            Self::Polled => "polled, two cores",
            Self::ThreeCores => "polled, three cores",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_one_core_come_last() {
        let pairs = |thread: usize| (thread / 2).to_string();
        assert_eq!(apart(vec![0, 1, 2, 3, 4, 5], pairs), [0, 2, 4]);
        assert_eq!(apart(vec![2, 3, 4], pairs), [2, 4, 3]);
        assert_eq!(apart(vec![6, 7], pairs), [6, 7]);
        assert_eq!(apart(vec![1], pairs), [1]);
    }
}
