//! The guest that bad input is tried on, and how to see whether it had an effect.

use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::{RawGuest, Record};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::sync::Arc;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::{
    PAGE_RESP_SUCCESS, PageResponse, PageRun, SupplyResp, SvmResp, VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
};
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_RETIRED, FaultRecord};
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, CtxCreate, CtxResource, MemEntry, ResourceCreateBlob, VIRTIO_GPU_BLOB_MEM_GUEST,
    VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY,
    VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, VIRTIO_GPU_CMD_RESOURCE_UNREF,
};
use virtio_gpu_svm::protocol::job::{OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::{
    BIND_OP_MAP_USERPTR, BindOp, Exec, ExecRsp, ReqHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE,
    VmBind, VmBindRsp, VmCreate, VmCreateRsp,
};
use zerocopy::{FromZeros, IntoBytes};

const MIB: u64 = 1 << 20;
/// Guest memory below the hole.
pub const LOW_BYTES: u64 = 64 * MIB;
/// Guest memory above the hole.
pub const HIGH_BYTES: u64 = 16 * MIB;
/// First address beyond all guest memory.
pub const RAM_END: u64 = (4 << 30) + HIGH_BYTES;

/// CPU addresses that are mapped at [`C`].
pub const A: u64 = 0x7000_0000_0000;
/// CPU addresses that are mapped nowhere.
pub const A2: u64 = 0x7000_4000_0000;
/// GPU addresses of [`A`].
pub const C: u64 = 0x20_0000_0000;
/// Bytes mapped there.
pub const MAPPED: u64 = MIB;
/// The blob resource of context 1.
pub const BLOB: u32 = 7;
/// Its bytes.
pub const BLOB_BYTES: u64 = 4 * PAGE_SIZE;

/// The guest.
pub struct Scene {
    daemon: Svmd,
    ram: Arc<GuestRam>,
    pub guest: RawGuest,
    /// Pages that nothing else uses, by number.
    pages: Vec<u64>,
    /// Waits for an answer: a write of context 1 to the first page of A.
    pub pending: FaultRecord,
    /// Was answered: a write of context 1 to the second window.
    pub answered: FaultRecord,
}

impl Scene {
    pub fn set_up() -> Self {
        Self::on(Svmd::launch(&Options::default()).unwrap())
    }

    /// The same on a daemon that may have served others.
    pub fn on(daemon: Svmd) -> Self {
        let layout = Layout::WithHole { low_bytes: LOW_BYTES, high_bytes: HIGH_BYTES };
        let ram = GuestRam::new(layout, 1).unwrap();
        let pages = ram.take_pages(64).unwrap();
        let mut guest = RawGuest::connect(&daemon.socket("vm0"), &ram, Profile::Qemu).unwrap();
        guest.hello(1).unwrap();
        for ctx_id in 1..=3 {
            let mut create =
                CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
            create.context_init = 24.into();
            accepted(guest.send(&create, &[]).unwrap());
        }
        accepted(guest.send(&header(VIRTIO_GPU_CMD_CTX_DESTROY, 3), &[]).unwrap());
        wait_retired(&mut guest, 3);
        make_blob(&mut guest, pages[60], BLOB_BYTES);
        for ctx_id in [1, 2] {
            make_vm(&mut guest, ctx_id, 0);
        }
        // Only context 2 has a GPU VM of that number.
        assert_eq!(make_vm(&mut guest, 2, 1), 2);

        launch_fill(&mut guest, C + 16 * PAGE_SIZE, 1);
        let answered = guest.wait_fault(1).unwrap();
        let run = run(A + 16 * PAGE_SIZE, pages[50], 1);
        let answer: SupplyResp =
            guest.send(&response(1, &answered, PAGE_RESP_SUCCESS, 1), run.as_bytes()).unwrap();
        accepted(answer.resp);
        assert_eq!(guest.wait_job(1).unwrap().status.get(), 0);
        launch_fill(&mut guest, C, 2);
        let pending = guest.wait_fault(1).unwrap();
        Self { daemon, ram, guest, pages, pending, answered }
    }

    /// Guest-physical address of a page that nothing else uses.
    pub fn free_gpa(&self, index: usize) -> u64 {
        self.pages[index] * PAGE_SIZE
    }

    /// A run of pages at a guest-physical address.
    pub fn run(&self, va: u64, gpa: u64, pages: u32) -> PageRun {
        PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), ..PageRun::new_zeroed() }
    }

    /// Everything that bad input must not change. Counters of refusals are not part of it.
    pub fn snapshot(&self) -> Value {
        let mut contexts = vec![];
        for ctx_id in [1, 2] {
            let mut context =
                self.daemon.call("context.get", json!({ "guest": "vm0", "ctx_id": ctx_id })).unwrap();
            context.as_object_mut().unwrap().remove("counters");
            let vms = context["vms"].as_array_mut().unwrap();
            let faults = vms.iter_mut().flat_map(|vm| vm["faults"].as_array_mut().unwrap());
            faults.for_each(|fault| drop(fault["wait_ns"].take()));
            contexts.push(context);
        }
        let mut guest = self.daemon.guest("vm0").unwrap();
        for limit in guest["limits"].as_array_mut().unwrap() {
            drop((limit["peak"].take(), limit["refused"].take()));
        }
        json!({ "guest": guest["status"], "limits": guest["limits"], "contexts": contexts })
    }

    /// Shows that the guest still works: the pending fault is answered, its job ends well, and everything goes away.
    pub fn finish(mut self) {
        let run = run(A, self.pages[51], 1);
        let answer = response(1, &self.pending, PAGE_RESP_SUCCESS, 1);
        let answer: SupplyResp = self.guest.send(&answer, run.as_bytes()).unwrap();
        accepted(answer.resp);
        let job = self.guest.wait_job(1).unwrap();
        assert_eq!((job.user_data.get(), job.status.get()), (2, 0));
        let mut word = [0; 8];
        self.ram.read(self.pages[51] * PAGE_SIZE, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 0xf111);

        let unclaimed = self.guest.unclaimed_records().unwrap();
        assert!(unclaimed.is_empty(), "records that nobody asked for: {unclaimed:?}");
        let unref = CtxResource {
            hdr: header(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0),
            resource_id: BLOB.into(),
            ..CtxResource::default()
        };
        accepted(self.guest.send(&unref, &[]).unwrap());
        for ctx_id in [1, 2] {
            accepted(self.guest.send(&header(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id), &[]).unwrap());
            wait_retired(&mut self.guest, ctx_id);
        }
        let status = self.daemon.guest("vm0").unwrap()["status"].take();
        for count in ["contexts", "retiring", "resources", "pending_faults"] {
            assert_eq!(status[count], 0, "{count} left behind: {status}");
        }
        assert_eq!(self.daemon.stat("/gpu_vms").unwrap(), 0);
        self.daemon.stop().unwrap();
    }
}

pub fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// The head of an answer to a fault.
pub fn response(ctx_id: u32, fault: &FaultRecord, code: u32, num_runs: u16) -> PageResponse {
    PageResponse {
        hdr: header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
        cookie: fault.cookie,
        code: code.into(),
        num_runs: num_runs.into(),
        flags: 0.into(),
    }
}

fn accepted(head: SvmResp) {
    assert_eq!(head.status.get(), 0, "{head:?}");
}

fn run(va: u64, page: u64, pages: u32) -> PageRun {
    let gpa = page * PAGE_SIZE;
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), ..PageRun::new_zeroed() }
}

fn wait_retired(guest: &mut RawGuest, ctx_id: u32) {
    let retired = |record: &Record| match record {
        Record::Notice(notice)
            if (notice.kind.get(), notice.ctx_id.get()) == (EVENT_CONTEXT_RETIRED, ctx_id) =>
        {
            Some(())
        }
        _ => None,
    };
    guest.wait_record(retired).unwrap();
}

fn make_blob(guest: &mut RawGuest, page: u64, bytes: u64) {
    let create = ResourceCreateBlob {
        hdr: header(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: BLOB.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: bytes.into(),
        ..ResourceCreateBlob::default()
    };
    // Where the pages are does not matter: nothing maps them. They are the guest's, so this is good input.
    let addr = (page * PAGE_SIZE).min(LOW_BYTES - bytes);
    let length = u32::try_from(bytes).unwrap();
    let entry = MemEntry { addr: addr.into(), length: length.into(), ..MemEntry::default() };
    accepted(guest.send(&create, entry.as_bytes()).unwrap());
    let attach = CtxResource {
        hdr: header(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1),
        resource_id: BLOB.into(),
        ..CtxResource::default()
    };
    accepted(guest.send(&attach, &[]).unwrap());
}

fn request_header(cmd: u32, len: usize) -> ReqHdr {
    ReqHdr { cmd: cmd.into(), len: u32::try_from(len).unwrap().into(), ..ReqHdr::default() }
}

/// A GPU VM with A..B at C..D. Returns its number.
fn make_vm(guest: &mut RawGuest, ctx_id: u32, dev_id: u32) -> u32 {
    let hdr = request_header(SVM_REQ_VM_CREATE, size_of::<VmCreate>());
    let create = VmCreate { hdr, dev_id: dev_id.into(), ..VmCreate::default() };
    let vm_id = guest.request::<VmCreateRsp>(ctx_id, &create, &[]).unwrap().vm_id;
    let bind = VmBind {
        hdr: request_header(SVM_REQ_VM_BIND, size_of::<VmBind>() + size_of::<BindOp>()),
        vm_id,
        num_binds: 1.into(),
        ..VmBind::default()
    };
    let op = BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: C.into(),
        range: MAPPED.into(),
        obj_offset: A.into(),
        ..BindOp::default()
    };
    guest.request::<VmBindRsp>(ctx_id, &bind, op.as_bytes()).unwrap();
    vm_id.get()
}

/// A job of context 1 that writes one word.
fn launch_fill(guest: &mut RawGuest, addr: u64, user_data: u64) {
    let exec = Exec {
        hdr: request_header(SVM_REQ_EXEC, size_of::<Exec>() + size_of::<Packet>()),
        vm_id: 1.into(),
        num_packets: 1.into(),
        user_data: user_data.into(),
        ..Exec::default()
    };
    let packet = Packet {
        opcode: OP_FILL.into(),
        dst: addr.into(),
        len: 8.into(),
        value: 0xf111.into(),
        ..Packet::default()
    };
    guest.request::<ExecRsp>(1, &exec, packet.as_bytes()).unwrap();
}
