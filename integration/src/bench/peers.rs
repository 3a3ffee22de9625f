//! What the figures are held against, as processes of their own: the crates' null backend (this program, executed anew)
//! and QEMU's `vhost-user-gpu`.
//!
//! The null backend is written as users of `vhost-user-backend` and `virtio-queue` write theirs: what is available is
//! collected and answered one by one, the driver is interrupted once, notifications are off meanwhile. It does no work.

use super::Bench;
use crate::provision::Vm;
use anyhow::{Context, Result, bail};
use rustix::thread::CpuSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_gpu_svm::protocol::gpu::VIRTIO_GPU_RESP_OK_NODATA;
use virtio_queue::{QueueOwnedT, Writer};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

/// First argument of this program where it is to be a null backend.
pub const NULL_BACKEND: &str = "null-backend";
/// How long a peer may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a null backend that polls looks at an empty ring before it sleeps: longer than any driver here pauses.
const POLL: Duration = Duration::from_millis(1);
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;

/// A backend in a process of its own, which goes with this.
pub struct Peer {
    child: Child,
    folder: TempDir,
}

impl Peer {
    /// The crates' null backend, on one core. One that polls looks at its ring for a while before it sleeps.
    ///
    /// # Errors
    /// It does not start.
    pub fn null(bench: &Bench, core: CpuSet, polls: bool) -> Result<Self> {
        Self::start(bench, core, |socket| {
            let mut command = Command::new(&bench.program);
            command.arg(NULL_BACKEND).arg(socket).arg(polls.to_string());
            command
        })
    }

    /// QEMU's program, on one core.
    ///
    /// # Errors
    /// It cannot be provisioned, or does not start.
    pub fn qemu_gpu(bench: &Bench, core: CpuSet) -> Result<Self> {
        let program = Vm::open()?.vhost_user_gpu()?;
        Self::start(bench, core, |socket| {
            let mut command = program.command();
            command.arg("--socket-path").arg(socket);
            command
        })
    }

    fn start(bench: &Bench, core: CpuSet, command: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut command = command(&folder.path().join("socket"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child =
            bench.cores.on(core, || command.spawn().with_context(|| format!("cannot start {command:?}")))?;
        Ok(Self { child, folder })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended with its connection.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Connects to a backend that may still be starting.
///
/// # Errors
/// It does not listen.
pub fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(cause) => {
                return Err(cause).with_context(|| format!("cannot connect to {}", socket.display()));
            }
        }
    }
}

/// Is a null backend until its frontend leaves; the arguments are those behind [`NULL_BACKEND`].
///
/// # Errors
/// The arguments are wrong, or the framework fails.
pub fn be_null_backend(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let (socket, polls) = arguments.next().zip(arguments.next()).context("usage: SOCKET POLLS")?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Null { memory: Mutex::new(memory.clone()), polls: polls == "true" });
    let daemon = VhostUserDaemon::new("null".into(), backend, memory);
    let mut daemon = match daemon {
        Ok(daemon) => daemon,
        Err(cause) => bail!("cannot make the null backend: {cause}"),
    };
    daemon.serve(&socket).map_err(|cause| anyhow::anyhow!("the null backend fails: {cause}"))
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Null {
    memory: Mutex<Memory>,
    polls: bool,
}

impl Null {
    /// Answers what is available; whether there was anything.
    fn process(&self, ring: &VringMutex) -> io::Result<bool> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner).memory();
        let mut ring = ring.get_mut();
        let chains: Vec<_> = ring.get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.collect();
        if chains.is_empty() {
            return Ok(false);
        }
        for chain in chains {
            let head = chain.head_index();
            // Of the request no more is read than what it is.
            let request = chain.clone().next().ok_or_else(|| io::Error::other("an empty chain"))?;
            let kind: u32 = memory.read_obj(request.addr()).map_err(io::Error::other)?;
            std::hint::black_box(kind);
            let mut writer = Writer::new(&*memory, chain).map_err(io::Error::other)?;
            writer.write_obj(u64::from(VIRTIO_GPU_RESP_OK_NODATA)).map_err(io::Error::other)?;
            ring.add_used(head, 8).map_err(io::Error::other)?;
        }
        if ring.needs_notification().map_err(io::Error::other)? {
            ring.signal_used_queue()?;
        }
        Ok(true)
    }

    fn poll(&self, ring: &VringMutex) -> io::Result<()> {
        let mut last = Instant::now();
        while last.elapsed() < POLL {
            if self.process(ring)? {
                last = Instant::now();
            }
            std::hint::spin_loop();
        }
        Ok(())
    }
}

impl VhostUserBackend for Null {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        1
    }
    fn max_queue_size(&self) -> usize {
        1024
    }
    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }
    fn set_event_idx(&self, _enabled: bool) {}
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
        Ok(())
    }
    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        rings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let Some(ring) = rings.first() else { return Ok(()) };
        loop {
            ring.disable_notification().map_err(io::Error::other)?;
            if self.polls {
                self.poll(ring)?;
            }
            self.process(ring)?;
            if !ring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
