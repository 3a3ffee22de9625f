//! The configuration of svmd: a TOML file, read into types and checked before anything is started.
//!
//! Strict: an unknown key is an error, so that a misspelt one is never silently a default. An error names the key and
//! says what to do. `config/svmd.toml` is the reference: it shows every key with its default, and a test holds it to
//! that.

mod limits;

use serde::Deserialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

pub use limits::{Limits, Overrides};

/// Most devices of one daemon.
pub const MAX_DEVICES: usize = 64;
/// Most engines of one device.
pub const MAX_ENGINES: u32 = 64;
/// Smallest GPU address space: one large leaf and a bit.
pub const MIN_VA_BITS: u32 = 22;
/// Largest GPU address space.
pub const MAX_VA_BITS: u32 = 57;
/// Most address bits of `hostmmu`: above is the worker's own memory.
const MAX_HOSTMMU_VA_BITS: u32 = 46;
const DEFAULT_JOB_LIMIT_MS: u32 = 60_000;
/// Microseconds that an engine or a queue thread looks for work, when nothing is said and at most.
const DEFAULT_BUSY_POLL_US: u32 = 50;
const MAX_BUSY_POLL_US: u32 = 1000;
/// Most workers of one device: what a machine has process numbers for.
const MAX_WORKERS: u32 = 1 << 15;
const DEFAULT_WORKERS: u32 = 256;
/// Most entries of a device's ledger.
pub const MAX_LEDGER: usize = 1 << 24;
/// The user id that the kernel tells of users who have none here.
const NOBODY: u32 = 65534;
/// Most bytes of a device's name: what the wire has room for.
pub const MAX_DEVICE_NAME: usize = 32;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{origin}: {message}")]
    Syntax {
        /// The file.
        origin: String,
        /// Line, key and cause.
        message: String,
    },
    /// A value that cannot be.
    #[error("{key}: {problem}")]
    Value {
        /// The key, as a path.
        key: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

/// Everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[daemon]`
    pub daemon: Daemon,
    /// `[[device]]`; [`Config::devices`] says what stands when there is none.
    pub device: Vec<Device>,
    /// `[limits]`
    pub limits: Limits,
    /// `[[guest]]`
    pub guest: Vec<Guest>,
}

/// `[daemon]`: the process.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Daemon {
    /// Where the operator's commands arrive; none when absent.
    pub control_socket: Option<PathBuf>,
    /// User ids, besides the daemon's own and root, that may use it.
    pub control_users: Vec<u32>,
    /// Where anybody whom its mode lets in may look; none when absent.
    pub control_socket_ro: Option<PathBuf>,
    /// Mode of that one.
    pub control_socket_ro_mode: u32,
    /// Folders below which guest sockets may be made.
    pub runtime_dirs: Vec<PathBuf>,
    /// What is logged.
    pub log: LogLevel,
    /// Accept guest memory that its VMM could shrink, which then costs its session.
    pub allow_unsealed: bool,
    /// How the daemon confines itself.
    pub sandbox: Sandbox,
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            control_socket: None,
            control_users: Vec::new(),
            control_socket_ro: None,
            control_socket_ro_mode: 0o660,
            runtime_dirs: Vec::new(),
            log: LogLevel::default(),
            allow_unsealed: false,
            sandbox: Sandbox::default(),
        }
    }
}

/// How the daemon confines itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sandbox {
    /// In full, or it does not start.
    Strict,
    /// As far as the kernel can; what it cannot is a warning.
    #[default]
    BestEffort,
    /// Not at all.
    Off,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what ends the daemon or a guest's session wrongly.
    Error,
    /// And what somebody should look at.
    Warn,
    /// And sessions that begin and end.
    #[default]
    Info,
    /// And what happens inside them.
    Debug,
    /// Everything.
    Trace,
}

/// `[[device]]`: a host device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What executes its jobs.
    pub kind: DeviceKind,
    /// Its name: 1 to 32 of `[A-Za-z0-9._-]`.
    pub name: String,
    /// Engines, each a thread; 1 for kinds that have none of their own.
    #[serde(default = "default_engines")]
    pub engines: u32,
    /// GPU addresses are below `1 << va_bits`; the most usual of the kind when absent.
    pub va_bits: Option<u32>,
    /// What a soft device does about an access without translation; [`FaultModel::default`] when left out.
    pub fault_model: Option<FaultModel>,
    /// Which GPU addresses a soft device has; [`AddressModel::default`] when left out.
    pub address_model: Option<AddressModel>,
    /// Faults that its own record keeps; 0 keeps none.
    #[serde(default)]
    pub ledger: usize,
    /// Milliseconds that a job may be on engines and wait for semaphores in all; 0: any time will do. The default of
    /// [`Device::job_limit_ms`] when left out.
    pub job_limit_ms: Option<u32>,
    /// Microseconds that an engine of a soft device looks for work before it sleeps; 0: it does not. The default of
    /// [`Device::busy_poll_us`] when left out.
    pub busy_poll_us: Option<u32>,
    /// GPU VMs, and so worker processes, at once. Only `hostmmu` has this; the default of [`Device::workers`] when left
    /// out.
    pub workers: Option<u32>,
}

/// What executes a device's jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The embedded software GPU.
    Soft,
    /// A worker process per GPU VM, whose page tables are the GPU's.
    Hostmmu,
}

/// What a soft device does about an access that has no translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultModel {
    /// The job waits until the fault is answered.
    #[default]
    Replayable,
    /// The job ends: everything must be bound before.
    None,
}

/// Which GPU addresses a soft device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressModel {
    /// Any that its guest chooses.
    #[default]
    Any,
    /// Those of the process' CPU.
    Identity,
}

/// `[[guest]]`: a guest that is there from the start.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its vhost-user socket.
    pub socket: PathBuf,
    /// Names of the devices that it sees, in the order of its `dev_id`; all when absent.
    pub devices: Option<Vec<String>>,
    /// Limits of its own, in place of those of `[limits]`.
    #[serde(default)]
    pub limits: Overrides,
}

fn default_engines() -> u32 {
    1
}

impl DeviceKind {
    /// Most engines and address bits, and the address bits when nothing is said.
    fn bounds(self) -> (u32, u32, u32) {
        match self {
            Self::Soft => (MAX_ENGINES, MAX_VA_BITS, 48),
            Self::Hostmmu => (1, MAX_HOSTMMU_VA_BITS, MAX_HOSTMMU_VA_BITS),
        }
    }
}

impl Device {
    /// GPU addresses are below `1 << va_bits`.
    pub fn va_bits(&self) -> u32 {
        self.va_bits.unwrap_or(self.kind.bounds().2)
    }

    /// What it does about an access that has no translation.
    pub fn fault_model(&self) -> FaultModel {
        self.fault_model.unwrap_or_default()
    }
    /// Which GPU addresses it has.
    pub fn address_model(&self) -> AddressModel {
        self.address_model.unwrap_or_default()
    }
    /// Whether its models can be; `key` makes a key's path.
    fn check_models(&self, key: &dyn Fn(&str) -> String) -> Result<(), Error> {
        if self.kind == DeviceKind::Hostmmu {
            let said = [
                ("fault_model", self.fault_model.is_some()),
                ("address_model", self.address_model.is_some()),
                ("busy_poll_us", self.busy_poll_us.is_some()),
            ];
            if let Some((field, _)) = said.iter().find(|(_, said)| *said) {
                let problem =
                    "a hostmmu device has replayable faults, any address and no engines; leave the key out";
                return Err(value(key(field), problem.to_owned()));
            }
        }
        if (self.fault_model(), self.address_model()) == (FaultModel::None, AddressModel::Identity) {
            let problem =
                "\"identity\" is for devices that ask for pages: it needs fault_model = \"replayable\"";
            return Err(value(key("address_model"), problem.to_owned()));
        }
        Ok(())
    }
    /// Milliseconds that a job may be on engines and wait for semaphores in all; 0: any time will do.
    pub fn job_limit_ms(&self) -> u32 {
        self.job_limit_ms.unwrap_or(DEFAULT_JOB_LIMIT_MS)
    }
    /// Microseconds that an engine looks for work before it sleeps, at most 1000; 0: it does not look.
    pub fn busy_poll_us(&self) -> u32 {
        self.busy_poll_us.unwrap_or(DEFAULT_BUSY_POLL_US)
    }

    /// GPU VMs, and so worker processes, at once.
    pub fn workers(&self) -> u32 {
        self.workers.unwrap_or(DEFAULT_WORKERS)
    }

    fn check_workers(&self) -> Result<(), String> {
        match self.workers {
            Some(_) if self.kind != DeviceKind::Hostmmu => {
                Err("only a hostmmu device has workers; leave the key out".to_owned())
            }
            Some(workers) if !(1..=MAX_WORKERS).contains(&workers) => {
                Err(format!("{workers} is not in 1..={MAX_WORKERS}"))
            }
            _ => Ok(()),
        }
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads and checks a text; `origin` names it in errors.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::Value`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|e| Error::Syntax {
            origin: origin.to_owned(),
            message: e.to_string().trim_end().to_owned(),
        })?;
        config.check()?;
        Ok(config)
    }

    /// The devices: those configured, else two soft ones.
    pub fn devices(&self) -> Vec<Device> {
        if !self.device.is_empty() {
            return self.device.clone();
        }
        ["soft0", "soft1"]
            .map(|name| Device {
                kind: DeviceKind::Soft,
                name: name.to_owned(),
                engines: default_engines(),
                va_bits: Some(DeviceKind::Soft.bounds().2),
                fault_model: Some(FaultModel::default()),
                address_model: Some(AddressModel::default()),
                ledger: 0,
                job_limit_ms: Some(DEFAULT_JOB_LIMIT_MS),
                busy_poll_us: Some(DEFAULT_BUSY_POLL_US),
                workers: None,
            })
            .to_vec()
    }

    fn check(&self) -> Result<(), Error> {
        self.daemon.check()?;
        self.check_devices()?;
        self.limits.check().map_err(|(name, problem)| value(format!("limits.{name}"), problem))?;
        let known: HashSet<String> = self.devices().into_iter().map(|d| d.name).collect();
        let mut names = HashSet::new();
        for (i, guest) in self.guest.iter().enumerate() {
            if !names.insert(&guest.name) {
                return Err(value(
                    format!("guest[{i}].name"),
                    format!("{:?} is taken by an earlier guest", guest.name),
                ));
            }
            let checked = guest.limits.check();
            checked.map_err(|(name, problem)| value(format!("guest[{i}].limits.{name}"), problem))?;
            for device in guest.devices.iter().flatten() {
                if !known.contains(device) {
                    let problem = format!(
                        "there is no device {device:?}; add a [[device]] of that name or leave it out"
                    );
                    return Err(value(format!("guest[{i}].devices"), problem));
                }
            }
            let mut granted = HashSet::new();
            if let Some(twice) = guest.devices.iter().flatten().find(|device| !granted.insert(*device)) {
                return Err(value(format!("guest[{i}].devices"), format!("{twice:?} is named twice")));
            }
            if guest.devices.as_ref().is_some_and(Vec::is_empty) {
                let problem =
                    "a guest without a device can do nothing; leave the key out to grant all".to_owned();
                return Err(value(format!("guest[{i}].devices"), problem));
            }
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), Error> {
        if self.device.len() > MAX_DEVICES {
            return Err(value("device", format!("{} devices, at most {MAX_DEVICES}", self.device.len())));
        }
        let mut names = HashSet::new();
        for (i, device) in self.device.iter().enumerate() {
            let key = |field: &str| format!("device[{i}].{field}");
            let name_ok = (1..=MAX_DEVICE_NAME).contains(&device.name.len())
                && device.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
            if !name_ok {
                let problem = format!("{:?} is not 1 to {MAX_DEVICE_NAME} of A-Z a-z 0-9 . _ -", device.name);
                return Err(value(key("name"), problem));
            }
            if !names.insert(&device.name) {
                return Err(value(key("name"), format!("{:?} is taken by an earlier device", device.name)));
            }
            device.check_workers().map_err(|problem| value(key("workers"), problem))?;
            device.check_models(&key)?;
            let (most_engines, most_va_bits, _) = device.kind.bounds();
            if !(1..=most_engines).contains(&device.engines) {
                return Err(value(
                    key("engines"),
                    format!("{} is not in 1..={most_engines}", device.engines),
                ));
            }
            if !(MIN_VA_BITS..=most_va_bits).contains(&device.va_bits()) {
                let problem = format!("{} is not in {MIN_VA_BITS}..={most_va_bits}", device.va_bits());
                return Err(value(key("va_bits"), problem));
            }
            if device.busy_poll_us() > MAX_BUSY_POLL_US {
                let problem = format!("{} is not in 0..={MAX_BUSY_POLL_US}", device.busy_poll_us());
                return Err(value(key("busy_poll_us"), problem));
            }
            if device.ledger > MAX_LEDGER {
                return Err(value(key("ledger"), format!("{} entries, at most {MAX_LEDGER}", device.ledger)));
            }
        }
        Ok(())
    }
}

impl Daemon {
    fn check(&self) -> Result<(), Error> {
        if self.control_users.contains(&NOBODY) {
            let problem = format!("{NOBODY} is every user of whom nothing is known; name a user of its own");
            return Err(value("daemon.control_users", problem));
        }
        let mode = self.control_socket_ro_mode;
        if mode & !0o666 != 0 || mode & 0o600 != 0o600 {
            let problem = format!("0o{mode:o} is not 0o600 with rights to read and write for others");
            return Err(value("daemon.control_socket_ro_mode", problem));
        }
        if self.control_socket.is_some() && self.control_socket == self.control_socket_ro {
            return Err(value(
                "daemon.control_socket_ro",
                "is the control socket; name another path".to_owned(),
            ));
        }
        Ok(())
    }
}

fn value(key: impl Into<String>, problem: String) -> Error {
    Error::Value { key: key.into(), problem }
}

#[cfg(test)]
mod tests;
