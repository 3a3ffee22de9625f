//! Guest memory as this daemon has accepted it: regions and one flat table from guest-physical address to region.
//!
//! The session checks a memory table, builds a [`MemoryTable`] and publishes it; ring code and engines see only what
//! was published. Regions that a new table carries over keep their identity ([`Region::id`]), and so their
//! translations. The one place where guest-physical claims become host memory.

use crate::addr::{GuestPa, PageRange};
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};
use vm_memory::mmap::MmapRegion;

/// Most regions of one table.
pub const MAX_REGIONS: usize = 64;
/// Guest-physical addresses end here.
pub const GUEST_PA_END: u64 = 1 << 46;

static NEXT_REGION: AtomicU64 = AtomicU64::new(1);

/// What a region is made of; equal for two messages that describe the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionIdentity {
    /// Device and inode of the file behind it.
    pub inode: (u64, u64),
    /// Offset in that file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Where it stands in guest-physical space.
    pub gpa: u64,
}

/// Whoever watches over a region's memory for as long as it is mapped.
pub trait Watch: std::fmt::Debug + Send + Sync {
    /// A device has found that memory of it is not there any more: its file has been shrunk.
    fn lost(&self);
}

/// One region of guest memory, mapped here. Unmapped when the last user lets go.
#[derive(Debug)]
pub struct Region {
    id: u64,
    identity: RegionIdentity,
    /// Dropped before the mapping: what it watches is mapped.
    watch: Option<Box<dyn Watch>>,
    mapping: MmapRegion<()>,
}

impl Region {
    /// Takes over a mapping that its caller has checked.
    pub fn new(identity: RegionIdentity, mapping: MmapRegion<()>) -> Arc<Self> {
        Self::with(identity, mapping, None)
    }
    /// The same, of a mapping that is watched; the watch goes before the mapping does.
    pub fn watched(
        identity: RegionIdentity,
        mapping: MmapRegion<()>,
        watch: impl Watch + 'static,
    ) -> Arc<Self> {
        Self::with(identity, mapping, Some(Box::new(watch)))
    }
    fn with(identity: RegionIdentity, mapping: MmapRegion<()>, watch: Option<Box<dyn Watch>>) -> Arc<Self> {
        Arc::new(Self { id: NEXT_REGION.fetch_add(1, Ordering::Relaxed), identity, watch, mapping })
    }
    /// Unique over the life of the daemon.
    pub fn id(&self) -> u64 {
        self.id
    }
    /// What it is made of.
    pub fn identity(&self) -> &RegionIdentity {
        &self.identity
    }
    /// Its first guest-physical address.
    pub fn gpa(&self) -> GuestPa {
        GuestPa(self.identity.gpa)
    }
    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.identity.size
    }
    /// Its mapping in this process; valid while the region is held.
    pub fn mapping(&self) -> &MmapRegion<()> {
        &self.mapping
    }
    /// A device that has mapped its file by itself has found memory of it missing.
    pub fn report_lost(&self) {
        if let Some(watch) = &self.watch {
            watch.lost();
        }
    }
}

/// Why a set of regions is no memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// Too many.
    #[error("{0} memory regions, at most {MAX_REGIONS} are accepted")]
    TooMany(usize),
    /// Not page aligned, empty, or beyond the space.
    #[error("memory region {gpa:#x}+{size:#x} is unaligned, empty or beyond {GUEST_PA_END:#x}")]
    BadRange {
        /// Where.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions at one guest-physical address.
    #[error("memory regions overlap at {gpa:#x}")]
    Overlap {
        /// Where.
        gpa: u64,
    },
}

/// log2 of the bytes of a slot of the flat table.
const SLOT_SHIFT: u32 = 21;
const SLOT_PAGES_SHIFT: u32 = SLOT_SHIFT - PAGE_SHIFT;
/// Guest-physical addresses that the flat table covers: 1 TiB with 512 KiB. What lies beyond is searched for.
const FLAT_END: u64 = 1 << 40;
/// A slot that no region fills alone.
const SHARED: u8 = u8::MAX;
const _: () = assert!(MAX_REGIONS < SHARED as usize);

/// A checked set of regions. Immutable; a change is a new table.
#[derive(Debug, Default)]
pub struct MemoryTable {
    /// Sorted by guest-physical address.
    regions: Vec<Arc<Region>>,
    /// Their pages, in the same order.
    places: Vec<PageRange>,
    /// The index of the region that fills a slot.
    slots: Vec<u8>,
}

/// Pages of one region.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// It.
    pub region: &'a Arc<Region>,
    /// Byte offset in it.
    pub offset: u64,
    /// How many: at least 1.
    pub pages: u64,
}

impl MemoryTable {
    /// Checks and sorts.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, TableError> {
        if regions.len() > MAX_REGIONS {
            return Err(TableError::TooMany(regions.len()));
        }
        regions.sort_by_key(|r| r.gpa());
        let mut free_from = 0;
        for region in &regions {
            let (gpa, size) = (region.gpa().0, region.size());
            let end = gpa.checked_add(size).filter(|end| *end <= GUEST_PA_END);
            let (Some(end), true, true) =
                (end, size > 0, gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE))
            else {
                return Err(TableError::BadRange { gpa, size });
            };
            if gpa < free_from {
                return Err(TableError::Overlap { gpa });
            }
            free_from = end;
        }
        let place = |region: &Arc<Region>| {
            let start = region.gpa().page();
            PageRange { start, end: start.saturating_add(region.size() >> PAGE_SHIFT) }
        };
        let places: Vec<_> = regions.iter().map(place).collect();
        let slots = slots_of(&places);
        Ok(Self { regions, places, slots })
    }
    /// Its regions, by rising guest-physical address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }
    /// The region that holds `pages` whole pages from page number `gpa_page`, and the byte offset in it.
    pub fn lookup(&self, gpa_page: u64, pages: u64) -> Option<(&Arc<Region>, u64)> {
        let place = self.lookup_some(gpa_page, pages)?;
        (place.pages == pages).then_some((place.region, place.offset))
    }
    /// Begins to look up one after the other.
    pub fn walk(&self) -> Walk<'_> {
        Walk { table: self, hot: None }
    }
    /// As many of `pages` pages from page number `gpa_page` on as one region holds; at least 1.
    pub fn lookup_some(&self, gpa_page: u64, pages: u64) -> Option<Place<'_>> {
        self.walk().run(gpa_page, pages)
    }
    /// The region that holds a page, and its pages.
    fn find(&self, gpa_page: u64) -> Option<(&Arc<Region>, PageRange)> {
        let slot = usize::try_from(gpa_page >> SLOT_PAGES_SHIFT).ok().and_then(|slot| self.slots.get(slot));
        let index = match slot {
            Some(index) if *index != SHARED => usize::from(*index),
            _ => self.places.partition_point(|place| place.start <= gpa_page).checked_sub(1)?,
        };
        let place = self.places.get(index).filter(|place| place.contains(gpa_page))?;
        Some((self.regions.get(index)?, *place))
    }
}

/// Looks pages up one after the other, most of which lie in the region of the one before.
pub struct Walk<'a> {
    table: &'a MemoryTable,
    hot: Option<(&'a Arc<Region>, PageRange)>,
}

impl<'a> Walk<'a> {
    /// The region that holds a page, and its pages.
    #[inline]
    pub fn region(&mut self, gpa_page: u64) -> Option<(&'a Arc<Region>, PageRange)> {
        match self.hot {
            Some((region, place)) if place.contains(gpa_page) => Some((region, place)),
            _ => Some(*self.hot.insert(self.table.find(gpa_page)?)),
        }
    }
    /// As many of `pages` pages from page number `gpa_page` on as one region holds; at least 1.
    #[inline]
    pub fn run(&mut self, gpa_page: u64, pages: u64) -> Option<Place<'a>> {
        let (region, place) = self.region(gpa_page)?;
        let offset = gpa_page.saturating_sub(place.start) << PAGE_SHIFT;
        Some(Place { region, offset, pages: place.end.saturating_sub(gpa_page).min(pages) })
    }
}

/// The flat table of places, which are sorted and apart; as far as it is needed.
fn slots_of(places: &[PageRange]) -> Vec<u8> {
    let end = places.last().map_or(0, |last| last.end).min(FLAT_END >> PAGE_SHIFT);
    let mut slots = vec![SHARED; usize::try_from(end >> SLOT_PAGES_SHIFT).unwrap_or(0)];
    for (index, place) in (0..).zip(places) {
        let first = place.start.div_ceil(1 << SLOT_PAGES_SHIFT);
        let filled = (first, place.end >> SLOT_PAGES_SHIFT);
        let filled = (usize::try_from(filled.0).ok(), usize::try_from(filled.1).ok());
        let (Some(first), Some(end)) = filled else { continue };
        let end = end.min(slots.len());
        slots.get_mut(first..end.max(first)).unwrap_or_default().fill(index);
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Regions of these bytes, at these addresses.
    fn table(regions: &[(u64, u64)]) -> MemoryTable {
        let region = |(gpa, size): &(u64, u64)| {
            let identity = RegionIdentity { inode: (0, 1), offset: 0, size: *size, gpa: *gpa };
            Region::new(identity, MmapRegion::new(usize::try_from(*size).unwrap()).unwrap())
        };
        MemoryTable::new(regions.iter().map(region).collect()).unwrap()
    }

    /// What a search of all regions says.
    fn searched(table: &MemoryTable, page: u64) -> Option<(u64, u64, u64)> {
        let held =
            table.regions().iter().find(|r| (r.gpa().0..r.gpa().0 + r.size()).contains(&(page << 12)))?;
        let end = held.gpa().0 + held.size();
        Some((held.id(), (page << 12) - held.gpa().0, (end >> 12) - page))
    }

    #[test]
    fn flat_table_agrees_with_a_search_of_regions() {
        // Below, across and beyond slots; side by side; beyond the flat table, and across its end.
        let places = [
            (0x1000, 0x3000),
            (MIB, 3 * MIB),
            (4 * MIB, 0x1000),
            (4 * MIB + 0x1000, 6 * MIB - 0x1000),
            (12 * MIB, 2 * MIB),
            (FLAT_END - 2 * MIB, 4 * MIB),
            (FLAT_END + 64 * MIB, 2 * MIB),
            (GUEST_PA_END - 0x1000, 0x1000),
        ];
        let table = table(&places);
        let mut pages: Vec<u64> = (0..(16 * MIB) >> 12).collect();
        for end in [FLAT_END - 2 * MIB, FLAT_END, FLAT_END + 2 * MIB, FLAT_END + 64 * MIB, GUEST_PA_END] {
            pages.extend((end >> 12) - 3..(end >> 12) + 3);
        }
        for page in pages {
            let found = table.lookup_some(page, u64::MAX).map(|p| (p.region.id(), p.offset, p.pages));
            assert_eq!(found, searched(&table, page), "page {page:#x}");
            let left = found.map_or(0, |(.., left)| left);
            assert_eq!(table.lookup(page, left.max(1)).is_some(), left > 0, "page {page:#x}");
            assert!(table.lookup(page, left + 1).is_none(), "page {page:#x}");
        }
        assert!(table.lookup_some(u64::MAX, 1).is_none());
    }

    #[test]
    fn flat_table_is_as_long_as_memory_and_no_longer_than_its_bound() {
        assert_eq!(MemoryTable::default().slots.len(), 0);
        assert_eq!(table(&[(0, 8 * MIB)]).slots.len(), 4);
        assert_eq!(table(&[(GUEST_PA_END - MIB, MIB)]).slots.len(), 1 << 19);
    }
}
