//! Snapshots for people and tools: what a host, guest, context, GPU VM or fault looks like from outside. Plain data,
//! taken under the owner's lock and then free of it. With the `serde` feature they serialise under these names.

use crate::quota::LimitStatus;
use crate::sync::Arc;

/// A host device.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct DeviceStatus {
    /// Index on this host.
    pub device: usize,
    /// Its name.
    pub name: String,
    /// GPU addresses are below `1 << va_bits`.
    pub va_bits: u32,
    /// Engines.
    pub engines: u32,
    /// `"replayable"`, `"kernel-resolved"` or `"none"`.
    pub fault_model: &'static str,
    /// `"any"` or `"identity"`.
    pub address_model: &'static str,
    /// GPU VMs alive on it.
    pub gpu_vms: usize,
    /// Asids that wait until engines let go of them.
    pub retiring: usize,
    /// Faults it has raised.
    pub faults_raised: u64,
}

/// A guest, while its VMM is connected.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct GuestStatus {
    /// Named by the operator.
    pub name: String,
    /// Of this session.
    pub epoch: u64,
    /// Of the driver, 0 before HELLO.
    pub incarnation: u64,
    /// Host devices granted, in the order of the guest's `dev_id`.
    pub devices: Vec<usize>,
    /// Contexts alive.
    pub contexts: usize,
    /// Contexts destroyed but not yet retired.
    pub retiring: usize,
    /// Blob resources.
    pub resources: usize,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Regions of guest memory.
    pub memory_regions: usize,
    /// Faults that wait for this guest.
    pub pending_faults: usize,
    /// Whether its rings are stopped and its jobs with them.
    pub frozen: bool,
    /// What it may use, and what it uses. Not told where it was taken out, to be told beside this.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Vec::is_empty"))]
    pub limits: Vec<LimitStatus>,
}

/// A context: one guest process.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ContextStatus {
    /// Its guest.
    pub guest: String,
    /// Its id in the guest.
    pub ctx_id: u32,
    /// Tells it from earlier contexts of that id.
    pub generation: u64,
    /// As the guest calls it.
    pub name: String,
    /// Its capset.
    pub capset_id: u32,
    /// Pages of its address space that are known (A side).
    pub known_pages: u64,
    /// Last invalidation accepted.
    pub inval_seq: u64,
    /// Last invalidation done.
    pub inval_done_seq: u64,
    /// Faults that wait for the guest.
    pub pending_faults: usize,
    /// Jobs and asynchronous binds in flight.
    pub jobs: usize,
    /// What it holds of its own limits and of its guest's.
    pub limits: Vec<Holding>,
    /// Its GPU VMs, one a device at most (C side).
    pub vms: Vec<VmStatus>,
    /// What has happened to it.
    pub counters: Counters,
}

/// What a context holds of a limit.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Holding {
    /// The limit's name, as in the configuration.
    pub name: &'static str,
    /// Held now; of a GPU VM's limit, the most that any of its GPU VMs holds.
    pub used: u64,
    /// The most that may be, by the context alone or by all of its guest together.
    pub limit: u64,
}

/// A context without its mappings, of which there may be very many.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct ContextSummary {
    /// Its guest.
    pub guest: String,
    /// Its id in the guest.
    pub ctx_id: u32,
    /// Tells it from earlier contexts of that id.
    pub generation: u64,
    /// As the guest calls it.
    pub name: String,
    /// Pages of its address space that are known (A side).
    pub known_pages: u64,
    /// Pages with a translation now, of all its GPU VMs.
    pub resident_pages: u64,
    /// Faults that wait for the guest.
    pub pending_faults: usize,
    /// Jobs and asynchronous binds in flight.
    pub jobs: usize,
    /// Mappings of all its GPU VMs, with what queued binds may add.
    pub mappings: u64,
    /// Bytes of its page tables.
    pub table_bytes: u64,
    /// Its GPU VMs, one a device at most (C side).
    pub vms: Vec<VmSummary>,
    /// What has happened to it.
    pub counters: Counters,
}

/// A GPU VM without its mappings.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct VmSummary {
    /// Its id in the context.
    pub vm_id: u32,
    /// The host device's index.
    pub device: usize,
    /// Its id in fault reports.
    pub asid: u32,
    /// `"usable"` or `"unusable"`.
    pub state: &'static str,
    /// How many mappings it has.
    pub mappings: usize,
    /// Pages with a translation now.
    pub resident_pages: u64,
}

/// A GPU VM.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct VmStatus {
    /// Its id in the context.
    pub vm_id: u32,
    /// The host device's index.
    pub device: usize,
    /// Its id in fault reports.
    pub asid: u32,
    /// `"usable"` or `"unusable"`.
    pub state: &'static str,
    /// What made it unusable: errno, positive; else 0.
    pub error: i32,
    /// The operation of a bind that this is about, or 0.
    pub error_op: u32,
    /// The GPU address that this is about, or 0.
    pub error_addr: u64,
    /// Mappings by rising GPU address.
    pub mappings: Vec<MappingStatus>,
    /// Pages with a translation now.
    pub resident_pages: u64,
    /// Pages that are to have one before a job touches them, and have none yet.
    pub wanted_pages: u64,
    /// Whether its queues are stopped until they have.
    pub held: bool,
    /// Jobs in flight.
    pub jobs: usize,
    /// Faults that wait for the guest.
    pub pending_faults: usize,
    /// The oldest of them, at most [`crate::fault::SHOWN_FAULTS`].
    pub faults: Vec<PendingStatus>,
}

/// A fault that waits for the guest.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct PendingStatus {
    /// Names it in the answer.
    pub cookie: u64,
    /// C, of the first page.
    pub gpu_addr: u64,
    /// A, of the first page.
    pub cpu_addr: u64,
    /// Pages that are asked for.
    pub pages: u64,
    /// `"read"`, `"write"` or `"atomic"`.
    pub access: &'static str,
    /// Whether no job waits at it yet.
    pub prefetch: bool,
    /// Whether the guest has been told.
    pub told: bool,
    /// Accesses that wait for it.
    pub waiters: usize,
    /// For how long, in nanoseconds.
    pub wait_ns: u64,
}

/// A mapping A..B -> C..D, or of a blob.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct MappingStatus {
    /// C.
    pub gpu_start: u64,
    /// D.
    pub gpu_end: u64,
    /// `"userptr"`, `"mirror"`, `"blob"` or `"null"`.
    pub kind: &'static str,
    /// A, for a userptr or mirror.
    pub cpu_start: Option<u64>,
    /// B, for a userptr or mirror.
    pub cpu_end: Option<u64>,
    /// The resource, for a blob.
    pub resource_id: Option<u32>,
    /// Where in the resource, for a blob.
    pub offset: Option<u64>,
    /// Whether the GPU may only read.
    pub readonly: bool,
    /// Pages with a translation now.
    pub resident_pages: u64,
}

/// What happened to one fault.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct FaultTrace {
    /// When it was raised, in nanoseconds since the daemon's start.
    pub time_ns: u64,
    /// Its owner's guest.
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_text"))]
    pub guest: Arc<str>,
    /// Its owner.
    pub ctx_id: u32,
    /// The host device's index.
    pub device: usize,
    /// As reported.
    pub asid: u32,
    /// As told to the guest; 0 where the guest was not asked.
    pub cookie: u64,
    /// C, of the page.
    pub gpu_addr: u64,
    /// A, of the page; 0 where no mapping says.
    pub cpu_addr: u64,
    /// `"read"`, `"write"` or `"atomic"`.
    pub access: &'static str,
    /// `"served-locally"`, `"answered"`, `"refused"`, `"dropped"` or `"throttled"`.
    pub outcome: &'static str,
    /// Nanoseconds from raising to the outcome.
    pub wait_ns: u64,
}

/// A shared text, for which serde would need another feature.
#[cfg(feature = "serde")]
fn as_text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

/// Counts since the start of their owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Counters {
    /// Faults that devices raised. Each ends as one of the next five.
    pub faults_raised: u64,
    /// Resolved without asking the guest.
    pub faults_served_locally: u64,
    /// Resolved by the guest's answer, joined ones included.
    pub faults_answered: u64,
    /// Ended as an error of the job.
    pub faults_refused: u64,
    /// Their context or GPU VM was gone.
    pub faults_dropped: u64,
    /// Sent back to be raised again, because too many were pending.
    pub faults_throttled: u64,
    /// Records written to the guest.
    pub faults_reported: u64,
    /// Faults that joined a pending record.
    pub faults_coalesced: u64,
    /// Answers that named no pending fault.
    pub answers_stale: u64,
    /// Runs of pages installed.
    pub runs_installed: u64,
    /// Runs of pages refused because an invalidation was newer.
    pub runs_refused: u64,
    /// Invalidations accepted.
    pub invalidations: u64,
    /// Jobs and asynchronous binds accepted.
    pub jobs_submitted: u64,
    /// Of these, those that ended well.
    pub jobs_done: u64,
    /// Those that ended with an error.
    pub jobs_failed: u64,
    /// Those dropped with their context or GPU VM.
    pub jobs_dropped: u64,
}

/// The whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HostStats {
    /// Guests connected.
    pub guests: usize,
    /// Contexts alive.
    pub contexts: usize,
    /// GPU VMs alive.
    pub gpu_vms: usize,
    /// GPU VMs with a fault that waits for its guest, now.
    pub pending_vms: usize,
    /// The most of them at any time.
    pub peak_pending_vms: usize,
    /// Sums over all contexts, past ones included.
    pub counters: Counters,
}
