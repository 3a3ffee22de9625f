//! A fault's way through the agent: looked up in its context's table, answered, and retried when the answer raced with
//! an invalidation. Runs on the pump's thread, or on the one that lets held answers go; never waits.

use super::ledger::{Answer, LedgerEntry, LedgerReport};
use super::{Agent, ContextState, State};
use crate::driver::Completion;
use virtio_gpu_svm::protocol::control::{PAGE_RESP_INVALID, PAGE_RESP_SUCCESS, PageRun};
use virtio_gpu_svm::protocol::errno::{EAGAIN, EEXIST, EFAULT, ENOSPC};
use virtio_gpu_svm::protocol::event::FaultRecord;

/// After so many races the fault is given up: each retry needs a new invalidation of the same 2 MiB, so a process that
/// gets here is doing it to itself.
const MAX_RETRIES: u32 = 1000;

/// An answer that the device has not taken yet.
pub(super) struct PendingAnswer {
    fault: FaultRecord,
    code: Answer,
    pages: u32,
    runs: u32,
    retries: u32,
    pid: i32,
}

impl Agent {
    pub(super) fn on_fault(&self, fault: FaultRecord) {
        let mut state = self.lock();
        state.ledger.counts().faults += 1;
        if let Some(context) = state.contexts.get_mut(&fault.ctx_id.get()) {
            context.faults += 1;
        }
        if let Some(held) = &mut state.held {
            held.push(fault);
            return;
        }
        drop(state);
        self.answer(fault, 0, self.options.fault_around_pages);
    }

    /// Translates and answers; a fault whose context is ending needs no answer, the device drops it. The table is read
    /// after the sequence, under one lock, so `as_of` is never too new. A window of 0 pages refuses the access.
    fn answer(&self, fault: FaultRecord, retries: u32, window_pages: u32) {
        let token = self.token();
        let mut state = self.lock();
        let as_of = self.device.accepted(fault.ctx_id.get());
        let runs = state.pages_for(&fault, window_pages, as_of);
        let code = if runs.is_empty() { Answer::Invalid } else { Answer::Success };
        let context = state.contexts.get(&fault.ctx_id.get());
        let living = context.filter(|context| context.state != ContextState::Retiring);
        let Some(pid) = living.map(|context| context.owner.pid) else {
            state.ledger.counts().unowned += 1;
            return;
        };
        let pending = PendingAnswer {
            fault,
            code,
            pages: runs.iter().map(|run| run.pages.get()).sum(),
            runs: u32::try_from(runs.len()).unwrap_or(u32::MAX),
            retries,
            pid,
        };
        state.answers.insert(token, pending);
        drop(state);
        let number = match code {
            Answer::Success => PAGE_RESP_SUCCESS,
            Answer::Invalid => PAGE_RESP_INVALID,
        };
        let (ctx_id, cookie) = (fault.ctx_id.get(), fault.cookie.get());
        if self.device.post_page_response(token, ctx_id, cookie, number, &runs).is_err() {
            // The device is lost; the pump hears of it too and ends everything.
            self.lock().answers.remove(&token);
        }
    }

    /// The device's answer to something that was posted: a fault's answer or a HELLO.
    pub(super) fn on_completion(&self, completion: &Completion) {
        let status = completion.response.status();
        let pending = self.lock().answers.remove(&completion.token);
        let Some(pending) = pending else {
            return self.on_hello_completion(completion);
        };
        if status == -EAGAIN {
            self.lock().ledger.counts().retries += 1;
            let retries = pending.retries + 1;
            let window = if retries < MAX_RETRIES { self.options.fault_around_pages } else { 0 };
            return self.answer(pending.fault, retries, window);
        }
        // The device does not take these pages and never will, and the job waits (PROTOCOL 4.4): it must end.
        if pending.code == Answer::Success && matches!(-status, EFAULT | EEXIST | ENOSPC) {
            return self.answer(pending.fault, pending.retries, 0);
        }
        let fault = &pending.fault;
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
        for fault in held {
            self.answer(fault, 0, self.options.fault_around_pages);
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
    fn pages_for(&self, fault: &FaultRecord, window_pages: u32, as_of: u64) -> Vec<PageRun> {
        let context = self.contexts.get(&fault.ctx_id.get());
        let Some(context) = context.filter(|context| context.state != ContextState::Retiring) else {
            return Vec::new();
        };
        context.arenas.window(fault.cpu_addr.get(), window_pages, as_of)
    }
}
