//! Records on their way to the guest. What must not be lost waits in the context that it is about (and is bounded by
//! that context's quotas); what outlives a context waits in the guest. A record gets its bytes when a buffer is there.

use crate::device::{Asid, JobEnd};
use crate::fault::Pending;
use crate::protocol::errno::name;
use crate::protocol::event::{
    EVENT_BIND_DONE, EVENT_FAULT, EVENT_JOB_DONE, EVENT_RECORD_BYTES, FAULT_LAST_PAGE, FAULT_PASID_VALID,
    FAULT_PREFETCH, FAULT_REPLAYABLE, FaultRecord, JobRecord, NoticeRecord,
};
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::timeline::Timeline;
use zerocopy::{Immutable, IntoBytes};

/// The bytes of one record.
pub type Record = [u8; EVENT_RECORD_BYTES];

/// A record that waits in a context; those of faults wait in the table of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// The end of a job or of an asynchronous bind.
    Job(DoneJob),
    /// Invalidations are done; the sequence is read when the record is written.
    InvalDone,
    /// A GPU VM has become unusable.
    Lost {
        /// It.
        vm_id: u32,
        /// Why: positive errno.
        errno: i32,
    },
}

/// A job or an asynchronous bind that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoneJob {
    /// Whether it was a bind.
    pub bind: bool,
    /// From the reply.
    pub job_id: u64,
    /// From the request.
    pub user_data: u64,
    /// The guest's number of the device.
    pub dev_id: u32,
    /// Where it had its turn.
    pub timeline: Timeline,
    /// The point that it had promised, or 0.
    pub point: u64,
    /// How it ended.
    pub end: JobEnd,
}

/// A record that is told by one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// `EVENT_*`.
    pub kind: u32,
    /// The context, or 0.
    pub ctx_id: u32,
    /// As the kind says.
    pub value: u64,
    /// Positive errno, or 0.
    pub errno: i32,
}

/// When and as the how-manieth a record is written.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Nanoseconds of the daemon's monotonic clock.
    pub timestamp: u64,
    /// Sequence in this guest.
    pub sequence: u64,
}

fn bytes(record: &(impl IntoBytes + Immutable)) -> Record {
    let mut out = [0; EVENT_RECORD_BYTES];
    record.write_to(&mut out).unwrap_or_else(|_| unreachable!("every record has {EVENT_RECORD_BYTES} bytes"));
    out
}

/// What the entry of a pending fault does not say.
#[derive(Clone, Copy, Debug)]
pub struct ToldFault {
    /// Its context.
    pub ctx_id: u32,
    /// Names it in the answer.
    pub cookie: u64,
    /// The guest's number of the device.
    pub dev_id: u32,
    /// The GPU VM there.
    pub asid: Asid,
    /// Accesses that wait for it.
    pub waiters: usize,
}

/// The next record of a fault. PROTOCOL 7.2.
pub fn fault_record(told: &ToldFault, fault: &Pending, stamp: Stamp) -> Record {
    let nth = fault.reported();
    let group = if fault.records() > 1 { told.cookie & u64::from(u32::MAX) } else { 0 };
    let is_last = nth.saturating_add(1) >= fault.records();
    let last = if is_last { FAULT_LAST_PAGE } else { 0 };
    let kind = if fault.is_prefetch() { FAULT_PREFETCH } else { FAULT_REPLAYABLE };
    bytes(&FaultRecord {
        kind: EVENT_FAULT.into(),
        ctx_id: told.ctx_id.into(),
        cookie: told.cookie.into(),
        dev_id: told.dev_id.into(),
        vm_id: fault.vm_id.into(),
        asid: told.asid.0.into(),
        grpid: u32::try_from(group).unwrap_or(u32::MAX).into(),
        flags: (FAULT_PASID_VALID | last | kind).into(),
        perm: u32::from(fault.perm()).into(),
        addr: (fault.page().wrapping_add(nth) << PAGE_SHIFT).into(),
        cpu_addr: (fault.cpu_page().wrapping_add(nth) << PAGE_SHIFT).into(),
        length_hint: hint_of(fault, nth).into(),
        fault_type: fault.fault_type(),
        level: fault.level(),
        engine_instance: fault.engine(),
        num_coalesced: u16::try_from(told.waiters).unwrap_or(u16::MAX).into(),
        access_mask: fault.perm().into(),
        address_precision: u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX).into(),
        timestamp: stamp.timestamp.into(),
        sequence: stamp.sequence.into(),
        ..FaultRecord::default()
    })
}

/// Bytes from the page of the `nth` record on; never none.
fn hint_of(fault: &Pending, nth: u64) -> u32 {
    let before = u32::try_from(nth << PAGE_SHIFT).unwrap_or(u32::MAX);
    fault
        .length_hint
        .saturating_sub(before)
        .max(u32::try_from(PAGE_SIZE).unwrap_or(u32::MAX).min(fault.length_hint))
}

/// PROTOCOL 7.3.
pub fn job_record(ctx_id: u32, job: &DoneJob, stamp: Stamp) -> Record {
    let accessed = job.end.errno != 0 && !job.bind;
    bytes(&JobRecord {
        kind: if job.bind { EVENT_BIND_DONE } else { EVENT_JOB_DONE }.into(),
        ctx_id: ctx_id.into(),
        job_id: job.job_id.into(),
        user_data: job.user_data.into(),
        dev_id: job.dev_id.into(),
        vm_id: job.timeline.vm_id.into(),
        status: job.end.errno.saturating_neg().into(),
        packet: job.end.packet.into(),
        addr: job.end.addr.0.into(),
        perm: if accessed { u32::from(job.end.access.perm()) } else { 0 }.into(),
        ring_idx: job.timeline.ring_idx.into(),
        timestamp: stamp.timestamp.into(),
        sequence: stamp.sequence.into(),
        point: job.point.into(),
        ..JobRecord::default()
    })
}

/// PROTOCOL 7.4.
pub fn notice_record(notice: Notice, stamp: Stamp) -> Record {
    bytes(&NoticeRecord {
        kind: notice.kind.into(),
        ctx_id: notice.ctx_id.into(),
        value: notice.value.into(),
        status: notice.errno.saturating_neg().into(),
        timestamp: stamp.timestamp.into(),
        sequence: stamp.sequence.into(),
        ..NoticeRecord::default()
    })
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kind {} context {} value {} ({})", self.kind, self.ctx_id, self.value, name(self.errno))
    }
}
