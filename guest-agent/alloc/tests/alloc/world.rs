//! An agent with its broker, and the view that a GPU has of a process' memory.

use crate::mock::{self, Mock, eventually};
use guest_agent::agent::{Agent, AgentOptions, ArenaMemory, ArenaPages, ImportedPages};
use guest_agent::broker::{Broker, BrokerOptions};
use guest_agent::memory_file::MemoryFile;
use rustix::process::{Resource, getrlimit, setrlimit};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Pages by guest-physical address: the file and the offset in it.
#[derive(Default)]
struct Pages {
    made: u64,
    by_address: HashMap<u64, (u64, u64)>,
    files: HashMap<u64, File>,
    /// What holds pages that are the processes' own.
    rings: HashMap<u64, OwnedFd>,
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

/// Memory that can be read and written as a device does it, by guest-physical address.
#[derive(Default)]
struct Memory(Mutex<Pages>);

impl ArenaMemory for Memory {
    fn create(&self, len: u64) -> io::Result<ArenaPages> {
        let fd = mock::file(len);
        let (id, pages) = self.0.lock().unwrap().add(File::from(fd.try_clone()?), 0, len);
        Ok(ArenaPages { id, fd, offset: 0, pages })
    }

    fn import(&self, file: &MemoryFile) -> io::Result<ImportedPages> {
        let (offset, len) = (file.offset(), file.len());
        let file = File::from(file.as_fd().try_clone_to_owned()?);
        let (id, pages) = self.0.lock().unwrap().add(file, offset, len);
        Ok(ImportedPages { id, pages })
    }

    fn hold(&self, ring: OwnedFd) -> io::Result<u64> {
        let mut pages = self.0.lock().unwrap();
        pages.made += 1;
        let id = pages.made;
        pages.rings.insert(id, ring);
        Ok(id)
    }

    fn release(&self, id: u64) {
        let mut pages = self.0.lock().unwrap();
        pages.rings.remove(&id);
        pages.files.remove(&id);
        pages.by_address.retain(|_, (arena, _)| *arena != id);
    }
}

pub struct World {
    pub mock: Arc<Mock>,
    pub agent: Arc<Agent>,
    memory: Arc<Memory>,
    _broker: Broker,
    pub directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        Self::with(AgentOptions::default())
    }

    pub fn with(options: AgentOptions) -> Self {
        Self::limited(options, |_| {})
    }

    /// As [`Self::with`], with other limits of connections.
    pub fn limited(options: AgentOptions, limit: impl FnOnce(&mut BrokerOptions)) -> Self {
        raise_descriptors();
        let directory = tempfile::tempdir().unwrap();
        let (mock, device) = mock::device();
        let memory = Arc::new(Memory::default());
        let agent = Agent::start(device, memory.clone(), options).unwrap();
        let mut serving = BrokerOptions::at(directory.path().join("agent.sock"));
        limit(&mut serving);
        let broker = Broker::start(agent.clone(), serving);
        Self { mock, agent, memory, _broker: broker.unwrap(), directory }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    /// A GPU that works for the process `pid`.
    pub fn gpu(&self, pid: i32) -> Gpu<'_> {
        let of_process = || {
            let contexts = self.agent.status().contexts;
            contexts.into_iter().find(|context| context.owner.pid == pid && context.state == "alive")
        };
        eventually("a context of the process", || of_process().is_some());
        Gpu { world: self, ctx_id: of_process().unwrap().ctx_id, known: RefCell::default() }
    }

    /// Waits until all that processes have pinned is let go.
    pub fn assert_no_rings(&self) {
        eventually("no pinned memory", || self.memory.0.lock().unwrap().rings.is_empty());
    }

    /// Bytes of arenas of the process `pid`.
    pub fn arena_bytes(&self, pid: i32) -> u64 {
        let contexts = self.agent.status().contexts;
        contexts.iter().filter(|context| context.owner.pid == pid).map(|context| context.arena_bytes).sum()
    }
}

/// Every arena of every program is a file here, and tests run beside each other.
fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// Says that a test is not run: not by `eprintln`, which the harness keeps to itself. Where CI is set, that fails.
pub fn lacking(what: &str) {
    std::io::stderr().write_all(format!("not tested: {what}\n").as_bytes()).unwrap();
    assert!(std::env::var_os("CI").is_none(), "{what}, and CI is set");
}

/// Only root can make processes of other users.
pub fn is_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        lacking(&format!("{what} (needs root)"));
    }
    root
}

impl Drop for World {
    fn drop(&mut self) {
        self.agent.stop();
        self.mock.end();
    }
}

/// What a GPU reads and writes at the CPU addresses of a process.
///
/// It asks once for each page, as a device does: after a change of the process' memory take another one.
pub struct Gpu<'a> {
    world: &'a World,
    ctx_id: u32,
    known: RefCell<HashMap<u64, (u64, u64)>>,
}

impl Gpu<'_> {
    /// Where the byte is. `None`: the agent refuses.
    fn place(&self, address: u64) -> Option<(u64, u64)> {
        let (page, within) = (address & !4095, address & 4095);
        let known = self.known.borrow().get(&page).copied();
        let found = || self.physical(page).map(|at| self.world.memory.0.lock().unwrap().by_address[&at]);
        let (file, offset) = known.or_else(found)?;
        self.known.borrow_mut().insert(page, (file, offset));
        Some((file, offset + within))
    }

    /// Where a page is in guest memory. `None`: the agent refuses.
    pub fn physical(&self, page: u64) -> Option<u64> {
        let mock = &self.world.mock;
        let cookie = mock.script(|script| script.fault(self.ctx_id, page));
        let answer = || {
            let script = mock.look();
            script.answers.iter().find(|answer| answer.cookie == cookie && answer.status == 0).cloned()
        };
        eventually("an answer", || answer().is_some());
        let holds = |va: u64, pages: u32| (va..va + u64::from(pages) * 4096).contains(&page);
        let answer = answer().unwrap();
        let run = answer.runs.iter().find(|run| holds(run.va.get(), run.pages.get()))?;
        Some(run.gpa.get() + page - run.va.get())
    }

    pub fn ctx_id(&self) -> u32 {
        self.ctx_id
    }

    pub fn reaches(&self, address: u64) -> bool {
        self.physical(address & !4095).is_some()
    }

    /// The word at an aligned address.
    pub fn word(&self, address: u64) -> u64 {
        let (file, offset) = self.place(address).unwrap_or_else(|| panic!("{address:#x} is out of reach"));
        let mut word = [0; 8];
        self.world.memory.0.lock().unwrap().files[&file].read_exact_at(&mut word, offset).unwrap();
        u64::from_le_bytes(word)
    }

    pub fn set_word(&self, address: u64, word: u64) {
        let (file, offset) = self.place(address).unwrap_or_else(|| panic!("{address:#x} is out of reach"));
        let pages = self.world.memory.0.lock().unwrap();
        pages.files[&file].write_all_at(&word.to_le_bytes(), offset).unwrap();
    }
}
