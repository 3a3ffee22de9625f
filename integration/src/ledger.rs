//! Compares three independent accounts of the same faults.
//!
//! * the devices' ledgers: written below the router by the engine that faulted, labelled with the context that the
//!   device itself was told at the creation of the GPU VM ([`Raised`]);
//! * the agents' ledgers: what each guest was asked and what it answered ([`Answered`]);
//! * the jobs' geometry: what must have happened, known before the first job ran ([`Touch`]).
//!
//! A router that sends a fault to the wrong owner cannot make the three agree. Accounts are compared as multisets of
//! (guest, context, device, asid, window, access); a window is [`WINDOW_PAGES`] aligned pages, the unit in which both
//! the core and the agent serve faults, so each window of a GPU VM is raised once, with the access of its first touch.
//!
//! Called by stories, the demo and the storm after all jobs have ended. Takes plain data and owns none of the
//! collecting: device ledgers come from svmd's `device.ledger`, agents' from the agents.

use anyhow::{Context, Result, ensure};
use guest_agent::agent::{Answer, LedgerEntry, LedgerReport};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::device::Access;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::event::{PERM_ATOMIC, PERM_READ, PERM_WRITE};

#[cfg(test)]
mod tests;

/// Pages that one fault makes known and resident, as an aligned window.
pub const WINDOW_PAGES: u64 = 16;
/// How long answers may be under way after the last job has ended.
const SETTLING: Duration = Duration::from_secs(30);
/// Differences that a [`Comparison`] explains; the counts are complete, the list is not.
const EXPLAINED: usize = 12;

/// A fault as a device raised it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Raised {
    /// Index of the host device.
    pub device: usize,
    /// The label of the GPU VM: its guest.
    pub guest: Arc<str>,
    /// The label of the GPU VM: its context.
    pub ctx_id: u32,
    /// The GPU VM.
    pub asid: u32,
    /// Page number in GPU address space (C).
    pub page: u64,
    /// How it was touched.
    pub access: Access,
}

/// A fault as an agent was asked and answered it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Answered {
    /// Whose agent.
    pub guest: Arc<str>,
    /// The context that the record named.
    pub ctx_id: u32,
    /// The record's cookie.
    pub cookie: u64,
    /// The host device, as an index of this host.
    pub device: usize,
    /// The asid in the record.
    pub asid: u32,
    /// Page number in GPU address space (C).
    pub page: u64,
    /// Page number in the process' address space (A).
    pub cpu_page: u64,
    /// How it was touched.
    pub access: Access,
    /// Whether the answer was "retry"; else it was a refusal.
    pub success: bool,
}

impl Answered {
    /// Everything that an agent has answered. `read` asks it for its ledger; a job may end before its agent has seen
    /// the device take the last answer, so this waits until no answer is under way.
    ///
    /// # Errors
    /// The agent does not answer or does not finish, has forgotten entries, or names what there is not.
    pub fn by_agent(
        guest: &Arc<str>,
        devices: &[usize],
        read: impl Fn() -> Result<LedgerReport>,
    ) -> Result<Vec<Self>> {
        let deadline = Instant::now() + SETTLING;
        let report = loop {
            let report = read()?;
            if report.pending == 0 {
                break report;
            }
            ensure!(Instant::now() < deadline, "{} answers of {guest} are still under way", report.pending);
            std::thread::sleep(Duration::from_millis(5));
        };
        ensure!(report.forgotten == 0, "the agent of {guest} has forgotten {} answers", report.forgotten);
        report.entries.iter().map(|entry| Self::from_agent(guest, devices, entry)).collect()
    }

    /// An entry of an agent's ledger. `devices` are the host devices granted to the guest, in the order of its `dev_id`.
    ///
    /// # Errors
    /// The entry names a device or an access that there is not.
    fn from_agent(guest: &Arc<str>, devices: &[usize], entry: &LedgerEntry) -> Result<Self> {
        let device = usize::try_from(entry.dev_id).ok().and_then(|dev_id| devices.get(dev_id));
        Ok(Self {
            guest: guest.clone(),
            ctx_id: entry.ctx_id,
            cookie: entry.cookie,
            device: *device.with_context(|| format!("{guest} has no device {}", entry.dev_id))?,
            asid: entry.asid,
            page: entry.gpu_addr / PAGE_SIZE,
            cpu_page: entry.cpu_addr / PAGE_SIZE,
            access: access_of_perm(entry.perm)
                .with_context(|| format!("an access of perm {:#x}", entry.perm))?,
            success: entry.code == Answer::Success && entry.status == 0,
        })
    }
}

/// What becomes of an expected fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It is raised, and pages come from the guest or from what is already known of it.
    Served,
    /// It is raised and ends as an error of the job, with or without the guest being asked.
    Refused,
    /// It may be raised or not, and may be dropped: its process goes away with jobs in flight.
    Uncertain,
}

/// The first touch of a window by a GPU VM, as the jobs' geometry has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Touch {
    /// The guest.
    pub guest: Arc<str>,
    /// The context.
    pub ctx_id: u32,
    /// Index of the host device.
    pub device: usize,
    /// Any page of the window, in GPU address space (C).
    pub page: u64,
    /// The page of the process (A) that backs it.
    pub cpu_page: u64,
    /// How it is touched first.
    pub access: Access,
    /// What must become of it.
    pub outcome: Outcome,
}

/// How the accounts compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Faults in the devices' ledgers.
    pub raised: u64,
    /// Of them, those that the guest was asked about.
    pub answered: u64,
    /// Of them, those served from pages already known, or joined with a pending record of the same pages.
    pub served_locally: u64,
    /// Of them, those that had to end as an error and of which the guest was not asked.
    pub refused: u64,
    /// Of them, those of processes that went away.
    pub dropped: u64,
    /// Records that an agent got, and that no GPU VM of that context raised.
    pub misrouted: u64,
    /// Faults that must have been raised and were not, or that were raised and that nobody can have resolved.
    pub lost: u64,
    /// Answers to a cookie that was answered before.
    pub answered_twice: u64,
    /// Faults raised that the geometry does not explain: repeated, or of a page that no job touches.
    pub unexpected: u64,
    /// The first differences, for people.
    pub differences: Vec<String>,
}

impl Comparison {
    /// Whether all three accounts agree.
    pub fn agrees(&self) -> bool {
        self.misrouted == 0 && self.lost == 0 && self.answered_twice == 0 && self.unexpected == 0
    }

    fn differ(&mut self, text: impl FnOnce() -> String) {
        if self.differences.len() < EXPLAINED {
            self.differences.push(text());
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} raised = {} answered by guests + {} served from known pages + {} refused + {} dropped",
            self.raised, self.answered, self.served_locally, self.refused, self.dropped
        )?;
        write!(
            f,
            "{} misrouted, {} lost, {} answered twice, {} unexpected",
            self.misrouted, self.lost, self.answered_twice, self.unexpected
        )?;
        for difference in &self.differences {
            write!(f, "\n  - {difference}")?;
        }
        Ok(())
    }
}

/// A window of a GPU VM, touched in one way.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    guest: Arc<str>,
    ctx_id: u32,
    device: usize,
    window: u64,
    access: Access,
}

/// The window that an entry of any of the accounts is about.
macro_rules! key {
    ($entry:expr) => {
        Key {
            guest: $entry.guest.clone(),
            ctx_id: $entry.ctx_id,
            device: $entry.device,
            window: $entry.page / WINDOW_PAGES,
            access: $entry.access,
        }
    };
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guest, ctx_id, device, window, access } = self;
        let start = window * WINDOW_PAGES * PAGE_SIZE;
        write!(f, "{access:?} at {start:#x} of context {ctx_id} of {guest} on device {device}")
    }
}

/// A window of a process' own pages.
type CpuWindow = (Arc<str>, u32, u64);

/// The access that a record's `perm` names, the strongest of them.
pub fn access_of_perm(perm: u32) -> Option<Access> {
    match perm {
        p if p & PERM_ATOMIC != 0 => Some(Access::Atomic),
        p if p & PERM_WRITE != 0 => Some(Access::Write),
        p if p & PERM_READ != 0 => Some(Access::Read),
        _ => None,
    }
}

/// Compares the three accounts.
pub fn compare(raised: &[Raised], answered: &[Answered], geometry: &[Touch]) -> Comparison {
    let mut result = Comparison { raised: raised.len() as u64, ..Comparison::default() };
    let unasked = match_answers(&mut result, raised, answered);
    let supplied: HashSet<CpuWindow> = answered
        .iter()
        .filter(|a| a.success)
        .map(|a| (a.guest.clone(), a.ctx_id, a.cpu_page / WINDOW_PAGES))
        .collect();
    settle(&mut result, raised, unasked, geometry, &supplied);
    result
}

/// Takes each answer's fault out of the raised ones. Returns those that no guest was asked about.
fn match_answers(result: &mut Comparison, raised: &[Raised], answered: &[Answered]) -> HashMap<Key, u64> {
    let mut open: HashMap<(Key, u32), u64> = HashMap::new();
    for fault in raised {
        *open.entry((key!(fault), fault.asid)).or_default() += 1;
    }
    let mut cookies: HashSet<(&Arc<str>, u64)> = HashSet::new();
    for answer in answered {
        let key = key!(answer);
        if !cookies.insert((&answer.guest, answer.cookie)) {
            result.answered_twice += 1;
            result.differ(|| format!("answered twice: cookie {:#x}, {key}", answer.cookie));
            continue;
        }
        match open.get_mut(&(key.clone(), answer.asid)) {
            Some(count) if *count > 0 => {
                *count -= 1;
                result.answered += 1;
            }
            _ => {
                result.misrouted += 1;
                result.differ(|| explain_misroute(&key, answer, raised));
            }
        }
    }
    let mut unasked: HashMap<Key, u64> = HashMap::new();
    for ((key, _), count) in open.into_iter().filter(|(_, count)| *count > 0) {
        *unasked.entry(key).or_default() += count;
    }
    unasked
}

fn explain_misroute(key: &Key, answer: &Answered, raised: &[Raised]) -> String {
    let owner = raised.iter().find(|r| r.asid == answer.asid && r.device == answer.device);
    match owner {
        Some(owner) if (&owner.guest, owner.ctx_id) != (&answer.guest, answer.ctx_id) => format!(
            "misrouted: {key} was asked of it, but asid {} is context {} of {}",
            answer.asid, owner.ctx_id, owner.guest
        ),
        Some(_) => {
            format!("misrouted: {key}, asid {}, was asked of it, but it did not raise it", answer.asid)
        }
        None => format!("misrouted: {key} was asked of it, but asid {} raised nothing", answer.asid),
    }
}

/// Accounts for the faults that no guest was asked about, and compares all of them with the geometry.
fn settle(
    result: &mut Comparison,
    raised: &[Raised],
    mut unasked: HashMap<Key, u64>,
    geometry: &[Touch],
    supplied: &HashSet<CpuWindow>,
) {
    let mut unexplained: HashMap<Key, u64> = HashMap::new();
    for fault in raised {
        *unexplained.entry(key!(fault)).or_default() += 1;
    }
    // Where a window is touched several times, the faults that nobody was asked about are those that had to fail.
    let (served, others): (Vec<_>, Vec<_>) =
        geometry.iter().partition(|touch| touch.outcome == Outcome::Served);
    for touch in others.into_iter().chain(served) {
        let key = key!(touch);
        if !take_one(&mut unexplained, &key) {
            if touch.outcome != Outcome::Uncertain {
                result.lost += 1;
                result.differ(|| format!("lost: {key} was never raised"));
            }
            continue;
        }
        if !take_one(&mut unasked, &key) {
            continue;
        }
        match touch.outcome {
            Outcome::Refused => result.refused += 1,
            Outcome::Uncertain => result.dropped += 1,
            Outcome::Served => {
                let window = (touch.guest.clone(), touch.ctx_id, touch.cpu_page / WINDOW_PAGES);
                if supplied.contains(&window) {
                    result.served_locally += 1;
                } else {
                    result.lost += 1;
                    result.differ(|| format!("lost: {key} was raised, and its pages were never asked for"));
                }
            }
        }
    }
    for (key, count) in unexplained.into_iter().filter(|(_, count)| *count > 0) {
        result.unexpected += count;
        result.differ(|| format!("unexpected: {key} was raised {count} times more than jobs explain"));
    }
}

fn take_one(counts: &mut HashMap<Key, u64>, key: &Key) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    }
}
