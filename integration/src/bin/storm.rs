//! Runs the storm and prints what came of it. Exit status 0 only if nothing was lost, misrouted or answered twice, and
//! every word is as it must be.

use anyhow::Result;
use clap::Parser;
use integration::storm::{Size, run};
use integration::svmd::DeviceKind;
use std::process::ExitCode;

/// Many processes of many guests, all at the same addresses, fault at random on all devices at once; then the ledgers of
/// devices, agents and jobs are compared. Starts a daemon of its own; needs neither root nor KVM.
#[derive(Parser)]
struct Arguments {
    /// What decides pages, order and accesses. May be given several times: one storm each, one after the other.
    #[arg(long, default_values_t = [1, 2, 3])]
    seed: Vec<u64>,
    /// Faults in all; at least 2 for each context on each device.
    #[arg(long, default_value_t = Size::default().faults)]
    faults: u64,
    /// Guests, each with a connection and an agent of its own.
    #[arg(long, default_value_t = Size::default().guests)]
    guests: usize,
    /// Contexts (processes) of each guest.
    #[arg(long, default_value_t = Size::default().contexts)]
    contexts: usize,
    /// Host devices, 1 to 16; each context uses all of them.
    #[arg(long, default_value_t = Size::default().devices)]
    devices: usize,
    /// What the devices are.
    #[arg(long, value_enum, default_value_t = DeviceKind::Soft)]
    device: DeviceKind,
}

fn main() -> ExitCode {
    match storms(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("storm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all of them are clean.
fn storms(arguments: Arguments) -> Result<bool> {
    let Arguments { seed, faults, guests, contexts, devices, device } = arguments;
    let size = Size { guests, contexts, devices, kind: device, faults };
    let mut clean = true;
    for seed in seed {
        let summary = run(seed, size)?;
        println!("{summary}");
        clean &= summary.is_clean();
    }
    Ok(clean)
}
