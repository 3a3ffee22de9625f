//! Time: where it comes from, and a guest's own, which passes only while the guest's rings run, so that a pause of any
//! length costs no deadline.
//!
//! Nothing in the core asks the system for the time but [`Monotonic`], which a [`crate::host::Host`] has unless it is
//! given another source: a VMM's virtual time, or one that a test moves ([`Manual`]).

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where time comes from.
pub trait Source: Send + Sync {
    /// What has passed since some moment that stays the same. Never goes back. Called under locks: it waits for nothing.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock, from 0 on.
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Source for Monotonic {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A clock that stands still but when it is moved.
#[derive(Default)]
pub struct Manual(AtomicU64);

impl Manual {
    /// Moves it on.
    pub fn advance(&self, by: Duration) {
        let nanos = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        let add = |now: u64| Some(now.saturating_add(nanos));
        // The update never refuses.
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok();
    }
}

impl Source for Manual {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// A stopwatch that runs from the start.
pub struct RunClock {
    source: Arc<dyn Source>,
    /// Guards the two numbers; nothing is locked under it, and nothing called but the source.
    state: Mutex<State>,
}

struct State {
    ran: Duration,
    since: Option<Duration>,
}

impl RunClock {
    /// A clock at 0 that runs.
    pub fn new(source: Arc<dyn Source>) -> Self {
        let since = Some(source.now());
        Self { source, state: Mutex::new(State { ran: Duration::ZERO, since }) }
    }
    /// Time that has passed on it.
    pub fn now(&self) -> Duration {
        self.lock().at(self.source.now())
    }
    /// Stops it, if it runs.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.ran = state.at(self.source.now());
        state.since = None;
    }
    /// Lets it run, if it is stopped.
    pub fn start(&self) {
        self.lock().since.get_or_insert_with(|| self.source.now());
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn at(&self, now: Duration) -> Duration {
        let running = self.since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        self.ran.saturating_add(running)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_clock_stands_still_and_goes_on() {
        let source = Arc::new(Manual::default());
        source.advance(Duration::from_secs(5));
        let clock = RunClock::new(Arc::clone(&source) as Arc<dyn Source>);
        source.advance(Duration::from_secs(1));
        clock.stop();
        source.advance(Duration::from_secs(100));
        assert_eq!(clock.now(), Duration::from_secs(1));
        clock.start();
        clock.start();
        source.advance(Duration::from_secs(2));
        assert_eq!(clock.now(), Duration::from_secs(3));
    }

    #[test]
    fn system_clock_goes_on() {
        let source = Monotonic::default();
        let at = source.now();
        while source.now() == at {}
        assert!(source.now() > at);
    }
}
