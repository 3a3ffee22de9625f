//! Faults that nobody answers: they end in time, their GPU VM with them, and nobody else notices.

use crate::mock::{A, C, GPA, World, run};
use virtio_gpu_svm::device::{Access, Verdict};
use virtio_gpu_svm::protocol::control::PAGE_RESP_SUCCESS;
use virtio_gpu_svm::protocol::errno::{EINVAL, EPIPE, ETIMEDOUT};
use virtio_gpu_svm::protocol::event::{EVENT_CONTEXT_LOST, NoticeRecord};
use zerocopy::FromBytes;

#[test]
fn unanswered_fault_ends_and_only_its_gpu_vm_with_it() {
    let w = World::new();
    let (vm, asid) = w.mapped(1);
    let (_, other) = w.mapped(2);
    let late = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let joined = w.devices[0].raise(&w.host, asid, C + 8, Access::Read);
    let cookie = w.cookies()[0];
    w.let_deadline_pass();
    w.host.expire_faults();
    w.host.work_off();
    assert_eq!(w.devices[0].verdict(late), Some(Verdict::Fail(ETIMEDOUT)));
    assert_eq!(w.devices[0].verdict(joined), Some(Verdict::Fail(ETIMEDOUT)));
    let records = w.records();
    let lost = records.iter().map(|bytes| NoticeRecord::read_from_bytes(bytes).unwrap());
    let lost: Vec<_> = lost.filter(|notice| notice.kind.get() == EVENT_CONTEXT_LOST).collect();
    assert_eq!(lost.iter().map(|n| (n.ctx_id.get(), n.status.get())).collect::<Vec<_>>(), [(1, -ETIMEDOUT)]);
    assert_eq!(w.exec(1, vm), -EPIPE);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), -EINVAL);
    assert_eq!(w.guest.contexts()[0].vms[0].error, ETIMEDOUT);
    let fresh = w.devices[0].raise(&w.host, other, C, Access::Read);
    assert_eq!(w.respond(2, w.cookies()[0], PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert_eq!(w.devices[0].verdict(fresh), Some(Verdict::Retry));
}

#[test]
fn pause_longer_than_the_deadline_loses_nothing() {
    let w = World::new();
    let (_, asid) = w.mapped(1);
    let stop = w.devices[0].raise(&w.host, asid, C, Access::Read);
    let cookie = w.cookies()[0];
    w.guest.freeze();
    w.let_deadline_pass();
    w.host.expire_faults();
    w.host.work_off();
    w.guest.thaw();
    w.host.expire_faults();
    w.host.work_off();
    assert_eq!(w.devices[0].verdict(stop), None);
    assert_eq!(w.respond(1, cookie, PAGE_RESP_SUCCESS, &[run(A, GPA, 1, 0)]), 0);
    assert_eq!(w.devices[0].verdict(stop), Some(Verdict::Retry));
}
