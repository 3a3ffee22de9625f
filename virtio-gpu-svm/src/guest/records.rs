//! The order in which a guest's records leave: notices first, then contexts in turn, one record each.
//!
//! Whoever has a record announces it; one thread at a time fills the buffers that the driver has posted.

use super::Guest;
use crate::context::Context;
use crate::event::{Notice, Record, Stamp, notice_record};
use crate::protocol::event::{EVENT_CONTEXT_RETIRED, EVENT_RECORD_BYTES, EventHdr};
use crate::quota::Charge;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use std::collections::VecDeque;
use zerocopy::IntoBytes;

/// Records that wait.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) notices: VecDeque<Notice>,
    /// Contexts whose CONTEXT_RETIRED is among them: such records would pile up in front of a driver that fetches none.
    pub(super) retired_charge: Charge,
    /// Contexts with a record that waits, each once: one record a turn.
    pub(super) ready: VecDeque<Arc<Context>>,
}

impl Guest {
    /// A context has records for the guest.
    pub(crate) fn announce(&self, context: &Arc<Context>) {
        self.lock_outbox().queue(context);
        self.port.ready();
    }
    /// Whether there is a record to deliver.
    pub fn has_events(&self) -> bool {
        let outbox = self.lock_outbox();
        !outbox.notices.is_empty() || !outbox.ready.is_empty()
    }
    /// Moves records into an event buffer of `room` bytes: clears `buf` and fills it with a header and as many records
    /// as fit, one of each context in turn. Leaves `buf` empty when there is no record, or room for none. To be called
    /// by one thread at a time. PROTOCOL 7.
    pub fn fill_events(&self, buf: &mut Vec<u8>, room: usize) {
        buf.clear();
        let fits = room.saturating_sub(size_of::<EventHdr>()) / EVENT_RECORD_BYTES;
        let first = self.sequence.load(Ordering::Relaxed);
        let mut records = 0_u32;
        while usize::try_from(records).is_ok_and(|records| records < fits) {
            let Some(record) = self.next_record() else { break };
            if buf.is_empty() {
                buf.extend_from_slice(EventHdr::default().as_bytes());
            }
            buf.extend_from_slice(&record);
            records = records.saturating_add(1);
        }
        let hdr = EventHdr {
            num_records: records.into(),
            flags: 0.into(),
            daemon_epoch: self.epoch.into(),
            sequence: first.into(),
        };
        if records > 0 && hdr.write_to_prefix(buf).is_err() {
            unreachable!("the header was put there");
        }
    }
    fn next_record(&self) -> Option<Record> {
        let stamp = || Stamp {
            timestamp: self.host.now_ns(),
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed),
        };
        loop {
            let context = {
                let mut outbox = self.lock_outbox();
                if let Some(notice) = outbox.notices.pop_front() {
                    outbox.retired_charge.shrink((notice.kind == EVENT_CONTEXT_RETIRED).into());
                    return Some(notice_record(notice, stamp()));
                }
                outbox.next()?
            };
            // One that is being changed is announced anew; the ring's lock is not held for as long as that takes.
            let Some((record, more)) = context.take_record(stamp) else { continue };
            if more {
                self.lock_outbox().queue(&context);
            }
            if record.is_some() {
                return record;
            }
        }
    }
}

impl Outbox {
    pub(super) fn clear(&mut self) {
        *self = Self { retired_charge: self.retired_charge.sibling(), ..Self::default() };
    }
    fn queue(&mut self, context: &Arc<Context>) {
        if !context.queued.swap(true, Ordering::Relaxed) {
            self.ready.push_back(Arc::clone(context));
        }
    }
    fn next(&mut self) -> Option<Arc<Context>> {
        let context = self.ready.pop_front()?;
        context.queued.store(false, Ordering::Relaxed);
        Some(context)
    }
}
