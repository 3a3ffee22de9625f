//! One context's memory: ranges of guest CPU addresses and the guest-physical pages behind them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;

/// Memory of a process that devices may reach.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Names it towards the maker of its memory.
    pub id: u64,
    /// First guest CPU address.
    pub va: u64,
    /// Bytes.
    pub len: u64,
    /// Guest-physical address of each page.
    pub pages: Arc<[u64]>,
}

impl Arena {
    fn end(&self) -> u64 {
        self.va.saturating_add(self.len)
    }
}

/// The arenas of a context; none overlaps another.
#[derive(Debug, Default)]
pub struct ArenaTable {
    by_va: BTreeMap<u64, Arena>,
}

impl ArenaTable {
    /// Whether a range overlaps an arena.
    pub fn overlaps(&self, va: u64, len: u64) -> bool {
        let before_end = self.by_va.range(..va.saturating_add(len)).next_back();
        before_end.is_some_and(|(_, arena)| arena.end() > va)
    }

    /// Adds an arena; gives it back if it overlaps another.
    ///
    /// # Errors
    /// The arena itself.
    pub fn insert(&mut self, arena: Arena) -> Result<(), Arena> {
        if self.overlaps(arena.va, arena.len) {
            return Err(arena);
        }
        self.by_va.insert(arena.va, arena);
        Ok(())
    }

    /// Removes an arena by its id.
    pub fn take(&mut self, id: u64) -> Option<Arena> {
        let va = self.by_va.values().find(|arena| arena.id == id)?.va;
        self.by_va.remove(&va)
    }

    /// Removes all.
    pub fn take_all(&mut self) -> Vec<Arena> {
        std::mem::take(&mut self.by_va).into_values().collect()
    }

    /// Arenas.
    pub fn len(&self) -> usize {
        self.by_va.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_va.is_empty()
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.by_va.values().map(|arena| arena.len).sum()
    }

    /// The pages of the aligned windows of `window_pages` around a range of addresses, cut to the arena that holds its
    /// first one; physically contiguous pages are one run. Empty: nothing stands there, or the window is empty.
    pub fn window(&self, asked: Range<u64>, window_pages: u32, as_of: u64) -> Vec<PageRun> {
        let Some(arena) = self.by_va.range(..=asked.start).next_back().map(|(_, arena)| arena) else {
            return Vec::new();
        };
        if asked.start >= arena.end() || window_pages == 0 {
            return Vec::new();
        }
        let window = u64::from(window_pages) * PAGE_SIZE;
        let first = (asked.start - asked.start % window).max(arena.va);
        let end = asked.end.checked_next_multiple_of(window).unwrap_or(u64::MAX).min(arena.end());
        let page_of = |va: u64| usize::try_from((va - arena.va) / PAGE_SIZE).unwrap_or(usize::MAX);
        let pages = arena.pages.get(page_of(first)..page_of(end)).unwrap_or_default();
        merge(first, pages, as_of)
    }
}

fn merge(first: u64, pages: &[u64], as_of: u64) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    let mut va = first;
    for &gpa in pages {
        match runs.last_mut() {
            Some(run) if run.gpa.get() + u64::from(run.pages.get()) * PAGE_SIZE == gpa => {
                run.pages = (run.pages.get() + 1).into();
            }
            _ => runs.push(PageRun {
                va: va.into(),
                gpa: gpa.into(),
                pages: 1.into(),
                flags: 0.into(),
                as_of: as_of.into(),
            }),
        }
        va += PAGE_SIZE;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(va: u64, pages: &[u64]) -> Arena {
        let len = pages.len() as u64 * PAGE_SIZE;
        Arena { id: va, va, len, pages: pages.iter().map(|p| p * PAGE_SIZE).collect() }
    }

    fn table(arenas: &[Arena]) -> ArenaTable {
        let mut table = ArenaTable::default();
        for arena in arenas {
            table.insert(arena.clone()).unwrap();
        }
        table
    }

    fn shape(runs: &[PageRun]) -> Vec<(u64, u64, u32)> {
        runs.iter().map(|r| (r.va.get(), r.gpa.get() / PAGE_SIZE, r.pages.get())).collect()
    }

    #[test]
    fn contiguous_pages_are_one_run() {
        let table = table(&[arena(0x10000, &[7, 8, 9, 3, 5, 6])]);
        let runs = table.window(0x12000..0x13000, 16, 4);
        assert_eq!(shape(&runs), [(0x10000, 7, 3), (0x13000, 3, 1), (0x14000, 5, 2)]);
        assert!(runs.iter().all(|run| run.as_of.get() == 4 && run.flags.get() == 0));
    }

    #[test]
    fn window_is_aligned_and_cut_to_the_arena() {
        let pages: Vec<u64> = (0..64).map(|n| n * 2).collect();
        let table = table(&[arena(0x3000, &pages)]);
        let first = |address: u64, window| shape(&table.window(address..address + 1, window, 0));
        assert_eq!(first(0x5000, 4), [(0x4000, 2, 1), (0x5000, 4, 1), (0x6000, 6, 1), (0x7000, 8, 1)]);
        assert_eq!(first(0x3000, 4), [(0x3000, 0, 1)]);
        assert_eq!(first(0x42000, 4), [(0x40000, 122, 1), (0x41000, 124, 1), (0x42000, 126, 1)]);
        assert_eq!(first(0x5fff, 1), [(0x5000, 4, 1)]);
    }

    #[test]
    fn range_is_covered_by_whole_windows() {
        let pages: Vec<u64> = (0..64).map(|n| n * 2).collect();
        let table = table(&[arena(0x3000, &pages)]);
        let runs = shape(&table.window(0x5000..0xa000, 4, 0));
        assert_eq!(
            (runs.first().copied(), runs.last().copied()),
            (Some((0x4000, 2, 1)), Some((0xb000, 16, 1)))
        );
        assert_eq!(runs.len(), 8);
        assert_eq!(table.window(0x41000..0x90000, 16, 0).len(), 3, "cut to the arena");
    }

    #[test]
    fn address_outside_every_arena_has_no_window() {
        let table = table(&[arena(0x10000, &[1, 2]), arena(0x20000, &[3])]);
        for address in [0, 0xffff, 0x12000, 0x1f000, 0x21000, u64::MAX] {
            assert!(table.window(address..address.saturating_add(1), 16, 0).is_empty(), "{address:#x}");
        }
    }

    #[test]
    fn overlap_is_refused_on_either_side() {
        let mut table = table(&[arena(0x10000, &[1, 2, 3, 4])]);
        for (va, pages) in [(0xf000, 2), (0x10000, 1), (0x13000, 4), (0xc000, 32)] {
            let pages = vec![9; pages];
            assert!(table.insert(arena(va, &pages)).is_err(), "{va:#x}");
        }
        assert!(table.insert(arena(0xf000, &[1])).is_ok());
        assert!(table.insert(arena(0x14000, &[1])).is_ok());
    }
}
