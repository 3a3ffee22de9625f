//! Measures everything that is claimed about speed, beside its references, and prints a table.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use integration::bench::place::{Cores, pin};
use integration::bench::report::{HEADER, Row};
use integration::bench::{Bench, METRICS, Metric, peers, scale};
use integration::fairness::{HOSTILE, be_hostile};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Measures the metrics P1 to P12, each in turn with its reference in the same run, and prints a row for each metric and
/// set of parameters. Starts daemons and references of its own; needs no GPU, root or KVM. Figures are of this machine and
/// this moment: compare ratios.
///
/// Exit status: 0 if everything that this machine can measure was measured, whether or not goals are met.
#[derive(Parser)]
struct Arguments {
    /// Only these, as in P1,P3
    #[arg(long, value_delimiter = ',')]
    metric: Vec<String>,
    /// Fewer sizes and rounds
    #[arg(long)]
    quick: bool,
    /// Rounds, each of ours and of the reference [default: 5, quick: 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Milliseconds of each side of a round [default: 100, quick: 20]
    #[arg(long)]
    slice_ms: Option<u64>,
    /// In place of each metric's own sizes: depths (P2), pages (P3, P6), contexts (P7, P8), guests (P10), KiB (P12)
    #[arg(long, value_delimiter = ',')]
    sizes: Option<Vec<u64>>,
    /// Also write one JSON object a row to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let done = if arguments.next_if(|first| first == peers::NULL_BACKEND).is_some() {
        peers::be_null_backend(arguments)
    } else if arguments.next_if(|first| first == scale::MEMORY).is_some() {
        scale::tell_memory(arguments)
    } else if arguments.next_if(|first| first == HOSTILE).is_some() {
        be_hostile(arguments)
    } else {
        report(&Arguments::parse())
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(arguments: &Arguments) -> Result<()> {
    let metrics = chosen(&arguments.metric)?;
    let mut json = arguments.json.as_ref().map(File::create).transpose().context("--json")?;
    eprintln!("bench-report: building svmd");
    let programs = integration::binaries::build_host(&[])?;
    let (rounds, slice_ms) = if arguments.quick { (3, 20) } else { (5, 100) };
    let bench = Bench {
        svmd: programs.get("svmd")?.to_owned(),
        // Not the file that runs: building may have replaced it.
        program: programs.get("bench-report")?.to_owned(),
        cores: Cores::find()?,
        rounds: arguments.rounds.unwrap_or(rounds).max(1),
        slice: Duration::from_millis(arguments.slice_ms.unwrap_or(slice_ms)),
        quick: arguments.quick,
        sizes: arguments.sizes.clone(),
    };
    eprintln!("bench-report: {}", bench.cores.describe());
    pin(bench.cores.here)?;
    println!("{HEADER}");
    let mut failed = vec![];
    for metric in metrics {
        eprintln!("bench-report: {} {}", metric.id, metric.name);
        let begin = Instant::now();
        let mut rows = vec![];
        let result = (metric.measure)(&bench, &mut |row| {
            println!("{row}");
            rows.push(row);
        });
        if let Err(error) = result {
            eprintln!("bench-report: {} fails: {error:#}", metric.id);
            let row = Row::new(metric.id, metric.name, "", serde_json::json!({}));
            rows.push(row.unmeasured(&format!("{error:#}")));
            failed.push(metric.id);
        }
        if let Some(json) = &mut json {
            rows.iter().try_for_each(|row| writeln!(json, "{}", row.json()))?;
        }
        eprintln!("bench-report: {} took {:.1} s", metric.id, begin.elapsed().as_secs_f64());
    }
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<&'static Metric>> {
    if names.is_empty() {
        return Ok(METRICS.iter().collect());
    }
    let find = |name: &String| {
        let found = METRICS.iter().find(|metric| metric.id.eq_ignore_ascii_case(name));
        let known = || METRICS.iter().map(|metric| metric.id).collect::<Vec<_>>().join(", ");
        found.with_context(|| format!("no metric {name}; there are {}", known()))
    };
    names.iter().map(find).collect()
}
