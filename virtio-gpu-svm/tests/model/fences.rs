//! Jobs and asynchronous binds that wait for each other across two GPU VMs, and what ends them.
//!
//! Of every end the ledger checks that it is the only one, has its place on the ring, and follows what was waited for.

use crate::machine::{Kind, Machine, NEEDS, Needs, Ram, tag};
use crate::process::{A, C};
use crate::scenarios::{P, work};
use crate::wire::{copy, map, on, store};
use std::sync::Arc;
use virtio_gpu_svm_model::protocol::errno::{ECANCELED, EFAULT, EPIPE};
use virtio_gpu_svm_model::shuttle::rand::{Rng, thread_rng};

const TWO: Needs = Needs { devices: &[Kind::Faults, Kind::Faults], ..NEEDS };
/// Of the page that takes another's place.
const OTHER: u64 = A + 2 * P;

/// Two GPU VMs hand a page to and fro; then one of them maps another page there.
fn launch(machine: &Machine, vms: &[u32]) -> Vec<u64> {
    let (a, b) = (vms[0], vms[1]);
    [
        machine.exec_on(on(a, 0).signal(1), &[store(C, tag(1, 1))]),
        machine.exec_on(on(b, 0).signal(1).waits(&[(a, 0, 1)]), &[copy(C + P, C), store(C, tag(1, 2))]),
        machine.bind_on(on(a, 0).signal(2).waits(&[(b, 0, 1)]), map(C, OTHER, 1)),
        machine.exec_on(on(a, 0).signal(3), &[copy(C + 8, C + P), store(C, tag(1, 3))]),
        machine.exec_on(on(b, 1).waits(&[(a, 0, 2), (b, 0, 1)]), &[copy(C + P + 8, C)]),
    ]
    .map(Result::unwrap)
    .to_vec()
}

/// Everything comes to its end.
pub fn fences(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, TWO);
    let vms = machine.process(1, 2, 2);
    machine.populate(1, A, 3);
    machine.start();
    let items = launch(&machine, &vms);
    for item in items {
        assert_eq!(machine.end_of(item), 0, "violation: a job or a bind failed");
    }
    let expected = [(A, 2), (A + P, 1), (A + P + 8, 2), (OTHER, 3), (OTHER + 8, 1)];
    for (at, n) in expected {
        assert_eq!(machine.result(1, at), tag(1, n), "violation: work was not done in its turn");
    }
    machine.finish();
}

/// One of the two is destroyed: its points are reached, and the other goes on.
pub fn fences_destroyed(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { faults_vanish: true, ..TWO });
    let vms = machine.process(1, 2, 2);
    machine.populate(1, A, 3);
    machine.start();
    let items = launch(&machine, &vms);
    let (gone, stays) = if thread_rng().gen_ratio(1, 2) { (vms[0], vms[1]) } else { (vms[1], vms[0]) };
    machine.vm_destroy(1, gone);
    machine.move_pages(1, A, 3);
    for item in items {
        let end = machine.end_of(item);
        assert!(end == 0 || end == -ECANCELED, "violation: a job or a bind ended with {end}");
    }
    let job = machine.exec_on(on(stays, 0), &[store(C + P, tag(1, 4))]).unwrap();
    assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    machine.result(1, A + P);
    machine.finish();
}

/// The process ends, or the driver's life, with everything in flight.
pub fn fences_cut(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { faults_vanish: true, ..TWO });
    let vms = machine.process(1, 2, 2);
    machine.populate(1, A, 3);
    machine.start();
    launch(&machine, &vms);
    if thread_rng().gen_ratio(1, 2) {
        machine.ctx_destroy(1);
        machine.wait(|ledger| ledger.retired.contains(&1).then_some(()));
    } else if machine.hello(2) > 0 {
        machine.wait(|ledger| (ledger.quiet == 2).then_some(()));
    }
    machine.free_all(1);
    let vm = machine.process(2, 2, 1)[0];
    machine.populate(2, A, 2);
    work(&machine, 2, vm, 0, 1);
    machine.finish();
}

/// A bind fails in its turn, for want of a page: what is behind it fails without being started, and who waits for it
/// goes on.
pub fn fences_failed(ram: &Arc<Ram>) {
    let devices = &[Kind::Rigid, Kind::Faults];
    let machine = Machine::new(ram, Needs { devices, holes: true, faults_vanish: true, ..NEEDS });
    let vms = machine.process(1, 2, 2);
    let (a, b) = (vms[0], vms[1]);
    machine.populate(1, A, 2);
    machine.start();
    let before = machine.exec_on(on(a, 0).signal(1), &[store(C, tag(1, 1))]).unwrap();
    let bind = machine.bind_on(on(a, 0).signal(2).waits(&[(a, 0, 1)]), map(C + 2 * P, OTHER, 1)).unwrap();
    let behind = machine.exec_on(on(a, 0).signal(3), &[store(C, tag(1, 9))]);
    let waits = [(a, 0, if behind.is_ok() { 3 } else { 2 })];
    let other = machine.exec_on(on(b, 0).waits(&waits), &[copy(C + P, C)]).unwrap();
    let ends = [before, bind, other].map(|item| machine.end_of(item));
    assert_eq!(ends, [0, -EFAULT, 0], "violation: jobs and a bind without a page ended otherwise");
    let behind = behind.map(|job| machine.end_of(job));
    let (Ok(end) | Err(end)) = behind;
    assert_eq!(end, -EPIPE, "violation: a job was started before the bind in front of it had ended");
    assert_eq!(machine.result(1, A + P), tag(1, 1), "violation: a job was started that could only fail");
    machine.wait(|ledger| ledger.lost.contains(&(1, a)).then_some(()));
    machine.finish();
}

/// A bind has its turn where nothing faults, while its page moves and translations are dropped: it ends when all is
/// there, and everything that waits for it goes on.
pub fn fences_held(ram: &Arc<Ram>) {
    let devices = &[Kind::Rigid, Kind::Faults];
    let machine = Machine::new(ram, Needs { devices, ..NEEDS });
    let vms = machine.process(1, 2, 2);
    let (a, b) = (vms[0], vms[1]);
    machine.populate(1, A, 4);
    machine.start();
    let kernel = machine.spawn(|machine| machine.move_pages(1, OTHER, 1));
    let operator = machine.spawn(|machine| machine.evict(1));
    let items = [
        machine.exec_on(on(a, 0).signal(1), &[store(C, tag(1, 1))]),
        machine.bind_on(on(a, 0).signal(2), map(C + 2 * P, OTHER, 2)),
        machine.exec_on(on(a, 0).signal(3), &[store(C + 3 * P, tag(1, 2)), copy(C + 3 * P + 8, C + 2 * P)]),
        machine.exec_on(on(b, 0).waits(&[(a, 0, 2)]), &[copy(C + P, C)]),
        machine.exec_on(on(a, 1).waits(&[(a, 0, 2)]), &[copy(C + 3 * P + 16, C)]),
    ];
    for item in items {
        assert_eq!(machine.end_of(item.unwrap()), 0, "violation: a job or a bind failed");
    }
    for (at, n) in [(A + P, 1), (A + 3 * P, 2), (A + 3 * P + 16, 1)] {
        assert_eq!(machine.result(1, at), tag(1, n), "violation: work was not done in its turn");
    }
    machine.result(1, A + 3 * P + 8);
    kernel.join().unwrap();
    operator.join().unwrap();
    work(&machine, 1, a, 1, 1);
    machine.finish();
}
