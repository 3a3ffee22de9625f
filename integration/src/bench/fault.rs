//! P6: a device fault that the guest answers, from one fault of a job to the next: the job faults and is parked, the record
//! reaches the guest, its answer is checked, installed and bound, the job goes on.
//!
//! A job touches one place after the other, each the first page of as many as one answer brings. So the time of a job by
//! its places is that of a whole round; what is prepared before and withdrawn afterwards is not in it. The reference does
//! the same with a CPU's faults, and pages that are one run: ours are scattered.

use super::Bench;
use super::events::{Events, Record};
use super::place::Place;
use super::report::{Figure, Goal, Row, alternate};
use super::ring::Driver;
use super::roundtrip::{Side, wait};
use super::script::{Answer, Script};
use super::svm::{Daemon, accepted, create_process, invalidate};
use super::uffd::Faults;
use crate::frontend::ram::GuestRam;
use crate::random::Random;
use crate::wire;
use anyhow::{Context, Result, bail, ensure};
use guest_agent::client::packet;
use rustix::thread::CpuSet;
use serde_json::json;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::event::FaultRecord;
use virtio_gpu_svm::protocol::request::{BIND_OP_MAP_USERPTR, BindOp};

const CTX: u32 = 1;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Places that a job touches.
const PLACES: u64 = 64;
/// Answers that may be on their way: the device has read one before the next fault can come, but not given it back.
const ANSWERS: usize = 8;
/// Distance of places where answers are shorter: no fault brings the next place's page along.
const STRIDE_PAGES: u64 = 64;
const MEMORY: u64 = 64 << 20;
const ROOM: u64 = 128;
const SEED: u64 = 6;

/// P6.
///
/// # Errors
/// The daemon fails.
pub fn round_trip(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    for place in Place::ALL.into_iter().chain([Place::ThreeCores]) {
        let new = |pages: u64, unit: &str| {
            let params = json!({ "pages": pages, "placement": place.to_string() });
            Row::new("P6", "device fault, answered by the guest", unit, params)
        };
        if let Some(why) = bench.cores.lack(place) {
            row(new(1, "us").unmeasured(&why));
            continue;
        }
        let core = bench.cores.of(place);
        for pages in bench.sizes(&[1, 16, 512], &[1, 512]) {
            let pages = pages.clamp(1, 4096);
            let mut ours = Ours::new(bench, core, place, pages)?;
            let name = "userfaultfd, CONTINUE";
            match Faults::new(core, PLACES, pages, place.polls()) {
                Ok(mut faults) => {
                    let sides = alternate(
                        bench.rounds,
                        || bench.repeat(|| ours.round()),
                        || bench.repeat(|| faults.round(PLACES)),
                    )?;
                    if pages >= 512 {
                        let each = sides.map(|us| us * 1e3 / pages as f64);
                        row(new(pages, "ns/page").against(name, each).wants(Goal::RatioAtMost(0.05)));
                    }
                    row(new(pages, "us").against(name, sides).wants(Goal::RatioAtMost(1.0)));
                }
                Err(cause) => row(new(pages, "us").unmeasured(&format!("{cause:#}"))),
            }
            if !ours.own.is_empty() {
                let params = json!({ "pages": pages, "placement": place.to_string() });
                let new =
                    Row::new("P6", "of that: from the record to the answer, in the guest", "us", params);
                row(new.alone(Figure::new(std::mem::take(&mut ours.own)), "none", "it is a part"));
            }
            if pages == 1 {
                let mut no_op = Side::ours(bench, core, place, 1)?;
                let sides = alternate(
                    bench.rounds,
                    || bench.repeat(|| ours.round()),
                    || no_op.median_us(bench.slice),
                )?;
                let most = if place.polls() { 1.3 } else { 1.6 };
                row(new(pages, "us").against("P1: our no-op", sides).wants(Goal::RatioAtMost(most)));
            }
        }
    }
    Ok(())
}

/// A process whose job faults, and the guest's agent.
struct Ours {
    _daemon: Daemon,
    driver: Driver,
    events: Events,
    job: Vec<u8>,
    /// A PAGE_RESPONSE each.
    answers: Script,
    /// Where their commands are.
    places: Vec<u64>,
    next: usize,
    runs: Vec<PageRun>,
    bytes: u64,
    sequence: u64,
    /// Microseconds of each fault that the guest took for its answer, by round.
    own: Vec<f64>,
}

impl Ours {
    fn new(bench: &Bench, core: CpuSet, place: Place, pages: u64) -> Result<Self> {
        let daemon = Daemon::launch(bench, core, 1, "")?;
        let mut driver = daemon.connect(0, MEMORY, wait(place))?;
        let events = Events::post(&mut driver)?;
        let vm_id = create_process(&mut driver, CTX)?;
        let stride = pages.max(STRIDE_PAGES) * PAGE_SIZE;
        let bytes = PLACES * stride;
        let operation = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: bytes.into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        accepted(&mut driver, &wire::bind(CTX, vm_id, &[operation]))?;
        let packets: Vec<_> = (0..PLACES).map(|place| packet::fill(C + place * stride, 8, 1)).collect();
        let job = wire::exec(CTX, vm_id, 0, &packets);
        let runs = scattered(driver.ram(), pages);
        let (mut answers, mut places) = (Script::default(), vec![]);
        for _ in 0..ANSWERS {
            let command = driver.place(&wire::answer(CTX, 0, &runs))?;
            answers.add(&driver, &[command], ROOM, Answer::Accepted)?;
            places.push(command.at);
        }
        let (next, sequence, own) = (0, 0, vec![]);
        Ok(Self { _daemon: daemon, driver, events, job, answers, places, next, runs, bytes, sequence, own })
    }

    /// Microseconds of each fault of one job.
    fn round(&mut self) -> Result<f64> {
        accepted(&mut self.driver, &self.job)?;
        let (mut begin, mut own) = (None, Duration::ZERO);
        for _ in 0..PLACES {
            let Record::Fault(fault) = self.events.next_but_done(&mut self.driver)? else {
                bail!("no fault")
            };
            let told = Instant::now();
            begin.get_or_insert(told);
            self.answer(&fault)?;
            own += told.elapsed();
        }
        let Record::Job(end) = self.events.next_but_done(&mut self.driver)? else { bail!("the job goes on") };
        let elapsed = begin.context("no fault came")?.elapsed();
        ensure!(end.status.get() == 0, "the job ended with {}", end.status.get());
        self.answers.drain(&mut self.driver.rings[0])?;
        let (sequence, mut done) = invalidate(&mut self.driver, CTX, A, self.bytes)?;
        while done < sequence {
            let Record::Done(record) = self.events.next(&mut self.driver)? else { bail!("no INVAL_DONE") };
            done = record.value.get();
        }
        self.sequence = sequence;
        self.own.push(own.as_secs_f64() * 1e6 / PLACES as f64);
        Ok(elapsed.as_secs_f64() * 1e6 / PLACES as f64)
    }

    fn answer(&mut self, fault: &FaultRecord) -> Result<()> {
        for (run, page) in self.runs.iter_mut().zip(0..) {
            run.va = (fault.cpu_addr.get() + page * PAGE_SIZE).into();
            run.as_of = self.sequence.into();
        }
        let command = wire::answer(CTX, fault.cookie.get(), &self.runs);
        self.driver.ram().write(self.places[self.next % ANSWERS], &command)?;
        self.next += 1;
        let ring = &mut self.driver.rings[0];
        self.answers.send(ring, ANSWERS)
    }
}

/// Pages anywhere in guest memory; those of the process follow each other.
fn scattered(ram: &GuestRam, pages: u64) -> Vec<PageRun> {
    let mut random = Random::new(SEED);
    let (first, end) = (ram.drivers_end().div_ceil(PAGE_SIZE), ram.end() / PAGE_SIZE);
    let gpa = |page: u64| (first + page) * PAGE_SIZE;
    let run = |page: u64| PageRun {
        va: (page * PAGE_SIZE).into(),
        gpa: gpa(random.below(end - first)).into(),
        pages: 1.into(),
        ..PageRun::default()
    };
    (0..pages).map(run).collect()
}
