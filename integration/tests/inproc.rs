//! The whole path without QEMU: a VMM in this process, real sockets, guest memory, rings and eventfds, and a daemon of
//! its own for each test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use guest_agent::agent::AgentOptions;
use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::RawGuest;
use integration::frontend::vhost_user::VIRTIO_F_IN_ORDER;
use integration::frontend::vmm::Vmm;
use integration::guest::{SimulatedGuest, Turn};

use integration::storm::{self, Size};
use integration::svmd::{DeviceKind, Options, Svmd};
use serde_json::json;
use std::sync::Arc;
use virtio_gpu_svm::protocol::control::{
    GetDevice, GetDeviceResp, SvmResp, VIRTIO_GPU_CMD_SVM_GET_DEVICE, VIRTIO_GPU_CMD_SVM_INVALIDATE,
};
use virtio_gpu_svm::protocol::errno::{EOPNOTSUPP, EPIPE};
use virtio_gpu_svm::protocol::event::EVENT_BIND_DONE;
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, GetCapset, GetCapsetInfo, GpuConfig, RespCapsetInfo, RespDisplayInfo, VIRTIO_GPU_CMD_GET_CAPSET,
    VIRTIO_GPU_CMD_GET_CAPSET_INFO, VIRTIO_GPU_CMD_GET_DISPLAY_INFO, VIRTIO_GPU_CMD_MOVE_CURSOR,
    VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER, VIRTIO_GPU_RESP_OK_CAPSET, VIRTIO_GPU_RESP_OK_CAPSET_INFO,
    VIRTIO_GPU_RESP_OK_DISPLAY_INFO,
};
use virtio_gpu_svm::protocol::job::{OP_CHASE, OP_FILL, OP_REDUCE, OP_SEM_SIGNAL, OP_SEM_WAIT, Packet};
use virtio_gpu_svm::protocol::request::{BIND_OP_MAP_USERPTR, BindOp};
use virtio_gpu_svm::protocol::{
    CAPSET_SVM, CONFIG_SIZE, SVM_CONFIG_OFFSET, SVM_MAGIC, SvmConfig, VERSION_MAJOR,
};
use zerocopy::FromBytes;

const MIB: u64 = 1 << 20;
const PROFILES: [Profile; 2] = [Profile::Qemu, Profile::CloudHypervisor];

fn ram(seed: u64) -> Arc<GuestRam> {
    GuestRam::new(Layout::WithHole { low_bytes: 96 * MIB, high_bytes: 32 * MIB }, seed).unwrap()
}

fn connect(daemon: &Svmd, profile: Profile) -> RawGuest {
    RawGuest::connect(&daemon.socket("vm0"), &ram(1), profile).unwrap()
}

fn header(kind: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ..CtrlHdr::default() }
}

#[test]
fn device_answers_as_virtio_gpu_in_both_profiles() {
    for profile in PROFILES {
        let daemon = Svmd::launch(&Options::default()).unwrap();
        let mut guest = connect(&daemon, profile);

        let display: RespDisplayInfo = guest.send(&header(VIRTIO_GPU_CMD_GET_DISPLAY_INFO), &[]).unwrap();
        assert_eq!(display.hdr.kind.get(), VIRTIO_GPU_RESP_OK_DISPLAY_INFO);
        assert!(display.pmodes.iter().all(|mode| mode.enabled.get() == 0));

        let info = GetCapsetInfo { hdr: header(VIRTIO_GPU_CMD_GET_CAPSET_INFO), ..GetCapsetInfo::default() };
        let info: RespCapsetInfo = guest.send(&info, &[]).unwrap();
        assert_eq!(info.hdr.kind.get(), VIRTIO_GPU_RESP_OK_CAPSET_INFO);
        assert_eq!((info.capset_id.get(), info.capset_max_version.get()), (CAPSET_SVM, 1));

        let capset = GetCapset {
            hdr: header(VIRTIO_GPU_CMD_GET_CAPSET),
            capset_id: CAPSET_SVM.into(),
            capset_version: 1.into(),
        };
        let capset: [u8; 24 + 64] = guest.send(&capset, &[]).unwrap();
        let hdr = CtrlHdr::read_from_bytes(&capset[..24]).unwrap();
        assert_eq!(hdr.kind.get(), VIRTIO_GPU_RESP_OK_CAPSET);
        let mut config = [0; 64];
        guest.vmm().connection().read_config(SVM_CONFIG_OFFSET, &mut config).unwrap();
        assert_eq!(capset[24..], config, "capset and config space say the same");

        let unknown = GetCapset { hdr: header(VIRTIO_GPU_CMD_GET_CAPSET), ..GetCapset::default() };
        let refused: CtrlHdr = guest.send(&unknown, &[]).unwrap();
        assert_eq!(refused.kind.get(), VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER);
    }
}

#[test]
fn cloud_hypervisor_profile_hides_device_features_and_keeps_in_order() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let guest = connect(&daemon, Profile::CloudHypervisor);
    assert_eq!(guest.vmm().features() & 0xff_ffff, 0);
    assert_ne!(guest.vmm().features() & 1 << VIRTIO_F_IN_ORDER, 0);
}

#[test]
fn config_space_can_be_read_at_any_offset_and_size() {
    for profile in PROFILES {
        let daemon = Svmd::launch(&Options::default()).unwrap();
        let guest = connect(&daemon, profile);
        let mut whole = [0; CONFIG_SIZE];
        guest.vmm().connection().read_config(0, &mut whole).unwrap();
        let gpu = GpuConfig::read_from_bytes(&whole[..16]).unwrap();
        assert_eq!((gpu.num_scanouts.get(), gpu.num_capsets.get()), (0, 1));
        let svm = SvmConfig::read_from_bytes(&whole[SVM_CONFIG_OFFSET..]).unwrap();
        assert_eq!((svm.magic.get(), svm.version_major.get()), (SVM_MAGIC, VERSION_MAJOR));
        assert_eq!(svm.num_devices.get(), 2);
        for offset in 0..CONFIG_SIZE {
            for size in [1, 2, 3, 4, 7, 8, 61] {
                let end = CONFIG_SIZE.min(offset + size);
                let mut part = vec![0; end - offset];
                guest.vmm().connection().read_config(offset, &mut part).unwrap();
                assert_eq!(part, whole[offset..end], "{size} bytes at {offset}");
            }
        }
    }
}

/// cloud-hypervisor panics on any failure of a config access, so even nonsense must be answered.
#[test]
fn config_accesses_beyond_the_space_are_answered() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let guest = connect(&daemon, Profile::CloudHypervisor);
    let mut connection = guest.vmm().connection();
    for (offset, size) in [(CONFIG_SIZE - 1, 2), (CONFIG_SIZE, 1), (200, 8), (CONFIG_SIZE - 3, 64), (255, 1)]
    {
        let bytes = connection.get_config(offset, size).unwrap();
        let beyond = CONFIG_SIZE.saturating_sub(offset).min(size);
        assert!(bytes[beyond..].iter().all(|byte| *byte == 0), "{size} bytes at {offset}: {bytes:?}");
    }
    for (offset, size) in [(0, 4), (4, 4), (7, 3), (CONFIG_SIZE, 2)] {
        connection.set_config(offset, &vec![0xff; size]).unwrap();
    }
    let svm = connection.get_config(SVM_CONFIG_OFFSET, 4).unwrap();
    assert_eq!(svm, SVM_MAGIC.to_le_bytes(), "writes have no effect on what is read only");
}

#[test]
fn commands_of_the_protocol_need_a_hello() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let mut guest = connect(&daemon, Profile::Qemu);
    for kind in VIRTIO_GPU_CMD_SVM_GET_DEVICE..=VIRTIO_GPU_CMD_SVM_INVALIDATE {
        let refused: SvmResp = guest.send(&header(kind), &[]).unwrap();
        assert_eq!(refused.status.get(), -EPIPE, "{kind:#x}");
    }
    let hello = guest.hello(7).unwrap();
    assert_eq!((hello.num_devices.get(), hello.retiring.get()), (2, 0));
    for dev_id in 0..2 {
        let hdr = header(VIRTIO_GPU_CMD_SVM_GET_DEVICE);
        let device = GetDevice { hdr, dev_id: dev_id.into(), ..GetDevice::default() };
        let device: GetDeviceResp = guest.send(&device, &[]).unwrap();
        assert_eq!((device.resp.status.get(), device.dev_id.get()), (0, dev_id));
        assert_eq!(device.name[..5], *format!("soft{dev_id}").as_bytes());
    }
}

#[test]
fn cursor_commands_are_answered_and_refused() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let mut guest = connect(&daemon, Profile::Qemu);
    let mut request = vec![0; 56];
    request[..4].copy_from_slice(&VIRTIO_GPU_CMD_MOVE_CURSOR.to_le_bytes());
    let answer = guest.cursor_command(&request, 48).unwrap();
    let head = SvmResp::read_from_bytes(&answer).unwrap();
    assert_eq!(head.status.get(), -EOPNOTSUPP);
    // Linux leaves no room for answers to cursor commands.
    assert_eq!(guest.cursor_command(&request, 0).unwrap(), [0; 0]);
}

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;

/// Sums `words` words from C on and puts the result behind them.
fn sum_job(words: u64) -> [Packet; 2] {
    [
        Packet {
            opcode: OP_REDUCE.into(),
            src: C.into(),
            dst: (C + 8 * words).into(),
            len: (8 * words).into(),
            ..Packet::default()
        },
        Packet {
            opcode: OP_FILL.into(),
            dst: (C + 8 * words + 8).into(),
            len: 8.into(),
            value: 0x5ca1e.into(),
            ..Packet::default()
        },
    ]
}

fn run_sum(guest: &SimulatedGuest) -> u32 {
    let mut process = guest.spawn("sum").unwrap();
    process.map_memory(A, MIB).unwrap();
    let words = 100_000;
    for word in 0..words {
        process.write(A + 8 * word, &(word * word).to_le_bytes()).unwrap();
    }
    process.create_vm(0).unwrap();
    process.bind(0, C, A, MIB).unwrap();
    process.exec(0, 0, 1, &sum_job(words)).unwrap();
    process.finish_job().unwrap();
    assert_eq!(process.read_word(A + 8 * words).unwrap(), (0..words).map(|w| w * w).sum::<u64>());
    assert_eq!(process.read_word(A + 8 * words + 8).unwrap(), 0x5ca1e);
    process.ctx_id()
}

/// A list in memory at A, with plain pointers; a mirror with offset 0 on one device and with another on the second.
#[test]
fn plain_pointers_are_walked_through_mirrors() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram(3), Profile::CloudHypervisor).unwrap();
    let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
    let mut process = guest.spawn("list").unwrap();
    process.map_memory(A, MIB).unwrap();
    let node = |n: u64| A + n * 7919 % 1021 * 64;
    for n in 0..500_u64 {
        let next = if n < 499 { node(n + 1) } else { 0 };
        process.write(node(n), &[next.to_le_bytes(), (n * n).to_le_bytes()].concat()).unwrap();
    }
    let half = 1_u64 << 47;
    let shift = 1_u64 << 44;
    for (dev_id, offset) in [(0, 0), (1, shift.cast_signed())] {
        process.create_vm(dev_id).unwrap();
        let to_gpu = |cpu: u64| cpu.checked_add_signed(-offset).unwrap();
        process.mirror(dev_id, 0, offset, half).unwrap();
        let result = A + MIB - 4096 + 64 * u64::from(dev_id);
        let walk = Packet {
            opcode: OP_CHASE.into(),
            dst: to_gpu(result).into(),
            src: to_gpu(node(0)).into(),
            value: 1000.into(),
            arg: (-offset).cast_unsigned().into(),
            ..Packet::default()
        };
        process.exec(dev_id, 0, 1, &[walk]).unwrap();
        process.finish_job().unwrap();
        assert_eq!(process.read_word(result).unwrap(), 500);
        assert_eq!(process.read_word(result + 8).unwrap(), (0..500_u64).map(|n| n * n).sum::<u64>());
    }
    assert!(
        daemon.stat("/counters/faults_served_locally").unwrap() > 0,
        "the second device asks for nothing known"
    );
}

/// A job holds the first ring until all is submitted; then a bind, a job that needs it, and a job of the other device
/// that reads what it wrote.
#[test]
fn work_waits_for_points_of_rings_and_devices() {
    for kind in [DeviceKind::Soft, DeviceKind::Hostmmu] {
        let daemon = Svmd::launch(&Options { kind, ..Options::default() }).unwrap();
        let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram(6), Profile::CloudHypervisor).unwrap();
        let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
        let mut process = guest.spawn("fences").unwrap();
        process.map_memory(A, MIB).unwrap();
        process.create_vm(0).unwrap();
        process.create_vm(1).unwrap();
        process.bind(1, C, A, MIB).unwrap();
        let (semaphore, words) = (C + MIB, 1024);
        process.bind(0, semaphore, A + MIB - 4096, 4096).unwrap();
        let at =
            |opcode: u32, dst: u64| Packet { opcode: opcode.into(), dst: dst.into(), ..Packet::default() };
        let point = |dev_id, ring_idx, seqno| process.point(dev_id, ring_idx, seqno).unwrap();

        let held = Packet { value: 1.into(), ..at(OP_SEM_WAIT, semaphore) };
        process.exec_in_turn(0, Turn { signal: 9, ..Turn::default() }, 1, &[held]).unwrap();
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: (MIB / 2).into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        let waits = [point(0, 0, 9)];
        let bind = process.bind_in_turn(0, Turn { ring_idx: 1, waits: &waits, signal: 1 }, &[op]).unwrap();
        let fill = Packet { len: (8 * words).into(), value: 7.into(), ..at(OP_FILL, C) };
        process.exec_in_turn(0, Turn { ring_idx: 1, signal: 2, ..Turn::default() }, 2, &[fill]).unwrap();
        let waits = [point(0, 1, 2), point(0, 0, 9)];
        let sum = Packet { src: C.into(), len: (8 * words).into(), ..at(OP_REDUCE, C + 8 * words) };
        process.exec_in_turn(1, Turn { waits: &waits, ..Turn::default() }, 3, &[sum]).unwrap();

        let release = Packet { value: 1.into(), ..at(OP_SEM_SIGNAL, semaphore) };
        process.exec(0, 2, 4, &[release]).unwrap();
        let ends: Vec<_> = (0..5).map(|_| process.finish_job().unwrap()).collect();
        let mut order: Vec<_> = ends.iter().map(|end| (end.user_data.get(), end.point.get())).collect();
        // The job that lets the first go may be told before or after it.
        order.retain(|end| *end != (4, 0));
        assert_eq!(order, [(1, 9), (0, 1), (2, 2), (3, 0)]);
        assert!(ends.iter().any(|end| end.kind.get() == EVENT_BIND_DONE && end.job_id.get() == bind));
        assert_eq!(process.read_word(A + 8 * words).unwrap(), 7 * words);
    }
}

#[test]
fn job_reads_scattered_memory_by_faults_in_both_profiles() {
    for profile in PROFILES {
        let daemon = Svmd::launch(&Options::default()).unwrap();
        let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram(3), profile).unwrap();
        let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
        run_sum(&guest);
        // 800,016 bytes of 64 KiB windows.
        assert_eq!(guest.answers(&[0, 1]).unwrap().len(), 13);
        assert_eq!(daemon.stat("/counters/faults_raised").unwrap(), 13);
    }
}

#[test]
fn reconnected_frontend_begins_anew_with_another_epoch() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let ram = ram(4);
    let mut epochs = vec![];
    for round in 1..=3 {
        let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram, Profile::CloudHypervisor).unwrap();
        let mut config = [0; 8];
        vmm.connection().read_config(SVM_CONFIG_OFFSET + 8, &mut config).unwrap();
        epochs.push(u64::from_le_bytes(config));
        let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
        run_sum(&guest);
        let status = daemon.guest("vm0").unwrap();
        assert_eq!(status["status"]["contexts"], 1, "contexts of round {round} only: {status}");
        assert_eq!(status["sessions"], round, "{status}");
    }
    epochs.dedup();
    assert_eq!(epochs.len(), 3, "{epochs:?}");
}

#[test]
fn context_and_pages_are_given_back_when_a_process_exits() {
    let daemon = Svmd::launch(&Options::default()).unwrap();
    let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &ram(5), Profile::Qemu).unwrap();
    let guest = SimulatedGuest::start("vm0", vmm, AgentOptions::default()).unwrap();
    let mut process = guest.spawn("first").unwrap();
    let arena = process.map_memory(A, MIB).unwrap();
    process.create_vm(0).unwrap();
    process.bind(0, C, A, MIB).unwrap();
    process.exec(0, 0, 1, &sum_job(10)).unwrap();
    process.finish_job().unwrap();
    process.unmap_memory(arena, A, MIB).unwrap();
    process.exec(0, 0, 2, &sum_job(10)).unwrap();
    let job = process.wait_job().unwrap();
    assert_ne!(job.status.get(), 0, "memory that was taken back is not read any more");
    process.exit();
    let listed = daemon.call("context.list", json!({ "guest": "vm0" })).unwrap();
    assert_eq!(listed["contexts"], json!([]));
}

/// The same as `cargo run -p integration --bin storm`, which prints what came of it and takes other sizes and seeds.
#[test]
fn storm_loses_and_misroutes_nothing_on_three_seeds() {
    for seed in [1, 2, 3] {
        let summary = storm::run(seed, Size::default()).unwrap();
        assert!(summary.is_clean(), "{summary}");
    }
}

/// On the CPU's own faults, with a process for each GPU VM, so of fewer.
#[test]
fn storm_on_hostmmu_loses_and_misroutes_nothing() {
    let size = Size { guests: 2, contexts: 8, kind: DeviceKind::Hostmmu, faults: 10_000, ..Size::default() };
    let summary = storm::run(4, size).unwrap();
    assert!(summary.is_clean(), "{summary}");
}
