//! What `cargo bench-guest` reports: rows of figures, made from the times that programs in a guest and the agent have
//! told. The table for people and the JSON are the same rows. All arithmetic is here, nothing is measured.
//!
//! The reference of faults is a bare userfaultfd loop of the same guest; of pins what the kernel alone takes; of programs
//! the same program as it is.

use crate::bench::report::Figure;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use std::fmt;

/// Pages of the window that the agent answers a fault with.
const WINDOW_PAGES: f64 = 16.0;
const PAGE_BYTES: f64 = 4096.0;

/// A figure, of which a table shows a line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Where: `"in process"` or `"QEMU"`.
    pub place: &'static str,
    /// Its name.
    pub id: &'static str,
    /// What it is, for people.
    pub what: String,
    /// Of `p50` and `p99`.
    pub unit: &'static str,
    /// The one in the middle.
    pub p50: f64,
    /// What 99 of 100 do not exceed; none of rates.
    pub p99: Option<f64>,
    /// The row whose figures are the reference.
    pub reference: Option<&'static str>,
    /// `p50` by the reference's.
    pub ratio_p50: Option<f64>,
    /// `p99` by the reference's.
    pub ratio_p99: Option<f64>,
}

impl Row {
    fn new(place: &'static str, id: &'static str, what: impl Into<String>, unit: &'static str) -> Self {
        let (reference, ratio_p50, ratio_p99) = (None, None, None);
        Self { place, id, what: what.into(), unit, p50: 0.0, p99: None, reference, ratio_p50, ratio_p99 }
    }

    /// With times, in the row's unit.
    fn times(mut self, times: &Times) -> Self {
        let per_unit = match self.unit {
            "ms" => 1e6,
            "us" => 1e3,
            _ => 1.0,
        };
        (self.p50, self.p99) = (times.percentile(50) / per_unit, Some(times.percentile(99) / per_unit));
        self
    }

    /// With what each round came to.
    fn rate(mut self, rate: &Figure) -> Self {
        self.p50 = rate.median();
        self
    }

    /// Beside another row.
    fn by(mut self, reference: &Self) -> Self {
        self.reference = Some(reference.id);
        self.ratio_p50 = Some(self.p50 / reference.p50);
        self.ratio_p99 = self.p99.zip(reference.p99).map(|(ours, theirs)| ours / theirs);
        self
    }

    /// Beside another row of rates; both took turns, so the ratio is taken in each round.
    fn by_rate(mut self, ours: &Figure, reference: &Self, theirs: &Figure) -> Self {
        self.reference = Some(reference.id);
        self.ratio_p50 = Some(ours.ratio(theirs));
        self
    }
}

/// What stands above rows.
pub const HEADER: &str =
    "where               p50         p99  unit   ratio of p50    of p99  to reference     what";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let digits = if self.p50.abs() >= 1000.0 { 0 } else { 1 };
        let p99 = self.p99.map_or_else(|| "-".to_owned(), |p99| format!("{p99:.digits$}"));
        write!(
            f,
            "{:<11} {:>11.digits$} {p99:>11}  {:<5} {:>13} {:>9}  {:<15}  {}: {}",
            self.place,
            self.p50,
            self.unit,
            or_none(self.ratio_p50),
            or_none(self.ratio_p99),
            self.reference.unwrap_or("-"),
            self.id,
            self.what
        )
    }
}

/// Times in nanoseconds, in the order in which they were told.
#[derive(Clone, Debug, PartialEq)]
pub struct Times(Vec<u64>);

impl Times {
    /// Of a ledger, or whoever has them.
    ///
    /// # Errors
    /// There are none.
    pub fn new(times: Vec<u64>) -> Result<Self> {
        ensure!(!times.is_empty(), "no times");
        Ok(Self(times))
    }

    /// A member of what a program has told.
    fn of(told: &Value, name: &str) -> Result<Self> {
        let list = told.get(name).and_then(Value::as_array);
        let list = list.with_context(|| format!("no list of {name:?} in {told}"))?;
        let times: Option<Vec<u64>> = list.iter().map(Value::as_u64).collect();
        Self::new(times.with_context(|| format!("{name}: not all are times: {list:?}"))?)
            .context(name.to_owned())
    }

    /// The least one that so many of a hundred do not exceed.
    fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).map_or(f64::NAN, |&time| time as f64)
    }

    /// Each less so much; what is less than nothing is nothing.
    fn less(&self, much: f64) -> Result<Self> {
        ensure!(much >= 0.0 && much.is_finite(), "{much} cannot be taken off");
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "nanoseconds, checked above"
        )]
        let much = much as u64;
        Ok(Self(self.0.iter().map(|time| time.saturating_sub(much)).collect()))
    }

    /// So many in each of these times, per second.
    fn rate(&self, count: f64) -> Figure {
        Figure::new(self.0.iter().map(|&time| count * 1e9 / time.max(1) as f64).collect())
    }

    /// Those of two steps that follow each other.
    fn and(&self, next: &Self) -> Self {
        Self(self.0.iter().zip(&next.0).map(|(first, second)| first + second).collect())
    }
}

/// One fault at a time. `told` is of `faults one`, `agent` the agent's part of each fault.
///
/// What a fault adds to a job is each first touch less the median of the same job where nothing faults: from the
/// device's access to the access's going on, as the loop's times are.
///
/// # Errors
/// Something was not told.
pub fn faults(place: &'static str, told: &Value, agent: &Times) -> Result<Vec<Row>> {
    let of = |name| Times::of(told, name);
    let (userfaultfd, first, again) = (of("userfaultfd")?, of("first_touch")?, of("touch")?);
    let row = |id, what: &str, times: &Times| Row::new(place, id, what, "us").times(times);
    let reference = row("userfaultfd", "a CPU touches a page, a userfaultfd loop answers it", &userfaultfd);
    let fault = first.less(again.percentile(50))?;
    Ok(vec![
        row("first touch", "a job's first touch of 16 pages, as its process sees it", &first).by(&reference),
        row("touch", "the same job, nothing faults", &again).by(&reference),
        row("fault", "what the fault adds to the job (first touch, less the p50 of touch)", &fault)
            .by(&reference),
        row("agent's part", "of that: the record found in the ring, to the doorbell rung", agent)
            .by(&reference),
        reference,
    ])
}

/// Many faults at a time. `told` is of `faults storm`.
///
/// # Errors
/// Something was not told.
pub fn answers(place: &'static str, told: &Value, processes: usize) -> Result<Vec<Row>> {
    let count =
        told.get("answers").and_then(Value::as_u64).with_context(|| format!("no answers in {told}"))?;
    let (ours, theirs) = (Times::of(told, "device")?, Times::of(told, "userfaultfd")?);
    let rates = |pages: f64| (ours.rate(count as f64 * pages), theirs.rate(count as f64));
    let row = |id, what: &str, rate| {
        Row::new(place, id, format!("{what}, {processes} processes at once"), "1/s").rate(rate)
    };
    let (answers, loops) = rates(1.0);
    let (pages, _) = rates(WINDOW_PAGES);
    let reference = row("loop rate", "pages that userfaultfd loops answer", &loops);
    Ok(vec![
        row("answer rate", "faults that the agent answers", &answers).by_rate(&answers, &reference, &loops),
        row("page rate", "pages that it answers them with", &pages).by_rate(&pages, &reference, &loops),
        reference,
    ])
}

/// Memory that is pinned. `told` is of `pins`.
///
/// # Errors
/// Something was not told.
pub fn pins(place: &'static str, told: &Value) -> Result<Vec<Row>> {
    let bytes = told.get("bytes").and_then(Value::as_u64).with_context(|| format!("no bytes in {told}"))?;
    let pages = bytes as f64 / PAGE_BYTES;
    let of = |name| Times::of(told, name);
    let (populate, pin, arena, gone) = (of("populate")?, of("pin")?, of("arena")?, of("arena_gone")?);
    let asked = of("asked")?;
    let (kernel, kernel_gone) = (populate.and(&pin), of("unpin")?.and(&of("unmap")?));
    let mib = bytes >> 20;
    let row =
        |id, what: &str, times: &Times| Row::new(place, id, format!("{what}, {mib} MiB"), "ms").times(times);
    let rate = |id, what: &str, times: &Times| Row::new(place, id, what, "1/s").rate(&times.rate(pages));
    let by_kernel = row("kernel pins", "the kernel alone makes and pins memory", &kernel);
    let by_kernel_gone = row("kernel unpins", "the kernel alone unpins and unmaps it", &kernel_gone);
    let kernel_rate = rate("kernel rate", "pages that the kernel alone makes and pins", &kernel);
    Ok(vec![
        row(
            "first ask",
            "a program's first svm_open, all of its memory pinned when it returns; of malloc",
            &asked,
        )
        .by(&by_kernel),
        row("mmap", "a program's mmap, pinned when it returns", &arena).by(&by_kernel),
        row("munmap", "a program's munmap, unpinned when it returns", &gone).by(&by_kernel_gone),
        rate("pin rate", "pages that are pinned", &arena).by_rate(
            &arena.rate(pages),
            &kernel_rate,
            &kernel.rate(pages),
        ),
        row("kernel clears", "of the kernel's: makes them, cleared (MAP_POPULATE)", &populate).by(&by_kernel),
        by_kernel,
        by_kernel_gone,
        kernel_rate,
    ])
}

/// What programs tell that use no device: of `usual run` and `usual start`.
#[derive(Clone, Debug)]
pub struct Usual {
    /// Of the first.
    pub run: Value,
    /// Of the second.
    pub start: Value,
}

/// Programs that use no device: in a guest without an agent, beside an agent that serves, and started by
/// `svm-agent run`.
///
/// # Errors
/// Something was not told.
pub fn programs(place: &'static str, alone: &Usual, beside: &Usual, followed: &Usual) -> Result<Vec<Row>> {
    const KINDS: [(&str, [&str; 3], &str, &str); 5] = [
        ("start", ["start, alone", "start, beside", "start, run"], "ms", "start and end of a program"),
        (
            "malloc",
            ["malloc, alone", "malloc, beside", "malloc, run"],
            "ns",
            "malloc and free, 16 to 2000 bytes",
        ),
        ("mmap", ["mmap, alone", "mmap, beside", "mmap, run"], "us", "mmap of 256 KiB, touched, and munmap"),
        ("thread", ["thread, alone", "thread, beside", "thread, run"], "us", "a thread's start and end"),
        ("fork", ["fork, alone", "fork, beside", "fork, run"], "ms", "fork (4 MiB of malloc), exit and wait"),
    ];
    let mut rows = vec![];
    for (kind, [id_alone, id_beside, id_run], unit, what) in KINDS {
        let row = |id, where_: &str, usual: &Usual| {
            let told = if kind == "start" { &usual.start } else { &usual.run };
            anyhow::Ok(Row::new(place, id, format!("{what}; {where_}"), unit).times(&Times::of(told, kind)?))
        };
        let reference = row(id_alone, "no agent in the guest", alone)?;
        rows.push(row(id_beside, "not started by `svm-agent run`, an agent serves", beside)?.by(&reference));
        rows.push(row(id_run, "started by `svm-agent run`", followed)?.by(&reference));
        rows.push(reference);
    }
    Ok(rows)
}

/// Whether every touch of a window was a fault.
///
/// # Errors
/// Not all were.
pub fn check_answered(answered: u64, touched: u64) -> Result<()> {
    ensure!(
        answered >= touched,
        "{touched} windows were touched and {answered} faults answered: not all faulted"
    );
    Ok(())
}

#[cfg(test)]
mod tests;
