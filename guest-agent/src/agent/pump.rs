//! The agent's own thread: takes what the device says and hands it on, and asks for a sign of life now and then.
//!
//! A daemon that has lost this guest's state, or has died, need not say so by itself, and processes that only wait for
//! their jobs ask it nothing. So while there are contexts the pump posts a small command every now and then: the answer
//! names the daemon's epoch, and no answer at all means that the device is lost.

use super::{Agent, Context, ContextState};
use crate::driver::{self, Event};
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

/// Whatever ends the pump, be it a panic: nobody may wait for it any more.
struct Ending<'a>(&'a Agent);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
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

    fn turn(&self, pulse: &mut Pulse) -> driver::Result<()> {
        let pump = self.device.pump(PUMP_TIMEOUT.min(self.options.pulse))?;
        for completion in pump.completions {
            if pulse.waiting == Some(completion.token) {
                pulse.waiting = None;
            } else {
                self.on_completion(&completion);
            }
        }
        // After the answers: one of them may be that to HELLO, and another one newer than it.
        if pump.foreign_epoch.is_some() {
            self.on_epoch_lost();
        }
        for (epoch, event) in pump.events {
            self.on_event(epoch, &event);
        }
        self.feel(pulse)
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

    fn on_event(&self, epoch: u64, event: &Event) {
        if let Event::Notice(notice) = event
            && notice.kind.get() == EVENT_QUIET
        {
            return self.on_quiet(notice.value.get());
        }
        if epoch != self.device.epoch() {
            return;
        }
        match event {
            Event::Fault(fault) => self.on_fault(*fault),
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
                    let arenas = state.contexts.remove(&ctx_id).map(|mut context| context.take_arenas());
                    drop(state);
                    self.device.forget_progress(ctx_id);
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

    fn forward(&self, ctx_id: u32, record: &[u8]) {
        let sink = self.lock().contexts.get(&ctx_id).map(|context| context.sink.clone());
        if let (Some(sink), Ok(record)) = (sink, record.try_into()) {
            sink.push(record);
        }
    }
}
