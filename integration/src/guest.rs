//! A guest that runs in this process: svm-agent's own core over a [`Vmm`], and processes that share their memory with
//! devices through it. For tests with many guests and processes; where the process boundary itself is the subject, the
//! broker and real processes are used instead.
//!
//! A [`SimulatedProcess`] has an address space of its own: a table from its CPU addresses to pages of guest memory that
//! are scattered on purpose, and whatever it reads or writes goes through that table, as through an MMU.

mod process;

pub use process::{GpuVm, SimulatedProcess, Turn};

use crate::frontend::RingAddresses;
use crate::frontend::ram::GuestRam;
use crate::frontend::vmm::Vmm;
use crate::ledger::Answered;
use anyhow::{Context, Result};
use guest_agent::agent::{Agent, AgentOptions, ArenaMemory, ArenaPages};
use guest_agent::driver::{DmaRegion, Rings, SvmDevice};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// A guest: its agent and what the agent stands on.
pub struct SimulatedGuest {
    name: Arc<str>,
    ram: Arc<GuestRam>,
    vmm: Arc<Vmm>,
    agent: Arc<Agent>,
}

impl SimulatedGuest {
    /// Sets up fresh rings in the VMM's guest memory and starts an agent on them. `name` is the guest's at the daemon.
    ///
    /// # Errors
    /// No guest memory is left, or the daemon refused.
    pub fn start(name: &str, vmm: Vmm, options: AgentOptions) -> Result<Self> {
        let memory = Arc::new(ScatteredArenas { ram: vmm.ram().clone(), arenas: Mutex::default() });
        Self::start_with(name, vmm, memory, options)
    }

    /// The same, with memory of the caller's making for processes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(
        name: &str,
        vmm: Vmm,
        memory: Arc<dyn ArenaMemory>,
        options: AgentOptions,
    ) -> Result<Self> {
        let ram = vmm.ram().clone();
        let bytes = Rings::BYTES as u64;
        let gpa = ram.take_dma(bytes)?;
        let pages = (gpa / PAGE_SIZE..(gpa + bytes) / PAGE_SIZE).map(|page| page * PAGE_SIZE).collect();
        let dma = Arc::new(DmaRegion::from_fd(ram.file().as_fd(), ram.offset(gpa, bytes)?, pages)?);
        let rings = Rings::new(vmm.ring_config())?;
        let addresses = rings.addresses(&dma)?;
        vmm.start_queues(&addresses.map(|queue| RingAddresses {
            size: queue.size,
            desc: queue.desc,
            avail: queue.avail,
            used: queue.used,
        }))?;
        let vmm = Arc::new(vmm);
        let device = Arc::new(SvmDevice::new(vmm.clone(), dma, &rings)?);
        let agent = Agent::start(device, memory, options).context("the agent does not start")?;
        Ok(Self { name: name.into(), ram, vmm, agent })
    }

    /// Its name at the daemon.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its agent.
    pub fn agent(&self) -> &Arc<Agent> {
        &self.agent
    }

    /// Its VMM.
    pub fn vmm(&self) -> &Arc<Vmm> {
        &self.vmm
    }

    /// A new process, known to the device as a context of its own.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn spawn(&self, name: &str) -> Result<SimulatedProcess> {
        SimulatedProcess::new(&self.agent, &self.ram, name)
    }

    /// The agent's ledger. `devices` are the host devices granted to this guest, in the order of its `dev_id`.
    ///
    /// # Errors
    /// The agent was asked more often than it remembers, or names devices that it has not.
    pub fn answers(&self, devices: &[usize]) -> Result<Vec<Answered>> {
        Answered::by_agent(&self.name, devices, || Ok(self.agent.ledger(true)))
    }
}

impl Drop for SimulatedGuest {
    fn drop(&mut self) {
        self.agent.stop();
    }
}

/// Arenas made of whatever pages guest memory has left. As nobody but simulated processes uses them, their pages do not
/// follow each other in the file, and cannot be mapped as one piece.
struct ScatteredArenas {
    ram: Arc<GuestRam>,
    arenas: Mutex<Arenas>,
}

#[derive(Default)]
struct Arenas {
    last_id: u64,
    pages: HashMap<u64, Vec<u64>>,
}

impl ArenaMemory for ScatteredArenas {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let count = usize::try_from(len / PAGE_SIZE).map_err(io::Error::other)?;
        let pages = self.ram.take_pages(count).map_err(io::Error::other)?;
        let fd: OwnedFd = self.ram.file().as_fd().try_clone_to_owned()?;
        let addresses = pages.iter().map(|page| page * PAGE_SIZE).collect();
        let mut arenas = self.arenas.lock().unwrap_or_else(PoisonError::into_inner);
        arenas.last_id += 1;
        let id = arenas.last_id;
        arenas.pages.insert(id, pages);
        Ok(ArenaPages { id, fd, offset: 0, pages: addresses })
    }

    fn release(&self, id: u64) {
        let pages = self.arenas.lock().unwrap_or_else(PoisonError::into_inner).pages.remove(&id);
        if let Err(cause) = self.ram.give_pages(&pages.unwrap_or_default()) {
            eprintln!("arena {id}: {cause:#}");
        }
    }
}
