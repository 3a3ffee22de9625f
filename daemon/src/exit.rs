//! The event that ends the framework's queue thread.
//!
//! Made before the framework is: one that gets none waits for its queue thread for ever when it is dropped. It takes the
//! readable end by its number, registers it, and never closes it: one file descriptor per session would be lost. So the
//! number is kept here and closed once the queue thread has ended.

#![expect(
    unsafe_code,
    reason = "a descriptor that the framework gave up by number is taken back into an owner"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::PoisonError;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Both ends until the framework takes them, then the number of the one that it will leak.
enum State {
    Made(EventConsumer, EventNotifier),
    Taken(RawFd),
    Closed,
}

/// The exit event of one session.
pub struct ExitEvent {
    /// Guards where the ends are; a section is one move.
    state: Mutex<State>,
}

impl ExitEvent {
    /// Makes the event.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> std::io::Result<Self> {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { state: Mutex::new(State::Made(consumer, notifier)) })
    }

    /// The pair that [`VhostUserBackend::exit_event`](vhost_user_backend::VhostUserBackend::exit_event) returns. Called
    /// by the framework once per queue thread, of which there is one; `None` if it is called again.
    pub fn take(&self) -> Option<(EventConsumer, EventNotifier)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *state, State::Closed) {
            State::Made(consumer, notifier) => {
                *state = State::Taken(consumer.as_raw_fd());
                Some((consumer, notifier))
            }
            other => {
                *state = other;
                None
            }
        }
    }

    /// Closes what the framework left open. To be called when its queue thread has ended, or was never begun.
    pub fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Taken(raw) = std::mem::replace(&mut *state, State::Closed) else { return };
        // SAFETY: `raw` came from a consumer that was handed to the framework, which turned it into a number by
        // `into_raw_fd` and keeps no owner (vhost-user-backend 0.24, VringEpollHandler::new). Its queue thread, the
        // only user of the epoll instance that knows the number, has ended. Nobody else closes it, and it is taken
        // from the state only once, so the number still names this event and this is its only owner.
        let owned = unsafe { OwnedFd::from_raw_fd(raw) };
        drop(owned);
    }
}
