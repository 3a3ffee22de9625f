//! The operator's socket: one line in, one JSON document out. Mode 0600, served one connection after another.

use crate::agent::Agent;
use crate::socket::listen;
use rustix::net::SocketType;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an operator may take to ask, or to read.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest request line.
const MAX_LINE: u64 = 256;

/// What an operator may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// [`crate::agent::AgentStatus`].
    Status,
    /// [`crate::agent::LedgerReport`] with entries.
    Ledger,
    /// Holds answers back: `{"holding": true}`.
    Hold,
    /// Lets held answers go: `{"released": n}`.
    Release,
    /// The memory of a process: [`crate::agent::MapReport`] for each of its contexts. `map PID` on the wire.
    Map(i32),
}

impl Request {
    fn line(self) -> String {
        match self {
            Self::Status => "status".into(),
            Self::Ledger => "ledger".into(),
            Self::Hold => "hold".into(),
            Self::Release => "release".into(),
            Self::Map(pid) => format!("map {pid}"),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let plain = [Self::Status, Self::Ledger, Self::Hold, Self::Release];
        let map = || line.strip_prefix("map ")?.parse().ok().map(Self::Map);
        plain.into_iter().find(|request| request.line() == line).or_else(map)
    }
}

/// Why an agent did not answer its operator.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Not for this user.
    #[error("only root may ask the agent at {path}")]
    NotAllowed {
        /// The socket.
        path: PathBuf,
    },
    /// Nobody listens.
    #[error("no agent listens at {path}; start `svm-agent serve`, or name its --admin-socket")]
    NotReachable {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the agent hung up")]
    Io(#[from] io::Error),
    /// The answer is not what was asked for.
    #[error("the agent's answer is not understood: another version?")]
    Answer(#[from] serde_json::Error),
}

pub(super) struct AdminListener {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminListener {
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::from(listen(path, SocketType::STREAM, 0o600)?);
        Ok(Self { listener, path: path.to_owned() })
    }

    pub(super) fn serve(&self, agent: &Agent, stop: BorrowedFd<'_>) {
        while super::wait_readable(self.listener.as_fd(), stop) {
            // An operator that hangs up early is no concern of the agent's.
            let answered = self.listener.accept().and_then(|(stream, _)| answer(agent, stream));
            answered.ok();
        }
    }
}

impl Drop for AdminListener {
    fn drop(&mut self) {
        // Best effort: a path that is gone already needs no removal.
        drop(std::fs::remove_file(&self.path));
    }
}

fn answer(agent: &Agent, mut stream: UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(MAX_LINE)).read_line(&mut line)?;
    let document = match Request::parse(line.trim_end()) {
        Some(Request::Status) => serde_json::to_vec(&agent.status())?,
        Some(Request::Ledger) => serde_json::to_vec(&agent.ledger(true))?,
        Some(Request::Hold) => {
            agent.hold_answers();
            serde_json::to_vec(&serde_json::json!({ "holding": true }))?
        }
        Some(Request::Release) => {
            serde_json::to_vec(&serde_json::json!({ "released": agent.release_answers() }))?
        }
        Some(Request::Map(pid)) => serde_json::to_vec(&agent.map(pid))?,
        None => {
            let error = "ask for status, ledger, hold, release or map PID";
            serde_json::to_vec(&serde_json::json!({ "error": error }))?
        }
    };
    stream.write_all(&document)
}

/// Asks the agent whose operator's socket is at `path`.
///
/// # Errors
/// When nobody listens there, or the answer is not understood.
pub fn ask<T: serde::de::DeserializeOwned>(path: &Path, request: Request) -> Result<T, AdminError> {
    let not_reachable = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied => AdminError::NotAllowed { path: path.to_owned() },
        _ => AdminError::NotReachable { path: path.to_owned(), source },
    };
    let mut stream = UnixStream::connect(path).map_err(not_reachable)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    writeln!(stream, "{}", request.line())?;
    let mut document = Vec::new();
    stream.read_to_end(&mut document)?;
    Ok(serde_json::from_slice(&document)?)
}
