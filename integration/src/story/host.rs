//! Guests without QEMU: no CPU at all, or a real vCPU between driver and doorbell. The agent and its broker run in this
//! process, the story's processes are real ones of the host, each with the same A..B mapped to its own guest memory.

use super::{Actor, Machine};
use crate::frontend::ram::GuestRam;
use crate::frontend::vmm::Vmm;
use crate::guest::SimulatedGuest;
use crate::ledger::Answered;
use anyhow::{Context, Result, ensure};
use guest_agent::agent::{AgentOptions, ArenaMemory, ArenaPages};
use guest_agent::broker::{Broker, BrokerOptions};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// A guest and its agent.
pub struct HostMachine {
    /// Stops serving before the guest goes.
    _broker: Broker,
    guest: SimulatedGuest,
    socket: PathBuf,
    program: PathBuf,
}

impl HostMachine {
    /// A guest on a VMM, with an agent that holds its answers back. `folder` is for the agent's socket and must be open
    /// to other users; `program` is the story's process.
    ///
    /// # Errors
    /// The daemon refused, or the socket cannot be made.
    pub fn start(name: &str, vmm: Vmm, folder: &Path, program: &Path) -> Result<Self> {
        let memory = Arc::new(ContiguousArenas { ram: vmm.ram().clone(), last_id: AtomicU64::new(0) });
        let options = AgentOptions { hold_answers: true, ..AgentOptions::default() };
        let guest = SimulatedGuest::start_with(name, vmm, memory, options)?;
        let socket = folder.join(format!("{name}-agent.sock"));
        let broker = Broker::start(guest.agent().clone(), BrokerOptions::at(&socket))
            .with_context(|| format!("no broker at {}", socket.display()))?;
        Ok(Self { _broker: broker, guest, socket, program: program.to_owned() })
    }
}

impl Machine for HostMachine {
    fn name(&self) -> &Arc<str> {
        self.guest.name()
    }
    fn spawn(&self, uid: u32, arguments: &[String]) -> Result<Box<dyn Actor>> {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        // Only root can give a process another user.
        if rustix::process::geteuid().is_root() {
            command.uid(uid).gid(uid);
        }
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Box::new(HostActor { child, output }))
    }
    fn agent_socket(&self) -> String {
        self.socket.display().to_string()
    }
    fn hold_answers(&self, hold: bool) -> Result<()> {
        if hold {
            self.guest.agent().hold_answers();
        } else {
            self.guest.agent().release_answers();
        }
        Ok(())
    }
    fn answers(&self, devices: &[usize]) -> Result<Vec<Answered>> {
        self.guest.answers(devices)
    }
}

/// Arenas that a real process can map in one piece: contiguous in guest memory, and so in its file. Taken from the
/// drivers' zone, which is never given back: the story ends before it is used up.
struct ContiguousArenas {
    ram: Arc<GuestRam>,
    last_id: AtomicU64,
}

impl ArenaMemory for ContiguousArenas {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let gpa = self.ram.take_dma(len).map_err(io::Error::other)?;
        let offset = self.ram.offset(gpa, len).map_err(io::Error::other)?;
        let fd = self.ram.file().as_fd().try_clone_to_owned()?;
        let pages = (0..len / PAGE_SIZE).map(|page| gpa + page * PAGE_SIZE).collect();
        Ok(ArenaPages { id: self.last_id.fetch_add(1, Ordering::Relaxed), fd, offset, pages })
    }
    fn release(&self, _id: u64) {}
}

struct HostActor {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Actor for HostActor {
    fn tell(&mut self, command: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no stdin")?;
        writeln!(stdin, "{command}").context("the process is gone; its error is above")
    }
    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line)
            .with_context(|| format!("the process answers {line:?}; its error is above"))
    }
    fn end(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "the process ended with {status}");
        Ok(())
    }
}

impl Drop for HostActor {
    fn drop(&mut self) {
        // It has ended already unless the story broke off.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
