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
//! The documented residue: when the keeper itself is killed, the kernel takes its pins down while the device may still
//! run. The serving process then stops the device at once, without waiting.

pub mod serving;
mod wire;

pub use wire::Handover;

use crate::agent::new_incarnation;
use crate::driver::dma::PAGE_BYTES;
use crate::driver::{self, DmaRegion, Event, Rings, SvmDevice, Transport};
use crate::pin::{self, Hold, Pinned, Pinner};
use crate::socket::MessageSocket;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::event::EVENT_QUIET;
use wire::{MAX_REQUEST, Reply, Request};

/// How long one attempt to reach quiet may take before the device is reset and asked again.
const QUIET_DEADLINE: Duration = Duration::from_secs(30);
/// How long one turn of the pump waits.
const PUMP_TIMEOUT: Duration = Duration::from_millis(100);
/// A serving process that lives shorter than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// Why the keeper cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device.
    #[error("device")]
    Hardware(#[source] Box<dyn std::error::Error + Send + Sync>),
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

/// The device as the keeper needs it. [`crate::driver::pci::PciDevice`] in a guest.
pub trait Hardware {
    /// Resets the device and starts it on empty rings in `dma`. Between the reset and the start it writes nowhere.
    ///
    /// # Errors
    /// When the device does not reset, or lacks something.
    fn restart(
        &mut self,
        dma: &DmaRegion,
    ) -> std::result::Result<Rings, Box<dyn std::error::Error + Send + Sync>>;

    /// Resets the device: it writes nowhere afterwards.
    ///
    /// # Errors
    /// When the device does not reset.
    fn stop(&mut self) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// The way to the running device.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    fn transport(&self) -> io::Result<Arc<dyn Transport>>;

    /// What another process needs for a transport of its own: a description and descriptors.
    fn handover(&self) -> (serde_json::Value, Vec<BorrowedFd<'_>>);
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
                wait_readable(stop, SHORT_LIFE);
            }
        }
    }

    /// Starts a serving process and does its bidding until it ends or the keeper is to stop.
    fn serve_one_life(&mut self, spawn: &mut Spawn<'_>, stop: BorrowedFd<'_>) -> Result<()> {
        let rings = self.hardware.restart(&self.dma).map_err(Error::Hardware)?;
        let (ours, theirs) = MessageSocket::pair().map_err(system("cannot make a socket pair"))?;
        let mut serving = spawn(theirs.into_fd()).map_err(system("cannot start the serving process"))?;
        self.served = true;
        if self.send_handover(&ours, rings.config()).is_ok() {
            while let Turn::Serving = self.turn(&ours, stop) {}
        }
        serving.end();
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

    /// Waits for one request of the serving process and carries it out.
    fn turn(&mut self, socket: &MessageSocket, stop: BorrowedFd<'_>) -> Turn {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Turn::Serving,
            Err(_) => return Turn::Ended,
        }
        let [ready, stopping] = fds.map(|fd| !fd.revents().is_empty());
        if stopping {
            return Turn::Ended;
        }
        if !ready {
            return Turn::Serving;
        }
        let mut buf = [0; MAX_REQUEST];
        let received = match socket.receive(&mut buf, false) {
            Ok(received) if received.len > 0 && !received.truncated => received,
            _ => return Turn::Ended,
        };
        let request = serde_json::from_slice(buf.get(..received.len).unwrap_or_default());
        let mut fds = received.fds.into_iter();
        let answered = match (request, fds.next(), fds.next()) {
            (Ok(Request::Create { len }), None, _) => self.create(socket, len),
            (Ok(Request::Import { offset, len }), Some(file), None) => {
                self.import(socket, file.as_fd(), offset, len)
            }
            (Ok(Request::Hold { fd }), Some(pidfd), None) => self.hold(socket, pidfd.as_fd(), fd),
            (Ok(Request::Release { id }), None, _) => self.release(socket, id),
            // Not a serving process of this version: it is replaced.
            _ => return Turn::Ended,
        };
        if answered.is_ok() { Turn::Serving } else { Turn::Ended }
    }

    fn create(&mut self, socket: &MessageSocket, len: u64) -> io::Result<()> {
        let made = whole_pages(len)
            .and_then(|len| self.pinner.pin(len).map_err(|error| (self.log)(&error.to_string())).ok());
        // Running out of anything is the fault of one process, and must not end the service of all.
        let listed = made.and_then(|pinned| Some((wire::pages_to_file(&pinned.pages).ok()?, pinned)));
        let Some((pages, pinned)) = listed else {
            return socket.send(&[&serde_json::to_vec(&Reply::Refused)?], &[], true);
        };
        let id = self.next_id();
        let reply = serde_json::to_vec(&Reply::Created { id })?;
        let sent = socket.send(&[&reply], &[pinned.fd.as_fd(), pages.as_fd()], true);
        // Kept even if it could not be told: then the serving process is gone, and the cleansing lets it go.
        self.arenas.insert(id, pinned.into_hold());
        sent
    }

    /// Pins memory that a process brings. The process hears why not, and nobody else: it can fail as often as it likes.
    fn import(
        &mut self,
        socket: &MessageSocket,
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let held = whole_pages(len)
            .ok_or(Errno::INVAL)
            .and_then(|len| self.pinner.import(file, offset, len).map_err(|error| error.errno()));
        let listed = held.and_then(|held| match wire::pages_to_file(&held.pages) {
            Ok(pages) => Ok((pages, held.hold)),
            Err(_) => Err(Errno::NOMEM),
        });
        let (pages, hold) = match listed {
            Ok(listed) => listed,
            Err(errno) => {
                let reply = Reply::NotImported { errno: errno.raw_os_error() };
                return socket.send(&[&serde_json::to_vec(&reply)?], &[], true);
            }
        };
        let id = self.next_id();
        let sent = socket.send(&[&serde_json::to_vec(&Reply::Imported { id })?], &[pages.as_fd()], true);
        // Kept even if it could not be told, as in `create`.
        self.arenas.insert(id, hold);
        sent
    }

    fn hold(&mut self, socket: &MessageSocket, pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<()> {
        let reply = match pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty()) {
            Ok(ring) => {
                let id = self.next_id();
                // Before it is told, as in `create`: whoever asked may be gone.
                self.arenas.insert(id, Box::new(ring));
                Reply::Held { id }
            }
            Err(errno) => Reply::NotImported { errno: errno.raw_os_error() },
        };
        socket.send(&[&serde_json::to_vec(&reply)?], &[], true)
    }

    fn next_id(&mut self) -> u64 {
        let id = self.next_arena;
        self.next_arena += 1;
        id
    }

    /// The serving process says that the device is through with an arena.
    fn release(&mut self, socket: &MessageSocket, id: u64) -> io::Result<()> {
        let reply = if self.arenas.remove(&id).is_some() { Reply::Released } else { Reply::Refused };
        socket.send(&[&serde_json::to_vec(&reply)?], &[], true)
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

/// Waits for `fd`, at most `timeout`.
fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let timeout = timeout.try_into().ok();
    matches!(rustix::event::poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0)
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    wait_readable(fd, Duration::ZERO)
}
