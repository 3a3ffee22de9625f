//! Lives of the driver: the first HELLO, and what follows when the daemon has lost this guest's state.

use super::{Agent, Context, Error, Result, State};
use crate::driver::{Completion, new_incarnation};
use std::sync::atomic::Ordering;
use virtio_gpu_svm::protocol::control::HelloResp;
use virtio_gpu_svm::protocol::errno::EPIPE;
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_LOST, NoticeRecord};
use zerocopy::IntoBytes;

/// Where a life of the driver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// HELLO was sent; there is no answer yet, or something of an earlier life is still in use.
    Opening {
        incarnation: u64,
        /// Token of the HELLO; 0: it was called, not posted.
        token: u64,
        /// HELLO was answered.
        answered: bool,
        /// The incarnation that the last QUIET record named.
        quiet: u64,
    },
    /// Contexts may be made.
    Open { incarnation: u64 },
    /// The device is lost for good.
    Failed { status: i32 },
}

impl Life {
    pub(super) fn begin(token: u64) -> Self {
        Life::Opening { incarnation: new_incarnation(), token, answered: false, quiet: 0 }
    }

    pub(super) fn incarnation(self) -> u64 {
        match self {
            Life::Opening { incarnation, .. } | Life::Open { incarnation } => incarnation,
            Life::Failed { .. } => 0,
        }
    }
}

impl Agent {
    /// The answer to HELLO.
    pub(super) fn on_hello(&self, hello: &HelloResp) {
        let (status, retiring) = (hello.resp.status.get(), hello.retiring.get());
        self.num_devices.store(hello.num_devices.get(), Ordering::Release);
        let mut state = self.lock();
        let Life::Opening { incarnation, token, quiet, .. } = state.life else { return };
        if status != 0 {
            state.life = Life::Failed { status };
        } else if retiring == 0 || quiet == incarnation {
            return self.opened(state, incarnation);
        } else {
            state.life = Life::Opening { incarnation, token, answered: true, quiet };
        }
        drop(state);
        self.life_changed.notify_all();
    }

    /// An answer that is no fault's: that to HELLO, if it bears its token. Others are of an earlier life, and must not
    /// be taken for the word that this one is quiet.
    pub(super) fn on_hello_completion(&self, completion: &Completion) {
        if !matches!(self.lock().life, Life::Opening { token, .. } if token == completion.token) {
            return;
        }
        // A short answer has no count; only a QUIET record helps then.
        let short = |_| HelloResp {
            resp: completion.response.head,
            retiring: u32::MAX.into(),
            ..HelloResp::default()
        };
        self.on_hello(&completion.response.hello().unwrap_or_else(short));
    }

    /// QUIET may overtake the answer to its HELLO.
    pub(super) fn on_quiet(&self, value: u64) {
        let mut state = self.lock();
        let Life::Opening { incarnation, token, answered, .. } = state.life else { return };
        if answered && value == incarnation {
            return self.opened(state, incarnation);
        }
        state.life = Life::Opening { incarnation, token, answered, quiet: value };
    }

    /// Nothing of earlier lives is in use any more: their memory may go.
    fn opened(&self, mut state: std::sync::MutexGuard<'_, State>, incarnation: u64) {
        state.life = Life::Open { incarnation };
        let orphans = std::mem::take(&mut state.orphans);
        drop(state);
        self.release(orphans);
        self.life_changed.notify_all();
    }

    /// The daemon has lost this guest's state: every context is gone, and a new life begins. Also when it is lost again
    /// before all was quiet; but not while HELLO is on its way, to which older answers still name other epochs.
    pub(super) fn on_epoch_lost(&self) {
        let token = self.token();
        let mut state = self.lock();
        if matches!(state.life, Life::Opening { answered: false, .. } | Life::Failed { .. }) {
            return;
        }
        state.life = Life::begin(token);
        let incarnation = state.life.incarnation();
        let lost = state.drop_contexts();
        drop(state);
        self.tell_lost(lost);
        if self.device.post_hello(token, incarnation).is_err() {
            self.on_device_failed();
        }
    }

    /// The device cannot be driven any more. Memory stays where it is: only the keeper can tell when it is safe.
    pub(super) fn on_device_failed(&self) {
        let mut state = self.lock();
        state.life = Life::Failed { status: -EPIPE };
        let lost = state.drop_contexts();
        drop(state);
        self.tell_lost(lost);
        self.life_changed.notify_all();
    }

    fn tell_lost(&self, lost: Vec<(u32, Context)>) {
        for (ctx_id, context) in lost {
            self.device.forget(ctx_id);
            let record = NoticeRecord {
                kind: EVENT_CONTEXT_LOST.into(),
                ctx_id: ctx_id.into(),
                status: (-EPIPE).into(),
                ..NoticeRecord::default()
            };
            if let Ok(record) = record.as_bytes().try_into() {
                context.sink.push(record);
            }
        }
    }

    /// Ends with an error unless contexts may be made.
    ///
    /// # Errors
    /// [`Error::NotOpen`].
    pub fn check_open(&self) -> Result<()> {
        if matches!(self.lock().life, Life::Open { .. }) { Ok(()) } else { Err(Error::NotOpen) }
    }
}

impl State {
    /// Removes all contexts; their memory becomes orphaned.
    fn drop_contexts(&mut self) -> Vec<(u32, Context)> {
        self.answers.clear();
        if let Some(held) = &mut self.held {
            held.clear();
        }
        let mut lost: Vec<(u32, Context)> = self.contexts.drain().collect();
        for (ctx_id, context) in &mut lost {
            self.keys.end(*ctx_id, std::mem::take(&mut context.lease));
            self.orphans.extend(context.arenas.take_all());
        }
        lost
    }
}
