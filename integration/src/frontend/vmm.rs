//! A VMM: guest memory, the connection to the daemon, and the wiring of doorbells and interrupts. Offers the guest's
//! driver what real hardware would ([`Transport`]), and hostile tests the parts.
//!
//! [`Vmm::without_cpu`] and [`Vmm::with_vcpu`] differ in the wiring only. To connect anew, as cloud-hypervisor does when
//! the daemon went away, drop it and make another one over the same guest memory.

use super::inproc::Direct;
use super::ram::GuestRam;
use super::vhost_user::{Connection, VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use super::{Profile, RingAddresses};
use anyhow::{Context, Result, ensure};
use guest_agent::driver::{RingConfig, Transport};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use virtio_gpu_svm::protocol::NUM_QUEUES;
use virtio_gpu_svm::protocol::gpu::{
    VIRTIO_GPU_F_CONTEXT_INIT, VIRTIO_GPU_F_RESOURCE_BLOB, VIRTIO_GPU_F_VIRGL,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// virtio's feature bit for notifications by index.
pub const VIRTIO_F_EVENT_IDX: u64 = 29;
/// What the epoll set says when the daemon has hung up.
const HANGUP: u64 = u64::MAX;

/// How doorbells and interrupts get from driver to daemon and back.
pub trait Wiring: Send + Sync {
    /// Handed to the daemon: readable when a queue's doorbell was rung.
    fn kicks(&self) -> &[EventFd];
    /// Handed to the daemon: it writes to interrupt the guest.
    fn calls(&self) -> &[EventFd];
    /// Readable when a queue's interrupt has reached the guest.
    fn wakes(&self) -> &[EventFd];
    /// Rings a queue's doorbell.
    ///
    /// # Errors
    /// No such queue, or the guest has no CPU any more.
    fn ring(&self, queue: usize) -> Result<()>;
    /// Whether interrupts can still come.
    ///
    /// # Errors
    /// They cannot, and why.
    fn check(&self) -> Result<()>;
    /// Interrupts of a queue that guest code has taken; 0 where the guest has no CPU.
    ///
    /// # Errors
    /// No such queue.
    fn interrupts(&self, queue: usize) -> Result<u64>;
}

/// A running VMM.
pub struct Vmm {
    ram: Arc<GuestRam>,
    wiring: Box<dyn Wiring>,
    /// Guards the order of messages to the daemon.
    connection: Mutex<Connection>,
    /// Readable when an interrupt has come or the daemon has hung up.
    epoll: Epoll,
    /// The daemon's end being closed is seen here; held open for as long as it is in the set.
    _stream: UnixStream,
    features: u64,
}

impl Vmm {
    /// A guest whose driver is this process.
    ///
    /// # Errors
    /// The daemon cannot be reached or lacks something.
    pub fn without_cpu(socket: &Path, ram: &Arc<GuestRam>, profile: Profile) -> Result<Self> {
        Self::connect(socket, ram, profile, Box::new(Direct::new()?))
    }

    /// A guest whose doorbells and interrupts pass through a vCPU.
    ///
    /// # Errors
    /// As [`Self::without_cpu`], and what KVM says.
    #[cfg(target_arch = "x86_64")]
    pub fn with_vcpu(socket: &Path, ram: &Arc<GuestRam>, profile: Profile) -> Result<Self> {
        Self::connect(socket, ram, profile, Box::new(super::kvm::KvmMachine::boot(ram)?))
    }

    fn connect(
        socket: &Path,
        ram: &Arc<GuestRam>,
        profile: Profile,
        wiring: Box<dyn Wiring>,
    ) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        let epoll = Epoll::new()?;
        for (queue, wake) in (0_u64..).zip(wiring.wakes()) {
            watch(&epoll, wake.as_raw_fd(), EventSet::IN, queue)?;
        }
        watch(&epoll, stream.as_raw_fd(), EventSet::READ_HANG_UP, HANGUP)?;
        let mut connection = Connection::open(stream.try_clone()?, ram, profile)?;
        // What svm-agent's driver accepts, cut to what this VMM lets it see.
        let wanted = [
            VIRTIO_GPU_F_VIRGL,
            VIRTIO_GPU_F_RESOURCE_BLOB,
            VIRTIO_GPU_F_CONTEXT_INIT,
            VIRTIO_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
            VIRTIO_F_IN_ORDER,
        ];
        let features = wanted.iter().fold(0, |bits, bit| bits | 1 << bit) & connection.device_features();
        ensure!(features & 1 << VIRTIO_F_VERSION_1 != 0, "the daemon does not offer VIRTIO_F_VERSION_1");
        connection.set_features(features)?;
        let connection = Mutex::new(connection);
        Ok(Self { ram: ram.clone(), wiring, connection, epoll, _stream: stream, features })
    }

    /// Whether the guest can still run.
    ///
    /// # Errors
    /// It cannot, and why.
    pub fn check(&self) -> Result<()> {
        self.wiring.check()
    }

    /// Interrupts of a queue that guest code has taken; 0 where the guest has no CPU.
    ///
    /// # Errors
    /// No such queue.
    pub fn interrupts(&self, queue: usize) -> Result<u64> {
        self.wiring.interrupts(queue)
    }

    /// Guest memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The features that were accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The driver's ring settings that go with the accepted features.
    pub fn ring_config(&self) -> RingConfig {
        RingConfig {
            event_idx: self.features & 1 << VIRTIO_F_EVENT_IDX != 0,
            in_order: self.features & 1 << VIRTIO_F_IN_ORDER != 0,
            ..RingConfig::default()
        }
    }

    /// Hands the rings over to the daemon and lets them run.
    ///
    /// # Errors
    /// A ring outside guest memory, or the daemon refused.
    pub fn start_queues(&self, rings: &[RingAddresses; NUM_QUEUES]) -> Result<()> {
        self.resume_queues(rings, [0; NUM_QUEUES])
    }

    /// The same, of rings that go on where [`Self::stop_queues`] left them.
    ///
    /// # Errors
    /// As [`Self::start_queues`].
    pub fn resume_queues(&self, rings: &[RingAddresses; NUM_QUEUES], bases: [u16; NUM_QUEUES]) -> Result<()> {
        let mut connection = self.connection();
        for (index, (ring, base)) in rings.iter().zip(bases).enumerate() {
            let (kick, call) = (&self.wiring.kicks()[index], &self.wiring.calls()[index]);
            connection.start_queue(index, *ring, base, kick, call)?;
        }
        Ok(())
    }

    /// Takes the rings back. Returns the index at which each would go on.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn stop_queues(&self) -> Result<[u16; NUM_QUEUES]> {
        self.connection().stop_queues()
    }

    /// Resets the device: its rings are stopped, features as they were.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn reset_device(&self) -> Result<()> {
        self.connection().reset_device(self.features)
    }

    /// The connection, for what no driver asks for.
    pub fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_interrupt(&self, timeout: Duration) -> Result<bool> {
        let mut events = [EpollEvent::default(); NUM_QUEUES + 1];
        let timeout = i32::try_from(timeout.as_millis())?;
        let count = match self.epoll.wait(timeout, &mut events) {
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => 0,
            other => other.context("cannot wait for an interrupt")?,
        };
        let mut interrupted = false;
        for event in &events[..count] {
            match usize::try_from(event.data()).ok().and_then(|queue| self.wiring.wakes().get(queue)) {
                Some(wake) => {
                    interrupted = true;
                    // Another thread may have emptied it; then there is nothing left to clear.
                    wake.read().ok();
                }
                None => anyhow::bail!("the daemon has hung up"),
            }
        }
        self.wiring.check()?;
        Ok(interrupted)
    }
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, data: u64) -> Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data)).context("epoll")
}

impl Transport for Vmm {
    fn notify(&self, queue: u16) -> io::Result<()> {
        self.wiring.ring(usize::from(queue)).map_err(io::Error::other)
    }

    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        self.wait_for_interrupt(timeout).map_err(io::Error::other)
    }
}
