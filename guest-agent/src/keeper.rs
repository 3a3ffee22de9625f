//! The keeper: the small process that holds the device and every page that the device may write to.
//!
//! Owns the device, the pinned ring memory, and the pinned arenas of processes. Everything else, down to the content of
//! the rings, is the business of the serving process ([`serving`]), which the keeper starts, and starts again when it
//! dies. Between two serving processes the order is always the same (`Keeper::cleanse`):
//!
//! 1. reset the device: it writes to no ring any more;
//! 2. start it on empty rings and say HELLO with a new incarnation: the daemon drops every context of the old one;
//! 3. wait until the daemon says that no engine uses anything of them: `retiring` is 0, or a QUIET record came;
//! 4. only then let the old arenas' pages go.
//!
//! If step 3 never ends, nothing is let go, ever. The ring memory stays pinned for the keeper's whole life.
//!
//! Memory is pinned a slice at a time, and each request that is under way has a slice in turn, so none waits for another
//! one's whole memory; what takes no time, as letting go, goes before, so many at a time. All on one thread: nothing else of
//! this process touches a mapping between a pin and the lookup of its pages ([`crate::pin`]). Who asks has one request of
//! each user under way ([`crate::agent`]).
//!
//! The documented residue: when the keeper itself is killed, the kernel takes its pins down while the device may still
//! run. The serving process then stops the device at once, without waiting.

pub mod serving;
mod wire;

pub use wire::Handover;

use crate::driver::dma::PAGE_BYTES;
use crate::driver::{self, DmaRegion, Event, Hardware, Rings, SvmDevice, new_incarnation};
use crate::pin::{self, Held, Hold, Pinned, Pinner, Pinning, Progress};
use crate::socket::MessageSocket;
use crate::wait;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::event::EVENT_QUIET;
use wire::{Answered, Asked, MAX_REQUEST, Reply, Request};

/// How long one attempt to reach quiet may take before the device is reset and asked again.
const QUIET_DEADLINE: Duration = Duration::from_secs(30);
/// How long one turn of the pump waits.
const PUMP_TIMEOUT: Duration = Duration::from_millis(100);
/// A serving process that lives shorter than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// Requests that go before a slice of those that are under way.
const REQUESTS_BEFORE_SLICE: usize = 32;

/// Why the keeper cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device.
    #[error("device")]
    Hardware(#[source] driver::hardware::Failure),
    /// The rings.
    #[error("rings")]
    Driver(#[from] driver::Error),
    /// Memory for the rings.
    #[error("ring memory")]
    Pin(#[from] pin::Error),
    /// The daemon refuses this driver.
    #[error("the daemon refuses HELLO: {} (another protocol version?)", virtio_gpu_svm::protocol::errno::name(*.0))]
    Refused(i32),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Result of the keeper.
pub type Result<T> = std::result::Result<T, Error>;

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// A serving process.
pub trait Serving {
    /// Ends it, and returns when nothing of it runs any more.
    fn end(&mut self);
}

/// Starts a serving process with its end of the connection to the keeper.
pub type Spawn<'a> = dyn FnMut(OwnedFd) -> io::Result<Box<dyn Serving>> + 'a;

/// What a turn of the connection to the serving process led to.
enum Turn {
    Serving,
    /// The process has ended, is not to be trusted any more, or the keeper is to stop.
    Ended,
}

/// The connection to a serving process.
struct Conversation<'a> {
    socket: MessageSocket,
    stop: BorrowedFd<'a>,
    /// Under way; the first one has the next slice.
    jobs: VecDeque<Job>,
    /// Requests since the last slice.
    since_slice: usize,
}

/// A request that takes a while.
struct Job {
    number: u64,
    /// Memory that is made for a process; `None`: it brought the memory.
    made: Option<OwnedFd>,
    pinning: Box<dyn Pinning>,
}

impl Conversation<'_> {
    /// Answers, when there is room: an answer that nobody reads must not keep the keeper from being stopped.
    fn answer(&self, number: u64, reply: Reply, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let message = serde_json::to_vec(&Answered { number, reply })?;
        loop {
            match self.socket.send(&[&message], fds, false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return sent,
            }
            let mut fds = [
                PollFd::new(&self.socket, PollFlags::OUT),
                PollFd::from_borrowed_fd(self.stop, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
            if is_readable(self.stop) {
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
        }
    }

    fn refuse(&self, number: u64, errno: Errno) -> io::Result<()> {
        self.answer(number, Reply::Refused { errno: errno.raw_os_error() }, &[])
    }
}

/// The keeper.
pub struct Keeper<H> {
    hardware: H,
    pinner: Box<dyn Pinner>,
    ring_fd: OwnedFd,
    dma: Arc<DmaRegion>,
    /// Holds the pages of the rings; never dropped before the device is stopped.
    _ring_pin: Pinned,
    arenas: HashMap<u64, Hold>,
    next_arena: u64,
    /// There has been a serving process, so there may be something to protect.
    served: bool,
    log: fn(&str),
}

impl<H: Hardware> Keeper<H> {
    /// Makes the ring memory. `log` takes one line at a time, for people.
    ///
    /// # Errors
    /// When memory cannot be pinned.
    pub fn new(hardware: H, pinner: Box<dyn Pinner>, log: fn(&str)) -> Result<Self> {
        let ring_pin = pinner.pin(Rings::BYTES)?;
        let ring_fd =
            ring_pin.fd.try_clone().map_err(system("cannot duplicate the ring memory's descriptor"))?;
        let dma =
            DmaRegion::from_fd(ring_fd.as_fd(), 0, ring_pin.pages.clone()).map_err(driver::Error::from)?;
        let (dma, arenas) = (Arc::new(dma), HashMap::new());
        Ok(Self {
            hardware,
            pinner,
            ring_fd,
            dma,
            _ring_pin: ring_pin,
            arenas,
            next_arena: 1,
            served: false,
            log,
        })
    }

    /// Keeps a serving process alive until `stop` becomes readable. Nothing is in use when this returns `Ok`.
    ///
    /// # Errors
    /// When the device cannot be started, the daemon refuses this driver, or no serving process can be started at all.
    /// Once there has been one, such errors are logged and everything is tried again: the pins must not go.
    pub fn run(&mut self, spawn: &mut Spawn<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let ended = self.keep(spawn, stop);
        // Before the rings' memory goes.
        let stopped = self.hardware.stop().map_err(Error::Hardware);
        ended.and(stopped)
    }

    fn keep(&mut self, spawn: &mut Spawn<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            self.cleanse(stop)?;
            if is_readable(stop) {
                return Ok(());
            }
            let started = Instant::now();
            match self.serve_one_life(spawn, stop) {
                Ok(()) => (self.log)("the serving process has ended; cleaning up after it"),
                Err(error) if !self.served => return Err(error),
                Err(error) => (self.log)(&format!("no serving process could be started: {error}")),
            }
            if started.elapsed() < SHORT_LIFE {
                // Cut short by a signal, it is only started sooner.
                wait::readable(&stop, Some(SHORT_LIFE)).ok();
            }
        }
    }

    /// Starts a serving process and does its bidding until it ends or the keeper is to stop.
    fn serve_one_life(&mut self, spawn: &mut Spawn<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let rings = self.hardware.restart(&self.dma).map_err(Error::Hardware)?;
        let (ours, theirs) = MessageSocket::pair().map_err(system("cannot make a socket pair"))?;
        let mut serving = spawn(theirs.into_fd()).map_err(system("cannot start the serving process"))?;
        self.served = true;
        let mut conversation = Conversation { socket: ours, stop, jobs: VecDeque::new(), since_slice: 0 };
        if self.send_handover(&conversation.socket, rings.config()).is_ok() {
            while let Turn::Serving = self.turn(&mut conversation) {}
        }
        serving.end();
        // Where the memory of unfinished jobs is was told to nobody: it goes with the conversation.
        Ok(())
    }

    /// Makes sure that nothing of an earlier life is in use, then lets its memory go. Tries for ever, except while there
    /// is nothing to protect.
    fn cleanse(&mut self, stop: BorrowedFd<'_>) -> Result<()> {
        loop {
            if self.arenas.is_empty() && is_readable(stop) {
                return Ok(());
            }
            let restarted = self.hardware.restart(&self.dma).map_err(Error::Hardware);
            match restarted.and_then(|rings| self.become_quiet(&rings, stop)) {
                Ok(true) => {
                    self.arenas.clear();
                    return Ok(());
                }
                Ok(false) => (self.log)("the daemon still uses memory of an earlier life; asking again"),
                Err(error) if !self.served => return Err(error),
                Err(error) => {
                    (self.log)(&format!("the device cannot be made quiet, trying again: {error}"));
                    std::thread::sleep(SHORT_LIFE);
                }
            }
        }
    }

    /// Says HELLO and waits for quiet. False: not in time, or there is nothing to protect and the keeper is to stop.
    fn become_quiet(&self, rings: &Rings, stop: BorrowedFd<'_>) -> Result<bool> {
        let transport = self.hardware.transport().map_err(system("no way to the device"))?;
        let device = SvmDevice::new(transport, self.dma.clone(), rings)?;
        let incarnation = new_incarnation();
        device.post_hello(0, incarnation)?;
        let deadline = Instant::now() + QUIET_DEADLINE;
        let mut quiet = false;
        let mut answered = false;
        while Instant::now() < deadline {
            if self.arenas.is_empty() && is_readable(stop) {
                return Ok(false);
            }
            let pump = device.pump(PUMP_TIMEOUT)?;
            for completion in pump.completions {
                let hello = completion.response.hello()?;
                if hello.resp.status.get() != 0 {
                    return Err(Error::Refused(hello.resp.status.get()));
                }
                answered = true;
                quiet |= hello.retiring.get() == 0;
            }
            quiet |= pump.events.iter().any(|(_, event)| is_quiet(event, incarnation));
            if answered && quiet {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn send_handover(&self, socket: &MessageSocket, rings: driver::RingConfig) -> io::Result<()> {
        let (hardware, fds) = self.hardware.handover();
        let handover = Handover { rings, ring_pages: self.dma.pages().to_vec(), hardware };
        let mut all = vec![self.ring_fd.as_fd()];
        all.extend(fds);
        socket.send(&[&serde_json::to_vec(&handover)?], &all, true)
    }

    /// Carries out one request that is there, or a slice of one that is under way; waits while there is neither.
    fn turn(&mut self, conversation: &mut Conversation<'_>) -> Turn {
        let mut fds = [
            PollFd::new(&conversation.socket, PollFlags::IN),
            PollFd::from_borrowed_fd(conversation.stop, PollFlags::IN),
        ];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = (!conversation.jobs.is_empty()).then_some(&at_once);
        match rustix::event::poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::INTR) => return Turn::Serving,
            Err(_) => return Turn::Ended,
        }
        let [ready, stopping] = fds.map(|fd| !fd.revents().is_empty());
        if stopping {
            return Turn::Ended;
        }
        let slice_is_due = !conversation.jobs.is_empty() && conversation.since_slice >= REQUESTS_BEFORE_SLICE;
        if ready && !slice_is_due {
            conversation.since_slice += 1;
            self.receive(conversation)
        } else {
            conversation.since_slice = 0;
            self.advance(conversation)
        }
    }

    fn receive(&mut self, conversation: &mut Conversation<'_>) -> Turn {
        let mut buf = [0; MAX_REQUEST];
        let received = match conversation.socket.receive(&mut buf, false) {
            Ok(received) if received.len > 0 && !received.truncated => received,
            _ => return Turn::Ended,
        };
        let asked = serde_json::from_slice(buf.get(..received.len).unwrap_or_default());
        let Ok(Asked { number, request }) = asked else { return Turn::Ended };
        let mut fds = received.fds.into_iter();
        let done = match (request, fds.next(), fds.next()) {
            (Request::Create { len }, None, _) => self.create(conversation, number, len),
            (Request::Import { offset, len }, Some(file), None) => {
                self.import(conversation, number, file.as_fd(), offset, len)
            }
            (Request::Hold { fd }, Some(pidfd), None) => self.hold(conversation, number, pidfd.as_fd(), fd),
            (Request::Release { id }, None, _) => {
                // The device is through with it.
                self.arenas.remove(&id);
                Ok(())
            }
            // Not a serving process of this version: it is replaced.
            _ => return Turn::Ended,
        };
        if done.is_ok() { Turn::Serving } else { Turn::Ended }
    }

    fn create(&self, conversation: &mut Conversation<'_>, number: u64, len: u64) -> io::Result<()> {
        let Some(len) = whole_pages(len) else { return conversation.refuse(number, Errno::INVAL) };
        match self.pinner.make(len) {
            Ok((made, pinning)) => {
                conversation.jobs.push_back(Job { number, made: Some(made), pinning });
                Ok(())
            }
            Err(error) => self.fail(conversation, number, true, &error),
        }
    }

    fn import(
        &self,
        conversation: &mut Conversation<'_>,
        number: u64,
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let Some(len) = whole_pages(len) else { return conversation.refuse(number, Errno::INVAL) };
        match self.pinner.import(file, offset, len) {
            Ok(pinning) => {
                conversation.jobs.push_back(Job { number, made: None, pinning });
                Ok(())
            }
            Err(error) => self.fail(conversation, number, false, &error),
        }
    }

    /// Running out of anything is the fault of one process, and must not end the service of all. Why its own memory cannot
    /// be pinned a process hears, and nobody else: it can fail as often as it likes.
    fn fail(
        &self,
        conversation: &Conversation<'_>,
        number: u64,
        ours: bool,
        error: &pin::Error,
    ) -> io::Result<()> {
        if ours {
            (self.log)(&error.to_string());
        }
        conversation.refuse(number, error.errno())
    }

    /// A slice of the job whose turn it is.
    fn advance(&mut self, conversation: &mut Conversation<'_>) -> Turn {
        let Some(Job { number, made, pinning }) = conversation.jobs.pop_front() else { return Turn::Serving };
        let told = match pinning.advance() {
            Ok(Progress::Going(pinning)) => {
                conversation.jobs.push_back(Job { number, made, pinning });
                Ok(())
            }
            Ok(Progress::Done(held)) => self.pinned(conversation, number, made.as_ref(), held),
            Err(error) => self.fail(conversation, number, made.is_some(), &error),
        };
        if told.is_ok() { Turn::Serving } else { Turn::Ended }
    }

    fn pinned(
        &mut self,
        conversation: &Conversation<'_>,
        number: u64,
        made: Option<&OwnedFd>,
        held: Held,
    ) -> io::Result<()> {
        let Ok(pages) = wire::pages_to_file(&held.pages) else {
            return conversation.refuse(number, Errno::NOMEM);
        };
        let id = self.next_id();
        let fds: Vec<BorrowedFd<'_>> = made.into_iter().chain([&pages]).map(AsFd::as_fd).collect();
        let told = conversation.answer(number, Reply::Kept { id }, &fds);
        // Kept even if it could not be told: then the serving process is gone, and the cleansing lets it go.
        self.arenas.insert(id, held.hold);
        told
    }

    fn hold(
        &mut self,
        conversation: &Conversation<'_>,
        number: u64,
        pidfd: BorrowedFd<'_>,
        fd: i32,
    ) -> io::Result<()> {
        match pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty()) {
            Ok(ring) => {
                let id = self.next_id();
                // Before it is told, as in `pinned`: whoever asked may be gone.
                self.arenas.insert(id, Box::new(ring));
                conversation.answer(number, Reply::Kept { id }, &[])
            }
            Err(errno) => conversation.refuse(number, errno),
        }
    }

    fn next_id(&mut self) -> u64 {
        let id = self.next_arena;
        self.next_arena += 1;
        id
    }
}

impl<H> Drop for Keeper<H> {
    fn drop(&mut self) {
        if !self.arenas.is_empty() {
            (self.log)(
                "memory that the device may still use is being let go: the device could not be made quiet",
            );
        }
    }
}

fn whole_pages(len: u64) -> Option<usize> {
    usize::try_from(len).ok().filter(|len| *len > 0 && len.is_multiple_of(PAGE_BYTES))
}

fn is_quiet(event: &Event, incarnation: u64) -> bool {
    matches!(event, Event::Notice(notice)
        if notice.kind.get() == EVENT_QUIET && notice.value.get() == incarnation)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    wait::readable(&fd, Some(Duration::ZERO)) == Ok(true)
}
