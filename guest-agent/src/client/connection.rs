//! The connection to the agent: requests and their replies, and the ends of jobs, handed to those who wait for them.
//!
//! No thread of its own: of several threads that wait, one reads the socket and hands out what came. A program with an
//! event loop waits for a descriptor instead ([`Connection::readiness`]), which is readable while there is something to
//! read or an end that nobody has taken, and then reads without waiting ([`Connection::dispatch`]).

use super::readiness::Readiness;
use super::{Error, Result};
use crate::message::{
    self, ARENA_CREATE, ARENA_FREE, ArenaCreate, ArenaFree, ArenaReply, Head, MAX_MESSAGE_BYTES, Reached,
    Refusal, SUBMIT, Submit, SubmitReply,
};
use crate::socket::{MessageSocket, Received, peer_credentials};
use crate::wait;
use rustix::process::{Pid, getpid};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{
    EVENT_BIND_DONE, EVENT_CONTEXT_LOST, EVENT_JOB_DONE, EVENT_RECORD_BYTES, JobRecord, NoticeRecord,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How long an agent may take to notice that a connection has ended.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// What became of a payload.
pub(super) struct SubmitStatus {
    pub(super) status: i32,
    pub(super) detail: u32,
    pub(super) limit: Option<Reached>,
}

/// A message from the agent that was waited for.
pub(super) struct Reply {
    pub(super) status: i32,
    pub(super) body: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// What has arrived and is not taken yet.
struct Inbox {
    /// Where messages are received. `None`: a thread reads on everybody's behalf.
    buffer: Option<Vec<u8>>,
    /// Somebody wanted to read without waiting while another thread did.
    missed: bool,
    /// Replies by the request's number.
    replies: HashMap<u32, Reply>,
    /// Ends by the job's number.
    ends: HashMap<u64, JobRecord>,
    /// Jobs whose end nobody will ask for.
    forgotten: HashSet<u64>,
    /// Tasks to be woken at a job's end.
    wakers: HashMap<u64, Waker>,
    /// Why the context is lost: negative errno.
    lost: Option<i32>,
    hung_up: bool,
}

/// What the parts of a client share.
pub(super) struct Connection {
    socket: MessageSocket,
    /// The process that connected; a forked child has no right to it.
    process: Pid,
    /// It has a place in another connection's context, which one at a time may have.
    joined: bool,
    /// Held while a request is sent and until its reply is there: the agent takes one at a time.
    sending: Mutex<u32>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    /// Once somebody has asked for it.
    readiness: OnceLock<Arc<Readiness>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Of a child it is a copy, and the parent goes on.
        if self.joined && self.check_process().is_ok() {
            self.leave();
        }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// How long a read may take.
#[derive(Clone, Copy)]
enum Patience {
    None,
    Until(Instant),
    Forever,
}

impl Patience {
    /// What is left of it; `None`: nothing.
    fn left(self) -> Option<Option<Duration>> {
        match self {
            Self::None => None,
            Self::Forever => Some(None),
            Self::Until(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                (!left.is_zero()).then_some(Some(left))
            }
        }
    }
}

impl Connection {
    pub(super) fn open(path: &Path, joined: bool) -> Result<Arc<Self>> {
        let not_reachable = |source| Error::NotReachable { path: path.to_owned(), source };
        let socket = MessageSocket::connect(path).map_err(not_reachable)?;
        let uid = peer_credentials(&socket).map_err(Error::Socket)?.uid;
        // Whoever answers gives this process its memory.
        if uid != 0 && uid != rustix::process::geteuid().as_raw() {
            return Err(Error::NotTheAgent { path: path.to_owned(), uid });
        }
        // The agent asks for the sender of each message; this covers the first ones too.
        socket.pass_credentials().map_err(Error::Socket)?;
        Ok(Arc::new(Self::over(socket, joined)))
    }

    fn over(socket: MessageSocket, joined: bool) -> Self {
        let inbox = Inbox {
            buffer: Some(vec![0; MAX_MESSAGE_BYTES]),
            missed: false,
            replies: HashMap::new(),
            ends: HashMap::new(),
            forgotten: HashSet::new(),
            wakers: HashMap::new(),
            lost: None,
            hung_up: false,
        };
        Self {
            socket,
            process: getpid(),
            joined,
            sending: Mutex::new(0),
            inbox: Mutex::new(inbox),
            arrived: Condvar::new(),
            readiness: OnceLock::new(),
        }
    }

    /// Ends the sending half and waits until the agent has closed the other: the next one that joins finds the place free.
    fn leave(&self) {
        let deadline = Instant::now() + LEAVE_PATIENCE;
        if rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write).is_err() {
            return;
        }
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        let patience = Patience::Until(deadline);
        while let Some(Ok(received)) = self.receive(&mut buffer, patience) {
            if received.len == 0 {
                return;
            }
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A child's message would end its parent's context, and a child that reads would take what the parent waits for.
    fn check_process(&self) -> Result<()> {
        if getpid() == self.process { Ok(()) } else { Err(Error::Forked) }
    }

    // Requests.

    /// One request and its reply; a refusal is an error.
    pub(super) fn ask(&self, what: &'static str, kind: u32, body: &[&[u8]]) -> Result<Reply> {
        let reply = self.exchange(what, kind, body)?;
        if reply.status == 0 {
            Ok(reply)
        } else {
            let refusal = Refusal::read_from_bytes(&reply.body).ok();
            let limit = refusal.and_then(|refusal| Reached::from_wire(refusal.limit.get()));
            Err(Error::Refused { what, status: reply.status, detail: 0, limit })
        }
    }

    fn exchange(&self, what: &'static str, kind: u32, body: &[&[u8]]) -> Result<Reply> {
        self.check_process()?;
        let mut last = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        *last = last.wrapping_add(1);
        let seqno = *last;
        let head = Head { kind: kind.into(), seqno: seqno.into(), status: 0.into(), reserved: 0.into() };
        let mut parts = vec![head.as_bytes()];
        parts.extend_from_slice(body);
        match self.socket.send(&parts, &[], true) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(self.ended()),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Err(Error::Refused { what, status: -errno::ENOBUFS, detail: 0, limit: None });
            }
            Err(error) => return Err(Error::Socket(error)),
        }
        let reply = self.wait_for(Patience::Forever, |inbox| inbox.replies.remove(&seqno))?;
        // Nothing but a reply or an error ends a wait for ever.
        reply.ok_or(Error::BadReply { what })
    }

    pub(super) fn submit(&self, payload: &[&[u8]], reply_len: u32) -> Result<(SubmitStatus, Vec<u8>)> {
        let submit = Submit { reply_len: reply_len.into(), reserved: 0.into() };
        let mut body = vec![submit.as_bytes()];
        body.extend_from_slice(payload);
        let reply = self.exchange("SUBMIT", SUBMIT, &body)?;
        match SubmitReply::read_from_prefix(&reply.body) {
            Ok((head, area)) => {
                let (detail, limit) = (head.detail.get().into(), Reached::from_wire(head.limit.get().into()));
                Ok((SubmitStatus { status: reply.status, detail, limit }, area.to_vec()))
            }
            // The agent itself refused, before the device was asked.
            Err(_) if reply.status != 0 => {
                Ok((SubmitStatus { status: reply.status, detail: 0, limit: None }, Vec::new()))
            }
            Err(_) => Err(Error::BadReply { what: "SUBMIT" }),
        }
    }

    pub(super) fn create_arena(&self, len: u64, va: u64) -> Result<(ArenaReply, OwnedFd)> {
        let request = ArenaCreate { len: len.into(), va: va.into() };
        let what = "ARENA_CREATE";
        let reply = self.ask(what, ARENA_CREATE, &[request.as_bytes()])?;
        let made: ArenaReply = parsed(what, &reply.body)?;
        let Some(fd) = reply.fd else {
            // The kernel drops a descriptor for which this process has no number free. If this fails, the next call tells.
            self.free_arena(made.arena_id.get()).ok();
            return Err(Error::NoDescriptor);
        };
        Ok((made, fd))
    }

    pub(super) fn free_arena(&self, arena_id: u64) -> Result<()> {
        let request = ArenaFree { arena_id: arena_id.into() };
        self.ask("ARENA_FREE", ARENA_FREE, &[request.as_bytes()]).map(|_| ())
    }

    // Ends of jobs.

    /// The end of a job, waited for until a deadline or for ever. `None`: not yet.
    pub(super) fn wait_for_end(
        &self,
        job_id: u64,
        known: &OnceLock<JobRecord>,
        deadline: Option<Instant>,
    ) -> Result<Option<JobRecord>> {
        self.check_process()?;
        let patience = deadline.map_or(Patience::Forever, Patience::Until);
        let end = self.wait_for(patience, |inbox| inbox.take_end(job_id, known))?;
        end.transpose()
    }

    /// The end of a job, if it has been told by now.
    pub(super) fn poll_end(&self, job_id: u64, known: &OnceLock<JobRecord>) -> Result<Option<JobRecord>> {
        self.look_for_end(job_id, known, None)
    }

    /// As [`Self::poll_end`]; where there is no end yet, the task is woken at it by whoever reads it.
    pub(super) fn poll_end_with(
        &self,
        job_id: u64,
        known: &OnceLock<JobRecord>,
        task: &Context<'_>,
    ) -> Poll<Result<JobRecord>> {
        match self.look_for_end(job_id, known, Some(task.waker())).transpose() {
            Some(end) => Poll::Ready(end),
            None => Poll::Pending,
        }
    }

    fn look_for_end(
        &self,
        job_id: u64,
        known: &OnceLock<JobRecord>,
        waker: Option<&Waker>,
    ) -> Result<Option<JobRecord>> {
        self.check_process()?;
        if let Some(&end) = known.get() {
            return Ok(Some(end));
        }
        self.dispatch();
        let mut inbox = self.inbox();
        let end = inbox.take_end(job_id, known);
        if let Some(end) = end {
            inbox.wakers.remove(&job_id);
            self.settle(&inbox, false);
            return end.map(Some);
        }
        if inbox.hung_up {
            drop(inbox);
            return Err(self.ended());
        }
        if let Some(waker) = waker {
            inbox.wakers.insert(job_id, waker.clone());
        }
        Ok(None)
    }

    /// Nobody will ask for the end of this job any more.
    pub(super) fn forget(&self, job_id: u64, taken: bool) {
        // In a forked child the inbox may be locked by a thread that is not there.
        if self.check_process().is_err() {
            return;
        }
        let mut inbox = self.inbox();
        inbox.wakers.remove(&job_id);
        if !taken && inbox.ends.remove(&job_id).is_none() && !inbox.hung_up {
            inbox.forgotten.insert(job_id);
        }
        self.settle(&inbox, false);
    }

    /// The error of a connection that has ended.
    fn ended(&self) -> Error {
        self.inbox().lost.map_or(Error::HungUp, |status| Error::Lost { status })
    }

    // Reading.

    /// Waits until `take` finds what it wants; `None`: not in time. One waiting thread reads the socket for all.
    fn wait_for<T>(
        &self,
        patience: Patience,
        mut take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<Option<T>> {
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = take(&mut inbox) {
                self.settle(&inbox, false);
                return Ok(Some(found));
            }
            if inbox.hung_up {
                drop(inbox);
                return Err(self.ended());
            }
            let Some(left) = patience.left() else { return Ok(None) };
            inbox = match (inbox.buffer.take(), left) {
                (Some(buffer), _) => {
                    drop(inbox);
                    self.read(buffer, patience);
                    self.inbox()
                }
                (None, None) => self.arrived.wait(inbox).unwrap_or_else(PoisonError::into_inner),
                (None, Some(left)) => {
                    self.arrived.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Takes in what has arrived, without waiting.
    pub(super) fn dispatch(&self) {
        loop {
            let mut inbox = self.inbox();
            if inbox.hung_up {
                return;
            }
            let Some(buffer) = inbox.buffer.take() else {
                // The other thread may leave something behind, and tells then.
                inbox.missed = true;
                self.settle(&inbox, false);
                return;
            };
            drop(inbox);
            if !self.read(buffer, Patience::None) {
                return;
            }
        }
    }

    /// Receives one message into the buffer that the caller has taken, and puts it back. Whether one came.
    fn read(&self, mut buffer: Vec<u8>, patience: Patience) -> bool {
        let received = self.receive(&mut buffer, patience);
        let mut inbox = self.inbox();
        let came = received.is_some_and(|received| inbox.on_received(received, &buffer));
        inbox.buffer = Some(buffer);
        let missed = std::mem::take(&mut inbox.missed);
        self.settle(&inbox, missed);
        let woken = inbox.take_woken();
        drop(inbox);
        self.arrived.notify_all();
        woken.into_iter().for_each(Waker::wake);
        came
    }

    /// `None`: nothing came in time.
    fn receive(&self, buffer: &mut [u8], patience: Patience) -> Option<io::Result<Received>> {
        let left = match patience {
            Patience::Forever => return Some(self.socket.receive(buffer, true)),
            Patience::None => None,
            Patience::Until(_) => patience.left().flatten(),
        };
        if let Some(left) = left {
            // What is wrong with the socket is told by receiving from it.
            wait::readable(&self.socket, Some(left)).ok();
        }
        match self.socket.receive(buffer, false) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            received => Some(received),
        }
    }

    // For event loops.

    /// The descriptor to wait for.
    pub(super) fn readiness(&self) -> Result<Arc<Readiness>> {
        self.check_process()?;
        let readiness = match self.readiness.get() {
            Some(readiness) => readiness,
            None => {
                let made = Readiness::new(&self.socket).map_err(Error::Socket)?;
                // Another thread may have been faster.
                self.readiness.get_or_init(|| Arc::new(made))
            }
        };
        self.settle(&self.inbox(), false);
        Ok(readiness.clone())
    }

    /// Makes the descriptor say what the inbox holds. `missed`: and that there may be something to read, to those who have
    /// been told so already and found another thread reading.
    fn settle(&self, inbox: &Inbox, missed: bool) {
        if let Some(readiness) = self.readiness.get() {
            readiness.set(inbox.has_untaken(), missed);
        }
    }
}

impl Inbox {
    /// Takes in a message. False: the connection has ended.
    fn on_received(&mut self, received: io::Result<Received>, buf: &[u8]) -> bool {
        let Ok(mut received) = received else {
            self.hung_up = true;
            return false;
        };
        let message = buf.get(..received.len).unwrap_or_default();
        let Ok((head, body)) = Head::read_from_prefix(message) else {
            self.hung_up = true;
            return false;
        };
        if head.kind.get() == message::EVENTS {
            for record in body.chunks_exact(EVENT_RECORD_BYTES) {
                self.on_record(record);
            }
            return true;
        }
        let reply = Reply { status: head.status.get(), body: body.to_vec(), fd: received.fds.pop() };
        self.replies.insert(head.seqno.get(), reply);
        true
    }

    fn on_record(&mut self, record: &[u8]) {
        let Ok(notice) = NoticeRecord::read_from_bytes(record) else { return };
        match notice.kind.get() {
            EVENT_JOB_DONE | EVENT_BIND_DONE => {
                if let Ok(job) = JobRecord::read_from_bytes(record)
                    && !self.forgotten.remove(&job.job_id.get())
                {
                    self.ends.insert(job.job_id.get(), job);
                }
            }
            // Of a GPU VM that became unusable the ends of its work tell, and the others go on.
            EVENT_CONTEXT_LOST if notice.value.get() == 0 => self.lost = Some(notice.status.get()),
            // Kinds of later versions.
            _ => {}
        }
    }

    /// Whether jobs could learn something by asking.
    fn has_untaken(&self) -> bool {
        !self.ends.is_empty() || self.lost.is_some() || self.hung_up
    }

    /// A job's end, which is kept in `known` for all who ask.
    fn take_end(&mut self, job_id: u64, known: &OnceLock<JobRecord>) -> Option<Result<JobRecord>> {
        if let Some(end) = self.ends.remove(&job_id) {
            return Some(Ok(*known.get_or_init(|| end)));
        }
        match (known.get(), self.lost) {
            (Some(&end), _) => Some(Ok(end)),
            (None, Some(status)) => Some(Err(Error::Lost { status })),
            (None, None) => None,
        }
    }

    /// Takes the wakers of those who have something to learn.
    fn take_woken(&mut self) -> Vec<Waker> {
        if self.lost.is_some() || self.hung_up {
            return self.wakers.drain().map(|(_, waker)| waker).collect();
        }
        let Self { wakers, ends, .. } = self;
        wakers.extract_if(|job_id, _| ends.contains_key(job_id)).map(|(_, waker)| waker).collect()
    }
}

/// A reply that is exactly a `T`.
pub(super) fn parsed<T: FromBytes + Immutable + KnownLayout>(what: &'static str, body: &[u8]) -> Result<T> {
    T::read_from_bytes(body).map_err(|_| Error::BadReply { what })
}

#[cfg(test)]
mod tests;
