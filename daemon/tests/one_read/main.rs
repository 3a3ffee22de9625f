//! No byte that a driver has written is read twice, whatever the command and however its chain is laid out: each command
//! of the protocol is answered from memory that changes under the reader's hands as it is from memory that keeps still.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod memory;
mod rings;
mod world;

use daemon::queue::ChainError;
use memory::Changing;
use rings::{Driver, Layout};
use std::collections::BTreeSet;
use std::sync::Arc;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::EOPNOTSUPP;
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::pages::Told;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{CAPSET_SVM, CONTROLQ, CURSORQ};
use world::{A, C, GPA, PAGE, World};
use zerocopy::{FromBytes, IntoBytes};

/// A command, by its kind and by that of the request in it: how to make one that this guest can be asked for.
type Row = (u32, u32, fn(&World) -> Vec<u8>);

/// Every command. `every_command_is_in_the_table` finds one that is missing.
const COMMANDS: [Row; 20] = [
    (VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0, |_| bare(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0)),
    (VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0, |_| {
        let hdr = world::hdr(VIRTIO_GPU_CMD_GET_CAPSET_INFO, 0);
        GetCapsetInfo { hdr, ..GetCapsetInfo::default() }.as_bytes().to_vec()
    }),
    (VIRTIO_GPU_CMD_GET_CAPSET, 0, |_| {
        let hdr = world::hdr(VIRTIO_GPU_CMD_GET_CAPSET, 0);
        GetCapset { hdr, capset_id: CAPSET_SVM.into(), capset_version: 1.into() }.as_bytes().to_vec()
    }),
    (VIRTIO_GPU_CMD_CTX_CREATE, 0, |_| world::create_context(3)),
    (VIRTIO_GPU_CMD_CTX_DESTROY, 0, |_| bare(VIRTIO_GPU_CMD_CTX_DESTROY, 1)),
    (VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0, |_| {
        world::create_blob(
            2,
            &[(GPA + 32 * PAGE, PAGE), (GPA + 64 * PAGE, 2 * PAGE), (GPA + 40 * PAGE, PAGE)],
        )
    }),
    (VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, |_| world::resource(VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, 1)),
    (VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 0, |_| world::resource(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 2, 1)),
    (VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, 0, |_| world::resource(VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, 1, 1)),
    (VIRTIO_GPU_CMD_SVM_HELLO, 0, |_| world::hello()),
    (VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0, |_| {
        let hdr = world::hdr(VIRTIO_GPU_CMD_SVM_GET_DEVICE, 0);
        GetDevice { hdr, ..GetDevice::default() }.as_bytes().to_vec()
    }),
    (VIRTIO_GPU_CMD_SVM_SUPPLY, 0, |_| {
        let run = |page: u64| world::run(A + page * PAGE, GPA + page * PAGE, 2);
        world::supply(&[run(16), run(20), run(24)])
    }),
    (VIRTIO_GPU_CMD_SVM_SUPPLY, 0, |_| {
        let page = |n: u64| world::run(A + (16 + n) * PAGE, GPA + (16 + 2 * n) * PAGE, 1);
        let Told { num_runs, flags, bytes } = Told::new(&[page(0), page(1), page(2)]).unwrap();
        assert_eq!(flags.get(), SUPPLY_LIST);
        let hdr = world::hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1);
        [Supply { hdr, num_runs, flags, ..Supply::default() }.as_bytes(), &bytes].concat()
    }),
    (VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, 0, |world| {
        let fault = world.fault();
        let hdr = world::hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, 1);
        let head = PageResponse {
            hdr,
            cookie: fault.cookie,
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 2.into(),
            flags: 0.into(),
        };
        let at = fault.cpu_addr.get();
        let runs = [world::run(at, GPA + 100 * PAGE, 1), world::run(at + PAGE, GPA + 101 * PAGE, 1)];
        [head.as_bytes(), runs.as_bytes()].concat()
    }),
    (VIRTIO_GPU_CMD_SVM_INVALIDATE, 0, |_| {
        let hdr = world::hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, 1);
        Invalidate { hdr, start: A.into(), length: PAGE.into(), ..Invalidate::default() }.as_bytes().to_vec()
    }),
    (VIRTIO_GPU_CMD_SUBMIT_3D, SVM_REQ_VM_CREATE, |_| world::submit(2, &[world::vm_create()])),
    (VIRTIO_GPU_CMD_SUBMIT_3D, SVM_REQ_VM_DESTROY, |_| {
        world::submit(1, &[world::vm_ref(SVM_REQ_VM_DESTROY)])
    }),
    (VIRTIO_GPU_CMD_SUBMIT_3D, SVM_REQ_VM_BIND, |_| world::submit(1, &[world::bind(&every_operation())])),
    (VIRTIO_GPU_CMD_SUBMIT_3D, SVM_REQ_EXEC, |_| world::submit(1, &[world::exec(C)])),
    (VIRTIO_GPU_CMD_SUBMIT_3D, SVM_REQ_VM_GET_PROPERTY, |_| {
        world::submit(1, &[world::vm_ref(SVM_REQ_VM_GET_PROPERTY)])
    }),
];

fn bare(kind: u32, ctx_id: u32) -> Vec<u8> {
    world::hdr(kind, ctx_id).as_bytes().to_vec()
}

fn every_operation() -> [BindOp; 6] {
    let at = |op: u32, page: u64| BindOp {
        op: op.into(),
        addr: (C + page * PAGE).into(),
        range: PAGE.into(),
        ..BindOp::default()
    };
    [
        BindOp { obj_offset: PAGE.into(), resource_id: 1.into(), ..at(BIND_OP_MAP, 100) },
        BindOp { flags: BIND_NULL.into(), ..at(BIND_OP_MAP, 101) },
        BindOp { obj_offset: (A + 8 * PAGE).into(), ..at(BIND_OP_MAP_USERPTR, 102) },
        at(BIND_OP_UNMAP, 101),
        BindOp { op: BIND_OP_UNMAP_ALL.into(), resource_id: 1.into(), ..BindOp::default() },
        at(BIND_OP_PREFETCH, 0),
    ]
}

/// The answer to `command` on a queue, as it was written to the driver's buffers, from memory that keeps still or changes.
fn answer(world: &World, queue: u16, layout: Layout, command: &[u8], changing: Option<bool>) -> Vec<u8> {
    let mut driver = Driver::new();
    driver.offer(layout, command);
    let carry_out = |command: &[u8], answer: &mut Vec<u8>, room: usize| match queue {
        CONTROLQ => world.guest.control(command, answer, room),
        _ => world.guest.cursor(command, answer, room),
    };
    if let Some(in_place) = changing {
        let memory = Arc::new(Changing::new(driver.memory.clone(), rings::AVAIL_INDEX, in_place));
        driver.serve(&memory, carry_out);
        assert_eq!(memory.repeated(), [], "{layout:?}: read again, or read after it was written");
        let read = memory.bytes_read(&rings::COMMANDS);
        assert_eq!(read, command.len() as u64, "{layout:?}: bytes of the command that were read");
    } else {
        driver.serve(&Arc::new(driver.memory.clone()), carry_out);
    }
    without_epoch(world, &driver.take_answer())
}

fn ways() -> impl Iterator<Item = (Layout, bool)> {
    Layout::ALL.into_iter().flat_map(|layout| Changing::IN_PLACE.map(|in_place| (layout, in_place)))
}

/// An answer without what differs from one host to the next.
fn without_epoch(world: &World, answer: &[u8]) -> Vec<u8> {
    let mut answer = answer.to_vec();
    let epoch = world.guest.epoch().to_le_bytes();
    let places: Vec<_> =
        (0..answer.len().saturating_sub(7)).filter(|at| answer[*at..at + 8] == epoch).collect();
    places.into_iter().for_each(|at| answer[at..at + 8].fill(0));
    answer
}

#[test]
fn every_command_is_answered_from_memory_that_changes_as_from_memory_that_does_not() {
    for (kind, request, make) in COMMANDS {
        let still = {
            let world = World::new();
            answer(&world, CONTROLQ, Layout::Plain, &make(&world), None)
        };
        let (hdr, _) = CtrlHdr::read_from_prefix(&still).unwrap();
        assert!((0x1100..0x1200).contains(&hdr.kind.get()), "{kind:#x}/{request} is refused: {still:x?}");
        for (layout, in_place) in ways() {
            let world = World::new();
            let changing = answer(&world, CONTROLQ, layout, &make(&world), Some(in_place));
            assert_eq!(changing, still, "{kind:#x}/{request}, {layout:?}, in place: {in_place}");
        }
    }
}

#[test]
fn every_command_is_in_the_table() {
    let world = World::new();
    let mut reply = Vec::new();
    let mut known = |command: &[u8]| {
        world.guest.control(command, &mut reply, 4096);
        SvmResp::read_from_prefix(&reply).is_ok_and(|(head, _)| head.status.get() != -EOPNOTSUPP)
    };
    let mut found = BTreeSet::new();
    for kind in (0..0x1000).filter(|kind| *kind != VIRTIO_GPU_CMD_SUBMIT_3D) {
        if known(&bare(kind, 0)) {
            found.insert((kind, 0));
        }
    }
    for cmd in 0..0x1000 {
        if known(&world::submit(1, &[world::request(cmd, ReqHdr::default().as_bytes())])) {
            found.insert((VIRTIO_GPU_CMD_SUBMIT_3D, cmd));
        }
    }
    assert_eq!(found, COMMANDS.map(|(kind, request, _)| (kind, request)).into());
}

#[test]
fn cursor_commands_are_read_once() {
    let world = World::new();
    for kind in [VIRTIO_GPU_CMD_UPDATE_CURSOR, VIRTIO_GPU_CMD_MOVE_CURSOR] {
        let command = [bare(kind, 0), vec![7; 32]].concat();
        let still = answer(&world, CURSORQ, Layout::Plain, &command, None);
        for (layout, in_place) in ways() {
            assert_eq!(answer(&world, CURSORQ, layout, &command, Some(in_place)), still);
        }
    }
}

#[test]
fn many_commands_of_one_visit_are_each_read_once() {
    let mut answers = Vec::new();
    for changing in [None, Some(false), Some(true)] {
        let (world, mut driver) = (World::new(), Driver::new());
        for ctx_id in 3..8 {
            for layout in Layout::ALL {
                driver.offer(layout, &world::create_context(ctx_id));
            }
        }
        let carry_out =
            |command: &[u8], answer: &mut Vec<u8>, room: usize| world.guest.control(command, answer, room);
        if let Some(in_place) = changing {
            let memory = Arc::new(Changing::new(driver.memory.clone(), rings::AVAIL_INDEX, in_place));
            driver.serve(&memory, carry_out);
            assert_eq!(memory.repeated(), []);
        } else {
            driver.serve(&Arc::new(driver.memory.clone()), carry_out);
        }
        let all = (0..5 * Layout::ALL.len()).map(|_| without_epoch(&world, &driver.take_answer()));
        answers.push(all.collect::<Vec<_>>());
    }
    assert!(answers.iter().all(|others| *others == answers[0]));
}

#[test]
fn event_buffers_are_described_once_and_never_read() {
    for (layout, in_place) in ways() {
        let (world, mut driver) = (World::new(), Driver::new());
        world.start_fault();
        driver.post(layout);
        let memory = Arc::new(Changing::new(driver.memory.clone(), rings::AVAIL_INDEX, in_place));
        driver.deliver(&memory, &world.guest);
        assert_eq!(memory.repeated(), [], "{layout:?}");
        assert_eq!(memory.bytes_read(&rings::COMMANDS), 0);
        let (hdr, records) =
            EventHdr::read_from_prefix(&driver.take_answer()).map(|(h, r)| (h, r.len())).unwrap();
        assert_eq!((hdr.num_records.get(), records), (1, EVENT_RECORD_BYTES));
    }
}

#[test]
fn circles_are_found_without_reading_again() {
    for (length, in_place) in [1, 2, 100].into_iter().zip([true, false, true]) {
        let mut driver = Driver::new();
        driver.offer_circle(length);
        let memory = Arc::new(Changing::new(driver.memory.clone(), rings::AVAIL_INDEX, in_place));
        assert_eq!(driver.refuse(&memory), ChainError::Cycle);
        assert_eq!(memory.repeated(), [], "{length}");
        assert!(driver.take_answer().is_empty());
    }
}

/// The check itself: who reads a command twice is found out.
#[test]
fn reading_twice_is_noticed() {
    use vm_memory::{Bytes, GuestAddress};
    let mut driver = Driver::new();
    driver.offer(Layout::Plain, b"command");
    let memory = Changing::new(driver.memory.clone(), rings::AVAIL_INDEX, false);
    let read = || memory.read_obj::<[u8; 7]>(GuestAddress(rings::COMMANDS.start)).unwrap();
    assert_eq!(read(), *b"command");
    assert_ne!(read(), *b"command");
    assert_eq!(memory.repeated().len(), 1);
}
