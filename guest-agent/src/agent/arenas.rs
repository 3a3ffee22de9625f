//! Arenas of contexts: made, and taken back once no engine can use them.

use super::{Agent, Arena, ArenaPages, Error, Result, Withdrawal, checked};
use crate::memory_file::MemoryFile;
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
    pub fn create_arena(&self, ctx_id: u32, va: u64, len: u64) -> Result<ArenaPages> {
        self.make(ctx_id, va, len, || {
            let made = self.memory.create(len).map_err(Error::Memory)?;
            let pages = made.pages.as_slice().into();
            Ok((made.id, pages, made))
        })
    }

    /// Makes memory of a process that of its context, standing at `va`. Returns its id.
    ///
    /// # Errors
    /// A bad or overlapping range, a quota, and whatever is wrong with the file by now.
    pub fn import_arena(&self, ctx_id: u32, va: u64, file: &MemoryFile) -> Result<u64> {
        self.make(ctx_id, va, file.len(), || {
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
        ctx_id: u32,
        va: u64,
        len: u64,
        find: impl FnOnce() -> std::result::Result<PinnedRange, Errno>,
    ) -> Result<u64> {
        self.make(ctx_id, va, len, || {
            let found = find().map_err(|errno| Error::Import(errno.into()))?;
            let id = self.memory.hold(found.ring).map_err(Error::Import)?;
            Ok((id, found.pages.into(), id))
        })
    }

    /// Makes an arena within the quotas: its id, its pages, and what else the caller gets.
    fn make<T>(
        &self,
        ctx_id: u32,
        va: u64,
        len: u64,
        make: impl FnOnce() -> Result<(u64, Arc<[u64]>, T)>,
    ) -> Result<T> {
        self.reserve(ctx_id, va, len)?;
        let made = make();
        let arena = made.as_ref().ok().map(|(id, pages, _)| Arena { id: *id, va, len, pages: pages.clone() });
        self.adopt(ctx_id, len, arena)?;
        made.map(|(_, _, made)| made)
    }

    /// Ends a reservation, with memory or without. What cannot be the context's any more is released.
    fn adopt(&self, ctx_id: u32, reserved: u64, arena: Option<Arena>) -> Result<()> {
        let mut state = self.lock();
        state.reserved_bytes -= reserved;
        // An id names another context only after millions of others.
        if let Some(context) = state.contexts.get_mut(&ctx_id) {
            let (bytes, arenas) = context.reserved;
            context.reserved = (bytes.saturating_sub(reserved), arenas.saturating_sub(1));
        }
        let Some(arena) = arena else { return Ok(()) };
        let inserted = match state.alive(ctx_id) {
            Ok(context) => context.arenas.insert(arena).map_err(|arena| {
                let (va, len) = (arena.va, arena.len);
                (arena, Error::Overlap { va, len })
            }),
            Err(error) => Err((arena, error)),
        };
        drop(state);
        inserted.map_err(|(arena, error)| {
            self.release([arena]);
            error
        })
    }

    fn reserve(&self, ctx_id: u32, va: u64, len: u64) -> Result<()> {
        let aligned = va.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let in_range = va.checked_add(len).is_some_and(|end| end <= GUEST_VA_END);
        if !aligned || !in_range || va == 0 || len == 0 {
            return Err(Error::BadRange { va, len });
        }
        let mut state = self.lock();
        let total = state.arena_bytes();
        let context = state.alive(ctx_id)?;
        let limit = self.options.context_arena_bytes;
        let (making_bytes, making) = context.reserved;
        if context.arenas.bytes().saturating_add(making_bytes).saturating_add(len) > limit {
            return Err(Error::Quota { limit });
        }
        let most = self.options.context_arenas;
        if context.arenas.len() + making >= most {
            return Err(Error::TooMany { what: "arenas", limit: most });
        }
        let most = self.options.context_parts;
        if context.arenas.num_parts() + making >= most {
            return Err(Error::TooMany { what: "parts of arenas", limit: most });
        }
        if context.arenas.overlaps(va, len) {
            return Err(Error::Overlap { va, len });
        }
        let uid = context.owner.uid;
        let limit = self.options.user_arena_bytes;
        if state.user_bytes(uid).saturating_add(len) > limit {
            return Err(Error::Quota { limit });
        }
        let limit = self.options.total_arena_bytes;
        if total.saturating_add(len) > limit {
            return Err(Error::Quota { limit });
        }
        if let Ok(context) = state.alive(ctx_id) {
            context.reserved = (making_bytes + len, making + 1);
        }
        state.reserved_bytes += len;
        Ok(())
    }

    /// Takes memory from a context. Returns when no engine can use it any more.
    ///
    /// # Errors
    /// No such arena, or the context ended meanwhile (then the memory is released with it).
    pub fn free_arena(&self, ctx_id: u32, arena_id: u64) -> Result<()> {
        let number = self.token();
        let withdrawn = self.lock().alive(ctx_id)?.arenas.withdraw(number, arena_id)?;
        self.see_off(ctx_id, withdrawn)
    }

    /// Takes `len` bytes of an arena from a context, `offset` bytes from its beginning. Returns when no engine can use
    /// them any more. They stay pinned until nothing of the arena is left.
    ///
    /// # Errors
    /// No such arena or part, too many parts, or the context ended meanwhile.
    pub fn cut_arena(&self, ctx_id: u32, arena_id: u64, offset: u64, len: u64) -> Result<()> {
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadRange { va: offset, len });
        }
        let (number, limit) = (self.token(), self.options.context_parts);
        let part = (offset, len);
        let withdrawn = self.lock().alive(ctx_id)?.arenas.withdraw_part(number, arena_id, part, limit)?;
        self.see_off(ctx_id, withdrawn)
    }

    /// Invalidates what was withdrawn, waits until no engine uses it, and removes it. When any of this fails it stays
    /// withdrawn and pinned until its context has ended.
    fn see_off(&self, ctx_id: u32, withdrawn: Withdrawal) -> Result<()> {
        let response = self.device.invalidate(ctx_id, withdrawn.va, withdrawn.len, INVAL_UNMAP)?;
        checked("INVALIDATE", response.resp.status.get())?;
        let seq = response.seq.get();
        let ended = || self.stopping.load(Ordering::Acquire) || self.lock().alive(ctx_id).is_err();
        if !self.device.wait_done(ctx_id, seq, ended) {
            return Err(Error::NoContext(ctx_id));
        }
        let arena = self.lock().alive(ctx_id)?.arenas.remove(withdrawn);
        self.release(arena);
        Ok(())
    }
}
