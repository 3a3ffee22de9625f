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
/// Maps nothing: reads give 0.
pub fn null(gpu: u64, pages: u64) -> BindOp {
    BindOp { op: BIND_OP_MAP.into(), flags: BIND_NULL.into(), ..unmap(gpu, pages) }
}
/// Makes resident what is mapped there.
pub fn prefetch(gpu: u64, pages: u64) -> BindOp {
    BindOp { op: BIND_OP_PREFETCH.into(), ..unmap(gpu, pages) }
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
/// Stores a word to all of these pages.
pub fn fill(dst: u64, pages: u64, value: u64) -> Packet {
    Packet { len: (pages * PAGE_SIZE).into(), ..store(dst, value) }
}
/// Copies a word.
pub fn copy(dst: u64, src: u64) -> Packet {
    Packet { opcode: OP_COPY.into(), dst: dst.into(), src: src.into(), len: 8.into(), ..Packet::default() }
}

/// A ring, and what is asked of it.
#[derive(Clone, Copy)]
pub struct On<'a> {
    pub ctx_id: u32,
    pub vm_id: u32,
    pub ring: u32,
    /// The point that is promised, or 0.
    pub signal: u64,
    /// (GPU VM, ring, point)
    pub waits: &'a [(u32, u32, u64)],
}

/// A ring of the first context.
pub fn on(vm_id: u32, ring: u32) -> On<'static> {
    On { ctx_id: 1, vm_id, ring, signal: 0, waits: &[] }
}

impl<'a> On<'a> {
    pub fn signal(self, signal: u64) -> Self {
        Self { signal, ..self }
    }
    pub fn waits(self, waits: &'a [(u32, u32, u64)]) -> Self {
        Self { waits, ..self }
    }
    fn points(&self) -> Vec<FencePoint> {
        let point = |&(vm, ring, seqno): &(u32, u32, u64)| FencePoint {
            vm_id: vm.into(),
            ring_idx: ring.into(),
            seqno: seqno.into(),
        };
        self.waits.iter().map(point).collect()
    }
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
    pub fn exec(&self, ctx_id: u32, vm_id: u32, ring: u32, packets: &[Packet]) -> Result<u64, i32> {
        self.exec_on(On { ctx_id, ..on(vm_id, ring) }, packets)
    }
    /// The same, with points.
    pub fn exec_on(&self, on: On<'_>, packets: &[Packet]) -> Result<u64, i32> {
        let count = u32::try_from(packets.len()).unwrap();
        self.launch(on, SVM_REQ_EXEC, |user_data, num_waits| {
            let head = Exec {
                vm_id: on.vm_id.into(),
                ring_idx: on.ring.into(),
                num_packets: count.into(),
                num_waits: num_waits.into(),
                user_data: user_data.into(),
                signal: on.signal.into(),
                ..Exec::default()
            };
            (head.as_bytes()[16..].to_vec(), packets.as_bytes())
        })
    }
    /// An operation takes its turn on a ring.
    pub fn bind_on(&self, on: On<'_>, op: BindOp) -> Result<u64, i32> {
        self.launch(on, SVM_REQ_VM_BIND, |user_data, num_waits| {
            let head = VmBind {
                vm_id: on.vm_id.into(),
                num_binds: 1.into(),
                flags: VM_BIND_ASYNC.into(),
                ring_idx: on.ring.into(),
                num_waits: num_waits.into(),
                user_data: user_data.into(),
                signal: on.signal.into(),
                ..VmBind::default()
            };
            (head.as_bytes()[16..].to_vec(), op.as_bytes())
        })
    }
    fn launch<'a>(
        &self,
        on: On<'_>,
        cmd: u32,
        request: impl FnOnce(u64, u32) -> (Vec<u8>, &'a [u8]),
    ) -> Result<u64, i32> {
        let mut turn = self.queue.lock().unwrap();
        turn.jobs += 1;
        let waits = on.points();
        let (head, list) = request(turn.jobs, u32::try_from(waits.len()).unwrap());
        self.ledger.lock().unwrap().waits.insert(turn.jobs, on.waits.to_vec());
        match self.submit(on.ctx_id, cmd, &[&head, waits.as_bytes(), list].concat()).0 {
            0 => Ok(turn.jobs),
            status => Err(status),
        }
    }

    pub fn supply(&self, ctx_id: u32, run: PageRun) {
        let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
        let cmd = Supply { hdr, num_runs: 1.into(), ..Supply::default() };
        self.accepted("SUPPLY", &[cmd.as_bytes(), run.as_bytes()].concat());
    }
    /// Answers a fault, without pages that it is an error; returns the status.
    pub fn respond(&self, ctx_id: u32, vm_id: u32, cookie: u64, runs: &[PageRun]) -> i32 {
        let turn = self.queue.lock().unwrap();
        if turn.closed {
            return 0;
        }
        let code = if runs.is_empty() { PAGE_RESP_INVALID } else { PAGE_RESP_SUCCESS };
        let cmd = PageResponse {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
            cookie: cookie.into(),
            code: code.into(),
            num_runs: u16::try_from(runs.len()).unwrap().into(),
            flags: 0.into(),
        };
        let response = self.send(&[cmd.as_bytes(), runs.as_bytes()].concat());
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
