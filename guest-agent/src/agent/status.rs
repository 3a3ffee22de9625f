//! What the agent tells its operator about itself.

use super::epoch::Life;
use super::{Agent, Answer, Context, ContextState, LedgerReport, Owner};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A host device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Its id.
    pub dev_id: u32,
    /// Its name.
    pub name: String,
    /// GPU addresses are below `1 << va_bits`.
    pub va_bits: u32,
    /// Engines.
    pub engines: u32,
}

/// What a process may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrustLevel {
    /// What harms nobody but itself.
    Strict,
    /// What harms others if it does it wrong.
    Trusted,
}

impl TrustLevel {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Trusted => "trusted",
        }
    }
}

/// A context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextReport {
    /// Its id.
    pub ctx_id: u32,
    /// Whose it is.
    pub owner: Owner,
    /// `"creating"`, `"alive"`, `"lost"` or `"retiring"`.
    pub state: String,
    /// What its process may do.
    pub trust: TrustLevel,
    /// Its arenas.
    pub arenas: usize,
    /// Bytes of them, those on their way out included.
    pub arena_bytes: u64,
    /// Faults that were addressed to it.
    pub faults: u64,
}

/// Memory of a process that GPUs may reach. All of it is pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaReport {
    /// Its id.
    pub id: u64,
    /// First address in the process.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Bytes.
    pub bytes: u64,
    /// Faults in it that were answered with pages, as far as the ledger remembers.
    pub faults: u64,
    /// Pages of those answers; one that several devices asked for counts as often.
    pub answered_pages: u64,
}

/// The memory of a context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapReport {
    /// Its id.
    pub ctx_id: u32,
    /// Whose it is.
    pub owner: Owner,
    /// Its arenas, by address.
    pub arenas: Vec<ArenaReport>,
    /// Whether the ledger has forgotten faults, so that counts may be too small.
    pub incomplete: bool,
}

/// The agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// `"opening"`, `"open"` or `"failed"`.
    pub state: String,
    /// This life of the driver.
    pub incarnation: u64,
    /// The daemon's epoch.
    pub daemon_epoch: u64,
    /// Whether answers are held back.
    pub holding_answers: bool,
    /// Host devices.
    pub devices: Vec<DeviceReport>,
    /// Contexts by id.
    pub contexts: Vec<ContextReport>,
    /// The file that says who is trusted; none: nobody is.
    pub trust_file: Option<PathBuf>,
    /// Bytes of pinned memory of processes, that on its way in and out included.
    pub pinned_bytes: u64,
    /// Counts of faults and answers.
    pub ledger: LedgerReport,
}

impl Agent {
    /// The agent now.
    pub fn status(&self) -> AgentStatus {
        let devices = self.devices().into_iter().map(|device| {
            let name: Vec<u8> = device.name.iter().copied().take_while(|&byte| byte != 0).collect();
            DeviceReport {
                dev_id: device.dev_id.get(),
                name: String::from_utf8_lossy(&name).into_owned(),
                va_bits: device.va_bits.get(),
                engines: device.num_engines.get(),
            }
        });
        let devices = devices.collect();
        let ledger = self.ledger(false);
        let state = self.lock();
        let mut contexts: Vec<ContextReport> =
            state.contexts.iter().map(|(&ctx_id, context)| self.report(ctx_id, context)).collect();
        contexts.sort_by_key(|context| context.ctx_id);
        let life = match state.life {
            Life::Opening { .. } => "opening",
            Life::Open { .. } => "open",
            Life::Failed { .. } => "failed",
        };
        AgentStatus {
            state: life.into(),
            incarnation: state.life.incarnation(),
            daemon_epoch: self.device.epoch(),
            holding_answers: state.held.is_some(),
            devices,
            contexts,
            trust_file: self.options.trust.file.clone(),
            pinned_bytes: state.accounts.bytes(),
            ledger,
        }
    }

    /// The memory of each context of the process `pid`; empty where it has none.
    pub fn map(&self, pid: i32) -> Vec<MapReport> {
        let ledger = self.ledger(true);
        let state = self.lock();
        let of_process = state.contexts.iter().filter(|(_, context)| context.owner.pid == pid);
        let mut maps: Vec<MapReport> = of_process.map(|(&id, context)| map(id, context, &ledger)).collect();
        maps.sort_by_key(|map| map.ctx_id);
        maps
    }

    fn report(&self, ctx_id: u32, context: &Context) -> ContextReport {
        let state = match context.state {
            _ if context.lost != 0 => "lost",
            ContextState::Creating => "creating",
            ContextState::Alive => "alive",
            ContextState::Retiring => "retiring",
        };
        ContextReport {
            ctx_id,
            owner: context.owner.clone(),
            state: state.into(),
            trust: if self.trusts(context.owner.uid) { TrustLevel::Trusted } else { TrustLevel::Strict },
            arenas: context.arenas.len(),
            arena_bytes: context.arenas.bytes(),
            faults: context.faults,
        }
    }
}

fn map(ctx_id: u32, context: &Context, ledger: &LedgerReport) -> MapReport {
    let arena = |(id, start, bytes): (u64, u64, u64)| {
        let end = start.saturating_add(bytes);
        ArenaReport { id, start, end, bytes, faults: 0, answered_pages: 0 }
    };
    let mut arenas: Vec<ArenaReport> = context.arenas.spans().map(arena).collect();
    let answers = ledger.entries.iter();
    for answer in answers.filter(|a| a.ctx_id == ctx_id && a.code == Answer::Success && a.status == 0) {
        let index = arenas.partition_point(|arena| arena.end <= answer.cpu_addr);
        if let Some(arena) = arenas.get_mut(index).filter(|arena| arena.start <= answer.cpu_addr) {
            arena.faults += 1;
            arena.answered_pages += u64::from(answer.pages);
        }
    }
    MapReport { ctx_id, owner: context.owner.clone(), arenas, incomplete: ledger.forgotten > 0 }
}
