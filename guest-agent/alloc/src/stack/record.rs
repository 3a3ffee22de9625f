//! The C library's record of a thread, where it lies in an arena: that of a thread whose stack the program brought.
//!
//! The child of a fork has the thread's new number written there, and its list of robust mutexes emptied, before any
//! handler runs. The record is still its parent's then, so the parent puts both right.

#![expect(unsafe_code, reason = "looks into the C library's record of this thread")]

use crate::numbered::KERNEL;
use crate::space::Space;
use libc::c_void;

/// Bytes of the record in which the number is looked for.
const RECORD: usize = 1024;
/// Words that may hold the number; there is one.
const PLACES: usize = 4;

/// What is put right.
pub struct Record {
    number: i32,
    places: [usize; PLACES],
    /// Where the list of robust mutexes begins, and what stood there.
    robust: Option<(usize, usize)>,
}

impl Record {
    /// Of this thread; `None`: its record lies in no arena.
    pub fn keep(space: &Space) -> Option<Self> {
        // SAFETY: it has no precondition.
        let record = usize::try_from(unsafe { libc::pthread_self() }).ok()?;
        let piece = space.first_in(&(record..record + RECORD))?;
        if !piece.backing.is_agents() {
            return None;
        }
        let number = rustix::thread::gettid().as_raw_nonzero().get();
        let mut places = [0; PLACES];
        let words = (record..record + RECORD).step_by(size_of::<i32>());
        // SAFETY: the record is longer, and aligned.
        let found = words.filter(|at| unsafe { pointer::<i32>(*at).read_volatile() } == number);
        places.iter_mut().zip(found).for_each(|(place, at)| *place = at);
        // SAFETY: the list's head is a word in the record.
        let robust = robust_list().map(|at| (at, unsafe { pointer::<usize>(at).read_volatile() }));
        Some(Self { number, places, robust })
    }

    /// In the parent, when the child has its own.
    pub fn put_right(&self) {
        for place in self.places.into_iter().filter(|place| *place != 0) {
            // SAFETY: the thread is the same, so its record is where it was.
            unsafe { pointer::<i32>(place).write_volatile(self.number) };
        }
        if let Some((at, word)) = self.robust {
            // SAFETY: as above.
            unsafe { pointer::<usize>(at).write_volatile(word) };
        }
    }
}

fn pointer<T>(at: usize) -> *mut T {
    std::ptr::with_exposed_provenance_mut(at)
}

fn robust_list() -> Option<usize> {
    let (mut head, mut len) = (std::ptr::null_mut::<c_void>(), 0usize);
    // SAFETY: the pointers are to variables here.
    let told = unsafe { KERNEL(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    (told == 0 && !head.is_null()).then(|| head.expose_provenance())
}
