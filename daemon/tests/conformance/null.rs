//! Null translations: they read as zero, swallow writes, and are otherwise like all.

use crate::packets::{copy, fill, packet, reduce, word_op};
use crate::rig::{C, Memory, pages};
use crate::{NO_NULLS, NULLS, on_each_with};
use virtio_gpu_svm::device::Error;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::job::*;

/// Where null pages are: an aligned block of 2 MiB.
const N: u64 = C + (4 << 20);

#[test]
fn a_device_without_null_translations_refuses_them() {
    on_each_with(NO_NULLS, |rig| {
        let vm = rig.vm(1);
        assert_eq!(rig.device.bind_null(vm, pages(N, 1)), Err(Error::Unsupported));
        assert_eq!(rig.run_missing(vm, &[fill(N, 8, 1)]).addr.0, N);
    });
}

#[test]
fn null_pages_read_as_zero_whatever_was_written() {
    on_each_with(NULLS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(4));
        memory.fill(3);
        rig.bind(vm, C, &memory, 0, 4);
        // A large block, and pages after it.
        rig.device.bind_null(vm, pages(N, 515)).unwrap();
        let writes = [
            fill(N, 515 * PAGE_SIZE, 7),
            copy(N + 1, C, 3 * PAGE_SIZE),
            reduce(N + 514 * PAGE_SIZE, C, 64),
            word_op(OP_ATOMIC_ADD, N + 8, 1),
            word_op(OP_SEM_SIGNAL, N, 1),
            packet(OP_AXPY, |p| (p.dst, p.src, p.len) = (N.into(), C.into(), 64.into())),
            packet(OP_CHASE, |p| (p.dst, p.src, p.value) = ((N + 4088).into(), N.into(), 5.into())),
        ];
        assert_eq!(rig.run(vm, &writes).errno, 0);
        let sum = packet(OP_CHASE, |p| (p.dst, p.src, p.value) = ((C + 16).into(), N.into(), 5.into()));
        let reads = [
            reduce(C, N, 515 * PAGE_SIZE),
            sum,
            copy(C + PAGE_SIZE, N + 511 * PAGE_SIZE + 9, 2 * PAGE_SIZE),
            word_op(OP_SEM_WAIT, N, 0),
        ];
        assert_eq!(rig.run(vm, &reads).errno, 0);
        // A list that begins there has one node, with payload 0.
        assert_eq!([0, 8, 16, 24, 32].map(|offset| memory.get(offset)), [0, 3, 1, 0, 3]);
        assert!((PAGE_SIZE..3 * PAGE_SIZE).step_by(8).all(|offset| memory.get(offset) == 0));
        assert_eq!((memory.get(3 * PAGE_SIZE), rig.faults().len()), (3, 0));
    });
}

#[test]
fn what_one_vm_writes_to_null_pages_no_other_sees() {
    on_each_with(NULLS, |rig| {
        let vms = [1, 2].map(|asid| (rig.vm(asid), Memory::new(1)));
        for (vm, memory) in &vms {
            memory.fill(5);
            rig.bind(*vm, C, memory, 0, 1);
            rig.device.bind_null(*vm, pages(N, 2)).unwrap();
        }
        let rounds = |packet| [packet; 50];
        let writes = rig.submit(vms[0].0, 0, &rounds(fill(N, 2 * PAGE_SIZE, !0)));
        let reads = rig.submit(vms[1].0, 0, &rounds(copy(C, N + 2048, PAGE_SIZE)));
        assert_eq!((rig.end_of(writes).errno, rig.end_of(reads).errno), (0, 0));
        assert!(vms[1].1.words().all(|word| word == 0));
        assert!(vms[0].1.words().all(|word| word == 5));
    });
}

#[test]
fn null_pages_are_resident_until_they_are_unbound() {
    on_each_with(NULLS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        rig.device.bind_null(vm, pages(N, 512)).unwrap();
        rig.device.bind_null(vm, pages(N + (2 << 20), 3)).unwrap();
        assert_eq!(rig.device.resident_pages(vm), 1 + 515);
        assert!(rig.device.is_resident(vm, pages(N + (1 << 20), 1)));
        rig.device.drop_region(vm, memory.0.id());
        assert_eq!(rig.device.resident_pages(vm), 515, "they are of no region");
        let flush = rig.device.unbind(vm, pages(N + (2 << 20) + PAGE_SIZE, 1));
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 514);
        let missing = rig.run_missing(vm, &[fill(N + (2 << 20), 2 * PAGE_SIZE, 1)]);
        assert_eq!(missing.addr.0, N + (2 << 20) + PAGE_SIZE);
        let flush = rig.device.unbind(vm, rig.all());
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 0);
        assert_eq!(rig.run_missing(vm, &[fill(N, 8, 1)]).addr.0, N);
    });
}

#[test]
fn null_and_bound_pages_replace_each_other() {
    on_each_with(NULLS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(512));
        rig.bind(vm, N, &memory, 0, 512);
        assert_eq!(rig.run(vm, &[fill(N, 2 << 20, 1)]).errno, 0);
        rig.device.bind_null(vm, pages(N, 512)).unwrap();
        let flush = rig.device.flush(vm);
        rig.wait_flush(vm, flush);
        assert_eq!(rig.run(vm, &[fill(N, 2 << 20, 2)]).errno, 0);
        assert!(memory.words().all(|word| word == 1));
        rig.bind(vm, N, &memory, 0, 512);
        assert_eq!(rig.run(vm, &[fill(N, 2 << 20, 3)]).errno, 0);
        assert!(memory.words().all(|word| word == 3));
        assert_eq!(rig.device.resident_pages(vm), 512);
    });
}

#[test]
fn a_semaphore_in_a_null_page_is_zero_until_memory_is_bound() {
    on_each_with(NULLS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        memory.set(0, 1);
        rig.device.bind_null(vm, pages(N, 1)).unwrap();
        let waits = rig.submit(vm, 0, &[word_op(OP_SEM_WAIT, N, 1), word_op(OP_SEM_SIGNAL, N + 8, 6)]);
        assert_eq!(rig.run_on(vm, 1, &[word_op(OP_SEM_SIGNAL, N, 1)]).errno, 0);
        rig.bind(vm, N, &memory, 0, 1);
        assert_eq!((rig.end_of(waits).errno, memory.get(8)), (0, 6));
    });
}

#[test]
fn the_whole_space_may_be_null_or_is_refused_whole() {
    on_each_with(NULLS, |rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        match rig.device.bind_null(vm, rig.all()) {
            Ok(()) => {
                assert_eq!(rig.device.resident_pages(vm), rig.all().pages());
                assert_eq!(rig.run(vm, &[fill(rig.end() - 8, 8, 1), fill(C, 8, 1)]).errno, 0);
                assert_eq!(memory.get(0), 0);
            }
            Err(error) => {
                assert_eq!((error, rig.device.resident_pages(vm)), (Error::OutOfMemory, 1));
                assert_eq!((rig.run(vm, &[fill(C, 8, 1)]).errno, memory.get(0)), (0, 1));
            }
        }
        let flush = rig.device.unbind(vm, rig.all());
        rig.wait_flush(vm, flush);
        assert_eq!(rig.device.resident_pages(vm), 0);
    });
}
