//! How often something may be done: so many times at once, and again as many in each minute.

use std::time::{Duration, Instant};
use virtio_gpu_svm::quota::LimitStatus;

/// In which a rate is whole again.
const WINDOW: Duration = Duration::from_secs(60);

/// What is left of it, in time: each costs its share of a minute.
pub(crate) struct Rate {
    limit: u32,
    left: Duration,
    since: Instant,
    peak: u64,
    refused: u64,
}

impl Rate {
    /// So many a minute, at least 1.
    pub fn new(limit: u32, now: Instant) -> Self {
        Self { limit: limit.max(1), left: WINDOW, since: now, peak: 0, refused: 0 }
    }

    /// Takes so many.
    ///
    /// # Errors
    /// How long it takes until there are so many. Counted as one refusal.
    pub fn take(&mut self, count: u32, now: Instant) -> Result<(), Duration> {
        self.refill(now);
        let price = self.share().saturating_mul(count);
        match self.left.checked_sub(price) {
            Some(left) => {
                self.left = left;
                self.peak = self.peak.max(self.used());
                Ok(())
            }
            None => {
                self.refused = self.refused.saturating_add(1);
                Err(price.saturating_sub(self.left))
            }
        }
    }

    /// How much of it is used.
    pub fn status(&mut self, name: &'static str, now: Instant) -> LimitStatus {
        self.refill(now);
        LimitStatus {
            name,
            scope: "guest",
            used: self.used(),
            peak: self.peak,
            limit: self.limit.into(),
            refused: self.refused,
        }
    }

    fn share(&self) -> Duration {
        WINDOW.checked_div(self.limit).unwrap_or(WINDOW)
    }

    fn used(&self) -> u64 {
        let used = WINDOW.saturating_sub(self.left).as_nanos().div_ceil(self.share().as_nanos().max(1));
        u64::try_from(used).unwrap_or(u64::MAX).min(self.limit.into())
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        self.left = self.left.saturating_add(passed).min(WINDOW);
        self.since = self.since.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn so_many_at_once_and_then_one_each_share_of_a_minute() {
        let start = Instant::now();
        let mut rate = Rate::new(3, start);
        let at_once: Vec<_> = (0..5).map(|_| rate.take(1, start)).collect();
        assert_eq!(at_once, [Ok(()), Ok(()), Ok(()), Err(seconds(20)), Err(seconds(20))]);
        assert_eq!(rate.take(1, start + seconds(15)), Err(seconds(5)));
        assert_eq!(rate.take(2, start + seconds(20)), Err(seconds(20)));
        assert_eq!(rate.take(1, start + seconds(20)), Ok(()));
        assert_eq!(rate.take(1, start + seconds(21)), Err(seconds(19)));
        let status = rate.status("x", start + seconds(21));
        assert_eq!((status.used, status.peak, status.limit, status.refused), (3, 3, 3, 5));
        assert_eq!(rate.status("x", start + seconds(200)).used, 0);
    }

    #[test]
    fn time_that_goes_back_gives_nothing() {
        let start = Instant::now() + seconds(100);
        let mut rate = Rate::new(1, start);
        assert_eq!(rate.take(1, start), Ok(()));
        assert!(rate.take(1, start.checked_sub(seconds(90)).unwrap()).is_err());
        assert_eq!(rate.take(1, start + seconds(59)), Err(seconds(1)));
    }
}
