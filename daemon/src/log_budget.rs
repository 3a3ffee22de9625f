//! How many lines of the log somebody may cause: so many at once, and again as many in each minute. What is left out is
//! counted, and told in one line as soon as there is room for that and for the line which follows it.
//!
//! One for each guest, over all its sessions, for what the guest, its driver and its VMM cause; one for the clients of each
//! control socket, and one for the guests that they add and remove; one for each device that has processes of its own; one
//! for panics.

use crate::rate::Rate;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use virtio_gpu_svm::quota::LimitStatus;

struct Credit {
    rate: Rate,
    /// Lines left out since the last one that was written.
    untold: u64,
}

/// See the module.
pub struct LogBudget {
    about: String,
    /// Guards the credit; a section is a few assignments.
    credit: Mutex<Credit>,
}

impl LogBudget {
    /// A budget of so many lines a minute, at least 1; `about` says whose, for people.
    pub fn new(about: String, lines: u32) -> Self {
        Self::begin(about, lines, Instant::now())
    }
    fn begin(about: String, lines: u32, now: Instant) -> Self {
        Self { about, credit: Mutex::new(Credit { rate: Rate::new(lines, now), untold: 0 }) }
    }

    /// Has a line written, if there is room.
    pub fn log(&self, write: impl FnOnce()) {
        if let Some(untold) = self.admit(Instant::now()) {
            self.tell(untold);
            write();
        }
    }

    /// How much of it is used.
    pub fn status(&self) -> LimitStatus {
        self.status_at(Instant::now())
    }
    fn status_at(&self, now: Instant) -> LimitStatus {
        self.lock().rate.status("log_lines", now)
    }

    /// Takes a line's share, and returns how many were left out before it; none if it is left out too.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut credit = self.lock();
        // The line that tells of those left out is one as well.
        let lines = if credit.untold > 0 { 2 } else { 1 };
        if credit.rate.take(lines, now).is_err() {
            credit.untold = credit.untold.saturating_add(1);
            return None;
        }
        Some(std::mem::take(&mut credit.untold))
    }

    fn tell(&self, untold: u64) {
        if untold > 0 {
            tracing::warn!("{untold} lines about {} suppressed", self.about);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Credit> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LogBudget {
    fn drop(&mut self) {
        let untold = std::mem::take(&mut self.lock().untold);
        self.tell(untold);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn burst_is_written_and_the_rest_is_counted() {
        let start = Instant::now();
        let budget = LogBudget::begin("x".to_owned(), 3, start);
        let admitted: Vec<_> = (0..6).map(|_| budget.admit(start)).collect();
        assert_eq!(admitted, [Some(0), Some(0), Some(0), None, None, None]);
        assert_eq!(budget.admit(start + seconds(20)), None, "one line has room, two have not");
        assert_eq!(budget.admit(start + seconds(40)), Some(4));
        assert_eq!(budget.admit(start + seconds(60)), Some(0));
        let status = budget.status_at(start + seconds(60));
        assert_eq!((status.used, status.peak, status.limit, status.refused), (3, 3, 3, 4));
        assert_eq!(budget.status_at(start + seconds(160)).used, 0);
    }

    #[test]
    fn flood_writes_no_more_than_its_lines_a_minute() {
        let start = Instant::now();
        let budget = LogBudget::begin("x".to_owned(), 6, start);
        let mut written = 0;
        for tenth in 0..10 * 60 * 10 {
            let untold = budget.admit(start + Duration::from_millis(100) * tenth);
            written += untold.map_or(0, |untold| 1 + u32::from(untold > 0));
        }
        assert!((60..=66).contains(&written), "{written} lines in ten minutes");
    }
}
