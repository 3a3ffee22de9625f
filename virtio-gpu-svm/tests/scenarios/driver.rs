//! A guest's driver: one command at a time, and its answer.

use crate::mock::hdr;
use std::sync::Arc;
use virtio_gpu_svm::guest::Guest;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::*;
use zerocopy::{FromBytes, IntoBytes};

/// Room for responses.
const ROOM: usize = 4096;

/// Where a job or bind has its turn.
#[derive(Clone, Default)]
pub struct Turn {
    pub ring: u32,
    pub waits: Vec<FencePoint>,
    pub signal: u64,
}

pub struct Driver(pub Arc<Guest>);

impl Driver {
    pub fn send(&self, request: &[u8]) -> Vec<u8> {
        let mut response = Vec::new();
        self.0.control(request, &mut response, ROOM);
        response
    }
    pub fn status(&self, request: &[u8]) -> i32 {
        SvmResp::read_from_prefix(&self.send(request)).unwrap().0.status.get()
    }
    /// How many contexts of earlier lives engines may still use.
    pub fn hello(&self, incarnation: u64) -> u32 {
        let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
        let version = 0x1_0000.into();
        let cmd = Hello { hdr, incarnation: incarnation.into(), version, reserved: 0.into() };
        let answer = HelloResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap();
        assert_eq!(answer.resp.status.get(), 0);
        answer.retiring.get()
    }
    pub fn create_context(&self, ctx_id: u32) -> i32 {
        let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        self.status(cmd.as_bytes())
    }
    pub fn destroy_context(&self, ctx_id: u32) -> i32 {
        self.status(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes())
    }
    /// One request as a submission.
    fn request(&self, ctx_id: u32, cmd: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
        let len = u32::try_from(size_of::<ReqHdr>() + body.len()).unwrap();
        let req = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
        let hdr = hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
        let submit = CmdSubmit { hdr, size: len.into(), padding: 0.into() };
        let response = self.send(&[submit.as_bytes(), req.as_bytes(), body].concat());
        let (head, reply) = SvmResp::read_from_prefix(&response).unwrap();
        if head.status.get() == 0 { Ok(reply.to_vec()) } else { Err(head.status.get()) }
    }
    /// The GPU VM's id and asid.
    pub fn create_vm(&self, ctx_id: u32, dev_id: u32) -> Result<(u32, u32), i32> {
        let body = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
        let reply = self.request(ctx_id, SVM_REQ_VM_CREATE, behind_header(body.as_bytes()))?;
        let reply = VmCreateRsp::read_from_bytes(&reply).unwrap();
        Ok((reply.vm_id.get(), reply.asid.get()))
    }
    pub fn destroy_vm(&self, ctx_id: u32, vm_id: u32) -> i32 {
        let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
        let done = self.request(ctx_id, SVM_REQ_VM_DESTROY, behind_header(body.as_bytes()));
        done.err().unwrap_or(0)
    }
    pub fn bind(&self, ctx_id: u32, vm_id: u32, ops: &[BindOp]) -> i32 {
        self.bind_in_turn(ctx_id, vm_id, 0, &Turn::default(), ops).err().unwrap_or(0)
    }
    pub fn bind_async(&self, ctx_id: u32, vm_id: u32, turn: &Turn, ops: &[BindOp]) -> Result<u64, i32> {
        self.bind_in_turn(ctx_id, vm_id, VM_BIND_ASYNC, turn, ops)
    }
    fn bind_in_turn(&self, ctx: u32, vm: u32, flags: u32, turn: &Turn, ops: &[BindOp]) -> Result<u64, i32> {
        let head = VmBind {
            vm_id: vm.into(),
            num_binds: u32::try_from(ops.len()).unwrap().into(),
            flags: flags.into(),
            ring_idx: turn.ring.into(),
            num_waits: u32::try_from(turn.waits.len()).unwrap().into(),
            signal: turn.signal.into(),
            ..VmBind::default()
        };
        let body = [behind_header(head.as_bytes()), turn.waits.as_bytes(), ops.as_bytes()].concat();
        let reply = self.request(ctx, SVM_REQ_VM_BIND, &body)?;
        Ok(VmBindRsp::read_from_bytes(&reply).unwrap().job_id.get())
    }
    pub fn exec(&self, ctx_id: u32, vm_id: u32, turn: &Turn, packets: &[Packet]) -> Result<u64, i32> {
        let head = Exec {
            vm_id: vm_id.into(),
            ring_idx: turn.ring.into(),
            num_packets: u32::try_from(packets.len()).unwrap().into(),
            num_waits: u32::try_from(turn.waits.len()).unwrap().into(),
            signal: turn.signal.into(),
            ..Exec::default()
        };
        let body = [behind_header(head.as_bytes()), turn.waits.as_bytes(), packets.as_bytes()].concat();
        let reply = self.request(ctx_id, SVM_REQ_EXEC, &body)?;
        Ok(ExecRsp::read_from_bytes(&reply).unwrap().job_id.get())
    }
    pub fn respond(&self, ctx_id: u32, cookie: u64, code: u32, runs: &[PageRun]) -> i32 {
        self.status(&answer(ctx_id, cookie, code, runs))
    }
    /// The sequence, and up to which one engines have let go.
    pub fn invalidate(&self, ctx_id: u32, start: u64, length: u64) -> (u64, u64) {
        let cmd = Invalidate {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id),
            start: start.into(),
            length: length.into(),
            event: INVAL_MIGRATE.into(),
            reserved: 0.into(),
        };
        let answer = InvalidateResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap();
        assert_eq!(answer.resp.status.get(), 0);
        (answer.seq.get(), answer.resp.inval_done_seq.get())
    }
    /// Takes records, at most as many as fit into a buffer of `room` bytes.
    pub fn fetch(&self, room: usize) -> Vec<[u8; EVENT_RECORD_BYTES]> {
        let mut buf = Vec::new();
        self.0.fill_events(&mut buf, room);
        let Ok((hdr, rest)) = EventHdr::read_from_prefix(&buf) else { return Vec::new() };
        let records: Vec<_> = rest.chunks(EVENT_RECORD_BYTES).map(|r| r.try_into().unwrap()).collect();
        assert_eq!(u32::try_from(records.len()), Ok(hdr.num_records.get()));
        records
    }
}

fn behind_header(request: &[u8]) -> &[u8] {
    &request[size_of::<ReqHdr>()..]
}

/// PAGE_RESPONSE.
pub fn answer(ctx_id: u32, cookie: u64, code: u32, runs: &[PageRun]) -> Vec<u8> {
    let cmd = PageResponse {
        hdr: hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
        cookie: cookie.into(),
        code: code.into(),
        num_runs: u16::try_from(runs.len()).unwrap().into(),
        flags: 0.into(),
    };
    [cmd.as_bytes(), runs.as_bytes()].concat()
}
