//! Mirrors of this process' memory.

#![expect(unsafe_code, reason = "functions with names that C programs call")]

use crate::connection::{NO_SVM, count};
use crate::failure::{Failure, call, call_void};
use crate::handle::{self, Mirror, Svm};
use crate::types::Device;
use std::ffi::{c_int, c_void};

/// What a function says of a mirror that is none.
pub(crate) const NO_MIRROR: &str = "`mirror` is NULL: make it by svm_mirror()";

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_mirror(svm: *mut Svm, dev_id: u32, out: *mut *mut Mirror) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        handle::check(out)?;
        let mirror = Mirror(svm.client.mirror(dev_id)?);
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::give(out, mirror) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_mirror_all(svm: *mut Svm, out: *mut *mut Mirror, room: usize) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let svm = unsafe { handle::of(svm, NO_SVM) }?;
        handle::check(out)?;
        let mirrors = svm.client.mirror_all()?;
        let told = count(mirrors.len())?;
        if mirrors.len() > room {
            // The missing room is what matters; what does not end now ends with the context.
            mirrors.into_iter().for_each(|mirror| drop(mirror.end()));
            return Err(Failure::Errno(libc::ENOBUFS, "there are more devices than `room`"));
        }
        for (index, mirror) in mirrors.into_iter().enumerate() {
            // SAFETY: it is not NULL, so the program has room for `room` handles there, and `index` is below that.
            unsafe { handle::give(out.wrapping_add(index), Mirror(mirror)) };
        }
        Ok(told)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_unmirror(mirror: *mut Mirror) {
    call_void(|| {
        // SAFETY: NULL, or a handle that is given back.
        if let Some(mirror) = unsafe { handle::take(mirror) } {
            // Best effort: what does not end now ends with the context.
            mirror.0.end().ok();
        }
    });
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_mirror_device(mirror: *const Mirror, out: *mut Device) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let mirror = unsafe { handle::of(mirror, NO_MIRROR) }?;
        handle::check(out)?;
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::put(out, Device::from(mirror.0.device())) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_device_address(
    mirror: *const Mirror,
    pointer: *const c_void,
    out: *mut u64,
) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let mirror = unsafe { handle::of(mirror, NO_MIRROR) }?;
        handle::check(out)?;
        if pointer.is_null() {
            return Err(Failure::Argument("`pointer` is NULL, which is no memory"));
        }
        let address = mirror.0.device_address(pointer)?;
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::put(out, address) };
        Ok(0)
    })
}
