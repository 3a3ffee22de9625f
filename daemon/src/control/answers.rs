//! Results that are not already a snapshot of the core or of the registry. Plain data; field names are the interface.

use serde::Serialize;
use virtio_gpu_svm::device::{Access, LedgerEntry};

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
    /// How much of its sandbox the process is in: none, part or full.
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
    pub depth: usize,
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
