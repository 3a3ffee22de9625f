//! Guests whose driver does as the test says, one command and one answer at a time, on a daemon of their own each: real
//! sockets, rings, engines and guest memory. So a test decides when a fault is answered and when records are taken, and
//! nobody but it and the daemon writes guest memory.
//!
//! * `memory`: memory comes and goes under running jobs.
//! * `lives`: pause, reset and new incarnations with jobs in flight and faults pending.
//! * `fairness`: who storms delays no other's record by more than one.
//! * `mappings`: as many as are allowed, and one more.
//! * `devices`: one process on two devices, with mappings that differ.
//! * `workers`: what processes of a device may do.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod devices;
mod fairness;
mod lives;
mod mappings;
mod memory;
mod workers;

use integration::frontend::Profile;
use integration::frontend::ram::{GuestRam, Layout};
use integration::frontend::raw::RawGuest;
use integration::svmd::Svmd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After so long without what is waited for a test has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at memory that nobody may write.
const LOOK: Duration = Duration::from_millis(20);

fn ram(seed: u64) -> Arc<GuestRam> {
    GuestRam::new(Layout::Flat { bytes: 48 << 20 }, seed).unwrap()
}

fn connect(daemon: &Svmd, guest: &str, ram: &Arc<GuestRam>) -> RawGuest {
    let mut guest = RawGuest::connect(&daemon.socket(guest), ram, Profile::Qemu).unwrap();
    guest.hello(1).unwrap();
    guest
}

/// Guest-physical addresses of pages that nothing else uses.
fn take_pages(ram: &GuestRam, count: usize) -> Vec<u64> {
    ram.take_pages(count).unwrap().into_iter().map(|page| page * 4096).collect()
}

/// Waits until `done`; the daemon tells nobody.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not yet");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Looks at memory again and again; not a byte of it may change.
fn assert_untouched(what: &str, looks: u32, pause: Duration, read: impl Fn() -> Vec<u8>) {
    let before = read();
    for look in 1..=looks {
        std::thread::sleep(pause);
        let now = read();
        // Compared as a whole first, which is much faster.
        let changed = (now != before).then(|| now.iter().zip(&before).position(|(now, then)| now != then));
        assert_eq!(changed, None, "{what}: the byte there had changed at look {look}");
    }
}
