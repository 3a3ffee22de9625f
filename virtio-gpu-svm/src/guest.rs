//! One guest: a VMM's session. Owns its contexts, its blob resources, its view of guest memory and its records.

use crate::info::{ContextStatus, GuestStatus};
use crate::memory::MemoryTable;
use crate::protocol::CONFIG_SIZE;
use std::sync::Arc;

/// Told when a guest has records to deliver. Called from engine and queue threads, with no lock of the core held.
pub trait EventPort: Send + Sync {
    /// There may be records; fetch them with [`Guest::fill_events`].
    fn ready(&self);
}

/// Why an operator's request about a context failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// No such context.
    #[error("no context {0}")]
    NoContext(u32),
}

/// One guest.
pub struct Guest {}

impl Guest {
    /// Its name.
    pub fn name(&self) -> &str {
        todo!()
    }
    /// Carries out one command of the control queue and writes the response, at most `room` bytes. Never waits.
    pub fn control(&self, _request: &[u8], _response: &mut Vec<u8>, _room: usize) {
        todo!()
    }
    /// The same for the cursor queue.
    pub fn cursor(&self, _request: &[u8], _response: &mut Vec<u8>, _room: usize) {
        todo!()
    }
    /// Config space now.
    pub fn config_space(&self) -> [u8; CONFIG_SIZE] {
        todo!()
    }
    /// Whether there is a record to deliver.
    pub fn has_events(&self) -> bool {
        todo!()
    }
    /// Moves records into an event buffer of `room` bytes: clears `buf` and fills it with a header and as many records
    /// as fit. Leaves `buf` empty when there is no record, or room for none.
    pub fn fill_events(&self, _buf: &mut Vec<u8>, _room: usize) {
        todo!()
    }
    /// Publishes a new memory table: what stood on removed regions is invalidated; waits for at most one slice of each
    /// engine.
    pub fn set_memory(&self, _table: Arc<MemoryTable>) {
        todo!()
    }
    /// The memory table now.
    pub fn memory(&self) -> Arc<MemoryTable> {
        todo!()
    }
    /// The rings stopped: stops this guest's jobs; on return no engine touches its memory.
    pub fn freeze(&self) {
        todo!()
    }
    /// The rings run again with the driver that left them.
    pub fn thaw(&self) {
        todo!()
    }
    /// The rings run again from nothing: the driver began anew; drops every context and resource.
    pub fn reset(&self) {
        todo!()
    }
    /// The session ended: as [`Guest::reset`], and the guest leaves the host's list.
    pub fn close(&self) {
        todo!()
    }
    /// What it looks like.
    pub fn status(&self) -> GuestStatus {
        todo!()
    }
    /// Its contexts, by id.
    pub fn contexts(&self) -> Vec<ContextStatus> {
        todo!()
    }
    /// Drops the translations of a context, on one host device or on all; the next accesses fault. Returns the pages
    /// that had a translation.
    ///
    /// # Errors
    /// [`EvictError`].
    pub fn evict(&self, _ctx_id: u32, _device: Option<usize>) -> Result<u64, EvictError> {
        todo!()
    }
}
