//! What the allocator library tells about this process, if it is there.

#![expect(unsafe_code, reason = "calls a function that is looked up by its name")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// As `struct svm_alloc_session` (alloc/include/svm_alloc.h).
#[repr(C)]
pub(super) struct Session {
    ctx_id: u32,
    socket: [c_char; 108],
}

type Ask = unsafe extern "C" fn(*mut Session) -> c_int;

impl Session {
    /// Asks the library. `None`: it is not loaded, or has no context.
    pub(super) fn of_process() -> Option<Self> {
        // SAFETY: the name ends with a zero.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"svm_alloc_session".as_ptr()) };
        // SAFETY: it is null or the library's function of that name, whose type this is.
        let ask = unsafe { std::mem::transmute::<*mut c_void, Option<Ask>>(found) }?;
        let mut session = Self { ctx_id: 0, socket: [0; 108] };
        // SAFETY: the pointer is to a session that lives here.
        let told = unsafe { ask(&raw mut session) };
        (told == 0).then_some(session)
    }

    pub(super) fn ctx_id(&self) -> u32 {
        self.ctx_id
    }

    /// Where the agent listens.
    pub(super) fn path(&self) -> &Path {
        // SAFETY: the library ends the name with a zero, within the array.
        let name = unsafe { CStr::from_ptr(self.socket.as_ptr()) };
        Path::new(OsStr::from_bytes(name.to_bytes()))
    }
}
