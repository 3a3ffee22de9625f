//! Memory that GPUs do not reach, and why: what a program is told when one of its jobs touched it.
//!
//! A few are remembered, the latest ones, by where they stand. Most of it is never asked for, so it costs one entry of an
//! array each time. What the kernel can say by itself (`/proc/self/maps`: files, huge pages, System V) is not kept.

use crate::link::Failure;
use guest_agent::message::{AgentLimit, Reached};
use std::fmt;
use std::ops::Range;
use virtio_gpu_svm::protocol::errno;

/// How many are remembered.
const MOST: usize = 128;

/// Of memory that is more than a process may have in all.
pub const TOO_LARGE: Why = Why::Limit(Reached::Agent(AgentLimit::ProcessMemory));

/// Why memory is out of reach.
#[derive(Clone, Copy)]
pub enum Why {
    /// It was mapped with these PROT_*.
    Mapped { prot: i32 },
    /// It was protected when it was mapped already.
    Protected,
    /// MAP_NORESERVE.
    Reserved,
    /// MAP_STACK.
    Stack,
    /// MAP_GROWSDOWN.
    GrowsDown,
    /// It lies below the part of a thread's stack that is in reach.
    DeepStack,
    /// It lies above.
    TopOfStack,
    /// The agent's limit, or the host's.
    Limit(Reached),
    /// The agent says no: negative errno.
    Refused(i32),
    /// The library knows of as many pieces of memory as it can.
    Full,
    /// No descriptor was free to take it by.
    NoDescriptor,
    /// It could not be pinned; a line on standard error says more.
    NotPinned,
    /// It was there before the program asked for a device, and other threads did not stand still then.
    Threads,
    /// As above, and was guarded, or kept from dumps (MADV_GUARD_INSTALL, MADV_DONTDUMP).
    Advised,
    /// As above, and faults in it went to a userfaultfd of the program's.
    Watched,
    /// It could not be copied when the program asked.
    Changed,
    /// remap_file_pages.
    Rearranged,
}

impl Why {
    /// What the agent has said. `None`: the connection is gone, and with it everybody who might ask.
    pub fn of(failure: &Failure) -> Option<Self> {
        match failure {
            Failure::Refused { limit: Some(limit), .. } => Some(Self::Limit(*limit)),
            Failure::Refused { status, .. } => Some(Self::Refused(*status)),
            Failure::NoDescriptor => Some(Self::NoDescriptor),
            _ => None,
        }
    }
}

/// As the end of a sentence, with what to do.
impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const WANTED: &str = "map it readable and writable (PROT_READ | PROT_WRITE), or use malloc";
        match self {
            Self::Mapped { prot } => {
                let how = how_mapped(*prot);
                write!(f, "it was mapped {how}, and such memory stays out of reach: {WANTED}")
            }
            Self::Protected => f.write_str(
                "it was protected by mprotect, and stays out of reach when it is readable and writable again: map it \
                 anew, readable and writable, or use malloc",
            ),
            Self::Reserved => f.write_str(
                "it was mapped with MAP_NORESERVE, more than 64 MiB of it, and such memory stays out of reach: map what \
                 GPUs use without MAP_NORESERVE, or use malloc",
            ),
            Self::Stack => f.write_str(
                "it was mapped with MAP_STACK, and such memory stays out of reach: map it without MAP_STACK, or use \
                 malloc; a thread may have the stack that pthread_create makes, of which 256 KiB are in reach; so are \
                 those of MAP_STACK where svm-agent trusts this user",
            ),
            Self::GrowsDown => f.write_str(
                "it was mapped with MAP_GROWSDOWN, and such memory stays out of reach: map it without MAP_GROWSDOWN, or \
                 use malloc",
            ),
            Self::DeepStack => f.write_str(
                "it is deep in a thread's stack, of which the upper 256 KiB are in reach: use malloc, or have it in a \
                 frame nearer to the thread's first function",
            ),
            Self::TopOfStack => f.write_str(
                "it is at the top of a thread's stack, where the C library has the thread's own variables: use malloc",
            ),
            Self::Limit(limit) => limit.fmt(f),
            Self::Refused(status) if *status == -errno::ENOMEM => {
                f.write_str("the guest had no memory left to pin (ENOMEM): free some, or give the guest more")
            }
            Self::Refused(status) if *status == -errno::EPERM => {
                f.write_str("its file is sealed against writing (EPERM): use one without F_SEAL_WRITE, or malloc")
            }
            Self::Refused(status) => {
                write!(f, "the agent has refused it ({}): use malloc", errno::name(*status))
            }
            Self::Full => f.write_str(
                "this process has more pieces of memory than libsvm_alloc.so keeps account of: map less in pieces, or \
                 use malloc",
            ),
            Self::NoDescriptor => f.write_str(
                "no descriptor was free to take memory by when it was made: raise the limit of open files (`ulimit -n`)",
            ),
            Self::Threads => f.write_str(
                "the program had it before it asked for a device, and its threads could not be held still then, as \
                 libsvm_alloc.so has said on standard error: ask for a device earlier, or start the program by \
                 `svm-agent run --early`",
            ),
            Self::Advised => f.write_str(
                "it was given MADV_DONTDUMP or MADV_GUARD_INSTALL before the program asked for a device, and such memory \
                 stays out of reach: ask for a device before, or map what GPUs use by itself",
            ),
            Self::Watched => f.write_str(
                "faults in it went to a userfaultfd of the program's when the program asked for a device, and such memory \
                 stays out of reach: ask for a device before, or map what GPUs use by itself",
            ),
            Self::Changed => f.write_str(
                "it could not be moved when the program first asked for a device: part of it was gone, or changed by system \
                 calls that libsvm_alloc.so does not see, or it is a file's and the kernel older than 5.14: use malloc, or \
                 map it afterwards",
            ),
            Self::Rearranged => f.write_str(
                "remap_file_pages has put other pages of its file there, and such memory stays out of reach: map them by \
                 mmap",
            ),
            Self::NotPinned => f.write_str(
                "it could not be pinned, for the reason that libsvm_alloc.so has printed on standard error: do what is \
                 said there, or use malloc",
            ),
        }
    }
}

/// Other than readable and writable.
fn how_mapped(prot: i32) -> &'static str {
    match prot {
        libc::PROT_NONE => "with PROT_NONE",
        _ if prot & libc::PROT_EXEC != 0 => "executable (PROT_EXEC)",
        _ if prot & libc::PROT_WRITE == 0 => "read-only",
        _ => "write-only",
    }
}

/// What is remembered.
pub struct Log {
    entries: [Option<(usize, usize, Why)>; MOST],
    /// Where the next one goes.
    next: usize,
    /// Whether there may be any.
    any: bool,
    /// The last of the refusals.
    refused: Option<Why>,
}

impl Log {
    pub const fn new() -> Self {
        Self { entries: [None; MOST], next: 0, any: false, refused: None }
    }

    pub fn add(&mut self, range: &Range<usize>, why: Why) {
        if let Some(entry) = self.entries.get_mut(self.next) {
            *entry = Some((range.start, range.end, why));
        }
        self.next = (self.next + 1) % MOST;
        self.any = true;
    }

    /// Forgets memory that is gone.
    pub fn forget(&mut self, range: &Range<usize>) {
        if !self.any {
            return;
        }
        self.any = false;
        for entry in &mut self.entries {
            if let Some((start, end, _)) = entry {
                if range.start <= *start {
                    *start = range.end.clamp(*start, *end);
                } else if range.end >= *end {
                    *end = range.start.clamp(*start, *end);
                }
                if start == end {
                    *entry = None;
                }
            }
            self.any |= entry.is_some();
        }
    }

    /// As [`Self::add`], for what the agent does not take.
    pub fn add_failure(&mut self, range: &Range<usize>, failure: &Failure) {
        if let Some(why) = Why::of(failure) {
            self.refused = Some(why);
            self.add(range, why);
        }
    }

    /// The last of the agent's refusals, for memory that it should have and that is not remembered any more.
    pub fn refused(&self) -> Option<Why> {
        self.refused
    }

    /// For the heap's memory, and what else the table has, that is not remembered.
    pub fn refuse(&mut self, why: Why) {
        self.refused = Some(why);
    }

    /// The latest that is about an address.
    pub fn find(&self, address: usize) -> Option<Why> {
        let (later, earlier) = self.entries.split_at_checked(self.next)?;
        let latest_first = later.iter().rev().chain(earlier.iter().rev()).flatten();
        let found = latest_first.copied().find(|(start, end, _)| (*start..*end).contains(&address));
        found.map(|(_, _, why)| why)
    }
}
