//! Ends that come at an awkward moment: who waits is let go, what is counted adds up, and nothing of a life that is
//! over reaches the next one.

use crate::mock::{A, C, GPA, LIMITS, MEMORY, World, faults, hdr, map, notices, region, run, table, unmap};
use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use virtio_gpu_svm::device::{Access, Asid, StopId, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::info::Counters;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::{SVM_REQ_VM_CREATE, SVM_REQ_VM_DESTROY, VmCreate, VmRef};
use zerocopy::{FromBytes, IntoBytes};

fn destroy_vm(world: &World, ctx_id: u32, vm_id: u32) {
    let body = VmRef { vm_id: vm_id.into(), ..VmRef::default() };
    assert_eq!(world.submit(ctx_id, SVM_REQ_VM_DESTROY, &body.as_bytes()[16..]).0, 0);
}
/// A GPU address whose page shares no fault-around window with those of other numbers.
fn apart(n: u64) -> u64 {
    C + n * 16 * 4096
}
/// Every fault that was raised ended as exactly one thing, or waits.
fn assert_balanced(world: &World, waiting: u64) {
    let c = world.host.stats().counters;
    let ended = c.faults_served_locally
        + c.faults_answered
        + c.faults_refused
        + c.faults_dropped
        + c.faults_throttled;
    assert_eq!(c.faults_raised, ended + waiting, "{c:?}");
}

#[test]
fn invalidation_is_not_done_while_engines_may_use_a_destroyed_gpu_vm() {
    let w = World::new();
    let (vm, _) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 16, 0)]), 0);
    destroy_vm(&w, 1, vm);
    let (seq, done) = w.invalidate(1, A, 4096);
    assert!(done < seq, "done, and the GPU VM has not retired");
    w.devices[0].pass(&w.host);
    assert_eq!(notices(&w), [], "a ticket of the GPU VM says nothing of its end");
    w.devices[0].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_INVAL_DONE, 1, seq)]);
}

#[test]
fn invalidation_is_not_done_while_engines_may_use_what_was_unmapped() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 16, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    w.devices[0].told().busy = true;
    assert_eq!(w.bind(1, vm, &[unmap(C, 64)]), 0);
    let (seq, done) = w.invalidate(1, A, 4096);
    assert!(done < seq, "done, and no engine has passed a checkpoint since the UNMAP");
    w.devices[0].pass(&w.host);
    assert_eq!(notices(&w), [(EVENT_INVAL_DONE, 1, seq)]);
}

#[test]
fn throttled_accesses_all_go_on_though_one_answer_serves_them() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stops: Vec<StopId> =
        (0..12).map(|n| w.devices[0].raise(&w.host, asid, C + n * 4096, Access::Read)).collect();
    let records = faults(&w);
    assert_eq!(records.len(), 4);
    // The first answer makes all twelve pages known and binds them: the others need no fault of their own any more.
    for record in records {
        assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(A, GPA, 16, 0)]), 0);
    }
    let stuck: Vec<_> = stops.iter().filter(|stop| w.devices[0].verdict(**stop).is_none()).collect();
    assert!(stuck.is_empty(), "nothing is pending any more, and still parked: {stuck:?}");
    assert_balanced(&w, 0);
}

#[test]
fn throttled_accesses_that_are_served_when_raised_again_let_others_in() {
    let w = World::with_limits(Limits { jobs: 64, ..LIMITS });
    let (_, asid) = w.mapped(1);
    let (vm1, asid1) = w.create_vm(1, 1);
    assert_eq!(w.bind(1, vm1, &[map(C, A, 64)]), 0);
    // Device 0 holds all records; on device 1 twenty accesses wait for a place.
    for n in 0..4 {
        w.devices[0].raise(&w.host, asid, C + n * 4096, Access::Read);
    }
    let mut parked: BTreeSet<(StopId, u64)> =
        (0..20).map(|n| (w.devices[1].raise(&w.host, asid1, C + n * 4096, Access::Read), n)).collect();
    loop {
        for record in faults(&w) {
            let cpu = record.cpu_addr.get();
            let gpa = GPA + (cpu - A);
            assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[run(cpu, gpa, 1, 0)]), 0);
        }
        let released: Vec<_> =
            parked.iter().filter(|(stop, _)| w.devices[1].verdict(*stop).is_some()).copied().collect();
        if released.is_empty() {
            break;
        }
        for (stop, n) in released {
            parked.remove(&(stop, n));
            // As the device does: the access is repeated, and faults if there is still no translation.
            if w.devices[1].bound(asid1, C + n * 4096).is_none() {
                parked.insert((w.devices[1].raise(&w.host, asid1, C + n * 4096, Access::Read), n));
            }
        }
    }
    assert!(parked.is_empty(), "nothing is pending any more, and still parked: {parked:?}");
    assert_balanced(&w, 0);
}

#[test]
fn throttled_accesses_of_a_destroyed_vm_hold_up_nobody() {
    let w = World::with_limits(Limits { jobs: 64, ..LIMITS });
    w.create_context(1);
    let (vm0, asid0) = w.create_vm(1, 0);
    let (vm1, asid1) = w.create_vm(1, 1);
    for vm in [vm0, vm1] {
        assert_eq!(w.bind(1, vm, &[map(C, A, 256)]), 0);
    }
    for n in 0..4 {
        w.devices[1].raise(&w.host, asid1, apart(n), Access::Read);
    }
    for n in 0..6 {
        w.devices[0].raise(&w.host, asid0, apart(n), Access::Read);
    }
    let last = w.devices[1].raise(&w.host, asid1, apart(5), Access::Read);
    destroy_vm(&w, 1, vm0);
    let record = faults(&w)[0];
    let page = run(record.cpu_addr.get(), GPA, 1, 0);
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[page]), 0);
    assert_eq!(w.devices[1].verdict(last), Some(Verdict::Retry));
    assert_balanced(&w, 3);
}

#[test]
fn failure_ends_its_job_with_efault_and_others_with_epipe_unasked() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, apart(0), Access::Read);
    let other = w.devices[0].raise(&w.host, asid, apart(1), Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    assert_eq!(w.respond(1, cookie, PAGE_RESP_FAILURE, &[]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Fail(EFAULT)));
    assert_eq!(w.devices[0].verdict(other), Some(Verdict::Fail(EPIPE)));
    // A job that was running meanwhile: the guest has said that it cannot answer any more.
    let later = w.devices[0].raise(&w.host, asid, apart(2), Access::Read);
    assert_eq!(w.devices[0].verdict(later), Some(Verdict::Fail(EPIPE)));
    assert!(faults(&w).is_empty());
    assert_eq!(w.host.stats().pending_vms, 0);
    assert_balanced(&w, 0);
}

#[test]
fn write_that_joins_after_the_record_was_read_does_not_spoil_its_answer() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let read = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let record = faults(&w)[0];
    assert_eq!(record.perm.get(), PERM_READ);
    let write = w.devices[0].raise(&w.host, asid, C, Access::Write);
    let mut readonly = run(A, GPA, 1, 0);
    readonly.flags = RUN_READONLY.into();
    assert_eq!(w.respond(1, record.cookie.get(), PAGE_RESP_SUCCESS, &[readonly]), 0);
    assert_eq!(w.devices[0].verdict(read), Some(Verdict::Retry));
    assert_eq!(w.devices[0].verdict(write), Some(Verdict::Retry));
    // Repeated, it asks for what it needs.
    w.devices[0].raise(&w.host, asid, C, Access::Write);
    let record = faults(&w)[0];
    assert_eq!((record.fault_type, record.perm.get()), (FAULT_WRITE_ACCESS, PERM_WRITE));
}

#[test]
fn answer_stands_when_only_pages_beside_it_have_raced() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    // Far from A: only the second run is too old.
    let far = A + (8 << 20);
    w.invalidate(1, far, 4096);
    let answer = PageResponse {
        hdr: hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, 1),
        cookie: cookie.into(),
        code: PAGE_RESP_SUCCESS.into(),
        num_runs: 2.into(),
        flags: 0.into(),
    };
    let runs = [run(A, GPA, 1, 0), run(far, GPA + 0x1000, 1, 0)];
    let resp = SupplyResp::read_from_bytes(&w.send(&[answer.as_bytes(), runs.as_bytes()].concat())).unwrap();
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
    assert_eq!((resp.installed.get(), resp.refused.get()), (1, 1));
    assert_eq!(resp.resp.status.get(), 0, "-EAGAIN means that the fault is still pending");
}

#[test]
fn pending_fault_is_not_starved_by_invalidations_elsewhere() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = faults(&w)[0].cookie.get();
    // Its own leaf once, while nothing of it is known; from then on only others.
    let (seq, _) = w.invalidate(1, A, 4096);
    w.invalidate(1, A + (64 << 20), 4096);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, seq)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
}

#[test]
fn invalidation_of_a_destroyed_context_is_not_told() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    assert_eq!(w.supply(1, &[run(A, GPA, 1, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    w.devices[0].told().busy = true;
    let (seq, done) = w.invalidate(1, A, 4096);
    assert!(done < seq);
    w.destroy_context(1);
    w.create_context(1);
    w.devices[0].pass(&w.host);
    w.devices[0].retire_all(&w.host);
    // The new context of that id has sequences of its own.
    assert_eq!(notices(&w), [(EVENT_CONTEXT_RETIRED, 1, 0)]);
}

#[test]
fn notices_that_are_not_fetched_count_as_contexts() {
    let w = World::new();
    for ctx_id in 1..=LIMITS.contexts {
        w.create_context(ctx_id);
        w.destroy_context(ctx_id);
    }
    let create = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, 1), ..CtxCreate::default() };
    assert_eq!(w.status(create.as_bytes()), -ENOSPC, "or they would pile up without end");
    assert_eq!(notices(&w).len(), LIMITS.contexts as usize);
    w.create_context(1);
}

#[test]
fn driver_without_hello_is_told_nothing_of_its_contexts() {
    let w = World::new();
    w.guest.reset();
    for _ in 0..100 {
        w.create_context(1);
        w.destroy_context(1);
    }
    assert!(!w.guest.has_events());
}

#[test]
fn quiet_waits_for_earlier_incarnations_only() {
    let w = World::new();
    w.mapped(1);
    assert_eq!(w.hello(2).retiring.get(), 1);
    let mine = w.mapped(1).1;
    w.destroy_context(1);
    assert_eq!(w.hello(2).retiring.get(), 1, "its own is none of an earlier one");
    // The old one goes, the new one stays busy.
    let kept = {
        let mut told = w.devices[0].told();
        let (kept, gone) = told.destroyed.iter().partition(|asid| asid.0 == mine);
        told.destroyed = gone;
        kept
    };
    w.devices[0].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_QUIET, 0, 2)]);
    w.devices[0].told().destroyed = kept;
    w.devices[0].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_CONTEXT_RETIRED, 1, 0)]);
}

#[test]
fn quiet_comes_with_the_last_of_earlier_incarnations() {
    let w = World::new();
    w.mapped(1);
    w.create_context(2);
    w.create_vm(2, 1);
    assert_eq!(w.hello(2).retiring.get(), 2);
    w.devices[0].retire_all(&w.host);
    assert!(notices(&w).is_empty(), "engines may still be in the other");
    w.devices[1].retire_all(&w.host);
    assert_eq!(notices(&w), [(EVENT_QUIET, 0, 2)]);
}

#[test]
fn loss_of_a_gpu_vm_that_is_destroyed_is_not_told() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    assert_eq!(w.respond(1, w.cookies()[0], PAGE_RESP_FAILURE, &[]), 0);
    destroy_vm(&w, 1, vm);
    assert!(notices(&w).is_empty());
}

#[test]
fn new_incarnation_does_not_let_the_old_jobs_run_again() {
    let w = World::new();
    let asid = Asid(w.mapped(1).1);
    w.guest.freeze();
    assert!(w.devices[0].told().frozen.contains(&asid));
    w.hello(1);
    assert!(!w.devices[0].told().frozen.contains(&asid), "the same driver goes on");
    w.guest.freeze();
    let unknown = Hello { hdr: hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0), incarnation: 1.into(), ..Hello::default() };
    assert_eq!(w.status(unknown.as_bytes()), -EOPNOTSUPP);
    assert!(w.guest.is_frozen(), "a HELLO that is refused decides nothing");
    w.hello(2);
    assert!(w.devices[0].told().frozen.contains(&asid), "its jobs would write into the next driver's memory");
    assert!(!w.guest.is_frozen());
}

#[test]
fn length_hint_ends_with_the_mapping() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    w.devices[0].raise_long(&w.host, asid, C + 62 * 4096 + 8, Access::Read, 1 << 30);
    w.devices[0].raise_long(&w.host, asid, C + 8, Access::Read, 4096);
    let hints: Vec<_> = faults(&w).iter().map(|record| record.length_hint.get()).collect();
    assert_eq!(hints, [2 * 4096, 4096 + 8]);
}

#[test]
fn removed_memory_is_out_of_use_by_dying_vms_too() {
    let w = World::new();
    let (vm, _) = w.mapped(1);
    let asid = Asid(w.mapped(2).1);
    destroy_vm(&w, 1, vm);
    w.destroy_context(2);
    let (done, wait) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            w.guest.set_memory(table(&[region(9, GPA, MEMORY)]));
            done.send(w.devices[0].told().vms.contains_key(&asid)).unwrap();
        });
        // No deadline: an answer that comes early is the defect.
        assert_eq!(wait.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        w.devices[0].retire_all(&w.host);
        assert!(!wait.recv().unwrap());
    });
}

#[test]
fn many_small_mappings_are_zapped_by_few_calls() {
    let w = World::with_limits(Limits { mappings: 4096, ..LIMITS });
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    let binds: Vec<_> = (0..2000).map(|n| map(C + n * 8192, A + n * 4096, 1)).collect();
    assert_eq!(w.bind(1, vm, &binds), 0);
    assert_eq!(w.supply(1, &[run(A, GPA, 2000, 0)]), 0);
    let touch = |n: u64| {
        w.devices[0].raise(&w.host, asid, C + n * 8192, Access::Read);
        assert!(w.devices[0].bound(asid, C + n * 8192).is_some());
    };
    (0..2000).for_each(touch);
    w.devices[0].told().unbinds = 0;
    w.invalidate(1, A, 2000 * 4096);
    assert!(w.devices[0].told().bound.is_empty());
    assert_eq!(w.supply(1, &[run(A, GPA, 2000, 1)]), 0);
    (0..2000).for_each(touch);
    assert_eq!(w.bind(1, vm, &[unmap(C, 4000)]), 0);
    assert!(w.devices[0].told().bound.is_empty());
    let unbinds = w.devices[0].told().unbinds;
    assert!(unbinds <= 200, "{unbinds} calls under the context's lock");
}

#[test]
fn pages_of_one_command_are_bounded() {
    let w = World::new();
    w.create_context(1);
    let all = (MEMORY / 4096) as u32;
    let most = (1 << 22) / all as usize;
    assert_eq!(w.supply(1, &vec![run(A, GPA, all, 0); most]), 0);
    assert_eq!(w.supply(1, &vec![run(A, GPA, all, 0); most + 1]), -EINVAL);
}

#[test]
fn refusal_names_the_run_that_it_is_about() {
    let w = World::new();
    w.create_context(1);
    let good = run(A, GPA, 1, 0);
    let wrong = [run(A + 1, GPA, 1, 0), run(A, GPA, 0, 0), run(A, 0, 1, 0), run(A, GPA, 1, 7)];
    for bad in wrong {
        let cmd = Supply { hdr: hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, 1), num_runs: 3.into(), ..Supply::default() };
        let bytes = w.send(&[cmd.as_bytes(), [good, good, bad].as_bytes()].concat());
        let resp = SvmResp::read_from_bytes(&bytes).unwrap();
        assert_eq!(resp.detail.get(), 2, "{bad:?}");
    }
}

#[test]
fn sums_never_fall_while_contexts_come_and_go() {
    let w = World::with_limits(Limits { contexts: 64, ..LIMITS });
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..3000 {
                let (_, asid) = w.mapped(1 + n % 8);
                w.devices[0].raise(&w.host, asid, 0x9000_0000, Access::Read);
                w.destroy_context(1 + n % 8);
                w.devices[0].retire_all(&w.host);
                // What found a lock held by who counts.
                w.host.work_off();
                w.records();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let mut last = Counters::default();
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            let now = w.host.stats().counters;
            assert!(now.faults_raised >= last.faults_raised, "{last:?} then {now:?}");
            last = now;
        }
    });
    w.host.work_off();
    assert_eq!(w.host.stats().counters.faults_raised, 3000);
    assert_balanced(&w, 0);
}

#[test]
fn a_device_without_room_refuses_the_vm_and_takes_it_later() {
    let w = World::new();
    w.create_context(1);
    w.devices[0].told().full = true;
    let body = VmCreate::default();
    let refused = w.submit(1, SVM_REQ_VM_CREATE, &body.as_bytes()[16..]);
    assert_eq!(refused.0, -ENOSPC);
    assert_eq!(w.host.devices()[0].retiring, 0, "its asid was given back");
    w.devices[0].told().full = false;
    w.create_vm(1, 0);
}
