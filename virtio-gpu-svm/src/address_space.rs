//! The A side: what is known of one guest process' CPU address space, virtual page -> guest-physical page.
//!
//! Supplied by the guest, dropped by invalidation, shared by all GPU VMs of the context. Owned by
//! [`crate::context::Context`], under its lock. Translations are kept per 2 MiB leaf, and so is the invalidation
//! sequence: a run of pages that was translated before an invalidation of its leaf is refused ([`Install::Raced`]),
//! and an unrelated munmap does not starve a fault. Leaves that do not exist share one sequence.
//!
//! A leaf is one run, or a table (`table`) of 4 bytes a page, or of 8 once a page of it lies at 4 TiB of guest-physical
//! space or beyond. It is charged what it takes, and one run what it takes once it is cut.

mod table;

use self::table::Table;
use crate::addr::PageRange;
use crate::protocol::{LEAF_SIZE, PAGE_SHIFT};
use crate::quota::{Charge, Full};
use crate::seeded::{self, Bug};
use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;
use std::ops::{ControlFlow, Range};

/// log2 of the pages of a leaf.
pub const LEAF_PAGES_SHIFT: u32 = LEAF_SIZE.trailing_zeros() - PAGE_SHIFT;
/// Pages of a leaf.
pub const LEAF_PAGES: u64 = 1 << LEAF_PAGES_SHIFT;
/// Most leaves of one address space.
pub const MAX_LEAVES: usize = 65_536;

/// What a leaf takes in the tree of leaves.
const LEAF_BYTES: u64 = 96;

/// A page that the guest has supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical page number.
    pub gpa_page: u64,
    /// Whether the process itself may only read it.
    pub readonly: bool,
}

impl Page {
    /// The page `n` further in a contiguous run.
    pub fn plus(self, n: u64) -> Self {
        Self { gpa_page: self.gpa_page.wrapping_add(n), ..self }
    }
    /// Whether a known page may become another, while GPU VMs use it: the same, with no fewer rights.
    #[inline]
    fn allows(self, new: Self) -> bool {
        self.gpa_page == new.gpa_page && (self.readonly || !new.readonly)
    }
}

/// A checked run of pages: contiguous in both spaces, inside guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Pages of the process.
    pub va: PageRange,
    /// What the first of them is.
    pub first: Page,
    /// The sequence that the guest held before it translated.
    pub as_of: u64,
}

impl Run {
    /// Whether all of it lies in a leaf.
    #[inline]
    fn lies_in(&self, index: u64) -> bool {
        let last = self.va.end.saturating_sub(1);
        (self.va.start >> LEAF_PAGES_SHIFT, last >> LEAF_PAGES_SHIFT) == (index, index)
    }
    /// Its slots in a leaf that it touches, and what the first of these is.
    fn in_leaf(&self, index: u64) -> (Range<u64>, Page) {
        let before = (index << LEAF_PAGES_SHIFT).saturating_sub(self.va.start);
        (slots_of(self.va, index), self.first.plus(before))
    }
    /// What the leaves that it touches take, if nothing else is in them.
    fn bytes_in(&self, leaves: &Range<u64>) -> u64 {
        let all = leaves.end.saturating_sub(leaves.start);
        let narrow_pages = Table::<u32>::places_from(self.first);
        let narrow = if narrow_pages < self.va.pages() {
            let first_wide = self.va.start.saturating_add(narrow_pages) >> LEAF_PAGES_SHIFT;
            first_wide.saturating_sub(leaves.start)
        } else {
            all
        };
        let wide = all.saturating_sub(narrow);
        let pages = narrow.saturating_mul(Table::<u32>::BYTES);
        let pages = pages.saturating_add(wide.saturating_mul(Table::<u64>::BYTES));
        pages.saturating_add(all.saturating_mul(LEAF_BYTES))
    }
}

/// A list of runs.
#[derive(Clone)]
pub struct Runs<I> {
    /// One after the other.
    pub each: I,
    /// What they are within, if somebody has looked. It is believed: where it lies in guest memory, no run is looked at.
    pub bounds: Option<Bounds>,
}

impl<I> Runs<I> {
    /// Nobody has looked.
    pub fn new(each: I) -> Self {
        Self { each, bounds: None }
    }
}

/// What all runs of a list are within.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Guest-physical pages that hold all of theirs.
    pub gpa_pages: PageRange,
    /// No run was translated at a newer sequence.
    pub newest: u64,
}

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Install {
    /// It stands.
    Done,
    /// An invalidation of its leaf is newer; nothing of it was installed.
    Raced,
    /// It contradicts a page that is known and was not invalidated; nothing of it was installed.
    Conflict,
    /// Too many leaves; nothing of it was installed.
    Full,
    /// The guest's tables take too many bytes; nothing of it was installed.
    OverQuota,
}

enum Pages {
    Empty,
    /// The whole leaf is one run.
    Large(Page),
    /// One by one, all below 4 TiB of guest-physical space.
    Narrow(Box<Table<u32>>),
    /// One by one, anywhere.
    Wide(Box<Table<u64>>),
}

struct Leaf {
    /// Last invalidation that touched it.
    invalidated: u64,
    known: u64,
    pages: Pages,
}

/// The A side of one context.
#[derive(Default)]
pub struct AddressSpace {
    leaves: BTreeMap<u64, Leaf>,
    /// Last invalidation accepted.
    seq: u64,
    /// Last invalidation that touched a leaf which does not exist.
    absent_invalidated: u64,
    known: u64,
    /// Of all leaves.
    charge: Charge,
}

impl AddressSpace {
    /// Nothing is known; the charge is for what will be.
    pub fn new(charge: Charge) -> Self {
        Self { charge, ..Self::default() }
    }
    /// Bytes that its leaves are charged.
    pub fn bytes(&self) -> u64 {
        self.charge.amount()
    }
    /// The same, counted from the leaves themselves.
    pub fn weigh(&self) -> u64 {
        self.leaves.values().map(Leaf::bytes).fold(0, u64::saturating_add)
    }
    /// Last invalidation accepted; the newest `as_of` that a run may carry.
    pub fn seq(&self) -> u64 {
        self.seq
    }
    /// Pages known.
    pub fn known_pages(&self) -> u64 {
        self.known
    }
    /// Begins to read pages one after the other.
    pub fn walk(&self) -> Walk<'_> {
        Walk { space: self, hot: None, behind: None }
    }
    /// What a page is, if it is known.
    pub fn lookup(&self, page: u64) -> Option<Page> {
        self.leaves.get(&(page >> LEAF_PAGES_SHIFT))?.page(page & (LEAF_PAGES - 1))
    }
    /// The first page of the leaf that holds `page`, if the whole leaf is one run.
    pub fn lookup_large(&self, page: u64) -> Option<Page> {
        match self.leaves.get(&(page >> LEAF_PAGES_SHIFT))?.pages {
            Pages::Large(first) => Some(first),
            Pages::Empty | Pages::Narrow(_) | Pages::Wide(_) => None,
        }
    }
    /// Gives the leaf of a page a sequence of its own, so that an answer which is on its way races only with
    /// invalidations of this leaf. Without effect when there are too many leaves.
    pub fn keep_leaf(&mut self, page: u64) {
        let index = page >> LEAF_PAGES_SHIFT;
        if self.leaves.contains_key(&index) {
            return;
        }
        if self.leaves.len() < MAX_LEAVES && self.charge.grow(LEAF_BYTES).is_ok() {
            self.obtain_leaf(index);
        }
    }
    /// Installs runs one after the other, each whole or not at all, and tells what became of how many of them until `tell`
    /// has heard enough; of more than one only where they stand. A leaf is found once for all runs in a row that lie in it.
    pub fn install_all(
        &mut self,
        mut runs: impl Iterator<Item = Run>,
        mut tell: impl FnMut(Install, u32) -> ControlFlow<()>,
    ) {
        let mut next = runs.next();
        while let Some(run) = next {
            let index = run.va.start >> LEAF_PAGES_SHIFT;
            if !run.lies_in(index) || seeded::on(Bug::WrongLeaf) {
                if tell(self.install(&run), 1).is_break() {
                    return;
                }
                next = runs.next();
                continue;
            }
            let Self { leaves, known, charge, absent_invalidated, .. } = self;
            let full = leaves.len() >= MAX_LEAVES;
            let leaf = match leaves.entry(index) {
                btree_map::Entry::Occupied(leaf) => leaf.into_mut(),
                btree_map::Entry::Vacant(place) => {
                    let became = room_for_leaf(*absent_invalidated, &run, full, charge);
                    if became == Install::Done {
                        let leaf = place.insert(Leaf { invalidated: *absent_invalidated, ..Leaf::EMPTY });
                        leaf.fill(slots_of(run.va, index), run.first);
                        *known = known.wrapping_add(leaf.known);
                    }
                    if tell(became, 1).is_break() {
                        return;
                    }
                    next = runs.next();
                    continue;
                }
            };
            let known_before = leaf.known;
            let rest = leaf.install_all(index, run, &mut runs, charge, &mut tell);
            *known = known.wrapping_add(leaf.known.wrapping_sub(known_before));
            match rest {
                ControlFlow::Continue(rest) => next = rest,
                ControlFlow::Break(()) => return,
            }
        }
    }
    /// Installs a run, all of it or nothing.
    pub fn install(&mut self, run: &Run) -> Install {
        let leaves = leaves_of(run.va);
        let existing = self.leaves.range(leaves.clone());
        let (mut present, mut before, mut kept, mut contradicts) = (0_u64, 0_u64, 0_u64, false);
        for (index, leaf) in existing {
            let neighbour = seeded::on(Bug::WrongLeaf).then(|| self.leaves.get(&(index ^ 1)));
            let invalidated = match neighbour {
                None => leaf.invalidated,
                Some(wrong) => wrong.map_or(self.absent_invalidated, |leaf| leaf.invalidated),
            };
            if is_stale(invalidated, run) {
                return Install::Raced;
            }
            let (slots, first) = run.in_leaf(*index);
            before = before.saturating_add(leaf.bytes());
            // What it takes more than if there was only this run.
            let alone = Leaf::EMPTY.bytes_with(&slots, first);
            kept = kept.saturating_add(leaf.bytes_with(&slots, first).saturating_sub(alone));
            contradicts |= leaf.contradicts(slots, first);
            present = present.saturating_add(1);
        }
        let missing = leaves.end.saturating_sub(leaves.start).saturating_sub(present);
        if missing > 0 && is_stale(self.absent_invalidated, run) {
            return Install::Raced;
        }
        if contradicts {
            return Install::Conflict;
        }
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        if self.leaves.len().saturating_add(missing) > MAX_LEAVES {
            return Install::Full;
        }
        if recharge(&mut self.charge, before, run.bytes_in(&leaves).saturating_add(kept)).is_err() {
            return Install::OverQuota;
        }
        for index in leaves {
            let (slots, first) = run.in_leaf(index);
            let leaf = self.obtain_leaf(index);
            let before = leaf.known;
            leaf.fill(slots, first);
            let after = leaf.known;
            self.known = self.known.wrapping_add(after).wrapping_sub(before);
        }
        Install::Done
    }
    /// Drops a range and returns the new sequence. Touches only leaves that exist.
    pub fn invalidate(&mut self, range: PageRange) -> u64 {
        self.seq = self.seq.saturating_add(1);
        let (seq, leaves) = (self.seq, leaves_of(range));
        let wanted = leaves.end.wrapping_sub(leaves.start);
        let (mut existing, mut emptied, mut freed) = (0_u64, 0_u64, 0_u64);
        let known = &mut self.known;
        let gone = self.leaves.extract_if(leaves, |index, leaf| {
            existing = existing.saturating_add(1);
            let (before, bytes) = (leaf.known, leaf.bytes());
            leaf.clear(slots_of(range, *index));
            leaf.invalidated = seq;
            *known = known.wrapping_sub(before.wrapping_sub(leaf.known));
            let empty = leaf.known == 0;
            freed = freed.saturating_add(if empty { bytes } else { 0 });
            empty
        });
        gone.for_each(|_| emptied = emptied.saturating_add(1));
        if existing < wanted || emptied > 0 {
            self.absent_invalidated = seq;
        }
        self.charge.shrink(freed);
        seq
    }
    /// Forgets every page for which `gone(gpa_page)` holds: its memory was taken away by the VMM.
    pub fn forget(&mut self, gone: impl Fn(u64) -> bool) {
        let mut freed = 0_u64;
        for leaf in self.leaves.values_mut() {
            let (before, bytes) = (leaf.known, leaf.bytes());
            for slot in 0..LEAF_PAGES {
                if leaf.page(slot).is_some_and(|page| gone(page.gpa_page)) {
                    leaf.clear(slot..slot.saturating_add(1));
                }
            }
            if leaf.known == 0 {
                leaf.pages = Pages::Empty;
            }
            self.known = self.known.wrapping_sub(before.wrapping_sub(leaf.known));
            freed = freed.saturating_add(bytes.saturating_sub(leaf.bytes()));
        }
        self.charge.shrink(freed);
    }
    fn obtain_leaf(&mut self, index: u64) -> &mut Leaf {
        let invalidated = self.absent_invalidated;
        self.leaves.entry(index).or_insert(Leaf { invalidated, ..Leaf::EMPTY })
    }
}

impl Leaf {
    const EMPTY: Self = Self { invalidated: 0, known: 0, pages: Pages::Empty };

    fn bytes(&self) -> u64 {
        let pages = match &self.pages {
            Pages::Empty => 0,
            // An invalidation may cut it, and cannot fail.
            Pages::Large(first) => table_bytes(*first, LEAF_PAGES),
            Pages::Narrow(_) => Table::<u32>::BYTES,
            Pages::Wide(_) => Table::<u64>::BYTES,
        };
        LEAF_BYTES.saturating_add(pages)
    }
    /// The same, once a run is there too.
    fn bytes_with(&self, slots: &Range<u64>, first: Page) -> u64 {
        let pages = slots.end.saturating_sub(slots.start);
        let bytes = LEAF_BYTES.saturating_add(table_bytes(first, pages));
        // One run takes the place of whatever is there.
        if pages == LEAF_PAGES { bytes } else { bytes.max(self.bytes()) }
    }
    #[inline]
    fn page(&self, slot: u64) -> Option<Page> {
        match &self.pages {
            Pages::Empty => None,
            Pages::Large(first) => Some(first.plus(slot)),
            Pages::Narrow(table) => table.page(slot),
            Pages::Wide(table) => table.page(slot),
        }
    }
    /// Installs runs until one does not lie in this leaf, which is returned.
    fn install_all(
        &mut self,
        index: u64,
        first: Run,
        runs: &mut impl Iterator<Item = Run>,
        charge: &mut Charge,
        tell: &mut impl FnMut(Install, u32) -> ControlFlow<()>,
    ) -> ControlFlow<(), Option<Run>> {
        let mut next = Some(first);
        while let Some(run) = next {
            let (done, rest) = self.install_pages(index, run, runs);
            if done > 0 {
                tell(Install::Done, done)?;
            }
            let Some(run) = rest.filter(|run| run.lies_in(index)) else { return ControlFlow::Continue(rest) };
            tell(self.install(&run, index, charge), 1)?;
            next = runs.next();
        }
        ControlFlow::Continue(None)
    }
    /// Installs runs of one page until one needs more, lies elsewhere or is refused, which is returned too. How many.
    #[inline]
    fn install_pages(
        &mut self,
        index: u64,
        first: Run,
        runs: &mut impl Iterator<Item = Run>,
    ) -> (u32, Option<Run>) {
        let (done, added, rest) = match &mut self.pages {
            Pages::Empty | Pages::Large(_) => return (0, Some(first)),
            Pages::Narrow(table) => table.install_pages(index, self.invalidated, first, runs),
            Pages::Wide(table) => table.install_pages(index, self.invalidated, first, runs),
        };
        self.known = self.known.saturating_add(added);
        (done, rest)
    }
    /// Installs a run that lies in this leaf.
    fn install(&mut self, run: &Run, index: u64, charge: &mut Charge) -> Install {
        if is_stale(self.invalidated, run) {
            return Install::Raced;
        }
        let (slots, first) = run.in_leaf(index);
        if self.contradicts(slots.clone(), first) {
            return Install::Conflict;
        }
        if recharge(charge, self.bytes(), self.bytes_with(&slots, first)).is_err() {
            return Install::OverQuota;
        }
        self.fill(slots, first);
        Install::Done
    }
    /// Whether a known page would become another one, or lose rights, behind the back of GPU VMs that use it.
    fn contradicts(&self, slots: Range<u64>, first: Page) -> bool {
        match &self.pages {
            Pages::Empty => false,
            Pages::Large(known) => !known.plus(slots.start).allows(first),
            Pages::Narrow(table) => table.contradicts(slots, first),
            Pages::Wide(table) => table.contradicts(slots, first),
        }
    }
    fn fill(&mut self, slots: Range<u64>, first: Page) {
        let pages = slots.end.saturating_sub(slots.start);
        if pages == LEAF_PAGES {
            self.pages = Pages::Large(first);
            self.known = LEAF_PAGES;
            return;
        }
        self.cut(!Table::<u32>::holds(first, pages));
        let added = match &mut self.pages {
            Pages::Empty | Pages::Large(_) => 0,
            Pages::Narrow(table) => table.fill(slots, first),
            Pages::Wide(table) => table.fill(slots, first),
        };
        self.known = self.known.saturating_add(added);
    }
    fn clear(&mut self, slots: Range<u64>) {
        if self.known == 0 || slots == (0..LEAF_PAGES) {
            self.pages = Pages::Empty;
            self.known = 0;
            return;
        }
        self.cut(false);
        let dropped = match &mut self.pages {
            Pages::Empty | Pages::Large(_) => 0,
            Pages::Narrow(table) => table.clear(slots),
            Pages::Wide(table) => table.clear(slots),
        };
        self.known = self.known.saturating_sub(dropped);
    }
    /// Its pages are kept one by one from now on: anywhere, if this is asked for or they are there. A wide table stays one as
    /// long as the leaf has a page.
    fn cut(&mut self, wide: bool) {
        let pages = match &self.pages {
            Pages::Narrow(table) if wide => Pages::Wide(table.widened()),
            Pages::Narrow(_) | Pages::Wide(_) => return,
            Pages::Empty if wide => Pages::Wide(Table::empty()),
            Pages::Empty => Pages::Narrow(Table::empty()),
            Pages::Large(first) if wide || !Table::<u32>::holds(*first, LEAF_PAGES) => {
                Pages::Wide(Table::of_run(*first))
            }
            Pages::Large(first) => Pages::Narrow(Table::of_run(*first)),
        };
        self.pages = pages;
    }
}

/// What a table takes that is made for a run.
fn table_bytes(first: Page, pages: u64) -> u64 {
    if Table::<u32>::holds(first, pages) { Table::<u32>::BYTES } else { Table::<u64>::BYTES }
}

/// Reads pages one after the other; finds a leaf once.
pub struct Walk<'a> {
    space: &'a AddressSpace,
    hot: Option<(u64, Option<&'a Leaf>)>,
    /// The leaves behind the hot one, once a leaf was followed by the next.
    behind: Option<Peekable<btree_map::Range<'a, u64, Leaf>>>,
}

impl<'a> Walk<'a> {
    /// How many of `most` pages from `page` on are surely not known, as far as its leaf goes; 0 if it is.
    pub fn gap(&mut self, page: u64, most: u64) -> u64 {
        let slot = page & (LEAF_PAGES - 1);
        let most = most.min(LEAF_PAGES.saturating_sub(slot));
        let slots = slot..slot.saturating_add(most);
        match self.leaf(page).map(|leaf| &leaf.pages) {
            None | Some(Pages::Empty) => most,
            Some(Pages::Large(_)) => 0,
            Some(Pages::Narrow(table)) => table.gap(slots),
            Some(Pages::Wide(table)) => table.gap(slots),
        }
    }
    /// Writes what `make` makes of the pages from `page` on, as far as their leaf goes, until one is not known or nothing is
    /// made of it. How many; none where the leaf is in one piece.
    #[inline]
    pub fn small<T>(&mut self, page: u64, to: &mut [T], make: impl Fn(Page) -> Option<T>) -> usize {
        let slot = page & (LEAF_PAGES - 1);
        match self.leaf(page).map(|leaf| &leaf.pages) {
            None | Some(Pages::Empty | Pages::Large(_)) => 0,
            Some(Pages::Narrow(table)) => table.read(slot, to, make),
            Some(Pages::Wide(table)) => table.read(slot, to, make),
        }
    }
    #[inline]
    fn leaf(&mut self, page: u64) -> Option<&'a Leaf> {
        let index = page >> LEAF_PAGES_SHIFT;
        match self.hot {
            Some((hot, leaf)) if hot == index => leaf,
            Some((hot, _)) if hot.checked_add(1) == Some(index) => self.next_leaf(index),
            _ => {
                let leaf = self.space.leaves.get(&index);
                (self.hot, self.behind) = (Some((index, leaf)), None);
                leaf
            }
        }
    }
    fn next_leaf(&mut self, index: u64) -> Option<&'a Leaf> {
        let leaves = &self.space.leaves;
        let behind = self.behind.get_or_insert_with(|| leaves.range(index..).peekable());
        let leaf = behind.next_if(|(at, _)| **at == index).map(|(_, leaf)| leaf);
        self.hot = Some((index, leaf));
        leaf
    }
    /// What a page is, and how many of `most` pages from it on follow in guest memory too, as far as its leaf goes; at
    /// least 1. None if it is not known.
    #[inline]
    pub fn run(&mut self, page: u64, most: u64) -> Option<(Page, u64)> {
        let leaf = self.leaf(page);
        let slot = page & (LEAF_PAGES - 1);
        let most = most.min(LEAF_PAGES.saturating_sub(slot));
        match &leaf?.pages {
            Pages::Empty => None,
            Pages::Large(first) => Some((first.plus(slot), most)),
            Pages::Narrow(table) => table.run(slot..slot.saturating_add(most)),
            Pages::Wide(table) => table.run(slot..slot.saturating_add(most)),
        }
    }
}

/// Whether a run may make the leaf that it lies in; then that is charged.
fn room_for_leaf(invalidated: u64, run: &Run, full: bool, charge: &mut Charge) -> Install {
    if is_stale(invalidated, run) {
        Install::Raced
    } else if full {
        Install::Full
    } else if charge.grow(LEAF_BYTES.saturating_add(table_bytes(run.first, run.va.pages()))).is_err() {
        Install::OverQuota
    } else {
        Install::Done
    }
}

/// Whether a run was translated before an invalidation of its leaf.
fn is_stale(invalidated: u64, run: &Run) -> bool {
    invalidated > run.as_of && !seeded::on(Bug::InstallStale)
}

/// What was charged so many bytes takes so many. That may be less: one run may take the place of a wide table.
fn recharge(charge: &mut Charge, before: u64, after: u64) -> Result<(), Full> {
    charge.resize(charge.amount().saturating_sub(before).saturating_add(after))
}

fn leaves_of(range: PageRange) -> Range<u64> {
    let last = range.end.saturating_sub(1) >> LEAF_PAGES_SHIFT;
    (range.start >> LEAF_PAGES_SHIFT)..last.saturating_add(1)
}

/// The slots of a range in a leaf that it touches.
fn slots_of(range: PageRange, index: u64) -> Range<u64> {
    let base = index << LEAF_PAGES_SHIFT;
    range.start.saturating_sub(base)..range.end.saturating_sub(base).min(LEAF_PAGES)
}

#[cfg(test)]
mod tests;
