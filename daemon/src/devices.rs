//! The host's devices while the daemon runs: made from the configuration, with a thread for each engine.
//!
//! Made once, before any guest; stopped once, after the last one is gone, because closing a guest waits for engines.

use config::{Device as DeviceConfig, DeviceKind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{Device, Events};
use virtio_gpu_svm::host::Host;

/// The devices and their threads.
pub struct Devices {
    soft: Vec<Arc<SoftDevice>>,
    engines: Vec<JoinHandle<()>>,
}

impl Devices {
    /// Makes devices and a host that owns them, and starts their engines. The configuration has been checked.
    ///
    /// # Errors
    /// When a thread cannot be started; then none is left.
    pub fn start(configs: &[DeviceConfig]) -> std::io::Result<(Arc<Host>, Self)> {
        let soft: Vec<_> = configs.iter().enumerate().map(|(index, config)| make(index, config)).collect();
        let host = Host::new(soft.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect());
        let events: Weak<dyn Events> = Arc::<Host>::downgrade(&host);
        let mut devices = Self { soft, engines: Vec::new() };
        for device in &devices.soft {
            device.start(Weak::clone(&events));
            for engine in 0..u8::try_from(device.info().num_engines).unwrap_or(u8::MAX) {
                let name = format!("{}/{engine}", device.info().name);
                let device = Arc::clone(device);
                match std::thread::Builder::new().name(name).spawn(move || device.run_engine(engine)) {
                    Ok(thread) => devices.engines.push(thread),
                    Err(error) => {
                        devices.stop();
                        return Err(error);
                    }
                }
            }
        }
        Ok((host, devices))
    }

    /// Stops the engines, each after its slice at the latest.
    pub fn stop(self) {
        for device in &self.soft {
            device.shutdown();
        }
        for engine in self.engines {
            let name = engine.thread().name().unwrap_or_default().to_owned();
            if engine.join().is_err() {
                tracing::error!(engine = name, "an engine had panicked");
            }
        }
    }
}

fn make(index: usize, config: &DeviceConfig) -> Arc<SoftDevice> {
    match config.kind {
        DeviceKind::Soft => SoftDevice::new(SoftConfig {
            index,
            name: config.name.clone(),
            engines: u8::try_from(config.engines).unwrap_or(u8::MAX),
            va_bits: config.va_bits,
            ledger: (config.ledger > 0).then_some(config.ledger),
            job_limit: (config.job_limit_ms > 0).then(|| Duration::from_millis(config.job_limit_ms.into())),
        }),
    }
}
