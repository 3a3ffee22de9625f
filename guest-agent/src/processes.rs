//! `svm-agent ps` and `svm-agent map`: which processes have memory that GPUs reach, and where.

use crate::{AdminArgs, EXIT_FAILED, answer, show};
use guest_agent::agent::{AgentStatus, ContextReport, MapReport};
use guest_agent::broker::AdminRequest;
use serde::Serialize;
use std::io::{Result, Write};
use std::process::ExitCode;

/// What `ps` prints.
#[derive(Serialize)]
struct Processes {
    /// Contexts by id; a process may have several.
    processes: Vec<ContextReport>,
}

/// Shows who has what.
pub fn ps(admin: &AdminArgs, json: bool) -> ExitCode {
    let status: AgentStatus = match answer(admin, AdminRequest::Status) {
        Ok(status) => status,
        Err(code) => return code,
    };
    show(&Processes { processes: status.contexts }, json, print_processes)
}

fn print_processes(out: &mut dyn Write, told: &Processes) -> Result<()> {
    writeln!(
        out,
        "{:>8} {:>6} {:>6} {:<9} {:<7} {:>6} {:>12} {:>8}  program",
        "pid", "uid", "ctx", "state", "trust", "arenas", "bytes", "faults"
    )?;
    for context in &told.processes {
        let ContextReport { ctx_id, owner, state, trust, arenas, arena_bytes, faults } = context;
        let (pid, uid, name, trust) = (owner.pid, owner.uid, &owner.name, trust.name());
        writeln!(
            out,
            "{pid:>8} {uid:>6} {ctx_id:>6} {state:<9} {trust:<7} {arenas:>6} {arena_bytes:>12} {faults:>8}  {name}"
        )?;
    }
    Ok(())
}

/// What `map` prints.
#[derive(Serialize)]
struct Map {
    /// The process.
    pid: i32,
    /// Its contexts.
    contexts: Vec<MapReport>,
}

/// Shows where a process has arenas.
pub fn map(admin: &AdminArgs, pid: i32, json: bool) -> ExitCode {
    let contexts: Vec<MapReport> = match answer(admin, AdminRequest::Map(pid)) {
        Ok(contexts) => contexts,
        Err(code) => return code,
    };
    if contexts.is_empty() {
        eprintln!(
            "svm-agent: process {pid} has no memory that GPUs reach; `svm-agent ps` lists those that have, \
             `svm-agent run` starts one"
        );
        return ExitCode::from(EXIT_FAILED);
    }
    show(&Map { pid, contexts }, json, print_map)
}

fn print_map(out: &mut dyn Write, told: &Map) -> Result<()> {
    for MapReport { ctx_id, owner, arenas, incomplete } in &told.contexts {
        writeln!(out, "process {} ({}), context {ctx_id}", told.pid, owner.name)?;
        writeln!(
            out,
            "{:>6} {:>30} {:>12} {:>8} {:>9}",
            "arena", "addresses", "bytes", "faults", "answered"
        )?;
        for arena in arenas {
            let range = format!("{:#x}..{:#x}", arena.start, arena.end);
            let (id, bytes, faults, pages) = (arena.id, arena.bytes, arena.faults, arena.answered_pages);
            writeln!(out, "{id:>6} {range:>30} {bytes:>12} {faults:>8} {pages:>9}")?;
        }
        let bytes: u64 = arenas.iter().map(|arena| arena.bytes).sum();
        let cut = if *incomplete { "; older faults are forgotten" } else { "" };
        writeln!(
            out,
            "{bytes} bytes, all pinned; answered: pages told to devices that had a fault there{cut}"
        )?;
    }
    Ok(())
}
