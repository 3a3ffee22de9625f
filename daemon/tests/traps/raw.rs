//! A VMM's end of the socket by hand: messages as bytes, with whatever descriptors, and answers as they come.

use crate::vmm::{PATIENCE, memfd};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_LOG_BASE: u32 = 6;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;

/// Version 1, no reply wanted.
pub const PLAIN: u32 = 1;
/// Bytes of [`Raw::memory`].
pub const MEMORY: u64 = 1 << 20;
/// Where the VMM has it.
pub const BASE: u64 = 0x7000_0000_0000;
/// What a VMM that knows all of the protocol acknowledges, whatever was offered.
pub const ALL_PROTOCOL: u64 = 0x7f_ffff;

/// A message from the daemon.
#[derive(Debug)]
pub struct Answer {
    pub request: u32,
    pub body: Vec<u8>,
}

/// A connection.
pub struct Raw {
    stream: UnixStream,
    pub memory: File,
    pub event: OwnedFd,
}

impl Raw {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        Self { stream, memory: memfd(MEMORY, true), event }
    }

    /// The same after a good handshake: these protocol features and the device's own are acknowledged.
    pub fn negotiated(socket: &Path, protocol: u64) -> Self {
        let raw = Self::connect(socket);
        raw.send(SET_OWNER, &[], &[]);
        let features = raw.ask(GET_FEATURES, &[]).unwrap().body;
        raw.send(SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[]);
        raw.send(SET_FEATURES, &features, &[]);
        raw
    }

    /// Sends a message. One that the daemon does not take any more is lost.
    pub fn send(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&message(request, PLAIN, body), fds);
    }
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).ok();
    }
    /// Sends a message and waits for what answers it. `None`: the daemon has hung up.
    pub fn ask(&self, request: u32, body: &[u8]) -> Option<Answer> {
        self.send(request, body, &[]);
        loop {
            let answer = self.answer()?;
            if answer.request == request {
                return Some(answer);
            }
        }
    }
    /// The next message from the daemon. Descriptors that came with it are closed.
    pub fn answer(&self) -> Option<Answer> {
        let mut head = [0; 12];
        self.fill(&mut head)?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(8) as usize];
        self.fill(&mut body)?;
        Some(Answer { request: word(0), body })
    }
    fn fill(&self, mut rest: &mut [u8]) -> Option<()> {
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(&self.stream, &mut [IoSliceMut::new(rest)], &mut control, RecvFlags::empty());
            // What hung up with unread bytes before it shows as an error.
            let bytes = match got {
                Ok(got) => got.bytes,
                Err(rustix::io::Errno::AGAIN) => panic!("the daemon neither answers nor hangs up"),
                Err(_) => 0,
            };
            rest = rest.get_mut(bytes..).filter(|_| bytes > 0)?;
        }
        Some(())
    }
    /// Ends the connection; who waits for an answer gets none.
    pub fn hang_up(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).ok();
    }
    /// Whether the session goes on behind what was sent.
    pub fn lives(&self) -> bool {
        self.ask(GET_FEATURES, &[]).is_some()
    }

    /// Sends its memory as one region.
    pub fn send_memory(&self) {
        self.send(SET_MEM_TABLE, &table(&[[0, MEMORY, BASE, 0]]), &[self.memory.as_fd()]);
    }
    /// Starts a ring of 16 descriptors in its memory.
    pub fn start_ring(&self, queue: u32) {
        let pair = |value: u32| [queue, value].map(u32::to_le_bytes).concat();
        self.send(SET_VRING_NUM, &pair(16), &[]);
        self.send(SET_VRING_BASE, &pair(0), &[]);
        self.send(SET_VRING_ADDR, &ring_areas(queue), &[]);
        let name = u64::from(queue).to_le_bytes();
        self.send(SET_VRING_CALL, &name, &[self.event.as_fd()]);
        self.send(SET_VRING_KICK, &name, &[self.event.as_fd()]);
        self.send(SET_VRING_ENABLE, &pair(1), &[]);
    }
}

pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    [&[request, flags, body.len() as u32].map(u32::to_le_bytes).concat(), body].concat()
}

/// The body of SET_MEM_TABLE: regions of {guest-physical, bytes, address in the VMM, offset in the file}.
pub fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let count = [regions.len() as u32, 0].map(u32::to_le_bytes).concat();
    let regions = regions.iter().flatten().flat_map(|word| word.to_le_bytes());
    count.into_iter().chain(regions).collect()
}

/// The body of ADD_MEM_REG and REM_MEM_REG.
pub fn one_region(region: [u64; 4]) -> Vec<u8> {
    [[0].as_slice(), &region].concat().into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The body of SET_VRING_ADDR, for a ring in [`Raw::memory`].
pub fn ring_areas(queue: u32) -> Vec<u8> {
    let ring = BASE + 0x1000 * (1 + 4 * u64::from(queue));
    let areas = [ring, ring + 0x2000, ring + 0x1000, 0];
    [[queue, 0].map(u32::to_le_bytes).concat(), areas.map(u64::to_le_bytes).concat()].concat()
}
