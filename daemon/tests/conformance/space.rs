//! The end of the space: everything up to it can be used, and nothing beyond it can be named.

use crate::packets::{copy, fill, packet, reduce, word_op};
use crate::rig::{C, Memory, pages};
use crate::{FAULTS, on_each, on_each_with};
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::protocol::job::*;
use virtio_gpu_svm::protocol::{PAGE_SIZE, errno};

fn chase(dst: u64, src: u64) -> Packet {
    packet(OP_CHASE, |p| (p.dst, p.src, p.value) = (dst.into(), src.into(), 10.into()))
}

fn axpy(dst: u64, src: u64, len: u64) -> Packet {
    packet(OP_AXPY, |p| (p.dst, p.src, p.len) = (dst.into(), src.into(), len.into()))
}

#[test]
fn the_last_page_is_memory_like_any_other() {
    on_each(|rig| {
        let (vm, memory, end) = (rig.vm(1), Memory::new(2), rig.end());
        rig.bind(vm, end - 2 * PAGE_SIZE, &memory, 0, 2);
        let packets = [
            fill(end - 2 * PAGE_SIZE, 2 * PAGE_SIZE, 3),
            word_op(OP_ATOMIC_ADD, end - 8, 4),
            copy(end - PAGE_SIZE, end - 8, 8),
            reduce(end - 16, end - PAGE_SIZE, PAGE_SIZE),
        ];
        assert_eq!(rig.run(vm, &packets).errno, 0);
        let sum = 3 * (PAGE_SIZE / 8 - 2) + 7 + 7;
        let words = [PAGE_SIZE, 2 * PAGE_SIZE - 16, 2 * PAGE_SIZE - 8].map(|offset| memory.get(offset));
        assert_eq!(words, [7, sum, 7]);
        let flush = rig.device.unbind(vm, pages(end - PAGE_SIZE, 1));
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 1);
        let missing = rig.run_missing(vm, &[fill(end - 8, 8, 1)]);
        assert_eq!((missing.addr.0, missing.access), (end - 8, Access::Write));
        let flush = rig.device.unbind(vm, rig.all());
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 0);
    });
}

#[test]
fn the_last_large_block_is_bound_and_dropped_whole() {
    on_each(|rig| {
        let (vm, memory, start) = (rig.vm(1), Memory::new(512), rig.end() - (2 << 20));
        rig.bind(vm, start, &memory, 0, 512);
        assert_eq!(rig.device.resident_pages(vm), 512);
        assert_eq!(rig.run(vm, &[fill(start, 2 << 20, 5)]).errno, 0);
        assert!(memory.words().all(|word| word == 5));
        assert!(rig.device.is_resident(vm, pages(rig.end() - PAGE_SIZE, 1)));
        let flush = rig.device.unbind(vm, pages(start, 512));
        rig.wait_flush(vm, flush);
        assert!(!rig.device.is_resident(vm, rig.all()));
        assert_eq!(rig.run_missing(vm, &[fill(start + 8, 8, 1)]).addr.0, start + 8);
    });
}

#[test]
fn operands_that_reach_beyond_the_space_are_refused() {
    on_each(|rig| {
        let end = rig.end();
        let beyond = [
            fill(end - 8, 16, 0),
            fill(end, 8, 0),
            fill(8, !7, 0),
            copy(C, end - 1, 2),
            copy(end - 1, C, 2),
            copy(u64::MAX, C, 2),
            reduce(C, end - 8, 16),
            reduce(end, C, 8),
            axpy(C, end - 8, 16),
            axpy(end - 8, C, 16),
            chase(C, end - 8),
            chase(end - 8, C),
            word_op(OP_ATOMIC_ADD, end, 1),
            word_op(OP_SEM_WAIT, end, 1),
            word_op(OP_SEM_SIGNAL, u64::MAX - 7, 1),
        ];
        for bad in beyond {
            assert!(rig.device.check_packets(&[bad]).is_err(), "{bad:?}");
        }
        let inside =
            [fill(end - 8, 8, 0), copy(end - 1, end - 2, 1), chase(end - 16, end - 16), axpy(C, end - 8, 8)];
        assert_eq!(rig.device.check_packets(&inside), Ok(()));
    });
}

/// A node's address is only known when the list is read.
#[test]
fn a_list_that_leaves_the_space_ends_its_job_there() {
    on_each(|rig| {
        let (vm, memory, end) = (rig.vm(1), Memory::new(1), rig.end());
        rig.bind(vm, end - PAGE_SIZE, &memory, 0, 1);
        for next in [end - 8, end, 1 << 63] {
            memory.set(0, next);
            let ended = rig.run(vm, &[chase(end - 64, end - PAGE_SIZE)]);
            assert_eq!((ended.errno, ended.addr.0), (errno::EFAULT, next));
        }
        memory.set(0, end - 16);
        assert_eq!(rig.run(vm, &[chase(end - 64, end - PAGE_SIZE)]).errno, 0);
        assert_eq!(memory.get(PAGE_SIZE - 64), 2);
    });
}

#[test]
fn a_fault_at_the_last_page_is_served() {
    on_each_with(FAULTS, |rig| {
        let (vm, memory, end) = (rig.vm(1), Memory::new(1), rig.end());
        let job = rig.submit(vm, 0, &[fill(end - 16, 16, 6)]);
        let fault = rig.fault(0);
        assert_eq!((fault.addr.0, fault.pages, fault.access), (end - 16, 1, Access::Write));
        rig.bind(vm, end - PAGE_SIZE, &memory, 0, 1);
        rig.device.resume(fault.stop, Verdict::Retry);
        assert_eq!((rig.end_of(job).errno, memory.get(PAGE_SIZE - 8)), (0, 6));
    });
}
