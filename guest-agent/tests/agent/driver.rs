//! Commands and waiting, below the agent.

use crate::mock::{Mock, device, eventually};
use guest_agent::driver::SvmDevice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

fn post(device: &SvmDevice, token: u64) {
    device.post_page_response(token, 0, token, 1, &[]).unwrap();
}

/// A thread that waits for its invalidation asks now and then whether to go on. Whoever is asked may need a lock under
/// which the pump asks for sequences.
#[test]
fn waiting_thread_holds_no_lock_while_it_asks_whether_to_go_on() {
    let (mock, device) = device();
    let other = device.clone();
    let done = device.wait_done(7, 1, move || {
        let (sender, asked) = mpsc::channel();
        let other = other.clone();
        std::thread::spawn(move || sender.send(other.accepted(7)));
        assert_eq!(asked.recv_timeout(Duration::from_secs(10)), Ok(0), "asking for a sequence was held up");
        true
    });
    assert!(!done);
    mock.end();
}

/// However many posted commands wait for room, a command that somebody waits for gets its turn.
#[test]
fn storm_of_posted_commands_does_not_keep_a_call_out() {
    const STORM: u64 = 400;
    let (mock, device): (Arc<Mock>, Arc<SvmDevice>) = device();
    (0..STORM).for_each(|token| post(&device, token));
    let called = Arc::new(AtomicBool::new(false));
    let caller = {
        let (device, called) = (device.clone(), called.clone());
        std::thread::spawn(move || {
            device.hello(5).unwrap();
            called.store(true, Ordering::Release);
        })
    };
    let mut token = STORM;
    while !called.load(Ordering::Acquire) {
        assert!(token < 100 * STORM, "the call was kept out");
        for _ in device.pump(Duration::from_millis(20)).unwrap().completions {
            post(&device, token);
            token += 1;
        }
    }
    caller.join().unwrap();
    mock.end();
    eventually("answered", || !mock.look().answers.is_empty());
}
