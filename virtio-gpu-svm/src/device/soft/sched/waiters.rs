//! Who waits for a semaphore, by guest. A semaphore's key is an address in a region, and a region is one guest's: so no
//! guest's signal, and no number of its waiters, is another's business.
//!
//! A signal wakes a batch of those who wait for its key. The others, and whoever waits for a CPU or another device, are
//! found when they are looked at: guests in turn, of a guest its waiters in turn.

use crate::device::Asid;
use crate::sync::Arc;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};

/// A ring that waits: for a key, in a GPU VM.
pub type Waiter = (u64, Asid, u32);

/// What one guest waits for.
#[derive(Default)]
struct Waiting {
    rings: BTreeSet<Waiter>,
    /// The one that was looked at last.
    looked: Option<Waiter>,
}

/// All that wait.
#[derive(Default)]
pub struct Waiters {
    guests: BTreeMap<Arc<str>, Waiting>,
    /// The guest that was looked at last.
    looked: Option<Arc<str>>,
}

impl Waiters {
    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }

    /// A ring begins to wait.
    pub fn insert(&mut self, guest: &Arc<str>, waiter: Waiter) {
        self.guests.entry(Arc::clone(guest)).or_default().rings.insert(waiter);
    }

    /// It waits no more.
    pub fn remove(&mut self, guest: &str, waiter: Waiter) {
        let Some(waiting) = self.guests.get_mut(guest) else { return };
        waiting.rings.remove(&waiter);
        if waiting.rings.is_empty() {
            self.guests.remove(guest);
        }
    }

    /// Those of a guest who wait for a key, at most `most`.
    pub fn of_key(&self, guest: &str, key: u64, most: usize) -> Vec<Waiter> {
        let Some(waiting) = self.guests.get(guest) else { return Vec::new() };
        let all = (key, Asid(0), 0)..=(key, Asid(u32::MAX), u32::MAX);
        waiting.rings.range(all).take(most).copied().collect()
    }

    /// The one that is to be looked at next. It is to be removed before the next call.
    pub fn next_look(&mut self) -> Option<Waiter> {
        let after = self.looked.take();
        let later =
            after.and_then(|last| self.guests.range::<Arc<str>, _>((Excluded(last), Unbounded)).next());
        let guest = Arc::clone(later.or_else(|| self.guests.first_key_value())?.0);
        let waiting = self.guests.get_mut(&guest)?;
        let later = waiting.looked.and_then(|last| waiting.rings.range((Excluded(last), Unbounded)).next());
        let waiter = later.or_else(|| waiting.rings.first()).copied()?;
        waiting.looked = Some(waiter);
        self.looked = Some(guest);
        Some(waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at `count` of them, which go on waiting, as those do whose time has not come.
    fn looks(waiters: &mut Waiters, guests: &[(&str, Asid)], count: usize) -> Vec<Waiter> {
        let look = |_| {
            let waiter = waiters.next_look().unwrap();
            let (guest, _) = guests.iter().find(|(_, asid)| *asid == waiter.1).unwrap();
            waiters.remove(guest, waiter);
            waiters.insert(&Arc::from(*guest), waiter);
            waiter
        };
        (0..count).map(look).collect()
    }

    #[test]
    fn lone_waiter_is_looked_at_every_second_time_beside_very_many() {
        let (few, many) = (("a", Asid(1)), ("b", Asid(2)));
        let mut waiters = Waiters::default();
        (0..10_000).for_each(|ring| waiters.insert(&"b".into(), (ring.into(), many.1, ring)));
        waiters.insert(&"a".into(), (7, few.1, 0));
        let looked = looks(&mut waiters, &[few, many], 2000);
        assert!(looked.iter().step_by(2).all(|waiter| waiter.1 == few.1));
        let mut others: Vec<_> = looked.iter().skip(1).step_by(2).collect();
        others.dedup();
        assert_eq!(others.len(), 1000, "each of the many in its turn");
    }

    #[test]
    fn waiters_of_a_key_are_those_of_the_guest_and_a_batch() {
        let mut waiters = Waiters::default();
        for ring in 0..10 {
            waiters.insert(&"a".into(), (7, Asid(1), ring));
            waiters.insert(&"b".into(), (7, Asid(2), ring));
        }
        waiters.insert(&"a".into(), (8, Asid(1), 20));
        assert_eq!(waiters.of_key("a", 7, 4), (0..4).map(|ring| (7, Asid(1), ring)).collect::<Vec<_>>());
        assert_eq!(waiters.of_key("a", 8, 4), [(8, Asid(1), 20)]);
        assert_eq!(waiters.of_key("c", 7, 4), []);
    }
}
