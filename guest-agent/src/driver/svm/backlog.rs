//! Commands that wait for room in the ring. Users take turns, so that one user's commands, many and large as they are, hold
//! up another's by one. Of a user, the answers to faults of each context have a line, and all else has one more; these take
//! turns as well, so that thousands of faults of one context hold up another's answer by one. A line keeps its order.
//!
//! A large command takes several turns of its line ([`TURN_PAGES`]), which passes all but the last of them, to other lines of
//! its user or else to other users. So one user's large commands leave as much of the ring to another one's small ones.
//!
//! What names no context that is known is the driver's own, which counts as a user. Whoever is first waits until there is
//! room for it: what is large gets its turn as well.

use super::Command;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use virtio_gpu_svm::protocol::control::VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE;

/// Pages of a command for each turn that it takes: all but what is large has room in these. The largest takes 15.
const TURN_PAGES: usize = 4;

/// Commands that wait, one of which is the next.
trait Waiting: Default {
    /// It has a turn: whether the next one is sent. Asked again before it is taken, it says the same.
    fn turn(&mut self) -> bool;
    fn next(&self) -> Option<&Command>;
    fn take(&mut self) -> Option<Command>;
    /// Drops a command, wherever it stands.
    fn withdraw(&mut self, serial: u64);
}

/// Commands in their order.
#[derive(Default)]
struct Line {
    commands: VecDeque<Command>,
    /// Turns since one was taken.
    passed: usize,
}

impl Waiting for Line {
    fn turn(&mut self) -> bool {
        let turns = self.next().map_or(0, |command| command.pages().div_ceil(TURN_PAGES));
        let enough = self.passed + 1 >= turns;
        if !enough {
            self.passed += 1;
        }
        enough
    }

    fn next(&self) -> Option<&Command> {
        self.commands.front()
    }

    fn take(&mut self) -> Option<Command> {
        self.passed = 0;
        self.commands.pop_front()
    }

    fn withdraw(&mut self, serial: u64) {
        self.commands.retain(|command| command.serial != serial);
    }
}

/// Lines that take turns.
struct Turns<K, L> {
    /// Those with commands.
    lines: HashMap<K, L>,
    /// The same, in the order of their turns.
    order: VecDeque<K>,
}

impl<K, L> Default for Turns<K, L> {
    fn default() -> Self {
        Self { lines: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Copy + Eq + Hash, L: Waiting> Turns<K, L> {
    /// The line of this key, which gets a command now.
    fn line(&mut self, key: K) -> &mut L {
        self.lines.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            L::default()
        })
    }
}

impl<K: Copy + Eq + Hash, L: Waiting> Waiting for Turns<K, L> {
    /// Each has one, until one sends.
    fn turn(&mut self) -> bool {
        for _ in 0..self.order.len() {
            let line = self.order.front().and_then(|key| self.lines.get_mut(key));
            if line.is_some_and(L::turn) {
                return true;
            }
            self.order.rotate_left(1);
        }
        false
    }

    fn next(&self) -> Option<&Command> {
        self.lines.get(self.order.front()?)?.next()
    }

    fn take(&mut self) -> Option<Command> {
        let key = self.order.pop_front()?;
        let line = self.lines.get_mut(&key)?;
        let command = line.take();
        if line.next().is_some() {
            self.order.push_back(key);
        } else {
            self.lines.remove(&key);
        }
        command
    }

    fn withdraw(&mut self, serial: u64) {
        self.lines.retain(|_, line| {
            line.withdraw(serial);
            line.next().is_some()
        });
        self.order.retain(|key| self.lines.contains_key(key));
    }
}

/// A user; `None`: the driver.
type User = Option<u32>;
/// The context whose faults are answered; `None`: all else.
type Answered = Option<u32>;

/// The lines.
#[derive(Default)]
pub(super) struct Backlog {
    /// The user of each context.
    of_context: HashMap<u32, u32>,
    users: Turns<User, Turns<Answered, Line>>,
}

impl Backlog {
    /// From now on commands of `ctx_id` are this user's.
    pub(super) fn assign(&mut self, ctx_id: u32, user: u32) {
        self.of_context.insert(ctx_id, user);
    }

    /// A context has ended.
    pub(super) fn forget(&mut self, ctx_id: u32) {
        self.of_context.remove(&ctx_id);
    }

    /// Puts a command at the end of its line.
    pub(super) fn push(&mut self, command: Command) {
        let user = self.of_context.get(&command.ctx_id).copied();
        // An answer may be overtaken, and overtake: it is good or not by its cookie and sequence alone.
        let answered = (command.kind == VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE).then_some(command.ctx_id);
        self.users.line(user).line(answered).commands.push_back(command);
    }

    /// Takes the command whose turn it is, if `fits` says so; the next turn is another line's.
    pub(super) fn pop_if(&mut self, fits: impl FnOnce(&Command) -> bool) -> Option<Command> {
        // Whoever sends nothing has a turn less to pass.
        while self.users.next().is_some() && !self.users.turn() {}
        if fits(self.users.next()?) { self.users.take() } else { None }
    }

    /// Takes a command out of its line, wherever it stands.
    pub(super) fn withdraw(&mut self, serial: u64) {
        self.users.withdraw(serial);
    }

    /// Nobody waits any more.
    pub(super) fn clear(&mut self) {
        self.users = Turns::default();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Waiter;
    use super::*;

    fn command(ctx_id: u32, serial: u64) -> Command {
        let (waiter, request) = (Waiter::Posted(serial), Vec::new());
        Command { serial, waiter, kind: 0, ctx_id, request, response_len: 0 }
    }

    fn drain(backlog: &mut Backlog) -> Vec<u64> {
        std::iter::from_fn(|| backlog.pop_if(|_| true)).map(|command| command.serial).collect()
    }

    #[test]
    fn lines_take_turns_and_keep_their_order() {
        let mut backlog = Backlog::default();
        for (ctx_id, line) in [(1, 1000), (2, 1000), (3, 0), (4, 7)] {
            backlog.assign(ctx_id, line);
        }
        backlog.forget(4);
        for (serial, ctx_id) in (10..).zip([1, 2, 1, 2, 3, 3, 0, 4]) {
            backlog.push(command(ctx_id, serial));
        }
        assert!(backlog.pop_if(|first| first.serial != 10).is_none(), "the first one keeps its turn");
        assert_eq!(drain(&mut backlog), [10, 14, 16, 11, 15, 17, 12, 13]);
        assert!(backlog.users.lines.is_empty() && backlog.users.order.is_empty());
    }

    #[test]
    fn answers_of_contexts_take_turns_within_their_users() {
        let mut backlog = Backlog::default();
        for (ctx_id, user) in [(1, 1000), (2, 1000), (3, 7)] {
            backlog.assign(ctx_id, user);
        }
        for (serial, ctx_id) in (10..).zip([1, 1, 1, 2, 3, 3]) {
            backlog.push(Command { kind: VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ..command(ctx_id, serial) });
        }
        backlog.push(command(1, 16));
        assert_eq!(drain(&mut backlog), [10, 14, 13, 15, 16, 11, 12]);
    }

    /// Serials of users' commands in the order in which they are taken; each is a user and the pages of a command.
    fn drained(commands: &[(u32, usize)]) -> Vec<u64> {
        let mut backlog = Backlog::default();
        for (serial, &(user, pages)) in (10..).zip(commands) {
            backlog.assign(user, user);
            backlog.push(Command { request: vec![0; pages * 4096], ..command(user, serial) });
        }
        drain(&mut backlog)
    }

    /// As many pages of a user who sends small ones go before one that is large; and it is not passed over for ever.
    #[test]
    fn large_command_takes_several_turns() {
        let large = 4 * TURN_PAGES;
        let small = TURN_PAGES;
        let commands = [(1, large), (1, 1), (2, small), (2, small), (2, small), (2, small), (2, small)];
        assert_eq!(drained(&commands), [12, 13, 14, 10, 15, 11, 16]);
        // Large ones take turns as small ones do, and nobody waits where nobody else does.
        assert_eq!(drained(&[(1, large), (1, large), (2, large), (2, large)]), [10, 12, 11, 13]);
        assert_eq!(drained(&[(1, large), (1, 1)]), [10, 11]);
    }

    #[test]
    fn large_command_lets_answers_of_its_user_go_before() {
        let mut backlog = Backlog::default();
        backlog.assign(2, 2);
        backlog.push(Command { request: vec![0; 4 * TURN_PAGES * 4096], ..command(1, 10) });
        for (serial, ctx_id) in (11..).zip([1, 1, 1, 1, 2, 2, 2, 2]) {
            backlog.push(Command { kind: VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ..command(ctx_id, serial) });
        }
        assert_eq!(drain(&mut backlog), [11, 15, 12, 16, 13, 17, 10, 18, 14]);
    }

    #[test]
    fn what_is_withdrawn_has_no_turn() {
        let mut backlog = Backlog::default();
        backlog.assign(1, 1);
        for (serial, ctx_id) in [(1, 1), (2, 0), (3, 0)] {
            backlog.push(command(ctx_id, serial));
        }
        backlog.withdraw(1);
        backlog.withdraw(3);
        backlog.withdraw(9);
        assert_eq!(drain(&mut backlog), [2]);
        backlog.push(command(1, 4));
        backlog.clear();
        assert!(backlog.pop_if(|_| true).is_none());
        backlog.push(command(1, 5));
        assert_eq!(drain(&mut backlog), [5]);
    }
}
