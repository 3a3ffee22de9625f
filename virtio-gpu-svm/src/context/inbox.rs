//! The context's lock, and what becomes of those who serve others too and find it held.
//!
//! An engine waits for no guest's command: what it reports while the lock is held goes into the context's *inbox*.
//! Whoever lets the lock go looks into it and leaves the context to the host's worker; the guest's own threads empty it
//! themselves after each command, so it grows while one is carried out and no longer. It holds at most what devices can
//! tell meanwhile: a fault or an end for each ring's front, an end for each job in flight, a flush and a retirement for
//! each GPU VM; of those destroyed by that very command too, since the next one finds it empty.
//!
//! Reports are carried out in the order in which they came: one that finds the lock free goes behind those that lie here.
//! Nobody is forgotten: who is turned away has written down what is to be done before the last try, who lets the lock go
//! looks afterwards, and between the two steps each has a sequentially consistent fence. So either the try finds the lock
//! free, or the look finds what was written.

use super::{After, Context, KEPT, Life, State, trim};
use crate::device::{Asid, Fault, JobEnd, JobId, Ticket};
use crate::seeded::{self, Bug};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, TRIES, TryLockError};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

/// Reports that are carried out under one hold of the lock.
const BATCH: usize = 16;

/// What a device tells of a GPU VM.
pub(crate) enum Report {
    /// A job faulted in a GPU VM of the context.
    Fault {
        /// The host device.
        device: usize,
        /// The GPU VM.
        vm_id: u32,
        /// As reported.
        fault: Fault,
    },
    /// A job ended.
    JobDone(JobId, JobEnd),
    /// A ticket was passed.
    Flushed(usize, Asid, Ticket),
    /// A GPU VM is gone; the last that is told of it.
    Retired(usize, Asid),
}

/// What waits for the lock.
#[derive(Default)]
pub(crate) struct Inbox {
    /// Guards the list only; nothing is locked under it.
    reports: Mutex<VecDeque<Report>>,
    /// How many there are; changed under that lock.
    count: AtomicUsize,
    /// Whether the host's worker, or a thread that delivers records, has found the lock held.
    turned_away: AtomicBool,
}

impl Inbox {
    fn len(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
    fn is_owed(&self) -> bool {
        self.len() > 0 || self.turned_away.load(Ordering::SeqCst)
    }
    fn push(&self, report: Report) {
        let mut reports = self.list();
        reports.push_back(report);
        self.count.store(reports.len(), Ordering::SeqCst);
    }
    fn pop(&self) -> Option<Report> {
        if self.len() == 0 {
            return None;
        }
        let mut reports = self.list();
        let report = reports.pop_front();
        trim(&mut reports, KEPT);
        self.count.store(reports.len(), Ordering::SeqCst);
        report
    }
    fn list(&self) -> MutexGuard<'_, VecDeque<Report>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold of the context's lock. Fields are dropped in this order: the look comes when others can have the lock.
pub(crate) struct Guard<'a> {
    state: MutexGuard<'a, State>,
    _look: Look<'a>,
}

impl Deref for Guard<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// Looks for those who were turned away.
struct Look<'a>(&'a Context);

impl Drop for Look<'_> {
    fn drop(&mut self) {
        fence(Ordering::SeqCst);
        if self.0.inbox.is_owed()
            && !seeded::on(Bug::IgnoreInbox)
            && let Some(context) = self.0.me.upgrade()
        {
            self.0.host.leave_work(&context);
        }
    }
}

impl Context {
    /// The lock, for threads that serve this guest alone, and people.
    pub(crate) fn lock(&self) -> Guard<'_> {
        self.guard(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
    /// The lock, if it is free or will be in a moment: most commands are short.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_>> {
        for _ in 0..TRIES {
            if let Some(guard) = self.try_once() {
                return Some(guard);
            }
            std::hint::spin_loop();
        }
        None
    }
    /// The same; where it is held, the host's worker comes when it is not, and announces the records that wait.
    pub(crate) fn lock_or_leave(&self) -> Option<Guard<'_>> {
        self.try_lock().or_else(|| {
            self.inbox.turned_away.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            self.try_once()
        })
    }
    fn try_once(&self) -> Option<Guard<'_>> {
        match self.state.try_lock() {
            Ok(state) => Some(self.guard(state)),
            Err(TryLockError::Poisoned(poisoned)) => Some(self.guard(poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => None,
        }
    }
    fn guard<'a>(&'a self, state: MutexGuard<'a, State>) -> Guard<'a> {
        Guard { state, _look: Look(self) }
    }

    /// A device reports. Does not wait: what cannot be carried out now is carried out by others.
    pub(crate) fn tell(self: &Arc<Self>, report: Report) {
        let mut after = After::default();
        let state = match self.try_lock() {
            Some(mut state) if self.inbox.len() == 0 => {
                if self.hear(&mut state, report, &mut after) {
                    self.advance(&mut state, &mut after);
                }
                state
            }
            free => {
                self.inbox.push(report);
                fence(Ordering::SeqCst);
                let Some(mut state) = free.or_else(|| self.try_once()) else { return };
                self.hear_some(&mut state, &mut after);
                state
            }
        };
        drop(state);
        self.settle_shared(after);
    }
    /// Carries out what lies in the inbox now. For threads that may wait for the lock.
    pub(crate) fn catch_up(self: &Arc<Self>) {
        let mut left = self.inbox.len();
        while left > 0 {
            let mut after = After::default();
            self.hear_some(&mut self.lock(), &mut after);
            self.settle_shared(after);
            left = left.saturating_sub(BATCH);
        }
    }
    /// Whether devices have told what has not been carried out.
    pub(crate) fn has_news(&self) -> bool {
        self.inbox.len() > 0 || self.farewell.load(Ordering::SeqCst)
    }
    /// One slice of what may go on, after what was reported. Returns whether there is more.
    pub(crate) fn work(self: &Arc<Self>) -> bool {
        let mut after = After { more: true, ..After::default() };
        {
            let Some(mut state) = self.lock_or_leave() else { return false };
            // Under the lock, and before all that is done under it: who is turned away from here on comes again.
            let turned_away = self.inbox.turned_away.swap(false, Ordering::SeqCst);
            self.hear_some(&mut state, &mut after);
            after.announce |= turned_away && state.has_records();
            // The guest may have room for what this context has to ask.
            state.vms.values_mut().for_each(|vm| vm.population.go_on());
            self.let_throttled_in(&mut state, true, &mut after);
        }
        self.say_farewell();
        self.settle_slices(after, 1, true)
    }
    /// Tells the guest that the context is gone, if its lock was held when that was heard.
    pub(crate) fn say_farewell(self: &Arc<Self>) {
        if self.farewell.swap(false, Ordering::SeqCst)
            && let Some(guest) = self.guest.upgrade()
        {
            guest.on_context_retired(self);
            guest.wake_waiters();
        }
    }

    fn hear_some(&self, state: &mut State, after: &mut After) {
        let mut ended = false;
        for _ in 0..BATCH {
            let Some(report) = self.inbox.pop() else { break };
            ended |= self.hear(state, report, after);
        }
        if ended {
            self.advance(state, after);
        }
    }
    /// Returns whether something may start.
    fn hear(&self, state: &mut State, report: Report, after: &mut After) -> bool {
        match report {
            Report::Fault { device, vm_id, fault } => self.on_fault(state, device, vm_id, &fault, after),
            Report::JobDone(job, end) => {
                self.end(state, job, end, after);
                return true;
            }
            Report::Flushed(device, asid, ticket) => state.on_flushed(device, asid, Some(ticket), after),
            Report::Retired(device, asid) => {
                if let Some(retiring) = state.retiring.get_mut() {
                    retiring.remove(&(device, asid));
                }
                // In the same step: an invalidation that still found it retiring would wait for a flush that has been.
                state.on_flushed(device, asid, None, after);
                after.let_go = true;
                after.gone |= state.life == Life::Destroyed && !state.is_retiring();
            }
        }
        false
    }
}
