//! Messages between keeper and serving process. Both are one program of one version, so they are JSON.

use crate::driver::RingConfig;
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;

/// Most bytes of a request.
pub(super) const MAX_REQUEST: usize = 4096;
/// Most bytes of the handover.
pub(super) const MAX_HANDOVER: usize = 128 << 10;

/// What the serving process gets at its start. Descriptors: ring memory, then the device's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Handover {
    /// How the rings are made.
    pub rings: RingConfig,
    /// Device address of each page of ring memory.
    pub ring_pages: Vec<u64>,
    /// What the hardware says of itself.
    pub hardware: serde_json::Value,
}

/// A request. Several may be under way.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Asked {
    /// Comes back with the answer.
    pub number: u64,
    /// What is asked.
    pub request: Request,
}

/// An answer, in whatever order.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Answered {
    /// Of the request.
    pub number: u64,
    /// What came of it.
    pub reply: Reply,
}

/// From the serving process.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Make pinned memory.
    Create {
        /// Bytes.
        len: u64,
    },
    /// Pin memory of a process, whose descriptor comes with the request.
    Import {
        /// Where it begins in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Keep a descriptor that pins memory of a process. A pidfd comes with the request, of the process that has it: the
    /// kernel sends no io_uring over a socket.
    Hold {
        /// What that process calls it.
        fd: i32,
    },
    /// Let it go: no engine can use it any more. Has no answer.
    Release {
        /// From [`Reply::Kept`].
        id: u64,
    },
}

/// From the keeper.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// Done. Descriptors: memory that was made, then, of memory, a file with the address of each page.
    Kept {
        /// Names it.
        id: u64,
    },
    /// Not done.
    Refused {
        /// Why, for the process.
        errno: i32,
    },
}

/// Page addresses do not fit a message; a file does.
pub(super) fn pages_to_file(pages: &[u64]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("svm-pages", MemfdFlags::CLOEXEC)?);
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    file.write_all(&bytes)?;
    Ok(file.into())
}

pub(super) fn pages_from_file(fd: OwnedFd) -> io::Result<Vec<u64>> {
    let mut file = File::from(fd);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|page| u64::from_le_bytes(*page)).collect())
}
