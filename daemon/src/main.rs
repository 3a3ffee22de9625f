//! svmd, the program: command line, logging, devices, guests, signals, exit status. All work is done in the library.
//!
//! Threads: this one runs a small tokio runtime for signals and the control socket and never touches guest memory;
//! each engine, guest and session has its own (DESIGN.md).

mod args;
mod inherited;

use args::Args;
use clap::Parser;
use config::{Config, LogLevel, Overrides, Sandbox};
use daemon::control::{self, ControlState};
use daemon::devices::Devices;
use daemon::housekeeper::Housekeeper;
use daemon::registry::{AddError, Endpoint, GuestSpec, Options, Registry, RegistryEvent};
use daemon::sandbox::{self, Profile};
use daemon::socket::ListeningSocket;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;

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
    // Before any other thread: they are confined as the one that starts them.
    confine(&config)?;

    let (host, devices) = Devices::start(&config.devices()).map_err(|e| Failure::Runtime(e.into()))?;
    #[cfg(feature = "sabotage")]
    if args.sabotage == Some(args::Sabotage::SwapAsid) {
        host.sabotage_swap_asids();
    }
    let housekeeper = Housekeeper::start(Arc::clone(&host)).map_err(|e| Failure::Runtime(e.into()))?;
    let registry = Registry::new(
        host,
        Options {
            runtime_dirs: config.daemon.runtime_dirs.clone(),
            limits: config.limits,
            allow_unsealed: config.daemon.allow_unsealed,
        },
    );
    let served = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Runtime(e.into()))
        .and_then(|runtime| runtime.block_on(serve(&registry, &config, inherited.zip(args.fd))));
    // Sessions first: closing a guest waits for the engines. For the same reason a `guest.remove` that was under way is
    // waited for: with the end of the runtime above, which joins it.
    registry.shutdown();
    housekeeper.stop();
    devices.stop();
    served
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

    let control_socket = config.daemon.control_socket.as_deref();
    let control_socket = control_socket.map(ListeningSocket::make_anywhere).transpose().map_err(refused)?;
    add_guests(registry, config)?;
    if let Some((socket, number)) = inherited {
        if matches!(socket, Endpoint::Connected(_)) && control_socket.is_none() && config.guest.is_empty() {
            end_with_its_only_guest(registry, &shutdown);
        }
        add(
            registry,
            GuestSpec { name: format!("fd{number}"), socket, devices: None, limits: Overrides::default() },
        )?;
    }
    let control = async {
        match &control_socket {
            Some(socket) => control::serve(socket.to_tokio()?, state, control::Options::default()).await,
            None => std::future::pending().await,
        }
        std::io::Result::Ok(())
    };
    tokio::select! {
        ended = control => ended.map_err(|e| Failure::Runtime(e.into())),
        () = shutdown.notified() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
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
