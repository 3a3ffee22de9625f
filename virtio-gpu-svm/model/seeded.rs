//! Errors that tests put into the core, to see that the checks find them.
//!
//! One at a time, for the schedules that this thread of the system runs.

use crate::page_table::{Miss, Translation};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// An error that can be switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Unbinding hands out no ticket.
    SkipFlush,
    /// The ticket is taken before the translations are dropped.
    FlushBeforeZap,
    /// An invalidation counts as done when it is accepted.
    DoneBeforeFlush,
    /// Runs are installed whatever their `as_of`.
    InstallStale,
    /// `as_of` is compared with the neighbouring leaf.
    WrongLeaf,
    /// Asids of contexts on their way out are free, and taken first.
    ReuseAsid,
    /// The guest lets a page go when its invalidation is accepted.
    DropPin,
    /// Pending faults of a destroyed GPU VM can still be answered.
    ResumeAfterTeardown,
    /// A fault that ends lets no throttled one in.
    LoseWakeUp,
    /// An invalidation zaps the first GPU VM alone.
    ZapOneVm,
    /// A cut in the second half of a large leaf leaves it mapped.
    LeaveHalf,
    /// A job that parks keeps its translations and uses them when it goes on.
    KeepParked,
    /// A GPU VM without faults is unbound before its queues are stopped.
    UnbindBeforeHold,
    /// A GPU VM that is held goes on while the guest is still asked for a page.
    ReleaseAsked,
    /// The guest's rings go on, and with them a GPU VM that is held.
    ThawHeld,
    /// A GPU VM that has its pages goes on while the guest's rings are stopped.
    RunFrozen,
    /// Without faults, a large leaf of which a page was missing is not wanted as a whole.
    BindPart,
    /// A job whose access has joined a prefetch ends with it.
    RefuseJoined,
    /// A job starts behind a bind that has not ended.
    StartBehindBind,
    /// A job starts before the last of its points is reached.
    SkipWait,
    /// Nobody is told that points of a destroyed GPU VM are reached.
    LosePoint,
    /// Of the accesses that wait for a fault, the first alone goes on.
    WakeOne,
    /// A group can be answered before its last record.
    AnswerEarly,
    /// Who lets a context's lock go does not look for those who were turned away.
    IgnoreInbox,
}

thread_local! {
    static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    /// Translations that the one job of [`Bug::KeepParked`] has kept, by GPU page.
    static KEPT: RefCell<HashMap<u64, Translation>> = RefCell::default();
}

/// Switches an error on, or all off, for schedules that this thread of the system runs from now on.
pub fn switch(bug: Option<Bug>) {
    BUG.set(bug);
    KEPT.with(|kept| kept.borrow_mut().clear());
}

/// Whether an error is switched on.
pub fn on(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}

/// The translation of a page: kept, or looked up.
pub(crate) fn kept(
    page: u64,
    lookup: impl FnOnce() -> Result<Translation, Miss>,
) -> Result<Translation, Miss> {
    if !on(Bug::KeepParked) {
        return lookup();
    }
    if let Some(kept) = KEPT.with(|kept| kept.borrow().get(&page).copied()) {
        return Ok(kept);
    }
    let found = lookup()?;
    KEPT.with(|kept| kept.borrow_mut().insert(page, found));
    Ok(found)
}

/// A slice is over: only a job that parked keeps what it found.
pub(crate) fn end_slice(parked: bool) {
    if !parked {
        KEPT.with(|kept| kept.borrow_mut().clear());
    }
}
