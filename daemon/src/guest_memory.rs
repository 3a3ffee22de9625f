//! Guest memory at the daemon's border: which regions of a VMM are accepted, and the one view of them that rings and
//! engines use.
//!
//! The framework maps what a VMM sends before it asks anybody. So its map is never used as it stands: [`accept`] checks
//! each region against its file, and only then a [`View`] is published through [`GuestMemory`]. A region that a new
//! table carries over unchanged keeps its [`Region`], and with it every translation made on it. Nothing that is checked
//! here stays true of a file that is not sealed, and not all of one that is; see [`crate::sigbus`].

use crate::sigbus::{self, Loss, WatchedMap};
use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_gpu_svm::memory::{MAX_REGIONS, MemoryTable, Region, RegionIdentity, TableError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Why a VMM's memory table was refused; its session ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The region has no file behind it.
    #[error("memory region at {gpa:#x} has no file behind it")]
    NoFile {
        /// Where.
        gpa: u64,
    },
    /// Not a memory file.
    #[error("the file behind memory region at {gpa:#x} is no regular file")]
    NotAFile {
        /// Where.
        gpa: u64,
    },
    /// The VMM could truncate the file under us.
    #[error(
        "memory region at {gpa:#x} is not sealed against shrinking (F_SEAL_SHRINK); give the guest sealed memory \
         (QEMU: memory-backend-memfd,share=on) or start svmd with --allow-unsealed"
    )]
    NotSealed {
        /// Where.
        gpa: u64,
    },
    /// The region is longer than its file.
    #[error("memory region at {gpa:#x} ends at {end:#x} of its file, which has {file_bytes:#x} bytes")]
    BeyondFile {
        /// Where.
        gpa: u64,
        /// Its end in the file.
        end: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// The regions are no table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The host kernel refused.
    #[error("cannot {action} memory region at {gpa:#x}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Where.
        gpa: u64,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A checked memory table, in the two forms in which it is used. Rings use the second as long as this is held.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// For commands and engines.
    pub table: Arc<MemoryTable>,
    rings: Arc<WatchedMap>,
}

impl View {
    /// For rings.
    pub fn rings(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(self.rings.map())
    }
}

/// The view that is in force. Holds no lock while a view is used.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Guards the two handles; a section is one assignment or clone.
    view: Mutex<View>,
}

impl GuestMemory {
    /// The view now; it stays mapped as long as it is held.
    pub fn view(&self) -> View {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// Puts a new view in force.
    pub fn publish(&self, view: View) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = view;
    }
}

/// Checks what the framework has mapped. Regions of `old` that are still the same are kept. What of it goes away later
/// is told to `loss`.
///
/// # Errors
/// [`Error`].
pub fn accept(
    mapped: Arc<GuestMemoryMmap>,
    old: &MemoryTable,
    allow_unsealed: bool,
    loss: &Arc<Loss>,
) -> Result<View, Error> {
    let count = mapped.num_regions();
    if count > MAX_REGIONS {
        return Err(TableError::TooMany(count).into());
    }
    let regions =
        mapped.iter().map(|r| accept_region(r, old, allow_unsealed, loss)).collect::<Result<Vec<_>, _>>()?;
    let table = Arc::new(MemoryTable::new(regions)?);
    let rings =
        WatchedMap::new(mapped, loss).map_err(|source| Error::Host { action: "watch", gpa: 0, source })?;
    Ok(View { table, rings: Arc::new(rings) })
}

fn accept_region(
    mapped: &GuestRegionMmap,
    old: &MemoryTable,
    allow_unsealed: bool,
    loss: &Arc<Loss>,
) -> Result<Arc<Region>, Error> {
    let (gpa, size) = (mapped.start_addr().0, mapped.len());
    let file_offset = mapped.file_offset().ok_or(Error::NoFile { gpa })?;
    let (file, offset) = (file_offset.file(), file_offset.start());

    let stat = fstat(file.as_fd()).map_err(|e| Error::Host {
        action: "look at the file of",
        gpa,
        source: e.into(),
    })?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::NotAFile { gpa });
    }
    // Seals first: after this check a sealed file cannot become shorter than what is read next.
    if !allow_unsealed && !fcntl_get_seals(file.as_fd()).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    {
        return Err(Error::NotSealed { gpa });
    }
    let file_bytes = fstat(file.as_fd())
        .map(|stat| u64::try_from(stat.st_size).unwrap_or(0))
        .map_err(|e| Error::Host { action: "look at the file of", gpa, source: e.into() })?;
    let end = offset.saturating_add(size);
    if end > file_bytes {
        return Err(Error::BeyondFile { gpa, end, file_bytes });
    }

    let identity = RegionIdentity { inode: (stat.st_dev, stat.st_ino), offset, size, gpa };
    if let Some(kept) = old.regions().iter().find(|r| *r.identity() == identity) {
        return Ok(Arc::clone(kept));
    }
    let refused = |source| Error::Host { action: "map", gpa, source };
    let bytes = usize::try_from(size).map_err(|e| refused(std::io::Error::other(e)))?;
    let mapping =
        MmapRegion::from_file(file_offset.clone(), bytes).map_err(|e| refused(std::io::Error::other(e)))?;
    sigbus::watch_region(identity, mapping, loss).map_err(refused)
}
