//! A daemon of its own for a test or demo: configuration, process, control socket, and a clean end.
//!
//! The folder given at the start holds everything: `svmd.toml`, `control.sock`, one vhost-user socket a guest
//! (`NAME.sock`) and `svmd.log`, which tests print when they fail.

use crate::ledger::Raised;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use virtio_gpu_svm::device::Access;

/// How long the daemon may take to listen, to end, or to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What executes the jobs of the host devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceKind {
    /// The embedded software GPU
    #[default]
    Soft,
    /// A worker process per GPU VM, whose page tables are the GPU's: faults are the CPU's own
    Hostmmu,
}

impl DeviceKind {
    /// As in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Hostmmu => "hostmmu",
        }
    }
}

/// What the daemon is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Guests that are there from the start.
    pub guests: Vec<String>,
    /// Host devices, called `soft0`, `soft1`, ... or `hostmmu0`, ...
    pub devices: usize,
    /// What they are.
    pub kind: DeviceKind,
    /// Engines of each; 1 for `hostmmu`.
    pub engines: u32,
    /// Faults that each device's ledger keeps.
    pub ledger: usize,
    /// Further lines of the configuration file.
    pub more: String,
    /// Further arguments.
    pub arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            guests: vec!["vm0".into()],
            devices: 2,
            kind: DeviceKind::Soft,
            engines: 1,
            ledger: 1 << 20,
            more: String::new(),
            arguments: vec![],
        }
    }
}

/// A running daemon. Killed when dropped, unless it was stopped before.
#[derive(Debug)]
pub struct Svmd {
    child: Mutex<Child>,
    folder: PathBuf,
    devices: usize,
    control: Mutex<BufReader<UnixStream>>,
    /// Removed with the daemon, if it was made for it.
    _own_folder: Option<TempDir>,
}

impl Svmd {
    /// Builds the daemon of this workspace and starts it in a folder of its own, which goes with it.
    ///
    /// # Errors
    /// It does not compile, or does not start.
    pub fn launch(options: &Options) -> Result<Self> {
        static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let build = || Ok(crate::binaries::build_host(&[])?.get("svmd")?.to_owned());
        let program = PROGRAM.get_or_init(|| build().map_err(|cause: anyhow::Error| format!("{cause:#}")));
        let program = program.as_ref().map_err(|cause| anyhow::anyhow!("{cause}"))?;
        let folder = tempfile::tempdir()?;
        let mut daemon = Self::start(program, folder.path(), options)?;
        daemon._own_folder = Some(folder);
        Ok(daemon)
    }

    /// Starts `program` with everything in `folder`, and waits until it listens.
    ///
    /// # Errors
    /// It does not start; its log is in the error.
    pub fn start(program: &Path, folder: &Path, options: &Options) -> Result<Self> {
        let config = folder.join("svmd.toml");
        std::fs::write(&config, configuration(folder, options)?)?;
        let log = File::create(folder.join("svmd.log"))?;
        let mut child = Command::new(program)
            .arg("--config")
            .arg(&config)
            .args(&options.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let control = match connect(&mut child, &folder.join("control.sock")) {
            Ok(stream) => BufReader::new(stream),
            Err(cause) => {
                // Already gone is as good as killed.
                child.kill().ok();
                child.wait().ok();
                let log = std::fs::read_to_string(folder.join("svmd.log")).unwrap_or_default();
                bail!("svmd does not come up: {cause:#}\n{log}");
            }
        };
        let (child, control) = (Mutex::new(child), Mutex::new(control));
        Ok(Self { child, folder: folder.to_owned(), devices: options.devices, control, _own_folder: None })
    }

    /// The vhost-user socket of a guest.
    pub fn socket(&self, guest: &str) -> PathBuf {
        self.folder.join(format!("{guest}.sock"))
    }

    /// Where its sockets are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the daemon has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("svmd.log")).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// Calls a method of the control socket.
    ///
    /// # Errors
    /// The daemon's error, or none answered.
    pub fn call(&self, method: &str, params: Value) -> Result<Value> {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(control.get_mut(), "{request}").with_context(|| format!("cannot call {method}"))?;
        let mut line = String::new();
        control.read_line(&mut line).with_context(|| format!("no answer to {method}"))?;
        let mut answer: Value =
            serde_json::from_str(&line).with_context(|| format!("{method} answers {line:?}"))?;
        if let Some(error) = answer.get("error") {
            bail!("{method} fails: {error}");
        }
        Ok(answer["result"].take())
    }

    /// A number of the host's statistics, by JSON pointer, as in `/counters/faults_raised`.
    ///
    /// # Errors
    /// There is no such number.
    pub fn stat(&self, pointer: &str) -> Result<u64> {
        let stats = self.call("stats.get", json!({}))?;
        stats
            .pointer(pointer)
            .and_then(Value::as_u64)
            .with_context(|| format!("no number {pointer} in {stats}"))
    }

    /// What the daemon says of a guest, while its VMM is connected.
    ///
    /// # Errors
    /// No such guest.
    pub fn guest(&self, name: &str) -> Result<Value> {
        self.call("guest.get", json!({ "name": name }))
    }

    /// The devices' ledgers, all of them.
    ///
    /// # Errors
    /// A ledger was too small for what happened.
    pub fn ledgers(&self) -> Result<Vec<Raised>> {
        let mut raised = vec![];
        for device in 0..self.devices {
            let ledger = Ledger::deserialize(self.call("device.ledger", json!({ "device": device }))?)?;
            ensure!(ledger.overwritten == 0, "the ledger of device {device} has lost {}", ledger.overwritten);
            raised.extend(ledger.entries.into_iter().map(|entry| entry.raised_on(device)));
        }
        Ok(raised)
    }

    /// Asks it to end, as a service manager does, and waits.
    ///
    /// # Errors
    /// It ends with another status than 0, or not at all.
    pub fn stop(&self) -> Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("cannot signal svmd")?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "svmd ends with {status}");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("svmd does not end")
    }
}

impl Drop for Svmd {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It may have ended already; then there is nothing left to kill.
        child.kill().ok();
        child.wait().ok();
    }
}

fn configuration(folder: &Path, options: &Options) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "[daemon]\ncontrol_socket = {:?}", folder.join("control.sock"))?;
    for device in 0..options.devices {
        let (kind, engines, ledger) = (options.kind.name(), options.engines, options.ledger);
        writeln!(
            text,
            "[[device]]\nkind = \"{kind}\"\nname = \"{kind}{device}\"\nengines = {engines}\nledger = {ledger}"
        )?;
    }
    for guest in &options.guests {
        let socket = folder.join(format!("{guest}.sock"));
        writeln!(text, "[[guest]]\nname = {guest:?}\nsocket = {socket:?}")?;
    }
    text.push_str(&options.more);
    Ok(text)
}

fn connect(child: &mut Child, socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(cause) if Instant::now() >= deadline => return Err(cause).context("its control socket"),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Result of `device.ledger`.
#[derive(Deserialize)]
struct Ledger {
    entries: Vec<LedgerRow>,
    overwritten: u64,
}

#[derive(Deserialize)]
struct LedgerRow {
    guest: String,
    ctx_id: u32,
    asid: u32,
    page: u64,
    access: LedgerAccess,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum LedgerAccess {
    Read,
    Write,
    Atomic,
}

impl LedgerRow {
    fn raised_on(self, device: usize) -> Raised {
        let access = match self.access {
            LedgerAccess::Read => Access::Read,
            LedgerAccess::Write => Access::Write,
            LedgerAccess::Atomic => Access::Atomic,
        };
        let Self { guest, ctx_id, asid, page, .. } = self;
        Raised { device, guest: guest.into(), ctx_id, asid, page, access }
    }
}
