//! The A side: what is known of one guest process' CPU address space, virtual page -> guest-physical page.
//!
//! Supplied by the guest, dropped by invalidation, shared by all GPU VMs of the context. Owned by
//! [`crate::context::Context`], under its lock. Translations are kept per 2 MiB leaf, and so is the invalidation
//! sequence: a run of pages that was translated before an invalidation of its leaf is refused ([`Install::Raced`]),
//! and an unrelated munmap does not starve a fault. Leaves that do not exist share one sequence.

use crate::addr::PageRange;
use crate::protocol::{LEAF_SIZE, PAGE_SHIFT};
use crate::quota::Charge;
use crate::seeded::{self, Bug};
use std::collections::{BTreeMap, btree_map};
use std::iter::Peekable;
use std::ops::ControlFlow;

/// log2 of the pages of a leaf.
pub const LEAF_PAGES_SHIFT: u32 = LEAF_SIZE.trailing_zeros() - PAGE_SHIFT;
/// Pages of a leaf.
pub const LEAF_PAGES: u64 = 1 << LEAF_PAGES_SHIFT;
const LEAF_SLOTS: usize = 512;
const _: () = assert!(LEAF_SLOTS.ilog2() == LEAF_PAGES_SHIFT);
/// Most leaves of one address space.
pub const MAX_LEAVES: usize = 65_536;

/// What a leaf takes in the tree of leaves.
const LEAF_BYTES: u64 = 96;
/// What its pages take besides. A leaf that is one run is charged the same: an invalidation may cut it, and cannot fail.
const PAGES_BYTES: u64 = 8 * LEAF_PAGES;

const PRESENT: u64 = 1 << 63;
const READONLY: u64 = 1 << 62;
const GPA_PAGE: u64 = (1 << 52) - 1;

/// A page that the guest has supplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical page number.
    pub gpa_page: u64,
    /// Whether the process itself may only read it.
    pub readonly: bool,
}

impl Page {
    fn encode(self) -> u64 {
        PRESENT | (self.gpa_page & GPA_PAGE) | if self.readonly { READONLY } else { 0 }
    }
    fn decode(entry: u64) -> Option<Self> {
        (entry & PRESENT != 0).then_some(Self { gpa_page: entry & GPA_PAGE, readonly: entry & READONLY != 0 })
    }
    /// The page `n` further in a contiguous run.
    pub fn plus(self, n: u64) -> Self {
        Self { gpa_page: self.gpa_page.wrapping_add(n), ..self }
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
    Small(Box<[u64; LEAF_SLOTS]>),
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
            Pages::Empty | Pages::Small(_) => None,
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
                        let empty = Leaf { invalidated: *absent_invalidated, known: 0, pages: Pages::Empty };
                        let leaf = place.insert(empty);
                        leaf.fill(part_of(run.va, index).1, run.first);
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
        let (mut present, mut bytes, mut contradicts) = (0_u64, 0_u64, false);
        for (index, leaf) in existing {
            let neighbour = seeded::on(Bug::WrongLeaf).then(|| self.leaves.get(&(index ^ 1)));
            let invalidated = match neighbour {
                None => leaf.invalidated,
                Some(wrong) => wrong.map_or(self.absent_invalidated, |leaf| leaf.invalidated),
            };
            if is_stale(invalidated, run) {
                return Install::Raced;
            }
            contradicts |= leaf.contradicts(run, *index);
            present = present.saturating_add(1);
            bytes = bytes.saturating_add(leaf.bytes_to_fill());
        }
        let missing = leaves.end.saturating_sub(leaves.start).saturating_sub(present);
        if missing > 0 && is_stale(self.absent_invalidated, run) {
            return Install::Raced;
        }
        if contradicts {
            return Install::Conflict;
        }
        bytes = bytes.saturating_add(missing.saturating_mul(LEAF_BYTES + PAGES_BYTES));
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        if self.leaves.len().saturating_add(missing) > MAX_LEAVES {
            return Install::Full;
        }
        if self.charge.grow(bytes).is_err() {
            return Install::OverQuota;
        }
        for index in leaves {
            let (part, slots) = part_of(run.va, index);
            let first = run.first.plus(part.start.wrapping_sub(run.va.start));
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
            leaf.clear(part_of(range, *index).1);
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
        self.leaves.entry(index).or_insert(Leaf { invalidated, known: 0, pages: Pages::Empty })
    }
}

impl Leaf {
    fn bytes(&self) -> u64 {
        match self.pages {
            Pages::Empty => LEAF_BYTES,
            Pages::Large(_) | Pages::Small(_) => LEAF_BYTES + PAGES_BYTES,
        }
    }
    /// What it takes more once it has a page.
    fn bytes_to_fill(&self) -> u64 {
        (LEAF_BYTES + PAGES_BYTES).saturating_sub(self.bytes())
    }
    fn page(&self, slot: u64) -> Option<Page> {
        match &self.pages {
            Pages::Empty => None,
            Pages::Large(first) => Some(first.plus(slot)),
            Pages::Small(entries) => Page::decode(*entries.get(usize::try_from(slot).ok()?)?),
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
    /// Installs runs of one page until one is longer, lies elsewhere or is refused, which is returned too. How many.
    #[inline]
    fn install_pages(
        &mut self,
        index: u64,
        first: Run,
        runs: &mut impl Iterator<Item = Run>,
    ) -> (u32, Option<Run>) {
        let Pages::Small(entries) = &mut self.pages else { return (0, Some(first)) };
        let (mut run, mut done, mut added) = (first, 0_u32, 0_u64);
        let rest = loop {
            if run.va.pages() != 1
                || run.va.start >> LEAF_PAGES_SHIFT != index
                || is_stale(self.invalidated, &run)
            {
                break Some(run);
            }
            let (entry, new) = (entry_mut(entries, run.va.start), run.first.encode());
            if !allows(*entry, new) {
                break Some(run);
            }
            // No more than the runs of a command.
            (done, added) = (done.wrapping_add(1), added.wrapping_add(u64::from(*entry == 0)));
            *entry = new;
            match runs.next() {
                Some(next) => run = next,
                None => break None,
            }
        };
        self.known = self.known.saturating_add(added);
        (done, rest)
    }
    /// Installs a run that lies in this leaf.
    fn install(&mut self, run: &Run, index: u64, charge: &mut Charge) -> Install {
        if is_stale(self.invalidated, run) {
            return Install::Raced;
        }
        if self.contradicts(run, index) {
            return Install::Conflict;
        }
        if charge.grow(self.bytes_to_fill()).is_err() {
            return Install::OverQuota;
        }
        self.fill(part_of(run.va, index).1, run.first);
        Install::Done
    }
    /// Whether a known page would become another one, or lose rights, behind the back of GPU VMs that use it.
    fn contradicts(&self, run: &Run, index: u64) -> bool {
        let (part, slots) = part_of(run.va, index);
        let first = run.first.plus(part.start.wrapping_sub(run.va.start));
        match &self.pages {
            Pages::Empty => false,
            Pages::Large(known) => {
                let same = known.plus(slots.start).gpa_page == first.gpa_page;
                !same || (first.readonly && !known.readonly)
            }
            Pages::Small(entries) => {
                let entries = slots_in(entries.as_slice(), slots);
                if entries.iter().fold(0, |any, entry| any | entry) == 0 {
                    return false;
                }
                let mut news = (0..).map(|n| first.plus(n).encode());
                !entries.iter().all(|entry| news.next().is_some_and(|new| allows(*entry, new)))
            }
        }
    }
    fn fill(&mut self, slots: std::ops::Range<u64>, first: Page) {
        if slots == (0..LEAF_PAGES) {
            self.pages = Pages::Large(first);
            self.known = LEAF_PAGES;
            return;
        }
        let (mut added, first) = (0_u64, first.encode());
        for (entry, n) in self.small(slots).iter_mut().zip(0..) {
            added = added.wrapping_add(u64::from(*entry == 0));
            // Guest memory ends far below the bits above the page's number.
            *entry = first.wrapping_add(n);
        }
        self.known = self.known.saturating_add(added);
    }
    fn clear(&mut self, slots: std::ops::Range<u64>) {
        if self.known == 0 || slots == (0..LEAF_PAGES) {
            self.pages = Pages::Empty;
            self.known = 0;
            return;
        }
        let mut dropped = 0_u64;
        for entry in self.small(slots) {
            dropped = dropped.saturating_add(u64::from(*entry & PRESENT != 0));
            *entry = 0;
        }
        self.known = self.known.saturating_sub(dropped);
    }
    /// Its entries at `slots`, one by one from now on.
    fn small(&mut self, slots: std::ops::Range<u64>) -> &mut [u64] {
        let entries = match &self.pages {
            Pages::Small(_) => None,
            Pages::Empty => Some(Box::new([0; LEAF_SLOTS])),
            Pages::Large(first) => {
                let mut entries = Box::new([0; LEAF_SLOTS]);
                entries.iter_mut().zip(0..).for_each(|(entry, n)| *entry = first.plus(n).encode());
                Some(entries)
            }
        };
        if let Some(entries) = entries {
            self.pages = Pages::Small(entries);
        }
        match &mut self.pages {
            Pages::Small(entries) => match (usize::try_from(slots.start), usize::try_from(slots.end)) {
                (Ok(start), Ok(end)) => entries.get_mut(start..end).unwrap_or_default(),
                _ => &mut [],
            },
            Pages::Empty | Pages::Large(_) => &mut [],
        }
    }
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
        match self.leaf(page).map(|leaf| &leaf.pages) {
            None | Some(Pages::Empty) => most,
            Some(Pages::Large(_)) => 0,
            Some(Pages::Small(entries)) => {
                let entries = slots_in(entries.as_slice(), slot..slot.saturating_add(most));
                let known = entries.iter().position(|entry| *entry != 0);
                known.and_then(|known| u64::try_from(known).ok()).unwrap_or(most)
            }
        }
    }
    /// The pages from `page` on, at most `most` and as far as its leaf goes, up to the first that is not known; none where
    /// the leaf is in one piece.
    #[inline]
    pub fn small(&mut self, page: u64, most: u64) -> Option<impl Iterator<Item = Page> + use<'a>> {
        let slot = page & (LEAF_PAGES - 1);
        let most = most.min(LEAF_PAGES.saturating_sub(slot));
        let Pages::Small(entries) = &self.leaf(page)?.pages else { return None };
        let entries = slots_in(entries.as_slice(), slot..slot.saturating_add(most));
        Some(entries.iter().map_while(|entry| Page::decode(*entry)))
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
            Pages::Small(entries) => {
                let entries = slots_in(entries.as_slice(), slot..slot.saturating_add(most));
                let page = Page::decode(*entries.first()?)?;
                let following = (0..).map(|n| page.plus(n).encode());
                let run = entries.iter().zip(following).take_while(|(entry, next)| **entry == *next).count();
                Some((page, u64::try_from(run).unwrap_or(1)))
            }
        }
    }
}

/// Whether a run may make the leaf that it lies in; then that is charged.
fn room_for_leaf(invalidated: u64, run: &Run, full: bool, charge: &mut Charge) -> Install {
    if is_stale(invalidated, run) {
        Install::Raced
    } else if full {
        Install::Full
    } else if charge.grow(LEAF_BYTES + PAGES_BYTES).is_err() {
        Install::OverQuota
    } else {
        Install::Done
    }
}

/// Whether a run was translated before an invalidation of its leaf.
fn is_stale(invalidated: u64, run: &Run) -> bool {
    invalidated > run.as_of && !seeded::on(Bug::InstallStale)
}

/// Whether an entry may become another: the same page, with no fewer rights.
fn allows(entry: u64, new: u64) -> bool {
    entry == 0 || entry == new || entry == new | READONLY
}

#[expect(clippy::indexing_slicing, reason = "the index is masked to the length of the table")]
fn entry_mut(entries: &mut [u64; LEAF_SLOTS], page: u64) -> &mut u64 {
    &mut entries[(page & (LEAF_PAGES - 1)) as usize & (LEAF_SLOTS - 1)]
}

fn slots_in(entries: &[u64], slots: std::ops::Range<u64>) -> &[u64] {
    match (usize::try_from(slots.start), usize::try_from(slots.end)) {
        (Ok(start), Ok(end)) => entries.get(start..end).unwrap_or_default(),
        _ => &[],
    }
}

fn leaves_of(range: PageRange) -> std::ops::Range<u64> {
    let last = range.end.saturating_sub(1) >> LEAF_PAGES_SHIFT;
    (range.start >> LEAF_PAGES_SHIFT)..last.saturating_add(1)
}

/// The pages of a range in one leaf, and their slots there.
fn part_of(range: PageRange, index: u64) -> (PageRange, std::ops::Range<u64>) {
    let base = index << LEAF_PAGES_SHIFT;
    let part =
        PageRange { start: range.start.max(base), end: range.end.min(base.saturating_add(LEAF_PAGES)) };
    (part, part.start.saturating_sub(base)..part.end.saturating_sub(base))
}

#[cfg(test)]
mod tests;
