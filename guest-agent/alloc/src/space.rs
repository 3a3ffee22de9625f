//! The memory of this process that is the library's matter: arenas, what takes their place when the agent gives none,
//! mappings of the program that the agent was shown, and what will be one of these when the process asks for a device.
//!
//! Owns the connection and the table ([`crate::piece`]). So a large block is found when it is freed, and a forked child
//! knows what it must not share. Used under the heap's lock only.
//!
//! Memory that the agent does not give is anonymous memory: the program works, and GPUs do not reach it. The first time
//! that is said in a line, or ends the program if SVM_ALLOC=require.
//!
//! Memory leaves the reach of GPUs ([`Space::withdraw`]) before anything else is done with it, and what is unmapped or
//! protected meanwhile stays at its place in the table until it is.

#![expect(unsafe_code, reason = "maps memory over memory that is in use")]

mod advised;
mod child;
mod dormant;
mod mapping;
mod pin;

pub use mapping::{copy_piece, map_anonymous, unmap};

use crate::fd::Kept;
use crate::fork;
use crate::left::{Log, Why};
use crate::link::{Failure, Link, Made};
use crate::others;
use crate::piece::{Backing, InChild, PAGE, Piece, Purpose, READ_WRITE, Table, Wakes};
use crate::say::{give_up, say};
use advised::Advised;
use guest_agent::message::DEFAULT_SOCKET;
use mapping::{copy_over, fill_over, map_arena};
use rustix::mm::MapFlags;
use std::ffi::CStr;
use std::ops::Range;
use virtio_gpu_svm::protocol::errno;

/// Most bytes of a socket's path, with the zero at its end: as in `sockaddr_un`.
pub const PATH: usize = guest_agent::client::SOCKET_NAME;

enum State {
    /// The program's environment cannot be read yet.
    Early,
    /// Nothing has asked for a device ([`dormant`]).
    Dormant,
    Up(Link),
    /// Without an agent.
    Down,
}

/// There is no room in the table: as when the kernel has no room for more mappings.
pub struct Full;

/// The table and the connection.
pub struct Space {
    state: State,
    socket: [u8; PATH],
    /// The program's memory is brought into reach at once, not only when it asks for a device.
    early: bool,
    /// Memory that GPUs do not reach ends the program.
    require: bool,
    complained: bool,
    /// The same for memory that could not be pinned.
    complained_of_pins: bool,
    follows_forks: bool,
    advised: Advised,
    table: Table,
    left: Left,
    log: Log,
}

/// Mappings of the program, and of the heap, that GPUs do not reach though they might have.
#[derive(Clone, Copy)]
pub struct Left {
    pub mappings: u64,
    pub bytes: u64,
}

impl Space {
    pub const fn new() -> Self {
        Self {
            state: State::Early,
            socket: [0; PATH],
            early: false,
            require: false,
            complained: false,
            complained_of_pins: false,
            follows_forks: false,
            advised: Advised::new(),
            table: Table::new(),
            left: Left { mappings: 0, bytes: 0 },
            log: Log::new(),
        }
    }

    /// Reads the environment as soon as it is there. What was allocated before stays out of reach.
    pub fn start(&mut self) {
        if !matches!(self.state, State::Early) {
            return;
        }
        if !self.follows_forks {
            self.follows_forks = true;
            fork::watch();
        }
        if !environment_is_there() {
            return;
        }
        let wanted = variable(c"SVM_ALLOC").map_or(&[][..], CStr::to_bytes);
        self.require = wanted == b"require";
        self.early = self.require || wanted == b"early";
        let named = variable(c"SVM_AGENT_SOCKET").map_or(DEFAULT_SOCKET.as_bytes(), CStr::to_bytes);
        // One that is too long is cut, and then nobody listens there. The last byte stays zero.
        for (to, from) in self.socket.iter_mut().take(PATH - 1).zip(named) {
            *to = *from;
        }
        self.state = State::Dormant;
    }

    /// Whether the program wants its memory in reach at once.
    pub fn is_early(&self) -> bool {
        self.early
    }

    /// Where the agent listens.
    pub fn socket(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.socket).unwrap_or_default()
    }

    /// The connection. A child that the library does not know of (vfork, `_Fork`, a raw clone) has none.
    fn link(&self) -> Option<&Link> {
        match &self.state {
            State::Up(link) if link.is_mine() => Some(link),
            _ => None,
        }
    }

    fn link_mut(&mut self) -> Option<&mut Link> {
        match &mut self.state {
            State::Up(link) if link.is_mine() => Some(link),
            _ => None,
        }
    }

    /// The number of the process' context, if it has one still: an agent that was replaced knows nothing of it.
    pub fn ctx_id(&mut self) -> Option<u32> {
        if self.link().is_some_and(Link::has_ended) {
            self.fail(&Failure::Broken);
        }
        self.link().map(Link::ctx_id)
    }

    /// Bytes of arenas that the process may have.
    pub fn max_arena_bytes(&self) -> u64 {
        self.link().map_or(0, Link::max_arena_bytes)
    }

    fn complain(&mut self, failure: &Failure) {
        if self.complained && !self.require {
            return;
        }
        self.complained = true;
        let socket = self.socket().to_str().unwrap_or("the socket");
        say(format_args!("GPUs do not reach all memory of this program. {socket}: {failure}"));
        self.end_if_required();
    }

    /// Other threads do not stand still, so what there is stays where it is.
    pub fn complain_of_threads(&mut self, failure: &others::Failure) {
        say(format_args!(
            "GPUs do not reach what memory this program has had so far: {failure}; have it ask for a device earlier, or start it by `svm-agent run --early`"
        ));
        self.end_if_required();
    }

    fn end_if_required(&self) {
        if self.require {
            say(format_args!("SVM_ALLOC=require, so the program ends"));
            give_up();
        }
    }

    fn fail(&mut self, failure: &Failure) {
        if failure.is_final() {
            self.state = State::Down;
        }
        self.complain(failure);
    }

    // New memory.

    /// Maps zeroed memory, whole pages of it, aligned to a power of two.
    pub fn create(&mut self, len: usize, align: usize, purpose: Purpose) -> Option<*mut u8> {
        self.start();
        let room = if align > PAGE { len.checked_add(align)? } else { len };
        // Taken at once as anonymous memory: an arena then takes its place, if there is one.
        // SAFETY: without MAP_FIXED no existing mapping is replaced.
        let reserved = unsafe { map_anonymous(0, room, READ_WRITE, MapFlags::empty()) }?;
        let base = reserved.checked_next_multiple_of(align.max(PAGE))?;
        unmap(reserved, base - reserved);
        unmap(base + len, room - len - (base - reserved));
        let range = base..base + len;
        let vacant = self.vacate(&range).is_ok();
        if vacant && !self.table.has_room() && purpose == Purpose::Heap {
            // Small blocks go on where GPUs do not reach. A fork copies that memory by itself.
            self.leave(len);
            self.note(&range, Why::Full);
            return Some(std::ptr::with_exposed_provenance_mut(base));
        }
        if !vacant || !self.table.has_room() {
            unmap(base, len);
            return None;
        }
        // SAFETY: the range was reserved above, and nobody knows it yet.
        if !unsafe { self.cover(base, len, purpose) } {
            self.table.insert(Piece::new(base, len, purpose, Backing::Own));
        }
        Some(std::ptr::with_exposed_provenance_mut(base))
    }

    /// Puts an arena of zeros in the place of memory of which nothing is in the table. False: it stays as it is.
    ///
    /// # Safety
    /// The range is mapped, and nobody needs what is in it.
    pub unsafe fn cover(&mut self, base: usize, len: usize, purpose: Purpose) -> bool {
        if self.is_dormant() {
            return self.add_dormant(&(base..base + len), purpose, READ_WRITE, Wakes::Arena);
        }
        let piece = Piece::new(base, len, purpose, Backing::Own);
        // SAFETY: as the caller says.
        self.adopt_by(piece, |made| unsafe { map_arena(made, base, len) })
    }

    /// Moves memory that is there already into an arena at the same address, contents and all. False: it stays as it is.
    ///
    /// # Safety
    /// The range is mapped, readable and writable, and nobody else uses it meanwhile. The caller does not stand on it.
    pub unsafe fn adopt(&mut self, base: usize, len: usize, purpose: Purpose) -> bool {
        // What is in the table has gone without its knowing: a thread's stack, if the thread ended by a system call.
        if self.vacate(&(base..base + len)).is_err() {
            return false;
        }
        let piece = Piece::new(base, len, purpose, Backing::Own);
        // SAFETY: the caller keeps others away from the range.
        self.adopt_by(piece, |made| unsafe { copy_over(Some(made), &piece) })
    }

    /// As [`Self::adopt`]: `place` puts the arena there, with contents.
    fn adopt_by(&mut self, piece: Piece, place: impl FnOnce(&Made) -> bool) -> bool {
        if !self.table.has_room() {
            self.note(&piece.range(), Why::Full);
            return false;
        }
        let Some(made) = self.take_arena(piece.base, piece.len) else { return false };
        if !place(&made) {
            self.give_arena(made.id);
            return false;
        }
        self.table.insert(Piece { backing: Backing::Arena { id: made.id, offset: 0 }, ..piece });
        true
    }

    /// Puts an arena with what `fill` writes in the place of a piece that is not in the table. False: it stays as it is.
    ///
    /// # Safety
    /// Nobody uses the memory meanwhile.
    pub unsafe fn adopt_piece(&mut self, piece: &Piece, fill: impl FnOnce(usize) -> bool) -> bool {
        // SAFETY: as the caller says.
        self.adopt_by(*piece, |made| unsafe { fill_over(made, piece.base, piece.len, fill) })
    }

    /// Counts a mapping that GPUs do not reach.
    pub fn leave(&mut self, len: usize) {
        self.left.mappings = self.left.mappings.saturating_add(1);
        self.left.bytes = self.left.bytes.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
    }

    /// Remembers why GPUs do not reach memory.
    pub fn note(&mut self, range: &Range<usize>, why: Why) {
        // Without an agent that is the reason, and no other.
        if self.link().is_some() || self.is_dormant() {
            self.log.add(range, why);
        }
    }

    /// Forgets it, of memory that is gone or another.
    pub fn forget_notes(&mut self, range: &Range<usize>) {
        self.log.forget(range);
    }

    /// Why GPUs do not reach an address, in the kernel's mapping `within`. `None`: they do, or it is not known.
    pub fn why(&self, address: usize, within: &Range<usize>) -> Option<Why> {
        let of_stack = |piece: &&Piece| piece.purpose == Purpose::Stack;
        let stacks = || self.table.pieces().iter().filter(of_stack);
        match self.table.first_in(&(address..address.saturating_add(1))) {
            Some(Piece { backing: Backing::Withdrawn, .. }) => {
                Some(self.log.find(address).unwrap_or(Why::Protected))
            }
            Some(Piece { backing: Backing::Own, prot, .. }) if prot != READ_WRITE => {
                Some(Why::Mapped { prot })
            }
            Some(Piece { backing: Backing::Own, .. }) => self.log.find(address).or(self.log.refused()),
            Some(_) => None,
            None if stacks().any(|piece| piece.base == within.end) => Some(Why::DeepStack),
            None if stacks().any(|piece| piece.end() == within.start) => Some(Why::TopOfStack),
            None => self.log.find(address),
        }
    }

    /// How many there were.
    pub fn left(&self) -> Left {
        self.left
    }

    /// Shows the program's own mapping of `file`, from `at` on, to the agent. False: GPUs do not reach it.
    pub fn import(&mut self, base: usize, len: usize, file: Kept, at: u64) -> bool {
        let shown = if self.table.has_room() {
            self.show(base, len, file, at)
        } else {
            self.note(&(base..base + len), Why::Full);
            None
        };
        let Some(id) = shown else {
            file.close();
            return false;
        };
        let backing = Backing::Shared { id, offset: 0, file: Some(file), at };
        self.table.insert(Piece::new(base, len, Purpose::Mapping, backing));
        true
    }

    fn show(&mut self, base: usize, len: usize, file: Kept, at: u64) -> Option<u64> {
        let link = self.link_mut()?;
        let shown = link.import(u64::try_from(base).ok()?, u64::try_from(len).ok()?, file.get()?, at);
        let failure = match shown {
            Ok(id) => return Some(id),
            Err(failure) => failure,
        };
        self.log.add_failure(&(base..base + len), &failure);
        // Not every file can be shown: that is no failure, but a lack of memory or a limit is.
        let expected = match &failure {
            Failure::Refused { status, limit } => {
                limit.is_none() && *status != -errno::ENOMEM && !failure.is_final()
            }
            _ => false,
        };
        if !expected {
            self.fail(&failure);
        }
        None
    }

    fn take_arena(&mut self, base: usize, len: usize) -> Option<Made> {
        let link = self.link_mut()?;
        let (va, bytes) = (u64::try_from(base).ok()?, u64::try_from(len).ok()?);
        let failure = match link.create(va, bytes) {
            Ok(made) => return Some(made),
            Err(failure) => failure,
        };
        self.log.add_failure(&(base..base + len), &failure);
        self.fail(&failure);
        None
    }

    fn give_arena(&mut self, id: u64) {
        let Some(link) = self.link_mut() else { return };
        if let Err(failure) = link.free(id) {
            self.fail(&failure);
        }
    }

    // Memory that goes.

    /// Has GPUs reach nothing in a range any more; the process still does. The range then begins and ends with pieces.
    pub fn withdraw(&mut self, range: &Range<usize>) -> Result<(), Full> {
        self.split(range.start)?;
        self.split(range.end)?;
        self.each_in(range, |space, piece| match piece.backing {
            Backing::Own | Backing::Withdrawn | Backing::Dormant(_) => {}
            Backing::Arena { id, offset } => {
                space.set_backing(piece.base, Backing::Withdrawn);
                space.cut(id, offset, piece.len);
            }
            Backing::Shared { id, offset, file, .. } => {
                space.table.remove(piece.base);
                file.into_iter().for_each(Kept::close);
                space.cut(id, offset, piece.len);
            }
            Backing::Pinned { id, offset, .. } => {
                space.table.remove(piece.base);
                space.cut(id, offset, piece.len);
            }
        });
        Ok(())
    }

    /// Has nothing of a range be in the table any more, because something else is there, or soon is.
    pub fn vacate(&mut self, range: &Range<usize>) -> Result<(), Full> {
        self.withdraw(range)?;
        self.advised.add(range, InChild::Copy);
        self.each_in(range, |space, mut piece| {
            space.table.remove(piece.base);
            piece.backing.file().and_then(Option::take).into_iter().for_each(Kept::close);
        });
        Ok(())
    }

    /// Anonymous memory takes the place of the pieces in a range, with their contents.
    ///
    /// # Safety
    /// As [`Self::adopt`].
    pub unsafe fn disown(&mut self, range: &Range<usize>) -> bool {
        let mut done = self.withdraw(range).is_ok();
        self.each_in(range, |space, piece| {
            // SAFETY: the caller keeps others away from the range.
            done = done && (!piece.backing.is_agents() || unsafe { copy_over(None, &piece) });
            if done {
                space.own(&piece);
            }
        });
        done
    }

    /// As [`Self::disown`], but the contents are not needed any more.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn forget(&mut self, range: &Range<usize>) -> Result<(), Full> {
        self.withdraw(range)?;
        self.each_in(range, |space, piece| {
            // SAFETY: the range is the piece's, and the caller keeps others away from it.
            unsafe { map_anonymous(piece.base, piece.len, piece.prot, MapFlags::FIXED) };
            space.own(&piece);
        });
        Ok(())
    }

    /// Takes note that a piece is anonymous memory now.
    fn own(&mut self, piece: &Piece) {
        if piece.purpose.is_kept() {
            self.set_backing(piece.base, Backing::Own);
        } else {
            self.table.remove(piece.base);
        }
    }

    /// Takes note of anonymous memory that takes part in a mapping of the program's.
    pub fn add_own(&mut self, range: &Range<usize>, purpose: Purpose, prot: i32) {
        if self.table.has_room() {
            let piece = Piece::new(range.start, range.len(), purpose, Backing::Own);
            self.table.insert(Piece { prot, ..piece });
        }
    }

    /// Takes note of memory that is as a piece was elsewhere. False: there is no room.
    pub fn add_as(&mut self, range: &Range<usize>, like: &Piece) -> bool {
        let room = self.table.has_room();
        if room {
            self.table.insert(Piece { base: range.start, len: range.len(), ..*like });
        }
        room
    }

    /// Unmaps the large block that begins at `base`.
    ///
    /// # Safety
    /// Nobody uses it any more.
    pub unsafe fn release(&mut self, base: usize) {
        let Some(piece) = self.table.find(base) else { return };
        if matches!(self.state, State::Up(_)) && self.link().is_none() {
            // The agent cannot be told. By vfork the memory is the parent's too, where other memory would come to the same
            // addresses; so it is lost instead.
            return;
        }
        let range = base..base + piece.block;
        // Where a block ends, a piece ends, so there is nothing to split.
        if self.vacate(&range).is_ok() {
            unmap(base, piece.block);
        }
    }

    fn split(&mut self, at: usize) -> Result<(), Full> {
        let Some(made) = self.table.split(at) else {
            let across = self.table.first_in(&(at..at + 1));
            // Before a device is asked for nothing goes by it, but for the heap.
            let other =
                |piece: &Piece| matches!(piece.backing, Backing::Dormant(_)) && !piece.purpose.is_heaps();
            let mut piece = across.filter(other).ok_or(Full)?;
            self.table.remove(piece.base);
            piece.backing.file().and_then(Option::take).into_iter().for_each(Kept::close);
            self.note(&piece.range(), Why::Full);
            return Ok(());
        };
        if let Some(Piece { base, mut backing, .. }) = made
            && let Some(file) = backing.file()
        {
            // Each piece closes its own.
            *file = file.and_then(|file| file.again());
            self.set_backing(base, backing);
        }
        Ok(())
    }

    fn set_backing(&mut self, base: usize, backing: Backing) {
        if let Some(entry) = self.table.entry(base) {
            entry.backing = backing;
        }
    }

    /// Calls with each piece of which a part lies in the range, in order. It may be removed, and others put in its place.
    pub fn each_in(&mut self, range: &Range<usize>, mut call: impl FnMut(&mut Self, Piece)) {
        let mut rest = range.clone();
        while let Some(piece) = self.table.first_in(&rest) {
            rest.start = piece.end();
            call(self, piece);
        }
    }

    /// Takes part of an arena out of the reach of GPUs.
    fn cut(&mut self, id: u64, offset: usize, len: usize) {
        let Some(link) = self.link_mut() else { return };
        let as_u64 = |bytes| u64::try_from(bytes).unwrap_or(u64::MAX);
        let failure = match link.cut(id, as_u64(offset), as_u64(len)) {
            Ok(()) => return,
            Err(failure) => failure,
        };
        if !failure.is_final() {
            // In too many parts. What must go goes, and the rest with it.
            self.give_arena(id);
            self.each_in(&(0..usize::MAX), |space, piece| {
                match piece.backing {
                    Backing::Arena { id: other, .. } if other == id => {
                        space.set_backing(piece.base, Backing::Withdrawn);
                    }
                    Backing::Pinned { id: other, .. } if other == id => drop(space.table.remove(piece.base)),
                    Backing::Shared { id: other, file, .. } if other == id => {
                        space.table.remove(piece.base);
                        file.into_iter().for_each(Kept::close);
                    }
                    _ => return,
                }
                space.log.add_failure(&piece.range(), &failure);
            });
        }
        self.fail(&failure);
    }

    // The table, for those who change mappings.

    /// Whether anything of a range is in the table.
    pub fn has(&self, range: &Range<usize>) -> bool {
        self.table.first_in(range).is_some()
    }

    /// Whether any of it is the library's matter.
    pub fn knows(&self, range: &Range<usize>) -> bool {
        let mut rest = range.clone();
        while let Some(piece) = self.table.first_in(&rest) {
            if !piece.is_let_be() {
                return true;
            }
            rest.start = piece.end();
        }
        false
    }

    /// The first piece of which a part lies in the range.
    pub fn first_in(&self, range: &Range<usize>) -> Option<Piece> {
        self.table.first_in(range)
    }

    /// The piece that begins at `base`.
    pub fn find(&self, base: usize) -> Option<Piece> {
        self.table.find(base)
    }

    /// Joins the piece that begins at `at` with the one before, if nothing tells them apart.
    pub fn join(&mut self, at: usize) {
        self.table.join(at);
    }

    /// Changes each piece in a range, which then begins and ends with pieces; not where they stand.
    pub fn change(&mut self, range: &Range<usize>, mut change: impl FnMut(&mut Piece)) -> Result<(), Full> {
        self.split(range.start)?;
        self.split(range.end)?;
        self.each_in(range, |space, piece| space.table.entry(piece.base).into_iter().for_each(&mut change));
        Ok(())
    }
}

/// Whether the C library has taken over the environment. The loader allocates before that.
fn environment_is_there() -> bool {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: the C library defines it as a pointer; nobody writes it while there is one thread, and later it is not null.
    !unsafe { environ }.is_null()
}

/// `None` as well in a program that has rights which whoever started it has not (setuid): that one must not choose who
/// gives it memory.
fn variable(name: &CStr) -> Option<&'static CStr> {
    unsafe extern "C" {
        fn secure_getenv(name: *const libc::c_char) -> *mut libc::c_char;
    }
    // SAFETY: the name ends with a zero.
    let value = unsafe { secure_getenv(name.as_ptr()) };
    // SAFETY: a value that is there ends with a zero; it is looked at before the program can change it.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) })
}
