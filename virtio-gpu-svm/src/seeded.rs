//! Errors that tests can put into the core. Here none of them is ever on, and the optimiser removes the switches; the
//! build that tests run under schedules of their choice (`model/`) has others behind the same names.

use crate::page_table::{Miss, Translation};

/// An error. Each is described in `model/seeded.rs`.
#[derive(Clone, Copy)]
pub(crate) enum Bug {
    SkipFlush,
    FlushBeforeZap,
    DoneBeforeFlush,
    InstallStale,
    WrongLeaf,
    ReuseAsid,
    ResumeAfterTeardown,
    LoseWakeUp,
    ZapOneVm,
    LeaveHalf,
    UnbindBeforeHold,
    ReleaseAsked,
    ThawHeld,
    RunFrozen,
    BindPart,
    RefuseJoined,
    StartBehindBind,
    SkipWait,
    LosePoint,
    WakeOne,
    AnswerEarly,
    IgnoreInbox,
}

/// Whether it is on: never.
pub(crate) const fn on(_: Bug) -> bool {
    false
}

/// The translation of a page: looked up.
pub(crate) fn kept(_: u64, lookup: impl FnOnce() -> Result<Translation, Miss>) -> Result<Translation, Miss> {
    lookup()
}

/// A slice is over.
pub(crate) const fn end_slice(_parked: bool) {}
