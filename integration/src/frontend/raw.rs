//! A split virtqueue written by hand: descriptors, indices and buffers as a test wants them, valid or not. What is
//! written here goes to guest memory as it is; nothing is checked, because that is the daemon's part.
//!
//! [`RawRing`] owns one ring and two buffers in guest memory; ringing the doorbell is the VMM's. [`RawGuest`] is a guest
//! that talks to the device through three of them, one command at a time; [`RawVm`] a GPU VM that it made so.

mod context;
mod guest;

pub use context::{RawVm, mirror, unmap, userptr};
pub use guest::{RECORDS_PER_BUFFER, RawGuest, Record};

use super::RingAddresses;
use super::ram::GuestRam;
use anyhow::{Result, ensure};
use std::sync::Arc;

/// Descriptor flag: another one follows.
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: it names a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

/// Bytes of the request buffer.
pub const REQUEST_BYTES: u64 = 3 << 20;
/// Bytes of the response buffer.
pub const RESPONSE_BYTES: u64 = 128 << 10;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `DESC_F_*`.
    pub flags: u16,
    /// The one that follows.
    pub next: u16,
}

/// A ring in guest memory.
#[derive(Debug)]
pub struct RawRing {
    ram: Arc<GuestRam>,
    addresses: RingAddresses,
    request: u64,
    response: u64,
    avail_idx: u16,
    used_seen: u16,
}

impl RawRing {
    /// A ring of `size` descriptors, all zero.
    ///
    /// # Errors
    /// No guest memory is left.
    pub fn new(ram: &Arc<GuestRam>, size: u16) -> Result<Self> {
        let entries = u64::from(size);
        let addresses = RingAddresses {
            size,
            desc: ram.take_dma(16 * entries)?,
            avail: ram.take_dma(6 + 2 * entries)?,
            used: ram.take_dma(6 + 8 * entries)?,
        };
        let (request, response) = (ram.take_dma(REQUEST_BYTES)?, ram.take_dma(RESPONSE_BYTES)?);
        Ok(Self { ram: ram.clone(), addresses, request, response, avail_idx: 0, used_seen: 0 })
    }

    /// As it was made: all zero, nothing available.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn clear(&mut self) -> Result<()> {
        let entries = u64::from(self.addresses.size);
        let RingAddresses { desc, avail, used, .. } = self.addresses;
        for (at, bytes) in [(desc, 16 * entries), (avail, 6 + 2 * entries), (used, 6 + 8 * entries)] {
            self.ram.write(at, &vec![0; usize::try_from(bytes)?])?;
        }
        (self.avail_idx, self.used_seen) = (0, 0);
        Ok(())
    }

    /// Where it is.
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Guest-physical address of the request buffer.
    pub fn request(&self) -> u64 {
        self.request
    }

    /// Guest-physical address of the response buffer.
    pub fn response(&self) -> u64 {
        self.response
    }

    /// Writes a descriptor of the table.
    ///
    /// # Errors
    /// The index is far outside the table.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<()> {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&descriptor.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        self.ram.write(self.addresses.desc + 16 * u64::from(index), &bytes)
    }

    /// Makes a chain available.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn publish(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.avail_idx % self.addresses.size);
        self.ram.store(self.addresses.avail + 4 + 2 * slot, head)?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.ram.store(self.addresses.avail + 2, self.avail_idx)
    }

    /// Writes the available index, whatever it should be.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn write_avail_idx(&mut self, value: u16) -> Result<()> {
        self.avail_idx = value;
        self.ram.store(self.addresses.avail + 2, value)
    }

    /// The available index as it was written last.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The next chain that the device has given back, if any: its head, and how many bytes were written to it. If there
    /// is none, the device has been asked for an interrupt at the next one.
    ///
    /// # Errors
    /// The ring is not in guest memory.
    pub fn take_used(&mut self) -> Result<Option<(u32, u32)>> {
        // VIRTIO_F_EVENT_IDX: the wish first, then the look; without that feature nobody reads it.
        let used_event = self.addresses.avail + 4 + 2 * u64::from(self.addresses.size);
        self.ram.store(used_event, self.used_seen)?;
        let used: u16 = self.ram.load(self.addresses.used + 2)?;
        if used == self.used_seen {
            return Ok(None);
        }
        let entry = self.addresses.used + 4 + 8 * u64::from(self.used_seen % self.addresses.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        Ok(Some((self.ram.load(entry)?, self.ram.load(entry + 4)?)))
    }

    /// Prepares one command as descriptors 0 and 1 (only 0 when there is nothing to read or to write), fills the room for
    /// its answer, and makes it available: from then on the device may find it, kicked or not.
    ///
    /// # Errors
    /// It does not fit into the buffers.
    pub fn publish_command(&mut self, request: &[u8], room: u32, fill: u8) -> Result<()> {
        ensure!(
            request.len() as u64 <= REQUEST_BYTES && u64::from(room) <= RESPONSE_BYTES,
            "command too large"
        );
        self.ram.write(self.request, request)?;
        self.ram.write(self.response, &vec![fill; room as usize])?;
        let read =
            Descriptor { addr: self.request, len: u32::try_from(request.len())?, ..Descriptor::default() };
        let write = Descriptor { addr: self.response, len: room, flags: DESC_F_WRITE, next: 0 };
        match (request.is_empty(), room == 0) {
            (false, false) => {
                self.write_descriptor(0, Descriptor { flags: DESC_F_NEXT, next: 1, ..read })?;
                self.write_descriptor(1, write)?;
            }
            (false, true) => self.write_descriptor(0, read)?,
            (true, _) => self.write_descriptor(0, write)?,
        }
        self.publish(0)
    }

    /// The first `len` bytes of the response buffer.
    ///
    /// # Errors
    /// More than the buffer has.
    pub fn read_response(&self, len: u32) -> Result<Vec<u8>> {
        ensure!(u64::from(len) <= RESPONSE_BYTES, "the device says that it wrote {len} bytes");
        let mut bytes = vec![0; len as usize];
        self.ram.read(self.response, &mut bytes)?;
        Ok(bytes)
    }
}
