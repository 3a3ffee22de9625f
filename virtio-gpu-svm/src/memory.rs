//! Guest memory as this daemon has accepted it: regions and one flat table from guest-physical address to region.
//!
//! The session checks a memory table, builds a [`MemoryTable`] and publishes it; ring code and engines see only what
//! was published. Regions that a new table carries over keep their identity ([`Region::id`]), and so their
//! translations. The one place where guest-physical claims become host memory.

use crate::addr::GuestPa;
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

/// A checked set of regions. Immutable; a change is a new table.
#[derive(Debug, Default)]
pub struct MemoryTable {
    /// Sorted by guest-physical address.
    regions: Vec<Arc<Region>>,
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
        Ok(Self { regions })
    }
    /// Its regions, by rising guest-physical address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }
    /// The region that holds `pages` whole pages from page number `gpa_page`, and the byte offset in it.
    pub fn lookup(&self, gpa_page: u64, pages: u64) -> Option<(&Arc<Region>, u64)> {
        let end = gpa_page.checked_add(pages)?;
        let after = self.regions.partition_point(|r| r.gpa().page() <= gpa_page);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let first = region.gpa().page();
        (end <= first.checked_add(region.size() >> PAGE_SHIFT)?)
            .then(|| (region, gpa_page.saturating_sub(first) << PAGE_SHIFT))
    }
}
