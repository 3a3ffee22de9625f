//! The device as a PCI function of this guest (virtio 1.3, 4.1, modern), driven through sysfs.
//!
//! [`PciDevice`] finds the function, takes it from whatever driver has it, and sets it up: the keeper's part.
//! [`PciTransport`] rings doorbells and waits for interrupts: the serving process' part, made from
//! descriptors that the keeper hands over, so that this process needs no rights of its own.
//!
//! Where the registers are is in [`capability`], sysfs in `discovery`, interrupts in [`irq`].

pub mod capability;
mod discovery;
pub mod irq;

use super::dma::DmaRegion;
use super::hardware::{Failure, Hardware};
use super::svm::{RingConfig, Rings};
use super::transport::Transport;
use super::virtqueue::{MAX_SIZE, QueueAddresses};
use crate::mapping::{self, Placement, SharedMapping};
use capability::{CapabilityError, Layout};
use irq::{Irq, IrqMode};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::NUM_QUEUES;

/// How long a reset may take: the daemon has to stop its engines.
const RESET_DEADLINE: Duration = Duration::from_secs(60);

const PCI_COMMAND: u64 = 4;
const PCI_COMMAND_MEMORY: u16 = 1 << 1;
const PCI_COMMAND_MASTER: u16 = 1 << 2;
const PCI_COMMAND_INTX_DISABLE: u16 = 1 << 10;

// The common configuration structure (virtio 1.3, 4.1.4.3).
const DEVICE_FEATURE_SELECT: usize = 0;
const DEVICE_FEATURE: usize = 4;
const DRIVER_FEATURE_SELECT: usize = 8;
const DRIVER_FEATURE: usize = 12;
const CONFIG_MSIX_VECTOR: usize = 16;
const NUM_QUEUES_OFFERED: usize = 18;
const DEVICE_STATUS: usize = 20;
const QUEUE_SELECT: usize = 22;
const QUEUE_SIZE: usize = 24;
const QUEUE_MSIX_VECTOR: usize = 26;
const QUEUE_ENABLE: usize = 28;
const QUEUE_NOTIFY_OFF: usize = 30;
const QUEUE_DESC: usize = 32;
const QUEUE_DRIVER: usize = 40;
const QUEUE_DEVICE: usize = 48;

const STATUS_ACKNOWLEDGE: u8 = 1;
const STATUS_DRIVER: u8 = 2;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const NO_VECTOR: u16 = 0xffff;

const VIRTIO_F_EVENT_IDX: u32 = 29;
const VIRTIO_F_VERSION_1: u32 = 32;
const VIRTIO_F_IN_ORDER: u32 = 35;

/// Why the function cannot be driven.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such function.
    #[error(
        "no virtio-gpu device (1af4:1050) on the PCI bus: is it in the VMM's command line, and /sys mounted?"
    )]
    NotFound,
    /// There are several.
    #[error("several virtio-gpu devices ({}): choose one with --pci-address", .0.join(", "))]
    Ambiguous(Vec<String>),
    /// A file of sysfs or devtmpfs could not be used.
    #[error("{what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The capabilities do not make sense.
    #[error("virtio capabilities")]
    Capability(#[from] CapabilityError),
    /// A register lies outside its BAR, or the BAR cannot be mapped.
    #[error("registers")]
    Registers(#[from] mapping::Error),
    /// The device did not reset in time.
    #[error("the device did not reset within {} s", RESET_DEADLINE.as_secs())]
    ResetTimeout,
    /// The device lacks something.
    #[error("the device {0}")]
    Unsupported(&'static str),
    /// Another agent has it.
    #[error("another svm-agent drives {0}: stop it first")]
    InUse(String),
    /// uio_pci_generic is not to be had.
    #[error(
        "no interrupt by uio_pci_generic: load the modules uio and uio_pci_generic (--module), or use --irq poll"
    )]
    NoUio,
    /// The rings do not fit.
    #[error("rings")]
    Rings(#[from] Box<super::Error>),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

fn file_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { what, path, source }
}

/// The function, owned by the keeper.
pub struct PciDevice {
    address: String,
    layout: Layout,
    bar: Arc<SharedMapping>,
    bar_file: OwnedFd,
    /// Its config space. Locked, so that there is one agent; the serving process has it too, and the lock with it.
    config: File,
    uio: Option<OwnedFd>,
    notify: [usize; NUM_QUEUES],
}

impl PciDevice {
    /// Takes the function at `address`, or the only one there is, from its driver. It is stopped afterwards.
    ///
    /// # Errors
    /// When there is none, or something of it cannot be used.
    pub fn open(address: Option<&str>, mode: IrqMode) -> Result<Self> {
        let address = discovery::find(address)?;
        let directory = discovery::directory(&address);
        let path = directory.join("config");
        let config = File::options().read(true).write(true).open(&path);
        let config = config.map_err(file_error("cannot open", path))?;
        // Before anything of it is touched.
        if rustix::fs::flock(&config, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::InUse(address));
        }
        discovery::unbind(&address)?;
        let uio = irq::bind(&address, mode)?;
        if uio.is_none() {
            let path = directory.join("enable");
            std::fs::write(&path, "1").map_err(file_error("cannot enable", path))?;
        }
        let mut space = [0; 256];
        let path = directory.join("config");
        config.read_exact_at(&mut space, 0).map_err(file_error("cannot read", path))?;
        let layout = capability::parse(&space)?;
        let path = directory.join(format!("resource{}", layout.bar));
        let bar_file = File::options().read(true).write(true).open(&path);
        let bar_file = bar_file.map_err(file_error("cannot open", path.clone()))?;
        let len = bar_file.metadata().map_err(file_error("cannot stat", path))?.len();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // No bus mastering before the reset: rings of an earlier life may still be set.
        set_command(&config, PCI_COMMAND_MEMORY | PCI_COMMAND_INTX_DISABLE)
            .map_err(file_error("cannot set up", directory.join("config")))?;
        let bar = Arc::new(SharedMapping::new(bar_file.as_fd(), 0, len, Placement::Anywhere)?);
        let notify = [0; NUM_QUEUES];
        let device = Self { address, layout, bar, bar_file: bar_file.into(), config, uio, notify };
        device.reset()?;
        Ok(device)
    }

    /// Where it is on the bus.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// `"uio"` or `"poll"`.
    pub fn irq_name(&self) -> &'static str {
        if self.uio.is_some() { "uio" } else { "poll" }
    }

    fn read<T: mapping::Register>(&self, register: usize) -> Result<T> {
        Ok(self.bar.register(self.layout.common + register)?)
    }

    fn write<T: mapping::Register>(&self, register: usize, value: T) -> Result<()> {
        Ok(self.bar.set_register(self.layout.common + register, value)?)
    }

    fn write_address(&self, register: usize, address: u64) -> Result<()> {
        let [b0, b1, b2, b3, b4, b5, b6, b7] = address.to_le_bytes();
        self.write(register, u32::from_le_bytes([b0, b1, b2, b3]))?;
        self.write(register + 4, u32::from_le_bytes([b4, b5, b6, b7]))
    }

    /// Resets the device. When this returns, it writes to no memory any more.
    ///
    /// # Errors
    /// [`Error::ResetTimeout`].
    pub fn reset(&self) -> Result<()> {
        self.write(DEVICE_STATUS, 0u8)?;
        let deadline = Instant::now() + RESET_DEADLINE;
        while self.read::<u8>(DEVICE_STATUS)? != 0 {
            if Instant::now() > deadline {
                return Err(Error::ResetTimeout);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Resets the device and starts it on empty rings in `dma`.
    ///
    /// # Errors
    /// When the device does not reset, or lacks something.
    pub fn start(&mut self, dma: &DmaRegion) -> Result<Rings> {
        self.reset()?;
        dma.clear()?;
        // Interrupts too: a serving process may have died between taking one and unmasking them.
        let interrupts = if self.uio.is_some() { 0 } else { PCI_COMMAND_INTX_DISABLE };
        set_command(&self.config, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | interrupts)
            .map_err(file_error("cannot set up", discovery::directory(&self.address).join("config")))?;
        self.write(DEVICE_STATUS, STATUS_ACKNOWLEDGE)?;
        self.write(DEVICE_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)?;
        let accepted = self.negotiate()?;
        let has = |bit: u32| accepted & 1 << bit != 0;
        if usize::from(self.read::<u16>(NUM_QUEUES_OFFERED)?) < NUM_QUEUES {
            return Err(Error::Unsupported("has fewer than three queues"));
        }
        let wanted = RingConfig::default();
        let config = RingConfig {
            control_size: self.queue_size(0, wanted.control_size)?,
            cursor_size: self.queue_size(1, wanted.cursor_size)?,
            event_size: self.queue_size(2, wanted.event_size)?,
            event_idx: has(VIRTIO_F_EVENT_IDX),
            in_order: has(VIRTIO_F_IN_ORDER),
        };
        let rings = Rings::new(config).map_err(Box::new)?;
        let queues = rings.addresses(dma).map_err(Box::new)?;
        self.write(CONFIG_MSIX_VECTOR, NO_VECTOR)?;
        for (index, addresses) in (0u16..).zip(&queues) {
            self.enable_queue(index, addresses)?;
        }
        self.write(
            DEVICE_STATUS,
            STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK,
        )?;
        Ok(rings)
    }

    /// Accepts what this driver can do. Bits 0 to 23 are the device's own; none of them is needed.
    fn negotiate(&self) -> Result<u64> {
        let mut offered = 0u64;
        for half in 0..2u32 {
            self.write(DEVICE_FEATURE_SELECT, half)?;
            offered |= u64::from(self.read::<u32>(DEVICE_FEATURE)?) << (32 * half);
        }
        if offered & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Unsupported("is not a virtio 1 device"));
        }
        let wanted = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_IN_ORDER;
        let accepted: u64 = offered & wanted;
        let [b0, b1, b2, b3, b4, b5, b6, b7] = accepted.to_le_bytes();
        for (half, bytes) in [(0u32, [b0, b1, b2, b3]), (1, [b4, b5, b6, b7])] {
            self.write(DRIVER_FEATURE_SELECT, half)?;
            self.write(DRIVER_FEATURE, u32::from_le_bytes(bytes))?;
        }
        self.write(DEVICE_STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)?;
        if self.read::<u8>(DEVICE_STATUS)? & STATUS_FEATURES_OK == 0 {
            return Err(Error::Unsupported("refuses the features that the driver accepted"));
        }
        Ok(accepted)
    }

    fn queue_size(&self, queue: u16, wanted: u16) -> Result<u16> {
        self.write(QUEUE_SELECT, queue)?;
        let offered: u16 = self.read(QUEUE_SIZE)?;
        let size = offered.min(wanted).min(MAX_SIZE);
        // The largest power of two that is not above.
        match size.checked_ilog2() {
            Some(log2) => Ok(1 << log2),
            None => Err(Error::Unsupported("lacks a queue")),
        }
    }

    fn enable_queue(&mut self, queue: u16, addresses: &QueueAddresses) -> Result<()> {
        self.write(QUEUE_SELECT, queue)?;
        self.write(QUEUE_SIZE, addresses.size)?;
        self.write(QUEUE_MSIX_VECTOR, NO_VECTOR)?;
        self.write_address(QUEUE_DESC, addresses.desc)?;
        self.write_address(QUEUE_DRIVER, addresses.avail)?;
        self.write_address(QUEUE_DEVICE, addresses.used)?;
        let doorbell = usize::from(self.read::<u16>(QUEUE_NOTIFY_OFF)?) * self.layout.notify_multiplier;
        if let Some(notify) = self.notify.get_mut(usize::from(queue)) {
            *notify = self.layout.notify + doorbell;
        }
        self.write(QUEUE_ENABLE, 1u16)
    }

    fn described(&self) -> (PciHandover, Vec<BorrowedFd<'_>>) {
        let handover = PciHandover {
            bar_len: self.bar.len(),
            status: self.layout.common + DEVICE_STATUS,
            notify: self.notify,
            isr: self.layout.isr,
            uio: self.uio.is_some(),
        };
        let mut fds = vec![self.bar_file.as_fd(), self.config.as_fd()];
        fds.extend(self.uio.as_ref().map(AsFd::as_fd));
        (handover, fds)
    }
}

impl Hardware for PciDevice {
    fn restart(&mut self, dma: &DmaRegion) -> std::result::Result<Rings, Failure> {
        Ok(self.start(dma)?)
    }

    fn stop(&mut self) -> std::result::Result<(), Failure> {
        Ok(self.reset()?)
    }

    fn transport(&self) -> io::Result<Arc<dyn Transport>> {
        let (handover, fds) = self.described();
        let fds: io::Result<Vec<OwnedFd>> = fds.iter().map(BorrowedFd::try_clone_to_owned).collect();
        Ok(Arc::new(PciTransport::new(&handover, fds?)?))
    }

    fn handover(&self) -> (serde_json::Value, Vec<BorrowedFd<'_>>) {
        let (handover, fds) = self.described();
        (serde_json::json!(handover), fds)
    }
}

/// Where things are in the BAR.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PciHandover {
    bar_len: usize,
    status: usize,
    notify: [usize; NUM_QUEUES],
    isr: usize,
    uio: bool,
}

/// The transport.
pub struct PciTransport {
    handover: PciHandover,
    bar: Arc<SharedMapping>,
    irq: Irq,
}

impl PciTransport {
    /// Uses the device with descriptors of its BAR, its config space and its uio, in this order.
    ///
    /// # Errors
    /// When one is missing, or the BAR cannot be mapped.
    pub fn new(handover: &PciHandover, fds: Vec<OwnedFd>) -> io::Result<Self> {
        let missing = || io::Error::other("a descriptor is missing");
        let mut fds = fds.into_iter();
        let bar = fds.next().ok_or_else(missing)?;
        let config = File::from(fds.next().ok_or_else(missing)?);
        let bar = SharedMapping::new(bar.as_fd(), 0, handover.bar_len, Placement::Anywhere);
        let bar = Arc::new(bar.map_err(io::Error::other)?);
        let irq = if handover.uio {
            let uio = File::from(fds.next().ok_or_else(missing)?);
            Irq::Uio { uio, config, bar: bar.clone(), isr: handover.isr }
        } else {
            Irq::Poll
        };
        Ok(Self { handover: handover.clone(), bar, irq })
    }

    /// Stops the device without waiting: the last resort of a process whose keeper has died.
    ///
    /// # Errors
    /// When the register lies outside the BAR.
    pub fn stop(&self) -> io::Result<()> {
        self.bar.set_register(self.handover.status, 0u8).map_err(io::Error::other)
    }
}

impl Transport for PciTransport {
    fn notify(&self, queue: u16) -> io::Result<()> {
        let doorbell = self.handover.notify.get(usize::from(queue));
        let doorbell = doorbell.ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        self.bar.set_register(*doorbell, queue).map_err(io::Error::other)
    }

    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        self.irq.wait(timeout)
    }
}

/// Sets the command register; the kernel's own view of it is not touched.
fn set_command(config: &File, command: u16) -> io::Result<()> {
    config.write_all_at(&command.to_le_bytes(), PCI_COMMAND)
}
