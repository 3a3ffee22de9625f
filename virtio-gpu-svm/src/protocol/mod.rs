//! The wire format of virtio-gpu-svm, shared by device and guest: the only part of this crate that a guest links.
//!
//! Owns: layouts, numbers and limits of PROTOCOL.md. Every struct is little-endian, has named padding, and its size
//! and offsets are asserted beside it. Nothing here interprets a value; checks live in the device's `command` module.
//!
//! * [`gpu`]: what virtio-gpu 1.3 defines and this device implements (PROTOCOL 2, 3).
//! * [`control`]: our control-queue commands, the only place where guest-physical addresses appear (PROTOCOL 4).
//! * [`request`]: requests inside a SUBMIT_3D payload, written by unprivileged guest processes (PROTOCOL 5).
//! * [`job`]: packets that engines execute (PROTOCOL 6).
//! * [`event`]: records on the event queue (PROTOCOL 7).
//! * [`errno`]: status values (PROTOCOL 8).
//! * [`limit`]: names of limits (PROTOCOL 9).

/// A struct whose fields are listed by name, with their place and size in bytes. Together they are all of it.
pub trait Wire {
    /// Name, offset, bytes.
    const FIELDS: &[(&str, usize, usize)];
}

/// A struct of the wire: little-endian fields, no padding that has no name, and its size asserted. Whoever uses it has
/// zerocopy's derives in scope.
#[macro_export]
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl $crate::protocol::Wire for $name {
            const FIELDS: &[(&str, usize, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$ty>())),*];
        }
        impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
    };
}

pub mod control;
pub mod errno;
pub mod event;
pub mod gpu;
pub mod job;
pub mod limit;
pub mod pages;
pub mod request;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Virtio device id of a GPU device.
pub const VIRTIO_ID_GPU: u32 = 16;
/// Queues in order: control, cursor, events.
pub const NUM_QUEUES: usize = 3;
/// Index of the control queue.
pub const CONTROLQ: u16 = 0;
/// Index of the cursor queue. Present because virtio-gpu has it; commands on it are answered, none has an effect.
pub const CURSORQ: u16 = 1;
/// Index of the event queue: buffers posted by the driver, filled by the device.
pub const EVENTQ: u16 = 2;
/// Largest queue size that the device accepts, in descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Bytes of a page of the protocol. Addresses and lengths of mappings are multiples of it.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a large leaf, and of the unit in which invalidation sequences are kept (PROTOCOL 4.5).
pub const LEAF_SIZE: u64 = 2 << 20;
/// First address beyond the guest CPU addresses that may be bound: the lower canonical half with 57 bits.
pub const GUEST_VA_END: u64 = 1 << 56;

/// Capset id of this protocol: below 31 because Linux shifts a 32-bit integer by it, and not one of the taken 1..=9.
pub const CAPSET_SVM: u32 = 24;
/// Highest version of the capset.
pub const CAPSET_SVM_VERSION: u32 = 1;

/// Most bytes of one control command, all device-readable descriptors together.
pub const MAX_COMMAND_BYTES: usize = 2 << 20;
/// Most bytes that the device writes in one response.
pub const MAX_RESPONSE_BYTES: usize = 64 << 10;
/// Most page runs in one SUPPLY or PAGE_RESPONSE.
pub const MAX_RUNS: u32 = 4096;
/// Most pages of all runs in one SUPPLY or PAGE_RESPONSE: 16 GiB.
pub const MAX_RUN_PAGES: u64 = 1 << 22;
/// Most operations in one VM_BIND.
pub const MAX_BINDS: u32 = 4096;
/// Most packets in one EXEC.
pub const MAX_PACKETS: u32 = 1024;
/// Most requests in one SUBMIT_3D payload.
pub const MAX_REQUESTS: usize = 256;
/// Most memory entries of one blob resource.
pub const MAX_BLOB_ENTRIES: u32 = 65_536;
/// Most mappings of one GPU VM.
pub const MAX_MAPPINGS: u32 = 65_536;
/// Most points that one job or asynchronous bind waits for.
pub const MAX_WAITS: u32 = 64;
/// Timelines (rings) of a GPU VM: `ring_idx` is below this.
pub const MAX_RINGS: u32 = 64;

/// Offset of [`SvmConfig`] in the device's config space; virtio-gpu's own fields and room for more come before.
pub const SVM_CONFIG_OFFSET: usize = 64;
/// Bytes of config space in all.
pub const CONFIG_SIZE: usize = 128;
/// [`SvmConfig::magic`]: "SVM1".
pub const SVM_MAGIC: u32 = u32::from_le_bytes(*b"SVM1");
/// Major version of the protocol; another one is not compatible.
pub const VERSION_MAJOR: u16 = 1;
/// Minor version of the protocol; a higher one only adds.
pub const VERSION_MINOR: u16 = 0;

/// The protocol's part of config space, and the contents of the capset. PROTOCOL 2.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SvmConfig {
    /// [`SVM_MAGIC`].
    pub magic: U32,
    /// [`VERSION_MAJOR`].
    pub version_major: U16,
    /// [`VERSION_MINOR`].
    pub version_minor: U16,
    /// Changes whenever the daemon has lost this guest's state.
    pub daemon_epoch: U64,
    /// Host devices granted to this guest; `dev_id` is below this.
    pub num_devices: U32,
    /// Contexts that this guest may have at once.
    pub max_contexts: U32,
    /// [`MAX_RUNS`].
    pub max_runs: U32,
    /// [`MAX_BINDS`].
    pub max_binds: U32,
    /// [`MAX_PACKETS`].
    pub max_packets: U32,
    /// Mappings that a GPU VM may have, and operations that binds of a context may have queued; at most [`MAX_MAPPINGS`].
    pub max_mappings: U32,
    /// Faults of one context that may wait for an answer at once; further jobs stay parked without a record.
    pub max_pending_faults: U32,
    /// Jobs of one context that may be in flight at once.
    pub max_jobs: U32,
    /// Bytes of one event record.
    pub event_record_bytes: U32,
    /// [`MAX_COMMAND_BYTES`].
    pub max_command_bytes: U32,
    /// Zero.
    pub reserved: U64,
}
const _: () = assert!(size_of::<SvmConfig>() == 64 && SVM_CONFIG_OFFSET + 64 == CONFIG_SIZE);
