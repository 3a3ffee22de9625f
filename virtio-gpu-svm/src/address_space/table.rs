//! The pages of a leaf one by one: a table of entries, 4 bytes each where every page lies below 4 TiB of guest-physical
//! space, else 8.
//!
//! Used by [`super::Leaf`], which knows how many entries are there, what is charged for them, and when a table must
//! become a wide one. One code for both; the loops over pages are compiled for each.

use super::{LEAF_PAGES, LEAF_PAGES_SHIFT, Page, Run, is_stale};
use std::ops::{BitOr, Range};

const LEAF_SLOTS: usize = 512;
const _: () = assert!(LEAF_SLOTS.ilog2() == LEAF_PAGES_SHIFT);

/// What is known of a page: its number, above that whether it is read-only, above that whether it is known. 0: it is not.
pub(super) trait Entry: Copy + Eq + Default + Into<u64> + BitOr<Output = Self> {
    /// Bits of a page's number.
    const PAGE_BITS: u32;
    /// Numbers below it have a place.
    const PLACES: u64 = 1 << Self::PAGE_BITS;
    const NUMBER: u64 = Self::PLACES.wrapping_sub(1);
    const READONLY: u64 = 1 << Self::PAGE_BITS;
    const PRESENT: u64 = 2 << Self::PAGE_BITS;

    /// The low bits of a number.
    fn low(bits: u64) -> Self;
    /// Whether a page's number has a place.
    fn holds(gpa_page: u64) -> bool {
        gpa_page >> Self::PAGE_BITS == 0
    }
    /// Of a page whose number has a place.
    #[inline]
    fn of(page: Page) -> Self {
        Self::low(page.gpa_page | Self::PRESENT | if page.readonly { Self::READONLY } else { 0 })
    }
    /// The entry of the page `n` further, whose number has a place too.
    #[inline]
    fn plus(self, n: u64) -> Self {
        let bits: u64 = self.into();
        Self::low(bits.wrapping_add(n))
    }
    /// What it says.
    #[inline]
    fn page(self) -> Option<Page> {
        let bits: u64 = self.into();
        let page = Page { gpa_page: bits & Self::NUMBER, readonly: bits & Self::READONLY != 0 };
        (bits & Self::PRESENT != 0).then_some(page)
    }
    fn is_known(self) -> bool {
        self != Self::default()
    }
}

impl Entry for u32 {
    const PAGE_BITS: u32 = 30;
    #[expect(clippy::cast_possible_truncation, reason = "the low bits are asked for")]
    #[inline]
    fn low(bits: u64) -> Self {
        bits as Self
    }
}

impl Entry for u64 {
    const PAGE_BITS: u32 = 62;
    #[inline]
    fn low(bits: u64) -> Self {
        bits
    }
}

/// The entries of a leaf.
pub(super) struct Table<E>([E; LEAF_SLOTS]);

impl<E: Entry> Table<E> {
    /// What it takes.
    pub(super) const BYTES: u64 = size_of::<E>() as u64 * LEAF_PAGES;

    /// Nothing is known.
    pub(super) fn empty() -> Box<Self> {
        Box::new(Self([E::default(); LEAF_SLOTS]))
    }
    /// All of it is one run.
    pub(super) fn of_run(first: Page) -> Box<Self> {
        let mut table = Self::empty();
        table.fill(0..LEAF_PAGES, first);
        table
    }
    /// How many pages of a run have a place here, from its first on.
    pub(super) fn places_from(first: Page) -> u64 {
        E::PLACES.saturating_sub(first.gpa_page)
    }
    /// Whether so many pages of a run have a place here.
    pub(super) fn holds(first: Page, pages: u64) -> bool {
        pages <= Self::places_from(first)
    }
    /// What a page is, if it is known.
    #[inline]
    pub(super) fn page(&self, slot: u64) -> Option<Page> {
        self.0.get(usize::try_from(slot).ok()?)?.page()
    }
    fn slots(&self, slots: Range<u64>) -> &[E] {
        match (usize::try_from(slots.start), usize::try_from(slots.end)) {
            (Ok(start), Ok(end)) => self.0.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }
    fn slots_mut(&mut self, slots: Range<u64>) -> &mut [E] {
        match (usize::try_from(slots.start), usize::try_from(slots.end)) {
            (Ok(start), Ok(end)) => self.0.get_mut(start..end).unwrap_or_default(),
            _ => &mut [],
        }
    }
    #[expect(clippy::indexing_slicing, reason = "the index is masked to the length of the table")]
    #[inline]
    fn entry_mut(&mut self, page: u64) -> &mut E {
        &mut self.0[(page & (LEAF_PAGES - 1)) as usize & (LEAF_SLOTS - 1)]
    }
    /// Whether a known page does not allow what a run says of it.
    pub(super) fn contradicts(&self, slots: Range<u64>, first: Page) -> bool {
        let entries = self.slots(slots);
        if !entries.iter().fold(E::default(), |any, entry| any | *entry).is_known() {
            return false;
        }
        // Not compared as entries: the run may have no place here.
        let allows = |(entry, n): (&E, u64)| entry.page().is_none_or(|known| known.allows(first.plus(n)));
        !entries.iter().zip(0..).all(allows)
    }
    /// Stores runs of one page, of leaf `index`, until one is longer, lies elsewhere, has no place here or is refused, which
    /// is returned too. How many, and how many of these were not known.
    #[inline]
    pub(super) fn install_pages(
        &mut self,
        index: u64,
        invalidated: u64,
        first: Run,
        runs: &mut impl Iterator<Item = Run>,
    ) -> (u32, u64, Option<Run>) {
        let (mut run, mut done, mut known) = (first, 0_u32, 0_u64);
        loop {
            if run.va.end != run.va.start.wrapping_add(1)
                || run.va.start >> LEAF_PAGES_SHIFT != index
                || !E::holds(run.first.gpa_page)
                || is_stale(invalidated, &run)
            {
                break (done, u64::from(done).wrapping_sub(known), Some(run));
            }
            let entry = self.entry_mut(run.va.start);
            if let Some(page) = entry.page() {
                if !page.allows(run.first) {
                    break (done, u64::from(done).wrapping_sub(known), Some(run));
                }
                known = known.wrapping_add(1);
            }
            *entry = E::of(run.first);
            // No more than the runs of a command.
            done = done.wrapping_add(1);
            match runs.next() {
                Some(next) => run = next,
                None => break (done, u64::from(done).wrapping_sub(known), None),
            }
        }
    }
    /// Stores a run that has a place here. How many of its pages were not known.
    pub(super) fn fill(&mut self, slots: Range<u64>, first: Page) -> u64 {
        let (mut added, first) = (0_u64, E::of(first));
        for (entry, n) in self.slots_mut(slots).iter_mut().zip(0..) {
            added = added.wrapping_add(u64::from(!entry.is_known()));
            *entry = first.plus(n);
        }
        added
    }
    /// Drops pages. How many of them were known.
    pub(super) fn clear(&mut self, slots: Range<u64>) -> u64 {
        let mut dropped = 0_u64;
        for entry in self.slots_mut(slots) {
            dropped = dropped.saturating_add(u64::from(entry.is_known()));
            *entry = E::default();
        }
        dropped
    }
    /// How many of the pages are not known before the first that is; all of them where none is.
    pub(super) fn gap(&self, slots: Range<u64>) -> u64 {
        let entries = self.slots(slots);
        let known = entries.iter().position(|entry| entry.is_known());
        known.unwrap_or(entries.len()) as u64
    }
    /// The first of the pages, and how many of them from it on follow it in guest memory. None if it is not known.
    #[inline]
    pub(super) fn run(&self, slots: Range<u64>) -> Option<(Page, u64)> {
        let entries = self.slots(slots);
        let first = *entries.first()?;
        let page = first.page()?;
        // Beyond the last number that has a place its neighbour would look like a page with another right.
        let follows = |(entry, n): &(&E, u64)| **entry == first.plus(*n);
        let run = entries.iter().zip(0..Self::places_from(page)).take_while(follows).count();
        Some((page, run as u64))
    }
    /// Writes what `make` makes of the pages from a slot on, until one is not known or nothing is made of it. How many.
    #[inline]
    pub(super) fn read<T>(&self, slot: u64, to: &mut [T], make: impl Fn(Page) -> Option<T>) -> usize {
        let mut count = 0_usize;
        for (entry, to) in self.slots(slot..LEAF_PAGES).iter().zip(to) {
            let Some(made) = entry.page().and_then(&make) else { break };
            *to = made;
            // No more than there are entries.
            count = count.wrapping_add(1);
        }
        count
    }
}

impl Table<u32> {
    /// The same pages, with room for all numbers.
    pub(super) fn widened(&self) -> Box<Table<u64>> {
        let mut wide = Table::empty();
        for (to, entry) in wide.0.iter_mut().zip(&self.0) {
            *to = entry.page().map_or(0, Entry::of);
        }
        wide
    }
}
