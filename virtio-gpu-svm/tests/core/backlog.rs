//! What is left to the host's worker: guests take turns, whatever one of them has left.

use crate::inbox::without_waiting;
use crate::mock::{C, GPA, LIMITS, MEMORY, Port, World, region, table};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;
use virtio_gpu_svm::context::Launch;
use virtio_gpu_svm::device::{Access, Asid, StopId};
use virtio_gpu_svm::host::Limits;
use virtio_gpu_svm::protocol::MAX_RINGS;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::timeline::{Point, Timeline};

/// Contexts of the guest that has many.
const MANY: u32 = 30;
/// Contexts of the other one.
const FEW: u32 = 3;
/// What these guests may use.
pub const ROOM: Limits = Limits { contexts: 64, jobs: 4096, total_jobs: 65_536, ..LIMITS };
/// Jobs that one end sets free: more than an engine starts by itself.
pub const JOBS: u32 = 600;
/// Jobs of a slice.
const SLICE: usize = 64;

/// Two guests of one host.
pub fn two_guests() -> (World, World) {
    let few = World::with_limits(ROOM);
    let guest = few.host.open_guest("many", ROOM, &[0, 1], Arc::new(Port::default()));
    let many = few.beside(guest);
    many.guest.set_memory(table(&[region(2, GPA, MEMORY)]));
    many.hello(1);
    (few, many)
}

/// A context with a job whose end sets very many free. Returns that job.
pub fn gated(w: &World, ctx_id: u32) -> u64 {
    let (vm_id, _) = w.mapped(ctx_id);
    let context = w.guest.context(ctx_id).unwrap();
    let launch = |ring_idx, signal, waits| {
        let launch = Launch { timeline: Timeline { vm_id, ring_idx }, user_data: 0, signal, waits };
        context.exec(launch, vec![Packet::default()]).unwrap().0
    };
    let gate = launch(0, 1, vec![]);
    let timeline = Timeline { vm_id, ring_idx: 0 };
    for n in 0..JOBS {
        launch(1 + n % (MAX_RINGS - 1), 0, vec![Point { timeline, seqno: 1 }]);
    }
    gate
}

/// In front of each of the first guest's stands no more than `most` of the other's in a row.
fn assert_turns(are_few: &[bool], most: usize) {
    let mut turns: Vec<_> = are_few.split(|is_few| *is_few).map(<[bool]>::len).collect();
    assert!(turns.len() > usize::try_from(FEW).unwrap());
    let behind = turns.pop().unwrap();
    assert!(turns.iter().all(|others| *others <= most), "more than a slice between: {turns:?}");
    assert!(behind > most, "the other guest had no more to do than this one");
}

#[test]
fn work_of_many_contexts_takes_turns_of_their_guest() {
    let (few, many) = two_guests();
    let mut gates: Vec<_> = (1..=MANY).map(|ctx_id| gated(&many, ctx_id)).collect();
    gates.extend((1..=FEW).map(|ctx_id| gated(&few, ctx_id)));
    gates.into_iter().for_each(|gate| few.devices[0].end(&few.host, gate, 0));
    let started = few.devices[0].jobs().len();
    few.host.work_off();
    let told = few.devices[0].told();
    let is_few = |asid: &Asid| *told.vms[asid].guest == *"g";
    let order: Vec<_> = told.jobs[started..].iter().map(|(asid, _)| is_few(asid)).collect();
    assert_eq!(told.jobs.len(), usize::try_from((MANY + FEW) * JOBS).unwrap(), "all are started");
    assert_turns(&order, SLICE);
}

#[test]
fn deadlines_of_many_contexts_take_turns_of_their_guest() {
    let (few, many) = two_guests();
    let raise = |w: &World, ctx_id| {
        let (_, asid) = w.mapped(ctx_id);
        w.devices[0].raise(&w.host, asid, C, Access::Read)
    };
    (1..=MANY).for_each(|ctx_id| _ = raise(&many, ctx_id));
    let stops: Vec<StopId> = (1..=FEW).map(|ctx_id| raise(&few, ctx_id)).collect();
    few.let_deadline_pass();
    few.host.expire_faults();
    // Asked again before it is done, it is not done twice.
    few.host.expire_faults();
    few.host.work_off();
    let resumed = few.devices[0].told().resumed.clone();
    assert_eq!(resumed.len(), usize::try_from(MANY + FEW).unwrap(), "each once");
    assert_turns(&resumed.iter().map(|(stop, _)| stops.contains(stop)).collect::<Vec<_>>(), 1);
}

/// A worker waits, or is about to; then `act` must end the wait.
fn ends_wait(act: impl FnOnce(&World)) {
    let (w, _) = two_guests();
    w.mapped(1);
    let ((begin, begun), (end, ended), host) = (channel(), channel(), Arc::clone(&w.host));
    let worker = std::thread::spawn(move || {
        begin.send(()).unwrap();
        host.wait_for_work(Duration::MAX);
        end.send(()).unwrap();
    });
    begun.recv().unwrap();
    // Most often it waits by then; that it may not yet be there is no reason to fail.
    (0..1000).for_each(|_| std::thread::yield_now());
    act(&w);
    without_waiting(move || ended.recv().unwrap());
    worker.join().unwrap();
}

#[test]
fn work_that_is_left_ends_the_workers_wait() {
    ends_wait(|w| assert_eq!(w.guest.evict(1, None), Ok(0)));
}

#[test]
fn worker_is_woken_while_it_waits_and_before() {
    ends_wait(|w| w.host.wake_worker());
    let (w, _) = two_guests();
    w.host.wake_worker();
    let host = Arc::clone(&w.host);
    without_waiting(move || host.wait_for_work(Duration::MAX));
    w.host.wait_for_work(Duration::ZERO);
}
