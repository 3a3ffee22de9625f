//! A fault's life against every event that can meet it, on a device that does nothing by itself.

use crate::mock::{A, C, GPA, MEMORY, World, faults, map, notices, region, run, table, unmap};
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::protocol::control::{
    PAGE_RESP_FAILURE, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS, RUN_READONLY,
};
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::*;
use zerocopy::FromBytes;

#[test]
fn same_ranges_in_two_contexts_each_fault_has_its_owner() {
    let w = World::new();
    let (_, asid1) = w.mapped(1);
    let (_, asid2) = w.mapped(2);
    assert_ne!(asid1, asid2);
    let stop1 = w.devices[0].raise(&w.host, asid1, C + 8, Access::Read);
    let stop2 = w.devices[0].raise(&w.host, asid2, C + 8, Access::Write);
    let records = faults(&w);
    assert_eq!(records.iter().map(|r| r.ctx_id.get()).collect::<Vec<_>>(), [1, 2]);
    assert!(records.iter().all(|r| (r.addr.get(), r.cpu_addr.get()) == (C, A)));
    assert_eq!(records.iter().map(|r| r.perm.get()).collect::<Vec<_>>(), [PERM_READ, PERM_WRITE]);
    assert_eq!(w.host.stats().peak_pending_vms, 2);
    for (record, (ctx_id, gpa)) in records.iter().zip([(1, GPA), (2, GPA + 0x5000)]) {
        assert_eq!(
            w.respond(3 - ctx_id, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, gpa, 1, 0)]),
            -EINVAL
        );
        assert_eq!(w.respond(ctx_id, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, gpa, 1, 0)]), 0);
    }
    assert_eq!(w.devices[0].bound(asid1, C), Some(GPA / 4096));
    assert_eq!(w.devices[0].bound(asid2, C), Some(GPA / 4096 + 5));
    assert_eq!(
        (w.devices[0].verdict(stop1), w.devices[0].verdict(stop2)),
        (Some(Verdict::Retry), Some(Verdict::Retry))
    );
    let stats = w.host.stats();
    assert_eq!((stats.counters.faults_answered, stats.counters.answers_stale, stats.pending_vms), (2, 2, 0));
}

#[test]
fn cookie_is_used_once_and_only_when_reported() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    let guessed = (w.guest.contexts()[0].generation << 32) | 1;
    assert_eq!(w.respond(1, guessed, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), -EINVAL);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(cookie, guessed);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), -EINVAL);
}

#[test]
fn known_page_serves_the_other_device_without_the_guest() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let (vm1, asid1) = w.create_vm(1, 1);
    assert_eq!(w.bind(1, vm1, &[map(C, A, 64)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 16, 0)]), 0);
    let stop = w.devices[1].raise(&w.host, asid1, C + 0x3000, Access::Write);
    assert_eq!(w.devices[1].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.devices[1].bound(asid1, C + 0x3000), Some(GPA / 4096 + 3));
    assert!(faults(&w).is_empty());
    assert_eq!(w.host.stats().counters.faults_served_locally, 1);
}

#[test]
fn large_leaf_is_bound_whole_where_both_sides_agree() {
    let w = World::new();
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    let (a, c) = (0x7f00_0020_0000, 0x4_0040_0000);
    assert_eq!(w.bind(1, vm, &[map(c, a, 1024)]), 0);
    assert_eq!(w.supply(1, &[run(a, GPA, 512, 0)]), 0);
    w.devices[0].raise(&w.host, asid, c + 0x12345, Access::Read);
    assert_eq!(w.guest.contexts()[0].vms[0].resident_pages, 512);
}

#[test]
fn faults_on_one_page_are_one_record_and_all_go_on() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stops: Vec<_> = (0..5)
        .map(|n| w.devices[0].raise(&w.host, asid, C + n * 8, [Access::Read, Access::Write][n as usize % 2]))
        .collect();
    let records = faults(&w);
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].num_coalesced.get(), 5);
    assert_eq!(w.respond(1, records[0].cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert!(stops.iter().all(|stop| w.devices[0].verdict(*stop) == Some(Verdict::Retry)));
    assert_eq!(w.host.stats().counters.faults_answered, 5);
}

#[test]
fn beyond_the_limit_faults_wait_their_turn() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stops: Vec<_> =
        (0..6).map(|n| w.devices[0].raise(&w.host, asid, C + n * 4096, Access::Read)).collect();
    let records = faults(&w);
    assert_eq!(records.len(), 4);
    assert_eq!(w.devices[0].verdict(stops[4]), None);
    assert_eq!(w.respond(1, records[0].cookie.get(), PAGE_RESP_INVALID, &[]), 0);
    assert_eq!(w.devices[0].verdict(stops[0]), Some(Verdict::Fail(EFAULT)));
    assert_eq!(
        w.devices[0].verdict(stops[4]),
        Some(Verdict::Retry),
        "raised again, and then within the limit"
    );
    assert_eq!(w.host.stats().counters.faults_throttled, 2);
}

#[test]
fn answer_older_than_an_invalidation_is_refused_and_the_fault_stays() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    let (seq, done) = w.invalidate(1, A, 4096);
    assert_eq!(done, seq);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, seq - 1)]), -EAGAIN);
    assert_eq!((w.devices[0].verdict(stop), w.devices[0].bound(asid, C)), (None, None));
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, seq)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.host.stats().counters.runs_refused, 1);
}

#[test]
fn invalidation_is_done_only_when_every_device_has_passed() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let (vm1, asid1) = w.create_vm(1, 1);
    assert_eq!(w.bind(1, vm1, &[map(C, A, 64)]), 0);
    assert_eq!(w.supply(1, &[run(A, GPA, 16, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    w.devices[1].raise(&w.host, asid1, C, Access::Read);
    w.devices.iter().for_each(|device| device.told().busy = true);
    let (seq, done) = w.invalidate(1, A, 16 * 4096);
    assert!(done < seq);
    assert_eq!((w.devices[0].bound(asid, C), w.devices[1].bound(asid1, C)), (None, None));
    w.devices[0].pass(&w.host);
    assert_eq!(notices(&w), []);
    w.devices[1].pass(&w.host);
    assert_eq!(notices(&w), [(EVENT_INVAL_DONE, 1, seq)]);
}

#[test]
fn unmapped_while_pending_is_raised_again_and_refused() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(w.bind(1, vm, &[unmap(C, 64)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), -EINVAL);
    let again = w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert_eq!(w.devices[0].verdict(again), Some(Verdict::Fail(EINVAL)));
}

#[test]
fn record_of_a_fault_that_ended_before_it_was_told_does_not_wait() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    for _ in 0..100 {
        w.devices[0].raise(&w.host, asid, C, Access::Read);
        assert_eq!(w.bind(1, vm, &[unmap(C, 64), map(C, A, 64)]), 0);
    }
    assert!(faults(&w).is_empty());
}

#[test]
fn write_through_a_readonly_mapping_is_refused() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    let mut readonly = map(C, A, 64);
    readonly.flags = 1.into();
    assert_eq!(w.bind(1, vm, &[readonly]), 0);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Write);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Fail(EPERM)));
    assert_eq!(w.supply(1, &[run(A, GPA, 1, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert!(w.devices[0].told().bound.values().all(|(_, writable)| !writable));
}

#[test]
fn write_to_a_page_that_the_process_may_only_read_asks_again() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let mut readonly = run(A, GPA, 1, 0);
    readonly.flags = RUN_READONLY.into();
    assert_eq!(w.supply(1, &[readonly]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Atomic);
    let record = faults(&w)[0];
    assert_eq!(record.fault_type, FAULT_ATOMIC_ACCESS);
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[readonly]), -EINVAL);
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert_eq!(w.devices[0].bound(asid, C), Some(GPA / 4096));
}

#[test]
fn failure_makes_only_that_gpu_vm_unusable() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    let (_, asid2) = w.mapped(2);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(w.respond(1, cookie, PAGE_RESP_FAILURE, &[]), 0);
    assert!(matches!(w.devices[0].verdict(stop), Some(Verdict::Fail(_))));
    assert_eq!(notices(&w), [(EVENT_CONTEXT_LOST, 1, vm.into())]);
    assert_eq!(w.bind(1, vm, &[map(C, A, 1)]), -EPIPE);
    assert_eq!(w.bind(1, vm, &[unmap(C, 64)]), 0);
    assert_eq!(w.exec(1, vm), -EPIPE);
    w.devices[0].raise(&w.host, asid2, C, Access::Read);
    assert_eq!(faults(&w).len(), 1);
}

#[test]
fn late_faults_of_a_destroyed_context_are_dropped_and_counted() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    let (_, other) = w.mapped(2);
    assert_eq!(w.exec(1, vm), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    w.destroy_context(1);
    let late = w.devices[0].raise(&w.host, asid, C + 4096, Access::Read);
    assert_eq!(w.devices[0].verdict(late), Some(Verdict::Fail(ECANCELED)));
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), -ENOENT);
    assert_eq!(notices(&w), []);
    w.devices[0].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_CONTEXT_RETIRED, 1, 0)]);
    let stats = w.host.stats();
    assert_eq!((stats.counters.faults_dropped, stats.counters.jobs_dropped, stats.pending_vms), (2, 1, 0));
    w.devices[0].raise(&w.host, other, C, Access::Read);
    assert_eq!(faults(&w)[0].ctx_id.get(), 2);
}

#[test]
fn asid_is_not_reused_before_it_is_retired() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    w.destroy_context(1);
    let (_, next) = w.mapped(1);
    assert_ne!(asid, next);
    assert_eq!(w.host.devices()[0].retiring, 1);
    w.devices[0].retire_all(&w.host);
    assert_eq!(w.host.devices()[0].retiring, 0);
}

#[test]
fn new_incarnation_drops_everything_and_tells_when_it_is_quiet() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert_eq!(w.hello(1).retiring.get(), 0, "the same life goes on");
    assert_eq!(w.guest.contexts().len(), 1);
    assert_eq!(w.hello(2).retiring.get(), 1);
    assert!(w.guest.contexts().is_empty());
    assert_eq!(w.records().len(), 0);
    w.devices[0].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_QUIET, 0, 2)]);
    assert_eq!(w.hello(3).retiring.get(), 0);
}

#[test]
fn removed_memory_is_forgotten_and_kept_memory_stays() {
    let w = World::new();
    let kept = region(1, GPA, MEMORY);
    let gone = region(2, GPA + MEMORY, MEMORY);
    w.guest.set_memory(table(&[kept.clone(), gone]));
    let (_, asid) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 8, 0), run(A + 0x8000, GPA + MEMORY, 8, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    w.guest.set_memory(table(&[kept]));
    assert_eq!(w.guest.contexts()[0].known_pages, 8);
    assert_eq!(w.devices[0].bound(asid, C + 0x8000), None);
    assert_eq!(w.supply(1, &[run(A + 0x8000, GPA + MEMORY, 8, 0)]), -EFAULT);
}

#[test]
fn list_reaches_over_a_hole_of_memory_and_no_run_lies_in_it() {
    let w = World::new();
    w.guest.set_memory(table(&[region(1, GPA, MEMORY), region(2, GPA + 2 * MEMORY, MEMORY)]));
    w.create_context(1);
    let (below, above) = (run(A, GPA, 1, 0), run(A + 0x1000, GPA + 2 * MEMORY, 1, 0));
    let hole = [run(A + 0x2000, GPA + MEMORY, 1, 0), run(A + 0x2000, GPA + MEMORY - 0x1000, 2, 0)];
    for bad in hole {
        assert_eq!(w.supply(1, &[below, bad, above]), -EFAULT);
    }
    assert_eq!(w.guest.contexts()[0].known_pages, 0);
    assert_eq!(w.supply(1, &[below, above]), 0);
    assert_eq!(w.guest.contexts()[0].known_pages, 2);
}

#[test]
fn jobs_end_in_records_and_count_until_they_are_told() {
    let w = World::new();
    let (vm, _) = w.mapped(1);
    (0..4).for_each(|_| assert_eq!(w.exec(1, vm), 0));
    assert_eq!(w.exec(1, vm), -ENOSPC);
    w.devices[0].end_job(&w.host, 0);
    w.devices[0].end_job(&w.host, EINVAL);
    assert_eq!(w.exec(1, vm), -ENOSPC, "undelivered records count");
    let ends: Vec<_> =
        w.records().iter().map(|bytes| JobRecord::read_from_bytes(bytes).unwrap().status.get()).collect();
    assert_eq!(ends, [0, -EINVAL]);
    assert_eq!(w.exec(1, vm), 0);
}

#[test]
fn eviction_drops_translations_and_nothing_else() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 16, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert_eq!(w.guest.evict(1, None).unwrap(), 16);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!(w.host.stats().counters.faults_served_locally, 2);
}

#[test]
fn vector_of_binds_takes_effect_whole_or_not_at_all() {
    let w = World::new();
    let (vm, _) = w.mapped(1);
    let many: Vec<_> = (0..9).map(|n| map(C + n * 0x10_0000, A, 1)).collect();
    assert_eq!(w.bind(1, vm, &many), -ENOSPC);
    assert_eq!(w.guest.contexts()[0].vms[0].mappings.len(), 1);
    assert_eq!(w.bind(1, vm, &many[1..8]), 0);
    assert_eq!(w.guest.contexts()[0].vms[0].mappings.len(), 8);
}
