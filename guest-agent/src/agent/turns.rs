//! Turns of users at whoever makes memory ([`super::ArenaMemory`]): each has one request there at a time, in the order in
//! which its threads came. Making takes as long as a user's memory is large, and longer where it was swapped out: so no
//! number of requests of one user is before another user's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

/// Who has a turn, and who waits for one.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Threads of a user; the first one has the turn. Never empty.
    lines: Mutex<HashMap<u32, VecDeque<Thread>>>,
}

/// A user's turn, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    uid: u32,
}

impl Turns {
    fn lines(&self) -> MutexGuard<'_, HashMap<u32, VecDeque<Thread>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the user's turn.
    pub(super) fn wait(&self, uid: u32) -> Turn<'_> {
        let own = std::thread::current();
        let is_first = |lines: &HashMap<u32, VecDeque<Thread>>| {
            lines.get(&uid).and_then(VecDeque::front).is_some_and(|first| first.id() == own.id())
        };
        self.lines().entry(uid).or_default().push_back(own.clone());
        while !is_first(&self.lines()) {
            std::thread::park();
        }
        Turn { turns: self, uid }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut lines = self.turns.lines();
        let next = lines.get_mut(&self.uid).and_then(|line| {
            line.pop_front();
            line.front().cloned()
        });
        if next.is_none() {
            lines.remove(&self.uid);
        }
        drop(lines);
        if let Some(next) = next {
            next.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn user_has_one_turn_at_a_time_and_others_have_theirs() {
        let turns = Turns::default();
        let (had, have) = mpsc::channel();
        std::thread::scope(|scope| {
            let first = turns.wait(1);
            for number in 0..8 {
                let (turns, had) = (&turns, had.clone());
                scope.spawn(move || {
                    let _turn = turns.wait(1);
                    had.send(number).unwrap();
                });
                // In line, so the order of the threads is known.
                while turns.lines()[&1].len() < number + 2 {
                    std::thread::yield_now();
                }
            }
            // None of those is before another user.
            drop(turns.wait(2));
            assert!(have.try_recv().is_err());
            drop(first);
        });
        assert_eq!(have.try_iter().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(turns.lines().is_empty(), "nothing is remembered of who has left");
    }
}
