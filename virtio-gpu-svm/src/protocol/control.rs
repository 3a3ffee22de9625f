//! Control-queue commands of this protocol. They belong to whoever owns the virtio device in the guest, and are the
//! only place where guest-physical addresses appear. PROTOCOL 4.

use super::gpu::CtrlHdr;
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Opens a driver's life. PROTOCOL 4.1.
pub const VIRTIO_GPU_CMD_SVM_HELLO: u32 = 0x0400;
/// Describes a host device. PROTOCOL 4.2.
pub const VIRTIO_GPU_CMD_SVM_GET_DEVICE: u32 = 0x0401;
/// Supplies pages of a context's address space. PROTOCOL 4.3.
pub const VIRTIO_GPU_CMD_SVM_SUPPLY: u32 = 0x0402;
/// Answers a fault. PROTOCOL 4.4.
pub const VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE: u32 = 0x0403;
/// Withdraws a range of a context's address space. PROTOCOL 4.5.
pub const VIRTIO_GPU_CMD_SVM_INVALIDATE: u32 = 0x0404;

/// [`GetDeviceResp::flags`]: the device has NULL mappings.
pub const DEVICE_NULL: u64 = 1 << 0;
/// [`GetDeviceResp::flags`]: the device has a right to execute.
pub const DEVICE_EXEC: u64 = 1 << 1;

/// [`PageRun::flags`]: the process may only read these pages.
pub const RUN_READONLY: u32 = 1 << 0;

/// [`Supply::flags`], [`PageResponse::flags`]: pages are told by a [`PageList`], not by runs.
pub const SUPPLY_LIST: u16 = 1 << 0;

/// [`PageResponse::code`]: retry the access.
pub const PAGE_RESP_SUCCESS: u32 = 0;
/// [`PageResponse::code`]: the access is an error of the process.
pub const PAGE_RESP_INVALID: u32 = 1;
/// [`PageResponse::code`]: the guest cannot answer this process' faults any more; its GPU VM becomes unusable.
pub const PAGE_RESP_FAILURE: u32 = 2;

/// [`Invalidate::event`]: the range is gone.
pub const INVAL_UNMAP: u32 = 0;
/// [`Invalidate::event`]: the pages were replaced.
pub const INVAL_CLEAR: u32 = 1;
/// [`Invalidate::event`]: access rights changed.
pub const INVAL_PROTECT: u32 = 2;
/// [`Invalidate::event`]: the pages move.
pub const INVAL_MIGRATE: u32 = 3;
/// [`Invalidate::event`]: the whole address space is gone; the range must be empty.
pub const INVAL_RELEASE: u32 = 4;

wire! {
    /// The response to every command without data of its own, and the head of those that have some: a virtio-gpu
    /// header, then what virtio-gpu has no room for. Written whole only where the driver left room for it.
    SvmResp, 48 {
        /// `OK_NODATA`, or the nearest `ERR_*` of virtio-gpu.
        hdr: CtrlHdr,
        /// 0 or a negative errno.
        status: I32,
        /// Index of the run, entry or request that `status` is about.
        detail: U16,
        /// The limit that -ENOSPC is about ([`super::limit::Limit`]); else 0.
        limit: U16,
        /// Changes whenever the daemon has lost this guest's state.
        daemon_epoch: U64,
        /// Invalidations of the header's context up to this sequence are done; 0 without a context.
        inval_done_seq: U64,
    }
}
wire! {
    /// `SVM_HELLO`.
    Hello, 40 {
        /// Header; no context.
        hdr: CtrlHdr,
        /// Chosen anew by each life of a driver, not 0. Contexts of an earlier incarnation are dropped.
        incarnation: U64,
        /// `major << 16 | minor` that the driver speaks.
        version: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// The response to [`Hello`].
    HelloResp, 64 {
        /// Head.
        resp: SvmResp,
        /// Host devices of this guest.
        num_devices: U32,
        /// Contexts of earlier incarnations that engines may still use; a QUIET record follows when none is left.
        retiring: U32,
        /// Zero.
        reserved: U64,
    }
}
wire! {
    /// `SVM_GET_DEVICE`.
    GetDevice, 32 {
        /// Header; no context.
        hdr: CtrlHdr,
        /// Below `num_devices`.
        dev_id: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// The response to [`GetDevice`].
    GetDeviceResp, 120 {
        /// Head.
        resp: SvmResp,
        /// As asked.
        dev_id: U32,
        /// GPU addresses are below `1 << va_bits`.
        va_bits: U32,
        /// 0 replayable, 1 resolved by the host kernel, 2 none.
        fault_model: U32,
        /// 0 any, 1 identity only.
        address_model: U32,
        /// Bit n: packet opcode n is executed.
        opcodes: U64,
        /// UTF-8, zero padded.
        name: [u8; 32],
        /// Engines.
        num_engines: U32,
        /// log2 of the smallest page.
        page_shift: U32,
        /// `DEVICE_*`.
        flags: U64,
    }
}
wire! {
    /// A run of pages, contiguous in both address spaces.
    PageRun, 32 {
        /// Guest CPU address, page aligned.
        va: U64,
        /// Guest-physical address, page aligned.
        gpa: U64,
        /// Pages, at least 1.
        pages: U32,
        /// [`RUN_READONLY`].
        flags: U32,
        /// The invalidation sequence that the guest held before it translated.
        as_of: U64,
    }
}
wire! {
    /// Pages that follow each other in the process and lie anywhere in guest memory: a run of one page each. For each
    /// follows its guest-physical address (le64, page aligned) with [`RUN_READONLY`] in its lowest bits.
    PageList, 16 {
        /// Guest CPU address of the first, page aligned.
        va: U64,
        /// The invalidation sequence that the guest held before it translated the first of them.
        as_of: U64,
    }
}
wire! {
    /// `SVM_SUPPLY`; [`PageRun`] follow, or a [`PageList`].
    Supply, 32 {
        /// Header with the context.
        hdr: CtrlHdr,
        /// Runs that follow, or pages of the list.
        num_runs: U16,
        /// [`SUPPLY_LIST`].
        flags: U16,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// `SVM_PAGE_RESPONSE`; [`PageRun`] follow, or a [`PageList`].
    PageResponse, 40 {
        /// Header with the context.
        hdr: CtrlHdr,
        /// Of the fault record.
        cookie: U64,
        /// `PAGE_RESP_*`.
        code: U32,
        /// Runs that follow, or pages of the list; 0 unless `code` is success.
        num_runs: U16,
        /// [`SUPPLY_LIST`].
        flags: U16,
    }
}
wire! {
    /// The response to [`Supply`] and [`PageResponse`].
    SupplyResp, 64 {
        /// Head. `-EAGAIN`: `refused` runs raced with an invalidation, the first is `detail`; the others stand. An
        /// answer whose own page stands has status 0 all the same.
        resp: SvmResp,
        /// Runs installed.
        installed: U32,
        /// Runs refused because an invalidation is newer than their `as_of`.
        refused: U32,
        /// Zero.
        reserved: U64,
    }
}
wire! {
    /// `SVM_INVALIDATE`.
    Invalidate, 48 {
        /// Header with the context.
        hdr: CtrlHdr,
        /// First guest CPU address, page aligned.
        start: U64,
        /// Bytes, a multiple of the page size.
        length: U64,
        /// `INVAL_*`.
        event: U32,
        /// Zero.
        reserved: U32,
    }
}
wire! {
    /// The response to [`Invalidate`]: accepted. Done is told by `inval_done_seq` and by a record.
    InvalidateResp, 64 {
        /// Head.
        resp: SvmResp,
        /// This invalidation's sequence; `as_of` of translations made after it.
        seq: U64,
        /// Zero.
        reserved: U64,
    }
}
