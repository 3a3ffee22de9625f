//! How long a thread that has nothing to do looks for work before it sleeps: a queue thread at an empty ring, an engine
//! at an empty schedule.
//!
//! To be woken costs tens of microseconds, to look again well below one. So a thread that has done something looks for a
//! while whether the next comes, and who brings it need not notify meanwhile. Nobody is to pay for that:
//! * each look in vain doubles the time until the next one, up to two hundred times the limit: a guest that asks seldom costs
//!   less than a hundredth of a CPU more, and one that asks nothing costs nothing, since only work begins a look;
//! * a thread that lost its CPU while it looked shares it with somebody, and would lose it again: whoever never sleeps is
//!   made to wait for whole slices, where one that was asleep is let in at once. It looks no more for a while, up to 1 s;
//! * a visit looks for no more than a few times the limit, because a queue thread holds its ring's lock meanwhile.
//!
//! Owned by the thread that looks, so nobody shares it.

use std::time::{Duration, Instant};

/// Looks between two at the clock: a microsecond or two.
const LOOKS: u32 = 32;
/// A clock that goes on by more than this between them was somebody else's: no interrupt takes so long, and no scheduler
/// gives anybody less.
const TAKEN: Duration = Duration::from_micros(200);
/// After the first look in vain.
const FIRST_REST: Duration = Duration::from_micros(50);
/// And at most, in limits.
const LONGEST_REST: u32 = 200;
/// After the CPU was taken, and at most.
const FIRST_RETREAT: Duration = Duration::from_millis(10);
const LONGEST_RETREAT: Duration = Duration::from_secs(1);
/// A CPU that was taken so long ago is nobody else's any more.
const FORGOTTEN: Duration = Duration::from_secs(10);
/// The most that a visit looks, in limits.
const VISIT: u32 = 4;

/// Time since some moment.
pub trait Clock {
    /// Now.
    fn now(&mut self) -> Duration;
}

/// The system's.
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&mut self) -> Duration {
        self.0.elapsed()
    }
}

/// See the module.
#[derive(Debug)]
pub struct BusyPoll<C = Monotonic> {
    clock: C,
    most: Duration,
    /// What is left of this visit's time.
    left: Duration,
    /// No look before.
    rests_until: Duration,
    /// How long the next rest is.
    rest: Duration,
    /// How long the last retreat was, and when.
    retreat: Duration,
    taken_at: Duration,
}

impl<C: Clock> BusyPoll<C> {
    /// Looks for at most so long; never, if that is nothing.
    pub fn new(clock: C, most: Duration) -> Self {
        let zero = Duration::ZERO;
        Self { clock, most, left: zero, rests_until: zero, rest: FIRST_REST, retreat: zero, taken_at: zero }
    }

    /// A visit begins.
    pub fn begin_visit(&mut self) {
        self.left = self.most.saturating_mul(VISIT);
    }

    /// Looks until something is there. `false`: not worth the while, or not any longer.
    ///
    /// # Errors
    /// That of a look.
    pub fn wait<E>(&mut self, mut look: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        let most = self.most.min(self.left);
        if most.is_zero() {
            return Ok(false);
        }
        let begin = self.clock.now();
        if begin < self.rests_until {
            return Ok(false);
        }
        let mut now = begin;
        loop {
            let found = look_often(&mut look)?;
            let before = std::mem::replace(&mut now, self.clock.now());
            let looked = now.saturating_sub(begin);
            let taken = now.saturating_sub(before) > TAKEN;
            if !found && !taken && looked < most {
                continue;
            }
            self.left = self.left.saturating_sub(looked);
            if taken {
                self.retreat(now);
            } else if found {
                self.rest = FIRST_REST;
            } else if looked >= self.most {
                self.rests_until = now.saturating_add(self.rest);
                self.rest = self.rest.saturating_mul(2).min(self.most.saturating_mul(LONGEST_REST));
            }
            return Ok(found);
        }
    }

    /// The CPU was taken.
    fn retreat(&mut self, now: Duration) {
        let again = now.saturating_sub(self.taken_at) < FORGOTTEN;
        let longer = if again { self.retreat.saturating_mul(2) } else { Duration::ZERO };
        self.retreat = longer.clamp(FIRST_RETREAT, LONGEST_RETREAT);
        self.taken_at = now;
        self.rests_until = now.saturating_add(self.retreat);
    }
}

fn look_often<E>(look: &mut impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    for _ in 0..LOOKS {
        if look()? {
            return Ok(true);
        }
        std::hint::spin_loop();
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    /// A microsecond passes with each look at the clock, and more when the CPU is somebody else's.
    #[derive(Default)]
    struct Fake {
        now: Duration,
        away: Duration,
    }

    impl Clock for Fake {
        fn now(&mut self) -> Duration {
            self.now += Duration::from_micros(1) + self.away;
            self.now
        }
    }

    fn poll(most: Duration) -> BusyPoll<Fake> {
        let mut poll = BusyPoll::new(Fake::default(), most);
        poll.begin_visit();
        poll
    }

    /// Looks in vain; how often.
    fn in_vain(poll: &mut BusyPoll<Fake>) -> u32 {
        let mut looks = 0;
        let found = poll.wait(|| {
            looks += 1;
            Ok::<_, ()>(false)
        });
        assert_eq!(found, Ok(false));
        looks
    }

    /// A visit that begins after the rest, and looks in vain; how long it rests then.
    fn rest_after(poll: &mut BusyPoll<Fake>) -> Duration {
        poll.begin_visit();
        poll.clock.now = poll.clock.now.max(poll.rests_until);
        assert!(in_vain(poll) > 0);
        poll.rests_until - poll.clock.now
    }

    #[test]
    fn what_comes_meanwhile_is_found() {
        let mut looks = 0;
        let found = poll(MOST).wait(|| {
            looks += 1;
            Ok::<_, ()>(looks == 3 * LOOKS)
        });
        assert_eq!(found, Ok(true));
    }

    #[test]
    fn look_that_fails_ends_it() {
        assert_eq!(poll(MOST).wait(|| Err::<bool, _>("broken")), Err("broken"));
    }

    #[test]
    fn no_time_is_no_look() {
        assert_eq!(in_vain(&mut poll(Duration::ZERO)), 0);
    }

    #[test]
    fn visit_looks_for_a_few_limits_and_no_longer() {
        let mut poll = poll(MOST);
        for _ in 0..VISIT {
            // As if each found something at last.
            poll.rests_until = Duration::ZERO;
            assert!(in_vain(&mut poll) > 0);
        }
        poll.rests_until = Duration::ZERO;
        assert_eq!(in_vain(&mut poll), 0);
        poll.begin_visit();
        assert!(in_vain(&mut poll) > 0);
    }

    #[test]
    fn cpu_that_was_taken_is_left_to_others_longer_each_time() {
        let mut poll = poll(MOST);
        poll.clock.away = TAKEN;
        let retreats: Vec<_> = (0..9).map(|_| rest_after(&mut poll)).collect();
        assert_eq!(retreats[..3], [FIRST_RETREAT, 2 * FIRST_RETREAT, 4 * FIRST_RETREAT]);
        assert_eq!(retreats[8], LONGEST_RETREAT);
        assert_eq!(in_vain(&mut poll), 0);
        poll.clock.now += FORGOTTEN;
        assert_eq!(rest_after(&mut poll), FIRST_RETREAT);
    }

    /// Whoever sends command after command is found each time, also when a slice was lost before.
    #[test]
    fn cpu_that_was_taken_before_a_find_counts_too() {
        let mut poll = poll(MOST);
        poll.clock.away = TAKEN;
        assert_eq!(poll.wait(|| Ok::<_, ()>(true)), Ok(true));
        assert_eq!(poll.rests_until, poll.clock.now + FIRST_RETREAT);
    }

    #[test]
    fn each_look_in_vain_doubles_the_rest_and_a_find_ends_that() {
        let mut poll = poll(MOST);
        let rests: Vec<_> = (0..10).map(|_| rest_after(&mut poll)).collect();
        assert_eq!(rests[..3], [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]);
        assert_eq!(rests[9], LONGEST_REST * MOST);
        poll.clock.now = poll.rests_until;
        assert_eq!(poll.wait(|| Ok::<_, ()>(true)), Ok(true));
        assert_eq!(rest_after(&mut poll), FIRST_REST);
    }
}
