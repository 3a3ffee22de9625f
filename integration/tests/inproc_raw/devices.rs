//! One process on two devices, which show its memory at other places and with other rights: what is known of the process
//! serves both, what is withdrawn is withdrawn from both, and what a mapping says holds on its device alone.

use crate::{LOOK, assert_untouched, connect, ram, take_pages, wait_until};
use guest_agent::client::packet;
use integration::frontend::ram::GuestRam;
use integration::frontend::raw::{RawGuest, RawVm, Record, mirror, userptr};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::sync::Arc;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno::EPERM;
use virtio_gpu_svm::protocol::event::{FaultRecord, JobRecord};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{BIND_READONLY, BindOp};

const A: u64 = 0x7000_0000_0000;
/// Of the process: data, then a page for results. A window, so one fault brings all of it.
const DATA: u64 = 15 * PAGE_SIZE;
const ALL: u64 = 16 * PAGE_SIZE;
/// Where the two devices show it.
const C: [u64; 2] = [0x20_0000_0000, 0x30_0004_0000];
/// CPU address - GPU address of the mirror on the second device.
const SHIFT: u64 = 1 << 44;

struct Rig {
    daemon: Svmd,
    ram: Arc<GuestRam>,
    guest: RawGuest,
    vms: [RawVm; 2],
    /// Guest-physical addresses of the process' pages, now.
    pages: Vec<u64>,
    seq: u64,
}

/// The data at its place on a device.
fn data(device: usize, readonly: bool) -> BindOp {
    let flags = if readonly { BIND_READONLY } else { 0 };
    BindOp { flags: flags.into(), ..userptr(C[device], A, DATA) }
}

impl Rig {
    /// The first device may only read the data, the second may write it, and mirrors it besides.
    fn start() -> Self {
        let daemon = Svmd::launch(&Options { devices: 2, engines: 2, ..Options::default() }).unwrap();
        let ram = ram(1);
        let mut guest = connect(&daemon, "vm0", &ram);
        guest.create_context(1).unwrap();
        let vms = [0, 1].map(|dev_id| guest.create_vm(1, dev_id).unwrap());
        let result = userptr(C[0] + DATA, A + DATA, PAGE_SIZE);
        assert_eq!(guest.bind(vms[0], &[data(0, true), result]).unwrap(), 0);
        let window = mirror(A - SHIFT, SHIFT.cast_signed(), ALL);
        assert_eq!(guest.bind(vms[1], &[data(1, false), window]).unwrap(), 0);
        let pages = take_pages(&ram, 16);
        Self { daemon, ram, guest, vms, pages, seq: 0 }
    }

    fn count(&self, name: &str) -> u64 {
        self.daemon.stat(&format!("/counters/{name}")).unwrap()
    }

    /// (raised, told to the guest, served from what is known) so far.
    fn faults(&self) -> (u64, u64, u64) {
        (self.count("faults_raised"), self.count("faults_reported"), self.count("faults_served_locally"))
    }

    fn context(&self) -> Value {
        self.daemon.call("context.get", json!({ "guest": "vm0", "ctx_id": 1 })).unwrap()
    }

    fn word(&self, page: usize) -> u64 {
        self.ram.load(self.pages[page]).unwrap()
    }

    /// Answers with the whole window.
    fn answer(&mut self, fault: &FaultRecord) {
        let pages: Vec<_> =
            (0..16).map(|page| A + page * PAGE_SIZE).zip(self.pages.iter().copied()).collect();
        assert_eq!(self.guest.answer(fault, &pages, self.seq).unwrap(), 0);
    }

    /// Answers whatever is asked until a job ends.
    fn serve(&mut self) -> JobRecord {
        loop {
            match self.guest.wait_record(|record| Some(*record)).unwrap() {
                Record::Fault(fault) => self.answer(&fault),
                Record::Job(job) => return job,
                // Invalidations are looked for elsewhere.
                Record::Notice(_) => {}
            }
        }
    }

    /// Runs a job to its end; returns its status.
    fn run(&mut self, device: usize, packet: Packet) -> i32 {
        self.guest.exec(self.vms[device], 0, 1, &[packet]).unwrap();
        self.serve().status.get()
    }

    /// A job that the next of its kind follows at once: the first device reads the data over and over, the second writes
    /// it at both its places.
    fn launch_endless(&mut self, device: usize) {
        let step = |step: u64| match (device, step % 2) {
            (0, _) => packet::reduce(C[0] + DATA, C[0], DATA),
            (_, 0) => packet::fill(C[1], DATA, step),
            _ => packet::fill(A - SHIFT, DATA, step),
        };
        self.guest.exec(self.vms[device], 0, 0, &(0..512).map(step).collect::<Vec<_>>()).unwrap();
    }

    /// Serves the guest until jobs of both devices have ended that began now.
    fn both_go_on(&mut self) {
        let mut ended = [0; 2];
        while ended.iter().any(|jobs| *jobs < 3) {
            let job = self.serve();
            assert_eq!(job.status.get(), 0, "{job:?}");
            let device = usize::try_from(job.dev_id.get()).unwrap();
            ended[device] += 1;
            self.launch_endless(device);
        }
    }

    /// The first word of the data as the first device sees it.
    fn read(&mut self) -> u64 {
        assert_eq!(self.run(0, packet::copy(C[0] + DATA, C[0], 8)), 0);
        self.word(15)
    }

    /// Withdraws everything, and waits until that is done.
    fn withdraw(&mut self) {
        self.seq = self.guest.invalidate(1, A, ALL).unwrap();
        wait_until("the invalidation", || self.context()["inval_done_seq"] == self.seq);
    }
}

#[test]
fn page_answered_for_one_device_serves_the_other() {
    let mut rig = Rig::start();
    rig.ram.store(rig.pages[0], 0xda7a_u64).unwrap();
    assert_eq!(rig.read(), 0xda7a);
    // The data was asked for; the results' page came along, in another mapping.
    assert_eq!(rig.faults(), (2, 1, 1));

    assert_eq!(rig.run(1, packet::fill(C[1], 8, 7)), 0);
    assert_eq!(rig.faults(), (3, 1, 2));
    assert_eq!(rig.run(1, packet::copy(A - SHIFT + PAGE_SIZE, A - SHIFT, 8)), 0);
    assert_eq!(rig.faults(), (4, 1, 3));
    assert_eq!((rig.word(0), rig.word(1)), (7, 7));
    // Nothing was known anew.
    assert_eq!(rig.read(), 7);
    assert_eq!(rig.faults(), (4, 1, 3));
}

#[test]
fn rights_of_a_mapping_hold_on_its_device_alone() {
    let mut rig = Rig::start();
    assert_eq!(rig.run(1, packet::fill(C[1], 8, 1)), 0);
    assert_eq!(rig.run(0, packet::fill(C[0], 8, 2)), -EPERM);
    assert_eq!((rig.word(0), rig.read()), (1, 1));
    assert_eq!(rig.run(1, packet::fill(C[1], 8, 3)), 0);

    // The other way round; the mirror beside it has rights of its own.
    for (device, readonly) in [(0, false), (1, true)] {
        assert_eq!(rig.guest.bind(rig.vms[device], &[data(device, readonly)]).unwrap(), 0);
    }
    assert_eq!(rig.run(1, packet::fill(C[1], 8, 4)), -EPERM);
    assert_eq!((rig.word(0), rig.read()), (3, 3));
    assert_eq!(rig.run(0, packet::fill(C[0], 8, 5)), 0);
    assert_eq!(rig.word(0), 5);
    assert_eq!(rig.run(1, packet::fill(A - SHIFT, 8, 6)), 0);
    assert_eq!((rig.word(0), rig.read()), (6, 6));
    let usable = rig.context()["vms"].as_array().unwrap().iter().all(|vm| vm["state"] == "usable");
    assert!(usable, "a write that is not allowed is the job's error only");
}

#[test]
fn one_invalidation_reaches_both_devices() {
    let mut rig = Rig::start();
    for device in [0, 0, 1, 1] {
        rig.launch_endless(device);
    }
    rig.both_go_on();
    for round in 0..8 {
        rig.withdraw();
        let old = std::mem::replace(&mut rig.pages, take_pages(&rig.ram, 16));
        for page in &old {
            rig.ram.write(*page, &[0xc5; 4096]).unwrap();
        }
        let read = || {
            let mut bytes = vec![0; 4096 * old.len()];
            for (page, bytes) in old.iter().zip(bytes.chunks_mut(4096)) {
                rig.ram.read(*page, bytes).unwrap();
            }
            bytes
        };
        assert_untouched("withdrawn pages", 2, LOOK, read);
        assert!(read().iter().all(|byte| *byte == 0xc5), "withdrawn pages were written");
        for vm in rig.context()["vms"].as_array().unwrap() {
            assert_eq!(vm["resident_pages"], 0, "round {round}: {vm}");
        }
        rig.both_go_on();
    }
}
