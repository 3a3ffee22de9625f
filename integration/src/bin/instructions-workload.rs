//! Runs operations of one workload: `instructions-workload NAME COUNT`. Called by `instructions`, under valgrind.

use std::process::ExitCode;

use anyhow::{Context, Result};
use integration::instructions::workload;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions-workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (name, count) = arguments.next().zip(arguments.next()).context("usage: NAME COUNT")?;
    workload::run(&name, count.parse().context("COUNT is no number")?)
}
