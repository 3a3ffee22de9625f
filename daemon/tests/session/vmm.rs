//! A VMM with one guest: the `vhost` crate's frontend over a real socket, memory in a memfd, and a driver that writes
//! its own rings.

use rustix::fs::{
    MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, ftruncate, memfd_create,
};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_gpu_svm::protocol::NUM_QUEUES;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// After so long without an answer a test has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of guest memory.
pub const MEMORY: u64 = 4 << 20;
/// Entries of each ring.
pub const SIZE: u16 = 16;

const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const WRITE: u16 = 2;
/// Where commands and their answers lie.
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;
const NEXT: u16 = 1;

/// A memfd of so many bytes.
pub fn memfd(bytes: u64, sealed: bool) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    File::from(fd)
}

/// What SET_MEM_TABLE and ADD_MEM_REG say of a region that is not mapped here.
pub fn region(file: &File, gpa: u64, bytes: u64, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr: 0x7000_0000_0000 + gpa,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// A connected frontend that has negotiated features.
pub fn connect(socket: &Path) -> Frontend {
    negotiate(Frontend::connect(socket, NUM_QUEUES as u64).unwrap())
}

pub fn negotiate(mut frontend: Frontend) -> Frontend {
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    assert_ne!(features & F_PROTOCOL_FEATURES, 0);
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_features(features).unwrap();
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend
}

#[expect(unsafe_code, reason = "the crate's type lends no descriptor")]
fn borrowed(file: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

struct Queue {
    base: u64,
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
    waiter: Epoll,
}

/// A VMM whose guest runs a driver.
pub struct Vmm {
    pub frontend: Frontend,
    memory: GuestMemoryMmap,
    /// Behind the memory.
    pub file: File,
    queues: Vec<Queue>,
}

impl Vmm {
    /// Connects and starts all rings.
    pub fn start(socket: &Path) -> Self {
        Self::start_on(connect(socket))
    }

    pub fn start_on(frontend: Frontend) -> Self {
        Self::start_with(frontend, memfd(MEMORY, true))
    }

    /// On memory of the caller's making, of [`MEMORY`] bytes.
    pub fn start_with(frontend: Frontend, file: File) -> Self {
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(offset))])
                .unwrap();
        let mut vmm = Self { frontend, memory, file, queues: Vec::new() };
        vmm.send_memory();
        for index in 0..NUM_QUEUES {
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let base = 0x1000 * (1 + 4 * index as u64);
            let (kick, call, waiter) = (event(), event(), Epoll::new().unwrap());
            let interrupt = EpollEvent::new(EventSet::IN, 0);
            waiter.ctl(ControlOperation::Add, call.as_raw_fd(), interrupt).unwrap();
            vmm.queues.push(Queue { base, avail: 0, used: 0, kick, call, waiter });
        }
        vmm.start_rings(true);
        vmm
    }

    fn host(&self, gpa: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(gpa)).unwrap() as u64
    }

    /// Sends the memory table (again).
    pub fn send_memory(&self) {
        let mapped = self.memory.iter().next().unwrap();
        let offset = mapped.file_offset().unwrap();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: self.host(0),
            mmap_offset: 0,
            mmap_handle: offset.file().as_raw_fd(),
        };
        self.frontend.set_mem_table(&[info]).unwrap();
    }

    /// Negotiates features again, as after a device reset.
    pub fn restore_features(&self) {
        let features = self.frontend.get_features().unwrap();
        self.frontend.set_features(features).unwrap();
    }

    /// Starts all rings: of a driver that begins anew, or of the one that was paused.
    pub fn start_rings(&mut self, anew: bool) {
        for index in 0..self.queues.len() {
            if anew {
                let queue = &mut self.queues[index];
                (queue.avail, queue.used) = (0, 0);
                self.memory.write_slice(&[0; 0x3000], GuestAddress(queue.base)).unwrap();
            }
            let config = self.ring_addresses(index);
            let queue = &self.queues[index];
            self.frontend.set_vring_num(index, SIZE).unwrap();
            self.frontend.set_vring_base(index, queue.avail).unwrap();
            self.frontend.set_vring_addr(index, &config).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// What SET_VRING_ADDR says of a ring.
    pub fn ring_addresses(&self, index: usize) -> VringConfigData {
        let base = self.queues[index].base;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: self.host(base),
            avail_ring_addr: self.host(base + 0x1000),
            used_ring_addr: self.host(base + 0x2000),
            log_addr: None,
        }
    }

    /// Rings a doorbell.
    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// Makes whoever writes a call file wait for ever, or reads a kick file.
    pub fn jam(&self) {
        for queue in &self.queues {
            queue.call.read().ok();
            queue.call.write(u64::MAX - 1).unwrap();
            for file in [&queue.kick, &queue.call] {
                let file = borrowed(file);
                fcntl_setfl(file, fcntl_getfl(file).unwrap() - OFlags::NONBLOCK).unwrap();
            }
        }
    }

    /// Stops all rings, as a VMM does that pauses or resets its guest.
    pub fn stop_rings(&mut self) -> Vec<u32> {
        (0..self.queues.len()).map(|index| self.frontend.get_vring_base(index).unwrap()).collect()
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut buf = vec![0; bytes];
        self.memory.read_slice(&mut buf, GuestAddress(gpa)).unwrap();
        buf
    }

    /// Writes a descriptor; flags and successor as the specification numbers them.
    pub fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::new();
        bytes.extend(addr.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(self.queues[queue].base + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain available, with or without a kick.
    pub fn offer(&mut self, queue: usize, head: u16, kick: bool) {
        let q = &mut self.queues[queue];
        let ring = q.base + 0x1000;
        let slot = ring + 4 + 2 * u64::from(q.avail % SIZE);
        q.avail = q.avail.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.store(q.avail, GuestAddress(ring + 2), std::sync::atomic::Ordering::SeqCst).unwrap();
        // Interrupt at the next used buffer.
        let event = ring + 4 + 2 * u64::from(SIZE);
        self.memory.write_obj(q.used, GuestAddress(event)).unwrap();
        if kick {
            q.kick.write(1).unwrap();
        }
    }

    /// Sets the available index to whatever.
    pub fn corrupt_avail(&self, queue: usize, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.queues[queue].base + 0x1002)).unwrap();
        self.queues[queue].kick.write(1).unwrap();
    }

    fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.queues[queue].base + 0x2002);
        self.memory.load(at, std::sync::atomic::Ordering::SeqCst).unwrap()
    }

    /// The next used entry (id, len), if there is one.
    pub fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        if self.used_index(queue) == self.queues[queue].used {
            return None;
        }
        let q = &mut self.queues[queue];
        let at = q.base + 0x2004 + 8 * u64::from(q.used % SIZE);
        q.used = q.used.wrapping_add(1);
        let word = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((word(at), word(at + 4)))
    }

    /// Waits for the next used entry.
    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        self.wait(queue, "a used buffer", |vmm| vmm.take_used(queue))
    }

    /// Waits until `ready` has something, looking after each interrupt of the queue.
    fn wait<T>(&mut self, queue: usize, what: &str, mut ready: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(value) = ready(self) {
                return value;
            }
            assert!(std::time::Instant::now() < deadline, "no {what} on queue {queue}");
            // The wait ends with the interrupt; the pause only bounds how late a missing one is noticed.
            let call = &self.queues[queue].call;
            let mut watched = [EpollEvent::default()];
            self.queues[queue].waiter.wait(20, &mut watched).unwrap();
            call.read().ok();
        }
    }

    /// One command on the control queue, and the answer to it.
    pub fn command(&mut self, request: &[u8]) -> Vec<u8> {
        self.command_on(0, request)
    }

    pub fn command_on(&mut self, queue: usize, request: &[u8]) -> Vec<u8> {
        self.send_on(queue, request);
        let (id, len) = self.wait_used(queue);
        assert_eq!(id, 0);
        self.read(ANSWER, len as usize)
    }

    /// One command, without waiting.
    pub fn send_on(&mut self, queue: usize, request: &[u8]) {
        self.write(REQUEST, request);
        self.write(ANSWER, &[0xee; 4096]);
        self.descriptor(queue, 0, REQUEST, request.len() as u32, NEXT, 1);
        self.descriptor(queue, 1, ANSWER, 4096, WRITE, 0);
        self.offer(queue, 0, true);
    }
}
