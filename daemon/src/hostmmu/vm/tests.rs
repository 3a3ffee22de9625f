//! What a VM tells its worker about jobs whose time is over. A limit of nothing is over at once.

use super::*;
use crate::hostmmu::message::MAX_MESSAGE;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};

const RING: u32 = 5;
const TID: u32 = 77;
const ADDR: u64 = 0x40_0000;

/// A VM with one job, which its worker is at; and the worker's end.
fn running(job_limit: Option<Duration>) -> (VmState, OwnedFd) {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut state = VmState::new(1 << 30, 8, job_limit, Charge::default());
    state.submit(Job { id: JobId(1), ring_idx: RING, packets: vec![Packet::default()] });
    state.attach(Arc::new(ours));
    assert_eq!(orders(&theirs), [Order::Job { ring: RING, job: 1 }]);
    state.add_thread(RING, TID);
    (state, theirs)
}

fn orders(worker: &OwnedFd) -> Vec<Order> {
    let (mut all, mut buffer) = (vec![], vec![0; MAX_MESSAGE]);
    loop {
        match message::receive(worker, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((bytes, _)) => {
                all.push(Order::decode(message::parse(&buffer[..bytes]).unwrap().0).unwrap());
            }
            Err(Errno::AGAIN) => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

fn ended(errno: i32) -> JobEnd {
    JobEnd { errno, packet: 0, addr: GpuAddr(0), access: Access::Read }
}

#[test]
fn a_job_whose_time_is_over_is_stopped_once() {
    let (mut state, worker) = running(Some(Duration::ZERO));
    assert!(state.wants_attendant() && state.next_alarm().is_some());
    state.expire();
    state.expire();
    assert_eq!(orders(&worker), [Order::Stop { ring: RING, job: 1 }]);
    assert_eq!(state.next_alarm(), None);
    assert_eq!(state.finish(RING, ended(ETIMEDOUT)), Some((JobId(1), ended(ETIMEDOUT))));
}

#[test]
fn an_access_of_a_stopped_job_ends_it_and_is_not_told() {
    let (mut state, worker) = running(Some(Duration::ZERO));
    state.expire();
    assert!(state.park_missing(TID, ADDR, true, StopId(1)).is_none());
    let resume = Order::Resume { ring: RING, wait: Wait::Missing, abandon: true };
    let stop = Order::Stop { ring: RING, job: 1 };
    assert_eq!(orders(&worker), [stop, stop, resume]);
    let (_, end) = state.finish(RING, ended(ETIMEDOUT)).unwrap();
    assert_eq!((end.errno, end.addr, end.access), (ETIMEDOUT, GpuAddr(ADDR), Access::Write));
}

/// It was parked by a freeze that is over.
#[test]
fn an_access_that_has_a_translation_goes_on_and_is_not_told() {
    let (mut state, worker) = running(None);
    let run = Run { pages: 1, region: 1, offset: 0, writable: false };
    state.translations.insert(ADDR >> PAGE_SHIFT, run);
    assert!(state.park_missing(TID, ADDR, false, StopId(1)).is_none());
    assert_eq!(orders(&worker), [Order::Resume { ring: RING, wait: Wait::Missing, abandon: false }]);

    let (mut state, worker) = running(None);
    state.translations.insert(ADDR >> PAGE_SHIFT, run);
    assert!(state.park_missing(TID, ADDR, true, StopId(1)).is_some(), "a write needs more");
    assert_eq!(orders(&worker), []);
}

#[test]
fn a_job_that_ends_before_it_hears_of_its_stop_has_ended_well() {
    let (mut state, worker) = running(Some(Duration::ZERO));
    state.submit(Job { id: JobId(2), ring_idx: RING, packets: vec![Packet::default()] });
    state.expire();
    assert_eq!(state.finish(RING, ended(0)), Some((JobId(1), ended(0))));
    state.expire();
    let stops = [1, 2].map(|job| Order::Stop { ring: RING, job });
    assert_eq!(orders(&worker), [Order::Job { ring: RING, job: 2 }, stops[0], stops[1]]);
}

#[test]
fn no_clock_runs_at_a_fault_in_a_frozen_vm_or_without_a_limit() {
    let (mut state, worker) = running(Some(Duration::ZERO));
    assert!(state.park_missing(TID, ADDR, false, StopId(1)).is_some());
    state.expire();
    assert_eq!((orders(&worker), state.next_alarm()), (vec![], None));

    let (mut state, worker) = running(Some(Duration::ZERO));
    let flush = state.set_frozen(true);
    assert!(matches!(flush, Flush::Pending(_)));
    orders(&worker);
    state.expire();
    assert_eq!((orders(&worker), state.next_alarm()), (vec![], None));

    let (mut state, worker) = running(None);
    state.expire();
    assert_eq!((orders(&worker), state.next_alarm()), (vec![], None));
    assert!(!state.wants_attendant());
}

/// An alarm is news once: jobs that follow one another wake nobody for it.
#[test]
fn a_later_job_does_not_move_the_alarm() {
    let (mut state, _worker) = running(Some(Duration::from_secs(3600)));
    let alarm = state.next_alarm();
    assert!(alarm.is_some());
    state.finish(RING, ended(0));
    state.submit(Job { id: JobId(2), ring_idx: RING, packets: vec![Packet::default()] });
    assert!(!state.wants_attendant());
    assert_eq!(state.next_alarm(), alarm);
}
