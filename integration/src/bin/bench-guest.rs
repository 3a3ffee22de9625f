//! `cargo bench-guest`: what faults and pins cost inside a guest, beside a bare userfaultfd loop of the same guest.

use anyhow::{Context, Result};
use clap::Parser;
use guest_agent::agent::LedgerReport;
use integration::binaries::build_host;
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::vmm::Vmm;
use integration::initramfs::FIRST_UID;
use integration::ordinary::{Ordinary, Scene, open_folder, sources};
use integration::provision::Vm;
use integration::qemu::ROOT;
use integration::story::Machine;
use integration::story::host::{HostMachine, Programs};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::process::ExitCode;

/// Measures faults of a program in a guest: how long a bare userfaultfd loop of the same guest takes for a page, how long a
/// device's first touch of 16 pages takes, how long the agent has such a fault, and what a pinned page costs.
///
/// In QEMU (needs what `cargo demo` needs), and in process, where the agent is a thread of this program.
#[derive(Parser)]
#[command(name = "cargo bench-guest")]
struct Arguments {
    /// Faults of each kind
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(10..=2000))]
    rounds: u32,
    /// Print one JSON object on one line instead of a table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let places = [("in process", in_process(arguments.rounds)?), ("QEMU", in_qemu(arguments.rounds)?)];
    if arguments.json {
        println!("{}", json!({ "in_process": places[0].1, "qemu": places[1].1 }));
        return Ok(());
    }
    println!("{:<12} {:<44} {:>10} {:>10} {:>8}", "", "", "p50 us", "p99 us", "x uffd");
    for (place, told) in &places {
        let reference = number(told, "/userfaultfd/p50")?;
        for (name, what) in ROWS {
            let (p50, p99) = (number(told, &format!("/{name}/p50"))?, number(told, &format!("/{name}/p99"))?);
            println!(
                "{place:<12} {what:<44} {:>10.1} {:>10.1} {:>8.2}",
                p50 / 1e3,
                p99 / 1e3,
                p50 / reference
            );
        }
        let answers = 1e9 / number(told, "/agent/mean")?;
        println!("{place:<12} the agent's part alone allows {answers:.0} answers (of 16 pages) per second");
    }
    // In process nothing is pinned.
    let pins = 1e9 / number(&places[1].1, "/pin_ns_per_page")?;
    println!("{:<12} {pins:.0} pages pinned per second, given to a program by mmap", places[1].0);
    Ok(())
}

/// What is measured.
const ROWS: [(&str, &str); 4] = [
    ("userfaultfd", "userfaultfd: a page, touched and answered"),
    ("first_touch", "a job's first touch of 16 pages, as it sees it"),
    ("touch", "the same job where nothing faults"),
    ("agent", "the agent's part: record to answer"),
];

fn number(told: &Value, pointer: &str) -> Result<f64> {
    told.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no {pointer} in {told}"))
}

fn in_qemu(rounds: u32) -> Result<Value> {
    let scene = Scene::set(&Vm::open()?, "faults")?;
    // For the reference: what an ordinary user may do is the kernel's default.
    scene.guest.check(ROOT, ["sh", "-c", "echo 1 > /proc/sys/vm/unprivileged_userfaultfd"])?;
    let told = scene.guest.check(FIRST_UID, format!("svm-agent run -- faults {rounds}"))?;
    let ledger: LedgerReport = serde_json::from_str(&scene.guest.check(ROOT, "svm-agent ledger --json")?)?;
    with_agent(&told, &ledger)
}

fn in_process(rounds: u32) -> Result<Value> {
    let built = build_host(&[])?;
    let mut programs = Ordinary::new(&built)?;
    programs.compile(&sources("faults"))?;
    let svmd = Svmd::launch(&Options::default())?;
    let ram = GuestRam::new(Layout::Flat { bytes: 512 << 20 }, 1)?;
    let vmm = Vmm::without_cpu(&svmd.socket("vm0"), &ram, Profile::CloudHypervisor)?;
    let folder = open_folder()?;
    let programs = Programs::of(&built, &programs)?;
    let machine = HostMachine::start("vm0", vmm, folder.path(), programs)?;
    machine.hold_answers(false)?;
    let mut program = machine.start(FIRST_UID, &["faults".to_owned(), rounds.to_string()])?;
    let told = program.line()?;
    program.end()?;
    with_agent(&told, &machine.ledger())
}

/// What the program has told, and what the agent knows of its faults.
fn with_agent(told: &str, ledger: &LedgerReport) -> Result<Value> {
    let mut told: Value = serde_json::from_str(told).with_context(|| format!("it says {told:?}"))?;
    let mut times: Vec<u64> = ledger.entries.iter().map(|entry| entry.answer_ns).collect();
    times.sort_unstable();
    let at =
        |percent: usize| times.get(times.len() * percent / 100).copied().context("no fault was answered");
    let mean = times.iter().sum::<u64>() / times.len().max(1) as u64;
    told["agent"] = json!({ "p50": at(50)?, "p99": at(99)?, "mean": mean });
    Ok(told)
}
