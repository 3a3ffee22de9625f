//! One context's memory: ranges of guest CPU addresses and the guest-physical pages behind them.
//!
//! An arena is pinned as a whole, but leaves in parts. What is withdrawn stays in the table, marked, until no engine uses
//! it: no answer covers it from the first, and its addresses are free, and its arena may go, only from the last.

use super::{Error, Result};
use crate::message::AgentLimit;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::{MAX_RUNS, PAGE_SIZE};

/// Memory of a process that devices may reach.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Names it towards the maker of its memory.
    pub id: u64,
    /// User whose limits it counts towards.
    pub uid: u32,
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

/// A part of an arena: all of it, or what is left between parts that were cut away.
#[derive(Debug)]
struct Part {
    arena: u64,
    end: u64,
    /// The withdrawal under way that takes it: no answer covers it, and nothing else may stand here yet.
    leaving: Option<u64>,
}

#[derive(Debug)]
struct Standing {
    arena: Arena,
    /// Parts of it, those that are leaving included. It is pinned until there is none.
    parts: usize,
}

/// Something that no answer covers any more, though engines may still use it: to be invalidated, then removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withdrawal {
    number: u64,
    /// First address and bytes of each of its parts. What lies between them is not of it.
    pub ranges: Vec<(u64, u64)>,
}

/// The arenas of a context, in parts of which none overlaps another.
#[derive(Debug, Default)]
pub struct ArenaTable {
    parts: BTreeMap<u64, Part>,
    arenas: HashMap<u64, Standing>,
    bytes: u64,
}

impl ArenaTable {
    /// Whether a range overlaps a part of an arena, be it one that is leaving.
    pub fn overlaps(&self, va: u64, len: u64) -> bool {
        let before_end = self.parts.range(..va.saturating_add(len)).next_back();
        before_end.is_some_and(|(_, part)| part.end > va)
    }

    /// Adds an arena; gives it back if it overlaps another.
    ///
    /// # Errors
    /// The arena itself.
    pub fn insert(&mut self, arena: Arena) -> std::result::Result<(), Arena> {
        if self.overlaps(arena.va, arena.len) {
            return Err(arena);
        }
        self.parts.insert(arena.va, Part { arena: arena.id, end: arena.end(), leaving: None });
        self.bytes += arena.len;
        self.arenas.insert(arena.id, Standing { arena, parts: 1 });
        Ok(())
    }

    /// Withdraws what is left of an arena. `number` names this withdrawal and no other one.
    ///
    /// # Errors
    /// [`Error::NoArena`]: there is no such arena, or all of it is leaving already.
    pub fn withdraw(&mut self, number: u64, id: u64) -> Result<Withdrawal> {
        let arena = &self.arenas.get(&id).ok_or(Error::NoArena(id))?.arena;
        let mut ranges = Vec::new();
        // Parts that stay never touch each other, so each is a range.
        for (&va, part) in self.parts.range_mut(arena.va..arena.end()) {
            if part.arena == id && part.leaving.is_none() {
                part.leaving = Some(number);
                ranges.push((va, part.end - va));
            }
        }
        if ranges.is_empty() { Err(Error::NoArena(id)) } else { Ok(Withdrawal { number, ranges }) }
    }

    /// Withdraws `len` bytes of an arena, `offset` bytes from its beginning; both are multiples of the page size. The
    /// context may have `limit` parts afterwards.
    ///
    /// # Errors
    /// [`Error::NoArena`], [`Error::BadRange`] for what is not in the arena, [`Error::CutBefore`], [`Error::TooMany`].
    pub fn withdraw_part(
        &mut self,
        number: u64,
        id: u64,
        (offset, len): (u64, u64),
        limit: usize,
    ) -> Result<Withdrawal> {
        let arena = &self.arenas.get(&id).ok_or(Error::NoArena(id))?.arena;
        let fits = len > 0 && offset.checked_add(len).is_some_and(|end| end <= arena.len);
        if !fits {
            return Err(Error::BadRange { va: offset, len });
        }
        let (va, end) = (arena.va + offset, arena.va + offset + len);
        // Parts of an arena never touch each other unless one is leaving, so a range that is there lies in one part.
        let within =
            |(_, part): &(&u64, &mut Part)| part.arena == id && part.leaving.is_none() && part.end >= end;
        let found = self.parts.range_mut(..=va).next_back().filter(within);
        let Some((&first, part)) = found else { return Err(Error::CutBefore { offset, len }) };
        let (before, last) = (first < va, part.end);
        let more = usize::from(before) + usize::from(end < last);
        if self.parts.len() + more > limit {
            return Err(Error::TooMany { which: AgentLimit::Parts, limit });
        }
        let part = |end, leaving| Part { arena: id, end, leaving };
        if before {
            self.parts.insert(first, part(va, None));
        }
        self.parts.insert(va, part(end, Some(number)));
        if end < last {
            self.parts.insert(end, part(last, None));
        }
        if let Some(standing) = self.arenas.get_mut(&id) {
            standing.parts += more;
        }
        Ok(Withdrawal { number, ranges: vec![(va, len)] })
    }

    /// Removes what no engine uses any more: its addresses are free. Gives back the arena of which nothing is left.
    pub fn remove(&mut self, withdrawn: &Withdrawal) -> Option<Arena> {
        let mut gone: Option<u64> = None;
        for (va, _) in &withdrawn.ranges {
            if self.parts.get(va).is_none_or(|part| part.leaving != Some(withdrawn.number)) {
                continue;
            }
            if let Some(part) = self.parts.remove(va)
                && let Some(standing) = self.arenas.get_mut(&part.arena)
            {
                standing.parts -= 1;
                gone = Some(part.arena);
            }
        }
        let id = gone.filter(|id| self.arenas.get(id).is_some_and(|standing| standing.parts == 0))?;
        let arena = self.arenas.remove(&id)?.arena;
        self.bytes -= arena.len;
        Some(arena)
    }

    /// Arena, first address and bytes of each part that is in reach, by address.
    pub fn spans(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let standing = self.parts.iter().filter(|(_, part)| part.leaving.is_none());
        standing.map(|(&va, part)| (part.arena, va, part.end - va))
    }

    /// Removes all.
    pub fn take_all(&mut self) -> Vec<Arena> {
        self.parts.clear();
        self.bytes = 0;
        std::mem::take(&mut self.arenas).into_values().map(|standing| standing.arena).collect()
    }

    /// Arenas of which something is left or leaving.
    pub fn len(&self) -> usize {
        self.arenas.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.arenas.is_empty()
    }

    /// Parts of all.
    pub fn num_parts(&self) -> usize {
        self.parts.len()
    }

    /// Bytes that are pinned: a part that was cut away is, as long as another one of its arena is left.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pages of the aligned windows of `window_pages` around a range of addresses, cut to the part of an arena that
    /// holds its first one. Empty: nothing stands there, or it is leaving, or the window is empty.
    pub fn window(&self, asked: Range<u64>, window_pages: u32) -> Window {
        self.lookup_window(asked, window_pages).unwrap_or_default()
    }

    fn lookup_window(&self, asked: Range<u64>, window_pages: u32) -> Option<Window> {
        let (&part_va, part) = self.parts.range(..=asked.start).next_back()?;
        if asked.start >= part.end || part.leaving.is_some() || window_pages == 0 {
            return None;
        }
        let arena = &self.arenas.get(&part.arena)?.arena;
        let window = u64::from(window_pages) * PAGE_SIZE;
        let va = (asked.start - asked.start % window).max(part_va);
        let end = asked.end.checked_next_multiple_of(window).unwrap_or(u64::MAX).min(part.end);
        let page_of = |va: u64| usize::try_from((va - arena.va) / PAGE_SIZE).ok();
        Some(Window { va, pages: arena.pages.clone(), range: page_of(va)?..page_of(end)? })
    }
}

/// Pages that stood in a table when it was looked at.
#[derive(Clone, Debug, Default)]
pub struct Window {
    va: u64,
    pages: Arc<[u64]>,
    range: Range<usize>,
}

impl Window {
    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The pages, of which physically contiguous ones are one run; at most [`MAX_RUNS`] runs. `as_of`: the invalidation
    /// sequence that was held before the table was looked at.
    pub fn runs(&self, as_of: u64) -> Vec<PageRun> {
        merge(self.va, self.pages.get(self.range.clone()).unwrap_or_default(), as_of)
    }
}

fn merge(first: u64, pages: &[u64], as_of: u64) -> Vec<PageRun> {
    let most = usize::try_from(MAX_RUNS).unwrap_or(usize::MAX);
    let mut runs: Vec<PageRun> = Vec::new();
    let mut va = first;
    for &gpa in pages {
        let goes_on = runs.last_mut().filter(|run| behind(run) == gpa);
        if let Some(run) = goes_on {
            run.pages = (run.pages.get() + 1).into();
        } else if runs.len() < most {
            let (va, gpa, as_of) = (va.into(), gpa.into(), as_of.into());
            runs.push(PageRun { va, gpa, pages: 1.into(), flags: 0.into(), as_of });
        } else {
            break;
        }
        va += PAGE_SIZE;
    }
    runs
}

/// The page behind a run.
fn behind(run: &PageRun) -> u64 {
    run.gpa.get() + u64::from(run.pages.get()) * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena(va: u64, pages: &[u64]) -> Arena {
        let len = pages.len() as u64 * PAGE_SIZE;
        Arena { id: va, uid: 0, va, len, pages: pages.iter().map(|p| p * PAGE_SIZE).collect() }
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
        let runs = table.window(0x12000..0x13000, 16).runs(4);
        assert_eq!(shape(&runs), [(0x10000, 7, 3), (0x13000, 3, 1), (0x14000, 5, 2)]);
        assert!(runs.iter().all(|run| run.as_of.get() == 4 && run.flags.get() == 0));
    }

    #[test]
    fn window_is_aligned_and_cut_to_the_arena() {
        let pages: Vec<u64> = (0..64).map(|n| n * 2).collect();
        let table = table(&[arena(0x3000, &pages)]);
        let first = |address: u64, window| shape(&table.window(address..address + 1, window).runs(0));
        assert_eq!(first(0x5000, 4), [(0x4000, 2, 1), (0x5000, 4, 1), (0x6000, 6, 1), (0x7000, 8, 1)]);
        assert_eq!(first(0x3000, 4), [(0x3000, 0, 1)]);
        assert_eq!(first(0x42000, 4), [(0x40000, 122, 1), (0x41000, 124, 1), (0x42000, 126, 1)]);
        assert_eq!(first(0x5fff, 1), [(0x5000, 4, 1)]);
    }

    #[test]
    fn range_is_covered_by_whole_windows() {
        let pages: Vec<u64> = (0..64).map(|n| n * 2).collect();
        let table = table(&[arena(0x3000, &pages)]);
        let runs = shape(&table.window(0x5000..0xa000, 4).runs(0));
        assert_eq!(
            (runs.first().copied(), runs.last().copied()),
            (Some((0x4000, 2, 1)), Some((0xb000, 16, 1)))
        );
        assert_eq!(runs.len(), 8);
        assert_eq!(table.window(0x41000..0x90000, 16).runs(0).len(), 3, "cut to the arena");
    }

    /// What is left out is asked for again.
    #[test]
    fn answer_holds_as_many_runs_as_a_command_takes() {
        let pages: Vec<u64> = (0..6000).map(|n| n * 2).collect();
        let table = table(&[arena(0x10000, &pages)]);
        let runs = table.window(0x10000..0x10000 + 6000 * PAGE_SIZE, 16).runs(0);
        assert_eq!(shape(&runs).last(), Some(&(0x10000 + 4095 * PAGE_SIZE, 2 * 4095, 1)));
    }

    #[test]
    fn address_outside_every_arena_has_no_window() {
        let table = table(&[arena(0x10000, &[1, 2]), arena(0x20000, &[3])]);
        for address in [0, 0xffff, 0x12000, 0x1f000, 0x21000, u64::MAX] {
            assert!(table.window(address..address.saturating_add(1), 16).is_empty(), "{address:#x}");
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

    /// Fault-around ends at what was cut away, before and after the rest of the arena.
    #[test]
    fn window_is_cut_to_the_part() {
        let mut table = table(&[arena(0x10000, &[0, 1, 2, 3, 4, 5, 6, 7])]);
        let withdrawn = table.withdraw_part(1, 0x10000, (0x3000, 0x2000), 8).unwrap();
        let check = |table: &ArenaTable| {
            for (at, expected) in [
                (0x11000, vec![(0x10000, 0, 3)]),
                (0x16000, vec![(0x15000, 5, 3)]),
                (0x13000, vec![]),
                (0x14000, vec![]),
            ] {
                assert_eq!(shape(&table.window(at..at + 1, 16).runs(0)), expected, "{at:#x}");
            }
        };
        check(&table);
        assert!(table.overlaps(0x13000, 1), "an engine may still be there");
        assert!(table.remove(&withdrawn).is_none(), "the rest is left");
        check(&table);
        assert!(!table.overlaps(0x13000, 0x2000));
        assert_eq!(table.bytes(), 0x8000, "still pinned");
    }

    #[test]
    fn cut_of_what_is_not_there_is_refused() {
        let mut table = table(&[arena(0x10000, &[0, 1, 2, 3])]);
        for part in [(0, 0), (0, 0x5000), (0x4000, 0x1000), (u64::MAX - 0xfff, 0x1000), (0x1000, u64::MAX)] {
            let refused = table.withdraw_part(1, 0x10000, part, 8);
            assert!(matches!(refused, Err(Error::BadRange { .. })), "{part:x?}");
        }
        assert!(matches!(table.withdraw_part(1, 7, (0, 0x1000), 8), Err(Error::NoArena(7))));
        table.withdraw_part(1, 0x10000, (0x1000, 0x1000), 8).unwrap();
        for part in [(0x1000, 0x1000), (0, 0x2000), (0x1000, 0x3000), (0, 0x4000)] {
            let refused = table.withdraw_part(2, 0x10000, part, 8);
            assert!(matches!(refused, Err(Error::CutBefore { .. })), "{part:x?}");
        }
        table.withdraw(3, 0x10000).unwrap();
        assert!(matches!(table.withdraw(4, 0x10000), Err(Error::NoArena(_))), "all of it is leaving");
    }

    /// A range that needs no more parts than there are can be cut however many there are.
    #[test]
    fn parts_are_limited() {
        let mut table = table(&[arena(0x10000, &[0, 1, 2, 3, 4, 5])]);
        table.withdraw_part(1, 0x10000, (0x1000, 0x1000), 3).unwrap();
        let refused = table.withdraw_part(2, 0x10000, (0x3000, 0x1000), 3);
        assert!(matches!(refused, Err(Error::TooMany { limit: 3, .. })));
        assert_eq!(shape(&table.window(0x13000..0x13001, 16).runs(0)), [(0x12000, 2, 4)], "untouched");
        table.withdraw_part(3, 0x10000, (0x2000, 0x4000), 3).unwrap();
    }
}
