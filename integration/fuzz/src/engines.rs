//! Software devices of every kind whose engines run, for targets that leave the order of things to threads.

use crate::must;
use daemon::housekeeper::Housekeeper;
use std::sync::Arc;
use std::time::Duration;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{AddressModel, Device, Events, FaultModel};
use virtio_gpu_svm::host::Host;

/// How long a job may run: nothing that an input asks for holds an engine up.
pub(crate) const JOB_LIMIT: Duration = Duration::from_millis(2);
/// Devices, numbered from 0.
pub(crate) const DEVICES: [usize; 3] = [0, 1, 2];

/// A host with a device that has replayable faults, one that has none, and one with the CPU's own addresses. Its threads
/// serve until the process ends.
pub(crate) struct Engines {
    pub(crate) host: Arc<Host>,
    devices: Vec<Arc<SoftDevice>>,
    _housekeeper: Housekeeper,
}

impl Engines {
    pub(crate) fn start() -> Self {
        use {AddressModel::*, FaultModel::*};
        let kinds = [(Replayable, Any), (FaultModel::None, Any), (Replayable, Identity)];
        let devices: Vec<_> = (0..)
            .zip(kinds)
            .map(|(index, (fault_model, address_model))| {
                SoftDevice::new(SoftConfig {
                    index,
                    name: format!("soft{index}"),
                    fault_model,
                    address_model,
                    job_limit: Some(JOB_LIMIT),
                    ..SoftConfig::default()
                })
            })
            .collect();
        let host = Host::new(devices.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect());
        for device in &devices {
            let events: Arc<dyn Events> = Arc::<Host>::clone(&host);
            device.start(Arc::downgrade(&events));
            let device = Arc::clone(device);
            std::thread::spawn(move || device.run_engine(0));
        }
        let _housekeeper = must(Housekeeper::start(Arc::clone(&host)));
        Self { host, devices, _housekeeper }
    }

    /// Holds the devices to it that a guest has left nothing there, and that no engine panicked.
    pub(crate) fn assert_idle(&self) {
        for device in self.host.devices() {
            assert_eq!((device.gpu_vms, device.retiring), (0, 0), "left on {device:?}");
        }
        for device in &self.devices {
            assert_eq!(device.panics(), 0, "an engine panicked");
        }
    }
}
