//! One split virtqueue, driver side (virtio 1.3, 2.7).
//!
//! Owns the three areas in DMA memory and a private copy of everything that the driver must believe: which descriptors
//! belong to which chain, and how much the device may have written. What the device writes (used index, ids, lengths)
//! is checked against that copy; the first violation ends the use of the queue.
//!
//! Descriptors are taken from a queue of free ones, oldest first, and return in the order of completion. So they go
//! round in ring order while the device completes in order, which is what VIRTIO_F_IN_ORDER demands of a driver.
//!
//! Not here: locking, notification, waiting. The caller has the queue to itself.

use super::dma::{DmaRegion, PAGE_BYTES, Segment};
use super::{Error, Result};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

const DESC_BYTES: usize = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
/// In `used.flags`: the device needs no notification.
const USED_F_NO_NOTIFY: u16 = 1;
/// Offset of `idx` in the avail and used areas.
const RING_IDX: usize = 2;
/// Offset of the first entry in the avail and used areas.
const RING_ENTRIES: usize = 4;
const USED_ENTRY_BYTES: usize = 8;
/// Where the used area begins in the second page of a queue.
const USED_OFFSET: usize = 1024;

/// Largest queue that [`QueueLayout`] can place.
pub const MAX_SIZE: u16 = 256;

/// What a device may not do to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More buffers used than are in flight.
    #[error("the used index went to {idx} from {last} with {in_flight} buffers in flight")]
    UsedIndex {
        /// What the device wrote.
        idx: u16,
        /// Up to where the driver has looked.
        last: u16,
        /// Buffers that the device has.
        in_flight: usize,
    },
    /// A used id that is not the head of a chain in flight.
    #[error("used id {id} is not in flight")]
    UsedId {
        /// What the device wrote.
        id: u32,
    },
    /// More bytes written than there was room for.
    #[error("{len} bytes used of a chain with room for {room}")]
    UsedLength {
        /// What the device wrote.
        len: u32,
        /// Room that the chain had.
        room: u32,
    },
}

/// Where the areas of a queue stand in a DMA region: descriptors in one page, the two rings in the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Offset of the descriptor area.
    pub desc: usize,
    /// Offset of the driver area (avail).
    pub avail: usize,
    /// Offset of the device area (used).
    pub used: usize,
}

/// Device addresses of the areas, as the transport tells them to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Descriptors.
    pub size: u16,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area (avail).
    pub avail: u64,
    /// Device area (used).
    pub used: u64,
}

impl QueueLayout {
    /// Bytes that a queue takes, whatever its size.
    pub const BYTES: usize = 2 * PAGE_BYTES;

    /// A queue of `size` descriptors at the page-aligned `offset`.
    ///
    /// # Errors
    /// [`Error::Setup`] for a size that is not a power of two up to [`MAX_SIZE`].
    pub fn at(offset: usize, size: u16) -> Result<Self> {
        if !size.is_power_of_two() || size > MAX_SIZE || !offset.is_multiple_of(PAGE_BYTES) {
            return Err(Error::Setup(
                "a queue needs 1 to 256 descriptors, a power of two, on a page boundary",
            ));
        }
        Ok(Self { size, desc: offset, avail: offset + PAGE_BYTES, used: offset + PAGE_BYTES + USED_OFFSET })
    }

    /// The areas as the device sees them.
    ///
    /// # Errors
    /// When the areas lie outside `dma`.
    pub fn addresses(&self, dma: &DmaRegion) -> Result<QueueAddresses> {
        Ok(QueueAddresses {
            size: self.size,
            desc: dma.address(self.desc)?,
            avail: dma.address(self.avail)?,
            used: dma.address(self.used)?,
        })
    }
}

/// A chain that the device has finished with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its head, as [`Virtqueue::add`] returned it.
    pub head: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

struct Chain {
    descriptors: Vec<u16>,
    writable: u32,
}

/// The queue.
pub struct Virtqueue {
    dma: Arc<DmaRegion>,
    layout: QueueLayout,
    event_idx: bool,
    in_order: bool,
    free: VecDeque<u16>,
    chains: Vec<Option<Chain>>,
    /// Heads in flight, oldest first.
    order: VecDeque<u16>,
    /// With IN_ORDER: the used entry that completes several chains, until they have all been taken.
    batch: Option<Used>,
    avail_idx: u16,
    /// The avail index when the device was last told.
    published_idx: u16,
    used_idx: u16,
    broken: bool,
}

impl Virtqueue {
    /// Takes over a queue whose areas are zero and which the device has not been told of, or has just been told of.
    ///
    /// # Errors
    /// When the areas lie outside `dma`.
    pub fn new(dma: Arc<DmaRegion>, layout: QueueLayout, event_idx: bool, in_order: bool) -> Result<Self> {
        layout.addresses(&dma)?;
        let chains = (0..layout.size).map(|_| None).collect();
        Ok(Self {
            dma,
            layout,
            event_idx,
            in_order,
            free: (0..layout.size).collect(),
            chains,
            order: VecDeque::new(),
            batch: None,
            avail_idx: 0,
            published_idx: 0,
            used_idx: 0,
            broken: false,
        })
    }

    /// Descriptors that are free.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Puts a chain into the ring and returns its head; `None` if there are not enough descriptors. The device sees it
    /// after [`Self::publish`]. A chain needs at least one segment.
    ///
    /// # Errors
    /// [`Error::Broken`], [`Error::Setup`] for an empty chain.
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<Option<u16>> {
        if self.broken {
            return Err(Error::Broken);
        }
        let count = readable.len() + writable.len();
        if count > self.free.len() {
            return Ok(None);
        }
        let descriptors: Vec<u16> = self.free.drain(..count).collect();
        let Some(&head) = descriptors.first() else {
            return Err(Error::Setup("a chain without segments"));
        };
        let flagged = readable.iter().map(|s| (s, 0)).chain(writable.iter().map(|s| (s, DESC_F_WRITE)));
        for (position, (segment, flags)) in flagged.enumerate() {
            let next = descriptors.get(position + 1).copied();
            self.write_descriptor(descriptors.get(position).copied().unwrap_or(head), *segment, flags, next)?;
        }
        let room = writable.iter().fold(0u32, |sum, segment| sum.saturating_add(segment.len));
        if let Some(slot) = self.chains.get_mut(usize::from(head)) {
            *slot = Some(Chain { descriptors, writable: room });
        }
        self.order.push_back(head);
        let entry = self.layout.avail + RING_ENTRIES + 2 * usize::from(self.avail_idx % self.layout.size);
        self.dma.memory().store_u16(entry, head, Ordering::Relaxed)?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        Ok(Some(head))
    }

    fn write_descriptor(&self, index: u16, segment: Segment, flags: u16, next: Option<u16>) -> Result<()> {
        let at = self.layout.desc + DESC_BYTES * usize::from(index);
        let flags = if next.is_some() { flags | DESC_F_NEXT } else { flags };
        let memory = self.dma.memory();
        memory.write(at, &segment.address.to_le_bytes())?;
        memory.store_u32(at + 8, segment.len, Ordering::Relaxed)?;
        memory.store_u16(at + 12, flags, Ordering::Relaxed)?;
        memory.store_u16(at + 14, next.unwrap_or(0), Ordering::Relaxed)?;
        Ok(())
    }

    /// Shows the device what was added. True: it wants to be notified.
    ///
    /// # Errors
    /// [`Error::Broken`].
    pub fn publish(&mut self) -> Result<bool> {
        if self.broken {
            return Err(Error::Broken);
        }
        let (old, new) = (self.published_idx, self.avail_idx);
        if old == new {
            return Ok(false);
        }
        let memory = self.dma.memory();
        // Release: descriptors and ring entries before the index (2.7.13).
        memory.store_u16(self.layout.avail + RING_IDX, new, Ordering::Release)?;
        self.published_idx = new;
        // The index before the device's wish is read, else both sides may go to sleep (2.7.13.4).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let avail_event =
                self.layout.used + RING_ENTRIES + USED_ENTRY_BYTES * usize::from(self.layout.size);
            let wish = memory.load_u16(avail_event, Ordering::Relaxed)?;
            Ok(passed_event(wish, new, old))
        } else {
            Ok(memory.load_u16(self.layout.used, Ordering::Relaxed)? & USED_F_NO_NOTIFY == 0)
        }
    }

    /// Takes the next chain that the device has used.
    ///
    /// # Errors
    /// [`Error::Protocol`] for what no device may write; the queue is broken from then on.
    pub fn take_used(&mut self) -> Result<Option<Used>> {
        if self.broken {
            return Err(Error::Broken);
        }
        let taken = self.next_used();
        if matches!(taken, Err(Error::Protocol(_))) {
            self.broken = true;
        }
        taken
    }

    fn next_used(&mut self) -> Result<Option<Used>> {
        if let Some(last) = self.batch {
            return self.take_of_batch(last).map(Some);
        }
        let memory = self.dma.memory();
        // Acquire: the entry and the buffer's contents after the index.
        let idx = memory.load_u16(self.layout.used + RING_IDX, Ordering::Acquire)?;
        let pending = usize::from(idx.wrapping_sub(self.used_idx));
        if pending == 0 {
            return Ok(None);
        }
        let in_flight = self.order.len();
        if pending > in_flight {
            return Err(Error::Protocol(Violation::UsedIndex { idx, last: self.used_idx, in_flight }));
        }
        let slot = usize::from(self.used_idx % self.layout.size);
        let entry = self.layout.used + RING_ENTRIES + USED_ENTRY_BYTES * slot;
        let id = memory.load_u32(entry, Ordering::Relaxed)?;
        let len = memory.load_u32(entry + 4, Ordering::Relaxed)?;
        let head = u16::try_from(id).map_err(|_| Error::Protocol(Violation::UsedId { id }))?;
        if self.in_order {
            // One entry may complete everything up to its chain; it stands where the first of them would (2.7.9).
            let position = self.order.iter().position(|&h| h == head).filter(|&p| p < pending);
            position.ok_or(Error::Protocol(Violation::UsedId { id }))?;
            return self.take_of_batch(Used { head, len }).map(Some);
        }
        self.complete(Used { head, len }).map(Some)
    }

    /// Takes the oldest chain of those that the entry `last` completes.
    fn take_of_batch(&mut self, last: Used) -> Result<Used> {
        let oldest = self.order.front().copied().unwrap_or(last.head);
        if oldest == last.head {
            self.batch = None;
            return self.complete(last);
        }
        self.batch = Some(last);
        // A skipped chain has been used completely.
        let room = self.chain(oldest).map_or(0, |chain| chain.writable);
        self.complete(Used { head: oldest, len: room })
    }

    fn chain(&self, head: u16) -> Option<&Chain> {
        self.chains.get(usize::from(head)).and_then(Option::as_ref)
    }

    fn complete(&mut self, used: Used) -> Result<Used> {
        let slot = self.chains.get_mut(usize::from(used.head));
        let chain = slot.and_then(Option::take);
        let chain = chain.ok_or(Error::Protocol(Violation::UsedId { id: u32::from(used.head) }))?;
        if used.len > chain.writable {
            let (len, room) = (used.len, chain.writable);
            return Err(Error::Protocol(Violation::UsedLength { len, room }));
        }
        self.free.extend(chain.descriptors);
        if let Some(position) = self.order.iter().position(|&h| h == used.head) {
            self.order.remove(position);
        }
        self.used_idx = self.used_idx.wrapping_add(1);
        Ok(used)
    }

    /// Asks for an interrupt at the next used buffer. True: there is one already, so look before waiting.
    ///
    /// # Errors
    /// [`Error::Broken`].
    pub fn arm(&mut self) -> Result<bool> {
        if self.broken {
            return Err(Error::Broken);
        }
        let memory = self.dma.memory();
        if self.event_idx {
            let used_event = self.layout.avail + RING_ENTRIES + 2 * usize::from(self.layout.size);
            memory.store_u16(used_event, self.used_idx, Ordering::Relaxed)?;
        }
        // The wish before the index is read again, else an interrupt may be lost (2.7.10).
        fence(Ordering::SeqCst);
        Ok(memory.load_u16(self.layout.used + RING_IDX, Ordering::Acquire)? != self.used_idx)
    }
}

/// Whether going from `old` to `new` passed `event` (`vring_need_event`).
fn passed_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
