//! Records on the event queue. A buffer opens with [`EventHdr`], records of 96 bytes follow. PROTOCOL 7.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a record.
pub const EVENT_RECORD_BYTES: usize = 96;

/// Record kind: [`FaultRecord`].
pub const EVENT_FAULT: u32 = 1;
/// Record kind: [`JobRecord`].
pub const EVENT_JOB_DONE: u32 = 2;
/// Record kind: [`NoticeRecord`], invalidations of `ctx_id` are done up to `value`.
pub const EVENT_INVAL_DONE: u32 = 3;
/// Record kind: [`NoticeRecord`], GPU VM `value` of the context became unusable for `status`; 0 is the whole context.
pub const EVENT_CONTEXT_LOST: u32 = 4;
/// Record kind: [`NoticeRecord`], no engine can use anything of the destroyed context `ctx_id` any more.
pub const EVENT_CONTEXT_RETIRED: u32 = 5;
/// Record kind: [`NoticeRecord`], no engine can use anything of incarnations before `value` any more.
pub const EVENT_QUIET: u32 = 6;
/// Record kind: [`JobRecord`], the end of an asynchronous bind.
pub const EVENT_BIND_DONE: u32 = 7;

/// [`FaultRecord::flags`]: `asid` and `vm_id` are valid (iommufd's value).
pub const FAULT_PASID_VALID: u32 = 1 << 0;
/// [`FaultRecord::flags`]: last of its group (iommufd's value).
pub const FAULT_LAST_PAGE: u32 = 1 << 1;
/// [`FaultRecord::flags`]: the access is repeated after a successful answer.
pub const FAULT_REPLAYABLE: u32 = 1 << 2;
/// [`FaultRecord::flags`]: no job waits at this page; the device is to have it before one does.
pub const FAULT_PREFETCH: u32 = 1 << 3;

/// Access: read.
pub const PERM_READ: u32 = 1;
/// Access: write.
pub const PERM_WRITE: u32 = 2;
/// Access: atomic.
pub const PERM_ATOMIC: u32 = 16;

/// [`FaultRecord::fault_type`]: no translation.
pub const FAULT_NOT_PRESENT: u8 = 0;
/// [`FaultRecord::fault_type`]: a write, and the process' page is known as read-only.
pub const FAULT_WRITE_ACCESS: u8 = 1;
/// [`FaultRecord::fault_type`]: an atomic, and the process' page is known as read-only.
pub const FAULT_ATOMIC_ACCESS: u8 = 2;

wire! {
    /// Opens every event buffer.
    EventHdr, 24 {
        /// Records that follow.
        num_records: U32,
        /// Zero.
        flags: U32,
        /// Changes whenever the daemon has lost this guest's state.
        daemon_epoch: U64,
        /// Sequence of the first record.
        sequence: U64,
    }
}
wire! {
    /// A device fault, addressed to the process that owns it.
    FaultRecord, 96 {
        /// [`EVENT_FAULT`].
        kind: U32,
        /// The context whose GPU VM faulted.
        ctx_id: U32,
        /// Names the fault in the answer; used once.
        cookie: U64,
        /// The host device.
        dev_id: U32,
        /// The GPU VM within the context.
        vm_id: U32,
        /// The id that the device reported.
        asid: U32,
        /// Group: the same in each of its records, and in one that stands alone 0.
        grpid: U32,
        /// `FAULT_*`.
        flags: U32,
        /// `PERM_*` of the access.
        perm: U32,
        /// GPU address (C), of the page.
        addr: U64,
        /// Guest CPU address (A), of the page.
        cpu_addr: U64,
        /// Bytes from `cpu_addr` that the job is expected to touch, within the mapping.
        length_hint: U32,
        /// `FAULT_*` type.
        fault_type: u8,
        /// Level of the table at which the walk ended; 0 is the last.
        level: u8,
        /// Zero.
        engine_class: u8,
        /// The engine.
        engine_instance: u8,
        /// Accesses joined in this record when it was written.
        num_coalesced: U16,
        /// `PERM_*` of all of them.
        access_mask: U16,
        /// Bytes to which `addr` is precise.
        address_precision: U32,
        /// Nanoseconds of the daemon's monotonic clock, which begins with it.
        timestamp: U64,
        /// Sequence of this record.
        sequence: U64,
        /// Zero.
        reserved: U64,
    }
}
wire! {
    /// The end of a job or of an asynchronous bind.
    JobRecord, 96 {
        /// [`EVENT_JOB_DONE`] or [`EVENT_BIND_DONE`].
        kind: U32,
        /// Its context.
        ctx_id: U32,
        /// From the reply.
        job_id: U64,
        /// From the request.
        user_data: U64,
        /// The host device.
        dev_id: U32,
        /// The GPU VM.
        vm_id: U32,
        /// 0 or a negative errno.
        status: I32,
        /// The packet or bind operation that failed.
        packet: U32,
        /// The GPU address that failed.
        addr: U64,
        /// `PERM_*` of the access that failed; of a bind 0.
        perm: U32,
        /// Its timeline.
        ring_idx: U32,
        /// Nanoseconds of the daemon's monotonic clock, which begins with it.
        timestamp: U64,
        /// Sequence of this record.
        sequence: U64,
        /// The point that it had promised, reached now; or 0.
        point: U64,
        /// Zero.
        reserved: [U64; 2],
    }
}
wire! {
    /// Everything that is told by one number.
    NoticeRecord, 96 {
        /// `EVENT_*`.
        kind: U32,
        /// The context, or 0.
        ctx_id: U32,
        /// As the kind says.
        value: U64,
        /// 0 or a negative errno.
        status: I32,
        /// Zero.
        reserved: U32,
        /// Nanoseconds of the daemon's monotonic clock, which begins with it.
        timestamp: U64,
        /// Sequence of this record.
        sequence: U64,
        /// Zero.
        reserved2: [U64; 7],
    }
}
const _: () = assert!(
    size_of::<FaultRecord>() == EVENT_RECORD_BYTES
        && size_of::<JobRecord>() == EVENT_RECORD_BYTES
        && size_of::<NoticeRecord>() == EVENT_RECORD_BYTES
);
