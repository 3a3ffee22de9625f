//! What the allocator library tells about this process, if it is there.

#![expect(unsafe_code, reason = "calls a function that is looked up by its name")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes of a socket's name, and of the zero after it.
pub const SOCKET_NAME: usize = 108;

/// What the allocator library tells: `struct svm_alloc_session` (alloc/include/svm_alloc.h).
#[repr(C)]
pub struct Session {
    /// The context to join.
    pub ctx_id: u32,
    /// The agent's socket, a C string.
    pub socket: [c_char; SOCKET_NAME],
}

type Ask = unsafe extern "C" fn(*mut Session) -> c_int;
type AskWhy = unsafe extern "C" fn(*const c_void, *const c_void, *const c_void, *mut c_char, usize) -> usize;

/// Most bytes of what the library says of an address.
const MAX_WHY: usize = 512;

/// Why GPUs do not reach an address in the mapping `within`, as the library has it, and what to do. `None`: it is not
/// loaded, or does not know.
pub(super) fn why(address: u64, within: &Range<u64>) -> Option<String> {
    // SAFETY: the name ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"svm_alloc_why".as_ptr()) };
    // SAFETY: it is null or the library's function of that name, whose type this is.
    let ask = unsafe { std::mem::transmute::<*mut c_void, Option<AskWhy>>(found) }?;
    let [address, start, end] = [address, within.start, within.end]
        .map(|at| usize::try_from(at).map_or(std::ptr::null(), std::ptr::without_provenance));
    let mut text = [0; MAX_WHY];
    // SAFETY: the text has as much room; the library reads nothing at the addresses.
    let len = unsafe { ask(address, start, end, text.as_mut_ptr(), text.len()) };
    let text = text.get(..len).filter(|text| !text.is_empty())?;
    Some(
        String::from_utf8_lossy(&text.iter().map(|byte| byte.cast_unsigned()).collect::<Vec<u8>>())
            .into_owned(),
    )
}

/// Whether this program has rights that whoever started it has not (setuid, setgid, capabilities), who must not choose its
/// agent then.
pub(super) fn is_secure() -> bool {
    // SAFETY: any type may be asked for; one that is not there gives 0.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

impl Session {
    /// Asks the library. `None`: it is not loaded, or has no context.
    pub(super) fn of_process() -> Option<Self> {
        // SAFETY: the name ends with a zero.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"svm_alloc_session".as_ptr()) };
        // SAFETY: it is null or the library's function of that name, whose type this is.
        let ask = unsafe { std::mem::transmute::<*mut c_void, Option<Ask>>(found) }?;
        let mut session = Self { ctx_id: 0, socket: [0; SOCKET_NAME] };
        // SAFETY: the pointer is to a session that lives here.
        let told = unsafe { ask(&raw mut session) };
        (told == 0).then_some(session)
    }

    /// Where the agent listens.
    pub(super) fn path(&self) -> &Path {
        // SAFETY: the library ends the name with a zero, within the array.
        let name = unsafe { CStr::from_ptr(self.socket.as_ptr()) };
        Path::new(OsStr::from_bytes(name.to_bytes()))
    }
}
