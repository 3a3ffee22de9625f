//! Order, fairness, flushes, freezing, regions that go, and the end of VMs.
use super::*;

/// A VM with 16 pages of its own at [`C`].
fn vm_with_memory(rig: &Rig, asid: u32) -> (Asid, Memory) {
    let memory = Memory::new(16);
    let asid = rig.vm(asid);
    rig.bind(asid, C, &memory, 0, 16);
    (asid, memory)
}

/// Work for a few slices on page 1 and following.
fn long() -> [Packet; 40] {
    [fill(C + PAGE_SIZE, 15 * PAGE_SIZE, 1); 40]
}

const ALL: PageRange = PageRange { start: 0, end: 1 << 36 };

fn pending(flush: Flush) -> Ticket {
    match flush {
        Flush::Pending(ticket) => ticket,
        Flush::Done => panic!("an engine is in a slice, but the flush is done"),
    }
}

#[test]
fn jobs_of_a_ring_end_in_order() {
    let rig = Rig::paused(3);
    let (asid, _) = vm_with_memory(&rig, 1);
    let jobs: Vec<_> = (0..30)
        .map(|i| match i % 3 {
            0 => rig.submit(asid, 4, &long()),
            _ => rig.submit(asid, 4, &[Packet::default()]),
        })
        .collect();
    rig.go();
    rig.end_of(jobs[29]);
    assert_eq!(done(&rig.log()), jobs);
}

/// Who looks does so for an hour: a job that nobody was called for would be waited for in vain.
#[test]
fn engines_that_look_find_jobs_and_return() {
    for engines in [1, 3] {
        let busy_poll = Duration::from_secs(3600);
        let rig = Rig::with(SoftConfig { busy_poll, ..config(engines) });
        let vms = [vm_with_memory(&rig, 1).0, vm_with_memory(&rig, 2).0];
        let before = rig.submit(vms[0], 0, &[fill(C, 8, 1)]);
        std::thread::sleep(Duration::from_millis(10));
        rig.go();
        rig.end_of(before);
        for n in 0..200 {
            let jobs = vms.map(|vm| rig.submit(vm, n % 4, &[fill(C, 8, 1)]));
            jobs.into_iter().for_each(|job| assert_eq!(rig.end_of(job).errno, 0));
        }
        rig.device.vm_destroy(vms[0]);
        rig.wait_retired(vms[0]);
    }
}

#[test]
fn rings_run_side_by_side() {
    let rig = Rig::paused(1);
    let (asid, _) = vm_with_memory(&rig, 1);
    let long = rig.submit(asid, 0, &long());
    let short = rig.submit(asid, 1, &[Packet::default()]);
    rig.go();
    rig.end_of(long);
    assert_eq!(done(&rig.log()), [short, long]);
}

#[test]
fn vm_with_many_rings_does_not_starve_those_with_a_single_job() {
    let rig = Rig::paused(1);
    let (bully, _) = vm_with_memory(&rig, 1);
    let victims = [vm_with_memory(&rig, 2).0, vm_with_memory(&rig, 3).0];
    let before = rig.submit(victims[0], 0, &long());
    let bullies: Vec<_> = (0..50).map(|ring| rig.submit(bully, ring, &long())).collect();
    let after = rig.submit(victims[1], 0, &long());
    rig.go();
    for job in bullies {
        rig.end_of(job);
    }
    assert_eq!(done(&rig.log())[..2], [before, after]);
}

#[test]
fn parked_job_leaves_its_engine_to_others() {
    let rig = Rig::new(1);
    let parked = rig.vm(1);
    rig.submit(parked, 0, &[fill(C, 8, 1)]);
    rig.submit(parked, 1, &[fill(C, 8, 1)]);
    rig.fault(1);
    let (other, _) = vm_with_memory(&rig, 2);
    assert_eq!(rig.run(other, &long()).errno, 0);
}

#[test]
fn unbind_with_a_slice_in_flight_is_flushed_after_it() {
    let rig = Rig::new(2);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let (other, _) = vm_with_memory(&rig, 2);
    rig.hold(asid, &memory);
    assert_eq!(rig.device.unbind(other, ALL), Flush::Done, "nobody is in the other VM");
    let first = pending(rig.device.unbind(asid, ALL));
    assert_eq!(rig.device.resident_pages(asid), 0);
    let second = pending(rig.device.unbind(asid, ALL));
    assert!(first < second);
    assert!(!rig.log().iter().any(|e| matches!(e, Event::Flushed(..))));
    rig.let_go(&memory);
    rig.wait_flushed(asid, second);
    assert_eq!(rig.device.unbind(asid, ALL), Flush::Done);
}

#[test]
fn flush_waits_only_for_slices_that_began_before() {
    let rig = Rig::new(2);
    let (asid, memory) = vm_with_memory(&rig, 1);
    rig.hold(asid, &memory);
    let early = pending(rig.device.unbind(asid, PageRange { start: 0, end: 1 }));
    // A second slice of the same VM begins after the unbind, and stays.
    let gate = Memory::new(1);
    rig.bind(asid, C + (1 << 30), &gate, 0, 1);
    let later = rig.hold_at(asid, 61, C + (1 << 30), &gate);
    rig.let_go(&memory);
    rig.wait_flushed(asid, early);
    assert!(!done(&rig.log()).contains(&later));
    let late = pending(rig.device.unbind(asid, PageRange { start: 0, end: 1 }));
    gate.set(0, 1);
    rig.wait_flushed(asid, late);
}

#[test]
fn flush_waits_for_the_oldest_slice() {
    let rig = Rig::new(3);
    let (asid, memory) = vm_with_memory(&rig, 1);
    rig.hold(asid, &memory);
    let ticket = pending(rig.device.unbind(asid, PageRange { start: 0, end: 1 }));
    let gate = Memory::new(1);
    rig.bind(asid, C + (1 << 30), &gate, 0, 1);
    rig.hold_at(asid, 61, C + (1 << 30), &gate);
    // The third engine passes checkpoints of this VM; the second job runs when all of the first was told.
    for _ in 0..2 {
        rig.run(asid, &[Packet::default()]);
    }
    assert!(!rig.log().iter().any(|e| matches!(e, Event::Flushed(..))));
    rig.let_go(&memory);
    rig.wait_flushed(asid, ticket);
    gate.set(0, 1);
}

#[test]
fn parked_job_holds_no_translation() {
    let rig = Rig::new(1);
    let (asid, _) = vm_with_memory(&rig, 1);
    rig.submit(asid, 1, &[fill(C, 8, 1), fill(C + (1 << 30), 8, 1)]);
    rig.fault(0);
    assert_eq!(rig.device.unbind(asid, ALL), Flush::Done);
}

#[test]
fn waiting_job_holds_no_translation() {
    let rig = Rig::new(1);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let job = rig.submit(asid, 0, &[word_op(OP_SEM_WAIT, C, 1)]);
    // It is looked at now and then, so an engine may be inside at this moment, but not for long.
    if let Flush::Pending(ticket) = rig.device.unbind(asid, ALL) {
        rig.wait_flushed(asid, ticket);
    }
    assert_eq!(rig.fault(0).job, job);
    rig.bind(asid, C, &memory, 0, 1);
    memory.set(0, 1);
    rig.device.resume(rig.fault(0).stop, Verdict::Retry);
    assert_eq!(rig.end_of(job).errno, 0);
}

#[test]
fn frozen_vm_keeps_its_place_and_goes_on() {
    let rig = Rig::new(2);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let held = rig.hold(asid, &memory);
    let queued = rig.submit(asid, 60, &[word_op(OP_SEM_SIGNAL, C + 16, 5)]);
    let faulted = rig.submit(asid, 3, &[fill(C + (1 << 30), 8, 1)]);
    let fault = rig.fault(0);
    let waiting = rig.submit(asid, 4, &[word_op(OP_SEM_WAIT, C + 16, 5)]);
    let ticket = pending(rig.device.set_frozen(asid, true));
    rig.let_go(&memory);
    rig.wait_flushed(asid, ticket);
    rig.device.resume(fault.stop, Verdict::Fail(errno::EFAULT));
    let late = rig.submit(asid, 7, &[Packet::default()]);
    memory.set(16, 5);

    // Others run, this one does not.
    let (other, _) = vm_with_memory(&rig, 2);
    assert_eq!(rig.run(other, &long()).errno, 0);
    let ended = done(&rig.log());
    assert!([queued, faulted, waiting, late].iter().all(|job| !ended.contains(job)));

    assert_eq!(rig.device.set_frozen(asid, false), Flush::Done);
    let ends = [held, queued, faulted, waiting, late].map(|job| rig.end_of(job).errno);
    assert_eq!(ends, [0, 0, errno::EFAULT, 0, 0]);
}

#[test]
fn vm_frozen_while_it_is_queued_does_not_run() {
    let rig = Rig::paused(1);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let job = rig.submit(asid, 0, &[word_op(OP_SEM_SIGNAL, C, 1)]);
    assert_eq!(rig.device.set_frozen(asid, true), Flush::Done);
    rig.go();
    let (other, _) = vm_with_memory(&rig, 2);
    rig.run(other, &long());
    assert_eq!(memory.get(0), 0);
    assert_eq!(rig.device.set_frozen(asid, false), Flush::Done);
    assert_eq!(rig.end_of(job).errno, 0);
}

#[test]
fn destroyed_vm_retires_once_and_says_nothing_after() {
    let rig = Rig::new(2);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let parked = rig.submit(asid, 0, &[fill(C + (1 << 30), 8, 1)]);
    let stop = rig.fault(0).stop;
    rig.submit(asid, 0, &[Packet::default()]);
    rig.submit(asid, 1, &[word_op(OP_SEM_WAIT, C + 16, 1 << 60)]);
    let running = rig.hold(asid, &memory);

    rig.device.vm_destroy(asid);
    rig.device.vm_destroy(asid);
    rig.device.resume(stop, Verdict::Retry);
    let job = Job { id: JobId(99), ring_idx: 0, packets: Vec::new() };
    assert_eq!(rig.device.submit(asid, job), Err(Error::NoVm(1)));
    assert_eq!(rig.device.bind(asid, GpuAddr(C), &[memory.extent(0, 1, true)]), Err(Error::NoVm(1)));
    assert_eq!(rig.device.vm_create(asid, label(1), Charge::default()), Err(Error::VmExists(1)));
    let ticket = pending(rig.device.unbind(asid, ALL));
    assert!(retired(&rig.log()).is_empty(), "an engine is inside");

    rig.let_go(&memory);
    rig.wait_retired(asid);
    let log = rig.log();
    assert!(matches!(log.last(), Some(Event::Retired(_))));
    assert!(
        log.iter().any(|e| matches!(e, Event::Flushed(_, t) if *t == ticket)),
        "flushed before it retired"
    );
    assert!(!done(&log).contains(&parked) && !done(&log).contains(&running));

    // The asid is free again, and nothing of the old VM is left to disturb the new one.
    let (asid, _) = vm_with_memory(&rig, 1);
    assert_eq!(rig.run(asid, &long()).errno, 0);
    assert_eq!(retired(&rig.log()).len(), 1);
    assert_eq!(Arc::strong_count(&memory.0), 1, "the old VM let go of its region");
}

#[test]
fn idle_vm_retires_from_an_engine() {
    let rig = Rig::paused(1);
    let asid = rig.vm(1);
    rig.device.vm_destroy(asid);
    assert!(rig.log().is_empty(), "never from the call itself");
    rig.go();
    rig.wait_retired(asid);
    assert_eq!(rig.device.unbind(asid, ALL), Flush::Done);
    assert_eq!(rig.device.resident_pages(asid), 0);
}

/// An engine still tells of the fault while the VM is destroyed: it must not retire before that call is over.
#[test]
fn vm_does_not_retire_while_its_fault_is_being_told() {
    let rig = Rig::new(2);
    let told = Arc::new(AtomicBool::new(false));
    let end_of_call = told.clone();
    rig.answer(move |device, fault| {
        device.vm_destroy(fault.asid);
        // Give the other engine every chance to retire the VM too early.
        for asid in 100..200 {
            device.vm_create(Asid(asid), label(asid), Charge::default()).unwrap();
            device.vm_destroy(Asid(asid));
            std::thread::yield_now();
        }
        end_of_call.store(true, Ordering::Release);
    });
    let asid = rig.vm(1);
    rig.submit(asid, 0, &[fill(C, 8, 1)]);
    rig.wait(|log| {
        let retired = retired(log).contains(&asid);
        assert!(!retired || told.load(Ordering::Acquire), "retired while its fault was being told");
        retired.then_some(())
    });
}

#[test]
fn churn_of_vms_retires_each_once() {
    let rig = Rig::new(2);
    rig.answer(|device, fault| device.resume(fault.stop, Verdict::Fail(errno::EFAULT)));
    let memory = Memory::new(16);
    for asid in 1..=300 {
        let vm = rig.vm(asid);
        rig.bind(vm, C, &memory, 0, 16);
        for ring in 0..4 {
            rig.submit(vm, ring, &[fill(C, 8, 1), fill(C + (1 << 40), 8, 1)]);
        }
        rig.device.vm_destroy(vm);
    }
    (1..=300).for_each(|asid| rig.wait_retired(Asid(asid)));
    let mut all = retired(&rig.log());
    all.sort_unstable();
    assert_eq!(all, (1..=300).map(Asid).collect::<Vec<_>>());
    assert_eq!(Arc::strong_count(&memory.0), 1);
}

#[test]
fn dropped_region_is_let_go_after_the_slice() {
    let rig = Rig::new(1);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let kept = Memory::new(4);
    rig.bind(asid, C + (1 << 30), &kept, 0, 4);
    let held = rig.hold(asid, &memory);
    std::thread::scope(|scope| {
        let dropping = scope.spawn(|| rig.device.drop_region(asid, memory.0.id()));
        for _ in 0..1000 {
            assert!(!dropping.is_finished(), "dropped under a slice that uses it");
            std::thread::yield_now();
        }
        rig.let_go(&memory);
        dropping.join().unwrap();
    });
    assert_eq!(Arc::strong_count(&memory.0), 1);
    assert_eq!(rig.device.resident_pages(asid), 4);
    assert_eq!(rig.end_of(held).errno, 0);
    rig.device.drop_region(asid, 123_456);
    rig.submit(asid, 0, &[copy(C, C + (1 << 30), 8)]);
    assert_eq!(rig.fault(0).addr, GpuAddr(C));
}

#[test]
fn tables_of_unbound_pages_are_freed_beside_running_jobs() {
    let rig = Rig::new(2);
    let (asid, memory) = vm_with_memory(&rig, 1);
    let busy: Vec<_> =
        (0..2).map(|ring| rig.submit(asid, ring, &[word_op(OP_SEM_WAIT, C + 8 * ring as u64, 1)])).collect();
    for ring in 2..6 {
        rig.submit(asid, ring, &[fill(C + PAGE_SIZE, 15 * PAGE_SIZE, 1); 1000]);
    }
    let mut last = None;
    // Far more than the bound on tables, each page in a table of its own.
    for i in 0..40_000u64 {
        let page = (1 << 30) + i * 512;
        rig.device.bind(asid, GpuAddr(page << 12), &[memory.extent(0, 1, true)]).unwrap();
        if let Flush::Pending(ticket) = rig.device.unbind(asid, PageRange { start: page, end: page + 1 }) {
            last = Some(ticket);
        }
    }
    if let Some(ticket) = last {
        rig.wait_flushed(asid, ticket);
    }
    memory.set(0, 1);
    memory.set(8, 1);
    busy.iter().for_each(|job| assert_eq!(rig.end_of(*job).errno, 0));
}

#[test]
fn panic_of_the_listener_does_not_stop_the_engine() {
    let rig = Rig::new(1);
    rig.answer(|_, _| panic!("a listener that panics, on purpose"));
    let (asid, _) = vm_with_memory(&rig, 1);
    rig.submit(asid, 1, &[fill(C + (1 << 30), 8, 1)]);
    rig.fault(0);
    assert_eq!(rig.run(asid, &[Packet::default()]).errno, 0);
    assert_eq!(rig.device.panics(), 1);
}

#[test]
fn events_without_an_owner_are_dropped() {
    let rig = Rig::paused(1);
    let gone: Arc<dyn Events> = Arc::new(Recorder {
        device: Weak::new(),
        log: Mutex::default(),
        news: Condvar::new(),
        answer: OnceLock::new(),
    });
    rig.device.start(Arc::downgrade(&gone));
    drop(gone);
    let (asid, memory) = vm_with_memory(&rig, 1);
    rig.submit(asid, 0, &[word_op(OP_SEM_SIGNAL, C, 3)]);
    while memory.get(0) != 3 {
        std::thread::yield_now();
    }
}

#[test]
fn shutdown_returns_engines_with_jobs_left() {
    let rig = Rig::new(2);
    let (asid, _) = vm_with_memory(&rig, 1);
    for ring in 0..8 {
        rig.submit(asid, ring, &[fill(C + PAGE_SIZE, 15 * PAGE_SIZE, 1); 1000]);
    }
    rig.submit(asid, 9, &[word_op(OP_SEM_WAIT, C, 1)]);
    drop(rig);
}

#[test]
fn jobs_without_end_are_ended_and_others_are_not() {
    let rig = Rig::limited(1, Some(Duration::from_millis(30)));
    rig.go();
    let (endless, memory) = vm_with_memory(&rig, 1);
    memory.set(0, C);
    let chasing = rig.submit(endless, 0, &[chase(C + 64, C, u64::MAX, 0)]);
    let waiting = rig.submit(endless, 1, &[word_op(OP_SEM_WAIT, C + 128, 1)]);
    let (other, _) = vm_with_memory(&rig, 2);
    let bystander = rig.submit(other, 0, &long());
    let behind = rig.submit(endless, 0, &[Packet::default()]);
    for (job, addr) in [(chasing, C + 64), (waiting, C + 128)] {
        let end = rig.end_of(job);
        assert_eq!((end.errno, end.packet, end.addr.0), (errno::ETIMEDOUT, 0, addr));
    }
    assert_eq!((rig.end_of(bystander).errno, rig.end_of(behind).errno), (0, 0));
}

#[test]
fn time_at_a_fault_or_frozen_costs_nothing() {
    let rig = Rig::limited(1, Some(Duration::from_millis(500)));
    rig.go();
    let (asid, memory) = vm_with_memory(&rig, 1);
    let waiting = rig.submit(asid, 0, &[word_op(OP_SEM_WAIT, C, 1)]);
    let faulting = rig.submit(asid, 1, &[fill(C + 16 * PAGE_SIZE, 8, 1)]);
    let stop = rig.fault(0).stop;
    if let Flush::Pending(_) = rig.device.set_frozen(asid, true) {}
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(rig.device.set_frozen(asid, false), Flush::Done);
    memory.set(0, 1);
    rig.bind(asid, C + 16 * PAGE_SIZE, &Memory::new(1), 0, 1);
    rig.device.resume(stop, Verdict::Retry);
    assert_eq!((rig.end_of(waiting).errno, rig.end_of(faulting).errno), (0, 0));
}

fn nops(count: usize) -> Box<ActiveJob> {
    let packets = vec![Packet::default(); count];
    Box::new(ActiveJob::new(Job { id: JobId(1), ring_idx: 0, packets }))
}

/// Whoever waits for an engine waits for a sixteenth of a slice, and the job gets on all the same.
#[test]
fn slice_that_is_waited_for_ends_soon() {
    let slices = |hurry| {
        let (_, vm) = bare(true);
        vm.hurry.store(hurry, Ordering::Relaxed);
        let mut job = nops(1024);
        let mut slice = || job.run(vm.memory.view().memory(), 1 << 48, &vm.hurry).halt;
        (1..).find(|_| matches!(slice(), Halt::End(_))).unwrap()
    };
    assert_eq!((slices(false), slices(true)), (4, 64));
}

#[test]
fn flush_bar_and_end_of_a_vm_are_waited_for_and_the_next_turn_is_not() {
    let waits: [fn(&mut Sched, Asid); 4] = [
        |sched, asid| assert!(matches!(sched.flush(asid), Flush::Pending(_))),
        |sched, asid| assert!(matches!(sched.set_frozen(asid, true), Flush::Pending(_))),
        |sched, asid| sched.set_barred(asid, true),
        |sched, asid| drop(sched.vm_destroy(asid)),
    ];
    let mut turns = 0;
    for wait in waits {
        let (mut sched, vm) = bare(true);
        sched.submit(vm.asid, 0, nops(1024)).unwrap();
        let mut turn = turn_of(&mut sched);
        let hurry = || vm.hurry.load(Ordering::Relaxed);
        assert!(!hurry());
        wait(&mut sched, vm.asid);
        assert!(hurry());
        let end = turn.job.run(vm.memory.view().memory(), 1 << 48, &vm.hurry);
        drop(sched.end_turn(0, turn, end));
        _ = sched.set_frozen(vm.asid, false);
        sched.set_barred(vm.asid, false);
        if let Some(Next::Run(_)) = sched.next(0) {
            assert!(!hurry());
            turns += 1;
        }
    }
    assert_eq!(turns, 3, "all but the one that has ended go on");
}
