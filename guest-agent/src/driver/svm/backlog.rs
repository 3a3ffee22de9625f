//! Commands that wait for room in the ring. Users take turns, so that one user's commands, many and large as they are, hold
//! up another's by one. Of a user, the answers to faults of each context have a line, and all else has one more; these take
//! turns as well, so that thousands of faults of one context hold up another's answer by one. A line keeps its order.
//!
//! What names no context that is known is the driver's own, which counts as a user. Whoever is first waits until there is
//! room for it: what is large gets its turn as well.

use super::Command;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use virtio_gpu_svm::protocol::control::VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE;

/// Commands that wait, one of which is the next.
trait Waiting: Default {
    fn next(&self) -> Option<&Command>;
    fn take(&mut self) -> Option<Command>;
    /// Drops a command, wherever it stands.
    fn withdraw(&mut self, serial: u64);
}

impl Waiting for VecDeque<Command> {
    fn next(&self) -> Option<&Command> {
        self.front()
    }

    fn take(&mut self) -> Option<Command> {
        self.pop_front()
    }

    fn withdraw(&mut self, serial: u64) {
        self.retain(|command| command.serial != serial);
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
    users: Turns<User, Turns<Answered, VecDeque<Command>>>,
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
        self.users.line(user).line(answered).push_back(command);
    }

    /// Takes the command whose turn it is, if `fits` says so; the next turn is another line's.
    pub(super) fn pop_if(&mut self, fits: impl FnOnce(&Command) -> bool) -> Option<Command> {
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
