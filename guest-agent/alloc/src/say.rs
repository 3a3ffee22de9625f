//! Lines on standard error, made without allocating.

use std::fmt::{self, Write};

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

/// Prints one line. What does not fit is cut off.
pub fn say(text: fmt::Arguments<'_>) {
    let mut line = Line::of(format_args!("svm-alloc: {text}"));
    line.len = line.len.min(LINE - 1);
    line.write_str("\n").ok();
    // A program without a standard error does not get it.
    rustix::io::write(rustix::stdio::stderr(), line.bytes()).ok();
}

/// Ends the program. Nothing of it runs any more: it may be in the middle of an allocation.
pub fn give_up() -> ! {
    // SAFETY: `_exit` has no precondition and does not return.
    #[expect(unsafe_code, reason = "ends the process without running handlers")]
    unsafe {
        libc::_exit(1)
    }
}
