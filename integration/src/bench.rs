//! `cargo bench-report`: the metrics P1 to P12 (see the README), each measured in turn with its reference, so that what this
//! machine does to the one it does to the other.
//!
//! A metric is a function from [`Bench`] (how long, how often, where) to rows. What is measured in rings runs against a
//! daemon of its own; what is said to be in process
//! drives the [`library`](crate::library). Nobody but `main` prints.
//!
//! * [`report`]: rows, figures, goals, and the alternation of both sides.
//! * [`place`]: cores and ways to wait; [`ring`], [`script`]: the frontend; [`svm`]: our side of it; [`peers`]: the others.
//! * [`events`]: records; [`uffd`]: a CPU's own faults.
//! * [`roundtrip`], [`bind`], [`fault`], [`storm`], [`scale`], [`bully`], [`copy`]: the metrics.

pub mod bind;
pub mod bully;
pub mod copy;
pub mod events;
pub mod fault;
pub mod peers;
pub mod place;
pub mod report;
pub mod ring;
pub mod roundtrip;
pub mod scale;
pub mod script;
pub mod storm;
pub mod svm;
pub mod uffd;

use anyhow::Result;
use place::Cores;
use report::{Row, median};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How to measure.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The daemon's program.
    pub svmd: PathBuf,
    /// This program, which is its own null backend.
    pub program: PathBuf,
    /// Where.
    pub cores: Cores,
    /// How often, at least.
    pub rounds: usize,
    /// How long each side of a round.
    pub slice: Duration,
    /// Fewer sizes.
    pub quick: bool,
    /// In place of a metric's own sizes.
    pub sizes: Option<Vec<u64>>,
}

impl Bench {
    /// The sizes that were asked for, else those of the metric: all, or the quick ones.
    pub fn sizes(&self, all: &[u64], quick: &[u64]) -> Vec<u64> {
        let own = if self.quick { quick } else { all };
        self.sizes.clone().unwrap_or_else(|| own.to_vec())
    }

    /// Measures again and again until a slice is over: the median.
    ///
    /// # Errors
    /// What is measured fails.
    pub fn repeat(&self, mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
        let begin = Instant::now();
        let mut figures = vec![];
        while figures.is_empty() || begin.elapsed() < self.slice {
            figures.push(measure()?);
        }
        Ok(median(&figures))
    }
}

/// A metric.
pub struct Metric {
    /// P1 to P12.
    pub id: &'static str,
    /// What it is.
    pub name: &'static str,
    /// Yields its rows, each as it comes.
    pub measure: fn(&Bench, &mut dyn FnMut(Row)) -> Result<()>,
}

/// All that there are.
pub const METRICS: &[Metric] = &[
    Metric { id: "P1", name: "no-op round trip", measure: roundtrip::round_trip },
    Metric { id: "P2", name: "no-op rate", measure: roundtrip::rate },
    Metric { id: "P3", name: "bind of scattered pages", measure: bind::scattered },
    Metric { id: "P4", name: "bind of runs", measure: bind::in_runs },
    Metric { id: "P5", name: "unbind and invalidate", measure: bind::withdrawal },
    Metric { id: "P6", name: "fault round trip", measure: fault::round_trip },
    Metric { id: "P7", name: "fault storms", measure: storm::storms },
    Metric { id: "P8", name: "many contexts", measure: scale::contexts },
    Metric { id: "P9", name: "memory", measure: scale::memory },
    Metric { id: "P10", name: "many guests", measure: scale::guests },
    Metric { id: "P11", name: "beside hostile guests", measure: bully::beside },
    Metric { id: "P12", name: "copy jobs", measure: copy::job },
];
