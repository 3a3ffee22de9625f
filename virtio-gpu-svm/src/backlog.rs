//! What is left to the host's worker: work that engines leave because they serve others too, and looks at the deadlines
//! of faults. Guests take turns, of a guest its contexts, a slice each: whatever one guest has left, another waits for
//! one slice of it.

use crate::context::Context;
use crate::guest::Guest;
use crate::host::on_behalf;
use crate::sleepers::Sleepers;
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use crate::turns::Turns;
use std::time::Duration;

/// What is to be done.
enum Chore {
    /// What may go on in a context.
    Context(Weak<Context>),
    /// Faults of a guest that nobody has answered in time, in the contexts behind this one.
    Deadlines(Weak<Guest>, Option<u32>),
}

impl Chore {
    /// Does a slice. Returns what is left, and whose it is.
    fn run(self) -> Option<(Arc<str>, Self)> {
        match &self {
            Self::Context(context) => {
                let context = context.upgrade()?;
                // Before the work: who leaves more from here on may be too late for it.
                context.left.store(false, Ordering::SeqCst);
                if on_behalf(|| context.fail_session(), || context.work())
                    && !context.left.swap(true, Ordering::SeqCst)
                {
                    return Some((Arc::clone(&context.label.guest), self));
                }
                None
            }
            Self::Deadlines(guest, after) => {
                let strong = guest.upgrade()?;
                let last = on_behalf(|| strong.fail_session(), || strong.expire_some(*after))?;
                Some((strong.shared_name(), Self::Deadlines(Weak::clone(guest), Some(last))))
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    turns: Turns<Chore>,
    /// Whether a wait is to end, also one that has not begun.
    woken: bool,
    sleepers: Sleepers,
}

/// The queue of it.
#[derive(Default)]
pub(crate) struct Backlog {
    /// Guards the queue only; nothing is locked under it.
    queue: Mutex<Queue>,
    news: Condvar,
}

impl Backlog {
    /// Leaves what may go on in a context; it stands here once.
    pub fn leave_work(&self, context: &Arc<Context>) {
        if !context.left.swap(true, Ordering::SeqCst) {
            self.push(&context.label.guest, Chore::Context(Arc::downgrade(context)));
        }
    }
    /// Leaves a look at the deadlines of a guest.
    pub fn leave_deadlines(&self, guest: &Arc<Guest>) {
        self.push(&guest.shared_name(), Chore::Deadlines(Arc::downgrade(guest), None));
    }
    /// Waits until there is something, or [`Backlog::wake`], or this time is over.
    pub fn wait(&self, timeout: Duration) {
        let mut queue = self.lock();
        if queue.turns.is_empty() && !queue.woken {
            queue.sleepers.lie_down();
            (queue, _) = self.news.wait_timeout(queue, timeout).unwrap_or_else(PoisonError::into_inner);
            queue.sleepers.get_up();
        }
        queue.woken = false;
    }
    /// Ends a [`Backlog::wait`], or the next one.
    pub fn wake(&self) {
        let mut queue = self.lock();
        queue.woken = true;
        if queue.sleepers.call_all() {
            drop(queue);
            self.news.notify_all();
        }
    }
    /// Does the slice whose turn it is. Returns whether there was one.
    pub fn work(&self) -> bool {
        let Some(chore) = self.lock().turns.pop() else { return false };
        if let Some((guest, left)) = chore.run() {
            self.lock().turns.push(&guest, left);
        }
        true
    }
    fn push(&self, guest: &Arc<str>, chore: Chore) {
        let mut queue = self.lock();
        queue.turns.push(guest, chore);
        if queue.sleepers.call(1) {
            drop(queue);
            self.news.notify_one();
        }
    }
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
