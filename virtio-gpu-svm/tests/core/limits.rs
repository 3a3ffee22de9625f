//! Each limit of a guest is granted exactly, the next is refused without effect, and what is given back may be had again.

use crate::mock::*;
use virtio_gpu_svm::device::{Access, StopId, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::control::{
    PAGE_RESP_INVALID, PAGE_RESP_SUCCESS, Supply, SvmResp, VIRTIO_GPU_CMD_SVM_SUPPLY,
};
use virtio_gpu_svm::protocol::errno::{EEXIST, ENOSPC};
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::quota::LimitStatus;
use zerocopy::{FromBytes, IntoBytes};

pub fn row(w: &World, limit: Limit) -> LimitStatus {
    w.guest.status().limits.into_iter().find(|row| row.name == limit.name()).unwrap()
}
fn used(w: &World, limit: Limit) -> u64 {
    row(w, limit).used
}
pub fn create(w: &World, ctx_id: u32) -> i32 {
    let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
    w.status(cmd.as_bytes())
}
/// A blob of pages that do not follow each other.
pub fn blob(w: &World, id: u32, pages: u64) -> i32 {
    let entry =
        |n: u64| MemEntry { addr: (GPA + 2 * n * 4096).into(), length: 4096.into(), padding: 0.into() };
    let entries: Vec<MemEntry> = (0..pages).map(entry).collect();
    let cmd = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: id.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: (pages as u32).into(),
        size: (pages * 4096).into(),
        ..ResourceCreateBlob::default()
    };
    w.status(&[cmd.as_bytes(), entries.as_bytes()].concat())
}
pub fn of_resource(w: &World, kind: u32, ctx_id: u32, id: u32) -> i32 {
    let cmd = CtxResource { hdr: hdr(kind, ctx_id), resource_id: id.into(), padding: 0.into() };
    w.status(cmd.as_bytes())
}
pub fn create_vm(w: &World, ctx_id: u32, dev_id: u32) -> i32 {
    let body = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
    w.submit(ctx_id, SVM_REQ_VM_CREATE, &body.as_bytes()[16..]).0
}
fn destroy_vm(w: &World, ctx_id: u32, vm_id: u32) {
    let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
    assert_eq!(w.submit(ctx_id, SVM_REQ_VM_DESTROY, &body.as_bytes()[16..]).0, 0);
}

#[test]
fn one_context_too_many_is_refused_until_a_record_is_fetched() {
    let w = World::with_limits(Limits { contexts: 2, ..LIMITS });
    assert_eq!((create(&w, 1), create(&w, 2), create(&w, 3)), (0, 0, -ENOSPC));
    assert_eq!(create(&w, 2), -EEXIST);
    w.create_vm(1, 0);
    w.destroy_context(1);
    assert_eq!(create(&w, 3), -ENOSPC, "it has not retired");
    w.devices[0].retire_all(&w.host);
    assert_eq!(create(&w, 3), -ENOSPC, "the driver has not heard of it");
    assert_eq!(w.records().len(), 1);
    assert_eq!((create(&w, 3), create(&w, 4)), (0, -ENOSPC));
    let LimitStatus { used, peak, limit, refused, .. } = row(&w, Limit::Contexts);
    assert_eq!((used, peak, limit, refused), (2, 2, 2, 4));
}

#[test]
fn new_incarnation_gives_everything_back() {
    let w = World::with_limits(Limits { contexts: 2, ..LIMITS });
    assert_eq!((create(&w, 1), create(&w, 2), blob(&w, 7, 3)), (0, 0, 0));
    assert_eq!(of_resource(&w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1, 7), 0);
    w.create_vm(2, 1);
    w.destroy_context(1);
    w.hello(2);
    assert_eq!((used(&w, Limit::Contexts), used(&w, Limit::GpuVms)), (1, 1), "one retires");
    assert_eq!((used(&w, Limit::Resources), used(&w, Limit::ResourceBytes)), (0, 0));
    w.devices[1].retire_all(&w.host);
    assert_eq!((used(&w, Limit::Contexts), used(&w, Limit::GpuVms)), (0, 0));
}

#[test]
fn one_resource_too_many_is_refused() {
    let w = World::with_limits(Limits { resources: 2, ..LIMITS });
    assert_eq!((blob(&w, 1, 1), blob(&w, 2, 1), blob(&w, 3, 1)), (0, 0, -ENOSPC));
    assert_eq!((used(&w, Limit::Resources), row(&w, Limit::ResourceBytes).refused), (2, 0));
    assert_eq!(of_resource(&w, VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, 1), 0);
    assert_eq!((blob(&w, 3, 1), blob(&w, 4, 1)), (0, -ENOSPC));
}

#[test]
fn bytes_of_resources_are_those_of_their_runs_and_attachments() {
    let (one, run, attachment) = (192, 16, 16);
    let resource_bytes = 2 * one + 5 * run + attachment;
    let w = World::with_limits(Limits { resource_bytes, ..LIMITS });
    assert_eq!((blob(&w, 1, 3), blob(&w, 2, 4)), (0, -ENOSPC), "a run and more too many");
    assert_eq!((used(&w, Limit::ResourceBytes), used(&w, Limit::Resources)), (one + 3 * run, 1));
    assert_eq!(blob(&w, 2, 2), 0);
    w.create_context(1);
    w.create_context(2);
    let attach = |ctx_id, id| of_resource(&w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, ctx_id, id);
    assert_eq!((attach(1, 1), attach(1, 1), attach(2, 1)), (0, 0, -ENOSPC), "once more is no more");
    assert_eq!(of_resource(&w, VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, 1, 1), 0);
    assert_eq!((attach(2, 1), attach(1, 2)), (0, -ENOSPC));
    w.destroy_context(2);
    assert_eq!((attach(1, 2), used(&w, Limit::ResourceBytes)), (0, resource_bytes));
    assert_eq!(of_resource(&w, VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, 2), 0);
    assert_eq!(used(&w, Limit::ResourceBytes), one + 3 * run);
}

#[test]
fn gpu_vm_counts_until_it_has_retired() {
    let w = World::with_limits(Limits { gpu_vms: 2, ..LIMITS });
    w.create_context(1);
    w.create_context(2);
    let (vm, _) = w.create_vm(1, 0);
    assert_eq!((create_vm(&w, 1, 1), create_vm(&w, 2, 0)), (0, -ENOSPC));
    assert_eq!(create_vm(&w, 1, 0), -EEXIST, "what it has already is no question of limits");
    destroy_vm(&w, 1, vm);
    assert_eq!(create_vm(&w, 2, 0), -ENOSPC);
    w.devices[0].retire_all(&w.host);
    assert_eq!(create_vm(&w, 2, 0), 0);
    assert_eq!(row(&w, Limit::GpuVms).refused, 2);
}

#[test]
fn gpu_vm_that_its_device_refuses_is_not_counted() {
    let w = World::new();
    w.create_context(1);
    w.devices[0].told().full = true;
    assert_eq!((create_vm(&w, 1, 0), used(&w, Limit::GpuVms)), (-ENOSPC, 0));
    w.devices[0].told().full = false;
    w.devices[0].told().fails_at = Some(1);
    assert_ne!(create_vm(&w, 1, 0), 0);
    assert_eq!(used(&w, Limit::GpuVms), 0);
    assert_eq!((create_vm(&w, 1, 0), used(&w, Limit::GpuVms)), (0, 1));
}

fn is_exact(w: &World) {
    for (limit, counted) in w.guest.recount() {
        assert_eq!(used(w, limit), counted, "{limit}");
    }
}
/// An asynchronous bind; its status.
pub fn bind_async(w: &World, ctx_id: u32, vm: u32, ops: &[BindOp], wait: Option<FencePoint>) -> i32 {
    let head = VmBind {
        vm_id: vm.into(),
        num_binds: (ops.len() as u32).into(),
        flags: VM_BIND_ASYNC.into(),
        num_waits: u32::from(wait.is_some()).into(),
        ..VmBind::default()
    };
    let body = [&head.as_bytes()[16..], wait.as_slice().as_bytes(), ops.as_bytes()].concat();
    w.submit(ctx_id, SVM_REQ_VM_BIND, &body).0
}
/// A job of so many packets on a ring that promises a point; its status.
pub fn exec(w: &World, ctx_id: u32, vm: u32, ring: u32, packets: usize, signal: u64) -> i32 {
    let head = Exec {
        vm_id: vm.into(),
        ring_idx: ring.into(),
        num_packets: (packets as u32).into(),
        signal: signal.into(),
        ..Exec::default()
    };
    let packets = vec![Packet::default(); packets];
    w.submit(ctx_id, SVM_REQ_EXEC, &[&head.as_bytes()[16..], packets.as_bytes()].concat()).0
}

#[test]
fn mappings_of_all_gpu_vms_are_limited_together() {
    let w = World::with_limits(Limits { mappings: 8, total_mappings: 10, ..LIMITS });
    w.create_context(1);
    w.create_context(2);
    let (a, b) = (w.create_vm(1, 0).0, w.create_vm(2, 0).0);
    let place = |n: u64| map(C + n * 8192, A + n * 8192, 1);
    let some = |n: std::ops::Range<u64>| n.map(place).collect::<Vec<_>>();
    assert_eq!((w.bind(1, a, &some(0..8)), w.bind(2, b, &some(0..2))), (0, 0));
    assert_eq!(w.bind(1, a, &some(8..9)), -ENOSPC, "its own limit comes first");
    assert_eq!((row(&w, Limit::Mappings).refused, row(&w, Limit::TotalMappings).refused), (1, 0));
    let (status, reply) = bind_reply(&w, 2, b, &some(1..4));
    assert_eq!((status, reply.detail.get()), (-ENOSPC, 1), "the first stands in the place of another");
    is_exact(&w);
    assert_eq!(w.bind(1, a, &[unmap(C, 1)]), 0);
    assert_eq!((w.bind(2, b, &some(2..3)), w.bind(2, b, &some(3..4))), (0, -ENOSPC));
    let row = row(&w, Limit::TotalMappings);
    assert_eq!((row.used, row.peak, row.refused), (10, 10, 2));
    is_exact(&w);
}
fn bind_reply(w: &World, ctx_id: u32, vm: u32, ops: &[BindOp]) -> (i32, RspHdr) {
    let head = VmBind { vm_id: vm.into(), num_binds: (ops.len() as u32).into(), ..VmBind::default() };
    let body = [&head.as_bytes()[16..], ops.as_bytes()].concat();
    let (status, reply) = w.submit(ctx_id, SVM_REQ_VM_BIND, &body);
    (status, RspHdr::read_from_prefix(&reply).unwrap().0)
}

#[test]
fn queued_bind_has_its_mappings_put_by() {
    let w = World::with_limits(Limits { total_mappings: 6, ..LIMITS });
    w.create_context(1);
    w.create_context(2);
    let (a, b) = (w.create_vm(1, 0).0, w.create_vm(2, 0).0);
    assert_eq!(w.bind(1, a, &[map(C, A, 8)]), 0);
    assert_eq!(exec(&w, 1, a, 1, 1, 7), 0);
    let wait = FencePoint { vm_id: a.into(), ring_idx: 1.into(), seqno: 7.into() };
    assert_eq!(bind_async(&w, 1, a, &[map(C + 4096, A, 1)], Some(wait)), 0);
    assert_eq!(used(&w, Limit::TotalMappings), 3, "a mapping in the middle of another makes three of one");
    assert_eq!(bind_async(&w, 1, a, &[map(C, A, 1); 2], Some(wait)), -ENOSPC);
    let others: Vec<_> = (0..4).map(|n| map(C + n * 8192, A, 1)).collect();
    assert_eq!((w.bind(2, b, &others), w.bind(2, b, &others[..3])), (-ENOSPC, 0));
    is_exact(&w);
    w.devices[0].end_job(&w.host, 0);
    assert_eq!(w.guest.context(1).unwrap().vm_property(a, |vm, _| vm.mappings.len()), Ok(3));
    assert_eq!(used(&w, Limit::TotalMappings), 6);
    is_exact(&w);
}

#[test]
fn what_a_queued_bind_did_not_need_is_given_back() {
    let w = World::new();
    w.create_context(1);
    let vm = w.create_vm(1, 0).0;
    assert_eq!(exec(&w, 1, vm, 1, 1, 7), 0);
    let wait = FencePoint { vm_id: vm.into(), ring_idx: 1.into(), seqno: 7.into() };
    assert_eq!(bind_async(&w, 1, vm, &[map(C, A, 1), unmap(C, 1)], Some(wait)), 0);
    assert_eq!(used(&w, Limit::TotalMappings), 4);
    w.devices[0].end_job(&w.host, 0);
    assert_eq!(used(&w, Limit::TotalMappings), 0);
    // One that fails at its turn, and one that goes with its GPU VM.
    let over: Vec<_> = (0..8).map(|n| map(C + n * 8192, A, 1)).collect();
    assert_eq!((w.bind(1, vm, &over), exec(&w, 1, vm, 1, 1, 8)), (0, 0));
    let wait = FencePoint { seqno: 8.into(), ..wait };
    assert_eq!(bind_async(&w, 1, vm, &[map(C + (1 << 20), A, 1)], Some(wait)), 0);
    assert_eq!(used(&w, Limit::TotalMappings), 10);
    w.devices[0].end_job(&w.host, 0);
    assert_eq!((used(&w, Limit::TotalMappings), row(&w, Limit::Mappings).refused), (8, 1));
    w.records();
    let (vm, _) = w.create_vm(1, 1);
    assert_eq!(exec(&w, 1, vm, 0, 1, 0), 0);
    assert_eq!(bind_async(&w, 1, vm, &[map(C, A, 1)], None), 0);
    is_exact(&w);
    destroy_vm(&w, 1, vm);
    assert_eq!(used(&w, Limit::TotalMappings), 8);
    is_exact(&w);
}

#[test]
fn jobs_of_all_contexts_are_limited_until_their_records_are_fetched() {
    let w = World::with_limits(Limits { jobs: 4, total_jobs: 3, ..LIMITS });
    w.create_context(1);
    w.create_context(2);
    let (a, b) = (w.create_vm(1, 0).0, w.create_vm(2, 0).0);
    assert_eq!((exec(&w, 1, a, 0, 1, 0), exec(&w, 1, a, 0, 1, 0), exec(&w, 2, b, 0, 1, 0)), (0, 0, 0));
    assert_eq!((exec(&w, 2, b, 0, 1, 0), bind_async(&w, 1, a, &[unmap(C, 1)], None)), (-ENOSPC, -ENOSPC));
    w.devices[0].end_job(&w.host, 0);
    assert_eq!(exec(&w, 2, b, 0, 1, 0), -ENOSPC, "a record waits");
    assert_eq!(w.records().len(), 1);
    assert_eq!((exec(&w, 2, b, 0, 1, 0), row(&w, Limit::TotalJobs).refused), (0, 3));
    is_exact(&w);
    w.destroy_context(2);
    assert_eq!(used(&w, Limit::TotalJobs), 1);
    is_exact(&w);
}

#[test]
fn bytes_of_queued_work_are_those_of_its_lists() {
    let (item, ring, packet) = (512, 2048, 64);
    let queue_bytes = ring + 2 * item + 10 * packet;
    let w = World::with_limits(Limits { queue_bytes, ..LIMITS });
    w.create_context(1);
    let vm = w.create_vm(1, 0).0;
    assert_eq!((exec(&w, 1, vm, 0, 6, 0), exec(&w, 1, vm, 0, 5, 0)), (0, -ENOSPC));
    assert_eq!((exec(&w, 1, vm, 1, 1, 0), exec(&w, 1, vm, 0, 4, 0)), (-ENOSPC, 0), "another ring costs more");
    assert_eq!(used(&w, Limit::QueueBytes), queue_bytes);
    is_exact(&w);
    w.devices[0].end_job(&w.host, 0);
    assert_eq!(used(&w, Limit::QueueBytes), ring + item + 4 * packet, "a record is not of the queue");
    assert_eq!(exec(&w, 1, vm, 0, 6, 0), 0);
    destroy_vm(&w, 1, vm);
    assert_eq!(used(&w, Limit::QueueBytes), 0);
    is_exact(&w);
}

/// Limits with so many bytes, what takes them, and how many it takes.
type Bytes = (fn(u64) -> Limits, fn(&World) -> i32, u64);

const BYTES: [Bytes; 3] = [
    (|resource_bytes| Limits { resource_bytes, ..LIMITS }, |w| blob(w, 1, 1), 192 + 16),
    (
        |table_bytes| Limits { table_bytes, ..LIMITS },
        |w| {
            w.create_context(1);
            w.supply(1, &[run(A, GPA, 1, 0)])
        },
        96 + 2048,
    ),
    (
        |queue_bytes| Limits { queue_bytes, ..LIMITS },
        |w| {
            w.create_context(1);
            let vm = w.create_vm(1, 0).0;
            exec(w, 1, vm, 0, 1, 0)
        },
        2048 + 512 + 64,
    ),
];

#[test]
fn one_byte_too_few_is_too_few() {
    for (limits, act, bytes) in BYTES {
        assert_eq!(act(&World::with_limits(limits(bytes))), 0);
        assert_eq!(act(&World::with_limits(limits(bytes - 1))), -ENOSPC);
    }
}

#[test]
fn bytes_of_address_spaces_are_limited_together() {
    const LEAF: u64 = 2 << 20;
    let full = 96 + 2048;
    let w = World::with_limits(Limits { table_bytes: 2 * full + 96, ..LIMITS });
    w.create_context(1);
    w.create_context(2);
    let at = |leaf: u64| run(A + leaf * LEAF, GPA, 1, 0);
    assert_eq!((w.supply(1, &[at(0)]), w.supply(2, &[at(0)]), w.supply(2, &[at(1)])), (0, 0, -ENOSPC));
    assert_eq!((w.supply(1, &[run(A + 4096, GPA, 3, 0)]), used(&w, Limit::TableBytes)), (0, 2 * full));
    is_exact(&w);
    w.invalidate(1, A, 4096);
    assert_eq!(w.supply(2, &[run(A + LEAF, GPA, 1, 0)]), -ENOSPC, "others of its pages are known");
    w.invalidate(1, A, LEAF);
    assert_eq!((w.supply(2, &[at(1)]), used(&w, Limit::TableBytes)), (0, 2 * full));
    // A leaf that is one run is charged as one that is cut.
    w.invalidate(2, 0, 1 << 47);
    assert_eq!(w.supply(2, &[run(A & !(LEAF - 1), GPA, 512, 1)]), 0);
    assert_eq!(used(&w, Limit::TableBytes), full);
    w.invalidate(2, A, 4096);
    assert_eq!(used(&w, Limit::TableBytes), full);
    is_exact(&w);
    w.guest.set_memory(table(&[]));
    assert_eq!(used(&w, Limit::TableBytes), 96, "nothing is known there any more");
    is_exact(&w);
}

#[test]
fn access_for_which_there_are_no_tables_fails_and_is_named() {
    let w = World::with_limits(Limits { table_bytes: 96 + 2048 + TABLE_BYTES, ..LIMITS });
    let (_, asid) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 1, 0), run(A + 16 * 4096, GPA, 1, 0)]), 0);
    let first = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let second = w.devices[0].raise(&w.host, asid, C + 16 * 4096, Access::Read);
    assert_eq!(w.devices[0].verdict(first), Some(Verdict::Retry));
    assert_eq!(w.devices[0].verdict(second), Some(Verdict::Fail(ENOSPC)));
    assert_eq!(
        (row(&w, Limit::TableBytes).refused, w.guest.quota().newly_reached()),
        (1, vec![Limit::TableBytes])
    );
    is_exact(&w);
    // The same for one that the guest answers.
    w.invalidate(1, A + 16 * 4096, 4096);
    let third = w.devices[0].raise(&w.host, asid, C + 16 * 4096, Access::Read);
    let cookie = w.cookies()[0];
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A + 16 * 4096, GPA, 1, 1)]), 0);
    assert_eq!(w.devices[0].verdict(third), Some(Verdict::Fail(ENOSPC)));
    w.guest.evict(1, None).unwrap();
    let again = w.devices[0].raise(&w.host, asid, C + 16 * 4096, Access::Read);
    assert_eq!(w.devices[0].verdict(again), Some(Verdict::Retry));
    is_exact(&w);
}

/// Raises a fault and says whether it waits; the access of one that is throttled or pending is not resumed.
fn raise(w: &World, asid: u32, page: u64) -> StopId {
    w.devices[0].raise(&w.host, asid, C + page * 4096, Access::Read)
}
fn resumed(w: &World, stop: StopId) -> Option<Verdict> {
    w.devices[0].verdict(stop)
}
/// Cookies that wait, with the context and GPU address of each.
fn asked(w: &World) -> Vec<(u32, u64, u64)> {
    let told =
        |record: &FaultRecord| (record.ctx_id.get(), (record.addr.get() - C) / 4096, record.cookie.get());
    faults(w).iter().map(told).collect()
}

#[test]
fn faults_beyond_the_guests_limit_wait_and_take_turns() {
    let w = World::with_limits(Limits { total_pending_faults: 2, ..LIMITS });
    let asids = [1, 2, 3].map(|ctx_id| w.mapped(ctx_id).1);
    let first = raise(&w, asids[0], 0);
    raise(&w, asids[0], 1);
    let waiting = [raise(&w, asids[1], 0), raise(&w, asids[2], 0), raise(&w, asids[0], 2)];
    assert_eq!((used(&w, Limit::TotalPendingFaults), row(&w, Limit::TotalPendingFaults).refused), (2, 3));
    let cookies = asked(&w);
    assert_eq!(
        cookies.iter().map(|(ctx_id, page, _)| (*ctx_id, *page)).collect::<Vec<_>>(),
        [(1, 0), (1, 1)]
    );
    // One ends: the context that has waited longest is let in, and not the one that made room.
    assert_eq!(w.respond(1, cookies[0].2, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    w.host.work_off();
    assert_eq!(resumed(&w, first), Some(Verdict::Retry));
    assert_eq!(waiting.map(|stop| resumed(&w, stop)), [Some(Verdict::Retry), None, None]);
    raise(&w, asids[1], 0);
    assert_eq!(asked(&w).len(), 1, "it has room now");
    // Two end: both others are let in, one after the other.
    w.destroy_context(2);
    w.host.work_off();
    assert_eq!(resumed(&w, waiting[1]), Some(Verdict::Retry));
    raise(&w, asids[2], 0);
    assert_eq!(w.respond(1, cookies[1].2, PAGE_RESP_INVALID, &[]), 0);
    w.host.work_off();
    assert_eq!(resumed(&w, waiting[2]), Some(Verdict::Retry));
    is_exact(&w);
}

#[test]
fn room_that_a_context_does_not_need_any_more_goes_to_the_next() {
    let w = World::with_limits(Limits { total_pending_faults: 1, ..LIMITS });
    let (one, two, three) = (w.mapped(1), w.mapped(2), w.mapped(3));
    raise(&w, one.1, 0);
    let (second, third) = (raise(&w, two.1, 0), raise(&w, three.1, 0));
    // Its page comes to be known meanwhile: it needs no room.
    assert_eq!(w.supply(2, &[run(A, GPA, 1, 0)]), 0);
    let cookie = asked(&w)[0].2;
    assert_eq!(w.respond(1, cookie, PAGE_RESP_INVALID, &[]), 0);
    w.host.work_off();
    assert_eq!((resumed(&w, second), resumed(&w, third)), (Some(Verdict::Retry), Some(Verdict::Retry)));
    raise(&w, three.1, 0);
    // The same with one that is gone when its turn comes.
    let (second, third) = (raise(&w, two.1, 1), raise(&w, one.1, 1));
    w.destroy_context(2);
    assert_eq!(w.respond(3, asked(&w)[0].2, PAGE_RESP_INVALID, &[]), 0);
    w.host.work_off();
    assert_eq!((resumed(&w, second), resumed(&w, third)), (None, Some(Verdict::Retry)));
    is_exact(&w);
}

#[test]
fn throttled_access_is_let_in_when_the_one_before_it_goes_with_its_gpu_vm() {
    let w = World::with_limits(Limits { pending_faults: 1, ..LIMITS });
    let (vm, asid) = w.mapped(1);
    let (other, other_asid) = w.create_vm(1, 1);
    assert_eq!(w.bind(1, other, &[map(C, A, 64)]), 0);
    raise(&w, asid, 0);
    let (next, last) =
        (raise(&w, asid, 1), w.devices[1].raise(&w.host, other_asid, C + 2 * 4096, Access::Read));
    assert_eq!(w.respond(1, asked(&w)[0].2, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert_eq!((resumed(&w, next), w.devices[1].verdict(last)), (Some(Verdict::Retry), None));
    destroy_vm(&w, 1, vm);
    assert_eq!(w.devices[1].verdict(last), Some(Verdict::Retry));
}

#[test]
fn prefetch_beyond_the_guests_limit_goes_on_later() {
    let w = World::with_limits(Limits { total_pending_faults: 1, pending_faults: 64, ..LIMITS });
    let ((_, asid), (vm, _)) = (w.mapped(1), w.mapped(2));
    raise(&w, asid, 0);
    let prefetch =
        BindOp { op: BIND_OP_PREFETCH.into(), addr: C.into(), range: 4096.into(), ..BindOp::default() };
    assert_eq!(w.bind(2, vm, &[prefetch]), 0);
    let waiting = asked(&w);
    assert_eq!(waiting.len(), 1, "{waiting:?}");
    assert_eq!(w.respond(1, waiting[0].2, PAGE_RESP_INVALID, &[]), 0);
    w.host.work_off();
    assert_eq!(asked(&w).iter().map(|(ctx_id, ..)| *ctx_id).collect::<Vec<_>>(), [2]);
    is_exact(&w);
}

#[test]
fn page_wishes_beyond_the_guests_bytes_are_dropped_as_advice() {
    let w = World::with_limits(Limits { mappings: 64, queue_bytes: 10 * 16, pending_faults: 1, ..LIMITS });
    let (vm, asid) = w.mapped(1);
    raise(&w, asid, 63);
    let wish = |n: u64| BindOp {
        op: BIND_OP_PREFETCH.into(),
        addr: (C + 2 * n * 4096).into(),
        range: 4096.into(),
        ..BindOp::default()
    };
    let wishes = |n: u64| (0..n).map(wish).collect::<Vec<_>>();
    assert_eq!(w.bind(1, vm, &wishes(14)), 0);
    assert_eq!(used(&w, Limit::QueueBytes), 10 * 16);
    is_exact(&w);
    assert_eq!(w.bind(1, vm, &wishes(16)), 0);
    assert_eq!((used(&w, Limit::QueueBytes), row(&w, Limit::QueueBytes).refused), (0, 1));
    is_exact(&w);
}

/// Waits for engines, and so for what they still have.
fn unref(w: &World, id: u32) -> i32 {
    w.devices.iter().for_each(|device| device.retire_all(&w.host));
    of_resource(w, VIRTIO_GPU_CMD_RESOURCE_UNREF, 0, id)
}

/// One of everything, in two contexts.
fn everything(w: &World) {
    for ctx_id in [1, 2] {
        create(w, ctx_id);
        blob(w, ctx_id, 2);
        of_resource(w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, ctx_id, ctx_id);
        create_vm(w, ctx_id, 0);
        create_vm(w, ctx_id, 1);
        w.bind(ctx_id, 1, &[map(C, A, 64)]);
        w.supply(ctx_id, &[run(A, GPA, 1, 0)]);
        exec(w, ctx_id, 1, 0, 3, 1);
        let wait = FencePoint { vm_id: 1.into(), ring_idx: 0.into(), seqno: 1.into() };
        bind_async(w, ctx_id, 1, &[map(C + 4096, A, 1)], Some(wait));
        let null = BindOp { flags: (BIND_NULL | BIND_IMMEDIATE).into(), ..map(C + (1 << 20), 0, 4) };
        w.bind(ctx_id, 1, &[BindOp { op: BIND_OP_MAP.into(), ..null }]);
        let asids = w.guest.context(ctx_id).map(|context| context.vm_property(1, |vm, _| vm.asid.0));
        if let Ok(Ok(asid)) = asids {
            raise(w, asid, 0);
            raise(w, asid, 2);
        }
        if let Some((_, _, cookie)) = asked(w).pop() {
            w.respond(ctx_id, cookie, PAGE_RESP_SUCCESS, &[run(A + 2 * 4096, GPA, 1, 0)]);
        }
    }
}
fn is_empty(w: &World, why: &str) {
    for device in &w.devices {
        device.retire_all(&w.host);
    }
    w.records();
    for LimitStatus { name, used, .. } in w.guest.status().limits {
        assert_eq!(used, 0, "{name} after {why}");
    }
}

#[test]
fn whatever_call_of_a_device_fails_all_is_given_back() {
    let mut calls = 0;
    loop {
        let w = World::new();
        for device in &w.devices {
            device.told().fails_at = Some(calls);
        }
        everything(&w);
        is_exact(&w);
        let made = w.devices.iter().map(|device| device.told().fallible).max().unwrap();
        for ctx_id in [1, 2] {
            let destroy = hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id);
            assert_eq!(w.status(destroy.as_bytes()), 0);
            unref(&w, ctx_id);
        }
        is_empty(&w, &format!("call {calls} failed"));
        if calls > made {
            break;
        }
        calls += 1;
    }
    assert!(calls > 8, "only {calls} calls can fail");
}

/// Steps of the random test; the long version: `SVM_OPS=1000000`.
const OPS: u64 = 20_000;

/// So tight that random operations reach each of them.
const TIGHT: Limits = Limits {
    contexts: 3,
    resources: 3,
    resource_bytes: 3 * 192 + 16 * 16,
    gpu_vms: 4,
    mappings: 8,
    total_mappings: 20,
    table_bytes: 8 * 2144,
    pending_faults: 2,
    total_pending_faults: 3,
    jobs: 4,
    total_jobs: 6,
    queue_bytes: 4 * 2048 + 12 * 512 + 64 * 64,
    ..LIMITS
};

#[test]
fn random_operations_keep_the_gauges_exact() {
    let from_env = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let mut seed: u64 = from_env("SVM_SEED").unwrap_or(0x0d15_ea5e);
    println!("SVM_SEED={seed}");
    let w = World::with_limits(TIGHT);
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let (mut waiting, mut incarnation) = (Vec::new(), 1);
    for step in 0..from_env("SVM_OPS").unwrap_or(OPS) {
        let ctx_id = 1 + random(3) as u32;
        let known = w.guest.context(ctx_id).ok();
        let vms = known.as_ref().map_or(Vec::new(), |context| context.status().vms);
        let vm = vms.get(random(2) as usize % vms.len().max(1));
        let (vm_id, device, asid) = vm.map_or((9, 0, 0), |vm| (vm.vm_id, vm.device, vm.asid));
        let page = random(40);
        let (gpu, cpu) = (C + page * 4096, A + page * 4096);
        let seq = known.as_ref().map_or(0, |context| context.status().inval_seq);
        match random(26) {
            0 => drop(create(&w, ctx_id)),
            1 if random(4) == 0 => drop(w.status(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes())),
            2 => drop(blob(&w, 1 + random(4) as u32, 1 + random(8))),
            3 => drop(unref(&w, 1 + random(4) as u32)),
            4 => drop(of_resource(&w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, ctx_id, 1 + random(4) as u32)),
            5 => drop(of_resource(&w, VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, ctx_id, 1 + random(4) as u32)),
            6 => drop(create_vm(&w, ctx_id, random(2) as u32)),
            7 if random(4) == 0 && vm.is_some() => destroy_vm(&w, ctx_id, vm_id),
            8 | 9 => drop(w.bind(ctx_id, vm_id, &[map(gpu, cpu, 1 + random(8))])),
            10 => drop(w.bind(ctx_id, vm_id, &[unmap(gpu, 1 + random(8))])),
            11 => {
                let op = BindOp { op: BIND_OP_PREFETCH.into(), obj_offset: 0.into(), ..map(gpu, 0, 4) };
                w.bind(ctx_id, vm_id, &[op]);
            }
            12 => {
                let ops = [map(gpu, cpu, 1), unmap(gpu + 8192, 1)];
                bind_async(&w, ctx_id, vm_id, &ops[..1 + random(2) as usize], None);
            }
            13 | 14 => drop(exec(&w, ctx_id, vm_id, random(2) as u32, 1 + random(40) as usize, 0)),
            15 => drop(w.supply(ctx_id, &[run(cpu + random(3) * (2 << 20), GPA + page * 4096, 1, seq)])),
            16 if known.is_some() => drop(w.invalidate(ctx_id, cpu, 4096 << random(12))),
            17 | 22..=25 if vm.is_some() => {
                w.devices[device].raise(&w.host, asid, gpu, Access::Read);
            }
            18 => {
                let of_device = &w.devices[random(2) as usize];
                if let Some(job) = of_device.jobs().first() {
                    of_device.end(&w.host, *job, if random(3) == 0 { 14 } else { 0 });
                }
            }
            19 => {
                waiting.extend(asked_of_any(&w));
                if !waiting.is_empty() {
                    let (ctx_id, cookie, at) = waiting.swap_remove(random(waiting.len() as u64) as usize);
                    let seq = w.guest.context(ctx_id).map_or(0, |context| context.status().inval_seq);
                    let code = random(2) as u32;
                    let runs = [run(at, GPA + (at - A) % MEMORY / 4096 * 4096, 1, seq)];
                    w.respond(ctx_id, cookie, code, if code == PAGE_RESP_SUCCESS { &runs } else { &[] });
                }
            }
            20 => {
                w.host.work_off();
                w.devices[random(2) as usize].retire_all(&w.host);
            }
            21 if random(50) == 0 => {
                incarnation += 1;
                w.hello(incarnation);
            }
            _ => {}
        }
        if step % 8 == 0 {
            is_exact(&w);
        }
    }
    w.hello(incarnation + 1);
    is_empty(&w, "all of it");
    let untouched = w.guest.status().limits.into_iter().filter(|row| row.refused == 0).map(|row| row.name);
    assert_eq!(untouched.collect::<Vec<_>>(), [""; 0], "limits that were never reached");
}
fn asked_of_any(w: &World) -> Vec<(u32, u64, u64)> {
    let told = |record: &FaultRecord| (record.ctx_id.get(), record.cookie.get(), record.cpu_addr.get());
    faults(w).iter().map(told).collect()
}

#[test]
fn refusal_names_its_limit_on_the_wire() {
    let w =
        World::with_limits(Limits { contexts: 1, total_mappings: 1, table_bytes: 2144, jobs: 1, ..LIMITS });
    let told = |bytes: &[u8]| {
        let (resp, rest) = SvmResp::read_from_prefix(bytes).unwrap();
        let of_reply = RspHdr::read_from_prefix(rest).map_or(0, |(rsp, _)| rsp.limit.get());
        (resp.status.get(), resp.detail.get(), Limit::from_wire(resp.limit.get()), Limit::from_wire(of_reply))
    };
    w.create_context(1);
    let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, 2), ..CtxCreate::default() };
    assert_eq!(told(&w.send(cmd.as_bytes())), (-ENOSPC, 0, Some(Limit::Contexts), None));
    let runs = [run(A, GPA, 1, 0), run(A + (2 << 20), GPA, 1, 0)];
    let supply = Supply { hdr: hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1), num_runs: 2.into(), ..Supply::default() };
    let sent = w.send(&[supply.as_bytes(), runs.as_bytes()].concat());
    assert_eq!(told(&sent), (-ENOSPC, 1, Some(Limit::TableBytes), None));
    let vm = w.create_vm(1, 0).0;
    let ops = [map(C, A, 1), map(C + 8192, A, 1)];
    let head = VmBind { vm_id: vm.into(), num_binds: 2.into(), ..VmBind::default() };
    let body = [&head.as_bytes()[16..], ops.as_bytes()].concat();
    let sent = w.submit_whole(1, SVM_REQ_VM_BIND, &body);
    assert_eq!(told(&sent), (-ENOSPC, 0, Some(Limit::TotalMappings), Some(Limit::TotalMappings)));
    assert_eq!(exec(&w, 1, vm, 0, 1, 0), 0);
    let exec = Exec { vm_id: vm.into(), num_packets: 1.into(), ..Exec::default() };
    let body = [&exec.as_bytes()[16..], Packet::default().as_bytes()].concat();
    let sent = w.submit_whole(1, SVM_REQ_EXEC, &body);
    assert_eq!(told(&sent), (-ENOSPC, 0, Some(Limit::Jobs), Some(Limit::Jobs)));
    let other = VmRef { vm_id: 99.into(), ..VmRef::default() };
    let sent = w.submit_whole(1, SVM_REQ_VM_DESTROY, &other.as_bytes()[16..]);
    assert_eq!(told(&sent).2, None, "what is no question of limits names none");
}
