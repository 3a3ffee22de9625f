//! A VMM that speaks vhost-user byte by byte, so that it can leave at any of them, and the driver of its guest.

use crate::PATIENCE;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr};
use virtio_gpu_svm::protocol::gpu::CtrlHdr;
use virtio_gpu_svm::protocol::{CONTROLQ, EVENTQ, NUM_QUEUES};
use zerocopy::FromBytes;

/// Bytes of guest memory, and of a module that is plugged in.
pub const MEMORY: u64 = 512 << 10;
pub const MODULE: u64 = 64 << 10;
/// Where a module stands.
pub const MODULE_GPA: u64 = 1 << 30;
/// Where the VMM has guest memory.
pub const BASE: u64 = 0x7000_0000_0000;
/// Guest-physical address of pages that processes have.
pub const PAGES: u64 = 0x4_0000;

const RING: u16 = 16;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const ROOM: u32 = 4096;
/// Buffers for events, a page each.
const EVENTS: u64 = 0x3_0000;
const EVENT_BUFFERS: u16 = 8;

const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What a message says, and what comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Back {
    Nothing,
    /// An acknowledgement of success.
    Ack,
    /// Data.
    Data,
}

/// Descriptors that go along.
#[derive(Clone, Copy)]
pub enum Along {
    Nothing,
    Memory,
    Module,
    Kick(usize),
    Call(usize),
}

pub struct Message {
    pub request: u32,
    pub payload: Vec<u8>,
    pub along: Along,
    pub back: Back,
}

impl Message {
    pub fn bytes(&self) -> Vec<u8> {
        let flags = if self.back == Back::Ack { 1 | NEED_REPLY } else { 1 };
        let size = u32::try_from(self.payload.len()).unwrap();
        let header = [self.request, flags, size].map(u32::to_le_bytes).concat();
        [header, self.payload.clone()].concat()
    }
}

struct Queue {
    kick: OwnedFd,
    call: OwnedFd,
    avail: u16,
    used: u16,
}

pub struct Vmm {
    stream: UnixStream,
    memory: File,
    module: File,
    queues: Vec<Queue>,
    /// Records that were taken.
    records: Vec<[u8; EVENT_RECORD_BYTES]>,
}

fn memfd(bytes: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    File::from(fd)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

impl Vmm {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let queue = |_| Queue { kick: event(), call: event(), avail: 0, used: 0 };
        let queues = (0..NUM_QUEUES).map(queue).collect();
        Self { stream, memory: memfd(MEMORY), module: memfd(MODULE), queues, records: Vec::new() }
    }

    /// Sends the first bytes of a message.
    pub fn send(&self, message: &Message, bytes: usize) {
        let whole = message.bytes();
        let fd: Option<BorrowedFd<'_>> = match message.along {
            Along::Nothing => None,
            Along::Memory => Some(self.memory.as_fd()),
            Along::Module => Some(self.module.as_fd()),
            Along::Kick(queue) => Some(self.queues[queue].kick.as_fd()),
            Along::Call(queue) => Some(self.queues[queue].call.as_fd()),
        };
        let fds: Vec<_> = fd.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&whole[..bytes])], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent.unwrap(), bytes);
    }
    /// Sends a message and waits for what comes back.
    pub fn exchange(&mut self, message: &Message) -> Vec<u8> {
        self.send(message, message.bytes().len());
        if message.back == Back::Nothing {
            return Vec::new();
        }
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4) & REPLY), (message.request, REPLY));
        let mut payload = vec![0; usize::try_from(word(8)).unwrap()];
        self.stream.read_exact(&mut payload).unwrap();
        if message.back == Back::Ack {
            assert_eq!(payload, 0_u64.to_le_bytes(), "request {} is refused", message.request);
        }
        payload
    }
    /// The rings begin anew.
    pub fn clear_rings(&mut self) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            (queue.avail, queue.used) = (0, 0);
            self.memory.write_all_at(&[0; 0x3000], ring_at(index)).unwrap();
        }
        self.records.clear();
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }
    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
    fn descriptor(&self, queue: usize, index: u16, (addr, len): (u64, u32), flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let at = ring_at(queue) + 16 * u64::from(index);
        self.write(at, &[addr, rest].map(u64::to_le_bytes).concat());
    }
    fn offer(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        let (slot, ring) = (u64::from(q.avail % RING), ring_at(queue) + 0x1000);
        q.avail = q.avail.wrapping_add(1);
        let avail = q.avail;
        self.write(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.write(ring + 2, &avail.to_le_bytes());
    }
    fn kick(&self, queue: usize) {
        rustix::io::write(&self.queues[queue].kick, &1_u64.to_ne_bytes()).unwrap();
    }
    fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = ring_at(queue) + 0x2000;
        let index = u16::from_le_bytes(self.read(ring + 2));
        let q = &mut self.queues[queue];
        if index == q.used {
            return None;
        }
        let at = ring + 4 + 8 * u64::from(q.used % RING);
        q.used = q.used.wrapping_add(1);
        let word = |at| u32::from_le_bytes(self.read(at));
        Some((word(at), word(at + 4)))
    }
    fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.take_used(queue) {
                return used;
            }
            assert!(Instant::now() < deadline, "nothing is used on queue {queue}");
            // The wait ends with the interrupt; its own end only bounds how late a missing one is noticed.
            let look = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            poll(&mut [PollFd::new(&self.queues[queue].call, PollFlags::IN)], Some(&look)).unwrap();
            // Nothing there is nothing to clear.
            rustix::io::read(&self.queues[queue].call, &mut [0; 8]).ok();
        }
    }

    /// One command on the control queue; the answer.
    pub fn command(&mut self, request: &[u8]) -> Vec<u8> {
        let length = u32::try_from(request.len()).unwrap();
        self.write(REQUEST, request);
        self.descriptor(CONTROLQ.into(), 0, (REQUEST, length), 1, 1);
        self.descriptor(CONTROLQ.into(), 1, (ANSWER, ROOM), 2, 0);
        self.offer(CONTROLQ.into(), 0);
        self.kick(CONTROLQ.into());
        let (_, written) = self.wait_used(CONTROLQ.into());
        let mut answer = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_exact_at(&mut answer, ANSWER).unwrap();
        let (hdr, _) = CtrlHdr::read_from_prefix(&answer).unwrap();
        assert!(hdr.kind.get() < 0x1200, "{hdr:?} to {:x?}", &request[..4]);
        answer
    }
    /// Gives the device buffers for events.
    pub fn post_events(&mut self) {
        for index in 0..EVENT_BUFFERS {
            self.post(index);
        }
        self.kick(EVENTQ.into());
    }
    fn post(&mut self, index: u16) {
        self.descriptor(EVENTQ.into(), index, (EVENTS + 4096 * u64::from(index), ROOM), 2, 0);
        self.offer(EVENTQ.into(), index);
    }
    /// The next record of a kind.
    pub fn record<T: FromBytes>(&mut self, kind: u32) -> T {
        loop {
            let wanted = |record: &[u8; EVENT_RECORD_BYTES]| record[..4] == kind.to_le_bytes();
            if let Some(at) = self.records.iter().position(wanted) {
                return T::read_from_bytes(&self.records.remove(at)).unwrap();
            }
            let (index, written) = self.wait_used(EVENTQ.into());
            let mut bytes = vec![0; usize::try_from(written).unwrap()];
            self.memory.read_exact_at(&mut bytes, EVENTS + 4096 * u64::from(index)).unwrap();
            let records = bytes[size_of::<EventHdr>()..].chunks(EVENT_RECORD_BYTES);
            self.records.extend(records.map(|record| <[u8; EVENT_RECORD_BYTES]>::try_from(record).unwrap()));
            self.post(u16::try_from(index).unwrap());
            self.kick(EVENTQ.into());
        }
    }
    /// Where a ring goes on that was stopped.
    pub fn next(&self, queue: usize) -> u16 {
        if queue == usize::from(EVENTQ) { self.queues[queue].used } else { self.queues[queue].avail }
    }
}

pub fn ring_at(queue: usize) -> u64 {
    0x1000 * (1 + 4 * u64::try_from(queue).unwrap())
}
