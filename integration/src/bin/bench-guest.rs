//! `cargo bench-guest`: what faults, pins and the library cost inside a guest, beside what the same guest has without us.

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use guest_agent::agent::{AgentStatus, LedgerReport};
use integration::binaries::build_host;
use integration::costs::{self, HEADER, Row, Times, Usual};
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::vmm::Vmm;
use integration::initramfs::FIRST_UID;
use integration::ordinary::{Ordinary, SCENE, Scene, of_one, open_folder, source, sources};
use integration::provision::Vm;
use integration::qemu::{Guest, ROOT, accelerator};
use integration::story::Machine;
use integration::story::host::{HostMachine, Programs};
use integration::svmd::{Options, Svmd};
use serde::Serialize;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Instant;

/// A quarter of it is for arenas.
const RAM_BYTES: u64 = 2 << 30;

/// Measures what a guest's programs pay, each beside a reference of the same guest.
///
/// A fault of a device's job, one at a time and of many processes at once, in turns with bare userfaultfd loops: in process
/// (the agent is a thread of this program) and in QEMU.
///
/// Memory that is pinned when mmap returns, in turns with what the kernel alone takes for that. And programs that use no
/// device, started by `svm-agent run` and otherwise, beside the same programs before the guest had an agent. Both in QEMU
/// alone, which needs what `cargo demo` needs.
///
/// Takes a minute or two. Times are of this machine and this moment: compare ratios, and let nothing else run beside.
#[derive(Parser)]
#[command(name = "cargo bench-guest")]
struct Arguments {
    /// Faults one at a time; the others are measured in proportion
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(10..=2000))]
    rounds: u32,
    /// Processes that fault at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=16))]
    processes: u32,
    /// Only there
    #[arg(long, value_enum)]
    place: Option<Place>,
    /// Print one JSON object on one line instead of a table: `machine`, and `rows` with the same figures
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Place {
    InProcess,
    Qemu,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in process",
            Self::Qemu => "QEMU",
        }
    }
}

/// What is reported.
#[derive(Serialize)]
struct Report {
    /// Where it was measured, in words.
    machine: Vec<String>,
    rows: Vec<Row>,
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
    let begin = Instant::now();
    let mut report = Report { machine: vec![host()], rows: vec![] };
    let wanted = |place| arguments.place.is_none_or(|only| only == place);
    if wanted(Place::InProcess) {
        report.rows.extend(in_process(arguments)?);
    }
    if wanted(Place::Qemu) {
        let (guest, rows) = in_qemu(arguments)?;
        report.machine.push(guest);
        report.rows.extend(rows);
    }
    progress(&format!("took {:.0} s", begin.elapsed().as_secs_f64()));
    if arguments.json {
        println!("{}", json!(report));
        return Ok(());
    }
    report.machine.iter().for_each(|line| println!("{line}"));
    println!("\n{HEADER}");
    report.rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

fn progress(what: &str) {
    eprintln!("bench-guest: {what}");
}

/// This machine in words.
fn host() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("CPUs of an unknown model", |(_, name)| name.trim());
    let release = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?");
    format!("host: {cpus} x {model}, Linux {}, load {load} at the start", release.trim())
}

/// How often the other things are measured.
struct Rounds {
    storm: u32,
    pins: u32,
    usual: u32,
}

impl Rounds {
    fn of(arguments: &Arguments) -> Self {
        let share = |part: u32| (arguments.rounds / part).max(2);
        Self { storm: share(50), pins: share(25), usual: share(10) }
    }
}

/// What both places measure: `told` starts the program `faults` and returns its line, `ledger` asks the agent.
fn faults(
    place: Place,
    arguments: &Arguments,
    told: &dyn Fn(&[String]) -> Result<String>,
    ledger: &dyn Fn(bool) -> Result<LedgerReport>,
) -> Result<Vec<Row>> {
    let Arguments { rounds, processes, .. } = arguments;
    let name = place.name();
    let words = |words: &[&dyn ToString]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
    progress(&format!("{name}: {rounds} faults one at a time"));
    let one = parse(&told(&words(&[&"faults", &"one", rounds]))?)?;
    let agent = ledger(true)?;
    costs::check_answered(agent.answered, u64::from(*rounds))?;
    let parts = Times::new(agent.entries.iter().map(|entry| entry.answer_ns).collect())?;
    let mut rows = costs::faults(name, &one, &parts)?;

    let storm = Rounds::of(arguments).storm;
    progress(&format!("{name}: faults of {processes} processes at once, {storm} rounds"));
    let many = parse(&told(&words(&[&"faults", &"storm", processes, &storm]))?)?;
    let in_round = many["answers"].as_u64().context("no answers")?;
    costs::check_answered(ledger(false)?.answered - agent.answered, in_round * u64::from(storm))?;
    rows.extend(costs::answers(name, &many, usize::try_from(*processes)?)?);
    Ok(rows)
}

fn parse(told: &str) -> Result<Value> {
    serde_json::from_str(told).with_context(|| format!("it says {told:?}"))
}

fn in_process(arguments: &Arguments) -> Result<Vec<Row>> {
    progress("in process: building");
    let built = build_host(&[])?;
    let mut programs = Ordinary::new(&built)?;
    programs.compile(&sources("faults"))?;
    let svmd = Svmd::launch(&Options::default())?;
    let ram = GuestRam::new(Layout::Flat { bytes: RAM_BYTES }, 1)?;
    let vmm = Vmm::without_cpu(&svmd.socket("vm0"), &ram, Profile::CloudHypervisor)?;
    let folder = open_folder()?;
    let machine = HostMachine::start("vm0", vmm, folder.path(), Programs::of(&built, &programs)?)?;
    machine.hold_answers(false)?;
    let told = |command: &[String]| {
        let mut program = machine.start(FIRST_UID, command)?;
        let told = program.line()?;
        program.end()?;
        Ok(told)
    };
    faults(Place::InProcess, arguments, &told, &|_| Ok(machine.ledger()))
}

/// The guest in words, and what was measured there.
fn in_qemu(arguments: &Arguments) -> Result<(String, Vec<Row>)> {
    let name = Place::Qemu.name();
    let rounds = Rounds::of(arguments);
    progress("QEMU: building, and booting a guest");
    let mut programs = of_one("faults")?;
    for name in ["pins", "usual"] {
        programs.compile(&source(name))?;
    }
    let (scene, alone) = Scene::of(&Vm::open()?, "costs", &programs, |guest| {
        progress(&format!("QEMU: programs without an agent, {} rounds", rounds.usual));
        usual(guest, &rounds, "")
    })?;
    let guest = &scene.guest;
    progress("QEMU: programs beside an agent, and followed by it");
    let beside = usual(guest, &rounds, "")?;
    let followed = usual(guest, &rounds, "svm-agent run -- ")?;

    // For the reference: what an ordinary user may do is the kernel's default.
    guest.check(ROOT, ["sh", "-c", "echo 1 > /proc/sys/vm/unprivileged_userfaultfd"])?;
    let told = |command: &[String]| guest.check(FIRST_UID, format!("svm-agent run -- {}", command.join(" ")));
    // Entries of a storm would keep the guest's serial port busy for minutes.
    let ledger = |entries: bool| {
        let verb = if entries { "ledger" } else { "status" };
        let text = guest.check(ROOT, format!("svm-agent {verb} --json"))?;
        let read = if entries {
            serde_json::from_str::<LedgerReport>(&text)
        } else {
            serde_json::from_str::<AgentStatus>(&text).map(|status| status.ledger)
        };
        read.with_context(|| format!("{verb}: {text}"))
    };
    let mut rows = faults(Place::Qemu, arguments, &told, &ledger)?;

    progress(&format!("QEMU: pins, {} rounds", rounds.pins));
    // By root, to whom no limit of pinned memory applies: the program pins by itself, too.
    let told = guest.check(ROOT, format!("svm-agent run -- pins {}", rounds.pins))?;
    rows.extend(costs::pins(name, &parse(&told)?)?);
    rows.extend(costs::programs(name, &alone, &beside, &followed)?);
    let (mib, cpus) = SCENE;
    let words = format!(
        "guest: QEMU ({}), {cpus} CPUs, {mib} MiB, Debian's Linux {}; in process: no guest kernel, nothing is pinned",
        accelerator(),
        guest.release()
    );
    Ok((words, rows))
}

/// What programs cost that use no device, started with these words before them.
fn usual(guest: &Guest, rounds: &Rounds, before: &str) -> Result<Usual> {
    let told = |command: String| parse(&guest.check(FIRST_UID, command)?);
    Ok(Usual {
        run: told(format!("{before}usual run {}", rounds.usual))?,
        start: told(format!("usual start {} {before}usual nothing", rounds.usual))?,
    })
}
