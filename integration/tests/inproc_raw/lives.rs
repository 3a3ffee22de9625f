//! Pauses, resets and new incarnations, with jobs that write without end and faults that nobody has answered.

use crate::{LOOK, assert_untouched, connect, ram, take_pages, wait_until};
use guest_agent::client::packet;
use integration::frontend::ram::GuestRam;
use integration::frontend::raw::{RawGuest, RawVm, Record, userptr};
use integration::svmd::{DeviceKind, Options, Svmd};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno::{ENOENT, ETIMEDOUT};
use virtio_gpu_svm::protocol::event::{EVENT_QUIET, FaultRecord, NoticeRecord};
use virtio_gpu_svm::protocol::job::Packet;

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// Pages that a context's jobs write without end.
const WRITTEN: u64 = 128;
/// Pages behind them, each of which a job waits for.
const AWAITED: u64 = 4;
/// What names the jobs that write.
const WRITER: u64 = 1000;
const WRITERS: u64 = 8;
const CONTEXTS: [u32; 2] = [1, 2];
/// Much shorter than the pause, and long enough for a busy host.
const DEADLINE_MS: u32 = 2000;
const PAUSE_LOOKS: u32 = 6;
const PAUSE_LOOK: Duration = Duration::from_millis(500);

struct Rig {
    daemon: Svmd,
    guest: RawGuest,
    ram: Arc<GuestRam>,
    /// Of each context, by CPU page from A on.
    pages: Vec<Vec<u64>>,
    vms: Vec<RawVm>,
    /// Faults that nobody has answered.
    awaited: Vec<FaultRecord>,
}

impl Rig {
    fn start(kind: DeviceKind) -> Self {
        let engines = if kind == DeviceKind::Soft { 2 } else { 1 };
        let more = format!("[limits]\nfault_deadline_ms = {DEADLINE_MS}\n");
        let options = Options { devices: 1, kind, engines, more, ..Options::default() };
        let daemon = Svmd::launch(&options).unwrap();
        let ram = ram(1);
        let guest = connect(&daemon, "vm0", &ram);
        let count = usize::try_from(WRITTEN + AWAITED + 1).unwrap();
        let pages = CONTEXTS.iter().map(|_| take_pages(&ram, count)).collect();
        Self { daemon, guest, ram, pages, vms: vec![], awaited: vec![] }
    }

    fn page(&self, ctx_id: u32, page: u64) -> u64 {
        self.pages[usize::try_from(ctx_id - 1).unwrap()][usize::try_from(page).unwrap()]
    }

    fn answer(&mut self, fault: &FaultRecord) -> i32 {
        let at = fault.cpu_addr.get();
        let gpa = self.page(fault.ctx_id.get(), (at - A) / PAGE_SIZE);
        self.guest.answer(fault, &[(at, gpa)], 0).unwrap()
    }

    /// Contexts that write without end, each with jobs behind that wait for pages.
    fn keep_busy(&mut self) {
        self.vms.clear();
        self.awaited.clear();
        for ctx_id in CONTEXTS {
            self.guest.create_context(ctx_id).unwrap();
            let vm = self.guest.create_vm(ctx_id, 0).unwrap();
            self.vms.push(vm);
            let op = userptr(C, A, (WRITTEN + AWAITED + 1) * PAGE_SIZE);
            assert_eq!(self.guest.bind(vm, &[op]).unwrap(), 0);
            self.guest.exec(vm, 0, 0, &[packet::fill(C, WRITTEN * PAGE_SIZE, 1)]).unwrap();
            for page in 0..WRITTEN {
                let fault = self.guest.wait_fault(ctx_id).unwrap();
                assert_eq!(
                    fault.cpu_addr.get(),
                    A + page * PAGE_SIZE,
                    "a page is known that nobody supplied"
                );
                assert_eq!(self.answer(&fault), 0);
            }
            assert_eq!(self.guest.wait_job(ctx_id).unwrap().status.get(), 0);
        }
        for vm in self.vms.clone() {
            for job in 0..AWAITED {
                let at = C + (WRITTEN + job) * PAGE_SIZE;
                let timeline = u32::try_from(job + 1).unwrap();
                self.guest.exec(vm, timeline, job, &[packet::fill(at, 8, 0xf111 + job)]).unwrap();
            }
            for _ in 0..AWAITED {
                self.awaited.push(self.guest.wait_fault(vm.ctx_id).unwrap());
            }
        }
        for vm in self.vms.clone() {
            for job in 0..WRITERS {
                self.guest.exec(vm, 0, WRITER + job, &writes()).unwrap();
            }
        }
    }

    fn context(&self, ctx_id: u32) -> Value {
        self.daemon.call("context.get", json!({ "guest": "vm0", "ctx_id": ctx_id })).unwrap()
    }

    fn status(&self) -> Value {
        self.daemon.guest("vm0").unwrap()["status"].take()
    }

    /// With the rings stopped, nothing at all is written.
    fn assert_ram_untouched(&self, what: &str, looks: u32, pause: Duration) {
        assert_untouched(what, looks, pause, || self.ram.contents().unwrap());
    }

    /// With running rings, the daemon may still say in them when it wants to be notified.
    fn assert_processes_untouched(&self, what: &str) {
        let first = usize::try_from(self.ram.drivers_end()).unwrap();
        assert_untouched(what, 3, LOOK, || self.ram.contents().unwrap().split_off(first));
    }
}

/// Different words each time, so that no write goes unseen.
fn writes() -> Vec<Packet> {
    (0..1024).map(|step| packet::fill(C, WRITTEN * PAGE_SIZE, step)).collect()
}

fn pause_longer_than_the_deadline(kind: DeviceKind) {
    let mut rig = Rig::start(kind);
    rig.keep_busy();
    rig.guest.pause().unwrap();
    let generations = CONTEXTS.map(|ctx_id| rig.context(ctx_id)["generation"].take());
    assert_eq!(rig.status()["frozen"], true);
    for ctx_id in CONTEXTS {
        let jobs = rig.context(ctx_id)["jobs"].as_u64().unwrap();
        assert!(jobs > AWAITED, "context {ctx_id} had written all before the pause");
    }
    rig.assert_ram_untouched("paused", PAUSE_LOOKS, PAUSE_LOOK);
    rig.guest.resume().unwrap();

    for fault in std::mem::take(&mut rig.awaited) {
        assert_eq!(rig.answer(&fault), 0, "a fault was lost in the pause: {fault:?}");
    }
    for ctx_id in CONTEXTS {
        let mut ended: Vec<u64> = (0..AWAITED + WRITERS)
            .map(|_| {
                let job = rig.guest.wait_job(ctx_id).unwrap();
                assert_eq!(job.status.get(), 0, "{job:?}");
                job.user_data.get()
            })
            .collect();
        ended.sort_unstable();
        assert_eq!(ended, (0..AWAITED).chain(WRITER..WRITER + WRITERS).collect::<Vec<_>>());
        for job in 0..AWAITED {
            assert_eq!(rig.ram.load::<u64>(rig.page(ctx_id, WRITTEN + job)).unwrap(), 0xf111 + job);
        }
    }
    assert_eq!(CONTEXTS.map(|ctx_id| rig.context(ctx_id)["generation"].take()), generations);

    // The deadline was in force all the time.
    let vm = rig.vms[0];
    let at = C + (WRITTEN + AWAITED) * PAGE_SIZE;
    rig.guest.exec(vm, 0, 7, &[packet::fill(at, 8, 1)]).unwrap();
    assert_eq!(rig.guest.wait_job(vm.ctx_id).unwrap().status.get(), -ETIMEDOUT);
}

#[test]
fn pause_longer_than_the_deadline_loses_nothing() {
    pause_longer_than_the_deadline(DeviceKind::Soft);
}

#[test]
fn pause_longer_than_the_deadline_loses_nothing_on_hostmmu() {
    pause_longer_than_the_deadline(DeviceKind::Hostmmu);
}

/// How a driver's life ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The next one says HELLO on running rings.
    Hello,
    /// The rings stop and start from nothing.
    RingStop,
    /// The VMM resets the device.
    Reset,
}

fn quiet(record: &Record) -> Option<NoticeRecord> {
    match record {
        Record::Notice(notice) if notice.kind.get() == EVENT_QUIET => Some(*notice),
        _ => None,
    }
}

/// Returns how often the new life had to wait for the old one.
fn lives_follow_each_other(kind: DeviceKind) -> usize {
    let mut rig = Rig::start(kind);
    let mut waited = 0;
    let ends = [End::Hello, End::RingStop, End::Reset].repeat(2);
    for (incarnation, end) in (2..).zip(ends) {
        rig.keep_busy();
        match end {
            End::Hello => {}
            End::RingStop => rig.guest.pause().unwrap(),
            End::Reset => rig.guest.vmm().reset_device().unwrap(),
        }
        if !matches!(end, End::Hello) {
            assert_eq!(rig.status()["frozen"], true);
            rig.assert_ram_untouched("rings stopped", 2, LOOK);
            rig.guest.begin_anew().unwrap();
        }
        let retiring = rig.guest.hello(incarnation).unwrap().retiring.get();
        if retiring > 0 {
            let told = rig.guest.wait_record(quiet).unwrap();
            assert_eq!(told.value.get(), incarnation);
            waited += 1;
        }
        // What stands in the buffers by now came before the answer to HELLO, or is QUIET.
        rig.guest.take_records().unwrap();
        rig.assert_processes_untouched("after a new incarnation");
        assert_nothing_is_left(&mut rig, end);
    }
    rig.daemon.stop().unwrap();
    waited
}

fn assert_nothing_is_left(rig: &mut Rig, end: End) {
    let records = rig.guest.take_records().unwrap();
    assert!(records.is_empty(), "{end:?}: records of the life before: {records:?}");
    for fault in std::mem::take(&mut rig.awaited) {
        assert_eq!(rig.answer(&fault), -ENOENT, "{end:?}");
    }
    for vm in rig.vms.clone() {
        assert_eq!(rig.guest.bind(vm, &[userptr(C, A, PAGE_SIZE)]).unwrap(), -ENOENT, "{end:?}");
    }
    let status = rig.status();
    for count in ["contexts", "retiring", "resources", "pending_faults"] {
        assert_eq!(status[count], 0, "{end:?}: {count} of the life before: {status}");
    }
    assert_eq!(rig.daemon.stat("/gpu_vms").unwrap(), 0);
    wait_until("devices let go", || {
        let devices = rig.daemon.call("device.list", json!({})).unwrap();
        devices["devices"][0]["retiring"] == 0
    });
}

#[test]
fn new_incarnation_finds_nothing_of_the_old_one() {
    assert!(lives_follow_each_other(DeviceKind::Soft) > 0, "no life had to wait for the one before");
}

#[test]
fn new_incarnation_finds_nothing_of_the_old_one_on_hostmmu() {
    assert!(lives_follow_each_other(DeviceKind::Hostmmu) > 0, "no life had to wait for the one before");
}
