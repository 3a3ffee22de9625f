//! P3, P4 and P5: pages of a process told, bound and withdrawn.
//!
//! Of ours, an operation is as many SUPPLY as the list takes, VM_BIND with IMMEDIATE, and one INVALIDATE: every page has
//! been checked, is known, has a translation, and is taken back. Scattered pages are told as a list, 8 bytes a page. Of
//! QEMU's program it is ATTACH_BACKING and DETACH_BACKING, which check and translate each entry of 16 bytes, and build no
//! page table. Each `as_of` of ours is written anew by the driver, beside the daemon at depth 64 and before the clock runs
//! at depth 1; QEMU's lists stay as they are.

mod ours;
mod qemu;

use super::Bench;
use super::place::Place;
use super::report::{Figure, Goal, Row, Sides, alternate};
use super::ring::Ring;
use super::roundtrip::Side;
use super::script::{Done, Script};
use crate::frontend::ram::GuestRam;
use crate::random::Random;
use anyhow::Result;
use ours::{Ours, Shape, Withdrawal};
use qemu::Qemu;
use rustix::thread::CpuSet;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;

/// Commands in flight at most.
const DEPTH: usize = 64;
const LEAF_PAGES: u64 = 512;
/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;
const SEED: u64 = 3;

/// P3.
///
/// # Errors
/// A backend fails.
pub fn scattered(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    for pages in bench.sizes(&[1, 16, 256, 4096, 65_536, 262_144], &[16, 4096]) {
        let (place, core) = place(bench);
        let mut ours = Ours::new(bench, core, Shape { pages, run: 1, withdrawal: Withdrawal::Whole })?;
        let mut qemu = Qemu::new(bench, core, pages).map_err(|cause| format!("{cause:#}"));
        let goal = match pages {
            16 => Goal::RatioAtLeast(3.0),
            256 => Goal::RatioAtLeast(1.5),
            4096.. => Goal::RatioAtLeast(1.0),
            _ => Goal::None,
        };
        for depth in [1, DEPTH] {
            let params = json!({ "pages": pages, "depth": depth, "placement": place.to_string() });
            let new = Row::new("P3", "scattered pages bound and withdrawn", "Mpages/s", params.clone());
            let name = "QEMU's vhost-user-gpu, attach and detach";
            let rates = match &mut qemu {
                Ok(qemu) => {
                    let sides = alternate(
                        bench.rounds,
                        || ours.rate(depth, bench.slice),
                        || qemu.rate(depth, bench.slice),
                    )?;
                    let rates = sides.ours.clone();
                    row(new.against(name, sides.map(|rate| rate / 1e6)).wants(goal));
                    rates
                }
                Err(why) => {
                    let rounds = (0..bench.rounds).map(|_| ours.rate(depth, bench.slice));
                    let rates = Figure::new(rounds.collect::<Result<_>>()?);
                    row(new.alone(rates.map(|rate| rate / 1e6), name, why).wants(goal));
                    rates
                }
            };
            if pages >= 4096 {
                row(per_page(params, pages, bench.rounds, &rates));
            }
        }
    }
    Ok(())
}

/// The same rates, beside a copy of the list.
fn per_page(params: Value, pages: u64, rounds: usize, rates: &Figure) -> Row {
    let sides = Sides { ours: rates.map(|rate| 1e9 / rate), reference: list_copies(pages, rounds) };
    let new = Row::new("P3", "scattered pages bound and withdrawn", "ns/page", params);
    new.against("one copy of the list", sides).wants(Goal::AtMost(10.0))
}

/// P4.
///
/// # Errors
/// The daemon fails.
pub fn in_runs(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let pages = if bench.quick { 65_536 } else { 262_144 };
    let (place, core) = place(bench);
    let shape = |run: u64| Shape { pages, run, withdrawal: Withdrawal::Whole };
    let mut scattered = Ours::new(bench, core, shape(1))?;
    for run in [16, LEAF_PAGES, pages] {
        let mut ours = Ours::new(bench, core, shape(run))?;
        let sides =
            alternate(bench.rounds, || ours.rate(DEPTH, bench.slice), || scattered.rate(DEPTH, bench.slice))?;
        let params = json!({ "pages": pages, "run": run, "depth": DEPTH, "placement": place.to_string() });
        let new = |unit: &str| Row::new("P4", "runs of pages bound and withdrawn", unit, params.clone());
        let name = "the same bytes in runs of one page";
        let goal = if run == LEAF_PAGES { Goal::RatioAtLeast(100.0) } else { Goal::None };
        let gib = sides.map(|rate| rate * PAGE_SIZE as f64 / GIB);
        row(new("GiB/s").against(name, gib).wants(goal));
        let each = Sides {
            ours: sides.ours.map(|rate| run as f64 * 1e9 / rate),
            reference: sides.reference.map(|rate| 1e9 / rate),
        };
        row(new("ns/run").against(name, each).wants(Goal::AtMost(60.0)));
    }
    Ok(())
}

/// P5.
///
/// # Errors
/// The daemon fails.
pub fn withdrawal(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let (place, core) = place(bench);
    for (run, withdrawal) in [
        (1, Withdrawal::Whole),
        (1, Withdrawal::Overlapping),
        (1, Withdrawal::Unmap),
        (LEAF_PAGES, Withdrawal::Whole),
        (LEAF_PAGES, Withdrawal::Overlapping),
        (LEAF_PAGES, Withdrawal::Unmap),
    ] {
        let pages = if run == 1 { 4096 } else { 65_536 };
        let mut ours = Ours::new(bench, core, Shape { pages, run, withdrawal })?;
        ours.start_job()?;
        let mut figures = (vec![], vec![]);
        for _ in 0..bench.rounds {
            let phases = ours.phases(bench.slice)?;
            figures.0.push(pages as f64 / phases.withdraw / 1e6);
            figures.1.push(pages as f64 / phases.bind / 1e6);
        }
        ours.check_job()?;
        let params = json!({
            "pages": pages, "run": run, "withdrawal": format!("{withdrawal:?}"), "depth": 1,
            "placement": place.to_string(),
        });
        let sides = Sides { ours: Figure::new(figures.0), reference: Figure::new(figures.1) };
        let new = Row::new("P5", "pages withdrawn while a job runs", "Mpages/s", params);
        row(new.against("the same pages bound", sides).wants(Goal::RatioAtLeast(1.0)));
    }
    flush(bench, place, row)?;
    flush(bench, Place::ThreeCores, row)
}

fn flush(bench: &Bench, place: Place, row: &mut dyn FnMut(Row)) -> Result<()> {
    let (pages, withdrawal) = (16, Withdrawal::Whole);
    let params = json!({ "pages": pages, "placement": place.to_string() });
    let new = Row::new("P5", "INVALIDATE to INVAL_DONE while a job runs", "us", params);
    if let Some(why) = bench.cores.lack(place) {
        row(new.unmeasured(&why));
        return Ok(());
    }
    let core = bench.cores.of(place);
    let mut ours = Ours::new(bench, core, Shape { pages, run: 1, withdrawal })?;
    let mut events = ours.start_job()?;
    let mut no_op = Side::ours(bench, core, place, 1)?;
    let sides = alternate(
        bench.rounds,
        || Ok(ours.flush(&mut events, bench.slice)? * 1e6),
        || no_op.median_us(bench.slice),
    )?;
    ours.check_job()?;
    row(new.against("P1: our no-op", sides).wants(Goal::RatioAtMost(1.1)));
    Ok(())
}

/// A core each, or where there is no other, one for both.
fn place(bench: &Bench) -> (Place, CpuSet) {
    let place = if bench.cores.are_two() { Place::Polled } else { Place::SameCore };
    (place, bench.cores.of(place))
}

/// Nanoseconds that a page's entry takes in a copy of a whole list, each round.
fn list_copies(pages: u64, rounds: usize) -> Figure {
    let list = vec![1_u64; usize::try_from(pages).unwrap_or(0)];
    let mut copy = vec![0_u64; list.len()];
    let times = 1 + usize::try_from(262_144 / pages.max(1)).unwrap_or(0);
    let round = |_| {
        let begin = Instant::now();
        for _ in 0..times {
            copy.copy_from_slice(std::hint::black_box(&list));
            std::hint::black_box(&copy);
        }
        begin.elapsed().as_secs_f64() * 1e9 / times as f64 / pages as f64
    };
    Figure::new((0..rounds).map(round).collect())
}

/// At depth 1 what the driver prepares is not in the time.
fn run(
    script: &mut Script,
    ring: &mut Ring,
    depth: usize,
    slice: Duration,
    mut prepare: impl FnMut(usize) -> Result<()>,
) -> Result<Done> {
    if depth > 1 {
        return script.run(ring, depth, slice, prepare);
    }
    let begin = Instant::now();
    let mut done = Done { commands: 0, elapsed: Duration::ZERO };
    while begin.elapsed() < slice {
        for place in 0..script.len() {
            prepare(place)?;
            done.elapsed += script.step(ring)?;
            done.commands += 1;
        }
    }
    Ok(done)
}

/// Enough for lists, and for runs that have their pages in one piece.
fn memory_for(run: u64) -> u64 {
    (256 << 20) + (4 * run * PAGE_SIZE / 3).next_multiple_of(PAGE_SIZE)
}

/// Runs of pages at random places of guest memory that is no driver's, one behind the other from `va` on.
fn runs(ram: &GuestRam, va: u64, pages: u64, run: u64) -> Vec<PageRun> {
    let mut random = Random::new(SEED);
    let run = run.min(pages);
    let (first, end) =
        (ram.drivers_end().next_multiple_of(LEAF_PAGES * PAGE_SIZE) / PAGE_SIZE, ram.end() / PAGE_SIZE);
    // Aligned as the run is long, as memory of huge pages would be.
    let align = run.min(LEAF_PAGES);
    let places = (end - first - run) / align + 1;
    (0..pages)
        .step_by(usize::try_from(run).unwrap_or(1))
        .map(|page| PageRun {
            va: (va + page * PAGE_SIZE).into(),
            gpa: ((first + random.below(places) * align) * PAGE_SIZE).into(),
            pages: u32::try_from(run.min(pages - page)).unwrap_or(0).into(),
            ..PageRun::default()
        })
        .collect()
}
