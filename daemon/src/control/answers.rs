//! Results that are not already a snapshot of the core or of the registry. Plain data; field names are the interface.

use serde::Serialize;
use virtio_gpu_svm::device::{Access, LedgerEntry};
use virtio_gpu_svm::info::{ContextStatus, Counters, VmStatus};

/// Result of `server.info`.
#[derive(Serialize)]
pub struct ServerInfo {
    pub name: &'static str,
    pub version: &'static str,
    pub pid: u32,
    pub uptime_s: u64,
    pub started_unix_s: u64,
    pub devices: Vec<String>,
    pub guests: usize,
    /// Which confinement the process runs under.
    pub sandbox: &'static str,
    pub protocol: Protocol,
    pub limits: Limits,
}

/// Versions of what guests see.
#[derive(Serialize)]
pub struct Protocol {
    pub virtio_device_id: u32,
    pub version_major: u16,
    pub version_minor: u16,
    pub capset_id: u32,
    pub capset_version: u32,
}

/// What a request may be.
#[derive(Serialize)]
pub struct Limits {
    pub line_bytes: usize,
    pub batch: usize,
}

/// A context in `context.list`: everything but its mappings, of which there may be very many.
#[derive(Serialize)]
pub struct ContextRow {
    pub guest: String,
    pub ctx_id: u32,
    pub generation: u64,
    pub name: String,
    pub known_pages: u64,
    pub resident_pages: u64,
    pub pending_faults: usize,
    pub jobs: usize,
    pub vms: Vec<VmRow>,
    pub counters: Counters,
}

/// A GPU VM in `context.list`.
#[derive(Serialize)]
pub struct VmRow {
    pub vm_id: u32,
    pub device: usize,
    pub asid: u32,
    pub state: &'static str,
    pub mappings: usize,
    pub resident_pages: u64,
}

impl From<ContextStatus> for ContextRow {
    fn from(context: ContextStatus) -> Self {
        Self {
            guest: context.guest,
            ctx_id: context.ctx_id,
            generation: context.generation,
            name: context.name,
            known_pages: context.known_pages,
            resident_pages: context.vms.iter().map(|vm| vm.resident_pages).sum(),
            pending_faults: context.pending_faults,
            jobs: context.jobs,
            vms: context.vms.iter().map(VmRow::from).collect(),
            counters: context.counters,
        }
    }
}

impl From<&VmStatus> for VmRow {
    fn from(vm: &VmStatus) -> Self {
        Self {
            vm_id: vm.vm_id,
            device: vm.device,
            asid: vm.asid,
            state: vm.state,
            mappings: vm.mappings.len(),
            resident_pages: vm.resident_pages,
        }
    }
}

/// Result of `device.ledger`.
#[derive(Serialize)]
pub struct Ledger<'a> {
    pub device: usize,
    pub name: String,
    pub entries: Vec<LedgerRow<'a>>,
    pub overwritten: u64,
}

/// A fault in `device.ledger`.
#[derive(Serialize)]
pub struct LedgerRow<'a> {
    pub guest: &'a str,
    pub ctx_id: u32,
    pub generation: u64,
    pub asid: u32,
    pub page: u64,
    pub access: &'static str,
}

impl<'a> From<&'a LedgerEntry> for LedgerRow<'a> {
    fn from(entry: &'a LedgerEntry) -> Self {
        Self {
            guest: &entry.label.guest,
            ctx_id: entry.label.ctx_id,
            generation: entry.label.generation,
            asid: entry.asid.0,
            page: entry.page,
            access: match entry.access {
                Access::Read => "read",
                Access::Write => "write",
                Access::Atomic => "atomic",
            },
        }
    }
}
