//! The thread that attends to one guest: waits for its VMM, serves it, waits for the next.
//!
//! One session at a time: a second VMM that connects meanwhile waits in the socket's backlog and is served when the
//! first has left. So a VMM that reconnects before its old connection is seen to be closed is not turned away.

use crate::eventq::Waker;
use crate::fuse::Failure;
use crate::limits::Overrides;
use crate::log_budget::LogBudget;
use crate::rate::Rate;
use crate::registry::{AddError, RegistryEvent, Subscribers, lock};
use crate::relay::Relay;
use crate::session::{self, Session, Setup};
use crate::socket::ListeningSocket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost::vhost_user::Listener;
use virtio_gpu_svm::host::Limits;

/// Pause after a session that could not be set up: the VMM's next try must not keep a core busy.
const PAUSE: Duration = Duration::from_millis(100);
/// In place of one that no clock can count.
const LONG_PAUSE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A guest's place in the registry.
pub(crate) struct Seat {
    pub name: String,
    pub socket: String,
    pub devices: Vec<usize>,
    /// Its own limits, as the operator gave them.
    pub overrides: Overrides,
    /// What it may use.
    pub limits: Limits,
    /// How long its queue thread looks for the next command.
    pub busy_poll_us: u32,
    /// Lines of the log that it may cause.
    pub log: Arc<LogBudget>,
    /// How often its VMM may come. To begin and to end a session costs more than anything else that a VMM can ask for, and
    /// others feel it: all threads share one address space, which changes. Guards a few numbers.
    pub pace: Mutex<Rate>,
    /// Set once and for ever: the attendant is to leave.
    pub stop: Waker,
    /// Guards what is told of sessions; a section is a few assignments.
    pub live: Mutex<Live>,
    /// Guards the handle until it is joined; a section is one move.
    pub thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is told of a guest's sessions.
#[derive(Default)]
pub(crate) struct Live {
    pub session: Option<Arc<Session>>,
    pub sessions: u64,
    pub last_error: Option<String>,
    /// The attendant was told to leave; a session that begins now must end at once.
    pub stopping: bool,
}

impl Seat {
    pub fn session(&self) -> Option<Arc<Session>> {
        lock(&self.live).session.clone()
    }

    /// Tells the attendant to leave.
    pub fn stop(&self) {
        self.stop.wake();
        let session = {
            let mut live = lock(&self.live);
            live.stopping = true;
            live.session.clone()
        };
        if let Some(session) = session {
            session.end();
        }
    }

    /// Tells it, and waits until it has left and its socket is gone.
    pub fn stop_and_join(&self) {
        self.stop();
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(guest = %self.name, "the guest's thread had panicked");
        }
    }
}

/// Where VMMs come in.
pub(crate) enum Door {
    /// By a listening socket, one after the other; the framework accepts by a descriptor of its own.
    Listening(ListeningSocket, Listener),
    /// One that was connected before we began.
    Connected(Relay),
}

impl Door {
    /// One that VMMs knock at.
    ///
    /// # Errors
    /// [`AddError::Io`].
    pub fn listening(socket: ListeningSocket, label: &str) -> Result<Self, AddError> {
        let failed = |source| AddError::Io { action: "duplicate", path: PathBuf::from(label), source };
        let accepting = Listener::from(socket.listener().try_clone().map_err(failed)?);
        Ok(Self::Listening(socket, accepting))
    }
}

/// See the module.
pub(crate) struct Attendant {
    pub seat: Arc<Seat>,
    pub setup: Setup,
    pub subscribers: Arc<Subscribers>,
}

impl Attendant {
    /// Serves until told to stop. Owns the door, and with it the socket's file.
    pub fn run(self, door: Door) {
        match door {
            Door::Listening(socket, mut listener) => {
                while self.wait_for_vmm(&socket) {
                    self.serve(&mut listener);
                }
            }
            Door::Connected(relay) => relay.run(|listener| self.serve(listener)),
        }
    }

    /// `false`: leave.
    fn wait_for_vmm(&self, socket: &ListeningSocket) -> bool {
        loop {
            let mut fds =
                [PollFd::new(&self.seat.stop, PollFlags::IN), PollFd::new(socket.listener(), PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let [stop, vmm] = fds;
            if !stop.revents().is_empty() {
                return false;
            }
            if vmm.revents().is_empty() {
                continue;
            }
            // Not in the match: it would keep the lock while it waits, from whoever asks after the guest.
            let taken = lock(&self.seat.pace).take(1, Instant::now());
            match taken {
                Ok(()) => return true,
                Err(wait) => self.pause(wait),
            }
        }
    }

    /// One session.
    fn serve(&self, listener: &mut Listener) {
        let name = &self.seat.name;
        let outcome = session::serve(&self.setup, listener, |session| {
            let stopping = {
                let mut live = lock(&self.seat.live);
                live.session = Some(Arc::clone(session));
                live.sessions = live.sessions.saturating_add(1);
                live.stopping
            };
            if stopping {
                session.end();
            }
            self.seat.log.log(|| tracing::info!(guest = %name, "VMM connected"));
            self.subscribers.tell(&RegistryEvent::GuestConnected { name: name.clone() });
        });
        let began = lock(&self.seat.live).session.take().is_some();
        let reason = match outcome {
            Ok(()) => "the VMM left".to_owned(),
            Err(failure) => {
                let reason = with_causes(&*failure);
                if !matches!(*failure, Failure::Removed) {
                    self.seat.log.log(|| tracing::warn!(guest = %name, %reason, "session ended"));
                    lock(&self.seat.live).last_error = Some(reason.clone());
                }
                reason
            }
        };
        if began {
            self.seat.log.log(|| tracing::info!(guest = %name, %reason, "VMM disconnected"));
            self.subscribers.tell(&RegistryEvent::GuestDisconnected { name: name.clone(), reason });
        } else {
            self.pause(PAUSE);
        }
    }

    /// Ends early when the attendant is to leave; either way the loop looks again.
    fn pause(&self, length: Duration) {
        let length = Timespec::try_from(length).unwrap_or(LONG_PAUSE);
        poll(&mut [PollFd::new(&self.seat.stop, PollFlags::IN)], Some(&length)).ok();
    }
}

/// An error with what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
