//! P12: a copy through GPU addresses, beside a copy of the same pages by this process.

use super::Bench;
use super::events::{Events, Record};
use super::place::Place;
use super::report::{Goal, Row, alternate};
use super::ring::Driver;
use super::roundtrip::{Side, wait};
use super::svm::{Daemon, accepted, create_process};
use crate::frontend::ram::GuestRam;
use crate::wire;
use anyhow::{Result, bail, ensure};
use guest_agent::client::packet;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{BIND_IMMEDIATE, BIND_OP_MAP_USERPTR, BindOp};
use virtio_gpu_svm::protocol::{MAX_PACKETS, PAGE_SIZE};

const CTX: u32 = 1;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Runs of a SUPPLY, and pages of a VM_BIND that makes them resident.
const RUNS: usize = 4096;
const BIND_PAGES: u64 = 65_536;
/// Pages that a job copies at least: 16 MiB.
const LEAST_PAGES: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: f64 = (1_u64 << 30) as f64;

/// P12.
///
/// # Errors
/// The daemon fails.
pub fn job(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let place = if bench.cores.are_two() { Place::Polled } else { Place::SameCore };
    for kib in bench.sizes(&[4, 64, 2048, 65_536, 1_048_576], &[4, 2048]) {
        for scattered in [true, false] {
            let pages = kib.div_ceil(4).max(1);
            let mut process = Process::new(bench, place, pages, scattered)?;
            // Short ones several times in a job: what a job itself takes is told below.
            let packets = (LEAST_PAGES / pages).clamp(1, u64::from(MAX_PACKETS));
            let copy = packet::copy(C + pages * PAGE_SIZE, C, pages * PAGE_SIZE);
            let copies = vec![copy; usize::try_from(packets)?];
            let gib = (packets * pages * PAGE_SIZE) as f64 / GIB;
            let guest = process.memory();
            let sides = alternate(
                bench.rounds,
                || bench.repeat(|| Ok(gib / process.run(&copies)?)),
                || bench.repeat(|| Ok(gib / guest.copy(packets)?)),
            )?;
            let params = json!({
                "KiB": pages * 4, "packets": packets, "scattered": scattered, "placement": place.to_string(),
            });
            let new = Row::new("P12", "copy job, from EXEC to its record", "GiB/s", params);
            row(new.against("memcpy of the same pages", sides).wants(Goal::RatioAtLeast(0.95)));
        }
    }
    for place in [place, Place::ThreeCores] {
        empty_job(bench, place, row)?;
    }
    Ok(())
}

fn empty_job(bench: &Bench, place: Place, row: &mut dyn FnMut(Row)) -> Result<()> {
    let params = json!({ "placement": place.to_string() });
    let new = Row::new("P12", "job without work, from EXEC to its record", "us", params);
    if let Some(why) = bench.cores.lack(place) {
        row(new.unmeasured(&why));
        return Ok(());
    }
    let mut process = Process::new(bench, place, 1, false)?;
    let mut no_op = Side::ours(bench, bench.cores.of(place), place, 1)?;
    let sides = alternate(
        bench.rounds,
        || bench.repeat(|| Ok(process.run(&[Packet::default()])? * 1e6)),
        || no_op.median_us(bench.slice),
    )?;
    let most = (10.0 * sides.reference.median()).round() / 10.0 + 1.0;
    row(new.against("P1: our no-op", sides).wants(Goal::AtMost(most)));
    Ok(())
}

/// A process with two ranges of so many pages, one behind the other.
struct Process {
    driver: Driver,
    events: Events,
    vm_id: u32,
    /// Of both ranges, in order.
    gpas: Vec<u64>,
    _daemon: Daemon,
}

impl Process {
    fn new(bench: &Bench, place: Place, pages: u64, scattered: bool) -> Result<Self> {
        let daemon = Daemon::launch(bench, bench.cores.of(place), 1, "")?;
        // A quarter is the driver's.
        let memory = (4 * 2 * pages * PAGE_SIZE / 3).next_multiple_of(MIB) + 64 * MIB;
        let mut driver = daemon.connect(0, memory, wait(place))?;
        let events = Events::post(&mut driver)?;
        let vm_id = create_process(&mut driver, CTX)?;
        let mut numbers = driver.ram().take_pages(usize::try_from(2 * pages)?)?;
        if !scattered {
            let first = driver.ram().drivers_end().div_ceil(PAGE_SIZE);
            numbers = (first..first + 2 * pages).collect();
        }
        let gpas: Vec<_> = numbers.iter().map(|page| page * PAGE_SIZE).collect();
        for (chunk, from) in gpas.chunks(RUNS).zip((A..).step_by(RUNS * usize::try_from(PAGE_SIZE)?)) {
            let runs = if scattered { single_pages(from, chunk) } else { one_run(from, chunk) };
            accepted(&mut driver, &wire::supply(CTX, &runs))?;
        }
        for page in (0..2 * pages).step_by(usize::try_from(BIND_PAGES)?) {
            let operation = BindOp {
                op: BIND_OP_MAP_USERPTR.into(),
                flags: BIND_IMMEDIATE.into(),
                addr: (C + page * PAGE_SIZE).into(),
                range: (BIND_PAGES.min(2 * pages - page) * PAGE_SIZE).into(),
                obj_offset: (A + page * PAGE_SIZE).into(),
                ..BindOp::default()
            };
            accepted(&mut driver, &wire::bind(CTX, vm_id, &[operation]))?;
        }
        Ok(Self { driver, events, vm_id, gpas, _daemon: daemon })
    }

    /// Seconds of a job.
    fn run(&mut self, packets: &[Packet]) -> Result<f64> {
        let exec = wire::exec(CTX, self.vm_id, 0, packets);
        let begin = Instant::now();
        accepted(&mut self.driver, &exec)?;
        let Record::Job(end) = self.events.next(&mut self.driver)? else { bail!("a page is missing") };
        let elapsed = begin.elapsed();
        ensure!(end.status.get() == 0, "the job ended with {}", end.status.get());
        Ok(elapsed.as_secs_f64())
    }

    /// The same pages, as this process sees them.
    fn memory(&self) -> Pages {
        let (sources, targets) = self.gpas.split_at(self.gpas.len() / 2);
        let (ram, sources, targets) = (self.driver.ram().clone(), sources.to_vec(), targets.to_vec());
        Pages { ram, pairs: sources.into_iter().zip(targets).collect() }
    }
}

struct Pages {
    ram: Arc<GuestRam>,
    pairs: Vec<(u64, u64)>,
}

impl Pages {
    /// Seconds of so many copies of all.
    fn copy(&self, times: u64) -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..times {
            for (source, target) in &self.pairs {
                let source = self.ram.slice(*source, PAGE_SIZE)?;
                source.copy_to_volatile_slice(self.ram.slice(*target, PAGE_SIZE)?);
            }
        }
        Ok(begin.elapsed().as_secs_f64())
    }
}

fn single_pages(va: u64, gpas: &[u64]) -> Vec<PageRun> {
    let run = |(index, gpa): (u64, &u64)| PageRun {
        va: (va + index * PAGE_SIZE).into(),
        gpa: (*gpa).into(),
        pages: 1.into(),
        ..PageRun::default()
    };
    (0..).zip(gpas).map(run).collect()
}

fn one_run(va: u64, gpas: &[u64]) -> Vec<PageRun> {
    let pages = u32::try_from(gpas.len()).unwrap_or(0).into();
    let first =
        gpas.first().map(|gpa| PageRun { va: va.into(), gpa: (*gpa).into(), pages, ..PageRun::default() });
    first.into_iter().collect()
}
