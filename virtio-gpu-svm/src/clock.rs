//! A guest's own time: it passes only while the guest's rings run, so that a pause of any length costs no deadline.

use crate::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A stopwatch that runs from the start.
pub struct RunClock {
    /// Guards the two numbers; nothing is called or locked under it.
    state: Mutex<State>,
}

struct State {
    ran: Duration,
    since: Option<Instant>,
}

impl RunClock {
    /// A clock at 0 that runs.
    pub fn new() -> Self {
        Self { state: Mutex::new(State { ran: Duration::ZERO, since: Some(Instant::now()) }) }
    }
    /// Time that has passed on it.
    pub fn now(&self) -> Duration {
        self.lock().now()
    }
    /// Stops it, if it runs.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.ran = state.now();
        state.since = None;
    }
    /// Lets it run, if it is stopped.
    pub fn start(&self) {
        self.lock().since.get_or_insert_with(Instant::now);
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RunClock {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn now(&self) -> Duration {
        self.ran.saturating_add(self.since.map_or(Duration::ZERO, |since| since.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_clock_stands_still_and_goes_on() {
        let clock = RunClock::new();
        clock.stop();
        let at = clock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), at);
        clock.start();
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.now() >= at + Duration::from_millis(2));
    }
}
