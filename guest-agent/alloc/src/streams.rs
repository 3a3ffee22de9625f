//! Streams lie in memory of their own, not in arenas.
//!
//! In the child of a process with several threads the C library sets the locks of all streams free, before any handler
//! runs. In an arena that would reach the parent, and a thread inside such a stream would wait for ever. So what the C
//! library allocates while it makes a stream comes from anonymous memory, which fork copies by itself. The buffers that
//! it allocates later, and those that it hands to the program, are ordinary blocks.
//!
//! Streams that the C library opens for itself (to read its databases) are made past this. It uses them without locks.

#![expect(unsafe_code, reason = "takes the place of functions of the C library")]

use crate::exports::set_errno;
use crate::growing;
use crate::real::Real;
use crate::thread_word::ThreadWord;
use libc::{FILE, c_char, c_int, c_void, size_t, wchar_t};
use rustix::mm::{MapFlags, ProtFlags};
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Address space for all streams, taken at the first one and filled as they come: room for some 100 000. Streams beyond
/// are made of ordinary blocks.
const ROOM: usize = 64 << 20;

/// What a thread is making: nothing of ours.
const NOTHING: usize = 0;
/// All that the C library allocates is the stream's.
const STREAM: usize = 1;
/// The first block is the stream, and then comes a buffer for the program.
const STREAM_THEN_BUFFER: usize = 2;

static MAKING: ThreadWord = ThreadWord::new();

/// Makes ready for streams, when the library is loaded or at the first one: constructors of other libraries may be earlier.
pub fn watch() {
    if !MAKING.is_made() {
        LIST.find();
        MAKING.make_once(None);
    }
}

/// Whether the block that this thread allocates now is a stream's.
pub fn asks() -> bool {
    match MAKING.get() {
        NOTHING => false,
        STREAM => true,
        _ => {
            MAKING.set(NOTHING);
            true
        }
    }
}

/// Where the memory of streams comes from: one range, front to back.
pub struct Source {
    /// The whole range, and how much of it is used. Cells because dlmalloc asks with a shared reference.
    room: RefCell<Range<usize>>,
    used: Cell<usize>,
}

impl Source {
    pub const fn new() -> Self {
        Self { room: RefCell::new(0..0), used: Cell::new(0) }
    }

    /// Whether a block is a stream's.
    pub fn holds(&self, block: *mut u8) -> bool {
        self.room.borrow().contains(&block.addr())
    }
}

// SAFETY: they are parts of a mapping of its own, each given once.
unsafe impl growing::Source for Source {
    const CHUNK: usize = 64 << 10;

    fn more(&self, size: usize) -> Option<(*mut u8, usize)> {
        let mut room = self.room.borrow_mut();
        if room.is_empty() {
            *room = reserve()?;
        }
        let (len, at) = (size.next_multiple_of(Self::CHUNK), room.start + self.used.get());
        if len > room.end - at {
            return None;
        }
        self.used.set(self.used.get() + len);
        Some((std::ptr::with_exposed_provenance_mut(at), len))
    }
}

fn reserve() -> Option<Range<usize>> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: without MAP_FIXED no existing mapping is replaced.
    let mapped = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), ROOM, prot, flags) };
    let start = mapped.ok()?.expose_provenance();
    Some(start..start + ROOM)
}

/// The lock of the C library's list of streams, which fork takes after all handlers have run. Who has it may wait for a
/// stream, and who has a stream for the heap: so it must be taken before the heap's lock, not after.
pub struct List {
    lock: Real,
    unlock: Real,
    reset: Real,
}

/// Of a C library without it nothing is held.
pub static LIST: List = List {
    lock: Real::new(c"_IO_list_lock"),
    unlock: Real::new(c"_IO_list_unlock"),
    reset: Real::new(c"_IO_list_resetlock"),
};

impl List {
    /// Looks for the functions, which may allocate.
    fn find(&self) {
        for function in [&self.lock, &self.unlock, &self.reset] {
            function.address();
        }
    }

    /// Takes the lock, if it was found; a thread that has it may take it again.
    pub fn hold(&self) -> bool {
        let found =
            ![&self.lock, &self.unlock, &self.reset].iter().any(|function| function.found().is_null());
        if found {
            call(self.lock.found());
        }
        found
    }

    pub fn let_go(&self) {
        call(self.unlock.found());
    }

    /// In a forked child: sets it free, whether the C library has done so or not.
    pub fn reset(&self) {
        call(self.reset.found());
    }
}

fn call(function: *const c_void) {
    // SAFETY: it is null or one of the functions above, which take nothing and return nothing.
    let function = unsafe { std::mem::transmute::<*const c_void, Option<unsafe extern "C" fn()>>(function) };
    if let Some(function) = function {
        // SAFETY: they have no precondition, but for the order in which `fork` calls them.
        unsafe { function() };
    }
}

/// What the program gives for a stream of its own, `cookie_io_functions_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CookieFunctions([*const c_void; 4]);

/// Functions that make a stream: the C library's own does it, while this thread's blocks are the stream's. A thread may
/// be cancelled in it, which unwinds through these frames; it allocates little from then on.
macro_rules! makers {
    ($($making:ident: $name:ident($($arg:ident: $type:ty),*);)*) => {$(
        /// As in the C library.
        ///
        /// # Safety
        /// As there.
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($arg: $type),*) -> *mut FILE {
            type Maker = unsafe extern "C-unwind" fn($($type),*) -> *mut FILE;
            static REAL: Real = Real::new(match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            });
            // SAFETY: it is null or the C library's function of that name, whose type this is.
            let real = unsafe { std::mem::transmute::<*const c_void, Option<Maker>>(REAL.address()) };
            let Some(real) = real else {
                set_errno(libc::ENOSYS);
                return std::ptr::null_mut();
            };
            watch();
            MAKING.set($making);
            // SAFETY: passed on as it came.
            let stream = unsafe { real($($arg),*) };
            MAKING.set(NOTHING);
            stream
        }
    )*};
}

makers! {
    STREAM: fopen(path: *const c_char, mode: *const c_char);
    STREAM: fopen64(path: *const c_char, mode: *const c_char);
    STREAM: fdopen(fd: c_int, mode: *const c_char);
    STREAM: tmpfile();
    STREAM: tmpfile64();
    STREAM: popen(command: *const c_char, mode: *const c_char);
    STREAM: fmemopen(buffer: *mut c_void, size: size_t, mode: *const c_char);
    STREAM: fopencookie(cookie: *mut c_void, mode: *const c_char, functions: CookieFunctions);
    STREAM_THEN_BUFFER: open_memstream(buffer: *mut *mut c_char, size: *mut size_t);
    STREAM_THEN_BUFFER: open_wmemstream(buffer: *mut *mut wchar_t, size: *mut size_t);
}
