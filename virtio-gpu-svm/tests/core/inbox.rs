//! Who serves many guests waits for the command of none: engines report, the worker passes by, records are delivered,
//! while the lock of a context is held; and nothing of it is lost.

use crate::backlog::{JOBS, ROOM, gated, two_guests};
use crate::mock::{A, C, GPA, MEMORY, Port, World, notices, region, run, table, unmap};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::protocol::errno::ETIMEDOUT;
use virtio_gpu_svm::protocol::event::{
    EVENT_CONTEXT_RETIRED, EVENT_FAULT, EVENT_INVAL_DONE, EVENT_JOB_DONE, EVENT_QUIET,
};

/// Far more than anything here takes: who waits for a guest waits for ever.
const LONG: Duration = Duration::from_secs(20);

/// No record.
const NOTHING: [u32; 0] = [];

/// The same world on another thread.
fn same(w: &World) -> World {
    w.beside(w.guest.clone())
}

/// Does something as an engine or the worker would, and fails if that waits for who holds the lock.
#[track_caller]
pub fn without_waiting<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = channel();
    spawn(move || done.send(act()).unwrap());
    let Ok(result) = end.recv_timeout(LONG) else { panic!("it waits for who holds the lock, or failed") };
    result
}

/// A thread that is in the midst of something, mostly with a lock in hand.
struct Busy {
    go: Sender<()>,
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Busy {
    fn in_midst_of((inside, go): (Receiver<()>, Sender<()>), act: impl FnOnce() + Send + 'static) -> Self {
        let (end, done) = channel();
        let thread = spawn(move || {
            act();
            end.send(()).unwrap();
        });
        inside.recv().unwrap();
        Self { go, done, thread }
    }
    #[track_caller]
    fn end(self) {
        self.go.send(()).unwrap();
        let Ok(()) = self.done.recv_timeout(LONG) else { panic!("it waits for something, or failed") };
        self.thread.join().unwrap();
    }
}

/// An unmap of the first page.
fn unmaps(w: &World, vm_id: u32, asid: u32) -> Busy {
    let there = same(w);
    Busy::in_midst_of(w.devices[0].close_gate(asid), move || {
        assert_eq!(there.bind(1, vm_id, &[unmap(C, 1)]), 0);
    })
}

/// A look of the operator's.
fn looks(w: &World, asid: u32) -> Busy {
    let there = same(w);
    Busy::in_midst_of(w.devices[0].close_gate(asid), move || drop(there.guest.context_summaries()))
}

fn kinds(w: &World) -> Vec<u32> {
    notices(w).into_iter().map(|(kind, ..)| kind).collect()
}

#[test]
fn reports_during_a_command_do_not_wait_for_it_and_come_in_order() {
    let (a, b) = two_guests();
    let (vm_id, asid) = a.mapped(1);
    assert_eq!(a.exec(1, vm_id), 0);
    a.devices[0].told().busy = true;
    let (seq, done) = a.invalidate(1, A, 4096);
    assert!(done < seq, "engines have not passed");
    let (_, other) = b.mapped(1);
    assert_eq!(b.supply(1, &[run(A, GPA, 1, 0)]), 0);

    let command = unmaps(&a, vm_id, asid);
    let (mine, others) = (same(&a), same(&b));
    let (stop, served) = without_waiting(move || {
        let device = &mine.devices[0];
        let stop = device.raise(&mine.host, asid, C + 8192, Access::Read);
        device.end_job(&mine.host, 0);
        device.pass(&mine.host);
        (stop, device.raise(&others.host, other, C, Access::Read))
    });
    assert_eq!(a.devices[0].verdict(served), Some(Verdict::Retry), "the other guest is served meanwhile");
    assert_eq!(kinds(&a), NOTHING, "nothing of this one is known yet");
    command.end();
    assert_eq!(kinds(&a), [EVENT_FAULT, EVENT_JOB_DONE, EVENT_INVAL_DONE]);
    assert_eq!(a.devices[0].verdict(stop), None, "it waits for the guest");
    a.host.work_off();
    assert_eq!(kinds(&a), NOTHING, "each came once");
    assert_eq!(a.invalidate(1, A, 4096).1, seq);
}

#[test]
fn many_reports_during_a_command_are_all_carried_out_behind_it() {
    const MANY: usize = 100;
    let (a, _) = two_guests();
    let (vm_id, asid) = a.mapped(1);
    (0..MANY).for_each(|_| assert_eq!(a.exec(1, vm_id), 0));
    let command = unmaps(&a, vm_id, asid);
    let mine = same(&a);
    without_waiting(move || (0..MANY).for_each(|_| mine.devices[0].end_job(&mine.host, 0)));
    command.end();
    assert_eq!(kinds(&a), [EVENT_JOB_DONE; MANY], "none is left to the worker");
}

#[test]
fn retirement_during_a_command_does_not_wait_for_it() {
    let (a, _) = two_guests();
    let (vm_id, asid) = a.mapped(1);
    let (gone, _) = a.create_vm(1, 1);
    a.guest.context(1).unwrap().vm_destroy(gone).unwrap();
    let (seq, done) = a.invalidate(1, A, 4096);
    assert!(done < seq, "engines may be in the GPU VM that was destroyed");

    let command = unmaps(&a, vm_id, asid);
    let mine = same(&a);
    without_waiting(move || mine.devices[1].retire_all(&mine.host));
    command.end();
    assert_eq!(kinds(&a), [EVENT_INVAL_DONE]);
    assert_eq!(a.guest.context(1).unwrap().inval_done_seq(), seq);
    assert_eq!(a.host.devices()[1].retiring, 0);
}

#[test]
fn reports_during_a_look_are_carried_out_by_the_worker() {
    let (a, _) = two_guests();
    let (_, asid) = a.mapped(1);
    let look = looks(&a, asid);
    let mine = same(&a);
    without_waiting(move || mine.devices[0].raise(&mine.host, asid, C, Access::Read));
    look.end();
    assert_eq!(kinds(&a), NOTHING, "an operator's thread does not work for guests");
    a.host.work_off();
    assert_eq!(kinds(&a), [EVENT_FAULT]);
}

#[test]
fn report_goes_behind_those_that_lie_there() {
    let (a, _) = two_guests();
    let (vm_id, asid) = a.mapped(1);
    (0..2).for_each(|_| assert_eq!(a.exec(1, vm_id), 0));
    let [first, second] = a.devices[0].jobs()[..] else { panic!("two jobs") };
    let look = looks(&a, asid);
    let mine = same(&a);
    without_waiting(move || mine.devices[0].end(&mine.host, first, 0));
    without_waiting({
        let mine = same(&a);
        move || _ = mine.devices[0].raise(&mine.host, asid, C, Access::Read)
    });
    look.end();
    // The lock is free, and the worker has not come yet.
    a.devices[0].end(&a.host, second, 0);
    assert_eq!(kinds(&a), [EVENT_JOB_DONE, EVENT_FAULT, EVENT_JOB_DONE]);
}

#[test]
fn worker_passes_by_a_context_whose_lock_is_held() {
    let (a, b) = two_guests();
    let gates = [gated(&a, 1), gated(&b, 1)];
    let asid = a.devices[0].told().vms.iter().find(|(_, label)| *label.guest == *"g").unwrap().0.0;
    gates.into_iter().for_each(|gate| a.devices[0].end(&a.host, gate, 0));
    let started = |name: &str| {
        let told = a.devices[0].told();
        told.jobs.iter().filter(|(asid, _)| *told.vms[asid].guest == *name).count()
    };
    let (jobs, before) = (usize::try_from(JOBS).unwrap(), started("g"));
    let look = looks(&a, asid);
    let mine = same(&a);
    without_waiting(move || mine.host.work_off());
    assert_eq!((started("g"), started("many")), (before, jobs), "the other guest's work is done");
    assert!(before < jobs);
    look.end();
    a.host.work_off();
    assert_eq!(started("g"), jobs, "the worker comes again");
}

#[test]
fn delivery_passes_by_a_context_whose_lock_is_held() {
    let (a, _) = two_guests();
    let ((_, asid), (_, other)) = (a.mapped(1), a.mapped(2));
    a.devices[0].raise(&a.host, asid, C, Access::Read);
    a.devices[0].raise(&a.host, other, C, Access::Read);
    let look = looks(&a, asid);
    let mine = same(&a);
    let told = without_waiting(move || notices(&mine));
    assert_eq!(told.iter().map(|(_, ctx_id, _)| *ctx_id).collect::<Vec<_>>(), [2]);
    look.end();
    a.host.work_off();
    assert_eq!(notices(&a).iter().map(|(_, ctx_id, _)| *ctx_id).collect::<Vec<_>>(), [1]);
}

#[test]
fn deadlines_pass_by_a_context_whose_lock_is_held() {
    let (a, b) = two_guests();
    let ((_, asid), (_, other)) = (a.mapped(1), b.mapped(1));
    let mine = a.devices[0].raise(&a.host, asid, C, Access::Read);
    let others = b.devices[0].raise(&b.host, other, C, Access::Read);
    a.let_deadline_pass();
    let expire = |w: World| {
        w.host.expire_faults();
        w.host.work_off();
    };
    let look = looks(&a, asid);
    let there = same(&a);
    without_waiting(move || expire(there));
    let late = Some(Verdict::Fail(ETIMEDOUT));
    assert_eq!((a.devices[0].verdict(mine), b.devices[0].verdict(others)), (None, late));
    look.end();
    expire(same(&a));
    assert_eq!(a.devices[0].verdict(mine), late, "it is as late at the next look");
}

#[test]
fn engine_leaves_the_rest_of_what_it_has_set_free_where_the_lock_is_held() {
    let (a, _) = two_guests();
    let port = Arc::new(Port::default());
    let w = a.beside(a.host.open_guest("third", ROOM, &[0, 1], Arc::clone(&port) as _));
    w.guest.set_memory(table(&[region(3, GPA, MEMORY)]));
    w.hello(1);
    let gate = gated(&w, 1);
    let asid = w.devices[0].told().vms.last_key_value().unwrap().0.0;
    let mine = same(&w);
    let engine = Busy::in_midst_of(port.close_gate(), move || mine.devices[0].end(&mine.host, gate, 0));
    let look = looks(&w, asid);
    engine.end();
    let jobs = usize::try_from(JOBS).unwrap();
    assert!(w.devices[0].jobs().len() < jobs);
    look.end();
    w.host.work_off();
    assert_eq!(w.devices[0].jobs().len(), jobs, "the worker has started them");
}

#[test]
fn who_waits_for_engines_hears_what_they_have_reported() {
    let (a, _) = two_guests();
    let (_, asid) = a.mapped(1);
    let (gone, _) = a.create_vm(1, 1);
    a.guest.context(1).unwrap().vm_destroy(gone).unwrap();
    let look = looks(&a, asid);
    let mine = same(&a);
    without_waiting(move || mine.devices[1].retire_all(&mine.host));
    look.end();
    // The worker has not come, and need not.
    let mine = same(&a);
    without_waiting(move || mine.guest.freeze());
}

#[test]
fn retirement_while_the_guest_is_changed_is_told_by_the_worker() {
    let (a, _) = two_guests();
    a.mapped(1);
    a.guest.freeze();
    let there = same(&a);
    let hello = Busy::in_midst_of(a.close_gate_of_clock(), move || {
        assert_eq!(there.hello(2).retiring.get(), 1);
    });
    let mine = same(&a);
    without_waiting(move || mine.devices[0].retire_all(&mine.host));
    hello.end();
    assert_eq!(kinds(&a), NOTHING, "the guest has not heard of it yet");
    a.host.work_off();
    assert_eq!(kinds(&a), [EVENT_QUIET]);
}

#[test]
fn retirement_while_the_guest_is_changed_is_found_by_who_waits_for_it() {
    let (a, _) = two_guests();
    a.mapped(1);
    a.destroy_context(1);
    let there = same(&a);
    let freeze = Busy::in_midst_of(a.close_gate_of_clock(), move || there.guest.freeze());
    let mine = same(&a);
    without_waiting(move || mine.devices[0].retire_all(&mine.host));
    // The worker has not come, and need not.
    freeze.end();
    a.guest.thaw();
    assert_eq!(kinds(&a), [EVENT_CONTEXT_RETIRED]);
}
