//! The entries of one table, many at once.

use super::{Leaf, PRESENT, index};
use crate::addr::PageRange;
use crate::protocol::PAGE_SIZE;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Clears the entries of the part whose word is hit, and returns how many.
pub(super) fn clear_entries(leaf: &Leaf, part: PageRange, hit: impl Fn(u64) -> bool) -> u64 {
    let mut dropped = 0u64;
    for cell in entries_of(leaf, part) {
        let word = cell.load(Ordering::Relaxed);
        if word & PRESENT != 0 && hit(word) {
            cell.store(0, Ordering::Release);
            // At most the entries of one table.
            dropped = dropped.wrapping_add(1);
        }
    }
    dropped
}

/// Calls `act` with every entry. The compiler does not unroll loops of atomics.
#[inline]
pub(super) fn for_each_unrolled(cells: &[AtomicU64], mut act: impl FnMut(&AtomicU64)) {
    let (eights, rest) = cells.as_chunks::<8>();
    for [a, b, c, d, e, f, g, h] in eights {
        act(a);
        act(b);
        act(c);
        act(d);
        act(e);
        act(f);
        act(g);
        act(h);
    }
    rest.iter().for_each(act);
}

/// How many of `most` pages from one with this word on follow each other in the host's space, with the same rights.
#[inline]
pub(super) fn follow(leaf: &Leaf, page: u64, word: u64, most: u64) -> u64 {
    let rest = leaf.get(index(page, 0)..).unwrap_or_default();
    let (mut pages, mut next) = (1_u64, word.wrapping_add(PAGE_SIZE));
    for cell in rest.iter().skip(1) {
        if pages >= most || cell.load(Ordering::Acquire) != next {
            break;
        }
        // Both stay within a table.
        (pages, next) = (pages.wrapping_add(1), next.wrapping_add(PAGE_SIZE));
    }
    pages
}

/// Entries that hold a translation.
pub(super) fn present_in(cells: &[AtomicU64]) -> u64 {
    // PRESENT is the lowest bit; at most the entries of one table are added.
    cells.iter().fold(0, |sum, cell| sum.wrapping_add(cell.load(Ordering::Relaxed) & PRESENT))
}
const _: () = assert!(PRESENT == 1);

/// The entries of pages that lie in one block.
pub(super) fn entries_of(leaf: &Leaf, part: PageRange) -> &[AtomicU64] {
    let first = index(part.start, 0);
    let last = index(part.end.saturating_sub(1), 0);
    leaf.get(first..=last).unwrap_or_default()
}
