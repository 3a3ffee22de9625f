//! What is counted: a catalogue of operations, each with the state that it works on. Run by a program of its own, so
//! that nothing else is in the totals.
//!
//! Which page an operation takes goes by its number, scrambled: no run of neighbours, the same in every run. State is
//! prepared for the longer run in both, so that it cancels out.

use std::hint::black_box;

use anyhow::{Context, Result, ensure};

use super::bulk::{GIB_PAGES, PAGES, Script};
use super::ring::RoundTrip;
use super::scene::{Answered, Churned, Invalidated, Served, Stormed, WINDOW};
use super::sides::{Bind, Find, Lookup, Route};

/// Operations of the shorter run. More than the daemon keeps of recent faults, so that its list is full.
const FEW: u64 = 2048;
/// The same of an operation about very many pages, and of one about a GiB.
const BULKY: u64 = 8;
const HUGE: u64 = 2;
/// Blobs that go one by one.
const BLOBS: u64 = 512;
/// Mappings of which an invalidation takes pages at once.
const MAPPINGS_AT_ONCE: u64 = 256;
/// The same of an operation that costs next to nothing and repeats.
const MANY: u64 = 1 << 14;
/// Windows of pages that are there for faults; a power of two, enough for the longer run.
pub const WINDOWS: u64 = 2 * FEW;

/// One operation that is counted.
pub trait Operation {
    /// Carries out the n-th; whether it did what it should, as far as that can be seen at once.
    fn run(&mut self, n: u64) -> bool;

    /// Whether everything was done that `count` operations do.
    fn is_done(&self, _count: u64) -> bool {
        true
    }
}

/// An operation with its state.
pub struct Workload {
    /// Its name in the record.
    pub name: &'static str,
    /// What is done.
    pub what: &'static str,
    /// How many pages of a GPU it is about.
    pub pages: u64,
    /// Operations of the shorter run; the longer one has twice as many.
    pub count: u64,
    prepare: Prepare,
}

/// Nothing: what the loop costs.
pub const IDLE: Workload = many("idle", "nothing", || Ok(Box::new(Idle)));

/// Mappings of the GPU VM whose faults are counted.
pub const MAPPINGS: u64 = 64;
/// The conversion C -> A among as many mappings as [`FAULTS`] have.
pub const FIND_OF_FAULTS: &str = "find-64";
/// The lookup of a page among as many leaves as [`FAULTS`] have.
pub const LOOKUP_OF_FAULTS: &str = "lookup-128";
/// Whole faults.
pub const FAULTS: [&str; 4] = ["fault-served-1", "fault-served-16", "fault-answered-1", "fault-answered-16"];

/// Everything that is recorded.
pub const ALL: &[Workload] = &[
    many("find-1", "mapping lookup C -> A, 1 mapping", || Find::boxed(1)),
    many(FIND_OF_FAULTS, "the same, 64 mappings", || Find::boxed(MAPPINGS)),
    many("find-4096", "the same, 4096 mappings", || Find::boxed(4096)),
    many("find-65536", "the same, 65,536 mappings", || Find::boxed(65_536)),
    many("lookup-1", "page lookup in the address space, 1 leaf of 2 MiB", || Lookup::boxed(1)),
    many(LOOKUP_OF_FAULTS, "the same, 128 leaves", || Lookup::boxed(128)),
    many("lookup-4096", "the same, 4096 leaves", || Lookup::boxed(4096)),
    many("route-4096", "asid -> owner, 4096 GPU VMs", || Route::boxed(4096)),
    few("bind-1", "soft page table: bind of 1 page", 1, || Bind::boxed(1, 0)),
    few("bind-16", "the same, run of 16", 16, || Bind::boxed(16, 0)),
    few("bind-512", "the same, run of 512, across two blocks", 512, || Bind::boxed(512, 256)),
    few("bind-512-large", "the same, run of 512, one large leaf", 512, || Bind::boxed(512, 0)),
    few("fault-served-1", "fault served from what is known, 1 page known", 1, || Served::boxed(1)),
    few("fault-served-16", "the same, its whole window of 16 known and bound", 16, || Served::boxed(16)),
    few("fault-answered-1", "fault, its record, PAGE_RESPONSE with 1 page", 1, || Answered::boxed(1)),
    few("fault-answered-16", "the same, with 16 pages as svm-agent answers", 16, || Answered::boxed(16)),
    few("invalidate-1", "INVALIDATE of 1 page that is bound, 64 mappings", 1, || {
        Invalidated::boxed(MAPPINGS)
    }),
    few("invalidate-1-of-4096", "the same, 4096 mappings", 1, || Invalidated::boxed(WINDOWS)),
    bulk("invalidate-4096", "INVALIDATE of 4096 pages that are bound, 1 mapping", PAGES, BULKY, || {
        Script::invalidate_pages(2 * BULKY)
    }),
    bulk(
        "invalidate-256x16",
        "the same, shown by 256 mappings of 16",
        MAPPINGS_AT_ONCE * WINDOW,
        BULKY,
        || Script::invalidate_mappings(MAPPINGS_AT_ONCE, 2 * BULKY),
    ),
    bulk("unref-1-of-4096", "RESOURCE_UNREF of a blob of 1 mapping, among 4096", 1, BLOBS, || {
        Script::unref(2 * BLOBS)
    }),
    few("storm-1", "fault, its record, the answer to the one before, 1 context", 1, || Stormed::boxed(1)),
    few("storm-1024", "the same, a fault waits in each of 1024 contexts", 1, || Stormed::boxed(1024)),
    many("context-churn", "a context made and destroyed, its record", Churned::boxed),
    many("command-noop", "a request that changes nothing: bytes, dispatch, reply", Script::nothing),
    many("ring-noop", "the same from ring to ring", RoundTrip::boxed),
    bulk(
        "supply-bind-4096x1",
        "SUPPLY of 4096 scattered pages, VM_BIND that makes them resident",
        PAGES,
        BULKY,
        || Script::bind(PAGES, 1, 2 * BULKY),
    ),
    bulk("supply-bind-list-4096", "the same, told as a list", PAGES, BULKY, || {
        Script::bind_list(PAGES, 2 * BULKY)
    }),
    bulk("supply-bind-256x16", "the same, in runs of 16", PAGES, BULKY, || {
        Script::bind(PAGES, 16, 2 * BULKY)
    }),
    bulk("supply-bind-8x512", "the same, in runs of 512, large leaves", PAGES, BULKY, || {
        Script::bind(PAGES, 512, 2 * BULKY)
    }),
    bulk("supply-bind-1x262144", "a GiB in one run, made resident by four VM_BINDs", GIB_PAGES, HUGE, || {
        Script::bind(GIB_PAGES, GIB_PAGES, 2 * HUGE)
    }),
];

type Prepare = fn() -> Result<Box<dyn Operation>>;

const fn many(name: &'static str, what: &'static str, prepare: Prepare) -> Workload {
    Workload { name, what, pages: 1, count: MANY, prepare }
}

const fn few(name: &'static str, what: &'static str, pages: u64, prepare: Prepare) -> Workload {
    Workload { name, what, pages, count: FEW, prepare }
}

const fn bulk(name: &'static str, what: &'static str, pages: u64, count: u64, prepare: Prepare) -> Workload {
    Workload { name, what, pages, count, prepare }
}

/// Runs `count` operations of a workload.
///
/// # Errors
/// Fails when there is no such workload, it is not prepared for so many, or it did not do what it should.
pub fn run(name: &str, count: u64) -> Result<()> {
    let known = ALL.iter().chain([&IDLE]).find(|workload| workload.name == name);
    let workload = known.with_context(|| format!("no workload {name:?}"))?;
    ensure!(count <= 2 * workload.count, "{name} is prepared for {} operations", 2 * workload.count);
    let mut operation = (workload.prepare)()?;
    let mut good = true;
    for n in 0..count {
        good &= operation.run(black_box(n));
    }
    ensure!(good && operation.is_done(count), "{name} did not do what it should");
    Ok(())
}

/// Of `end` numbers, a power of two, the n-th in an order without neighbours.
pub fn scrambled(n: u64, end: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b1) & (end - 1)
}

struct Idle;

impl Operation for Idle {
    fn run(&mut self, n: u64) -> bool {
        black_box(n) <= 2 * MANY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_does_what_it_should() {
        for workload in ALL.iter().chain([&IDLE]) {
            run(workload.name, workload.count.min(100)).unwrap();
        }
    }

    #[test]
    fn names_are_told_apart_and_shares_are_of_workloads() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|workload| workload.name).collect();
        assert_eq!(names.len(), ALL.len());
        for name in FAULTS.iter().chain([&FIND_OF_FAULTS, &LOOKUP_OF_FAULTS]) {
            assert!(names.contains(name), "{name}");
        }
        assert!(run("no such", 1).is_err());
    }

    #[test]
    fn scrambled_numbers_come_once_each() {
        let all: std::collections::BTreeSet<_> = (0..WINDOWS).map(|n| scrambled(n, WINDOWS)).collect();
        assert_eq!(all.len() as u64, WINDOWS);
    }
}
