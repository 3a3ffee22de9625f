//! What C programs are told of errors: a negative errno, and a text for the thread that says what to do.

#![expect(unsafe_code, reason = "functions with names that C programs call")]

use guest_agent::client;
use std::cell::RefCell;
use std::error::Error;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call fails.
pub enum Failure {
    /// An argument.
    Argument(&'static str),
    /// The client library says so.
    Client(client::Error),
    /// Another errno, positive, with its text.
    Errno(c_int, &'static str),
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        Self::Client(error)
    }
}

/// Outcome of a call's body: what it returns where it succeeds.
pub type Result<T> = std::result::Result<T, Failure>;

thread_local! {
    static TEXT: RefCell<CString> = RefCell::default();
}

/// Runs a call's body.
pub fn call(body: impl FnOnce() -> Result<c_int>) -> c_int {
    // What a panic leaves behind is whole: the client library's locks are taken as they are, and outputs are written last.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => value,
        Ok(Err(failure)) => {
            let (errno, text) = told(&failure);
            keep(text);
            -errno
        }
        Err(_) => {
            keep(
                "libgpusvm has failed; what it printed before says where. End the program and report it"
                    .into(),
            );
            -libc::ENOTRECOVERABLE
        }
    }
}

/// Runs the body of a call that returns nothing.
pub fn call_void(body: impl FnOnce()) {
    call(|| {
        body();
        Ok(0)
    });
}

fn told(failure: &Failure) -> (c_int, String) {
    match failure {
        Failure::Argument(text) => (libc::EINVAL, (*text).into()),
        Failure::Errno(errno, text) => (*errno, (*text).into()),
        Failure::Client(error) => (errno_of(error), with_causes(error)),
    }
}

fn keep(text: String) {
    let text = CString::new(text.replace('\0', "?")).unwrap_or_default();
    // Fails in a thread that is ending: then nobody can ask.
    TEXT.try_with(|kept| *kept.borrow_mut() = text).ok();
}

fn with_causes(error: &client::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// The errno of an error, positive.
pub fn errno_of(error: &client::Error) -> c_int {
    use client::Error;
    let of_system = |source: &std::io::Error, otherwise| source.raw_os_error().unwrap_or(otherwise);
    match error {
        Error::NotReachable { source, .. } => of_system(source, libc::ENOTCONN),
        Error::NoAllocator => libc::ENOTCONN,
        Error::NotTheAgent { .. } => libc::EACCES,
        Error::HungUp | Error::Lost { .. } => libc::EPIPE,
        Error::Socket(source) | Error::Maps(source) => of_system(source, libc::EIO),
        // What the agent sends is no errno if it is not negative.
        Error::Refused { status, .. } if *status < 0 && *status > -4096 => -status,
        Error::Refused { .. } | Error::BadReply { .. } => libc::EPROTO,
        Error::Map { source, .. } => of_system(source, libc::ENOMEM),
        Error::NoDescriptor => libc::EMFILE,
        Error::Forked => libc::ECHILD,
        Error::NoDevice { .. } => libc::ENOENT,
        Error::NothingToMirrorOn => libc::ENODEV,
        Error::NoFaults { .. } => libc::EOPNOTSUPP,
        Error::DoesNotFit { .. } => libc::ERANGE,
        Error::OutOfReach { .. } => libc::EFAULT,
        Error::Job(error) if error.errno > 0 && error.errno < 4096 => error.errno,
        Error::Job(_) => libc::EPROTO,
    }
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn svm_error() -> *const c_char {
    // An ending thread has none any more.
    TEXT.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// See the header.
#[unsafe(no_mangle)]
pub extern "C" fn svm_version() -> u32 {
    let number = |text: &str| text.parse().unwrap_or(0);
    number(env!("CARGO_PKG_VERSION_MAJOR")) << 16 | number(env!("CARGO_PKG_VERSION_MINOR"))
}
