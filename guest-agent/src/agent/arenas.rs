//! Arenas of contexts: made, and taken back once no engine can use them.

use super::key::Lease;
use super::{Agent, Arena, ArenaPages, ContextKey, Error, Result, State, Withdrawal, checked};
use crate::memory_file::MemoryFile;
use crate::message::AgentLimit;
use crate::process_memory::PinnedRange;
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_gpu_svm::protocol::control::INVAL_UNMAP;
use virtio_gpu_svm::protocol::{GUEST_VA_END, PAGE_SIZE};

impl Agent {
    /// Makes memory for a context, standing at `va` in its process.
    ///
    /// # Errors
    /// A bad or overlapping range, a quota, no memory.
    pub fn create_arena(&self, key: ContextKey, va: u64, len: u64) -> Result<ArenaPages> {
        self.make(key, va, len, || {
            let made = self.memory.create(len).map_err(Error::Memory)?;
            let pages = made.pages.as_slice().into();
            Ok((made.id, pages, made))
        })
    }

    /// Makes memory of a process that of its context, standing at `va`. Returns its id.
    ///
    /// # Errors
    /// A bad or overlapping range, a quota, and whatever is wrong with the file by now.
    pub fn import_arena(&self, key: ContextKey, va: u64, file: &MemoryFile) -> Result<u64> {
        self.make(key, va, file.len(), || {
            let made = self.memory.import(file).map_err(Error::Import)?;
            Ok((made.id, made.pages.into(), made.id))
        })
    }

    /// Makes memory that a trusted process has pinned that of its context. `find` is called when the quotas allow it.
    /// Returns its id.
    ///
    /// # Errors
    /// A bad or overlapping range, a quota, and what `find` says.
    pub fn pin_arena(
        &self,
        key: ContextKey,
        va: u64,
        len: u64,
        find: impl FnOnce() -> std::result::Result<PinnedRange, Errno>,
    ) -> Result<u64> {
        self.make(key, va, len, || {
            let found = find().map_err(|errno| Error::Import(errno.into()))?;
            let id = self.memory.hold(found.ring).map_err(Error::Import)?;
            Ok((id, found.pages.into(), id))
        })
    }

    /// Makes an arena within the quotas: its id, its pages, and what else the caller gets.
    fn make<T>(
        &self,
        key: ContextKey,
        va: u64,
        len: u64,
        make: impl FnOnce() -> Result<(u64, Arc<[u64]>, T)>,
    ) -> Result<T> {
        let uid = self.reserve(key, va, len)?;
        let turn = self.turns.wait(uid);
        // What is asked for in line by processes that have gone costs nobody anything.
        let made = self.check_present(key).and_then(|()| make());
        drop(turn);
        let arena =
            |(id, pages, _): &(u64, Arc<[u64]>, T)| Arena { id: *id, uid, va, len, pages: pages.clone() };
        match made.as_ref().map(arena) {
            Ok(arena) => self.adopt(key, arena)?,
            Err(_) => {
                let mut state = self.lock();
                state.end_reservation(key, len);
                state.accounts.discharge(uid, len);
            }
        }
        made.map(|(_, _, made)| made)
    }

    /// Whether there is still somebody to make memory for.
    fn check_present(&self, key: ContextKey) -> Result<()> {
        let sink = self.lock().alive(key)?.sink.clone();
        if sink.has_left() { Err(Error::NoContext(key.ctx_id())) } else { Ok(()) }
    }

    /// Ends a reservation with memory. What cannot be the context's any more is released.
    fn adopt(&self, key: ContextKey, arena: Arena) -> Result<()> {
        let mut state = self.lock();
        state.end_reservation(key, arena.len);
        let inserted = match state.alive(key) {
            Ok(context) => context.arenas.insert(arena).map_err(|arena| {
                let (va, len) = (arena.va, arena.len);
                (arena, Error::Overlap { va, len })
            }),
            Err(error) => Err((arena, error)),
        };
        drop(state);
        inserted.map_err(|(arena, error)| {
            self.release_now(&arena);
            error
        })
    }

    /// Counts an arena before it is made. Returns the user whom it counts for.
    fn reserve(&self, key: ContextKey, va: u64, len: u64) -> Result<u32> {
        let aligned = va.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let in_range = va.checked_add(len).is_some_and(|end| end <= GUEST_VA_END);
        if !aligned || !in_range || va == 0 || len == 0 {
            return Err(Error::BadRange { va, len });
        }
        let mut state = self.lock();
        let context = state.alive(key)?;
        let limit = self.options.context_arena_bytes;
        let (making_bytes, making) = context.reserved;
        if context.arenas.bytes().saturating_add(making_bytes).saturating_add(len) > limit {
            return Err(Error::Quota { which: AgentLimit::ProcessMemory, limit });
        }
        let most = self.options.context_arenas;
        if context.arenas.len() + making >= most {
            return Err(Error::TooMany { which: AgentLimit::Arenas, limit: most });
        }
        let most = self.options.context_parts;
        if context.arenas.num_parts() + making >= most {
            return Err(Error::TooMany { which: AgentLimit::Parts, limit: most });
        }
        if context.arenas.overlaps(va, len) {
            return Err(Error::Overlap { va, len });
        }
        let uid = context.owner.uid;
        state.accounts.charge(uid, len, &self.options)?;
        if let Ok(context) = state.alive(key) {
            context.reserved = (making_bytes + len, making + 1);
        }
        Ok(uid)
    }

    /// Takes memory from a context. Returns when no engine can use it any more.
    ///
    /// # Errors
    /// No such arena, or the context ended meanwhile (then the memory is released with it).
    pub fn free_arena(&self, key: ContextKey, arena_id: u64) -> Result<()> {
        let number = self.token();
        let (withdrawn, lease) = {
            let mut state = self.lock();
            let context = state.alive(key)?;
            (context.arenas.withdraw(number, arena_id)?, context.lease.clone())
        };
        self.see_off(key, &withdrawn, lease)
    }

    /// Takes `len` bytes of an arena from a context, `offset` bytes from its beginning. Returns when no engine can use
    /// them any more. They stay pinned until nothing of the arena is left.
    ///
    /// # Errors
    /// No such arena or part, too many parts, or the context ended meanwhile.
    pub fn cut_arena(&self, key: ContextKey, arena_id: u64, offset: u64, len: u64) -> Result<()> {
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadRange { va: offset, len });
        }
        let (number, limit) = (self.token(), self.options.context_parts);
        let (withdrawn, lease) = {
            let mut state = self.lock();
            let context = state.alive(key)?;
            let withdrawn = context.arenas.withdraw_part(number, arena_id, (offset, len), limit)?;
            (withdrawn, context.lease.clone())
        };
        self.see_off(key, &withdrawn, lease)
    }

    /// Invalidates what was withdrawn, waits until no engine uses it, and removes it. When any of this fails it stays
    /// withdrawn and pinned until its context has ended. Whoever asked waits until memory is its maker's again: so its
    /// limits allow other memory at once, and nobody gives memory back faster than it goes.
    fn see_off(&self, key: ContextKey, withdrawn: &Withdrawal, lease: Lease) -> Result<()> {
        let ctx_id = key.ctx_id();
        let mut last = 0;
        // Each by itself: between two of them other memory may stand by now, which engines use.
        for &(va, len) in &withdrawn.ranges {
            let response = self.device.invalidate(ctx_id, va, len, INVAL_UNMAP)?;
            checked("INVALIDATE", response.resp.status.get())?;
            last = response.seq.get();
        }
        drop(lease);
        let ended = || self.stopping.load(Ordering::Acquire) || self.lock().alive(key).is_err();
        if !self.device.wait_done(ctx_id, last, ended) {
            return Err(Error::NoContext(ctx_id));
        }
        let arena = self.lock().alive(key)?.arenas.remove(withdrawn);
        if let Some(arena) = arena {
            self.release_now(&arena);
        }
        Ok(())
    }
}

impl State {
    fn end_reservation(&mut self, key: ContextKey, len: u64) {
        if let Some(context) = self.context(key) {
            let (bytes, arenas) = context.reserved;
            context.reserved = (bytes.saturating_sub(len), arenas.saturating_sub(1));
        }
    }
}
