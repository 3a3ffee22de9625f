//! Pages that the guest supplies: with the answer to a fault, or unasked.
//!
//! An answer names a cookie, a code and runs; everything else is looked up in our own table. All runs are checked
//! before the first takes effect. A run that was translated before an invalidation of its leaf is refused with
//! -EAGAIN, and its fault stays pending for another try. PROTOCOL 4.3, 4.4.

use super::{FAULT_AROUND_PAGES, Outcome, Pending};
use crate::addr::PageRange;
use crate::address_space::{Bounds, Install, Page, Run, Runs};
use crate::context::{After, Context, Life, State, add};
use crate::device::Verdict;
use crate::gpu_vm;
use crate::protocol::control::{PAGE_RESP_FAILURE, PAGE_RESP_INVALID, PAGE_RESP_SUCCESS};
use crate::protocol::errno::{EFAULT, ENOSPC, EPIPE, ETIMEDOUT};
use crate::protocol::event::PERM_WRITE;
use crate::protocol::limit::Limit;
use crate::seeded::{self, Bug};
use crate::sync::Arc;
use std::ops::ControlFlow;
use std::time::Duration;

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Retry the access.
    Success,
    /// The access is an error of the process.
    Invalid,
    /// The guest cannot serve this process any more.
    Failure,
}

impl Code {
    /// From the wire.
    pub fn from_wire(code: u32) -> Option<Self> {
        match code {
            PAGE_RESP_SUCCESS => Some(Self::Success),
            PAGE_RESP_INVALID => Some(Self::Invalid),
            PAGE_RESP_FAILURE => Some(Self::Failure),
            _ => None,
        }
    }
}

/// What became of supplied runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Supplied {
    /// Runs that stand.
    pub installed: u32,
    /// Runs that raced with an invalidation.
    pub refused: u32,
    /// The first of them.
    pub first_refused: u32,
    /// Whether what was to be achieved is still open: for an answer, that its fault is still pending.
    pub pending: bool,
}

/// Why pages or an answer were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The context is lost.
    #[error("the context is lost")]
    Lost,
    /// No pending fault has this cookie.
    #[error("no pending fault has cookie {0:#x}")]
    UnknownCookie(u64),
    /// SUCCESS without the page that was asked for, or without the right.
    #[error("the answer does not cover page {cpu_page:#x} with the right that was asked for")]
    NotCovered {
        /// CPU page number.
        cpu_page: u64,
    },
    /// Runs with a code that has none.
    #[error("an answer that is no success carries runs")]
    UnexpectedRuns,
    /// Pages outside guest memory.
    #[error("run {index} lies outside guest memory")]
    NoMemory {
        /// Which run.
        index: u32,
    },
    /// Translated at a sequence that was never given out.
    #[error("run {index} was translated at a sequence of the future")]
    FutureSequence {
        /// Which run.
        index: u32,
    },
    /// Contradicts what is known.
    #[error("run {index} contradicts a known page; invalidate first")]
    Conflict {
        /// Which run.
        index: u32,
    },
    /// Over the quota of address-space leaves.
    #[error("run {index} needs more address-space leaves than a context may have")]
    Full {
        /// Which run.
        index: u32,
    },
    /// Over the guest's quota of bytes for tables.
    #[error("run {index} needs more bytes of tables than the guest may have")]
    OverQuota {
        /// Which run.
        index: u32,
    },
}

impl Context {
    /// Installs runs. PROTOCOL 4.3.
    ///
    /// # Errors
    /// [`Error`]; runs before the one that it names stand.
    pub fn supply(&self, runs: Runs<impl Iterator<Item = Run> + Clone>) -> Result<Supplied, Error> {
        let mut state = self.lock();
        state.check_runs(&runs)?;
        state.install_runs(runs.each).inspect_err(|error| self.count_full(error))
    }
    /// Counts what was refused for a limit that has no charge.
    fn count_full(&self, error: &Error) {
        if let Error::Full { .. } = error {
            self.quota.refuse(Limit::Leaves);
        }
    }

    /// Answers a fault. PROTOCOL 4.4.
    ///
    /// # Errors
    /// [`Error`]; the fault stays pending.
    pub fn respond(
        self: &Arc<Self>,
        cookie: u64,
        code: Code,
        runs: Runs<impl Iterator<Item = Run> + Clone>,
    ) -> Result<Supplied, Error> {
        let mut after = After::default();
        let result = self.respond_locked(&mut self.lock(), cookie, code, runs, &mut after);
        self.settle(after);
        result
    }

    fn respond_locked(
        &self,
        state: &mut State,
        cookie: u64,
        code: Code,
        runs: Runs<impl Iterator<Item = Run> + Clone>,
        after: &mut After,
    ) -> Result<Supplied, Error> {
        let Some((pending, perm)) = state.faults.get(cookie).and_then(|p| Some((p, told(p)?))) else {
            add(&mut state.counters.obtain().answers_stale, 1);
            return Err(Error::UnknownCookie(cookie));
        };
        let (vm_id, range, cpu_page) = (pending.vm_id, pending.range(), pending.cpu_page());
        let prefetch = pending.is_prefetch();
        let writes = u32::from(perm) & PERM_WRITE != 0;
        if code != Code::Success {
            if runs.each.clone().next().is_some() {
                return Err(Error::UnexpectedRuns);
            }
            // Without faults no job could be told: what cannot be had ends the GPU VM.
            let fatal = code == Code::Failure || (prefetch && self.lacks_faults(state, vm_id));
            self.release_joined(state, cookie, after);
            // A prefetch was refused for its first page: who joined it may want another, and asks for itself.
            let advice = prefetch && !fatal && !seeded::on(Bug::RefuseJoined);
            let verdict = if advice { Verdict::Retry } else { Verdict::Fail(EFAULT) };
            self.end_pending(state, cookie, Outcome::Refused, verdict, after);
            if fatal {
                self.make_unusable(state, vm_id, EFAULT, range.start, after);
            }
            return Ok(Supplied { pending: false, ..Supplied::default() });
        }
        state.check_runs(&runs)?;
        let serves = |page: Page| !(writes && page.readonly);
        let covered = runs.each.clone().any(|run| run.va.contains(cpu_page) && serves(run.first));
        if !covered && !state.space.lookup(cpu_page).is_some_and(serves) {
            return Err(Error::NotCovered { cpu_page });
        }
        let mut supplied = state.install_runs(runs.each).inspect_err(|error| self.count_full(error))?;
        let stands = covered && supplied.refused == 0;
        if stands || state.space.lookup(cpu_page).is_some_and(serves) {
            supplied.pending = false;
            // A prefetch is bound as it was wanted, in slices.
            let window = |page: u64| page / FAULT_AROUND_PAGES;
            let windows = if prefetch {
                0..0
            } else {
                window(range.start)..window(range.end.saturating_sub(1)).saturating_add(1)
            };
            let bound = windows
                .map(|window| window.saturating_mul(FAULT_AROUND_PAGES).max(range.start))
                .try_for_each(|page| self.bind_around(state, vm_id, page));
            let (outcome, verdict) = match bound {
                Ok(()) => (Outcome::Answered, Verdict::Retry),
                Err(errno) => (Outcome::Refused, Verdict::Fail(errno)),
            };
            self.end_pending(state, cookie, outcome, verdict, after);
        }
        Ok(supplied)
    }

    /// A group is refused for its first page: who joined it may want another, and asks for itself.
    fn release_joined(&self, state: &mut State, cookie: u64, after: &mut After) {
        let group = state.faults.get(cookie).filter(|group| group.pages() > 1 && !group.is_prefetch());
        let Some(vm) = group.and_then(|group| state.vms.get(&group.vm_id)) else { return };
        let (device, joined) = (vm.device, state.faults.take_joined(cookie));
        state.count(Outcome::Throttled, u64::try_from(joined.len()).unwrap_or(u64::MAX));
        joined.into_iter().for_each(|stop| after.resume(device, stop, Verdict::Retry));
    }

    /// Ends faults that were raised at `run` of the guest's own time or before: the guest has had its time, the job
    /// fails, and the GPU VM becomes unusable. Returns whether there were any. Not while the lock is held: they are as
    /// late at the next look. PROTOCOL 4.4.
    pub(crate) fn expire_faults(self: &Arc<Self>, run: Duration) -> bool {
        let mut after = After::default();
        let any = {
            let Some(mut state) = self.try_lock() else { return false };
            let late = state.faults.raised_until(run);
            let any = !late.is_empty();
            for (cookie, vm_id, page) in late {
                let advice = state.faults.is_advice(cookie);
                let fatal = !advice || self.lacks_faults(&state, vm_id);
                let verdict = Verdict::Fail(ETIMEDOUT);
                self.end_pending(&mut state, cookie, Outcome::Refused, verdict, &mut after);
                if fatal {
                    self.make_unusable(&mut state, vm_id, ETIMEDOUT, page, &mut after);
                }
            }
            any
        };
        self.settle_shared(after);
        any
    }

    /// Makes a GPU VM unusable for good: nothing more is mapped or run in it. Semantics of panthor.
    pub(crate) fn make_unusable(
        &self,
        state: &mut State,
        vm_id: u32,
        errno: i32,
        page: u64,
        after: &mut After,
    ) {
        let addr = page << crate::protocol::PAGE_SHIFT;
        let op = state.operation_at(vm_id, page);
        self.spoil(state, vm_id, gpu_vm::State::Unusable { errno, op, addr }, after);
    }

    /// The same, for an error that is known to the operation; the first one stays.
    pub(crate) fn spoil(&self, state: &mut State, vm_id: u32, dead: gpu_vm::State, after: &mut After) {
        let gpu_vm::State::Unusable { errno, .. } = dead else { return };
        let Some(vm) = state.vms.get_mut(&vm_id).filter(|vm| vm.state == gpu_vm::State::Usable) else {
            return;
        };
        vm.state = dead;
        state.timelines.wake_vm(vm_id);
        let others = state.faults.cookies_in(vm_id, &[PageRange { start: 0, end: u64::MAX }]);
        for cookie in others {
            self.end_pending(state, cookie, Outcome::Refused, Verdict::Fail(EPIPE), after);
        }
        self.give_up_population(state, vm_id);
        self.end_populated(state, after);
        state.tell(crate::event::Waiting::Lost { vm_id, errno });
        after.announce = true;
        after.more = true;
    }
}

/// What the guest knows that its answer must grant; none before it knows all.
fn told(pending: &Pending) -> Option<u16> {
    pending.told().or_else(|| seeded::on(Bug::AnswerEarly).then_some(pending.perm()))
}

impl State {
    /// Whether runs lie in guest memory, each in one region, and are not of the future.
    fn check_runs(&self, runs: &Runs<impl Iterator<Item = Run> + Clone>) -> Result<(), Error> {
        if self.life != Life::Alive {
            return Err(Error::Lost);
        }
        // Mostly guest memory is one region as far as they go; then none needs to be looked at alone.
        let within = |bounds: &Bounds| {
            let PageRange { start, end } = bounds.gpa_pages;
            bounds.newest <= self.space.seq()
                && self.memory.lookup(start, end.saturating_sub(start)).is_some()
        };
        if runs.bounds.as_ref().is_some_and(within) {
            return Ok(());
        }
        let mut memory = self.memory.walk();
        for (index, run) in (0..).zip(runs.each.clone()) {
            if run.as_of > self.space.seq() {
                return Err(Error::FutureSequence { index });
            }
            let (gpa_page, pages) = (run.first.gpa_page, run.va.pages());
            let place = memory.region(gpa_page);
            if place.is_none_or(|(_, place)| place.end.saturating_sub(gpa_page) < pages) {
                return Err(Error::NoMemory { index });
            }
        }
        Ok(())
    }
    fn install_runs(&mut self, runs: impl Iterator<Item = Run>) -> Result<Supplied, Error> {
        let (mut supplied, mut outcome, mut index) = (Supplied::default(), Ok(()), 0_u32);
        self.space.install_all(runs, |install, count| {
            match install {
                Install::Done => supplied.installed = supplied.installed.saturating_add(count),
                Install::Raced => {
                    if supplied.refused == 0 {
                        supplied.first_refused = index;
                    }
                    supplied.refused = supplied.refused.saturating_add(count);
                }
                Install::Conflict => outcome = Err(Error::Conflict { index }),
                Install::Full => outcome = Err(Error::Full { index }),
                Install::OverQuota => outcome = Err(Error::OverQuota { index }),
            }
            index = index.saturating_add(count);
            if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let counters = self.counters.obtain();
        add(&mut counters.runs_installed, supplied.installed.into());
        add(&mut counters.runs_refused, supplied.refused.into());
        supplied.pending = supplied.refused > 0;
        outcome.map(|()| supplied)
    }
}

impl Error {
    /// On the wire. PROTOCOL 8.
    pub fn errno(&self) -> i32 {
        use crate::protocol::errno::{EEXIST, EINVAL};
        match self {
            Self::Lost => EPIPE,
            Self::UnknownCookie(_)
            | Self::NotCovered { .. }
            | Self::UnexpectedRuns
            | Self::FutureSequence { .. } => EINVAL,
            Self::NoMemory { .. } => EFAULT,
            Self::Conflict { .. } => EEXIST,
            Self::Full { .. } | Self::OverQuota { .. } => ENOSPC,
        }
    }
    /// The limit that -ENOSPC is about. PROTOCOL 9.
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::Full { .. } => Some(Limit::Leaves),
            Self::OverQuota { .. } => Some(Limit::TableBytes),
            Self::Lost
            | Self::UnknownCookie(_)
            | Self::NotCovered { .. }
            | Self::UnexpectedRuns
            | Self::NoMemory { .. }
            | Self::FutureSequence { .. }
            | Self::Conflict { .. } => None,
        }
    }
    /// The run that it is about.
    pub fn index(&self) -> u32 {
        match self {
            Self::NoMemory { index }
            | Self::FutureSequence { index }
            | Self::Conflict { index }
            | Self::Full { index }
            | Self::OverQuota { index } => *index,
            Self::Lost | Self::UnknownCookie(_) | Self::NotCovered { .. } | Self::UnexpectedRuns => 0,
        }
    }
}
