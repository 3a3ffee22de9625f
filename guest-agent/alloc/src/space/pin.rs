//! Memory that stays the program's own and is pinned where it stands, for processes that are trusted.

use super::{Space, State};
use crate::link::Link;
use crate::piece::{Backing, Piece, Purpose, Sharing};
use crate::pinned::{self, Failure};
use crate::say::say;
use std::ops::Range;

impl Space {
    /// Whether the agent takes what this process has pinned.
    pub fn is_trusted(&self) -> bool {
        self.link().is_some_and(Link::is_trusted)
    }

    /// Pins memory of which nothing is in the table, and shows it to the agent. False: GPUs do not reach it.
    pub fn pin(&mut self, range: &Range<usize>, sharing: Sharing) -> bool {
        let wanted = self.is_trusted() && !range.is_empty() && self.table.has_room();
        let State::Up(link) = &mut self.state else { return false };
        if !wanted || u64::try_from(range.len()).is_ok_and(|len| len > link.max_arena_bytes()) {
            return false;
        }
        match pinned::pin(link, range) {
            Ok(id) => {
                let backing = Backing::Pinned { id, offset: 0, sharing };
                self.table.insert(Piece::new(range.start, range.len(), Purpose::Mapping, backing));
                true
            }
            Err(failure) => {
                self.on_unpinned(range.len(), &failure);
                false
            }
        }
    }

    /// Memory that is not pinned is as it was, so it ends no program.
    fn on_unpinned(&mut self, len: usize, failure: &Failure) {
        if !self.complained_of_pins {
            self.complained_of_pins = true;
            say(format_args!("GPUs do not reach {len} bytes that this program might pin: {failure}"));
        }
        if let Failure::Agent(failure) = failure
            && failure.is_final()
        {
            self.fail(failure);
        }
    }
}
