//! What the model guest says on the control queue. One command at a time, as one queue thread carries them out.

use crate::machine::Machine;
use virtio_gpu_svm_model::protocol::control::*;
use virtio_gpu_svm_model::protocol::gpu::*;
use virtio_gpu_svm_model::protocol::job::{OP_COPY, OP_FILL, Packet};
use virtio_gpu_svm_model::protocol::request::*;
use virtio_gpu_svm_model::protocol::{PAGE_SIZE, errno};
use zerocopy::{FromBytes, IntoBytes};

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// Maps `pages` of the process at a GPU address.
pub fn map(gpu: u64, cpu: u64, pages: u64) -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: gpu.into(),
        range: (pages * PAGE_SIZE).into(),
        obj_offset: cpu.into(),
        ..BindOp::default()
    }
}
/// Maps a whole blob at a GPU address.
pub fn map_blob(gpu: u64, resource_id: u32, pages: u64) -> BindOp {
    BindOp {
        op: BIND_OP_MAP.into(),
        addr: gpu.into(),
        range: (pages * PAGE_SIZE).into(),
        resource_id: resource_id.into(),
        ..BindOp::default()
    }
}
/// Unmaps whatever is there.
pub fn unmap(gpu: u64, pages: u64) -> BindOp {
    BindOp {
        op: BIND_OP_UNMAP.into(),
        addr: gpu.into(),
        range: (pages * PAGE_SIZE).into(),
        ..BindOp::default()
    }
}
/// Stores a word.
pub fn store(dst: u64, value: u64) -> Packet {
    Packet {
        opcode: OP_FILL.into(),
        dst: dst.into(),
        len: 8.into(),
        value: value.into(),
        ..Packet::default()
    }
}
/// Copies a word.
pub fn copy(dst: u64, src: u64) -> Packet {
    Packet { opcode: OP_COPY.into(), dst: dst.into(), src: src.into(), len: 8.into(), ..Packet::default() }
}

impl Machine {
    /// Carries out one command; what its response says of invalidations is noted.
    fn send(&self, request: &[u8]) -> Vec<u8> {
        let mut response = Vec::new();
        self.guest.control(request, &mut response, 4096);
        let (resp, _) = SvmResp::read_from_prefix(&response).unwrap();
        self.note_done(resp.hdr.ctx_id.get(), resp.inval_done_seq.get());
        response
    }
    fn status(&self, request: &[u8]) -> i32 {
        let _turn = self.queue.lock().unwrap();
        SvmResp::read_from_prefix(&self.send(request)).unwrap().0.status.get()
    }
    fn accepted(&self, what: &str, request: &[u8]) {
        let status = self.status(request);
        assert_eq!(status, 0, "violation: {what} was refused");
    }

    /// Returns how many contexts of earlier incarnations are on their way out.
    pub fn hello(&self, incarnation: u64) -> u32 {
        let _turn = self.queue.lock().unwrap();
        let cmd = Hello {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0),
            incarnation: incarnation.into(),
            version: 0x1_0000.into(),
            reserved: 0.into(),
        };
        let resp = HelloResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap();
        assert_eq!(resp.resp.status.get(), 0, "violation: HELLO was refused");
        self.ledger.lock().unwrap().incarnation = incarnation;
        resp.retiring.get()
    }
    pub fn ctx_create(&self, ctx_id: u32) {
        let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        self.accepted("CTX_CREATE", cmd.as_bytes());
    }
    pub fn ctx_destroy(&self, ctx_id: u32) {
        self.accepted("CTX_DESTROY", hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes());
    }
    /// A blob of one page, attached to the context.
    pub fn blob(&self, ctx_id: u32, resource_id: u32, gpa: u64) {
        let cmd = ResourceCreateBlob {
            hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
            resource_id: resource_id.into(),
            blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
            nr_entries: 1.into(),
            size: PAGE_SIZE.into(),
            ..ResourceCreateBlob::default()
        };
        let entry = MemEntry { addr: gpa.into(), length: 4096.into(), padding: 0.into() };
        self.accepted("RESOURCE_CREATE_BLOB", &[cmd.as_bytes(), entry.as_bytes()].concat());
        let hdr = hdr(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, ctx_id);
        let attach = CtxResource { hdr, resource_id: resource_id.into(), padding: 0.into() };
        self.accepted("CTX_ATTACH_RESOURCE", attach.as_bytes());
    }
    pub fn unref(&self, resource_id: u32) {
        let hdr = hdr(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0);
        let unref = CtxResource { hdr, resource_id: resource_id.into(), padding: 0.into() };
        self.accepted("RESOURCE_UNREF", unref.as_bytes());
    }

    /// One request as a submission; returns its status and its reply. The queue's turn is the caller's.
    fn submit(&self, ctx_id: u32, cmd: u32, body: &[u8]) -> (i32, Vec<u8>) {
        let len = u32::try_from(size_of::<ReqHdr>() + body.len()).unwrap();
        let req = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
        let hdr = hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
        let submit = CmdSubmit { hdr, size: len.into(), padding: 0.into() };
        let response = self.send(&[submit.as_bytes(), req.as_bytes(), body].concat());
        let (resp, reply) = SvmResp::read_from_prefix(&response).unwrap();
        (resp.status.get(), reply.to_vec())
    }
    pub fn vm_create(&self, ctx_id: u32, dev_id: u32) -> u32 {
        let _turn = self.queue.lock().unwrap();
        let body = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
        let (status, reply) = self.submit(ctx_id, SVM_REQ_VM_CREATE, &body.as_bytes()[16..]);
        assert_eq!(status, 0, "violation: VM_CREATE was refused");
        VmCreateRsp::read_from_bytes(&reply).unwrap().vm_id.get()
    }
    pub fn vm_destroy(&self, ctx_id: u32, vm_id: u32) {
        let mut turn = self.queue.lock().unwrap();
        let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
        let (status, _) = self.submit(ctx_id, SVM_REQ_VM_DESTROY, &body.as_bytes()[16..]);
        assert_eq!(status, 0, "violation: VM_DESTROY was refused");
        turn.destroyed.insert((ctx_id, vm_id));
    }
    pub fn bind(&self, ctx_id: u32, vm_id: u32, op: BindOp) {
        let _turn = self.queue.lock().unwrap();
        let head = VmBind { vm_id: vm_id.into(), num_binds: 1.into(), ..VmBind::default() };
        let body = [&head.as_bytes()[16..], op.as_bytes()].concat();
        let (status, _) = self.submit(ctx_id, SVM_REQ_VM_BIND, &body);
        assert_eq!(status, 0, "violation: VM_BIND was refused");
    }
    /// Launches a job. Returns what its record will name, or the errno of the refusal.
    pub fn exec(&self, ctx_id: u32, vm_id: u32, ring_idx: u32, packets: &[Packet]) -> Result<u64, i32> {
        let mut turn = self.queue.lock().unwrap();
        turn.jobs += 1;
        let head = Exec {
            vm_id: vm_id.into(),
            ring_idx: ring_idx.into(),
            num_packets: u32::try_from(packets.len()).unwrap().into(),
            user_data: turn.jobs.into(),
            ..Exec::default()
        };
        let body = [&head.as_bytes()[16..], packets.as_bytes()].concat();
        match self.submit(ctx_id, SVM_REQ_EXEC, &body).0 {
            0 => Ok(turn.jobs),
            status => Err(status),
        }
    }

    pub fn supply(&self, ctx_id: u32, run: PageRun) {
        let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
        let cmd = Supply { hdr, num_runs: 1.into(), reserved: 0.into() };
        self.accepted("SUPPLY", &[cmd.as_bytes(), run.as_bytes()].concat());
    }
    /// Answers a fault; returns the status.
    pub fn respond(&self, ctx_id: u32, vm_id: u32, cookie: u64, run: PageRun) -> i32 {
        let turn = self.queue.lock().unwrap();
        let cmd = PageResponse {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
            cookie: cookie.into(),
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 1.into(),
        };
        let response = self.send(&[cmd.as_bytes(), run.as_bytes()].concat());
        let status = SvmResp::read_from_prefix(&response).unwrap().0.status.get();
        let gone = turn.destroyed.contains(&(ctx_id, vm_id));
        assert!(!gone || status == -errno::EINVAL, "violation: a fault of a destroyed GPU VM was resumed");
        status
    }
    /// Returns the sequence.
    pub fn invalidate(&self, ctx_id: u32, start: u64, pages: u64) -> u64 {
        let _turn = self.queue.lock().unwrap();
        let cmd = Invalidate {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id),
            start: start.into(),
            length: (pages * PAGE_SIZE).into(),
            event: INVAL_MIGRATE.into(),
            reserved: 0.into(),
        };
        let resp = InvalidateResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap();
        assert_eq!(resp.resp.status.get(), 0, "violation: INVALIDATE was refused");
        resp.seq.get()
    }
}
