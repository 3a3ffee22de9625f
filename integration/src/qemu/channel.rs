//! The host's end of a guest's command channel: processes by id, what they wrote, how they ended.
//!
//! One thread reads events into a table; callers wait on it with a deadline. Whatever fails says what the guest's console
//! and QEMU said last. The wire is `guest_runner`'s.

use std::collections::HashMap;
use std::fmt::{self, Display};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use guest_runner::{Event, Request, Stream};
use serde_json::Value;

/// Lines of each log that an error shows.
const TAIL_LINES: usize = 120;

/// A program with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command(Vec<String>);

/// Words separated by white space; for anything else use `["sh", "-c", script]`.
impl From<&str> for Command {
    fn from(words: &str) -> Self {
        Self(words.split_whitespace().map(str::to_owned).collect())
    }
}

impl From<String> for Command {
    fn from(words: String) -> Self {
        words.as_str().into()
    }
}

impl<const N: usize> From<[&str; N]> for Command {
    fn from(argv: [&str; N]) -> Self {
        Self(argv.map(str::to_owned).to_vec())
    }
}

impl From<Vec<String>> for Command {
    fn from(argv: Vec<String>) -> Self {
        Self(argv)
    }
}

impl Display for Command {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join(" "))
    }
}

/// How a process ended and what it wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit status; none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Display for Output {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(formatter, "exit status {code}")?,
            (None, Some(signal)) => write!(formatter, "ended by signal {signal}")?,
            (None, None) => write!(formatter, "still running")?,
        }
        write!(formatter, "\n-- stdout --\n{}\n-- stderr --\n{}", self.stdout, self.stderr)
    }
}

/// A process in a guest. Dropping it leaves the process alone.
#[derive(Debug)]
pub struct Process {
    channel: Arc<Channel>,
    id: u64,
    pid: u32,
    command: Command,
    /// Bytes of standard output that `wait_for_line` has passed.
    passed: usize,
}

/// The channel of one guest.
#[derive(Debug)]
pub struct Channel {
    guest: String,
    requests: Mutex<ChildStdin>,
    next_id: AtomicU64,
    table: Mutex<Table>,
    changed: Condvar,
    logs: Vec<PathBuf>,
    timeout: Duration,
}

#[derive(Debug, Default)]
struct Table {
    release: Option<String>,
    processes: HashMap<u64, Entry>,
    /// Why no more events come.
    closed: Option<String>,
    exit: Option<ExitStatus>,
}

#[derive(Debug, Default)]
struct Entry {
    pid: Option<u32>,
    output: Output,
    refused: Option<String>,
}

impl Entry {
    fn ended(&self) -> bool {
        self.output.code.is_some() || self.output.signal.is_some()
    }
}

impl Process {
    /// Its id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Fails when it does not end in time, or the guest does first.
    pub fn wait(&self) -> Result<Output> {
        self.channel.wait_for(&format!("end of `{}`", self.command), |table| {
            let entry = table.processes.get(&self.id)?;
            entry.ended().then(|| entry.output.clone())
        })
    }

    /// What it has written so far, and how it ended if it has.
    #[must_use]
    pub fn output(&self) -> Output {
        let table = self.channel.table();
        table.processes.get(&self.id).map(|entry| entry.output.clone()).unwrap_or_default()
    }

    /// Waits for the next line of standard output for which `pick` has an answer; lines before it are passed over and
    /// not looked at again.
    ///
    /// # Errors
    /// Fails when the process ends without such a line, or none comes in time.
    pub fn wait_for_line<T>(&mut self, mut pick: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let mut passed = self.passed;
        let what = format!("a line of `{}`", self.command);
        let found = self.channel.wait_for(&what, |table| {
            let entry = table.processes.get(&self.id)?;
            while let Some((line, _)) = entry.output.stdout.get(passed..)?.split_once('\n') {
                passed += line.len() + 1;
                if let Some(answer) = pick(line) {
                    return Some(Ok(answer));
                }
            }
            entry.ended().then(|| Err(entry.output.clone()))
        })?;
        self.passed = passed;
        found.map_err(|output| anyhow!("`{}` ended without the line waited for: {output}", self.command))
    }

    /// Writes a line to its standard input and waits for the next line of JSON on its standard output.
    ///
    /// # Errors
    /// Fails when the process ends, or does not answer in time.
    pub fn ask(&mut self, line: &str) -> Result<Value> {
        self.write_line(line)?;
        self.wait_for_line(|answer| serde_json::from_str(answer).ok())
    }

    /// Writes a line to its standard input.
    ///
    /// # Errors
    /// Fails when the guest is gone.
    pub fn write_line(&self, line: &str) -> Result<()> {
        self.channel.send(&Request::Stdin { id: self.id, data: format!("{line}\n") })
    }

    /// Closes its standard input.
    ///
    /// # Errors
    /// Fails when the guest is gone.
    pub fn close_stdin(&self) -> Result<()> {
        self.channel.send(&Request::CloseStdin { id: self.id })
    }

    /// Sends a signal to this process alone; no effect when it has ended.
    ///
    /// # Errors
    /// Fails when the guest is gone.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.channel.send(&Request::Kill { id: self.id, signal })
    }
}

impl Channel {
    pub(super) fn new(guest: String, requests: ChildStdin, logs: Vec<PathBuf>, timeout: Duration) -> Self {
        Self {
            guest,
            requests: Mutex::new(requests),
            next_id: AtomicU64::new(1),
            table: Mutex::default(),
            changed: Condvar::new(),
            logs,
            timeout,
        }
    }

    pub(super) fn wait_ready(&self) -> Result<String> {
        self.wait_for("boot", |table| table.release.clone())
    }

    pub(super) fn wait_exit(&self) -> Result<ExitStatus> {
        // The channel closes on the way, so that is no failure here.
        let deadline = Instant::now() + self.timeout;
        let mut table = self.table();
        loop {
            if let Some(exit) = table.exit {
                return Ok(exit);
            }
            table = self
                .wait_until(table, deadline)
                .map_err(|_| self.failure("power-off", "did not end in time"))?;
        }
    }

    pub(super) fn power_off(&self) -> Result<()> {
        self.send(&Request::PowerOff)
    }

    pub(super) fn spawn(channel: &Arc<Self>, uid: u32, command: Command) -> Result<Process> {
        let id = channel.next_id.fetch_add(1, Ordering::Relaxed);
        channel.table().processes.insert(id, Entry::default());
        channel.send(&Request::Spawn { id, uid, argv: command.0.clone() })?;
        let started = channel.wait_for(&format!("start of `{command}`"), |table| {
            let entry = table.processes.get(&id)?;
            match (&entry.refused, entry.pid) {
                (Some(cause), _) => Some(Err(cause.clone())),
                (None, Some(pid)) => Some(Ok(pid)),
                (None, None) => None,
            }
        })?;
        match started {
            Ok(pid) => Ok(Process { channel: Arc::clone(channel), id, pid, command, passed: 0 }),
            Err(cause) => bail!("guest {}: `{command}` does not start: {cause}", channel.guest),
        }
    }

    pub(super) fn on_exit(&self, status: io::Result<ExitStatus>) {
        let mut table = self.table();
        match status {
            Ok(status) => {
                table.exit = Some(status);
                table.closed.get_or_insert_with(|| format!("QEMU has ended ({status})"));
            }
            Err(error) => table.closed = Some(format!("QEMU cannot be waited for: {error}")),
        }
        self.changed.notify_all();
    }

    fn on_event(&self, event: Event) {
        let mut table = self.table();
        match event {
            Event::Ready { release } => table.release = Some(release),
            Event::Started { id, pid } => table.processes.entry(id).or_default().pid = Some(pid),
            Event::Refused { id, error } => table.processes.entry(id).or_default().refused = Some(error),
            Event::Output { id, stream, data } => {
                let output = &mut table.processes.entry(id).or_default().output;
                match stream {
                    Stream::Stdout => output.stdout.push_str(&data),
                    Stream::Stderr => output.stderr.push_str(&data),
                }
            }
            Event::Exited { id, code, signal } => {
                let output = &mut table.processes.entry(id).or_default().output;
                (output.code, output.signal) = (code, signal);
            }
        }
        self.changed.notify_all();
    }

    fn close(&self, why: String) {
        self.table().closed.get_or_insert(why);
        self.changed.notify_all();
    }

    fn send(&self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = requests.write_all(&line).and_then(|()| requests.flush());
        sent.map_err(|error| self.failure("a request", &error.to_string()))
    }

    /// Waits until `pick` finds in the table what the caller wants.
    fn wait_for<T>(&self, what: &str, mut pick: impl FnMut(&Table) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + self.timeout;
        let mut table = self.table();
        loop {
            if let Some(found) = pick(&table) {
                return Ok(found);
            }
            if let Some(why) = &table.closed {
                let why = why.clone();
                drop(table);
                return Err(self.failure(what, &why));
            }
            table = self
                .wait_until(table, deadline)
                .map_err(|_| self.failure(what, &format!("nothing for {} s", self.timeout.as_secs())))?;
        }
    }

    fn wait_until<'a>(
        &self,
        table: MutexGuard<'a, Table>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, Table>, TimedOut> {
        let left = deadline.checked_duration_since(Instant::now()).ok_or(TimedOut)?;
        let (table, _) = self.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner);
        Ok(table)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self, what: &str, why: &str) -> anyhow::Error {
        let mut text = format!("guest {}: while waiting for {what}: {why}", self.guest);
        for log in &self.logs {
            let contents = fs::read(log).unwrap_or_default();
            let contents = String::from_utf8_lossy(&contents);
            let lines: Vec<&str> = contents.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default();
            let name = log.file_name().unwrap_or_default().display();
            text.push_str(&format!("\n-- end of {name} --\n{}", tail.join("\n")));
        }
        anyhow!(text)
    }
}

struct TimedOut;

/// Reads events until QEMU closes the channel.
pub(super) fn read_events(channel: Arc<Channel>, events: ChildStdout) -> JoinHandle<()> {
    thread::spawn(move || {
        let why = match forward(&channel, BufReader::new(events)) {
            Ok(()) => "QEMU has closed the command channel".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        channel.close(why);
    })
}

fn forward(channel: &Channel, mut events: impl BufRead) -> Result<()> {
    let mut ready = false;
    let mut line = Vec::new();
    while events.read_until(b'\n', &mut line)? > 0 {
        match serde_json::from_slice(&line) {
            Ok(event) => {
                ready = true;
                channel.on_event(event);
            }
            // Firmware and the kernel's probing may leave bytes on the port before the runner opens it.
            Err(_) if !ready => {}
            Err(error) => {
                return Err(error).context(format!(
                    "not an event on the command channel: {}",
                    String::from_utf8_lossy(&line)
                ));
            }
        }
        line.clear();
    }
    Ok(())
}
