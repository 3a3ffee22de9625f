//! The memory of a forked child: a context of its own, and copies in the place of what it shares with its parent.

#![expect(unsafe_code, reason = "maps memory over memory that is in use")]

use super::mapping::{copy_over, map_anonymous, map_arena, unmap};
use super::{Space, State};
use crate::fd::Kept;
use crate::piece::{Backing, InChild, Piece, Purpose, Wakes};
use crate::say::{give_up, say};
use rustix::mm::{Advice, MapFlags};
use std::ops::Range;

impl Space {
    /// Whether a forked child would share memory with its parent that it must not share.
    pub fn is_shared(&self) -> bool {
        self.table.pieces().iter().any(|piece| piece.backing.is_agents())
    }

    /// In a forked child: puts copies in the place of what it shares with its parent. It has asked for no device yet, so
    /// they are its own memory; if it is to be early, they are arenas of a context of its own. Stacks are of threads that
    /// the child does not have, but for the one that `mine` is of.
    ///
    /// # Safety
    /// The process has one thread, which stands on no piece, and the parent does nothing meanwhile that the child must
    /// not see.
    pub unsafe fn renew(&mut self, mine: &Range<usize>) {
        // Pieces may be shared though the connection is gone.
        let had_one = matches!(self.state, State::Up(_));
        if had_one || !self.early && matches!(self.state, State::Down) {
            self.complained = false;
            self.complained_of_pins = false;
            self.state = State::Dormant;
        }
        if had_one && self.early {
            self.connect();
        }
        self.each_in(&(0..usize::MAX), |space, piece| match piece.backing {
            Backing::Own | Backing::Dormant(_) if piece.in_child == InChild::Nothing => {
                // It is a whole piece, and no GPU reaches it, so this cannot fail.
                space.vacate(&piece.range()).ok();
            }
            Backing::Own if space.is_dormant() && !piece.stays => {
                space.set_backing(piece.base, Backing::Dormant(Wakes::Arena))
            }
            Backing::Own | Backing::Dormant(_) => {}
            // SAFETY: as the caller says.
            Backing::Arena { .. } | Backing::Withdrawn => unsafe {
                space.renew_piece(piece, mine.contains(&piece.base))
            },
            Backing::Shared { file, at, .. } => {
                space.table.remove(piece.base);
                match file {
                    Some(file) if piece.in_child == InChild::Copy && space.is_dormant() => {
                        let wakes = Wakes::Shared { file: Some(file), at };
                        space.table.insert(Piece { backing: Backing::Dormant(wakes), ..piece });
                    }
                    Some(file) if piece.in_child == InChild::Copy => {
                        space.import(piece.base, piece.len, file, at);
                    }
                    file => file.into_iter().for_each(Kept::close),
                }
            }
            Backing::Pinned { sharing, .. } => {
                space.table.remove(piece.base);
                if piece.in_child == InChild::Nothing {
                } else if space.is_dormant() {
                    space.table.insert(Piece { backing: Backing::Dormant(Wakes::Pinned(sharing)), ..piece });
                } else if space.pin(&piece.range(), sharing) {
                    space.change(&piece.range(), |pinned| pinned.in_child = piece.in_child).ok();
                }
            }
        });
    }

    /// # Safety
    /// As [`Self::renew`].
    unsafe fn renew_piece(&mut self, piece: Piece, mine: bool) {
        self.table.remove(piece.base);
        let reached = matches!(piece.backing, Backing::Arena { .. });
        let unused = piece.purpose == Purpose::Stack && !mine;
        let zeros = unused || piece.in_child == InChild::Zeros;
        if piece.in_child == InChild::Nothing {
            return unmap(piece.base, piece.len);
        }
        if zeros {
            // SAFETY: as the caller says.
            unsafe { map_anonymous(piece.base, piece.len, piece.prot, MapFlags::FIXED) };
            if piece.in_child == InChild::Zeros {
                // For children of its own, which the kernel gives their memory.
                let at = std::ptr::with_exposed_provenance_mut(piece.base);
                // SAFETY: the memory is this process' own, and stays as it is.
                unsafe { rustix::mm::madvise(at, piece.len, Advice::LinuxWipeOnFork) }.ok();
            }
        }
        if unused {
            return;
        }
        let made = reached.then(|| self.take_arena(piece.base, piece.len)).flatten();
        let done = match &made {
            // SAFETY: nobody needs what is there.
            Some(made) if zeros => unsafe { map_arena(made, piece.base, piece.len) },
            None if zeros => true,
            // SAFETY: as the caller says.
            made => unsafe { copy_over(made.as_ref(), &piece) },
        };
        if !done {
            // It would go on changing its parent's memory.
            say(format_args!(
                "no memory to copy {:#x} bytes for a forked child, which ends: have it need less, or set no SVM_ALLOC",
                piece.len
            ));
            give_up();
        }
        let own = if self.is_dormant() { Backing::Dormant(Wakes::Arena) } else { Backing::Own };
        let backing = made.map_or(own, |made| Backing::Arena { id: made.id, offset: 0 });
        if backing.is_agents() || piece.purpose.is_kept() {
            self.table.insert(Piece { backing, ..piece });
        }
    }
}
