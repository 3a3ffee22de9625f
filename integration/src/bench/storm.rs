//! P7: contexts that all fault on one GPU address, several accesses each, and a guest that answers when it has been told of
//! all of them.
//!
//! Each access is a job on a ring of its own. A storm is timed from the first EXEC to the last record of an end; pages are
//! withdrawn outside that time.

use super::Bench;
use super::events::{Events, Record};
use super::place::Place;
use super::report::{Figure, Goal, Row, alternate};
use super::ring::Driver;
use super::roundtrip::{Side, wait};
use super::scale::{Memory, measured};
use super::script::{Answer, Script};
use super::svm::Daemon;
use crate::wire;
use anyhow::{Result, ensure};
use guest_agent::client::packet;
use serde_json::json;
use std::time::Instant;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::request::{BIND_OP_MAP_USERPTR, BindOp};

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Commands in flight.
const DEPTH: usize = 64;
const MIB: u64 = 1 << 20;
const ROOM: u64 = 128;
/// Bytes of a command at most.
const COMMAND: usize = 256;
/// The first GPU VM of a context.
const VM: u32 = 1;
/// What the operator allows, so that no storm is held back.
const LIMITS: &str = "[limits]\ncontexts = 200000\ngpu_vms = 200000\ntotal_jobs = 400000\ntotal_pending_faults = 400000\n\
                      table_bytes = 17179869184\nqueue_bytes = 17179869184\n";

/// P7.
///
/// # Errors
/// The daemon fails.
pub fn storms(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let place = if bench.cores.are_two() { Place::Polled } else { Place::SameCore };
    let mut no_ops = Side::ours(bench, bench.cores.of(place), place, DEPTH)?;
    let mut one = Storm::new(bench, place, 1, 1)?;
    let name = "accesses that fault, are answered and end";
    let mut cases: Vec<_> = bench.sizes(&[1, 1000, 10_000], &[1, 100]).into_iter().map(|n| (n, 1)).collect();
    cases.extend(if bench.quick { vec![(100, 4)] } else { vec![(1000, 4), (1000, 64)] });
    if !bench.quick && bench.sizes.is_none() {
        cases.push((100_000, 1));
    }
    for (contexts, duplicates) in cases {
        let mut storm = Storm::new(bench, place, u32::try_from(contexts)?, duplicates)?;
        // Few contexts end too soon to be timed.
        let times = (DEPTH as u64).div_ceil(contexts);
        let params = json!({
            "contexts": contexts, "duplicates": duplicates, "depth": DEPTH, "placement": place.to_string(),
        });
        let new = |name: &str, unit: &str| Row::new("P7", name, unit, params.clone());
        let sides =
            alternate(bench.rounds, || Ok(1.0 / storm.seconds_each(times)?), || no_ops.rate(bench.slice))?;
        row(new(name, "1/s").against("P2: our no-ops", sides).wants(Goal::RatioAtLeast(0.5)));
        let sides = alternate(
            bench.rounds,
            || Ok(storm.seconds_each(times)? * 1e6),
            || Ok(one.seconds_each(DEPTH as u64)? * 1e6),
        )?;
        row(new(name, "us each").against("1 context, one after the other", sides));
        let reports = Figure::once(storm.reports as f64 / (storm.storms * contexts) as f64);
        row(new("reports of a page of a context", "1")
            .alone(reports, "none", "the goal is a number")
            .wants(Goal::Exactly(1.0)));
    }
    apart(bench, name, row)?;
    let contexts = if bench.quick { 100 } else { 4000 };
    let Memory { grown, .. } = measured(bench, "faults", contexts, PENDING)?;
    let params = json!({ "contexts": contexts, "pending": PENDING, "placement": "in process" });
    let new = Row::new("P7", "resident memory of a pending fault", "bytes", params);
    let each = Figure::once(grown / (contexts * PENDING) as f64);
    row(new.alone(each, "none", "the goal is a number").wants(Goal::AtMost(64.0)));
    Ok(())
}

/// A storm in which engine and queue thread need not take turns on one core.
fn apart(bench: &Bench, name: &str, row: &mut dyn FnMut(Row)) -> Result<()> {
    let (place, contexts) = (Place::ThreeCores, if bench.quick { 100 } else { 1000 });
    let params = json!({
        "contexts": contexts, "duplicates": 1, "depth": DEPTH, "placement": place.to_string(),
    });
    let new = Row::new("P7", name, "1/s", params);
    if let Some(why) = bench.cores.lack(place) {
        row(new.unmeasured(&why));
        return Ok(());
    }
    let mut no_ops = Side::ours(bench, bench.cores.of(place), place, DEPTH)?;
    let mut storm = Storm::new(bench, place, contexts, 1)?;
    let sides = alternate(bench.rounds, || Ok(1.0 / storm.seconds_each(1)?), || no_ops.rate(bench.slice))?;
    row(new.against("P2: our no-ops", sides).wants(Goal::RatioAtLeast(0.5)));
    Ok(())
}

/// Faults of each context that wait, where their memory is measured.
const PENDING: u64 = 64;

/// Many processes, each with one page at the same address.
struct Storm {
    driver: Driver,
    events: Events,
    commands: Script,
    contexts: u32,
    /// Jobs of each, on a ring each.
    duplicates: u32,
    gpa: u64,
    /// Storms so far: as many invalidations of each process.
    storms: u64,
    reports: u64,
    ends: u64,
    faults: Vec<FaultRecord>,
    _daemon: Daemon,
}

impl Storm {
    fn new(bench: &Bench, place: Place, contexts: u32, duplicates: u32) -> Result<Self> {
        let daemon = Daemon::launch(bench, bench.cores.of(place), 1, LIMITS)?;
        let mut driver = daemon.connect(0, 64 * MIB, wait(place))?;
        let events = Events::post(&mut driver)?;
        let gpa = driver.ram().take_pages(1)?[0] * PAGE_SIZE;
        let mut commands = Script::default();
        for _ in 0..DEPTH {
            let room = driver.place(&[0; COMMAND])?;
            commands.add(&driver, &[room], ROOM, Answer::Accepted)?;
        }
        let (storms, reports, ends, faults) = (0, 0, 0, vec![]);
        let mut storm = Self {
            driver,
            events,
            commands,
            contexts,
            duplicates,
            gpa,
            storms,
            reports,
            ends,
            faults,
            _daemon: daemon,
        };
        for ctx_id in 1..=contexts {
            storm.send(&wire::create_context(ctx_id))?;
            storm.send(&wire::create_vm(ctx_id))?;
            storm.send(&wire::bind(ctx_id, VM, &[mapping()]))?;
        }
        storm.commands.drain(&mut storm.driver.rings[0])?;
        Ok(storm)
    }

    fn send(&mut self, command: &[u8]) -> Result<()> {
        self.commands.send_new(&mut self.driver.rings[0], command)
    }

    /// Seconds of an access, of so many storms.
    fn seconds_each(&mut self, storms: u64) -> Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..storms {
            seconds += self.rage()?;
        }
        let accesses = storms * u64::from(self.contexts) * u64::from(self.duplicates);
        Ok(seconds / accesses as f64)
    }

    fn rage(&mut self) -> Result<f64> {
        let (begin, contexts) = (Instant::now(), u64::from(self.contexts));
        let before = self.ends;
        for ctx_id in 1..=self.contexts {
            for ring in 0..self.duplicates {
                self.send(&wire::exec(ctx_id, VM, ring, &[packet::fill(C, 8, 1)]))?;
            }
            self.collect()?;
        }
        self.commands.drain(&mut self.driver.rings[0])?;
        while (self.faults.len() as u64) < contexts {
            self.wait()?;
        }
        // Now they are all waiting.
        while let Some(fault) = self.faults.pop() {
            let run = PageRun {
                va: fault.cpu_addr,
                gpa: self.gpa.into(),
                pages: 1.into(),
                as_of: self.storms.into(),
                ..PageRun::default()
            };
            self.send(&wire::answer(fault.ctx_id.get(), fault.cookie.get(), &[run]))?;
            self.reports += 1;
            self.collect()?;
        }
        self.commands.drain(&mut self.driver.rings[0])?;
        while self.ends - before < contexts * u64::from(self.duplicates) {
            self.wait()?;
        }
        let elapsed = begin.elapsed().as_secs_f64();
        // Whoever was told twice is told by now.
        self.reports += self.faults.drain(..).len() as u64;
        for ctx_id in 1..=self.contexts {
            self.send(&wire::invalidate(ctx_id, A, PAGE_SIZE))?;
        }
        self.commands.drain(&mut self.driver.rings[0])?;
        self.storms += 1;
        Ok(elapsed)
    }

    /// Takes what records there are.
    fn collect(&mut self) -> Result<()> {
        while let Some(record) = self.events.take(&mut self.driver)? {
            self.count(&record)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        let record = self.events.next(&mut self.driver)?;
        self.count(&record)
    }

    fn count(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Fault(fault) => self.faults.push(*fault),
            Record::Job(end) => {
                ensure!(end.status.get() == 0, "a job ended with {}", end.status.get());
                self.ends += 1;
            }
            Record::Done(_) => {}
        }
        Ok(())
    }
}

fn mapping() -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: C.into(),
        range: PAGE_SIZE.into(),
        obj_offset: A.into(),
        ..BindOp::default()
    }
}
