//! P8, P9 and P10: what many contexts, much memory and many guests cost.
//!
//! Memory is the resident memory of a process of its own that does one thing (this program, executed anew): before, after,
//! and when everything was taken back.

use super::Bench;
use super::peers::Peer;
use super::place::Place;
use super::report::{Figure, Goal, Row, Sides, alternate, median};
use super::ring::{Driver, Wait};
use super::roundtrip::{no_ops, wait};
use super::script::{Answer, Script};
use super::svm::Daemon;
use crate::library::{GPA, Library, Process};
use crate::random::Random;
use crate::wire;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::ffi::OsString;
use std::process::Command;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::PageRun;
use virtio_gpu_svm::protocol::request::{BIND_IMMEDIATE, BIND_OP_MAP_USERPTR, BindOp};

/// First argument of this program where it is to measure its memory.
pub const MEMORY: &str = "memory";
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
const SEED: u64 = 8;
const MIB: u64 = 1 << 20;
const PAGES_OF_A_GIB: u64 = 262_144;
/// Binds of a sample.
const BINDS: usize = 2000;
/// Pages of a bind.
const BIND_PAGES: u64 = 16;
/// Runs of a SUPPLY.
const LIST: usize = 4096;
/// Runs with which everything is used once.
const FIRST_RUNS: u64 = 8;
/// No-ops that each guest keeps in flight.
const DEPTH: usize = 8;

/// P8.
///
/// # Errors
/// The library refuses.
pub fn contexts(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let mut one = Many::new(1)?;
    for count in bench.sizes(&[1, 1000, 10_000, 100_000], &[1, 1000]) {
        let mut many = Many::new(u32::try_from(count)?)?;
        let sides = alternate(bench.rounds, || many.bind_us(), || one.bind_us())?;
        let goal = match count {
            ..=10_000 => Goal::RatioAtMost(1.2),
            _ => Goal::RatioAtMost(2.0),
        };
        let params = json!({ "contexts": count, "pages": BIND_PAGES, "placement": "in process" });
        let new = Row::new("P8", "bind in a random context, p50", "us", params);
        row(new.against("1 context", sides).wants(goal));
    }
    let rounds = (0..bench.rounds).map(|_| churn(bench.slice)).collect::<Result<_>>()?;
    let new = Row::new("P8", "contexts created and destroyed", "1/s", json!({ "placement": "in process" }));
    row(new.alone(Figure::new(rounds), "none", "the goal is a number").wants(Goal::AtLeast(1e6)));
    Ok(())
}

/// Many processes, each with one mapping.
struct Many {
    library: Library,
    processes: Vec<Process>,
    random: Random,
}

impl Many {
    fn new(count: u32) -> Result<Self> {
        let mut library = Library::new(64 * MIB)?;
        let processes: Vec<_> =
            (1..=count).map(|ctx_id| library.create_process(ctx_id)).collect::<Result<_>>()?;
        for process in &processes {
            library.control(&bind(*process, 0))?;
        }
        Ok(Self { library, processes, random: Random::new(SEED) })
    }

    /// The same mapping made again, each time in another context.
    fn bind_us(&mut self) -> Result<f64> {
        let mut times = vec![];
        for _ in 0..BINDS {
            let process = self.processes[self.random.index(self.processes.len())];
            let (command, begin) = (bind(process, 0), Instant::now());
            self.library.control(&command)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        Ok(median(&times))
    }
}

fn bind(process: Process, flags: u32) -> Vec<u8> {
    mapping(process, 0, BIND_PAGES, flags)
}

fn mapping(process: Process, first: u64, pages: u64, flags: u32) -> Vec<u8> {
    let operation = BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        flags: flags.into(),
        addr: (C + first * PAGE_SIZE).into(),
        range: (pages * PAGE_SIZE).into(),
        obj_offset: (A + first * PAGE_SIZE).into(),
        ..BindOp::default()
    };
    wire::bind(process.ctx_id, process.vm_id, &[operation])
}

/// Contexts a second that are created and destroyed, the record of each end fetched.
fn churn(slice: Duration) -> Result<f64> {
    let mut library = Library::new(64 * MIB)?;
    let (create, destroy) = (wire::create_context(1), wire::destroy_context(1));
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed() < slice {
        for _ in 0..64 {
            library.control(&create)?;
            library.control(&destroy)?;
            count += library.take_records(drop)?;
        }
    }
    Ok(count as f64 / begin.elapsed().as_secs_f64())
}

/// P9.
///
/// # Errors
/// The process that is measured fails.
pub fn memory(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let contexts: u64 = if bench.quick { 10_000 } else { 100_000 };
    let pages = PAGES_OF_A_GIB;
    let cases = [
        ("contexts", contexts, 1, "bytes/context", Goal::AtMost(512.0)),
        ("processes", contexts, 1, "bytes/context with a GPU VM", Goal::None),
        ("pages", pages, 1, "bytes/page", Goal::AtMost(12.2)),
        ("pages", pages, 512, "bytes/run", Goal::AtMost(32.0)),
    ];
    for (case, count, run, unit, goal) in cases {
        let Memory { grown, left, again } = measured(bench, case, count, run)?;
        let params = json!({ case: count, "run": run, "placement": "in process" });
        let new = || Row::new("P9", "resident memory", unit, params.clone());
        let each = Figure::once(grown / (count / run) as f64);
        let of_pages = case == "pages" && run == 1;
        row(if of_pages {
            let sides = Sides { ours: each, reference: Figure::once(8.1) };
            new().against("the least of a radix table (a constant)", sides).wants(goal)
        } else {
            new().alone(each, "none", "the goal is a number").wants(goal)
        });
        // An allocator keeps what it is given back: whether it can be used again is what a second time shows.
        for (name, bytes) in [("left when all was taken back", left), ("added by a second time", again)] {
            let mib = |bytes: f64| Figure::once(bytes / MIB as f64);
            let sides = Sides { ours: mib(bytes), reference: mib(grown) };
            let new = Row::new("P9", &format!("resident memory {name}"), "MiB", params.clone());
            row(new.against("while it was there", sides).wants(Goal::RatioAtMost(0.05)));
        }
    }
    Ok(())
}

/// Bytes of a process.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// It has grown by these.
    pub grown: f64,
    /// These are left when all was undone.
    pub left: f64,
    /// And these more when it was done and undone again.
    pub again: f64,
}

/// What a process of its own needs for so much of a case.
///
/// # Errors
/// It fails.
pub fn measured(bench: &Bench, case: &str, count: u64, run: u64) -> Result<Memory> {
    let mut command = Command::new(&bench.program);
    command.args([MEMORY, case, &count.to_string(), &run.to_string()]);
    let output = command.output().context("cannot measure memory")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let numbers: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [before, with, left, again] = numbers[..] else { bail!("{text:?} is not four numbers") };
    Ok(Memory { grown: with - before, left: left - before, again: again - left })
}

/// Does one thing twice and prints how much memory this process has before, with it, when it was undone, and when the
/// second time was; the arguments are those behind [`MEMORY`].
///
/// # Errors
/// The arguments are wrong, or the library refuses.
pub fn tell_memory(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut next = || arguments.next().and_then(|argument| argument.into_string().ok()).context("usage");
    let (case, count, run): (String, u64, u64) = (next()?, next()?.parse()?, next()?.parse()?);
    let mut library = Library::new(1 << 30)?;
    // What is made once, by the first of all.
    let first = library.create_process(u32::MAX)?;
    let waiting = if case == "faults" { processes(&mut library, count, run)? } else { vec![] };
    if case != "faults" {
        library.start_engine();
    }
    // Lists of runs are kept: what tables would be made of must not have been in use before.
    let (mut commands, mut told) = (vec![], vec![]);
    if case == "pages" {
        // The first use of code and of lists takes room that is not the price of a page. Commands are the driver's.
        send(&mut library, &supply_and_bind(first, FIRST_RUNS * run, run, 0).0)?;
        withdraw(&mut library, first, FIRST_RUNS * run)?;
        (commands, told) = (1..=2).map(|sequence| supply_and_bind(first, count, run, sequence)).unzip();
    }
    let before = resident()?;
    let mut figures = vec![];
    for round in 0..2 {
        match case.as_str() {
            "contexts" => create(&mut library, count, |library, ctx_id| {
                library.control(&wire::create_context(ctx_id)).map(drop)
            })?,
            "processes" => {
                create(&mut library, count, |library, ctx_id| library.create_process(ctx_id).map(drop))?;
            }
            "faults" if round == 0 => raise(&library, &waiting, run),
            "faults" => {}
            "pages" => send(&mut library, commands.get(round).context("no commands")?)?,
            _ => bail!("no case {case}"),
        }
        figures.push(resident()?);
        match case.as_str() {
            "pages" => withdraw(&mut library, first, count)?,
            "faults" => {}
            _ => destroy(&mut library, count)?,
        }
        figures.push(resident()?);
    }
    drop(told);
    println!("{before} {} {} {}", figures[0], figures[1], figures[3]);
    Ok(())
}

fn withdraw(library: &mut Library, process: Process, pages: u64) -> Result<()> {
    library.control(&wire::invalidate(process.ctx_id, A, pages * PAGE_SIZE)).map(drop)
}

fn create(library: &mut Library, count: u64, one: impl Fn(&mut Library, u32) -> Result<()>) -> Result<()> {
    (1..=u32::try_from(count)?).try_for_each(|ctx_id| one(library, ctx_id))
}

/// Destroys contexts, and waits for the records of their ends.
fn destroy(library: &mut Library, count: u64) -> Result<()> {
    let mut ended = 0;
    for ctx_id in 1..=u32::try_from(count)? {
        library.control(&wire::destroy_context(ctx_id))?;
        ended += library.take_records(drop)?;
    }
    while (ended as u64) < count {
        ended += library.take_records(drop)?;
        std::thread::yield_now();
    }
    Ok(())
}

fn raise(library: &Library, processes: &[Process], pages: u64) {
    for (process, index) in processes.iter().zip(0..) {
        (0..pages).for_each(|page| library.raise(*process, index * pages + page, C + page * PAGE_SIZE));
    }
}

/// Processes whose pages nobody knows.
fn processes(library: &mut Library, count: u64, pages: u64) -> Result<Vec<Process>> {
    let mut processes = vec![];
    for ctx_id in 1..=u32::try_from(count)? {
        let process = library.create_process(ctx_id)?;
        library.control(&mapping(process, 0, pages, 0))?;
        processes.push(process);
    }
    Ok(processes)
}

/// Commands that tell pages and bind them, and the runs.
fn supply_and_bind(process: Process, pages: u64, run: u64, sequence: u64) -> (Vec<Vec<u8>>, Vec<PageRun>) {
    let mut random = Random::new(SEED);
    let places = PAGES_OF_A_GIB / run;
    let told: Vec<_> = (0..pages / run)
        .map(|index| PageRun {
            va: (A + index * run * PAGE_SIZE).into(),
            gpa: (GPA + random.below(places) * run * PAGE_SIZE).into(),
            pages: u32::try_from(run).unwrap_or(0).into(),
            as_of: sequence.into(),
            ..PageRun::default()
        })
        .collect();
    let supplies = told.chunks(LIST).map(|runs| wire::supply(process.ctx_id, runs));
    let binds = (0..pages)
        .step_by(65_536)
        .map(|page| mapping(process, page, 65_536.min(pages - page), BIND_IMMEDIATE));
    (supplies.chain(binds).collect(), told)
}

fn send(library: &mut Library, commands: &[Vec<u8>]) -> Result<()> {
    commands.iter().try_for_each(|command| library.control(command).map(drop))
}

/// Resident bytes of this process.
fn resident() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text.split_whitespace().nth(1).context("no statm")?.parse()?;
    Ok(pages * PAGE_SIZE)
}

/// P10.
///
/// # Errors
/// A backend fails.
pub fn guests(bench: &Bench, row: &mut dyn FnMut(Row)) -> Result<()> {
    let place = if bench.cores.are_two() { Place::Polled } else { Place::SameCore };
    let core = bench.cores.of(place);
    for count in bench.sizes(&[1, 4, 16, 64], &[1, 4]) {
        let count = usize::try_from(count)?;
        let daemon = Daemon::launch(bench, core, count, "")?;
        let connect = |guest| daemon.connect(guest, 32 * MIB, wait(place));
        let mut ours = Crowd::new((0..count).map(connect).collect::<Result<_>>()?, Answer::CAPSET_INFO)?;
        let nulls: Vec<_> = (0..count).map(|_| Peer::null(bench, core, false)).collect::<Result<_>>()?;
        let connect = |peer: &Peer| Driver::connect(&peer.socket(), 1, 32 * MIB, wait(place));
        let mut null = Crowd::new(nulls.iter().map(connect).collect::<Result<_>>()?, Answer::NO_DATA)?;
        // Guests that wait for their turn on one core need longer than one alone.
        let slice = bench.slice.max(Duration::from_millis(5) * u32::try_from(count)?);
        let mut jain = (vec![], vec![]);
        let sides = alternate(
            bench.rounds,
            || ours.rate(slice).map(|(rate, fair)| (rate, jain.0.push(fair)).0),
            || null.rate(slice).map(|(rate, fair)| (rate, jain.1.push(fair)).0),
        )?;
        let params = json!({ "guests": count, "depth": DEPTH, "placement": place.to_string() });
        let name = "as many of the crates' null backends";
        let new = |name: &str, unit: &str| Row::new("P10", name, unit, params.clone());
        row(new("no-ops of all guests", "requests/s").against(name, sides).wants(Goal::RatioAtLeast(0.95)));
        let fair = Sides { ours: Figure::new(jain.0), reference: Figure::new(jain.1) };
        row(new("Jain's index of guests' no-ops", "1").against(name, fair).wants(Goal::AtLeast(0.98)));
    }
    Ok(())
}

/// Guests whose rings one thread serves in turn.
struct Crowd(Vec<(Driver, Script)>);

impl Crowd {
    fn new(drivers: Vec<Driver>, answer: Answer) -> Result<Self> {
        let guest = |mut driver: Driver| {
            // Who serves many rings sleeps at none.
            driver.wait_by(Wait::Polling)?;
            let script = no_ops(&driver, answer, DEPTH)?;
            Ok((driver, script))
        };
        Ok(Self(drivers.into_iter().map(guest).collect::<Result<_>>()?))
    }

    /// Requests a second of all, and Jain's index of those of each.
    fn rate(&mut self, slice: Duration) -> Result<(f64, f64)> {
        let before: Vec<_> = self.0.iter().map(|(_, script)| script.done()).collect();
        let begin = Instant::now();
        while begin.elapsed() < slice {
            for (driver, script) in &mut self.0 {
                script.pump(&mut driver.rings[0], DEPTH)?;
            }
        }
        let elapsed = begin.elapsed().as_secs_f64();
        let each: Vec<_> = self.0.iter().zip(before).map(|((_, script), old)| script.done() - old).collect();
        for (driver, script) in &mut self.0 {
            script.drain(&mut driver.rings[0])?;
        }
        let each: Vec<f64> = each.into_iter().map(|done| done as f64).collect();
        Ok((each.iter().sum::<f64>() / elapsed, jain(&each)))
    }
}

/// 1 where all have the same, 1/n where one has all.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_is_one_for_equal_shares_and_least_for_one_that_has_all() {
        assert!((jain(&[3.0, 3.0, 3.0]) - 1.0).abs() < 1e-9);
        assert!((jain(&[9.0, 0.0, 0.0]) - 1.0 / 3.0).abs() < 1e-9);
    }
}
