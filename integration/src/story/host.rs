//! Guests without QEMU: no CPU at all, or a real vCPU between driver and doorbell. The agent and its broker run in this
//! process, the story's processes are real ones of the host, each with the same A..B mapped to its own guest memory.

use super::{Actor, Machine};
use crate::binaries::Binaries;
use crate::frontend::ram::GuestRam;
use crate::frontend::vmm::Vmm;
use crate::guest::SimulatedGuest;
use crate::ledger::Answered;
use crate::ordinary::Ordinary;
use anyhow::{Context, Result, bail, ensure};
use guest_agent::agent::{AgentOptions, ArenaMemory, ArenaPages, LedgerReport};
use guest_agent::broker::{Broker, BrokerOptions};
use serde_json::Value;
use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_gpu_svm::protocol::PAGE_SIZE;

/// A guest and its agent.
pub struct HostMachine {
    /// Stops serving before the guest goes.
    _broker: Broker,
    guest: SimulatedGuest,
    socket: PathBuf,
    programs: Programs,
}

/// What runs in such a guest.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The story's process.
    pub process: PathBuf,
    /// `svm-agent`, which starts ordinary programs.
    pub agent: PathBuf,
    /// The allocator library.
    pub allocator: PathBuf,
    /// Where ordinary programs are.
    pub folder: PathBuf,
}

impl Programs {
    /// As they were built.
    ///
    /// # Errors
    /// One was not.
    pub fn of(built: &Binaries, ordinary: &Ordinary) -> Result<Self> {
        Ok(Self {
            process: built.get("story-process")?.to_owned(),
            agent: built.get("svm-agent")?.to_owned(),
            allocator: ordinary.allocator(),
            folder: ordinary.folder().to_owned(),
        })
    }
}

impl HostMachine {
    /// What the agent knows of its answers.
    pub fn ledger(&self) -> LedgerReport {
        self.guest.agent().ledger(true)
    }

    /// A guest on a VMM, with an agent that holds its answers back. `folder` is for the agent's socket and must be open
    /// to other users.
    ///
    /// # Errors
    /// The daemon refused, or the socket cannot be made.
    pub fn start(name: &str, vmm: Vmm, folder: &Path, programs: Programs) -> Result<Self> {
        let memory = Arc::new(ContiguousArenas { ram: vmm.ram().clone(), arenas: Mutex::default() });
        let options = AgentOptions { hold_answers: true, ..AgentOptions::default() };
        let guest = SimulatedGuest::start_with(name, vmm, memory, options)?;
        let socket = folder.join(format!("{name}-agent.sock"));
        let broker = Broker::start(guest.agent().clone(), BrokerOptions::at(&socket))
            .with_context(|| format!("no broker at {}", socket.display()))?;
        Ok(Self { _broker: broker, guest, socket, programs })
    }
}

impl Machine for HostMachine {
    fn name(&self) -> &Arc<str> {
        self.guest.name()
    }
    fn spawn(&self, uid: u32, arguments: &[String]) -> Result<Box<dyn Actor>> {
        let mut command = Command::new(&self.programs.process);
        command.args(arguments);
        HostActor::start(command, uid)
    }
    fn start(&self, uid: u32, program: &[String]) -> Result<Box<dyn Actor>> {
        let [program, arguments @ ..] = program else { bail!("no program") };
        let mut command = Command::new(&self.programs.agent);
        command.arg("run").arg("--library").arg(&self.programs.allocator);
        command.arg("--socket").arg(&self.socket);
        command.arg("--").arg(self.programs.folder.join(program)).args(arguments);
        HostActor::start(command, uid)
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
/// drivers' zone; one that is released serves again, for as many bytes.
struct ContiguousArenas {
    ram: Arc<GuestRam>,
    arenas: Mutex<Arenas>,
}

#[derive(Default)]
struct Arenas {
    last_id: u64,
    /// Bytes and guest-physical address.
    made: HashMap<u64, (u64, u64)>,
    /// Addresses by bytes.
    free: HashMap<u64, Vec<u64>>,
}

impl ContiguousArenas {
    fn arenas(&self) -> MutexGuard<'_, Arenas> {
        self.arenas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, arenas: &mut Arenas, len: u64) -> Result<u64> {
        let Some(gpa) = arenas.free.get_mut(&len).and_then(Vec::pop) else { return self.ram.take_dma(len) };
        self.ram.write(gpa, &vec![0; usize::try_from(len)?])?;
        Ok(gpa)
    }
}

impl ArenaMemory for ContiguousArenas {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let mut arenas = self.arenas();
        let gpa = self.take(&mut arenas, len).map_err(io::Error::other)?;
        let offset = self.ram.offset(gpa, len).map_err(io::Error::other)?;
        let fd = self.ram.file().as_fd().try_clone_to_owned()?;
        let pages = (0..len / PAGE_SIZE).map(|page| gpa + page * PAGE_SIZE).collect();
        arenas.last_id += 1;
        let id = arenas.last_id;
        arenas.made.insert(id, (len, gpa));
        Ok(ArenaPages { id, fd, offset, pages })
    }
    fn release(&self, id: u64) {
        let mut arenas = self.arenas();
        if let Some((len, gpa)) = arenas.made.remove(&id) {
            arenas.free.entry(len).or_default().push(gpa);
        }
    }
}

struct HostActor {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl HostActor {
    fn start(mut command: Command, uid: u32) -> Result<Box<dyn Actor>> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // Only root can give a process another user.
        if rustix::process::geteuid().is_root() {
            command.uid(uid).gid(uid);
        }
        let program = command.get_program().to_owned();
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Box::new(Self { child, output }))
    }
}

impl Actor for HostActor {
    fn tell(&mut self, command: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no stdin")?;
        writeln!(stdin, "{command}").context("the process is gone; its error is above")
    }
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the process has ended; its error is above");
        Ok(line.trim_end().to_owned())
    }
    fn answer(&mut self) -> Result<Value> {
        let line = self.line()?;
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
