//! Target: a session and its VMM, which sends messages with descriptors, good and bad, writes the rings and kicks; the
//! commands in them come to devices of every kind, whose faults are answered now and then.
//!
//! The session ends when the VMM has left, or before, and says why; no thread of it panics, nor does an engine; it leaves
//! nothing on a device and no descriptor behind. (So nothing else may open descriptors in this process meanwhile.)

use crate::engines::{DEVICES, Engines};
use crate::input::Input;
use crate::script;
use crate::{exclusive, must};
use daemon::fuse::Failure;
use daemon::limits::Limits;
use daemon::log_budget::LogBudget;
use daemon::session::{self, Setup};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::vhost_user::Listener;
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::{EVENTQ, NUM_QUEUES};
use zerocopy::FromBytes;

/// After so long a session that should end hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Messages and deeds of one VMM at most.
const STEPS: usize = 48;
/// Bytes of guest memory; the frontend has it at [`BASE`]. Rings, commands and answers are in the first [`RINGS`], pages
/// of processes where `script` looks for them.
const MEMORY: u64 = 4 << 20;
const RINGS: u64 = 256 << 10;
const BASE: u64 = 0x7000_0000_0000;
const RING: u16 = 16;
/// Chains of a queue with buffers of their own; of more the buffers are used again.
const CHAINS: u8 = 8;
/// Bytes of each buffer.
const ROOM: u32 = 0x1000;
const REQUESTS_AT: u64 = 0x1_0000;
const ANSWERS_AT: u64 = 0x2_0000;
const BUFFERS_AT: u64 = 0x3_0000;
const LIMITS: Limits = Limits {
    contexts: 4,
    pending_faults: 8,
    jobs: 8,
    mappings: 16,
    resources: 4,
    fault_deadline_ms: 0,
    ..Limits::DEFAULT
};

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const RESET_DEVICE: u32 = 34;
/// One beyond the largest request number that is known.
const REQUESTS: u8 = 48;

struct Door {
    engines: Engines,
    listener: Mutex<Listener>,
    socket: std::path::PathBuf,
    _dir: TempDir,
}

static DOOR: LazyLock<Mutex<Arc<Door>>> = LazyLock::new(|| {
    // As a registry does; it stays open.
    daemon::event_file::prepare();
    let dir = must(tempfile::tempdir());
    let socket = dir.path().join("guest.sock");
    let listener = Mutex::new(Listener::from(must(UnixListener::bind(&socket))));
    Mutex::new(Arc::new(Door { engines: Engines::start(), listener, socket, _dir: dir }))
});

/// A VMM: its connection, its guest's memory, and events of each queue.
struct Vmm {
    stream: UnixStream,
    memory: File,
    unsealed: File,
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    avail: [u16; NUM_QUEUES],
}

/// Serves a VMM that does what the input says.
///
/// # Panics
/// If one of the module's statements does not hold.
pub fn run(bytes: &[u8]) {
    let shared = exclusive(&DOOR);
    let door = Arc::clone(&shared);
    let before = descriptors();
    let (ended, end) = mpsc::channel();
    let stream = must(UnixStream::connect(&door.socket));
    let server = std::thread::spawn(move || {
        let setup = Setup {
            host: Arc::clone(&door.engines.host),
            name: "fuzz".into(),
            limits: daemon::limits::of(&LIMITS),
            devices: DEVICES.to_vec(),
            busy_poll: std::time::Duration::ZERO,
            allow_unsealed: false,
            log: Arc::new(LogBudget::new("a fuzzed guest".to_owned(), 1)),
        };
        let mut listener = door.listener.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let outcome = session::serve(&setup, &mut listener, |_| ());
        ended.send(outcome).ok();
    });
    let mut vmm = Vmm::new(stream);
    let mut input = Input::new(bytes);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        vmm.step(&mut input);
    }
    vmm.leave();
    let outcome = must(end.recv_timeout(PATIENCE));
    assert!(server.join().is_ok());
    drop(vmm);
    if let Err(failure) = &outcome {
        assert!(!matches!(**failure, Failure::Panicked(_)), "{failure}");
    }
    shared.engines.assert_idle();
    await_descriptors(before, &outcome);
}

/// Engines and the housekeeper may hold what is left of a guest a moment longer than its session.
fn await_descriptors(before: usize, outcome: &Result<(), Arc<Failure>>) {
    let until = Instant::now() + PATIENCE;
    while descriptors() != before {
        assert!(Instant::now() < until, "{before} descriptors before, {} after: {outcome:?}", descriptors());
        std::thread::yield_now();
    }
}

/// How many this process has open.
fn descriptors() -> usize {
    must(std::fs::read_dir("/proc/self/fd")).count()
}

fn memfd(sealed: bool) -> File {
    let fd = must(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING));
    must(ftruncate(&fd, MEMORY));
    if sealed {
        must(fcntl_add_seals(&fd, SealFlags::SHRINK));
    }
    File::from(fd)
}

impl Vmm {
    fn new(stream: UnixStream) -> Self {
        must(stream.set_read_timeout(Some(PATIENCE)));
        must(stream.set_write_timeout(Some(PATIENCE)));
        let event = || must(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC));
        let events = || (0..NUM_QUEUES).map(|_| event()).collect();
        let (memory, unsealed) = (memfd(true), memfd(false));
        Self { stream, memory, unsealed, kicks: events(), calls: events(), avail: [0; NUM_QUEUES] }
    }

    /// A message of any kind and form, or from 0x80 on something that a good VMM does.
    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.u8();
        if step < 0x80 {
            return self.any_message(u32::from(step % REQUESTS), input);
        }
        let queue = usize::from(step) % NUM_QUEUES;
        match (step & 0x7f) / 3 {
            0 => self.negotiate(),
            1 => self.send_memory(),
            2 => self.start_ring(queue),
            3 => self.number(GET_VRING_BASE, queue, 0),
            4 => self.send(RESET_DEVICE, 1, &[], &[]),
            5 => self.number(SET_VRING_ENABLE, queue, u32::from(input.u8() & 1)),
            6 => self.offer(queue, &script::hello(u64::from(input.u8()))),
            7..=8 => self.offer(0, &script::create_context(script::ctx_id(input))),
            9..=14 => self.offer(0, &script::command(input)),
            15 => self.offer(queue, &script::command(input)),
            16 => self.offer_buffer(EVENTQ.into()),
            17 => {
                // Anything, among the rings or anywhere in guest memory.
                let (at, bytes) = (input.u32(), input.u8());
                let within = if bytes & 0x80 == 0 { RINGS } else { MEMORY };
                let bytes = input.take(usize::from(bytes) & 0x7f);
                self.write(u64::from(at) % (within - 256), bytes);
            }
            18 => self.kick(queue),
            19..=20 => self.answer(input),
            21 => self.send(GET_CONFIG, 1, &[0, 128, 0].map(u32::to_le_bytes).concat(), &[]),
            // Everything so far is done when this is answered.
            _ => self.settle(),
        }
    }

    fn any_message(&mut self, request: u32, input: &mut Input<'_>) {
        let (how, fds, length) = (input.u8(), input.u8(), input.u8());
        let payload = input.take(usize::from(length) & 0x7f);
        let flags = match how & 7 {
            0 => u32::from(input.u8()),
            1 => 9,
            _ => 1,
        };
        let files =
            [self.memory.as_fd(), self.kicks[0].as_fd(), self.calls[1].as_fd(), self.unsealed.as_fd()];
        let fds: Vec<_> =
            (0..fds & 3).zip(files.iter().cycle().skip(usize::from(fds >> 6))).map(|(_, fd)| *fd).collect();
        let size = if how & 0x38 == 0x38 { input.u32() } else { u32::from(length & 0x7f) };
        Self::send_raw(&self.stream, [request, flags, size], payload, &fds);
    }

    fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        Self::send_raw(&self.stream, [request, flags, size], payload, fds);
    }
    fn send_raw(stream: &UnixStream, header: [u32; 3], payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let bytes = [&header.map(u32::to_le_bytes).concat(), payload].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "no room for descriptors");
        }
        // A session that has ended takes no more.
        sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).ok();
    }
    fn number(&self, request: u32, queue: usize, value: u32) {
        let queue = u32::try_from(queue).unwrap_or(u32::MAX);
        self.send(request, 1, &[queue, value].map(u32::to_le_bytes).concat(), &[]);
    }

    fn negotiate(&self) {
        self.send(SET_OWNER, 1, &[], &[]);
        self.send(SET_PROTOCOL_FEATURES, 1, &0x1_a229_u64.to_le_bytes(), &[]);
        self.send(SET_FEATURES, 1, &session::FEATURES.to_le_bytes(), &[]);
    }
    fn send_memory(&self) {
        let region = [0, MEMORY, BASE, 0].map(u64::to_le_bytes).concat();
        self.send(SET_MEM_TABLE, 1, &[&1_u64.to_le_bytes()[..], &region].concat(), &[self.memory.as_fd()]);
    }
    fn ring_at(queue: usize) -> u64 {
        0x1000 * (1 + 4 * u64::try_from(queue).unwrap_or(0))
    }
    fn start_ring(&mut self, queue: usize) {
        let (ring, index) = (BASE + Self::ring_at(queue), u32::try_from(queue).unwrap_or(0));
        self.number(SET_VRING_NUM, queue, RING.into());
        self.number(SET_VRING_BASE, queue, self.avail[queue].into());
        let head = [index, 0].map(u32::to_le_bytes).concat();
        let areas = [ring, ring + 0x2000, ring + 0x1000, 0].map(u64::to_le_bytes).concat();
        self.send(SET_VRING_ADDR, 1, &[head, areas].concat(), &[]);
        let name = u64::from(index).to_le_bytes();
        self.send(SET_VRING_CALL, 1, &name, &[self.calls[queue].as_fd()]);
        self.send(SET_VRING_KICK, 1, &name, &[self.kicks[queue].as_fd()]);
        self.number(SET_VRING_ENABLE, queue, 1);
    }
    fn write(&self, at: u64, bytes: &[u8]) {
        must(self.memory.write_all_at(bytes, at));
    }
    /// Makes a command available, and room for its answer, and kicks.
    fn offer(&mut self, queue: usize, command: &[u8]) {
        let place = self.place(queue);
        self.write(REQUESTS_AT + place, command);
        let length = u32::try_from(command.len()).unwrap_or(u32::MAX);
        self.make_available(queue, &[(REQUESTS_AT + place, length, 1), (ANSWERS_AT + place, ROOM, 2)]);
    }
    /// Makes a buffer for event records available, and kicks.
    fn offer_buffer(&mut self, queue: usize) {
        let place = self.place(queue);
        self.make_available(queue, &[(BUFFERS_AT + place, ROOM, 2)]);
    }
    /// Answers a fault that an event buffer tells of.
    fn answer(&mut self, input: &mut Input<'_>) {
        let place = u64::from(ROOM) * u64::from(input.below(CHAINS));
        let mut buffer = vec![0; must(usize::try_from(ROOM))];
        must(self.memory.read_exact_at(&mut buffer, BUFFERS_AT + place));
        let records = buffer.get(size_of::<EventHdr>()..).unwrap_or_default();
        let mut faults = records
            .chunks_exact(EVENT_RECORD_BYTES)
            .filter_map(|record| FaultRecord::read_from_bytes(record).ok())
            .filter(|record| record.kind.get() == EVENT_FAULT);
        let Some(fault) = faults.nth(usize::from(input.u8() & 3)) else { return };
        let seq = if input.flag() { 0 } else { u64::MAX };
        let run = script::run(input, Some(fault.cpu_addr.get()), seq);
        self.offer(0, &script::response(fault.ctx_id.get(), fault.cookie.get(), input.below(3), &[run]));
    }
    /// Where the next chain of a queue has its buffers, from the beginning of each kind.
    fn place(&self, queue: usize) -> u64 {
        u64::from(ROOM) * u64::from(self.avail[queue] % u16::from(CHAINS))
    }
    /// A chain of buffers (address, bytes, 2 for writable and 1 for readable).
    fn make_available(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let ring = Self::ring_at(queue);
        let head = 2 * (self.avail[queue] % u16::from(CHAINS));
        for ((index, &(addr, length, kind)), left) in
            (head..).zip(buffers).zip((0..u16::try_from(buffers.len()).unwrap_or(0)).rev())
        {
            let flags = kind & 2 | u16::from(left > 0);
            let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
            self.write(ring + 16 * u64::from(index), &[addr, rest].map(u64::to_le_bytes).concat());
        }
        let slot = u64::from(self.avail[queue] % RING);
        self.write(ring + 0x1004 + 2 * slot, &head.to_le_bytes());
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.write(ring + 0x1002, &self.avail[queue].to_le_bytes());
        self.kick(queue);
    }
    fn kick(&self, queue: usize) {
        // A full counter is a kick too.
        rustix::io::write(&self.kicks[queue], &1_u64.to_ne_bytes()).ok();
    }
    /// Lets the session's threads come to what was kicked.
    fn settle(&self) {
        self.send(GET_FEATURES, 1, &[], &[]);
        std::thread::sleep(Duration::from_micros(200));
    }
    fn leave(&mut self) {
        self.stream.shutdown(Shutdown::Write).ok();
        let mut rest = Vec::new();
        // What it answered does not matter, nor does a connection that it has cut.
        self.stream.read_to_end(&mut rest).ok();
    }
}
