//! The only door to a GPU. The core owns the truth about mappings; a device is a cache of translations that may be
//! dropped and faulted in again. Memory is named by (region, offset), so that a device can use host addresses or fds.
//!
//! All work is submitted and completes through [`Events`]. A fault is resolved by [`Device::bind`] and released by
//! [`Device::resume`], two steps. Devices never call up in any other way.
//!
//! # Locking
//! `Events` methods are called from engine threads **with no lock of the device held** and may call any method of
//! [`Device`]. Methods of `Device` may be called under locks of the core, so they never call `Events` synchronously
//! and never wait for an engine, except [`Device::drop_region`].

pub mod ledger;
pub mod operands;
pub mod soft;

use crate::addr::{GpuAddr, PageRange};
use crate::memory::Region;
use crate::protocol::job::Packet;
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::quota::{Charge, Full};
use crate::sync::Arc;

/// How a device deals with an access that has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultModel {
    /// The job parks, the fault is reported, the access is repeated after [`Device::resume`].
    Replayable,
    /// The host kernel resolves it.
    KernelResolved,
    /// It cannot: everything must be bound before. A job that finds no translation, or none with the right, ends with
    /// -EFAULT (-EPERM) at that address, unless its GPU VM is frozen: then it goes on when that is thawed. So the core
    /// freezes a GPU VM before it unbinds, and thaws it when everything is bound again. Not so one that has become
    /// unusable: its jobs are to end.
    None,
}

/// Which GPU addresses a mapping may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressModel {
    /// Any below `1 << va_bits`.
    Any,
    /// Only the CPU's own: the device has no mappings and asks for pages of the process' address space, in groups
    /// ([`Fault::pages`]), as PCIe page requests do.
    Identity,
}

/// What a device is. Constant over its life.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// For people; at most 32 bytes.
    pub name: String,
    /// GPU addresses are below `1 << va_bits`.
    pub va_bits: u32,
    /// Engines that run jobs side by side.
    pub num_engines: u32,
    /// Bit n: packet opcode n is executed.
    pub opcodes: u64,
    /// Faults.
    pub fault_model: FaultModel,
    /// Addresses.
    pub address_model: AddressModel,
    /// Whether it has translations that read as zero and swallow writes ([`Device::bind_null`]).
    pub null_mappings: bool,
    /// Whether translations carry a right to execute.
    pub exec: bool,
}

/// Device-wide id of a GPU VM: what a fault report carries. 20 bits, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asid(pub u32);

/// One beyond the largest asid.
pub const ASID_END: u32 = 1 << 20;

/// Whose GPU VM this is, as the device itself is told at creation: the ledger's truth below the router.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VmLabel {
    /// The guest's name.
    pub guest: Arc<str>,
    /// The context in it.
    pub ctx_id: u32,
    /// The context's generation.
    pub generation: u64,
}

/// Pages of a region, in order, and what the GPU may do with them.
#[derive(Clone, Copy, Debug)]
pub struct Extent<'a> {
    /// Where they are. Lent: a list of very many pages names few regions.
    pub region: &'a Arc<Region>,
    /// Byte offset in it, page aligned.
    pub offset: u64,
    /// How many, at least 1.
    pub pages: u64,
    /// Whether the GPU may write.
    pub writable: bool,
}

/// A page of a region, and whether the GPU may write it: a word, for lists of very many pages that follow each other only
/// in the GPU's space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScatteredPage(u64);

impl ScatteredPage {
    /// What [`ScatteredPage::word`] has where the GPU may write.
    pub const WRITABLE: u64 = 1 << 1;
    const OFFSET: u64 = !(PAGE_SIZE - 1);

    /// The page that holds the byte at an offset.
    pub fn new(offset: u64, writable: bool) -> Self {
        Self((offset & Self::OFFSET) | if writable { Self::WRITABLE } else { 0 })
    }
    /// Byte offset in the region, page aligned.
    pub fn offset(self) -> u64 {
        self.0 & Self::OFFSET
    }
    /// Whether the GPU may write.
    pub fn is_writable(self) -> bool {
        self.0 & Self::WRITABLE != 0
    }
    /// The offset and [`ScatteredPage::WRITABLE`].
    pub fn word(self) -> u64 {
        self.0
    }
}

/// An access right that a job needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Atomic read-modify-write; needs write permission.
    Atomic,
}

/// Names a job within a GPU VM; chosen by the core, never reused. It is the number that the process sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// Work for one GPU VM. Jobs of one ring run in order of submission, rings run side by side.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name in events.
    pub id: JobId,
    /// Its timeline in the GPU VM.
    pub ring_idx: u32,
    /// What to do; checked by [`Device::check_packets`].
    pub packets: Vec<Packet>,
}

/// Names a parked access within a device; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StopId(pub u64);

/// An access without translation. The job is off its engine and holds no translation.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// The GPU VM whose job faulted.
    pub asid: Asid,
    /// To be named in [`Device::resume`], exactly once.
    pub stop: StopId,
    /// The job.
    pub job: JobId,
    /// The address that was touched.
    pub addr: GpuAddr,
    /// Pages, from that of `addr` on, that are asked for together; at least 1. More are one group: one report, one
    /// answer, one [`Device::resume`].
    pub pages: u64,
    /// Bytes from `addr` that the packet is going to touch, as far as the device knows; at least 1.
    pub length_hint: u64,
    /// How it was touched.
    pub access: Access,
    /// The engine.
    pub engine: u8,
    /// Level of the table at which the walk ended; 0 is the last.
    pub level: u8,
}

/// What becomes of a parked access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Repeat it.
    Retry,
    /// The job ends with this errno (positive).
    Fail(i32),
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobEnd {
    /// 0 or a positive errno.
    pub errno: i32,
    /// The packet that failed.
    pub packet: u32,
    /// The address that failed.
    pub addr: GpuAddr,
    /// How it was touched.
    pub access: Access,
}

/// A point that engines must pass before old translations are surely unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Whether old translations may still be in use after an [`Device::unbind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "memory may be released only after the flush"]
pub enum Flush {
    /// Nobody uses them.
    Done,
    /// Nobody will once [`Events::flushed`] names this ticket.
    Pending(Ticket),
}

/// What devices tell the core.
pub trait Events: Send + Sync {
    /// A job faulted and is parked. Called once per parking.
    fn fault(&self, device: usize, fault: Fault);
    /// A job ended. Not called for jobs that [`Device::vm_destroy`] drops.
    fn job_done(&self, device: usize, asid: Asid, job: JobId, end: JobEnd);
    /// No engine uses what was unbound under this ticket or an earlier one of that GPU VM.
    fn flushed(&self, device: usize, asid: Asid, ticket: Ticket);
    /// The GPU VM is gone: no job, no translation, no fault of it is left, and none will be reported.
    fn retired(&self, device: usize, asid: Asid);
}

/// Why a device refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such GPU VM, or it is being destroyed.
    #[error("asid {0} is not alive on this device")]
    NoVm(u32),
    /// The asid is in use.
    #[error("asid {0} is in use on this device")]
    VmExists(u32),
    /// A packet that this device does not execute.
    #[error("packet {index} has an unknown opcode")]
    UnknownOpcode {
        /// Which.
        index: u32,
    },
    /// A packet whose fields contradict its opcode.
    #[error("packet {index} has a bad operand")]
    BadOperand {
        /// Which.
        index: u32,
    },
    /// No memory for tables.
    #[error("out of memory")]
    OutOfMemory,
    /// The guest's tables take as many bytes as they may.
    #[error(transparent)]
    OverQuota(#[from] Full),
    /// The device has no such translations.
    #[error("the device has no such translations")]
    Unsupported,
    /// The device has as many GPU VMs as it may have.
    #[error("no room for another GPU VM")]
    TooManyVms,
}

/// One entry of a device's own record of the faults that it raised, below the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LedgerEntry {
    /// Whose job it was, as the device was told.
    pub label: VmLabel,
    /// The GPU VM.
    pub asid: Asid,
    /// The GPU page (C), as a page number.
    pub page: u64,
    /// How it was touched.
    pub access: Access,
}

/// A GPU.
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Creates an empty GPU VM. What its tables take of this process' memory is added to `tables`, which is dropped with
    /// them.
    ///
    /// # Errors
    /// [`Error::VmExists`], [`Error::OutOfMemory`], [`Error::TooManyVms`].
    fn vm_create(&self, asid: Asid, label: VmLabel, tables: Charge) -> Result<(), Error>;

    /// Begins to destroy a GPU VM: its jobs stop at their next checkpoint and are dropped, parked ones at once; no
    /// fault is raised any more. [`Events::retired`] follows.
    fn vm_destroy(&self, asid: Asid);

    /// Makes translations for the extents, one after the other from `addr`; replaces what stood there (the core has
    /// unbound it, or it is the same). Whole aligned 2 MiB blocks become large leaves.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::OutOfMemory`], [`Error::OverQuota`]; then no translation was added.
    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error>;

    /// The same as [`Device::bind`], of pages that lie anywhere in one region.
    ///
    /// # Errors
    /// Those of [`Device::bind`]; then no translation was added.
    fn bind_pages(
        &self,
        asid: Asid,
        addr: GpuAddr,
        region: &Arc<Region>,
        pages: &[ScatteredPage],
    ) -> Result<(), Error> {
        let mut extents: Vec<Extent> = Vec::new();
        for page in pages {
            let (offset, writable) = (page.offset(), page.is_writable());
            match extents.last_mut() {
                Some(last)
                    if last.writable == writable
                        && last.offset.checked_add(last.pages << PAGE_SHIFT) == Some(offset) =>
                {
                    last.pages = last.pages.saturating_add(1);
                }
                _ => extents.push(Extent { region, offset, pages: 1, writable }),
            }
        }
        self.bind(asid, addr, &extents)
    }

    /// Makes translations that read as zero and swallow writes; replaces what stood there. Only for devices with
    /// [`DeviceInfo::null_mappings`].
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::OutOfMemory`], [`Error::OverQuota`], [`Error::Unsupported`]; then no translation was
    /// added.
    fn bind_null(&self, _asid: Asid, _range: PageRange) -> Result<(), Error> {
        Err(Error::Unsupported)
    }

    /// Drops translations of the range; a large leaf that is cut goes whole. Cannot fail and does not wait.
    fn unbind(&self, asid: Asid, range: PageRange) -> Flush;

    /// What must be passed before everything unbound so far is surely unused.
    fn flush(&self, asid: Asid) -> Flush;

    /// Whether a ticket has been passed, or the GPU VM is gone.
    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool;

    /// Drops every translation to a region, waits for at most one engine slice, and forgets the region.
    fn drop_region(&self, asid: Asid, region_id: u64);

    /// Translations of a GPU VM now, in pages.
    fn resident_pages(&self, asid: Asid) -> u64;

    /// Pages of the range with a translation now. Costs what the tables hold there, not what the range spans.
    fn resident_in(&self, asid: Asid, range: PageRange) -> u64;

    /// Bytes that the tables of a GPU VM take now.
    fn table_bytes(&self, _asid: Asid) -> u64 {
        0
    }

    /// Checks packets as far as this can be done without memory.
    ///
    /// # Errors
    /// [`Error::UnknownOpcode`], [`Error::BadOperand`].
    fn check_packets(&self, packets: &[Packet]) -> Result<(), Error>;

    /// Queues a job.
    ///
    /// # Errors
    /// [`Error::NoVm`].
    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error>;

    /// Releases a parked access. A stop that is not parked (its VM was destroyed) is ignored.
    fn resume(&self, stop: StopId, verdict: Verdict);

    /// Stops (or lets go on) the jobs of a GPU VM at their checkpoints; they keep their place. Freezing returns a
    /// flush: once done, no engine touches memory of this VM until it is thawed.
    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush;

    /// The faults raised so far, and how many older ones were overwritten. Empty unless the ledger was switched on.
    fn ledger(&self) -> (Vec<LedgerEntry>, u64);
}
