//! Races of an event loop with a thread that waits, one step after the other.

use super::*;
use crate::message::EVENTS;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::{AsFd, BorrowedFd};
use zerocopy::FromZeros;

/// A connection, the agent's end of it, and an event loop that is told of changes only.
struct Bench {
    connection: Arc<Connection>,
    agent: MessageSocket,
    events: super::super::Events,
    edges: OwnedFd,
}

impl Bench {
    fn new() -> Self {
        let (ours, agent) = MessageSocket::pair().unwrap();
        let connection = Arc::new(Connection::over(ours, false));
        let events = super::super::Events::new(&connection).unwrap();
        let edges = epoll::create(CreateFlags::CLOEXEC).unwrap();
        epoll::add(&edges, &events, EventData::new_u64(0), EventFlags::IN | EventFlags::ET).unwrap();
        Self { connection, agent, events, edges }
    }

    /// The agent tells the end of a job.
    fn end(&self, job_id: u64) {
        let head = Head { kind: EVENTS.into(), ..Head::new_zeroed() };
        let record =
            JobRecord { kind: EVENT_JOB_DONE.into(), job_id: job_id.into(), ..JobRecord::new_zeroed() };
        self.agent.send(&[head.as_bytes(), record.as_bytes()], &[], false).unwrap();
    }

    fn has_ended(&self, job_id: u64) -> bool {
        self.connection.poll_end(job_id, &OnceLock::new()).unwrap().is_some()
    }

    /// Another thread begins to wait; it reads by [`Connection::read`].
    fn take_buffer(&self) -> Vec<u8> {
        self.connection.inbox().buffer.take().unwrap()
    }

    fn edge(&self) -> bool {
        waited(self.edges.as_fd())
    }

    fn readable(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut [PollFd::new(&self.events, PollFlags::IN)], Some(&now)).unwrap() == 1
    }
}

fn waited(edges: BorrowedFd<'_>) -> bool {
    let mut buffer = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 1];
    epoll::wait(edges, &mut buffer[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn what_a_reader_leaves_behind_is_told_once_more() {
    let bench = Bench::new();
    let buffer = bench.take_buffer();
    let reply = Head { kind: SUBMIT.into(), seqno: 1.into(), ..Head::new_zeroed() };
    bench.agent.send(&[reply.as_bytes()], &[], false).unwrap();
    bench.end(1);
    assert!(bench.edge());
    bench.events.dispatch();
    assert!(!bench.edge(), "the other thread reads");
    // It takes its own reply and goes; the end is still in the socket.
    assert!(bench.connection.read(buffer, Patience::Forever));
    assert!(bench.edge(), "nobody reads the end");
    assert!(bench.has_ended(1));
    assert!(!bench.readable());
}

#[test]
fn end_that_a_reader_has_taken_in_is_told() {
    let bench = Bench::new();
    let buffer = bench.take_buffer();
    bench.end(1);
    assert!(bench.connection.read(buffer, Patience::Forever));
    // The socket is empty again, and the end is in the inbox.
    assert!(bench.edge() && bench.readable());
    assert!(bench.has_ended(1));
    assert!(!bench.edge() && !bench.readable());
}

#[test]
fn loop_does_not_spin_while_another_thread_reads() {
    let bench = Bench::new();
    let buffer = bench.take_buffer();
    for _ in 0..2 {
        bench.events.dispatch();
        assert!(!bench.readable());
    }
    // Its time is over, and nothing came.
    assert!(!bench.connection.read(buffer, Patience::None));
    assert!(bench.readable(), "what came since would be missed");
    bench.events.dispatch();
    assert!(!bench.readable());
}

#[test]
fn end_that_nobody_wants_any_more_is_not_told() {
    let bench = Bench::new();
    bench.connection.forget(1, false);
    bench.end(1);
    bench.end(2);
    bench.events.dispatch();
    assert!(bench.readable());
    bench.connection.forget(2, false);
    assert!(!bench.readable());
    assert!(!bench.has_ended(1) && !bench.has_ended(2));
}

#[test]
fn hung_up_agent_leaves_the_descriptor_readable() {
    let Bench { connection, agent, events, .. } = Bench::new();
    drop(agent);
    events.dispatch();
    let end = connection.poll_end(1, &OnceLock::new());
    assert!(matches!(end, Err(Error::HungUp)));
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&now)), Ok(1));
}

/// The kernel drops a descriptor for which there is no number; the agent hears of it.
#[test]
fn arena_that_comes_without_its_descriptor_is_given_back() {
    let Bench { connection, agent, .. } = Bench::new();
    let asking = std::thread::spawn(move || connection.create_arena(4096, 0x10_000).map(|_| ()));
    let mut buffer = [0; 256];
    let mut next = || {
        let received = agent.receive(&mut buffer, true).unwrap();
        let (head, body) = Head::read_from_prefix(&buffer[..received.len]).unwrap();
        (head, body.to_vec())
    };
    let (create, _) = next();
    let made = ArenaReply { arena_id: 7.into(), offset: 0.into() };
    agent.send(&[create.as_bytes(), made.as_bytes()], &[], false).unwrap();
    let (free, body) = next();
    assert_eq!((free.kind.get(), ArenaFree::read_from_bytes(&body).unwrap().arena_id.get()), (ARENA_FREE, 7));
    agent.send(&[free.as_bytes()], &[], false).unwrap();
    assert!(matches!(asking.join().unwrap(), Err(Error::NoDescriptor)));
}
