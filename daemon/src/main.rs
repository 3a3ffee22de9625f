//! svmd, the program: command line, logging, devices, guests, signals, exit status. All work is done in the library.
//!
//! Threads: this one runs a small tokio runtime for signals and the control socket and never touches guest memory;
//! each engine, guest and session has its own (DESIGN.md).

mod args;
mod inherited;

use anyhow::Context;
use args::Args;
use clap::Parser;
use config::{Config, LogLevel, Overrides, Sandbox};
use daemon::control::methods::Rights;
use daemon::control::{self, ControlState, Users};
use daemon::devices::Devices;
use daemon::panic_log;
use daemon::registry::{AddError, Endpoint, GuestSpec, Options, Registry, RegistryEvent};
use daemon::sandbox::{self, Profile};
use daemon::socket::{ListeningSocket, PRIVATE};
use rustix::fs::Mode;
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;

/// Longer than any daemon runs.
const FOR_EVER: Duration = Duration::from_hours(1 << 20);
/// Exit status for a bad command line or configuration; clap uses the same.
const USAGE: u8 = 2;

/// Whose mistake it was.
enum Failure {
    /// The command line's or the configuration's.
    Usage(anyhow::Error),
    /// The machine's.
    Runtime(anyhow::Error),
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_capabilities {
        println!("{}", serde_json::json!({"type": "gpu", "features": []}));
        return ExitCode::SUCCESS;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(va_bits) = args.hostmmu_worker {
        return be_worker(va_bits);
    }
    let done = if args.print_sandbox { print_sandbox(&args) } else { run(&args) };
    let (status, error) = match done {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => (ExitCode::from(USAGE), error),
        Err(Failure::Runtime(error)) => (ExitCode::FAILURE, error),
    };
    eprintln!("svmd: {error:#}");
    status
}

/// This process was started by another svmd, for one GPU VM.
#[cfg(target_arch = "x86_64")]
fn be_worker(va_bits: u32) -> ExitCode {
    match daemon::hostmmu::worker::run(va_bits) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("svmd: worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    // First of all, while every open descriptor is an inherited one.
    let inherited = args.fd.map(inherited::take).transpose().map_err(Failure::Usage)?;
    let config = args.configuration().map_err(Failure::Usage)?;
    log_to_stderr(config.daemon.log);
    panic_log::install(config.limits.log_lines);
    // Sockets are made with a mode of their own each; nothing else is made, so this takes away what none of them has.
    let modes = control_mode(&config.daemon) | read_only_mode(&config.daemon) | PRIVATE;
    rustix::process::umask(Mode::from_raw_mode(0o777) - modes);
    // While limits of CPU time can be read: the kernel tells them in files.
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    // Before any other thread: they are confined as the one that starts them.
    confine(&config)?;
    let runtime = start_runtime().map_err(Failure::Runtime)?;

    let (host, devices) = Devices::start(&config.devices(), cpus).map_err(|e| Failure::Runtime(e.into()))?;
    #[cfg(feature = "sabotage")]
    if args.sabotage == Some(args::Sabotage::SwapAsid) {
        host.sabotage_swap_asids();
    }
    let options = Options {
        runtime_dirs: config.daemon.runtime_dirs.clone(),
        limits: config.limits,
        allow_unsealed: config.daemon.allow_unsealed,
    };
    let registry = Registry::new(host, options).map_err(|e| Failure::Runtime(e.into()))?;
    let served = runtime.block_on(serve(&registry, &config, inherited.zip(args.fd)));
    // A `guest.remove` that is under way has its thread in there, which is waited for.
    drop(runtime);
    // Sessions before devices: closing a guest waits for the engines.
    registry.shutdown();
    devices.stop();
    served
}

/// The runtime of control sockets and signals, with one thread for methods, which stays: a thread more that cannot be had
/// is then a request that waits, and no panic. What the runtime itself cannot have is one, and is made an error of; it is
/// the only thread that could panic yet, so nobody else's panic goes unheard.
fn start_runtime() -> anyhow::Result<Runtime> {
    let start = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().max_blocking_threads(control::METHOD_THREADS).thread_keep_alive(FOR_EVER);
        let runtime = builder.build()?;
        // It has nothing to say.
        drop(runtime.spawn_blocking(|| ()));
        std::io::Result::Ok(runtime)
    };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let started = std::panic::catch_unwind(start);
    std::panic::set_hook(hook);
    match started {
        Ok(started) => Ok(started.context("cannot start the runtime")?),
        Err(panic) => {
            let reason =
                panic.downcast_ref::<String>().map_or("out of descriptors or threads", String::as_str);
            anyhow::bail!("cannot start the runtime: {reason}")
        }
    }
}

/// Enters the sandbox. What of it is not in force is told, and is an error if all of it was asked for.
fn confine(config: &Config) -> Result<(), Failure> {
    if config.daemon.sandbox == Sandbox::Off {
        tracing::warn!("not confined, as the configuration or --sandbox has it");
        return Ok(());
    }
    let report = sandbox::enter(&Profile::of(config));
    for measure in report.lacking() {
        let (name, reason) = (measure.name, &measure.detail);
        if config.daemon.sandbox == Sandbox::Strict {
            let error = anyhow::anyhow!("cannot be confined as --sandbox=strict asks: {name}: {reason}");
            return Err(Failure::Runtime(error));
        }
        tracing::warn!(%reason, "not confined in full: {name}");
    }
    Ok(())
}

/// The sandbox is entered for that: what is printed is what this kernel has granted.
fn print_sandbox(args: &Args) -> Result<(), Failure> {
    let config = args.configuration().map_err(Failure::Usage)?;
    if config.daemon.sandbox == Sandbox::Off {
        println!("off: not confined");
    } else {
        print!("{}", sandbox::enter(&Profile::of(&config)));
    }
    Ok(())
}

/// Until a signal or an operator ends it.
async fn serve(
    registry: &Arc<Registry>,
    config: &Config,
    inherited: Option<(Endpoint, i32)>,
) -> Result<(), Failure> {
    // Before the first socket is made, so that a signal finds all of them removed.
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    let shutdown = Arc::new(Notify::new());
    let state = ControlState::new(Arc::clone(registry), Arc::clone(&shutdown));

    add_guests(registry, config)?;
    // After the guests' sockets: whoever can connect to a control socket finds those of the configuration.
    let doors = Doors::open(&config.daemon)?;
    if let Some((socket, number)) = inherited {
        if matches!(socket, Endpoint::Connected(_)) && doors.0.is_empty() && config.guest.is_empty() {
            end_with_its_only_guest(registry, &shutdown);
        }
        add(
            registry,
            GuestSpec { name: format!("fd{number}"), socket, devices: None, limits: Overrides::default() },
        )?;
    }
    let control = doors.serve(&state);
    tokio::select! {
        ended = control => ended.map_err(|e| Failure::Runtime(e.into())),
        () = shutdown.notified() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// The sockets for operators, and what each of them is for.
struct Doors(Vec<(ListeningSocket, control::Options)>);

impl Doors {
    fn open(config: &config::Daemon) -> Result<Self, Failure> {
        let mut doors = Vec::new();
        if let Some(path) = &config.control_socket {
            let socket = ListeningSocket::make_anywhere(path, control_mode(config)).map_err(refused)?;
            let users = Users::Only(config.control_users.clone());
            doors.push((socket, control::Options { users, ..control::Options::default() }));
        }
        if let Some(path) = &config.control_socket_ro {
            let socket = ListeningSocket::make_anywhere(path, read_only_mode(config)).map_err(refused)?;
            let (rights, users) = (Rights::ReadOnly, Users::All);
            doors.push((socket, control::Options { rights, users, ..control::Options::default() }));
        }
        Ok(Self(doors))
    }

    /// Until one of them cannot be served; for ever where there is none.
    async fn serve(&self, state: &Arc<ControlState>) -> std::io::Result<()> {
        let mut serving = tokio::task::JoinSet::new();
        for (socket, options) in &self.0 {
            serving.spawn(control::serve(socket.to_tokio()?, Arc::clone(state), options.clone()));
        }
        match serving.join_next().await {
            Some(ended) => ended.map_err(std::io::Error::other),
            None => std::future::pending().await,
        }
    }
}

/// The peers' user ids decide where other users than our own may come.
fn control_mode(config: &config::Daemon) -> Mode {
    if config.control_users.is_empty() { PRIVATE } else { Mode::from_raw_mode(0o666) }
}

fn read_only_mode(config: &config::Daemon) -> Mode {
    Mode::from_raw_mode(config.control_socket_ro_mode)
}

fn listen_for(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|e| Failure::Runtime(e.into()))
}

fn add_guests(registry: &Registry, config: &Config) -> Result<(), Failure> {
    for guest in &config.guest {
        let (name, socket) = (guest.name.clone(), Endpoint::Path(guest.socket.clone()));
        let (devices, limits) = (guest.devices.clone(), guest.limits.clone());
        add(registry, GuestSpec { name, socket, devices, limits })?;
    }
    Ok(())
}

/// Two guests of one name are a mistake here even if they are equal.
fn add(registry: &Registry, spec: GuestSpec) -> Result<(), Failure> {
    let name = spec.name.clone();
    match registry.add(spec) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::Usage(anyhow::anyhow!("guest {name:?} is named twice"))),
        Err(error) => Err(refused(error)),
    }
}

/// Who is to blame for a socket that could not be made.
fn refused(error: AddError) -> Failure {
    match error {
        AddError::BadName(_)
        | AddError::NameTaken { .. }
        | AddError::SocketOutsideRuntimeDirs(_)
        | AddError::UnknownDevice(_)
        | AddError::DeviceTwice(_) => Failure::Usage(error.into()),
        AddError::SocketInUse(_) | AddError::ShuttingDown | AddError::Io { .. } => {
            Failure::Runtime(error.into())
        }
    }
}

/// A daemon that was started for one connection and that nobody can reach otherwise ends with it.
fn end_with_its_only_guest(registry: &Registry, shutdown: &Arc<Notify>) {
    let shutdown = Arc::clone(shutdown);
    registry.subscribe(Box::new(move |event| {
        if matches!(event, RegistryEvent::GuestDisconnected { .. }) {
            shutdown.notify_one();
        }
    }));
}

fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level).init();
}
