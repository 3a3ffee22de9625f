//! Binding all or nothing, and the copy that other processors use.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "small numbers of tests"
)]

use super::*;
use crate::memory::RegionIdentity;
use vm_memory::mmap::MmapRegion;

fn region(pages: u64) -> Arc<Region> {
    let size = pages * PAGE_SIZE;
    let identity = RegionIdentity { inode: (0, 0), offset: 0, size, gpa: 0 };
    Region::new(identity, MmapRegion::new(size as usize).unwrap())
}

fn extent(region: &Arc<Region>, page: u64, pages: u64) -> Extent<'_> {
    Extent { region, offset: page * PAGE_SIZE, pages, writable: true }
}

#[test]
fn bind_without_room_for_tables_changes_nothing() {
    let memory = VmMemory::new(57, 1, Charge::default(), Arc::default());
    let region = region(1024);
    // A leaf and a block table for each page, until no more fit.
    let mut bound = 0u64;
    while memory.bind(bound << 18, &[extent(&region, 0, 1)]).is_ok() {
        bound += 1;
    }
    let first = (bound << 18) - 3;
    let beyond: Vec<_> = (0..6).map(|page| extent(&region, page, 1)).collect();
    assert_eq!(memory.bind(first, &beyond), Err(NoTable::OutOfMemory));
    assert_eq!(memory.resident_pages(), bound);

    memory.unbind(PageRange { start: 0, end: 1 << 45 });
    assert_eq!(memory.resident_pages(), 0);
    assert_eq!(memory.bind(first, &beyond), Ok(()));
}

#[test]
fn extent_beyond_its_region_is_not_bound() {
    let region = region(4);
    for (offset, pages) in [(0, 5), (PAGE_SIZE, 4), (8, 1), (!4095, 2), (0, u64::MAX), (0, 0)] {
        let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
        let bad = Extent { region: &region, offset, pages, writable: true };
        let bind = || memory.bind(0, &[extent(&region, 0, 1), bad]);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(bind)).is_err(), "{offset:#x}+{pages}");
        assert_eq!(memory.resident_pages(), 0);
        assert_eq!(memory.bind(0, &[extent(&region, 0, 4)]), Ok(()), "the panic does no further harm");
    }
}

#[test]
fn scattered_page_beyond_its_region_is_not_bound() {
    let region = region(4);
    for offset in [4 * PAGE_SIZE, 5 * PAGE_SIZE, !(PAGE_SIZE - 1)] {
        let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
        let pages = [0, offset, PAGE_SIZE].map(|offset| ScatteredPage::new(offset, true));
        let bind = || memory.bind_pages(0, &region, &pages);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(bind)).is_err(), "{offset:#x}");
        assert_eq!(memory.resident_pages(), 0);
        let last = [ScatteredPage::new(3 * PAGE_SIZE, true)];
        assert_eq!(memory.bind_pages(0, &region, &last), Ok(()), "the panic does no further harm");
    }
}

#[test]
fn scattered_pages_without_room_for_tables_change_nothing() {
    let memory = VmMemory::new(57, 1, Charge::default(), Arc::default());
    let region = region(1024);
    let mut bound = 0u64;
    while memory.bind(bound << 18, &[extent(&region, 0, 1)]).is_ok() {
        bound += 1;
    }
    let first = (bound << 18) - 3;
    let beyond = [9, 5, 7, 1, 3, 2].map(|page| ScatteredPage::new(page * PAGE_SIZE, true));
    assert_eq!(memory.bind_pages(first, &region, &beyond), Err(NoTable::OutOfMemory));
    assert_eq!(memory.resident_pages(), bound);

    memory.unbind(PageRange { start: 0, end: 1 << 45 });
    assert_eq!(memory.bind_pages(first, &region, &beyond), Ok(()));
    assert_eq!(memory.resident_pages(), 6);
    memory.drop_region(region.id());
    assert_eq!((memory.resident_pages(), memory.table_bytes()), (0, 0));
}

#[test]
fn empty_tables_wait_for_the_view_to_end() {
    let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
    let region = region(1);
    let view = memory.view();
    for block in 0..RECLAIM_PRESSURE as u64 {
        memory.bind(block << 9, &[extent(&region, 0, 1)]).unwrap();
        memory.unbind(PageRange { start: block << 9, end: (block << 9) + 1 });
    }
    assert!(memory.wants_reclaim());
    drop(view);
    assert!(memory.reclaim());
    assert!(!memory.wants_reclaim(), "a batch is gone");
    assert_eq!(memory.emptied.load(Ordering::Relaxed), RECLAIM_PRESSURE - FREE_BATCH);
    memory.reclaim_all();
    assert_eq!(memory.read().table.table_bytes(), 0);
}

#[test]
fn vm_is_taken_apart_in_batches_and_lets_go_of_its_regions() {
    let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
    let region = region(1);
    let blocks = 3 * FREE_BATCH as u64;
    for block in 0..blocks {
        memory.bind(block << 9, &[extent(&region, 0, 1)]).unwrap();
    }
    let mut batches = 1;
    while memory.dismantle() {
        batches += 1;
    }
    assert!((4..=5).contains(&batches), "{blocks} blocks and a few tables above went in {batches} batches");
    assert_eq!(Arc::strong_count(&region), 1);
    assert_eq!(memory.bind(0, &[extent(&region, 0, 1)]), Ok(()), "what is left is an empty table");
}

#[test]
fn span_ends_with_its_translation() {
    let memory = VmMemory::new(48, 1, Charge::default(), Arc::default());
    let region = region(1024);
    memory.bind(511, &[extent(&region, 0, 513)]).unwrap();
    let view = memory.view();
    let mut view = view.memory();
    let lengths = [(511, 0x10, 1 << 30), (512, 0, 1 << 30), (1023, 0xff8, 1 << 30), (600, 8, 24)]
        .map(|(page, inner, len)| view.source((page << PAGE_SHIFT) + inner, len).unwrap().bytes());
    assert_eq!(lengths, [PAGE_SIZE - 0x10, 512 * PAGE_SIZE, 8, 24]);
    assert!(!view.written());
}

#[test]
fn copy_by_words_is_byte_by_byte() {
    for (to, from, bytes) in [
        (64, 0, 40),
        (3, 0, 50),
        (0, 3, 50),
        (8, 0, 100),
        (5, 5, 20),
        (1, 0, 100),
        (0, 8, 100),
        (13, 5, 77),
        (64, 7, 3),
    ] {
        let mut memory: Vec<u8> = (0..200).collect();
        let mut model = memory.clone();
        (0..bytes).for_each(|i| model[to + i] = model[from + i]);
        let base = memory.as_mut_ptr();
        // SAFETY: both ranges lie in the 200 bytes of `memory`, which nothing else uses.
        unsafe { copy_words(base.wrapping_add(to), base.wrapping_add(from), bytes as u64) };
        assert_eq!(memory, model, "{bytes} bytes from {from} to {to}");
    }
}
