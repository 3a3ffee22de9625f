//! Target: any bytes as one command, to a guest with a context, a resource and a GPU VM on each kind of software device,
//! whose engines run. Jobs that come of it run for a moment; their faults are answered with the guest's first pages.
//!
//! The answer fits its room and has a header; no engine panics; afterwards nothing is left on any device.

use crate::engines::{DEVICES, Engines, JOB_LIMIT};
use crate::script::{self, GPA, REGION};
use crate::{exclusive, must};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Instant;
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::{PAGE_RESP_SUCCESS, PageRun};
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::*;
use vm_memory::mmap::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

const LIMITS: Limits = Limits {
    contexts: 4,
    pending_faults: 8,
    jobs: 8,
    mappings: 16,
    resources: 4,
    fault_deadline_ms: 0,
    ..Limits::DEFAULT
};
/// Bytes that an answer may have, by the input's first byte.
const ROOMS: [usize; 6] = [64 << 10, 4096, 128, 48, 24, 0];

struct Scene {
    engines: Engines,
    memory: Arc<MemoryTable>,
}

static SCENE: LazyLock<Mutex<Scene>> = LazyLock::new(|| {
    let identity = RegionIdentity { inode: (0, 1), offset: 0, size: REGION, gpa: GPA };
    let region = Region::new(identity, must(MmapRegion::new(must(usize::try_from(REGION)))));
    let memory = Arc::new(must(MemoryTable::new(vec![region])));
    Mutex::new(Scene { engines: Engines::start(), memory })
});

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

/// Carries out one command: the first byte says how much room the answer has and (from 0x80) that it is the cursor
/// queue's; the rest is the command.
///
/// # Panics
/// If one of the module's statements does not hold.
pub fn run(bytes: &[u8]) {
    let Some((how, command)) = bytes.split_first() else { return };
    let scene = exclusive(&SCENE);
    let guest = scene.engines.host.open_guest("fuzz", LIMITS, &DEVICES, Arc::new(Silent));
    guest.set_memory(Arc::clone(&scene.memory));
    furnish(&guest);
    let room = ROOMS[usize::from(*how) % ROOMS.len()];
    let mut answer = Vec::new();
    if how & 0x80 != 0 {
        guest.cursor(command, &mut answer, room);
    } else {
        guest.control(command, &mut answer, room);
    }
    assert!(answer.len() <= room, "{} bytes in a room of {room}", answer.len());
    assert_eq!(answer.len() < size_of::<CtrlHdr>(), room < size_of::<CtrlHdr>());
    serve(&guest);
    guest.close();
    scene.engines.assert_idle();
}

/// Makes the objects that commands may name: context 1 with GPU VMs 1 to 3, resource 1.
fn furnish(guest: &Arc<Guest>) {
    let mut answer = Vec::new();
    let mut done = |command: &[u8]| {
        guest.control(command, &mut answer, 4096);
        let kind = CtrlHdr::read_from_prefix(&answer).map_or(0, |(hdr, _)| hdr.kind.get());
        assert_eq!(kind, VIRTIO_GPU_RESP_OK_NODATA, "the scene cannot be set");
    };
    done(&script::hello(1));
    done(&script::create_context(1));
    let blob = ResourceCreateBlob {
        hdr: script::hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: 1.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: 0x4000.into(),
        ..ResourceCreateBlob::default()
    };
    let entry = MemEntry { addr: GPA.into(), length: 0x4000.into(), padding: 0.into() };
    done(&[blob.as_bytes(), entry.as_bytes()].concat());
    let attach = script::hdr(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1);
    done(CtxResource { hdr: attach, resource_id: 1.into(), padding: 0.into() }.as_bytes());
    done(&script::supply(1, &[run_at(script::A, 16)]));
    for dev_id in 0..3_u32 {
        let request = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
        done(&request_of(SVM_REQ_VM_CREATE, request.as_bytes()));
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: script::C.into(),
            range: 0x10_000.into(),
            obj_offset: script::A.into(),
            ..BindOp::default()
        };
        let bind = VmBind { vm_id: (dev_id + 1).into(), num_binds: 1.into(), ..VmBind::default() };
        if dev_id < 2 {
            done(&request_of(SVM_REQ_VM_BIND, &[bind.as_bytes(), op.as_bytes()].concat()));
        }
    }
}

fn run_at(va: u64, pages: u32) -> PageRun {
    PageRun { va: va.into(), gpa: GPA.into(), pages: pages.into(), ..PageRun::default() }
}

/// A submission of one request of context 1, whose header is still empty.
fn request_of(cmd: u32, request: &[u8]) -> Vec<u8> {
    let size = u32::try_from(request.len()).unwrap_or(u32::MAX);
    let head = ReqHdr { cmd: cmd.into(), len: size.into(), ..ReqHdr::default() };
    let hdr = script::hdr(VIRTIO_GPU_CMD_SUBMIT_3D, 1);
    let submit = CmdSubmit { hdr, size: size.into(), padding: 0.into() };
    [submit.as_bytes(), head.as_bytes(), &request[size_of::<ReqHdr>()..]].concat()
}

/// Answers the faults of jobs until there is no job, for a moment.
fn serve(guest: &Arc<Guest>) {
    let (mut buf, mut answer) = (Vec::new(), Vec::new());
    let until = Instant::now() + JOB_LIMIT;
    while guest.contexts().iter().any(|context| context.jobs > 0) && Instant::now() < until {
        guest.fill_events(&mut buf, 4096);
        let records = buf.get(size_of::<EventHdr>()..).unwrap_or_default().chunks_exact(EVENT_RECORD_BYTES);
        for fault in records.filter_map(|record| FaultRecord::read_from_bytes(record).ok()) {
            if fault.kind.get() == EVENT_FAULT {
                let runs = [run_at(fault.cpu_addr.get(), 1)];
                let (ctx_id, cookie) = (fault.ctx_id.get(), fault.cookie.get());
                guest.control(&script::response(ctx_id, cookie, PAGE_RESP_SUCCESS, &runs), &mut answer, 4096);
            }
        }
        std::thread::yield_now();
    }
}
