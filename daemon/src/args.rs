//! The command line of svmd, and what it makes of the configuration file.

use clap::{ArgAction, Parser, ValueEnum};
use config::{Config, LogLevel, Sandbox};
use std::path::{Path, PathBuf};

/// Shares the host's GPUs with the processes of many virtual machines. Each guest's VMM connects to a vhost-user socket
/// of its own; the processes in it map their memory into GPU address spaces, and every device fault goes to the process
/// that owns it.
///
/// Exit status: 0 after SIGTERM, SIGINT or `svmctl shutdown`; 1 when something failed; 2 for a bad command line or
/// configuration.
#[derive(Debug, Parser)]
#[command(name = "svmd", version, max_term_width = 100)]
pub struct Args {
    /// Make a vhost-user socket and serve a guest on it, named after the file without its extension. Repeatable.
    #[arg(long, value_name = "PATH", action = ArgAction::Append, conflicts_with = "fd")]
    pub socket_path: Vec<PathBuf>,

    /// Serve one guest on an inherited vhost-user socket, listening or connected. With a connected one, and without a
    /// control socket, svmd ends when that VMM leaves. At least 3.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(3..))]
    pub fd: Option<i32>,

    /// Make the socket on which svmctl reaches the daemon. Overrides daemon.control_socket of the configuration.
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Make a second socket, for looking only, with the mode of daemon.control_socket_ro_mode. Overrides
    /// daemon.control_socket_ro of the configuration.
    #[arg(long, value_name = "PATH")]
    pub control_socket_ro: Option<PathBuf>,

    /// Read this configuration file. Default: two software devices with one engine each, no guests.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Allow guest sockets below this folder only. Repeatable; adds to daemon.runtime_dirs of the configuration.
    /// Default: the folders of the control socket and of the guest sockets named at the start.
    #[arg(long, value_name = "DIR", action = ArgAction::Append)]
    pub runtime_dir: Vec<PathBuf>,

    /// Accept guest memory that its VMM could shrink (no F_SEAL_SHRINK). A VMM that does so under running work loses its
    /// session.
    #[arg(long)]
    pub allow_unsealed: bool,

    /// How much to log on stderr. Overrides daemon.log of the configuration (default there: info).
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub log: Option<Log>,

    /// How svmd confines itself before it serves anybody. Overrides daemon.sandbox of the configuration (default there:
    /// best-effort).
    #[arg(long, value_name = "MODE", value_enum)]
    pub sandbox: Option<Confinement>,

    /// Enter the sandbox that the other options and the configuration ask for, print what of it is in force, and exit.
    #[arg(long)]
    pub print_sandbox: bool,

    /// Print what this backend can do as JSON, as QEMU's vhost-user conventions ask, and exit.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Be the worker of a GPU VM of this many address bits. svmd starts itself so.
    #[cfg(target_arch = "x86_64")]
    #[arg(long, value_name = "VA_BITS", hide = true, exclusive = true,
        value_parser = clap::value_parser!(u32).range(22..=i64::from(daemon::hostmmu::MAX_VA_BITS)))]
    pub hostmmu_worker: Option<u32>,

    /// Do something wrong on purpose, so that checks can be shown to fail.
    #[cfg(feature = "sabotage")]
    #[arg(long, value_name = "HOW", value_enum, hide = true)]
    pub sabotage: Option<Sabotage>,
}

/// Log levels by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Log {
    /// What ends the daemon or a session wrongly.
    Error,
    /// And what somebody should look at.
    Warn,
    /// And sessions that begin and end.
    Info,
    /// And what happens inside them.
    Debug,
    /// Everything.
    Trace,
}

/// Ways to confine the daemon, by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Confinement {
    /// Everything of it, or svmd does not start.
    Strict,
    /// As far as the kernel can; what it cannot is a warning.
    BestEffort,
    /// Nothing.
    Off,
}

/// Ways to do something wrong.
#[cfg(feature = "sabotage")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sabotage {
    /// Route two contexts' faults to each other.
    SwapAsid,
}

impl Args {
    /// The configuration file with the command line put over it.
    ///
    /// # Errors
    /// An unreadable or wrong file, a socket without a usable name, or nothing to serve.
    pub fn configuration(&self) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        for path in &self.socket_path {
            let name = guest_name(path)?;
            config.guest.push(config::Guest {
                name,
                socket: path.clone(),
                devices: None,
                limits: config::Overrides::default(),
            });
        }
        let daemon = &mut config.daemon;
        daemon.control_socket = self.control_socket.clone().or(daemon.control_socket.take());
        daemon.control_socket_ro = self.control_socket_ro.clone().or(daemon.control_socket_ro.take());
        daemon.allow_unsealed |= self.allow_unsealed;
        daemon.log = self.log.map_or(daemon.log, LogLevel::from);
        daemon.sandbox = self.sandbox.map_or(daemon.sandbox, Sandbox::from);
        daemon.runtime_dirs.extend(self.runtime_dir.iter().cloned());
        if daemon.runtime_dirs.is_empty() {
            let named = config.guest.iter().map(|guest| &guest.socket).chain(&daemon.control_socket);
            daemon.runtime_dirs = named.map(|path| folder(path).to_owned()).collect();
        }
        if let Some(missing) = daemon.runtime_dirs.iter().find(|dir| !dir.is_dir()) {
            anyhow::bail!(
                "runtime folder {missing:?} does not exist; make it, or name another with --runtime-dir"
            );
        }
        if daemon.control_socket.is_some() && daemon.control_socket == daemon.control_socket_ro {
            anyhow::bail!("the control socket and the read-only one have the same path; name another");
        }
        let serves = !config.guest.is_empty() || daemon.control_socket.is_some() || self.fd.is_some();
        if !serves && !self.print_sandbox {
            anyhow::bail!(
                "nothing to serve: give --socket-path, --control-socket, --fd or a --config with one of them"
            );
        }
        Ok(config)
    }
}

/// The folder of a path; the current one for a bare name.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn guest_name(path: &Path) -> anyhow::Result<String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let stem =
        stem.ok_or_else(|| anyhow::anyhow!("--socket-path {path:?} has no file name to call a guest by"))?;
    Ok(stem.to_owned())
}

impl From<Log> for LogLevel {
    fn from(level: Log) -> Self {
        match level {
            Log::Error => Self::Error,
            Log::Warn => Self::Warn,
            Log::Info => Self::Info,
            Log::Debug => Self::Debug,
            Log::Trace => Self::Trace,
        }
    }
}

impl From<Confinement> for Sandbox {
    fn from(mode: Confinement) -> Self {
        match mode {
            Confinement::Strict => Self::Strict,
            Confinement::BestEffort => Self::BestEffort,
            Confinement::Off => Self::Off,
        }
    }
}
