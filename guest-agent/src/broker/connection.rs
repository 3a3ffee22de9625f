//! One process at the broker: its socket, its context, and what is on its way to it.
//!
//! A thread of its own reads one request after another and replies in order. Records are pushed by the agent's pump,
//! which must never wait: they are sent if the socket has room, else queued up to a bound; a process that does not read
//! loses its connection, and with it its context, and delays nobody.
//!
//! A context ends with the address space that its process had at HELLO, be the socket open in the next program: that is
//! looked at before each message, and now and then. Pages stay pinned until the device is through with them, so what is
//! noticed late harms nobody.
//!
//! A descriptor that a process sends is looked at and closed on its own connection's thread: where it is one of a FUSE
//! server that does not answer, that thread waits, and nobody else ([`super::Broker::close`]).
//!
//! A second connection of the same process may join the context: an allocator owns it and a library launches jobs in it,
//! and neither has to read the other's messages. The one that joins gets the records; the one that opened it, and nobody
//! else, ends it.

use crate::agent::{self, Agent, ContextKey, EventSink, Owner};
use crate::memory_file::MemoryFile;
use crate::message::{
    ARENA_CREATE, ARENA_CUT, ARENA_FREE, ARENA_IMPORT, ARENA_PIN, ArenaCreate, ArenaCut, ArenaFree,
    ArenaImport, ArenaPin, ArenaReply, DEVICES, DeviceEntry, EVENTS, HELLO, HELLO_TRUSTED, Head, Hello,
    HelloReply, MAX_MESSAGE_BYTES, MAX_RECORDS, MAX_REPLY_BYTES, MESSAGE_VERSION, Reached, Refusal, SUBMIT,
    Submit, SubmitReply,
};
use crate::process_memory::ProcessMemory;
use crate::socket::{Credentials, MessageSocket, Peer, Received};
use crate::wait;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::control::GetDeviceResp;
use virtio_gpu_svm::protocol::event::EVENT_RECORD_BYTES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Records that may wait for a process to read.
const MAX_QUEUED_RECORDS: usize = 8192;
/// How long a process that says nothing may have executed another program before that is noticed.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

type Record = [u8; EVENT_RECORD_BYTES];

enum Outgoing {
    Reply { bytes: Vec<u8>, fd: Option<OwnedFd> },
    Records(Vec<Record>),
}

#[derive(Default)]
struct Outbox {
    queue: VecDeque<Outgoing>,
    queued_records: usize,
    /// The process reads too slowly, or its socket is broken.
    dead: bool,
}

/// Connections that opened a context, by the context's number: with its key, for numbers come back.
#[derive(Default)]
pub(super) struct Openers(Mutex<HashMap<u32, (ContextKey, Weak<Connection>)>>);

impl Openers {
    fn locked(&self) -> MutexGuard<'_, HashMap<u32, (ContextKey, Weak<Connection>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The opener of the context that has this number now.
    fn lookup(&self, ctx_id: u32) -> Option<(ContextKey, Arc<Connection>)> {
        let (key, opener) = self.locked().get(&ctx_id).cloned()?;
        Some((key, opener.upgrade()?))
    }

    /// Removes the opener of this context, and of no other one that has its number by now.
    fn remove(&self, key: ContextKey) {
        let mut openers = self.locked();
        if openers.get(&key.ctx_id()).is_some_and(|(other, _)| *other == key) {
            openers.remove(&key.ctx_id());
        }
    }
}

/// The context that a connection speaks for.
#[derive(Clone, Copy)]
struct Place {
    key: ContextKey,
    /// The context ends with this connection.
    opened: bool,
}

/// Who gets a context's records.
enum Reader {
    Opener,
    /// Who has joined; nobody any more once it has left.
    Joined(Weak<Connection>),
}

pub(super) struct Connection {
    agent: Arc<Agent>,
    openers: Arc<Openers>,
    socket: MessageSocket,
    peer: Peer,
    outbox: Mutex<Outbox>,
    /// Readable when something was queued.
    wake: OwnedFd,
    /// Whether what the process says of its memory is believed.
    trusted: bool,
    /// The address space, or why it cannot be looked at, from when the connection is served.
    memory: OnceLock<Result<ProcessMemory, Errno>>,
    /// Sender of the first message.
    sender: OnceLock<Credentials>,
    /// The context, once HELLO has made or joined it.
    place: Mutex<Option<Place>>,
    /// Of the context that this connection opened.
    reader: Mutex<Reader>,
}

/// A request's outcome.
enum Outcome {
    /// Status and body, perhaps a descriptor.
    Reply { status: i32, body: Vec<u8>, fd: Option<OwnedFd> },
    /// The message was not one of ours: tell, then hang up.
    Refuse(Errno),
}

impl Outcome {
    fn ok(body: &[u8]) -> Self {
        Self::Reply { status: 0, body: body.to_vec(), fd: None }
    }

    fn done(result: agent::Result<()>) -> Self {
        result.map_or_else(|error| Self::refused(&error), |()| Self::ok(&[]))
    }

    /// What the agent does not do; where a limit is the reason the body names it.
    fn refused(error: &agent::Error) -> Self {
        let body = error.reached().map_or_else(Vec::new, |limit| refusal(limit).as_bytes().to_vec());
        Self::Reply { status: error.status(), body, fd: None }
    }

    fn failed(status: i32) -> Self {
        Self::Reply { status, body: Vec::new(), fd: None }
    }
}

impl Connection {
    pub(super) fn new(
        agent: Arc<Agent>,
        openers: Arc<Openers>,
        socket: MessageSocket,
        peer: Peer,
    ) -> io::Result<Self> {
        let trusted = agent.trusts(peer.credentials.uid);
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            agent,
            openers,
            socket,
            peer,
            outbox: Mutex::new(Outbox::default()),
            wake,
            trusted,
            memory: OnceLock::new(),
            sender: OnceLock::new(),
            place: Mutex::new(None),
            reader: Mutex::new(Reader::Opener),
        })
    }

    /// Serves until the process is gone or has done something wrong; then its context is destroyed.
    /// It has so long to say HELLO.
    pub(super) fn serve(self: &Arc<Self>, stop: BorrowedFd<'_>, hello_timeout: Duration) {
        let mut buf = vec![0; MAX_MESSAGE_BYTES];
        // Here and not where connections are accepted: it may wait for the process.
        self.memory.get_or_init(|| ProcessMemory::open(&self.peer));
        self.serve_process(stop, hello_timeout, &mut buf);
        // What was not read is dropped here, where closing its descriptors may wait for the process: the last to have this
        // socket may be a thread that serves everybody.
        rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both).ok();
        while self.socket.receive(&mut buf, false).is_ok_and(|left| left.len > 0 || left.sender.is_some()) {}
    }

    fn serve_process(self: &Arc<Self>, stop: BorrowedFd<'_>, hello_timeout: Duration, buf: &mut [u8]) {
        let begun = Instant::now();
        // Who has no context has no reason to stay. A message that is there is looked at first.
        let left = || self.place().is_none().then(|| hello_timeout.saturating_sub(begun.elapsed()));
        while self.turn(stop, left(), buf).is_some() && left() != Some(Duration::ZERO) {}
        let place = self.place().take();
        if let Some(Place { key, opened: true }) = place {
            self.openers.remove(key);
            // Whoever has joined it has the key of a context that is no more.
            self.agent.destroy_context(key);
        }
    }

    fn place(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> Result<&ProcessMemory, Errno> {
        self.memory.get().map_or(Err(Errno::ACCESS), |memory| memory.as_ref().map_err(|errno| *errno))
    }

    /// Whether the program that connected is no more, though its process may be.
    fn has_executed(&self) -> bool {
        self.memory().is_ok_and(ProcessMemory::has_gone)
    }

    fn take_place(&self, place: Place) {
        *self.place() = Some(place);
    }

    fn reader(&self) -> MutexGuard<'_, Reader> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to happen, at most as long as is `left`. `None`: the connection ends.
    fn turn(self: &Arc<Self>, stop: BorrowedFd<'_>, left: Option<Duration>, buf: &mut [u8]) -> Option<()> {
        let waiting = !self.outbox().queue.is_empty();
        // No new request before the last reply is out: so at most one is outstanding.
        let wish = if waiting { PollFlags::OUT } else { PollFlags::IN };
        let mut fds = [
            PollFd::new(&self.socket, wish),
            PollFd::new(&self.peer.pidfd, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        let pause = left.map_or(LOOK_INTERVAL, |left| left.min(LOOK_INTERVAL));
        match rustix::event::poll(&mut fds, pause.try_into().ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return None,
        }
        let [socket, pidfd, wake, stop] = fds.map(|fd| fd.revents());
        if !pidfd.is_empty() || !stop.is_empty() || socket.intersects(PollFlags::HUP | PollFlags::ERR) {
            return None;
        }
        if !wake.is_empty() {
            // Only empties the counter; another thread may have done it.
            rustix::io::read(&self.wake, &mut [0u8; 8]).ok();
        }
        self.flush()?;
        if !waiting && socket.contains(PollFlags::IN) {
            return self.receive(buf);
        }
        if self.has_executed() { None } else { Some(()) }
    }

    fn receive(self: &Arc<Self>, buf: &mut [u8]) -> Option<()> {
        let mut received = match self.socket.receive(buf, false) {
            Ok(received) if received.len == 0 => return None,
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(()),
            Err(_) => return None,
        };
        let message = buf.get(..received.len)?;
        let (head, body) = Head::read_from_prefix(message).ok().unwrap_or((empty_head(), &[]));
        let outcome = match self.check(&received, &head) {
            Ok(()) => self.carry_out(&head, body, received.fds.pop()),
            Err(errno) => Outcome::Refuse(errno),
        };
        let reply = |status: i32| Head { status: status.into(), reserved: 0.into(), ..head };
        match outcome {
            Outcome::Reply { status, body, fd } => {
                let mut bytes = reply(status).as_bytes().to_vec();
                bytes.extend_from_slice(&body);
                self.outbox().queue.push_back(Outgoing::Reply { bytes, fd });
                self.flush()
            }
            Outcome::Refuse(errno) => {
                // Best effort: the connection ends anyway.
                let bytes = reply(-errno.raw_os_error());
                drop(self.socket.send(&[bytes.as_bytes()], &[], false));
                None
            }
        }
    }

    /// What must hold for every message.
    fn check(&self, received: &Received, head: &Head) -> Result<(), Errno> {
        // The process that connected, and ever since its first message the same user: so neither a child that
        // inherited the socket nor a program that was executed with other rights may use the context.
        let of_peer = received.sender.filter(|sender| sender.pid == self.peer.credentials.pid);
        let sender = of_peer.ok_or(Errno::ACCESS)?;
        // Whose memory cannot be looked at hears so, and has no context.
        let memory = self.memory()?;
        // Nor may the next program of that process, which cannot have sent this before the last one's memory was gone.
        if *self.sender.get_or_init(|| sender) != sender || memory.has_gone() {
            return Err(Errno::ACCESS);
        }
        // One message comes with a descriptor, and with one alone.
        let wanted = usize::from(head.kind.get() == ARENA_IMPORT);
        let clean = !received.truncated && received.fds.len() == wanted && received.len >= size_of::<Head>();
        if !clean || head.status.get() != 0 || head.reserved.get() != 0 {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    fn carry_out(self: &Arc<Self>, head: &Head, body: &[u8], fd: Option<OwnedFd>) -> Outcome {
        let place = *self.place();
        let key = place.map(|place| place.key);
        match (head.kind.get(), key) {
            (HELLO, None) => parsed::<Hello>(body).map_or_else(Outcome::Refuse, |hello| self.on_hello(hello)),
            (DEVICES, Some(_)) if body.is_empty() => self.on_devices(),
            (ARENA_CREATE, Some(key)) => {
                parsed(body).map_or_else(Outcome::Refuse, |request| self.on_arena_create(key, request))
            }
            (ARENA_IMPORT, Some(key)) => match (parsed(body), fd) {
                (Ok(request), Some(fd)) => self.on_arena_import(key, request, fd),
                _ => Outcome::Refuse(Errno::INVAL),
            },
            (ARENA_PIN, Some(key)) => {
                parsed(body).map_or_else(Outcome::Refuse, |request| self.on_arena_pin(key, request))
            }
            (ARENA_FREE, Some(key)) => {
                parsed(body).map_or_else(Outcome::Refuse, |request| self.on_arena_free(key, request))
            }
            (ARENA_CUT, Some(key)) => {
                parsed(body).map_or_else(Outcome::Refuse, |request| self.on_arena_cut(key, request))
            }
            (SUBMIT, Some(key)) => self.on_submit(key, body),
            _ => Outcome::Refuse(Errno::INVAL),
        }
    }

    fn on_hello(self: &Arc<Self>, hello: Hello) -> Outcome {
        if hello.version.get() != MESSAGE_VERSION {
            return Outcome::Refuse(Errno::OPNOTSUPP);
        }
        match hello.join.get() {
            0 => self.open(),
            ctx_id => match self.join(ctx_id) {
                Ok(key) => self.hello_reply(key),
                Err(errno) => Outcome::failed(-errno.raw_os_error()),
            },
        }
    }

    fn open(self: &Arc<Self>) -> Outcome {
        let Credentials { pid, uid, .. } = self.peer.credentials;
        let owner = Owner { pid, uid, name: program_name(pid) };
        let sink: Arc<dyn EventSink> = self.clone();
        match self.agent.create_context(owner, sink) {
            Ok(key) => {
                self.take_place(Place { key, opened: true });
                self.openers.locked().insert(key.ctx_id(), (key, Arc::downgrade(self)));
                self.hello_reply(key)
            }
            Err(error) => Outcome::refused(&error),
        }
    }

    /// Takes a place in a context of the same process. Contexts of others are not told from such as do not exist.
    fn join(self: &Arc<Self>, ctx_id: u32) -> Result<ContextKey, Errno> {
        let (key, opener) = self.openers.lookup(ctx_id).ok_or(Errno::NOENT)?;
        let same_names = opener.peer.credentials == self.peer.credentials && opener.sender == self.sender;
        // While the process that opened it lives, its id names no other process.
        if !same_names || opener.peer.has_exited() || opener.has_executed() {
            return Err(Errno::NOENT);
        }
        let mut reader = opener.reader();
        // Who has left may be here still, but has no place by the time that its process hears so.
        let joined = match &*reader {
            Reader::Opener => None,
            Reader::Joined(other) => other.upgrade(),
        };
        if joined.is_some_and(|other| other.place().is_some()) {
            return Err(Errno::BUSY);
        }
        *reader = Reader::Joined(Arc::downgrade(self));
        // Before anybody else looks.
        self.take_place(Place { key, opened: false });
        drop(reader);
        Ok(key)
    }

    fn hello_reply(&self, key: ContextKey) -> Outcome {
        let num_devices = u32::try_from(self.agent.devices().len()).unwrap_or(u32::MAX);
        let reply = HelloReply {
            ctx_id: key.ctx_id().into(),
            num_devices: num_devices.into(),
            max_arena_bytes: self.agent.context_arena_bytes().into(),
            flags: if self.trusted { HELLO_TRUSTED } else { 0 }.into(),
            reserved: 0.into(),
        };
        Outcome::ok(reply.as_bytes())
    }

    fn on_devices(&self) -> Outcome {
        let entries: Vec<DeviceEntry> = self.agent.devices().iter().map(device_entry).collect();
        Outcome::ok(entries.as_bytes())
    }

    fn on_arena_create(&self, key: ContextKey, request: ArenaCreate) -> Outcome {
        match self.agent.create_arena(key, request.va.get(), request.len.get()) {
            Ok(made) => {
                let reply = ArenaReply { arena_id: made.id.into(), offset: made.offset.into() };
                Outcome::Reply { status: 0, body: reply.as_bytes().to_vec(), fd: Some(made.fd) }
            }
            Err(error) => Outcome::refused(&error),
        }
    }

    fn on_arena_import(&self, key: ContextKey, request: ArenaImport, fd: OwnedFd) -> Outcome {
        let (offset, len) = (request.offset.get(), request.len.get());
        let file = match MemoryFile::new(fd, offset, len) {
            Ok(file) => file,
            Err(error) => return Outcome::failed(-error.errno().raw_os_error()),
        };
        match self.agent.import_arena(key, request.va.get(), &file) {
            Ok(id) => Outcome::ok(ArenaReply { arena_id: id.into(), offset: offset.into() }.as_bytes()),
            Err(error) => Outcome::refused(&error),
        }
    }

    fn on_arena_pin(&self, key: ContextKey, request: ArenaPin) -> Outcome {
        let (va, len, ring) = (request.va.get(), request.len.get(), request.ring.get());
        if request.reserved.get() != 0 {
            return Outcome::Refuse(Errno::INVAL);
        }
        let memory = match self.memory() {
            Ok(memory) if self.trusted => memory,
            _ => return Outcome::failed(-Errno::ACCESS.raw_os_error()),
        };
        match self.agent.pin_arena(key, va, len, || memory.pinned(&self.peer, ring, va, len)) {
            Ok(id) => Outcome::ok(ArenaReply { arena_id: id.into(), offset: 0.into() }.as_bytes()),
            Err(error) => Outcome::refused(&error),
        }
    }

    fn on_arena_free(&self, key: ContextKey, request: ArenaFree) -> Outcome {
        Outcome::done(self.agent.free_arena(key, request.arena_id.get()))
    }

    fn on_arena_cut(&self, key: ContextKey, request: ArenaCut) -> Outcome {
        let (offset, len) = (request.offset.get(), request.len.get());
        Outcome::done(self.agent.cut_arena(key, request.arena_id.get(), offset, len))
    }

    fn on_submit(&self, key: ContextKey, body: &[u8]) -> Outcome {
        let Ok((submit, payload)) = Submit::read_from_prefix(body) else {
            return Outcome::Refuse(Errno::INVAL);
        };
        let reply_len = submit.reply_len.get();
        let Ok(room) = usize::try_from(reply_len.min(MAX_REPLY_BYTES)) else {
            return Outcome::Refuse(Errno::INVAL);
        };
        if submit.reserved.get() != 0 || reply_len > MAX_REPLY_BYTES || payload.is_empty() {
            return Outcome::Refuse(Errno::INVAL);
        }
        match self.agent.submit(key, payload, room) {
            Ok(response) => {
                let reply = SubmitReply {
                    detail: response.head.detail,
                    limit: response.head.limit,
                    reserved: 0.into(),
                };
                let mut body = reply.as_bytes().to_vec();
                body.extend_from_slice(response.tail());
                Outcome::Reply { status: response.status(), body, fd: None }
            }
            Err(error) => Outcome::failed(error.status()),
        }
    }

    // Sending.

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is queued, as far as the socket has room. `None`: the connection is dead.
    fn flush(&self) -> Option<()> {
        let mut outbox = self.outbox();
        while let Some(next) = outbox.queue.pop_front() {
            if let Some(unsent) = self.send(next, &mut outbox) {
                outbox.queue.push_front(unsent);
                break;
            }
        }
        if outbox.dead { None } else { Some(()) }
    }

    /// Sends without waiting; gives back what there was no room for.
    fn send(&self, outgoing: Outgoing, outbox: &mut Outbox) -> Option<Outgoing> {
        let sent = match &outgoing {
            Outgoing::Reply { bytes, fd } => {
                let fd = fd.as_ref().map(AsFd::as_fd);
                self.socket.send(&[bytes], fd.as_slice(), false)
            }
            Outgoing::Records(records) => {
                self.socket.send(&[events_head().as_bytes(), records.as_flattened()], &[], false)
            }
        };
        match sent {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(outgoing),
            Err(_) => outbox.dead = true,
        }
        if let Outgoing::Records(records) = &outgoing {
            outbox.queued_records = outbox.queued_records.saturating_sub(records.len());
        }
        None
    }
}

impl EventSink for Connection {
    fn push(&self, record: &Record) {
        let joined = match &*self.reader() {
            Reader::Opener => None,
            Reader::Joined(other) => Some(other.clone()),
        };
        match joined {
            None => self.push_here(record),
            Some(other) => {
                if let Some(other) = other.upgrade() {
                    other.push_here(record);
                }
            }
        }
    }

    fn has_left(&self) -> bool {
        // What cannot be asked is found out in its time.
        let hung_up = wait::hung_up(&self.socket, Some(Duration::ZERO)) == Ok(true);
        hung_up || self.peer.has_exited() || self.has_executed()
    }
}

impl Connection {
    fn push_here(&self, record: &Record) {
        let mut outbox = self.outbox();
        if outbox.dead {
            return;
        }
        outbox.queued_records += 1;
        if outbox.queue.is_empty() {
            let unsent = self.send(Outgoing::Records(vec![*record]), &mut outbox);
            outbox.queue.extend(unsent);
        } else if let Some(Outgoing::Records(records)) = outbox.queue.back_mut()
            && records.len() < MAX_RECORDS
        {
            records.push(*record);
        } else {
            outbox.queue.push_back(Outgoing::Records(vec![*record]));
        }
        outbox.dead |= outbox.queued_records > MAX_QUEUED_RECORDS;
        let wake = outbox.dead || !outbox.queue.is_empty();
        drop(outbox);
        if wake {
            // Fails only when the counter is full, and then it is readable.
            rustix::io::write(&self.wake, &1u64.to_ne_bytes()).ok();
        }
    }
}

/// A body that is exactly a `T`.
fn parsed<T: FromBytes + Immutable + KnownLayout>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(body).map_err(|_| Errno::INVAL)
}

/// The body of a refusal.
pub(super) fn refusal(limit: Reached) -> Refusal {
    Refusal { limit: limit.to_wire().into(), reserved: 0.into() }
}

fn empty_head() -> Head {
    Head { kind: 0.into(), seqno: 0.into(), status: 0.into(), reserved: 0.into() }
}

fn events_head() -> Head {
    Head { kind: EVENTS.into(), ..empty_head() }
}

fn device_entry(device: &GetDeviceResp) -> DeviceEntry {
    DeviceEntry {
        dev_id: device.dev_id,
        va_bits: device.va_bits,
        fault_model: device.fault_model,
        address_model: device.address_model,
        opcodes: device.opcodes,
        name: device.name,
        num_engines: device.num_engines,
        page_shift: device.page_shift,
        flags: device.flags,
    }
}

/// For people only; the process chooses it.
fn program_name(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    comm.trim_end().chars().filter(|c| !c.is_control()).take(32).collect()
}
