//! The device's side of a split virtqueue, over its own mapping of the driver's memory.

use guest_agent::driver::DmaRegion;
use guest_agent::driver::dma::{PAGE_BYTES, Segment};
use guest_agent::driver::virtqueue::QueueAddresses;
use rustix::fs::MemfdFlags;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Memory of `pages` pages whose device addresses are neither contiguous nor in order.
pub fn memory(pages: usize) -> (OwnedFd, Vec<u64>) {
    let fd = rustix::fs::memfd_create("mock-guest", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, (pages * PAGE_BYTES) as u64).unwrap();
    let addresses =
        (0..pages as u64).rev().map(|page| 0x1_0000_0000 + page * 2 * PAGE_BYTES as u64).collect();
    (fd, addresses)
}

/// A mapping of such memory.
pub fn region(fd: &OwnedFd, addresses: &[u64]) -> Arc<DmaRegion> {
    Arc::new(DmaRegion::from_fd(fd.as_fd(), 0, addresses.to_vec()).unwrap())
}

/// A chain that the driver made available.
pub struct Chain {
    pub head: u16,
    pub readable: Vec<u8>,
    pub writable: Vec<Segment>,
}

/// One queue.
pub struct DeviceRing {
    memory: Arc<DmaRegion>,
    offsets: HashMap<u64, usize>,
    queue: QueueAddresses,
    event_idx: bool,
    last_avail: u16,
    used_idx: u16,
}

impl DeviceRing {
    pub fn new(memory: Arc<DmaRegion>, queue: QueueAddresses, event_idx: bool) -> Self {
        let offsets =
            memory.pages().iter().enumerate().map(|(index, page)| (*page, index * PAGE_BYTES)).collect();
        Self { memory, offsets, queue, event_idx, last_avail: 0, used_idx: 0 }
    }

    fn offset(&self, address: u64) -> usize {
        let within = address % PAGE_BYTES as u64;
        self.offsets[&(address - within)] + within as usize
    }

    fn u16(&self, address: u64) -> u16 {
        self.memory.memory().load_u16(self.offset(address), Ordering::Acquire).unwrap()
    }

    fn set_u16(&self, address: u64, value: u16) {
        self.memory.memory().store_u16(self.offset(address), value, Ordering::Release).unwrap();
    }

    pub fn set_used_flags(&self, flags: u16) {
        self.set_u16(self.queue.used, flags);
    }

    fn set_u32(&self, address: u64, value: u32) {
        self.memory.memory().store_u32(self.offset(address), value, Ordering::Relaxed).unwrap();
    }

    fn bytes(&self, segment: Segment) -> Vec<u8> {
        let mut bytes = vec![0; segment.len as usize];
        self.memory.memory().read(self.offset(segment.address), &mut bytes).unwrap();
        bytes
    }

    /// Takes the next chain; else asks to be notified.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.u16(self.queue.avail + 2) == self.last_avail {
            if self.event_idx {
                self.set_u16(self.queue.used + 4 + 8 * u64::from(self.queue.size), self.last_avail);
                fence(Ordering::SeqCst);
            }
            if self.u16(self.queue.avail + 2) == self.last_avail {
                return None;
            }
        }
        let slot = u64::from(self.last_avail % self.queue.size);
        let head = self.u16(self.queue.avail + 4 + 2 * slot);
        self.last_avail = self.last_avail.wrapping_add(1);
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut index = head;
        loop {
            let descriptor =
                self.bytes(Segment { address: self.queue.desc + 16 * u64::from(index), len: 16 });
            let address = u64::from_le_bytes(descriptor[..8].try_into().unwrap());
            let len = u32::from_le_bytes(descriptor[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(descriptor[12..14].try_into().unwrap());
            let segment = Segment { address, len };
            if flags & 2 == 0 {
                assert!(chain.writable.is_empty(), "readable after writable");
                chain.readable.extend(self.bytes(segment));
            } else {
                chain.writable.push(segment);
            }
            if flags & 1 == 0 {
                return Some(chain);
            }
            index = u16::from_le_bytes(descriptor[14..16].try_into().unwrap());
        }
    }

    /// Writes `data` into a chain's buffers; bytes that fit.
    pub fn fill(&self, chain: &Chain, data: &[u8]) -> u32 {
        let mut rest = data;
        for segment in &chain.writable {
            let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
            self.memory.memory().write(self.offset(segment.address), now).unwrap();
            rest = later;
        }
        (data.len() - rest.len()) as u32
    }

    /// Writes a used entry and publishes `advance` of them. True: the driver wants an interrupt.
    pub fn push_raw(&mut self, id: u32, len: u32, advance: u16) -> bool {
        let entry = self.queue.used + 4 + 8 * u64::from(self.used_idx % self.queue.size);
        self.set_u32(entry, id);
        self.set_u32(entry + 4, len);
        let old = self.used_idx;
        self.used_idx = old.wrapping_add(advance);
        self.set_u16(self.queue.used + 2, self.used_idx);
        fence(Ordering::SeqCst);
        let event = self.u16(self.queue.avail + 4 + 2 * u64::from(self.queue.size));
        !self.event_idx || self.used_idx.wrapping_sub(event).wrapping_sub(1) < self.used_idx.wrapping_sub(old)
    }

    /// Answers a chain.
    pub fn push(&mut self, chain: &Chain, data: &[u8]) -> bool {
        let len = self.fill(chain, data);
        self.push_raw(u32::from(chain.head), len, 1)
    }
}
