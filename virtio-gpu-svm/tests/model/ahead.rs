//! Pages before their first touch, and GPU VMs that stand still for want of them: on devices without faults, and
//! prefetches on those that have them.

use crate::machine::{Kind, Machine, NEEDS, Needs, Ram, tag};
use crate::process::{A, C};
use crate::scenarios::{P, work, work_all};
use crate::wire::{copy, map, null, on, prefetch, store, unmap};
use std::sync::Arc;
use virtio_gpu_svm_model::protocol::errno::{EFAULT, EPIPE};
use virtio_gpu_svm_model::protocol::{LEAF_SIZE, PAGE_SIZE};
use virtio_gpu_svm_model::shuttle::rand::{Rng, thread_rng};

const RIGID: Needs = Needs { devices: &[Kind::Rigid], engines: 2, ..NEEDS };

/// Pages move, and the operator drops translations, under jobs that cannot fault.
pub fn held(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, RIGID);
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A, 3);
    machine.start();
    let kernel = machine.spawn(|machine| {
        machine.move_pages(1, A, 1);
        machine.move_pages(1, A, 2);
    });
    let operator = machine.spawn(|machine| machine.evict(1));
    work_all(&machine, [(vm, 0), (vm, 1)]);
    kernel.join().unwrap();
    operator.join().unwrap();
    work(&machine, 1, vm, 0, 1);
    machine.finish();
}

/// The rings stop and go on while translations were dropped, or a page is missing.
pub fn held_frozen(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, RIGID);
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.start();
    let jobs = [0, 1].map(|ring: u32| {
        let packets: Vec<_> = (1..4).map(|n| store(C + P * u64::from(ring), tag(1, ring * 8 + n))).collect();
        machine.exec(1, vm, ring, &packets).unwrap()
    });
    let operator = machine.spawn(|machine| (0..2).for_each(|_| machine.evict(1)));
    machine.stop_rings();
    let moved = machine.begin_move(1, A, 1);
    machine.stop_rings();
    machine.end_move(1, moved);
    for job in jobs {
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    }
    operator.join().unwrap();
    work(&machine, 1, vm, 0, 1);
    machine.finish();
}

/// A part is unmapped, let go, and mapped again under jobs beside it.
pub fn held_unmapped(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { faults_vanish: true, ..RIGID });
    let vm = machine.process(1, 4, 1)[0];
    machine.populate(1, A, 4);
    machine.start();
    let (own, theirs) = (C + 3 * P, A + 3 * P);
    let racing = machine.exec(1, vm, 2, &[store(own, tag(1, 8))]).unwrap();
    let user = machine.spawn(move |machine| work(machine, 1, vm, 0, 2));
    machine.bind(1, vm, unmap(own, 1));
    let later = machine.exec(1, vm, 3, &[store(own, tag(1, 9))]).unwrap();
    machine.move_pages(1, theirs, 1);
    let end = machine.end_of(racing);
    assert!(end == 0 || end == -EFAULT, "violation: a job ended with {end}");
    assert_eq!(machine.end_of(later), -EFAULT, "violation: a job used what was unmapped before its launch");
    machine.bind(1, vm, map(own, theirs, 1));
    let again = machine.exec(1, vm, 2, &[store(own, tag(1, 7))]).unwrap();
    assert_eq!(machine.end_of(again), 0, "violation: a job failed");
    machine.result(1, theirs);
    user.join().unwrap();
    machine.finish();
}

/// All of it in an order that is drawn: moves, evictions, pages told unasked, and changes of a mapping beside the jobs'
/// pages, some in their turn on a ring.
pub fn held_mixed(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { faults_vanish: true, ..RIGID });
    let vm = machine.process(1, 4, 1)[0];
    machine.populate(1, A, 4);
    machine.start();
    let kernel = machine.spawn(|machine| {
        for _ in 0..2 {
            match thread_rng().gen_range(0..6) {
                page @ 0..4 => machine.move_pages(1, A + P * page, 1),
                4 => machine.move_pages(1, A, 4),
                _ => machine.evict(1),
            }
        }
    });
    let user = machine.spawn(move |machine| {
        for _ in 0..2 {
            let beside = C + 3 * P;
            match thread_rng().gen_range(0..4) {
                0 => machine.bind(1, vm, unmap(beside, 1)),
                1 => machine.bind(1, vm, map(beside, A + 3 * P, 1)),
                2 => machine.bind(1, vm, null(beside, 1)),
                _ => {
                    let bind = machine.bind_on(on(vm, 0), map(beside, A + 2 * P, 1)).unwrap();
                    assert_eq!(machine.end_of(bind), 0, "violation: a bind failed");
                }
            }
        }
    });
    work_all(&machine, [(vm, 0), (vm, 1)]);
    kernel.join().unwrap();
    user.join().unwrap();
    work(&machine, 1, vm, 0, 1);
    machine.finish();
}

/// A page goes that is mapped: the GPU VM is lost, and another is made without it.
pub fn held_lost(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { holes: true, faults_vanish: true, ..RIGID });
    let vm = machine.process(1, 4, 1)[0];
    machine.populate(1, A, 4);
    machine.start();
    let kernel = machine.spawn(|machine| {
        machine.move_pages(1, A + P, 1);
        machine.drop_page(1, A);
    });
    let jobs = [0, 1].map(|ring| machine.exec(1, vm, ring, &[store(C, tag(1, 1)), copy(C + P, C)]));
    for job in jobs.into_iter().map(|job| job.map(|job| machine.end_of(job))) {
        let (Ok(end) | Err(end)) = job;
        assert!([0, -EFAULT, -EPIPE].contains(&end), "violation: a job ended with {end}");
    }
    machine.wait(|ledger| ledger.lost.contains(&(1, vm)).then_some(()));
    assert_eq!(machine.exec(1, vm, 0, &[store(C, 1)]), Err(-EPIPE), "violation: a lost GPU VM took a job");
    kernel.join().unwrap();
    machine.vm_destroy(1, vm);
    let vm = machine.vm_create(1, 0);
    machine.bind(1, vm, map(C, A + P, 3));
    let job = machine.exec(1, vm, 0, &[store(C, tag(1, 2)), copy(C + P, C)]).unwrap();
    assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    machine.result(1, A + 2 * P);
    machine.finish();
}

/// The VMM takes memory away under jobs that cannot fault.
pub fn held_unplugged(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, RIGID);
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A + P, 2);
    machine.populate_more(1, A);
    machine.start();
    let frontend = machine.spawn(|machine| machine.unplug_under(1, A));
    work_all(&machine, [(vm, 0), (vm, 1)]);
    frontend.join().unwrap();
    work(&machine, 1, vm, 0, 1);
    machine.finish();
}

/// A page of a large leaf is asked for while it is told unasked, and translations are dropped.
pub fn held_leaf(ram: &Arc<Ram>) {
    const LEAF: u64 = LEAF_SIZE / PAGE_SIZE;
    let machine = Machine::new(ram, RIGID);
    machine.process(1, 1, 0);
    let vm = machine.vm_create(1, 0);
    machine.populate(1, A, LEAF);
    machine.supply_run(1, A, 100);
    machine.supply_run(1, A + 101 * P, LEAF - 101);
    machine.bind(1, vm, map(C, A, LEAF));
    machine.start();
    let kernel = machine.spawn(|machine| machine.supply_page(1, A + 100 * P));
    let operator = machine.spawn(|machine| machine.evict(1));
    for n in 1..3 {
        let job = machine.exec(1, vm, 0, &[store(C, tag(1, n)), copy(C + 500 * P, C)]).unwrap();
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
        machine.result(1, A + 500 * P);
    }
    kernel.join().unwrap();
    operator.join().unwrap();
    let job = machine.exec(1, vm, 0, &[copy(C + 8, C + 500 * P)]).unwrap();
    assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    machine.finish();
}

/// Prefetches of a range whose first page is not there, against faults, moves and unmaps of the others.
pub fn prefetched(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { holes: true, faults_vanish: true, ..NEEDS });
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A, 4);
    machine.bind(1, vm, map(C - P, A - P, 5));
    machine.start();
    let kernel = machine.spawn(|machine| machine.move_pages(1, A, 1));
    let user = machine.spawn(move |machine| {
        machine.bind(1, vm, prefetch(C - P, 5));
        machine.bind(1, vm, unmap(C + 3 * P, 1));
        machine.bind(1, vm, prefetch(C, 4));
        machine.bind(1, vm, map(C + 3 * P, A + 3 * P, 1));
    });
    work_all(&machine, [(vm, 0), (vm, 1)]);
    kernel.join().unwrap();
    user.join().unwrap();
    let job = machine.exec(1, vm, 0, &[store(C - P, 1)]).unwrap();
    assert_eq!(machine.end_of(job), -EFAULT, "violation: a job used a page that is not there");
    machine.finish();
}
