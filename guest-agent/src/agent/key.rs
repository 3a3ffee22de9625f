//! Names of contexts. The device's numbers go round and come back; a [`ContextKey`] names one context and never another
//! one, so that whoever holds the key of a context that has ended reaches nobody else's.

use std::sync::Arc;

/// Names one context for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContextKey {
    ctx_id: u32,
    /// No two contexts of this agent have the same.
    generation: u64,
}

impl ContextKey {
    /// The number that the device knows it by, as long as it lives.
    pub fn ctx_id(self) -> u32 {
        self.ctx_id
    }
}

impl From<ContextKey> for u32 {
    fn from(key: ContextKey) -> Self {
        key.ctx_id
    }
}

/// Held while a command that names a context may be on its way: until then no other context has its number.
#[derive(Clone, Debug, Default)]
pub(super) struct Lease(Arc<()>);

impl Lease {
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// Gives keys out.
pub(super) struct Keys {
    /// The highest number.
    most: u32,
    last: u32,
    generation: u64,
    /// Numbers of contexts that have ended, though commands that name them may be on their way.
    lingering: Vec<(u32, Lease)>,
}

impl Keys {
    pub(super) fn new(most: u32) -> Self {
        Self { most, last: 0, generation: 0, lingering: Vec::new() }
    }

    /// A new key. Numbers go round, so that a late record does not meet a new context soon. `None`: each is taken.
    pub(super) fn next(&mut self, is_taken: impl Fn(u32) -> bool) -> Option<ContextKey> {
        self.lingering.retain(|(_, lease)| lease.is_shared());
        for _ in 0..self.most {
            self.last = if self.last >= self.most { 1 } else { self.last + 1 };
            let lingers = self.lingering.iter().any(|(ctx_id, _)| *ctx_id == self.last);
            if !lingers && !is_taken(self.last) {
                self.generation += 1;
                return Some(ContextKey { ctx_id: self.last, generation: self.generation });
            }
        }
        None
    }

    /// A context has ended.
    pub(super) fn end(&mut self, ctx_id: u32, lease: Lease) {
        if lease.is_shared() {
            self.lingering.push((ctx_id, lease));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_keys_do_not() {
        let mut keys = Keys::new(3);
        let given: Vec<ContextKey> = (0..4).filter_map(|_| keys.next(|_| false)).collect();
        let numbers: Vec<u32> = given.iter().map(|key| key.ctx_id()).collect();
        assert_eq!(numbers, [1, 2, 3, 1]);
        assert_ne!(given.first(), given.last());
        assert_eq!(keys.next(|ctx_id| ctx_id != 3).map(ContextKey::ctx_id), Some(3));
        assert_eq!(keys.next(|_| true), None);
    }

    #[test]
    fn number_is_not_given_again_while_a_command_may_name_it() {
        let mut keys = Keys::new(2);
        let (own, of_command) = (Lease::default(), Lease::default());
        let under_way = of_command.clone();
        keys.end(1, own);
        keys.end(2, of_command);
        let mut next = || keys.next(|_| false).map(ContextKey::ctx_id);
        assert_eq!([next(), next(), next()], [Some(1); 3]);
        drop(under_way);
        assert_eq!(next(), Some(2));
    }
}
