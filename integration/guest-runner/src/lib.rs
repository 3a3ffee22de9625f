//! The command channel between the host and a test guest: one JSON object per line in each direction over the guest's
//! second serial port, so that output, exit and death of many processes at once can never be taken for one another.
//!
//! The host chooses an id for each process and never uses it twice. A process' `Output` precedes its `Exited`, except for
//! what a descendant that holds its pipes writes later.

pub mod churn;
pub mod story;

use serde::{Deserialize, Serialize};

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Start a process; answered by [`Event::Started`] or [`Event::Refused`].
    Spawn {
        /// Chosen by the host.
        id: u64,
        /// User and group that it runs as.
        uid: u32,
        /// Program and arguments.
        argv: Vec<String>,
    },
    /// Append to the standard input of a process.
    Stdin {
        /// Of the process.
        id: u64,
        /// Text to write; a line ends with a line feed.
        data: String,
    },
    /// Close the standard input of a process.
    CloseStdin {
        /// Of the process.
        id: u64,
    },
    /// Send a signal to exactly this process; none of its descendants.
    Kill {
        /// Of the process.
        id: u64,
        /// As the kernel numbers it.
        signal: i32,
    },
    /// Switch the guest off.
    PowerOff,
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The guest has booted and takes requests.
    Ready {
        /// `uname -r`.
        release: String,
    },
    /// The process runs.
    Started {
        /// Of the process.
        id: u64,
        /// In the guest.
        pid: u32,
    },
    /// The request has no effect.
    Refused {
        /// Of the process.
        id: u64,
        /// Why.
        error: String,
    },
    /// The process wrote lines, or the rest before the end of its stream, or a piece of a very long line.
    Output {
        /// Of the process.
        id: u64,
        /// Where it wrote to.
        stream: Stream,
        /// Bytes that are not UTF-8 are replaced.
        data: String,
    },
    /// The process has ended and was reaped.
    Exited {
        /// Of the process.
        id: u64,
        /// Exit status, absent when a signal ended it.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
}

/// Where a process writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The guest's end of the channel.
pub const CHANNEL: &str = "/dev/ttyS1";
/// Modules to load at boot, in the order of their names.
pub const MODULES: &str = "/modules";
