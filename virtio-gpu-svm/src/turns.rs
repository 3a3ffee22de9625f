//! Whose turn it is where one thread serves several guests: guests in turn, and of a guest what it has queued, in order.
//! So a guest with very many contexts gets the share of a guest with one.
//!
//! Plain state under its user's lock. Every call costs the logarithm of what is queued, whoever has queued it: what is
//! withdrawn is not searched for.

use crate::sync::Arc;
use std::collections::{BTreeMap, VecDeque};

/// Where an item stands, to withdraw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(i64);

/// Items of guests.
pub struct Turns<T> {
    /// Of each guest in `order` what it has queued; perhaps nothing any more.
    lines: BTreeMap<Arc<str>, BTreeMap<i64, T>>,
    /// Guests, each once.
    order: VecDeque<Arc<str>>,
    /// Places that were given, from 0 on up, and below it down.
    last: i64,
    first: i64,
    len: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { lines: BTreeMap::new(), order: VecDeque::new(), last: 0, first: 0, len: 0 }
    }
}

impl<T> Turns<T> {
    /// Whether nobody has queued anything.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Queues an item behind those of its guest.
    pub fn push(&mut self, guest: &Arc<str>, item: T) -> Place {
        self.last = self.last.saturating_add(1);
        self.put(guest, self.last, item)
    }

    /// Queues an item before those of its guest.
    pub fn push_first(&mut self, guest: &Arc<str>, item: T) -> Place {
        self.first = self.first.saturating_sub(1);
        self.put(guest, self.first, item)
    }

    fn put(&mut self, guest: &Arc<str>, place: i64, item: T) -> Place {
        if let Some(line) = self.lines.get_mut(guest) {
            line.insert(place, item);
        } else {
            self.lines.insert(Arc::clone(guest), BTreeMap::from([(place, item)]));
            self.order.push_back(Arc::clone(guest));
        }
        self.len = self.len.saturating_add(1);
        Place(place)
    }

    /// Takes the first item of the guest whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        while let Some(guest) = self.order.pop_front() {
            let Some(line) = self.lines.get_mut(&guest) else { continue };
            let first = line.pop_first();
            if line.is_empty() {
                self.lines.remove(&guest);
            } else {
                self.order.push_back(guest);
            }
            if let Some((_, item)) = first {
                self.len = self.len.saturating_sub(1);
                return Some(item);
            }
        }
        None
    }

    /// Withdraws an item that has not been taken.
    pub fn remove(&mut self, guest: &str, place: Place) -> Option<T> {
        // The guest keeps its turn: its next item may come before that.
        let item = self.lines.get_mut(guest)?.remove(&place.0)?;
        self.len = self.len.saturating_sub(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(turns: &mut Turns<u32>) -> Vec<u32> {
        std::iter::from_fn(|| turns.pop()).collect()
    }

    #[test]
    fn guests_alternate_whatever_each_has_queued() {
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let mut turns = Turns::default();
        (0..5).for_each(|i| _ = turns.push(&b, 100 + i));
        (0..2).for_each(|i| _ = turns.push(&a, i));
        assert_eq!(order(&mut turns), [100, 0, 101, 1, 102, 103, 104]);
        assert!(turns.is_empty());
    }

    #[test]
    fn guest_that_queues_anew_goes_behind_the_others() {
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let mut turns = Turns::default();
        turns.push(&a, 0);
        turns.push(&b, 100);
        for _ in 0..3 {
            assert_eq!(turns.pop(), Some(0));
            turns.push(&a, 0);
            assert_eq!(turns.pop(), Some(100));
            turns.push(&b, 100);
        }
    }

    #[test]
    fn what_goes_first_goes_before_its_guests_own_only() {
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let mut turns = Turns::default();
        (0..3).for_each(|i| _ = turns.push(&a, i));
        (100..103).for_each(|i| _ = turns.push(&b, i));
        turns.push_first(&b, 99);
        assert_eq!(order(&mut turns), [0, 99, 1, 100, 2, 101, 102]);
    }

    #[test]
    fn withdrawn_item_is_not_taken_and_its_guest_stands_once() {
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let mut turns = Turns::default();
        let place = turns.push(&a, 0);
        assert_eq!(turns.remove("a", place), Some(0));
        assert_eq!(turns.remove("a", place), None);
        assert!(turns.is_empty());
        turns.push(&b, 100);
        turns.push(&b, 101);
        turns.push(&a, 1);
        turns.push(&a, 2);
        assert_eq!(order(&mut turns), [1, 100, 2, 101]);
    }
}
