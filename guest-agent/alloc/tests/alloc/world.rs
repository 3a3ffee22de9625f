//! An agent with its broker, and the view that a GPU has of a process' memory.

use crate::lacking::lacking;
use crate::mock::{self, Mock, eventually};
use crate::pages::{Memory, View};
use guest_agent::agent::{Agent, AgentOptions};
use guest_agent::broker::{Broker, BrokerOptions};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::path::PathBuf;
use std::sync::Arc;

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
        Gpu(View::new(&self.mock, &self.memory, of_process().unwrap().ctx_id))
    }

    /// Waits until all that processes have pinned is let go.
    pub fn assert_no_rings(&self) {
        eventually("no pinned memory", || self.memory.rings.lock().unwrap().is_empty());
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

/// What a GPU finds at the CPU addresses of a process: after a change of the process' memory take another one.
pub struct Gpu<'a>(View<'a>);

impl Gpu<'_> {
    /// Where a page is in guest memory. `None`: the agent refuses.
    pub fn physical(&self, page: u64) -> Option<u64> {
        self.0.physical(page)
    }

    pub fn ctx_id(&self) -> u32 {
        self.0.ctx_id
    }

    pub fn reaches(&self, address: u64) -> bool {
        self.physical(address & !4095).is_some()
    }

    /// The word at an aligned address.
    pub fn word(&self, address: u64) -> u64 {
        self.0.word(address).unwrap_or_else(|| panic!("{address:#x} is out of reach"))
    }

    pub fn set_word(&self, address: u64, word: u64) {
        self.0.set_word(address, word).unwrap_or_else(|| panic!("{address:#x} is out of reach"));
    }
}
