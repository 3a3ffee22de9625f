//! A VMM and a driver that mean ill: rings anywhere, descriptors and indices as a case wants them. The kernel's view of
//! guest memory is the file's, so nothing here is checked but by the daemon.

use crate::vmm::{memfd, negotiate, region};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{Error, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_gpu_svm::protocol::NUM_QUEUES;

/// Two regions side by side, a hole, and one that may go.
pub const REGIONS: [(u64, u64, u64); 3] = [(0, MIB, 0), (MIB, MIB, MIB), (HOLE_END, MIB, 2 * MIB)];
pub const MIB: u64 = 1 << 20;
pub const HOLE: u64 = 2 * MIB;
pub const HOLE_END: u64 = 4 * MIB;
pub const END: u64 = 5 * MIB;
/// Where commands, answers and indirect tables lie.
pub const COMMAND: u64 = 0x8_0000;
pub const ANSWER: u64 = 0x9_0000;
pub const TABLE: u64 = 0xa_0000;
pub const SIZE: u16 = 16;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

/// Where a ring is said to be.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl Place {
    /// Where the rings of a queue lie unless a case says otherwise.
    pub fn of(queue: usize) -> Self {
        let base = 0x1_0000 * (1 + queue as u64);
        Self { size: SIZE, desc: base, avail: base + 0x8000, used: base + 0xa000 }
    }
}

struct Queue {
    place: Place,
    avail: u16,
    used: u16,
    kick: OwnedFd,
    call: OwnedFd,
}

/// The messages that bring a file.
#[derive(Clone, Copy)]
pub enum Bring {
    Kick = 12,
    Call = 13,
}

pub struct Hostile {
    pub frontend: Frontend,
    stream: UnixStream,
    file: File,
    queues: Vec<Queue>,
}

pub type Outcome = Result<(), Error>;

impl Hostile {
    /// Connects and says where memory is. No ring runs.
    pub fn connect(socket: &Path) -> Self {
        let file = memfd(3 * MIB, true);
        let queue =
            |index| Queue { place: Place::of(index), avail: 0, used: 0, kick: event(), call: event() };
        let queues = (0..NUM_QUEUES).map(queue).collect();
        let stream = UnixStream::connect(socket).unwrap();
        let frontend = negotiate(Frontend::from_stream(stream.try_clone().unwrap(), NUM_QUEUES as u64));
        let hostile = Self { frontend, stream, file, queues };
        hostile.frontend.set_mem_table(&hostile.regions()).unwrap();
        hostile
    }

    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        REGIONS.map(|(gpa, bytes, offset)| region(&self.file, gpa, bytes, offset)).to_vec()
    }

    pub fn place(&self, queue: usize) -> Place {
        self.queues[queue].place
    }
    pub fn kick_file(&self, queue: usize) -> BorrowedFd<'_> {
        self.queues[queue].kick.as_fd()
    }
    pub fn call_file(&self, queue: usize) -> BorrowedFd<'_> {
        self.queues[queue].call.as_fd()
    }
    /// Guest memory's file.
    pub fn memory_file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    /// Index of the next chain.
    pub fn avail(&self, queue: usize) -> u16 {
        self.queues[queue].avail
    }

    /// SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ADDR: the ring goes on at the driver's index.
    pub fn set_ring(&mut self, queue: usize, place: Place) -> Outcome {
        self.queues[queue].place = place;
        self.frontend.set_vring_num(queue, place.size)?;
        self.frontend.set_vring_base(queue, self.queues[queue].avail)?;
        self.write(place.avail.wrapping_add(2), &self.queues[queue].avail.to_le_bytes());
        self.move_ring(queue, place)
    }

    /// SET_VRING_ADDR alone.
    pub fn move_ring(&mut self, queue: usize, place: Place) -> Outcome {
        self.queues[queue].place = place;
        self.queues[queue].used = Self::offset(place.used).map_or(0, |_| self.read_u16(place.used + 2));
        let host = |gpa: u64| 0x7000_0000_0000 + gpa;
        let config = VringConfigData {
            queue_max_size: place.size,
            queue_size: place.size,
            flags: 0,
            desc_table_addr: host(place.desc),
            avail_ring_addr: host(place.avail),
            used_ring_addr: host(place.used),
            log_addr: None,
        };
        self.frontend.set_vring_addr(queue, &config)
    }

    /// Sends a file, of any kind. Whether it was taken shows in what is asked next.
    pub fn bring(&self, what: Bring, queue: usize, file: BorrowedFd<'_>) {
        let bytes = [&[what as u32, 1, 8].map(u32::to_le_bytes).concat()[..], &(queue as u64).to_le_bytes()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        // The daemon may have hung up.
        sendmsg(&self.stream, &[IoSlice::new(&bytes.concat())], &mut control, SendFlags::NOSIGNAL).ok();
    }

    /// SET_VRING_CALL, SET_VRING_KICK, SET_VRING_ENABLE.
    pub fn run(&mut self, queue: usize) -> Outcome {
        self.bring(Bring::Call, queue, self.call_file(queue));
        self.bring(Bring::Kick, queue, self.kick_file(queue));
        self.frontend.set_vring_enable(queue, true)
    }

    pub fn start(&mut self, queue: usize, place: Place) -> Outcome {
        self.set_ring(queue, place)?;
        self.run(queue)
    }

    /// Stops a ring and forgets what was in it.
    pub fn stop(&mut self, queue: usize) -> Outcome {
        self.frontend.get_vring_base(queue)?;
        self.forget(queue);
        Ok(())
    }
    /// Stops a ring that is to go on where it was.
    pub fn pause(&mut self, queue: usize) {
        self.frontend.get_vring_base(queue).unwrap();
    }
    pub fn forget(&mut self, queue: usize) {
        let Place { desc, .. } = Place::of(queue);
        self.write(desc, &[0; 0xc000]);
        let queue = &mut self.queues[queue];
        (queue.avail, queue.used, queue.kick, queue.call) = (0, 0, event(), event());
    }

    fn offset(gpa: u64) -> Option<u64> {
        let inside = |(start, bytes, _): &&(u64, u64, u64)| (*start..start + bytes).contains(&gpa);
        REGIONS.iter().find(inside).map(|(start, _, offset)| offset + gpa - start)
    }
    /// Writes memory, as far as there is any.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let Some(offset) = Self::offset(gpa) else { return };
        let end = if gpa < HOLE { HOLE } else { END };
        let bytes = &bytes[..bytes.len().min((end - gpa) as usize)];
        self.file.write_all_at(bytes, offset).unwrap();
    }
    pub fn read(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut buf = vec![0; bytes];
        self.file.read_exact_at(&mut buf, Self::offset(gpa).unwrap()).unwrap();
        buf
    }
    fn read_u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa, 2).try_into().unwrap())
    }
    fn read_u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().unwrap())
    }

    /// Writes descriptors to a table from entry 0 on.
    pub fn describe(&self, table: u64, descs: &[Desc]) {
        let mut bytes = Vec::new();
        for (addr, len, flags, next) in descs {
            bytes.extend(addr.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
        }
        self.write(table, &bytes);
    }

    /// Makes a head available, without a kick.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let Queue { place, avail, .. } = self.queues[queue];
        self.write(place.avail + 4 + 2 * u64::from(avail % place.size), &head.to_le_bytes());
        self.set_avail(queue, avail.wrapping_add(1));
    }
    pub fn set_avail(&mut self, queue: usize, avail: u16) {
        self.queues[queue].avail = avail;
        self.write(self.place(queue).avail + 2, &avail.to_le_bytes());
    }
    pub fn kick(&self, queue: usize) {
        rustix::io::write(self.kick_file(queue), &1_u64.to_ne_bytes()).unwrap();
    }

    /// Chains that have come back since this was asked last: (head, length).
    pub fn take_used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let Place { used, size, .. } = self.place(queue);
        let (now, mut taken) = (self.read_u16(used + 2), Vec::new());
        while self.queues[queue].used != now {
            let at = used + 4 + 8 * u64::from(self.queues[queue].used % size);
            taken.push((self.read_u32(at), self.read_u32(at + 4)));
            self.queues[queue].used = self.queues[queue].used.wrapping_add(1);
        }
        taken
    }

    /// A command in two descriptors, and its answer.
    pub fn command(&mut self, queue: usize, command: &[u8]) -> Vec<u8> {
        self.write(COMMAND, command);
        let table = self.place(queue).desc;
        self.describe(table, &[(COMMAND, command.len() as u32, NEXT, 1), (ANSWER, 4096, WRITE, 0)]);
        self.publish(queue, 0);
        self.kick(queue);
        let (_, length) = super::until("an answer", || self.take_used(queue).pop());
        self.read(ANSWER, length as usize)
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}
