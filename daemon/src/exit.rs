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

/// An exit event made before the framework asks for it, which waits for ever where it gets none, and what the framework
/// will leak of it.
#[derive(Debug)]
pub struct ExitEvent {
    /// Guards the pair until the framework has it; a section is one move.
    pair: Mutex<Option<(EventConsumer, EventNotifier)>>,
    /// Guards the number; a section is one move.
    consumer: Mutex<Option<RawFd>>,
}

impl ExitEvent {
    /// Makes one.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        let pair = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { pair: Mutex::new(Some(pair)), consumer: Mutex::new(None) })
    }

    /// The pair that [`VhostUserBackend::exit_event`](vhost_user_backend::VhostUserBackend::exit_event) returns. Called
    /// by the framework once per queue thread, of which there is one; `None` after that.
    pub fn take(&self) -> Option<(EventConsumer, EventNotifier)> {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        *self.consumer.lock().unwrap_or_else(PoisonError::into_inner) = Some(pair.0.as_raw_fd());
        Some(pair)
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
