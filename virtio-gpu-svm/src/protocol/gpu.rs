//! virtio-gpu 1.3 as far as this device implements it. Names and numbers are the specification's.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Feature bit: 3D commands (contexts, SUBMIT_3D).
pub const VIRTIO_GPU_F_VIRGL: u64 = 0;
/// Feature bit: blob resources.
pub const VIRTIO_GPU_F_RESOURCE_BLOB: u64 = 3;
/// Feature bit: CTX_CREATE names a capset.
pub const VIRTIO_GPU_F_CONTEXT_INIT: u64 = 4;

/// Number of a control command.
pub const VIRTIO_GPU_CMD_GET_DISPLAY_INFO: u32 = 0x0100;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_RESOURCE_UNREF: u32 = 0x0102;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING: u32 = 0x0106;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING: u32 = 0x0107;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_GET_CAPSET_INFO: u32 = 0x0108;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_GET_CAPSET: u32 = 0x0109;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB: u32 = 0x010c;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_CTX_CREATE: u32 = 0x0200;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_CTX_DESTROY: u32 = 0x0201;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE: u32 = 0x0202;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE: u32 = 0x0203;
/// Number of a control command.
pub const VIRTIO_GPU_CMD_SUBMIT_3D: u32 = 0x0207;
/// Number of a cursor command.
pub const VIRTIO_GPU_CMD_UPDATE_CURSOR: u32 = 0x0300;
/// Number of a cursor command.
pub const VIRTIO_GPU_CMD_MOVE_CURSOR: u32 = 0x0301;

/// Response: done, no data.
pub const VIRTIO_GPU_RESP_OK_NODATA: u32 = 0x1100;
/// Response: [`RespDisplayInfo`].
pub const VIRTIO_GPU_RESP_OK_DISPLAY_INFO: u32 = 0x1101;
/// Response: [`RespCapsetInfo`].
pub const VIRTIO_GPU_RESP_OK_CAPSET_INFO: u32 = 0x1102;
/// Response: header, then the capset's bytes.
pub const VIRTIO_GPU_RESP_OK_CAPSET: u32 = 0x1103;
/// Response: refused, none of the causes below.
pub const VIRTIO_GPU_RESP_ERR_UNSPEC: u32 = 0x1200;
/// Response: out of memory or over a quota.
pub const VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY: u32 = 0x1201;
/// Response: no such scanout.
pub const VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
/// Response: no such resource.
pub const VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
/// Response: no such context.
pub const VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
/// Response: a parameter is out of range.
pub const VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER: u32 = 0x1205;

/// Header flag: the response carries `fence_id` and is sent when the command has taken effect.
pub const VIRTIO_GPU_FLAG_FENCE: u32 = 1 << 0;
/// Header flag: `ring_idx` names a timeline of the context.
pub const VIRTIO_GPU_FLAG_INFO_RING_IDX: u32 = 1 << 1;

/// Blob memory: pages of the guest.
pub const VIRTIO_GPU_BLOB_MEM_GUEST: u32 = 1;
/// Blob flag: the guest maps it.
pub const VIRTIO_GPU_BLOB_FLAG_USE_MAPPABLE: u32 = 1;
/// Blob flag: may be exported to other drivers of the guest.
pub const VIRTIO_GPU_BLOB_FLAG_USE_SHAREABLE: u32 = 2;
/// Blob flag: may be shared with another device.
pub const VIRTIO_GPU_BLOB_FLAG_USE_CROSS_DEVICE: u32 = 4;
/// `context_init`: the capset id.
pub const VIRTIO_GPU_CONTEXT_INIT_CAPSET_ID_MASK: u32 = 0xff;
/// Scanouts in a display info, whatever the device has.
pub const VIRTIO_GPU_MAX_SCANOUTS: usize = 16;

wire! {
    /// The first 16 bytes of config space: `struct virtio_gpu_config`.
    GpuConfig, 16 {
        /// Events pending; always 0 here.
        events_read: U32,
        /// Written by the driver to clear events.
        events_clear: U32,
        /// Scanouts; 0, this device has no display.
        num_scanouts: U32,
        /// Capsets; 1.
        num_capsets: U32,
    }
}
wire! {
    /// `struct virtio_gpu_ctrl_hdr`: opens every request and every response.
    CtrlHdr, 24 {
        /// Command or response number. (`type` in the specification.)
        kind: U32,
        /// `VIRTIO_GPU_FLAG_*`.
        flags: U32,
        /// Echoed when [`VIRTIO_GPU_FLAG_FENCE`] is set.
        fence_id: U64,
        /// Context of the command, 0 for none.
        ctx_id: U32,
        /// Timeline when [`VIRTIO_GPU_FLAG_INFO_RING_IDX`] is set.
        ring_idx: u8,
        /// Zero.
        padding: [u8; 3],
    }
}
wire! {
    /// `struct virtio_gpu_display_one`.
    DisplayOne, 24 {
        /// x, y, width, height.
        rect: [U32; 4],
        /// Whether a display is there.
        enabled: U32,
        /// Zero.
        flags: U32,
    }
}
wire! {
    /// `struct virtio_gpu_resp_display_info`.
    RespDisplayInfo, 408 {
        /// [`VIRTIO_GPU_RESP_OK_DISPLAY_INFO`].
        hdr: CtrlHdr,
        /// One entry a scanout.
        pmodes: [DisplayOne; VIRTIO_GPU_MAX_SCANOUTS],
    }
}
wire! {
    /// `struct virtio_gpu_get_capset_info`.
    GetCapsetInfo, 32 {
        /// Header.
        hdr: CtrlHdr,
        /// Below `num_capsets`.
        capset_index: U32,
        /// Zero.
        padding: U32,
    }
}
wire! {
    /// `struct virtio_gpu_resp_capset_info`.
    RespCapsetInfo, 40 {
        /// [`VIRTIO_GPU_RESP_OK_CAPSET_INFO`].
        hdr: CtrlHdr,
        /// Its id.
        capset_id: U32,
        /// Its highest version.
        capset_max_version: U32,
        /// Its bytes.
        capset_max_size: U32,
        /// Zero.
        padding: U32,
    }
}
wire! {
    /// `struct virtio_gpu_get_capset`.
    GetCapset, 32 {
        /// Header.
        hdr: CtrlHdr,
        /// Its id.
        capset_id: U32,
        /// A version up to the highest.
        capset_version: U32,
    }
}
wire! {
    /// `struct virtio_gpu_ctx_create`.
    CtxCreate, 96 {
        /// Header; `ctx_id` is chosen by the driver.
        hdr: CtrlHdr,
        /// Bytes of `debug_name` in use.
        nlen: U32,
        /// Capset id in the low 8 bits; the rest is zero.
        context_init: U32,
        /// A name for people.
        debug_name: [u8; 64],
    }
}
wire! {
    /// `struct virtio_gpu_ctx_resource`, `struct virtio_gpu_resource_unref`: a resource id, the context in the header.
    CtxResource, 32 {
        /// Header.
        hdr: CtrlHdr,
        /// The resource.
        resource_id: U32,
        /// Zero.
        padding: U32,
    }
}
wire! {
    /// `struct virtio_gpu_resource_create_blob`; [`MemEntry`] follow.
    ResourceCreateBlob, 56 {
        /// Header.
        hdr: CtrlHdr,
        /// Chosen by the driver, not 0.
        resource_id: U32,
        /// [`VIRTIO_GPU_BLOB_MEM_GUEST`].
        blob_mem: U32,
        /// `VIRTIO_GPU_BLOB_FLAG_*`.
        blob_flags: U32,
        /// Entries that follow.
        nr_entries: U32,
        /// Of host memory; 0 for guest memory.
        blob_id: U64,
        /// Bytes; a multiple of the page size.
        size: U64,
    }
}
wire! {
    /// `struct virtio_gpu_mem_entry`.
    MemEntry, 16 {
        /// Guest-physical address.
        addr: U64,
        /// Bytes.
        length: U32,
        /// Zero.
        padding: U32,
    }
}
wire! {
    /// `struct virtio_gpu_resource_attach_backing`; [`MemEntry`] follow.
    ResourceAttachBacking, 32 {
        /// Header.
        hdr: CtrlHdr,
        /// The resource.
        resource_id: U32,
        /// Entries that follow.
        nr_entries: U32,
    }
}
wire! {
    /// `struct virtio_gpu_cmd_submit`; `size` bytes of requests follow (PROTOCOL 5).
    CmdSubmit, 32 {
        /// Header.
        hdr: CtrlHdr,
        /// Bytes that follow.
        size: U32,
        /// Zero.
        padding: U32,
    }
}
