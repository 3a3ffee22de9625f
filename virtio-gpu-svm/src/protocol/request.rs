//! Requests inside a SUBMIT_3D payload: written by an unprivileged guest process, about its own context only, and
//! free of guest-physical addresses. PROTOCOL 5.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Creates the context's GPU VM on a device. PROTOCOL 5.1.
pub const SVM_REQ_VM_CREATE: u32 = 1;
/// Destroys a GPU VM. PROTOCOL 5.2.
pub const SVM_REQ_VM_DESTROY: u32 = 2;
/// Changes mappings of a GPU VM. PROTOCOL 5.3.
pub const SVM_REQ_VM_BIND: u32 = 3;
/// Launches a job. PROTOCOL 5.4.
pub const SVM_REQ_EXEC: u32 = 4;
/// Reads a GPU VM's state. PROTOCOL 5.5.
pub const SVM_REQ_VM_GET_PROPERTY: u32 = 5;

/// [`BindOp::op`]: map a blob resource, or with a flag a mirror window or nothing.
pub const BIND_OP_MAP: u32 = 0;
/// [`BindOp::op`]: unmap a range.
pub const BIND_OP_UNMAP: u32 = 1;
/// [`BindOp::op`]: map a range of the process' CPU addresses.
pub const BIND_OP_MAP_USERPTR: u32 = 2;

/// [`BindOp::op`]: unmap every mapping of a blob resource.
pub const BIND_OP_UNMAP_ALL: u32 = 3;
/// [`BindOp::op`]: make what is mapped in a range resident.
pub const BIND_OP_PREFETCH: u32 = 4;

/// [`BindOp::flags`]: the GPU may only read.
pub const BIND_READONLY: u32 = 1 << 0;
/// [`BindOp::flags`] of a MAP or MAP_USERPTR: resident at once, not by faults.
pub const BIND_IMMEDIATE: u32 = 1 << 1;
/// [`BindOp::flags`] of a MAP: reads as zero and swallows writes.
pub const BIND_NULL: u32 = 1 << 2;
/// [`BindOp::flags`] of a MAP: a mirror window, CPU address = GPU address + `obj_offset` (signed).
pub const BIND_CPU_ADDR_MIRROR: u32 = 1 << 5;
/// [`BindOp::flags`] of a MAP or MAP_USERPTR: the GPU may execute.
pub const BIND_EXEC: u32 = 1 << 16;

/// [`VmBind::flags`]: takes its turn on a ring, and ends with a record.
pub const VM_BIND_ASYNC: u32 = 1 << 0;

/// [`VmProperty::state`]: works.
pub const VM_USABLE: u32 = 0;
/// [`VmProperty::state`]: only UNMAP, DESTROY and GET_PROPERTY work.
pub const VM_UNUSABLE: u32 = 1;

wire! {
    /// Opens every request.
    ReqHdr, 16 {
        /// `SVM_REQ_*`.
        cmd: U32,
        /// Bytes of the request with this header, a multiple of 8.
        len: U32,
        /// The process' own number, echoed.
        seqno: U32,
        /// Where the reply goes in the reply area, a multiple of 8.
        rsp_off: U32,
    }
}
wire! {
    /// Opens every reply.
    RspHdr, 16 {
        /// Bytes of the reply with this header; 0: the request was not reached.
        len: U32,
        /// As in the request.
        seqno: U32,
        /// 0 or a negative errno.
        ret: I32,
        /// Index of the operation or packet that `ret` is about.
        detail: U16,
        /// The limit that -ENOSPC is about ([`super::limit::Limit`]); else 0.
        limit: U16,
    }
}
wire! {
    /// `VM_CREATE`.
    VmCreate, 32 {
        /// Header.
        hdr: ReqHdr,
        /// The host device.
        dev_id: U32,
        /// Zero.
        flags: U32,
        /// Zero.
        reserved: U64,
    }
}
wire! {
    /// The reply to [`VmCreate`].
    VmCreateRsp, 32 {
        /// Header.
        hdr: RspHdr,
        /// Names the GPU VM within the context.
        vm_id: U32,
        /// Its id in the device's fault reports.
        asid: U32,
        /// GPU addresses are below `1 << va_bits`.
        va_bits: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// `VM_DESTROY`, `VM_GET_PROPERTY`.
    VmRef, 24 {
        /// Header.
        hdr: ReqHdr,
        /// The GPU VM.
        vm_id: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// A point of a timeline: reached when the job or bind that promised it has ended. PROTOCOL 5.6.
    FencePoint, 16 {
        /// The GPU VM.
        vm_id: U32,
        /// Its ring, below [`super::MAX_RINGS`].
        ring_idx: U32,
        /// The point; every timeline begins at 0, which is reached.
        seqno: U64,
    }
}
wire! {
    /// `VM_BIND`; `num_waits` [`FencePoint`], then `num_binds` [`BindOp`] follow. All operations take effect or none.
    VmBind, 56 {
        /// Header.
        hdr: ReqHdr,
        /// The GPU VM.
        vm_id: U32,
        /// Operations that follow the points.
        num_binds: U32,
        /// `VM_BIND_*`. Without [`VM_BIND_ASYNC`] all that follows here is zero.
        flags: U32,
        /// Timeline, below [`super::MAX_RINGS`].
        ring_idx: U32,
        /// Points that it waits for, at most [`super::MAX_WAITS`].
        num_waits: U32,
        /// Zero.
        reserved: U32,
        /// The process' own value, echoed in the record.
        user_data: U64,
        /// The point of its timeline that it promises, or 0.
        signal: U64,
    }
}
wire! {
    /// The reply to [`VmBind`].
    VmBindRsp, 24 {
        /// Header.
        hdr: RspHdr,
        /// Names the asynchronous bind within the context; 0: it has taken effect.
        job_id: U64,
    }
}
wire! {
    /// One operation of [`VmBind`]; numbering of xe's `VM_BIND`, for operations and flags.
    BindOp, 48 {
        /// `BIND_OP_*`.
        op: U32,
        /// `BIND_*`.
        flags: U32,
        /// First GPU address (C), page aligned. UNMAP_ALL: zero.
        addr: U64,
        /// Bytes, a multiple of the page size, not 0. UNMAP_ALL: zero.
        range: U64,
        /// MAP: offset in the resource, or of a mirror window (two's complement). MAP_USERPTR: first guest CPU address
        /// (A). UNMAP, UNMAP_ALL: zero.
        obj_offset: U64,
        /// MAP (but of a mirror window), UNMAP_ALL: the resource. Else zero.
        resource_id: U32,
        /// Zero.
        reserved: U32,
        /// Zero.
        reserved2: U64,
    }
}
wire! {
    /// `EXEC`; `num_waits` [`FencePoint`], then `num_packets` [`super::job::Packet`] follow. Jobs and asynchronous binds
    /// of one ring take effect in order, rings run side by side.
    Exec, 48 {
        /// Header.
        hdr: ReqHdr,
        /// The GPU VM.
        vm_id: U32,
        /// Timeline, below [`super::MAX_RINGS`].
        ring_idx: U32,
        /// Packets that follow the points, at least 1.
        num_packets: U32,
        /// Points that it waits for, at most [`super::MAX_WAITS`].
        num_waits: U32,
        /// The process' own value, echoed in the job's record.
        user_data: U64,
        /// The point of its timeline that it promises, or 0.
        signal: U64,
    }
}
wire! {
    /// The reply to [`Exec`].
    ExecRsp, 24 {
        /// Header.
        hdr: RspHdr,
        /// Names the job within the context.
        job_id: U64,
    }
}
wire! {
    /// The reply to `VM_GET_PROPERTY`.
    VmProperty, 64 {
        /// Header.
        hdr: RspHdr,
        /// `VM_USABLE` or `VM_UNUSABLE`.
        state: U32,
        /// The errno that made it unusable, negative, or 0.
        first_errno: I32,
        /// Where.
        error_addr: U64,
        /// Pages that have a translation now.
        resident_pages: U64,
        /// Mappings.
        num_mappings: U32,
        /// Jobs and asynchronous binds in flight.
        num_jobs: U32,
        /// Faults that wait for the guest.
        pending_faults: U32,
        /// Its id in the device's fault reports.
        asid: U32,
        /// The host device.
        dev_id: U32,
        /// Index of the bind operation that made it unusable, else 0.
        error_op: U32,
    }
}
