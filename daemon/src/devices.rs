//! The host's devices while the daemon runs: made from the configuration, with a thread for each engine.
//!
//! Made once, before any guest; stopped once, after the last one is gone, because closing a guest waits for engines.

use config::{Device as DeviceConfig, DeviceKind};
use std::io::Result;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{AddressModel, Device, Events, FaultModel};
use virtio_gpu_svm::host::Host;

#[cfg(target_arch = "x86_64")]
use crate::hostmmu::{DEFAULT_BUDGET, HostMmuConfig, HostMmuDevice};

/// A device that the daemon keeps running.
enum Running {
    /// Its engines are threads of [`Devices`].
    Soft(Arc<SoftDevice>),
    /// Its workers are processes.
    #[cfg(target_arch = "x86_64")]
    HostMmu(Arc<HostMmuDevice>),
}

/// The devices and their threads.
pub struct Devices {
    running: Vec<Running>,
    engines: Vec<JoinHandle<()>>,
}

impl Devices {
    /// Makes devices and a host that owns them, and starts their engines. The configuration has been checked. `cpus` is how
    /// many the daemon may use, for `engines_may_look`.
    ///
    /// # Errors
    /// When a thread cannot be started, or the machine lacks what a device needs; then none is left.
    pub fn start(configs: &[DeviceConfig], cpus: usize) -> Result<(Arc<Host>, Self)> {
        let looks = engines_may_look(configs, cpus);
        let make = |(index, config)| make(index, config, looks);
        let running: Vec<_> = configs.iter().enumerate().map(make).collect::<Result<_>>()?;
        let host = Host::new(running.iter().map(Running::device).collect());
        let events: Weak<dyn Events> = Arc::<Host>::downgrade(&host);
        let mut devices = Self { running, engines: Vec::new() };
        match devices.start_all(&events) {
            Ok(()) => Ok((host, devices)),
            Err(error) => {
                devices.stop();
                Err(error)
            }
        }
    }

    fn start_all(&mut self, events: &Weak<dyn Events>) -> Result<()> {
        for device in &self.running {
            match device {
                Running::Soft(device) => {
                    device.start(Weak::clone(events));
                    for engine in 0..u8::try_from(device.info().num_engines).unwrap_or(u8::MAX) {
                        let name = format!("{}/{engine}", device.info().name);
                        let device = Arc::clone(device);
                        let thread = std::thread::Builder::new().name(name);
                        self.engines.push(thread.spawn(move || device.run_engine(engine))?);
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Running::HostMmu(device) => device.start(Weak::clone(events)),
            }
        }
        Ok(())
    }

    /// Stops the engines, each after its slice at the latest.
    pub fn stop(self) {
        for device in &self.running {
            match device {
                Running::Soft(device) => device.shutdown(),
                #[cfg(target_arch = "x86_64")]
                Running::HostMmu(device) => device.shutdown(),
            }
        }
        for engine in self.engines {
            let name = engine.thread().name().unwrap_or_default().to_owned();
            if engine.join().is_err() {
                tracing::error!(engine = name, "an engine had panicked");
            }
        }
    }
}

impl Running {
    fn device(&self) -> Arc<dyn Device> {
        match self {
            Self::Soft(device) => Arc::clone(device) as Arc<dyn Device>,
            #[cfg(target_arch = "x86_64")]
            Self::HostMmu(device) => Arc::clone(device) as Arc<dyn Device>,
        }
    }
}

/// Whether engines may look for work before they sleep: not where none of the daemon's CPUs would be left to queue
/// threads, whom they would keep from bringing it.
fn engines_may_look(configs: &[DeviceConfig], cpus: usize) -> bool {
    let engines =
        configs.iter().filter(|config| config.kind == DeviceKind::Soft).map(|config| config.engines);
    let engines =
        engines.map(|engines| usize::try_from(engines).unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
    cpus > engines
}

fn make(index: usize, config: &DeviceConfig, looks: bool) -> Result<Running> {
    let (name, ledger) = (config.name.clone(), (config.ledger > 0).then_some(config.ledger));
    let job_limit = (config.job_limit_ms() > 0).then(|| Duration::from_millis(config.job_limit_ms().into()));
    match config.kind {
        DeviceKind::Soft => Ok(Running::Soft(SoftDevice::new(SoftConfig {
            index,
            name,
            engines: u8::try_from(config.engines).unwrap_or(u8::MAX),
            va_bits: config.va_bits(),
            fault_model: match config.fault_model() {
                config::FaultModel::Replayable => FaultModel::Replayable,
                config::FaultModel::None => FaultModel::None,
            },
            address_model: match config.address_model() {
                config::AddressModel::Any => AddressModel::Any,
                config::AddressModel::Identity => AddressModel::Identity,
            },
            ledger,
            job_limit,
            busy_poll: Duration::from_micros(if looks { config.busy_poll_us().into() } else { 0 }),
        }))),
        #[cfg(target_arch = "x86_64")]
        DeviceKind::Hostmmu => HostMmuDevice::new(HostMmuConfig {
            index,
            name,
            va_bits: config.va_bits(),
            ledger,
            // Also after the file was replaced.
            program: "/proc/self/exe".into(),
            budget: DEFAULT_BUDGET,
            job_limit,
            workers: usize::try_from(config.workers()).unwrap_or(usize::MAX),
        })
        .map(Running::HostMmu),
        #[cfg(not(target_arch = "x86_64"))]
        DeviceKind::Hostmmu => Err(std::io::Error::other(format!("device {name:?}: hostmmu is for x86-64"))),
    }
}
