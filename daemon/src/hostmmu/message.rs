//! What the daemon and a worker say to each other: one datagram a message, over a socket pair that only they have.
//!
//! Both are the same program, so numbers travel in this machine's order. A message is [`RECORD`] bytes, followed by
//! packets in [`Order::Job`]; two kinds carry a descriptor. The order of messages is the order in which they take effect.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use virtio_gpu_svm::device::Access;
use virtio_gpu_svm::protocol::MAX_PACKETS;
use virtio_gpu_svm::protocol::job::Packet;
use zerocopy::{FromBytes, IntoBytes};

const WORDS: usize = 7;
/// Bytes of a message without packets.
pub const RECORD: usize = WORDS * size_of::<u64>();
/// Most bytes of a message.
pub const MAX_MESSAGE: usize = RECORD + MAX_PACKETS as usize * size_of::<Packet>();

/// Numbers of a message; the first says which it is.
type Record = [u64; WORDS];

/// What a parked thread waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// In the kernel, for a missing page.
    Missing,
    /// In the worker, after an access that its mapping forbids.
    Denied,
}

/// From the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The descriptor that comes along is the file of this region.
    Region {
        /// [`virtio_gpu_svm::memory::Region::id`].
        id: u64,
    },
    /// No order will name this region any more.
    Forget {
        /// Which.
        id: u64,
    },
    /// Maps a part of a region's file; replaces what stood there.
    Map {
        /// GPU address, which is the worker's own.
        addr: u64,
        /// Bytes.
        bytes: u64,
        /// Of which region.
        region: u64,
        /// Byte offset in its file.
        offset: u64,
        /// Whether packets may write.
        writable: bool,
    },
    /// Nothing is mapped there any more.
    Unmap {
        /// GPU address.
        addr: u64,
        /// Bytes.
        bytes: u64,
    },
    /// To be answered when everything before has taken effect.
    Fence {
        /// Comes back.
        ticket: u64,
    },
    /// A job; its packets follow.
    Job {
        /// Its timeline.
        ring: u32,
        /// Its name, for [`Order::Stop`].
        job: u64,
    },
    /// Ends a job, if it has not ended yet: before its next access, or within one that takes long.
    Stop {
        /// Its timeline.
        ring: u32,
        /// Its name.
        job: u64,
    },
    /// Lets a parked thread look again: its job was stopped, or its access is repeated.
    Resume {
        /// Whose thread.
        ring: u32,
        /// In what it is parked.
        wait: Wait,
        /// Whether the job was stopped.
        abandon: bool,
    },
}

/// From a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Set up; the descriptor that comes along tells the faults.
    Ready,
    /// A ring has a thread.
    Thread {
        /// Which ring.
        ring: u32,
        /// Its thread, as faults name it.
        tid: u32,
    },
    /// A thread is parked, because its mapping forbids what it did.
    Denied {
        /// Whose.
        ring: u32,
        /// What was touched.
        addr: u64,
        /// Whether it was to be written.
        write: bool,
    },
    /// A mapping is there, but the file behind it ends before. The job that touched it ends.
    Lost {
        /// What was touched.
        addr: u64,
    },
    /// The front job of a ring ended.
    Done {
        /// Which ring.
        ring: u32,
        /// 0 or a positive errno.
        errno: u32,
        /// The packet that failed.
        packet: u32,
        /// The address that failed.
        addr: u64,
        /// How it was touched.
        access: Access,
    },
    /// Everything before this fence has taken effect.
    Fenced {
        /// As in the order.
        ticket: u64,
    },
}

impl Order {
    /// As numbers.
    pub fn encode(self) -> Record {
        match self {
            Self::Region { id } => [1, id, 0, 0, 0, 0, 0],
            Self::Forget { id } => [2, id, 0, 0, 0, 0, 0],
            Self::Map { addr, bytes, region, offset, writable } => {
                [3, addr, bytes, region, offset, writable.into(), 0]
            }
            Self::Unmap { addr, bytes } => [4, addr, bytes, 0, 0, 0, 0],
            Self::Fence { ticket } => [5, ticket, 0, 0, 0, 0, 0],
            Self::Job { ring, job } => [6, ring.into(), job, 0, 0, 0, 0],
            Self::Resume { ring, wait, abandon } => {
                [7, ring.into(), (wait == Wait::Denied).into(), abandon.into(), 0, 0, 0]
            }
            Self::Stop { ring, job } => [8, ring.into(), job, 0, 0, 0, 0],
        }
    }

    /// From numbers; `None` if they are no order.
    pub fn decode(record: Record) -> Option<Self> {
        Some(match record {
            [1, id, ..] => Self::Region { id },
            [2, id, ..] => Self::Forget { id },
            [3, addr, bytes, region, offset, writable, _] => {
                Self::Map { addr, bytes, region, offset, writable: writable != 0 }
            }
            [4, addr, bytes, ..] => Self::Unmap { addr, bytes },
            [5, ticket, ..] => Self::Fence { ticket },
            [6, ring, job, ..] => Self::Job { ring: u32::try_from(ring).ok()?, job },
            [7, ring, denied, abandon, ..] => Self::Resume {
                ring: u32::try_from(ring).ok()?,
                wait: if denied == 0 { Wait::Missing } else { Wait::Denied },
                abandon: abandon != 0,
            },
            [8, ring, job, ..] => Self::Stop { ring: u32::try_from(ring).ok()?, job },
            _ => return None,
        })
    }
}

impl Report {
    /// As numbers.
    pub fn encode(self) -> Record {
        match self {
            Self::Ready => [1, 0, 0, 0, 0, 0, 0],
            Self::Thread { ring, tid } => [2, ring.into(), tid.into(), 0, 0, 0, 0],
            Self::Denied { ring, addr, write } => [3, ring.into(), addr, write.into(), 0, 0, 0],
            Self::Done { ring, errno, packet, addr, access } => {
                let access = match access {
                    Access::Read => 0,
                    Access::Write => 1,
                    Access::Atomic => 2,
                };
                [4, ring.into(), errno.into(), packet.into(), addr, access, 0]
            }
            Self::Fenced { ticket } => [5, ticket, 0, 0, 0, 0, 0],
            Self::Lost { addr } => [6, addr, 0, 0, 0, 0, 0],
        }
    }

    /// From numbers; `None` if they are no report.
    pub fn decode(record: Record) -> Option<Self> {
        let small = |number: u64| u32::try_from(number).ok();
        Some(match record {
            [1, ..] => Self::Ready,
            [2, ring, tid, ..] => Self::Thread { ring: small(ring)?, tid: small(tid)? },
            [3, ring, addr, write, ..] => Self::Denied { ring: small(ring)?, addr, write: write != 0 },
            [4, ring, errno, packet, addr, access, _] => {
                let access = match access {
                    0 => Access::Read,
                    1 => Access::Write,
                    _ => Access::Atomic,
                };
                Self::Done { ring: small(ring)?, errno: small(errno)?, packet: small(packet)?, addr, access }
            }
            [5, ticket, ..] => Self::Fenced { ticket },
            [6, addr, ..] => Self::Lost { addr },
            _ => return None,
        })
    }
}

/// Splits a datagram into its record and the packets behind it.
pub fn parse(bytes: &[u8]) -> Option<(Record, &[Packet])> {
    let (record, packets) = Record::read_from_prefix(bytes).ok()?;
    Some((record, <[Packet]>::ref_from_bytes(packets).ok()?))
}

/// Sends one message.
///
/// # Errors
/// The socket's; `WouldBlock` only with [`SendFlags::DONTWAIT`].
pub fn send(
    socket: BorrowedFd<'_>,
    record: &Record,
    packets: &[Packet],
    fd: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> rustix::io::Result<()> {
    let parts = [IoSlice::new(record.as_bytes()), IoSlice::new(packets.as_bytes())];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    retry_on_intr(|| sendmsg(socket, &parts, &mut control, flags | SendFlags::NOSIGNAL)).map(drop)
}

/// Receives one message into `buffer`: its length, 0 once the other side is gone, and a descriptor that came along.
///
/// # Errors
/// The socket's; `WouldBlock` only with [`RecvFlags::DONTWAIT`].
pub fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message =
        retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(&mut *buffer)], &mut control, flags))?;
    let fd = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((message.bytes, fd))
}
