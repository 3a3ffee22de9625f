//! Serves the processes of the guest over a unix socket: one connection, one context, unless a second connection of the
//! same process joins it.
//!
//! Owns the listeners and one thread per connection (`connection`). A connection's context lives as long as the
//! process that connected: it ends when the process exits (pidfd), when the socket hangs up, and when anything is wrong
//! with a message. Each message must come from that same process, so a forked child or a program that inherited the
//! socket has no right over the context.
//!
//! The operator's socket (`admin`) is another one, for root only.

mod admin;
mod connection;

use crate::agent::Agent;
use crate::socket::{MessageListener, MessageSocket};
use connection::{Connection, Openers};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use admin::{AdminError, Request as AdminRequest, ask as ask_admin};

/// How long to wait when a connection cannot be accepted.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where to listen, and for how many.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    /// Socket for processes, mode 0666.
    pub socket: PathBuf,
    /// Socket for the operator, mode 0600; none if not wanted.
    pub admin_socket: Option<PathBuf>,
    /// Connections at once.
    pub max_clients: usize,
    /// Connections of one user at once.
    pub max_clients_per_uid: usize,
}

impl BrokerOptions {
    /// Listens at `socket` with default limits and without an operator's socket.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), admin_socket: None, max_clients: 512, max_clients_per_uid: 256 }
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
    /// Takes a place for one more connection of a user, if there is one.
    fn take(&mut self, uid: u32, limits: &BrokerOptions) -> bool {
        let of_user = self.by_uid.get(&uid).copied().unwrap_or(0);
        let has_room = self.total < limits.max_clients && of_user < limits.max_clients_per_uid;
        if has_room {
            self.total += 1;
            self.by_uid.insert(uid, of_user + 1);
        }
        has_room
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
        let serving = shared.clone();
        threads.push(spawn("svm-broker", move || accept_loop(&serving, &listener))?);
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

fn accept_loop(shared: &Arc<Shared>, listener: &MessageListener) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while let Some(true) = wait_readable(listener.as_fd(), shared.stop.as_fd()) {
        connections.retain(|connection| !connection.is_finished());
        let Ok(socket) = listener.accept() else {
            // Out of descriptors or memory: the connection still waits, so there is no use in asking again at once.
            if wait_stop(shared.stop.as_fd(), ACCEPT_PAUSE) {
                break;
            }
            continue;
        };
        // A connection that cannot be identified is dropped; its process sees a hang-up.
        connections.extend(start_connection(shared, socket).ok());
    }
    for connection in connections {
        drop(connection.join());
    }
}

/// Waits for `fd`; `Some(true)` when it is readable, `None` when `stop` is.
fn wait_readable(fd: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> Option<bool> {
    loop {
        let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&stop, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return None,
        }
        let [ready, stopping] = &fds;
        if !stopping.revents().is_empty() {
            return None;
        }
        if !ready.revents().is_empty() {
            return Some(true);
        }
    }
}

/// Waits for `stop`, at most `timeout`. True: the broker is to end.
fn wait_stop(stop: BorrowedFd<'_>, timeout: Timespec) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(ready) if ready > 0)
}

fn start_connection(shared: &Arc<Shared>, socket: MessageSocket) -> io::Result<JoinHandle<()>> {
    socket.pass_credentials()?;
    let peer = socket.peer()?;
    if peer.credentials.pid == 0 {
        // Of a process that has no id here, so its messages could not be told from those of another such one.
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    let uid = peer.credentials.uid;
    let Some(seat) = Seat::take(shared, uid) else {
        return Err(io::Error::from(io::ErrorKind::QuotaExceeded));
    };
    let connection = Arc::new(Connection::new(shared.agent.clone(), shared.openers.clone(), socket, peer)?);
    spawn("svm-client", move || {
        connection.serve(seat.shared.stop.as_fd());
        drop(seat);
    })
}

/// A connection's place in the limits.
struct Seat {
    shared: Arc<Shared>,
    uid: u32,
}

impl Seat {
    fn take(shared: &Arc<Shared>, uid: u32) -> Option<Self> {
        let mut clients = shared.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if !clients.take(uid, &shared.options) {
            return None;
        }
        Some(Self { shared: shared.clone(), uid })
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

    #[test]
    fn user_that_has_all_its_connections_leaves_some_to_others() {
        let limits = BrokerOptions { max_clients: 5, max_clients_per_uid: 2, ..BrokerOptions::at("unused") };
        let mut clients = Clients::default();
        assert!(clients.take(1, &limits) && clients.take(1, &limits));
        assert!(!clients.take(1, &limits));
        assert!(clients.take(2, &limits) && clients.take(2, &limits) && clients.take(3, &limits));
        assert!(!clients.take(4, &limits), "all are taken");
        clients.give_back(1);
        assert!(!clients.take(2, &limits) && clients.take(4, &limits));
        for uid in [1, 2, 2, 3, 4] {
            clients.give_back(uid);
        }
        assert!(clients.total == 0 && clients.by_uid.is_empty(), "nothing is remembered of who has left");
    }
}
