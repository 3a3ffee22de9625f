//! Pages as SUPPLY and PAGE_RESPONSE tell them. PROTOCOL 4.3.

use super::control::{PageList, PageRun, RUN_READONLY, SUPPLY_LIST};
use super::{MAX_RUNS, PAGE_SIZE};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

/// What a driver puts into such a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its `num_runs`.
    pub num_runs: U16,
    /// Its `flags`.
    pub flags: U16,
    /// What follows its fixed part.
    pub bytes: Vec<u8>,
}

impl Told {
    /// Runs as they are, or as a [`PageList`] if they can be one and it is shorter; then `detail`, `installed` and `refused` of
    /// the answer count pages. None if they are more than [`MAX_RUNS`].
    pub fn new(runs: &[PageRun]) -> Option<Self> {
        let count = u16::try_from(runs.len()).ok().filter(|count| u32::from(*count) <= MAX_RUNS)?;
        let as_runs = || Self { num_runs: count.into(), flags: 0.into(), bytes: runs.as_bytes().to_vec() };
        Some(Self::list(runs).unwrap_or_else(as_runs))
    }

    fn list(runs: &[PageRun]) -> Option<Self> {
        let (first, last) = (runs.first()?, runs.last()?);
        // What the device would refuse as a run must not become another page as an entry.
        let fits = |run: &PageRun| {
            let end = u64::from(run.pages.get()).checked_mul(PAGE_SIZE)?.checked_add(run.gpa.get())?;
            let low = (end & PAGE_SIZE.wrapping_sub(1)) | u64::from(run.flags.get() & !RUN_READONLY);
            (low == 0 && run.pages.get() > 0).then_some(())
        };
        let follows = |pair: &[PageRun]| match pair {
            [one, next] => one.as_of == next.as_of && end(one) == Some(next.va.get()),
            _ => true,
        };
        let pages = end(last)?.checked_sub(first.va.get())?.checked_div(PAGE_SIZE)?;
        let pages = u16::try_from(pages).ok().filter(|pages| u32::from(*pages) <= MAX_RUNS)?;
        let bytes = usize::from(pages).checked_mul(size_of::<U64>())?.checked_add(size_of::<PageList>())?;
        if bytes >= size_of_val(runs)
            || !runs.windows(2).all(follows)
            || runs.iter().any(|run| fits(run).is_none())
        {
            return None;
        }
        let mut list = Vec::with_capacity(bytes);
        list.extend_from_slice(PageList { va: first.va, as_of: first.as_of }.as_bytes());
        for run in runs {
            // Flags stand below a page's address.
            let entry = |n: u32| {
                U64::new(
                    run.gpa.get().wrapping_add(u64::from(n).wrapping_mul(PAGE_SIZE))
                        | u64::from(run.flags.get()),
                )
            };
            (0..run.pages.get()).for_each(|n| list.extend_from_slice(entry(n).as_bytes()));
        }
        Some(Self { num_runs: pages.into(), flags: SUPPLY_LIST.into(), bytes: list })
    }
}

/// The address behind a run.
fn end(run: &PageRun) -> Option<u64> {
    run.va.get().checked_add(u64::from(run.pages.get()).checked_mul(PAGE_SIZE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, gpa_page: u64, pages: u32) -> PageRun {
        let (va, gpa) = ((page * PAGE_SIZE).into(), (gpa_page * PAGE_SIZE).into());
        PageRun { va, gpa, pages: pages.into(), flags: 0.into(), as_of: 7.into() }
    }

    fn told(runs: &[PageRun]) -> Told {
        Told::new(runs).unwrap()
    }

    #[test]
    fn scattered_pages_are_a_list() {
        let readonly = PageRun { flags: RUN_READONLY.into(), ..run(12, 3, 1) };
        let told = told(&[run(10, 50, 2), readonly]);
        let words = [10 * PAGE_SIZE, 7, 50 * PAGE_SIZE, 51 * PAGE_SIZE, 3 * PAGE_SIZE + 1];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(told, Told { num_runs: 3.into(), flags: SUPPLY_LIST.into(), bytes });
    }

    #[test]
    fn what_is_shorter_as_runs_or_no_list_stays_runs() {
        let other = PageRun { as_of: 8.into(), ..run(11, 3, 1) };
        let cases: [&[PageRun]; 6] = [
            &[],
            &[run(10, 50, 2)],
            &[run(10, 50, 100), run(110, 9, 1)],
            &[run(10, 50, 1), run(12, 3, 1), run(13, 9, 1)],
            &[run(10, 50, 1), other, run(12, 3, 1)],
            &[run(10, 50, 1), run(9, 3, 1), run(10, 4, 1)],
        ];
        for runs in cases {
            let count = u16::try_from(runs.len()).unwrap();
            let expected = Told { num_runs: count.into(), flags: 0.into(), bytes: runs.as_bytes().to_vec() };
            assert_eq!(told(runs), expected);
        }
    }

    #[test]
    fn what_the_device_refuses_stays_as_it_is() {
        let unaligned = PageRun { gpa: 0x5001.into(), ..run(10, 5, 1) };
        let flag = PageRun { flags: (1 << 12).into(), ..run(10, 4, 1) };
        let far = PageRun { gpa: (u64::MAX << 12).into(), ..run(11, 0, 3) };
        let cases = [
            vec![unaligned],
            vec![flag],
            vec![run(10, 5, 1), far],
            vec![run(10, 5, 1), run(11, 9, 0), run(11, 7, 1)],
        ];
        for runs in cases {
            assert_eq!((told(&runs).flags.get(), &told(&runs).bytes[..]), (0, runs.as_bytes()));
        }
    }

    #[test]
    fn no_more_are_told_than_a_command_may_hold() {
        let runs: Vec<_> = (0..=u64::from(MAX_RUNS)).map(|n| run(n, n * 2, 1)).collect();
        assert_eq!(Told::new(&runs), None);
        assert_eq!(told(&runs[1..]).num_runs.get(), 4096);
        // As a list they would be too many.
        let runs: Vec<_> = (0..4096).map(|n| run(2 * n, 5 * n, 2)).collect();
        assert_eq!((told(&runs).num_runs.get(), told(&runs).flags.get()), (4096, 0));
    }
}
