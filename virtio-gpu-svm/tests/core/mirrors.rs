//! Mirror windows: CPU address = GPU address + offset, populated by faults, carved and mirrored again.

use crate::mock::{A, C, GPA, LIMITS, World, map, run, unmap};
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::control::PAGE_RESP_SUCCESS;
use virtio_gpu_svm::protocol::errno::{EBUSY, EINVAL};
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::request::{BIND_CPU_ADDR_MIRROR, BIND_OP_MAP, BindOp};
use zerocopy::FromBytes;

/// GPU addresses of the mock device end here.
const GPU_END: u64 = 1 << 40;

fn mirror(gpu: u64, offset: i64, pages: u64) -> BindOp {
    let (op, flags) = (BIND_OP_MAP.into(), BIND_CPU_ADDR_MIRROR.into());
    BindOp { op, flags, obj_offset: offset.cast_unsigned().into(), ..map(gpu, 0, pages) }
}
fn with_vm() -> (World, u32, u32) {
    let w = World::new();
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    (w, vm, asid)
}
fn last_fault(w: &World) -> FaultRecord {
    FaultRecord::read_from_bytes(w.records().last().unwrap()).unwrap()
}

#[test]
fn whole_space_is_mirrored_for_nothing_and_populated_by_faults() {
    let (w, vm, asid) = with_vm();
    for offset in [0, 0x7f00_0000_0000 - 0x4_0000_0000, -0x3_0000_0000] {
        let base = if offset < 0 { 0x3_0000_0000 } else { 0 };
        let whole = mirror(base, offset, (GPU_END - base) / 4096);
        assert_eq!(w.bind(1, vm, &[unmap(0, GPU_END / 4096), whole]), 0);
        let status = &w.guest.contexts()[0];
        assert_eq!(
            (status.known_pages, status.vms[0].resident_pages, status.vms[0].mappings.len()),
            (0, 0, 1)
        );
        let stop = w.devices[0].raise(&w.host, asid, C + 0x1008, Access::Write);
        let fault = last_fault(&w);
        let cpu = (C + 0x1000).checked_add_signed(offset).unwrap();
        assert_eq!((fault.addr.get(), fault.cpu_addr.get()), (C + 0x1000, cpu));
        assert_eq!(
            w.respond(
                1,
                fault.cookie.get(),
                PAGE_RESP_SUCCESS,
                &[run(cpu, GPA, 1, w.guest.contexts()[0].inval_seq)]
            ),
            0
        );
        assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
        assert_eq!(w.devices[0].bound(asid, C + 0x1000), Some(GPA / 4096));
        w.invalidate(1, cpu, 4096);
        assert_eq!(w.devices[0].bound(asid, C + 0x1000), None, "an invalidation finds the page at C");
    }
}

#[test]
fn mirror_is_carved_and_mirrored_again() {
    let (w, vm, asid) = with_vm();
    let offset = A.cast_signed() - C.cast_signed();
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1024)]), 0);
    assert_eq!(w.bind(1, vm, &[map(C + 0x10_0000, 0x1000_0000, 16)]), 0);
    let mappings = w.guest.contexts()[0].vms[0].mappings.clone();
    let kinds: Vec<_> = mappings.iter().map(|m| (m.kind, m.gpu_start, m.cpu_start.unwrap())).collect();
    assert_eq!(
        kinds,
        [("mirror", C, A), ("userptr", C + 0x10_0000, 0x1000_0000), ("mirror", C + 0x11_0000, A + 0x11_0000)]
    );
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1024)]), 0);
    w.devices[0].raise(&w.host, asid, C + 0x10_0000, Access::Read);
    assert_eq!(last_fault(&w).cpu_addr.get(), A + 0x10_0000);
}

#[test]
fn cutting_a_populated_mirror_is_busy_until_it_is_invalidated() {
    let (w, vm, asid) = with_vm();
    assert_eq!(w.bind(1, vm, &[mirror(C, A.cast_signed() - C.cast_signed(), 64)]), 0);
    assert_eq!(w.supply(1, &[run(A, GPA, 16, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C, Access::Read);
    for op in [unmap(C, 64), unmap(C + 0xf000, 1), map(C, A, 1)] {
        assert_eq!(w.bind(1, vm, &[unmap(C + 0x20_0000, 1), op]), -EBUSY);
    }
    assert_eq!(w.guest.contexts()[0].vms[0].mappings.len(), 1, "nothing was done");
    assert_eq!(w.bind(1, vm, &[unmap(C + 0x1_0000, 8)]), 0, "beside the pages it may be cut");
    w.invalidate(1, A, 16 * 4096);
    assert_eq!(w.bind(1, vm, &[unmap(C, 64)]), 0);
    assert!(w.guest.contexts()[0].vms[0].mappings.is_empty());
}

#[test]
fn offset_out_of_the_canonical_range_is_refused() {
    let (w, vm, _) = with_vm();
    let top = 1_i64 << 56;
    for (gpu, offset) in [(0, -4096), (C, i64::MIN), (C, i64::MAX & !4095), (0, top - 4096), (C, 8)] {
        assert_eq!(w.bind(1, vm, &[mirror(gpu, offset, 2)]), -EINVAL, "{gpu:#x} {offset:#x}");
    }
    assert_eq!(w.bind(1, vm, &[mirror(0, top - 8192, 2)]), 0);
    let mut with_object = mirror(C, 0, 1);
    with_object.resource_id = 1.into();
    assert_eq!(w.bind(1, vm, &[with_object]), -EINVAL);
    let mut userptr = map(C, A, 1);
    userptr.flags = BIND_CPU_ADDR_MIRROR.into();
    assert_eq!(w.bind(1, vm, &[userptr]), -EINVAL);
}

#[test]
fn many_parts_are_looked_at_as_one() {
    let w = World::with_limits(Limits { mappings: 4096, ..LIMITS });
    w.create_context(1);
    let (vm, asid) = w.create_vm(1, 0);
    let offset = A.cast_signed() - C.cast_signed();
    let parts: Vec<_> = (0..100).map(|n| unmap(C + n * 8192, 1)).collect();
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1024)]), 0);
    assert_eq!(w.bind(1, vm, &parts), 0, "nothing is resident");
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1024)]), 0);
    // A page between the first two parts.
    assert_eq!(w.supply(1, &[run(A + 4096, GPA, 1, 0)]), 0);
    w.devices[0].raise(&w.host, asid, C + 4096, Access::Read);
    assert_eq!(w.bind(1, vm, &parts[..64]), 0, "looked at one by one");
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1)]), 0);
    assert_eq!(w.bind(1, vm, &parts), 0, "of the first 64 only one is a mirror again");
    w.invalidate(1, A, 1024 * 4096);
    assert_eq!(w.bind(1, vm, &[mirror(C, offset, 1024)]), 0);
    assert_eq!(w.supply(1, &[run(A + 4096, GPA, 1, w.guest.contexts()[0].inval_seq)]), 0);
    w.devices[0].raise(&w.host, asid, C + 4096, Access::Read);
    assert_eq!(w.bind(1, vm, &parts), -EBUSY, "more than 64 parts, and a page between them");
}
