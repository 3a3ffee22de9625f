//! P1 and P2: a command that has nothing to do, one at a time and many in flight.

use super::Bench;
use super::peers::Peer;
use super::place::{Place, pin};
use super::report::{Goal, Row, alternate, median};
use super::ring::{Driver, Wait};
use super::script::{Answer, Script};
use super::svm::Daemon;
use crate::wire;
use anyhow::{Context, Result};
use rustix::thread::CpuSet;
use serde_json::json;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: u64 = 32 << 20;
/// Bytes for the answer to a no-op.
const ROOM: u64 = 64;
/// Round trips between two looks at whether a slice is over.
const BATCH: usize = 16;

/// P1.
///
/// # Errors
/// A backend fails.
pub fn round_trip(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    for place in Place::ALL {
        let new = || Row::new("P1", "no-op round trip", "us", json!({ "placement": place.to_string() }));
        if let Some(why) = bench.cores.lack(place) {
            row(new().unmeasured(&why));
            continue;
        }
        let core = bench.cores.of(place);
        let mut ours = Side::ours(bench, core, place, 1)?;
        if place != Place::Polled {
            let mut events = PingPong::new(core)?;
            let sides =
                alternate(bench.rounds, || ours.median_us(bench.slice), || events.median_us(bench.slice))?;
            row(new().against("eventfd ping-pong of two threads", sides).wants(Goal::RatioAtMost(1.1)));
        }
        for polls in [false, true] {
            // A backend that polls beside its driver on one core would keep it from running.
            if polls && place == Place::SameCore {
                continue;
            }
            let mut null = Side::null(bench, core, place, polls, 1)?;
            let sides =
                alternate(bench.rounds, || ours.median_us(bench.slice), || null.median_us(bench.slice))?;
            let name = if polls { "the crates' null backend, polling" } else { "the crates' null backend" };
            let goal = if place == Place::Polled || !polls { Goal::RatioAtMost(1.1) } else { Goal::None };
            row(new().against(name, sides).wants(goal));
        }
    }
    Ok(())
}

/// P2.
///
/// # Errors
/// A backend fails.
pub fn rate(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let place = if bench.cores.are_two() { Place::Polled } else { Place::SameCore };
    let core = bench.cores.of(place);
    for depth in bench.sizes(&[64, 256], &[64, 256]) {
        let depth = usize::try_from(depth)?.clamp(1, 256);
        let mut ours = Side::ours(bench, core, place, depth)?;
        let mut null = Side::null(bench, core, place, false, depth)?;
        let sides = alternate(bench.rounds, || ours.rate(bench.slice), || null.rate(bench.slice))?;
        let params = json!({ "depth": depth, "placement": place.to_string() });
        let new = Row::new("P2", "no-op rate", "requests/s", params);
        row(new.against("the crates' null backend", sides).wants(Goal::RatioAtLeast(3.0)));
    }
    Ok(())
}

/// A backend and its driver, with no-ops for it.
pub struct Side {
    driver: Driver,
    script: Script,
    _backend: Backend,
}

enum Backend {
    Ours(#[expect(dead_code, reason = "lives as long as its driver")] Daemon),
    Null(#[expect(dead_code, reason = "lives as long as its driver")] Peer),
}

impl Side {
    /// Our daemon.
    ///
    /// # Errors
    /// It fails.
    pub fn ours(bench: &Bench, core: CpuSet, place: Place, depth: usize) -> Result<Self> {
        let daemon = Daemon::launch(bench, core, 1, "")?;
        let driver = daemon.connect(0, MEMORY, wait(place))?;
        Self::new(driver, Backend::Ours(daemon), Answer::CAPSET_INFO, depth)
    }
    fn null(bench: &Bench, core: CpuSet, place: Place, polls: bool, depth: usize) -> Result<Self> {
        let null = Peer::null(bench, core, polls)?;
        let driver = Driver::connect(&null.socket(), 1, MEMORY, wait(place))?;
        Self::new(driver, Backend::Null(null), Answer::NO_DATA, depth)
    }
    fn new(driver: Driver, backend: Backend, answer: Answer, depth: usize) -> Result<Self> {
        let script = no_ops(&driver, answer, depth)?;
        Ok(Self { driver, script, _backend: backend })
    }
    /// Microseconds of a round trip.
    ///
    /// # Errors
    /// The backend fails.
    pub fn median_us(&mut self, slice: Duration) -> Result<f64> {
        let ring = &mut self.driver.rings[0];
        sample(slice, || self.script.step(ring))
    }
    /// Requests a second, as many in flight as there are.
    ///
    /// # Errors
    /// The backend fails.
    pub fn rate(&mut self, slice: Duration) -> Result<f64> {
        let depth = self.script.len();
        let done = self.script.run(&mut self.driver.rings[0], depth, slice, |_| Ok(()))?;
        Ok(1.0 / done.seconds_each())
    }
}

/// So many no-ops, to be answered alike.
///
/// # Errors
/// Guest memory is full.
pub fn no_ops(driver: &Driver, answer: Answer, count: usize) -> Result<Script> {
    let mut script = Script::default();
    for _ in 0..count {
        let command = driver.place(&wire::no_op())?;
        script.add(driver, &[command], ROOM, answer)?;
    }
    Ok(script)
}

/// How a driver waits in a placement.
pub fn wait(place: Place) -> Wait {
    if place.polls() { Wait::Polling } else { Wait::Blocking }
}

/// Takes times for so long; their median in microseconds.
fn sample(slice: Duration, mut take: impl FnMut() -> Result<Duration>) -> Result<f64> {
    let begin = Instant::now();
    let mut times = vec![];
    while times.is_empty() || begin.elapsed() < slice {
        for _ in 0..BATCH {
            times.push(take()?.as_secs_f64() * 1e6);
        }
    }
    Ok(median(&times))
}

/// Two threads and an eventfd each way.
struct PingPong {
    there: EventFd,
    back: EventFd,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What ends the other thread.
const END: u64 = 2;

impl PingPong {
    fn new(core: CpuSet) -> Result<Self> {
        let (there, back) = (EventFd::new(0)?, EventFd::new(0)?);
        let (ping, pong) = (there.try_clone()?, back.try_clone()?);
        let thread = std::thread::spawn(move || {
            // Where it cannot be had, or either end breaks, nobody answers, and the other side finds out.
            if pin(core).is_ok() {
                while ping.read().is_ok_and(|count| count < END) && pong.write(1).is_ok() {}
            }
        });
        Ok(Self { there, back, thread: Some(thread) })
    }
    fn median_us(&mut self, slice: Duration) -> Result<f64> {
        sample(slice, || {
            let begin = Instant::now();
            self.there.write(1)?;
            self.back.read().context("the other thread has ended")?;
            Ok(begin.elapsed())
        })
    }
}

impl Drop for PingPong {
    fn drop(&mut self) {
        // Then it has ended already.
        self.there.write(END).ok();
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}
