//! Faults, invalidation and ends, on devices that have faults; some of it on every device.

use crate::packets::{copy, fill, packet, reduce, word_op};
use crate::rig::{C, Event, Kind, Memory, Rig, label, pages};
use crate::{FAULTS, has_userfaultfd, on_each, on_each_with};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::sync::Arc;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::{Access, Asid, Error, Flush, Verdict};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::{PAGE_SHIFT, PAGE_SIZE};
use virtio_gpu_svm::quota::Charge;

#[test]
fn a_missing_page_parks_the_job_until_it_is_bound() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(4));
        let job = rig.submit(vm, 0, &[fill(C + 16, 3 * PAGE_SIZE, 7)]);
        for page in 0..4 {
            let fault = rig.fault(page as usize);
            assert_eq!((fault.asid, fault.job, fault.access), (vm, job, Access::Write));
            assert_eq!(fault.addr.page(), (C >> PAGE_SHIFT) + page);
            assert!(fault.length_hint >= 1);
            rig.bind(vm, fault.addr.page_start().0, &memory, page, 1);
            rig.device.resume(fault.stop, Verdict::Retry);
        }
        assert_eq!(rig.end_of(job).errno, 0);
        let words = (0..4 * PAGE_SIZE).step_by(8).map(|offset| memory.get(offset));
        assert_eq!(words.sum::<u64>(), 7 * 3 * PAGE_SIZE / 8);
        assert_eq!(rig.device.resident_pages(vm), 4);
        assert_eq!(rig.faults().len(), 4);
    });
}

/// Retried without a translation: the same access faults again, under another name.
#[test]
fn a_retry_without_translation_faults_again() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        let job = rig.submit(vm, 0, &[word_op(OP_ATOMIC_ADD, C, 1)]);
        let first = rig.fault(0);
        assert_eq!(first.access, Access::Atomic);
        rig.device.resume(first.stop, Verdict::Retry);
        let second = rig.fault(1);
        assert_ne!(first.stop, second.stop);
        assert_eq!(first.addr, second.addr);
        rig.device.resume(first.stop, Verdict::Fail(errno::EFAULT));
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.resume(second.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, memory.get(0)), (0, 1));
    });
}

#[test]
fn a_failed_access_ends_its_job_alone() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        rig.bind(vm, C, &memory, 0, 1);
        let job = rig.submit(vm, 0, &[fill(C, 8, 1), copy(C + 4096 * 7, C + 4096 * 9, 64)]);
        let next = rig.submit(vm, 0, &[fill(C + 8, 8, 2)]);
        let fault = rig.fault(0);
        rig.device.resume(fault.stop, Verdict::Fail(errno::EACCES));
        let end = rig.end_of(job);
        assert_eq!(
            (end.errno, end.packet, end.addr, end.access),
            (errno::EACCES, 1, fault.addr, fault.access)
        );
        assert_eq!(rig.end_of(next).errno, 0);
        assert_eq!((memory.get(0), memory.get(8)), (1, 2));
    });
}

#[test]
fn a_read_only_page_refuses_writes_until_it_is_bound_again() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        memory.set(0, 40);
        rig.device.bind(vm, GpuAddr(C), &[memory.extent(0, 1, false)]).unwrap();
        rig.bind(vm, C + PAGE_SIZE, &memory, 1, 1);
        assert_eq!(rig.run(vm, &[reduce(C + PAGE_SIZE, C, 8)]).errno, 0);
        assert_eq!(memory.get(PAGE_SIZE), 40);
        let denied = rig.submit(vm, 0, &[fill(C, 8, 1)]);
        let fault = rig.fault(0);
        assert_eq!((fault.addr.0, fault.access), (C, Access::Write));
        rig.device.resume(fault.stop, Verdict::Fail(errno::EACCES));
        let end = rig.end_of(denied);
        assert_eq!((end.errno, end.addr.0, end.access), (errno::EACCES, C, Access::Write));
        assert_eq!(memory.get(0), 40);

        let job = rig.submit(vm, 0, &[word_op(OP_ATOMIC_ADD, C, 2)]);
        let fault = rig.fault(1);
        assert_eq!(fault.access, Access::Atomic);
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, memory.get(0)), (0, 42));
    });
}

#[test]
fn unbound_pages_fault_again_and_are_not_touched() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory, other) = (rig.vm(1), Memory::new(3), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 3);
        assert_eq!(rig.run(vm, &[fill(C, 3 * PAGE_SIZE, 1)]).errno, 0);
        let flush = rig.device.unbind(vm, pages(C + PAGE_SIZE, 1));
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 2);
        let job = rig.submit(vm, 0, &[fill(C, 3 * PAGE_SIZE, 2)]);
        let fault = rig.fault(0);
        assert_eq!(fault.addr.0, C + PAGE_SIZE);
        rig.bind(vm, C + PAGE_SIZE, &other, 0, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!(rig.end_of(job).errno, 0);
        assert_eq!((memory.get(0), memory.get(PAGE_SIZE), memory.get(2 * PAGE_SIZE)), (2, 1, 2));
        assert_eq!(other.get(0), 2);
        let all = rig.device.unbind(vm, rig.all());
        rig.wait_flush(vm, all);
        assert_eq!((rig.device.resident_pages(vm), rig.device.flush(vm)), (0, Flush::Done));
    });
}

#[test]
fn a_parked_ring_holds_up_no_other() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        rig.bind(vm, C, &memory, 0, 1);
        let parked = rig.submit(vm, 0, &[fill(C + PAGE_SIZE, 8, 1)]);
        let fault = rig.fault(0);
        for ring in 1..6 {
            let job = rig.submit(vm, ring, &[word_op(OP_ATOMIC_ADD, C, 1)]);
            assert_eq!(rig.end_of(job).errno, 0);
        }
        assert_eq!((memory.get(0), memory.get(PAGE_SIZE)), (5, 0));
        rig.bind(vm, C + PAGE_SIZE, &memory, 1, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!((rig.end_of(parked).errno, memory.get(PAGE_SIZE)), (0, 1));
    });
}

/// Every ring faults at one page; each has its own stop, and one may fail while others go on.
#[test]
fn rings_that_fault_on_one_page_are_released_one_by_one() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        let jobs: Vec<_> = (0..4).map(|ring| rig.submit(vm, ring, &[word_op(OP_ATOMIC_ADD, C, 1)])).collect();
        rig.fault(3);
        let faults = rig.faults();
        rig.device.resume(faults[0].stop, Verdict::Fail(errno::EFAULT));
        rig.bind(vm, C, &memory, 0, 1);
        for fault in &faults[1..] {
            rig.device.resume(fault.stop, Verdict::Retry);
        }
        for job in jobs {
            let expected = if job == faults[0].job { errno::EFAULT } else { 0 };
            assert_eq!(rig.end_of(job).errno, expected);
        }
        assert_eq!(memory.get(0), 3);
        assert_eq!(rig.faults().len(), 4);
    });
}

#[test]
fn two_vms_at_the_same_addresses_see_their_own_memory() {
    on_each_with(FAULTS, |rig| {
        let vms = [1, 2].map(|asid| (rig.vm(asid), Memory::new(2)));
        let jobs = vms.each_ref().map(|(vm, _)| rig.submit(*vm, 0, &[fill(C, PAGE_SIZE, vm.0.into())]));
        rig.fault(1);
        for fault in rig.faults() {
            let (vm, memory) = vms.iter().find(|(vm, _)| *vm == fault.asid).unwrap();
            rig.bind(*vm, C, memory, 1, 1);
            rig.device.resume(fault.stop, Verdict::Retry);
        }
        for job in jobs {
            assert_eq!(rig.end_of(job).errno, 0);
        }
        for (vm, memory) in &vms {
            assert_eq!((memory.get(0), memory.get(PAGE_SIZE)), (0, vm.0.into()));
        }
        let (ledger, overwritten) = rig.device.ledger();
        let mut raised: Vec<_> = ledger.iter().map(|e| (e.label.clone(), e.asid, e.page, e.access)).collect();
        raised.sort_by_key(|entry| entry.1);
        let expected = [1, 2].map(|asid| (label(asid), Asid(asid), C >> PAGE_SHIFT, Access::Write));
        assert_eq!((raised, overwritten), (expected.to_vec(), 0));
    });
}

#[test]
fn a_destroyed_vm_retires_with_its_parked_job_and_its_asid_serves_again() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        let dropped = rig.submit(vm, 0, &[fill(C, 8, 1)]);
        let fault = rig.fault(0);
        assert_eq!(rig.device.vm_create(vm, label(1), Charge::default()), Err(Error::VmExists(1)));
        rig.device.vm_destroy(vm);
        rig.wait_retired(vm);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert!(!rig.log().iter().any(|event| matches!(event, Event::Done(job, _) if *job == dropped)));
        assert_eq!(rig.device.bind(vm, GpuAddr(C), &[memory.extent(0, 1, true)]), Err(Error::NoVm(1)));
        assert_eq!(rig.device.resident_pages(vm), 0);
        let vm = rig.vm(1);
        rig.bind(vm, C, &memory, 0, 1);
        assert_eq!((rig.run(vm, &[fill(C, 8, 9)]).errno, memory.get(0)), (0, 9));
    });
}

#[test]
fn a_dropped_region_is_let_go_and_others_stay() {
    on_each(|rig| {
        let (vm, gone, stays) = (rig.vm(1), Memory::new(2), Memory::new(1));
        rig.bind(vm, C, &gone, 0, 2);
        rig.bind(vm, C + 2 * PAGE_SIZE, &stays, 0, 1);
        assert_eq!(rig.run(vm, &[fill(C, 3 * PAGE_SIZE, 1)]).errno, 0);
        rig.device.drop_region(vm, gone.0.id());
        assert_eq!(rig.device.resident_pages(vm), 1);
        assert_eq!(Arc::strong_count(&gone.0), 1);
        assert_eq!(rig.run(vm, &[fill(C + 2 * PAGE_SIZE, 8, 2)]).errno, 0);
        assert_eq!(rig.run_missing(vm, &[fill(C, 8, 3)]).addr.0, C);
        assert_eq!((gone.get(0), stays.get(0)), (1, 2));
    });
}

#[test]
fn a_frozen_vm_touches_nothing_until_it_is_thawed() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(3));
        rig.bind(vm, C, &memory, 0, 2);
        let running = rig.submit(vm, 0, &[word_op(OP_SEM_WAIT, C, 1), fill(C + PAGE_SIZE, 8, 1)]);
        let parked = rig.submit(vm, 1, &[fill(C + 2 * PAGE_SIZE, 8, 1)]);
        let fault = rig.fault(0);
        let flush = rig.device.set_frozen(vm, true);
        rig.wait_flush(vm, flush);
        // All that could make a job go on.
        memory.set(0, 1);
        rig.bind(vm, C + 2 * PAGE_SIZE, &memory, 2, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        let waiting = rig.submit(vm, 2, &[fill(C + 8, 8, 1)]);
        // Another VM's job takes its time meanwhile.
        let (other, more) = (rig.vm(2), Memory::new(16));
        rig.bind(other, C, &more, 0, 16);
        assert_eq!(rig.run(other, &vec![fill(C, 16 * PAGE_SIZE, 5); 64]).errno, 0);
        assert_eq!([8, PAGE_SIZE, 2 * PAGE_SIZE].map(|offset| memory.get(offset)), [0; 3]);
        assert_eq!(rig.device.set_frozen(vm, false), Flush::Done);
        for job in [running, parked, waiting] {
            assert_eq!(rig.end_of(job).errno, 0);
        }
        assert_eq!([8, PAGE_SIZE, 2 * PAGE_SIZE].map(|offset| memory.get(offset)), [1; 3]);
        assert_eq!(rig.faults().len(), 1);
    });
}

#[test]
fn jobs_of_one_ring_end_in_order() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        let jobs: Vec<_> = (1..=100).map(|n| rig.submit(vm, 0, &[fill(C, 8, n)])).collect();
        rig.end_of(jobs[99]);
        let ended: Vec<_> = rig
            .log()
            .iter()
            .filter_map(|e| if let Event::Done(job, _) = e { Some(*job) } else { None })
            .collect();
        assert_eq!(ended, jobs);
        assert_eq!(memory.get(0), 100);
    });
}

/// Answered where they are told, and many at once: as the core does with pages that it knows.
#[test]
fn a_storm_of_faults_served_at_once_loses_none() {
    const PAGES: u64 = 256;
    on_each_with(FAULTS, |rig| {
        let memory = Memory::new(PAGES);
        let bound = memory.clone();
        rig.answer(move |device, fault| {
            // Backwards, so that no two neighbours are one mapping.
            let page = PAGES - 1 - (fault.addr.page() - (C >> PAGE_SHIFT));
            device.bind(fault.asid, fault.addr.page_start(), &[bound.extent(page, 1, true)]).unwrap();
            device.resume(fault.stop, Verdict::Retry);
        });
        let vms = [1, 2, 3].map(|asid| rig.vm(asid));
        let add = |page| word_op(OP_ATOMIC_ADD, C + page * PAGE_SIZE, 1);
        let packets: Vec<_> = (0..PAGES).map(add).collect();
        let jobs: Vec<_> =
            vms.iter().flat_map(|vm| [0, 1].map(|ring| rig.submit(*vm, ring, &packets))).collect();
        for job in jobs {
            assert_eq!(rig.end_of(job).errno, 0);
        }
        for page in 0..PAGES {
            assert_eq!(memory.get(page * PAGE_SIZE), 6, "page {page}");
        }
    });
}

/// A process cannot have more than some 65,530 mappings; here, eight runs.
#[test]
fn beyond_its_budget_hostmmu_evicts_and_faults_again() {
    if !has_userfaultfd() {
        return;
    }
    let rig = Rig::new(Kind::HostMmu { budget: 8 });
    let (vm, memory) = (rig.vm(1), Memory::new(64));
    let bound = memory.clone();
    rig.answer(move |device, fault| {
        let page = 63 - (fault.addr.page() - (C >> PAGE_SHIFT));
        device.bind(fault.asid, fault.addr.page_start(), &[bound.extent(page, 1, true)]).unwrap();
        device.resume(fault.stop, Verdict::Retry);
    });
    for round in 1..=2 {
        assert_eq!(rig.run(vm, &[fill(C, 64 * PAGE_SIZE, round)]).errno, 0);
        assert!((0..64 * PAGE_SIZE).step_by(8).all(|offset| memory.get(offset) == round));
        assert_eq!(rig.device.resident_pages(vm), 8);
    }
    assert_eq!(rig.faults().len(), 128);
}

/// What is not the GPU's in a worker cannot be reached: neither below nor above its space, nor bound there.
#[test]
fn hostmmu_keeps_its_own_memory_out_of_reach() {
    if !has_userfaultfd() {
        return;
    }
    let rig = Rig::new(Kind::HostMmu { budget: 8 });
    let (vm, memory) = (rig.vm(1), Memory::new(1));
    assert_eq!(rig.device.bind(vm, GpuAddr(0), &[memory.extent(0, 1, true)]), Err(Error::OutOfMemory));
    assert!(rig.device.check_packets(&[fill((1 << 46) - 8, 16, 0)]).is_err());
    let low = rig.submit(vm, 0, &[packet(OP_NOP, |_| ()), fill(PAGE_SIZE, 8, 1)]);
    let fault = rig.fault(0);
    assert_eq!((fault.addr.0, fault.access), (PAGE_SIZE, Access::Write));
    rig.device.resume(fault.stop, Verdict::Fail(errno::EFAULT));
    let end = rig.end_of(low);
    assert_eq!((end.errno, end.packet, end.addr.0), (errno::EFAULT, 1, PAGE_SIZE));
}

/// Its VMM has shrunk the file behind it: the job that finds out ends, and nothing else does.
#[test]
fn memory_that_is_gone_costs_hostmmu_one_job() {
    if !has_userfaultfd() {
        return;
    }
    let rig = Rig::new(Kind::HostMmu { budget: 8 });
    let (vm, memory) = (rig.vm(1), Memory::new(4));
    rig.bind(vm, C, &memory, 0, 4);
    memory.0.mapping().file_offset().unwrap().file().set_len(2 * PAGE_SIZE).unwrap();
    let end = rig.run(vm, &[fill(C, 4 * PAGE_SIZE, 1)]);
    assert_eq!((end.errno, end.addr.0), (errno::EFAULT, C + PAGE_SIZE));
    assert_eq!(rig.run(vm, &[fill(C, PAGE_SIZE, 2)]).errno, 0);
    assert_eq!(memory.get(0), 2);
}

/// Only one test has workers with so many address bits, so that it knows them.
const MARKED_VA_BITS: u32 = 41;

/// Running workers of this many address bits that this process has started.
fn workers(va_bits: u32) -> Vec<Pid> {
    let arguments = format!("{}\0{va_bits}\0", daemon::hostmmu::ARGUMENT);
    let parent = format!("\nPPid:\t{}\n", std::process::id());
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let ours = processes.filter(|path| {
        let read = |file| fs::read(path.join(file)).unwrap_or_default();
        let has = |text: Vec<u8>, part: &str| String::from_utf8_lossy(&text).contains(part);
        has(read("cmdline"), &arguments) && has(read("status"), &parent)
    });
    ours.map(|path| Pid::from_raw(path.file_name().unwrap().to_str().unwrap().parse().unwrap()).unwrap())
        .collect()
}

/// A worker that dies, for whatever reason, costs its GPU VM the jobs, and nobody else anything.
#[test]
fn a_killed_worker_ends_its_jobs_and_lets_go_of_memory() {
    if !has_userfaultfd() {
        return;
    }
    let rig = Rig::hostmmu(MARKED_VA_BITS, 8);
    let (lost, lives, memory) = (rig.vm(1), rig.vm(2), Memory::new(2));
    let jobs = [0, 1].map(|ring| rig.submit(lost, ring, &[fill(C, 8, 1)]));
    rig.fault(1);
    let before = workers(MARKED_VA_BITS);
    rig.bind(lives, C, &memory, 0, 1);
    rig.bind(lost, C + PAGE_SIZE, &memory, 1, 1);
    let [worker] = before[..] else { panic!("not one worker: {before:?}") };
    kill_process(worker, Signal::KILL).unwrap();
    for job in jobs {
        assert_eq!(rig.end_of(job).errno, errno::ECANCELED);
    }
    rig.device.drop_region(lost, memory.0.id());
    assert_eq!(rig.run(lost, &[fill(C, 8, 1)]).errno, errno::ECANCELED);
    assert_eq!((rig.run(lives, &[fill(C, 8, 3)]).errno, memory.get(0)), (0, 3));
    rig.device.vm_destroy(lost);
    rig.wait_retired(lost);
}
