//! What the kinds differ in: jobs that end for want of a fault, faults for groups of pages, and null translations.
use super::*;

const OK: i32 = 0;
const ALL: PageRange = PageRange { start: 0, end: 1 << 36 };

fn pages(addr: u64, count: u64) -> PageRange {
    PageRange { start: addr >> 12, end: (addr >> 12) + count }
}

#[test]
#[should_panic(expected = "cannot be")]
fn cpu_addresses_without_faults_are_refused() {
    let (fault_model, address_model) = (FaultModel::None, AddressModel::Identity);
    SoftDevice::new(SoftConfig { fault_model, address_model, ..config(1) });
}

#[test]
fn missing_page_without_faults_ends_the_job_there() {
    let rig = Rig::without_faults(1);
    let (asid, memory) = (rig.vm(1), Memory::new(2));
    rig.bind(asid, C, &memory, 0, 1);
    let bad = rig.submit(asid, 0, &[Packet::default(), fill(C, 2 * PAGE_SIZE, 1)]);
    let next = rig.submit(asid, 0, &[word_op(OP_ATOMIC_ADD, C, 1)]);
    let addr = GpuAddr(C + PAGE_SIZE);
    assert_eq!(rig.end_of(bad), JobEnd { errno: errno::EFAULT, packet: 1, addr, access: Access::Write });
    assert_eq!((rig.end_of(next).errno, memory.get(0)), (OK, 2));
    assert_eq!((faults(&rig.log()).len(), rig.device.faults_raised()), (0, 0));
}

#[test]
fn read_only_page_without_faults_ends_the_job_with_eperm() {
    let rig = Rig::without_faults(1);
    let (asid, memory) = (rig.vm(1), Memory::new(1));
    rig.device.bind(asid, GpuAddr(C), &[memory.extent(0, 1, false)]).unwrap();
    let end = rig.run(asid, &[word_op(OP_ATOMIC_ADD, C + 8, 1)]);
    let addr = GpuAddr(C + 8);
    assert_eq!(end, JobEnd { errno: errno::EPERM, packet: 0, addr, access: Access::Atomic });
    assert!(rig.device.ledger().0.is_empty());
}

#[test]
fn miss_of_a_frozen_vm_is_repeated_once_it_is_thawed() {
    let rig = Rig::without_faults(1);
    let (asid, memory, gate) = (rig.vm(1), Memory::new(1), Memory::new(1));
    rig.bind(asid, C, &gate, 0, 1);
    let hold = packet(OP_HOLD, |p| p.dst = C.into());
    let job = rig.submit(asid, 0, &[hold, fill(C + PAGE_SIZE, 8, 5)]);
    while gate.get(8) == 0 {
        std::thread::yield_now();
    }
    let Flush::Pending(ticket) = rig.device.set_frozen(asid, true) else { panic!("no slice is held") };
    rig.let_go(&gate);
    rig.wait_flushed(asid, ticket);
    rig.bind(asid, C + PAGE_SIZE, &memory, 0, 1);
    assert_eq!(rig.device.set_frozen(asid, false), Flush::Done);
    assert_eq!((rig.end_of(job).errno, memory.get(0)), (OK, 5));
}

/// Freeze, unbind, bind elsewhere and thaw, all within one slice, which looked its page up in between.
#[test]
fn miss_under_a_freeze_that_is_over_is_repeated() {
    let (mut sched, vm) = bare(false);
    let (asid, memory) = (vm.asid, Memory::new(1));
    let job = Job { id: JobId(1), ring_idx: 0, packets: vec![fill(C, 8, 5)] };
    sched.submit(asid, 0, Box::new(ActiveJob::new(job))).unwrap();

    let mut first = turn_of(&mut sched);
    assert!(matches!(sched.set_frozen(asid, true), Flush::Pending(_)));
    let slice = first.job.run(vm.memory.view().memory(), 1 << 48, &vm.hurry);
    assert!(matches!(slice.halt, Halt::Fault(..)));
    vm.memory.bind(C >> 12, &[memory.extent(0, 1, true)]).unwrap();
    assert_eq!(sched.set_frozen(asid, false), Flush::Done);
    let (report, over) = sched.end_turn(0, first, slice);
    assert!(report.is_some_and(|r| r.done.is_none() && r.fault.is_none()) && over.is_none());

    let mut second = turn_of(&mut sched);
    let slice = second.job.run(vm.memory.view().memory(), 1 << 48, &vm.hurry);
    assert!(matches!(slice.halt, Halt::End(JobEnd { errno: OK, .. })));
    assert_eq!(memory.get(0), 5);
}

/// The same job, without a freeze after its slice began: it ends, also when the VM was frozen before.
#[test]
fn miss_after_a_freeze_ends_the_job() {
    let rig = Rig::without_faults(1);
    let asid = rig.vm(1);
    assert_eq!(rig.device.set_frozen(asid, true), Flush::Done);
    let job = rig.submit(asid, 0, &[fill(C, 8, 5)]);
    assert_eq!(rig.device.set_frozen(asid, false), Flush::Done);
    assert_eq!(rig.end_of(job).errno, errno::EFAULT);
}

#[test]
fn group_ends_with_the_packet_the_bound_or_a_page_that_is_there() {
    let rig = Rig::identity(1);
    let (asid, memory) = (rig.vm(1), Memory::new(64));
    let asked = |n: usize| {
        let fault = rig.fault(n);
        (fault.addr.0 - C, fault.pages, fault.length_hint)
    };
    let job = rig.submit(asid, 0, &[fill(C + 0xff8, 0x2010, 1), reduce(C, C + 0x1000, 0xc000)]);
    assert_eq!(asked(0), (0xff8, 4, 0x2010));
    rig.bind(asid, C, &memory, 0, 1);
    rig.bind(asid, C + 0x2000, &memory, 2, 1);
    rig.device.resume(rig.fault(0).stop, Verdict::Retry);
    assert_eq!(asked(1), (0x1000, 1, 0x2008), "page 2 is there");
    rig.bind(asid, C + 0x1000, &memory, 1, 3);
    rig.device.resume(rig.fault(1).stop, Verdict::Retry);
    assert_eq!(asked(2), (0x4000, u64::from(MAX_GROUP_PAGES), 0x9000));
    rig.bind(asid, C + 0x4000, &memory, 4, 8);
    rig.device.resume(rig.fault(2).stop, Verdict::Retry);
    assert_eq!(asked(3), (0xc000, 1, 0x1000));
    rig.bind(asid, C + 0xc000, &memory, 12, 1);
    rig.device.resume(rig.fault(3).stop, Verdict::Retry);
    assert_eq!((rig.end_of(job).errno, memory.get(0)), (OK, 0x401));
}

#[test]
fn group_of_a_write_counts_pages_that_are_read_only() {
    let rig = Rig::identity(1);
    let (asid, memory) = (rig.vm(1), Memory::new(4));
    rig.device.bind(asid, GpuAddr(C), &[memory.extent(0, 3, false)]).unwrap();
    rig.submit(asid, 0, &[copy(C + 0x1000, C, 0x3000)]);
    let fault = rig.fault(0);
    assert_eq!((fault.addr.0, fault.pages, fault.access), (C + 0x1000, 3, Access::Write));
}

#[test]
fn identity_device_has_no_null_translations() {
    let rig = Rig::identity(1);
    let asid = rig.vm(1);
    assert!(!rig.device.info().null_mappings);
    assert_eq!(rig.device.bind_null(asid, pages(C, 1)), Err(Error::Unsupported));
}

#[test]
fn null_pages_read_as_zero_after_every_kind_of_write() {
    let rig = Rig::new(2);
    let (asid, memory) = (rig.vm(1), Memory::new(8));
    memory.scribble();
    let before = memory.read(0, 2 * PAGE_SIZE);
    rig.bind(asid, C, &memory, 0, 8);
    let null = C + (1 << 21);
    rig.device.bind_null(asid, pages(null, 600)).unwrap();
    let writes = [
        fill(null, 600 * PAGE_SIZE, 7),
        copy(null + 1, C, 2 * PAGE_SIZE),
        reduce(null + 64, C, 64),
        axpy(null, C, PAGE_SIZE, 2.0),
        chase(null + 520 * PAGE_SIZE - 8, null + 8, 3, 0),
        word_op(OP_ATOMIC_ADD, null + 8, 1),
        word_op(OP_SEM_SIGNAL, null + 16, 1),
        word_op(OP_SEM_WAIT, null + 16, 0),
    ];
    assert_eq!(rig.run(asid, &writes).errno, OK);
    assert!(memory.read(0, 2 * PAGE_SIZE) == before);
    let reads = [
        copy(C + 3 * PAGE_SIZE + 1, null + 3, PAGE_SIZE + 5),
        reduce(C + 5 * PAGE_SIZE, null, 600 * PAGE_SIZE),
        chase(C + 6 * PAGE_SIZE, null + 16, 9, 0),
        axpy(C, null, PAGE_SIZE, 2.0),
    ];
    for i in 0..512 {
        memory.set(8 * i, 3.0f64.to_bits());
    }
    assert_eq!(rig.run(asid, &reads).errno, OK);
    assert!(memory.read(3 * PAGE_SIZE + 1, PAGE_SIZE + 5).iter().all(|octet| *octet == 0));
    let words = [0, 5 * PAGE_SIZE, 6 * PAGE_SIZE, 6 * PAGE_SIZE + 8].map(|offset| memory.get(offset));
    assert_eq!(words, [3.0f64.to_bits(), 0, 1, 0]);
    assert!(faults(&rig.log()).is_empty());
}

/// A copy from here to there through null pages, byte by byte, and one whose overlapping parts are null.
#[test]
fn copy_across_null_and_bound_pages_keeps_the_bound_bytes() {
    let rig = Rig::new(1);
    let (asid, memory) = (rig.vm(1), Memory::new(8));
    memory.scribble();
    rig.bind(asid, C, &memory, 0, 8);
    rig.device.bind_null(asid, pages(C + 0x1000, 1)).unwrap();
    let source = memory.read(0, 3 * PAGE_SIZE);
    assert_eq!(rig.run(asid, &[copy(C + 0x5003, C, 3 * PAGE_SIZE - 8)]).errno, OK);
    let mut wanted = source;
    wanted[0x1000..0x2000].fill(0);
    assert!(memory.read(0x5003, 3 * PAGE_SIZE - 8) == wanted[..3 * PAGE_SIZE as usize - 8]);
}

#[test]
fn null_pages_are_replaced_by_bind_and_dropped_by_unbind() {
    let rig = Rig::new(1);
    let (asid, memory) = (rig.vm(1), Memory::new(1));
    rig.device.bind_null(asid, pages(C, 4)).unwrap();
    assert_eq!(rig.device.resident_pages(asid), 4);
    assert_eq!(rig.device.resident_in(asid, pages(C + 0x3000, 1)), 1);
    rig.bind(asid, C + 0x1000, &memory, 0, 1);
    assert_eq!((rig.run(asid, &[fill(C, 0x4000, 9)]).errno, memory.get(0)), (OK, 9));
    rig.device.bind_null(asid, pages(C + 0x1000, 1)).unwrap();
    assert_eq!((rig.run(asid, &[fill(C, 0x4000, 8)]).errno, memory.get(0)), (OK, 9));
    rig.device.drop_region(asid, memory.0.id());
    assert_eq!(rig.device.resident_pages(asid), 4, "no null page is a region's");
    assert_eq!(rig.device.unbind(asid, pages(C + 0x3000, 1)), Flush::Done);
    rig.submit(asid, 0, &[fill(C, 0x4000, 1)]);
    assert_eq!(rig.fault(0).addr, GpuAddr(C + 0x3000));
    assert_eq!(rig.device.unbind(asid, ALL), Flush::Done);
    assert_eq!(rig.device.resident_pages(asid), 0);
}

/// Its word is 0 until something else is bound there; then it looks again by itself.
#[test]
fn wait_at_a_null_page_goes_on_when_memory_is_bound() {
    let rig = Rig::new(1);
    let (asid, memory) = (rig.vm(1), Memory::new(1));
    memory.set(0, 5);
    rig.device.bind_null(asid, pages(C, 1)).unwrap();
    let waits = rig.submit(asid, 0, &[word_op(OP_SEM_WAIT, C, 5)]);
    let signals = rig.submit(asid, 1, &[word_op(OP_SEM_SIGNAL, C, 5)]);
    assert_eq!(rig.end_of(signals).errno, OK);
    assert_eq!(done(&rig.log()), [signals]);
    rig.bind(asid, C, &memory, 0, 1);
    assert_eq!(rig.end_of(waits).errno, OK);
}

#[test]
fn null_range_beyond_the_tables_bound_changes_nothing() {
    let rig = Rig::with(SoftConfig { va_bits: 57, ..config(1) });
    let (asid, memory) = (rig.vm(1), Memory::new(1));
    rig.bind(asid, C, &memory, 0, 1);
    let all = PageRange { start: 0, end: 1 << 45 };
    assert_eq!(rig.device.bind_null(asid, all), Err(Error::OutOfMemory));
    // One that would fit alone, but not with the directories above it.
    let most = PageRange { start: 0, end: ((128 << 20) / (512 * 24)) << 18 };
    assert_eq!(rig.device.bind_null(asid, most), Err(Error::OutOfMemory));
    assert_eq!(rig.device.resident_pages(asid), 1);
    let large = PageRange { start: 1 << 30, end: (1 << 30) + (1 << 28) };
    rig.device.bind_null(asid, large).unwrap();
    assert_eq!(rig.device.resident_pages(asid), 1 + (1 << 28));
}
