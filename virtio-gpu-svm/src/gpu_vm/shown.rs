//! From CPU pages to the mappings that show them: what an invalidation asks, which names CPU pages and must not look at
//! every mapping.
//!
//! Mappings may show the same CPU pages any number of times, so they overlap here. They are kept by size, in powers of two:
//! of one size only those can show a page that begin less than that before it, and these are neighbours. What is looked at
//! in vain is thus no more than the mappings within one size of the range's begin.

use crate::addr::PageRange;
use std::collections::BTreeMap;

/// A mapping: how large, where it begins in CPU pages, where in GPU pages. Ordered like that.
type Key = (u8, u64, u64);

/// The mappings of a GPU VM that show CPU pages.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// With their pages.
    mappings: BTreeMap<Key, u64>,
}

impl Shown {
    /// A mapping of these CPU pages comes, at this GPU page.
    pub(super) fn insert(&mut self, cpu: PageRange, gpu: u64) {
        self.mappings.insert((size_of(cpu.pages()), cpu.start, gpu), cpu.pages());
    }
    /// It goes.
    pub(super) fn remove(&mut self, cpu: PageRange, gpu: u64) {
        self.mappings.remove(&(size_of(cpu.pages()), cpu.start, gpu));
    }
    /// GPU pages that show any of these CPU pages, in no order; they may overlap nothing but each their own mapping.
    pub(super) fn of(&self, cpu: PageRange) -> Vec<PageRange> {
        let mut found = Vec::new();
        let mut next = self.mappings.keys().next().map(|(size, ..)| *size);
        while let Some(size) = next {
            let most = 1_u64.checked_shl(size.into()).unwrap_or(u64::MAX);
            let first = cpu.start.saturating_sub(most.saturating_sub(1));
            for ((_, start, gpu), pages) in self.mappings.range((size, first, 0)..(size, cpu.end, 0)) {
                let shown = PageRange { start: *start, end: start.saturating_add(*pages) };
                if let Some(both) = shown.intersect(cpu) {
                    let to_gpu = |page: u64| page.saturating_sub(*start).saturating_add(*gpu);
                    found.push(PageRange { start: to_gpu(both.start), end: to_gpu(both.end) });
                }
            }
            let larger = size.saturating_add(1);
            next = self.mappings.range((larger, 0, 0)..).next().map(|((size, ..), _)| *size);
        }
        found
    }
}

/// log2 of the least power of two that is no smaller.
fn size_of(pages: u64) -> u8 {
    let bits = pages.checked_next_power_of_two().map_or(u64::BITS, u64::trailing_zeros);
    u8::try_from(bits).unwrap_or(u8::MAX)
}
