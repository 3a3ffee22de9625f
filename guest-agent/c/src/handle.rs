//! What handles point to, and the only places where a pointer of a C program is followed.
//!
//! A handle is a box that the program owns; all that it holds may be used by several threads. What the header asks of
//! programs is what makes these functions sound: pointers are NULL or as the header says, and a handle is given back once,
//! when no other call with it is under way.

#![expect(unsafe_code, reason = "follows pointers of C programs")]

use crate::failure::{Failure, Result};
use guest_agent::client::{self, Arena, Client, Events};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

/// `struct svm`.
#[derive(Debug)]
pub struct Svm {
    pub(crate) client: Client,
    /// Once a descriptor was asked for.
    pub(crate) events: OnceLock<Events>,
    /// Memory of `svm_map`, by address.
    pub(crate) arenas: Mutex<HashMap<usize, Arena>>,
}

/// `struct svm_mirror`.
#[derive(Debug)]
pub struct Mirror(pub(crate) client::Mirror);

/// `struct svm_job`.
#[derive(Debug)]
pub struct Job(pub(crate) client::Job);

/// What a handle points to.
///
/// # Safety
/// `handle` is NULL or a handle of type `T` that is not given back before the result's last use.
pub unsafe fn of<'a, T>(handle: *const T, what: &'static str) -> Result<&'a T> {
    // SAFETY: the caller's handle is NULL or points to a `T` that `give` made; nobody changes it but through its locks.
    unsafe { handle.as_ref() }.ok_or(Failure::Argument(what))
}

/// Checks a pointer to where something is to be written, before that is made.
pub fn check<T>(out: *mut T) -> Result<()> {
    if out.is_null() { Err(Failure::Argument("`out` is NULL: name a place for the result")) } else { Ok(()) }
}

/// Writes a result.
///
/// # Safety
/// `out` is writable.
pub unsafe fn put<T>(out: *mut T, value: T) {
    // SAFETY: the caller's pointer is writable.
    unsafe { out.write(value) };
}

/// Makes a handle and writes it.
///
/// # Safety
/// `out` is writable.
pub unsafe fn give<T>(out: *mut *mut T, value: T) {
    // SAFETY: passed on.
    unsafe { put(out, Box::into_raw(Box::new(value))) };
}

/// Takes a handle back; NULL is none.
///
/// # Safety
/// `handle` is NULL or a handle of type `T` that nobody uses any more.
pub unsafe fn take<T>(handle: *mut T) -> Option<Box<T>> {
    if handle.is_null() {
        return None;
    }
    // SAFETY: `give` made it from a box, and the caller gives it up.
    Some(unsafe { Box::from_raw(handle) })
}

/// Values of a program's array.
///
/// # Safety
/// `values` is NULL or points to `count` values, which nobody changes before the result's last use.
pub unsafe fn list<'a, T>(values: *const T, count: usize, what: &'static str) -> Result<&'a [T]> {
    if values.is_null() {
        return Err(Failure::Argument(what));
    }
    // SAFETY: as the caller says.
    Ok(unsafe { std::slice::from_raw_parts(values, count) })
}
