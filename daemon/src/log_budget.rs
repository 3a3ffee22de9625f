//! How many lines of the log somebody may cause: so many at once, and again as many in each minute. What is left out is
//! counted, and told in one line as soon as there is room for that and for the line which follows it.
//!
//! One for each guest, over all its sessions, for what the guest, its driver and its VMM cause; one for the clients of each
//! control socket, and one for the guests that they add and remove; one for each device that has processes of its own; one
//! for panics.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_gpu_svm::quota::LimitStatus;

/// In which a budget is whole again.
const WINDOW: Duration = Duration::from_secs(60);

/// Lines that may be written, in time: a line takes its share of a minute.
struct Credit {
    left: Duration,
    since: Instant,
    /// Lines left out since the last one that was written.
    untold: u64,
    left_out: u64,
    peak: u64,
}

/// See the module.
pub struct LogBudget {
    about: String,
    lines: u32,
    /// Guards the credit; a section is a few assignments.
    credit: Mutex<Credit>,
}

impl LogBudget {
    /// A budget of so many lines a minute, at least 1; `about` says whose, for people.
    pub fn new(about: String, lines: u32) -> Self {
        let credit = Credit { left: WINDOW, since: Instant::now(), untold: 0, left_out: 0, peak: 0 };
        Self { about, lines: lines.max(1), credit: Mutex::new(credit) }
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
        let mut credit = self.lock();
        credit.refill(now);
        LimitStatus {
            name: "log_lines",
            scope: "guest",
            used: self.used(&credit),
            peak: credit.peak,
            limit: self.lines.into(),
            refused: credit.left_out,
        }
    }

    /// Takes a line's share, and returns how many were left out before it; none if it is left out too.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut credit = self.lock();
        credit.refill(now);
        // The line that tells of those left out is one as well.
        let lines = if credit.untold > 0 { 2 } else { 1 };
        let Some(left) = credit.left.checked_sub(self.share().saturating_mul(lines)) else {
            credit.untold = credit.untold.saturating_add(1);
            credit.left_out = credit.left_out.saturating_add(1);
            return None;
        };
        credit.left = left;
        credit.peak = credit.peak.max(self.used(&credit));
        Some(std::mem::take(&mut credit.untold))
    }

    fn share(&self) -> Duration {
        WINDOW.checked_div(self.lines).unwrap_or(WINDOW)
    }

    fn used(&self, credit: &Credit) -> u64 {
        let used = WINDOW.saturating_sub(credit.left).as_nanos().div_ceil(self.share().as_nanos().max(1));
        u64::try_from(used).unwrap_or(u64::MAX).min(self.lines.into())
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

impl Credit {
    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        self.left = self.left.saturating_add(passed).min(WINDOW);
        self.since = self.since.max(now);
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

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn burst_is_written_and_the_rest_is_counted() {
        let budget = LogBudget::new("x".to_owned(), 3);
        let start = budget.lock().since;
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
        let budget = LogBudget::new("x".to_owned(), 6);
        let start = budget.lock().since;
        let mut written = 0;
        for tenth in 0..10 * 60 * 10 {
            let untold = budget.admit(start + Duration::from_millis(100) * tenth);
            written += untold.map_or(0, |untold| 1 + u32::from(untold > 0));
        }
        assert!((60..=66).contains(&written), "{written} lines in ten minutes");
    }
}
