//! The agent's own threads. The pump takes what the device says, and asks for a sign of life now and then; records are
//! acted on by the pump and by helpers, each context's by one at a time ([`super::lanes`]).
//!
//! A daemon that has lost this guest's state, or has died, need not say so by itself, and processes that only wait for
//! their jobs ask it nothing. So while there are contexts the pump posts a small command every now and then: the answer
//! names the daemon's epoch, and no answer at all means that the device is lost.

use super::answer::Batch;
use super::lanes::Record;
use super::{Agent, Context, ContextState};
use crate::driver::{self, Event};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_LOST, EVENT_CONTEXT_RETIRED, EVENT_QUIET, NoticeRecord};
use zerocopy::IntoBytes;

/// How long one turn of the pump waits; bounds how late [`Agent::stop`] is noticed.
const PUMP_TIMEOUT: Duration = Duration::from_millis(100);
/// A device that is silent for so many pulses is lost. Commands never wait in the device.
const SILENT_PULSES: u32 = 30;

/// The question whether the device is alive.
struct Pulse {
    /// When it was asked last.
    asked: Instant,
    /// Names the question that waits for its answer.
    waiting: Option<u64>,
}

/// Whatever ends one of the threads, be it a panic: nobody may wait for it any more.
struct Ending<'a>(&'a Agent);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.lanes.end();
        self.0.device.close();
        if !self.0.stopping.load(Ordering::Acquire) {
            self.0.on_device_failed();
        }
    }
}

impl Agent {
    pub(super) fn pump(&self) {
        let _ending = Ending(self);
        let mut pulse = Pulse { asked: Instant::now(), waiting: None };
        while !self.stopping.load(Ordering::Acquire) {
            if self.turn(&mut pulse).is_err() {
                return;
            }
        }
    }

    /// A helper of the pump.
    pub(super) fn help(&self) {
        let _ending = Ending(self);
        while let Some(lane) = self.lanes.wait() {
            self.serve(lane, &mut Batch::default());
        }
    }

    fn turn(&self, pulse: &mut Pulse) -> driver::Result<()> {
        let idle = PUMP_TIMEOUT.min(self.options.pulse);
        let pump = self.device.pump(if self.lanes.are_ready() { Duration::ZERO } else { idle })?;
        let mut batch = Batch::default();
        for completion in pump.completions {
            if pulse.waiting == Some(completion.token) {
                pulse.waiting = None;
            } else {
                self.on_completion(&completion, &mut batch);
            }
        }
        // After the answers: one of them may be that to HELLO, and another one newer than it.
        if pump.foreign_epoch.is_some() {
            self.on_epoch_lost();
        }
        let (quiet, others): (Vec<_>, Vec<_>) =
            pump.events.into_iter().partition(|(_, event)| is_quiet(event));
        for (_, event) in quiet {
            if let Event::Notice(notice) = event {
                self.on_quiet(notice.value.get());
            }
        }
        // Without a record none was found, and what was given back may still be worth a helper.
        let found = pump.found.into_iter().cycle();
        let records =
            others.into_iter().zip(found).map(|((epoch, event), found)| Record { epoch, found, event });
        self.lanes.add(records.collect(), self.helpers());
        // No more than that before the device is heard again: somebody else's fault may be there by now.
        while let Some(lane) = self.lanes.take() {
            self.serve(lane, &mut batch);
            if !self.lanes.are_full() {
                break;
            }
        }
        self.send(batch);
        self.feel(pulse)
    }

    /// Acts on some records of a lane, and of others that are ready while they lead to little, and sends what they lead to
    /// before it gives them back.
    fn serve(&self, lane: (u32, VecDeque<Record>), batch: &mut Batch) {
        let mut lanes = Vec::new();
        let mut next = Some(lane);
        while let Some((ctx_id, records)) = next {
            lanes.push(ctx_id);
            for record in records {
                self.on_event(&record, batch);
            }
            next = if batch.is_full() { None } else { self.lanes.take() };
        }
        self.send(std::mem::take(batch));
        self.lanes.give_back(&lanes);
    }

    fn feel(&self, pulse: &mut Pulse) -> driver::Result<()> {
        let silent_for = pulse.asked.elapsed();
        if pulse.waiting.is_some() {
            let lost = silent_for > self.options.pulse.saturating_mul(SILENT_PULSES);
            return if lost { Err(driver::Error::Broken) } else { Ok(()) };
        }
        if silent_for < self.options.pulse || self.lock().contexts.is_empty() {
            return Ok(());
        }
        let token = self.token();
        *pulse = Pulse { asked: Instant::now(), waiting: Some(token) };
        self.device.post_get_device(token, 0)
    }

    fn on_event(&self, record: &Record, batch: &mut Batch) {
        if record.epoch != self.device.epoch() {
            return;
        }
        match &record.event {
            Event::Fault(fault) => self.on_fault(*fault, record.found, batch),
            Event::Job(job) => self.forward(job.ctx_id.get(), job.as_bytes()),
            Event::Notice(notice) => self.on_notice(notice),
        }
    }

    fn on_notice(&self, notice: &NoticeRecord) {
        let ctx_id = notice.ctx_id.get();
        match notice.kind.get() {
            EVENT_CONTEXT_RETIRED => {
                let mut state = self.lock();
                let retiring = |context: &Context| context.state == ContextState::Retiring;
                if state.contexts.get(&ctx_id).is_some_and(retiring) {
                    // Before its number may be another one's.
                    self.device.forget(ctx_id);
                    let mut context = state.end_context(ctx_id);
                    drop(state);
                    let arenas = context.as_mut().map(|context| context.arenas.take_all());
                    self.release(arenas.into_iter().flatten());
                }
            }
            EVENT_CONTEXT_LOST => {
                // Of a GPU VM that is lost only its process need know.
                let whole = notice.value.get() == 0;
                if let Some(context) = self.lock().contexts.get_mut(&ctx_id).filter(|_| whole) {
                    context.lost = notice.status.get();
                }
                self.forward(ctx_id, notice.as_bytes());
            }
            // INVAL_DONE was noted by the driver; other kinds are for later versions.
            _ => {}
        }
    }

    pub(super) fn helpers(&self) -> usize {
        self.options.serving_threads.saturating_sub(1)
    }

    fn forward(&self, ctx_id: u32, record: &[u8]) {
        let sink = self.lock().contexts.get(&ctx_id).map(|context| context.sink.clone());
        if let (Some(sink), Ok(record)) = (sink, record.try_into()) {
            sink.push(record);
        }
    }
}

/// Of the driver's life, not of a context; it has no order with the records of any.
fn is_quiet(event: &Event) -> bool {
    matches!(event, Event::Notice(notice) if notice.kind.get() == EVENT_QUIET)
}
