//! All guests and all devices of one daemon.

use crate::device::Device;
use crate::guest::{EventPort, Guest};
use crate::info::{DeviceStatus, FaultTrace, HostStats};
use std::sync::Arc;

/// What one guest may use at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Contexts.
    pub contexts: u32,
    /// Faults of one context that wait for an answer.
    pub pending_faults: u32,
    /// Jobs of one context in flight.
    pub jobs: u32,
    /// Mappings of one GPU VM.
    pub mappings: u32,
    /// Blob resources.
    pub resources: u32,
}

/// All guests and all devices of one daemon.
pub struct Host {}

impl Host {
    /// A host with these devices; their index is their place in the list.
    pub fn new(_devices: Vec<Arc<dyn Device>>) -> Arc<Self> {
        todo!()
    }
    /// Begins a guest's session: its VMM has connected. `devices` are the host devices granted to it, in the order of
    /// its `dev_id`; `port` is told when the guest has records to deliver.
    pub fn open_guest(
        self: &Arc<Self>,
        _name: &str,
        _limits: Limits,
        _devices: &[usize],
        _port: Arc<dyn EventPort>,
    ) -> Arc<Guest> {
        todo!()
    }
    /// The devices.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        todo!()
    }
    /// The device of an index.
    pub fn device(&self, _index: usize) -> Option<&Arc<dyn Device>> {
        todo!()
    }
    /// Guests connected now, by name.
    pub fn guests(&self) -> Vec<Arc<Guest>> {
        todo!()
    }
    /// Counts of the whole host.
    pub fn stats(&self) -> HostStats {
        todo!()
    }
    /// The last faults that came to an end, the newest last; at most `limit`.
    pub fn recent_faults(&self, _limit: usize) -> Vec<FaultTrace> {
        todo!()
    }
    /// Misroutes the faults of neighbouring asids to each other. To show that checks fail.
    #[cfg(feature = "sabotage")]
    pub fn sabotage_swap_asids(&self) {
        todo!()
    }
}
