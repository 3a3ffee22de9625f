//! The scenarios.

use crate::agent::{Habit, Lie};
use crate::driver::Driver;
use crate::heap::live_here;
use crate::process::Life;
use crate::ram::Ram;
use crate::random::Random;
use crate::world::{Disturbance, Seen, Stage, World, close_vm, exit, unmap_all};
use std::sync::Arc;

const SCENARIOS: u64 = 10_000;
/// On one host.
const AGAIN: u64 = 500;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

fn rams() -> [Ram; 3] {
    [1, 2, 3].map(Ram::new)
}

/// The heap must be as it was before.
fn leaving_nothing<T>(what: &dyn std::fmt::Debug, scenario: impl FnOnce() -> T) -> T {
    let guard = Named(what);
    let before = live_here();
    let result = scenario();
    let left = live_here().wrapping_sub(before);
    assert_eq!(left, 0, "bytes left on the heap");
    std::mem::forget(guard);
    result
}

/// Says which scenario it was that panicked.
struct Named<'a>(&'a dyn std::fmt::Debug);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        println!("in {:?}", self.0);
    }
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.actions += other.actions;
        self.faults += other.faults;
        self.failed_jobs += other.failed_jobs;
        self.stale_answers += other.stale_answers;
        self.throttled += other.throttled;
    }
}

#[test]
fn every_disturbance_in_every_state_harms_nobody_else() {
    let (seed, rams) = (number("SVM_SEED", 1), rams());
    let world = || World::new(seed, &Stage::new(), &rams, &[2, 1]);
    world().finish();
    let states = leaving_nothing(&"an honest run", || world().finish()).actions;
    let disturbances = Disturbance::all();
    let mut seen = Seen::default();
    for state in 0..=states {
        for disturbance in &disturbances {
            let one = leaving_nothing(&(state, disturbance), || {
                let mut world = world();
                (0..state).for_each(|_| _ = world.go());
                world.disturb(0, *disturbance);
                world.finish()
            });
            seen.add(one);
        }
    }
    let count = (states + 1) * u64::try_from(disturbances.len()).unwrap();
    println!(
        "seed {seed}: {} states x {} disturbances = {count} scenarios; {seen:?}",
        states + 1,
        disturbances.len()
    );
    assert!(seen.faults > count && seen.failed_jobs > 0 && seen.stale_answers > 0 && seen.throttled > 0);
}

/// What a process does beside its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Lives,
    /// Its context goes while a fault of it waits.
    ExitsMidFault,
    /// While jobs of it are queued behind points.
    ExitsWithFences,
    /// Unmaps its memory under a fault.
    UnmapsUnderFault,
    ClosesVmUnderFault,
}

const MANNERS: [Manner; 5] = [
    Manner::Lives,
    Manner::ExitsMidFault,
    Manner::ExitsWithFences,
    Manner::UnmapsUnderFault,
    Manner::ClosesVmUnderFault,
];

fn habit(random: &mut Random) -> Habit {
    let lie = random.pick(&Lie::ALL);
    match random.below(12) {
        0..=3 => Habit::Honest,
        4..=6 => Habit::Lies(lie),
        7 | 8 => Habit::OnlyLies(lie),
        9 => Habit::Late,
        10 => Habit::Silent,
        _ => Habit::DiesAfter(u32::try_from(random.below(6)).unwrap()),
    }
}

/// A scenario that is drawn: one to three guests, one to four processes each.
#[derive(Debug)]
struct Drawn {
    seed: u64,
    processes: Vec<u32>,
    habits: Vec<Habit>,
    /// (guest, process): what it does when it can.
    manners: Vec<(usize, usize, Manner)>,
    /// After so many actions, to a guest.
    disturbances: Vec<(u64, usize, Disturbance)>,
}

impl Drawn {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let guests = 1 + random.index(3);
        let processes: Vec<u32> = (0..guests).map(|_| 1 + u32::try_from(random.below(4)).unwrap()).collect();
        let habits = (0..guests).map(|_| habit(&mut random)).collect();
        let mut manners = Vec::new();
        for (guest, count) in processes.iter().enumerate() {
            for process in 0..usize::try_from(*count).unwrap() {
                if random.one_in(3) {
                    manners.push((guest, process, random.pick(&MANNERS)));
                }
            }
        }
        let all = Disturbance::all();
        let some = (0..random.below(3)).map(|_| (random.below(160), random.index(guests), random.pick(&all)));
        let mut disturbances: Vec<_> = some.collect();
        disturbances.sort_unstable_by_key(|(when, ..)| *when);
        Self { seed, processes, habits, manners, disturbances }
    }

    fn play(&self, stage: &Stage, rams: &[Ram]) -> Seen {
        let mut world = World::new(self.seed, stage, rams, &self.processes);
        for (guest, habit) in world.guests.iter_mut().zip(&self.habits) {
            guest.habit = *habit;
            guest.asleep = *habit == Habit::Late;
            if !habit.serves() {
                guest.owe_nobody();
            }
        }
        let (mut manners, mut disturbances) = (self.manners.clone(), self.disturbances.clone());
        let mut actions = 0;
        while world.go() {
            actions += 1;
            manners.retain(|manner| !misbehave(&mut world, *manner));
            while let Some((_, guest, disturbance)) = disturbances.first().copied().filter(|d| d.0 <= actions)
            {
                disturbances.remove(0);
                if !world.guests[guest].paused {
                    world.disturb(guest, disturbance);
                }
            }
        }
        world.finish()
    }
}

/// Whether it was the moment for it.
fn misbehave(world: &mut World, (guest, process, manner): (usize, usize, Manner)) -> bool {
    let sim = &mut world.guests[guest];
    if !sim.is_up() {
        return false;
    }
    let driver = Driver(Arc::clone(&sim.driver().0));
    let Some(process) = sim.processes.get_mut(process) else { return true };
    let faults = sim.open.iter().any(|open| open.record.ctx_id.get() == process.ctx_id);
    let queued = process.jobs.values().filter(|end| end.is_none()).count() > 1;
    if process.life != Life::Lives || !process.has_begun() {
        return false;
    }
    match manner {
        Manner::Lives => return true,
        Manner::ExitsMidFault if faults => exit(process, &driver),
        Manner::ExitsWithFences if queued => exit(process, &driver),
        Manner::UnmapsUnderFault if faults => unmap_all(process, &driver),
        Manner::ClosesVmUnderFault if faults => close_vm(process, &driver),
        _ => return false,
    }
    true
}

#[test]
fn drawn_scenarios_lose_nothing() {
    let (seed, count, rams) = (number("SVM_SEED", 1), number("SVM_SCENARIOS", SCENARIOS), rams());
    let mut seen = Seen::default();
    Drawn::new(seed).play(&Stage::new(), &rams);
    for n in 0..count {
        let drawn = Drawn::new(seed.wrapping_mul(1 << 32).wrapping_add(n));
        seen.add(leaving_nothing(&drawn, || drawn.play(&Stage::new(), &rams)));
    }
    println!("seed {seed}: {count} scenarios; {seen:?}");
    assert!(seen.faults > count && seen.failed_jobs > 0 && seen.stale_answers > 0 && seen.throttled > 0);
}

/// What a host keeps for people is bounded; beside that it keeps nothing of those who were there.
#[test]
fn host_outlives_its_guests_and_does_not_grow() {
    let (seed, rams, stage) = (number("SVM_SEED", 1), rams(), Stage::new());
    let play = |n: u64| {
        let drawn = Drawn::new(seed.wrapping_mul(1 << 32).wrapping_add(n));
        let guard = Named(&drawn);
        drawn.play(&stage, &rams);
        std::mem::forget(guard);
    };
    (0..AGAIN).for_each(&play);
    let before = live_here();
    (0..AGAIN).for_each(&play);
    // Looked at once: what is printed into a buffer is on the heap too.
    let grown = live_here().wrapping_sub(before).cast_signed();
    println!("seed {seed}: {grown} bytes after {AGAIN} scenarios once more");
    assert_eq!(grown, 0, "the same scenarios once more, and more bytes on the heap");
}
