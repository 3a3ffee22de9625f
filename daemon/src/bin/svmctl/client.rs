//! The control socket from the operator's side: one request, its response, then perhaps events. Blocking.

use crate::Params;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Bytes of a line from the daemon at most. A full device ledger is the longest answer there is.
const MAX_LINE: u64 = 1 << 30;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong in a way that only we can see.
    #[error("{0}")]
    Usage(String),
    /// The daemon refused.
    #[error("{message} [{kind}]")]
    Refused {
        /// `error.data.kind`, or the code where the daemon names no kind.
        kind: String,
        /// For people.
        message: String,
    },
    /// No connection.
    #[error("cannot connect to {}: {source}; {}", path.display(), advice(path, source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("lost the daemon while {doing}: {source}; see the log of svmd")]
    Lost {
        /// What was going on.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What answers is no svmd.
    #[error("unexpected answer from {0}; is it the control socket of svmd, and not a guest's socket?")]
    Foreign(PathBuf),
    /// Our own standard output failed.
    #[error("cannot write the result: {0}")]
    Output(#[source] io::Error),
}

impl Error {
    /// The exit status that says so.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Refused { .. } | Self::Output(_) => 1,
            Self::Usage(_) => 2,
            Self::Connect { .. } | Self::Lost { .. } | Self::Foreign(_) => 3,
        }
    }
}

fn advice(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "is svmd running, and with this control socket? (--socket or $SVMD_SOCKET names another)"
                .to_owned()
        }
        io::ErrorKind::ConnectionRefused => {
            "nobody listens there: start svmd, which takes over a dead socket".to_owned()
        }
        io::ErrorKind::PermissionDenied => match std::fs::metadata(path) {
            Ok(owner) => {
                format!(
                    "run as uid {}, which owns the socket (group {}), or as root",
                    owner.uid(),
                    owner.gid()
                )
            }
            Err(_) => "its folder is closed to you: run as the user of svmd, or as root".to_owned(),
        },
        _ => "is this the control socket of svmd?".to_owned(),
    }
}

/// A connection to the daemon.
pub struct Client {
    path: PathBuf,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let stream =
            UnixStream::connect(path).map_err(|source| Error::Connect { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), reader: BufReader::new(stream) })
    }

    /// Calls a method and waits for its result.
    pub fn call(&mut self, method: &str, params: Params) -> Result<Value, Error> {
        let mut request =
            json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string();
        request.push('\n');
        // A daemon that refuses the connection says why before it closes, so an answer may be there all the same.
        let written = self.reader.get_ref().write_all(request.as_bytes());
        let response = match (self.line("waiting for the answer"), written) {
            (Ok(Some(response)), _) => response,
            (_, Err(source)) => return Err(Error::Lost { doing: "sending the request", source }),
            (Ok(None), Ok(())) => {
                let source = io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection");
                return Err(Error::Lost { doing: "waiting for the answer", source });
            }
            (Err(error), Ok(())) => return Err(error),
        };
        if let Some(error) = response.get("error") {
            let kind = error["data"]["kind"].as_str();
            return Err(Error::Refused {
                kind: kind.map_or_else(|| error["code"].to_string(), str::to_owned),
                message: error["message"].as_str().unwrap_or("the daemon refused").to_owned(),
            });
        }
        response.get("result").cloned().ok_or_else(|| Error::Foreign(self.path.clone()))
    }

    /// Waits for the next event; `None` once the daemon has ended.
    pub fn next_event(&mut self) -> Result<Option<Value>, Error> {
        let Some(notification) = self.line("waiting for events")? else {
            return Ok(None);
        };
        notification.get("params").cloned().map(Some).ok_or_else(|| Error::Foreign(self.path.clone()))
    }

    fn line(&mut self, doing: &'static str) -> Result<Option<Value>, Error> {
        let mut line = Vec::new();
        let mut limited = self.reader.by_ref().take(MAX_LINE);
        limited.read_until(b'\n', &mut line).map_err(|source| Error::Lost { doing, source })?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|_| Error::Foreign(self.path.clone()))
    }
}
