//! Lines on standard error, made without allocating.

#![expect(unsafe_code, reason = "keeps lines under the heap's lock, and ends the process")]

use crate::{heap, others};
use std::cell::UnsafeCell;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Longest line.
const LINE: usize = 480;

/// Text without a home of its own. What does not fit is cut off.
pub struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Line {
    pub fn of(text: fmt::Arguments<'_>) -> Self {
        let mut line = Self { bytes: [0; LINE], len: 0 };
        // `write_str` never fails; a type that fails to print itself leaves a shorter line.
        line.write_fmt(text).ok();
        line
    }

    fn print(&self) {
        // A program without a standard error does not get it.
        rustix::io::write(rustix::stdio::stderr(), self.bytes()).ok();
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        let fits = text.len().min(room.len());
        for (to, from) in room.iter_mut().zip(text.as_bytes()) {
            *to = *from;
        }
        self.len += fits;
        Ok(())
    }
}

/// Lines that are kept while others stand still: whoever reads standard error may be one of them. Only whoever has the
/// heap's lock comes here.
struct Slot(UnsafeCell<Lines>);

pub type Lines = [Option<Line>; 2];

// SAFETY: as above.
unsafe impl Sync for Slot {}

static KEPT: Slot = Slot(UnsafeCell::new([None, None]));
static KEEPS: AtomicBool = AtomicBool::new(false);

/// Has lines be kept until [`take`]. The caller has the heap's lock, and keeps it until then.
pub fn keep() {
    KEEPS.store(true, Ordering::Relaxed);
}

/// What was said meanwhile, for whoever prints it without the lock.
pub fn take() -> Lines {
    KEEPS.store(false, Ordering::Relaxed);
    // SAFETY: the caller has the heap's lock.
    std::mem::take(unsafe { &mut *KEPT.0.get() })
}

pub fn print(lines: &Lines) {
    lines.iter().flatten().for_each(Line::print);
}

/// Prints one line. What does not fit is cut off.
pub fn say(text: fmt::Arguments<'_>) {
    let mut line = Line::of(format_args!("svm-alloc: {text}"));
    line.len = line.len.min(LINE - 1);
    line.write_str("\n").ok();
    if KEEPS.load(Ordering::Relaxed) && heap::is_mine() {
        // SAFETY: this thread has the heap's lock.
        let lines = unsafe { &mut *KEPT.0.get() };
        if let Some(free) = lines.iter_mut().find(|kept| kept.is_none()) {
            *free = Some(line);
        }
        return;
    }
    line.print();
}

/// Ends the program. Nothing of it runs any more: it may be in the middle of an allocation.
pub fn give_up() -> ! {
    if KEEPS.load(Ordering::Relaxed) && heap::is_mine() {
        let lines = take();
        others::let_go();
        print(&lines);
    }
    // SAFETY: `_exit` has no precondition and does not return.
    unsafe { libc::_exit(1) }
}
