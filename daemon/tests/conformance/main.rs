//! What every device does, asked of each kind through `trait Device` alone: real engines, real processes, real faults.

#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::cast_possible_truncation, reason = "small numbers of the tests")]

mod faults;
mod limits;
mod packets;
mod rig;

use rig::{Kind, Rig};
use std::io::Write;
use std::time::Duration;

/// Runs a test on every kind of device.
fn on_each(test: impl Fn(Rig)) {
    on_each_limited(None, test);
}

/// Runs a test on every kind of device, whose jobs may take so long.
fn on_each_limited(job_limit: Option<Duration>, test: impl Fn(Rig)) {
    test(Rig::limited(Kind::Soft, job_limit));
    if has_userfaultfd() {
        test(Rig::limited(Kind::HostMmu { budget: daemon::hostmmu::DEFAULT_BUDGET }, job_limit));
    }
}

/// Whether this kernel has what `hostmmu` needs. Without it, its half of the tests is skipped, loudly; not in CI.
fn has_userfaultfd() -> bool {
    let Err(error) = daemon::hostmmu::probe() else { return true };
    assert!(std::env::var_os("CI").is_none(), "hostmmu cannot be tested here: {error}");
    // Not captured by the test harness, unlike eprintln.
    let warning = format!("hostmmu is NOT tested here: {error}\n");
    std::io::stderr().write_all(warning.as_bytes()).unwrap();
    false
}
