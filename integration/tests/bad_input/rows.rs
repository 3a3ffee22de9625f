//! The tables: commands as bytes, and the errno with which each must be refused (PROTOCOL 3 to 5, 8).

use super::scene::{
    A, A2, BLOB, BLOB_BYTES, C, HIGH_BYTES, LOW_BYTES, MAPPED, RAM_END, Scene, header, response,
};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::{EACCES, EEXIST, EFAULT, EINVAL, ENOENT, EOPNOTSUPP};
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_FILL, OP_NOP, Packet};
use virtio_gpu_svm::protocol::pages::Told;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{
    GUEST_VA_END, MAX_BINDS, MAX_BLOB_ENTRIES, MAX_COMMAND_BYTES, MAX_PACKETS, MAX_REQUESTS, MAX_RINGS,
    MAX_RUNS, MAX_WAITS, PAGE_SIZE, VERSION_MAJOR,
};
use zerocopy::{Immutable, IntoBytes};

/// One command.
pub struct Row {
    pub name: String,
    pub command: Vec<u8>,
    pub errno: i32,
}

fn row(name: &str, errno: i32, command: Vec<u8>) -> Row {
    Row { name: name.into(), command, errno }
}

fn bytes(head: &(impl IntoBytes + Immutable), tail: &[u8]) -> Vec<u8> {
    [head.as_bytes(), tail].concat()
}

/// A changed copy.
fn with<T: Copy>(value: T, change: impl FnOnce(&mut T)) -> T {
    let mut changed = value;
    change(&mut changed);
    changed
}

const UNALIGNED: u64 = 0x7000_0000_0800;
const LAST_PAGE: u64 = u64::MAX - PAGE_SIZE + 1;

fn hello() -> Hello {
    let version = u32::from(VERSION_MAJOR) << 16;
    let hdr = header(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    Hello { hdr, incarnation: 1.into(), version: version.into(), reserved: 0.into() }
}

fn create_context(ctx_id: u32) -> CtxCreate {
    let hdr = header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id);
    CtxCreate { hdr, context_init: 24.into(), ..CtxCreate::default() }
}

fn resource(kind: u32, ctx_id: u32, resource_id: u32) -> CtxResource {
    CtxResource { hdr: header(kind, ctx_id), resource_id: resource_id.into(), ..CtxResource::default() }
}

fn blob(pages: u64) -> ResourceCreateBlob {
    ResourceCreateBlob {
        hdr: header(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: 8.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: (pages * PAGE_SIZE).into(),
        ..ResourceCreateBlob::default()
    }
}

fn entry(addr: u64, length: u64) -> MemEntry {
    let length = u32::try_from(length).unwrap();
    MemEntry { addr: addr.into(), length: length.into(), padding: 0.into() }
}

/// Commands that are right in themselves and whose effect can be repeated.
pub fn good_commands(scene: &Scene) -> Vec<Row> {
    let runs = [scene.run(A2, scene.free_gpa(0), 1), scene.run(A2 + PAGE_SIZE, scene.free_gpa(1), 1)];
    let get_device = GetDevice { hdr: header(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0), ..GetDevice::default() };
    let good = |name: &str, command| Row { name: name.into(), command, errno: 0 };
    vec![
        good("HELLO", bytes(&hello(), &[])),
        good("GET_DEVICE", bytes(&get_device, &[])),
        good("SUPPLY", supply(1, &runs)),
        good("SUPPLY of a list", listed(1, &runs)),
        good("INVALIDATE", bytes(&invalidate(1, A2, PAGE_SIZE, INVAL_UNMAP), &[])),
        good("CTX_CREATE", bytes(&create_context(9), &[])),
        good("CTX_ATTACH_RESOURCE", bytes(&resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1, BLOB), &[])),
        good("RESOURCE_CREATE_BLOB", bytes(&blob(1), entry(scene.free_gpa(2), PAGE_SIZE).as_bytes())),
        good("RESOURCE_UNREF", bytes(&resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, 8), &[])),
        good("SUBMIT_3D", submit(1, &bytes(&vm_ref(SVM_REQ_VM_GET_PROPERTY, 1), &[]))),
        good("CTX_DESTROY", bytes(&header(VIRTIO_GPU_CMD_CTX_DESTROY, 9), &[])),
    ]
}

/// Everything but pages and processes' requests.
pub fn control(scene: &Scene) -> Vec<Row> {
    let mut rows = vec![];
    for kind in [0, 0x0103, 0x0104, 0x0105, 0x0106, 0x0107, 0x010a, 0x0208, 0x0405, 0x1100, 0xffff_ffff] {
        rows.push(row(&format!("command {kind:#x}"), EOPNOTSUPP, bytes(&header(kind, 0), &[])));
    }
    let head =
        |change: fn(&mut CtrlHdr)| bytes(&with(header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0), change), &[]);
    rows.push(row("unknown header flag", EINVAL, head(|h| h.flags = (1 << 5).into())));
    rows.push(row("header padding", EINVAL, head(|h| h.padding[2] = 1)));
    rows.push(row(
        "a command of more bytes than any has",
        EINVAL,
        bytes(&header(VIRTIO_GPU_CMD_SUBMIT_3D, 1), &vec![0; MAX_COMMAND_BYTES]),
    ));

    let greet = |change: fn(&mut Hello)| bytes(&with(hello(), change), &[]);
    rows.push(row("HELLO of version 2", EOPNOTSUPP, greet(|h| h.version = (2 << 16).into())));
    rows.push(row("HELLO of version 0", EOPNOTSUPP, greet(|h| h.version = 0.into())));
    rows.push(row("HELLO without incarnation", EINVAL, greet(|h| h.incarnation = 0.into())));
    rows.push(row("HELLO with reserved field", EINVAL, greet(|h| h.reserved = 1.into())));
    rows.push(row("HELLO of a context", EINVAL, greet(|h| h.hdr.ctx_id = 1.into())));

    let device = |dev_id: u32, reserved: u32| {
        let hdr = header(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
        bytes(&GetDevice { hdr, dev_id: dev_id.into(), reserved: reserved.into() }, &[])
    };
    rows.push(row("GET_DEVICE of the device after the last", ENOENT, device(2, 0)));
    rows.push(row("GET_DEVICE of the largest number", ENOENT, device(u32::MAX, 0)));
    rows.push(row("GET_DEVICE with reserved field", EINVAL, device(0, 1)));
    rows.extend(contexts());
    rows.extend(resources(scene));
    rows
}

fn contexts() -> Vec<Row> {
    let create = |ctx_id, change: fn(&mut CtxCreate)| bytes(&with(create_context(ctx_id), change), &[]);
    let destroy = |ctx_id| bytes(&header(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id), &[]);
    vec![
        row("CTX_CREATE of context 0", EINVAL, create(0, |_| {})),
        row("CTX_CREATE of a context that exists", EEXIST, create(1, |_| {})),
        row("CTX_CREATE with a foreign capset", EINVAL, create(9, |c| c.context_init = 2.into())),
        row("CTX_CREATE with unknown bits", EINVAL, create(9, |c| c.context_init = (24 | 1 << 8).into())),
        row("CTX_CREATE with an overlong name", EINVAL, create(9, |c| c.nlen = 65.into())),
        row("CTX_CREATE with the longest length", EINVAL, create(9, |c| c.nlen = u32::MAX.into())),
        row("CTX_DESTROY of context 0", ENOENT, destroy(0)),
        row("CTX_DESTROY of a context that never was", ENOENT, destroy(99)),
        row("CTX_DESTROY of a dead context", ENOENT, destroy(3)),
    ]
}

fn resources(scene: &Scene) -> Vec<Row> {
    let gpa = scene.free_gpa(2);
    let make = |change: fn(&mut ResourceCreateBlob), entries: &[MemEntry]| {
        bytes(&with(blob(1), change), entries.as_bytes())
    };
    let one = [entry(gpa, PAGE_SIZE)];
    let at = |addr| [entry(addr, PAGE_SIZE)];
    let attach = |ctx, id| bytes(&resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, ctx, id), &[]);
    let detach = |ctx, id| bytes(&resource(VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, ctx, id), &[]);
    let unref = |id| bytes(&resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, id), &[]);
    vec![
        row("blob of host memory", EOPNOTSUPP, make(|b| b.blob_mem = 2.into(), &one)),
        row("blob of no kind", EOPNOTSUPP, make(|b| b.blob_mem = 0.into(), &one)),
        row("blob with resource id 0", EINVAL, make(|b| b.resource_id = 0.into(), &one)),
        row("blob with a resource id that exists", EEXIST, make(|b| b.resource_id = BLOB.into(), &one)),
        row("blob with a blob id", EINVAL, make(|b| b.blob_id = 1.into(), &one)),
        row("blob with an unknown flag", EINVAL, make(|b| b.blob_flags = 8.into(), &one)),
        row("blob with more entries than there are", EINVAL, make(|b| b.nr_entries = 2.into(), &one)),
        row("blob with fewer entries than there are", EINVAL, make(|b| b.nr_entries = 0.into(), &one)),
        row(
            "blob with too many entries",
            EINVAL,
            make(|b| b.nr_entries = (MAX_BLOB_ENTRIES + 1).into(), &one),
        ),
        row("blob with the most entries", EINVAL, make(|b| b.nr_entries = u32::MAX.into(), &one)),
        row("blob larger than its entries", EINVAL, make(|b| b.size = (2 * PAGE_SIZE).into(), &one)),
        row("blob of no bytes", EINVAL, make(|b| b.size = 0.into(), &one)),
        row("blob of half a page", EINVAL, make(|b| b.size = 2048.into(), &one)),
        row("blob of the most bytes", EINVAL, make(|b| b.size = u64::MAX.into(), &one)),
        row("blob entry with padding", EINVAL, make(|_| {}, &[with(one[0], |e| e.padding = 1.into())])),
        row("blob entry that is unaligned", EINVAL, make(|_| {}, &at(gpa + 512))),
        row("blob entry of no bytes", EINVAL, make(|_| {}, &[entry(gpa, 0)])),
        row("blob entry that overflows", EINVAL, make(|_| {}, &at(LAST_PAGE))),
        row("blob entry in the hole", EFAULT, make(|_| {}, &at(LOW_BYTES))),
        row("blob entry beyond guest memory", EFAULT, make(|_| {}, &at(RAM_END))),
        row(
            "blob entry across the end of guest memory",
            EFAULT,
            bytes(&blob(2), entry(RAM_END - PAGE_SIZE, 2 * PAGE_SIZE).as_bytes()),
        ),
        row("attach to a context that never was", ENOENT, attach(99, BLOB)),
        row("attach to a dead context", ENOENT, attach(3, BLOB)),
        row("attach of no resource", ENOENT, attach(1, 99)),
        row("detach of what is not attached", EACCES, detach(2, BLOB)),
        row("detach of no resource", ENOENT, detach(1, 99)),
        row("unref of no resource", ENOENT, unref(99)),
        row("unref of resource 0", ENOENT, unref(0)),
    ]
}

pub fn supply(ctx_id: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    let num_runs = u16::try_from(runs.len()).unwrap();
    bytes(&Supply { hdr, num_runs: num_runs.into(), ..Supply::default() }, runs.as_bytes())
}

/// Pages that follow each other, told as a list.
fn listed(ctx_id: u32, pages: &[PageRun]) -> Vec<u8> {
    let Told { num_runs, flags, bytes: told } = Told::new(pages).unwrap();
    assert_eq!(flags.get(), SUPPLY_LIST);
    let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    bytes(&Supply { hdr, num_runs, flags, ..Supply::default() }, &told)
}

fn invalidate(ctx_id: u32, start: u64, length: u64, event: u32) -> Invalidate {
    Invalidate {
        hdr: header(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id),
        start: start.into(),
        length: length.into(),
        event: event.into(),
        reserved: 0.into(),
    }
}

/// Pages, answers and invalidations.
pub fn pages(scene: &Scene) -> Vec<Row> {
    let mut rows = bad_runs(scene);
    rows.extend(bad_answers(scene));
    let inval = |start, length, event| bytes(&invalidate(1, start, length, event), &[]);
    let everything = !(PAGE_SIZE - 1);
    rows.extend([
        row("invalidation that is unaligned", EINVAL, inval(UNALIGNED, PAGE_SIZE, INVAL_UNMAP)),
        row("invalidation of half a page", EINVAL, inval(A2, 2048, INVAL_UNMAP)),
        row("invalidation of nothing", EINVAL, inval(A2, 0, INVAL_UNMAP)),
        row("invalidation that overflows", EINVAL, inval(LAST_PAGE, 2 * PAGE_SIZE, INVAL_CLEAR)),
        row(
            "invalidation beyond the space",
            EINVAL,
            inval(GUEST_VA_END - PAGE_SIZE, 2 * PAGE_SIZE, INVAL_CLEAR),
        ),
        row("invalidation of all there is", EINVAL, inval(0, everything, INVAL_UNMAP)),
        row("invalidation for an unknown cause", EINVAL, inval(A2, PAGE_SIZE, INVAL_RELEASE + 1)),
        row("release of a range", EINVAL, inval(A2, PAGE_SIZE, INVAL_RELEASE)),
        row("invalidation of a dead context", ENOENT, bytes(&invalidate(3, A2, PAGE_SIZE, 0), &[])),
        row("invalidation of context 0", ENOENT, bytes(&invalidate(0, A2, PAGE_SIZE, 0), &[])),
        row(
            "invalidation with reserved field",
            EINVAL,
            bytes(&with(invalidate(1, A2, PAGE_SIZE, 0), |i| i.reserved = 1.into()), &[]),
        ),
    ]);
    rows
}

/// Runs that are wrong in a SUPPLY, and again in an answer to the pending fault.
fn bad_runs(scene: &Scene) -> Vec<Row> {
    let (gpa, known) = (scene.free_gpa(0), A + 16 * PAGE_SIZE);
    let good = scene.run(A2, gpa, 1);
    let runs: Vec<(&str, i32, PageRun)> = vec![
        ("va that is unaligned", EINVAL, scene.run(UNALIGNED, gpa, 1)),
        ("gpa that is unaligned", EINVAL, scene.run(A2, gpa + 1, 1)),
        ("no pages", EINVAL, scene.run(A2, gpa, 0)),
        ("va beyond the space", EINVAL, scene.run(GUEST_VA_END, gpa, 1)),
        ("va across the end of the space", EINVAL, scene.run(GUEST_VA_END - PAGE_SIZE, gpa, 2)),
        ("va that overflows", EINVAL, scene.run(LAST_PAGE, gpa, 2)),
        ("gpa that overflows", EINVAL, scene.run(A2, LAST_PAGE, 2)),
        ("unknown flag", EINVAL, with(good, |r| r.flags = 2.into())),
        ("a sequence of the future", EINVAL, with(good, |r| r.as_of = 1.into())),
        ("the largest sequence", EINVAL, with(good, |r| r.as_of = u64::MAX.into())),
        ("pages beyond guest memory", EFAULT, scene.run(A2, RAM_END, 1)),
        ("pages in the hole", EFAULT, scene.run(A2, LOW_BYTES, 1)),
        ("pages across the hole's start", EFAULT, scene.run(A2, LOW_BYTES - PAGE_SIZE, 2)),
        ("pages across the end of guest memory", EFAULT, scene.run(A2, RAM_END - PAGE_SIZE, 2)),
        (
            "pages across both regions",
            EFAULT,
            scene.run(A2, 0, u32::try_from((LOW_BYTES + HIGH_BYTES) / PAGE_SIZE).unwrap()),
        ),
        ("the most pages", EINVAL, scene.run(A2, 0, u32::MAX)),
        ("another page than is known", EEXIST, scene.run(known, gpa, 1)),
    ];
    let mut rows = vec![];
    for (name, errno, run) in runs {
        rows.push(row(&format!("SUPPLY with {name}"), errno, supply(1, &[run])));
        if errno != EEXIST {
            rows.push(row(&format!("SUPPLY with {name} in its second run"), errno, supply(1, &[good, run])));
            let answer = response(1, &scene.pending, PAGE_RESP_SUCCESS, 2);
            let covering = scene.run(A, gpa, 1);
            rows.push(row(&format!("answer with {name}"), errno, bytes(&answer, [covering, run].as_bytes())));
        }
    }
    let counted = |num_runs: u16, runs: &[PageRun]| {
        let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, 1);
        bytes(&Supply { hdr, num_runs: num_runs.into(), ..Supply::default() }, runs.as_bytes())
    };
    let many: Vec<PageRun> =
        (0..=MAX_RUNS).map(|n| scene.run(A2 + u64::from(n) * PAGE_SIZE, gpa, 1)).collect();
    let mut reserved = supply(1, &[good]);
    reserved[28] = 1;
    let list = listed(1, &[good, scene.run(A2 + PAGE_SIZE, scene.free_gpa(1), 1)]);
    let word = |at: usize, word: u64| {
        let mut list = list.clone();
        list[at..at + 8].copy_from_slice(&word.to_le_bytes());
        list
    };
    // Its head is at 32, its entries at 48 and 56.
    rows.extend([
        row("list with va that is unaligned", EINVAL, word(32, UNALIGNED)),
        row("list across the end of the space", EINVAL, word(32, GUEST_VA_END - PAGE_SIZE)),
        row("list whose va overflows", EINVAL, word(32, LAST_PAGE)),
        row("list with a sequence of the future", EINVAL, word(40, 1)),
        row("list with the largest sequence", EINVAL, word(40, u64::MAX)),
        row("list with an unknown flag in an entry", EINVAL, word(56, gpa | 2)),
        row("list with gpa that is unaligned", EINVAL, word(56, gpa | 0x800)),
        row("list with a page beyond guest memory", EFAULT, word(56, RAM_END)),
        row("list with a page in the hole", EFAULT, word(56, LOW_BYTES)),
        row("list with the last page of all", EFAULT, word(56, LAST_PAGE)),
        row("list that contradicts", EEXIST, listed(1, &[scene.run(known, gpa, 1)])),
        row("list without its end", EINVAL, list[..list.len() - 1].to_vec()),
        row("list with more than its end", EINVAL, [&list[..], &[0]].concat()),
        row("list that is no more than a head", EINVAL, list[..48].to_vec()),
        row("list without a head", EINVAL, list[..40].to_vec()),
        row("SUPPLY with an unknown flag", EINVAL, word(24, 3 << 16 | 2)),
    ]);
    rows.extend([
        row("SUPPLY of no runs", EINVAL, supply(1, &[])),
        row("SUPPLY of too many runs", EINVAL, supply(1, &many)),
        row("SUPPLY of the most runs", EINVAL, counted(u16::MAX, &[good])),
        row("SUPPLY of more runs than there are", EINVAL, counted(2, &[good])),
        row("SUPPLY of fewer runs than there are", EINVAL, counted(1, &[good, good])),
        row("SUPPLY with reserved field", EINVAL, reserved),
        row("SUPPLY to a context that never was", ENOENT, supply(99, &[good])),
        row("SUPPLY to a dead context", ENOENT, supply(3, &[good])),
        row("SUPPLY to context 0", ENOENT, supply(0, &[good])),
    ]);
    rows
}

fn bad_answers(scene: &Scene) -> Vec<Row> {
    let gpa = scene.free_gpa(3);
    let run = scene.run(A, gpa, 1);
    let answer = |ctx_id, fault: &FaultRecord, code, runs: &[PageRun]| {
        let num_runs = u16::try_from(runs.len()).unwrap();
        bytes(&response(ctx_id, fault, code, num_runs), runs.as_bytes())
    };
    let (pending, answered) = (&scene.pending, &scene.answered);
    let named = |cookie: u64| with(*pending, |fault| fault.cookie = cookie.into());
    let cookie = pending.cookie.get();
    let many: Vec<PageRun> =
        (0..=MAX_RUNS).map(|n| scene.run(A + u64::from(n) * PAGE_SIZE, gpa, 1)).collect();
    let mut rows = vec![
        row("answer with a repeated cookie", EINVAL, answer(1, answered, PAGE_RESP_SUCCESS, &[run])),
        row("refusal with a repeated cookie", EINVAL, answer(1, answered, PAGE_RESP_INVALID, &[])),
        row("answer by another context", EINVAL, answer(2, pending, PAGE_RESP_SUCCESS, &[run])),
        row("refusal by another context", EINVAL, answer(2, pending, PAGE_RESP_FAILURE, &[])),
        row("answer by a dead context", ENOENT, answer(3, pending, PAGE_RESP_SUCCESS, &[run])),
        row("answer by context 0", ENOENT, answer(0, pending, PAGE_RESP_SUCCESS, &[run])),
        row("answer with an unknown code", EINVAL, answer(1, pending, PAGE_RESP_FAILURE + 1, &[])),
        row("refusal with pages", EINVAL, answer(1, pending, PAGE_RESP_INVALID, &[run])),
        row("failure with pages", EINVAL, answer(1, pending, PAGE_RESP_FAILURE, &[run])),
        row("success without pages", EINVAL, answer(1, pending, PAGE_RESP_SUCCESS, &[])),
        row(
            "success with other pages",
            EINVAL,
            answer(1, pending, PAGE_RESP_SUCCESS, &[scene.run(A + PAGE_SIZE, gpa, 1)]),
        ),
        row(
            "success for a write with a read-only page",
            EINVAL,
            answer(1, pending, PAGE_RESP_SUCCESS, &[with(run, |r| r.flags = RUN_READONLY.into())]),
        ),
        row("answer with too many runs", EINVAL, answer(1, pending, PAGE_RESP_SUCCESS, &many)),
        row(
            "answer with more runs than there are",
            EINVAL,
            bytes(&response(1, pending, 0, 2), run.as_bytes()),
        ),
    ];
    // The generation is in the upper half: neighbours of both halves, and the ends.
    for wrong in [0, cookie + 1, cookie - 1, cookie + (1 << 32), cookie - (1 << 32), !cookie, u64::MAX] {
        let name = format!("answer with unknown cookie {wrong:#x}");
        let fault = named(wrong);
        rows.push(row(&name, EINVAL, answer(1, &fault, PAGE_RESP_SUCCESS, &[run])));
    }
    rows
}

fn request_header(cmd: u32, len: usize) -> ReqHdr {
    ReqHdr { cmd: cmd.into(), len: u32::try_from(len).unwrap().into(), ..ReqHdr::default() }
}

pub fn submit(ctx_id: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let hdr = header(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
    bytes(&CmdSubmit { hdr, size: size.into(), padding: 0.into() }, payload)
}

fn vm_create(dev_id: u32) -> VmCreate {
    let hdr = request_header(SVM_REQ_VM_CREATE, size_of::<VmCreate>());
    VmCreate { hdr, dev_id: dev_id.into(), ..VmCreate::default() }
}

fn vm_ref(cmd: u32, vm_id: u32) -> VmRef {
    VmRef { hdr: request_header(cmd, size_of::<VmRef>()), vm_id: vm_id.into(), reserved: 0.into() }
}

fn vm_bind(vm_id: u32, num_binds: u32, ops: &[BindOp]) -> Vec<u8> {
    let hdr = request_header(SVM_REQ_VM_BIND, size_of::<VmBind>() + size_of_val(ops));
    let bind = VmBind { hdr, vm_id: vm_id.into(), num_binds: num_binds.into(), ..VmBind::default() };
    bytes(&bind, ops.as_bytes())
}

/// A bind of one operation behind its points.
fn waiting_bind(change: impl FnOnce(&mut VmBind), waits: &[FencePoint]) -> Vec<u8> {
    let rest = [waits.as_bytes(), userptr().as_bytes()].concat();
    let bind = VmBind {
        hdr: request_header(SVM_REQ_VM_BIND, size_of::<VmBind>() + rest.len()),
        vm_id: 1.into(),
        num_binds: 1.into(),
        flags: VM_BIND_ASYNC.into(),
        num_waits: u32::try_from(waits.len()).unwrap().into(),
        ..VmBind::default()
    };
    bytes(&with(bind, change), &rest)
}

/// A job of one packet behind its points.
fn waiting_job(waits: &[FencePoint]) -> Vec<u8> {
    let rest = [waits.as_bytes(), nop().as_bytes()].concat();
    let exec = Exec {
        hdr: request_header(SVM_REQ_EXEC, size_of::<Exec>() + rest.len()),
        vm_id: 1.into(),
        num_packets: 1.into(),
        num_waits: u32::try_from(waits.len()).unwrap().into(),
        ..Exec::default()
    };
    bytes(&exec, &rest)
}

fn point(vm_id: u32, ring_idx: u32, seqno: u64) -> FencePoint {
    FencePoint { vm_id: vm_id.into(), ring_idx: ring_idx.into(), seqno: seqno.into() }
}

fn exec(change: impl FnOnce(&mut Exec), packets: &[Packet]) -> Vec<u8> {
    let hdr = request_header(SVM_REQ_EXEC, size_of::<Exec>() + size_of_val(packets));
    let num_packets = u32::try_from(packets.len()).unwrap();
    let exec = Exec { hdr, vm_id: 1.into(), num_packets: num_packets.into(), ..Exec::default() };
    bytes(&with(exec, change), packets.as_bytes())
}

fn userptr() -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: (C + MAPPED).into(),
        range: PAGE_SIZE.into(),
        obj_offset: A2.into(),
        ..BindOp::default()
    }
}

fn nop() -> Packet {
    Packet { opcode: OP_NOP.into(), ..Packet::default() }
}

/// Payloads of one request each that are right in themselves.
pub fn good_payloads(_scene: &Scene) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("VM_CREATE", bytes(&vm_create(1), &[])),
        ("VM_BIND", vm_bind(1, 2, &[userptr(), userptr()])),
        ("EXEC", exec(|_| {}, &[nop(), nop()])),
        ("EXEC that waits", waiting_job(&[point(1, 0, 0), point(1, MAX_RINGS - 1, 0)])),
        ("VM_BIND in turn", waiting_bind(|bind| bind.signal = 1.into(), &[point(1, 0, 0)])),
        ("VM_GET_PROPERTY", bytes(&vm_ref(SVM_REQ_VM_GET_PROPERTY, 1), &[])),
        ("VM_DESTROY", bytes(&vm_ref(SVM_REQ_VM_DESTROY, 2), &[])),
    ]
}

/// What a process may get wrong; all of it as context 1.
pub fn requests(_scene: &Scene) -> Vec<Row> {
    let mut rows = bad_lists();
    let own = |name: &str, errno, payload: Vec<u8>| row(name, errno, submit(1, &payload));
    let create = |change: fn(&mut VmCreate)| bytes(&with(vm_create(1), change), &[]);
    rows.extend([
        own("VM_CREATE on the device after the last", ENOENT, create(|c| c.dev_id = 2.into())),
        own("VM_CREATE on the largest device", ENOENT, create(|c| c.dev_id = u32::MAX.into())),
        own("VM_CREATE where there is one", EEXIST, create(|c| c.dev_id = 0.into())),
        own("VM_CREATE with a flag", EINVAL, create(|c| c.flags = 1.into())),
        own("VM_CREATE with reserved field", EINVAL, create(|c| c.reserved = 1.into())),
    ]);
    for (name, cmd) in [("VM_DESTROY", SVM_REQ_VM_DESTROY), ("VM_GET_PROPERTY", SVM_REQ_VM_GET_PROPERTY)] {
        for (whose, vm_id) in
            [("no GPU VM", 0), ("another context's GPU VM", 2), ("the largest GPU VM", u32::MAX)]
        {
            rows.push(own(&format!("{name} of {whose}"), ENOENT, bytes(&vm_ref(cmd, vm_id), &[])));
        }
        let reserved = with(vm_ref(cmd, 1), |r| r.reserved = 1.into());
        rows.push(own(&format!("{name} with reserved field"), EINVAL, bytes(&reserved, &[])));
    }
    rows.extend(bad_binds());
    rows.extend(bad_jobs());
    rows.extend(bad_points());
    rows
}

/// Payloads that are no list of requests.
fn bad_lists() -> Vec<Row> {
    let own = |name: &str, errno, payload: Vec<u8>| row(name, errno, submit(1, &payload));
    let property = vm_ref(SVM_REQ_VM_GET_PROPERTY, 1);
    let head = |change: fn(&mut ReqHdr)| bytes(&with(property, |p| change(&mut p.hdr)), &[]);
    let good = property.as_bytes();
    let mut fenced = submit(1, &exec(|_| {}, &[nop()]));
    fenced[4..8].copy_from_slice(&VIRTIO_GPU_FLAG_FENCE.to_le_bytes());
    let mut padded = submit(1, good);
    padded[28] = 1;
    let mut longer = submit(1, good);
    longer[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        own("empty payload", EINVAL, vec![]),
        own("unknown request 0", EOPNOTSUPP, head(|h| h.cmd = 0.into())),
        own("unknown request 6", EOPNOTSUPP, head(|h| h.cmd = 6.into())),
        own("unknown request of the largest number", EOPNOTSUPP, head(|h| h.cmd = u32::MAX.into())),
        own("request of length 0", EINVAL, head(|h| h.len = 0.into())),
        own("request shorter than its header", EINVAL, head(|h| h.len = 8.into())),
        own("request of odd length", EINVAL, head(|h| h.len = 20.into())),
        own("request longer than the payload", EINVAL, head(|h| h.len = 32.into())),
        own("request of the greatest length", EINVAL, head(|h| h.len = 0xffff_fff8_u32.into())),
        own("reply at an odd place", EINVAL, head(|h| h.rsp_off = 4.into())),
        own("reply beyond the reply area", EINVAL, head(|h| h.rsp_off = 4096.into())),
        own("reply across the end of the reply area", EINVAL, head(|h| h.rsp_off = 4000.into())),
        own("reply at the farthest place", EINVAL, head(|h| h.rsp_off = 0xffff_fff8_u32.into())),
        own("too many requests", EINVAL, good.repeat(MAX_REQUESTS + 1)),
        own("a good request and half of one", EINVAL, [good, &good[..16]].concat()),
        own("a good request and bytes", EINVAL, [good, &[0; 8]].concat()),
        row("payload of a dead context", ENOENT, submit(3, good)),
        row("payload of context 0", ENOENT, submit(0, good)),
        row("payload with padding", EINVAL, padded),
        row("payload of the greatest length", EINVAL, longer),
        row("fenced job", EOPNOTSUPP, fenced),
    ]
}

fn bad_binds() -> Vec<Row> {
    let op = |change: fn(&mut BindOp)| with(userptr(), change);
    let map = |change: fn(&mut BindOp)| {
        with(userptr(), |op| {
            (op.op, op.obj_offset, op.resource_id) = (BIND_OP_MAP.into(), 0.into(), BLOB.into());
            change(op);
        })
    };
    let unmap = |change: fn(&mut BindOp)| {
        with(userptr(), |op| {
            (op.op, op.obj_offset) = (BIND_OP_UNMAP.into(), 0.into());
            change(op);
        })
    };
    let ops: Vec<(&str, i32, BindOp)> = vec![
        ("unknown op 5", EINVAL, op(|o| o.op = 5.into())),
        ("unknown op of the largest number", EINVAL, op(|o| o.op = u32::MAX.into())),
        ("unknown flag", EINVAL, op(|o| o.flags = 8.into())),
        ("reserved field", EINVAL, op(|o| o.reserved = 1.into())),
        ("second reserved field", EINVAL, op(|o| o.reserved2 = 1.into())),
        ("unaligned address", EINVAL, op(|o| o.addr = (C + 8).into())),
        ("unaligned length", EINVAL, op(|o| o.range = 4097.into())),
        ("no bytes", EINVAL, op(|o| o.range = 0.into())),
        (
            "address that overflows",
            EINVAL,
            op(|o| (o.addr, o.range) = (LAST_PAGE.into(), (2 * PAGE_SIZE).into())),
        ),
        ("address beyond the device's space", EINVAL, op(|o| o.addr = (1 << 48).into())),
        (
            "address across the end of the device's space",
            EINVAL,
            op(|o| {
                (o.addr, o.range) = (((1 << 48) - PAGE_SIZE).into(), (2 * PAGE_SIZE).into());
            }),
        ),
        ("unaligned process address", EINVAL, op(|o| o.obj_offset = UNALIGNED.into())),
        ("process address beyond the space", EINVAL, op(|o| o.obj_offset = GUEST_VA_END.into())),
        (
            "process address that overflows",
            EINVAL,
            op(|o| {
                (o.obj_offset, o.range) = (LAST_PAGE.into(), (2 * PAGE_SIZE).into());
            }),
        ),
        ("process address and a resource", EINVAL, op(|o| o.resource_id = BLOB.into())),
        ("no resource", ENOENT, map(|o| o.resource_id = 99.into())),
        ("resource 0", ENOENT, map(|o| o.resource_id = 0.into())),
        ("an offset that is unaligned", EINVAL, map(|o| o.obj_offset = 8.into())),
        ("an offset beyond the resource", EINVAL, map(|o| o.obj_offset = BLOB_BYTES.into())),
        ("an offset that overflows", EINVAL, map(|o| o.obj_offset = LAST_PAGE.into())),
        ("more than the resource has", EINVAL, map(|o| o.range = (BLOB_BYTES + PAGE_SIZE).into())),
        ("UNMAP and an offset", EINVAL, unmap(|o| o.obj_offset = PAGE_SIZE.into())),
        ("UNMAP and a resource", EINVAL, unmap(|o| o.resource_id = BLOB.into())),
        ("UNMAP and a flag", EINVAL, unmap(|o| o.flags = BIND_READONLY.into())),
        ("UNMAP of nothing", EINVAL, unmap(|o| o.range = 0.into())),
    ];
    let mut rows = vec![];
    for (name, errno, op) in ops {
        rows.push(row(&format!("VM_BIND with {name}"), errno, submit(1, &vm_bind(1, 1, &[op]))));
        let second = vm_bind(1, 2, &[userptr(), op]);
        rows.push(row(&format!("VM_BIND with {name} in its second operation"), errno, submit(1, &second)));
    }
    let many = vec![userptr(); MAX_BINDS as usize + 1];
    rows.extend([
        row("VM_BIND of a resource of another context", EACCES, submit(2, &vm_bind(1, 1, &[map(|_| {})]))),
        row("VM_BIND of nothing", EINVAL, submit(1, &vm_bind(1, 0, &[]))),
        row("VM_BIND of too many", EINVAL, submit(1, &vm_bind(1, MAX_BINDS + 1, &many))),
        row("VM_BIND of more than there are", EINVAL, submit(1, &vm_bind(1, 2, &[userptr()]))),
        row("VM_BIND of the most", EINVAL, submit(1, &vm_bind(1, u32::MAX, &[userptr()]))),
        row("VM_BIND in no GPU VM", ENOENT, submit(1, &vm_bind(0, 1, &[userptr()]))),
        row("VM_BIND in another context's GPU VM", ENOENT, submit(1, &vm_bind(2, 1, &[userptr()]))),
    ]);
    rows
}

/// Nothing was ever promised here.
fn bad_points() -> Vec<Row> {
    let mut rows = vec![];
    let points = [
        ("a point that nobody has promised", EINVAL, point(1, 0, 1)),
        ("the largest point", EINVAL, point(1, MAX_RINGS - 1, u64::MAX)),
        ("a ring too many", EINVAL, point(1, MAX_RINGS, 0)),
        ("no GPU VM", ENOENT, point(0, 0, 0)),
        ("another context's GPU VM", ENOENT, point(2, 0, 0)),
    ];
    for (name, errno, bad) in points {
        let waits = [point(1, 0, 0), bad];
        rows.push(row(&format!("EXEC that waits for {name}"), errno, submit(1, &waiting_job(&waits))));
        let bind = waiting_bind(|_| {}, &waits);
        rows.push(row(&format!("VM_BIND that waits for {name}"), errno, submit(1, &bind)));
    }
    let many = vec![point(1, 0, 0); MAX_WAITS as usize + 1];
    let own = |name: &str, errno, payload: Vec<u8>| row(name, errno, submit(1, &payload));
    let mut fenced = submit(1, &waiting_bind(|_| {}, &[]));
    fenced[4..8].copy_from_slice(&VIRTIO_GPU_FLAG_FENCE.to_le_bytes());
    let more = exec(|e| e.num_waits = 1.into(), &[nop()]);
    rows.extend([
        own("EXEC that waits for too many points", EINVAL, waiting_job(&many)),
        own("VM_BIND that waits for too many points", EINVAL, waiting_bind(|_| {}, &many)),
        own("EXEC of more points than there are", EINVAL, more),
        own("EXEC of the most points", EINVAL, exec(|e| e.num_waits = u32::MAX.into(), &[nop()])),
        own("VM_BIND with an unknown flag", EINVAL, waiting_bind(|b| b.flags = 3.into(), &[])),
        own("VM_BIND with reserved field", EINVAL, waiting_bind(|b| b.reserved = 1.into(), &[])),
        own("VM_BIND on a ring too many", EINVAL, waiting_bind(|b| b.ring_idx = MAX_RINGS.into(), &[])),
        own("VM_BIND at once that waits", EINVAL, waiting_bind(|b| b.flags = 0.into(), &[point(1, 0, 0)])),
        own(
            "VM_BIND at once that promises",
            EINVAL,
            waiting_bind(|b| (b.flags, b.signal) = (0.into(), 1.into()), &[]),
        ),
        own(
            "VM_BIND at once on a ring",
            EINVAL,
            waiting_bind(|b| (b.flags, b.ring_idx) = (0.into(), 1.into()), &[]),
        ),
        own(
            "VM_BIND at once with user data",
            EINVAL,
            waiting_bind(|b| (b.flags, b.user_data) = (0.into(), 1.into()), &[]),
        ),
        row("fenced bind in turn", EOPNOTSUPP, fenced),
    ]);
    rows
}

fn bad_jobs() -> Vec<Row> {
    let own = |name: &str, errno, payload: Vec<u8>| row(name, errno, submit(1, &payload));
    let packet = |change: fn(&mut Packet)| exec(|_| {}, &[nop(), with(nop(), change)]);
    vec![
        own("EXEC of nothing", EINVAL, exec(|_| {}, &[])),
        own("EXEC of too many packets", EINVAL, exec(|_| {}, &vec![nop(); MAX_PACKETS as usize + 1])),
        own("EXEC of more packets than there are", EINVAL, exec(|e| e.num_packets = 2.into(), &[nop()])),
        own("EXEC of the most packets", EINVAL, exec(|e| e.num_packets = u32::MAX.into(), &[nop()])),
        own("EXEC on a ring too many", EINVAL, exec(|e| e.ring_idx = MAX_RINGS.into(), &[nop()])),
        own("EXEC in no GPU VM", ENOENT, exec(|e| e.vm_id = 0.into(), &[nop()])),
        own("EXEC in another context's GPU VM", ENOENT, exec(|e| e.vm_id = 2.into(), &[nop()])),
        own("packet of an unknown opcode", EINVAL, packet(|p| p.opcode = 9.into())),
        own("packet of the largest opcode", EINVAL, packet(|p| p.opcode = u32::MAX.into())),
        own("packet with a flag", EINVAL, packet(|p| p.flags = 1.into())),
        own("packet with reserved field", EINVAL, packet(|p| p.reserved[1] = 1.into())),
        own("packet with an operand that it does not use", EINVAL, packet(|p| p.src = C.into())),
        own(
            "packet with an unaligned operand",
            EINVAL,
            packet(|p| {
                (p.opcode, p.dst, p.len) = (OP_FILL.into(), (C + 4).into(), 8.into());
            }),
        ),
        own(
            "packet with an unaligned length",
            EINVAL,
            packet(|p| {
                (p.opcode, p.dst, p.len) = (OP_FILL.into(), C.into(), 12.into());
            }),
        ),
    ]
}
