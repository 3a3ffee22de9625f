//! `svm-agent`: the command line of the agent.
//!
//! `serve` is the keeper, which starts a serving process; `run` starts a program with its memory in arenas; the others ask
//! a running agent over its operator's socket.
//! Exit codes are part of the interface: see [`EXIT_HELP`].

mod processes;
mod run;
mod serve;

use clap::{Args, Parser, Subcommand, ValueEnum};
use guest_agent::agent::{AgentStatus, LedgerReport};
use guest_agent::broker::{AdminError, AdminRequest, ask_admin};
use guest_agent::driver::pci::irq::IrqMode;
use guest_agent::message::{DEFAULT_ADMIN_SOCKET, DEFAULT_SOCKET};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const EXIT_HELP: &str = "\
Exit codes:
  0  done; for `serve`: stopped by SIGTERM or SIGINT with nothing left in use
  1  failed; the reason is on standard error
  2  wrong usage
  3  no agent is running at the operator's socket
  4  no virtio-gpu device, or it cannot be driven
`run` exits as the program does; 126 and 127 also say, as in a shell, that it cannot be started or is not there.";
const EXIT_FAILED: u8 = 1;
const EXIT_NO_AGENT: u8 = 3;
const EXIT_NO_DEVICE: u8 = 4;

/// Lets this guest's processes share their memory with GPUs of the host.
///
/// `serve` owns the guest's virtio-gpu device. Programs connect to its socket, get memory that GPUs reach too (arenas),
/// and launch jobs on plain pointers. A job's first access to a page is a fault, which the agent answers with the page.
#[derive(Parser)]
#[command(name = "svm-agent", version, after_help = EXIT_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Drive the device and serve processes until SIGTERM or SIGINT; needs root
    Serve(ServeArgs),
    /// Run a program with its memory where GPUs reach it: what malloc gives, globals, the stacks of threads
    ///
    /// The program stays as it is, and hands plain pointers into that memory to GPUs. A process' memory is brought into
    /// reach when it first asks for a device (svm_open); until then it pays next to nothing. It must be linked dynamically,
    /// since libsvm_alloc.so is loaded before the C library. Processes that it starts run so too.
    Run(run::RunArgs),
    /// Show which processes have memory that GPUs reach, and how much
    Ps {
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show where a process has memory that GPUs reach, and which of it they have asked for
    Map {
        /// The process
        #[arg(value_name = "PID")]
        pid: i32,
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show devices, contexts, pinned memory and fault counts of the running agent
    Status {
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show which faults were answered, how, and how long that took: from their record's being found in the ring to the
    /// doorbell's being rung
    Ledger {
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Hold answers to faults back until `release`: jobs wait, so what is pending can be looked at. Longer than the
    /// daemon's deadline (fault_deadline_ms, by default 60 s), and the jobs fail and their GPU VMs are unusable
    Hold {
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line
        #[arg(long)]
        json: bool,
    },
    /// Let held answers go, and hold none back any more
    Release {
        #[command(flatten)]
        admin: AdminArgs,
        /// Print one JSON object on one line
        #[arg(long)]
        json: bool,
    },
    /// What the keeper starts; its standard input is the keeper's socket
    #[command(hide = true, name = guest_agent::keeper::serving::SUBCOMMAND)]
    ServeForKeeper(AgentArgs),
}

#[derive(Args)]
struct AdminArgs {
    /// The operator's socket of the agent
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET)]
    admin_socket: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum IrqArg {
    /// Interrupts if uio_pci_generic can be had, else polling
    Auto,
    /// Interrupts through uio_pci_generic, or fail
    Uio,
    /// No interrupts: look every half millisecond
    Poll,
}

impl From<IrqArg> for IrqMode {
    fn from(arg: IrqArg) -> Self {
        match arg {
            IrqArg::Auto => IrqMode::Auto,
            IrqArg::Uio => IrqMode::Uio,
            IrqArg::Poll => IrqMode::Poll,
        }
    }
}

#[derive(Args)]
struct ServeArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// The device's PCI address, such as 0000:00:04.0; needed only if there are several virtio-gpu devices
    #[arg(long, value_name = "ADDRESS")]
    pci_address: Option<String>,
    /// How to learn that the device has something to say
    #[arg(long, value_enum, default_value_t = IrqArg::Auto)]
    irq: IrqArg,
    /// Kernel module file (.ko, also compressed) to load first; repeatable, in order. Already loaded ones are fine
    #[arg(long = "module", value_name = "FILE")]
    modules: Vec<PathBuf>,
}

/// Options of the serving process; the keeper passes them on.
#[derive(Args)]
struct AgentArgs {
    /// Socket for processes; anybody in the guest may connect
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Socket for the operator; only root may connect
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET)]
    admin_socket: PathBuf,
    /// Pages of 4 KiB that one answer to a fault covers: an aligned window, cut to the arena. A power of two
    #[arg(long, value_name = "PAGES", default_value_t = 16, value_parser = parse_window)]
    fault_around: u32,
    /// Hold answers to faults back until `svm-agent release`
    #[arg(long)]
    hold_answers: bool,
    /// MiB of pinned memory that one connection may have
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    process_memory: u32,
    /// MiB of pinned memory that all connections of one user may have, each piece with 32 KiB more [default: three quarters of
    /// all]
    #[arg(long, value_name = "MIB")]
    user_memory: Option<u32>,
    /// MiB of pinned memory in all, each piece with 32 KiB more [default: half of the guest's memory]
    #[arg(long, value_name = "MIB")]
    total_memory: Option<u32>,
    /// Threads that answer faults and pass records on, at most 64 [default: one for each CPU, at most 4]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u8).range(1..=64))]
    serving_threads: Option<u8>,
    /// File that says whose processes are trusted: `trusted_uids = [..]`; of root's, and not writable by others. Trusted
    /// processes may have GPUs reach their memory where it stands, and can so harm others [default: /etc/svm-agent.toml
    /// if it is there, else nobody is trusted]
    #[arg(long, value_name = "FILE")]
    trust: Option<PathBuf>,
    /// Connections at once, 16 of them for root alone
    #[arg(long, value_name = "COUNT", default_value_t = 512)]
    max_clients: usize,
    /// Connections of one user at once; users other than root also have at most as many as are free for others
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    max_clients_per_user: usize,
}

fn parse_window(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(pages @ 1..=512u32) if pages.is_power_of_two() => Ok(pages),
        _ => Err("a power of two from 1 to 512 is wanted".into()),
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Verb::Serve(args) => serve::keep(&args),
        Verb::ServeForKeeper(args) => serve::serve(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Ps { admin, json } => processes::ps(&admin, json),
        Verb::Map { pid, admin, json } => processes::map(&admin, pid, json),
        Verb::Status { admin, json } => ask(&admin, AdminRequest::Status, json, print_status),
        Verb::Ledger { admin, json } => ask(&admin, AdminRequest::Ledger, json, print_ledger),
        Verb::Hold { admin, json } => ask(&admin, AdminRequest::Hold, json, print_holding),
        Verb::Release { admin, json } => ask(&admin, AdminRequest::Release, json, print_released),
    }
}

/// Prints an error with its causes.
fn complain(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    eprintln!("svm-agent: {text}");
}

/// Asks the agent and prints its answer.
fn ask<T>(
    admin: &AdminArgs,
    request: AdminRequest,
    json: bool,
    print: fn(&mut dyn Write, &T) -> std::io::Result<()>,
) -> ExitCode
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    match answer(admin, request) {
        Ok(answer) => show(&answer, json, print),
        Err(code) => code,
    }
}

/// The agent's answer; where there is none, that was said.
fn answer<T: serde::de::DeserializeOwned>(admin: &AdminArgs, request: AdminRequest) -> Result<T, ExitCode> {
    ask_admin(&admin.admin_socket, request).map_err(|error| {
        complain(&error);
        let no_agent = matches!(error, AdminError::NotReachable { .. });
        ExitCode::from(if no_agent { EXIT_NO_AGENT } else { EXIT_FAILED })
    })
}

fn show<T: serde::Serialize>(
    answer: &T,
    json: bool,
    print: fn(&mut dyn Write, &T) -> std::io::Result<()>,
) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let printed = if json {
        serde_json::to_writer(&mut out, answer).map_err(std::io::Error::from).and_then(|()| writeln!(out))
    } else {
        print(&mut out, answer)
    };
    // A reader that has seen enough is not an error of ours.
    if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) }
}

fn print_status(out: &mut dyn Write, status: &AgentStatus) -> std::io::Result<()> {
    let holding = if status.holding_answers { ", holding answers back" } else { "" };
    writeln!(out, "agent {}{holding}; daemon epoch {:#x}", status.state, status.daemon_epoch)?;
    match &status.trust_file {
        Some(file) => writeln!(out, "trust: as {} says", file.display())?,
        None => writeln!(out, "trust: nobody (no trust file)")?,
    }
    for device in &status.devices {
        let (id, name, bits, engines) = (device.dev_id, &device.name, device.va_bits, device.engines);
        writeln!(out, "device {id}: {name}, {bits} address bits, {engines} engines")?;
    }
    writeln!(
        out,
        "{:>6} {:>8} {:>6} {:<9} {:<8} {:>6} {:>12} {:>8}  program",
        "ctx", "pid", "uid", "state", "trust", "arenas", "bytes", "faults"
    )?;
    for context in &status.contexts {
        let (owner, state) = (&context.owner, &context.state);
        writeln!(
            out,
            "{:>6} {:>8} {:>6} {state:<9} {:<8} {:>6} {:>12} {:>8}  {}",
            context.ctx_id,
            owner.pid,
            owner.uid,
            context.trust.name(),
            context.arenas,
            context.arena_bytes,
            context.faults,
            owner.name
        )?;
    }
    let ledger = &status.ledger;
    writeln!(out, "pinned {} bytes; {}", status.pinned_bytes, counts(ledger))
}

fn counts(ledger: &LedgerReport) -> String {
    format!(
        "{} faults: {} answered, {} refused, {} pending ({} held back), {} stale, {} retries",
        ledger.faults,
        ledger.answered,
        ledger.refused,
        ledger.pending,
        ledger.held,
        ledger.stale,
        ledger.retries
    )
}

fn print_ledger(out: &mut dyn Write, ledger: &LedgerReport) -> std::io::Result<()> {
    writeln!(
        out,
        "{:>6} {:>8} {:>4} {:>18} {:>18} {:>5} {:>5} {:>10} answer",
        "ctx", "pid", "dev", "gpu address", "cpu address", "perm", "pages", "took us"
    )?;
    for entry in &ledger.entries {
        writeln!(
            out,
            "{:>6} {:>8} {:>4} {:>#18x} {:>#18x} {:>5} {:>5} {:>8}.{} {:?} ({})",
            entry.ctx_id,
            entry.pid,
            entry.dev_id,
            entry.gpu_addr,
            entry.cpu_addr,
            entry.perm,
            entry.pages,
            entry.answer_ns / 1000,
            entry.answer_ns % 1000 / 100,
            entry.code,
            entry.status
        )?;
    }
    writeln!(out, "{}", counts(ledger))
}

/// The answer to `hold`.
#[derive(serde::Serialize, serde::Deserialize)]
struct Holding {
    /// Answers are held back.
    holding: bool,
}

fn print_holding(out: &mut dyn Write, answer: &Holding) -> std::io::Result<()> {
    writeln!(out, "{}", if answer.holding { "answers are held back" } else { "answers go" })
}

/// The answer to `release`.
#[derive(serde::Serialize, serde::Deserialize)]
struct Released {
    /// Answers that went.
    released: usize,
}

fn print_released(out: &mut dyn Write, answer: &Released) -> std::io::Result<()> {
    writeln!(out, "{} answers released", answer.released)
}
