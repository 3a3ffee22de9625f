//! Every command, good and bad.

use crate::rows::{self, Row};
use crate::scene::{Scene, header, response};
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::{RawGuest, Record, userptr};
use integration::svmd::{Options, Svmd};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{FaultRecord, JobRecord, NoticeRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_FILL, Packet};
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{CAPSET_SVM, SvmConfig, Wire};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

/// Room that any answer here has, and then some.
const FULL: usize = 1024;
/// Bytes behind the room that must not change either.
const BEYOND: usize = 64;
/// Bytes of virtio-gpu's header, of `SvmResp`, and where that has the epoch and `inval_done_seq`.
const HEADER: usize = size_of::<CtrlHdr>();
const HEAD: usize = size_of::<SvmResp>();
const EPOCH: std::ops::Range<usize> = 32..40;
const DONE_SEQ: std::ops::Range<usize> = 40..48;

/// Sends a command with `room` bytes for the answer, which hold `fill`. The answer; nothing else was written.
fn exchange(scene: &mut Scene, command: &[u8], room: usize, fill: u8) -> Vec<u8> {
    let ram = scene.guest.vmm().ram().clone();
    let ring = scene.guest.control_ring();
    let at = ring.response();
    ram.write(at + room as u64, &[fill; BEYOND]).unwrap();
    ring.publish_command(command, u32::try_from(room).unwrap(), fill).unwrap();
    let written = scene.guest.kick_and_wait(0).unwrap() as usize;
    assert!(written <= room, "{written} bytes in {room}");
    let mut bytes = vec![0; room + BEYOND];
    ram.read(at, &mut bytes).unwrap();
    assert!(bytes[written..].iter().all(|byte| *byte == fill), "written beyond byte {written} of {room}");
    bytes.truncate(written);
    bytes
}

fn number(command: &[u8]) -> u32 {
    U32::read_from_prefix(command).map_or(0, |(kind, _)| kind.get())
}

/// The requests of a SUBMIT_3D: their number, and where in the answer the reply is.
fn requests(command: &[u8]) -> Vec<(u32, usize)> {
    let (mut rest, mut requests) = (command.get(size_of::<CmdSubmit>()..).unwrap_or_default(), vec![]);
    while let Ok((hdr, _)) = ReqHdr::read_from_prefix(rest) {
        let Some(next) = rest.get(hdr.len.get() as usize..).filter(|_| hdr.len.get() >= 16) else { break };
        requests.push((hdr.cmd.get(), HEAD + hdr.rsp_off.get() as usize));
        rest = next;
    }
    requests
}

fn is_reserved(field: &str) -> bool {
    field.starts_with("reserved") || field.starts_with("padding")
}

/// Every reserved field and all padding of a struct is zero, as far as it was written.
fn reserved_is_zero<T: Wire>(bytes: &[u8]) {
    for (field, at, len) in T::FIELDS.iter().filter(|(field, ..)| is_reserved(field)) {
        if let Some(bytes) = bytes.get(*at..at + len) {
            assert!(
                bytes.iter().all(|byte| *byte == 0),
                "{}.{field}: {bytes:02x?}",
                std::any::type_name::<T>()
            );
        }
    }
}

/// What in an answer is to be zero, by the command that it is for.
fn check_reserved(command: &[u8], answer: &[u8]) {
    reserved_is_zero::<CtrlHdr>(answer);
    let (kind, refused) = (number(command), number(answer) >= VIRTIO_GPU_RESP_ERR_UNSPEC);
    match kind {
        VIRTIO_GPU_CMD_SUBMIT_3D => check_replies(command, answer),
        _ if refused => assert!(answer.len() <= HEAD),
        VIRTIO_GPU_CMD_GET_DISPLAY_INFO => {
            assert!(answer.get(HEADER..).is_none_or(|modes| modes.iter().all(|byte| *byte == 0)));
        }
        VIRTIO_GPU_CMD_GET_CAPSET_INFO => reserved_is_zero::<RespCapsetInfo>(answer),
        VIRTIO_GPU_CMD_GET_CAPSET => {
            let capset = SvmConfig::read_from_prefix(answer.get(HEADER..).unwrap_or_default());
            assert!(capset.is_err() || capset.unwrap().0.reserved.get() == 0);
        }
        VIRTIO_GPU_CMD_SVM_HELLO => reserved_is_zero::<HelloResp>(answer),
        VIRTIO_GPU_CMD_SVM_GET_DEVICE => {
            if let Ok((device, _)) = GetDeviceResp::read_from_prefix(answer) {
                let end = device.name.iter().position(|byte| *byte == 0).unwrap_or(32);
                assert!(device.name[end..].iter().all(|byte| *byte == 0), "{:?}", device.name);
            }
        }
        VIRTIO_GPU_CMD_SVM_SUPPLY | VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE => {
            reserved_is_zero::<SupplyResp>(answer)
        }
        VIRTIO_GPU_CMD_SVM_INVALIDATE => reserved_is_zero::<InvalidateResp>(answer),
        _ => assert!(answer.len() <= HEAD, "an answer to {kind:#x} of {} bytes", answer.len()),
    }
}

/// Replies are where they should be, and between them is nothing.
fn check_replies(command: &[u8], answer: &[u8]) {
    let mut covered = vec![false; answer.len()];
    covered.iter_mut().take(HEAD).for_each(|covered| *covered = true);
    for (cmd, at) in requests(command) {
        let Ok((head, _)) = RspHdr::read_from_prefix(answer.get(at..).unwrap_or_default()) else { continue };
        let reply = &answer[at..];
        if head.ret.get() == 0 {
            match cmd {
                SVM_REQ_VM_CREATE => reserved_is_zero::<VmCreateRsp>(reply),
                SVM_REQ_VM_BIND => reserved_is_zero::<VmBindRsp>(reply),
                SVM_REQ_EXEC => reserved_is_zero::<ExecRsp>(reply),
                SVM_REQ_VM_GET_PROPERTY => reserved_is_zero::<VmProperty>(reply),
                _ => assert_eq!(head.len.get() as usize, size_of::<RspHdr>(), "reply to {cmd}"),
            }
        }
        covered.iter_mut().skip(at).take(head.len.get() as usize).for_each(|covered| *covered = true);
    }
    let gaps = answer.iter().zip(covered).filter(|(_, covered)| !covered);
    assert!(gaps.map(|(byte, _)| byte).all(|byte| *byte == 0), "bytes between replies: {answer:02x?}");
}

/// Takes out what PROTOCOL says is this session's or the device's: the epoch, `inval_done_seq`, and asids.
fn masked(command: &[u8], mut answer: Vec<u8>) -> Vec<u8> {
    let mut hide = |range: std::ops::Range<usize>| {
        if let Some(bytes) = answer.get_mut(range) {
            bytes.fill(0);
        }
    };
    hide(EPOCH);
    // When engines have passed is their own affair.
    if number(command) != VIRTIO_GPU_CMD_GET_CAPSET {
        hide(DONE_SEQ);
    }
    let asid = |fields: &[(&str, usize, usize)]| fields.iter().find(|(name, ..)| *name == "asid").unwrap().1;
    for (cmd, at) in requests(command).into_iter().filter(|_| number(command) == VIRTIO_GPU_CMD_SUBMIT_3D) {
        match cmd {
            SVM_REQ_VM_CREATE => hide(at + asid(VmCreateRsp::FIELDS)..at + asid(VmCreateRsp::FIELDS) + 4),
            SVM_REQ_VM_GET_PROPERTY => hide(at + asid(VmProperty::FIELDS)..at + asid(VmProperty::FIELDS) + 4),
            _ => {}
        }
    }
    answer
}

/// Good commands beside those of the tables: virtio-gpu's own, and two properties with a gap between the replies.
fn more_good() -> Vec<Row> {
    let good = |name: &str, command: &[u8]| Row { name: name.into(), command: command.to_vec(), errno: 0 };
    let hdr = |kind| header(kind, 0);
    let property = |rsp_off: u32| VmRef {
        hdr: ReqHdr {
            cmd: SVM_REQ_VM_GET_PROPERTY.into(),
            len: 24.into(),
            seqno: rsp_off.into(),
            rsp_off: rsp_off.into(),
        },
        vm_id: 1.into(),
        ..VmRef::default()
    };
    let two = [property(128).as_bytes(), property(16).as_bytes()].concat();
    let capset = GetCapset {
        hdr: hdr(VIRTIO_GPU_CMD_GET_CAPSET),
        capset_id: CAPSET_SVM.into(),
        ..GetCapset::default()
    };
    let info = GetCapsetInfo { hdr: hdr(VIRTIO_GPU_CMD_GET_CAPSET_INFO), ..GetCapsetInfo::default() };
    vec![
        good("GET_DISPLAY_INFO", hdr(VIRTIO_GPU_CMD_GET_DISPLAY_INFO).as_bytes()),
        good("GET_CAPSET_INFO", info.as_bytes()),
        good("GET_CAPSET", capset.as_bytes()),
        good("two properties", &rows::submit(1, &two)),
    ]
}

/// Commands that change nothing, so that each can be sent with every room.
fn without_effect(scene: &Scene) -> Vec<Row> {
    let mut all = rows::control(scene);
    all.extend(rows::pages(scene));
    all.extend(rows::requests(scene));
    all.extend(more_good());
    all
}

/// Commands with an effect, in an order in which all are accepted.
fn with_effect(scene: &Scene) -> Vec<Row> {
    let payloads = rows::good_payloads(scene).into_iter();
    let mut all: Vec<_> = payloads
        .map(|(name, payload)| Row { name: name.into(), command: rows::submit(1, &payload), errno: 0 })
        .collect();
    all.extend(rows::good_commands(scene));
    all
}

/// Numbers that the protocol's sources give to commands with this prefix.
fn numbers(source: &str, prefix: &str) -> Vec<(String, u32)> {
    let constant = |line: &str| {
        let (name, value) = line.strip_prefix("pub const ")?.strip_suffix(';')?.split_once(": u32 = ")?;
        let digits = value.strip_prefix("0x");
        let value = digits.map_or_else(|| value.parse(), |digits| u32::from_str_radix(digits, 16));
        Some((name.to_owned(), value.ok()?)).filter(|_| name.starts_with(prefix))
    };
    source.lines().filter_map(constant).collect()
}

#[test]
fn every_number_of_the_protocol_is_sent() {
    let scene = Scene::set_up();
    let all: Vec<_> = without_effect(&scene).into_iter().chain(with_effect(&scene)).collect();
    let gpu = include_str!("../../../virtio-gpu-svm/src/protocol/gpu.rs");
    let control = include_str!("../../../virtio-gpu-svm/src/protocol/control.rs");
    let request = include_str!("../../../virtio-gpu-svm/src/protocol/request.rs");
    let commands = [numbers(gpu, "VIRTIO_GPU_CMD_"), numbers(control, "VIRTIO_GPU_CMD_")].concat();
    assert_eq!((commands.len(), numbers(request, "SVM_REQ_").len()), (19, 5), "{commands:?}");
    for (name, value) in commands {
        // Those of the cursor are refused on the control queue like any other number.
        let cursor = (0x300..0x302).contains(&value);
        assert!(cursor || all.iter().any(|row| number(&row.command) == value), "{name} is not sent");
    }
    let submits = all.iter().filter(|row| number(&row.command) == VIRTIO_GPU_CMD_SUBMIT_3D);
    let sent: Vec<u32> = submits.flat_map(|row| requests(&row.command)).map(|(cmd, _)| cmd).collect();
    for (name, value) in numbers(request, "SVM_REQ_") {
        assert!(sent.contains(&value), "{name} is not sent");
    }
    scene.finish();
}

#[test]
fn every_answer_is_written_as_far_as_it_says_and_no_further() {
    let mut scene = Scene::set_up();
    for row in without_effect(&scene) {
        let full = exchange(&mut scene, &row.command, FULL, 0xee);
        check_reserved(&row.command, &full);
        let submit = number(&row.command) == VIRTIO_GPU_CMD_SUBMIT_3D;
        let long = row.command.len() > 1 << 16;
        for room in (0..=full.len() + 1).filter(|room| !long || room % HEADER == 0) {
            let answer = exchange(&mut scene, &row.command, room, 0xee);
            assert_eq!(answer, exchange(&mut scene, &row.command, room, 0x11), "{}: {room} bytes", row.name);
            if submit {
                // What does not fit in the reply area is refused, so the answer is another.
                check_reserved(&row.command, &answer);
                continue;
            }
            let head_alone = full.len() == HEAD && room < HEAD;
            let expected = if head_alone { room.min(HEADER) } else { room.min(full.len()) };
            assert_eq!(answer, full[..expected], "{}: {room} bytes", row.name);
        }
    }
    scene.finish();
}

/// Makes a daemon that has served somebody with secrets in every field, and whose heap has seen them.
fn dirty() -> Svmd {
    let options = Options { guests: vec!["vm0".into(), "vm1".into()], ..Options::default() };
    let daemon = Svmd::launch(&options).unwrap();
    let ram = GuestRam::new(Layout::Flat { bytes: 48 << 20 }, 7).unwrap();
    let mut spy = RawGuest::connect(&daemon.socket("vm1"), &ram, Profile::Qemu).unwrap();
    spy.hello(0xa5a5_a5a5_a5a5_a5a5).unwrap();
    for ctx_id in 1..=9 {
        spy.create_context(ctx_id).unwrap();
        let vm = spy.create_vm(ctx_id, 0).unwrap();
        assert_eq!(spy.bind(vm, &[userptr(0xa5_a5a5_a000, 0xa5a5_a5a5_a000, 0x1000)]).unwrap(), 0);
        let fill = Packet {
            opcode: OP_FILL.into(),
            dst: 0xa5_a5a5_a000.into(),
            len: 8.into(),
            value: 0xa5a5_a5a5_a5a5_a5a5.into(),
            ..Packet::default()
        };
        spy.exec(vm, 0, 0xa5a5_a5a5_a5a5_a5a5, &[fill; 64]).unwrap();
        let fault = spy.wait_fault(ctx_id).unwrap();
        assert_eq!(spy.refuse(&fault).unwrap(), 0);
    }
    for bytes in (0..65_536).step_by(509) {
        spy.command(&vec![0xa5; bytes], 65_536).unwrap();
        spy.submit(9, &vec![0xa5; bytes], 60_000).unwrap();
    }
    daemon
}

/// All answers and records of a script, without what may differ.
fn told(daemon: Svmd) -> Vec<(String, Vec<u8>)> {
    let mut scene = Scene::on(daemon);
    let mut told = vec![("FAULT".to_owned(), record_bytes(&Record::Fault(scene.pending)))];
    told.push(("FAULT answered".to_owned(), record_bytes(&Record::Fault(scene.answered))));
    let rows: Vec<_> = without_effect(&scene).into_iter().chain(with_effect(&scene)).collect();
    for row in rows {
        let answer = exchange(&mut scene, &row.command, FULL, 0xee);
        check_reserved(&row.command, &answer);
        told.push((row.name, masked(&row.command, answer)));
    }
    // The job whose fault waits is in front of the others.
    let answer = response(1, &scene.pending, PAGE_RESP_INVALID, 0);
    let answer = exchange(&mut scene, answer.as_bytes(), FULL, 0xee);
    told.push(("PAGE_RESPONSE".to_owned(), masked(&[], answer)));
    // The ends of three jobs and a bind, in whatever order they came, and of a context.
    let mut ends: Vec<_> = (0..4).map(|_| Record::Job(scene.guest.wait_job(1).unwrap())).collect();
    let retired = |record: &Record| {
        matches!(record, Record::Notice(notice) if notice.ctx_id.get() == 9).then_some(*record)
    };
    ends.push(scene.guest.wait_record(retired).unwrap());
    let mut records: Vec<_> = ends.iter().map(record_bytes).collect();
    records.sort();
    told.extend(records.into_iter().map(|record| ("a record".to_owned(), record)));
    told
}

fn record_bytes(record: &Record) -> Vec<u8> {
    let without = |fields: &[(&str, usize, usize)], bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        for (_, at, len) in
            fields.iter().filter(|(name, ..)| ["asid", "timestamp", "sequence"].contains(name))
        {
            bytes[*at..at + len].fill(0);
        }
        bytes
    };
    match record {
        Record::Fault(fault) => {
            reserved_is_zero::<FaultRecord>(fault.as_bytes());
            assert_eq!(fault.engine_class, 0);
            let mut bytes = without(FaultRecord::FIELDS, fault.as_bytes());
            // The upper half of a cookie is the context's generation, which counts those of the host.
            bytes[12..16].fill(0);
            bytes
        }
        Record::Job(job) => {
            reserved_is_zero::<JobRecord>(job.as_bytes());
            without(JobRecord::FIELDS, job.as_bytes())
        }
        Record::Notice(notice) => {
            reserved_is_zero::<NoticeRecord>(notice.as_bytes());
            without(NoticeRecord::FIELDS, notice.as_bytes())
        }
    }
}

#[test]
fn what_others_did_before_changes_no_byte_that_a_guest_is_told() {
    let clean = told(Svmd::launch(&Options::default()).unwrap());
    let dirty = told(dirty());
    assert_eq!(clean.len(), dirty.len());
    for ((name, clean), (_, dirty)) in clean.iter().zip(&dirty) {
        assert_eq!(clean, dirty, "{name}");
    }
    assert_eq!(clean.iter().filter(|(name, _)| name == "a record").count(), 5);
}
