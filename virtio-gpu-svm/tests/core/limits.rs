//! Each limit of a guest is granted exactly, the next is refused without effect, and what is given back may be had again.

use crate::mock::*;
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::control::PAGE_RESP_SUCCESS;
use virtio_gpu_svm::protocol::errno::{EEXIST, ENOSPC};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::quota::LimitStatus;
use zerocopy::{FromBytes, IntoBytes};

fn row(w: &World, limit: Limit) -> LimitStatus {
    w.guest.status().limits.into_iter().find(|row| row.name == limit.name()).unwrap()
}
fn used(w: &World, limit: Limit) -> u64 {
    row(w, limit).used
}
fn create(w: &World, ctx_id: u32) -> i32 {
    let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
    w.status(cmd.as_bytes())
}
/// A blob of pages that do not follow each other.
fn blob(w: &World, id: u32, pages: u64) -> i32 {
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
fn of_resource(w: &World, kind: u32, ctx_id: u32, id: u32) -> i32 {
    let cmd = CtxResource { hdr: hdr(kind, ctx_id), resource_id: id.into(), padding: 0.into() };
    w.status(cmd.as_bytes())
}
fn create_vm(w: &World, ctx_id: u32, dev_id: u32) -> i32 {
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
fn bind_async(w: &World, ctx_id: u32, vm: u32, ops: &[BindOp], wait: Option<FencePoint>) -> i32 {
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
fn exec(w: &World, ctx_id: u32, vm: u32, ring: u32, packets: usize, signal: u64) -> i32 {
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

#[test]
fn bytes_of_address_spaces_are_limited_together() {
    const LEAF: u64 = 2 << 20;
    let full = 96 + 4096;
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
    let w = World::with_limits(Limits { table_bytes: 96 + 4096 + TABLE_BYTES, ..LIMITS });
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
