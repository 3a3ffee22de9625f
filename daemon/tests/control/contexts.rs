//! What operators see of contexts and devices: a guest's driver makes them with commands of the protocol.

use crate::device::{Idle, RESIDENT};
use crate::harness::{LIMITS, Server};
use daemon::control::Options;
use serde_json::json;
use std::process::Command;
use std::sync::Arc;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::{Access, Asid, Events, Fault, JobId, LedgerEntry, StopId, VmLabel};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::protocol::control::{Hello, VIRTIO_GPU_CMD_SVM_HELLO};
use virtio_gpu_svm::protocol::gpu::{
    CmdSubmit, CtrlHdr, CtxCreate, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_SUBMIT_3D,
    VIRTIO_GPU_RESP_OK_NODATA,
};
use virtio_gpu_svm::protocol::request::{
    BIND_OP_MAP_USERPTR, BIND_READONLY, BindOp, ReqHdr, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, VmBind, VmCreate,
};
use virtio_gpu_svm::protocol::{CAPSET_SVM, MAX_RESPONSE_BYTES, VERSION_MAJOR};
use zerocopy::{FromBytes, IntoBytes};

const CTX_ID: u32 = 5;
const A: u64 = 0x7f00_0000_0000;
const C: u64 = 0x4000_0000;
const LENGTH: u64 = 0x3000;

struct Deaf;

impl EventPort for Deaf {
    fn ready(&self) {}
}

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

fn command(guest: &Arc<Guest>, bytes: &[u8]) {
    let mut response = Vec::new();
    guest.control(bytes, &mut response, MAX_RESPONSE_BYTES);
    let (hdr, _) = CtrlHdr::read_from_prefix(&response).unwrap();
    assert_eq!(hdr.kind.get(), VIRTIO_GPU_RESP_OK_NODATA, "{response:?}");
}

fn submit(guest: &Arc<Guest>, payload: &[u8]) {
    let size = u32::try_from(payload.len()).unwrap().into();
    let submit = CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, CTX_ID), size, ..CmdSubmit::default() };
    command(guest, &[submit.as_bytes(), payload].concat());
}

fn req<T>(cmd: u32, extra: usize) -> ReqHdr {
    let len = u32::try_from(size_of::<T>() + extra).unwrap().into();
    ReqHdr { cmd: cmd.into(), len, ..ReqHdr::default() }
}

/// A daemon with two devices and guest `vm0`, whose context has a GPU VM on each with one mapping A..B -> C..D.
fn daemon_with_context() -> (Server, Arc<Guest>) {
    let label = VmLabel { guest: "vm0".into(), ctx_id: CTX_ID, generation: 1 };
    let entry = LedgerEntry { label, asid: Asid(9), page: C >> 12, access: Access::Write };
    let devices = vec![Idle::start("gpu0", vec![entry]), Idle::start("gpu1", Vec::new())];
    let server = Server::start_on(devices, Options::default());
    server.client().result("guest.add", json!({"name": "vm0", "socket": server.guest_socket("vm0.sock")}));
    // The VMM's session, without the VMM.
    let guest =
        server.registry.host().open_guest("vm0", daemon::limits::of(&LIMITS), &[0, 1], Arc::new(Deaf));
    let hello = Hello {
        hdr: hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0),
        incarnation: 1.into(),
        version: (u32::from(VERSION_MAJOR) << 16).into(),
        ..Hello::default()
    };
    command(&guest, hello.as_bytes());
    let mut create = CtxCreate {
        hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, CTX_ID),
        nlen: 4.into(),
        context_init: CAPSET_SVM.into(),
        ..CtxCreate::default()
    };
    create.debug_name[..4].copy_from_slice(b"a\x1bpp");
    command(&guest, create.as_bytes());
    for (dev_id, vm_id) in [(0, 1), (1, 2)] {
        let hdr = req::<VmCreate>(SVM_REQ_VM_CREATE, 0);
        submit(&guest, VmCreate { hdr, dev_id: dev_id.into(), ..VmCreate::default() }.as_bytes());
        let bind = VmBind {
            hdr: req::<VmBind>(SVM_REQ_VM_BIND, size_of::<BindOp>()),
            vm_id: vm_id.into(),
            num_binds: 1.into(),
            ..VmBind::default()
        };
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            flags: BIND_READONLY.into(),
            addr: C.into(),
            range: LENGTH.into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        submit(&guest, &[bind.as_bytes(), op.as_bytes()].concat());
    }
    (server, guest)
}

#[test]
fn context_list_counts_and_get_tells_mappings() {
    let (server, _guest) = daemon_with_context();
    let mut client = server.client();
    let listed = client.result("context.list", json!({"guest": "vm0"}));
    assert_eq!(listed, client.result("context.list", json!({})));
    let row = &listed["contexts"][0];
    assert_eq!((&row["guest"], &row["ctx_id"]), (&json!("vm0"), &json!(CTX_ID)));
    assert_eq!(row["resident_pages"], 2 * RESIDENT);
    assert_eq!(row["vms"][1]["device"], 1);
    assert_eq!(row["vms"][1]["mappings"], 1);
    assert_eq!(row["counters"]["faults_raised"], 0);
    let context = client.result("context.get", json!({"guest": "vm0", "ctx_id": CTX_ID}));
    let mapping = json!({
        "gpu_start": C, "gpu_end": C + LENGTH, "kind": "userptr", "cpu_start": A, "cpu_end": A + LENGTH,
        "resource_id": null, "offset": null, "readonly": true, "resident_pages": RESIDENT,
    });
    assert_eq!(context["vms"][0]["mappings"], json!([mapping]));
    assert_eq!(context["vms"][0]["resident_pages"], RESIDENT);
    assert_eq!(client.result("stats.get", json!({}))["gpu_vms"], 2);
    let missing = client.error("context.get", json!({"guest": "vm0", "ctx_id": CTX_ID + 1}));
    assert_eq!(missing, (-32000, "context-not-found".into()));
}

#[test]
fn evict_drops_translations_of_the_named_device_only() {
    let (server, _guest) = daemon_with_context();
    let mut client = server.client();
    let evict = |device| json!({"guest": "vm0", "ctx_id": CTX_ID, "device": device});
    let unknown = client.error("context.evict", evict(json!("gpu2")));
    assert_eq!(unknown, (-32000, "unknown-device".into()));
    assert_eq!(client.result("context.evict", evict(json!("gpu1"))), json!({"evicted_pages": RESIDENT}));
    assert_eq!(client.result("context.evict", evict(json!(1))), json!({"evicted_pages": 0}));
    let rest = json!({"guest": "vm0", "ctx_id": CTX_ID});
    assert_eq!(client.result("context.evict", rest), json!({"evicted_pages": RESIDENT}));
}

#[test]
fn ledger_is_told_by_index_and_by_name() {
    let (server, _guest) = daemon_with_context();
    let mut client = server.client();
    let ledger = client.result("device.ledger", json!({"device": 0}));
    let entry = json!({"guest": "vm0", "ctx_id": CTX_ID, "generation": 1, "asid": 9, "page": C >> 12, "access": "write"});
    assert_eq!(ledger, json!({"device": 0, "name": "gpu0", "entries": [entry], "overwritten": 7}));
    assert_eq!(client.result("device.ledger", json!({"device": "gpu0"})), ledger);
    assert_eq!(client.result("device.ledger", json!({"device": "gpu1"}))["entries"], json!([]));
    let devices = client.result("device.list", json!({}));
    assert_eq!(devices["devices"][1]["name"], "gpu1");
    assert_eq!(devices["devices"][1]["gpu_vms"], 1);
}

#[test]
fn svmctl_shows_the_context_and_its_mappings() {
    let (server, _guest) = daemon_with_context();
    let svmctl = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_svmctl"));
        let output = command.arg("--socket").arg(server.socket()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let fault = Fault {
        asid: Asid(1),
        stop: StopId(1),
        job: JobId(1),
        addr: GpuAddr(C + 0x1008),
        pages: 1,
        length_hint: 8,
        access: Access::Read,
        engine: 0,
        level: 0,
    };
    server.registry.host().fault(0, fault);
    let shown = svmctl(&["context", "show", "vm0", "5"]);
    let mapping = "0x7f0000000000..0x7f0000003000  ->  0x40000000..0x40003000  read    12 KiB  2 (8 KiB)";
    assert_eq!(shown.matches(mapping).count(), 2, "{shown}");
    let first = "gpu vm 1 on device 0: asid 1, usable, resident 2 (8 KiB), wanted 0, jobs and binds 0, waiting faults 1\n";
    assert!(shown.contains(first), "{shown}");
    let waits = shown.lines().find(|line| line.contains("0x40001000")).unwrap_or_default();
    assert!(waits.contains("0x7f0000001000  read"), "{shown}");
    let listed = svmctl(&["contexts"]);
    assert!(listed.contains("4 (16 KiB)"), "{listed}");
    // The name comes from the guest: its escape must not reach the terminal.
    assert!(listed.contains("a?pp") && !listed.contains('\u{1b}'), "{listed}");
    assert!(svmctl(&["ledger", "gpu0"]).contains("0x40000000  write"));
    assert!(svmctl(&["devices"]).contains("replayable"));
    assert_eq!(svmctl(&["context", "evict", "vm0", "5", "--device", "gpu1"]), "evicted pages: 2 (8 KiB)\n");
}

#[test]
fn device_is_granted_once() {
    let devices = vec![Idle::start("gpu0", Vec::new()), Idle::start("gpu1", Vec::new())];
    let server = Server::start_on(devices, Options::default());
    let mut client = server.client();
    let add = json!({"name": "vm0", "socket": server.guest_socket("vm0.sock"), "devices": ["gpu1", "gpu0", "gpu1"]});
    assert_eq!(client.error("guest.add", add), (-32000, "device-twice".into()));
    assert_eq!(client.result("guest.list", json!({})), json!({"guests": []}));
}
