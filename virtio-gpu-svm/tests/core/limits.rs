//! Each limit of a guest is granted exactly, the next is refused without effect, and what is given back may be had again.

use crate::mock::*;
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::errno::{EEXIST, ENOSPC};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::request::{SVM_REQ_VM_CREATE, SVM_REQ_VM_DESTROY, VmCreate, VmRef};
use virtio_gpu_svm::quota::LimitStatus;
use zerocopy::IntoBytes;

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
