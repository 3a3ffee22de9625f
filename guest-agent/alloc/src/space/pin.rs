//! Memory that stays the program's own and is pinned where it stands, for processes that are trusted.

use super::Space;
use crate::left::{TOO_LARGE, Why};
use crate::link::Link;
use crate::piece::{Backing, Piece, Purpose, READ_WRITE, Sharing, Wakes};
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
        if !self.is_trusted() || range.is_empty() {
            return false;
        }
        if !self.table.has_room() {
            self.note(range, Why::Full);
            return false;
        }
        let Some(link) = self.link_mut() else { return false };
        if u64::try_from(range.len()).is_ok_and(|len| len > link.max_arena_bytes()) {
            self.note(range, TOO_LARGE);
            return false;
        }
        match pinned::pin(link, range) {
            Ok(id) => {
                let backing = Backing::Pinned { id, offset: 0, sharing };
                self.table.insert(Piece::new(range.start, range.len(), Purpose::Mapping, backing));
                true
            }
            Err(failure) => {
                self.on_unpinned(range, &failure);
                false
            }
        }
    }

    /// As [`Self::pin`]; before the process asks for a device, takes note of it.
    pub fn pin_or_remember(&mut self, range: &Range<usize>, sharing: Sharing) -> bool {
        if self.is_dormant() {
            return self.add_dormant(range, Purpose::Mapping, READ_WRITE, Wakes::Pinned(sharing));
        }
        self.pin(range, sharing)
    }

    /// Memory that is not pinned is as it was, so it ends no program.
    fn on_unpinned(&mut self, range: &Range<usize>, failure: &Failure) {
        match failure {
            Failure::Agent(failure) => self.log.add_failure(range, failure),
            Failure::Ring(_) | Failure::Register(_) => self.note(range, Why::NotPinned),
        }
        if !self.complained_of_pins {
            self.complained_of_pins = true;
            say(format_args!(
                "GPUs do not reach {} bytes that this program might pin: {failure}",
                range.len()
            ));
        }
        if let Failure::Agent(failure) = failure
            && failure.is_final()
        {
            self.fail(failure);
        }
    }
}
