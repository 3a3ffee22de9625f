//! An agent with its broker, and devices whose engines execute packets on the memory of processes.
//!
//! An engine sees a process' memory as a real one does: an address goes through the mappings of the GPU VM, a page that
//! is not known is a fault to the agent, and what the agent answers names the page. So what it finds is right only if
//! the library has mapped it, the process has it in an arena, and the agent knows it.

use crate::mock::{self, Launch, Mock, Shape, eventually};
use guest_agent::agent::{Agent, AgentOptions, ArenaMemory, ArenaPages, ImportedPages};
use guest_agent::broker::{Broker, BrokerOptions};
use guest_agent::memory_file::MemoryFile;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::protocol::event::{PERM_READ, PERM_WRITE};
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::request::{BIND_CPU_ADDR_MIRROR, BIND_OP_MAP_USERPTR, BindOp};

/// Pages by guest-physical address: the file and the offset in it.
#[derive(Default)]
struct Pages {
    made: u64,
    by_address: HashMap<u64, (u64, u64)>,
    files: HashMap<u64, File>,
}

impl Pages {
    /// A part of a file becomes memory; its pages. Neighbours in the file are none in guest memory.
    fn add(&mut self, file: File, offset: u64, len: u64) -> (u64, Vec<u64>) {
        self.made += 1;
        let id = self.made;
        let addresses: Vec<u64> = (0..len / 4096).map(|page| (id << 32) + page * 8192).collect();
        for (page, address) in (0..).zip(&addresses) {
            self.by_address.insert(*address, (id, offset + page * 4096));
        }
        self.files.insert(id, file);
        (id, addresses)
    }
}

/// Memory that is read and written by guest-physical address.
#[derive(Default)]
struct Memory(Mutex<Pages>);

impl ArenaMemory for Memory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let fd = mock::file(len);
        let (id, pages) = self.0.lock().unwrap().add(File::from(fd.try_clone()?), 0, len);
        Ok(ArenaPages { id, fd, offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let own = File::from(file.as_fd().try_clone_to_owned()?);
        let (id, pages) = self.0.lock().unwrap().add(own, file.offset(), file.len());
        Ok(ImportedPages { id, pages })
    }

    fn release(&self, id: u64) {
        let mut pages = self.0.lock().unwrap();
        pages.files.remove(&id);
        pages.by_address.retain(|_, (arena, _)| *arena != id);
    }
}

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
        let mut view = View { engines: self, launch, known: HashMap::new() };
        for (index, packet) in (0..).zip(&launch.packets) {
            if let Err((errno, address, access)) = view.packet(packet) {
                return Some((errno, index, address, access));
            }
        }
        None
    }
}

/// What a job sees of its process' memory. It asks once for each page.
struct View<'a> {
    engines: &'a Engines,
    launch: &'a Launch,
    known: HashMap<u64, (u64, u64)>,
}

impl View<'_> {
    fn packet(&mut self, packet: &Packet) -> Result<(), Stop> {
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

    fn word(&mut self, address: u64) -> Result<u64, Stop> {
        let (file, offset) = self.place(address).ok_or((-14, address, PERM_READ))?;
        let mut word = [0; 8];
        self.engines.memory.0.lock().unwrap().files[&file].read_exact_at(&mut word, offset).unwrap();
        Ok(u64::from_le_bytes(word))
    }

    fn set_word(&mut self, address: u64, word: u64) -> Result<(), Stop> {
        let (file, offset) = self.place(address).ok_or((-14, address, PERM_WRITE))?;
        let pages = self.engines.memory.0.lock().unwrap();
        pages.files[&file].write_all_at(&word.to_le_bytes(), offset).unwrap();
        Ok(())
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

    fn place(&mut self, gpu: u64) -> Option<(u64, u64)> {
        let cpu = self.cpu_address(gpu)?;
        let (page, within) = (cpu & !4095, cpu & 4095);
        let known = self.known.get(&page).copied();
        let (file, offset) = known.or_else(|| self.fault(page))?;
        self.known.insert(page, (file, offset));
        Some((file, offset + within))
    }

    fn fault(&self, page: u64) -> Option<(u64, u64)> {
        let mock = &self.engines.mock;
        let cookie = mock.script(|script| script.fault(self.launch.ctx_id, page));
        let answer = || {
            let script = mock.look();
            script.answers.iter().find(|answer| answer.cookie == cookie && answer.status == 0).cloned()
        };
        eventually("an answer", || answer().is_some());
        let holds = |va: u64, pages: u32| (va..va + u64::from(pages) * 4096).contains(&page);
        let answer = answer().unwrap();
        let run = answer.runs.iter().find(|run| holds(run.va.get(), run.pages.get()))?;
        let physical = run.gpa.get() + page - run.va.get();
        self.engines.memory.0.lock().unwrap().by_address.get(&physical).copied()
    }
}
