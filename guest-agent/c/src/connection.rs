//! Connections, devices, memory.

#![expect(unsafe_code, reason = "functions with names that C programs call")]

use crate::failure::{Failure, Result, call, call_void};
use crate::handle::{self, Svm};
use crate::types::Device;
use guest_agent::client::Client;
use guest_agent::driver::dma::PAGE_BYTES;
use std::collections::HashMap;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

pub(crate) const NO_SVM: &str = "`svm` is NULL: open it by svm_open() or svm_connect()";

fn svm(client: Client) -> Svm {
    Svm { client, events: OnceLock::new(), arenas: Mutex::default() }
}

/// A count as C functions return it.
pub(crate) fn count(count: usize) -> Result<c_int> {
    c_int::try_from(count).map_err(|_| Failure::Errno(libc::EOVERFLOW, "more than an int can count"))
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_open(out: *mut *mut Svm) -> c_int {
    call(|| {
        handle::check(out)?;
        let opened = svm(Client::of_process()?);
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::give(out, opened) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_connect(socket: *const c_char, out: *mut *mut Svm) -> c_int {
    call(|| {
        handle::check(out)?;
        let path = if socket.is_null() {
            Client::default_socket()
        } else {
            // SAFETY: it is not NULL, so it is a text that ends with a zero.
            let name = unsafe { CStr::from_ptr(socket) };
            PathBuf::from(OsStr::from_bytes(name.to_bytes()))
        };
        let opened = svm(Client::connect(path)?);
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::give(out, opened) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_close(svm: *mut Svm) {
    call_void(|| {
        // SAFETY: NULL, or a handle that is given back.
        if let Some(svm) = unsafe { handle::take(svm) } {
            let arenas = std::mem::take(&mut *svm.arenas.lock().unwrap_or_else(PoisonError::into_inner));
            for (_, arena) in arenas {
                // Best effort: what the agent does not take now it takes with the context.
                arena.free().ok();
            }
        }
    });
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_devices(svm: *mut Svm, out: *mut Device, room: usize) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        if room > 0 {
            handle::check(out)?;
        }
        let devices = svm.client.devices()?;
        let told = count(devices.len())?;
        for (index, device) in devices.iter().take(room).enumerate() {
            // SAFETY: it is not NULL, so the program has room for `room` devices there, and `index` is below that.
            unsafe { handle::put(out.wrapping_add(index), Device::from(device)) };
        }
        Ok(told)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_fd(svm: *mut Svm) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        if let Some(events) = svm.events.get() {
            return Ok(events.as_raw_fd());
        }
        let events = svm.client.events()?;
        Ok(svm.events.get_or_init(|| events).as_raw_fd())
    })
}

fn arenas(svm: &Svm) -> std::sync::MutexGuard<'_, HashMap<usize, guest_agent::client::Arena>> {
    svm.arenas.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_map(
    svm: *mut Svm,
    address: *mut c_void,
    length: usize,
    out: *mut *mut c_void,
) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        handle::check(out)?;
        if length == 0 || isize::try_from(length).is_err() || !address.addr().is_multiple_of(PAGE_BYTES) {
            return Err(Failure::Argument("`length` is 0 or too large, or `address` is no multiple of 4096"));
        }
        let at = (!address.is_null()).then(|| address.addr());
        let arena = svm.client.arena(length, at)?;
        let mapped = arena.as_ptr();
        arenas(svm).insert(mapped.addr(), arena);
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::put(out, mapped.cast()) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_unmap(svm: *mut Svm, address: *mut c_void) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        if address.is_null() {
            return Err(Failure::Argument("`address` is NULL"));
        }
        let arena = arenas(svm).remove(&address.addr());
        match arena {
            Some(arena) => {
                arena.free()?;
                Ok(0)
            }
            None => Err(Failure::Errno(libc::ENOENT, "no memory of svm_map() with this handle begins there")),
        }
    })
}
