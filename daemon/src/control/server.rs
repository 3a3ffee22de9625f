//! Connections: bytes to lines, lines to answers, events in between.
//!
//! One task a connection, which alone writes to it, so a line is never torn. It reads the next request only after the
//! answer to the last one has left, so a connection holds at most one request, one response and the hub's bounded
//! ring of events, and a client that does not read only stops itself, until it is cut off.

use super::ControlState;
use super::admission::{Admission, Options, Place};
use super::events::Subscription;
use super::methods::{self, Rights, Then};
use super::rpc::{self, Error, Id, Kind, Message, Request};
use crate::log_budget::LogBudget;
use serde_json::Value;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Bytes of a line at most, without its end.
pub const MAX_LINE: usize = 64 << 10;
/// Methods of one socket that run at once and may wait, and as many that do not wait.
const RUNNING: usize = 4;
/// Threads on which the methods of the control socket and of a read-only one run, at most.
pub const METHOD_THREADS: usize = 4 * RUNNING;
/// A result of more bytes is large.
const LARGE: usize = 1 << 20;
/// Large results of one socket that are being written at most.
const MAX_LARGE: usize = 8;
/// Bytes that a client must take from us within [`Options::stall`].
const CHUNK: usize = 64 << 10;
/// Bytes asked of a socket at once.
const READ_SIZE: usize = 8 << 10;
/// How long to wait when the kernel has no file descriptor or memory for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What the connections of one socket share.
struct Desk {
    state: Arc<ControlState>,
    rights: Rights,
    stall: Duration,
    /// Lines that clients may cause.
    log: Arc<LogBudget>,
    /// Turns of methods that do not wait.
    looking: Semaphore,
    /// Turns of methods that may, so that they hold nobody else up.
    waiting: Semaphore,
    /// Large results that may still be on their way: to clients that take them as slowly as they can.
    large: Arc<Semaphore>,
}

/// Serves clients of `listener` until it is dropped; its connections end with it. Needs a tokio runtime with I/O and
/// time, and [`METHOD_THREADS`] threads that may block.
pub async fn serve(listener: UnixListener, state: Arc<ControlState>, options: Options) {
    let whose = match options.rights {
        Rights::Full => "clients of the control socket",
        Rights::ReadOnly => "clients of the read-only control socket",
    };
    let log = Arc::new(LogBudget::new(whose.to_owned(), state.registry.log_lines()));
    let mut admission = Admission::new(options.clone(), Arc::clone(&log));
    let desk = Arc::new(Desk {
        state,
        rights: options.rights,
        stall: options.stall,
        log: Arc::clone(&log),
        looking: Semaphore::new(RUNNING),
        waiting: Semaphore::new(RUNNING),
        large: Arc::new(Semaphore::new(MAX_LARGE)),
    });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let uid = stream.peer_cred().ok().map(|peer| peer.uid());
                    match admission.admit(uid) {
                        Ok(place) => {
                            connections.spawn(Connection::new(stream, Arc::clone(&desk), place).run());
                        }
                        Err(error) => tell(&stream, error),
                    }
                }
                Err(error) => {
                    log.log(|| tracing::warn!(%error, "cannot accept a control connection"));
                    sleep(ACCEPT_RETRY).await;
                }
            },
            Some(ended) = connections.join_next() => match ended {
                Ok(Ok(())) => {}
                // A line that is not written takes nothing from those that are.
                Ok(Err(error)) if tracing::enabled!(tracing::Level::DEBUG) => {
                    log.log(|| tracing::debug!(%error, "control connection ended"));
                }
                Ok(Err(_)) => {}
                Err(error) => log.log(|| tracing::error!(%error, "control connection failed")),
            },
        }
        // Clients that are there first, however many come.
        tokio::task::yield_now().await;
    }
}

/// Says why there is no connection. An empty socket takes a short line at once; a client that is gone already misses
/// nothing.
fn tell(stream: &UnixStream, error: Error) {
    let mut text = rpc::response(&Id::Null, Err(error));
    text.push('\n');
    stream.try_write(text.as_bytes()).ok();
}

/// What is to be written of one request.
#[derive(Default)]
struct Reply {
    /// None to a notification.
    text: Option<String>,
    /// The daemon is to end.
    shutdown: bool,
    /// Held while a large text is on its way.
    _large: Option<OwnedSemaphorePermit>,
}

struct Connection {
    lines: Lines,
    output: Output,
    desk: Arc<Desk>,
    place: Arc<Place>,
    subscription: Option<Subscription>,
}

impl Connection {
    fn new(stream: UnixStream, desk: Arc<Desk>, place: Arc<Place>) -> Self {
        let (reader, writer) = stream.into_split();
        let output = Output { writer, stall: desk.stall };
        Self { lines: Lines::new(reader), output, desk, place, subscription: None }
    }

    async fn run(mut self) -> io::Result<()> {
        loop {
            // Parts of a line are no request: who sends bytes one by one is idle.
            self.place.set_idle(self.subscription.is_none());
            tokio::select! {
                line = self.lines.next() => {
                    self.place.set_idle(false);
                    match line? {
                        Some(Line::Whole(line)) => self.on_line(&line).await?,
                        Some(Line::TooLong) => self.output.line(too_long()).await?,
                        None => return Ok(()),
                    }
                },
                event = next_event(&mut self.subscription) => match event {
                    Some(text) => self.output.line(text).await?,
                    None => self.subscription = None,
                },
                () = self.place.told_to_leave() => return self.output.line(gave_way()).await,
            }
            // Others first, however much this client has sent ahead.
            tokio::task::yield_now().await;
        }
    }

    async fn on_line(&mut self, line: &[u8]) -> io::Result<()> {
        let shutdown = match Message::parse(line) {
            Ok(Message::Single(value)) => {
                let reply = self.answer(value).await;
                if let Some(text) = reply.text {
                    self.output.line(text).await?;
                }
                reply.shutdown
            }
            Ok(Message::Batch(values)) => self.on_batch(values).await?,
            Err(error) => {
                self.output.line(rpc::response(&Id::Null, Err(error))).await?;
                false
            }
        };
        if shutdown {
            self.desk.state.shutdown.notify_one();
        }
        Ok(())
    }

    /// Answers requests one by one, each written before the next is begun, so that a batch of large results needs no
    /// more memory than its largest. No array at all when all are notifications.
    async fn on_batch(&mut self, values: Vec<Value>) -> io::Result<bool> {
        let mut opened = false;
        let mut shutdown = false;
        for value in values {
            let reply = self.answer(value).await;
            shutdown |= reply.shutdown;
            if let Some(text) = &reply.text {
                self.output.write(if opened { b"," } else { b"[" }).await?;
                self.output.write(text.as_bytes()).await?;
                opened = true;
            }
        }
        if opened {
            self.output.write(b"]\n").await?;
        }
        Ok(shutdown)
    }

    /// What is to be written of one request.
    async fn answer(&mut self, value: Value) -> Reply {
        let request = match Request::from_value(value) {
            Ok(request) => request,
            Err((id, error)) => {
                let text = id.map(|id| rpc::response(&id, Err(error)));
                return Reply { text, ..Reply::default() };
            }
        };
        let id = request.id.clone();
        let mut shutdown = false;
        let outcome = self.desk.run(request).await.map(|answer| {
            match answer.then {
                Then::Continue => {}
                Then::Subscribe(subscription) => self.subscription = Some(subscription),
                Then::Shutdown => shutdown = true,
            }
            answer.result
        });
        let Some(id) = id else { return Reply { shutdown, ..Reply::default() } };
        let (outcome, large) = match outcome {
            Ok(result) if result.len() > LARGE => match Arc::clone(&self.desk.large).try_acquire_owned() {
                Ok(large) => (Ok(result), Some(large)),
                Err(_) => (Err(busy()), None),
            },
            outcome => (outcome, None),
        };
        Reply { text: Some(rpc::response(&id, outcome)), shutdown, _large: large }
    }
}

impl Desk {
    /// Carries out a request in its turn.
    async fn run(&self, request: Request) -> Result<methods::Answer, Error> {
        let waits = methods::find(&request.method).is_some_and(|method| method.waits);
        // Never closed, so this only ever waits.
        let turn = if waits { &self.waiting } else { &self.looking }.acquire().await;
        let (state, rights) = (Arc::clone(&self.state), self.rights);
        // A defect in a handler must cost this request only.
        let outcome = tokio::task::spawn_blocking(move || methods::call(&state, rights, &request)).await;
        drop(turn);
        outcome.unwrap_or_else(|error| {
            self.log.log(|| tracing::error!(%error, "a control method failed"));
            Err(Error::new(Kind::Internal, "the method failed in svmd; its log says more"))
        })
    }
}

fn busy() -> Error {
    let message =
        format!("{MAX_LARGE} results of more than {LARGE} bytes are being read by others; try again");
    Error::new(Kind::Busy, message)
}

fn gave_way() -> String {
    let message = "idle, and closed for another connection";
    rpc::response(&Id::Null, Err(Error::new(Kind::TooManyConnections, message)))
}

fn too_long() -> String {
    let message = format!("a line of more than {MAX_LINE} bytes; the rest of it is skipped");
    rpc::response(&Id::Null, Err(Error::new(Kind::LineTooLong, message)))
}

async fn next_event(subscription: &mut Option<Subscription>) -> Option<String> {
    match subscription {
        Some(subscription) => subscription.next().await,
        None => std::future::pending().await,
    }
}

enum Line {
    Whole(Vec<u8>),
    TooLong,
}

/// Cuts the stream into lines. Bytes after the last line end are no request and are dropped with the connection.
struct Lines {
    reader: OwnedReadHalf,
    /// Read but not yet given out; never more than [`MAX_LINE`] + [`READ_SIZE`].
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no line end.
    scanned: usize,
    /// The line that `buffer` starts in was too long.
    skipping: bool,
}

impl Lines {
    fn new(reader: OwnedReadHalf) -> Self {
        Self { reader, buffer: Vec::new(), scanned: 0, skipping: false }
    }

    /// The next line without its end; `None` at the end of the stream. May be dropped while it waits without losing a
    /// byte.
    async fn next(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.take_line() {
                return Ok(Some(line));
            }
            let mut bytes = [0; READ_SIZE];
            match self.reader.read(&mut bytes).await? {
                0 => return Ok(None),
                length => self.buffer.extend(bytes.iter().take(length)),
            }
        }
    }

    fn take_line(&mut self) -> Option<Line> {
        loop {
            let mut fresh = self.buffer.iter().skip(self.scanned);
            let Some(end) = fresh.position(|byte| *byte == b'\n') else {
                return self.without_end();
            };
            let end = self.scanned.saturating_add(end);
            let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
            line.truncate(end);
            self.scanned = 0;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            return Some(if line.len() > MAX_LINE { Line::TooLong } else { Line::Whole(line) });
        }
    }

    /// The buffer holds no line end: keeps what may still become a line.
    fn without_end(&mut self) -> Option<Line> {
        self.scanned = self.buffer.len();
        if !self.skipping && self.scanned <= MAX_LINE {
            return None;
        }
        self.buffer.clear();
        self.scanned = 0;
        // Told once per line.
        (!std::mem::replace(&mut self.skipping, true)).then_some(Line::TooLong)
    }
}

struct Output {
    writer: OwnedWriteHalf,
    stall: Duration,
}

impl Output {
    async fn line(&mut self, mut text: String) -> io::Result<()> {
        text.push('\n');
        self.write(text.as_bytes()).await
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            timeout(self.stall, self.writer.write_all(chunk))
                .await
                .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client does not read"))??;
        }
        Ok(())
    }
}
