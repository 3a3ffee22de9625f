//! Every command and every request with every field at its bad values: the exact errno, and no effect. The table works
//! on good commands whose bytes are changed one field at a time; a last test shows that the good ones are good.

use crate::mock::{A, C, GPA, LIMITS, MEMORY, World, hdr, map, run, unmap};
use virtio_gpu_svm::device::Access;
use virtio_gpu_svm::population::MAX_PREFETCH_PAGES;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{
    CAPSET_SVM, GUEST_VA_END, MAX_BINDS, MAX_BLOB_ENTRIES, MAX_COMMAND_BYTES, MAX_PACKETS, MAX_REQUESTS,
    MAX_RINGS, MAX_RUNS, MAX_WAITS,
};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: u64 = 4096;
const MAX_PAGE: u64 = u64::MAX - 4095;
/// Of the mock devices.
const SPACE_END: u64 = 1 << 40;
/// Contexts: two that live, one that never was, one that is gone.
const MINE: u32 = 1;
const OTHER: u32 = 2;
const NEVER: u32 = 77;
const GONE: u32 = 3;
/// Blobs of four pages: attached to MINE, and to none.
const ATTACHED: u32 = 5;
const LOOSE: u32 = 6;
/// GPU VMs: context MINE has 1 and had 2; context OTHER has 1 and 2.
const VM: u32 = 1;
const FOREIGN: u32 = 2;

/// A world with one of everything.
struct Scene {
    w: World,
    /// A write to C waits for its answer.
    cookie: u64,
    /// Its fault has been answered.
    stale: u64,
    /// Its fault waits, but the guest has not been told.
    untold: u64,
}

fn fetch(w: &World) -> u64 {
    let records = w.records();
    FaultRecord::read_from_bytes(records.last().unwrap()).unwrap().cookie.get()
}

fn scene() -> Scene {
    let w = World::new();
    let (_, asid) = w.mapped(MINE);
    w.mapped(OTHER);
    w.create_vm(OTHER, 1);
    w.create_vm(MINE, 1);
    let vm = VmRef { vm_id: FOREIGN.into(), ..VmRef::default() };
    assert_eq!(w.submit(MINE, SVM_REQ_VM_DESTROY, &vm.as_bytes()[16..]).0, 0);
    w.create_context(GONE);
    w.destroy_context(GONE);
    for id in [ATTACHED, LOOSE] {
        assert_eq!(w.status(&blob(id)), 0);
    }
    assert_eq!(w.status(&resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, MINE, ATTACHED)), 0);
    assert_eq!(w.supply(MINE, &[run(A + 32 * PAGE, GPA, 1, 0)]), 0);
    w.devices[1].retire_all(&w.host);
    w.devices[0].raise(&w.host, asid, C + PAGE, Access::Read);
    let stale = fetch(&w);
    assert_eq!(w.respond(MINE, stale, PAGE_RESP_INVALID, &[]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Write);
    let cookie = fetch(&w);
    w.devices[0].raise(&w.host, asid, C + 2 * PAGE, Access::Read);
    Scene { w, cookie, stale, untold: cookie + 1 }
}

/// All that a refused command must leave as it was. Answers without a fault and refusals are counted, that is all.
fn snapshot(w: &World) -> String {
    let mut contexts = w.guest.contexts();
    for context in &mut contexts {
        context.counters.answers_stale = 0;
        let faults = context.vms.iter_mut().flat_map(|vm| &mut vm.faults);
        faults.for_each(|fault| fault.wait_ns = 0);
    }
    let mut stats = w.host.stats();
    stats.counters.answers_stale = 0;
    let devices: Vec<_> = w
        .devices
        .iter()
        .map(|device| {
            let told = device.told();
            (told.vms.clone(), told.bound.clone(), told.resumed.clone(), told.jobs.clone(), told.unbinds)
        })
        .collect();
    let mut guest = w.guest.status();
    guest.limits.iter_mut().for_each(|limit| (limit.peak, limit.refused) = (0, 0));
    format!("{guest:?}{contexts:?}{stats:?}{devices:?}{}", w.guest.has_events())
}

#[track_caller]
fn refused(w: &World, what: &str, bytes: &[u8], errno: i32) {
    let before = snapshot(w);
    assert_eq!(w.status(bytes), -errno, "{what}");
    assert_eq!(snapshot(w), before, "{what} had an effect");
}

/// The bytes with a field changed.
fn with(bytes: &[u8], offset: usize, field: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[offset..offset + field.len()].copy_from_slice(field);
    bytes
}

/// (field, offset, bad values, errno) of a command; values are as wide as the field.
enum Field {
    U32(&'static str, usize, Vec<u32>, i32),
    U64(&'static str, usize, Vec<u64>, i32),
}
use Field::{U32, U64};

fn each_field(w: &World, command: &str, good: &[u8], fields: &[Field]) {
    for field in fields {
        match field {
            U32(name, at, values, errno) => {
                for value in values {
                    let bytes = with(good, *at, &value.to_le_bytes());
                    refused(w, &format!("{command}.{name} = {value:#x}"), &bytes, *errno);
                }
            }
            U64(name, at, values, errno) => {
                for value in values {
                    let bytes = with(good, *at, &value.to_le_bytes());
                    refused(w, &format!("{command}.{name} = {value:#x}"), &bytes, *errno);
                }
            }
        }
    }
}

/// What is refused of every command alike: cut at any byte, longer, unknown flags, padding of the header.
fn each_shape(w: &World, command: &str, good: &[u8]) {
    for length in 0..good.len() {
        refused(w, &format!("{command} cut at {length}"), &good[..length], EINVAL);
    }
    refused(w, &format!("{command} and a byte"), &[good, &[0]].concat(), EINVAL);
    for bit in 2..32 {
        refused(w, &format!("{command} flag {bit}"), &with(good, 4, &(1_u32 << bit).to_le_bytes()), EINVAL);
    }
    for at in 21..24 {
        refused(w, &format!("{command} padding {at}"), &with(good, at, &[1]), EINVAL);
    }
}

fn no_context() -> Field {
    U32("ctx_id", 16, vec![0, NEVER, GONE, u32::MAX], ENOENT)
}

fn create(ctx_id: u32) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id);
    CtxCreate { hdr, context_init: CAPSET_SVM.into(), ..CtxCreate::default() }.as_bytes().to_vec()
}
fn resource(kind: u32, ctx_id: u32, resource_id: u32) -> Vec<u8> {
    let cmd = CtxResource { hdr: hdr(kind, ctx_id), resource_id: resource_id.into(), padding: 0.into() };
    cmd.as_bytes().to_vec()
}
fn blob_of(resource_id: u32, entries: &[MemEntry], pages: u64) -> Vec<u8> {
    let head = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: resource_id.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        blob_flags: 7.into(),
        nr_entries: (entries.len() as u32).into(),
        blob_id: 0.into(),
        size: (pages * PAGE).into(),
    };
    [head.as_bytes(), entries.as_bytes()].concat()
}
fn entry(addr: u64, pages: u32) -> MemEntry {
    MemEntry { addr: addr.into(), length: (pages * 4096).into(), padding: 0.into() }
}
fn blob(resource_id: u32) -> Vec<u8> {
    blob_of(resource_id, &[entry(GPA, 3), entry(GPA + 0x10_000, 1)], 4)
}
fn supply_of(ctx_id: u32, runs: &[PageRun]) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
    let cmd = Supply { hdr, num_runs: (runs.len() as u16).into(), ..Supply::default() };
    [cmd.as_bytes(), runs.as_bytes()].concat()
}
fn response_of(ctx_id: u32, cookie: u64, code: u32, runs: &[PageRun]) -> Vec<u8> {
    let cmd = PageResponse {
        hdr: hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
        cookie: cookie.into(),
        code: code.into(),
        num_runs: (runs.len() as u16).into(),
        flags: 0.into(),
    };
    [cmd.as_bytes(), runs.as_bytes()].concat()
}
fn hello_of() -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    Hello { hdr, incarnation: 1.into(), version: 0x1_0000.into(), reserved: 0.into() }.as_bytes().to_vec()
}
fn device_of(dev_id: u32) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
    GetDevice { hdr, dev_id: dev_id.into(), reserved: 0.into() }.as_bytes().to_vec()
}
fn invalidate_of(start: u64, length: u64, event: u32) -> Vec<u8> {
    let cmd = Invalidate {
        hdr: hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, MINE),
        start: start.into(),
        length: length.into(),
        event: event.into(),
        reserved: 0.into(),
    };
    cmd.as_bytes().to_vec()
}

/// Fields of a run that stands at `at` in a command.
fn run_fields(at: usize) -> Vec<Field> {
    vec![
        U64("va", at, vec![A + 1, GUEST_VA_END, GUEST_VA_END - PAGE, MAX_PAGE], EINVAL),
        U64("gpa", at + 8, vec![GPA + 8, MAX_PAGE], EINVAL),
        U64("gpa", at + 8, vec![0, GPA - PAGE, GPA + MEMORY - PAGE, GPA + MEMORY, 1 << 46, 1 << 60], EFAULT),
        U32("pages", at + 16, vec![0, u32::MAX], EINVAL),
        U32("pages", at + 16, vec![1 + (MEMORY / PAGE) as u32], EFAULT),
        U32("flags", at + 20, vec![2, 1 << 31], EINVAL),
        U64("as_of", at + 24, vec![1, u64::MAX], EINVAL),
    ]
}

#[test]
fn virtio_gpu_commands() {
    let w = &scene().w;
    let display = hdr(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0).as_bytes().to_vec();
    each_shape(w, "GET_DISPLAY_INFO", &display);

    let hdr_info = hdr(VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0);
    let info = GetCapsetInfo { hdr: hdr_info, ..GetCapsetInfo::default() };
    each_shape(w, "GET_CAPSET_INFO", info.as_bytes());
    each_field(
        w,
        "GET_CAPSET_INFO",
        info.as_bytes(),
        &[U32("index", 24, vec![1, u32::MAX], EINVAL), U32("padding", 28, vec![1], EINVAL)],
    );

    let hdr_get = hdr(VIRTIO_GPU_CMD_GET_CAPSET, 0);
    let get = GetCapset { hdr: hdr_get, capset_id: CAPSET_SVM.into(), capset_version: 1.into() };
    each_shape(w, "GET_CAPSET", get.as_bytes());
    each_field(
        w,
        "GET_CAPSET",
        get.as_bytes(),
        &[U32("id", 24, vec![0, 1, CAPSET_SVM + 1], EINVAL), U32("version", 28, vec![2, u32::MAX], EINVAL)],
    );

    each_shape(w, "CTX_CREATE", &create(9));
    each_field(
        w,
        "CTX_CREATE",
        &create(9),
        &[
            U32("ctx_id", 16, vec![0], EINVAL),
            U32("ctx_id", 16, vec![MINE, OTHER], EEXIST),
            U32("nlen", 24, vec![65, u32::MAX], EINVAL),
            U32("context_init", 28, vec![1, CAPSET_SVM + 1, CAPSET_SVM | 0x100, 1 << 31], EINVAL),
        ],
    );
    let destroy = hdr(VIRTIO_GPU_CMD_CTX_DESTROY, MINE).as_bytes().to_vec();
    each_shape(w, "CTX_DESTROY", &destroy);
    each_field(w, "CTX_DESTROY", &destroy, &[no_context()]);

    // What virtio-gpu has and this device has not, and what nobody has.
    for kind in
        [0, 0x101, 0x103, 0x105, 0x106, 0x10a, 0x10b, 0x10d, 0x204, 0x208, 0x209, 0x300, 0x405, 0x1100]
    {
        refused(w, &format!("command {kind:#x}"), hdr(kind, MINE).as_bytes(), EOPNOTSUPP);
    }
    refused(w, "over-long command", &[create(9), vec![0; MAX_COMMAND_BYTES]].concat(), EINVAL);
}

#[test]
fn resource_commands() {
    let w = &scene().w;
    let unref = resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, ATTACHED);
    each_shape(w, "RESOURCE_UNREF", &unref);
    let no_resource = || U32("resource_id", 24, vec![0, 99, u32::MAX], ENOENT);
    let padding = || U32("padding", 28, vec![1], EINVAL);
    each_field(w, "RESOURCE_UNREF", &unref, &[no_resource(), padding()]);
    for (kind, good) in
        [(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, LOOSE), (VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, ATTACHED)]
    {
        let good = resource(kind, MINE, good);
        each_shape(w, "CTX_*_RESOURCE", &good);
        each_field(w, "CTX_*_RESOURCE", &good, &[no_context(), no_resource(), padding()]);
    }
    let loose = resource(VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, MINE, LOOSE);
    refused(w, "detach of what is not attached", &loose, EACCES);

    let good = blob(7);
    each_shape(w, "CREATE_BLOB", &good);
    let fields = [
        U32("resource_id", 24, vec![0], EINVAL),
        U32("resource_id", 24, vec![ATTACHED, LOOSE], EEXIST),
        U32("blob_mem", 28, vec![0, 2, 3, u32::MAX], EOPNOTSUPP),
        U32("blob_flags", 32, vec![8, 1 << 31], EINVAL),
        U32("nr_entries", 36, vec![0, 1, 3, MAX_BLOB_ENTRIES, MAX_BLOB_ENTRIES + 1, u32::MAX], EINVAL),
        U64("blob_id", 40, vec![1], EINVAL),
        U64("size", 48, vec![0, 1, 3 * PAGE, 5 * PAGE, 4 * PAGE + 1, MAX_PAGE], EINVAL),
        U64("addr", 72, vec![GPA + 1, MAX_PAGE], EINVAL),
        U64("addr", 72, vec![0, GPA - PAGE, GPA + MEMORY, 1 << 46, 1 << 60], EFAULT),
        U32("length", 80, vec![0, 1, 4095], EINVAL),
        U32("length", 80, vec![2 * 4096], EINVAL),
        U32("length", 80, vec![0xffff_f000], EFAULT),
        U32("padding", 84, vec![1], EINVAL),
    ];
    each_field(w, "CREATE_BLOB", &good, &fields);
    refused(w, "blob without entries", &blob_of(7, &[], 0), EINVAL);
    let many = vec![entry(GPA, 1); MAX_BLOB_ENTRIES as usize + 1];
    refused(w, "blob of too many entries", &blob_of(7, &many, many.len() as u64), EINVAL);
    let bad = [entry(GPA, 1), entry(GPA, 1), entry(0, 1)];
    let resp = SvmResp::read_from_bytes(&w.send(&blob_of(7, &bad, 3))).unwrap();
    assert_eq!((resp.status.get(), resp.detail.get()), (-EFAULT, 2));
}

#[test]
fn quotas_of_a_guest() {
    let w = &scene().w;
    for id in 7..5 + LIMITS.resources {
        assert_eq!(w.status(&blob(id)), 0);
    }
    refused(w, "one blob too many", &blob(20), ENOSPC);
    w.records();
    for ctx_id in 10..8 + LIMITS.contexts {
        assert_eq!(w.status(&create(ctx_id)), 0);
    }
    refused(w, "one context too many", &create(50), ENOSPC);
}

#[test]
fn control_commands() {
    let Scene { w, cookie, stale, untold } = &scene();
    each_shape(w, "HELLO", &hello_of());
    let fields = [
        U32("ctx_id", 16, vec![MINE], EINVAL),
        U64("incarnation", 24, vec![0], EINVAL),
        U32("version", 32, vec![0, 1, 0xffff, 0x2_0000, u32::MAX], EOPNOTSUPP),
        U32("reserved", 36, vec![1], EINVAL),
    ];
    each_field(w, "HELLO", &hello_of(), &fields);

    each_shape(w, "GET_DEVICE", &device_of(0));
    let fields = [
        U32("ctx_id", 16, vec![MINE], EINVAL),
        U32("dev_id", 24, vec![2, u32::MAX], ENOENT),
        U32("reserved", 28, vec![1], EINVAL),
    ];
    each_field(w, "GET_DEVICE", &device_of(0), &fields);

    let supply = supply_of(MINE, &[run(A, GPA, 2, 0), run(A + 8 * PAGE, GPA, 2, 0)]);
    each_shape(w, "SUPPLY", &supply);
    let fields = [
        no_context(),
        U32(
            "num_runs, flags",
            24,
            vec![0, 1, 3, MAX_RUNS, MAX_RUNS + 1, 0xffff, 2 << 16 | 2, u32::MAX],
            EINVAL,
        ),
        U32("reserved", 28, vec![1], EINVAL),
    ];
    each_field(w, "SUPPLY", &supply, &fields);
    each_field(w, "SUPPLY", &supply, &run_fields(64));
    refused(w, "SUPPLY of nothing", &supply_of(MINE, &[]), EINVAL);
    let most = vec![run(A, GPA, 1, 0); MAX_RUNS as usize + 1];
    refused(w, "SUPPLY of too many runs", &supply_of(MINE, &most), EINVAL);
    let known = run(A + 32 * PAGE, GPA + PAGE, 1, 0);
    refused(w, "SUPPLY that contradicts", &supply_of(MINE, &[known]), EEXIST);

    let answer = response_of(MINE, *cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 2, 0)]);
    each_shape(w, "PAGE_RESPONSE", &answer);
    let fields = [
        no_context(),
        U32("ctx_id", 16, vec![OTHER], EINVAL),
        U64("cookie", 24, vec![0, 1, *stale, *untold, *cookie + 2, u64::MAX], EINVAL),
        U32("code", 32, vec![3, u32::MAX], EINVAL),
        // Codes that carry no runs.
        U32("code", 32, vec![PAGE_RESP_INVALID, PAGE_RESP_FAILURE], EINVAL),
        U32("num_runs, flags", 36, vec![0, 2, MAX_RUNS, MAX_RUNS + 1, 0xffff, 2 << 16 | 1, u32::MAX], EINVAL),
        // Beside the page that was asked for, or without the right.
        U64("va", 40, vec![A + PAGE, A - 2 * PAGE], EINVAL),
        U32("flags", 60, vec![RUN_READONLY], EINVAL),
    ];
    each_field(w, "PAGE_RESPONSE", &answer, &fields);
    each_field(w, "PAGE_RESPONSE", &answer, &run_fields(40));
    let empty = response_of(MINE, *cookie, PAGE_RESP_SUCCESS, &[]);
    refused(w, "SUCCESS without the page", &empty, EINVAL);
    let code_only = response_of(MINE, *stale, PAGE_RESP_INVALID, &[]);
    refused(w, "second answer", &code_only, EINVAL);
    let untold = response_of(MINE, *untold, PAGE_RESP_INVALID, &[]);
    refused(w, "answer to what was never told", &untold, EINVAL);

    let inval = invalidate_of(A, 2 * PAGE, INVAL_UNMAP);
    each_shape(w, "INVALIDATE", &inval);
    let fields = [
        no_context(),
        U64("start", 24, vec![A + 1, GUEST_VA_END, GUEST_VA_END - PAGE, MAX_PAGE], EINVAL),
        U64("length", 32, vec![0, 1, PAGE + 1, GUEST_VA_END, MAX_PAGE, u64::MAX], EINVAL),
        U32("event", 40, vec![INVAL_RELEASE, 5, u32::MAX], EINVAL),
        U32("reserved", 44, vec![1], EINVAL),
    ];
    each_field(w, "INVALIDATE", &inval, &fields);
    refused(w, "RELEASE of a range", &invalidate_of(0, PAGE, INVAL_RELEASE), EINVAL);
    refused(w, "RELEASE from an address", &invalidate_of(PAGE, 0, INVAL_RELEASE), EINVAL);
}

#[test]
fn control_commands_need_a_hello() {
    let w = World::new();
    w.guest.reset();
    let commands = [
        device_of(0),
        supply_of(MINE, &[run(A, GPA, 1, 0)]),
        response_of(MINE, 1, PAGE_RESP_INVALID, &[]),
        invalidate_of(A, PAGE, INVAL_UNMAP),
    ];
    for command in commands {
        for length in size_of::<CtrlHdr>()..=command.len() {
            refused(&w, "command before HELLO", &command[..length], EPIPE);
        }
    }
}

#[test]
fn dead_incarnation_owns_nothing() {
    let Scene { w, cookie, .. } = &scene();
    w.hello(2);
    let answer = response_of(MINE, *cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]);
    refused(w, "answer of an earlier life", &answer, ENOENT);
    refused(w, "blob of an earlier life", &resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, ATTACHED), ENOENT);
    assert_eq!(w.status(&create(MINE)), 0);
    refused(w, "answer to the next context of that id", &answer, EINVAL);
    refused(w, "GPU VM of an earlier life", &submit_of(MINE, &property(VM)), ENOENT);
}

// Requests.

fn submit_of(ctx_id: u32, payload: &[u8]) -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
    let cmd = CmdSubmit { hdr, size: (payload.len() as u32).into(), padding: 0.into() };
    [cmd.as_bytes(), payload].concat()
}
/// A request with its length filled in.
fn request(cmd: u32, fixed: &[u8], list: &[u8]) -> Vec<u8> {
    let len = (fixed.len() + list.len()) as u32;
    let head = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
    [head.as_bytes(), &fixed[16..], list].concat()
}
fn vm_create(dev_id: u32) -> Vec<u8> {
    let body = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
    request(SVM_REQ_VM_CREATE, body.as_bytes(), &[])
}
fn vm_destroy(vm_id: u32) -> Vec<u8> {
    let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
    request(SVM_REQ_VM_DESTROY, body.as_bytes(), &[])
}
fn property(vm_id: u32) -> Vec<u8> {
    let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
    request(SVM_REQ_VM_GET_PROPERTY, body.as_bytes(), &[])
}
fn vm_bind(ops: &[BindOp]) -> Vec<u8> {
    vm_bind_with(0, &[], ops)
}
fn vm_bind_with(flags: u32, waits: &[FencePoint], ops: &[BindOp]) -> Vec<u8> {
    let body = VmBind {
        vm_id: VM.into(),
        num_binds: (ops.len() as u32).into(),
        flags: flags.into(),
        num_waits: (waits.len() as u32).into(),
        ..VmBind::default()
    };
    request(SVM_REQ_VM_BIND, body.as_bytes(), &[waits.as_bytes(), ops.as_bytes()].concat())
}
fn exec(packets: usize) -> Vec<u8> {
    exec_with(0, 0, &[], packets)
}
fn exec_with(ring_idx: u32, signal: u64, waits: &[FencePoint], packets: usize) -> Vec<u8> {
    let body = Exec {
        vm_id: VM.into(),
        ring_idx: ring_idx.into(),
        num_packets: (packets as u32).into(),
        num_waits: (waits.len() as u32).into(),
        signal: signal.into(),
        ..Exec::default()
    };
    let packets = vec![Packet::default(); packets];
    request(SVM_REQ_EXEC, body.as_bytes(), &[waits.as_bytes(), packets.as_bytes()].concat())
}
fn point(vm_id: u32, ring_idx: u32, seqno: u64) -> FencePoint {
    FencePoint { vm_id: vm_id.into(), ring_idx: ring_idx.into(), seqno: seqno.into() }
}
fn map_blob(resource_id: u32) -> BindOp {
    let op = map(C + 0x10_0000, PAGE, 2);
    BindOp { op: BIND_OP_MAP.into(), resource_id: resource_id.into(), ..op }
}

/// Where a request begins in its submission.
const AT: usize = size_of::<CmdSubmit>();

/// What is refused of every request alike.
fn each_request_shape(w: &World, name: &str, good: &[u8]) {
    let whole = submit_of(MINE, good);
    each_shape(w, name, &whole);
    for length in 0..good.len() {
        refused(w, &format!("payload of {name} cut at {length}"), &submit_of(MINE, &good[..length]), EINVAL);
    }
    // Shorter and longer in its own words.
    for len in (0..good.len() + 8).step_by(4).filter(|len| *len != good.len()) {
        let mut bytes = with(good, 4, &(len as u32).to_le_bytes());
        bytes.resize(len.max(16), 0);
        refused(w, &format!("{name} of {len} bytes"), &submit_of(MINE, &bytes), EINVAL);
    }
    let fields = [
        no_context(),
        U32("size", 24, vec![0, u32::MAX, MAX_COMMAND_BYTES as u32 + 1], EINVAL),
        U32("padding", 28, vec![1], EINVAL),
        U32("cmd", AT, vec![0, 6, u32::MAX], EOPNOTSUPP),
        U32("len", AT + 4, vec![0, 8, 15, 17, u32::MAX, u32::MAX - 7], EINVAL),
        // Unaligned, over the end of the room, far beyond it.
        U32("rsp_off", AT + 12, vec![1, 4, 4096 - 48 - 8, 4096, u32::MAX - 7], EINVAL),
    ];
    each_field(w, name, &whole, &fields);
    // Without room for a reply nothing is done.
    for room in 0..size_of::<SvmResp>() + size_of::<RspHdr>() {
        let (before, mut response) = (snapshot(w), Vec::new());
        w.guest.control(&whole, &mut response, room);
        assert!(response.len() <= room);
        assert_eq!(snapshot(w), before, "{name} with room for {room} bytes");
    }
}

fn no_vm() -> Field {
    U32("vm_id", AT + 16, vec![0, FOREIGN, 99, u32::MAX], ENOENT)
}

#[test]
fn vm_requests() {
    let w = &scene().w;
    each_request_shape(w, "VM_CREATE", &vm_create(1));
    let fields = [
        U32("dev_id", AT + 16, vec![2, u32::MAX], ENOENT),
        U32("dev_id", AT + 16, vec![0], EEXIST),
        U32("flags", AT + 20, vec![1], EINVAL),
        U64("reserved", AT + 24, vec![1], EINVAL),
    ];
    each_field(w, "VM_CREATE", &submit_of(MINE, &vm_create(1)), &fields);
    for (name, good) in [("VM_DESTROY", vm_destroy(VM)), ("VM_GET_PROPERTY", property(VM))] {
        each_request_shape(w, name, &good);
        let fields = [no_vm(), U32("reserved", AT + 20, vec![1], EINVAL)];
        each_field(w, name, &submit_of(MINE, &good), &fields);
    }
}

#[test]
fn bind_requests() {
    let w = &scene().w;
    let (first, second) = (map(C + 0x20_0000, A, 1), map(C + 0x30_0000, A, 2));
    let good = vm_bind(&[first, second]);
    each_request_shape(w, "VM_BIND", &good);
    let op = AT + size_of::<VmBind>() + 48;
    let whole = submit_of(MINE, &good);
    let fields = [
        no_vm(),
        U32("num_binds", AT + 20, vec![0, 1, 3, MAX_BINDS, MAX_BINDS + 1, u32::MAX], EINVAL),
        U32("flags", AT + 24, vec![2, 1 << 31, u32::MAX], EINVAL),
        // Without ASYNC there is neither a ring nor a point.
        U32("ring_idx", AT + 28, vec![1, MAX_RINGS, u32::MAX], EINVAL),
        U32("num_waits", AT + 32, vec![1, MAX_WAITS, MAX_WAITS + 1, u32::MAX], EINVAL),
        U32("reserved", AT + 36, vec![1], EINVAL),
        U64("user_data", AT + 40, vec![1, u64::MAX], EINVAL),
        U64("signal", AT + 48, vec![1, u64::MAX], EINVAL),
    ];
    each_field(w, "VM_BIND", &whole, &fields);
    let waiting = vm_bind_with(0, &[point(VM, 0, 0)], &[first, second]);
    refused(w, "VM_BIND that waits", &submit_of(MINE, &waiting), EINVAL);
    // Each is wrong in its second operation: the first must not stand.
    let fields = [
        U32("op", op, vec![3, 4, u32::MAX], EINVAL),
        U32("flags", op + 4, vec![BIND_NULL, BIND_NULL | BIND_IMMEDIATE, 1 << 3, 1 << 15, 1 << 31], EINVAL),
        U32("flags", op + 4, vec![BIND_EXEC], EOPNOTSUPP),
        U64("addr", op + 8, vec![C + 1, SPACE_END, SPACE_END - PAGE, 1 << 57, MAX_PAGE], EINVAL),
        U64("range", op + 16, vec![0, 1, PAGE + 8, SPACE_END, MAX_PAGE, u64::MAX], EINVAL),
        U64("obj_offset", op + 24, vec![A + 1, GUEST_VA_END, GUEST_VA_END - PAGE, MAX_PAGE], EINVAL),
        U32("resource_id", op + 32, vec![ATTACHED], EINVAL),
        U32("reserved", op + 36, vec![1], EINVAL),
        U64("reserved2", op + 40, vec![1], EINVAL),
    ];
    each_field(w, "MAP_USERPTR", &whole, &fields);

    let blob = submit_of(MINE, &vm_bind(&[first, map_blob(ATTACHED)]));
    let fields = [
        U32("resource_id", op + 32, vec![LOOSE], EACCES),
        U32("resource_id", op + 32, vec![0, 99], ENOENT),
        U64("obj_offset", op + 24, vec![1, 3 * PAGE, 4 * PAGE, MAX_PAGE], EINVAL),
        U64("range", op + 16, vec![4 * PAGE], EINVAL),
    ];
    each_field(w, "MAP", &blob, &fields);
    refused(w, "MAP of another's blob", &with(&blob, 16, &OTHER.to_le_bytes()), EACCES);

    let unmapping = submit_of(MINE, &vm_bind(&[first, unmap(C, 2)]));
    let fields = [
        U32("flags", op + 4, vec![BIND_READONLY], EINVAL),
        U64("obj_offset", op + 24, vec![PAGE], EINVAL),
        U32("resource_id", op + 32, vec![ATTACHED], EINVAL),
    ];
    each_field(w, "UNMAP", &unmapping, &fields);

    let many: Vec<_> = (0..LIMITS.mappings.into()).map(|n| map(C + (n + 1) * 0x10_0000, A, 1)).collect();
    refused(w, "one mapping too many", &submit_of(MINE, &vm_bind(&many)), ENOSPC);
    let most = vec![first; MAX_BINDS as usize + 1];
    refused(w, "too many binds", &submit_of(MINE, &vm_bind(&most)), EINVAL);
    let nothing = vm_bind(&[]);
    refused(w, "no binds", &submit_of(MINE, &nothing), EINVAL);

    let bad = BindOp { op: 9.into(), ..second };
    let response = w.send(&submit_of(MINE, &[property(VM), vm_bind(&[first, bad])].concat()));
    let (resp, rest) = SvmResp::read_from_prefix(&response).unwrap();
    assert_eq!((resp.status.get(), resp.detail.get()), (-EINVAL, 1), "the request");
    let (reply, _) = RspHdr::read_from_prefix(rest).unwrap();
    assert_eq!((reply.ret.get(), reply.detail.get()), (-EINVAL, 1), "the operation");
}

#[test]
fn bind_requests_for_pages_before_their_first_touch() {
    let w = &scene().w;
    let (first, second) = (map(C + 0x20_0000, A, 1), map(C + 0x30_0000, A, 2));
    let op = AT + size_of::<VmBind>() + 48;
    let prefetch = submit_of(MINE, &vm_bind(&[first, BindOp { op: BIND_OP_PREFETCH.into(), ..unmap(C, 2) }]));
    let too_many = (MAX_PREFETCH_PAGES + 1) * PAGE;
    let fields = [
        U32("flags", op + 4, vec![BIND_READONLY, BIND_IMMEDIATE], EINVAL),
        U64("addr", op + 8, vec![C + 1, SPACE_END], EINVAL),
        U64("range", op + 16, vec![0, 1, too_many, u64::MAX], EINVAL),
        U64("obj_offset", op + 24, vec![PAGE], EINVAL),
        U32("resource_id", op + 32, vec![ATTACHED], EINVAL),
    ];
    each_field(w, "PREFETCH", &prefetch, &fields);
    let half = MAX_PREFETCH_PAGES / 2 + 1;
    let immediate = BindOp { flags: BIND_IMMEDIATE.into(), ..map(C + 0x20_0000, A, half) };
    let two = [immediate, BindOp { addr: 0.into(), ..immediate }];
    refused(w, "more than may be made resident at once", &submit_of(MINE, &vm_bind(&two)), EINVAL);
    let null = BindOp { op: BIND_OP_MAP.into(), flags: BIND_NULL.into(), obj_offset: 0.into(), ..second };
    let null = submit_of(MINE, &vm_bind(&[first, null]));
    let fields = [
        U32("flags", op + 4, vec![BIND_NULL | BIND_CPU_ADDR_MIRROR, BIND_NULL | BIND_READONLY], EINVAL),
        U32("flags", op + 4, vec![BIND_NULL | BIND_EXEC], EOPNOTSUPP),
        U64("obj_offset", op + 24, vec![PAGE], EINVAL),
        U32("resource_id", op + 32, vec![ATTACHED], EINVAL),
    ];
    each_field(w, "NULL", &null, &fields);
}

#[test]
fn exec_requests() {
    let w = &scene().w;
    each_request_shape(w, "EXEC", &exec(2));
    let whole = submit_of(MINE, &exec(2));
    let fields = [
        no_vm(),
        U32("ring_idx", AT + 20, vec![MAX_RINGS, u32::MAX], EINVAL),
        U32("num_packets", AT + 24, vec![0, 1, 3, MAX_PACKETS, MAX_PACKETS + 1, u32::MAX], EINVAL),
        U32("num_waits", AT + 28, vec![1, MAX_WAITS, MAX_WAITS + 1, u32::MAX], EINVAL),
    ];
    each_field(w, "EXEC", &whole, &fields);
    refused(w, "EXEC of nothing", &submit_of(MINE, &exec(0)), EINVAL);
    refused(w, "EXEC of too many", &submit_of(MINE, &exec(MAX_PACKETS as usize + 1)), EINVAL);
    refused(w, "EXEC fenced", &with(&whole, 4, &VIRTIO_GPU_FLAG_FENCE.to_le_bytes()), EOPNOTSUPP);
    for _ in 0..LIMITS.jobs {
        assert_eq!(w.status(&whole), 0);
    }
    refused(w, "one job too many", &whole, ENOSPC);
}

/// Fields of a point that stands at `at` in a command, of a GPU VM on whose ring 3 point 7 was promised last.
fn point_fields(at: usize) -> Vec<Field> {
    vec![
        U32("wait's vm_id", at, vec![0, FOREIGN, 99, u32::MAX], ENOENT),
        U32("wait's ring_idx", at + 4, vec![0, 2, MAX_RINGS - 1, MAX_RINGS, u32::MAX], EINVAL),
        U64("wait's seqno", at + 8, vec![8, 1 << 32, u64::MAX], EINVAL),
    ]
}

#[test]
fn points() {
    let w = &scene().w;
    let with_points = |signal: u64, waits: &[FencePoint]| exec_with(3, signal, waits, 1);
    assert_eq!(w.status(&submit_of(MINE, &with_points(7, &[]))), 0);
    // The second wait is wrong: what is behind it would be good.
    let waits = [point(VM, 3, 7), point(VM, 3, 6), point(VM, 3, 0)];
    let exec = with_points(9, &waits);
    let second = AT + size_of::<Exec>() + size_of::<FencePoint>();
    each_request_shape(w, "EXEC that waits", &exec);
    let whole = submit_of(MINE, &exec);
    each_field(w, "EXEC that waits", &whole, &point_fields(second));
    let backwards = || U64("signal", AT + 40, vec![1, 6, 7], EINVAL);
    each_field(w, "EXEC that waits", &whole, &[backwards()]);

    let ops = [map(C + 0x20_0000, A, 1), map(C + 0x30_0000, A, 2)];
    let bind = with(&vm_bind_with(VM_BIND_ASYNC, &waits, &ops), 28, &3_u32.to_le_bytes());
    let second = AT + size_of::<VmBind>() + size_of::<FencePoint>();
    each_request_shape(w, "VM_BIND in turn", &bind);
    let whole = submit_of(MINE, &bind);
    each_field(w, "VM_BIND in turn", &whole, &point_fields(second));
    let fields = [
        no_vm(),
        U32("num_binds", AT + 20, vec![0, 1, 3, MAX_BINDS, MAX_BINDS + 1, u32::MAX], EINVAL),
        U32("flags", AT + 24, vec![0, 2, 3, 1 << 31, u32::MAX], EINVAL),
        U32("ring_idx", AT + 28, vec![MAX_RINGS, u32::MAX], EINVAL),
        U32("num_waits", AT + 32, vec![0, 2, 4, MAX_WAITS, MAX_WAITS + 1, u32::MAX], EINVAL),
        U32("reserved", AT + 36, vec![1], EINVAL),
        U64("signal", AT + 48, vec![1, 6, 7], EINVAL),
    ];
    each_field(w, "VM_BIND in turn", &whole, &fields);
    refused(w, "VM_BIND in turn, fenced", &with(&whole, 4, &VIRTIO_GPU_FLAG_FENCE.to_le_bytes()), EOPNOTSUPP);
    // Its operations are looked at when it is submitted.
    let op = second + 2 * size_of::<FencePoint>() + size_of::<BindOp>();
    let fields = [
        U32("op", op, vec![9, u32::MAX], EINVAL),
        U64("addr", op + 8, vec![C + 1, SPACE_END, MAX_PAGE], EINVAL),
        U32("reserved", op + 36, vec![1], EINVAL),
    ];
    each_field(w, "VM_BIND in turn", &whole, &fields);

    let most = vec![point(VM, 3, 7); MAX_WAITS as usize];
    let more = [&most[..], &most[..1]].concat();
    refused(w, "EXEC that waits for too many", &submit_of(MINE, &with_points(0, &more)), EINVAL);
    let bad = [point(VM, 3, 7), point(VM, 3, 8)];
    let response = w.send(&submit_of(MINE, &with_points(0, &bad)));
    let (_, reply) = SvmResp::read_from_prefix(&response).unwrap();
    let (reply, _) = RspHdr::read_from_prefix(reply).unwrap();
    assert_eq!((reply.ret.get(), reply.detail.get()), (-EINVAL, 1), "the wait");
    assert_eq!(w.status(&submit_of(MINE, &with_points(0, &most))), 0);
    assert_eq!(w.status(&whole), 0);
}

#[test]
fn payloads() {
    let w = &scene().w;
    refused(w, "empty payload", &submit_of(MINE, &[]), EINVAL);
    let many = vec![vm_create(1); MAX_REQUESTS + 1].concat();
    refused(w, "too many requests", &submit_of(MINE, &many), EINVAL);
    // All headers are looked at before the first request is carried out.
    refused(
        w,
        "good request, then half a one",
        &submit_of(MINE, &[&vm_create(1)[..], &[0; 8]].concat()),
        EINVAL,
    );
}

#[test]
fn dead_gpu_vm() {
    let Scene { w, cookie, .. } = &scene();
    assert_eq!(w.respond(MINE, *cookie, PAGE_RESP_FAILURE, &[]), 0);
    w.records();
    refused(w, "MAP_USERPTR", &submit_of(MINE, &vm_bind(&[map(C, A, 1)])), EPIPE);
    refused(w, "MAP", &submit_of(MINE, &vm_bind(&[map_blob(ATTACHED)])), EPIPE);
    refused(w, "EXEC", &submit_of(MINE, &exec(1)), EPIPE);
    let mapping = vm_bind_with(VM_BIND_ASYNC, &[], &[unmap(C, 1), map(C, A, 1)]);
    refused(w, "MAP_USERPTR in turn", &submit_of(MINE, &mapping), EPIPE);
    assert_eq!(w.status(&submit_of(MINE, &vm_bind(&[unmap(C, 1)]))), 0);
    assert_eq!(w.status(&submit_of(MINE, &vm_bind_with(VM_BIND_ASYNC, &[], &[unmap(C, 1)]))), 0);
    assert_eq!(w.status(&submit_of(MINE, &property(VM))), 0);
    assert_eq!(w.status(&submit_of(MINE, &vm_destroy(VM))), 0);
}

/// Bytes that are counted but not asked for do not come from anywhere else: what no reply covers is zero.
#[test]
fn space_between_replies_is_zero() {
    let w = &scene().w;
    let far = with(&property(VM), 12, &1024_u32.to_le_bytes());
    let response = w.send(&submit_of(MINE, &far));
    let area = &response[size_of::<SvmResp>()..];
    assert_eq!(area.len(), 1024 + size_of::<VmProperty>());
    assert!(area[..1024].iter().all(|byte| *byte == 0));
}

/// Else the table would prove nothing.
#[test]
fn good_commands_are_carried_out() {
    let cookie = scene().cookie;
    let commands = [
        hdr(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0).as_bytes().to_vec(),
        create(9),
        hdr(VIRTIO_GPU_CMD_CTX_DESTROY, MINE).as_bytes().to_vec(),
        resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, ATTACHED),
        resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, MINE, LOOSE),
        resource(VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, MINE, ATTACHED),
        blob(7),
        hello_of(),
        device_of(0),
        supply_of(MINE, &[run(A, GPA, 2, 0), run(A + 8 * PAGE, GPA, 2, 0)]),
        supply_of(MINE, &vec![run(A, GPA, 1, 0); MAX_RUNS as usize]),
        response_of(MINE, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 2, 0)]),
        response_of(MINE, cookie, PAGE_RESP_INVALID, &[]),
        invalidate_of(A, 2 * PAGE, INVAL_UNMAP),
        invalidate_of(0, 0, INVAL_RELEASE),
        submit_of(MINE, &vm_create(1)),
        submit_of(MINE, &vm_destroy(VM)),
        submit_of(MINE, &property(VM)),
        submit_of(MINE, &vm_bind(&[map(C + 0x20_0000, A, 1), map(C + 0x30_0000, A, 2)])),
        submit_of(MINE, &vm_bind(&[map_blob(ATTACHED)])),
        submit_of(MINE, &vm_bind(&vec![unmap(C, 2); MAX_BINDS as usize])),
        submit_of(MINE, &exec(2)),
        submit_of(MINE, &exec_with(MAX_RINGS - 1, u64::MAX, &[point(VM, MAX_RINGS - 1, 0)], 1)),
        submit_of(MINE, &vm_bind_with(VM_BIND_ASYNC, &[], &[map(C + 0x20_0000, A, 1)])),
        submit_of(MINE, &exec(MAX_PACKETS as usize)),
        submit_of(MINE, &vec![property(VM); MAX_REQUESTS].concat()),
    ];
    for command in commands {
        let scene = scene();
        let response = scene.w.send(&command);
        let (head, _) = CtrlHdr::read_from_prefix(&response).unwrap();
        assert!(matches!(head.kind.get(), 0x1100..=0x1106), "{:?} of {:?}", head, &command[..24]);
    }
}
