//! Fences and asynchronous binds: what starts when, how it ends, and that nothing is lost. The property test compares
//! the core with a scheduler that looks at everything again after each step.

use crate::mock::{A, C, GPA, LIMITS, World, device_info, faults, hdr, map, run, unmap};
use std::collections::BTreeSet;
use std::sync::Arc;
use virtio_gpu_svm::addr::PageRange;
use virtio_gpu_svm::context::{Bind, Launch};
use virtio_gpu_svm::device::{Access, DeviceInfo, FaultModel};
use virtio_gpu_svm::gpu_vm::{Backing, GpuVa};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::MAX_RINGS;
use virtio_gpu_svm::protocol::control::{PAGE_RESP_FAILURE, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS};
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::resource::Blob;
use virtio_gpu_svm::timeline::Timeline;
use zerocopy::{FromBytes, IntoBytes};

const ROOM: Limits = Limits { jobs: 4096, mappings: 4096, ..LIMITS };

/// A ring, and what is asked of it.
#[derive(Clone, Copy)]
struct On<'a> {
    vm: u32,
    ring: u32,
    signal: u64,
    waits: &'a [(u32, u32, u64)],
}

fn on(vm: u32, ring: u32) -> On<'static> {
    On { vm, ring, signal: 0, waits: &[] }
}

impl<'a> On<'a> {
    fn signal(self, signal: u64) -> Self {
        Self { signal, ..self }
    }
    fn waits(self, waits: &'a [(u32, u32, u64)]) -> Self {
        Self { waits, ..self }
    }
    fn points(&self) -> Vec<FencePoint> {
        let point = |&(vm, ring, seqno): &(u32, u32, u64)| FencePoint {
            vm_id: vm.into(),
            ring_idx: ring.into(),
            seqno: seqno.into(),
        };
        self.waits.iter().map(point).collect()
    }
    /// Launches a job in context 1; its id, or the status.
    fn exec(self, w: &World) -> Result<u64, i32> {
        let waits = self.points();
        let head = Exec {
            vm_id: self.vm.into(),
            ring_idx: self.ring.into(),
            num_packets: 1.into(),
            num_waits: (waits.len() as u32).into(),
            signal: self.signal.into(),
            ..Exec::default()
        };
        let body = [&head.as_bytes()[16..], waits.as_bytes(), Packet::default().as_bytes()].concat();
        let (status, reply) = w.submit(1, SVM_REQ_EXEC, &body);
        if status == 0 { Ok(ExecRsp::read_from_bytes(&reply).unwrap().job_id.get()) } else { Err(status) }
    }
    /// Has operations take their turn; their id, or the status.
    fn bind(self, w: &World, ops: &[BindOp]) -> Result<u64, i32> {
        let waits = self.points();
        let head = VmBind {
            vm_id: self.vm.into(),
            num_binds: (ops.len() as u32).into(),
            flags: VM_BIND_ASYNC.into(),
            ring_idx: self.ring.into(),
            num_waits: (waits.len() as u32).into(),
            signal: self.signal.into(),
            user_data: 0xb1bd.into(),
            ..VmBind::default()
        };
        let body = [&head.as_bytes()[16..], waits.as_bytes(), ops.as_bytes()].concat();
        let (status, reply) = w.submit(1, SVM_REQ_VM_BIND, &body);
        if status == 0 { Ok(VmBindRsp::read_from_bytes(&reply).unwrap().job_id.get()) } else { Err(status) }
    }
}

/// A context with a GPU VM on each device.
fn two_vms(limits: Limits) -> (World, u32, u32) {
    let w = World::with_limits(limits);
    let (vm, _) = w.mapped(1);
    let (other, _) = w.create_vm(1, 1);
    (w, vm, other)
}

/// Records of ends that wait.
fn ends(w: &World) -> Vec<JobRecord> {
    let records = w.records();
    let records = records.iter().map(|bytes| JobRecord::read_from_bytes(bytes).unwrap());
    records.filter(|record| [EVENT_JOB_DONE, EVENT_BIND_DONE].contains(&record.kind.get())).collect()
}
/// The same, as (id, status).
fn statuses(w: &World) -> Vec<(u64, i32)> {
    ends(w).iter().map(|end| (end.job_id.get(), end.status.get())).collect()
}
/// GPU addresses that are mapped in a GPU VM of context 1.
fn mapped(w: &World, vm: u32) -> BTreeSet<u64> {
    let contexts = w.guest.contexts();
    let vm = contexts[0].vms.iter().find(|status| status.vm_id == vm).unwrap();
    vm.mappings.iter().map(|mapping| mapping.gpu_start).collect()
}
fn property(w: &World, vm: u32) -> VmProperty {
    let body = VmRef { vm_id: vm.into(), ..VmRef::default() };
    let (status, reply) = w.submit(1, SVM_REQ_VM_GET_PROPERTY, &body.as_bytes()[16..]);
    assert_eq!(status, 0);
    VmProperty::read_from_bytes(&reply).unwrap()
}
fn destroy_vm(w: &World, vm: u32) {
    let body = VmRef { vm_id: vm.into(), ..VmRef::default() };
    assert_eq!(w.submit(1, SVM_REQ_VM_DESTROY, &body.as_bytes()[16..]).0, 0);
}
fn resource(w: &World, kind: u32, resource_id: u32) {
    let cmd = CtxResource { hdr: hdr(kind, 1), resource_id: resource_id.into(), padding: 0.into() };
    assert_eq!(w.status(cmd.as_bytes()), 0);
}
/// A blob of one page, attached to context 1.
fn create_blob(w: &World, resource_id: u32) {
    let head = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: resource_id.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: 4096.into(),
        ..ResourceCreateBlob::default()
    };
    let entry = MemEntry { addr: GPA.into(), length: 4096.into(), padding: 0.into() };
    assert_eq!(w.status(&[head.as_bytes(), entry.as_bytes()].concat()), 0);
    resource(w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, resource_id);
}
fn map_blob(gpu: u64, resource_id: u32) -> BindOp {
    BindOp { op: BIND_OP_MAP.into(), resource_id: resource_id.into(), ..map(gpu, 0, 1) }
}
fn unmap_all(resource_id: u32) -> BindOp {
    BindOp { op: BIND_OP_UNMAP_ALL.into(), resource_id: resource_id.into(), ..BindOp::default() }
}
/// A GPU address of its own for a number.
fn place(n: u64) -> u64 {
    C + 0x100_0000 + n * 0x1_0000
}

#[test]
fn jobs_of_a_ring_go_to_the_device_at_once() {
    let (w, vm, _) = two_vms(ROOM);
    let jobs: Vec<u64> = (1..=3).map(|n| on(vm, 0).signal(n).exec(&w).unwrap()).collect();
    assert_eq!(w.devices[0].jobs(), jobs, "the device keeps the order");
}

#[test]
fn bind_takes_its_turn_between_jobs() {
    let (w, vm, _) = two_vms(ROOM);
    let first = on(vm, 0).exec(&w).unwrap();
    let bind = on(vm, 0).signal(7).bind(&w, &[map(place(0), A, 1)]).unwrap();
    let last = on(vm, 0).exec(&w).unwrap();
    let aside = on(vm, 1).exec(&w).unwrap();
    assert_eq!(w.devices[0].jobs(), [first, aside], "another ring does not wait");
    assert!(!mapped(&w, vm).contains(&place(0)));
    w.devices[0].end(&w.host, first, 0);
    assert!(mapped(&w, vm).contains(&place(0)));
    assert_eq!(w.devices[0].jobs(), [aside, last]);
    let ends = ends(&w);
    let bound = ends[1];
    assert_eq!(ends.len(), 2);
    assert_eq!((bound.kind.get(), bound.job_id.get(), bound.point.get()), (EVENT_BIND_DONE, bind, 7));
    assert_eq!((bound.status.get(), bound.user_data.get(), bound.ring_idx.get()), (0, 0xb1bd, 0));
}

#[test]
fn bind_on_a_free_ring_takes_effect_at_once() {
    let (w, vm, _) = two_vms(ROOM);
    on(vm, 3).bind(&w, &[map(place(0), A, 1)]).unwrap();
    assert!(mapped(&w, vm).contains(&place(0)));
    assert_eq!(ends(&w).len(), 1);
    assert_eq!(property(&w, vm).num_jobs.get(), 0);
}

#[test]
fn synchronous_bind_passes_what_is_queued() {
    let (w, vm, _) = two_vms(ROOM);
    let job = on(vm, 0).exec(&w).unwrap();
    on(vm, 0).bind(&w, &[unmap(place(0), 1)]).unwrap();
    assert_eq!(w.bind(1, vm, &[map(place(0), A, 1)]), 0);
    assert!(mapped(&w, vm).contains(&place(0)));
    w.devices[0].end(&w.host, job, 0);
    assert!(!mapped(&w, vm).contains(&place(0)));
}

#[test]
fn points_are_waited_for_across_rings_and_devices() {
    let (w, vm, other) = two_vms(ROOM);
    let first = on(vm, 0).signal(5).exec(&w).unwrap();
    let across = on(other, 1).signal(1).waits(&[(vm, 0, 3)]).exec(&w).unwrap();
    let bind = on(vm, 2).signal(9).waits(&[(other, 1, 1)]).bind(&w, &[map(place(0), A, 1)]).unwrap();
    let last = on(vm, 1).waits(&[(vm, 2, 9), (vm, 0, 5), (vm, 0, 0)]).exec(&w).unwrap();
    assert_eq!((w.devices[0].jobs(), w.devices[1].jobs()), (vec![first], vec![]));
    // A point is reached by the end of its work, however it ended, and with it all before it.
    w.devices[0].end(&w.host, first, EFAULT);
    assert_eq!((w.devices[0].jobs(), w.devices[1].jobs()), (vec![], vec![across]));
    assert!(!mapped(&w, vm).contains(&place(0)));
    w.devices[1].end(&w.host, across, 0);
    assert!(mapped(&w, vm).contains(&place(0)));
    assert_eq!(w.devices[0].jobs(), [last]);
    assert_eq!(statuses(&w), [(first, -EFAULT), (across, 0), (bind, 0)]);
}

#[test]
fn job_behind_one_that_waits_waits_too() {
    let (w, vm, _) = two_vms(ROOM);
    let first = on(vm, 0).signal(1).exec(&w).unwrap();
    let waits = on(vm, 1).waits(&[(vm, 0, 1)]).exec(&w).unwrap();
    let behind = on(vm, 1).exec(&w).unwrap();
    assert_eq!(w.devices[0].jobs(), [first]);
    w.devices[0].end(&w.host, first, 0);
    assert_eq!(w.devices[0].jobs(), [waits, behind]);
}

#[test]
fn wait_for_its_own_ring_ends_when_what_is_before_has_ended() {
    let (w, vm, _) = two_vms(ROOM);
    let first = on(vm, 0).signal(1).exec(&w).unwrap();
    let second = on(vm, 0).signal(2).waits(&[(vm, 0, 1)]).exec(&w).unwrap();
    assert_eq!(w.devices[0].jobs(), [first]);
    w.devices[0].end(&w.host, first, 0);
    assert_eq!(w.devices[0].jobs(), [second]);
    assert_eq!(on(vm, 0).signal(3).waits(&[(vm, 0, 3)]).exec(&w), Err(-EINVAL), "its own point");
}

#[test]
fn timelines_do_not_go_backwards_and_nobody_waits_for_the_future() {
    let (w, vm, other) = two_vms(ROOM);
    on(vm, 0).signal(u64::MAX - 1).exec(&w).unwrap();
    for signal in [1, u64::MAX - 1] {
        assert_eq!(on(vm, 0).signal(signal).exec(&w), Err(-EINVAL));
        assert_eq!(on(vm, 0).signal(signal).bind(&w, &[unmap(C, 1)]), Err(-EINVAL));
    }
    on(vm, 0).exec(&w).unwrap();
    on(vm, 0).signal(u64::MAX).exec(&w).unwrap();
    on(other, 0).signal(1).exec(&w).unwrap();
    for wait in [(vm, 1, 1), (other, 0, 2), (vm, MAX_RINGS, 0), (vm, u32::MAX, 0)] {
        assert_eq!(on(vm, 2).waits(&[(vm, 0, 1), wait]).exec(&w), Err(-EINVAL), "{wait:?}");
        assert_eq!(on(vm, 2).waits(&[(vm, 0, 1), wait]).bind(&w, &[unmap(C, 1)]), Err(-EINVAL), "{wait:?}");
    }
    for gone in [0, 99, u32::MAX] {
        assert_eq!(on(vm, 2).waits(&[(gone, 0, 0)]).exec(&w), Err(-ENOENT));
    }
    assert_eq!(on(vm, 2).waits(&[(vm, 0, 0); 65]).exec(&w), Err(-EINVAL));
    // A promise that was refused is none.
    on(vm, 2).signal(1).exec(&w).unwrap();
    destroy_vm(&w, other);
    assert_eq!(on(vm, 2).waits(&[(other, 0, 1)]).exec(&w), Err(-ENOENT));
}

#[test]
fn ends_are_told_in_the_order_of_the_ring() {
    let (w, vm, other) = two_vms(ROOM);
    let jobs: Vec<u64> = (1..=3).map(|n| on(vm, 0).signal(n).exec(&w).unwrap()).collect();
    let waits = on(other, 0).waits(&[(vm, 0, 2)]).exec(&w).unwrap();
    // Two engines may report the ends of two jobs at the same moment.
    w.devices[0].end(&w.host, jobs[1], 0);
    assert_eq!(statuses(&w), []);
    assert!(w.devices[1].jobs().is_empty());
    w.devices[0].end(&w.host, jobs[0], EINVAL);
    assert_eq!(statuses(&w), [(jobs[0], -EINVAL), (jobs[1], 0)]);
    assert_eq!(w.devices[1].jobs(), [waits]);
}

#[test]
fn failed_bind_makes_the_gpu_vm_unusable_and_says_where() {
    let (w, vm, other) = two_vms(LIMITS);
    let gate = on(other, 0).signal(1).exec(&w).unwrap();
    // Seven of eight are there; with operation 5 they are nine, and stay so.
    assert_eq!(w.bind(1, vm, &(0..6).map(|n| map(place(n), A, 1)).collect::<Vec<_>>()), 0);
    let before = mapped(&w, vm);
    let ops = [
        unmap(place(0), 1),
        map(place(10), A, 1),
        map(place(11), A, 1),
        unmap(place(1), 1),
        map(place(12), A, 1),
        map(place(13), A, 1),
        unmap(place(20), 1),
    ];
    let bind = on(vm, 0).signal(4).waits(&[(other, 0, 1)]).bind(&w, &ops).unwrap();
    let behind = on(vm, 0).exec(&w).unwrap();
    assert_eq!(property(&w, vm).num_jobs.get(), 2);
    w.devices[1].end(&w.host, gate, 0);
    assert_eq!(mapped(&w, vm), before, "nothing of the vector stands");
    let records = w.records();
    let failed = JobRecord::read_from_bytes(&records[1]).unwrap();
    assert_eq!((failed.kind.get(), failed.job_id.get()), (EVENT_BIND_DONE, bind));
    assert_eq!((failed.status.get(), failed.packet.get(), failed.addr.get()), (-ENOSPC, 5, place(13)));
    assert_eq!((failed.point.get(), failed.perm.get()), (4, 0));
    let lost = NoticeRecord::read_from_bytes(&records[2]).unwrap();
    assert_eq!(
        (lost.kind.get(), lost.value.get(), lost.status.get()),
        (EVENT_CONTEXT_LOST, vm.into(), -ENOSPC)
    );
    let dropped = JobRecord::read_from_bytes(&records[3]).unwrap();
    assert_eq!((dropped.job_id.get(), dropped.status.get()), (behind, -EPIPE));
    let state = property(&w, vm);
    assert_eq!((state.state.get(), state.first_errno.get()), (VM_UNUSABLE, -ENOSPC));
    assert_eq!((state.error_op.get(), state.error_addr.get()), (5, place(13)));
    assert_eq!(state.num_jobs.get(), 0);
    // Only taking away goes on, and the first error stays.
    assert_eq!(on(vm, 0).exec(&w), Err(-EPIPE));
    assert_eq!(on(vm, 0).bind(&w, &[unmap(place(2), 1), map(place(2), A, 1)]), Err(-EPIPE));
    on(vm, 0).bind(&w, &[unmap(place(2), 1)]).unwrap();
    assert!(!mapped(&w, vm).contains(&place(2)));
    assert_eq!(property(&w, vm).error_op.get(), 5);
    assert_eq!(on(other, 0).exec(&w).map(|_| ()), Ok(()), "the other GPU VM works");
}

#[test]
fn bind_that_cuts_a_mirror_with_pages_names_the_operation() {
    let (w, vm, _) = two_vms(ROOM);
    let asid = property(&w, vm).asid.get();
    let mirror = BindOp {
        op: BIND_OP_MAP.into(),
        flags: BIND_CPU_ADDR_MIRROR.into(),
        ..map(C, A.wrapping_sub(C), 64)
    };
    assert_eq!(w.bind(1, vm, &[unmap(C, 64), mirror]), 0);
    let job = on(vm, 0).exec(&w).unwrap();
    let ops = [unmap(place(0), 1), unmap(C, 20), unmap(C + 20 * 4096, 20)];
    let bind = on(vm, 0).bind(&w, &ops).unwrap();
    assert_eq!(w.supply(1, &[run(A + 32 * 4096, GPA, 1, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C + 32 * 4096, Access::Read);
    w.devices[0].end(&w.host, job, 0);
    let end = ends(&w)[1];
    assert_eq!((end.job_id.get(), end.status.get()), (bind, -EBUSY));
    assert_eq!((end.packet.get(), end.addr.get()), (2, C + 20 * 4096));
    assert_eq!(property(&w, vm).error_op.get(), 2);
}

#[test]
fn blob_that_was_detached_is_not_mapped_later() {
    for kind in [VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE, VIRTIO_GPU_CMD_RESOURCE_UNREF] {
        let (w, vm, other) = two_vms(ROOM);
        create_blob(&w, 5);
        let job = on(vm, 0).signal(1).exec(&w).unwrap();
        let gone = on(other, 0).waits(&[(vm, 0, 1)]).bind(&w, &[unmap_all(5)]).unwrap();
        let ops = [map(place(0), A, 1), map_blob(place(1), 5), map_blob(place(2), 5)];
        let bind = on(vm, 0).bind(&w, &ops).unwrap();
        resource(&w, kind, 5);
        // The next blob of that id is another one.
        if kind == VIRTIO_GPU_CMD_RESOURCE_UNREF {
            create_blob(&w, 5);
        } else {
            resource(&w, VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 5);
        }
        assert_eq!(w.bind(1, other, &[map_blob(place(3), 5)]), 0);
        w.devices[0].end(&w.host, job, 0);
        let ends = ends(&w);
        let failed = ends.iter().find(|end| end.job_id.get() == bind).unwrap();
        assert_eq!((failed.status.get(), failed.packet.get(), failed.addr.get()), (-EACCES, 1, place(1)));
        assert_eq!(mapped(&w, vm), BTreeSet::from([C]));
        assert!(ends.iter().any(|end| end.job_id.get() == gone && end.status.get() == 0));
        assert!(mapped(&w, other).contains(&place(3)), "an UNMAP_ALL of the old one");
    }
}

#[test]
fn destroyed_gpu_vm_ends_its_work_and_reaches_its_points() {
    let (w, vm, other) = two_vms(ROOM);
    let gate = on(other, 5).signal(1).exec(&w).unwrap();
    let running = on(vm, 0).exec(&w).unwrap();
    let bind = on(vm, 0).signal(3).bind(&w, &[map(place(0), A, 1)]).unwrap();
    let queued = on(vm, 0).signal(4).waits(&[(other, 5, 1)]).exec(&w).unwrap();
    let waits = on(vm, 1).waits(&[(other, 5, 1)]).exec(&w).unwrap();
    let elsewhere = on(other, 0).waits(&[(vm, 0, 4)]).exec(&w).unwrap();
    assert_eq!(w.devices[1].jobs(), [gate]);
    destroy_vm(&w, vm);
    assert_eq!(w.devices[1].jobs(), [gate, elsewhere]);
    let ended: Vec<_> = [running, bind, queued, waits].map(|id| (id, -ECANCELED)).into();
    assert_eq!(statuses(&w), ended);
    // What it had on the device, and what it waited for, concerns nobody any more.
    w.devices[0].end(&w.host, running, 0);
    w.devices[1].end(&w.host, gate, 0);
    assert_eq!(statuses(&w), [(gate, 0)]);
    assert_eq!(w.host.stats().counters.jobs_dropped, 4);
}

#[test]
fn queued_jobs_of_an_unusable_gpu_vm_wait_no_longer() {
    let (w, vm, other) = two_vms(ROOM);
    let asid = property(&w, vm).asid.get();
    let gate = on(other, 0).signal(1).exec(&w).unwrap();
    let running = on(vm, 0).signal(1).exec(&w).unwrap();
    let waits = on(vm, 0).signal(2).waits(&[(other, 0, 1)]).exec(&w).unwrap();
    let maps = on(vm, 0).signal(3).bind(&w, &[unmap(C, 1), map(place(0), A, 1)]).unwrap();
    let unmaps = on(vm, 1).waits(&[(other, 0, 1)]).bind(&w, &[unmap(C, 64)]).unwrap();
    let alone = on(vm, 2).waits(&[(other, 0, 1)]).exec(&w).unwrap();
    let freed = on(other, 1).waits(&[(vm, 0, 3)]).exec(&w).unwrap();
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = w.cookies()[0];
    assert_eq!(w.respond(1, cookie, PAGE_RESP_FAILURE, &[]), 0);
    assert_eq!(statuses(&w), [(alone, -EPIPE)], "the others keep the order of their ring");
    assert_eq!(w.devices[1].jobs(), [gate]);
    w.devices[0].end(&w.host, running, EPIPE);
    assert_eq!(statuses(&w), [(running, -EPIPE), (waits, -EPIPE), (maps, -EPIPE)]);
    assert_eq!(w.devices[1].jobs(), [gate, freed]);
    assert!(mapped(&w, vm).contains(&C), "an unmap waits as before");
    w.devices[1].end(&w.host, gate, 0);
    assert_eq!(mapped(&w, vm), BTreeSet::new());
    assert!(statuses(&w).contains(&(unmaps, 0)));
    assert_eq!(property(&w, vm).first_errno.get(), -EFAULT);
}

#[test]
fn what_is_queued_counts() {
    let (w, vm, _) = two_vms(LIMITS);
    let first = on(vm, 0).exec(&w).unwrap();
    for n in 0..3 {
        on(vm, 0).bind(&w, &[unmap(place(n), 1)]).unwrap();
    }
    assert_eq!(on(vm, 0).exec(&w), Err(-ENOSPC));
    assert_eq!(on(vm, 1).bind(&w, &[unmap(C, 1)]), Err(-ENOSPC));
    w.devices[0].end(&w.host, first, 0);
    assert_eq!(on(vm, 0).exec(&w), Err(-ENOSPC), "records count until they are fetched");
    assert_eq!(statuses(&w).len(), 4);
    let first = on(vm, 0).exec(&w).unwrap();
    on(vm, 0).bind(&w, &[unmap(C, 1); 5]).unwrap();
    assert_eq!(on(vm, 0).bind(&w, &[unmap(C, 1); 4]), Err(-ENOSPC), "nine operations of eight");
    on(vm, 0).bind(&w, &[unmap(C, 1); 3]).unwrap();
    w.devices[0].end(&w.host, first, 0);
    on(vm, 0).bind(&w, &[unmap(C, 1); 8]).unwrap();
}

#[test]
fn operations_that_go_with_their_gpu_vm_are_not_queued_any_more() {
    let (w, vm, other) = two_vms(LIMITS);
    on(vm, 0).exec(&w).unwrap();
    on(vm, 0).bind(&w, &[unmap(C, 1); 8]).unwrap();
    assert_eq!(on(other, 0).bind(&w, &[unmap(C, 1)]), Err(-ENOSPC));
    w.guest.context(1).unwrap().vm_destroy(vm).unwrap();
    on(other, 0).bind(&w, &[unmap(C, 1); 8]).unwrap();
}

#[test]
fn what_a_context_leaves_queued_is_dropped_and_counted() {
    let (w, vm, other) = two_vms(ROOM);
    let first = on(vm, 0).signal(1).exec(&w).unwrap();
    on(vm, 0).bind(&w, &[map(place(0), A, 1)]).unwrap();
    on(other, 0).waits(&[(vm, 0, 1)]).exec(&w).unwrap();
    w.destroy_context(1);
    w.devices[0].end(&w.host, first, 0);
    assert_eq!(w.host.stats().counters.jobs_dropped, 3);
    assert!(w.devices[1].jobs().is_empty());
    w.devices.iter().for_each(|device| device.retire_all(&w.host));
    assert_eq!(w.records().len(), 1, "CONTEXT_RETIRED");
}

#[test]
fn earlier_incarnation_starts_nothing_any_more() {
    let (w, vm, other) = two_vms(ROOM);
    let asid = property(&w, other).asid.get();
    let first = on(vm, 0).signal(1).exec(&w).unwrap();
    let freed = on(other, 0).signal(1).waits(&[(vm, 0, 1)]).exec(&w).unwrap();
    on(vm, 1).waits(&[(other, 0, 1)]).exec(&w).unwrap();
    w.guest.freeze();
    // An engine reports what it ended before: what that sets free goes to a device that is frozen.
    w.devices[0].end(&w.host, first, 0);
    assert_eq!(w.devices[1].jobs(), [freed]);
    assert!(w.devices[1].told().frozen.iter().any(|frozen| frozen.0 == asid));
    w.hello(2);
    w.devices[1].end(&w.host, freed, 0);
    assert!(w.devices[0].jobs().is_empty());
    w.devices.iter().for_each(|device| device.retire_all(&w.host));
    assert!(ends(&w).is_empty());
    assert_eq!(w.host.stats().counters.jobs_dropped, 2);
}

#[test]
fn one_end_may_set_very_many_free() {
    let (w, vm, other) = two_vms(ROOM);
    let gate = on(vm, 0).signal(1).exec(&w).unwrap();
    let mut expected = BTreeSet::new();
    for n in 0..3000_u32 {
        let gate = [(vm, 0, 1)];
        let ring = on(other, n % MAX_RINGS).waits(&gate);
        if n < 1000 {
            ring.bind(&w, &[map(place(n.into()), A, 1)]).unwrap();
        } else {
            expected.insert(ring.exec(&w).unwrap());
        }
    }
    assert!(w.devices[1].jobs().is_empty());
    w.devices[0].end(&w.host, gate, 0);
    assert!(w.devices[1].jobs().len() < expected.len(), "an engine leaves most of it to the host");
    w.host.work_off();
    let started = w.devices[1].jobs();
    assert_eq!(started.len(), expected.len(), "each once");
    assert_eq!(started.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(mapped(&w, other).len(), 1000);
    assert_eq!(ends(&w).len(), 1001);
}

#[test]
fn ends_and_submissions_at_the_same_time_lose_nothing() {
    let (w, vm, other) = two_vms(ROOM);
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut launched = Vec::new();
    std::thread::scope(|scope| {
        for device in &w.devices {
            scope.spawn(|| {
                let finished = || done.load(std::sync::atomic::Ordering::Acquire);
                while !finished() || w.guest.contexts()[0].jobs > 0 {
                    match device.jobs().first() {
                        Some(job) => device.end(&w.host, *job, 0),
                        None => std::thread::yield_now(),
                    }
                }
            });
        }
        let mut promised = 0;
        for n in 0..3000_u64 {
            let (vm, wait) = if n % 2 == 0 { (vm, other) } else { (other, vm) };
            let waits = [(wait, 0, promised), (vm, 1, 0)];
            let ring = on(vm, 0).signal(n + 1).waits(&waits);
            let id = if n % 5 == 0 { ring.bind(&w, &[unmap(place(n), 1)]) } else { ring.exec(&w) };
            launched.push(id);
            promised = n + 1;
        }
        done.store(true, std::sync::atomic::Ordering::Release);
        // What an engine reports while the other looks is the worker's.
        while w.guest.contexts()[0].jobs > 0 {
            w.host.work_off();
        }
    });
    let (launched, ended): (BTreeSet<u64>, _) = (launched.into_iter().flatten().collect(), statuses(&w));
    assert_eq!(launched.len(), 3000, "all were accepted");
    assert_eq!(ended.iter().map(|(id, _)| *id).collect::<BTreeSet<_>>(), launched);
    assert_eq!(ended.len(), launched.len());
    assert!(ended.iter().all(|(_, status)| *status == 0));
}

/// What the reference knows of an item.
#[derive(Clone, Debug)]
struct Item {
    id: u64,
    vm: usize,
    ring: u32,
    signal: u64,
    /// Where it maps, for a bind.
    bind: Option<u64>,
    /// Items whose end it waits for.
    after: Vec<usize>,
    started: bool,
    ended: bool,
}

/// A scheduler that is too simple to be wrong: looks at all items again until nothing changes.
fn settle(items: &mut [Item]) {
    loop {
        let startable = (0..items.len()).find(|&n| {
            let item = &items[n];
            let before = || items[..n].iter().filter(|other| (other.vm, other.ring) == (item.vm, item.ring));
            let turn = match item.bind {
                Some(_) => before().all(|other| other.ended),
                None => before().all(|other| other.started && (other.bind.is_none() || other.ended)),
            };
            !item.started && turn && item.after.iter().all(|&other| items[other].ended)
        });
        let Some(n) = startable else { return };
        items[n].started = true;
        items[n].ended = items[n].bind.is_some();
    }
}

/// Random jobs and binds with random waits on 4 rings of 2 GPU VMs, ended in random order. `SVM_SEED` repeats one seed,
/// `SVM_OPS` sets the steps of each.
#[test]
fn agrees_with_a_scheduler_that_looks_at_everything() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number("SVM_SEED").map_or((1..=8).collect(), |seed| vec![seed]);
    for seed in seeds {
        println!("seed {seed} (set SVM_SEED to repeat)");
        compare_with_the_scheduler(seed, number("SVM_OPS").unwrap_or(400));
    }
}

fn compare_with_the_scheduler(seed: u64, steps: u64) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % below
    };
    let (w, first, second) = two_vms(ROOM);
    let vms = [first, second];
    let mut items: Vec<Item> = Vec::new();
    let mut told: Vec<JobRecord> = Vec::new();
    for step in 0..2 * steps {
        // The second half only ends what is left.
        if step < steps && next(5) < 3 {
            launch(&w, vms, &mut items, &mut next);
        } else {
            // Devices keep a ring's order: one of the first of each ring ends.
            let firsts: Vec<usize> = (0..items.len())
                .filter(|&n| {
                    let same = |other: &&Item| {
                        (other.vm, other.ring) == (items[n].vm, items[n].ring) && !other.ended
                    };
                    items[n].started && !items[n].ended && items[..n].iter().filter(same).count() == 0
                })
                .collect();
            let Some(&n) = firsts.get(next(firsts.len().max(1) as u64) as usize) else { continue };
            items[n].ended = true;
            w.devices[items[n].vm].end(&w.host, items[n].id, [0, EFAULT][next(2) as usize]);
        }
        settle(&mut items);
        for (vm, device) in w.devices.iter().enumerate() {
            let running = |item: &&Item| item.vm == vm && item.started && !item.ended;
            let expected: BTreeSet<u64> = items.iter().filter(running).map(|item| item.id).collect();
            assert_eq!(
                device.jobs().into_iter().collect::<BTreeSet<_>>(),
                expected,
                "seed {seed} step {step}"
            );
            let bound = |item: &Item| item.bind.filter(|_| item.vm == vm && item.started);
            let expected: BTreeSet<u64> = items.iter().filter_map(bound).collect();
            let mut mapped = mapped(&w, vms[vm]);
            mapped.remove(&C);
            assert_eq!(mapped, expected, "seed {seed} step {step}");
        }
        told.extend(ends(&w));
        let ended: BTreeSet<u64> = items.iter().filter(|item| item.ended).map(|item| item.id).collect();
        assert_eq!(told.len(), ended.len(), "seed {seed} step {step}: told once");
        assert_eq!(told.iter().map(|end| end.job_id.get()).collect::<BTreeSet<_>>(), ended);
    }
    assert!(items.iter().all(|item| item.ended), "seed {seed}");
    for (vm, ring) in (0..2).flat_map(|vm| (0..4).map(move |ring| (vm, ring))) {
        let submitted = items.iter().filter(|item| (item.vm, item.ring) == (vm, ring));
        let submitted: Vec<_> = submitted.map(|item| (item.id, item.signal)).collect();
        let here = |end: &&JobRecord| (end.vm_id.get(), end.ring_idx.get()) == (vms[vm], ring);
        let told: Vec<_> = told.iter().filter(here).map(|end| (end.job_id.get(), end.point.get())).collect();
        assert_eq!(told, submitted, "seed {seed}: ring {ring} of {vm} in order");
    }
}

fn launch(w: &World, vms: [u32; 2], items: &mut Vec<Item>, next: &mut impl FnMut(u64) -> u64) {
    let (vm, ring) = (next(2) as usize, next(4) as u32);
    let last = |items: &[Item], vm, ring| {
        let here = items.iter().filter(|item| (item.vm, item.ring) == (vm, ring));
        here.map(|item| item.signal).max().unwrap_or(0)
    };
    let signal = if next(3) > 0 { last(items, vm, ring) + 1 + next(3) } else { 0 };
    let (mut waits, mut after) = (Vec::new(), Vec::new());
    for _ in 0..next(4) {
        let (of, on) = (next(2) as usize, next(4) as u32);
        let seqno = next(last(items, of, on) + 1);
        waits.push((vms[of], on, seqno));
        // The first that promised as much.
        let promised = |item: &Item| (item.vm, item.ring) == (of, on) && item.signal >= seqno;
        after.extend(items.iter().position(promised).filter(|_| seqno > 0));
    }
    let ring_of = on(vms[vm], ring).signal(signal).waits(&waits);
    let bind = (next(3) == 0).then(|| place(items.len() as u64));
    let id = match bind {
        Some(at) => ring_of.bind(w, &[map(at, A, 1)]),
        None => ring_of.exec(w),
    };
    let id = id.unwrap();
    items.push(Item { id, vm, ring, signal, bind, after, started: false, ended: false });
}

/// Context 1 with a GPU VM on a device without faults, and on one with.
fn without_and_with_faults() -> (World, u32, u32) {
    let rigid = DeviceInfo { fault_model: FaultModel::None, ..device_info() };
    let w = World::on_devices(Limits { pending_faults: 64, ..ROOM }, [rigid, device_info()]);
    w.create_context(1);
    let (rigid, _) = w.create_vm(1, 0);
    let (other, _) = w.create_vm(1, 1);
    (w, rigid, other)
}

#[test]
fn bind_that_asks_for_pages_ends_when_they_are_there() {
    let (w, rigid, other) = without_and_with_faults();
    let mapped = on(rigid, 0).signal(1).bind(&w, &[map(C, A, 8)]).unwrap();
    let behind = on(rigid, 0).exec(&w).unwrap();
    let elsewhere = on(other, 0).waits(&[(rigid, 0, 1)]).exec(&w).unwrap();
    let asked = faults(&w);
    assert_eq!((asked.len(), w.devices[0].told().jobs.len(), w.devices[1].told().jobs.len()), (1, 0, 0));
    assert_eq!(w.respond(1, asked[0].cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 8, 0)]), 0);
    assert_eq!(statuses(&w), [(mapped, 0)]);
    assert_eq!((w.devices[0].told().jobs.len(), w.devices[1].told().jobs.len()), (1, 1));
    w.devices[0].end_job(&w.host, 0);
    w.devices[1].end_job(&w.host, 0);
    assert_eq!(statuses(&w), [(behind, 0), (elsewhere, 0)]);
}

#[test]
fn prefetch_in_turn_ends_whether_its_pages_come_or_not() {
    let (w, _, vm) = without_and_with_faults();
    assert_eq!(w.bind(1, vm, &[map(C, A, 8)]), 0);
    let prefetch = BindOp { op: BIND_OP_PREFETCH.into(), ..unmap(C, 8) };
    for (code, runs) in [(PAGE_RESP_INVALID, vec![]), (PAGE_RESP_SUCCESS, vec![run(A, GPA, 8, 0)])] {
        let id = on(vm, 3).bind(&w, &[prefetch]).unwrap();
        let asked = faults(&w);
        assert_eq!(asked.len(), 1);
        assert_eq!(w.respond(1, asked[0].cookie.get(), code, &runs), 0);
        assert_eq!(statuses(&w), [(id, 0)], "it is advice");
    }
    assert_eq!(w.guest.contexts()[0].vms[1].resident_pages, 8);
}

#[test]
fn pages_that_are_refused_name_the_operation_that_wants_them() {
    let (w, rigid, _) = without_and_with_faults();
    assert_eq!(w.supply(1, &[run(A, GPA, 8, 0)]), 0);
    let ops = [map(C, A, 8), map(C + (1 << 20), A + (1 << 20), 4), map(C + (2 << 20), A, 8)];
    let bind = on(rigid, 0).bind(&w, &ops).unwrap();
    let job = on(rigid, 0).exec(&w).unwrap();
    let asked = faults(&w);
    assert_eq!((asked.len(), asked[0].addr.get()), (1, C + (1 << 20)));
    assert_eq!(w.respond(1, asked[0].cookie.get(), PAGE_RESP_INVALID, &[]), 0);
    let told = ends(&w);
    let shape: Vec<_> = told
        .iter()
        .map(|end| (end.job_id.get(), end.status.get(), end.packet.get(), end.addr.get()))
        .collect();
    assert_eq!(shape, [(bind, -EFAULT, 1, C + (1 << 20)), (job, -EPIPE, 0, 0)]);
    let property = property(&w, rigid);
    let error = (property.first_errno.get(), property.error_op.get(), property.error_addr.get());
    assert_eq!(error, (-EFAULT, 1, C + (1 << 20)));
}

#[test]
fn bind_that_waits_for_pages_ends_with_its_gpu_vm() {
    let (w, rigid, _) = without_and_with_faults();
    let bind = on(rigid, 0).signal(1).bind(&w, &[map(C, A, 8)]).unwrap();
    assert_eq!(faults(&w).len(), 1);
    destroy_vm(&w, rigid);
    assert_eq!(statuses(&w), [(bind, -ECANCELED)]);
    assert_eq!(w.guest.contexts()[0].jobs, 0);
}

#[test]
fn bind_is_not_told_another_binds_operation() {
    let (w, rigid, _) = without_and_with_faults();
    let first = on(rigid, 0).bind(&w, &[map(C, A, 1)]).unwrap();
    let far = C + (1 << 20);
    let second = on(rigid, 1).bind(&w, &[unmap(C + (1 << 30), 1), map(far, A + (1 << 20), 1)]).unwrap();
    let asked = faults(&w);
    let refused = asked.iter().find(|fault| fault.addr.get() == far).unwrap();
    assert_eq!(w.respond(1, refused.cookie.get(), PAGE_RESP_INVALID, &[]), 0);
    let told = ends(&w).into_iter();
    let told: BTreeSet<_> =
        told.map(|end| (end.job_id.get(), end.status.get(), end.packet.get(), end.addr.get())).collect();
    assert_eq!(told, BTreeSet::from([(first, -EPIPE, 0, 0), (second, -EFAULT, 1, far)]));
}

#[test]
fn queued_bind_lets_go_of_a_blob_that_is_dropped() {
    let (w, vm, _) = two_vms(ROOM);
    create_blob(&w, 5);
    on(vm, 0).exec(&w).unwrap();
    let blob = Arc::new(Blob::new(5, std::iter::once((GPA / 4096, 1))));
    let kept = Arc::downgrade(&blob);
    let va =
        GpuVa { range: PageRange { start: 16, end: 17 }, backing: Backing::Blob(blob, 0), readonly: false };
    let timeline = Timeline { vm_id: vm, ring_idx: 0 };
    let launch = Launch { timeline, user_data: 0, signal: 0, waits: vec![] };
    w.guest.context(1).unwrap().bind_async(launch, vec![Bind::Map(va)]).unwrap();
    resource(&w, VIRTIO_GPU_CMD_RESOURCE_UNREF, 5);
    assert!(kept.upgrade().is_none());
}
