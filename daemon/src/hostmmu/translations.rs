//! Which GPU pages a worker has mapped: runs of pages, within a budget.
//!
//! A process has about 65,530 mappings. A run costs one, and the gap behind it another, so runs are counted, and beyond
//! the budget the oldest go; what is touched again faults again. The same where its guest's tables take as many bytes
//! as they may. Owned by a GPU VM, under its lock.

use std::collections::BTreeMap;
use virtio_gpu_svm::addr::PageRange;
use virtio_gpu_svm::protocol::PAGE_SHIFT;
use virtio_gpu_svm::quota::Charge;

/// Runs that nobody is charged for: what a job has in hand must find room, or it would fault for ever.
const FREE_RUNS: usize = 64;
/// What a run takes in both trees.
const RUN_BYTES: u64 = 128;

/// Consecutive pages of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many.
    pub pages: u64,
    /// The region.
    pub region: u64,
    /// Byte offset in it.
    pub offset: u64,
    /// Whether packets may write.
    pub writable: bool,
}

impl Run {
    /// The run without its first pages.
    fn skip(self, pages: u64) -> Self {
        Self { pages: self.pages - pages, offset: self.offset + (pages << PAGE_SHIFT), ..self }
    }

    /// Whether `next` goes on where this one ends.
    fn joins(&self, next: &Self) -> bool {
        (self.region, self.writable, self.offset + (self.pages << PAGE_SHIFT))
            == (next.region, next.writable, next.offset)
    }
}

/// The runs of a GPU VM, by first page.
#[derive(Debug)]
pub struct Translations {
    budget: usize,
    runs: BTreeMap<u64, (Run, u64)>,
    /// First pages by age.
    ages: BTreeMap<u64, u64>,
    clock: u64,
    pages: u64,
    charge: Charge,
}

impl Translations {
    /// None yet; at most `budget` runs, which are charged for.
    pub fn new(budget: usize, charge: Charge) -> Self {
        Self { budget, runs: BTreeMap::new(), ages: BTreeMap::new(), clock: 0, pages: 0, charge }
    }

    /// Bytes that are charged.
    pub fn bytes(&self) -> u64 {
        self.charge.amount()
    }

    /// Bytes that are to be.
    fn due(&self) -> u64 {
        let runs = self.runs.len().saturating_sub(FREE_RUNS);
        u64::try_from(runs).unwrap_or(u64::MAX).saturating_mul(RUN_BYTES)
    }

    /// Pages with a translation.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages of the range that have a translation.
    pub fn resident_in(&self, range: PageRange) -> u64 {
        let first = self.last_below(range.start + 1).map_or(range.start, |(start, ..)| start);
        let inside = |(start, run): (&u64, &Run)| {
            let run = PageRange { start: *start, end: start + run.pages };
            run.intersect(range).map_or(0, PageRange::pages)
        };
        self.runs.range(first..range.end).map(|(start, (run, _))| inside((start, run))).sum()
    }

    /// The run that a page is in.
    pub fn lookup(&self, page: u64) -> Option<Run> {
        let (first, run, _) = self.last_below(page.saturating_add(1))?;
        (page < first + run.pages).then_some(run)
    }

    /// All runs, by first page.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Run)> {
        self.runs.iter().map(|(first, (run, _))| (*first, *run))
    }

    /// Puts a run in, in place of what stood there, and joins it with its neighbours.
    pub fn insert(&mut self, mut first: u64, mut run: Run) {
        self.remove(PageRange { start: first, end: first + run.pages });
        let before = self.runs.range(..first).next_back().map(|(start, (run, _))| (*start, *run));
        if let Some((start, before)) = before.filter(|(start, b)| start + b.pages == first && b.joins(&run)) {
            self.take(start);
            (first, run) = (start, Run { pages: before.pages + run.pages, ..before });
        }
        if let Some((next, _)) =
            self.runs.get(&(first + run.pages)).copied().filter(|(next, _)| run.joins(next))
        {
            self.take(first + run.pages);
            run.pages += next.pages;
        }
        self.clock += 1;
        self.put(first, run, self.clock);
    }

    /// Takes a range out, cutting runs that reach beyond it; returns what covers all that was in it.
    pub fn remove(&mut self, range: PageRange) -> Option<PageRange> {
        let mut covered: Option<PageRange> = None;
        while let Some((start, run, age)) =
            self.last_below(range.end).filter(|(s, r, _)| s + r.pages > range.start)
        {
            self.take(start);
            let end = start + run.pages;
            if start < range.start {
                self.put(start, Run { pages: range.start - start, ..run }, age);
            }
            if end > range.end {
                // The younger half needs an age of its own.
                self.clock += 1;
                self.put(range.end, run.skip(range.end - start), self.clock);
            }
            let (start, end) = (start.max(range.start), end.min(range.end));
            covered = Some(PageRange { start, end: covered.map_or(end, |c| c.end) });
        }
        covered
    }

    /// Takes out all runs of a region.
    pub fn remove_region(&mut self, region: u64) -> Vec<PageRange> {
        let of_it = self.iter().filter(|(_, run)| run.region == region);
        let ranges: Vec<_> = of_it.map(|(start, run)| PageRange { start, end: start + run.pages }).collect();
        for range in &ranges {
            self.take(range.start);
        }
        ranges
    }

    /// Takes out the oldest run, if there are more than the budget or the guest's quota allows.
    pub fn evict(&mut self) -> Option<PageRange> {
        if self.runs.len() <= self.budget && self.charge.resize(self.due()).is_ok() {
            return None;
        }
        let start = *self.ages.first_key_value()?.1;
        let run = self.take(start)?;
        Some(PageRange { start, end: start + run.pages })
    }

    fn last_below(&self, end: u64) -> Option<(u64, Run, u64)> {
        self.runs.range(..end).next_back().map(|(start, (run, age))| (*start, *run, *age))
    }

    fn put(&mut self, first: u64, run: Run, age: u64) {
        self.pages += run.pages;
        self.runs.insert(first, (run, age));
        self.ages.insert(age, first);
    }

    fn take(&mut self, first: u64) -> Option<Run> {
        let (run, age) = self.runs.remove(&first)?;
        self.ages.remove(&age);
        self.pages -= run.pages;
        self.charge.shrink_to(self.due());
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use virtio_gpu_svm::host::Limits;
    use virtio_gpu_svm::protocol::limit::Limit;
    use virtio_gpu_svm::quota::Quota;

    fn run(pages: u64, offset_page: u64) -> Run {
        Run { pages, region: 1, offset: offset_page << PAGE_SHIFT, writable: true }
    }

    #[test]
    fn neighbours_that_go_on_are_joined() {
        let mut all = Translations::new(8, Charge::default());
        all.insert(10, run(2, 0));
        all.insert(14, run(1, 4));
        all.insert(12, run(2, 2));
        assert_eq!(all.iter().collect::<Vec<_>>(), [(10, run(5, 0))]);
    }

    #[test]
    fn page_is_found_in_its_run_and_not_beyond() {
        let mut all = Translations::new(8, Charge::default());
        all.insert(10, run(3, 4));
        assert_eq!([9, 10, 12, 13].map(|page| all.lookup(page).is_some()), [false, true, true, false]);
    }

    #[test]
    fn a_cut_run_keeps_both_ends() {
        let mut all = Translations::new(8, Charge::default());
        all.insert(10, run(10, 0));
        let gone = all.remove(PageRange { start: 13, end: 15 });
        assert_eq!(gone, Some(PageRange { start: 13, end: 15 }));
        assert_eq!(all.iter().collect::<Vec<_>>(), [(10, run(3, 0)), (15, run(5, 5))]);
        assert_eq!(all.pages(), 8);
    }

    #[test]
    fn beyond_the_budget_the_oldest_goes() {
        let mut all = Translations::new(2, Charge::default());
        for first in [30, 10, 20] {
            all.insert(first, run(1, first + 100));
        }
        all.insert(50, Run { region: 2, ..run(1, 0) });
        assert_eq!(all.evict(), Some(PageRange { start: 30, end: 31 }));
        assert_eq!(all.evict(), Some(PageRange { start: 10, end: 11 }));
        assert_eq!(all.evict(), None);
        assert_eq!(all.remove_region(2), [PageRange { start: 50, end: 51 }]);
    }

    #[test]
    fn beyond_the_quota_the_oldest_goes() {
        let quota = Quota::new(&Limits { table_bytes: 2 * RUN_BYTES, ..Limits::DEFAULT });
        let mut all = Translations::new(1 << 20, quota.charge(Limit::TableBytes));
        let used = || quota.used(Limit::TableBytes);
        for n in 0..66 {
            all.insert(2 * n, run(1, 3 * n));
            assert_eq!(all.evict(), None);
        }
        assert_eq!(used(), 2 * RUN_BYTES);
        all.insert(200, run(1, 0));
        assert_eq!(all.evict(), Some(PageRange { start: 0, end: 1 }));
        assert_eq!((all.evict(), used()), (None, 2 * RUN_BYTES));
        all.remove(PageRange { start: 0, end: 5 });
        assert_eq!(used(), 0, "the first ones are free");
    }

    /// Against one entry a page.
    #[test]
    fn random_changes_agree_with_a_map_of_pages() {
        let (mut all, mut pages, mut seed) =
            (Translations::new(1 << 20, Charge::default()), HashMap::new(), 0x5eed_u64);
        println!("seed {seed:#x}");
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..20_000 {
            let (first, count, offset) = (random(64), 1 + random(8), random(3) * 64);
            if random(3) == 0 {
                all.remove(PageRange { start: first, end: first + count });
                pages.retain(|page, _| !(first..first + count).contains(page));
            } else {
                all.insert(first, run(count, offset + first));
                pages.extend((first..first + count).map(|page| (page, (offset + page) << PAGE_SHIFT)));
            }
            let flat: HashMap<_, _> =
                all.iter().flat_map(|(f, r)| (0..r.pages).map(move |i| (f + i, r.skip(i).offset))).collect();
            assert_eq!(flat, pages);
            assert_eq!(all.pages(), u64::try_from(pages.len()).unwrap_or(0));
        }
    }
}
