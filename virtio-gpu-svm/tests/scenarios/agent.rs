//! A guest's agent, honest or not: what it answers, and what each lie must come to.
//!
//! Most lies are refused with the errno that PROTOCOL 4.4 names, and the fault is still pending: the truth can follow.
//! Some are a guest's own affair, and accepted: then its processes are owed no results, and others notice nothing.

use crate::driver::{Driver, answer};
use crate::guest::Sim;
use crate::mock::run;
use crate::process::{A, Owed, PAGES};
use crate::ram::{self, GPA};
use crate::random::Random;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::errno::*;
use virtio_gpu_svm::protocol::event::{FAULT_PREFETCH, FaultRecord, PERM_WRITE};

/// A fault that the agent was told of.
#[derive(Clone, Copy)]
pub struct Open {
    /// Its first record.
    pub record: FaultRecord,
    /// Pages that are asked for.
    pub pages: u64,
}

impl Open {
    /// Of a group of so many records.
    pub fn new(record: FaultRecord, group: u64) -> Self {
        let ahead = record.flags.get() & FAULT_PREFETCH != 0;
        let pages = if ahead { u64::from(record.length_hint.get()).div_ceil(4096) } else { group };
        Self { record, pages }
    }
    fn ctx_id(&self) -> u32 {
        self.record.ctx_id.get()
    }
    fn cookie(&self) -> u64 {
        self.record.cookie.get()
    }
    fn writes(&self) -> bool {
        self.record.perm.get() & PERM_WRITE != 0
    }
    /// The first page, counted from the process' first.
    fn page(&self) -> u64 {
        (self.record.cpu_addr.get() - A) / 4096
    }
}

/// What is not the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// For another context of the guest.
    OtherContext,
    /// Another guest's agent answers for this one.
    OtherGuest,
    /// A cookie that was used.
    Stale,
    /// A cookie that never was.
    MadeUp,
    /// The cookie of a fault that may be pending and was not told.
    Untold,
    /// The truth, twice.
    Twice,
    /// The truth, and then that there is none.
    TakenBack,
    /// Pages that may only be read.
    NoWriteRight,
    OutsideMemory,
    HalfOutsideMemory,
    /// Another page than was asked for.
    Shifted,
    NoRuns,
    /// Translated at a sequence that was never given out.
    FromTheFuture,
    /// Translated before a withdrawal that came before the answer.
    Outdated,
    /// One page at two places.
    Contradicts,
    InvalidWithRuns,
    UnknownCode,
    /// Unaligned, empty, endless, beyond the space, with unknown flags.
    Malformed,
    Truncated,
    Miscounted,
    NoContext,
    /// The page of another process of the guest: its own affair.
    OthersPage,
    /// INVALID.
    Refuses,
    /// FAILURE.
    Fails,
}

impl Lie {
    pub const ALL: [Self; 24] = [
        Self::OtherContext,
        Self::OtherGuest,
        Self::Stale,
        Self::MadeUp,
        Self::Untold,
        Self::Twice,
        Self::TakenBack,
        Self::NoWriteRight,
        Self::OutsideMemory,
        Self::HalfOutsideMemory,
        Self::Shifted,
        Self::NoRuns,
        Self::FromTheFuture,
        Self::Outdated,
        Self::Contradicts,
        Self::InvalidWithRuns,
        Self::UnknownCode,
        Self::Malformed,
        Self::Truncated,
        Self::Miscounted,
        Self::NoContext,
        Self::OthersPage,
        Self::Refuses,
        Self::Fails,
    ];
    /// What the device may say to it about a fault that is pending. 0 to what is refused otherwise: the page was known
    /// by another answer, or the right was not needed.
    fn may_be_told(self, open: &Open) -> &'static [i32] {
        match self {
            Self::OtherContext | Self::Stale | Self::MadeUp | Self::NoContext => &[-EINVAL, -ENOENT],
            Self::OtherGuest => &[-EINVAL, -ENOENT, -EPIPE],
            Self::NoRuns => &[-EINVAL, 0],
            // Told before of that place, and with another page.
            Self::Shifted => &[-EINVAL, 0, -EEXIST],
            Self::NoWriteRight if open.writes() => &[-EINVAL, -EEXIST],
            Self::NoWriteRight | Self::OthersPage => &[0, -EEXIST],
            Self::OutsideMemory | Self::HalfOutsideMemory => &[-EFAULT],
            Self::Outdated => &[-EAGAIN],
            Self::Contradicts => &[-EEXIST],
            Self::Refuses | Self::Fails => &[0],
            Self::Untold
            | Self::Twice
            | Self::TakenBack
            | Self::FromTheFuture
            | Self::InvalidWithRuns
            | Self::UnknownCode
            | Self::Malformed
            | Self::Truncated
            | Self::Miscounted => &[-EINVAL],
        }
    }
    /// Whether it costs its guest's processes their results.
    pub fn harms(self) -> bool {
        matches!(self, Self::OthersPage | Self::Refuses | Self::Fails)
    }
}

/// How an agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    Honest,
    /// A lie, and then the truth where that helps.
    Lies(Lie),
    /// A lie and nothing else.
    OnlyLies(Lie),
    /// Answers when the deadline has passed.
    Late,
    Silent,
    /// Answers so many, and then its keeper starts another.
    DiesAfter(u32),
}

impl Habit {
    /// Whether its processes are owed results all the same.
    pub fn serves(self) -> bool {
        match self {
            Self::Honest => true,
            Self::Lies(lie) => !lie.harms(),
            Self::OnlyLies(_) | Self::Late | Self::Silent | Self::DiesAfter(_) => false,
        }
    }
}

impl Sim {
    /// Whether its page is not on the move.
    pub fn can_be_told(&self, open: &Open) -> bool {
        self.is_up() && self.runs(open).is_some()
    }
    /// The first fault that can be answered now.
    fn answerable(&self) -> Option<usize> {
        self.open.iter().position(|open| self.runs(open).is_some())
    }
    pub fn can_answer(&self) -> bool {
        self.is_up() && !self.asleep && self.habit != Habit::Silent && self.answerable().is_some()
    }
    /// Answers a fault as its habit is.
    pub fn answer(&mut self, elsewhere: Option<&Driver>, random: &mut Random) {
        let Some(open) = self.answerable().map(|at| self.open.remove(at)) else { return };
        match self.habit {
            Habit::Honest | Habit::Silent => self.tell(&open),
            Habit::Late => {
                self.tell(&open);
                self.asleep = self.open.is_empty();
            }
            Habit::Lies(lie) => {
                if self.lie(lie, Some(&open), elsewhere, random) {
                    self.tell(&open);
                }
            }
            Habit::OnlyLies(lie) => _ = self.lie(lie, Some(&open), elsewhere, random),
            Habit::DiesAfter(0) => (self.asleep, self.dying) = (true, true),
            Habit::DiesAfter(left) => {
                self.habit = Habit::DiesAfter(left - 1);
                self.tell(&open);
            }
        }
    }
    /// The pages that were asked for, as far as they can be told; none before the first can. Of processes that are gone
    /// too.
    fn runs(&self, open: &Open) -> Option<Vec<PageRun>> {
        let Some(process) = self.process(open.ctx_id()) else { return Some(Vec::new()) };
        let first = open.page();
        let told = |page: u64| {
            let of = process.pages.get(usize::try_from(page).unwrap()).filter(|of| of.moving.is_none())?;
            Some(run(A + page * 4096, of.gpa, 1, process.seq))
        };
        told(first)?;
        Some((first..(first + open.pages).min(PAGES)).filter_map(told).collect())
    }
    /// Whether the fault can still be pending, as far as its process knows.
    fn is_alive(&self, open: &Open) -> bool {
        let (device, asid) = (usize::try_from(open.record.dev_id.get()).unwrap(), open.record.asid.get());
        self.process(open.ctx_id()).is_some_and(|process| process.vm_of(device, asid).is_some())
    }
    fn owes(&self, open: &Open) -> bool {
        self.is_alive(open) && self.process(open.ctx_id()).is_some_and(|p| p.owed == Owed::Results)
    }
    fn respond(&self, open: &Open, code: u32, runs: &[PageRun]) -> i32 {
        self.driver().respond(open.ctx_id(), open.cookie(), code, runs)
    }

    /// The truth.
    fn tell(&mut self, open: &Open) {
        let runs = self.runs(open).unwrap();
        let status = self.respond(open, PAGE_RESP_SUCCESS, &runs);
        self.stale.push((open.ctx_id(), open.cookie()));
        if self.owes(open) {
            assert_eq!(status, 0, "an honest answer: {:?}", open.record);
        } else {
            let contradicts = status == -EEXIST && self.is_spoilt();
            assert!(contradicts || [0, -EINVAL, -ENOENT].contains(&status), "{status}: {:?}", open.record);
        }
    }

    /// Lies about a fault, or about none. Whether the fault may be pending all the same.
    pub fn lie(
        &mut self,
        lie: Lie,
        open: Option<&Open>,
        elsewhere: Option<&Driver>,
        random: &mut Random,
    ) -> bool {
        let made_up =
            Open::new(FaultRecord { ctx_id: 1.into(), cpu_addr: A.into(), ..FaultRecord::default() }, 1);
        let (about, known) = (open.unwrap_or(&made_up), open.is_some_and(|open| self.owes(open)));
        if lie.harms() && open.is_some() {
            self.owe_nothing_more(about.ctx_id(), lie == Lie::OthersPage);
        }
        if known && matches!(lie, Lie::Twice | Lie::TakenBack) {
            self.tell(about);
        }
        let status = self.say(lie, about, elsewhere, random);
        if known {
            assert!(lie.may_be_told(about).contains(&status), "{lie:?} about {:?}: {status}", about.record);
        } else if open.is_none() {
            assert!([-EINVAL, -ENOENT, -EPIPE].contains(&status), "{lie:?} about nothing: {status}");
        }
        status != 0 && !matches!(lie, Lie::Twice | Lie::TakenBack)
    }
    fn say(&mut self, lie: Lie, open: &Open, elsewhere: Option<&Driver>, random: &mut Random) -> i32 {
        let (ctx, cookie, va) = (open.ctx_id(), open.cookie(), open.record.cpu_addr.get());
        let runs = self.runs(open).unwrap_or_default();
        let seq = self.process(ctx).map_or(0, |process| process.seq);
        let right = runs.first().copied().unwrap_or_else(|| run(va, GPA, 1, seq));
        let with = |change: &dyn Fn(&mut PageRun)| {
            let mut wrong = right;
            change(&mut wrong);
            [wrong]
        };
        let say = |code, runs: &[PageRun]| self.respond(open, code, runs);
        let claim = |ctx, cookie| self.driver().respond(ctx, cookie, PAGE_RESP_SUCCESS, &runs);
        let end = GPA + ram::PAGES * 4096;
        match lie {
            Lie::OtherContext => {
                let other = self.processes.iter().map(|process| process.ctx_id).find(|id| *id != ctx);
                claim(other.unwrap_or(999), cookie)
            }
            Lie::OtherGuest => match elsewhere {
                Some(driver) => driver.respond(ctx, cookie, PAGE_RESP_SUCCESS, &runs),
                None => claim(999, cookie),
            },
            Lie::Stale => {
                let stale = self.stale.last().copied();
                let (ctx, cookie) = stale.filter(|of| of.1 != cookie).unwrap_or((ctx, u64::MAX));
                claim(ctx, cookie)
            }
            Lie::MadeUp => claim(ctx, random.next() | 1 << 63),
            Lie::Untold => {
                let told = self.open.iter().any(|open| open.cookie() == cookie + 1);
                claim(ctx, if told { u64::MAX } else { cookie + 1 })
            }
            Lie::Twice => claim(ctx, cookie),
            Lie::TakenBack | Lie::Refuses => say(PAGE_RESP_INVALID, &[]),
            Lie::Fails => say(PAGE_RESP_FAILURE, &[]),
            Lie::NoWriteRight => say(0, &with(&|run| run.flags = RUN_READONLY.into())),
            Lie::OutsideMemory => say(0, &with(&|run| run.gpa = end.into())),
            Lie::HalfOutsideMemory => {
                say(0, &with(&|run| (run.gpa, run.pages) = ((end - 4096).into(), 2.into())))
            }
            Lie::Shifted => say(0, &with(&|run| run.va = (va + (1 << 30)).into())),
            Lie::NoRuns => say(0, &[]),
            Lie::FromTheFuture => say(0, &with(&|run| run.as_of = (seq + 1).into())),
            Lie::Outdated => self.say_outdated(open, &right),
            Lie::Contradicts => {
                let elsewhere = right.gpa.get() ^ 4096;
                say(0, &[right, with(&|run| run.gpa = elsewhere.into())[0]])
            }
            Lie::InvalidWithRuns => say(PAGE_RESP_INVALID, &[right]),
            Lie::UnknownCode => say(7, &[]),
            Lie::Malformed => {
                let wrong: [&dyn Fn(&mut PageRun); 6] = [
                    &|run| run.va = (va + 1).into(),
                    &|run| run.gpa = (GPA + 1).into(),
                    &|run| run.pages = 0.into(),
                    &|run| run.pages = u32::MAX.into(),
                    &|run| run.va = (1_u64 << 56).into(),
                    &|run| run.flags = 0x80.into(),
                ];
                say(0, &with(wrong[random.index(wrong.len())]))
            }
            Lie::Truncated => {
                let whole = answer(ctx, cookie, 0, &[right]);
                self.driver().status(&whole[..whole.len() - 8])
            }
            Lie::Miscounted => {
                let mut whole = answer(ctx, cookie, 0, &[right]);
                whole.extend(answer(0, 0, 0, &[]));
                self.driver().status(&whole)
            }
            Lie::NoContext => claim(0, cookie),
            Lie::OthersPage => {
                let other = self.processes.iter().find(|process| process.ctx_id != ctx);
                let gpa = other.map_or(right.gpa.get(), |process| process.pages[0].gpa);
                say(0, &with(&|run| run.gpa = gpa.into()))
            }
        }
    }
    /// Withdraws the page, and answers with what was translated before.
    fn say_outdated(&mut self, open: &Open, right: &PageRun) -> i32 {
        if self.is_alive(open) {
            let driver = Driver(self.driver().0.clone());
            let process = self.process_mut(open.ctx_id()).unwrap();
            process.touch(&driver, open.page());
        }
        self.respond(open, PAGE_RESP_SUCCESS, &[*right])
    }
}
