//! The table of pieces: memory of this process that the library has put something behind, or will when the process asks for
//! a device, sorted by address.
//!
//! Only keeps account; [`crate::space`] does what it says. It has a fixed size, because it must not allocate.

use crate::fd::Kept;
use std::ops::Range;

/// Bytes of a page.
pub const PAGE: usize = guest_agent::driver::dma::PAGE_BYTES;
/// What GPUs reach is mapped so.
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Most pieces of memory. The agent allows a context fewer arenas by default; the rest is for parts of them.
const MAX_PIECES: usize = 4096;
/// Room that new memory leaves for the parts of what there is.
const SPARE: usize = 512;

/// What a piece of memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Small blocks.
    Heap,
    /// One large block, or a part of it.
    Block,
    /// Globals of the program or of a library.
    Globals,
    /// Globals of a library that may be unloaded.
    Loaded,
    /// The upper part of a thread's stack.
    Stack,
    /// What the program has mapped: zeros at first.
    Mapping,
    /// As above, but a file's contents at first.
    File,
}

impl Purpose {
    /// Whether the heap keeps account of it, wherever it is.
    pub fn is_heaps(self) -> bool {
        matches!(self, Self::Heap | Self::Block)
    }

    /// Whether it stays in the table as anonymous memory: the heap keeps account of all its memory, and what the program
    /// has mapped at once is one mapping to the program, though it may be several to the kernel by now.
    pub fn is_kept(self) -> bool {
        matches!(self, Self::Heap | Self::Block | Self::Mapping | Self::File)
    }
}

/// Whose the memory of a piece is.
#[derive(Clone, Copy)]
pub enum Backing {
    /// Anonymous memory: this process' own, out of the reach of GPUs.
    Own,
    /// The arena `id` from `offset` on.
    Arena { id: u64, offset: usize },
    /// It was an arena's, and GPUs do not reach it any more. Still the agent's memory, so a forked child shares it.
    Withdrawn,
    /// The program's own shared mapping, which the agent knows as the arena `id` from `offset` on. `file`: the same
    /// memory again, for a forked child; `at`: where the piece begins in it.
    Shared { id: u64, offset: usize, file: Option<Kept>, at: u64 },
    /// The program's own memory, which the library has pinned: the agent knows it as the arena `id` from `offset` on.
    Pinned { id: u64, offset: usize, sharing: Sharing },
    /// The program's own memory, and what becomes of it when the process first asks for a device.
    Dormant(Wakes),
}

/// What becomes of memory when the process first asks for a device.
#[derive(Clone, Copy)]
pub enum Wakes {
    /// An arena takes its place, with its contents.
    Arena,
    /// The same; and until then it is a mapping of a file.
    Copy,
    /// The agent is shown the file: a descriptor of the library's own, and where the piece begins in it.
    Shared { file: Option<Kept>, at: u64 },
    /// It is pinned, if the process is trusted.
    Pinned(Sharing),
}

/// Who sees what is written to pinned memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// This process alone; a forked child is given a copy by the kernel.
    Private,
    /// Forked children too.
    Family,
    /// Whoever attaches the System V segment, which begins at this address here.
    Segment(usize),
}

impl Backing {
    /// Whether a forked child must have a copy of it.
    pub fn is_agents(&self) -> bool {
        matches!(self, Self::Arena { .. } | Self::Withdrawn)
    }

    /// Whether GPUs and the process must go on having the same pages when the process gives up what is in them.
    pub fn keeps_pages(&self) -> bool {
        self.is_agents() || matches!(self, Self::Pinned { sharing: Sharing::Private, .. })
    }

    /// Whether others may have the same pages because the program has mapped them so.
    pub fn is_shared(&self) -> bool {
        match self {
            Self::Shared { .. } | Self::Dormant(Wakes::Shared { .. }) => true,
            Self::Pinned { sharing, .. } | Self::Dormant(Wakes::Pinned(sharing)) => {
                *sharing != Sharing::Private
            }
            _ => false,
        }
    }

    /// The descriptor that goes with it.
    pub fn file(&mut self) -> Option<&mut Option<Kept>> {
        match self {
            Self::Shared { file, .. } | Self::Dormant(Wakes::Shared { file, .. }) => Some(file),
            _ => None,
        }
    }

    fn behind(mut self, len: usize) -> Self {
        match &mut self {
            Self::Own | Self::Withdrawn | Self::Dormant(Wakes::Arena | Wakes::Copy | Wakes::Pinned(_)) => {}
            Self::Arena { offset, .. } | Self::Pinned { offset, .. } => *offset += len,
            Self::Shared { offset, at, .. } => {
                *offset += len;
                *at += u64::try_from(len).unwrap_or(0);
            }
            Self::Dormant(Wakes::Shared { at, .. }) => *at += u64::try_from(len).unwrap_or(0),
        }
        self
    }
}

/// What a forked child has in a piece's place (MADV_DONTFORK, MADV_WIPEONFORK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InChild {
    Copy,
    Nothing,
    Zeros,
}

/// A piece of memory.
#[derive(Clone, Copy)]
pub struct Piece {
    pub base: usize,
    pub len: usize,
    pub purpose: Purpose,
    pub backing: Backing,
    /// Bytes of the large block that begins here; else 0.
    pub block: usize,
    /// PROT_*, as the program has it; memory that GPUs reach is readable and writable.
    pub prot: i32,
    pub in_child: InChild,
    /// Whether it is never moved, in no forked child either.
    pub stays: bool,
}

impl Piece {
    /// Readable and writable, its beginning a block's if it is for one.
    pub fn new(base: usize, len: usize, purpose: Purpose, backing: Backing) -> Self {
        let block = if purpose == Purpose::Block { len } else { 0 };
        Self { base, len, purpose, backing, block, prot: READ_WRITE, in_child: InChild::Copy, stays: false }
    }

    /// Whether it is a mapping of a file that is to be copied.
    pub fn is_copied(&self) -> bool {
        matches!(self.backing, Backing::Dormant(Wakes::Copy)) && self.prot == READ_WRITE
    }

    /// Whether it is a copy of what was a file's, which is none to the kernel.
    pub fn was_files(&self) -> bool {
        self.purpose == Purpose::File && !matches!(self.backing, Backing::Dormant(Wakes::Copy))
    }

    /// Whether it is the program's own, and none of the library's matter but that it stays.
    pub fn is_let_be(&self) -> bool {
        self.stays && !self.purpose.is_heaps()
    }

    pub fn end(&self) -> usize {
        self.base + self.len
    }

    pub fn range(&self) -> Range<usize> {
        self.base..self.end()
    }
}

/// Pieces, none of which overlaps another.
pub struct Table {
    pieces: [Piece; MAX_PIECES],
    count: usize,
}

impl Table {
    pub const fn new() -> Self {
        let none = Piece {
            base: 0,
            len: 0,
            purpose: Purpose::Heap,
            backing: Backing::Own,
            block: 0,
            prot: 0,
            in_child: InChild::Copy,
            stays: false,
        };
        Self { pieces: [none; MAX_PIECES], count: 0 }
    }

    pub fn pieces(&self) -> &[Piece] {
        self.pieces.get(..self.count).unwrap_or_default()
    }

    /// Whether there is room for a piece of new memory.
    pub fn has_room(&self) -> bool {
        self.count < MAX_PIECES - SPARE
    }

    /// The piece that begins at `base`.
    pub fn find(&self, base: usize) -> Option<Piece> {
        let at = self.position(base)?;
        self.pieces().get(at).copied()
    }

    /// The first piece of which a part lies in the range.
    pub fn first_in(&self, range: &Range<usize>) -> Option<Piece> {
        let at = self.pieces().partition_point(|piece| piece.end() <= range.start);
        self.pieces().get(at).copied().filter(|piece| piece.base < range.end)
    }

    /// Adds a piece. The caller has looked whether there is room.
    pub fn insert(&mut self, piece: Piece) {
        let at = self.pieces().partition_point(|other| other.base < piece.base);
        if self.count < MAX_PIECES {
            self.pieces.copy_within(at..self.count, at + 1);
            self.count += 1;
        }
        if let Some(entry) = self.pieces.get_mut(at) {
            *entry = piece;
        }
    }

    pub fn remove(&mut self, base: usize) -> Option<Piece> {
        let at = self.position(base)?;
        let piece = self.pieces().get(at).copied();
        self.pieces.copy_within(at + 1..self.count, at);
        self.count -= 1;
        piece
    }

    /// The piece that begins at `base`, to be changed; not where it stands.
    pub fn entry(&mut self, base: usize) -> Option<&mut Piece> {
        let at = self.position(base)?;
        self.pieces.get_mut(at)
    }

    /// Has a piece begin at `at` if one lies across it. `None`: there is no room. Else the piece that is new.
    pub fn split(&mut self, at: usize) -> Option<Option<Piece>> {
        let across = self.first_in(&(at..at + 1)).filter(|piece| piece.base < at);
        let Some(piece) = across else { return Some(None) };
        if self.count == MAX_PIECES {
            return None;
        }
        let len = at - piece.base;
        if let Some(entry) = self.entry(piece.base) {
            entry.len = len;
        }
        let rest =
            Piece { base: at, len: piece.len - len, block: 0, backing: piece.backing.behind(len), ..piece };
        self.insert(rest);
        Some(Some(rest))
    }

    /// Joins the piece that begins at `at` with the one before, if nothing tells them apart: both dormant, mapped and
    /// protected alike.
    pub fn join(&mut self, at: usize) {
        let (Some(piece), Some(before)) =
            (self.find(at), at.checked_sub(1).and_then(|last| self.first_in(&(last..at))))
        else {
            return;
        };
        let wakes = |piece: &Piece| match piece.backing {
            Backing::Dormant(Wakes::Arena) => Some(None),
            Backing::Dormant(Wakes::Pinned(sharing @ Sharing::Private)) => Some(Some(sharing)),
            _ => None,
        };
        let mapped = |piece: &Piece| piece.purpose == Purpose::Mapping && wakes(piece).is_some();
        let alike =
            before.prot == piece.prot && before.in_child == piece.in_child && wakes(&before) == wakes(&piece);
        if alike && mapped(&piece) && mapped(&before) {
            self.remove(at);
            if let Some(entry) = self.entry(before.base) {
                entry.len += piece.len;
            }
        }
    }

    fn position(&self, base: usize) -> Option<usize> {
        self.pieces().binary_search_by_key(&base, |piece| piece.base).ok()
    }
}
