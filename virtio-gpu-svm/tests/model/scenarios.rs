//! What happens side by side. Each is small: one or two processes, few pages, few jobs.

use crate::machine::{Kind, LIMITS, Machine, NEEDS, Needs, Ram, tag};
use crate::process::{A, C};
use crate::wire::{self, copy, fill, map, map_blob, store};
use std::sync::Arc;
use virtio_gpu_svm_model::host::Limits;
use virtio_gpu_svm_model::protocol::errno::{ECANCELED, EINVAL, ENOENT};
use virtio_gpu_svm_model::protocol::{LEAF_SIZE, PAGE_SIZE};

pub const P: u64 = PAGE_SIZE;

/// Jobs on a ring that write to the first page and copy from it to the one behind as many as the ring's number; every
/// result must be the process' own.
pub fn work(machine: &Machine, ctx_id: u32, vm: u32, ring: u32, rounds: u32) {
    let own = P * u64::from(ring + 1);
    for n in 1..=rounds {
        let packets = [store(C, tag(ctx_id, n)), copy(C + own, C)];
        let job = machine.exec(ctx_id, vm, ring, &packets).unwrap();
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
        machine.result(ctx_id, A + own);
    }
}

/// [`work`] of several at once.
pub fn work_all<const N: usize>(machine: &Arc<Machine>, users: [(u32, u32); N]) {
    let users = users.map(|(vm, ring)| machine.spawn(move |machine| work(machine, 1, vm, ring, 2)));
    for user in users {
        user.join().unwrap();
    }
}

/// Faults, their answers, and moves of the page that is asked for. A page of the next leaf is known and stays.
pub fn invalidation(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, NEEDS);
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A, 3);
    machine.populate(1, A + LEAF_SIZE, 1);
    machine.supply_page(1, A + LEAF_SIZE);
    machine.start();
    let kernel = machine.spawn(|machine| (0..2).for_each(|_| machine.move_pages(1, A, 1)));
    work_all(&machine, [(vm, 0), (vm, 1)]);
    kernel.join().unwrap();
    machine.finish();
}

/// A mapping is replaced and taken away under jobs that fault on it.
pub fn unmap(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { faults_vanish: true, ..NEEDS });
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 3);
    let other = machine.page_of(1, A + 2 * P);
    ram.mark(other, tag(1, 7));
    machine.start();
    let racing = machine.exec(1, vm, 1, &[copy(C + P, C)]).unwrap();
    machine.bind(1, vm, map(C, A + 2 * P, 1));
    let later = machine.exec(1, vm, 2, &[copy(C + P + 8, C)]).unwrap();
    assert_eq!((machine.end_of(racing), machine.end_of(later)), (0, 0), "violation: a job failed");
    machine.result(1, A + P);
    assert_eq!(
        machine.result(1, A + P + 8),
        tag(1, 7),
        "violation: a job saw what was there before its launch"
    );

    let racing = machine.exec(1, vm, 1, &[store(C, tag(1, 8))]).unwrap();
    machine.bind(1, vm, wire::unmap(C, 1));
    let kernel = machine.spawn(|machine| machine.move_pages(1, A + 2 * P, 1));
    let later = machine.exec(1, vm, 2, &[store(C, tag(1, 9))]).unwrap();
    let end = machine.end_of(racing);
    assert!(end == 0 || end == -EINVAL, "violation: a job ended with {end}");
    assert_eq!(machine.end_of(later), -EINVAL, "violation: a job used what was unmapped before its launch");
    kernel.join().unwrap();
    machine.finish();
}

/// A process ends with jobs in flight, and another begins.
pub fn exit(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, faults_vanish: true, ..NEEDS });
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.start();
    for ring in 0..2 {
        machine.exec(1, vm, ring, &[store(C, tag(1, 1)), store(C + P, tag(1, 2))]).unwrap();
    }
    let user = machine.spawn(move |machine| {
        if let Err(status) = machine.exec(1, vm, 0, &[copy(C + P, C)]) {
            assert_eq!(status, -ENOENT, "violation: a launch was refused");
        }
    });
    machine.ctx_destroy(1);
    let next = machine.spawn(|machine| {
        let vm = machine.process(2, 2, 1)[0];
        machine.populate(2, A, 2);
        work(machine, 2, vm, 0, 1);
    });
    machine.wait(|ledger| ledger.retired.contains(&1).then_some(()));
    machine.free_all(1);
    user.join().unwrap();
    next.join().unwrap();
    machine.finish();
}

/// Engines that look for work before they sleep: what comes meanwhile is not left to nobody.
pub fn looking(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, looks: true, ..NEEDS });
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A, 3);
    machine.start();
    work_all(&machine, [(vm, 0), (vm, 1)]);
    machine.finish();
}

/// A driver's life begins anew with jobs of the old one in flight.
pub fn reset(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, faults_vanish: true, ..NEEDS });
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.start();
    for ring in 0..2 {
        machine.exec(1, vm, ring, &[store(C, tag(1, 1)), store(C + P, tag(1, 2))]).unwrap();
    }
    if machine.hello(2) > 0 {
        machine.wait(|ledger| (ledger.quiet == 2).then_some(()));
    }
    machine.free_all(1);
    let vm = machine.process(2, 2, 1)[0];
    machine.populate(2, A, 2);
    work(&machine, 2, vm, 0, 1);
    machine.finish();
}

/// The rings stop and go on while jobs run.
pub fn freeze(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, ..NEEDS });
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.start();
    let frontend = machine.spawn(|machine| (0..2).for_each(|_| machine.stop_rings()));
    let job = |ring: u32| {
        let first = ring * 8;
        let packets: Vec<_> = (1..4).map(|n| store(C + P * u64::from(ring), tag(1, first + n))).collect();
        machine.exec(1, vm, ring, &packets).unwrap()
    };
    let jobs = [job(0), job(1)];
    for job in jobs {
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    }
    frontend.join().unwrap();
    machine.finish();
}

/// One address space, a GPU VM on each of two devices.
pub fn two_vms(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { devices: &[Kind::Faults, Kind::Faults], ..NEEDS });
    let vms = machine.process(1, 3, 2);
    machine.populate(1, A, 3);
    machine.start();
    let kernel = machine.spawn(|machine| (0..2).for_each(|_| machine.move_pages(1, A, 1)));
    work_all(&machine, [(vms[0], 0), (vms[1], 1)]);
    kernel.join().unwrap();
    machine.finish();
}

/// Pages in both halves of a large leaf move while jobs write to them.
pub fn large_leaf(ram: &Arc<Ram>) {
    const LEAF: u64 = LEAF_SIZE / PAGE_SIZE;
    let (low, high) = (100 * P, 400 * P);
    let machine = Machine::new(ram, NEEDS);
    let vm = machine.process(1, LEAF, 1)[0];
    machine.populate(1, A, LEAF);
    machine.supply_run(1, A, LEAF);
    machine.start();
    let kernel = machine.spawn(move |machine| {
        machine.move_pages(1, A + high, 2);
        machine.move_pages(1, A + low, 1);
    });
    for n in 1..3 {
        let packets = [store(C + high, tag(1, n)), store(C + low, tag(1, n)), copy(C + 8, C + high)];
        let job = machine.exec(1, vm, 0, &packets).unwrap();
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
        machine.result(1, A + 8);
    }
    kernel.join().unwrap();
    machine.finish();
}

/// A job has translated its source and parks at its target; then the source moves.
pub fn parked(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, NEEDS);
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.supply_page(1, A);
    machine.start();
    let kernel = machine.spawn(|machine| machine.move_pages(1, A, 1));
    let job = machine.exec(1, vm, 0, &[copy(C + P, C)]).unwrap();
    assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    machine.result(1, A + P);
    kernel.join().unwrap();
    machine.finish();
}

/// More faults than may be pending.
pub fn throttle(ram: &Arc<Ram>) {
    let limits = Limits { pending_faults: 1, ..LIMITS };
    let machine = Machine::new(ram, Needs { engines: 2, limits, ..NEEDS });
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A, 3);
    machine.start();
    let kernel = machine.spawn(|machine| machine.move_pages(1, A, 1));
    let jobs: Vec<_> =
        (0..3).map(|n| machine.exec(1, vm, n, &[store(C + P * u64::from(n), tag(1, n))]).unwrap()).collect();
    for job in jobs {
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    }
    kernel.join().unwrap();
    machine.finish();
}

/// A GPU VM is destroyed under its jobs; its process goes on, moves a page, and makes another.
pub fn teardown(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, faults_vanish: true, ..NEEDS });
    let vm = machine.process(1, 2, 1)[0];
    machine.populate(1, A, 2);
    machine.start();
    let jobs = [0, 1]
        .map(|ring| machine.exec(1, vm, ring, &[store(C, tag(1, 1)), store(C + P, tag(1, 2))]).unwrap());
    machine.vm_destroy(1, vm);
    machine.move_pages(1, A, 1);
    for job in jobs {
        let end = machine.end_of(job);
        assert!(end == 0 || end == -ECANCELED, "violation: a job ended with {end}");
    }
    let vm = machine.vm_create(1, 0);
    machine.bind(1, vm, map(C, A, 2));
    work(&machine, 1, vm, 0, 1);
    machine.finish();
}

/// The VMM takes memory away under jobs that use it.
pub fn unplug(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, ..NEEDS });
    let vm = machine.process(1, 3, 1)[0];
    machine.populate(1, A + P, 2);
    machine.populate_more(1, A);
    machine.start();
    let frontend = machine.spawn(|machine| machine.unplug_under(1, A));
    work_all(&machine, [(vm, 0), (vm, 1)]);
    frontend.join().unwrap();
    machine.finish();
}

/// A blob is unreferenced while jobs use it.
pub fn unref(ram: &Arc<Ram>) {
    let machine = Machine::new(ram, Needs { engines: 2, ..NEEDS });
    let vm = machine.process(1, 1, 1)[0];
    machine.populate(1, A, 1);
    let page = ram.take(1, 1);
    machine.blob(1, 9, Ram::gpa(page));
    machine.bind(1, vm, map_blob(C + P, 9, 1));
    machine.start();
    let jobs = [0, 1].map(|ring| {
        machine
            .exec(1, vm, ring, &[store(C + P, tag(1, 1)), copy(C, C + P), store(C + P, tag(1, 2))])
            .unwrap()
    });
    machine.unref(9);
    ram.free(page);
    for job in jobs {
        let end = machine.end_of(job);
        assert!(end == 0 || end == -EINVAL, "violation: a job ended with {end}");
    }
    machine.result(1, A);
    machine.finish();
}

/// A device that asks for pages of the process' own addresses in groups, which are answered in part, and move.
pub fn groups(ram: &Arc<Ram>) {
    let needs = Needs { devices: &[Kind::Identity], engines: 2, ..NEEDS };
    let machine = Machine::new(ram, needs);
    machine.ctx_create(1);
    machine.note_context(1);
    let vm = machine.vm_create(1, 0);
    machine.populate(1, A, 5);
    machine.start();
    let kernel = machine.spawn(|machine| {
        machine.move_pages(1, A + P, 1);
        machine.move_pages(1, A, 2);
    });
    let fills = [(0, A, 4), (1, A + P, 3)];
    let jobs = fills.map(|(ring, at, pages)| {
        let packets = [fill(at, pages, tag(1, ring + 1)), copy(A + 4 * P + 8 * u64::from(ring), at + P)];
        machine.exec(1, vm, ring, &packets).unwrap()
    });
    for job in jobs {
        assert_eq!(machine.end_of(job), 0, "violation: a job failed");
    }
    [0, 8].into_iter().for_each(|at| _ = machine.result(1, A + 4 * P + at));
    kernel.join().unwrap();
    machine.finish();
}
