//! A split ring under one visit: where its parts lie, how far driver and device are, and each access to it.
//!
//! The framework's queue owns setup and positions. Both are copied when a visit begins, and the positions are given back
//! when it ends ([`Split::leave`]); it holds the ring's lock meanwhile, so nobody sees them differ.
//!
//! The driver's index is read once for all chains that it shows: what is known to be available needs no other look. Ours is
//! written once for several chains that were given back ([`Split::publish`]): whoever polls it fetches it anew each time.

use super::RingError;
use super::chain::Table;
use super::reach::{Missing, Reach, RingMemory};
use crate::ring::Areas;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::{Queue, QueueT};
use vm_memory::Permissions;

/// Flag of the used ring without event indices: the driver need not notify.
const NO_NOTIFY: u16 = 1;
/// Places in the available and in the used ring: the index, and the first entry.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
/// Bytes of an entry of each part.
const HEAD_BYTES: u64 = 2;
const ELEMENT_BYTES: u64 = 8;

/// See the module.
pub(super) struct Split<M> {
    pub(super) reach: Reach<M>,
    table: Table,
    avail: u64,
    used: u64,
    /// A power of two.
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// `next_used` as the driver knows it.
    published: u16,
    /// The driver's index when it was read last; at least `next_avail`.
    available: u16,
    /// `next_used` when it was last asked whether the driver wants to be interrupted.
    told: u16,
}

impl<M> Split<M> {
    /// Where the driver's index stands, as far as it was followed.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The descriptor table.
    pub(super) fn table(&self) -> Table {
        self.table
    }

    /// Goes one chain back.
    pub(super) fn put_back(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Whether chains were given back since it was last asked whether the driver wants to know.
    pub(super) fn has_untold(&self) -> bool {
        self.told != self.next_used
    }

    /// Chains that were given back and not shown to the driver.
    pub(super) fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Gives the positions back.
    pub(super) fn leave(&self, queue: &mut Queue) {
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
    }

    /// Where an entry of an area is.
    #[inline]
    fn entry(&self, area: u64, position: u16, bytes: u64) -> u64 {
        let slot = u64::from(position & self.size.wrapping_sub(1));
        area.saturating_add(ENTRIES).saturating_add(slot.saturating_mul(bytes))
    }

    /// Where the word behind an area's entries is: the event index of the other side.
    #[inline]
    fn event(&self, area: u64, bytes: u64) -> u64 {
        area.saturating_add(ENTRIES).saturating_add(u64::from(self.size).saturating_mul(bytes))
    }
}

impl<M: RingMemory> Split<M> {
    /// `None` if the three areas of the ring do not lie in guest memory and apart from each other.
    pub(super) fn enter(queue: &Queue, memory: Arc<M>) -> Option<Self> {
        let (desc, avail, used, size) =
            (queue.desc_table(), queue.avail_ring(), queue.used_ring(), queue.size());
        let reach = Reach::new(memory, desc);
        let areas = Areas::new(desc, avail, used, size);
        let inside = |area: &Range<u64>, access| {
            let bytes = usize::try_from(area.end.saturating_sub(area.start));
            bytes.is_ok_and(|bytes| reach.holds_area(area.start, bytes, access))
        };
        // The crate takes an available ring at 0 for one that was never set.
        let sound = avail != 0
            && inside(&areas.desc, Permissions::Read)
            && inside(&areas.avail, Permissions::Read)
            && inside(&areas.used, Permissions::Write)
            && areas.are_apart();
        sound.then(|| Self {
            reach,
            table: Table { start: desc, entries: size },
            avail,
            used,
            size,
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            published: queue.next_used(),
            available: queue.next_avail(),
            told: queue.next_used(),
        })
    }

    /// The head of the next chain.
    #[inline]
    pub(super) fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_avail == self.available {
            // What the driver wrote before it moved its index is seen behind it.
            let available = self.load_available(Ordering::Acquire).map_err(|_| RingError::AvailIndex)?;
            if available.wrapping_sub(self.next_avail) > self.size {
                return Err(RingError::AvailIndex);
            }
            self.available = available;
            if available == self.next_avail {
                return Ok(None);
            }
        }
        let slot = self.entry(self.avail, self.next_avail, HEAD_BYTES);
        let head = self.reach.load(slot, Ordering::Relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        if head < self.size { Ok(Some(head)) } else { Err(RingError::HeadOutOfRange(head)) }
    }

    /// Whether the driver's index has moved on. What it says then is checked by [`Self::pop`].
    #[inline]
    pub(super) fn has_more(&self) -> Result<bool, RingError> {
        Ok(self.load_available(Ordering::Relaxed)? != self.next_avail)
    }

    /// Gives a chain back, with so many bytes written to it. The driver sees it when that is published.
    #[inline]
    pub(super) fn give_back(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let element = self.entry(self.used, self.next_used, ELEMENT_BYTES);
        self.reach.store_element(element, [head.into(), written])?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was given back.
    #[inline]
    pub(super) fn publish(&mut self) -> Result<(), RingError> {
        if self.published == self.next_used {
            return Ok(());
        }
        // Answers and elements are seen behind it.
        self.reach.store(self.used.saturating_add(INDEX), self.next_used, Ordering::Release)?;
        self.published = self.next_used;
        Ok(())
    }

    /// Asks the driver to notify again. `true`: something arrived meanwhile.
    pub(super) fn rearm(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            self.reach.store(self.event(self.used, ELEMENT_BYTES), self.next_avail, Ordering::Relaxed)?;
        } else {
            self.reach.store(self.used, 0, Ordering::Relaxed)?;
        }
        // Either the driver sees this when it has moved its index, or its index is seen moved here.
        fence(Ordering::SeqCst);
        self.has_more()
    }

    /// Asks the driver not to notify. With event indices it does not anyway until it is asked anew.
    pub(super) fn disarm(&mut self) -> Result<(), RingError> {
        if !self.event_idx {
            self.reach.store(self.used, NO_NOTIFY, Ordering::Relaxed)?;
        }
        Ok(())
    }

    /// Publishes, and says whether the driver wants to be interrupted for what was given back since this was asked last.
    /// Without event indices it is always told: so does the crate, and its flag is a hint.
    pub(super) fn wants_interrupt(&mut self) -> Result<bool, RingError> {
        self.publish()?;
        // Either the driver sees the used index when it has set its event index, or that is seen here.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.told, self.next_used);
        if !self.event_idx {
            return Ok(true);
        }
        let event = self.reach.load(self.event(self.avail, HEAD_BYTES), Ordering::Relaxed)?;
        let passed = self.next_used.wrapping_sub(event).wrapping_sub(1);
        Ok(passed < self.next_used.wrapping_sub(old))
    }

    fn load_available(&self, order: Ordering) -> Result<u16, Missing> {
        self.reach.load(self.avail.saturating_add(INDEX), order)
    }
}
