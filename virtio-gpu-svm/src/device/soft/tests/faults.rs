//! Faults: what they tell, that nothing has happened before they are answered, and that they reach their owner only.
use super::*;
use std::collections::BTreeMap;

const OK: i32 = 0;

fn bind_page(device: &SoftDevice, fault: Fault, memory: &Memory, writable: bool) {
    let page = fault.addr.page() - (C >> 12);
    device.bind(fault.asid, fault.addr.page_start(), &[memory.extent(page, 1, writable)]).unwrap();
}

/// Binds the faulting page of the memory at [`C`], and resumes.
fn serve(memory: &Memory) -> impl Fn(&SoftDevice, Fault) + Send + Sync + 'static {
    let memory = memory.clone();
    move |device, fault| {
        bind_page(device, fault, &memory, true);
        device.resume(fault.stop, Verdict::Retry);
    }
}

#[test]
fn fault_tells_what_was_touched() {
    let rig = Rig::new(1);
    let asid = rig.vm(5);
    let job = rig.submit(asid, 2, &[Packet::default(), copy(C + 0x1000, C + 0x2ffc, 0x5000)]);
    let fault = rig.fault(0);
    assert_eq!((fault.asid, fault.job, fault.addr), (asid, job, GpuAddr(C + 0x2ffc)));
    assert_eq!((fault.length_hint, fault.access, fault.level, fault.engine), (0x5000, Access::Read, 3, 0));

    let memory = Memory::new(16);
    rig.bind(asid, C + 0x2000, &memory, 2, 1);
    rig.device.resume(fault.stop, Verdict::Retry);
    let fault = rig.fault(1);
    assert_eq!((fault.addr, fault.length_hint), (GpuAddr(C + 0x1000), 0x5000));
    assert_eq!((fault.access, fault.level), (Access::Write, 0));

    rig.bind(asid, C + 0x1000, &memory, 1, 1);
    rig.device.resume(fault.stop, Verdict::Retry);
    let fault = rig.fault(2);
    assert_eq!((fault.addr, fault.length_hint, fault.access), (GpuAddr(C + 0x3000), 0x4ffc, Access::Read));
    assert_eq!(rig.device.faults_raised(), 3);
}

#[test]
fn every_packet_runs_from_nothing_resident() {
    let rig = Rig::new(2);
    let asid = rig.vm(1);
    let memory = Memory::new(64);
    rig.answer(serve(&memory));
    for i in 0..8 * 512 {
        memory.set(8 * i, 1);
    }
    let at = |page: u64| C + page * PAGE_SIZE;
    memory.set(40 * PAGE_SIZE - 8, 0);
    let packets = [
        reduce(at(32), at(0), 8 * PAGE_SIZE),
        copy(at(8) + 1, at(0) + 1, 8 * PAGE_SIZE - 2),
        fill(at(16), 8 * PAGE_SIZE, 2.0f64.to_bits()),
        fill(at(24), 8 * PAGE_SIZE, 3.0f64.to_bits()),
        axpy(at(16), at(24), 8 * PAGE_SIZE, 10.0),
        chase(at(34) - 8, at(40) - 8, 10, 0),
        word_op(OP_ATOMIC_ADD, at(44), 6),
        word_op(OP_SEM_SIGNAL, at(45), 7),
        word_op(OP_SEM_WAIT, at(46), 0),
    ];
    memory.set(40 * PAGE_SIZE, 99);
    assert_eq!(rig.run(asid, &packets).errno, OK);
    assert_eq!(memory.get(32 * PAGE_SIZE), 8 * 512);
    assert!(memory.read(8 * PAGE_SIZE + 1, 8 * PAGE_SIZE - 2) == memory.read(1, 8 * PAGE_SIZE - 2));
    assert!((0..8 * 512).all(|i| memory.get(16 * PAGE_SIZE + 8 * i) == 32.0f64.to_bits()));
    assert_eq!((memory.get(34 * PAGE_SIZE - 8), memory.get(34 * PAGE_SIZE)), (1, 99));
    assert_eq!((memory.get(44 * PAGE_SIZE), memory.get(45 * PAGE_SIZE)), (6, 7));

    // Geometry: pages 0..32 of the four ranges, and the lone ones; each was raised exactly once.
    let mut pages: Vec<u64> = rig.device.ledger().0.iter().map(|e| e.page - (C >> 12)).collect();
    pages.sort_unstable();
    let lone = [32, 33, 34, 39, 40, 44, 45, 46];
    assert_eq!(pages, (0..32).chain(lone).collect::<Vec<_>>());
}

#[test]
fn result_across_two_pages_is_stored_whole_or_not() {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let memory = Memory::new(4);
    rig.bind(asid, C, &memory, 0, 1);
    memory.set(PAGE_SIZE - 8, 5);
    memory.set(64, 0);
    rig.submit(asid, 0, &[chase(C + PAGE_SIZE - 8, C + 64, 3, 0)]);
    let fault = rig.fault(0);
    assert_eq!((fault.addr, fault.access), (GpuAddr(C + PAGE_SIZE), Access::Write));
    assert_eq!(memory.get(PAGE_SIZE - 8), 5);
}

#[test]
fn write_to_read_only_page_faults_as_write() {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let memory = Memory::new(1);
    memory.set(0, 11);
    rig.device.bind(asid, GpuAddr(C), &[memory.extent(0, 1, false)]).unwrap();
    assert_eq!(rig.run(asid, &[word_op(OP_SEM_WAIT, C, 11)]).errno, OK);

    let job = rig.submit(asid, 0, &[word_op(OP_SEM_SIGNAL, C, 12)]);
    assert_eq!((rig.fault(0).access, rig.fault(0).level), (Access::Write, 0));
    rig.device.resume(rig.fault(0).stop, Verdict::Fail(errno::EPERM));
    let end = rig.end_of(job);
    assert_eq!(end, JobEnd { errno: errno::EPERM, packet: 0, addr: GpuAddr(C), access: Access::Write });

    let job = rig.submit(asid, 0, &[word_op(OP_ATOMIC_ADD, C, 1)]);
    assert_eq!(rig.fault(1).access, Access::Atomic);
    assert_eq!(memory.get(0), 11);
    rig.bind(asid, C, &memory, 0, 1);
    rig.device.resume(rig.fault(1).stop, Verdict::Retry);
    assert_eq!(rig.end_of(job).errno, OK);
    assert_eq!(memory.get(0), 12);
}

#[test]
fn failed_job_lets_the_next_of_its_ring_run() {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let bad = rig.submit(asid, 0, &[Packet::default(), fill(C, 64, 0)]);
    let good = rig.submit(asid, 0, &[Packet::default()]);
    rig.device.resume(rig.fault(0).stop, Verdict::Fail(errno::EFAULT));
    let wanted = JobEnd { errno: errno::EFAULT, packet: 1, addr: GpuAddr(C), access: Access::Write };
    assert_eq!((rig.end_of(bad), rig.end_of(good).errno), (wanted, OK));
}

#[test]
fn retry_without_a_translation_faults_again_under_a_new_stop() {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    rig.submit(asid, 0, &[fill(C, 8, 1)]);
    let first = rig.fault(0);
    rig.device.resume(first.stop, Verdict::Retry);
    let second = rig.fault(1);
    assert_eq!((first.addr, first.job), (second.addr, second.job));
    assert_ne!(first.stop, second.stop);
    // The first is spent: it must not release the second.
    rig.device.resume(first.stop, Verdict::Fail(errno::EFAULT));
    rig.device.resume(StopId(12345), Verdict::Retry);
    rig.bind(asid, C, &Memory::new(1), 0, 1);
    rig.device.resume(second.stop, Verdict::Retry);
    rig.wait(|log| (!done(log).is_empty()).then_some(()));
    assert_eq!(faults(&rig.log()).len(), 2);
}

#[test]
fn unbound_page_faults_again() {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let memory = Memory::new(4);
    rig.bind(asid, C, &memory, 0, 4);
    assert_eq!(rig.run(asid, &[fill(C, 4 * PAGE_SIZE, 1)]).errno, OK);
    let page = (C >> 12) + 2;
    assert_eq!(rig.device.unbind(asid, PageRange { start: page, end: page + 1 }), Flush::Done);
    assert_eq!(rig.device.resident_pages(asid), 3);
    rig.submit(asid, 0, &[fill(C, 4 * PAGE_SIZE, 2)]);
    assert_eq!(rig.fault(0).addr.page(), page);
    assert_eq!((memory.get(0), memory.get(2 * PAGE_SIZE)), (2, 1));
}

#[test]
fn ledger_keeps_the_newest() {
    let device = SoftDevice::new(SoftConfig { ledger: Some(2), ..config(1) });
    let push = |page| {
        let entry = LedgerEntry { label: label(1), asid: Asid(1), page, access: Access::Read };
        device.ledger.as_ref().unwrap().lock().unwrap().push(entry);
    };
    (0..5).for_each(push);
    let (entries, overwritten) = device.ledger();
    assert_eq!((entries.iter().map(|e| e.page).collect::<Vec<_>>(), overwritten), (vec![3, 4], 3));
}

/// All VMs map one C to memory of their own, nothing is resident, and every page is touched once for each access: the
/// ledger must hold exactly what the geometry says, and each VM its own bytes.
#[test]
fn storm_of_vms_on_one_address_reaches_each_owner() {
    const VMS: u32 = 40;
    const PAGES: u64 = 12;
    let rig = Rig::new(3);
    let memories: BTreeMap<u32, Memory> = (1..=VMS).map(|asid| (asid, Memory::new(2 * PAGES))).collect();
    let served = memories.clone();
    rig.answer(move |device, fault| {
        bind_page(device, fault, &served[&fault.asid.0], true);
        device.resume(fault.stop, Verdict::Retry);
    });
    let half = PAGES * PAGE_SIZE;
    let mut jobs = Vec::new();
    for (asid, memory) in &memories {
        (0..half / 8).for_each(|i| memory.set(8 * i, u64::from(*asid)));
        let vm = rig.vm(*asid);
        jobs.push(rig.submit(vm, 0, &[copy(C + half, C, half)]));
    }
    for job in jobs {
        assert_eq!(rig.end_of(job).errno, OK);
    }
    for (asid, memory) in &memories {
        assert!((0..half / 8).all(|i| memory.get(half + 8 * i) == u64::from(*asid)), "vm {asid}");
    }
    let mut raised: Vec<_> =
        rig.device.ledger().0.iter().map(|e| (e.label.ctx_id, e.page, e.access)).collect();
    raised.sort_unstable();
    let pages = |asid: u32| {
        let page = move |page| {
            (asid * 10, (C >> 12) + page, if page < PAGES { Access::Read } else { Access::Write })
        };
        (0..2 * PAGES).map(page)
    };
    assert_eq!(raised, (1..=VMS).flat_map(pages).collect::<Vec<_>>());
    assert_eq!(rig.device.faults_raised(), u64::from(VMS) * 2 * PAGES);
}
