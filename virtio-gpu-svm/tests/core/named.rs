//! What a guest and its operator are told of limits: the name of the one that is reached, and the most that was held.

use crate::limits::{bind_async, blob, create, create_vm, exec, of_resource, row};
use crate::mock::{A, C, GPA, LIMITS, World, device_info, map, run, unmap};
use virtio_gpu_svm::context;
use virtio_gpu_svm::device::{Access, DeviceInfo, Error as DeviceError, FaultModel};
use virtio_gpu_svm::fault::response;
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::population::MAX_POPULATED_PAGES;
use virtio_gpu_svm::protocol::control::PAGE_RESP_INVALID;
use virtio_gpu_svm::protocol::errno::ENOSPC;
use virtio_gpu_svm::protocol::gpu::VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::quota::Full;

/// A limit, what it leaves no room for, and the status of that.
type Case = (Limit, Limits, fn(&World) -> i32);

/// A context with a GPU VM.
fn vm(w: &World) -> u32 {
    w.create_context(1);
    w.create_vm(1, 0).0
}

const CASES: [Case; 15] = [
    (Limit::Contexts, Limits { contexts: 1, ..LIMITS }, |w| create(w, 1) + create(w, 2)),
    (Limit::Resources, Limits { resources: 1, ..LIMITS }, |w| blob(w, 1, 1) + blob(w, 2, 1)),
    (Limit::ResourceBytes, Limits { resource_bytes: 208, ..LIMITS }, |w| blob(w, 1, 2)),
    (Limit::ResourceBytes, Limits { resource_bytes: 208, ..LIMITS }, |w| {
        w.create_context(1);
        blob(w, 1, 1) + of_resource(w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1, 1)
    }),
    (Limit::GpuVms, Limits { gpu_vms: 1, ..LIMITS }, |w| {
        vm(w);
        create_vm(w, 1, 1)
    }),
    (Limit::Mappings, Limits { mappings: 1, ..LIMITS }, |w| {
        w.bind(1, vm(w), &[map(C, A, 1), map(C + 8192, A, 1)])
    }),
    (Limit::Mappings, Limits { mappings: 1, ..LIMITS }, |w| bind_async(w, 1, vm(w), &[unmap(C, 1); 2], None)),
    (Limit::TotalMappings, Limits { total_mappings: 1, ..LIMITS }, |w| {
        w.bind(1, vm(w), &[map(C, A, 1), map(C + 8192, A, 1)])
    }),
    (Limit::TableBytes, Limits { table_bytes: 2143, ..LIMITS }, |w| {
        w.create_context(1);
        w.supply(1, &[run(A, GPA, 1, 0)])
    }),
    (Limit::Jobs, Limits { jobs: 1, ..LIMITS }, |w| {
        let vm = vm(w);
        w.exec(1, vm) + w.exec(1, vm)
    }),
    (Limit::TotalJobs, Limits { total_jobs: 1, ..LIMITS }, |w| {
        let vm = vm(w);
        w.exec(1, vm) + w.exec(1, vm)
    }),
    (Limit::QueueBytes, Limits { queue_bytes: 2623, ..LIMITS }, |w| exec(w, 1, vm(w), 0, 1, 0)),
    (Limit::QueueBytes, Limits { queue_bytes: 64, ..LIMITS }, |w| {
        bind_async(w, 1, vm(w), &[unmap(C, 1)], None)
    }),
    (Limit::ResidentPages, LIMITS, |w| w.bind(1, vm(w), &[map(C, A, MAX_POPULATED_PAGES + 1)])),
    (Limit::DeviceGpuVms, LIMITS, |w| {
        w.create_context(1);
        w.devices[0].told().full = true;
        create_vm(w, 1, 0)
    }),
];

#[test]
fn every_refusal_names_its_limit() {
    for (nth, (limit, limits, act)) in CASES.into_iter().enumerate() {
        let without = DeviceInfo { fault_model: FaultModel::None, ..device_info() };
        let first = if limit == Limit::ResidentPages { without } else { device_info() };
        let w = World::on_devices(limits, [first, device_info()]);
        assert_eq!(act(&w), -ENOSPC, "{limit}, case {nth}");
        let (named, of_reply) = w.named_limits();
        assert_eq!(named, Some(limit), "case {nth}");
        assert!(of_reply.is_none_or(|named| named == Some(limit)), "{limit}, case {nth}: {of_reply:?}");
        assert_eq!(w.guest.quota().newly_reached(), [limit], "case {nth}");
    }
}

/// What no test comes to: a device has more asids than there are contexts here.
#[test]
fn errors_that_are_rare_name_their_limit() {
    let over = DeviceError::OverQuota(Full(Limit::TableBytes));
    assert_eq!(context::Error::NoAsid.limit(), Some(Limit::Asids));
    assert_eq!(context::Error::Device(over).limit(), Some(Limit::TableBytes));
    assert_eq!(response::Error::Full { index: 0 }.limit(), Some(Limit::Leaves));
}

#[test]
fn most_that_a_context_or_gpu_vm_had_is_its_limits_peak() {
    let w = World::new();
    let ((vm, asid), (_, other)) = (w.mapped(1), w.mapped(2));
    let more = [map(C + (1 << 20), A, 1), map(C + (2 << 20), A, 1)];
    assert_eq!((w.bind(1, vm, &more), w.bind(1, vm, &[unmap(C + (1 << 20), 1)])), (0, 0));
    (0..3).for_each(|page| _ = w.devices[0].raise(&w.host, asid, C + page * 4096, Access::Read));
    w.devices[0].raise(&w.host, other, C, Access::Read);
    let cookie = w.cookies()[0];
    assert_eq!(w.respond(1, cookie, PAGE_RESP_INVALID, &[]), 0);
    (0..3).for_each(|_| assert_eq!(w.exec(1, vm), 0));
    w.devices[0].end_job(&w.host, 0);
    w.records();
    for limit in [Limit::Mappings, Limit::PendingFaults, Limit::Jobs] {
        let row = row(&w, limit);
        assert_eq!((row.used, row.peak), (2, 3), "{limit}");
    }
}
