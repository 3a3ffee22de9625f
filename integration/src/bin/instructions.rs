//! Counts what a fault costs and prints it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use integration::instructions::{Figures, measure, recorded_path, valgrind, workload};
use serde_json::json;

/// Counts the instructions that the daemon's library takes for a fault and for its parts, with valgrind's callgrind,
/// which is fetched from Debian's mirrors into target/vm where the machine has none.
///
/// Run it with CARGO_INCREMENTAL=0, as the recorded figures are made: they are then held to 2 %, else to 15 %.
///
/// Exit status: 0 if the figures are those that are recorded, or were written; 1 if not.
#[derive(Parser)]
struct Arguments {
    /// One JSON object on stdout instead of a table
    #[arg(long)]
    json: bool,
    /// Record these figures as those that the tests hold the code to
    #[arg(long)]
    write: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the figures are as recorded.
fn run(arguments: &Arguments) -> Result<bool> {
    let figures = measure(&valgrind()?)?;
    if arguments.json {
        let shares = workload::FAULTS.map(|fault| (fault, figures.share_of_conversion(fault)));
        let shares: std::collections::BTreeMap<_, _> = shares.into_iter().collect();
        println!("{}", json!({ "figures": figures, "share_of_conversion": shares }));
    } else {
        print!("{}", figures.table());
    }
    if arguments.write {
        figures.record()?;
        eprintln!("instructions: written to {}", recorded_path().display());
        return Ok(true);
    }
    let differences = Figures::recorded()?.differences(&figures);
    for difference in &differences {
        eprintln!("instructions: {difference}");
    }
    Ok(differences.is_empty())
}
