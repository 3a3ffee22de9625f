//! `svm-agent serve`: the keeper, and the serving process that it starts.

#![expect(unsafe_code, reason = "signalfd has no safe wrapper")]

use crate::{AgentArgs, EXIT_FAILED, EXIT_NO_DEVICE, ServeArgs, complain};
use guest_agent::agent::{Agent, AgentOptions};
use guest_agent::broker::{Broker, BrokerOptions};
use guest_agent::driver::pci::{PciDevice, PciHandover, PciTransport};
use guest_agent::keeper::{Keeper, serving};
use guest_agent::pin::KernelPinner;
use guest_agent::socket::{MessageSocket, unlink_dead};
use guest_agent::trust::Trust;
use rustix::net::SocketType;
use rustix::process::Resource;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// finit_module: the file is compressed.
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

/// How long connections are waited for when the device is lost.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors that the keeper and the serving process may have: one for each arena, four for each connection. Twice as
/// many as there may be arenas ([`AgentOptions::total_arenas`]).
const DESCRIPTORS: u64 = 1 << 19;

/// Runs the keeper.
pub fn keep(args: &ServeArgs) -> ExitCode {
    let stop = match prepare(args) {
        Ok(stop) => stop,
        Err(error) => {
            complain(error.as_ref());
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let device = match PciDevice::open(args.pci_address.as_deref(), args.irq.into()) {
        Ok(device) => device,
        Err(error) => {
            complain(&error);
            return ExitCode::from(EXIT_NO_DEVICE);
        }
    };
    log(&format!("driving {} (interrupts: {})", device.address(), device.irq_name()));
    let arguments = args.agent.to_arguments();
    let mut keeper = match Keeper::new(device, Box::new(KernelPinner), log) {
        Ok(keeper) => keeper,
        Err(error) => {
            complain(&error);
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let mut spawn = |socket| {
        remove_sockets(&args.agent);
        serving::spawn(socket, &arguments)
    };
    let ended = keeper.run(&mut spawn, stop.as_fd());
    remove_sockets(&args.agent);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(EXIT_NO_DEVICE)
        }
    }
}

/// A serving process that was killed leaves them, and one that cannot end even listens there. There may be none.
fn remove_sockets(args: &AgentArgs) {
    for socket in [&args.socket, &args.admin_socket] {
        std::fs::remove_file(socket).ok();
    }
}

fn log(line: &str) {
    eprintln!("svm-agent: {line}");
}

/// Everything that can go wrong before the device is touched.
fn prepare(args: &ServeArgs) -> Result<OwnedFd, Box<dyn std::error::Error>> {
    if !rustix::process::geteuid().is_root() {
        return Err("`serve` needs root: for the device's registers, and to know where pages are".into());
    }
    let sockets = [
        (&args.agent.socket, SocketType::SEQPACKET, "--socket"),
        (&args.agent.admin_socket, SocketType::STREAM, "--admin-socket"),
    ];
    for (path, kind, option) in sockets {
        if !path.parent().is_some_and(|folder| folder.as_os_str().is_empty() || folder.is_dir()) {
            return Err(format!("the folder of {} does not exist; choose {option}", path.display()).into());
        }
        unlink_dead(path, kind).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => {
                format!(
                    "{} is in use or is no socket: stop the other svm-agent, or choose {option}",
                    path.display()
                )
            }
            _ => format!("cannot use {}: {error}", path.display()),
        })?;
    }
    // The serving process reads it too; here it is said before anything is touched.
    Trust::load(args.agent.trust.as_deref())?;
    let stop = termination_fd()?;
    if let Err(error) = raise_descriptors() {
        log(&format!("the limit of open files stays as it is ({error}); fewer processes and arenas fit"));
    }
    // The keeper holds what the device writes to, and processes decide how much: it must not be the one that is killed
    // when memory runs out.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log(&format!("the keeper may be killed when memory runs out ({error})"));
    }
    if let Err(error) = KernelPinner::raise_limit() {
        log(&format!("RLIMIT_MEMLOCK stays as it is ({error}); memory cannot be pinned beyond it"));
    }
    for module in &args.modules {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot load the module {}: {error}", module.display()))
        };
        load_module(module).map_err(named)?;
    }
    Ok(stop)
}

/// For this process and those that it starts.
fn raise_descriptors() -> io::Result<()> {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.current.map(|current| current.max(DESCRIPTORS));
    limit.maximum = limit.maximum.map(|maximum| maximum.max(DESCRIPTORS));
    Ok(rustix::process::setrlimit(Resource::Nofile, limit)?)
}

/// Half of this guest's memory, in MiB.
fn half_of_memory() -> u32 {
    let info = rustix::system::sysinfo();
    let bytes = u64::from(info.mem_unit) * info.totalram;
    u32::try_from((bytes / 2) >> 20).unwrap_or(u32::MAX)
}

/// A descriptor that becomes readable at SIGTERM and SIGINT, which do nothing else any more.
fn termination_fd() -> io::Result<OwnedFd> {
    // SAFETY: a signal set is plain data for which all zeros is a value; it is emptied next anyway.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a set that lives here.
    unsafe { libc::sigemptyset(&raw mut signals) };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the pointer is to a set that lives here; the signals exist.
        unsafe { libc::sigaddset(&raw mut signals, signal) };
    }
    // SAFETY: the set is initialised; no old set is asked for. No other thread runs yet.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: -1 asks for a new descriptor; the set is initialised.
    let fd = unsafe { libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let compressed = path.extension().is_some_and(|extension| extension != "ko");
    let flags = if compressed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    match rustix::system::finit_module(&file, c"", flags) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Runs the serving process: standard input is the keeper's socket.
pub fn serve(args: &AgentArgs) -> ExitCode {
    match serve_for_keeper(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(error.as_ref());
            ExitCode::from(EXIT_FAILED)
        }
    }
}

fn serve_for_keeper(args: &AgentArgs) -> Result<(), Box<dyn std::error::Error>> {
    // Started through /proc/self/exe, which would be called "exe".
    rustix::thread::set_name(c"svm-agent")?;
    let fd = io::stdin().as_fd().try_clone_to_owned()?;
    // Any other process is the better victim than the keeper, and this one is replaced. Best effort.
    std::fs::write("/proc/self/oom_score_adj", "0").ok();
    let (watch, keeper) = (fd.try_clone()?, fd.try_clone()?);
    let socket = MessageSocket::from(fd);
    let (handover, dma, fds) = serving::take_over(&socket)?;
    let hardware: PciHandover = serde_json::from_value(handover.hardware.clone())?;
    let transport = Arc::new(PciTransport::new(&hardware, fds)?);
    let stopping = transport.clone();
    // From now on, whatever else this process is doing.
    std::thread::Builder::new().name("svm-watch".into()).spawn(move || end_with_keeper(&watch, &stopping))?;
    let device = serving::drive(&handover, dma, transport.clone())?;
    let memory = Arc::new(serving::KeeperMemory::new(socket)?);
    let agent = Agent::start(Arc::new(device), memory, args.agent_options()?)?;
    let broker = Broker::start(agent.clone(), args.broker_options())?;
    log(&format!("serving processes at {}", args.socket.display()));
    while !agent.has_failed() {
        std::thread::sleep(Duration::from_millis(200));
    }
    broker.close(CLOSE_PATIENCE);
    // Before this process has ended, which may take longer: the keeper waits for nothing else.
    rustix::net::shutdown(&keeper, rustix::net::Shutdown::Both)?;
    Err("the device is lost".into())
}

/// Waits for the keeper's end. The pins are going down then: the device must not write any more.
fn end_with_keeper(watch: &OwnedFd, transport: &PciTransport) {
    while !serving::keeper_gone(watch, Duration::from_secs(3600)) {}
    match transport.stop() {
        Ok(()) => log("the connection to the keeper has ended; the device was stopped"),
        Err(error) => log(&format!("the keeper has gone, and the device could not be stopped: {error}")),
    }
    std::process::exit(i32::from(EXIT_FAILED));
}

impl AgentArgs {
    fn agent_options(&self) -> Result<AgentOptions, guest_agent::trust::Error> {
        let total = u64::from(self.total_memory.unwrap_or_else(half_of_memory)) << 20;
        let of_user = self.user_memory.map(|mib| u64::from(mib) << 20);
        let defaults = AgentOptions::default();
        Ok(AgentOptions {
            fault_around_pages: self.fault_around,
            hold_answers: self.hold_answers,
            context_arena_bytes: u64::from(self.process_memory) << 20,
            user_arena_bytes: of_user.unwrap_or(total / 4 * 3),
            total_arena_bytes: total,
            serving_threads: self.serving_threads.map_or(defaults.serving_threads, usize::from),
            trust: Trust::load(self.trust.as_deref())?,
            ..defaults
        })
    }

    fn broker_options(&self) -> BrokerOptions {
        BrokerOptions {
            admin_socket: Some(self.admin_socket.clone()),
            max_clients: self.max_clients,
            max_clients_per_uid: self.max_clients_per_user,
            ..BrokerOptions::at(&self.socket)
        }
    }

    /// The options again, for the serving process' command line.
    fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--socket={}", self.socket.display()),
            format!("--admin-socket={}", self.admin_socket.display()),
            format!("--fault-around={}", self.fault_around),
            format!("--process-memory={}", self.process_memory),
            format!("--max-clients={}", self.max_clients),
            format!("--max-clients-per-user={}", self.max_clients_per_user),
        ];
        let some = [
            self.user_memory.map(|mib| format!("--user-memory={mib}")),
            self.total_memory.map(|mib| format!("--total-memory={mib}")),
            self.serving_threads.map(|threads| format!("--serving-threads={threads}")),
            self.trust.as_ref().map(|file| format!("--trust={}", file.display())),
        ];
        arguments.extend(some.into_iter().flatten());
        if self.hold_answers {
            arguments.push("--hold-answers".into());
        }
        arguments
    }
}
