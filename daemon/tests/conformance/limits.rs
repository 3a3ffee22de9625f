//! Limits: of what a job may take, and of workers.

use crate::packets::{packet, word_op};
use crate::rig::{C, Memory, Rig, hostmmu_config, label};
use crate::{ALL, FAULTS, has_userfaultfd, on_each_limited};
use daemon::hostmmu::HostMmuConfig;
use std::thread::sleep;
use std::time::Duration;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::{Asid, Error, Verdict};
use virtio_gpu_svm::protocol::errno::ETIMEDOUT;
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::{PAGE_SIZE, errno};
use virtio_gpu_svm::quota::Charge;

/// Soon over for a job that never ends.
const SHORT: Duration = Duration::from_millis(300);
/// Never over for a job of a few packets, however busy the machine is.
const AMPLE: Duration = Duration::from_secs(1);

/// A list whose only node is its own next, walked for so many nodes; it begins at C. No machine takes less than a
/// nanosecond for each.
fn chase(memory: &Memory, nodes: u64) -> Packet {
    memory.set(0, C);
    packet(OP_CHASE, |p| (p.dst, p.src, p.value) = ((C + 64).into(), C.into(), nodes.into()))
}

/// As above, to a node that never comes.
fn endless_chase(memory: &Memory) -> Packet {
    chase(memory, u64::MAX)
}

/// Runs `endless` on a ring and checks that it ends, that the rest of its ring runs then, and that neither another ring
/// nor another GPU VM is held up while it runs.
fn check_that_it_ends_alone(rig: &Rig, endless: Packet, memory: &Memory) {
    let (vm, other) = (rig.vm(1), rig.vm(2));
    rig.bind(vm, C, memory, 0, 2);
    rig.bind(other, C, memory, 1, 1);
    let add = |at: u64| word_op(OP_ATOMIC_ADD, at, 1);
    let ends = rig.submit(vm, 1, &[add(C + PAGE_SIZE), endless, add(C + PAGE_SIZE)]);
    let behind = rig.submit(vm, 1, &[add(C + PAGE_SIZE)]);
    let beside = rig.submit(vm, 2, &[add(C + PAGE_SIZE)]);
    let elsewhere = rig.submit(other, 1, &[add(C)]);
    let end = rig.end_of(ends);
    assert_eq!((end.errno, end.packet, end.addr), (ETIMEDOUT, 1, GpuAddr(endless.dst.get())));
    for goes_on in [behind, beside, elsewhere] {
        assert_eq!(rig.end_of(goes_on).errno, 0);
    }
    assert_eq!(memory.get(PAGE_SIZE), 4);
    assert!(rig.faults().is_empty());
}

#[test]
fn an_endless_chase_ends_and_others_go_on() {
    on_each_limited(ALL, SHORT, |rig| {
        let memory = Memory::new(2);
        check_that_it_ends_alone(&rig, endless_chase(&memory), &memory);
    });
}

#[test]
fn a_semaphore_never_signalled_ends_and_others_go_on() {
    on_each_limited(ALL, SHORT, |rig| {
        check_that_it_ends_alone(&rig, word_op(OP_SEM_WAIT, C + 8, 1), &Memory::new(2));
    });
}

/// Each packet ends, the job would not for a minute.
#[test]
fn a_job_of_long_packets_ends_within_one() {
    on_each_limited(ALL, SHORT, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        let packets = vec![chase(&memory, 100_000_000); 1024];
        let end = rig.run(vm, &packets);
        assert_eq!((end.errno, end.addr), (ETIMEDOUT, GpuAddr(C + 64)));
    });
}

#[test]
fn time_at_a_fault_does_not_count() {
    on_each_limited(FAULTS, AMPLE, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        let job = rig.submit(vm, 0, &[word_op(OP_ATOMIC_ADD, C, 1)]);
        let fault = rig.fault(0);
        sleep(AMPLE + AMPLE / 4);
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, memory.get(0)), (0, 1));
    });
}

#[test]
fn jobs_of_a_frozen_vm_do_not_age() {
    on_each_limited(ALL, AMPLE, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        let waits = rig.submit(vm, 0, &[word_op(OP_SEM_WAIT, C, 1)]);
        let begun = rig.submit(vm, 1, &[word_op(OP_ATOMIC_ADD, C + 8, 1)]);
        assert_eq!(rig.end_of(begun).errno, 0);
        rig.wait_flush(vm, rig.device.set_frozen(vm, true));
        sleep(AMPLE + AMPLE / 4);
        let thawed = rig.device.set_frozen(vm, false);
        rig.wait_flush(vm, thawed);
        memory.set(0, 1);
        assert_eq!(rig.end_of(waits).errno, 0);
    });
}

/// What it faulted at is asked for once, and an answer that comes after its end is a late one.
#[test]
fn a_limit_survives_faults_and_their_answers() {
    on_each_limited(FAULTS, SHORT, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        let job = rig.submit(vm, 0, &[endless_chase(&memory)]);
        let fault = rig.fault(0);
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!(rig.end_of(job).errno, ETIMEDOUT);
        rig.device.resume(fault.stop, Verdict::Fail(errno::EFAULT));
        assert_eq!(rig.run(vm, &[word_op(OP_ATOMIC_ADD, C + 8, 1)]).errno, 0);
        assert_eq!(rig.faults().len(), 1);
    });
}

#[test]
fn beyond_its_workers_hostmmu_takes_no_vm_until_one_has_retired() {
    if !has_userfaultfd() {
        return;
    }
    let rig = Rig::with_workers(HostMmuConfig { workers: 2, ..hostmmu_config() });
    let memory = Memory::new(1);
    let (first, second) = (rig.vm(1), rig.vm(2));
    assert_eq!(rig.device.vm_create(Asid(3), label(3), Charge::default()), Err(Error::TooManyVms));
    for vm in [first, second] {
        rig.bind(vm, C, &memory, 0, 1);
        assert_eq!(rig.run(vm, &[word_op(OP_ATOMIC_ADD, C, 1)]).errno, 0);
    }
    rig.device.vm_destroy(first);
    rig.wait_retired(first);
    let third = rig.vm(3);
    rig.bind(third, C, &memory, 0, 1);
    assert_eq!(rig.run(third, &[word_op(OP_ATOMIC_ADD, C, 1)]).errno, 0);
    assert_eq!(memory.get(0), 3);
}
