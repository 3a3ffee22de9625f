//! Which pages of a mapping are known, and those of them that are bound around a fault.
//!
//! Pages are read in runs: the address space's leaf, the blob's entry and the region of guest memory are found once for
//! each. Serving a fault and population ([`crate::population`]) both read them here.

use super::device_errno;
use crate::addr::{GpuAddr, PageRange};
use crate::address_space::{AddressSpace, Walk};
use crate::device::{Asid, Device, Extent, ScatteredPage};
use crate::gpu_vm::{Backing, Behind, GpuVa};
use crate::memory::{self, MemoryTable, Place, Region};
use crate::protocol::{LEAF_SIZE, PAGE_SHIFT};
use crate::sync::Arc;

/// Pages bound around a fault as far as they are known: an aligned window of the GPU VM, cut to the mapping.
pub const FAULT_AROUND_PAGES: u64 = 16;
const LEAF_PAGES: u64 = LEAF_SIZE >> PAGE_SHIFT;
const LEAF_SLOTS: usize = 512;
const _: () = assert!(LEAF_SLOTS as u64 == LEAF_PAGES);
/// Fewer pages in one piece are cheaper one by one: an extent is made, checked and found for some 300 instructions, a page
/// of a leaf for some 25.
pub(crate) const LONG_RUN: u64 = 64;

/// What is bound around a fault: of one mapping, on one device, as far as it is known.
pub(super) struct Window<'a> {
    pub(super) device: &'a dyn Device,
    pub(super) asid: Asid,
    pub(super) va: &'a GpuVa,
    pub(super) space: &'a AddressSpace,
    pub(super) memory: &'a MemoryTable,
}

impl Window<'_> {
    /// Binds the whole large leaf that holds a page where everything allows it, else the known pages of its window. The
    /// room of `spare` is lent.
    pub(super) fn bind(self, page: u64, spare: &mut Vec<Extent<'static>>) -> std::result::Result<(), i32> {
        let Self { device, asid, va, space, memory } = self;
        let block =
            PageRange { start: page & !(LEAF_PAGES - 1), end: (page | (LEAF_PAGES - 1)).saturating_add(1) };
        let aligned = page & !(FAULT_AROUND_PAGES - 1);
        let window = PageRange { start: aligned, end: aligned.saturating_add(FAULT_AROUND_PAGES) };
        let window = va.range.intersect(window).unwrap_or(window);
        if matches!(va.backing, Backing::Null) {
            let whole = va.range.intersect(block).filter(|part| *part == block);
            return device.bind_null(asid, whole.unwrap_or(window)).map_err(device_errno);
        }
        let mut pages = Pages::of(va, space, memory);
        if va.range.intersect(block) == Some(block)
            && let Behind::Cpu(cpu) = va.behind(block.start)
            && cpu % LEAF_PAGES == 0
            && let Some(first) = space.lookup_large(cpu)
            && let Some((region, offset)) = memory.lookup(first.gpa_page, LEAF_PAGES)
        {
            let writable = !va.readonly && !first.readonly;
            let extent = Extent { region, offset, pages: LEAF_PAGES, writable };
            return device.bind(asid, GpuAddr(block.start_addr()), &[extent]).map_err(device_errno);
        }
        let mut extents = emptied(std::mem::take(spare));
        let mut bound = Ok(());
        let mut at = window.start;
        while at < window.end && bound.is_ok() {
            let from = PageRange { start: at, end: window.end };
            let end = pages.collect(from, |_| true, 1, &mut extents);
            if end > at {
                bound = device.bind(asid, GpuAddr(at << PAGE_SHIFT), &extents).map_err(device_errno);
                extents.clear();
            }
            at = pages.next_known(PageRange { start: end, end: window.end });
        }
        *spare = emptied(extents);
        bound
    }
}

/// Reads where the pages of a mapping are, as far as it is known.
pub(crate) struct Pages<'s, 'm> {
    va: &'s GpuVa,
    space: Walk<'s>,
    memory: memory::Walk<'m>,
}

impl<'s, 'm> Pages<'s, 'm> {
    /// Of a mapping.
    pub(crate) fn of(va: &'s GpuVa, space: &'s AddressSpace, memory: &'m MemoryTable) -> Self {
        Self { va, space: space.walk(), memory: memory.walk() }
    }
    /// As many of `most` pages from `page` on as follow each other in one region.
    #[inline]
    pub(crate) fn extent(&mut self, page: u64, most: u64) -> Option<Extent<'m>> {
        let (gpa_page, readonly, pages) = match self.va.behind(page) {
            Behind::Cpu(cpu_page) => {
                let (first, pages) = self.space.run(cpu_page, most)?;
                (first.gpa_page, first.readonly, pages)
            }
            Behind::Blob(blob, at) => {
                let (gpa_page, pages) = blob.run(at, most)?;
                (gpa_page, false, pages)
            }
            Behind::Null => return None,
        };
        let Place { region, offset, pages } = self.memory.run(gpa_page, pages)?;
        Some(Extent { region, offset, pages, writable: !self.va.readonly && !readonly })
    }
    /// The first page of a range that may be known, or the range's end. The first one of the range is not, or will not do.
    pub(crate) fn next_known(&mut self, range: PageRange) -> u64 {
        let mut at = range.start.saturating_add(1).min(range.end);
        while at < range.end
            && let Behind::Cpu(cpu_page) = self.va.behind(at)
        {
            let gap = self.space.gap(cpu_page, range.end.saturating_sub(at));
            if gap == 0 {
                break;
            }
            at = at.saturating_add(gap);
        }
        at
    }
    /// Collects pages one by one into `pages`, from the first of a range on that are known, lie in one leaf and one region
    /// and, where this is asked for, may be written. How many, the first of `pages`, and the region; nothing where extents do
    /// better.
    pub(crate) fn scattered(
        &mut self,
        range: PageRange,
        writable_only: bool,
        pages: &mut Vec<ScatteredPage>,
    ) -> Option<(usize, &'m Arc<Region>)> {
        let Behind::Cpu(cpu_page) = self.va.behind(range.start) else { return None };
        let (first, run) = self.space.run(cpu_page, range.pages().min(LONG_RUN))?;
        if run >= LONG_RUN {
            return None;
        }
        let (region, place) = self.memory.region(first.gpa_page)?;
        let (place_pages, mapped_writable) = (place.pages(), !self.va.readonly);
        pages.resize(LEAF_SLOTS, ScatteredPage::default());
        let most = usize::try_from(range.pages()).unwrap_or(LEAF_SLOTS).min(LEAF_SLOTS);
        let count = self.space.small(cpu_page, pages.get_mut(..most).unwrap_or_default(), |page| {
            let writable = mapped_writable && !page.readonly;
            let index = page.gpa_page.wrapping_sub(place.start);
            let will_do = index < place_pages && (writable || !writable_only);
            will_do.then(|| ScatteredPage::new(index << PAGE_SHIFT, writable))
        });
        (count > 0).then_some((count, region))
    }
    /// Adds the extents of the pages from the first of a range on that are known and will do. Returns the first page that
    /// is not, or the range's end; or where an extent begins, not the first one, that has fewer than `least` pages.
    pub(crate) fn collect(
        &mut self,
        range: PageRange,
        will_do: impl Fn(&Extent) -> bool,
        least: u64,
        extents: &mut Vec<Extent<'m>>,
    ) -> u64 {
        let mut at = range.start;
        while at < range.end
            && let Some(extent) = self.extent(at, range.end.saturating_sub(at)).filter(&will_do)
            && (extent.pages >= least || at == range.start)
        {
            at = at.saturating_add(extent.pages);
            push(extents, extent);
        }
        at
    }
}

/// Adds an extent to a list, to the last one where it continues it.
fn push<'a>(extents: &mut Vec<Extent<'a>>, extent: Extent<'a>) {
    if let Some(last) = extents.last_mut()
        && Arc::ptr_eq(last.region, extent.region)
        && last.writable == extent.writable
        && last.offset.wrapping_add(last.pages << PAGE_SHIFT) == extent.offset
    {
        last.pages = last.pages.saturating_add(extent.pages);
    } else {
        extents.push(extent);
    }
}

/// An empty list with the room of another, whose extents are of another time.
pub(crate) fn emptied<'a>(mut extents: Vec<Extent<'_>>) -> Vec<Extent<'a>> {
    extents.clear();
    extents.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Region, RegionIdentity};
    use vm_memory::mmap::MmapRegion;

    #[test]
    fn emptied_list_has_the_room_that_it_had() {
        let identity = RegionIdentity { inode: (0, 1), offset: 0, size: 4096, gpa: 0 };
        let region = Region::new(identity, MmapRegion::new(4096).unwrap());
        let mut extents = Vec::with_capacity(100);
        extents.push(Extent { region: &region, offset: 0, pages: 1, writable: true });
        let empty: Vec<Extent<'static>> = emptied(extents);
        assert_eq!((empty.len(), empty.capacity()), (0, 100));
    }
}
