//! A VMM that disappears after each message of a session, and inside each message, with jobs running and faults
//! pending: the session ends, nothing is left, and the next one is served.

use crate::rig::{Daemon, play};
use crate::script::{Step, session};
use crate::vmm::Vmm;

/// Plays the first `steps`, and then so many bytes of the next, if it is a message.
fn play_until(vmm: &mut Vmm, steps: usize, bytes: usize) {
    let mut first = session();
    let next = first.split_off(steps).into_iter().next();
    play(vmm, first);
    match next {
        Some(Step::Message(message)) if bytes > 0 => vmm.send(&message, bytes),
        Some(Step::Late(message)) if bytes > 0 => {
            let message = message(vmm);
            vmm.send(&message, bytes);
        }
        _ => {}
    }
}

/// The bytes after which a VMM leaves inside a message of this length: all, or those around its parts.
fn cuts(length: usize, all: bool) -> Vec<usize> {
    let header = 12;
    let mut cuts =
        if all { (1..length).collect() } else { vec![1, header - 1, header, header + 1, length - 1] };
    cuts.retain(|cut| *cut < length);
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

#[test]
fn vmm_that_leaves_at_any_message_leaves_nothing() {
    let daemon = Daemon::start();
    let all = std::env::var_os("SVM_TIMES").is_some();
    let steps = session();
    let (mut boundaries, mut inside) = (0, 0);
    for at in 0..=steps.len() {
        daemon.leaving_nothing(&format!("after {at} steps"), |daemon| {
            daemon.session(|vmm| play_until(vmm, at, 0));
        });
        boundaries += 1;
        let length = match steps.get(at) {
            Some(Step::Message(message)) => message.bytes().len(),
            // The index of a ring.
            Some(Step::Late(_)) => 20,
            _ => continue,
        };
        for cut in cuts(length, all) {
            daemon.leaving_nothing(&format!("after {at} steps and {cut} bytes"), |daemon| {
                daemon.session(|vmm| play_until(vmm, at, cut));
            });
            inside += 1;
        }
    }
    daemon.leaving_nothing("a whole session", |daemon| daemon.session(|vmm| play(vmm, session())));
    println!("{boundaries} boundaries, {inside} places inside messages");
}
