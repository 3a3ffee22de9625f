//! Connections that are not served. Where a limit leaves no room, their first message is answered with its name, and that
//! is all.
//!
//! One thread has them all: to read from them, and to close them, may wait for the process, which may have sent descriptors.
//! It keeps a few; when more come, the one that has said nothing for longest is hung up on.

use super::connection::refusal;
use crate::message::{AgentLimit, HELLO, Head, Reached};
use crate::socket::MessageSocket;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Most that are kept, and most that wait to be.
pub(super) const MOST: usize = 32;
/// How often those that are kept are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A connection, and the limit that leaves no room for it. `None`: it is only closed.
pub(super) type Refused = (MessageSocket, Option<AgentLimit>);

/// Serves what comes until nothing can come any more. Each has so long to ask.
pub(super) fn serve(come: &Receiver<Refused>, timeout: Duration) {
    // Those that have not asked yet, oldest first.
    let mut kept: VecDeque<(MessageSocket, AgentLimit, Instant)> = VecDeque::new();
    loop {
        let next = if kept.is_empty() {
            come.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            come.recv_timeout(LOOK_INTERVAL)
        };
        match next {
            Ok((socket, Some(limit))) => {
                if kept.len() == MOST {
                    kept.pop_front();
                }
                kept.push_back((socket, limit, Instant::now()));
            }
            Ok((_, None)) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        kept.retain(|(socket, limit, came)| came.elapsed() < timeout && !is_through(socket, *limit));
    }
}

fn is_through(socket: &MessageSocket, limit: AgentLimit) -> bool {
    let mut message = [0; size_of::<Head>()];
    // Not by `receive`: descriptors that came with it need not be had first to be closed.
    let received = match rustix::net::recv(socket, &mut message, RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN | Errno::INTR) => return false,
        received => received.map_or(0, |(_, len)| len),
    };
    let head = message.get(..received).and_then(|message| Head::read_from_bytes(message).ok());
    if let Some(head) = head.filter(|head| head.kind.get() == HELLO) {
        let head = Head { status: (-Errno::NOSPC.raw_os_error()).into(), reserved: 0.into(), ..head };
        let body = refusal(Reached::Agent(limit));
        // Best effort: who does not read is not waited for.
        socket.send(&[head.as_bytes(), body.as_bytes()], &[], false).ok();
    }
    true
}
