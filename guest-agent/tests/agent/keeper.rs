//! The keeper: between two serving processes nothing is let go before the device is quiet.

use crate::agent::TestSink;
use crate::lacking::lacking;
use crate::mock::{Mock, MockTransport, eventually, file};
use crate::ring::region;
use guest_agent::agent::{Agent, AgentOptions, ArenaMemory, Owner};
use guest_agent::broker::{Broker, BrokerOptions};
use guest_agent::client::Client;
use guest_agent::driver::dma::PAGE_BYTES;
use guest_agent::driver::hardware::{Failure, Hardware};
use guest_agent::driver::{DmaRegion, RingConfig, Rings, Transport};
use guest_agent::keeper::{Keeper, Serving, serving};
use guest_agent::memory_file::MemoryFile;
use guest_agent::message::{ARENA_IMPORT, ArenaImport, HELLO, Head, Hello, MESSAGE_VERSION};
use guest_agent::pin::{self, Held, Pinner, Pinning, Progress};
use guest_agent::socket::MessageSocket;
use rustix::event::EventfdFlags;
use rustix::net::SocketFlags;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::protocol::event::EVENT_QUIET;
use zerocopy::{FromBytes, IntoBytes};

/// The mock as a machine that can be reset.
struct MockMachine(Arc<Mock>, Arc<OwnedFd>);

impl Hardware for MockMachine {
    fn restart(&mut self, dma: &DmaRegion) -> Result<Rings, Failure> {
        self.stop()?;
        dma.clear()?;
        let rings = Rings::new(RingConfig { event_idx: true, ..RingConfig::default() })?;
        let memory = region(&self.1, dma.pages());
        self.0.set_queues(Some((memory, rings.addresses(dma)?, true)));
        Ok(rings)
    }

    fn stop(&mut self) -> Result<(), Failure> {
        self.0.set_queues(None);
        self.0.look().log.push("reset".into());
        Ok(())
    }

    fn transport(&self) -> io::Result<Arc<dyn Transport>> {
        Ok(Arc::new(MockTransport(self.0.clone())))
    }

    fn handover(&self) -> (serde_json::Value, Vec<BorrowedFd<'_>>) {
        (serde_json::Value::Null, Vec::new())
    }
}

/// Notes in the device's log when pages are let go.
struct LoggingPinner(Arc<Mock>, Arc<OwnedFd>, Mutex<u64>);

struct Hold(Arc<Mock>, u64);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.look().log.push(format!("unpin {}", self.1));
    }
}

/// Pinned at the first look.
struct AtOnce(Held);

impl Pinning for AtOnce {
    fn advance(self: Box<Self>) -> pin::Result<Progress> {
        Ok(Progress::Done(self.0))
    }
}

impl Pinner for LoggingPinner {
    fn make(&self, len: usize) -> pin::Result<(OwnedFd, Box<dyn Pinning>)> {
        let mut count = self.2.lock().unwrap();
        *count += 1;
        let pages =
            (0..(len / PAGE_BYTES) as u64).map(|page| (*count << 32) + page * PAGE_BYTES as u64).collect();
        // The first one is the ring memory, which the mock maps too.
        let fd = if *count == 1 { self.1.try_clone().unwrap() } else { file(len as u64) };
        let hold = Box::new(Hold(self.0.clone(), *count));
        Ok((fd, Box::new(AtOnce(Held { pages, hold }))))
    }

    fn import(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> pin::Result<Box<dyn Pinning>> {
        let mut count = self.2.lock().unwrap();
        *count += 1;
        let size = rustix::fs::fstat(file).unwrap().st_size.cast_unsigned();
        assert!(offset + len as u64 <= size, "the descriptor is the process' file");
        let (pages, hold) = (vec![*count << 32; len / PAGE_BYTES], Box::new(Hold(self.0.clone(), *count)));
        Ok(Box::new(AtOnce(Held { pages, hold })))
    }
}

/// A serving process played by this one: everything of it ends with `end`.
struct Played {
    broker: Option<Broker>,
    agent: Arc<Agent>,
}

impl Serving for Played {
    fn end(&mut self) {
        self.broker = None;
        self.agent.stop();
    }
}

/// What the played serving processes share: a way to make one die, as kill -9 would.
#[derive(Default)]
struct Lives {
    started: usize,
    /// Closing it is what the keeper sees of a death.
    connection: Option<OwnedFd>,
}

fn serve(mock: &Arc<Mock>, socket: OwnedFd, path: &Path) -> Played {
    let socket = MessageSocket::from(socket);
    let (handover, dma, _) = serving::take_over(&socket).unwrap();
    let transport = Arc::new(MockTransport(mock.clone()));
    let device = serving::drive(&handover, dma, transport).unwrap();
    let memory: Arc<dyn ArenaMemory> = Arc::new(serving::KeeperMemory::new(socket).unwrap());
    let agent = Agent::start(Arc::new(device), memory, AgentOptions::default()).unwrap();
    let broker = Broker::start(agent.clone(), BrokerOptions::at(path)).unwrap();
    Played { broker: Some(broker), agent }
}

/// A serving process on a thread of its own, because the keeper hands over after it was started.
struct Threaded {
    mock: Arc<Mock>,
    played: std::sync::mpsc::Receiver<Played>,
}

impl Serving for Threaded {
    fn end(&mut self) {
        if let Ok(mut played) = self.played.recv_timeout(Duration::from_secs(30)) {
            played.end();
        }
        self.mock.look().log.push("served".into());
    }
}

/// A process that brings memory.
fn import(path: &Path, va: u64) -> MessageSocket {
    let socket = MessageSocket::connect(path).unwrap();
    let exchange = |kind: u32, body: &[u8], fds: &[BorrowedFd<'_>]| {
        let head = Head { kind: kind.into(), seqno: 1.into(), status: 0.into(), reserved: 0.into() };
        socket.send(&[head.as_bytes(), body], fds, true).unwrap();
        let mut buf = [0; 256];
        let received = socket.receive(&mut buf, true).unwrap();
        assert_eq!(Head::read_from_prefix(&buf[..received.len]).unwrap().0.status.get(), 0);
    };
    let hello = Hello { version: MESSAGE_VERSION.into(), join: 0.into() };
    exchange(HELLO, hello.as_bytes(), &[]);
    let (brought, len) = (file(4 * PAGE_BYTES as u64), 2 * PAGE_BYTES as u64);
    let body = ArenaImport { len: len.into(), va: va.into(), offset: len.into() };
    exchange(ARENA_IMPORT, body.as_bytes(), &[brought.as_fd()]);
    socket
}

#[test]
fn memory_of_a_dead_serving_process_stays_until_the_device_is_quiet() {
    let (mock, _thread) = Mock::start();
    let ring = Arc::new(file(Rings::BYTES as u64));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let lives = Arc::new(Mutex::new(Lives::default()));
    let keeper = {
        let (mock, ring, path) = (mock.clone(), ring.clone(), path.clone());
        let (stop, lives) = (stop.clone(), lives.clone());
        std::thread::spawn(move || {
            let pinner = LoggingPinner(mock.clone(), ring.clone(), Mutex::new(0));
            let mut keeper = Keeper::new(MockMachine(mock.clone(), ring), Box::new(pinner), |_| {}).unwrap();
            let mut spawn = |socket: OwnedFd| -> io::Result<Box<dyn Serving>> {
                let mut lives = lives.lock().unwrap();
                lives.started += 1;
                lives.connection = Some(socket.try_clone()?);
                let (sender, played) = std::sync::mpsc::channel();
                let (served, path) = (mock.clone(), path.clone());
                std::thread::spawn(move || sender.send(serve(&served, socket, &path)));
                Ok(Box::new(Threaded { mock: mock.clone(), played }))
            };
            keeper.run(&mut spawn, stop.as_fd())
        })
    };
    eventually("the first serving process", || Client::connect(&path).is_ok());
    let client = Client::connect(&path).unwrap();
    let _arena = client.arena_as_if_at(8 * PAGE_BYTES, 0x7000_0000).unwrap();
    let _importing = import(&path, 0x7100_0000);
    let first_life = mock.look().incarnation;

    // It dies; the daemon still uses its memory.
    mock.look().retiring = 1;
    mock.look().log.clear();
    let connection = lives.lock().unwrap().connection.take().unwrap();
    rustix::net::shutdown(&connection, rustix::net::Shutdown::Both).unwrap();
    eventually("HELLO of a new incarnation", || mock.look().log.iter().any(|line| line == "hello"));
    assert_ne!(mock.look().incarnation, first_life);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!mock.look().log.iter().any(|line| line.starts_with("unpin")), "{:?}", mock.look().log);
    assert_eq!(lives.lock().unwrap().started, 1);

    mock.script(|script| {
        script.retiring = 0;
        let incarnation = script.incarnation;
        script.notice(EVENT_QUIET, 0u32, incarnation);
    });
    for unpinned in ["unpin 2", "unpin 3"] {
        eventually(unpinned, || mock.look().log.iter().any(|line| line == unpinned));
    }
    let log = mock.look().log.clone();
    let at = |wanted: &str| log.iter().position(|line| line == wanted).unwrap();
    assert!(
        at("served") < at("reset") && at("reset") < at("hello") && at("hello") < at("unpin 2"),
        "{log:?}"
    );

    eventually("the second serving process", || Client::connect(&path).is_ok());
    assert_eq!(lives.lock().unwrap().started, 2);
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).unwrap();
    keeper.join().unwrap().unwrap();
    let log = mock.look().log.clone();
    // The rings go last, after a last reset.
    assert_eq!(&log[log.len() - 2..], ["reset", "unpin 1"]);
    mock.end();
}

/// Memory whose descriptors got lost on the way must not stay pinned for ever.
#[test]
fn memory_that_did_not_arrive_is_given_back() {
    let (ours, theirs) = MessageSocket::pair().unwrap();
    let memory = serving::KeeperMemory::new(theirs).unwrap();
    let asking = std::thread::spawn(move || memory.create(4096).map(|_| ()));
    let hear = || {
        let mut buf = [0; 256];
        let received = ours.receive(&mut buf, true).unwrap();
        String::from_utf8(buf[..received.len].to_vec()).unwrap()
    };
    assert_eq!(hear(), r#"{"number":1,"request":{"Create":{"len":4096}}}"#);
    ours.send(&[br#"{"number":1,"reply":{"Kept":{"id":7}}}"#], &[], true).unwrap();
    assert_eq!(hear(), r#"{"number":0,"request":{"Release":{"id":7}}}"#);
    assert!(asking.join().unwrap().is_err());
}

#[test]
fn imported_memory_that_did_not_arrive_is_given_back_and_refusals_are_told() {
    let (ours, theirs) = MessageSocket::pair().unwrap();
    let asking = std::thread::spawn(move || {
        let memory = serving::KeeperMemory::new(theirs).unwrap();
        let brought = MemoryFile::new(file(8192), 4096, 4096).unwrap();
        [memory.import(&brought), memory.import(&brought)].map(|made| made.map(|_| ()).unwrap_err())
    });
    let hear = || {
        let mut buf = [0; 256];
        let received = ours.receive(&mut buf, true).unwrap();
        (String::from_utf8(buf[..received.len].to_vec()).unwrap(), received.fds.len())
    };
    let asked = |number: u64| {
        (format!(r#"{{"number":{number},"request":{{"Import":{{"offset":4096,"len":4096}}}}}}"#), 1)
    };
    assert_eq!(hear(), asked(1));
    ours.send(&[br#"{"number":1,"reply":{"Kept":{"id":7}}}"#], &[], true).unwrap();
    assert_eq!(hear(), (r#"{"number":0,"request":{"Release":{"id":7}}}"#.to_owned(), 0));
    assert_eq!(hear(), asked(2));
    ours.send(&[br#"{"number":2,"reply":{"Refused":{"errno":14}}}"#], &[], true).unwrap();
    let [lost, refused] = asking.join().unwrap();
    assert_eq!((lost.kind(), refused.raw_os_error()), (io::ErrorKind::OutOfMemory, Some(14)));
}

/// Each answer is for the request that bears its number.
#[test]
fn answers_come_in_any_order() {
    let (ours, theirs) = MessageSocket::pair().unwrap();
    let memory = Arc::new(serving::KeeperMemory::new(theirs).unwrap());
    let ask = |expected: &str| {
        let memory = memory.clone();
        let asking = std::thread::spawn(move || memory.create(4096).map(|_| ()).unwrap_err());
        let mut buf = [0; 256];
        let received = ours.receive(&mut buf, true).unwrap();
        assert_eq!(String::from_utf8(buf[..received.len].to_vec()).unwrap(), expected);
        asking
    };
    let first = ask(r#"{"number":1,"request":{"Create":{"len":4096}}}"#);
    let second = ask(r#"{"number":2,"request":{"Create":{"len":4096}}}"#);
    ours.send(&[br#"{"number":2,"reply":{"Refused":{"errno":2}}}"#], &[], true).unwrap();
    assert_eq!(second.join().unwrap().raw_os_error(), Some(2));
    assert!(!first.is_finished());
    ours.send(&[br#"{"number":1,"reply":{"Refused":{"errno":1}}}"#], &[], true).unwrap();
    assert_eq!(first.join().unwrap().raw_os_error(), Some(1));
}

const LARGE: usize = 2 * Rings::BYTES;
const SMALL: usize = PAGE_BYTES;
/// Slices of a small piece.
const SMALL_SLICES: usize = 3;

/// Memory of which large pieces are not pinned before they are let.
#[derive(Default)]
struct Slow {
    let_through: AtomicBool,
    large_begun: AtomicUsize,
    small_held: AtomicUsize,
    /// Slices of large pieces since something was done for a small one, and the most of them.
    between: Mutex<(usize, usize)>,
}

impl Slow {
    fn did_large(&self) {
        self.between.lock().unwrap().0 += 1;
        // Else it takes what the others need.
        std::thread::yield_now();
    }

    fn did_small(&self) {
        let mut between = self.between.lock().unwrap();
        *between = (0, between.1.max(between.0));
    }
}

struct SlowPinner(Arc<Slow>, Arc<OwnedFd>);

struct Slices {
    slow: Arc<Slow>,
    len: usize,
    left: usize,
}

struct SmallHold(Arc<Slow>);

impl Drop for SmallHold {
    fn drop(&mut self) {
        self.0.small_held.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Pinning for Slices {
    fn advance(mut self: Box<Self>) -> pin::Result<Progress> {
        let large = self.len == LARGE;
        self.left = self.left.saturating_sub(1);
        let done = if large {
            self.slow.did_large();
            self.slow.let_through.load(Ordering::SeqCst)
        } else {
            self.slow.did_small();
            self.left == 0
        };
        if !done {
            return Ok(Progress::Going(self));
        }
        let pages = (0..self.len / PAGE_BYTES).map(|page| (page * PAGE_BYTES) as u64).collect();
        let hold: pin::Hold = if self.len == SMALL {
            self.slow.small_held.fetch_add(1, Ordering::SeqCst);
            Box::new(SmallHold(self.slow.clone()))
        } else {
            Box::new(())
        };
        Ok(Progress::Done(Held { pages, hold }))
    }
}

impl Pinner for SlowPinner {
    fn make(&self, len: usize) -> pin::Result<(OwnedFd, Box<dyn Pinning>)> {
        let fd = if len == Rings::BYTES { self.1.try_clone().unwrap() } else { file(len as u64) };
        if len == LARGE {
            self.0.large_begun.fetch_add(1, Ordering::SeqCst);
        } else {
            *self.0.between.lock().unwrap() = (0, 0);
        }
        Ok((fd, Box::new(Slices { slow: self.0.clone(), len, left: SMALL_SLICES })))
    }
}

/// Whatever becomes of the test, its threads end.
struct LetThrough<'a>(&'a Slow);

impl Drop for LetThrough<'_> {
    fn drop(&mut self) {
        self.0.let_through.store(true, Ordering::SeqCst);
    }
}

/// However much one user asks for, and however long it takes, another one waits for a slice of it at a time.
#[test]
fn large_memory_of_a_user_is_not_waited_for_by_others() {
    let (mock, _thread) = Mock::start();
    let (ring, slow) = (Arc::new(file(Rings::BYTES as u64)), Arc::new(Slow::default()));
    let pinner = SlowPinner(slow.clone(), ring.clone());
    let (keeper, socket, stop) = keeper(&mock, ring, Box::new(pinner));
    let (handover, dma, _) = serving::take_over(&socket).unwrap();
    let device = serving::drive(&handover, dma, Arc::new(MockTransport(mock.clone()))).unwrap();
    let memory = Arc::new(serving::KeeperMemory::new(socket).unwrap());
    let agent = Agent::start(Arc::new(device), memory, AgentOptions::default()).unwrap();
    let context = |uid| {
        let owner = Owner { pid: 1, uid, name: "test".into() };
        agent.create_context(owner, Arc::new(TestSink::default())).unwrap()
    };
    std::thread::scope(|scope| {
        let let_through = LetThrough(&slow);
        let create = |ctx_id, len: usize| agent.create_arena(ctx_id, 0x1_0000_0000, len as u64).unwrap();
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let ctx_id = context(1);
                scope.spawn(move || create(ctx_id, LARGE))
            })
            .collect();
        eventually("a large one is begun", || slow.large_begun.load(Ordering::SeqCst) > 0);
        let other = context(2);
        for _ in 0..3 {
            let making = scope.spawn(move || create(other, SMALL));
            eventually("another user's", || making.is_finished());
            let id = making.join().unwrap().id;
            assert_eq!(slow.small_held.load(Ordering::SeqCst), 1);
            let most = slow.between.lock().unwrap().1;
            assert!(most <= 1, "{most} slices of one were before one of the other");
            agent.free_arena(other, id).unwrap();
            eventually("released", || slow.small_held.load(Ordering::SeqCst) == 0);
        }
        assert_eq!(slow.large_begun.load(Ordering::SeqCst), 1, "one of a user at a time");
        assert!(waiting.iter().all(|waiting| !waiting.is_finished()));
        drop(let_through);
    });
    assert_eq!(slow.large_begun.load(Ordering::SeqCst), 4);
    agent.stop();
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).unwrap();
    keeper.join().unwrap().unwrap();
    mock.end();
}

/// Memory that is pinned at once, but for large pieces: their first slice waits for a word, and the others note how much was
/// let go before them.
struct Counting {
    begun: mpsc::Sender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
    let_go: AtomicUsize,
    /// Of small pieces, in all, at each slice of a large one.
    at_slices: Mutex<Vec<usize>>,
}

struct CountingPinner(Arc<Counting>, Arc<OwnedFd>);

/// Slices of a large piece.
struct LargeSlices(Arc<Counting>);

struct CountedHold(Arc<Counting>);

impl Drop for CountedHold {
    fn drop(&mut self) {
        self.0.let_go.fetch_add(1, Ordering::SeqCst);
    }
}

impl Pinning for LargeSlices {
    fn advance(self: Box<Self>) -> pin::Result<Progress> {
        let mut slices = self.0.at_slices.lock().unwrap();
        if slices.is_empty() {
            self.0.begun.send(()).unwrap();
            self.0.go_on.lock().unwrap().recv().unwrap();
        }
        slices.push(self.0.let_go.load(Ordering::SeqCst));
        let done = slices.len() == SLICES_OF_LARGE;
        drop(slices);
        Ok(if done {
            Progress::Done(Held { pages: vec![0; LARGE / PAGE_BYTES], hold: Box::new(()) })
        } else {
            Progress::Going(self)
        })
    }
}

impl Pinner for CountingPinner {
    fn make(&self, len: usize) -> pin::Result<(OwnedFd, Box<dyn Pinning>)> {
        let fd = if len == Rings::BYTES { self.1.try_clone().unwrap() } else { file(len as u64) };
        if len == LARGE {
            return Ok((fd, Box::new(LargeSlices(self.0.clone()))));
        }
        let pages = (0..len / PAGE_BYTES).map(|page| (page * PAGE_BYTES) as u64).collect();
        Ok((fd, Box::new(AtOnce(Held { pages, hold: Box::new(CountedHold(self.0.clone())) }))))
    }
}

const SLICES_OF_LARGE: usize = 4;

/// However much is let go at once, who waits to be pinned has a slice now and then.
#[test]
fn burst_of_releases_goes_before_a_slice_in_part() {
    let (mock, _thread) = Mock::start();
    let ring = Arc::new(file(Rings::BYTES as u64));
    let ((begun, has_begun), (go_on, may_go_on)) = (mpsc::channel(), mpsc::channel());
    let counting = Arc::new(Counting {
        begun,
        go_on: Mutex::new(may_go_on),
        let_go: AtomicUsize::new(0),
        at_slices: Mutex::default(),
    });
    let pinner = CountingPinner(counting.clone(), ring.clone());
    let (keeper, socket, stop) = keeper(&mock, ring, Box::new(pinner));
    serving::take_over(&socket).unwrap();
    let memory = Arc::new(serving::KeeperMemory::new(socket).unwrap());
    let small: Vec<u64> = (0..100).map(|_| memory.create(SMALL as u64).unwrap().id).collect();
    let making = {
        let memory = memory.clone();
        std::thread::spawn(move || memory.create(LARGE as u64).map(|made| made.id))
    };
    has_begun.recv().unwrap();
    small.iter().for_each(|id| memory.release(*id));
    go_on.send(()).unwrap();
    making.join().unwrap().unwrap();
    assert_eq!(*counting.at_slices.lock().unwrap(), [0, 32, 64, 96]);
    eventually("all are let go", || counting.let_go.load(Ordering::SeqCst) == small.len());
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).unwrap();
    keeper.join().unwrap().unwrap();
    mock.end();
}

/// A keeper whose serving process this one is, at the socket.
type Kept = (JoinHandle<guest_agent::keeper::Result<()>>, MessageSocket, Arc<OwnedFd>);

fn keeper(mock: &Arc<Mock>, ring: Arc<OwnedFd>, pinner: Box<dyn Pinner>) -> Kept {
    let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let (connected, connection) = std::sync::mpsc::channel();
    let (mock, stopping) = (mock.clone(), stop.clone());
    let keeper = std::thread::spawn(move || {
        let mut keeper = Keeper::new(MockMachine(mock.clone(), ring), pinner, |_| {}).unwrap();
        let mut spawn = |socket: OwnedFd| -> io::Result<Box<dyn Serving>> {
            connected.send(socket).map_err(io::Error::other)?;
            let (_, played) = std::sync::mpsc::channel();
            Ok(Box::new(Threaded { mock: mock.clone(), played }))
        };
        keeper.run(&mut spawn, stopping.as_fd())
    });
    (keeper, MessageSocket::from(connection.recv().unwrap()), stop)
}

/// Two sockets: what is read from one tells whether anybody has the other.
fn pipe() -> (OwnedFd, OwnedFd) {
    let (kind, flags) = (rustix::net::SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC);
    rustix::net::socketpair(rustix::net::AddressFamily::UNIX, kind, flags, None).unwrap()
}

fn io_uring(what: &str) -> Option<OwnedFd> {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    match io_uring::IoUring::new(1) {
        Ok(ring) => Some(pidfd_getfd(own, ring.as_raw_fd(), PidfdGetfdFlags::empty()).unwrap()),
        Err(error) => {
            lacking(&format!("{what} ({error})"));
            None
        }
    }
}

/// A descriptor that pins memory of a process stays open in the keeper until it is released.
#[test]
fn descriptor_is_held_until_it_is_released() {
    let (mock, _thread) = Mock::start();
    let ring = Arc::new(file(Rings::BYTES as u64));
    let pinner = LoggingPinner(mock.clone(), ring.clone(), Mutex::new(0));
    let (keeper, socket, stop) = keeper(&mock, ring, Box::new(pinner));
    serving::take_over(&socket).unwrap();
    let memory = serving::KeeperMemory::new(socket).unwrap();
    let (reader, writer) = pipe();
    let id = memory.hold(writer).unwrap();
    let mut byte = [0];
    assert_eq!(rustix::io::read(&reader, &mut byte), Err(rustix::io::Errno::AGAIN), "open");
    memory.release(id);
    eventually("closed", || rustix::io::read(&reader, &mut byte) == Ok(0));
    let (reader, writer) = pipe();
    memory.hold(writer).unwrap();
    if let Some(ring) = io_uring("the keeper holds an io_uring, which no socket carries") {
        memory.hold(ring).unwrap();
    }
    // The serving process ends: let go once the device is quiet.
    drop(memory);
    eventually("closed", || rustix::io::read(&reader, &mut byte) == Ok(0));
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).unwrap();
    keeper.join().unwrap().unwrap();
    mock.end();
}

/// After a reply that is not understood the next one may be somebody else's.
#[test]
fn broken_conversation_with_the_keeper_ends() {
    let (ours, theirs) = MessageSocket::pair().unwrap();
    ours.send(&[b"?"], &[], true).unwrap();
    ours.send(&[br#"{"number":1,"reply":{"Kept":{"id":7}}}"#], &[], true).unwrap();
    let memory = serving::KeeperMemory::new(theirs).unwrap();
    assert!(memory.create(4096).is_err());
    let again = memory.create(4096).map(|_| ()).unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::BrokenPipe);
}

/// A keeper that has made nothing yet can be stopped while the daemon is still busy with an earlier life.
#[test]
fn keeper_with_nothing_to_protect_stops_before_quiet() {
    let (mock, _thread) = Mock::start();
    let ring = Arc::new(file(Rings::BYTES as u64));
    mock.look().retiring = 1;
    let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let keeper = {
        let (mock, ring, stop) = (mock.clone(), ring.clone(), stop.clone());
        std::thread::spawn(move || {
            let pinner = LoggingPinner(mock.clone(), ring.clone(), Mutex::new(0));
            let mut keeper = Keeper::new(MockMachine(mock, ring), Box::new(pinner), |_| {}).unwrap();
            keeper.run(&mut |_| Err(io::Error::other("not yet")), stop.as_fd())
        })
    };
    eventually("HELLO", || mock.look().log.iter().any(|line| line == "hello"));
    rustix::io::write(&*stop, &1u64.to_ne_bytes()).unwrap();
    eventually("ended", || keeper.is_finished());
    keeper.join().unwrap().unwrap();
    assert_eq!(mock.look().log.last().unwrap(), "unpin 1");
    mock.end();
}
