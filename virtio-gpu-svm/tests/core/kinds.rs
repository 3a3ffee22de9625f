//! Devices without mappings of their own: addresses are the process', and pages are asked for in groups.

use crate::mock::*;
use virtio_gpu_svm::device::{Access, AddressModel, DeviceInfo, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::control::{PAGE_RESP_FAILURE, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS};
use virtio_gpu_svm::protocol::errno::{EFAULT, EINVAL, EOPNOTSUPP, EPIPE};
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::request::*;

const PAGE: u64 = 4096;
/// A and C are one on such a device.
const AT: u64 = 0x7f_0003_0000;

fn world() -> (World, u32, u32) {
    let identity =
        DeviceInfo { address_model: AddressModel::Identity, null_mappings: false, ..device_info() };
    let w = World::on_devices(Limits { pending_faults: 64, ..LIMITS }, [identity, device_info()]);
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    (w, vm, asid)
}

#[test]
fn whole_address_space_is_there_without_a_bind() {
    let (w, _, asid) = world();
    let stop = w.devices[0].raise(&w.host, asid, AT + 8, Access::Write);
    let record = faults(&w)[0];
    assert_eq!((record.addr.get(), record.cpu_addr.get(), record.grpid.get()), (AT, AT, 0));
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(AT, GPA, 1, 0)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.devices[0].bound(asid, AT), Some(GPA / PAGE));
}

#[test]
fn only_identity_is_accepted() {
    let (w, vm, _) = world();
    let mirror = |offset: i64| BindOp {
        op: BIND_OP_MAP.into(),
        flags: BIND_CPU_ADDR_MIRROR.into(),
        obj_offset: offset.cast_unsigned().into(),
        ..unmap(AT, 4)
    };
    for op in [map(AT, AT, 4), mirror(0), BindOp { op: BIND_OP_PREFETCH.into(), ..unmap(AT, 4) }] {
        assert_eq!(w.bind(1, vm, &[op]), 0);
    }
    assert_eq!(w.bind(1, vm, &[map(AT, AT + PAGE, 4)]), -EINVAL);
    assert_eq!(w.bind(1, vm, &[mirror(4096)]), -EINVAL);
    let readonly = BindOp { flags: BIND_READONLY.into(), ..map(AT, AT, 4) };
    let null = BindOp { op: BIND_OP_MAP.into(), flags: BIND_NULL.into(), ..unmap(AT, 4) };
    for op in [unmap(AT, 4), readonly, null] {
        assert_eq!(w.bind(1, vm, &[op]), -EOPNOTSUPP);
    }
    let status = &w.guest.contexts()[0].vms[0];
    assert_eq!(status.mappings.len(), 1);
}

#[test]
fn group_has_a_record_for_each_page_one_cookie_and_one_answer() {
    let (w, _, asid) = world();
    let stop = w.devices[0].raise_group(&w.host, asid, AT + 0x10, Access::Read, 6);
    let records = faults(&w);
    let flags = |last: u32| FAULT_PASID_VALID | FAULT_REPLAYABLE | last;
    let shape: Vec<_> = records.iter().map(|r| (r.addr.get(), r.cpu_addr.get(), r.flags.get())).collect();
    let expected: Vec<_> = (0..6)
        .map(|n| (AT + n * PAGE, AT + n * PAGE, flags(if n == 5 { FAULT_LAST_PAGE } else { 0 })))
        .collect();
    assert_eq!(shape, expected);
    assert!(records.iter().all(|r| r.cookie == records[0].cookie && r.grpid == records[0].grpid));
    assert_ne!(records[0].grpid.get(), 0);
    assert_eq!(w.respond(1, records[5].cookie.get(), PAGE_RESP_SUCCESS, &[run(AT, GPA, 6, 0)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert!((0..6).all(|n| w.devices[0].bound(asid, AT + n * PAGE).is_some()));
}

#[test]
fn group_leaves_out_what_is_known_or_asked_for() {
    let (w, _, asid) = world();
    assert_eq!(w.supply(1, &[run(AT + 3 * PAGE, GPA, 1, 0)]), 0);
    w.devices[0].raise_group(&w.host, asid, AT, Access::Read, 8);
    assert_eq!(faults(&w).len(), 3, "up to the known page");
    let second = w.devices[0].raise_group(&w.host, asid, AT + 2 * PAGE, Access::Read, 8);
    assert!(faults(&w).is_empty(), "its first page is asked for: it joins");
    w.devices[0].raise_group(&w.host, asid, AT - 2 * PAGE, Access::Read, 8);
    let before = faults(&w);
    assert_eq!(before.iter().map(|r| r.addr.get()).collect::<Vec<_>>(), [AT - 2 * PAGE, AT - PAGE]);
    assert_eq!(w.guest.contexts()[0].pending_faults, 2);
    assert_eq!(w.devices[0].verdict(second), None);
}

#[test]
fn answer_before_the_last_record_of_a_group_is_stale() {
    let (w, _, asid) = world();
    w.devices[0].raise_group(&w.host, asid, AT, Access::Read, 2);
    let mut buf = Vec::new();
    w.guest.fill_events(&mut buf, 24 + EVENT_RECORD_BYTES);
    let cookie = u64::from_le_bytes(buf[32..40].try_into().unwrap());
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(AT, GPA, 2, 0)]), -EINVAL);
    assert_eq!(faults(&w).len(), 1);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(AT, GPA, 2, 0)]), 0);
}

#[test]
fn who_joined_a_group_is_not_refused_for_its_first_page() {
    let (w, _, asid) = world();
    let first = w.devices[0].raise_group(&w.host, asid, AT, Access::Read, 8);
    let joined = w.devices[0].raise(&w.host, asid, AT + 3 * PAGE, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(w.respond(1, cookie, PAGE_RESP_INVALID, &[]), 0);
    assert_eq!(w.devices[0].verdict(first), Some(Verdict::Fail(EFAULT)));
    assert_eq!(w.devices[0].verdict(joined), Some(Verdict::Retry));
    let counters = w.host.stats().counters;
    assert_eq!((counters.faults_raised, counters.faults_refused, counters.faults_throttled), (2, 1, 1));
}

#[test]
fn operation_that_does_nothing_is_refused_in_an_unusable_gpu_vm() {
    let (w, vm, asid) = world();
    w.devices[0].raise(&w.host, asid, AT, Access::Read);
    assert_eq!(w.respond(1, w.cookies()[0], PAGE_RESP_FAILURE, &[]), 0);
    assert_eq!(w.bind(1, vm, &[map(AT, AT, 1)]), -EPIPE);
}
