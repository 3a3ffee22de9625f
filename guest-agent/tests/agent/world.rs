//! An agent with its broker, and devices whose engines execute packets on the memory of processes.
//!
//! An engine sees a process' memory as a real one does: an address goes through the mappings of the GPU VM, a page that
//! is not known is a fault to the agent, and what the agent answers names the page. So what it finds is right only if
//! the library has mapped it, the process has it in an arena, and the agent knows it.

use crate::mock::{self, Launch, Mock, Shape};
use crate::pages::{Memory, View};
use guest_agent::agent::{Agent, AgentOptions};
use guest_agent::broker::{Broker, BrokerOptions};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::protocol::event::{PERM_READ, PERM_WRITE};
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::request::{BIND_CPU_ADDR_MIRROR, BIND_OP_MAP_USERPTR, BindOp};

pub struct World {
    pub mock: Arc<Mock>,
    pub agent: Arc<Agent>,
    pub directory: tempfile::TempDir,
    broker: Option<Broker>,
    engines: Option<JoinHandle<()>>,
    ended: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
}

impl World {
    /// With devices of these shapes.
    pub fn new(shapes: &[Shape]) -> Self {
        Self::limited(shapes, AgentOptions::default(), |_| {})
    }

    /// As [`Self::new`], with other limits.
    pub fn limited(shapes: &[Shape], limits: AgentOptions, limit: impl FnOnce(&mut BrokerOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (mock, device) = mock::device();
        mock.script(|script| {
            script.devices = shapes.len() as u32;
            script.shapes = (0..).zip(shapes.iter().copied()).collect();
            script.played = true;
        });
        let memory = Arc::new(Memory::default());
        let agent = Agent::start(device, memory.clone(), limits).unwrap();
        let mut options = BrokerOptions::at(directory.path().join("agent.sock"));
        options.admin_socket = Some(directory.path().join("admin.sock"));
        limit(&mut options);
        let broker = Some(Broker::start(agent.clone(), options).unwrap());
        let (ended, paused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let engines = Engines { mock: mock.clone(), memory, ended: ended.clone(), paused: paused.clone() };
        let engines = Some(std::thread::spawn(move || engines.run()));
        Self { mock, agent, directory, broker, engines, ended, paused }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// Jobs that are launched from now on wait, or go on.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        let engines = self.engines.take().map(JoinHandle::join);
        drop(self.broker.take());
        self.agent.stop();
        self.mock.end();
        // What an engine found wrong is the test's failure, unless that has another already.
        if !std::thread::panicking() {
            engines.unwrap().unwrap();
        }
    }
}

/// Where a job stopped: negative errno, address, access.
type Stop = (i32, u64, u32);

struct Engines {
    mock: Arc<Mock>,
    memory: Arc<Memory>,
    ended: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
}

impl Engines {
    fn run(&self) {
        while !self.ended.load(Ordering::SeqCst) {
            // Looked at together: what is launched after a pause waits.
            let launch = self.mock.script(|script| {
                if self.paused.load(Ordering::SeqCst) { None } else { script.launched.pop_front() }
            });
            match launch {
                None => std::thread::sleep(Duration::from_millis(1)),
                Some(launch) => {
                    let failure = self.execute(&launch);
                    self.mock.script(|script| script.end_job(&launch, failure));
                }
            }
        }
    }

    fn execute(&self, launch: &Launch) -> Option<(i32, u32, u64, u32)> {
        let job = Job { launch, view: View::new(&self.mock, &self.memory, launch.ctx_id) };
        for (index, packet) in (0..).zip(&launch.packets) {
            if let Err((errno, address, access)) = job.packet(packet) {
                return Some((errno, index, address, access));
            }
        }
        None
    }
}

/// A job, and what it sees of its process' memory.
struct Job<'a> {
    launch: &'a Launch,
    view: View<'a>,
}

impl Job<'_> {
    fn packet(&self, packet: &Packet) -> Result<(), Stop> {
        let (dst, src, len) = (packet.dst.get(), packet.src.get(), packet.len.get());
        let (value, arg) = (packet.value.get(), packet.arg.get());
        match packet.opcode.get() {
            OP_NOP => {}
            OP_FILL => (0..len / 8).try_for_each(|word| self.set_word(dst + word * 8, value))?,
            OP_REDUCE => {
                let mut sum = 0u64;
                for word in 0..len / 8 {
                    sum = sum.wrapping_add(self.word(src + word * 8)?);
                }
                self.set_word(dst, sum)?;
            }
            OP_ATOMIC_ADD => {
                let word = self.word(dst)?;
                self.set_word(dst, word.wrapping_add(value))?;
            }
            OP_CHASE => {
                let (mut at, mut nodes, mut sum) = (src, 0, 0u64);
                while at != 0 && nodes < value {
                    if !at.is_multiple_of(16) {
                        return Err((-22, at, PERM_READ));
                    }
                    nodes += 1;
                    sum = sum.wrapping_add(self.word(at + 8)?);
                    at = match self.word(at)? {
                        0 => 0,
                        next => next.wrapping_add(arg),
                    };
                }
                self.set_word(dst, nodes)?;
                self.set_word(dst + 8, sum)?;
            }
            other => panic!("opcode {other} is not played"),
        }
        Ok(())
    }

    fn word(&self, address: u64) -> Result<u64, Stop> {
        let word = self.cpu_address(address).and_then(|cpu| self.view.word(cpu));
        word.ok_or((-14, address, PERM_READ))
    }

    fn set_word(&self, address: u64, word: u64) -> Result<(), Stop> {
        let set = self.cpu_address(address).and_then(|cpu| self.view.set_word(cpu, word));
        set.ok_or((-14, address, PERM_WRITE))
    }

    /// The process' address behind a device's.
    fn cpu_address(&self, gpu: u64) -> Option<u64> {
        let holds = |op: &&BindOp| gpu.checked_sub(op.addr.get()).is_some_and(|n| n < op.range.get());
        let op = self.launch.mappings.iter().rev().find(holds)?;
        if op.flags.get() & BIND_CPU_ADDR_MIRROR != 0 {
            Some(gpu.wrapping_add(op.obj_offset.get()))
        } else if op.op.get() == BIND_OP_MAP_USERPTR {
            Some(gpu - op.addr.get() + op.obj_offset.get())
        } else {
            None
        }
    }
}
