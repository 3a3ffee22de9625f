//! Commands as bytes, for the ring and for the library alike. Nothing is sent here.

use virtio_gpu_svm::protocol::control::{
    Hello, INVAL_UNMAP, Invalidate, PAGE_RESP_SUCCESS, PageResponse, PageRun, SUPPLY_LIST, Supply,
    VIRTIO_GPU_CMD_SVM_HELLO, VIRTIO_GPU_CMD_SVM_INVALIDATE, VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
    VIRTIO_GPU_CMD_SVM_SUPPLY,
};
use virtio_gpu_svm::protocol::gpu::{
    CmdSubmit, CtrlHdr, CtxCreate, GetCapsetInfo, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY,
    VIRTIO_GPU_CMD_GET_CAPSET_INFO, VIRTIO_GPU_CMD_SUBMIT_3D,
};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::pages::Told;
use virtio_gpu_svm::protocol::request::{
    BindOp, Exec, ReqHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, SVM_REQ_VM_GET_PROPERTY, VmBind,
    VmCreate, VmRef,
};
use zerocopy::IntoBytes;

/// Where `as_of` stands in a run of pages.
pub const AS_OF: u64 = 24;
/// Where the first run stands in a SUPPLY.
pub const SUPPLY_RUNS: u64 = size_of::<Supply>() as u64;

/// Where `as_of` stands in a SUPPLY of a list.
pub const LIST_AS_OF: u64 = SUPPLY_RUNS + 8;

/// Where `inval_done_seq` stands in an answer.
pub const INVAL_DONE: u64 = 40;

/// The header of a command.
pub fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// HELLO.
pub fn hello(incarnation: u64) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    let (version, reserved) = (0x1_0000.into(), 0.into());
    Hello { hdr, incarnation: incarnation.into(), version, reserved }.as_bytes().to_vec()
}

/// GET_CAPSET_INFO: the command that has the least to do.
pub fn no_op() -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0);
    GetCapsetInfo { hdr, ..GetCapsetInfo::default() }.as_bytes().to_vec()
}

/// CTX_CREATE.
pub fn create_context(ctx_id: u32) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id);
    CtxCreate { hdr, ..CtxCreate::default() }.as_bytes().to_vec()
}

/// CTX_DESTROY.
pub fn destroy_context(ctx_id: u32) -> Vec<u8> {
    header(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes().to_vec()
}

/// SUPPLY.
pub fn supply(ctx_id: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    let num_runs = u16::try_from(runs.len()).unwrap_or(u16::MAX).into();
    let head = Supply { hdr, num_runs, ..Supply::default() };
    [head.as_bytes(), runs.as_bytes()].concat()
}

/// SUPPLY of single pages that follow each other in the process, as a list.
///
/// # Panics
/// If they are no such pages.
pub fn supply_list(ctx_id: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    let Told { num_runs, flags, bytes } = told(runs);
    assert_eq!(flags.get(), SUPPLY_LIST, "runs that are no list");
    let head = Supply { hdr, num_runs, flags, ..Supply::default() };
    [head.as_bytes(), &bytes].concat()
}

/// PAGE_RESPONSE with pages, as they are told the shortest way.
///
/// # Panics
/// If they are more than a command may hold.
pub fn answer(ctx_id: u32, cookie: u64, runs: &[PageRun]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id);
    let Told { num_runs, flags, bytes } = told(runs);
    let head = PageResponse { hdr, cookie: cookie.into(), code: PAGE_RESP_SUCCESS.into(), num_runs, flags };
    [head.as_bytes(), &bytes].concat()
}

fn told(runs: &[PageRun]) -> Told {
    Told::new(runs).unwrap_or_else(|| panic!("{} runs are too many for a command", runs.len()))
}

/// INVALIDATE.
pub fn invalidate(ctx_id: u32, start: u64, bytes: u64) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id);
    let (start, length, event) = (start.into(), bytes.into(), INVAL_UNMAP.into());
    Invalidate { hdr, start, length, event, ..Invalidate::default() }.as_bytes().to_vec()
}

/// VM_CREATE on device 0.
pub fn create_vm(ctx_id: u32) -> Vec<u8> {
    let hdr = request(SVM_REQ_VM_CREATE, size_of::<VmCreate>());
    submit(ctx_id, VmCreate { hdr, ..VmCreate::default() }.as_bytes())
}

/// VM_GET_PROPERTY.
pub fn property(ctx_id: u32, vm_id: u32) -> Vec<u8> {
    let hdr = request(SVM_REQ_VM_GET_PROPERTY, size_of::<VmRef>());
    submit(ctx_id, VmRef { hdr, vm_id: vm_id.into(), ..VmRef::default() }.as_bytes())
}

/// VM_BIND.
pub fn bind(ctx_id: u32, vm_id: u32, operations: &[BindOp]) -> Vec<u8> {
    let hdr = request(SVM_REQ_VM_BIND, size_of::<VmBind>() + size_of_val(operations));
    let (vm_id, num_binds) = (vm_id.into(), count(operations).into());
    let head = VmBind { hdr, vm_id, num_binds, ..VmBind::default() };
    submit(ctx_id, &[head.as_bytes(), operations.as_bytes()].concat())
}

/// EXEC on a ring.
pub fn exec(ctx_id: u32, vm_id: u32, ring_idx: u32, packets: &[Packet]) -> Vec<u8> {
    let hdr = request(SVM_REQ_EXEC, size_of::<Exec>() + size_of_val(packets));
    let (vm_id, num_packets) = (vm_id.into(), count(packets).into());
    let ring_idx = ring_idx.into();
    let head = Exec { hdr, vm_id, ring_idx, num_packets, ..Exec::default() };
    submit(ctx_id, &[head.as_bytes(), packets.as_bytes()].concat())
}

fn submit(ctx_id: u32, payload: &[u8]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
    let head = CmdSubmit { hdr, size: count(payload).into(), padding: 0.into() };
    [head.as_bytes(), payload].concat()
}

fn request(cmd: u32, bytes: usize) -> ReqHdr {
    let len = u32::try_from(bytes).unwrap_or(u32::MAX);
    ReqHdr { cmd: cmd.into(), len: len.into(), ..ReqHdr::default() }
}

fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}
