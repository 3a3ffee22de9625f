//! Runs a scenario under many schedules, and says how many it took.

use crate::machine::Ram;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use std::cell::RefCell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use virtio_gpu_svm_model::seeded::{self, Bug};
use virtio_gpu_svm_model::shuttle::{self, Config, FailurePersistence, Runner, UngracefulShutdownConfig};

/// A guest, its processes and what they do, from the first command to the last engine.
pub type Scenario = fn(&Arc<Ram>);

/// Schedules of all scenarios, where nothing else is asked for.
const SCHEDULES: usize = 100_000;
/// Sum of the scenarios' shares in them.
const SHARES: usize = 48;
/// Schedules in which a seeded error must be found.
const BOUND: usize = 20_000;
/// Where nothing else is asked for: the same schedules each time.
const SEED: u64 = 0x5eed;
/// Changes of priority in a schedule of the second kind.
const DEPTH: usize = 12;

#[derive(Clone, Copy, Debug)]
enum Order {
    /// Whoever runs next is drawn at each step.
    Random,
    /// Probabilistic concurrency testing: fixed priorities, changed at [`DEPTH`] drawn points.
    Pct,
}

thread_local! {
    /// On a thread that runs schedules: what the first panic said. Shuttle's own report of a panic may have no text.
    static SAID: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// Panics in schedules are results: they are kept, and not printed.
fn catch_texts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = || {
                let text = info.payload_as_str().unwrap_or("a panic without a text");
                info.location().map_or_else(|| text.to_owned(), |location| format!("{text}\n{location}"))
            };
            let kept = SAID.with_borrow_mut(|said| {
                let said = said.as_mut()?;
                said.get_or_insert_with(text);
                Some(())
            });
            if kept.is_none() {
                others(info);
            }
        }));
    });
}

/// Runs up to `most` schedules; the one with a violation, if there was any, and what it was.
fn explore(
    scenario: Scenario,
    bug: Option<Bug>,
    order: Order,
    most: usize,
) -> Result<usize, (usize, String)> {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    catch_texts();
    // A thread of its own: what a failed schedule leaves behind in the thread's state stays behind.
    let run = std::thread::spawn(move || {
        seeded::switch(bug);
        let scheduler: Box<dyn Scheduler + Send> = match order {
            Order::Random => Box::new(RandomScheduler::new_from_seed(seed(), most)),
            Order::Pct => Box::new(PctScheduler::new_from_seed(seed(), DEPTH, most)),
        };
        let ram = Arc::new(Ram::new());
        let runner = Runner::new(scheduler, config(bug));
        SAID.set(Some(None));
        let all = catch_unwind(AssertUnwindSafe(|| {
            runner.run(move || {
                counted.fetch_add(1, Ordering::Relaxed);
                seeded::switch(bug);
                ram.clear();
                scenario(&ram);
            })
        }));
        all.map_err(|_| SAID.take().flatten().unwrap_or_default())
    });
    run.join().unwrap().map_err(|text| (count.load(Ordering::Relaxed), text))
}

fn config(bug: Option<Bug>) -> Config {
    let mut config = Config::new();
    config.stack_size = 128 << 10;
    config.failure_persistence = match bug {
        Some(_) => FailurePersistence::None,
        None => FailurePersistence::Print,
    };
    let mut shutdown = UngracefulShutdownConfig::default();
    shutdown.immediately_return_on_panic = true;
    config.ungraceful_shutdown_config = shutdown;
    config
}

/// A number from the environment.
fn asked(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn seed() -> u64 {
    asked("SVM_SEED").unwrap_or(SEED)
}

/// Past the capture of passing tests' output: these numbers are to be seen.
fn say(text: &str) {
    let line = format!("{text} (seed {})\n", seed());
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// Fails at the first violation in the scenario's share of the schedules.
pub fn hold(name: &str, scenario: Scenario, share: usize) {
    let all = asked("SVM_SCHEDULES").map_or(SCHEDULES, |all| usize::try_from(all).unwrap());
    let each = (all * share).div_ceil(SHARES * 2);
    for order in [Order::Random, Order::Pct] {
        if let Err((at, what)) = explore(scenario, None, order, each) {
            panic!("{name}: schedule {at} of seed {}: {what}", seed());
        }
    }
    say(&format!("{name}: {} schedules, no violation", 2 * each));
}

/// Fails unless both kinds of schedules find the error.
pub fn seeded(bug: Bug, scenario: Scenario) {
    let find = |order| match explore(scenario, Some(bug), order, BOUND) {
        Ok(_) => panic!("{bug:?} was not found in {BOUND} schedules ({order:?}) of seed {}", seed()),
        Err((at, what)) => {
            // A panic of our own making is no find.
            assert!(what.contains("violation: ") || what.starts_with("deadlock!"), "{bug:?}: {what}");
            (at, what)
        }
    };
    let ((random, what), (pct, _)) = (find(Order::Random), find(Order::Pct));
    let what = what.lines().next().unwrap_or_default();
    let what = what.split_once("violation: ").map_or("deadlock", |(_, what)| what);
    say(&format!("{bug:?}: found after {random} random schedules, {pct} of PCT: {what}"));
}
