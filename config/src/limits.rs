//! `[limits]`: what one guest may use at once, and what a guest has in place of it.

use serde::Deserialize;
use std::collections::BTreeMap;

/// Most of a number of objects that have an entry in a table.
const MANY: u64 = 1 << 20;
/// A name of more bytes is like none.
const LONGEST: usize = 32;
/// Most bytes: a terabyte.
const BYTES: u64 = 1 << 40;

/// `[limits]`: what one guest may use at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Contexts of a guest.
    pub contexts: u32,
    /// Blob resources of a guest.
    pub resources: u32,
    /// Bytes that describe them.
    pub resource_bytes: u64,
    /// GPU VMs of a guest.
    pub gpu_vms: u32,
    /// Mappings of one GPU VM.
    pub mappings: u32,
    /// Mappings of a guest.
    pub total_mappings: u32,
    /// Bytes of a guest's page tables.
    pub table_bytes: u64,
    /// Faults of one context that wait for an answer.
    pub pending_faults: u32,
    /// Faults of a guest that wait for an answer.
    pub total_pending_faults: u32,
    /// Jobs of one context in flight.
    pub jobs: u32,
    /// Jobs of a guest in flight.
    pub total_jobs: u32,
    /// Bytes of what waits for its turn.
    pub queue_bytes: u64,
    /// Milliseconds in which a fault must be answered; 0: any time will do.
    pub fault_deadline_ms: u32,
    /// Lines of the log that a guest and its VMM may cause in a minute.
    pub log_lines: u32,
    /// Times that a guest's VMM may connect in a minute without a wait.
    pub sessions: u32,
    /// Microseconds that a guest's queue thread looks for the next command before it sleeps; 0: it does not look.
    pub busy_poll_us: u32,
}

impl Limits {
    /// What a guest has unless its operator says otherwise.
    pub const DEFAULT: Self = Self {
        contexts: 4096,
        resources: 4096,
        resource_bytes: 64 << 20,
        gpu_vms: 8192,
        mappings: 65_536,
        total_mappings: 262_144,
        table_bytes: 512 << 20,
        pending_faults: 256,
        total_pending_faults: 16_384,
        jobs: 256,
        total_jobs: 16_384,
        queue_bytes: 64 << 20,
        fault_deadline_ms: 60_000,
        log_lines: 60,
        sessions: 600,
        busy_poll_us: crate::DEFAULT_BUSY_POLL_US,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A limit's number.
enum Number<'a> {
    Count(&'a mut u32),
    Bytes(&'a mut u64),
}

/// Name and problem.
type Refused = (String, String);

impl Limits {
    /// Every limit: its name, the least and the most that it may be.
    pub const BOUNDS: [(&'static str, u64, u64); 16] = [
        ("contexts", 1, MANY),
        ("resources", 1, MANY),
        ("resource_bytes", 4096, BYTES),
        ("gpu_vms", 1, MANY),
        ("mappings", 1, 1 << 16),
        ("total_mappings", 1, 1 << 28),
        ("table_bytes", 1 << 20, BYTES),
        ("pending_faults", 1, 1 << 16),
        ("total_pending_faults", 1, MANY),
        ("jobs", 1, 1 << 16),
        ("total_jobs", 1, MANY),
        ("queue_bytes", 1 << 16, BYTES),
        ("fault_deadline_ms", 0, u32::MAX as u64),
        ("log_lines", 1, 1 << 20),
        ("sessions", 1, 1 << 20),
        ("busy_poll_us", 0, crate::MAX_BUSY_POLL_US as u64),
    ];

    fn number(&mut self, name: &str) -> Option<Number<'_>> {
        Some(match name {
            "contexts" => Number::Count(&mut self.contexts),
            "resources" => Number::Count(&mut self.resources),
            "resource_bytes" => Number::Bytes(&mut self.resource_bytes),
            "gpu_vms" => Number::Count(&mut self.gpu_vms),
            "mappings" => Number::Count(&mut self.mappings),
            "total_mappings" => Number::Count(&mut self.total_mappings),
            "table_bytes" => Number::Bytes(&mut self.table_bytes),
            "pending_faults" => Number::Count(&mut self.pending_faults),
            "total_pending_faults" => Number::Count(&mut self.total_pending_faults),
            "jobs" => Number::Count(&mut self.jobs),
            "total_jobs" => Number::Count(&mut self.total_jobs),
            "queue_bytes" => Number::Bytes(&mut self.queue_bytes),
            "fault_deadline_ms" => Number::Count(&mut self.fault_deadline_ms),
            "log_lines" => Number::Count(&mut self.log_lines),
            "sessions" => Number::Count(&mut self.sessions),
            "busy_poll_us" => Number::Count(&mut self.busy_poll_us),
            _ => return None,
        })
    }
    fn get(mut self, name: &str) -> Option<u64> {
        match self.number(name)? {
            Number::Count(count) => Some((*count).into()),
            Number::Bytes(bytes) => Some(*bytes),
        }
    }
    /// Sets a limit by its name.
    fn set(&mut self, name: &str, value: u64) -> Result<(), Refused> {
        check(name, value)?;
        match self.number(name) {
            Some(Number::Count(count)) => *count = u32::try_from(value).unwrap_or(u32::MAX),
            Some(Number::Bytes(bytes)) => *bytes = value,
            None => {}
        }
        Ok(())
    }
    pub(crate) fn check(&self) -> Result<(), Refused> {
        Self::BOUNDS.iter().try_for_each(|(name, ..)| check(name, self.get(name).unwrap_or(0)))
    }
    /// These with the numbers of a guest's own.
    pub fn with(mut self, overrides: &Overrides) -> Self {
        for (name, value) in &overrides.0 {
            // They were checked when they were read.
            self.set(name, *value).ok();
        }
        self
    }
}

fn check(name: &str, value: u64) -> Result<(), Refused> {
    let refused = |problem: String| Err((name.to_owned(), problem));
    let Some((_, least, most)) = Limits::BOUNDS.iter().find(|(known, ..)| *known == name) else {
        let meant = nearest(name).map(|known| format!("did you mean {known}? ")).unwrap_or_default();
        let names: Vec<_> = Limits::BOUNDS.iter().map(|(known, ..)| *known).collect();
        return refused(format!("there is no such limit; {meant}there are {}", names.join(", ")));
    };
    if (least..=most).contains(&&value) {
        Ok(())
    } else {
        refused(format!("{value} is not in {least}..={most}"))
    }
}

/// The limit whose name a misspelt one is most like, if it is like any.
fn nearest(name: &str) -> Option<&'static str> {
    // A name may come from a client, and is then as long as it likes.
    if name.len() > LONGEST {
        return None;
    }
    let distances = Limits::BOUNDS.iter().map(|(known, ..)| (distance(name, known), *known));
    distances.min().filter(|(edits, known)| *edits <= known.len() / 3).map(|(_, known)| known)
}

/// Characters to be put in, left out or replaced to make one of the other.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((to, replaced), left_out) in b.chars().zip(&row).zip(row.iter().skip(1)) {
            let put_in = next.last().copied().unwrap_or(0) + 1;
            next.push(put_in.min(left_out + 1).min(replaced + usize::from(from != to)));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

/// Limits of one guest, by name, in place of those of `[limits]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Overrides(BTreeMap<String, u64>);

impl Overrides {
    /// Checks names and numbers.
    ///
    /// # Errors
    /// The first that is wrong, and what is.
    pub fn new(limits: impl IntoIterator<Item = (String, u64)>) -> Result<Self, (String, String)> {
        let overrides = Self(limits.into_iter().collect());
        overrides.check()?;
        Ok(overrides)
    }
    pub(crate) fn check(&self) -> Result<(), Refused> {
        self.0.iter().try_for_each(|(name, value)| check(name, *value))
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
