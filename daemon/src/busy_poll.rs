//! How long a queue thread looks at an empty ring before it sleeps.
//!
//! To be woken costs tens of microseconds, to look again well below one. So a thread that has answered looks for a while
//! whether the next command comes, and the driver need not notify meanwhile. Nobody is to pay for that:
//! * between looks the thread gives way to whoever else is runnable on its CPU. If that took time and brought nothing, the
//!   CPU is wanted, and the thread sleeps and does not look for a while;
//! * each look in vain doubles the time until the next one, up to 10 ms: a guest that asks seldom costs less
//!   than a hundredth of a CPU more, and one that asks nothing costs nothing, since only a visit begins to look;
//! * a visit looks for no more than a few times the limit, because it holds the ring's lock.
//!
//! Owned by the thread of one guest, so nobody shares it.

use std::time::{Duration, Instant};

/// Looks between two times that the CPU is offered: a microsecond or two.
const LOOKS: u32 = 32;
/// A CPU that comes back later than this was used by somebody.
const TAKEN: Duration = Duration::from_micros(5);
/// After the first look in vain.
const FIRST_REST: Duration = Duration::from_micros(50);
/// And at most.
const LONGEST_REST: Duration = Duration::from_millis(10);
/// The most that a visit looks, in limits.
const VISIT: u32 = 4;

/// The clock, and the CPU that is given away.
pub trait Cpu {
    /// Time since some moment.
    fn now(&mut self) -> Duration;
    /// Lets others run that are ready to.
    fn give_way(&mut self);
}

/// The calling thread's.
pub struct Thread(Instant);

impl Default for Thread {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Cpu for Thread {
    fn now(&mut self) -> Duration {
        self.0.elapsed()
    }
    fn give_way(&mut self) {
        std::thread::yield_now();
    }
}

/// See the module.
#[derive(Debug)]
pub struct BusyPoll<C = Thread> {
    cpu: C,
    most: Duration,
    /// What is left of this visit's time.
    left: Duration,
    /// No look before.
    rests_until: Duration,
    /// How long the next rest is.
    rest: Duration,
}

impl<C: Cpu> BusyPoll<C> {
    /// Looks for at most so long; never, if that is nothing.
    pub fn new(cpu: C, most: Duration) -> Self {
        Self { cpu, most, left: Duration::ZERO, rests_until: Duration::ZERO, rest: FIRST_REST }
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
        let begin = self.cpu.now();
        if begin < self.rests_until {
            return Ok(false);
        }
        let mut now = begin;
        let found = loop {
            if look_often(&mut look)? {
                break true;
            }
            let before = self.cpu.now();
            self.cpu.give_way();
            now = self.cpu.now();
            let taken = now.saturating_sub(before) > TAKEN;
            if taken || now.saturating_sub(begin) >= most {
                // Whoever ran may have brought something.
                break look()?;
            }
        };
        self.left = self.left.saturating_sub(now.saturating_sub(begin));
        if found {
            self.rest = FIRST_REST;
        } else {
            self.rests_until = now.saturating_add(self.rest);
            self.rest = self.rest.saturating_mul(2).min(LONGEST_REST);
        }
        Ok(found)
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

    /// A microsecond passes with each look at the clock, and more when the CPU is given away.
    #[derive(Default)]
    struct Fake {
        now: Duration,
        away: Duration,
        given: u32,
    }

    impl Cpu for Fake {
        fn now(&mut self) -> Duration {
            self.now += Duration::from_micros(1);
            self.now
        }
        fn give_way(&mut self) {
            self.given += 1;
            self.now += self.away;
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

    #[test]
    fn what_comes_meanwhile_is_found() {
        let mut poll = poll(MOST);
        let mut looks = 0;
        let found = poll.wait(|| {
            looks += 1;
            Ok::<_, ()>(looks == 3 * LOOKS)
        });
        assert_eq!((found, poll.cpu.given), (Ok(true), 2));
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
    fn cpu_that_others_want_is_left_to_them() {
        let mut poll = poll(MOST);
        poll.cpu.away = TAKEN;
        assert_eq!(in_vain(&mut poll), LOOKS + 1);
        assert_eq!(in_vain(&mut poll), 0);
    }

    #[test]
    fn what_others_have_brought_is_found() {
        let mut poll = poll(MOST);
        poll.cpu.away = TAKEN;
        let mut looks = 0;
        let found = poll.wait(|| {
            looks += 1;
            Ok::<_, ()>(looks > LOOKS)
        });
        assert_eq!((found, poll.rests_until), (Ok(true), Duration::ZERO));
    }

    #[test]
    fn each_look_in_vain_doubles_the_rest_and_a_find_ends_that() {
        let mut poll = poll(MOST);
        let rest = |poll: &mut BusyPoll<Fake>| {
            poll.begin_visit();
            poll.cpu.now = poll.rests_until;
            assert!(in_vain(poll) > 0);
            poll.rests_until - poll.cpu.now
        };
        let rests: Vec<_> = (0..10).map(|_| rest(&mut poll)).collect();
        assert_eq!(rests[..3], [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]);
        assert_eq!(rests[9], LONGEST_REST);
        poll.cpu.now = poll.rests_until;
        assert_eq!(poll.wait(|| Ok::<_, ()>(true)), Ok(true));
        assert_eq!(rest(&mut poll), FIRST_REST);
    }
}
