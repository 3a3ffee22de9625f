//! The third act: a small C program that builds a list with malloc, knows nothing of arenas, mirrors or guests, and has
//! devices walk it by the pointer that it has. Twice in each guest at the same time, at the same addresses where the
//! guest lets us choose them: whose list is it?

use super::{Actor, Machine, PATIENCE};
use crate::ledger;
use crate::svmd::Svmd;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use std::time::{Duration, Instant};

/// Of each list.
const NODES: u64 = 2000;
/// Programs of each guest that run at the same time.
const PROGRAMS: u32 = 2;

/// What the act came to.
#[derive(Clone, Debug, Serialize)]
pub struct PlainPointers {
    /// Programs, over all guests.
    pub programs: u64,
    /// Nodes of the list of each.
    pub nodes: u64,
    /// Walks: each program's list by each device.
    pub walks: u64,
    /// Of them, those that ended with another count or sum than the program's own list has.
    pub wrong: u64,
    /// Faults that the agents answered, of these programs alone.
    pub answered: u64,
    /// Of them, those that no GPU VM of the program had raised.
    pub misrouted: u64,
}

impl PlainPointers {
    /// Whether everything was as it must be, of so many guests on so many devices.
    pub fn holds(&self, guests: usize, devices: usize) -> bool {
        self.programs == guests as u64 * u64::from(PROGRAMS)
            && self.walks == self.programs * devices as u64
            && self.wrong == 0
            && self.misrouted == 0
            // The first fault of each waits for its answer.
            && self.answered >= self.programs
    }
}

struct Program {
    name: String,
    seed: u64,
    actor: Box<dyn Actor>,
}

/// The sum of the values in a program's list: its own numbers, of which it takes one for each exchange of two nodes and
/// then one for each node.
fn sum_of(seed: u64) -> u64 {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (1..NODES).for_each(|_| {
        next();
    });
    (0..NODES).fold(0, |sum: u64, _| sum.wrapping_add(next() >> 16))
}

/// What a program says of a walk: `device=0 name=soft0 pointer=0x7f.. address=0x7f.. nodes=2000 sum=1 expected=1 ok`.
struct Walk {
    device: u64,
    pointer: String,
    nodes: u64,
    sum: u64,
}

impl Walk {
    fn read(line: &str) -> Option<Self> {
        let word = |key: &str| {
            let mut words = line.split_whitespace().filter_map(|word| word.split_once('='));
            words.find(|(name, _)| *name == key).map(|(_, value)| value)
        };
        let number = |key: &str| word(key)?.parse().ok();
        Some(Self {
            device: number("device")?,
            pointer: word("pointer")?.to_owned(),
            nodes: number("nodes")?,
            sum: number("sum")?,
        })
    }
}

/// Tells the act. The agents answer faults, and nothing of the acts before is left.
///
/// # Errors
/// A program does not start, or does not end well.
pub fn tell(
    daemon: &Svmd,
    machines: &[Box<dyn Machine>],
    devices: usize,
    narrate: &dyn Fn(&str),
) -> Result<PlainPointers> {
    narrate(
        "\nplain pointers: a small C program builds a list with malloc, and devices walk it; twice at once in each guest",
    );
    let before = counts(daemon, machines, devices)?;
    let mut programs = vec![];
    for (index, machine) in (1_u32..).zip(machines) {
        machine.hold_answers(true)?;
        for number in 1..=PROGRAMS {
            // Odd, as the program makes it: no two are the same.
            let seed = u64::from(index * 1000 + 2 * number + 1);
            let arguments = ["list".to_owned(), NODES.to_string(), seed.to_string()];
            let actor = machine.start(super::FIRST_UID + number, &arguments)?;
            let name = format!("{} program {number}", machine.name());
            programs.push(Program { name, seed, actor });
        }
    }
    wait_until_all_fault(daemon, programs.len())?;
    narrate(&format!("  {} programs run, and the first fault of each waits for its answer", programs.len()));
    for machine in machines {
        machine.hold_answers(false)?;
    }
    let (mut walks, mut wrong) = (0, 0);
    for program in &mut programs {
        for _ in 0..devices {
            let line = program.actor.line()?;
            let walk = Walk::read(&line).with_context(|| format!("{} says {line:?}", program.name))?;
            walks += 1;
            let right = (walk.nodes, walk.sum) == (NODES, sum_of(program.seed));
            wrong += u64::from(!right);
            narrate(&format!(
                "  {:<22} list at {}: device {} walked {} nodes, sum {}, {}",
                program.name,
                walk.pointer,
                walk.device,
                walk.nodes,
                walk.sum,
                if right { "its own" } else { "NOT ITS OWN" }
            ));
        }
        program.actor.end()?;
    }
    let after = counts(daemon, machines, devices)?;
    Ok(PlainPointers {
        programs: programs.len() as u64,
        nodes: NODES,
        walks,
        wrong,
        answered: after.0 - before.0,
        misrouted: after.1 - before.1,
    })
}

/// Waits until each program has a fault pending on a device.
fn wait_until_all_fault(daemon: &Svmd, programs: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while daemon.stat("/pending_vms")? < programs as u64 {
        ensure!(
            Instant::now() < deadline,
            "not all programs have come to a fault: {}\n{}",
            daemon.call("stats.get", json!({}))?,
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Faults so far that guests answered, and those that they were asked for in vain.
fn counts(daemon: &Svmd, machines: &[Box<dyn Machine>], devices: usize) -> Result<(u64, u64)> {
    let raised = daemon.ledgers()?;
    let mut answered = vec![];
    for machine in machines {
        answered.extend(machine.answers(&(0..devices).collect::<Vec<_>>())?);
    }
    let comparison = ledger::compare(&raised, &answered, &[]);
    Ok((comparison.answered, comparison.misrouted))
}
