//! A guest in a state in which every command has something to do, on a host of its own so that ids are the same each
//! time: contexts 1 and 2, of which 1 has GPU VM 1 with mappings, blob 1, and known pages.

use config::{Device, DeviceKind};
use daemon::devices::Devices;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::*;
use vm_memory::mmap::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

/// CPU addresses.
pub const A: u64 = 0x7f00_0000_0000;
/// Their GPU addresses.
pub const C: u64 = 0x4_0000_0000;
pub const PAGE: u64 = 4096;
/// Guest-physical memory that commands name.
pub const GPA: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

pub struct World {
    pub guest: Arc<Guest>,
    _host: Arc<Host>,
    devices: Option<Devices>,
}

impl World {
    pub fn new() -> Self {
        let device = Device {
            kind: DeviceKind::Soft,
            name: "soft0".into(),
            engines: 1,
            va_bits: None,
            fault_model: None,
            address_model: None,
            ledger: 0,
            job_limit_ms: None,
            busy_poll_us: None,
            workers: None,
        };
        let (host, devices) = Devices::start(&[device], 1).unwrap();
        let limits = Limits {
            contexts: 8,
            pending_faults: 8,
            jobs: 8,
            mappings: 16,
            resources: 4,
            fault_deadline_ms: 0,
            ..Limits::DEFAULT
        };
        let guest = host.open_guest("vm0", limits, &[0], Arc::new(Silent));
        let identity = RegionIdentity { inode: (0, 1), offset: 0, size: BYTES, gpa: GPA };
        let region = Region::new(identity, MmapRegion::new(usize::try_from(BYTES).unwrap()).unwrap());
        guest.set_memory(Arc::new(MemoryTable::new(vec![region]).unwrap()));
        let world = Self { guest, _host: host, devices: Some(devices) };
        world.furnish();
        world
    }

    fn furnish(&self) {
        self.done(&hello());
        self.done(&create_context(1));
        self.done(&create_context(2));
        self.done(&create_blob(1, &[(GPA, 4 * PAGE)]));
        self.done(&resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1, 1));
        self.done(&supply(&[run(A, GPA + 8 * PAGE, 4)]));
        self.done(&submit(1, &[vm_create()]));
        let userptr = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: (64 * PAGE).into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        self.done(&submit(1, &[bind(&[userptr])]));
    }

    /// Carries a command out as it stands.
    fn done(&self, command: &[u8]) {
        let mut answer = Vec::new();
        self.guest.control(command, &mut answer, 4096);
        let (head, _) = SvmResp::read_from_prefix(&answer).unwrap();
        assert_eq!((head.hdr.kind.get(), head.status.get()), (VIRTIO_GPU_RESP_OK_NODATA, 0));
    }

    /// Lets a job fault, and returns the fault's record and the bytes it came in.
    pub fn fault(&self) -> FaultRecord {
        self.start_fault();
        let mut bytes = Vec::new();
        self.guest.fill_events(&mut bytes, 4096);
        let (hdr, records) = EventHdr::read_from_prefix(&bytes).unwrap();
        assert_eq!(hdr.num_records.get(), 1);
        let (record, _) = FaultRecord::read_from_prefix(records).unwrap();
        assert_eq!(record.kind.get(), EVENT_FAULT);
        record
    }

    /// Lets a job fault, and waits until a record of it can be fetched.
    pub fn start_fault(&self) {
        self.done(&submit(1, &[exec(C + 32 * PAGE)]));
        let deadline = Instant::now() + PATIENCE;
        while !self.guest.has_events() {
            assert!(Instant::now() < deadline, "no fault");
            std::thread::yield_now();
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.guest.close();
        self.devices.take().unwrap().stop();
    }
}

pub fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

pub fn hello() -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    Hello { hdr, incarnation: 1.into(), version: 0x1_0000.into(), ..Hello::default() }.as_bytes().to_vec()
}

pub fn create_context(ctx_id: u32) -> Vec<u8> {
    CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() }.as_bytes().to_vec()
}

pub fn create_blob(resource_id: u32, entries: &[(u64, u64)]) -> Vec<u8> {
    let entry = |&(addr, length): &(u64, u64)| MemEntry {
        addr: addr.into(),
        length: u32::try_from(length).unwrap().into(),
        ..MemEntry::default()
    };
    let head = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: resource_id.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: u32::try_from(entries.len()).unwrap().into(),
        size: entries.iter().map(|(_, length)| length).sum::<u64>().into(),
        ..ResourceCreateBlob::default()
    };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    [head.as_bytes(), entries.as_bytes()].concat()
}

pub fn resource(kind: u32, ctx_id: u32, resource_id: u32) -> Vec<u8> {
    let hdr = hdr(kind, ctx_id);
    CtxResource { hdr, resource_id: resource_id.into(), ..CtxResource::default() }.as_bytes().to_vec()
}

pub fn run(va: u64, gpa: u64, pages: u32) -> PageRun {
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), ..PageRun::default() }
}

pub fn supply(runs: &[PageRun]) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1);
    let num_runs = u16::try_from(runs.len()).unwrap().into();
    let head = Supply { hdr, num_runs, ..Supply::default() };
    [head.as_bytes(), runs.as_bytes()].concat()
}

pub fn submit(ctx_id: u32, requests: &[Vec<u8>]) -> Vec<u8> {
    let payload = requests.concat();
    let size = u32::try_from(payload.len()).unwrap().into();
    let head = CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id), size, ..CmdSubmit::default() };
    [head.as_bytes(), &payload].concat()
}

/// A request from a struct that begins with an empty header.
pub fn request(cmd: u32, bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap().into();
    let hdr = ReqHdr { cmd: cmd.into(), len, seqno: 7.into(), rsp_off: 0.into() };
    [hdr.as_bytes(), &bytes[size_of::<ReqHdr>()..]].concat()
}

pub fn vm_create() -> Vec<u8> {
    request(SVM_REQ_VM_CREATE, VmCreate::default().as_bytes())
}

pub fn vm_ref(cmd: u32) -> Vec<u8> {
    request(cmd, VmRef { vm_id: 1.into(), ..VmRef::default() }.as_bytes())
}

pub fn bind(ops: &[BindOp]) -> Vec<u8> {
    let num_binds = u32::try_from(ops.len()).unwrap().into();
    let head = VmBind { vm_id: 1.into(), num_binds, ..VmBind::default() };
    request(SVM_REQ_VM_BIND, &[head.as_bytes(), ops.as_bytes()].concat())
}

/// A job of two packets, the first of which writes a word.
pub fn exec(addr: u64) -> Vec<u8> {
    let fill = Packet {
        opcode: OP_FILL.into(),
        dst: addr.into(),
        len: 8.into(),
        value: 1.into(),
        ..Packet::default()
    };
    let head = Exec { vm_id: 1.into(), num_packets: 2.into(), ..Exec::default() };
    request(SVM_REQ_EXEC, &[head.as_bytes(), [fill, Packet::default()].as_bytes()].concat())
}
