//! Golden bytes: the wire format as PROTOCOL.md prints it, both ways.
#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use virtio_gpu_svm::protocol::control::{
    GetDeviceResp, Hello, HelloResp, Invalidate, InvalidateResp, PageList, PageResponse, PageRun,
    SUPPLY_LIST, Supply, SupplyResp, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO,
};
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EventHdr, FaultRecord, JobRecord, NoticeRecord};
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, CtxCreate, MemEntry, ResourceCreateBlob, RespCapsetInfo, RespDisplayInfo,
};
use virtio_gpu_svm::protocol::job::{OP_CHASE, Packet};
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::request::{
    BIND_OP_MAP_USERPTR, BIND_READONLY, BindOp, Exec, ExecRsp, FencePoint, ReqHdr, RspHdr, VM_BIND_ASYNC,
    VmBind, VmBindRsp, VmCreateRsp, VmProperty,
};
use virtio_gpu_svm::protocol::{SVM_MAGIC, SvmConfig, Wire};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes from hex digits; spaces and line breaks are for people.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn golden<T: IntoBytes + FromBytes + Immutable + PartialEq + std::fmt::Debug>(value: T, bytes: &str) {
    assert_eq!(value.as_bytes(), hex(bytes), "written: {value:?}");
    assert_eq!(T::read_from_bytes(&hex(bytes)).unwrap(), value, "read");
}

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

/// The fields of a struct, in order, are all of it.
fn is_covered<T: Wire>() {
    let mut end = 0;
    for (field, at, len) in T::FIELDS {
        assert_eq!(*at, end, "{}.{field}", std::any::type_name::<T>());
        end += len;
    }
    assert_eq!(end, size_of::<T>(), "{}", std::any::type_name::<T>());
}

#[test]
fn every_byte_of_what_the_device_writes_is_a_field() {
    is_covered::<CtrlHdr>();
    is_covered::<SvmResp>();
    is_covered::<HelloResp>();
    is_covered::<GetDeviceResp>();
    is_covered::<SupplyResp>();
    is_covered::<InvalidateResp>();
    is_covered::<RespDisplayInfo>();
    is_covered::<RespCapsetInfo>();
    is_covered::<RspHdr>();
    is_covered::<VmCreateRsp>();
    is_covered::<VmBindRsp>();
    is_covered::<ExecRsp>();
    is_covered::<VmProperty>();
    is_covered::<EventHdr>();
    is_covered::<FaultRecord>();
    is_covered::<JobRecord>();
    is_covered::<NoticeRecord>();
}

#[test]
fn header_and_hello() {
    golden(
        Hello {
            hdr: CtrlHdr {
                flags: 1.into(),
                fence_id: 0x1122.into(),
                ring_idx: 7,
                ..hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0)
            },
            incarnation: 0x0102_0304_0506_0708.into(),
            version: 0x1_0000.into(),
            reserved: 0.into(),
        },
        "00040000 01000000 2211000000000000 00000000 07 000000
         0807060504030201 00000100 00000000",
    );
}

#[test]
fn response_head() {
    golden(
        SvmResp {
            hdr: hdr(0x1200, 3),
            status: (-11).into(),
            detail: 2.into(),
            limit: 0.into(),
            daemon_epoch: 5.into(),
            inval_done_seq: 9.into(),
        },
        "00120000 00000000 0000000000000000 03000000 00000000
         f5ffffff 02000000 0500000000000000 0900000000000000",
    );
    golden(
        SvmResp {
            hdr: hdr(0x1201, 3),
            status: (-28).into(),
            detail: 0x0102.into(),
            limit: Limit::TotalMappings.to_wire().into(),
            daemon_epoch: 5.into(),
            inval_done_seq: 9.into(),
        },
        "01120000 00000000 0000000000000000 03000000 00000000
         e4ffffff 0201 0600 0500000000000000 0900000000000000",
    );
}

#[test]
fn limits_have_the_numbers_and_names_of_the_text() {
    let named = Limit::ALL.map(|limit| (limit.to_wire(), limit.name()));
    let expected = [
        (1, "contexts"),
        (2, "resources"),
        (3, "resource_bytes"),
        (4, "gpu_vms"),
        (5, "mappings"),
        (6, "total_mappings"),
        (7, "table_bytes"),
        (8, "pending_faults"),
        (9, "total_pending_faults"),
        (10, "jobs"),
        (11, "total_jobs"),
        (12, "queue_bytes"),
        (16, "leaves"),
        (17, "resident_pages"),
        (18, "asids"),
        (19, "device_gpu_vms"),
    ];
    assert_eq!(named, expected);
}

#[test]
fn page_response_with_a_run() {
    golden(
        PageResponse {
            hdr: hdr(0x0403, 1),
            cookie: 0x1_0000_0002.into(),
            code: 0.into(),
            num_runs: 1.into(),
            flags: 0.into(),
        },
        "03040000 00000000 0000000000000000 01000000 00000000 0200000001000000 00000000 01000000",
    );
    golden(
        PageRun {
            va: 0x7000_0000_0000.into(),
            gpa: 0x1234_5000.into(),
            pages: 16.into(),
            flags: 1.into(),
            as_of: 3.into(),
        },
        "0000000000700000 0050341200000000 10000000 01000000 0300000000000000",
    );
    golden(PageList { va: 0x7000_0000_0000.into(), as_of: 3.into() }, "0000000000700000 0300000000000000");
    golden(
        Supply {
            hdr: hdr(0x0402, 1),
            num_runs: 0x102.into(),
            flags: SUPPLY_LIST.into(),
            ..Supply::default()
        },
        "02040000 00000000 0000000000000000 01000000 00000000 0201 0100 00000000",
    );
    golden(
        Invalidate {
            hdr: hdr(0x0404, 1),
            start: 0x1000.into(),
            length: 0x2000.into(),
            event: 1.into(),
            reserved: 0.into(),
        },
        "04040000 00000000 0000000000000000 01000000 00000000 0010000000000000 0020000000000000 01000000 00000000",
    );
}

#[test]
fn virtio_gpu_commands() {
    let mut debug_name = [0; 64];
    debug_name[..2].copy_from_slice(b"hi");
    let name = format!("6869{}", "00".repeat(62));
    golden(
        CtxCreate { hdr: hdr(0x0200, 4), nlen: 2.into(), context_init: 24.into(), debug_name },
        &format!("00020000 00000000 0000000000000000 04000000 00000000 02000000 18000000 {name}"),
    );
    golden(
        ResourceCreateBlob {
            hdr: hdr(0x010c, 0),
            resource_id: 9.into(),
            blob_mem: 1.into(),
            blob_flags: 1.into(),
            nr_entries: 1.into(),
            blob_id: 0.into(),
            size: 0x1000.into(),
        },
        "0c010000 00000000 0000000000000000 00000000 00000000
         09000000 01000000 01000000 01000000 0000000000000000 0010000000000000",
    );
    golden(
        MemEntry { addr: 0x4000.into(), length: 0x1000.into(), padding: 0.into() },
        "0040000000000000 00100000 00000000",
    );
}

#[test]
fn requests_and_packets() {
    let req = ReqHdr { cmd: 3.into(), len: 72.into(), seqno: 8.into(), rsp_off: 16.into() };
    golden(req, "03000000 48000000 08000000 10000000");
    golden(
        RspHdr { len: 16.into(), seqno: 8.into(), ret: (-2).into(), detail: 1.into(), limit: 0.into() },
        "10000000 08000000 feffffff 01000000",
    );
    golden(
        BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            flags: BIND_READONLY.into(),
            addr: 0x10_0000.into(),
            range: 0x4000.into(),
            obj_offset: 0x7f00_0000_0000.into(),
            resource_id: 0.into(),
            reserved: 0.into(),
            reserved2: 0.into(),
        },
        "02000000 01000000 0000100000000000 0040000000000000 00000000007f0000 00000000 00000000 0000000000000000",
    );
    golden(
        Exec {
            hdr: req,
            vm_id: 1.into(),
            ring_idx: 2.into(),
            num_packets: 1.into(),
            num_waits: 3.into(),
            user_data: 0xabcd.into(),
            signal: 0x1_0000_0005.into(),
        },
        "03000000 48000000 08000000 10000000 01000000 02000000 01000000 03000000 cdab000000000000
         0500000001000000",
    );
    golden(
        Packet {
            opcode: OP_CHASE.into(),
            dst: 0x100.into(),
            src: 0x200.into(),
            value: 10.into(),
            arg: u64::MAX.into(),
            ..Packet::default()
        },
        "05000000 00000000 0001000000000000 0002000000000000 0000000000000000 0a00000000000000 ffffffffffffffff
         0000000000000000 0000000000000000",
    );
}

#[test]
fn fences_and_binds_in_turn() {
    let hdr = ReqHdr { cmd: 3.into(), len: 120.into(), seqno: 8.into(), rsp_off: 16.into() };
    golden(
        VmBind {
            hdr,
            vm_id: 1.into(),
            num_binds: 2.into(),
            flags: VM_BIND_ASYNC.into(),
            ring_idx: 4.into(),
            num_waits: 5.into(),
            reserved: 0.into(),
            user_data: 0xabcd.into(),
            signal: 6.into(),
        },
        "03000000 78000000 08000000 10000000 01000000 02000000 01000000 04000000 05000000 00000000
         cdab000000000000 0600000000000000",
    );
    golden(
        FencePoint { vm_id: 1.into(), ring_idx: 2.into(), seqno: 0x1_0000_0003.into() },
        "01000000 02000000 0300000001000000",
    );
    let rsp = RspHdr { len: 24.into(), seqno: 8.into(), ..RspHdr::default() };
    golden(
        VmBindRsp { hdr: rsp, job_id: 0x1122.into() },
        "18000000 08000000 00000000 00000000 2211000000000000",
    );
    golden(
        VmProperty {
            hdr: rsp,
            state: 1.into(),
            first_errno: (-28).into(),
            error_addr: 0xc000.into(),
            resident_pages: 2.into(),
            num_mappings: 3.into(),
            num_jobs: 4.into(),
            pending_faults: 5.into(),
            asid: 6.into(),
            dev_id: 7.into(),
            error_op: 8.into(),
        },
        "18000000 08000000 00000000 00000000 01000000 e4ffffff 00c0000000000000 0200000000000000
         03000000 04000000 05000000 06000000 07000000 08000000",
    );
}

#[test]
fn records() {
    golden(
        EventHdr { num_records: 1.into(), flags: 0.into(), daemon_epoch: 7.into(), sequence: 40.into() },
        "01000000 00000000 0700000000000000 2800000000000000",
    );
    golden(
        FaultRecord {
            kind: EVENT_FAULT.into(),
            ctx_id: 1.into(),
            cookie: 0x10.into(),
            dev_id: 1.into(),
            vm_id: 2.into(),
            asid: 3.into(),
            grpid: 0.into(),
            flags: 7.into(),
            perm: 2.into(),
            addr: 0xc000.into(),
            cpu_addr: 0xa000.into(),
            length_hint: 64.into(),
            fault_type: 1,
            level: 2,
            engine_class: 0,
            engine_instance: 4,
            num_coalesced: 5.into(),
            access_mask: 3.into(),
            address_precision: 4096.into(),
            timestamp: 6.into(),
            sequence: 41.into(),
            reserved: 0.into(),
        },
        "01000000 01000000 1000000000000000 01000000 02000000 03000000 00000000 07000000 02000000
         00c0000000000000 00a0000000000000 40000000 01 02 00 04 0500 0300 00100000
         0600000000000000 2900000000000000 0000000000000000",
    );
    golden(
        JobRecord {
            kind: 2.into(),
            ctx_id: 1.into(),
            job_id: 8.into(),
            user_data: 9.into(),
            dev_id: 1.into(),
            vm_id: 2.into(),
            status: (-22).into(),
            packet: 3.into(),
            addr: 0xd000.into(),
            perm: 1.into(),
            ring_idx: 4.into(),
            timestamp: 6.into(),
            sequence: 42.into(),
            point: 0x1_0000_0007.into(),
            ..JobRecord::default()
        },
        "02000000 01000000 0800000000000000 0900000000000000 01000000 02000000 eaffffff 03000000
         00d0000000000000 01000000 04000000 0600000000000000 2a00000000000000
         0700000001000000 00000000000000000000000000000000",
    );
    let notice =
        NoticeRecord { kind: 3.into(), ctx_id: 1.into(), value: 12.into(), ..NoticeRecord::default() };
    golden(notice, &format!("03000000 01000000 0c00000000000000 {}", "00".repeat(80)));
}

#[test]
fn config_space_part() {
    golden(
        SvmConfig {
            magic: SVM_MAGIC.into(),
            version_major: 1.into(),
            version_minor: 0.into(),
            daemon_epoch: 2.into(),
            num_devices: 3.into(),
            max_contexts: 4.into(),
            max_runs: 5.into(),
            max_binds: 6.into(),
            max_packets: 7.into(),
            max_mappings: 8.into(),
            max_pending_faults: 9.into(),
            max_jobs: 10.into(),
            event_record_bytes: 96.into(),
            max_command_bytes: 11.into(),
            reserved: 0.into(),
        },
        "53564d31 0100 0000 0200000000000000 03000000 04000000 05000000 06000000 07000000 08000000 09000000
         0a000000 60000000 0b000000 0000000000000000",
    );
}
