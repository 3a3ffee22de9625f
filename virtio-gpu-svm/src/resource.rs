//! Blob resources: guest pages that the guest's kernel driver has named. Guest-wide; a context may use one only while
//! it is attached to it. Mappings hold the blob, and the blob says where its pages are; memory itself is looked up at
//! fault time against the memory table of that moment.

/// A blob resource of guest memory.
#[derive(Debug)]
pub struct Blob {
    /// Its id in the guest.
    pub resource_id: u32,
    /// Its pages.
    pub pages: u64,
    /// (first page of the blob, first guest-physical page), by rising page; the first is page 0.
    runs: Vec<(u64, u64)>,
}

/// What a blob takes besides its runs: itself, and its place in the guest's table.
const FIXED_BYTES: u64 = 192;

impl Blob {
    /// A blob from its entries, (guest-physical page, pages) each, in order; contiguous entries become one run.
    pub fn new(resource_id: u32, entries: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut pages = 0_u64;
        for (gpa_page, count) in entries {
            let continued =
                runs.last().is_some_and(|(at, gpa)| gpa.wrapping_add(pages.wrapping_sub(*at)) == gpa_page);
            if !continued {
                runs.push((pages, gpa_page));
            }
            pages = pages.saturating_add(count);
        }
        // It may be kept for long, and is counted by what it holds.
        runs.shrink_to_fit();
        Self { resource_id, pages, runs }
    }
    /// Bytes that describe it here.
    pub fn bytes(&self) -> u64 {
        let runs = self.runs.capacity().saturating_mul(size_of::<(u64, u64)>());
        u64::try_from(runs).unwrap_or(u64::MAX).saturating_add(FIXED_BYTES)
    }
    /// The guest-physical page behind a page of the blob.
    pub fn gpa_page(&self, page: u64) -> Option<u64> {
        self.run(page, 1).map(|(gpa_page, _)| gpa_page)
    }
    /// The same, and how many of `most` pages from it on follow in guest memory too; at least 1.
    pub fn run(&self, page: u64, most: u64) -> Option<(u64, u64)> {
        if page >= self.pages {
            return None;
        }
        let after = self.runs.partition_point(|(at, _)| *at <= page);
        let (at, gpa_page) = self.runs.get(after.checked_sub(1)?)?;
        let end = self.runs.get(after).map_or(self.pages, |(next, _)| *next);
        Some((gpa_page.wrapping_add(page.wrapping_sub(*at)), end.saturating_sub(page).min(most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_joined_and_found() {
        let blob = Blob::new(1, [(10, 2), (12, 1), (50, 3)].into_iter());
        assert_eq!(blob.runs, [(0, 10), (3, 50)]);
        assert_eq!(
            (0..7).map(|p| blob.gpa_page(p)).collect::<Vec<_>>(),
            [Some(10), Some(11), Some(12), Some(50), Some(51), Some(52), None]
        );
        let runs = [(0, 9), (1, 9), (1, 1), (3, 9), (5, 9), (6, 9)].map(|(page, most)| blob.run(page, most));
        assert_eq!(runs, [Some((10, 3)), Some((11, 2)), Some((11, 1)), Some((50, 3)), Some((52, 1)), None]);
    }
}
