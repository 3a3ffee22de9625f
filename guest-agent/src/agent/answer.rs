//! A fault's way through the agent: looked up in its context's table, answered, and retried when the answer raced with
//! an invalidation. Runs on the threads that serve, or on the one that lets held answers go; never waits. Answers are
//! gathered and go to the device together.

use super::ledger::{Answer, LedgerEntry, LedgerReport};
use super::table::Window;
use super::{Agent, Context, ContextState, State};
use crate::driver::{Completion, Posted, SvmDevice};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Instant;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::{PAGE_RESP_INVALID, PAGE_RESP_SUCCESS};
use virtio_gpu_svm::protocol::errno::{EAGAIN, EEXIST, EFAULT, ENOSPC};
use virtio_gpu_svm::protocol::event::{FAULT_LAST_PAGE, FAULT_PREFETCH, FaultRecord};

/// After so many races the fault is given up: each retry needs a new invalidation of the same 2 MiB, so a process that
/// gets here is doing it to itself.
const MAX_RETRIES: u32 = 1000;

/// Answers that are gathered before they are sent, and those to the turn of one more lane: few enough not to keep the
/// first one waiting.
const MAX_BATCH: usize = 32;

/// A fault that is to be answered: a page, a group of pages or a range that is to be there before it is touched.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    /// Its last record.
    fault: FaultRecord,
    /// CPU addresses `[start, end)`.
    start: u64,
    end: u64,
    /// When that record was found in the ring.
    found: Instant,
}

/// An answer that the device has not taken yet.
pub(super) struct PendingAnswer {
    asked: Asked,
    code: Answer,
    pages: u32,
    runs: u32,
    retries: u32,
    pid: i32,
    sent: Sent,
}

/// When a batch was with the device and the doorbell rung, which is after its answers can be looked up: the device may
/// be faster than who sends.
type Sent = Arc<OnceLock<Instant>>;

/// Answers that go to the device together.
#[derive(Default)]
pub(super) struct Batch {
    answers: Vec<(PendingAnswer, Posted)>,
    /// Of the first answer and all others.
    sent: Option<Sent>,
}

impl Batch {
    pub(super) fn is_full(&self) -> bool {
        self.answers.len() >= MAX_BATCH
    }
}

impl Agent {
    pub(super) fn on_fault(&self, fault: FaultRecord, found: Instant, batch: &mut Batch) {
        let mut state = self.lock();
        let Some(asked) = state.whole(fault, found) else { return };
        state.ledger.counts().faults += 1;
        if let Some(context) = state.contexts.get_mut(&fault.ctx_id.get()) {
            context.faults += 1;
        }
        if let Some(held) = &mut state.held {
            held.push(asked);
            return;
        }
        self.answer(state, asked, 0, self.options.fault_around_pages, batch);
    }

    /// Translates and answers; a fault whose context is ending needs no answer, the device drops it. The table is read
    /// after the sequence, under one lock, so `as_of` is never too new. A window of 0 pages refuses the access.
    fn answer(
        &self,
        mut state: MutexGuard<'_, State>,
        asked: Asked,
        retries: u32,
        window_pages: u32,
        batch: &mut Batch,
    ) {
        let (ctx_id, cookie) = (asked.fault.ctx_id.get(), asked.fault.cookie.get());
        let as_of = self.device.accepted(ctx_id);
        let Some((window, pid)) = state.window(&asked, window_pages) else {
            state.ledger.counts().unowned += 1;
            return;
        };
        drop(state);
        let (code, number) = match window.is_empty() {
            true => (Answer::Invalid, PAGE_RESP_INVALID),
            false => (Answer::Success, PAGE_RESP_SUCCESS),
        };
        let runs = window.runs(as_of);
        let pending = PendingAnswer {
            asked,
            code,
            pages: runs.iter().map(|run| run.pages.get()).sum(),
            runs: u32::try_from(runs.len()).unwrap_or(u32::MAX),
            retries,
            pid,
            sent: batch.sent.get_or_insert_default().clone(),
        };
        // A window has no more runs than fit.
        if let Ok(posted) = SvmDevice::page_response(self.token(), (ctx_id, cookie), number, &runs) {
            batch.answers.push((pending, posted));
        }
    }

    /// Sends a batch, but not what is for contexts that have ended meanwhile.
    pub(super) fn send(&self, batch: Batch) {
        let Batch { answers, sent: Some(sent) } = batch else { return };
        let mut commands = Vec::with_capacity(answers.len());
        let mut state = self.lock();
        for (pending, posted) in answers {
            if state.serves(pending.asked.fault.ctx_id.get()).is_none() {
                state.ledger.counts().unowned += 1;
                continue;
            }
            state.answers.insert(posted.token, pending);
            commands.push(posted);
        }
        drop(state);
        let tokens: Vec<u64> = commands.iter().map(|posted| posted.token).collect();
        if self.device.post_all(commands).is_err() {
            // The device is lost; the pump hears of it too and ends everything.
            let mut state = self.lock();
            for token in tokens {
                state.answers.remove(&token);
            }
        }
        sent.get_or_init(Instant::now);
    }

    /// The device's answer to something that was posted: a fault's answer or a HELLO.
    pub(super) fn on_completion(&self, completion: &Completion, batch: &mut Batch) {
        let status = completion.response.status();
        let pending = self.lock().answers.remove(&completion.token);
        let Some(pending) = pending else {
            return self.on_hello_completion(completion);
        };
        if status == -EAGAIN {
            let mut state = self.lock();
            state.ledger.counts().retries += 1;
            let retries = pending.retries + 1;
            let window = if retries < MAX_RETRIES { self.options.fault_around_pages } else { 0 };
            return self.answer(state, pending.asked, retries, window, batch);
        }
        // The device does not take these pages and never will, and the job waits (PROTOCOL 4.4): it must end.
        if pending.code == Answer::Success && matches!(-status, EFAULT | EEXIST | ENOSPC) {
            return self.answer(self.lock(), pending.asked, pending.retries, 0, batch);
        }
        let fault = &pending.asked.fault;
        let sent = pending.sent.get().copied().unwrap_or_else(Instant::now);
        let took = sent.saturating_duration_since(pending.asked.found);
        let entry = LedgerEntry {
            index: 0,
            ctx_id: fault.ctx_id.get(),
            cookie: fault.cookie.get(),
            dev_id: fault.dev_id.get(),
            vm_id: fault.vm_id.get(),
            asid: fault.asid.get(),
            gpu_addr: fault.addr.get(),
            cpu_addr: fault.cpu_addr.get(),
            perm: fault.perm.get(),
            code: pending.code,
            pages: pending.pages,
            runs: pending.runs,
            status,
            retries: pending.retries,
            pid: pending.pid,
            answer_ns: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
        };
        self.lock().ledger.record(entry);
    }

    /// Holds back the answers to faults from now on, until [`Self::release_answers`].
    pub fn hold_answers(&self) {
        self.lock().held.get_or_insert_default();
    }

    /// Lets held answers go and holds none back any more. Returns how many there were.
    pub fn release_answers(&self) -> usize {
        let held = self.lock().held.take().unwrap_or_default();
        let count = held.len();
        for some in held.chunks(MAX_BATCH) {
            let mut batch = Batch::default();
            for asked in some {
                self.answer(self.lock(), *asked, 0, self.options.fault_around_pages, &mut batch);
            }
            self.send(batch);
        }
        count
    }

    /// Counts of faults and answers, and the newest answers if `with_entries`.
    pub fn ledger(&self, with_entries: bool) -> LedgerReport {
        let state = self.lock();
        let mut report = state.ledger.report(with_entries);
        report.held = state.held.as_ref().map_or(0, |held| held.len() as u64);
        report.pending = state.answers.len() as u64 + report.held;
        report
    }
}

impl State {
    /// All that a fault asks for, once its last record is here. Records of a context come in order and those of a group
    /// follow each other; what was begun and is not ended was dropped by the device.
    fn whole(&mut self, fault: FaultRecord, found: Instant) -> Option<Asked> {
        let (cookie, page) = (fault.cookie.get(), fault.cpu_addr.get());
        let is_last = fault.flags.get() & FAULT_LAST_PAGE != 0;
        let begun = self.contexts.get_mut(&fault.ctx_id.get()).and_then(|context| {
            let begun = context.group.take().filter(|(of, _)| *of == cookie);
            if !is_last {
                context.group = Some(begun.unwrap_or((cookie, page)));
            }
            begun
        });
        let bytes = match fault.flags.get() & FAULT_PREFETCH {
            0 => PAGE_SIZE,
            _ => u64::from(fault.length_hint.get()).max(PAGE_SIZE),
        };
        let start = begun.map_or(page, |(_, first)| first);
        is_last.then(|| Asked { fault, start, end: page.saturating_add(bytes), found })
    }

    /// A context whose faults are answered.
    fn serves(&self, ctx_id: u32) -> Option<&Context> {
        self.contexts.get(&ctx_id).filter(|context| context.state != ContextState::Retiring)
    }

    /// Pages for a fault, and the process that they are of.
    fn window(&self, asked: &Asked, window_pages: u32) -> Option<(Window, i32)> {
        let context = self.serves(asked.fault.ctx_id.get())?;
        Some((context.arenas.window(asked.start..asked.end, window_pages), context.owner.pid))
    }
}
