//! What the kernel tells of this process in /proc, read without allocating.

use crate::fd::Fd;
use crate::say::Line;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ops::{ControlFlow, Range};

/// Bytes that are read at once.
const ROOM: usize = 8192;
/// Flags of a thread that never comes back from the kernel: PF_IO_WORKER, PF_USER_WORKER, PF_KTHREAD.
const KERNELS: u64 = 0x10 | 0x4000 | 0x0020_0000;
/// Where they stand in the line of a thread, counted from its state.
const FLAGS: usize = 6;

fn open(path: &CStr, flags: OFlags) -> rustix::io::Result<Fd> {
    rustix::fs::open(path, flags | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map(Fd::new)
}

/// Calls with the number of each thread of this process.
pub fn each_thread(mut call: impl FnMut(i32)) -> rustix::io::Result<()> {
    let folder = open(c"/proc/self/task", OFlags::DIRECTORY)?;
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut entries = RawDir::new(&folder, &mut room);
    while let Some(entry) = entries.next() {
        let number = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok());
        number.into_iter().for_each(&mut call);
    }
    Ok(())
}

/// Whether a thread of this process may run code of the program, now or later: it is not known to be at its end, nor to be
/// one of the kernel's (io_uring).
pub fn runs(thread: i32) -> bool {
    let path = Line::of(format_args!("/proc/self/task/{thread}/stat\0"));
    let mut room = [0; ROOM];
    let read = CStr::from_bytes_until_nul(path.bytes()).map_err(|_| Errno::INVAL).and_then(|path| {
        let file = open(path, OFlags::empty())?;
        rustix::io::read(&file, &mut room)
    });
    let line = match read {
        Err(Errno::NOENT | Errno::SRCH) => return false,
        read => room.get(..read.unwrap_or(0)).unwrap_or_default(),
    };
    // Its name, in parentheses, may hold anything.
    let Some(end) = line.iter().rposition(|byte| *byte == b')') else { return true };
    let line = std::str::from_utf8(line.get(end + 1..).unwrap_or_default()).unwrap_or_default();
    let mut words = line.split_ascii_whitespace();
    let ended = words.next().is_some_and(|state| matches!(state, "Z" | "X" | "x"));
    let flags = words.nth(FLAGS - 1).and_then(|flags| flags.parse::<u64>().ok());
    !ended && flags.is_none_or(|flags| flags & KERNELS == 0)
}

/// Whether this process has a userfaultfd open.
pub fn has_userfaultfd() -> rustix::io::Result<bool> {
    let folder = open(c"/proc/self/fd", OFlags::DIRECTORY)?;
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut entries = RawDir::new(&folder, &mut room);
    while let Some(entry) = entries.next() {
        let mut name = [0u8; 32];
        // One that is closed meanwhile is none.
        let named = rustix::fs::readlinkat_raw(&folder, entry?.file_name(), &mut name[..]);
        if named.is_ok_and(|len| name.get(..len) == Some(&b"anon_inode:[userfaultfd]"[..])) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// One of the kernel's mappings.
pub struct Mapping {
    pub range: Range<usize>,
    /// Private, readable and writable.
    pub plain: bool,
}

/// Calls with each of the kernel's mappings, by address, until it is told to stop. A mapping that is changed meanwhile may
/// be told as it was.
pub fn each_mapping(mut call: impl FnMut(Mapping) -> ControlFlow<()>) -> Option<()> {
    each_line(c"/proc/self/maps", |line| mapping(line).map_or(ControlFlow::Continue(()), &mut call))
}

/// Calls with each mapping of which faults go to a userfaultfd.
pub fn each_watched(mut call: impl FnMut(Range<usize>)) -> Option<()> {
    let mut last = None;
    each_line(c"/proc/self/smaps", |line| {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            // For pages that are missing, protected, or not mapped yet.
            let mut flags = flags.split(u8::is_ascii_whitespace);
            let watched = flags.any(|flag| matches!(flag, b"um" | b"uw" | b"ui"));
            last.take().filter(|_| watched).into_iter().for_each(&mut call);
        } else if let Some(mapping) = mapping(line) {
            last = Some(mapping.range);
        }
        ControlFlow::Continue(())
    })
}

fn each_line(path: &CStr, mut call: impl FnMut(&[u8]) -> ControlFlow<()>) -> Option<()> {
    let file = open(path, OFlags::empty()).ok()?;
    let mut room = [0; ROOM];
    let mut kept = 0;
    loop {
        // The kernel gives whole lines, unless there is no room for one.
        let read = rustix::io::read(&file, room.get_mut(kept..)?).ok()?;
        let text = room.get(..kept + read)?;
        if read == 0 {
            return Some(());
        }
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in text.get(..end)?.split(|byte| *byte == b'\n') {
            if call(line).is_break() {
                return Some(());
            }
        }
        let all = text.len();
        room.copy_within(end..all, 0);
        kept = all - end;
    }
}

/// The one that holds an address.
pub fn mapping_of(address: usize) -> Option<Range<usize>> {
    let mut found = None;
    each_mapping(|mapping| {
        let here = mapping.range.contains(&address);
        found = here.then_some(mapping.range);
        if here { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    found
}

fn mapping(line: &[u8]) -> Option<Mapping> {
    let mut words = line.split(|byte| *byte == b' ');
    let (start, end) = std::str::from_utf8(words.next()?).ok()?.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    Some(Mapping { range, plain: words.next()? == b"rw-p" })
}
