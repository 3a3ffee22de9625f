//! What each packet computes, and which packets are refused.
use super::*;

/// One VM with `pages` pages bound at [`C`], every second page of a region, so that no two are neighbours.
fn scattered(pages: u64) -> (Rig, Asid, Memory) {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let memory = Memory::new(2 * pages);
    let extents: Vec<_> = (0..pages).map(|i| memory.extent(2 * (pages - 1 - i), 1, true)).collect();
    rig.device.bind(asid, GpuAddr(C), &extents).unwrap();
    (rig, asid, memory)
}

/// One VM with a region bound at [`C`] as it is.
fn straight(pages: u64) -> (Rig, Asid, Memory) {
    let rig = Rig::new(1);
    let asid = rig.vm(1);
    let memory = Memory::new(pages);
    memory.scribble();
    rig.bind(asid, C, &memory, 0, pages);
    (rig, asid, memory)
}

const OK: JobEnd = JobEnd { errno: 0, packet: 0, addr: GpuAddr(0), access: Access::Read };

#[test]
fn job_without_packets_ends_well() {
    let (rig, asid, _) = straight(1);
    assert_eq!(rig.run(asid, &[]), OK);
    assert_eq!(rig.run(asid, &[Packet::default(); 1000]), OK);
}

#[test]
fn copy_of_any_alignment_moves_bytes() {
    let (rig, asid, memory) = straight(64);
    for (dst, src, len) in
        [(0x8003, 0x105, 9), (0x8001, 0x1ffd, 8197), (0x20000, 0x0, 0x10000), (0x8007, 0xff, 1)]
    {
        let wanted = memory.read(src, len);
        let (before, after) = (memory.read(dst - dst.min(8), dst.min(8)), memory.read(dst + len, 8));
        assert_eq!(rig.run(asid, &[copy(C + dst, C + src, len)]), OK);
        assert!(memory.read(dst, len) == wanted, "{len} bytes from {src:#x} to {dst:#x}");
        assert_eq!((memory.read(dst - dst.min(8), dst.min(8)), memory.read(dst + len, 8)), (before, after));
    }
}

#[test]
fn copy_over_itself_goes_byte_by_byte() {
    for distance in [1, 3, 8, 16, 4096] {
        let (rig, asid, memory) = straight(16);
        let mut model = memory.read(0, 16 * PAGE_SIZE);
        for i in 0..20_000 {
            model[100 + distance + i] = model[100 + i];
        }
        assert_eq!(rig.run(asid, &[copy(C + 100 + distance as u64, C + 100, 20_000)]), OK);
        assert!(memory.read(0, 16 * PAGE_SIZE) == model, "distance {distance}");
    }
}

#[test]
fn copy_downwards_over_itself_keeps_bytes() {
    let (rig, asid, memory) = straight(16);
    let wanted = memory.read(107, 20_000);
    assert_eq!(rig.run(asid, &[copy(C + 100, C + 107, 20_000)]), OK);
    assert!(memory.read(100, 20_000) == wanted);
}

#[test]
fn scattered_pages_are_one_range() {
    let (rig, asid, memory) = scattered(40);
    let len = 20 * PAGE_SIZE;
    let packets = [fill(C, len, 3), copy(C + len, C, len), reduce(C + 8, C + len, len)];
    assert_eq!(rig.run(asid, &packets), OK);
    // The first page of the range is the last but one of the region.
    assert_eq!(memory.get(78 * PAGE_SIZE + 8), 3 * len / 8);
    assert_eq!(memory.get(79 * PAGE_SIZE), 0, "a page between stays as it was");
}

#[test]
fn reduce_wraps() {
    let (rig, asid, memory) = straight(4);
    let wanted = (0..4 * PAGE_SIZE).step_by(8).fold(0u64, |sum, offset| sum.wrapping_add(memory.get(offset)));
    assert_eq!(rig.run(asid, &[reduce(C + 16, C, 4 * PAGE_SIZE)]), OK);
    assert_eq!(memory.get(16), wanted);
}

#[test]
fn axpy_adds_in_f64() {
    let (rig, asid, memory) = straight(8);
    for i in 0..1500u64 {
        memory.set(8 * i, (i as f64).to_bits());
        memory.set(4 * PAGE_SIZE + 8 * i, 0.5f64.to_bits());
    }
    assert_eq!(rig.run(asid, &[axpy(C + 4 * PAGE_SIZE, C, 8 * 1500, -2.0)]), OK);
    for i in 0..1500u64 {
        assert_eq!(f64::from_bits(memory.get(4 * PAGE_SIZE + 8 * i)), 0.5 - 2.0 * i as f64, "element {i}");
    }
}

/// A list at A, seen by the GPU at C != A: nodes in a shuffled order, the payload of node i is i + 1.
fn list(memory: &Memory, nodes: u64, a: u64) -> u64 {
    let place = |i: u64| (i * 7919 % nodes) * 24 + 8;
    for i in 0..nodes {
        memory.set(place(i), if i + 1 == nodes { 0 } else { a + place(i + 1) });
        memory.set(place(i) + 8, i + 1);
    }
    place(0)
}

#[test]
fn chase_follows_cpu_addresses_by_offset() {
    let (rig, asid, memory) = straight(64);
    let a = 0x5555_0000_0000;
    let first = list(&memory, 9000, a);
    let result = 63 * PAGE_SIZE;
    assert_eq!(rig.run(asid, &[chase(C + result, C + first, u64::MAX, C.wrapping_sub(a))]), OK);
    assert_eq!((memory.get(result), memory.get(result + 8)), (9000, 9000 * 9001 / 2));
}

#[test]
fn chase_stops_after_count() {
    let (rig, asid, memory) = straight(64);
    let first = list(&memory, 9000, C);
    let result = 63 * PAGE_SIZE;
    assert_eq!(rig.run(asid, &[chase(C + result, C + first, 100, 0)]), OK);
    assert_eq!((memory.get(result), memory.get(result + 8)), (100, 5050));
    assert_eq!(rig.run(asid, &[chase(C + result, C + first, 0, 0)]), OK);
    assert_eq!((memory.get(result), memory.get(result + 8)), (0, 0));
    memory.set(result, 1);
    assert_eq!(rig.run(asid, &[chase(C + result, 0, 5, 0)]), OK);
    assert_eq!(memory.get(result), 0, "address 0 is the end of the list");
}

#[test]
fn chase_to_bad_pointer_fails_with_its_address() {
    let (rig, asid, memory) = straight(2);
    for (next, errno) in
        [(C + 4, errno::EINVAL), ((1 << 48) - 8, errno::EFAULT), (u64::MAX - 7, errno::EFAULT)]
    {
        memory.set(64, next);
        memory.set(128, 77);
        let end = rig.run(asid, &[Packet::default(), chase(C + 128, C + 64, 9, 0)]);
        assert_eq!(end, JobEnd { errno, packet: 1, addr: GpuAddr(next), access: Access::Read });
        assert_eq!(memory.get(128), 77, "nothing is stored");
    }
}

#[test]
fn atomic_adds_of_all_engines_count() {
    let rig = Rig::new(3);
    let memory = Memory::new(1);
    memory.set(0, 0);
    let mut jobs = Vec::new();
    for asid in 1..=3 {
        let asid = rig.vm(asid);
        rig.bind(asid, C, &memory, 0, 1);
        for ring in 0..4 {
            jobs.push(rig.submit(asid, ring, &[word_op(OP_ATOMIC_ADD, C, 5); 1000]));
        }
    }
    for job in jobs {
        assert_eq!(rig.end_of(job), OK);
    }
    assert_eq!(memory.get(0), 3 * 4 * 1000 * 5);
}

#[test]
fn signal_comes_after_what_is_before_it() {
    let rig = Rig::new(2);
    let asid = rig.vm(1);
    let memory = Memory::new(65);
    rig.bind(asid, C, &memory, 0, 65);
    let (len, semaphore) = (32 * PAGE_SIZE, C + 64 * PAGE_SIZE);
    let waiter = [word_op(OP_SEM_WAIT, semaphore, 1), copy(C + len, C, len)];
    let waiter = rig.submit(asid, 1, &waiter);
    rig.submit(asid, 0, &[fill(C, len, 42), word_op(OP_SEM_SIGNAL, semaphore, 1)]);
    assert_eq!(rig.end_of(waiter), OK);
    assert!((0..len / 8).all(|i| memory.get(len + 8 * i) == 42));
}

#[test]
fn semaphore_set_by_the_guest_cpu_is_seen() {
    let (rig, asid, memory) = straight(1);
    memory.set(0, 4);
    let job = rig.submit(asid, 0, &[word_op(OP_SEM_WAIT, C, 5)]);
    // Another job runs beside, so the waiter is off the engine.
    assert_eq!(rig.end_of(rig.submit(asid, 1, &[Packet::default()])), OK);
    assert_eq!(done(&rig.log()).len(), 1);
    memory.set(0, 6);
    assert_eq!(rig.end_of(job), OK);
}

#[test]
fn semaphores_between_vms_play_ping_pong() {
    let rig = Rig::new(2);
    let memory = Memory::new(1);
    memory.set(0, 0);
    let turns = 200;
    let jobs: Vec<_> = (0..2)
        .map(|who| {
            let asid = rig.vm(who + 1);
            rig.bind(asid, C, &memory, 0, 1);
            let turn = |i: u64| [word_op(OP_SEM_WAIT, C, i), word_op(OP_SEM_SIGNAL, C, i + 1)];
            let packets: Vec<_> = (0..turns).filter(|i| i % 2 == u64::from(who)).flat_map(turn).collect();
            rig.submit(asid, 0, &packets)
        })
        .collect();
    for job in jobs {
        assert_eq!(rig.end_of(job), OK);
    }
    assert_eq!(memory.get(0), turns);
}

#[test]
fn panic_costs_its_job_alone() {
    let (rig, asid, memory) = straight(1);
    let bad = rig.run(asid, &[Packet::default(), packet(OP_PANIC, |_| ())]);
    assert_eq!(bad, JobEnd { errno: errno::EFAULT, packet: 1, addr: GpuAddr(0), access: Access::Read });
    assert_eq!(rig.device.panics(), 1);
    assert_eq!(rig.run(asid, &[word_op(OP_SEM_SIGNAL, C, 9)]), OK);
    assert_eq!(memory.get(0), 9);
}

#[test]
fn bad_packets_are_refused_with_their_index() {
    let rig = Rig::new(1);
    let top = 1u64 << 48;
    let bad = [
        packet(OP_NOP, |p| p.dst = 8.into()),
        packet(OP_NOP, |p| p.flags = 1.into()),
        packet(OP_NOP, |p| p.reserved[1] = 1.into()),
        copy(C, C, 0),
        copy(C, top - 8, 9),
        copy(top - 8, C, 9),
        copy(u64::MAX, C, 2),
        copy(C, C, u64::MAX),
        packet(OP_COPY, |p| (p.len, p.value) = (8.into(), 1.into())),
        packet(OP_COPY, |p| (p.len, p.arg) = (8.into(), 1.into())),
        fill(C + 1, 8, 0),
        fill(C, 12, 0),
        fill(C, 0, 0),
        fill(top, 8, 0),
        packet(OP_FILL, |p| (p.len, p.src) = (8.into(), 8.into())),
        reduce(C + 4, C, 8),
        reduce(C, C + 4, 8),
        reduce(top, C, 8),
        reduce(C, C, 0),
        axpy(C, C, 4, 1.0),
        axpy(C + 4, C, 8, 1.0),
        packet(OP_AXPY, |p| (p.len, p.arg) = (8.into(), 8.into())),
        chase(C, C + 4, 1, 0),
        chase(C + 4, C, 1, 0),
        chase(C, top - 8, 1, 0),
        chase(top - 8, C, 1, 0),
        packet(OP_CHASE, |p| p.len = 8.into()),
        word_op(OP_ATOMIC_ADD, C + 1, 1),
        word_op(OP_SEM_WAIT, top, 1),
        word_op(OP_SEM_SIGNAL, u64::MAX - 7, 1),
        packet(OP_SEM_SIGNAL, |p| p.len = 8.into()),
        packet(OP_SEM_WAIT, |p| p.src = 8.into()),
        packet(OP_ATOMIC_ADD, |p| p.arg = 8.into()),
    ];
    for (case, packet) in bad.into_iter().enumerate() {
        let refused = rig.device.check_packets(&[Packet::default(), packet]);
        assert_eq!(refused, Err(Error::BadOperand { index: 1 }), "case {case}");
    }
    let unknown = packet(9, |_| ());
    assert_eq!(rig.device.check_packets(&[unknown]), Err(Error::UnknownOpcode { index: 0 }));
    assert_eq!(rig.device.check_packets(&[copy(top - 8, C, 8), chase(top - 16, top - 16, 1, 1)]), Ok(()));
}

#[test]
fn capabilities_name_every_opcode() {
    let rig = Rig::new(2);
    let info = rig.device.info();
    assert_eq!((info.num_engines, info.va_bits, info.name.as_str()), (2, 48, "soft3"));
    for opcode in 0..64 {
        let listed = info.opcodes >> opcode & 1 == 1;
        let known =
            rig.device.check_packets(&[packet(opcode, |_| ())]) != Err(Error::UnknownOpcode { index: 0 });
        assert_eq!(listed, known, "opcode {opcode}");
    }
}
