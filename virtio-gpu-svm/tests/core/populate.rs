//! Pages before their first touch: PREFETCH, IMMEDIATE and NULL, and devices without faults, whose queues stand still
//! until everything is there.

use crate::mock::*;
use virtio_gpu_svm::device::{Access, Asid, DeviceInfo, FaultModel, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::population::MAX_POPULATED_PAGES;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::*;
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
const WIDE: Limits = Limits { mappings: 4096, pending_faults: 64, ..LIMITS };

fn prefetch(gpu: u64, pages: u64) -> BindOp {
    BindOp { op: BIND_OP_PREFETCH.into(), ..unmap(gpu, pages) }
}
fn immediate(op: BindOp) -> BindOp {
    BindOp { flags: (op.flags.get() | BIND_IMMEDIATE).into(), ..op }
}
fn null(gpu: u64, pages: u64) -> BindOp {
    BindOp { op: BIND_OP_MAP.into(), flags: BIND_NULL.into(), ..unmap(gpu, pages) }
}
/// A world whose device 0 has no faults.
fn without_faults(limits: Limits) -> World {
    let rigid = DeviceInfo { fault_model: FaultModel::None, ..device_info() };
    World::on_devices(limits, [rigid, device_info()])
}
/// Context 1 with a GPU VM on device 0.
fn with_vm(w: World) -> (World, u32, u32) {
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    (w, vm, asid)
}
fn resident(w: &World, asid: u32, gpu: u64, pages: u64) -> u64 {
    (0..pages).filter(|n| w.devices[0].bound(asid, gpu + n * PAGE).is_some()).count() as u64
}
fn is_held(w: &World, asid: u32) -> bool {
    w.devices[0].told().frozen.contains(&Asid(asid))
}
/// Answers every prefetch record with all that it asks for, until none comes. Guest-physical pages go up with A.
/// Returns how many records there were.
fn answer_all(w: &World, ctx_id: u32, code: u32) -> usize {
    let mut answered = 0;
    loop {
        let records = faults(w);
        if records.is_empty() {
            return answered;
        }
        for record in records {
            assert_eq!(record.flags.get(), FAULT_PASID_VALID | FAULT_LAST_PAGE | FAULT_PREFETCH);
            let seq = w.guest.context(ctx_id).unwrap().status().inval_seq;
            let cpu = record.cpu_addr.get();
            let pages = record.length_hint.get() / 4096;
            let runs = [run(cpu, GPA + (cpu - A), pages, seq)];
            let runs = if code == PAGE_RESP_SUCCESS { &runs[..] } else { &[] };
            assert_eq!(w.respond(ctx_id, record.cookie.get(), code, runs), 0);
            answered += 1;
        }
    }
}

#[test]
fn prefetch_binds_what_is_known_and_asks_for_the_rest_in_runs() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 1024)]), 0);
    assert_eq!(w.supply(1, &[run(A + 10 * PAGE, GPA + 10 * PAGE, 5, 0)]), 0);
    assert_eq!(w.bind(1, vm, &[prefetch(C, 600)]), 0);
    assert_eq!(resident(&w, asid, C, 1024), 5);
    let asked: Vec<_> = faults(&w)
        .iter()
        .map(|f| (f.addr.get() - C, f.length_hint.get(), f.perm.get(), f.cookie.get()))
        .collect();
    let shape: Vec<_> = asked.iter().map(|(at, len, perm, _)| (*at, *len, *perm)).collect();
    assert_eq!(
        shape,
        [(0, 10 * 4096, PERM_READ), (15 * PAGE, 512 * 4096, PERM_READ), (527 * PAGE, 73 * 4096, PERM_READ)]
    );
    let first = asked[0].3;
    assert_eq!(w.respond(1, first, PAGE_RESP_SUCCESS, &[run(A, GPA, 4, 0)]), 0);
    assert_eq!(resident(&w, asid, C, 1024), 9, "what the answer brought is bound");
    let again = faults(&w);
    assert_eq!(
        (again[0].addr.get(), again[0].length_hint.get()),
        (C + 4 * PAGE, 6 * 4096),
        "the rest is asked again"
    );
    assert_eq!(w.respond(1, again[0].cookie.get(), PAGE_RESP_INVALID, &[]), 0);
    for (_, _, _, cookie) in &asked[1..] {
        assert_eq!(w.respond(1, *cookie, PAGE_RESP_INVALID, &[]), 0);
    }
    assert!(faults(&w).is_empty(), "it was advice: what is not there is not asked for again");
    let status = &w.guest.contexts()[0];
    assert_eq!((status.pending_faults, status.vms[0].state), (0, "usable"));
}

#[test]
fn write_that_joins_a_prefetch_does_not_ask_more_of_its_first_page() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 64), prefetch(C, 64)]), 0);
    let stop = w.devices[0].raise(&w.host, asid, C + 9 * PAGE, Access::Write);
    let record = faults(&w)[0];
    assert_eq!(record.perm.get(), PERM_READ);
    let readonly = PageRun { flags: RUN_READONLY.into(), ..run(A, GPA, 1, 0) };
    let runs = [readonly, run(A + PAGE, GPA + PAGE, 63, 0)];
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &runs), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
}

#[test]
fn advice_that_nobody_works_off_is_bounded() {
    let (w, vm, _) = with_vm(World::with_limits(WIDE));
    let top = (1 << 40) - 4096 * PAGE;
    assert_eq!(w.bind(1, vm, &[map(top, A, 4096), prefetch(top, 4096)]), 0, "asks, and is not answered");
    for round in 0..8 {
        let ops: Vec<_> = (0..4096).map(|n| prefetch((round * 4096 + n) * 2 * PAGE, 1)).collect();
        assert_eq!(w.bind(1, vm, &ops), 0);
    }
    let wanted = w.guest.contexts()[0].vms[0].wanted_pages;
    assert!(wanted <= 1 << 14, "{wanted}");
}

#[test]
fn unanswered_advice_expires_and_nothing_with_it() {
    let (w, vm, _) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 8), prefetch(C, 8)]), 0);
    w.let_deadline_pass();
    w.host.expire_faults();
    w.host.work_off();
    let status = &w.guest.contexts()[0];
    assert_eq!((status.pending_faults, status.vms[0].state), (0, "usable"));
}

#[test]
fn page_without_the_right_to_write_is_asked_for_where_there_are_no_faults() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    let readonly = PageRun { flags: RUN_READONLY.into(), ..run(A, GPA, 4, 0) };
    assert_eq!(w.supply(1, &[readonly]), 0);
    let read = BindOp { flags: BIND_READONLY.into(), ..map(C + (1 << 30), A, 4) };
    assert_eq!(w.bind(1, vm, &[read]), 0);
    assert!(faults(&w).is_empty() && !is_held(&w, asid), "enough for a mapping that is read only");
    assert_eq!(w.bind(1, vm, &[map(C, A, 4)]), 0);
    let record = faults(&w)[0];
    assert_eq!(record.perm.get(), PERM_READ | PERM_WRITE);
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 4, 0)]), 0);
    assert_eq!((resident(&w, asid, C, 4), is_held(&w, asid)), (4, false));
}

#[test]
fn prefetch_leaves_what_is_resident_alone() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    let leaf = 0x4_0020_0000;
    assert_eq!(w.supply(1, &[run(A, GPA, 512, 0)]), 0);
    assert_eq!(w.bind(1, vm, &[immediate(map(leaf, A, 512))]), 0);
    let calls = w.devices[0].told().fallible;
    assert_eq!(w.bind(1, vm, &[prefetch(leaf + 5 * PAGE, 100)]), 0);
    assert_eq!((resident(&w, asid, leaf, 512), w.devices[0].told().fallible), (512, calls));
}

#[test]
fn prefetch_without_faults_has_nothing_to_do() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 64)]), 0);
    answer_all(&w, 1, PAGE_RESP_SUCCESS);
    let calls = w.devices[0].told().fallible;
    assert_eq!(w.bind(1, vm, &[prefetch(C + PAGE, 9)]), 0);
    assert_eq!((is_held(&w, asid), w.devices[0].told().fallible), (false, calls));
}

#[test]
fn access_joins_the_prefetch_of_its_page() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 64), prefetch(C, 64)]), 0);
    let record = faults(&w)[0];
    let stop = w.devices[0].raise(&w.host, asid, C + 9 * PAGE, Access::Write);
    assert!(faults(&w).is_empty(), "one report for the page");
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 64, 0)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(resident(&w, asid, C, 64), 64);
}

#[test]
fn access_that_joined_a_refused_prefetch_asks_for_its_own_page() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 64), prefetch(C, 64)]), 0);
    let record = faults(&w)[0];
    let stop = w.devices[0].raise(&w.host, asid, C + 9 * PAGE, Access::Write);
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_INVALID, &[]), 0, "its first page is not there");
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    let again = w.devices[0].raise(&w.host, asid, C + 9 * PAGE, Access::Write);
    let record = faults(&w)[0];
    assert_eq!((record.cpu_addr.get(), record.flags.get() & FAULT_PREFETCH), (A + 9 * PAGE, 0));
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_INVALID, &[]), 0);
    assert_eq!(w.devices[0].verdict(again), Some(Verdict::Fail(EFAULT)), "it is asked once more, as a fault");
}

#[test]
fn immediate_map_is_resident_at_once_as_far_as_it_is_known() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.supply(1, &[run(A, GPA, 1024, 0)]), 0);
    assert_eq!(w.bind(1, vm, &[immediate(map(C, A, 1024)), map(C + (4 << 20), A, 16)]), 0);
    assert_eq!(resident(&w, asid, C, 1024), 1024);
    assert_eq!(resident(&w, asid, C + (4 << 20), 16), 0, "only what asked for it");
    assert!(faults(&w).is_empty());
}

#[test]
fn null_mapping_is_served_without_the_guest() {
    let (w, vm, asid) = with_vm(World::with_limits(WIDE));
    assert_eq!(w.bind(1, vm, &[null(C, 1 << 24)]), 0, "costs nothing");
    let stop = w.devices[0].raise(&w.host, asid, C + 5 * PAGE, Access::Write);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.devices[0].bound(asid, C + 5 * PAGE), Some(NULL_PAGE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 16)]), 0);
    assert_eq!(w.devices[0].bound(asid, C + 5 * PAGE), None, "replaced");
    let status = &w.guest.contexts()[0].vms[0];
    let kinds: Vec<_> = status.mappings.iter().map(|m| m.kind).collect();
    assert_eq!(kinds, ["userptr", "null"]);
}

#[test]
fn queues_without_faults_stand_still_until_all_is_bound() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 1024)]), 0);
    assert_eq!(w.exec(1, vm), 0);
    assert!(is_held(&w, asid));
    let asked = faults(&w);
    assert!(asked.iter().all(|f| f.perm.get() == PERM_READ | PERM_WRITE), "as if written to");
    let cookies: Vec<_> = asked.iter().map(|f| f.cookie.get()).collect();
    let (pages, seq) = (1024, 0);
    assert_eq!(w.respond(1, cookies[0], PAGE_RESP_SUCCESS, &[run(A, GPA, pages, seq)]), 0);
    for cookie in &cookies[1..] {
        assert!(is_held(&w, asid));
        assert_eq!(w.respond(1, *cookie, PAGE_RESP_SUCCESS, &[]), 0, "known by now");
    }
    assert_eq!(resident(&w, asid, C, 1024), 1024);
    assert!(!is_held(&w, asid));
}

#[test]
fn invalidation_without_faults_stops_queues_evicts_and_binds_again() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 1024)]), 0);
    answer_all(&w, 1, PAGE_RESP_SUCCESS);
    assert_eq!(w.exec(1, vm), 0);
    w.devices[0].told().busy = true;
    let (seq, done) = w.invalidate(1, A + 700 * PAGE, PAGE);
    assert!(is_held(&w, asid), "stopped before it was unbound: the mock looks");
    assert!(done < seq);
    assert_eq!(w.devices[0].bound(asid, C + 700 * PAGE), None);
    w.devices[0].told().busy = false;
    w.devices[0].pass(&w.host);
    assert_eq!(w.guest.contexts()[0].inval_done_seq, seq, "done does not wait for the pages to come back");
    assert!(is_held(&w, asid));
    assert_eq!(answer_all(&w, 1, PAGE_RESP_SUCCESS), 1);
    assert_eq!(w.devices[0].bound(asid, C + 700 * PAGE), Some((GPA + 700 * PAGE) / PAGE));
    assert!(!is_held(&w, asid));
    assert_eq!(resident(&w, asid, C, 1024), 1024);
}

#[test]
fn rest_of_a_large_leaf_is_bound_again_without_faults() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    let leaf = 0x4_0020_0000;
    assert_eq!(w.bind(1, vm, &[map(leaf, A, 512)]), 0);
    answer_all(&w, 1, PAGE_RESP_SUCCESS);
    assert_eq!(w.exec(1, vm), 0);
    // A device drops a leaf whole when it is cut; the mock drops a page that nobody asked it to.
    assert_eq!(w.bind(1, vm, &[unmap(leaf + 100 * PAGE, 1)]), 0);
    w.devices[0].told().bound.remove(&(Asid(asid), leaf / PAGE + 300));
    assert_eq!(w.bind(1, vm, &[unmap(leaf + 101 * PAGE, 1)]), 0);
    assert_eq!(resident(&w, asid, leaf, 512), 510);
    assert!(!is_held(&w, asid), "known pages need no guest");
}

#[test]
fn answer_that_finds_its_page_in_a_large_leaf_binds_all_of_it() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    let leaf = 0x4_0020_0000;
    let known = [run(A, GPA, 100, 0), run(A + 101 * PAGE, GPA + 101 * PAGE, 411, 0)];
    assert_eq!(w.supply(1, &known), 0);
    assert_eq!(w.bind(1, vm, &[map(leaf, A, 512)]), 0);
    let asked = faults(&w)[0];
    assert_eq!(w.supply(1, &[run(A + 100 * PAGE, GPA + 100 * PAGE, 1, 0)]), 0);
    w.guest.evict(1, None).unwrap();
    w.host.work_off();
    assert_eq!(resident(&w, asid, leaf, 512), 512, "as one leaf, on a device that has them");
    // Such a device drops the rest of a leaf of which a part is bound.
    w.devices[0].told().bound.clear();
    assert_eq!(w.respond(1, asked.cookie.get(), PAGE_RESP_SUCCESS, &[]), 0);
    assert_eq!((resident(&w, asid, leaf, 512), is_held(&w, asid)), (512, false));
}

#[test]
fn part_of_a_blob_that_is_mapped_again_in_place_brings_back_its_leaf() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    let (leaf, pages) = (0x4_0020_0000, 512 * 4096);
    let create = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: 5.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: u64::from(pages).into(),
        ..ResourceCreateBlob::default()
    };
    let entry = MemEntry { addr: GPA.into(), length: pages.into(), padding: 0.into() };
    assert_eq!(w.status(&[create.as_bytes(), entry.as_bytes()].concat()), 0);
    let hdr = hdr(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1);
    let attach = CtxResource { hdr, resource_id: 5.into(), padding: 0.into() };
    assert_eq!(w.status(attach.as_bytes()), 0);
    let blob = |gpu: u64, offset: u64, pages| BindOp {
        op: BIND_OP_MAP.into(),
        resource_id: 5.into(),
        obj_offset: offset.into(),
        ..unmap(gpu, pages)
    };
    assert_eq!(w.bind(1, vm, &[blob(leaf, 0, 512)]), 0);
    // A device drops the rest of a leaf of which a part is bound.
    w.devices[0].told().bound.clear();
    assert_eq!(w.bind(1, vm, &[blob(leaf + 9 * PAGE, 9 * PAGE, 3)]), 0);
    assert_eq!((resident(&w, asid, leaf, 512), is_held(&w, asid)), (512, false));
}

#[test]
fn page_that_cannot_be_had_makes_a_gpu_vm_without_faults_unusable() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 8)]), 0);
    assert_eq!(w.exec(1, vm), 0);
    assert_eq!(answer_all(&w, 1, PAGE_RESP_INVALID), 1);
    let status = &w.guest.contexts()[0].vms[0];
    assert_eq!((status.state, status.error), ("unusable", EFAULT));
    assert!(!is_held(&w, asid), "its jobs go on, and find that it is lost");
    w.devices[0].end_job(&w.host, EFAULT);
    assert_eq!(w.bind(1, vm, &[map(C, A, 8)]), -EPIPE);
    assert_eq!(w.bind(1, vm, &[prefetch(C, 8)]), -EPIPE);
    assert_eq!(w.bind(1, vm, &[unmap(C, 8)]), 0);
}

#[test]
fn mirror_is_refused_and_size_bounded_without_faults() {
    let (w, vm, _) = with_vm(without_faults(WIDE));
    let mirror = BindOp { op: BIND_OP_MAP.into(), flags: BIND_CPU_ADDR_MIRROR.into(), ..unmap(C, 1) };
    assert_eq!(w.bind(1, vm, &[mirror]), -EOPNOTSUPP);
    assert_eq!(w.bind(1, vm, &[map(C, A, MAX_POPULATED_PAGES + 1)]), -ENOSPC);
    assert_eq!(w.guest.contexts()[0].vms[0].mappings.len(), 0);
}

#[test]
fn guest_that_stops_its_rings_keeps_a_held_gpu_vm_stopped() {
    let (w, vm, asid) = with_vm(without_faults(WIDE));
    assert_eq!(w.bind(1, vm, &[map(C, A, 8)]), 0);
    w.guest.freeze();
    w.guest.thaw();
    assert!(is_held(&w, asid), "its pages are still missing");
    let record = faults(&w)[0];
    w.guest.freeze();
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 8, 0)]), 0);
    assert!(is_held(&w, asid), "the rings are stopped");
    w.guest.thaw();
    assert!(!is_held(&w, asid));
}

#[test]
fn removed_region_is_asked_for_again_and_a_blob_on_it_is_lost() {
    let w = without_faults(WIDE);
    let (low, high) = (region(1, GPA, MEMORY), region(2, 1 << 30, MEMORY));
    w.guest.set_memory(table(&[low.clone(), high.clone()]));
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    assert_eq!(w.bind(1, vm, &[map(C, A, 4)]), 0);
    let record = faults(&w)[0];
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, 1 << 30, 4, 0)]), 0);
    w.guest.set_memory(table(std::slice::from_ref(&low)));
    assert!(is_held(&w, asid));
    assert_eq!(answer_all(&w, 1, PAGE_RESP_SUCCESS), 1);
    assert_eq!((w.devices[0].bound(asid, C), is_held(&w, asid)), (Some(GPA / PAGE), false));
    w.guest.set_memory(table(&[low.clone(), high]));
    let cmd = ResourceCreateBlob {
        hdr: hdr(VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB, 0),
        resource_id: 5.into(),
        blob_mem: VIRTIO_GPU_BLOB_MEM_GUEST.into(),
        nr_entries: 1.into(),
        size: (4 * PAGE).into(),
        ..ResourceCreateBlob::default()
    };
    let entry = MemEntry { addr: (1 << 30).into(), length: (4 * 4096).into(), padding: 0.into() };
    assert_eq!(w.status(&[cmd.as_bytes(), entry.as_bytes()].concat()), 0);
    let attach = CtxResource {
        hdr: hdr(VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE, 1),
        resource_id: 5.into(),
        padding: 0.into(),
    };
    assert_eq!(w.status(attach.as_bytes()), 0);
    let blob = BindOp { op: BIND_OP_MAP.into(), resource_id: 5.into(), ..unmap(C + (1 << 20), 4) };
    assert_eq!(w.bind(1, vm, &[blob]), 0);
    assert_eq!(resident(&w, asid, C + (1 << 20), 4), 4);
    w.guest.set_memory(table(&[low]));
    let status = &w.guest.contexts()[0].vms[0];
    assert_eq!((status.state, status.error), ("unusable", EFAULT));
}

/// Every operation with the n-th device call failing, for every n: what the guest sees is as if the operation had not
/// been tried, or as if it had succeeded; nothing hangs, and it can be tried again.
#[test]
fn failing_device_call_leaves_the_state_as_it_was() {
    let limits = Limits { pending_faults: 64, ..WIDE };
    let mut swept = 0;
    for at in 0.. {
        let w = World::with_limits(limits);
        w.create_context(1);
        w.devices[0].told().fails_at = Some(at);
        let shape = |w: &World| {
            let mut status = w.guest.contexts().remove(0);
            // Translations are a cache; they may come.
            let mappings = status.vms.iter_mut().flat_map(|vm| &mut vm.mappings);
            mappings.for_each(|mapping| mapping.resident_pages = 0);
            let mappings = |vm: &virtio_gpu_svm::info::VmStatus| format!("{:?}", vm.mappings);
            (
                status.known_pages,
                status.vms.iter().map(mappings).collect::<Vec<_>>(),
                status.pending_faults,
                status.jobs,
            )
        };
        let vm_create = VmCreate::default();
        let before = shape(&w);
        let (status, _) = w.submit(1, SVM_REQ_VM_CREATE, &vm_create.as_bytes()[16..]);
        if status != 0 {
            assert_eq!((status, shape(&w)), (-ENOMEM, before));
            assert_eq!(
                w.host.devices()[0].gpu_vms + w.host.devices()[0].retiring,
                0,
                "its asid is free again"
            );
            w.create_vm(1, 0);
        }
        let (vm, asid) = (1, w.guest.contexts()[0].vms[0].asid);
        assert_eq!(w.bind(1, vm, &[map(C, A, 64), null(C + (2 << 20), 8)]), 0);
        assert_eq!(w.supply(1, &[run(A, GPA, 32, 0)]), 0);
        let before = shape(&w);
        assert_eq!(w.bind(1, vm, &[prefetch(C, 32), prefetch(C + (2 << 20), 8)]), 0, "advice");
        assert_eq!(shape(&w), before);
        for access in [C, C + 40 * PAGE, C + (2 << 20)] {
            let stop = w.devices[0].raise(&w.host, asid, access, Access::Read);
            if w.devices[0].verdict(stop).is_none() {
                let cookie = w.cookies()[0];
                assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A + 40 * PAGE, GPA, 1, 0)]), 0);
            }
            let verdict = w.devices[0].verdict(stop);
            assert!(matches!(verdict, Some(Verdict::Retry | Verdict::Fail(ENOMEM))), "{verdict:?}");
        }
        let before = shape(&w);
        let status = w.exec(1, vm);
        if status != 0 {
            assert_eq!((status, shape(&w)), (-ENOMEM, before));
            assert_eq!(w.exec(1, vm), 0);
        }
        assert_eq!(w.guest.contexts()[0].vms[0].state, "usable");
        let calls = w.devices[0].told().fallible;
        if at >= calls {
            swept = at;
            break;
        }
    }
    assert!(swept >= 6, "only {swept} calls of devices were made");
}

#[test]
fn failing_device_call_without_faults_makes_only_that_gpu_vm_unusable() {
    let w = without_faults(WIDE);
    let (lost, other) = (1, 2);
    for ctx_id in [lost, other] {
        w.create_context(ctx_id);
        w.create_vm(ctx_id, 0);
        assert_eq!(w.supply(ctx_id, &[run(A, GPA, 64, 0)]), 0);
    }
    assert_eq!(w.bind(other, 1, &[map(C, A, 64)]), 0);
    let next = w.devices[0].told().fallible;
    w.devices[0].told().fails_at = Some(next);
    assert_eq!(w.bind(lost, 1, &[map(C, A, 64)]), 0);
    let states: Vec<_> = w.guest.contexts().iter().map(|c| (c.vms[0].state, c.vms[0].error)).collect();
    assert_eq!(states, [("unusable", ENOMEM), ("usable", 0)]);
    assert_eq!(w.exec(lost, 1), -EPIPE);
    assert_eq!(w.exec(other, 1), 0);
}
