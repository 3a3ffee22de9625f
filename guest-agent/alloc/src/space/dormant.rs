//! Before the process asks for a device, and when it does.
//!
//! A program that never does pays for next to nothing: its memory is its own, anonymous or a file's, and the table says
//! what is to become of it. When it asks, each piece is brought into the reach of GPUs at its address; a piece that cannot
//! be stays as it is, and is counted as left.

#![expect(unsafe_code, reason = "maps memory over memory that is in use")]

use super::{Space, State};
use crate::fd::Kept;
use crate::left::{TOO_LARGE, Why};
use crate::link::Link;
use crate::maps::{copy_mapped, import_kept};
use crate::piece::{Backing, InChild, Piece, Purpose, READ_WRITE, Wakes};
use crate::proc;
use std::ops::{ControlFlow, Range};

impl Space {
    /// Whether nothing has asked for a device yet.
    pub fn is_dormant(&self) -> bool {
        matches!(self.state, State::Dormant)
    }

    /// Connects to the agent. False: there is none.
    pub fn connect(&mut self) -> bool {
        let opened = Link::open(self.socket());
        match opened {
            Ok(link) => {
                self.state = State::Up(link);
                true
            }
            Err(failure) => {
                self.state = State::Down;
                self.complain(&failure);
                false
            }
        }
    }

    /// Takes note of memory of which nothing is in the table. False: there is no room.
    pub fn add_dormant(&mut self, range: &Range<usize>, purpose: Purpose, prot: i32, wakes: Wakes) -> bool {
        let room = self.table.has_room();
        if room {
            let piece = Piece::new(range.start, range.len(), purpose, Backing::Dormant(wakes));
            self.table.insert(Piece { prot, ..piece });
        } else {
            self.note(range, Why::Full);
        }
        room
    }

    /// Brings what was taken note of into the reach of GPUs, or lets it be if there is no agent.
    ///
    /// # Safety
    /// All other threads stand still, if there is an agent, and this one stands on no piece.
    pub unsafe fn awaken(&mut self) {
        self.each_in(&(0..usize::MAX), |space, piece| {
            let Backing::Dormant(wakes) = piece.backing else { return };
            space.table.remove(piece.base);
            // SAFETY: as the caller says.
            if unsafe { space.awaken_piece(&piece) } {
                // It is one piece, so there is nothing to split.
                space.change(&piece.range(), |awake| awake.in_child = piece.in_child).ok();
            } else if piece.purpose.is_heaps() {
                space.table.insert(Piece { backing: Backing::Own, ..piece });
            } else if piece.prot == READ_WRITE && (!matches!(wakes, Wakes::Pinned(_)) || space.is_trusted()) {
                space.leave(piece.len);
            }
        });
    }

    /// Moves memory of which the table says nothing, such as the program has not protected meanwhile, into arenas at the
    /// same addresses.
    ///
    /// # Safety
    /// As [`Self::adopt`].
    pub unsafe fn adopt_plain(&mut self, range: &Range<usize>, purpose: Purpose) {
        let mut done = range.start;
        while done < range.end {
            let Some(mut part) = next_plain(&(done..range.end)) else { return };
            if let Some(known) = self.first_in(&part) {
                part.end = known.base.max(part.start);
                done = known.end();
            } else {
                done = part.end;
            }
            if part.is_empty() {
                continue;
            }
            let (in_child, end) = self.advised.first(&part);
            if end < part.end {
                (part.end, done) = (end, end);
            }
            let (base, len) = (part.start, part.len());
            // SAFETY: the arena has as many bytes. The kernel says so where a page is a guard.
            let copy = |to| unsafe { copy_mapped(base, to, len) };
            // SAFETY: as the caller says.
            if unsafe { self.adopt_piece(&Piece::new(base, len, purpose, Backing::Own), copy) } {
                // It is one piece, so there is nothing to split.
                self.change(&part, |piece| piece.in_child = in_child).ok();
            }
        }
    }

    /// Takes note of what the program has told the kernel that forked children have, if the table does not keep it.
    pub fn take_advice(&mut self, range: &Range<usize>, in_child: InChild) {
        let mut kept = range.start;
        self.each_in(range, |_, piece| {
            if piece.purpose.is_kept() && !piece.is_let_be() && piece.base <= kept {
                kept = piece.end();
            }
        });
        if kept < range.end {
            self.advised.add(range, in_child);
        }
    }

    /// Lets memory in a range be what it is, whatever is asked for, also such as the table says nothing of.
    pub fn let_be(&mut self, range: &Range<usize>, why: Why) {
        // Without room to split a piece it goes as a whole.
        let whole = self.split(range.start).is_err() | self.split(range.end).is_err();
        let mut done = range.start;
        self.each_in(range, |space, piece| {
            let before = done..piece.base;
            done = piece.end();
            if matches!(piece.backing, Backing::Dormant(_)) {
                space.let_piece_be(piece, why);
            }
            // Globals, or a stack: a piece keeps them.
            if !whole {
                space.keep(&before, why);
            }
        });
        if !whole {
            self.keep(&(done..range.end), why);
        }
    }

    /// Takes note of memory of which nothing is in the table, that it stays what it is.
    pub fn keep(&mut self, range: &Range<usize>, why: Why) {
        if !range.is_empty() {
            self.add_own(range, Purpose::Mapping, READ_WRITE);
            self.change(range, |piece| piece.stays = true).ok();
            self.note(range, why);
        }
    }

    /// As [`Self::awaken`], where it cannot be done.
    pub fn let_all_be(&mut self, why: Why) {
        self.each_in(&(0..usize::MAX), |space, piece| {
            if matches!(piece.backing, Backing::Dormant(_)) {
                space.let_piece_be(piece, why);
            }
        });
        self.log.refuse(why);
    }

    fn let_piece_be(&mut self, mut piece: Piece, why: Why) {
        self.table.remove(piece.base);
        piece.backing.file().and_then(Option::take).into_iter().for_each(Kept::close);
        self.note(&piece.range(), why);
        if piece.purpose.is_heaps() {
            let stays = matches!(why, Why::Advised | Why::Watched | Why::Protected);
            self.table.insert(Piece { backing: Backing::Own, stays, ..piece });
        } else if piece.prot == READ_WRITE {
            self.leave(piece.len);
        }
    }

    /// Lets be what is not as the table has it: the program has changed it by system calls that the library does not see.
    pub fn let_changed_be(&mut self) {
        // Without /proc no thread stands still either, and nothing is moved.
        proc::each_mapping(|mapping| {
            if !mapping.plain {
                self.each_in(&mapping.range, |space, piece| {
                    let moves = matches!(piece.backing, Backing::Dormant(Wakes::Arena | Wakes::Copy));
                    if moves && piece.prot == READ_WRITE {
                        space.let_piece_be(piece, Why::Changed);
                    }
                });
            }
            ControlFlow::Continue(())
        });
    }

    /// Lets be what the program watches by a userfaultfd: an arena would not be watched, and all of its pages are there.
    pub fn let_watched_be(&mut self) {
        if proc::has_userfaultfd().unwrap_or(true) {
            proc::each_watched(|range| self.let_be(&range, Why::Watched));
        }
    }

    /// The next mapping of a file that is to be copied. From now on it is as one that was.
    pub fn take_copy(&mut self, rest: &mut Range<usize>) -> Option<Range<usize>> {
        while let Some(piece) = self.table.first_in(rest) {
            rest.start = piece.end();
            if piece.is_copied() {
                self.set_backing(piece.base, Backing::Dormant(Wakes::Arena));
                return Some(piece.range());
            }
        }
        None
    }

    /// Lets those be that were not taken.
    pub fn let_copies_be(&mut self) {
        self.each_in(&(0..usize::MAX), |space, piece| {
            if piece.is_copied() {
                space.let_piece_be(piece, Why::Changed);
            }
        });
    }

    /// # Safety
    /// As [`Self::awaken`].
    unsafe fn awaken_piece(&mut self, piece: &Piece) -> bool {
        let Piece { base, len, mut backing, .. } = *piece;
        let range = piece.range();
        let file = backing.file().and_then(Option::take);
        let fits = u64::try_from(len).is_ok_and(|len| len <= self.max_arena_bytes());
        let plain = piece.prot == READ_WRITE;
        if !plain || !fits && !piece.purpose.is_heaps() {
            // Of what was mapped so it is known already.
            if plain || self.log.find(base).is_none() {
                self.note(&range, if plain { TOO_LARGE } else { Why::Protected });
            }
            file.into_iter().for_each(Kept::close);
            return false;
        }
        match backing {
            Backing::Dormant(Wakes::Shared { at, .. }) => {
                file.is_some_and(|file| import_kept(self, &range, file, at))
            }
            Backing::Dormant(Wakes::Pinned(sharing)) => self.pin(&range, sharing),
            _ => {
                let mut copied = true;
                let copy = |to| {
                    // SAFETY: the arena has as many bytes. The kernel says so where the program's memory has gone meanwhile.
                    copied = unsafe { copy_mapped(base, to, len) };
                    copied
                };
                // SAFETY: as the caller says.
                let adopted = unsafe { self.adopt_piece(piece, copy) };
                if !copied {
                    self.note(&range, Why::Changed);
                }
                adopted
            }
        }
    }
}

/// The first part of a range that is private, readable and writable.
fn next_plain(range: &Range<usize>) -> Option<Range<usize>> {
    let mut found = 0..0;
    proc::each_mapping(|mapping| {
        let part = mapping.range.start.max(range.start)..mapping.range.end.min(range.end);
        if mapping.plain && !part.is_empty() {
            found = part;
        }
        let ended = !found.is_empty() || mapping.range.end >= range.end;
        if ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    (!found.is_empty()).then_some(found)
}
