//! Commands and waiting, below the agent.

use crate::mock::{Mock, device, device_with, eventually};
use guest_agent::driver::{Error, Posted, SvmDevice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::gpu::{CmdSubmit, CtrlHdr, VIRTIO_GPU_CMD_SUBMIT_3D};
use zerocopy::IntoBytes;

fn answer(token: u64) -> Posted {
    SvmDevice::page_response(token, (0, token), 1, &[]).unwrap()
}

fn post(device: &SvmDevice, token: u64) {
    device.post_all(vec![answer(token)]).unwrap();
}

#[test]
fn commands_that_are_posted_together_ring_once() {
    let (mock, device) = device_with(false);
    let before = mock.doorbells();
    device.post_all((0..30).map(answer).collect()).unwrap();
    assert_eq!(mock.doorbells() - before, 1);
    let mut tokens = Vec::new();
    while tokens.len() < 30 {
        let pump = device.pump(Duration::from_millis(20)).unwrap();
        tokens.extend(pump.completions.iter().map(|completion| completion.token));
    }
    assert_eq!(tokens, (0..30).collect::<Vec<u64>>());
    device.post_all(Vec::new()).unwrap();
    assert_eq!(mock.doorbells() - before, 1, "nothing to tell");
    mock.end();
}

#[test]
fn command_that_is_too_large_is_not_sent_and_neither_are_those_beside_it() {
    let (mock, device) = device();
    let large = Posted { request: vec![0; 8 << 20], ..answer(2) };
    assert!(matches!(device.post_all(vec![answer(1), large]), Err(Error::TooLarge { .. })));
    device.post_all(vec![answer(3)]).unwrap();
    let mut tokens = Vec::new();
    while tokens.is_empty() {
        let pump = device.pump(Duration::from_millis(20)).unwrap();
        tokens.extend(pump.completions.iter().map(|completion| completion.token));
    }
    assert_eq!(tokens, [3]);
    mock.end();
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
    let (began, mut token) = (Instant::now(), STORM);
    while !called.load(Ordering::Acquire) {
        assert!(began.elapsed() < Duration::from_secs(30), "the call was kept out");
        for _ in device.pump(Duration::from_millis(20)).unwrap().completions {
            post(&device, token);
            token += 1;
        }
    }
    caller.join().unwrap();
    mock.end();
    eventually("answered", || !mock.look().answers.is_empty());
}

/// One user has far more before the device than there is room for. The command of another one waits for what is in the
/// ring, and for one that is before it: not for the rest.
#[test]
fn large_commands_of_one_user_do_not_keep_those_of_another_waiting() {
    const COMMANDS: usize = 200;
    let (mock, device) = device();
    let creating = {
        let device = device.clone();
        let create = move |(ctx_id, user)| device.ctx_create(ctx_id, user, "test").unwrap().status();
        std::thread::spawn(move || [(1, 1000), (2, 1000), (3, 1001)].map(create))
    };
    while !creating.is_finished() {
        device.pump(Duration::from_millis(20)).unwrap();
    }
    assert_eq!(creating.join().unwrap(), [0; 3]);
    mock.script(|script| script.stalled = true);
    let large = |n: usize| {
        let head = submission(u32::try_from(n % 2).unwrap() + 1);
        Posted { token: 1, request: [head, vec![0xff; 200 << 10]].concat(), response_len: 4096 }
    };
    device.post_all((0..COMMANDS).map(large).collect()).unwrap();
    device.post_all(vec![SvmDevice::page_response(2, (3, 77), 1, &[]).unwrap()]).unwrap();
    mock.script(|script| script.stalled = false);
    let mut order = Vec::new();
    eventually("all", || {
        let pump = device.pump(Duration::from_millis(20)).unwrap();
        order.extend(pump.completions.iter().map(|completion| completion.token));
        order.len() == COMMANDS + 1
    });
    let before = order.iter().position(|token| *token == 2).unwrap();
    // 20 of them fill the ring's memory.
    assert!(before <= 22, "{before} of {COMMANDS} went first");
    mock.end();
}

fn submission(ctx_id: u32) -> Vec<u8> {
    let hdr = CtrlHdr { kind: VIRTIO_GPU_CMD_SUBMIT_3D.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() };
    CmdSubmit { hdr, ..CmdSubmit::default() }.as_bytes().to_vec()
}
