//! What SUPPLY and PAGE_RESPONSE tell of a process' pages, checked as far as that can be done without the context: runs, or
//! a list. They are read where they lie; the bytes are our own. PROTOCOL 4.3.

use super::{Error, Result, elements, zero};
use crate::addr::PageRange;
use crate::address_space::{Bounds, Page, Run, Runs};
use crate::protocol::control::{PageList, PageRun, RUN_READONLY, SUPPLY_LIST};
use crate::protocol::{GUEST_VA_END, MAX_RUN_PAGES, MAX_RUNS, PAGE_SHIFT, PAGE_SIZE};
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U64};

/// What stands behind the fixed part of a command.
pub(super) enum Pages<'a> {
    /// Runs.
    Runs(&'a [PageRun]),
    /// The head of a list, and its entries.
    List(PageList, &'a [U64]),
}

impl<'a> Pages<'a> {
    /// What must be all the rest.
    pub(super) fn read(rest: &'a [u8], num_runs: U16, flags: U16) -> Result<Self> {
        let (count, list) = (u32::from(num_runs.get()), flags.get() & SUPPLY_LIST != 0);
        zero(flags.get() & !SUPPLY_LIST == 0)?;
        if list {
            let (head, rest) = PageList::read_from_prefix(rest).map_err(|_| Error::Length)?;
            return Ok(Self::List(head, elements(rest, count, MAX_RUNS)?));
        }
        Ok(Self::Runs(elements(rest, count, MAX_RUNS)?))
    }
    /// How many pages the largest run has.
    pub(super) fn largest_run(&self) -> u64 {
        match self {
            Self::Runs(runs) => runs.iter().map(|run| run.pages.get().into()).max().unwrap_or(0),
            Self::List(..) => 1,
        }
    }
    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Runs(runs) => runs.is_empty(),
            Self::List(_, entries) => entries.is_empty(),
        }
    }
}

/// What runs are within, if surely nothing is wrong with any of them. A loop without a way out: lists are long and seldom bad,
/// and what is wrong with a bad one is found by who looks at each run alone.
fn bounds_of_good(runs: &[PageRun]) -> Option<Bounds> {
    let (mut total, mut starts, mut lasts, mut flags) = (0_u64, 0_u64, 0_u64, 0_u32);
    let (mut gpa_start, mut gpa_end, mut newest) = (u64::MAX, 0_u64, 0_u64);
    for run in runs {
        let (va, gpa, pages) = (run.va.get(), run.gpa.get(), u64::from(run.pages.get()));
        let bytes = pages << PAGE_SHIFT;
        // Of at most MAX_RUNS numbers of 32 bits.
        total = total.wrapping_add(pages);
        starts |= va | gpa;
        flags |= run.flags.get();
        // What wraps has the highest bit set: here where there are no pages, and in its start where that is far out.
        let last = bytes.wrapping_sub(1);
        lasts |= last | va.wrapping_add(last);
        gpa_start = gpa_start.min(gpa);
        gpa_end = gpa_end.max(gpa.wrapping_add(bytes));
        newest = newest.max(run.as_of.get());
    }
    let good = starts & (PAGE_SIZE - 1) == 0
        && (starts | lasts) < GUEST_VA_END
        && flags & !RUN_READONLY == 0
        && total <= MAX_RUN_PAGES;
    let gpa_pages = PageRange { start: gpa_start >> PAGE_SHIFT, end: gpa_end >> PAGE_SHIFT };
    good.then_some(Bounds { gpa_pages, newest })
}
// Numbers below it are those without certain bits, and so is what they are together.
const _: () = assert!(GUEST_VA_END.is_power_of_two());

/// Checks runs.
pub(super) fn checked_runs(runs: &[PageRun]) -> Result<Runs<impl Iterator<Item = Run> + Clone>> {
    let mut left = MAX_RUN_PAGES;
    let mut check = |run: &PageRun| {
        left = left.checked_sub(run.pages.get().into()).ok_or(Error::Count)?;
        zero(run.flags.get() & !RUN_READONLY == 0)?;
        let bytes = u64::from(run.pages.get()).saturating_mul(PAGE_SIZE);
        PageRange::from_bytes(run.va.get(), bytes, GUEST_VA_END)?;
        PageRange::from_bytes(run.gpa.get(), bytes, u64::MAX)?;
        Ok(())
    };
    let bounds = bounds_of_good(runs);
    if bounds.is_none() {
        for (index, run) in (0..).zip(runs) {
            check(run).map_err(|error: Error| error.at(index))?;
        }
    }
    let each = runs.iter().map(|run| {
        let start = run.va.get() >> PAGE_SHIFT;
        // It was checked to lie in the space.
        let va = PageRange { start, end: start.wrapping_add(run.pages.get().into()) };
        let readonly = run.flags.get() & RUN_READONLY != 0;
        let first = Page { gpa_page: run.gpa.get() >> PAGE_SHIFT, readonly };
        Run { va, first, as_of: run.as_of.get() }
    });
    Ok(Runs { each, bounds })
}

/// Checks a list: it is runs of one page.
pub(super) fn checked_list(
    list: PageList,
    entries: &[U64],
) -> Result<Runs<impl Iterator<Item = Run> + Clone>> {
    const LOW_BITS: u64 = (PAGE_SIZE - 1) & !(RUN_READONLY as u64);
    let as_of = list.as_of.get();
    let bytes = u64::try_from(entries.len()).unwrap_or(u64::MAX).saturating_mul(PAGE_SIZE);
    let va = PageRange::from_bytes(list.va.get(), bytes, GUEST_VA_END)
        .map_err(|error| Error::from(error).at(0))?;
    let (mut bits, mut first, mut last) = (0_u64, u64::MAX, 0_u64);
    for entry in entries {
        bits |= entry.get();
        first = first.min(entry.get());
        last = last.max(entry.get());
    }
    if bits & LOW_BITS != 0 {
        for (index, entry) in (0..).zip(entries) {
            zero(entry.get() & LOW_BITS == 0).map_err(|error| error.at(index))?;
        }
    }
    let gpa_pages = PageRange { start: first >> PAGE_SHIFT, end: (last >> PAGE_SHIFT).saturating_add(1) };
    let each = (va.start..).zip(entries).map(move |(page, entry)| {
        let readonly = entry.get() & u64::from(RUN_READONLY) != 0;
        let first = Page { gpa_page: entry.get() >> PAGE_SHIFT, readonly };
        // It was checked to lie in the space.
        Run { va: PageRange { start: page, end: page.wrapping_add(1) }, first, as_of }
    });
    Ok(Runs { each, bounds: Some(Bounds { gpa_pages, newest: as_of }) })
}

#[cfg(test)]
mod tests;
