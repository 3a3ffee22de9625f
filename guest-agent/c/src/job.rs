//! Jobs: launched, waited for, asked.

#![expect(unsafe_code, reason = "functions with names that C programs call")]

use crate::failure::{self, Failure, Result, call, call_void};
use crate::handle::{self, Job, Mirror};
use crate::mirror::NO_MIRROR;
use crate::types::{self, Packet};
use guest_agent::client;
use std::ffi::c_int;
use std::time::Duration;
use virtio_gpu_svm::protocol::{MAX_PACKETS, MAX_RINGS, job};

const NO_JOB: &str = "`job` is NULL: launch it by svm_submit()";

/// Launches a job.
///
/// # Safety
/// `mirror` is NULL or a handle in use; `packets` is NULL or points to `count` packets.
unsafe fn launch(
    mirror: *mut Mirror,
    ring: u32,
    packets: *const Packet,
    count: usize,
) -> Result<client::Job> {
    // SAFETY: as the caller says.
    let mirror = unsafe { handle::of(mirror, NO_MIRROR) }?;
    let most = usize::try_from(MAX_PACKETS).unwrap_or(usize::MAX);
    if count == 0 || count > most {
        return Err(Failure::Argument("`count` is 0 or above SVM_MAX_PACKETS"));
    }
    if ring >= MAX_RINGS {
        return Err(Failure::Argument("`ring` is not below SVM_MAX_RINGS"));
    }
    // SAFETY: as the caller says.
    let packets = unsafe { handle::list(packets, count, "`packets` is NULL") }?;
    let packets: Vec<job::Packet> = packets.iter().map(Into::into).collect();
    Ok(mirror.0.exec(ring, &packets, 0)?)
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_run(
    mirror: *mut Mirror,
    ring: u32,
    packets: *const Packet,
    count: usize,
) -> c_int {
    call(|| {
        // SAFETY: as the header says.
        let job = unsafe { launch(mirror, ring, packets, count) }?;
        job.wait()?;
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_submit(
    mirror: *mut Mirror,
    ring: u32,
    packets: *const Packet,
    count: usize,
    out: *mut *mut Job,
) -> c_int {
    call(|| {
        handle::check(out)?;
        // SAFETY: as the header says.
        let job = unsafe { launch(mirror, ring, packets, count) }?;
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::give(out, Job(job)) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_job_poll(job: *mut Job) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let job = unsafe { handle::of(job, NO_JOB) }?;
        Ok(c_int::from(job.0.try_wait()?))
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_job_wait(job: *mut Job, timeout_ms: c_int) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let job = unsafe { handle::of(job, NO_JOB) }?;
        let timeout = match u64::try_from(timeout_ms) {
            Ok(0) => return Ok(c_int::from(job.0.try_wait()?)),
            Ok(timeout) => Duration::from_millis(timeout),
            Err(_) if timeout_ms == -1 => Duration::MAX,
            Err(_) => return Err(Failure::Argument("`timeout_ms` is below -1")),
        };
        Ok(c_int::from(job.0.wait_timeout(timeout)?))
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_job_failure(job: *mut Job, out: *mut types::Failure) -> c_int {
    call(|| {
        // SAFETY: NULL, or a handle in use.
        let job = unsafe { handle::of(job, NO_JOB) }?;
        handle::check(out)?;
        let error = match job.0.try_wait() {
            Ok(_) => return Err(Failure::Errno(libc::EAGAIN, "the job has not failed")),
            Err(error @ client::Error::Forked) => return Err(error.into()),
            Err(error) => error,
        };
        let plain = types::Failure { error: -failure::errno_of(&error), ..types::Failure::default() };
        let told = match &error {
            client::Error::Job(end) => {
                types::Failure { packet: end.packet, address: end.addr, access: end.access, ..plain }
            }
            _ => plain,
        };
        // SAFETY: it is not NULL, so the program has room there.
        unsafe { handle::put(out, told) };
        Ok(0)
    })
}

/// See the header.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn svm_job_free(job: *mut Job) {
    // SAFETY: NULL, or a handle that is given back.
    call_void(|| drop(unsafe { handle::take(job) }));
}
