//! The worker: a process of its own for one GPU VM, whose page tables are the GPU's page tables.
//!
//! The main thread obeys the daemon: it maps and unmaps, hands jobs to the threads of rings, and releases those that are
//! parked. It ends, and with it the process, when the daemon closes the socket.

mod ring;
mod sandbox;
mod space;
mod unit;

pub use space::LOWEST;

use super::message::{self, MAX_MESSAGE, Order, Report, Wait};
use super::process;
use crate::sandbox::privileges;
use anyhow::{Context, Result};
use ring::{NO_JOB, Ring};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use space::Space;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use virtio_gpu_svm::protocol::job::Packet;

/// A ring, as the main thread sees it.
struct Handle {
    jobs: Sender<(u64, Vec<Packet>)>,
    verdicts: Sender<bool>,
    /// The job that is to end.
    stopped: Arc<AtomicU64>,
    /// Its thread; set before its first report.
    tid: Arc<OnceLock<i32>>,
}

struct Worker {
    socket: Arc<OwnedFd>,
    space: Space,
    regions: HashMap<u64, OwnedFd>,
    rings: HashMap<u32, Handle>,
}

/// Is a worker until the daemon lets go of it. The socket to the daemon is standard input.
///
/// # Errors
/// The machine lacks what is needed, or the daemon speaks another language.
pub fn run(va_bits: u32) -> Result<()> {
    process::close_inherited()?;
    privileges::hide_memory().context("cannot forbid core dumps")?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("standard input is no socket")?;
    let space =
        Space::new(1u64.checked_shl(va_bits).unwrap_or(0)).context("cannot take the GPU's addresses")?;
    unit::install().context("cannot handle signals")?;
    sandbox::enter().context("cannot enter the sandbox")?;
    let ready = Report::Ready.encode();
    message::send(socket.as_fd(), &ready, &[], Some(space.faults().as_fd()), SendFlags::empty())?;
    Worker { socket: Arc::new(socket), space, regions: HashMap::new(), rings: HashMap::new() }.obey()
}

impl Worker {
    fn obey(mut self) -> Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (bytes, fd) = message::receive(&self.socket, &mut buffer, RecvFlags::empty())?;
            if bytes == 0 {
                return Ok(());
            }
            let (record, packets) =
                buffer.get(..bytes).and_then(message::parse).context("a message of another size")?;
            let order = Order::decode(record).context("an unknown order")?;
            self.execute(order, packets, fd).with_context(|| format!("cannot do {order:?}"))?;
        }
    }

    fn execute(&mut self, order: Order, packets: &[Packet], fd: Option<OwnedFd>) -> Result<()> {
        match order {
            Order::Region { id } => {
                self.regions.insert(id, fd.context("no descriptor came along")?);
            }
            Order::Forget { id } => drop(self.regions.remove(&id)),
            Order::Map { addr, bytes, region, offset, writable } => {
                let file = self.regions.get(&region).context("an unknown region")?;
                self.space.map(addr, bytes, file, offset, writable)?;
            }
            Order::Unmap { addr, bytes } => self.space.unmap(addr, bytes)?,
            Order::Fence { ticket } => {
                let report = Report::Fenced { ticket }.encode();
                message::send(self.socket.as_fd(), &report, &[], None, SendFlags::empty())?;
            }
            Order::Job { ring, job } => {
                let jobs = &self.ring(ring)?.jobs;
                jobs.send((job, packets.to_vec())).ok().context("the ring's thread is gone")?;
            }
            Order::Stop { ring, job } => {
                let handle = self.rings.get(&ring).context("an unknown ring")?;
                handle.stopped.store(job, Ordering::Release);
            }
            Order::Resume { ring, wait, abandon } => self.resume(ring, wait, abandon)?,
        }
        Ok(())
    }

    fn resume(&self, ring: u32, wait: Wait, abandon: bool) -> Result<()> {
        let handle = self.rings.get(&ring).context("an unknown ring")?;
        match wait {
            Wait::Denied => handle.verdicts.send(abandon).ok().context("the ring's thread is gone")?,
            Wait::Missing => {
                let tid = handle.tid.get().context("the ring has no thread yet")?;
                unit::release(*tid, if abandon { unit::ABANDON } else { unit::RETRY });
            }
        }
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&Handle> {
        let entry = match self.rings.entry(index) {
            std::collections::hash_map::Entry::Occupied(entry) => return Ok(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(entry) => entry,
        };
        let (jobs, job_queue) = channel();
        let (verdicts, verdict_queue) = channel();
        let (tid, stopped) = (Arc::new(OnceLock::new()), Arc::new(AtomicU64::new(NO_JOB)));
        let ring = Ring {
            index,
            end: self.space.end(),
            socket: Arc::clone(&self.socket),
            jobs: job_queue,
            verdicts: verdict_queue,
            stopped: Arc::clone(&stopped),
            tid: Arc::clone(&tid),
        };
        let thread = std::thread::Builder::new().name(format!("ring {index}"));
        thread.spawn(move || ring.run()).context("cannot start a thread for the ring")?;
        Ok(entry.insert(Handle { jobs, verdicts, stopped, tid }))
    }
}
