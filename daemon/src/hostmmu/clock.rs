//! How long the job at the front of a ring has been on its thread: the time that a limit of jobs is about.
//!
//! It runs while nothing but the job itself holds the job up: not behind other jobs of its ring, not before its thread
//! is there, not while it is parked at a fault, and not while its VM is frozen. Owned by a ring, under its VM's lock.

use std::time::{Duration, Instant};

/// A clock that can be halted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    spent: Duration,
    since: Option<Instant>,
}

impl Clock {
    /// Lets it run, or halts it.
    pub fn set(&mut self, runs: bool, now: Instant) {
        match self.since {
            None if runs => self.since = Some(now),
            Some(_) if !runs => *self = Self { spent: self.spent(now), since: None },
            _ => {}
        }
    }

    /// When it will show `limit`, if it is not halted until then.
    pub fn due(&self, limit: Duration) -> Option<Instant> {
        self.since?.checked_add(limit.saturating_sub(self.spent))
    }

    fn spent(&self, now: Instant) -> Duration {
        let running = self.since.map(|since| now.saturating_duration_since(since));
        self.spent.saturating_add(running.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn halts_do_not_count() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut clock = Clock::default();
        clock.set(true, at(0));
        clock.set(true, at(2));
        assert_eq!(clock.due(LIMIT), Some(at(10)));
        clock.set(false, at(3));
        clock.set(false, at(50));
        assert_eq!(clock.due(LIMIT), None);
        clock.set(true, at(100));
        assert_eq!(clock.due(LIMIT), Some(at(107)));
    }

    #[test]
    fn a_spent_clock_is_due_at_once() {
        let start = Instant::now();
        let mut clock = Clock::default();
        clock.set(true, start);
        clock.set(false, start + LIMIT + LIMIT);
        let later = start + LIMIT + LIMIT + LIMIT;
        clock.set(true, later);
        assert_eq!(clock.due(LIMIT), Some(later));
    }
}
