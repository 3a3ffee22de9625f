//! Measures what one guest's operations cost beside hostile ones, and prints a table.

use anyhow::Result;
use clap::Parser;
use integration::fairness::{HEADER, HOSTILE, Hostility, be_hostile, run};
use std::process::ExitCode;
use std::time::Duration;

/// Times commands, jobs and faults of one guest, alone and beside guests that do the worst they may. Starts daemons of its
/// own; needs neither root nor KVM. The figures are of this machine and this moment.
#[derive(Parser)]
struct Arguments {
    /// Beside what.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [
        Hostility::Jobs, Hostility::Faults, Hostility::Binds, Hostility::Invalidate, Hostility::Kicks,
        Hostility::Sessions, Hostility::Status, Hostility::Hello, Hostility::Limits, Hostility::Everything,
    ])]
    beside: Vec<Hostility>,
    /// How long each is measured.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Engines of the device.
    #[arg(long, default_value_t = 1)]
    engines: u32,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).peekable();
    let done = if arguments.next_if(|first| first == HOSTILE).is_some() {
        be_hostile(arguments)
    } else {
        measure(&Arguments::parse())
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fairness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    let each = Duration::try_from_secs_f64(arguments.seconds)?;
    println!("{HEADER}");
    run(&arguments.beside, each, arguments.engines, |row| println!("{row}"))
}
