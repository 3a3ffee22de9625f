//! What a guest's driver and its processes ask for, one command each, with answers to faults as the test wants them.

use super::guest::RawGuest;
use anyhow::{Result, ensure};
use virtio_gpu_svm::protocol::control::{
    INVAL_UNMAP, Invalidate, InvalidateResp, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS, PageResponse, PageRun,
    SvmResp, VIRTIO_GPU_CMD_SVM_INVALIDATE, VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY,
};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{
    BIND_CPU_ADDR_MIRROR, BIND_OP_MAP, BIND_OP_MAP_USERPTR, BIND_OP_UNMAP, BindOp, Exec, ExecRsp, ReqHdr,
    RspHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, SVM_REQ_VM_DESTROY, VmBind, VmBindRsp,
    VmCreate, VmCreateRsp, VmRef,
};
use zerocopy::IntoBytes;

/// A GPU VM of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawVm {
    /// Its context.
    pub ctx_id: u32,
    /// Its id in the context.
    pub vm_id: u32,
}

/// Shows `[cpu, cpu + bytes)` of the process at `gpu`.
pub fn userptr(gpu: u64, cpu: u64, bytes: u64) -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: gpu.into(),
        range: bytes.into(),
        obj_offset: cpu.into(),
        ..BindOp::default()
    }
}

/// Shows CPU address = GPU address + `offset` for `bytes` from `gpu` on.
pub fn mirror(gpu: u64, offset: i64, bytes: u64) -> BindOp {
    BindOp {
        op: BIND_OP_MAP.into(),
        flags: BIND_CPU_ADDR_MIRROR.into(),
        addr: gpu.into(),
        range: bytes.into(),
        obj_offset: offset.cast_unsigned().into(),
        ..BindOp::default()
    }
}

/// Takes `bytes` from `gpu` on out of the GPU VM.
pub fn unmap(gpu: u64, bytes: u64) -> BindOp {
    BindOp { op: BIND_OP_UNMAP.into(), addr: gpu.into(), range: bytes.into(), ..BindOp::default() }
}

impl RawGuest {
    /// Creates a context.
    ///
    /// # Errors
    /// The device refused.
    pub fn create_context(&mut self, ctx_id: u32) -> Result<()> {
        let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        let answer: SvmResp = self.send(&create, &[])?;
        accepted("CTX_CREATE", answer.status.get())
    }

    /// Destroys a context.
    ///
    /// # Errors
    /// The device refused.
    pub fn destroy_context(&mut self, ctx_id: u32) -> Result<()> {
        let answer: SvmResp = self.send(&header(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id), &[])?;
        accepted("CTX_DESTROY", answer.status.get())
    }

    /// Creates a context's GPU VM on a device.
    ///
    /// # Errors
    /// The device refused.
    pub fn create_vm(&mut self, ctx_id: u32, dev_id: u32) -> Result<RawVm> {
        let hdr = request::<VmCreate>(SVM_REQ_VM_CREATE, 0)?;
        let create = VmCreate { hdr, dev_id: dev_id.into(), ..VmCreate::default() };
        let reply: VmCreateRsp = self.request(ctx_id, &create, &[])?;
        Ok(RawVm { ctx_id, vm_id: reply.vm_id.get() })
    }

    /// Destroys a GPU VM.
    ///
    /// # Errors
    /// The device refused.
    pub fn destroy_vm(&mut self, vm: RawVm) -> Result<()> {
        let hdr = request::<VmRef>(SVM_REQ_VM_DESTROY, 0)?;
        let destroy = VmRef { hdr, vm_id: vm.vm_id.into(), ..VmRef::default() };
        self.request::<RspHdr>(vm.ctx_id, &destroy, &[]).map(drop)
    }

    /// Changes mappings with one VM_BIND. Returns its status: 0 or a negative errno.
    ///
    /// # Errors
    /// No answer comes.
    pub fn bind(&mut self, vm: RawVm, ops: &[BindOp]) -> Result<i32> {
        let hdr = request::<VmBind>(SVM_REQ_VM_BIND, size_of_val(ops))?;
        let mut bind = VmBind { hdr, ..VmBind::default() };
        bind.vm_id = vm.vm_id.into();
        bind.num_binds = u32::try_from(ops.len())?.into();
        let payload = [bind.as_bytes(), ops.as_bytes()].concat();
        let (head, _) = self.submit(vm.ctx_id, &payload, size_of::<VmBindRsp>())?;
        Ok(head.status.get())
    }

    /// Launches a job. Returns its id.
    ///
    /// # Errors
    /// The device refused.
    pub fn exec(&mut self, vm: RawVm, ring_idx: u32, user_data: u64, packets: &[Packet]) -> Result<u64> {
        let exec = Exec {
            hdr: request::<Exec>(SVM_REQ_EXEC, size_of_val(packets))?,
            vm_id: vm.vm_id.into(),
            ring_idx: ring_idx.into(),
            num_packets: u32::try_from(packets.len())?.into(),
            user_data: user_data.into(),
            ..Exec::default()
        };
        Ok(self.request::<ExecRsp>(vm.ctx_id, &exec, packets.as_bytes())?.job_id.get())
    }

    /// Answers a fault with pages, as (CPU address, guest-physical address) each. Returns the status.
    ///
    /// # Errors
    /// No answer comes.
    pub fn answer(&mut self, fault: &FaultRecord, pages: &[(u64, u64)], as_of: u64) -> Result<i32> {
        let run = |&(va, gpa): &(u64, u64)| PageRun {
            va: va.into(),
            gpa: gpa.into(),
            pages: 1.into(),
            as_of: as_of.into(),
            ..PageRun::default()
        };
        self.respond(fault, PAGE_RESP_SUCCESS, &pages.iter().map(run).collect::<Vec<_>>())
    }

    /// Answers a fault with one run of `pages` pages from a CPU address and a guest-physical address on. Returns the status.
    ///
    /// # Errors
    /// No answer comes.
    pub fn answer_run(&mut self, fault: &FaultRecord, va: u64, gpa: u64, pages: u32) -> Result<i32> {
        let run = PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), ..PageRun::default() };
        self.respond(fault, PAGE_RESP_SUCCESS, &[run])
    }

    /// Answers a fault: the access is an error of its process. Returns the status.
    ///
    /// # Errors
    /// No answer comes.
    pub fn refuse(&mut self, fault: &FaultRecord) -> Result<i32> {
        self.respond(fault, PAGE_RESP_INVALID, &[])
    }

    fn respond(&mut self, fault: &FaultRecord, code: u32, runs: &[PageRun]) -> Result<i32> {
        let answer = PageResponse {
            hdr: header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, fault.ctx_id.get()),
            cookie: fault.cookie,
            code: code.into(),
            num_runs: u16::try_from(runs.len())?.into(),
            flags: 0.into(),
        };
        // A refusal has no more than the head.
        let answer: SvmResp = self.send(&answer, runs.as_bytes())?;
        Ok(answer.status.get())
    }

    /// Withdraws CPU addresses of a process from all its GPU VMs. Returns the invalidation's sequence.
    ///
    /// # Errors
    /// The device refused.
    pub fn invalidate(&mut self, ctx_id: u32, start: u64, bytes: u64) -> Result<u64> {
        let invalidate = Invalidate {
            hdr: header(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id),
            start: start.into(),
            length: bytes.into(),
            event: INVAL_UNMAP.into(),
            ..Invalidate::default()
        };
        let answer: InvalidateResp = self.send(&invalidate, &[])?;
        accepted("INVALIDATE", answer.resp.status.get())?;
        Ok(answer.seq.get())
    }
}

fn accepted(what: &str, status: i32) -> Result<()> {
    ensure!(status == 0, "{what} is refused: {}", errno::name(status));
    Ok(())
}

fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// The header of a request with `tail` bytes behind its fixed part.
fn request<T>(cmd: u32, tail: usize) -> Result<ReqHdr> {
    let len = u32::try_from(size_of::<T>() + tail)?;
    Ok(ReqHdr { cmd: cmd.into(), len: len.into(), ..ReqHdr::default() })
}
