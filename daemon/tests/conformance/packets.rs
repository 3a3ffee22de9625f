//! What packets do, on memory that is bound.

use crate::on_each;
use crate::rig::{C, Memory};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::job::*;

pub fn packet(opcode: u32, operands: impl FnOnce(&mut Packet)) -> Packet {
    let mut packet = Packet { opcode: opcode.into(), ..Packet::default() };
    operands(&mut packet);
    packet
}

pub fn fill(dst: u64, len: u64, value: u64) -> Packet {
    packet(OP_FILL, |p| (p.dst, p.len, p.value) = (dst.into(), len.into(), value.into()))
}

pub fn copy(dst: u64, src: u64, len: u64) -> Packet {
    packet(OP_COPY, |p| (p.dst, p.src, p.len) = (dst.into(), src.into(), len.into()))
}

pub fn reduce(dst: u64, src: u64, len: u64) -> Packet {
    packet(OP_REDUCE, |p| (p.dst, p.src, p.len) = (dst.into(), src.into(), len.into()))
}

pub fn word_op(opcode: u32, dst: u64, value: u64) -> Packet {
    packet(opcode, |p| (p.dst, p.value) = (dst.into(), value.into()))
}

#[test]
fn fill_copy_and_reduce_move_words() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(4));
        rig.bind(vm, C, &memory, 0, 4);
        let end = rig.run(
            vm,
            &[
                fill(C + 8, 2 * PAGE_SIZE, 3),
                copy(C + 3 * PAGE_SIZE + 1, C + 7, 10),
                reduce(C, C + 8, PAGE_SIZE),
            ],
        );
        assert_eq!(end.errno, 0);
        assert_eq!((memory.get(8), memory.get(2 * PAGE_SIZE), memory.get(2 * PAGE_SIZE + 8)), (3, 3, 0));
        assert_eq!(memory.get(0), 3 * PAGE_SIZE / 8);
        // The octets 00 03 00 00 00 00 00 00 00 03 from octet 1 on.
        assert_eq!(memory.get(3 * PAGE_SIZE), 3 << 16);
        assert_eq!(memory.get(3 * PAGE_SIZE + 8), 3 << 16);
    });
}

#[test]
fn overlapping_copy_repeats_the_first_octets() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        memory.set(0, 0xab);
        assert_eq!(rig.run(vm, &[copy(C + 1, C, 15)]).errno, 0);
        assert_eq!((memory.get(0), memory.get(8)), (0xabab_abab_abab_abab, 0xabab_abab_abab_abab));
    });
}

#[test]
fn axpy_computes_in_f64() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        rig.bind(vm, C, &memory, 0, 2);
        for i in 0..8 {
            memory.set(i * 8, (i as f64).to_bits());
            memory.set(PAGE_SIZE + i * 8, 100f64.to_bits());
        }
        let axpy = packet(OP_AXPY, |p| {
            (p.dst, p.src, p.len) = ((C + PAGE_SIZE).into(), C.into(), 64.into());
            p.value = 2.5f64.to_bits().into();
        });
        assert_eq!(rig.run(vm, &[axpy]).errno, 0);
        for i in 0..8 {
            assert_eq!(f64::from_bits(memory.get(PAGE_SIZE + i * 8)), 100.0 + 2.5 * i as f64);
        }
    });
}

#[test]
fn chase_follows_a_list_and_refuses_bad_nodes() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(2));
        rig.bind(vm, C, &memory, 0, 2);
        // Nodes at 0, 1000 and 64, as CPU addresses; the GPU adds C.
        for (node, next, payload) in [(0, 1000, 5), (1000, 64, 6), (64, 0, 7)] {
            memory.set(node, next);
            memory.set(node + 8, payload);
        }
        let chase = packet(OP_CHASE, |p| {
            (p.dst, p.src) = ((C + PAGE_SIZE).into(), C.into());
            (p.value, p.arg) = (10.into(), C.into());
        });
        assert_eq!(rig.run(vm, &[chase]).errno, 0);
        assert_eq!((memory.get(PAGE_SIZE), memory.get(PAGE_SIZE + 8)), (3, 18));
        memory.set(64, 3);
        let end = rig.run(vm, &[chase]);
        assert_eq!((end.errno, end.addr.0), (errno::EINVAL, C + 3));
        memory.set(64, 1 << 50);
        let end = rig.run(vm, &[chase]);
        assert_eq!((end.errno, end.addr.0), (errno::EFAULT, C + (1 << 50)));
    });
}

#[test]
fn atomics_and_semaphores_order_two_rings() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        let waits = rig.submit(vm, 1, &[word_op(OP_SEM_WAIT, C, 5), word_op(OP_ATOMIC_ADD, C + 8, 30)]);
        let signals = rig.submit(vm, 2, &[word_op(OP_ATOMIC_ADD, C + 8, 12), word_op(OP_SEM_SIGNAL, C, 5)]);
        assert_eq!((rig.end_of(signals).errno, rig.end_of(waits).errno), (0, 0));
        assert_eq!((memory.get(0), memory.get(8)), (5, 42));
    });
}

/// Signalled by the guest's CPU, which the device does not see.
#[test]
fn a_semaphore_may_be_signalled_by_the_cpu() {
    on_each(|rig| {
        let (vm, memory) = (rig.vm(1), Memory::new(1));
        rig.bind(vm, C, &memory, 0, 1);
        let waits = rig.submit(vm, 1, &[word_op(OP_SEM_WAIT, C, 5)]);
        let other = rig.submit(vm, 2, &[word_op(OP_ATOMIC_ADD, C + 8, 1)]);
        assert_eq!(rig.end_of(other).errno, 0);
        memory.set(0, 6);
        assert_eq!(rig.end_of(waits).errno, 0);
    });
}

#[test]
fn bad_packets_are_refused_before_they_run() {
    on_each(|rig| {
        for bad in [
            packet(99, |_| ()),
            fill(C + 4, 8, 0),
            fill(rig.end(), 8, 0),
            copy(C, C, 0),
            packet(OP_NOP, |p| p.flags = 1.into()),
        ] {
            assert!(rig.device.check_packets(&[packet(OP_NOP, |_| ()), bad]).is_err(), "{bad:?}");
        }
    });
}
