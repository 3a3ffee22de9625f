//! What the agent tells its operator about itself.

use super::epoch::Life;
use super::{Agent, Context, ContextState, LedgerReport, Owner};
use serde::{Deserialize, Serialize};

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

/// A context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextReport {
    /// Its id.
    pub ctx_id: u32,
    /// Whose it is.
    pub owner: Owner,
    /// `"creating"`, `"alive"`, `"lost"` or `"retiring"`.
    pub state: String,
    /// Its arenas.
    pub arenas: usize,
    /// Bytes of them, those on their way out included.
    pub arena_bytes: u64,
    /// Faults that were addressed to it.
    pub faults: u64,
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
    /// Bytes of pinned memory of processes.
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
            state.contexts.iter().map(|(&ctx_id, context)| report(ctx_id, context)).collect();
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
            pinned_bytes: state.arena_bytes(),
            ledger,
        }
    }
}

fn report(ctx_id: u32, context: &Context) -> ContextReport {
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
        arenas: context.arenas.len() + context.withdrawn.len(),
        arena_bytes: context.arena_bytes(),
        faults: context.faults,
    }
}
