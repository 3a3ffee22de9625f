//! What the daemon gives up before it serves anybody: system calls, files, other processes, privileges, core dumps.
//!
//! Entered by the first thread while it is the only one, so that every thread inherits all of it, and workers too; after
//! that nothing leads out again. Devices, sockets and guests are made inside. The profile follows the configuration: only
//! a daemon with `hostmmu` devices can execute anything.
//!
//! Each measure stands for itself: what the kernel refuses is reported, and the caller decides whether to go on.

mod calls;
mod files;
pub(crate) mod privileges;
#[cfg(test)]
mod tests;

use crate::socket::folder_of;
use config::{Config, DeviceKind};
use std::fmt::{Display, Formatter};
use std::path::PathBuf;
use std::sync::OnceLock;

/// What a daemon must still be able to do.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Sockets are made and removed below these.
    pub folders: Vec<PathBuf>,
    /// Worker processes are started.
    pub workers: bool,
}

/// One thing that is given up, or should be.
#[derive(Clone, Debug)]
pub struct Measure {
    /// Which.
    pub name: &'static str,
    /// Whether it is.
    pub in_force: bool,
    /// What is left, or why it is not in force.
    pub detail: String,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report(Vec<Measure>);

/// What became of [`enter`], for whoever asks later.
static ENTERED: OnceLock<bool> = OnceLock::new();

/// How much of the sandbox this process is in: `none`, `part` or `full`.
pub fn in_force() -> &'static str {
    match ENTERED.get() {
        None => "none",
        Some(false) => "part",
        Some(true) => "full",
    }
}

/// Gives everything up but the profile, for good.
pub fn enter(profile: &Profile) -> Report {
    let mut measures = vec![alone()];
    measures.extend(privileges::drop_all());
    measures.extend(files::restrict(profile));
    // Last: what comes before takes calls that are given up here.
    let left = if profile.workers { "with starting workers" } else { "with no way to execute" };
    measures.push(Measure::of("system calls (seccomp)", calls::restrict(profile), |()| {
        format!("a list, {left}; any other kills the process")
    }));
    let report = Report(measures);
    // The first time decides: what is given up stays given up.
    ENTERED.get_or_init(|| report.lacking().next().is_none());
    report
}

/// Other threads would stay outside of what is not the process' own but a thread's.
fn alone() -> Measure {
    let name = "every thread";
    match std::fs::read_dir("/proc/self/task").map(Iterator::count) {
        Ok(1) => Measure::in_force(name, "confined before any other was started".into()),
        Ok(threads) => Measure::lacking(name, format!("{threads} threads were there before")),
        Err(error) => Measure::lacking(name, format!("cannot count threads in /proc: {error}")),
    }
}

impl Profile {
    /// What this configuration takes.
    pub fn of(config: &Config) -> Self {
        let mut folders = config.daemon.runtime_dirs.clone();
        let control = [&config.daemon.control_socket, &config.daemon.control_socket_ro];
        folders.extend(control.into_iter().flatten().map(|path| folder_of(path).to_owned()));
        let workers = config.devices().iter().any(|device| device.kind == DeviceKind::Hostmmu);
        Self { folders, workers }
    }
}

impl Measure {
    fn in_force(name: &'static str, detail: String) -> Self {
        Self { name, in_force: true, detail }
    }
    fn lacking(name: &'static str, detail: String) -> Self {
        Self { name, in_force: false, detail }
    }
    fn of<T, E: Display>(name: &'static str, result: Result<T, E>, detail: impl FnOnce(T) -> String) -> Self {
        match result {
            Ok(done) => Self::in_force(name, detail(done)),
            Err(error) => Self::lacking(name, error.to_string()),
        }
    }
}

impl Report {
    /// What is not in force.
    pub fn lacking(&self) -> impl Iterator<Item = &Measure> {
        self.0.iter().filter(|measure| !measure.in_force)
    }
}

impl Display for Report {
    /// A line a measure.
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|Measure { name, in_force, detail }| {
            let state = if *in_force { "in force" } else { "NOT in force" };
            writeln!(f, "{name:<30} {state:<13} {detail}")
        })
    }
}
