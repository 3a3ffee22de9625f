//! What a fault costs the daemon, in instructions: a figure that the machine's load does not change, so that it can be
//! kept in a file and held to.
//!
//! Each [`workload`] runs under valgrind's callgrind twice, the second time with twice as many operations; the
//! difference of the two totals is what half of those cost. Start, preparation and whatever only the first operations pay cancel
//! out, and no symbol is named, so inlining does not matter. What the loop itself costs is measured in the same way
//! and taken off.
//!
//! Both the command and the test take the program from a build of the whole workspace, so they count the same code.

pub mod workload;

mod bulk;
mod ring;
mod scene;
mod sides;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::binaries;
use crate::provision::{Valgrind, Vm, progress};
use workload::Workload;

/// The program that runs workloads.
const PROGRAM: &str = "instructions-workload";
/// How the figures are made.
pub const COMMAND: &str = "CARGO_INCREMENTAL=0 cargo run -p integration --bin instructions -- --write";
/// How far a figure may be off, as a share of the one that is recorded.
const TOLERANCE: f64 = 0.02;
/// The same where they are not made alike: another C library has another allocator, and incremental compilation, which
/// continuous integration does without, inlines less.
const TOLERANCE_ELSEWHERE: f64 = 0.15;
/// What a single instruction more or less may be.
const GRAIN: f64 = 1.0;

/// Figures, and what they were made with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// How to make them anew.
    pub command: String,
    /// The compiler.
    pub rustc: String,
    /// The C library.
    pub libc: String,
    /// Whether the compiler was to work incrementally.
    pub incremental: bool,
    /// Instructions of one operation, by workload.
    pub instructions: BTreeMap<String, f64>,
}

/// Where the figures are kept.
#[must_use]
pub fn recorded_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json")
}

/// Counts every workload.
///
/// # Errors
/// Fails when a program does not build or run.
pub fn measure(valgrind: &Valgrind) -> Result<Figures> {
    let programs = binaries::build_host(&[])?;
    let program = programs.get(PROGRAM)?;
    progress!("counting instructions with {}", valgrind.version()?);
    let counter = Counter { valgrind, program, folder: tempfile::tempdir()? };
    let idle = counter.difference(&workload::IDLE)?;
    let mut instructions = BTreeMap::new();
    for (workload, total) in counter.all()? {
        instructions.insert(workload.name.to_owned(), round(total - idle));
    }
    let words = |command: &mut Command| {
        let output = command.output().with_context(|| format!("{command:?} does not start"))?;
        anyhow::Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    Ok(Figures {
        command: COMMAND.to_owned(),
        rustc: words(Command::new(rustc).arg("--version"))?,
        libc: words(Command::new("getconf").arg("GNU_LIBC_VERSION"))?,
        incremental: std::env::var_os("CARGO_INCREMENTAL").is_none_or(|value| value != "0"),
        instructions,
    })
}

/// valgrind, or why there is none.
///
/// # Errors
/// Fails when none can be had.
pub fn valgrind() -> Result<Valgrind> {
    Vm::open()?.valgrind()
}

struct Counter<'a> {
    valgrind: &'a Valgrind,
    program: &'a Path,
    folder: tempfile::TempDir,
}

impl Counter<'_> {
    /// Every workload with the cost of one operation, as many at once as there are processors.
    fn all(&self) -> Result<Vec<(&'static Workload, f64)>> {
        let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            while let Some(workload) = workload::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                let cost = self.difference(workload).map(|cost| (workload, cost));
                found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(cost);
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads.min(workload::ALL.len()) {
                scope.spawn(work);
            }
        });
        found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_iter().collect()
    }

    /// Instructions of one operation, with what the loop costs.
    fn difference(&self, workload: &Workload) -> Result<f64> {
        let count = workload.count;
        let (once, twice) = (self.total(workload, count)?, self.total(workload, 2 * count)?);
        let more = twice.checked_sub(once).with_context(|| {
            format!("{} costs {twice} instructions, half as much of it {once}", workload.name)
        })?;
        Ok(more as f64 / count as f64)
    }

    /// Instructions of a whole run.
    fn total(&self, workload: &Workload, count: u64) -> Result<u64> {
        let file = self.folder.path().join(format!("{}.{count}", workload.name));
        let mut command = self.valgrind.command();
        command.args(["--tool=callgrind", "--quiet"]);
        command.arg(format!("--callgrind-out-file={}", file.display()));
        command.arg(self.program).args([workload.name, &count.to_string()]);
        let output = command.output().with_context(|| format!("{command:?} does not start"))?;
        ensure!(
            output.status.success(),
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = std::fs::read_to_string(&file)?;
        let total = text.lines().find_map(|line| line.strip_prefix("summary: "));
        total.and_then(|total| total.trim().parse().ok()).context("callgrind has written no sum")
    }
}

impl Figures {
    /// Those that are recorded.
    ///
    /// # Errors
    /// Fails when the file is missing or something else.
    pub fn recorded() -> Result<Self> {
        let path = recorded_path();
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} holds no figures", path.display()))
    }

    /// Records these.
    ///
    /// # Errors
    /// Fails when the file cannot be written.
    pub fn record(&self) -> Result<()> {
        let path = recorded_path();
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
    }

    /// What differs from these in `now` by more than may be: a line each.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let tolerance = if self.is_made_like(now) { TOLERANCE } else { TOLERANCE_ELSEWHERE };
        let names: std::collections::BTreeSet<_> =
            self.instructions.keys().chain(now.instructions.keys()).collect();
        let line = |name: &String| match (self.instructions.get(name), now.instructions.get(name)) {
            (Some(was), Some(is)) if (is - was).abs() <= (was * tolerance).max(GRAIN) => None,
            (was, is) => Some(format!("{name}: {} recorded, {} counted", shown(was), shown(is))),
        };
        names.into_iter().filter_map(line).collect()
    }

    /// Whether the same code costs the same in both.
    #[must_use]
    pub fn is_made_like(&self, other: &Self) -> bool {
        (&self.libc, self.incremental) == (&other.libc, other.incremental)
    }

    /// Instructions of turning a GPU address into what is known of its CPU page, among as many mappings as the faults
    /// that are counted have: C -> A, then A -> guest-physical page.
    fn conversion(&self) -> f64 {
        self.of(workload::FIND_OF_FAULTS) + self.of(workload::LOOKUP_OF_FAULTS)
    }

    /// The conversion as a share of a workload, which is a whole fault.
    #[must_use]
    pub fn share_of_conversion(&self, fault: &str) -> f64 {
        self.conversion() / self.of(fault)
    }

    fn of(&self, name: &str) -> f64 {
        self.instructions.get(name).copied().unwrap_or(f64::NAN)
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::from("instructions  per page  \n");
        for workload in workload::ALL {
            let cost = self.of(workload.name);
            let per_page = match workload.pages {
                1 => String::new(),
                pages => format!("{:.1}", cost / pages as f64),
            };
            // Writing to a string cannot fail.
            writeln!(text, "{cost:>12.1}  {per_page:>8}  {:<22} {}", workload.name, workload.what).ok();
        }
        writeln!(
            text,
            "\nconversion C -> A and lookup of the page there: {:.1} instructions",
            self.conversion()
        )
        .ok();
        for fault in workload::FAULTS {
            writeln!(text, "  {:>5.2} % of {fault}", 100.0 * self.share_of_conversion(fault)).ok();
        }
        writeln!(text, "({}, {}, dev profile: opt-level 2, overflow checks)", self.rustc, self.libc).ok();
        text
    }
}

fn shown(figure: Option<&f64>) -> String {
    figure.map_or_else(|| "nothing".to_owned(), |figure| format!("{figure:.1}"))
}

/// A tenth of an instruction is more than enough.
fn round(figure: f64) -> f64 {
    (figure * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(libc: &str, all: &[(&str, f64)]) -> Figures {
        let instructions = all.iter().map(|(name, figure)| ((*name).to_owned(), *figure)).collect();
        let (command, rustc) = (String::new(), String::new());
        Figures { command, rustc, libc: libc.to_owned(), incremental: false, instructions }
    }

    #[test]
    fn two_percent_or_one_instruction_pass_and_more_does_not() {
        let was = figures("a", &[("small", 10.0), ("large", 1000.0)]);
        assert!(was.differences(&figures("a", &[("small", 11.0), ("large", 980.0)])).is_empty());
        let off = was.differences(&figures("a", &[("small", 11.1), ("large", 1020.1)]));
        assert_eq!(off.len(), 2, "{off:?}");
    }

    #[test]
    fn figures_that_are_not_made_alike_may_be_further_off() {
        let was = figures("a", &[("large", 1000.0)]);
        let incremental = |figure| Figures { incremental: true, ..figures("a", &[("large", figure)]) };
        assert!(was.differences(&figures("b", &[("large", 1149.0)])).is_empty());
        assert!(was.differences(&incremental(1149.0)).is_empty());
        assert_eq!(was.differences(&figures("b", &[("large", 1151.0)])).len(), 1);
        assert_eq!(was.differences(&incremental(1151.0)).len(), 1);
    }

    #[test]
    fn a_workload_that_comes_or_goes_is_a_difference() {
        let (was, is) = (figures("a", &[("old", 1.0)]), figures("a", &[("new", 1.0)]));
        assert_eq!(
            was.differences(&is),
            ["new: nothing recorded, 1.0 counted", "old: 1.0 recorded, nothing counted"]
        );
    }
}
