//! The event that ends the framework's queue thread.
//!
//! The framework takes the readable end by its number, registers it, and never closes it: one file descriptor per
//! session would be lost. So the number is kept here and closed once the queue thread has ended.

#![expect(
    unsafe_code,
    reason = "a descriptor that the framework gave up by number is taken back into an owner"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::PoisonError;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Makes the exit event and remembers what the framework will leak of it.
#[derive(Debug, Default)]
pub struct ExitEvent {
    /// Guards the number; a section is one move.
    consumer: Mutex<Option<RawFd>>,
}

impl ExitEvent {
    /// The pair that [`VhostUserBackend::exit_event`](vhost_user_backend::VhostUserBackend::exit_event) returns. Called
    /// by the framework once per queue thread, of which there is one. `None` only when the host is out of descriptors;
    /// the caller must then not start.
    pub fn make(&self) -> Option<(EventConsumer, EventNotifier)> {
        let mut slot = self.consumer.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return None;
        }
        let pair = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()?;
        *slot = Some(pair.0.as_raw_fd());
        Some(pair)
    }

    /// Whether the event was made.
    pub fn is_made(&self) -> bool {
        self.consumer.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Closes what the framework left open. To be called when its queue thread has ended, or was never begun.
    pub fn close(&self) {
        let Some(raw) = self.consumer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // SAFETY: `raw` came from a consumer that was handed to the framework, which turned it into a number by
        // `into_raw_fd` and keeps no owner (vhost-user-backend 0.24, VringEpollHandler::new). Its queue thread, the
        // only user of the epoll instance that knows the number, has ended. Nobody else closes it, and it is taken
        // from the slot only once, so the number still names this event and this is its only owner.
        let owned = unsafe { OwnedFd::from_raw_fd(raw) };
        drop(owned);
    }
}
