//! What another guest's numbers cost: a turn each, counted in slices of one engine. Whatever is counted takes a slice
//! and leaves an event.
use super::*;

/// GPU VMs of the guest that has very many.
const MANY: u32 = 1000;
/// Jobs of the guest that has one GPU VM, one behind the other.
const FEW: usize = 100;
const RINGS: u32 = 4;

/// A guest with one GPU VM and its jobs, of a slice each.
fn submit_few(rig: &Rig) -> Vec<JobId> {
    let victim = rig.vm_of("few", 1);
    (0..FEW).map(|_| rig.submit(victim, 0, &[Packet::default()])).collect()
}

fn make_many(rig: &Rig) -> Vec<Asid> {
    (2..2 + MANY).map(|asid| rig.vm_of("many", asid)).collect()
}

/// Between two ends of these jobs nothing but at most one event is told.
fn assert_alternate(log: &[Event], jobs: &[JobId]) {
    let is_ours = |event: &Event| matches!(event, Event::Done(job, _) if jobs.contains(job));
    let turns: Vec<_> = log.split(is_ours).collect();
    assert_eq!(turns.len(), jobs.len() + 1);
    for (nth, turn) in turns[..jobs.len()].iter().enumerate() {
        assert!(turn.len() <= 1, "{} turns of others before turn {nth}: {turn:?}", turn.len());
    }
    assert!(!turns[jobs.len()].is_empty(), "the others had no more to do than these");
}

#[test]
fn guest_with_many_busy_vms_gets_the_turns_of_one() {
    let rig = Rig::paused(1);
    let mut last = None;
    for asid in make_many(&rig) {
        for ring in 0..RINGS {
            last = (0..2).map(|_| rig.submit(asid, ring, &[Packet::default()])).last();
        }
    }
    let jobs = submit_few(&rig);
    rig.go();
    rig.end_of(last.unwrap());
    assert_alternate(&rig.log(), &jobs);
}

#[test]
fn vms_of_a_guest_take_turns_within_its_share() {
    let rig = Rig::paused(1);
    let (one, other) = (rig.vm_of("many", 1), rig.vm_of("many", 2));
    let bully: Vec<_> = (0..60).map(|ring| rig.submit(one, ring, &[Packet::default()])).collect();
    let jobs: Vec<_> = (0..20).map(|_| rig.submit(other, 0, &[Packet::default()])).collect();
    rig.go();
    rig.end_of(bully[59]);
    assert_alternate(&rig.log(), &jobs);
}

#[test]
fn vms_that_retire_take_turns_of_their_guest() {
    let rig = Rig::paused(1);
    let many = make_many(&rig);
    many.iter().for_each(|asid| rig.device.vm_destroy(*asid));
    let jobs = submit_few(&rig);
    rig.go();
    many.iter().for_each(|asid| rig.wait_retired(*asid));
    assert_alternate(&rig.log(), &jobs);
}

/// Each fault is refused at once: its job comes back to fail, so a slice leaves one event here too.
#[test]
fn faults_of_many_vms_take_turns_of_their_guest() {
    let rig = Rig::paused(1);
    rig.answer(|device, fault| device.resume(fault.stop, Verdict::Fail(errno::EFAULT)));
    let mut last = None;
    for asid in make_many(&rig) {
        last = Some(rig.submit(asid, 0, &[fill(C, 8, 1)]));
    }
    let jobs = submit_few(&rig);
    rig.go();
    rig.end_of(last.unwrap());
    assert_alternate(&rig.log(), &jobs);
}

#[test]
fn signal_to_many_waiters_wakes_a_batch_and_all_in_time() {
    let rig = Rig::paused(1);
    let memory = Memory::new(1);
    let mut waiting = vec![];
    for asid in (2..22).map(|asid| rig.vm_of("many", asid)) {
        rig.bind(asid, C, &memory, 0, 1);
        waiting.extend((0..60).map(|ring| rig.submit(asid, ring, &[word_op(OP_SEM_WAIT, C, 1)])));
    }
    rig.go();
    let signaller = rig.vm_of("many", 30);
    rig.bind(signaller, C, &memory, 0, 1);
    assert_eq!(rig.run(signaller, &[word_op(OP_SEM_SIGNAL, C, 1)]).errno, 0);
    assert!(waiting.into_iter().all(|job| rig.end_of(job).errno == 0));
}

/// An engine that entered the VM would wait for the lock with everybody else's work.
#[test]
fn engine_does_not_come_to_a_vm_whose_region_is_dropped() {
    let rig = Rig::new(2);
    let (asid, memory) = (rig.vm_of("many", 2), Memory::new(16));
    rig.bind(asid, C, &memory, 0, 16);
    let held = rig.hold(asid, &memory);
    let (device, region) = (Arc::clone(&rig.device), memory.0.id());
    // Not scoped: a test that fails leaves it behind.
    let dropping = std::thread::spawn(move || device.drop_region(asid, region));
    let deadline = Instant::now() + PATIENCE;
    while !rig.device.sched().is_barred(asid) {
        assert!(Instant::now() < deadline, "engines are not kept out");
        std::thread::yield_now();
    }
    let behind = rig.submit(asid, 1, &[Packet::default()]);
    for job in submit_few(&rig) {
        assert_eq!(rig.end_of(job).errno, 0);
    }
    assert!(!done(&rig.log()).contains(&behind), "it ran while its memory was changed");
    assert!(!dropping.is_finished(), "dropped under a slice that uses it");
    rig.let_go(&memory);
    dropping.join().unwrap();
    assert_eq!((rig.end_of(held).errno, rig.end_of(behind).errno), (0, 0));
}

/// A driver may be waiting for it, and what its guest has to do besides is no reason to wait longer.
#[test]
fn vm_that_retires_goes_before_the_jobs_of_its_guest() {
    let rig = Rig::paused(1);
    let many = make_many(&rig);
    many.iter().for_each(|asid| _ = rig.submit(*asid, 0, &[Packet::default()]));
    rig.device.vm_destroy(many[500]);
    rig.go();
    rig.wait_retired(many[500]);
    assert!(matches!(rig.log()[0], Event::Retired(asid) if asid == many[500]), "others went before");
}
