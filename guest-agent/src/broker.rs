//! Serves the processes of the guest over a unix socket: one connection, one context, unless a second connection of the
//! same process joins it.
//!
//! Owns the listeners and one thread per connection (`connection`). A connection's context lives as long as the
//! process that connected: it ends when the process exits (pidfd), when the socket hangs up, and when anything is wrong
//! with a message. Each message must come from that same process, so a forked child or a program that inherited the
//! socket has no right over the context.
//!
//! Connections beyond the limits are told which one it is (`refused`).
//!
//! The operator's socket (`admin`) is another one, for root only.

mod admin;
mod connection;
mod refused;

use crate::agent::Agent;
use crate::message::AgentLimit;
use crate::socket::{MessageListener, MessageSocket};
use crate::wait;
use connection::{Connection, Openers};
use refused::Refused;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use admin::{AdminError, Request as AdminRequest, ask as ask_admin};

/// The user who administers the guest.
const ROOT: u32 = 0;
/// How long to wait when a connection cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where to listen, and for how many.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    /// Socket for processes, mode 0666.
    pub socket: PathBuf,
    /// Socket for the operator, mode 0600; none if not wanted.
    pub admin_socket: Option<PathBuf>,
    /// Connections at once.
    pub max_clients: usize,
    /// Connections of one user at once; of a user other than root also at most as many as are left to others.
    pub max_clients_per_uid: usize,
    /// Of all connections, those that only root can have; a quarter, where that is less.
    pub root_clients: usize,
    /// How long a connection may be silent before it says HELLO.
    pub hello_timeout: Duration,
}

impl BrokerOptions {
    /// Listens at `socket` with default limits and without an operator's socket.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            admin_socket: None,
            max_clients: 512,
            max_clients_per_uid: 256,
            root_clients: 16,
            hello_timeout: Duration::from_secs(10),
        }
    }
}

/// The broker. Stops listening and ends its connections when dropped.
pub struct Broker {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    agent: Arc<Agent>,
    options: BrokerOptions,
    /// Readable once the broker is to end.
    stop: OwnedFd,
    clients: Mutex<Clients>,
    openers: Arc<Openers>,
}

#[derive(Default)]
struct Clients {
    by_uid: HashMap<u32, usize>,
    total: usize,
}

impl Clients {
    /// Takes a place for one more connection of a user, if there is one: root any that is free, others only while they
    /// have fewer than are free, but for those that are root's. So the first one gets half of all, the next one half of the
    /// rest, and so on.
    fn take(&mut self, uid: u32, limits: &BrokerOptions) -> Result<(), AgentLimit> {
        let of = |uid: u32| self.by_uid.get(&uid).copied().unwrap_or(0);
        let of_user = of(uid);
        let mut free = limits.max_clients.saturating_sub(self.total);
        if uid != ROOT {
            let reserved = limits.root_clients.min(limits.max_clients / 4);
            free = free.saturating_sub(reserved.saturating_sub(of(ROOT)));
        }
        if of_user >= limits.max_clients_per_uid {
            return Err(AgentLimit::UserClients);
        }
        if free == 0 || (uid != ROOT && of_user >= free) {
            return Err(AgentLimit::Clients);
        }
        self.total += 1;
        self.by_uid.insert(uid, of_user + 1);
        Ok(())
    }

    fn give_back(&mut self, uid: u32) {
        self.total = self.total.saturating_sub(1);
        match self.by_uid.get_mut(&uid) {
            Some(of_user) if *of_user > 1 => *of_user -= 1,
            _ => drop(self.by_uid.remove(&uid)),
        }
    }
}

impl Broker {
    /// Listens and serves until dropped.
    ///
    /// # Errors
    /// When a socket cannot be made; `AddrInUse` where another broker listens.
    pub fn start(agent: Arc<Agent>, options: BrokerOptions) -> io::Result<Self> {
        let listener = MessageListener::bind(&options.socket, 0o666)?;
        let admin = options.admin_socket.as_deref().map(admin::AdminListener::bind).transpose()?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let (clients, openers) = (Mutex::default(), Arc::default());
        let shared = Arc::new(Shared { agent, options, stop, clients, openers });
        let mut threads = Vec::new();
        let (refuse, refused) = mpsc::sync_channel(refused::MOST);
        let (serving, timeout) = (shared.clone(), shared.options.hello_timeout);
        // In this order: what is refused ends when nothing is accepted any more.
        threads.push(spawn("svm-broker", move || accept_loop(&serving, &listener, &refuse))?);
        threads.push(spawn("svm-refused", move || refused::serve(&refused, timeout))?);
        if let Some(admin) = admin {
            let serving = shared.clone();
            let body = move || admin.serve(&serving.agent, serving.stop.as_fd());
            threads.push(spawn("svm-admin", body)?);
        }
        Ok(Self { shared, threads })
    }
}

impl Broker {
    /// Ends, but waits at most `patience` for connections: closing a descriptor that a process sent may wait for that
    /// process, and a program that is going to end anyway need not.
    pub fn close(mut self, patience: Duration) {
        self.stop();
        let deadline = Instant::now() + patience;
        while !self.threads.iter().all(JoinHandle::is_finished) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.threads.clear();
    }

    fn stop(&self) {
        // An eventfd takes 2^64-2 increments.
        rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes()).ok();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // A panic of that thread has been printed already.
            drop(thread.join());
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(body)
}

fn accept_loop(shared: &Arc<Shared>, listener: &MessageListener, refuse: &SyncSender<Refused>) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while wait_readable(listener.as_fd(), shared.stop.as_fd()) {
        connections.retain(|connection| !connection.is_finished());
        let Ok(socket) = listener.accept() else {
            // Out of descriptors or memory: the connection still waits, so there is no use in asking again at once.
            if wait::readable(&shared.stop, Some(ACCEPT_PAUSE)) == Ok(true) {
                break;
            }
            continue;
        };
        match start_connection(shared, socket) {
            Ok(connection) => connections.push(connection),
            // That thread ends after this one.
            Err(refused) => drop(refuse.send(refused)),
        }
    }
    for connection in connections {
        drop(connection.join());
    }
}

/// Waits for the listener. False: `stop` is readable.
fn wait_readable(listener: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> bool {
    let mut fds = [stop, listener].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return fds[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Starts a connection's thread, or says why it is refused.
fn start_connection(shared: &Arc<Shared>, socket: MessageSocket) -> Result<JoinHandle<()>, Refused> {
    let peer = match socket.pass_credentials().and_then(|()| socket.peer()) {
        // Without an id here its messages could not be told from those of another such process.
        Ok(peer) if peer.credentials.pid != 0 => peer,
        // Its process sees a hang-up.
        _ => return Err((socket, None)),
    };
    let seat = match Seat::take(shared, peer.credentials.uid) {
        Ok(seat) => seat,
        Err(limit) => return Err((socket, Some(limit))),
    };
    // Kept until there is a thread: it is closed where that may wait.
    let (give, taken) = mpsc::sync_channel::<MessageSocket>(1);
    let agent = (shared.agent.clone(), shared.openers.clone());
    let started = spawn("svm-client", move || {
        if let Ok(socket) = taken.recv()
            && let Ok(connection) = Connection::new(agent.0, agent.1, socket, peer)
        {
            Arc::new(connection).serve(seat.shared.stop.as_fd(), seat.shared.options.hello_timeout);
        }
        drop(seat);
    });
    match started {
        // The thread waits for it.
        Ok(thread) => give.send(socket).map(|()| thread).map_err(|unsent| (unsent.0, None)),
        Err(_) => Err((socket, None)),
    }
}

/// A connection's place in the limits.
struct Seat {
    shared: Arc<Shared>,
    uid: u32,
}

impl Seat {
    fn take(shared: &Arc<Shared>, uid: u32) -> Result<Self, AgentLimit> {
        let mut clients = shared.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.take(uid, &shared.options)?;
        Ok(Self { shared: shared.clone(), uid })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.clients.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_clients: usize, max_clients_per_uid: usize, root_clients: usize) -> BrokerOptions {
        BrokerOptions { max_clients, max_clients_per_uid, root_clients, ..BrokerOptions::at("unused") }
    }

    /// Takes as many as a user gets.
    fn take_all(clients: &mut Clients, uid: u32, limits: &BrokerOptions) -> usize {
        (0..).take_while(|_| clients.take(uid, limits).is_ok()).count()
    }

    #[test]
    fn users_leave_others_half_of_what_there_is() {
        let limits = limits(512, 512, 16);
        let mut clients = Clients::default();
        let taken: Vec<usize> = (1..=10).map(|uid| take_all(&mut clients, uid, &limits)).collect();
        assert_eq!(taken, [248, 124, 62, 31, 16, 8, 4, 2, 1, 0]);
        assert_eq!(take_all(&mut clients, 0, &limits), 16, "root's own");
        // Whatever is given back is for those who have less than is free.
        (0..4).for_each(|_| clients.give_back(1));
        assert_eq!([1, 6, 11, 12].map(|uid| take_all(&mut clients, uid, &limits)), [0, 0, 2, 1]);
    }

    #[test]
    fn root_takes_its_own_places_first() {
        let limits = limits(40, 40, 16);
        let mut clients = Clients::default();
        // A quarter of so few.
        assert!((0..10).all(|_| clients.take(0, &limits).is_ok()));
        assert_eq!(take_all(&mut clients, 1, &limits), 15);
        assert_eq!(take_all(&mut clients, 0, &limits), 15, "what is left");
        assert_eq!(take_all(&mut clients, 2, &limits), 0);
    }

    #[test]
    fn places_of_a_user_are_limited_and_given_back() {
        let limits = limits(64, 2, 0);
        let mut clients = Clients::default();
        assert_eq!([0, 1, 1].map(|uid| take_all(&mut clients, uid, &limits)), [2, 2, 0]);
        clients.give_back(1);
        assert_eq!(clients.take(1, &limits), Ok(()));
        assert_eq!(clients.take(1, &limits), Err(AgentLimit::UserClients));
        for uid in [0, 0, 1, 1] {
            clients.give_back(uid);
        }
        assert!(clients.total == 0 && clients.by_uid.is_empty(), "nothing is remembered of who has left");
    }
}
