//! Fair service, counted in records and answers: two processes storm, and have their faults answered only when everybody
//! else is through; others of the same guest and of another one do single faults.
//!
//! The stormed guest posts event buffers only while all records that can come are waiting, so what is told in which
//! order does not depend on who is faster.

use crate::{connect, ram, take_pages, wait_until};
use guest_agent::client::packet;
use integration::frontend::Profile;
use integration::frontend::raw::{RECORDS_PER_BUFFER, RawGuest, RawVm, Record, userptr};
use integration::frontend::vmm::Vmm;
use integration::svmd::{Options, Svmd};
use serde_json::json;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::event::FaultRecord;

/// `pending_faults` of the daemon.
const LIMIT: usize = 16;
const STORMS: [u32; 2] = [1, 3];
const VICTIM: u32 = 2;
/// Jobs of a storm, each on a timeline of its own, and pages that each touches.
const JOBS: u64 = 64;
const JOB_PAGES: u64 = 64;
/// Times that every victim is served.
const ROUNDS: u64 = 25;
/// Faults of the victim in a round, each of a job of its own.
const SINGLES: u64 = 4;

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;

#[test]
fn storm_delays_no_other_by_more_than_a_record_each() {
    let mut rig = Rig::set_up();
    let mut answered = 0;
    for round in 0..ROUNDS {
        rig.launch_singles(round);
        rig.wait_pending();
        let faults = rig.take_faults(LIMIT * STORMS.len() + usize::try_from(SINGLES).unwrap());
        assert_turns(&faults);
        let (singles, storms): (Vec<_>, Vec<_>) =
            faults.into_iter().partition(|fault| fault.ctx_id.get() == VICTIM);
        rig.finish_singles(&singles);
        rig.serve_elsewhere(round);
        if round + 1 < ROUNDS {
            // As late as can be, and never all of them.
            answered += storms.len();
            storms.iter().for_each(|fault| rig.answer(fault));
        }
    }
    // The storms' last faults are never answered, and nobody minds.
    let counters = |name: &str| rig.daemon.stat(&format!("/counters/{name}")).unwrap();
    let singles = ROUNDS * (SINGLES + 1);
    let storms = u64::try_from(answered + LIMIT * STORMS.len()).unwrap();
    assert_eq!(counters("faults_reported"), singles + storms);
    assert_eq!(counters("jobs_done"), singles);
    assert!(counters("faults_throttled") > 0, "the limit was never reached");
}

struct Rig {
    daemon: Svmd,
    guest: RawGuest,
    elsewhere: RawGuest,
    victim: RawVm,
    other: RawVm,
    /// Guest-physical address behind every CPU address.
    gpa: u64,
    other_gpa: u64,
}

impl Rig {
    fn set_up() -> Self {
        let more = format!("[limits]\npending_faults = {LIMIT}\n");
        let guests = vec!["vm0".into(), "vm1".into()];
        let options = Options { guests, devices: 1, engines: 2, more, ..Options::default() };
        let daemon = Svmd::launch(&options).unwrap();
        let (memory, other_memory) = (ram(1), ram(2));
        let vmm = Vmm::without_cpu(&daemon.socket("vm0"), &memory, Profile::Qemu).unwrap();
        let mut guest = RawGuest::without_event_buffers(vmm).unwrap();
        guest.hello(1).unwrap();
        let mut elsewhere = connect(&daemon, "vm1", &other_memory);
        let other = make_vm(&mut elsewhere, VICTIM);
        let victim = make_vm(&mut guest, VICTIM);
        for ctx_id in STORMS {
            let vm = make_vm(&mut guest, ctx_id);
            for job in 0..JOBS {
                let page = |step| C + (job * JOB_PAGES + step) * PAGE_SIZE;
                let packets: Vec<_> = (0..JOB_PAGES).map(|step| packet::fill(page(step), 8, step)).collect();
                guest.exec(vm, u32::try_from(job).unwrap(), job, &packets).unwrap();
            }
        }
        let (gpa, other_gpa) = (take_pages(&memory, 1)[0], take_pages(&other_memory, 1)[0]);
        Self { daemon, guest, elsewhere, victim, other, gpa, other_gpa }
    }

    fn launch_singles(&mut self, round: u64) {
        for job in 0..SINGLES {
            let at = C + (round * SINGLES + job) * PAGE_SIZE;
            let timeline = u32::try_from(job).unwrap();
            self.guest.exec(self.victim, timeline, job, &[packet::fill(at, 8, 1)]).unwrap();
        }
    }

    fn pending(&self, ctx_id: u32) -> usize {
        let context = self.daemon.call("context.get", json!({ "guest": "vm0", "ctx_id": ctx_id })).unwrap();
        usize::try_from(context["pending_faults"].as_u64().unwrap()).unwrap()
    }

    /// Waits until everything that can be pending is.
    fn wait_pending(&self) {
        for ctx_id in STORMS {
            wait_until("storm", || {
                let pending = self.pending(ctx_id);
                assert!(pending <= LIMIT, "{pending} faults of context {ctx_id} are pending");
                pending == LIMIT
            });
        }
        let singles = usize::try_from(SINGLES).unwrap();
        wait_until("single faults", || self.pending(VICTIM) == singles);
    }

    /// Takes exactly `count` records, all of faults.
    fn take_faults(&mut self, count: usize) -> Vec<FaultRecord> {
        self.guest.post_event_buffers(count.div_ceil(RECORDS_PER_BUFFER)).unwrap();
        let mut records = vec![];
        while records.len() < count {
            records.push(self.guest.wait_record(|record| Some(*record)).unwrap());
        }
        records.extend(self.guest.take_records().unwrap());
        assert_eq!(records.len(), count, "more faults than may be pending");
        let fault = |record: &Record| match record {
            Record::Fault(fault) => *fault,
            other => panic!("{other:?}"),
        };
        records.iter().map(fault).collect()
    }

    fn answer(&mut self, fault: &FaultRecord) {
        let pages = [(fault.cpu_addr.get(), self.gpa)];
        assert_eq!(self.guest.answer(fault, &pages, 0).unwrap(), 0);
    }

    /// Answers the victim: all its jobs end, and nobody else has anything to say meanwhile.
    fn finish_singles(&mut self, faults: &[FaultRecord]) {
        faults.iter().for_each(|fault| self.answer(fault));
        let mut ended = 0;
        while ended < faults.len() {
            self.guest.post_event_buffers(1).unwrap();
            let first = self.guest.wait_record(|record| Some(*record)).unwrap();
            for record in [vec![first], self.guest.take_records().unwrap()].concat() {
                let Record::Job(job) = record else { panic!("{record:?}") };
                assert_eq!((job.ctx_id.get(), job.status.get()), (VICTIM, 0));
                ended += 1;
            }
        }
    }

    /// A single fault in another guest: a record, an answer, the end of the job, and nothing else.
    fn serve_elsewhere(&mut self, round: u64) {
        let at = C + round * PAGE_SIZE;
        self.elsewhere.exec(self.other, 0, round, &[packet::fill(at, 8, 1)]).unwrap();
        let fault = self.elsewhere.wait_fault(VICTIM).unwrap();
        let pages = [(fault.cpu_addr.get(), self.other_gpa)];
        assert_eq!(self.elsewhere.answer(&fault, &pages, 0).unwrap(), 0);
        let job = self.elsewhere.wait_job(VICTIM).unwrap();
        assert_eq!((job.user_data.get(), job.status.get()), (round, 0));
        assert_eq!(self.elsewhere.unclaimed_records().unwrap(), []);
    }
}

fn make_vm(guest: &mut RawGuest, ctx_id: u32) -> RawVm {
    guest.create_context(ctx_id).unwrap();
    let vm = guest.create_vm(ctx_id, 0).unwrap();
    assert_eq!(guest.bind(vm, &[userptr(C, A, JOBS * JOB_PAGES * PAGE_SIZE)]).unwrap(), 0);
    vm
}

/// In front of each record of the victim stands at most one of each other context since the victim's last one.
fn assert_turns(faults: &[FaultRecord]) {
    let order: Vec<u32> = faults.iter().map(|fault| fault.ctx_id.get()).collect();
    let mut turns: Vec<_> = order.split(|ctx_id| *ctx_id == VICTIM).collect();
    // Behind the victim's last record the others are among themselves.
    turns.pop();
    for turn in turns {
        for storm in STORMS {
            let records = turn.iter().filter(|ctx_id| **ctx_id == storm).count();
            assert!(records <= 1, "context {storm} goes before context {VICTIM} {records} times: {order:?}");
        }
    }
}
