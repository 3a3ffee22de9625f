//! Commands of a guest from bytes of an input: mostly well formed, about few objects and few pages, so that they meet.

use crate::input::Input;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::pages::Told;
use virtio_gpu_svm::protocol::request::*;
use zerocopy::IntoBytes;

/// A: begins shortly before a boundary of leaves.
pub(crate) const A: u64 = 0x7f00_001e_0000;
/// C: differs from A, and is not aligned to a leaf.
pub(crate) const C: u64 = 0x4_0002_0000;
/// Guest-physical memory may stand here.
pub(crate) const GPA: u64 = 0x10_0000;
/// Bytes of each region.
pub(crate) const REGION: u64 = 1 << 20;
/// Contexts have ids from 1 to here.
pub(crate) const CONTEXTS: u8 = 4;

pub(crate) fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

pub(crate) fn ctx_id(input: &mut Input<'_>) -> u32 {
    input.below(CONTEXTS) + 1
}

/// Bytes of a range: few pages, or now and then a lot.
fn length(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        0xff => 1 << 40,
        0xfe => 0x20_0000,
        pages => u64::from(pages % 48 + 1) * 4096,
    }
}

fn near(input: &mut Input<'_>, base: u64) -> u64 {
    match input.u8() {
        0xff => input.u64(),
        0xfe => 0,
        page => base + u64::from(page % 64) * 4096,
    }
}

/// A CPU address.
pub(crate) fn a(input: &mut Input<'_>) -> u64 {
    near(input, A)
}

/// A GPU address; on a device with the CPU's own it is one of these.
pub(crate) fn c(input: &mut Input<'_>) -> u64 {
    let base = if input.flag() { A } else { C };
    near(input, base)
}

fn gpa(input: &mut Input<'_>) -> u64 {
    let base = if input.flag() { GPA } else { GPA + 2 * REGION };
    near(input, base)
}

/// A run of pages with a given sequence or any other.
pub(crate) fn run(input: &mut Input<'_>, va: Option<u64>, seq: u64) -> PageRun {
    let va = va.unwrap_or_else(|| a(input));
    let pages = match input.u8() {
        0xff => 1024,
        pages => u32::from(pages % 32) + 1,
    };
    let as_of = match input.below(8) {
        0 => input.u64(),
        1 => seq.saturating_sub(1),
        _ => seq,
    };
    let flags = u32::from(input.below(4) == 0);
    let gpa = gpa(input);
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), flags: flags.into(), as_of: as_of.into() }
}

fn list<T: IntoBytes + zerocopy::Immutable>(head: &[u8], items: &[T]) -> Vec<u8> {
    [head, items.as_bytes()].concat()
}

pub(crate) fn supply(ctx_id: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    let Told { num_runs, flags, bytes } = told(runs);
    [Supply { hdr, num_runs, flags, ..Supply::default() }.as_bytes(), &bytes].concat()
}

pub(crate) fn response(ctx_id: u32, cookie: u64, code: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id);
    let Told { num_runs, flags, bytes } = told(runs);
    let head = PageResponse { hdr, cookie: cookie.into(), code: code.into(), num_runs, flags };
    [head.as_bytes(), &bytes].concat()
}

/// A run alone of an odd number of pages is told as a list.
fn told(runs: &[PageRun]) -> Told {
    let list = |run: &PageRun| {
        let pages = (0..u64::from(run.pages.get())).map(|n| PageRun {
            va: run.va.get().wrapping_add(n * 4096).into(),
            gpa: run.gpa.get().wrapping_add(n * 4096).into(),
            pages: 1.into(),
            ..*run
        });
        Told::new(&pages.collect::<Vec<_>>())
    };
    let as_list = match runs {
        [run] if run.pages.get() < 32 && run.pages.get() % 2 == 1 => list(run),
        _ => Told::new(runs),
    };
    as_list.unwrap_or_else(|| panic!("{} runs in a command", runs.len()))
}

fn count<T>(items: &[T]) -> zerocopy::little_endian::U32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX).into()
}

pub(crate) fn hello(incarnation: u64) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    let version = 0x1_0000.into();
    Hello { hdr, incarnation: incarnation.into(), version, reserved: 0.into() }.as_bytes().to_vec()
}

pub(crate) fn create_context(ctx_id: u32) -> Vec<u8> {
    CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() }.as_bytes().to_vec()
}

pub(crate) fn destroy_context(ctx_id: u32) -> Vec<u8> {
    hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes().to_vec()
}

pub(crate) fn invalidate(input: &mut Input<'_>) -> Vec<u8> {
    let event = input.below(5);
    let (start, length) = if event == INVAL_RELEASE { (0, 0) } else { (a(input), length(input)) };
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id(input));
    let (start, length) = (start.into(), length.into());
    Invalidate { hdr, start, length, event: event.into(), reserved: 0.into() }.as_bytes().to_vec()
}

pub(crate) fn create_blob(input: &mut Input<'_>) -> Vec<u8> {
    let entries: Vec<MemEntry> = (0..input.below(3) + 1)
        .map(|_| {
            let bytes = u32::try_from(length(input)).unwrap_or(u32::MAX);
            MemEntry { addr: gpa(input).into(), length: bytes.into(), padding: 0.into() }
        })
        .collect();
    let size: u64 = entries.iter().map(|entry| u64::from(entry.length.get())).sum();
    let head = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: (input.below(4) + 1).into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: count(&entries),
        size: size.into(),
        ..ResourceCreateBlob::default()
    };
    list(head.as_bytes(), &entries)
}

/// UNREF, ATTACH or DETACH.
pub(crate) fn resource(input: &mut Input<'_>) -> Vec<u8> {
    let kind = match input.below(4) {
        0 => VIRTIO_GPU_CMD_RESOURCE_UNREF,
        1 => VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE,
        _ => VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE,
    };
    let (hdr, resource_id) = (hdr(kind, ctx_id(input)), input.below(4) + 1);
    CtxResource { hdr, resource_id: resource_id.into(), padding: 0.into() }.as_bytes().to_vec()
}

/// What is asked without effect.
pub(crate) fn question(input: &mut Input<'_>) -> Vec<u8> {
    match input.below(4) {
        0 => hdr(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0).as_bytes().to_vec(),
        1 => {
            let hdr = hdr(VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0);
            GetCapsetInfo { hdr, ..GetCapsetInfo::default() }.as_bytes().to_vec()
        }
        2 => {
            let hdr = hdr(VIRTIO_GPU_CMD_GET_CAPSET, 0);
            GetCapset { hdr, capset_id: 24.into(), capset_version: 1.into() }.as_bytes().to_vec()
        }
        _ => {
            let hdr = hdr(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
            GetDevice { hdr, dev_id: input.below(4).into(), reserved: 0.into() }.as_bytes().to_vec()
        }
    }
}

/// Any that needs nothing of what was before.
pub(crate) fn command(input: &mut Input<'_>) -> Vec<u8> {
    match input.below(16) {
        0 => hello(u64::from(input.below(4))),
        1 => create_context(ctx_id(input)),
        2 => destroy_context(ctx_id(input)),
        3 => create_blob(input),
        4 => resource(input),
        5 => question(input),
        6 => invalidate(input),
        7 => {
            let ctx_id = ctx_id(input);
            let runs: Vec<_> = (0..=input.below(3)).map(|_| run(input, None, 0)).collect();
            supply(ctx_id, &runs)
        }
        8 => input.take(64).to_vec(),
        _ => submit(input),
    }
}

/// A SUBMIT_3D with one to four requests.
pub(crate) fn submit(input: &mut Input<'_>) -> Vec<u8> {
    let (mut payload, mut rsp_off) = (Vec::new(), 0_u32);
    let ctx_id = ctx_id(input);
    for _ in 0..=input.below(4) {
        let (cmd, body) = request(input);
        let len = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
        let hdr = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 7.into(), rsp_off: rsp_off.into() };
        payload.extend(hdr.as_bytes());
        payload.extend(body);
        rsp_off += 64;
    }
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let hdr = hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
    list(CmdSubmit { hdr, size: size.into(), padding: 0.into() }.as_bytes(), &payload)
}

/// A request's number, and its bytes behind the header.
fn request(input: &mut Input<'_>) -> (u32, Vec<u8>) {
    let body = |whole: &[u8]| whole[size_of::<ReqHdr>()..].to_vec();
    match input.below(10) {
        0 | 1 => {
            let request = VmCreate { dev_id: input.below(3).into(), ..VmCreate::default() };
            (SVM_REQ_VM_CREATE, body(request.as_bytes()))
        }
        2 => {
            let request = VmRef { vm_id: vm_id(input), ..VmRef::default() };
            let cmd = if input.flag() { SVM_REQ_VM_DESTROY } else { SVM_REQ_VM_GET_PROPERTY };
            (cmd, body(request.as_bytes()))
        }
        3..=6 => (SVM_REQ_VM_BIND, bind(input)),
        _ => (SVM_REQ_EXEC, exec(input)),
    }
}

fn vm_id(input: &mut Input<'_>) -> zerocopy::little_endian::U32 {
    (input.below(5) + 1).into()
}

fn points(input: &mut Input<'_>) -> Vec<FencePoint> {
    let point = |input: &mut Input<'_>| FencePoint {
        vm_id: vm_id(input),
        ring_idx: input.below(3).into(),
        seqno: u64::from(input.below(8)).into(),
    };
    (0..input.below(8).saturating_sub(5)).map(|_| point(input)).collect()
}

fn bind(input: &mut Input<'_>) -> Vec<u8> {
    let vm_id = vm_id(input);
    let ops: Vec<BindOp> = (0..=input.below(3)).map(|_| operation(input)).collect();
    let mut head = VmBind { vm_id, num_binds: count(&ops), ..VmBind::default() };
    let mut waits = Vec::new();
    if input.flag() {
        waits = points(input);
        head.flags = VM_BIND_ASYNC.into();
        head.ring_idx = input.below(3).into();
        head.num_waits = count(&waits);
        head.signal = u64::from(input.below(8)).into();
    }
    let head = &head.as_bytes()[size_of::<ReqHdr>()..];
    list(&list(head, &waits), &ops)
}

fn operation(input: &mut Input<'_>) -> BindOp {
    let op = input.below(8);
    let (addr, range) = (c(input), length(input));
    let place = BindOp { addr: addr.into(), range: range.into(), ..BindOp::default() };
    let flags = u32::from(input.u8()) & (BIND_READONLY | BIND_IMMEDIATE);
    match op {
        0 => BindOp { op: BIND_OP_UNMAP.into(), ..place },
        1 => BindOp { op: BIND_OP_PREFETCH.into(), ..place },
        2 => {
            let resource_id = (input.below(4) + 1).into();
            BindOp { op: BIND_OP_UNMAP_ALL.into(), resource_id, ..BindOp::default() }
        }
        3 => BindOp { op: BIND_OP_MAP.into(), flags: (flags | BIND_NULL).into(), ..place },
        4 => {
            let obj_offset = a(input).wrapping_sub(addr).into();
            let flags = (flags | BIND_CPU_ADDR_MIRROR).into();
            BindOp { op: BIND_OP_MAP.into(), flags, obj_offset, ..place }
        }
        5 => BindOp {
            op: BIND_OP_MAP.into(),
            flags: flags.into(),
            obj_offset: (u64::from(input.below(4)) * 4096).into(),
            resource_id: (input.below(4) + 1).into(),
            ..place
        },
        _ => {
            let obj_offset = a(input).into();
            BindOp { op: BIND_OP_MAP_USERPTR.into(), flags: flags.into(), obj_offset, ..place }
        }
    }
}

fn exec(input: &mut Input<'_>) -> Vec<u8> {
    let packets: Vec<_> = (0..=input.below(2)).map(|_| packet(input)).collect();
    let (vm_id, waits) = (vm_id(input), points(input));
    let head = Exec {
        vm_id,
        ring_idx: input.below(3).into(),
        num_packets: count(&packets),
        num_waits: count(&waits),
        signal: u64::from(input.below(8)).into(),
        ..Exec::default()
    };
    let head = &head.as_bytes()[size_of::<ReqHdr>()..];
    list(&list(head, &waits), &packets)
}

/// Mostly one that a device takes: what an opcode does not name is left out.
fn packet(input: &mut Input<'_>) -> Packet {
    let opcode = input.below(10);
    let (dst, src) = (c(input), c(input));
    let (len, value) = (u64::from(input.u8()) * 8, u64::from(input.u8()));
    let [no_src, no_len, no_value] = match opcode {
        OP_COPY => [false, false, true],
        OP_FILL => [true, false, false],
        OP_REDUCE => [false, false, true],
        OP_AXPY => [false; 3],
        OP_CHASE => [false, true, false],
        OP_ATOMIC_ADD | OP_SEM_WAIT | OP_SEM_SIGNAL => [true, true, false],
        _ => [true; 3],
    };
    let of = |without: bool, field: u64| if without { 0 } else { field };
    Packet {
        opcode: opcode.into(),
        dst: of(opcode == OP_NOP, dst).into(),
        src: of(no_src, src).into(),
        len: of(no_len, len).into(),
        value: of(no_value, value).into(),
        ..Packet::default()
    }
}
