//! Faults for groups of pages.

use crate::packets::{copy, fill, reduce, word_op};
use crate::rig::{C, Memory, Random, pages};
use crate::{FAULTS, GROUPS, on_each_with};
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::soft::MAX_GROUP_PAGES;
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::job::OP_ATOMIC_ADD;

const MOST: u64 = MAX_GROUP_PAGES as u64;

#[test]
fn a_word_asks_for_its_page_alone() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        let job = rig.submit(vm, 0, &[word_op(OP_ATOMIC_ADD, C, 1), fill(C + PAGE_SIZE, 8, 1)]);
        assert_eq!(rig.fault(0).pages, 1);
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.resume(rig.fault(0).stop, Verdict::Retry);
        assert_eq!((rig.fault(1).job, rig.fault(1).pages), (job, 1));
    });
}

#[test]
fn a_group_is_told_once_and_released_by_one_resume() {
    on_each_with(GROUPS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(MOST));
        let job = rig.submit(vm, 0, &[fill(C + 8, MOST * PAGE_SIZE - 8, 2)]);
        let fault = rig.fault(0);
        assert_eq!((fault.addr.0, fault.pages), (C + 8, MOST));
        rig.bind(vm, C, &memory, 0, MOST);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!(rig.end_of(job).errno, 0);
        assert_eq!(memory.words().sum::<u64>(), 2 * (MOST * PAGE_SIZE / 8 - 1));
        assert_eq!((rig.faults().len(), rig.device.ledger().0.len()), (1, 1));
    });
}

#[test]
fn a_longer_packet_asks_for_its_pages_group_by_group() {
    on_each_with(GROUPS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2 * MOST + 3));
        let job = rig.submit(vm, 0, &[fill(C, (2 * MOST + 3) * PAGE_SIZE, 2)]);
        for (n, wanted) in [MOST, MOST, 3].into_iter().enumerate() {
            let (fault, first) = (rig.fault(n), n as u64 * MOST);
            assert_eq!((fault.addr.0, fault.pages), (C + first * PAGE_SIZE, wanted));
            rig.bind(vm, fault.addr.0, &memory, first, wanted);
            rig.device.resume(fault.stop, Verdict::Retry);
        }
        assert_eq!(rig.end_of(job).errno, 0);
        assert!(memory.words().all(|word| word == 2));
    });
}

#[test]
fn a_partly_bound_group_faults_again_for_the_rest() {
    on_each_with(GROUPS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(6));
        memory.fill(1);
        let job = rig.submit(vm, 0, &[reduce(C, C, 5 * PAGE_SIZE)]);
        assert_eq!(rig.fault(0).pages, 5);
        rig.bind(vm, C, &memory, 0, 2);
        rig.bind(vm, C + 3 * PAGE_SIZE, &memory, 3, 1);
        rig.device.resume(rig.fault(0).stop, Verdict::Retry);
        let second = rig.fault(1);
        assert_eq!((second.addr.0, second.pages), (C + 2 * PAGE_SIZE, 1), "page 3 is there");
        // None of it: the same is asked again.
        rig.device.resume(second.stop, Verdict::Retry);
        let third = rig.fault(2);
        assert_eq!((third.addr, third.pages), (second.addr, 1));
        rig.bind(vm, C + 2 * PAGE_SIZE, &memory, 2, 1);
        rig.device.resume(third.stop, Verdict::Retry);
        let last = rig.fault(3);
        assert_eq!((last.addr.0, last.pages), (C + 4 * PAGE_SIZE, 1));
        rig.bind(vm, last.addr.0, &memory, 4, 1);
        rig.device.resume(last.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, memory.get(0)), (0, 5 * PAGE_SIZE / 8));
    });
}

#[test]
fn a_write_asks_for_pages_that_may_only_be_read() {
    on_each_with(GROUPS, |rig| {
        let (vm, memory, other) = (rig.vm(1), Memory::new(4), Memory::new(4));
        memory.fill(7);
        rig.device.bind(vm, GpuAddr(C), &[memory.extent(0, 4, false)]).unwrap();
        let job = rig.submit(vm, 0, &[copy(C + PAGE_SIZE, C, 2 * PAGE_SIZE)]);
        let fault = rig.fault(0);
        assert_eq!((fault.addr.0, fault.pages, fault.access), (C + PAGE_SIZE, 2, Access::Write));
        rig.bind(vm, C + PAGE_SIZE, &other, 1, 2);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, other.get(2 * PAGE_SIZE)), (0, 7));
        assert!(memory.words().all(|word| word == 7));
    });
}

/// Pages are there or not, and answers give any part of what was asked, as chance has it: every group holds only pages
/// that are missing and belong to the packet, and the packet ends as if all had been there.
#[test]
fn random_answers_give_the_packet_all_its_pages() {
    const PAGES: u64 = 40;
    on_each_with(GROUPS, |rig| {
        for round in 0..20 {
            let seed = 0x6709_5eed + round;
            println!("seed {seed:#x}");
            let mut random = Random(seed);
            let (vm, memory) = (rig.vm(1 + round as u32), Memory::new(PAGES));
            let first = random.below(PAGES / 2);
            let end = first + 1 + random.below(PAGES - first);
            let mut there: Vec<bool> = (0..PAGES).map(|_| random.below(3) == 0).collect();
            for page in (0..PAGES).filter(|page| there[*page as usize]) {
                rig.bind(vm, C + page * PAGE_SIZE, &memory, page, 1);
            }
            let job = rig.submit(vm, 0, &[fill(C + first * PAGE_SIZE, (end - first) * PAGE_SIZE, 9)]);
            let before = rig.faults().iter().filter(|fault| fault.job != job).count();
            for n in before.. {
                let Some(fault) = rig.fault_or_end(n, job) else { break };
                let asked = pages(fault.addr.0, fault.pages);
                let page = asked.start - C / PAGE_SIZE;
                let last = page + fault.pages;
                assert!(fault.pages <= MOST && first <= page && last <= end, "{fault:?} of {first}..{end}");
                assert!((page..last).all(|page| !there[page as usize]), "{fault:?}: {there:?}");
                for page in page..last {
                    if random.below(2) == 0 {
                        rig.bind(vm, C + page * PAGE_SIZE, &memory, page, 1);
                        there[page as usize] = true;
                    }
                }
                rig.device.resume(fault.stop, Verdict::Retry);
            }
            assert_eq!(rig.end_of(job).errno, 0);
            for page in 0..PAGES {
                let wanted = if (first..end).contains(&page) { 9 } else { 0 };
                assert_eq!(memory.get(page * PAGE_SIZE + 8), wanted, "page {page}, seed {seed:#x}");
            }
        }
    });
}
