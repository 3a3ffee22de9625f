//! The same again and again: the process holds as much as before.

use crate::control;
use crate::rig::{Daemon, play};
use crate::script::{create, destroy, handshake, hello, session, up, work};
use crate::vmm::Vmm;
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_RETIRED, NoticeRecord};

/// How often, unless SVM_TIMES says.
pub fn times(default: u32) -> u32 {
    std::env::var("SVM_TIMES").ok().map_or(default, |text| text.parse().unwrap())
}

fn again(default: u32, what: &str, act: impl Fn(&Daemon)) {
    let (daemon, times) = (Daemon::start(), times(default));
    daemon.leaving_nothing(&format!("{times} times {what}"), |daemon| (0..times).for_each(|_| act(daemon)));
    println!("{times} times {what}: no descriptor, thread, asid or byte more");
}

#[test]
fn connections_leave_nothing() {
    again(300, "connect and leave", |daemon| daemon.session(|_| ()));
}

#[test]
fn handshakes_leave_nothing() {
    again(300, "a handshake", |daemon| daemon.session(|vmm| play(vmm, handshake())));
}

#[test]
fn sessions_with_faults_and_jobs_leave_nothing() {
    again(50, "a session with contexts, faults and jobs", |daemon| {
        daemon.session(|vmm| play(vmm, session()));
    });
}

/// A context on both devices, with a fault that is answered and a job, in a session that goes on.
pub fn live_and_die(vmm: &mut Vmm) {
    create(vmm, 1);
    work(vmm, 1);
    destroy(vmm, 1);
    let retired: NoticeRecord = vmm.record(EVENT_CONTEXT_RETIRED);
    assert_eq!(retired.ctx_id.get(), 1);
}

#[test]
fn contexts_leave_nothing_in_a_session_that_goes_on() {
    let (daemon, times) = (Daemon::start(), times(1000));
    let growing = std::cell::Cell::new(0);
    daemon.leaving_nothing("a session", |daemon| {
        daemon.session(|vmm| {
            play(vmm, up());
            hello(vmm, 7);
            live_and_die(vmm);
            let before = crate::heap::live();
            (0..times).for_each(|_| live_and_die(vmm));
            growing.set(crate::heap::live().wrapping_sub(before).cast_signed());
        });
    });
    println!("{times} contexts in one session: {} bytes more", growing.get());
    assert!(growing.get() < 4096, "{} bytes more after {times} contexts", growing.get());
}

#[test]
fn guests_leave_nothing() {
    again(300, "guest.add and guest.remove", |daemon| {
        assert!(daemon.add("vm1"));
        assert!(daemon.registry.remove("vm1"));
    });
}

#[test]
fn control_connections_leave_nothing() {
    again(1000, "a control connection", |daemon| {
        let answer = control(&daemon.path("control"), "stats.get", "{}");
        assert!(answer["error"].is_null(), "{answer}");
    });
}
