//! The frontend's half of vhost-user: what a VMM says to the daemon for one device, in the order in which VMMs say it.
//!
//! Owns the connection. Used by the two VMMs beside it, and by hostile tests that stop half way.

use super::hotplug::Plugged;
use super::ram::GuestRam;
use super::{Profile, RingAddresses};
use anyhow::{Context, Result, ensure};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtio_gpu_svm::protocol::{CONFIG_SIZE, NUM_QUEUES};
use vmm_sys_util::eventfd::EventFd;

/// The device's own feature bits, which cloud-hypervisor's generic device keeps from the guest.
const DEVICE_FEATURES: u64 = (1 << 24) - 1;
/// virtio's feature bit for rings and buffers that are completed in order.
pub const VIRTIO_F_IN_ORDER: u64 = 35;
/// virtio's feature bit for devices that follow version 1 of the specification or a later one.
pub const VIRTIO_F_VERSION_1: u64 = 32;

/// A connection to the daemon.
pub struct Connection {
    frontend: Frontend,
    profile: Profile,
    ram: Arc<GuestRam>,
    backend_features: u64,
    running: [bool; NUM_QUEUES],
}

impl Connection {
    /// Negotiates on a new connection, up to where the guest's driver comes in.
    ///
    /// # Errors
    /// The daemon hung up, or lacks what a VMM needs.
    pub fn open(stream: UnixStream, ram: &Arc<GuestRam>, profile: Profile) -> Result<Self> {
        let mut frontend = Frontend::from_stream(stream, NUM_QUEUES as u64);
        let backend_features = frontend.get_features().context("GET_FEATURES")?;
        ensure!(
            backend_features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0,
            "the daemon does not offer protocol features"
        );
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        let offered = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        ensure!(offered.contains(wanted), "the daemon offers only {offered:?}");
        frontend.set_protocol_features(wanted).context("SET_PROTOCOL_FEATURES")?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
        ensure!(queues >= NUM_QUEUES as u64, "the daemon has only {queues} queues");
        frontend.set_owner().context("SET_OWNER")?;
        Ok(Self { frontend, profile, ram: ram.clone(), backend_features, running: [false; NUM_QUEUES] })
    }

    /// The feature bits that the guest's driver gets to see.
    pub fn device_features(&self) -> u64 {
        let hidden = match self.profile {
            Profile::Qemu => 0,
            Profile::CloudHypervisor => DEVICE_FEATURES,
        };
        self.backend_features & !hidden & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Passes on the features that the driver accepted, and announces guest memory.
    ///
    /// # Errors
    /// The driver accepted what was not offered, or the daemon refused.
    pub fn set_features(&mut self, accepted: u64) -> Result<()> {
        let offered = self.device_features();
        ensure!(accepted & !offered == 0, "features {accepted:#x} accepted, {offered:#x} offered");
        let acked = accepted | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(acked).context("SET_FEATURES")?;
        self.announce_memory()
    }

    /// Announces guest memory (again).
    ///
    /// # Errors
    /// The daemon refused.
    pub fn announce_memory(&mut self) -> Result<()> {
        self.announce_memory_with(&[])
    }

    /// Announces guest memory as one table, with modules besides.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn announce_memory_with(&mut self, plugged: &[Plugged<'_>]) -> Result<()> {
        let mut table = self.ram.vhost_regions();
        table.extend(plugged.iter().map(Plugged::vhost_region));
        table.sort_by_key(|region| region.guest_phys_addr);
        self.frontend.set_mem_table(&table).context("SET_MEM_TABLE")?;
        Ok(())
    }

    /// Adds a module to guest memory. On return the daemon knows it.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn add_memory(&mut self, plugged: &Plugged<'_>) -> Result<()> {
        self.frontend.add_mem_region(&plugged.vhost_region()).context("ADD_MEM_REG")?;
        Ok(())
    }

    /// Takes a module away. On return the daemon touches none of it.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn remove_memory(&mut self, plugged: &Plugged<'_>) -> Result<()> {
        self.frontend.remove_mem_region(&plugged.vhost_region()).context("REM_MEM_REG")
    }

    /// Reads config space as the profile's VMM does it.
    ///
    /// # Errors
    /// The daemon refused, or the range is not within what the VMM has of config space.
    pub fn read_config(&mut self, offset: usize, data: &mut [u8]) -> Result<()> {
        let end = offset + data.len();
        ensure!(end <= CONFIG_SIZE, "config access {offset}+{} is out of range", data.len());
        match self.profile {
            Profile::Qemu => data.copy_from_slice(&self.get_config(0, CONFIG_SIZE)?[offset..end]),
            Profile::CloudHypervisor => data.copy_from_slice(&self.get_config(offset, data.len())?),
        }
        Ok(())
    }

    /// One GET_CONFIG.
    ///
    /// # Errors
    /// The daemon refused, or answered with another length.
    pub fn get_config(&mut self, offset: usize, bytes: usize) -> Result<Vec<u8>> {
        let (offset, size) = (u32::try_from(offset)?, u32::try_from(bytes)?);
        let (_, data) = self
            .frontend
            .get_config(offset, size, VhostUserConfigFlags::empty(), &vec![0; bytes])
            .with_context(|| format!("GET_CONFIG {offset}+{size}"))?;
        Ok(data)
    }

    /// Writes config space.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn set_config(&mut self, offset: usize, data: &[u8]) -> Result<()> {
        let offset = u32::try_from(offset)?;
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, data)
            .with_context(|| format!("SET_CONFIG {offset}+{}", data.len()))
    }

    /// Hands a ring over to the daemon, which goes on at index `base`. `kick` is written when the guest rings its
    /// doorbell, the daemon writes `call` to interrupt the guest.
    ///
    /// # Errors
    /// A ring that is not in guest memory, or the daemon refused.
    pub fn start_queue(
        &mut self,
        index: usize,
        ring: RingAddresses,
        base: u16,
        kick: &EventFd,
        call: &EventFd,
    ) -> Result<()> {
        ensure!(index < NUM_QUEUES, "no queue {index}");
        let host = |gpa: u64| Ok::<u64, anyhow::Error>(self.ram.host_base() + self.ram.offset(gpa, 2)?);
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: host(ring.desc)?,
            used_ring_addr: host(ring.used)?,
            avail_ring_addr: host(ring.avail)?,
            log_addr: None,
        };
        self.frontend.set_vring_num(index, ring.size).context("SET_VRING_NUM")?;
        self.frontend.set_vring_addr(index, &config).context("SET_VRING_ADDR")?;
        self.frontend.set_vring_base(index, base).context("SET_VRING_BASE")?;
        self.frontend.set_vring_call(index, call).context("SET_VRING_CALL")?;
        self.frontend.set_vring_kick(index, kick).context("SET_VRING_KICK")?;
        self.frontend.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
        self.running[index] = true;
        Ok(())
    }

    /// Takes every ring back. On return the daemon touches none of them. Returns the index at which each would go on.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn stop_queues(&mut self) -> Result<[u16; NUM_QUEUES]> {
        let mut bases = [0; NUM_QUEUES];
        for (index, base) in bases.iter_mut().enumerate() {
            if std::mem::take(&mut self.running[index]) {
                self.frontend.set_vring_enable(index, false).context("SET_VRING_ENABLE 0")?;
                *base = self.stop_queue(index)?;
            }
        }
        Ok(bases)
    }

    fn stop_queue(&mut self, index: usize) -> Result<u16> {
        Ok(u16::try_from(self.frontend.get_vring_base(index).context("GET_VRING_BASE")?)?)
    }

    /// Resets the device, and negotiates features anew.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn reset_device(&mut self, accepted: u64) -> Result<()> {
        self.frontend.reset_device().context("RESET_DEVICE")?;
        for index in 0..NUM_QUEUES {
            // Disabled by the reset.
            if std::mem::take(&mut self.running[index]) {
                self.stop_queue(index)?;
            }
        }
        let acked = accepted | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(acked).context("SET_FEATURES")
    }

    /// The connection itself, for messages that no well-behaved VMM sends.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }
}
