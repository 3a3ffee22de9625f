//! Connections: bytes to lines, lines to answers, events in between.
//!
//! One task a connection, which alone writes to it, so a line is never torn. It reads the next request only after the
//! answer to the last one has left, so a connection holds at most one request, one response and the hub's bounded
//! ring of events, and a client that does not read only stops itself, until it is cut off.

use super::ControlState;
use super::events::Subscription;
use super::methods::{self, Then};
use super::rpc::{self, Error, Id, Kind, Message, Request};
use serde_json::Value;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Bytes of a line at most, without its end.
pub const MAX_LINE: usize = 64 << 10;
/// Bytes that a client must take from us within [`Options::stall`].
const CHUNK: usize = 64 << 10;
/// Bytes asked of a socket at once.
const READ_SIZE: usize = 8 << 10;
/// How long to wait when the kernel has no file descriptor or memory for another connection.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How much clients may ask of the server.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Connections at once. Another one is told so and closed.
    pub max_connections: usize,
    /// A client that takes less than 64 KiB in this time while there is more for it is cut off.
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_connections: 64, stall: Duration::from_secs(10) }
    }
}

/// Serves clients of `listener` until it is dropped; its connections end with it. Needs a tokio runtime with I/O and
/// time.
pub async fn serve(listener: UnixListener, state: Arc<ControlState>, options: Options) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < options.max_connections => {
                    connections.spawn(Connection::new(stream, Arc::clone(&state), options.stall).run());
                }
                Ok((stream, _)) => refuse(&stream, options.max_connections),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    sleep(ACCEPT_RETRY).await;
                }
            },
            Some(ended) = connections.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "control connection ended"),
                Err(error) => tracing::error!(%error, "control connection failed"),
            },
        }
    }
}

fn refuse(stream: &UnixStream, max_connections: usize) {
    let message = format!("all {max_connections} control connections are in use; close one and try again");
    let mut text = rpc::response(&Id::Null, Err(Error::new(Kind::TooManyConnections, message)));
    text.push('\n');
    // An empty socket takes a short line at once. A client that is gone already misses nothing.
    stream.try_write(text.as_bytes()).ok();
}

struct Connection {
    lines: Lines,
    output: Output,
    state: Arc<ControlState>,
    subscription: Option<Subscription>,
}

impl Connection {
    fn new(stream: UnixStream, state: Arc<ControlState>, stall: Duration) -> Self {
        let (reader, writer) = stream.into_split();
        Self { lines: Lines::new(reader), output: Output { writer, stall }, state, subscription: None }
    }

    async fn run(mut self) -> io::Result<()> {
        loop {
            tokio::select! {
                line = self.lines.next() => match line? {
                    Some(Line::Whole(line)) => self.on_line(&line).await?,
                    Some(Line::TooLong) => self.output.line(too_long()).await?,
                    None => return Ok(()),
                },
                event = next_event(&mut self.subscription) => match event {
                    Some(text) => self.output.line(text).await?,
                    None => self.subscription = None,
                },
            }
            // Others first, however much this client has sent ahead.
            tokio::task::yield_now().await;
        }
    }

    async fn on_line(&mut self, line: &[u8]) -> io::Result<()> {
        let shutdown = match Message::parse(line) {
            Ok(Message::Single(value)) => {
                let (response, shutdown) = self.answer(value).await;
                if let Some(text) = response {
                    self.output.line(text).await?;
                }
                shutdown
            }
            Ok(Message::Batch(values)) => self.on_batch(values).await?,
            Err(error) => {
                self.output.line(rpc::response(&Id::Null, Err(error))).await?;
                false
            }
        };
        if shutdown {
            self.state.shutdown.notify_one();
        }
        Ok(())
    }

    /// Answers requests one by one, each written before the next is begun, so that a batch of large results needs no
    /// more memory than its largest. No array at all when all are notifications.
    async fn on_batch(&mut self, values: Vec<Value>) -> io::Result<bool> {
        let mut opened = false;
        let mut shutdown = false;
        for value in values {
            let (response, wants_shutdown) = self.answer(value).await;
            shutdown |= wants_shutdown;
            if let Some(text) = response {
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

    /// The response to one request, none to a notification, and whether the daemon is to end.
    async fn answer(&mut self, value: Value) -> (Option<String>, bool) {
        let request = match Request::from_value(value) {
            Ok(request) => request,
            Err((id, error)) => return (id.map(|id| rpc::response(&id, Err(error))), false),
        };
        let id = request.id.clone();
        let state = Arc::clone(&self.state);
        // The registry may wait (for a session to end), and a defect in a handler must cost this request only.
        let outcome = tokio::task::spawn_blocking(move || methods::call(&state, &request)).await;
        let outcome = outcome.unwrap_or_else(|error| {
            tracing::error!(%error, "a control method failed");
            Err(Error::new(Kind::Internal, "the method failed in svmd; its log says more"))
        });
        let mut shutdown = false;
        let outcome = outcome.map(|answer| {
            match answer.then {
                Then::Continue => {}
                Then::Subscribe(subscription) => self.subscription = Some(subscription),
                Then::Shutdown => shutdown = true,
            }
            answer.result
        });
        (id.map(|id| rpc::response(&id, outcome)), shutdown)
    }
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
