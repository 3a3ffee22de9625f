//! Lines on standard error, made without allocating.

use std::fmt::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// What is said while others stand still: whoever reads standard error may be one of them.
static KEPT: Mutex<Kept> = Mutex::new(Kept { keeps: false, lines: [None, None] });

struct Kept {
    keeps: bool,
    /// The first ones.
    lines: [Option<Line>; 2],
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the next line be kept until [`let_go`].
pub fn keep() {
    kept().keeps = true;
}

pub fn let_go() {
    let mut kept = kept();
    kept.keeps = false;
    let lines = std::mem::take(&mut kept.lines);
    drop(kept);
    lines.iter().flatten().for_each(Line::print);
}

/// Prints one line. What does not fit is cut off.
pub fn say(text: fmt::Arguments<'_>) {
    let mut line = Line::of(format_args!("svm-alloc: {text}"));
    line.len = line.len.min(LINE - 1);
    line.write_str("\n").ok();
    // A thread that stands still may have it, in the middle of a line of its own.
    if let Ok(mut kept) = KEPT.try_lock()
        && kept.keeps
    {
        if let Some(free) = kept.lines.iter_mut().find(|kept| kept.is_none()) {
            *free = Some(line);
        }
        return;
    }
    line.print();
}

/// Ends the program. Nothing of it runs any more: it may be in the middle of an allocation.
pub fn give_up() -> ! {
    let_go();
    // SAFETY: `_exit` has no precondition and does not return.
    #[expect(unsafe_code, reason = "ends the process without running handlers")]
    unsafe {
        libc::_exit(1)
    }
}
