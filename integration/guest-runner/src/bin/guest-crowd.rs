//! Very many contexts in one guest: connections to the agent, each with a page of its own that its GPU VM shows at the one
//! address where all of them show theirs.
//!
//! Takes commands as lines on standard input and answers each with one line of JSON:
//! * `grow COUNT`: connects until there are so many.
//! * `fault`: a job of each, all at once, writes a word to its page, which no device has seen since the last time; what
//!   stands in each page afterwards is compared with what its own context wrote.

use guest_agent::client::{Arena, Client, Vm, packet};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

/// C, of every context.
const GPU: u64 = 0x20_0000_0000;
const BYTES: usize = 4096;
const TIMELINE: u32 = 1;

type Failure = Box<dyn std::error::Error>;

struct Member {
    arena: Arena,
    vm: Vm,
    /// Last: the connection outlives what hangs on it.
    client: Client,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("guest-crowd: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let socket = std::env::args().nth(1).ok_or("usage: guest-crowd SOCKET")?;
    // A connection each.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let mut crowd = vec![];
    let mut round = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let begin = Instant::now();
        let wrong = match line.split_once(' ') {
            Some(("grow", count)) => {
                let count: usize = count.parse()?;
                while crowd.len() < count {
                    crowd.push(Member::join(&socket)?);
                }
                0
            }
            None if line == "fault" => {
                round += 1;
                fault(&crowd, round)?
            }
            _ => return Err(format!("{line:?} is no command").into()),
        };
        let seconds = begin.elapsed().as_secs_f64();
        say(&json!({ "contexts": crowd.len(), "seconds": seconds, "wrong": wrong }))?;
    }
    Ok(())
}

fn say(answer: &Value) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{answer}")?;
    out.flush()
}

impl Member {
    fn join(socket: &str) -> Result<Self, Failure> {
        let client = Client::connect(socket)?;
        let arena = client.arena(BYTES, None)?;
        let vm = client.vm(0)?;
        Ok(Self { arena, vm, client })
    }

    /// Different for each context, and each time.
    fn word(&self, round: u64) -> u64 {
        u64::from(self.client.ctx_id()) << 32 | round
    }

    fn holds(&self, round: u64) -> bool {
        let mut found = vec![0; BYTES];
        self.arena.read(0, &mut found);
        found.as_chunks::<8>().0.iter().all(|word| u64::from_le_bytes(*word) == self.word(round))
    }
}

/// How many pages hold something else than their contexts wrote.
fn fault(crowd: &[Member], round: u64) -> Result<usize, Failure> {
    let bytes = u64::try_from(BYTES)?;
    // Bound anew, so that no page is resident.
    for member in crowd {
        member.vm.bind_userptr(GPU, member.arena.address(), bytes, 0)?;
    }
    let jobs: Vec<_> = crowd
        .iter()
        .map(|member| member.vm.exec(TIMELINE, &[packet::fill(GPU, bytes, member.word(round))], 0))
        .collect::<Result<_, _>>()?;
    for job in jobs {
        job.wait()?;
    }
    for member in crowd {
        member.vm.unbind(GPU, bytes)?;
    }
    Ok(crowd.iter().filter(|member| !member.holds(round)).count())
}
