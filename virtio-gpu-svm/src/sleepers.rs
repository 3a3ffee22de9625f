//! Who sleeps at a condition variable, counted under its lock.
//!
//! To notify is a system call whether anybody sleeps or not, and whoever was called takes a while to come: until then the
//! caller, who may have more for the same sleeper, would call again each time.

/// The count.
#[derive(Debug, Default)]
pub(crate) struct Sleepers {
    /// Not called yet.
    asleep: usize,
    /// Called, and not back under the lock.
    called: usize,
}

impl Sleepers {
    /// This thread is about to wait.
    pub(crate) fn lie_down(&mut self) {
        self.asleep = self.asleep.saturating_add(1);
    }

    /// It is back, called or by itself. In the second case it takes the place of one that was called, who comes all the same.
    pub(crate) fn get_up(&mut self) {
        let count = if self.called > 0 { &mut self.called } else { &mut self.asleep };
        *count = count.saturating_sub(1);
    }

    /// Whether one is to be notified so that there are as many as `needed` on their way; it counts as called.
    #[must_use = "who counts as called must be notified"]
    pub(crate) fn call(&mut self, needed: usize) -> bool {
        let one = self.asleep > 0 && self.called < needed;
        if one {
            self.asleep = self.asleep.saturating_sub(1);
            self.called = self.called.saturating_add(1);
        }
        one
    }

    /// Whether there is anybody to be notified; all count as called.
    #[must_use = "who counts as called must be notified"]
    pub(crate) fn call_all(&mut self) -> bool {
        let asleep = std::mem::take(&mut self.asleep);
        self.called = self.called.saturating_add(asleep);
        asleep > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_asleep_is_not_called() {
        let mut sleepers = Sleepers::default();
        assert!(!sleepers.call(1) && !sleepers.call_all());
    }

    #[test]
    fn as_many_are_called_as_are_needed_and_asleep() {
        let mut sleepers = Sleepers::default();
        (0..3).for_each(|_| sleepers.lie_down());
        assert!(sleepers.call(1));
        assert!(!sleepers.call(1), "one is on its way");
        assert!(sleepers.call(2));
        sleepers.get_up();
        assert!(sleepers.call(2), "one is left, and one on its way");
        assert!(!sleepers.call(9), "nobody is left");
    }

    #[test]
    fn all_are_called_once() {
        let mut sleepers = Sleepers::default();
        (0..3).for_each(|_| sleepers.lie_down());
        assert!(sleepers.call_all());
        assert!(!sleepers.call_all());
        (0..3).for_each(|_| sleepers.get_up());
        sleepers.lie_down();
        assert!(sleepers.call_all());
    }

    /// Its timeout ended just when somebody else was called for it: that one comes too, and is counted then.
    #[test]
    fn whoever_comes_by_itself_takes_the_place_of_one_that_was_called() {
        let mut sleepers = Sleepers::default();
        (0..2).for_each(|_| sleepers.lie_down());
        assert!(sleepers.call(1));
        sleepers.get_up();
        assert!(sleepers.call(1), "the other one may still sleep");
        sleepers.get_up();
        assert!(!sleepers.call(1));
    }
}
