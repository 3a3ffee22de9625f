//! A test for each row of the table in `main.rs`, and for what else a VMM can say.

use crate::raw::*;
use crate::vmm::{Vmm, memfd, region};
use crate::{Footprint, Scene};
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_JOB_DONE, EventHdr, JobRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_FILL, OP_SEM_WAIT, Packet};
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{PAGE_SIZE, VERSION_MAJOR};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const CONTROLQ: usize = 0;
const EVENTQ: usize = 2;
/// A CPU address of the process, and the page behind it.
const A: u64 = 0x7f00_0000_0000;
const PAGE: u64 = 0x3f_0000;
/// A GPU address of the process.
const C: u64 = 0x10_0000_0000;

fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}
fn bytes(head: &(impl IntoBytes + Immutable), tail: &[u8]) -> Vec<u8> {
    [head.as_bytes(), tail].concat()
}
fn hello() -> Vec<u8> {
    let version = (u32::from(VERSION_MAJOR) << 16).into();
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0);
    bytes(&Hello { hdr, incarnation: 1.into(), version, ..Hello::default() }, &[])
}
fn create_context() -> Vec<u8> {
    bytes(&CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, 1), ..CtxCreate::default() }, &[])
}
fn submit(request: &(impl IntoBytes + Immutable), tail: &[u8]) -> Vec<u8> {
    let size = (size_of_val(request) + tail.len()) as u32;
    let submit =
        CmdSubmit { hdr: hdr(VIRTIO_GPU_CMD_SUBMIT_3D, 1), size: size.into(), ..CmdSubmit::default() };
    [submit.as_bytes(), request.as_bytes(), tail].concat()
}
fn request<T>(cmd: u32, tail: usize) -> ReqHdr {
    ReqHdr { cmd: cmd.into(), len: ((size_of::<T>() + tail) as u32).into(), ..ReqHdr::default() }
}
fn create_vm() -> Vec<u8> {
    submit(&VmCreate { hdr: request::<VmCreate>(SVM_REQ_VM_CREATE, 0), ..VmCreate::default() }, &[])
}
fn vm_ref(cmd: u32) -> Vec<u8> {
    submit(&VmRef { hdr: request::<VmRef>(cmd, 0), vm_id: 1.into(), ..VmRef::default() }, &[])
}
/// Shows A at C.
fn bind(flags: u32) -> Vec<u8> {
    let op = BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        flags: flags.into(),
        addr: C.into(),
        range: PAGE_SIZE.into(),
        obj_offset: A.into(),
        ..BindOp::default()
    };
    let hdr = request::<VmBind>(SVM_REQ_VM_BIND, size_of::<BindOp>());
    submit(&VmBind { hdr, vm_id: 1.into(), num_binds: 1.into(), ..VmBind::default() }, op.as_bytes())
}
fn exec(packet: Packet) -> Vec<u8> {
    let hdr = request::<Exec>(SVM_REQ_EXEC, size_of::<Packet>());
    submit(&Exec { hdr, vm_id: 1.into(), num_packets: 1.into(), ..Exec::default() }, packet.as_bytes())
}
fn fill() -> Packet {
    Packet { opcode: OP_FILL.into(), dst: C.into(), len: 8.into(), value: 7.into(), ..Packet::default() }
}
/// Waits until nobody signals it.
fn endless() -> Packet {
    Packet { opcode: OP_SEM_WAIT.into(), dst: C.into(), value: u64::MAX.into(), ..Packet::default() }
}
fn run() -> PageRun {
    PageRun { va: A.into(), gpa: PAGE.into(), pages: 1.into(), ..PageRun::default() }
}
fn supply() -> Vec<u8> {
    let supply = Supply { hdr: hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1), num_runs: 1.into(), ..Supply::default() };
    bytes(&supply, run().as_bytes())
}
fn invalidate() -> Vec<u8> {
    let hdr = hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, 1);
    bytes(&Invalidate { hdr, start: A.into(), length: PAGE_SIZE.into(), ..Invalidate::default() }, &[])
}

fn accepted(vmm: &mut Vmm, command: &[u8]) {
    let answer = vmm.command(command);
    assert_eq!(SvmResp::read_from_prefix(&answer).unwrap().0.status.get(), 0, "{answer:02x?}");
}
/// Makes a command available that may never be answered.
fn offer(vmm: &mut Vmm, command: &[u8]) {
    vmm.write(0x10_0000, command);
    vmm.descriptor(CONTROLQ, 0, 0x10_0000, command.len() as u32, 1, 1);
    vmm.descriptor(CONTROLQ, 1, 0x20_0000, 4096, 2, 0);
    vmm.offer(CONTROLQ, 0, true);
}
/// A guest with a process that has a GPU VM, in which A is at C.
fn furnished(scene: &Scene, guest: &str) -> Vmm {
    let mut vmm = Vmm::start(&scene.socket(guest));
    for command in [hello(), create_context(), create_vm(), bind(0)] {
        accepted(&mut vmm, &command);
    }
    vmm
}
/// A job of the process runs to its end. The bytes of the event buffer.
fn works(vmm: &mut Vmm) -> Vec<u8> {
    const BUFFER: u64 = 0x30_0000;
    vmm.write(BUFFER, &[0xee; 4096]);
    vmm.descriptor(EVENTQ, 0, BUFFER, 4096, 2, 0);
    vmm.offer(EVENTQ, 0, true);
    accepted(vmm, &supply());
    accepted(vmm, &exec(fill()));
    assert_eq!(vmm.wait_used(EVENTQ), (0, 24 + 96));
    assert_eq!(vmm.read(PAGE, 8), 7u64.to_le_bytes());
    vmm.read(BUFFER, 4096)
}

#[test]
fn records_are_written_whole_and_nothing_behind_them() {
    let scene = Scene::start();
    let mut vmm = furnished(&scene, "vm0");
    let buffer = works(&mut vmm);
    let (head, rest) = EventHdr::read_from_prefix(&buffer).unwrap();
    assert_eq!((head.num_records.get(), head.flags.get()), (1, 0));
    let (record, rest) = JobRecord::read_from_prefix(rest).unwrap();
    assert_eq!((record.kind.get(), record.reserved), (EVENT_JOB_DONE, [0.into(); 2]));
    assert!(rest.iter().all(|byte| *byte == 0xee));
}

#[test]
fn names_of_processes_have_nothing_but_what_stands_there() {
    let scene = Scene::start();
    let mut vmm = Vmm::start(&scene.socket("vm0"));
    accepted(&mut vmm, &hello());
    let names = [
        ("a\n\r\tb", "a???b"),
        ("\u{1b}[2J\u{9b}1m\u{7f}", "?[2J?1m?"),
        ("abc\u{202e}fed\u{2066}\u{200b}\u{2028}", "abc?fed???"),
        ("it's \"q\" \\ \u{fc}\u{4e2d}", "it's \"q\" \\ \u{fc}\u{4e2d}"),
    ];
    for (given, seen) in names {
        let mut debug_name = [0; 64];
        debug_name[..given.len()].copy_from_slice(given.as_bytes());
        let nlen = (given.len() as u32).into();
        let create =
            CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, 1), nlen, debug_name, ..CtxCreate::default() };
        accepted(&mut vmm, create.as_bytes());
        let contexts = scene.guest("vm0").context_summaries();
        assert_eq!(contexts[0].name, seen);
        accepted(&mut vmm, hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 1).as_bytes());
    }
}

/// A device that panics in this call, however it comes to it.
fn panic_in(method: &'static str, prepare: &[Vec<u8>], act: impl FnOnce(&mut Vmm)) {
    let scene = Scene::start();
    let mut neighbour = furnished(&scene, "vm1");
    let before = Footprint::settled();
    let mut vmm = furnished(&scene, "vm0");
    for command in prepare {
        accepted(&mut vmm, command);
    }
    scene.device.arm(method);
    act(&mut vmm);
    let reason = scene.wait_disconnected("vm0");
    assert!(reason.contains("internal fault"), "{method}: {reason}");
    assert!(!scene.device.is_armed(), "nobody has called {method}");
    works(&mut neighbour);
    drop(vmm);
    before.wait_restored();
    scene.serves_the_next();
    let mut again = furnished(&scene, "vm0");
    works(&mut again);
}

#[test]
fn e01_panic_in_a_command_costs_its_session_alone() {
    let act = |command: Vec<u8>| move |vmm: &mut Vmm| offer(vmm, &command);
    panic_in("check_packets", &[], act(exec(fill())));
    panic_in("submit", &[], act(exec(fill())));
    panic_in("resident_pages", &[], act(vm_ref(SVM_REQ_VM_GET_PROPERTY)));
    panic_in("bind", &[supply()], act(bind(BIND_IMMEDIATE)));
    panic_in("unbind", &[supply()], act(invalidate()));
    panic_in("vm_destroy", &[], act(vm_ref(SVM_REQ_VM_DESTROY)));
    panic_in("vm_create", &[vm_ref(SVM_REQ_VM_DESTROY)], act(create_vm()));
}

#[test]
fn e01_panic_while_the_vmm_is_answered_costs_its_session_alone() {
    panic_in("set_frozen", &[], |vmm| drop(vmm.frontend.get_vring_base(CONTROLQ)));
    panic_in("set_frozen", &[], |vmm| drop(vmm.frontend.reset_device()));
    // A table without the page that the device knows.
    let known = [supply(), bind(BIND_IMMEDIATE)];
    panic_in("drop_region", &known, |vmm| {
        let file = memfd(PAGE_SIZE, true);
        drop(vmm.frontend.set_mem_table(&[region(&file, 1 << 32, PAGE_SIZE, 0)]));
    });
}

#[test]
fn e01_panic_on_an_engine_costs_the_session_it_is_about() {
    // The page is known, so the engine that misses it binds it and lets the job go on.
    let act = |vmm: &mut Vmm| offer(vmm, &exec(fill()));
    panic_in("bind", &[supply()], act);
    panic_in("resume", &[supply()], act);
}

#[test]
fn e01_panic_of_the_housekeeper_costs_the_session_it_is_about() {
    let scene = Scene::with_deadline(1);
    let mut vmm = furnished(&scene, "vm0");
    // Nobody answers its fault: at the deadline the job is let go, to its end.
    scene.device.arm("resume");
    accepted(&mut vmm, &exec(fill()));
    let reason = scene.wait_disconnected("vm0");
    assert!(reason.contains("internal fault"), "{reason}");
    assert!(!scene.device.is_armed());
    // It still looks after others.
    let mut neighbour = furnished(&scene, "vm1");
    let next_record = |vmm: &mut Vmm, index: u16| {
        vmm.descriptor(EVENTQ, index, 0x30_0000, 120, 2, 0);
        vmm.offer(EVENTQ, index, true);
        assert_eq!(vmm.wait_used(EVENTQ), (u32::from(index), 120));
        u32::read_from_prefix(&vmm.read(0x30_0000 + 24, 4)).unwrap().0
    };
    accepted(&mut neighbour, &exec(fill()));
    // Its fault may be told before it is over, and that its GPU VM is lost.
    assert!((0..3).any(|index| next_record(&mut neighbour, index) == EVENT_JOB_DONE));
}

#[test]
fn e01_panic_while_a_session_is_closed_leaves_no_thread() {
    let scene = Scene::start();
    let mut neighbour = furnished(&scene, "vm1");
    let before = Footprint::settled();
    let vmm = furnished(&scene, "vm0");
    scene.device.arm("vm_destroy");
    drop(vmm);
    let reason = scene.wait_disconnected("vm0");
    assert!(reason.contains("closing the guest"), "{reason}");
    works(&mut neighbour);
    before.wait_restored();
    scene.serves_the_next();
}

#[test]
fn e02_file_that_ends_early_by_any_arithmetic_is_refused() {
    let scene = Scene::start();
    let regions = [
        [0, MEMORY + PAGE_SIZE, BASE, 0],
        [0, PAGE_SIZE, BASE, MEMORY],
        [0, MEMORY, BASE, PAGE_SIZE],
        // Offset and length that wrap, and that nearly do.
        [0, MEMORY, BASE, u64::MAX - PAGE_SIZE + 1],
        [0, u64::MAX - PAGE_SIZE + 1, BASE, PAGE_SIZE],
        [0, PAGE_SIZE, BASE, (1 << 63) - PAGE_SIZE],
        [u64::MAX - PAGE_SIZE + 1, MEMORY, BASE, 0],
        [0, 0, BASE, 0],
    ];
    for region in regions {
        for add in [false, true] {
            let before = Footprint::settled();
            let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
            if add {
                raw.send(ADD_MEM_REG, &one_region(region), &[raw.memory.as_fd()]);
            } else {
                raw.send(SET_MEM_TABLE, &table(&[region]), &[raw.memory.as_fd()]);
            }
            assert!(!raw.lives(), "{region:#x?}");
            drop(raw);
            scene.wait_disconnected("vm0");
            before.wait_restored();
        }
    }
    scene.serves_the_next();
}

/// Requests of parts of the protocol that were not offered, and that a VMM uses all the same, having acknowledged
/// everything. What becomes of them: the session ends, or it goes on and the answer says no.
#[test]
fn e03_what_was_not_offered_ends_the_session_or_is_answered_with_no() {
    let scene = Scene::start();
    let log = [PAGE_SIZE, 0].map(u64::to_le_bytes).concat();
    let inflight =
        [[PAGE_SIZE, 0].map(u64::to_le_bytes).concat(), [3u16, 16, 0, 0].map(u16::to_le_bytes).concat()]
            .concat();
    let (queue, word) = ([0u32, 1].map(u32::to_le_bytes).concat(), 1u64.to_le_bytes().to_vec());
    let ends: [(&str, u32, Vec<u8>, usize); 16] = [
        ("SET_STATUS", 39, word.clone(), 0),
        ("GET_STATUS", 40, vec![], 0),
        ("SET_LOG_BASE", SET_LOG_BASE, log, 1),
        ("SET_LOG_FD", 7, vec![], 1),
        ("GET_INFLIGHT_FD", 31, inflight.clone(), 0),
        ("SET_INFLIGHT_FD", 32, inflight, 1),
        ("IOTLB_MSG", 22, vec![0; 32], 0),
        ("VRING_KICK", 35, queue.clone(), 0),
        ("GPU_SET_SOCKET", 33, vec![], 1),
        ("SEND_RARP", 19, word.clone(), 0),
        ("NET_SET_MTU", 20, word.clone(), 0),
        ("SET_VRING_ENDIAN", 23, queue, 0),
        ("CREATE_CRYPTO_SESSION", 26, vec![0; 64], 0),
        ("CLOSE_CRYPTO_SESSION", 27, word.clone(), 0),
        ("POSTCOPY_ADVISE", 28, vec![], 0),
        ("POSTCOPY_END", 30, vec![], 0),
    ];
    for (name, request, body, fds) in ends {
        let before = Footprint::settled();
        let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
        raw.send_memory();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let gpu = [theirs.as_fd()];
        let fds = if request == 33 { &gpu[..] } else { &[raw.memory.as_fd()][..fds] };
        raw.send(request, &body, fds);
        assert!(!raw.lives(), "{name}");
        drop((raw, ours, theirs));
        scene.wait_disconnected("vm0");
        before.wait_restored();
    }

    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    raw.send_memory();
    let state = [0u32, 0].map(u32::to_le_bytes).concat();
    raw.send(42, &state, &[raw.event.as_fd()]);
    let answer = raw.answer().unwrap();
    assert_eq!(
        (answer.request, answer.body),
        (42, 0x101u64.to_le_bytes().to_vec()),
        "SET_DEVICE_STATE_FD fails"
    );
    let answer = raw.ask(43, &[]).unwrap();
    assert_ne!(answer.body, 0u64.to_le_bytes(), "CHECK_DEVICE_STATE fails");
    let object = [1u8; 16];
    assert!(raw.ask(41, &object).unwrap().body.is_empty(), "GET_SHARED_OBJECT has none");
    assert!(raw.lives());
}

#[test]
fn e05_owner_of_a_session_owns_nothing_of_the_next() {
    let scene = Scene::start();
    let raw = Raw::negotiated(&scene.socket("vm0"), 0);
    raw.send(SET_OWNER, &[], &[]);
    assert!(!raw.lives(), "it is owned already");
    drop(raw);
    scene.wait_disconnected("vm0");
    scene.serves_the_next();
}

#[test]
fn e06_sessions_leave_no_descriptor_and_no_thread() {
    let scene = Scene::start();
    let before = Footprint::settled();
    for _ in 0..50 {
        let mut vmm = furnished(&scene, "vm0");
        works(&mut vmm);
        drop(vmm);
        scene.wait_disconnected("vm0");
        before.wait_restored();
    }
}

/// The framework knows ring addresses by the VMM's addresses, and finds the first region that has one. So a VMM that
/// says two regions are at one place of its own has named other pages of its own guest: its loss alone.
#[test]
fn e08_regions_at_one_address_of_the_vmm_are_its_own_loss() {
    let scene = Scene::start();
    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    let half = MEMORY / 2;
    let regions = table(&[[0, half, BASE, 0], [1 << 30, half, BASE, half]]);
    raw.send(SET_MEM_TABLE, &regions, &[raw.memory.as_fd(), raw.memory.as_fd()]);
    (0..3).for_each(|queue| raw.start_ring(queue));
    assert!(raw.lives());
    scene.guest("vm0");
    let status = scene.registry.get("vm0").unwrap().status.unwrap();
    assert_eq!((status.memory_regions, status.memory_bytes), (2, MEMORY));
    // An address within one of these regions, beyond all that is mapped, is none.
    let mut areas = ring_areas(0);
    areas[8..16].copy_from_slice(&(BASE + half).to_le_bytes());
    raw.send(SET_VRING_ADDR, &areas, &[]);
    assert!(!raw.lives());
    scene.wait_disconnected("vm0");
}

/// The framework checks that in SET_MEM_TABLE, and not in ADD_MEM_REG: there it finds out, by a panic, when it is given
/// an address beyond the region's begin.
#[test]
fn e08_address_of_the_vmm_that_wraps_costs_the_session_alone() {
    let scene = Scene::start();
    let mut neighbour = furnished(&scene, "vm1");
    let before = Footprint::settled();
    let last = u64::MAX - PAGE_SIZE + 1;
    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    raw.send(SET_MEM_TABLE, &table(&[[0, MEMORY, last, 0]]), &[raw.memory.as_fd()]);
    assert!(!raw.lives());
    drop(raw);
    scene.wait_disconnected("vm0");
    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    raw.send(ADD_MEM_REG, &one_region([0, MEMORY, last, 0]), &[raw.memory.as_fd()]);
    let areas = [last, last + 0x400, last + 0x200, 0].map(u64::to_le_bytes).concat();
    raw.send(SET_VRING_ADDR, &[[0; 8].as_slice(), &areas].concat(), &[]);
    assert!(!raw.lives());
    drop(raw);
    let reason = scene.wait_disconnected("vm0");
    assert!(reason.contains("answering the VMM"), "{reason}");
    works(&mut neighbour);
    before.wait_restored();
    scene.serves_the_next();
}

#[test]
fn e08_one_file_may_be_many_regions_and_one_event_all_events() {
    let scene = Scene::start();
    let before = Footprint::settled();
    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    let regions: Vec<_> = (0..8).map(|n| [n << 30, MEMORY, BASE + (n << 30), 0]).collect();
    raw.send(SET_MEM_TABLE, &table(&regions), &[raw.memory.as_fd(); 8]);
    for queue in 0..3u64 {
        raw.start_ring(queue as u32);
        raw.send(SET_VRING_ERR, &queue.to_le_bytes(), &[raw.event.as_fd()]);
    }
    rustix::io::write(&raw.event, &3u64.to_ne_bytes()).unwrap();
    assert!(raw.lives());
    drop(raw);
    assert_eq!(scene.wait_disconnected("vm0"), "the VMM left");
    before.wait_restored();
}

#[test]
fn e08_ring_sizes_that_are_none_are_refused_or_rest() {
    let scene = Scene::start();
    for (size, lives) in
        [(0, false), (1025, false), (1 << 16, false), (u32::MAX, false), (3, true), (1024, true)]
    {
        let raw = Raw::negotiated(&scene.socket("vm0"), 0);
        raw.send_memory();
        raw.start_ring(0);
        raw.send(SET_VRING_NUM, &[0, size].map(u32::to_le_bytes).concat(), &[]);
        assert_eq!(raw.lives(), lives, "{size}");
        drop(raw);
        scene.wait_disconnected("vm0");
    }
    // Three rings, of which the control queue's size is none: only that one rests.
    let mut vmm = Vmm::start(&scene.socket("vm0"));
    vmm.frontend.set_vring_num(CONTROLQ, 3).unwrap();
    offer(&mut vmm, &hello());
    assert!(!vmm.command_on(1, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes()).is_empty());
    assert_eq!(vmm.take_used(CONTROLQ), None);
}

#[test]
fn e08_queues_beyond_the_last_are_refused() {
    let scene = Scene::start();
    let pair = |index: u32| [index, 1].map(u32::to_le_bytes).concat();
    for index in [3, 255, 256, u32::MAX] {
        for request in [SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE] {
            let raw = Raw::negotiated(&scene.socket("vm0"), 0);
            raw.send(request, &pair(index), &[]);
            assert!(!raw.lives(), "{request} of queue {index}");
        }
        let raw = Raw::negotiated(&scene.socket("vm0"), 0);
        raw.send_memory();
        raw.send(SET_VRING_ADDR, &[&index.to_le_bytes()[..], &ring_areas(0)[4..]].concat(), &[]);
        assert!(!raw.lives(), "SET_VRING_ADDR of queue {index}");
    }
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        let raw = Raw::negotiated(&scene.socket("vm0"), 0);
        raw.send(request, &3u64.to_le_bytes(), &[raw.event.as_fd()]);
        assert!(!raw.lives(), "{request} of queue 3");
    }
    scene.serves_the_next();
}

#[test]
fn e09_stray_descriptors_are_closed() {
    let scene = Scene::start();
    let before = Footprint::settled();
    for request in
        [GET_FEATURES, SET_FEATURES, SET_OWNER, GET_CONFIG, SET_CONFIG, SET_VRING_NUM, RESET_DEVICE]
    {
        for count in [1, 32, 33, 64] {
            let raw = Raw::connect(&scene.socket("vm0"));
            raw.send(request, &[], &vec![raw.memory.as_fd(); count]);
            // With more than the framework has room for it does not hear the message.
            assert_eq!(raw.lives(), count > 32, "{request} with {count}");
            let with_session = Footprint::now().descriptors - before.descriptors;
            assert!(with_session < 32, "{with_session} are open with a session");
            drop(raw);
            scene.wait_disconnected("vm0");
            before.wait_restored();
        }
    }
    // More than the one that each of these carries.
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        let raw = Raw::connect(&scene.socket("vm0"));
        raw.send(request, &[0; 8], &[raw.event.as_fd(); 2]);
        assert!(!raw.lives(), "{request} with 2");
        drop(raw);
        scene.wait_disconnected("vm0");
        before.wait_restored();
    }
    scene.serves_the_next();
}

#[test]
fn files_that_cannot_be_made_non_blocking_end_the_session() {
    let scene = Scene::start();
    let mut neighbour = furnished(&scene, "vm1");
    // It names a place in the file system and does nothing else.
    let path = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let before = Footprint::now();
    for (queue, name) in [(0u64, "control"), (1, "cursor"), (2, "event")] {
        for (request, file) in [(SET_VRING_KICK, "kick"), (SET_VRING_CALL, "call")] {
            let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
            raw.send_memory();
            raw.send(request, &queue.to_le_bytes(), &[path.as_fd()]);
            let reason = scene.wait_disconnected("vm0");
            let expected = format!("the {file} file of its {name} queue cannot be used without waiting");
            assert!(reason.contains(&expected), "{reason}");
            let entry = scene.registry.get("vm0").unwrap();
            assert_eq!(entry.last_error, Some(reason));
            drop(raw);
            before.wait_restored();
        }
    }
    works(&mut neighbour);
    scene.serves_the_next();
}

#[test]
fn e10_headers_that_are_none_end_the_session() {
    let scene = Scene::start();
    let before = Footprint::settled();
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    let mut headers = vec![header(1, PLAIN, u32::MAX), header(1, PLAIN, 0x1001)];
    headers.extend([0, 45, 60, 61, 255, 256, 1 << 16, u32::MAX].map(|request| header(request, PLAIN, 0)));
    headers.extend([0, 2, 3].map(|version| header(1, version, 0)));
    // A reply, and each flag that is reserved.
    headers.push(header(1, PLAIN | 4, 0));
    headers.extend((4..32).map(|bit| header(1, PLAIN | 1 << bit, 0)));
    for bytes in headers {
        let raw = Raw::connect(&scene.socket("vm0"));
        raw.send_bytes(&bytes, &[]);
        assert!(!raw.lives(), "{bytes:02x?}");
        drop(raw);
        scene.wait_disconnected("vm0");
        before.wait_restored();
    }
    scene.serves_the_next();
}

#[test]
fn features_may_be_set_twice_and_only_those_that_were_offered() {
    let scene = Scene::start();
    let mut vmm = furnished(&scene, "vm0");
    let features = vmm.frontend.get_features().unwrap();
    vmm.frontend.set_features(features).unwrap();
    works(&mut vmm);
    drop(vmm);
    scene.wait_disconnected("vm0");
    for bit in (0..64).filter(|bit| features & 1 << bit == 0) {
        let raw = Raw::connect(&scene.socket("vm0"));
        raw.send(SET_FEATURES, &(1u64 << bit).to_le_bytes(), &[]);
        assert!(!raw.lives(), "feature {bit}");
        drop(raw);
        scene.wait_disconnected("vm0");
    }
}

#[test]
fn config_of_any_size_and_place_has_nothing_but_the_device_in_it() {
    let scene = Scene::start();
    let raw = Raw::negotiated(&scene.socket("vm0"), ALL_PROTOCOL);
    let space = scene.guest("vm0").config_space();
    let mut asked = 0;
    for offset in (0..0x100).chain([0xf00, 0xff0, 0xfff]) {
        for size in [1, 2, 3, 4, 7, 8, 64, 127, 128, 129, 0x100, 0xff4 - offset.min(0xff3)] {
            if offset + size > 0x1000 || size > 0xff4 {
                continue;
            }
            let head = [offset, size, 0].map(u32::to_le_bytes).concat();
            // What the VMM sends in the place of the answer is not in the answer.
            let body = [head.clone(), vec![0xa5; size as usize]].concat();
            let answer = raw.ask(GET_CONFIG, &body).unwrap().body;
            let expected: Vec<u8> =
                (offset..offset + size).map(|at| space.get(at as usize).copied().unwrap_or(0)).collect();
            assert_eq!(answer, [head, expected].concat(), "{size} at {offset}");
            asked += 1;
        }
    }
    assert!(asked > 2000, "{asked}");
}

#[test]
fn vmm_that_leaves_or_resets_or_takes_memory_while_jobs_run_is_served_again() {
    type Deed = (&'static str, fn(&mut Vmm));
    let deeds: [Deed; 4] = [
        ("leaves", |_| {}),
        ("resets", |vmm| vmm.frontend.reset_device().unwrap()),
        ("stops", |vmm| drop(vmm.stop_rings())),
        ("takes memory", |vmm| {
            let file = memfd(PAGE_SIZE, true);
            vmm.frontend.set_mem_table(&[region(&file, 1 << 32, PAGE_SIZE, 0)]).unwrap();
        }),
    ];
    let scene = Scene::start();
    let mut neighbour = furnished(&scene, "vm1");
    let before = Footprint::settled();
    for (what, deed) in deeds {
        let mut vmm = furnished(&scene, "vm0");
        accepted(&mut vmm, &supply());
        accepted(&mut vmm, &exec(endless()));
        deed(&mut vmm);
        drop(vmm);
        assert_eq!(scene.wait_disconnected("vm0"), "the VMM left", "{what}");
        before.wait_restored();
    }
    works(&mut neighbour);
    scene.serves_the_next();
}
