//! Pending faults by GPU VM and page: a treap over the places of a list. The links are in the entries; the weight of an
//! entry is drawn from its number and a secret of the tree, so that its depth is the logarithm of how many there are,
//! whichever pages a guest's jobs touch.

use super::Pending;
use std::hash::{BuildHasher, RandomState};

/// A place in the list, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(u32);

impl Place {
    pub(super) const NONE: Self = Self(u32::MAX);

    pub(super) fn of(index: usize) -> Self {
        Self(u32::try_from(index).unwrap_or(u32::MAX))
    }
    fn index(self) -> Option<usize> {
        usize::try_from(self.0).ok().filter(|_| self != Self::NONE)
    }
}

/// A link of the tree.
#[derive(Clone, Copy)]
enum Link {
    Root,
    Left(Place),
    Right(Place),
}

/// Keys: GPU VM, first page.
type Key = (u32, u64);

#[derive(Debug)]
pub(super) struct Order {
    root: Place,
    secret: u64,
}

impl Default for Order {
    fn default() -> Self {
        Self { root: Place::NONE, secret: RandomState::new().hash_one(0_u64) }
    }
}

impl Order {
    /// Adds the entry of a place; no other has its key.
    pub(super) fn insert(&mut self, list: &mut [Pending], new: Place) {
        let Some((key, weight)) = self.of(list, new) else { return };
        let (mut at, mut node) = (Link::Root, self.root);
        while let Some((other, heavier)) = self.of(list, node).filter(|(_, other)| *other > weight) {
            debug_assert_ne!(other, key, "two faults of one page, of weight {heavier}");
            at = if key < other { Link::Left(node) } else { Link::Right(node) };
            node = self.link(list, at);
        }
        self.set(list, at, new);
        // What is lighter goes below it, the smaller keys on its left and the others on its right.
        let (mut smaller, mut larger) = (Link::Left(new), Link::Right(new));
        while let Some((other, _)) = self.of(list, node) {
            let next = if other < key {
                self.set(list, smaller, node);
                smaller = Link::Right(node);
                smaller
            } else {
                self.set(list, larger, node);
                larger = Link::Left(node);
                larger
            };
            node = self.link(list, next);
        }
        self.set(list, smaller, Place::NONE);
        self.set(list, larger, Place::NONE);
    }
    /// Takes the entry of a place out.
    pub(super) fn remove(&mut self, list: &mut [Pending], old: Place) {
        let Some((key, _)) = self.of(list, old) else { return };
        let mut at = Link::Root;
        loop {
            let node = self.link(list, at);
            let Some((other, _)) = self.of(list, node).filter(|_| node != old) else { break };
            at = if key < other { Link::Left(node) } else { Link::Right(node) };
        }
        let (mut smaller, mut larger) = (self.link(list, Link::Left(old)), self.link(list, Link::Right(old)));
        while let (Some((_, left)), Some((_, right))) = (self.of(list, smaller), self.of(list, larger)) {
            if left > right {
                self.set(list, at, smaller);
                at = Link::Right(smaller);
                smaller = self.link(list, at);
            } else {
                self.set(list, at, larger);
                at = Link::Left(larger);
                larger = self.link(list, at);
            }
        }
        self.set(list, at, if smaller == Place::NONE { larger } else { smaller });
    }
    /// The last entry whose key is no larger.
    pub(super) fn last_until(&self, list: &[Pending], key: Key) -> Option<usize> {
        self.nearest(list, |other| other <= key, Link::Right, Link::Left)
    }
    /// The first entry whose key is no smaller.
    pub(super) fn first_from(&self, list: &[Pending], key: Key) -> Option<usize> {
        self.nearest(list, |other| other >= key, Link::Left, Link::Right)
    }
    /// The entry that fits and is nearest to those that do not: `nearer` leads from one that fits, `back` from others.
    fn nearest(
        &self,
        list: &[Pending],
        fits: impl Fn(Key) -> bool,
        nearer: fn(Place) -> Link,
        back: fn(Place) -> Link,
    ) -> Option<usize> {
        let (mut node, mut found) = (self.root, None);
        while let Some(pending) = node.index().and_then(|index| list.get(index)) {
            let next = if fits(pending.key()) {
                found = node.index();
                nearer(node)
            } else {
                back(node)
            };
            node = self.link(list, next);
        }
        found
    }
    /// The key and the weight of an entry.
    fn of(&self, list: &[Pending], node: Place) -> Option<(Key, u64)> {
        let pending = list.get(node.index()?)?;
        Some((pending.key(), weight(self.secret ^ u64::from(pending.number))))
    }
    #[cfg(test)]
    pub(super) fn root(&self) -> Place {
        self.root
    }
    #[cfg(test)]
    pub(super) fn entry<'a>(&self, list: &'a [Pending], node: Place) -> Option<&'a Pending> {
        list.get(node.index()?)
    }
    fn link(&self, list: &[Pending], link: Link) -> Place {
        let entry = |node: Place| node.index().and_then(|index| list.get(index));
        match link {
            Link::Root => self.root,
            Link::Left(node) => entry(node).map_or(Place::NONE, |pending| pending.left),
            Link::Right(node) => entry(node).map_or(Place::NONE, |pending| pending.right),
        }
    }
    fn set(&mut self, list: &mut [Pending], link: Link, to: Place) {
        let (Link::Left(node) | Link::Right(node)) = link else {
            self.root = to;
            return;
        };
        let Some(pending) = node.index().and_then(|index| list.get_mut(index)) else { return };
        if matches!(link, Link::Left(_)) {
            pending.left = to;
        } else {
            pending.right = to;
        }
    }
}

/// A number's bits mixed so that each decides all: the finalizer of splitmix64.
fn weight(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
