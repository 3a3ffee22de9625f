//! `cargo demo`.

use anyhow::{Context, Result};
use clap::Parser;
use integration::demo::{Sabotage, Stage, VmmKind, show};
use integration::svmd::DeviceKind;
use std::io::Write;
use std::process::ExitCode;

/// Whose fault is it? Several processes in several guests map the same CPU range A..B to the same GPU range C..D on two
/// devices, and all of them fault there at once. Shows who mapped what, which faults went where, and what each process
/// read, and compares three independent records of every fault.
///
/// Builds what it needs. With --vmm qemu (the default) it fetches QEMU and a guest kernel from Debian's mirrors into
/// target/vm on first use, without root: up to 2 minutes and 400 MB. --vmm inproc needs neither.
///
/// Exit status: 0 if everything is as it must be, 1 if not or if it could not be shown, 2 for wrong usage.
#[derive(Parser)]
#[command(name = "cargo demo")]
struct Arguments {
    /// How the guests run
    #[arg(long, value_enum, default_value_t = VmmKind::Qemu)]
    vmm: VmmKind,
    /// What executes the jobs of both host devices
    #[arg(long, value_enum, default_value_t = DeviceKind::Soft)]
    device: DeviceKind,
    /// Guests, each with a VMM, an agent and a connection of its own
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=16))]
    guests: u64,
    /// Processes of each guest
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=32))]
    processes: u64,
    /// Write the result as one JSON object on one line into this file; `-` is stdout, and then nothing else is on stdout
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
    /// Break the daemon on purpose, to see that the check can fail; the exit status is then 1
    #[arg(long, value_enum, value_name = "HOW")]
    sabotage: Option<Sabotage>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything was as it must be.
fn run(arguments: Arguments) -> Result<bool> {
    let Arguments { vmm, device, guests, processes, json, sabotage } = arguments;
    let stage = Stage {
        vmm,
        device,
        guests: usize::try_from(guests)?,
        processes: usize::try_from(processes)?,
        sabotage,
    };
    let aside = json.as_deref() == Some("-");
    let narrate = |line: &str| if aside { eprintln!("{line}") } else { println!("{line}") };
    let report = show(stage, &narrate)?;
    if let Some(path) = json {
        let line = serde_json::to_string(&report)?;
        if aside {
            println!("{line}");
            std::io::stdout().flush()?;
        } else {
            std::fs::write(&path, line + "\n").with_context(|| format!("cannot write {path}"))?;
        }
    }
    let verdict = if report.holds() {
        "every fault reached its owner, and no byte is anybody else's"
    } else {
        "NOT AS IT MUST BE"
    };
    narrate(&format!("\n{verdict} ({:.1} s)", report.seconds));
    Ok(report.holds())
}
