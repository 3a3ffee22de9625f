//! What a hostile driver or VMM can write into rings, or say about them, on each of the three queues: every case has one
//! exact outcome, costs no more than a visit may, leaves the guest's other queues and another guest alone, and is over
//! when the rings are stopped.

mod bystander;
mod cases;
mod driver;

use crate::spec;
use bystander::Bystander;
use cases::{Case, Want};
use config::{Device, DeviceKind};
use daemon::devices::Devices;
use daemon::limits::Limits;
use daemon::queue::Budget;
use daemon::registry::{Options, Registry, RegistryEvent};
use daemon::ring::RingStatus;
use driver::{ANSWER, COMMAND, Hostile, NEXT, Place, WRITE};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_gpu_svm::protocol::control::{Hello, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::{CAPSET_SVM, NUM_QUEUES};
use zerocopy::{FromBytes, IntoBytes};

const CONTROLQ: usize = 0;
const CURSORQ: usize = 1;
const EVENTQ: usize = 2;
/// After so long without what is waited for a test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// With so many wrong cases a test ends.
const ENOUGH: usize = 2;

/// Waits until `look` finds something. What it looks at tells nobody.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not yet");
        std::thread::sleep(Duration::from_micros(50));
    }
}

pub fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}

pub fn hello(incarnation: u64) -> Hello {
    let (hdr, incarnation) = (hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0), incarnation.into());
    Hello { hdr, incarnation, version: 0x1_0000.into(), ..Hello::default() }
}

pub fn create_context(ctx_id: u32) -> CtxCreate {
    let hdr = hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id);
    CtxCreate { hdr, context_init: CAPSET_SVM.into(), ..CtxCreate::default() }
}

/// A daemon with one soft device, two guests, and a bystander that works.
struct Scene {
    registry: Arc<Registry>,
    devices: Devices,
    bystander: Bystander,
    events: mpsc::Receiver<RegistryEvent>,
    socket: PathBuf,
    _dir: TempDir,
}

impl Scene {
    fn start() -> Self {
        let device = Device {
            kind: DeviceKind::Soft,
            name: "soft0".into(),
            engines: 1,
            va_bits: None,
            fault_model: None,
            address_model: None,
            ledger: 0,
            job_limit_ms: None,
            busy_poll_us: None,
            workers: None,
        };
        let (host, devices) = Devices::start(&[device], 1).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            contexts: 16,
            pending_faults: 16,
            jobs: 16,
            mappings: 64,
            resources: 16,
            fault_deadline_ms: 0,
            sessions: 1 << 20,
            ..Limits::DEFAULT
        };
        let runtime_dirs = vec![dir.path().to_owned()];
        let registry = Registry::new(host, Options { runtime_dirs, limits, allow_unsealed: false }).unwrap();
        let [socket, other] = ["hostile", "bystander"].map(|name| {
            let path = dir.path().join(format!("{name}.sock"));
            assert!(registry.add(spec(name, &path)).unwrap());
            path
        });
        let (tell, events) = mpsc::channel();
        registry.subscribe(Box::new(move |event| tell.send(event.clone()).unwrap_or(())));
        let bystander = Bystander::start(&other);
        Self { registry, devices, bystander, events, socket, _dir: dir }
    }

    /// How a ring of the hostile guest fares, while it has a session.
    fn ring(&self, queue: usize) -> Option<RingStatus> {
        self.registry.get("hostile").unwrap().queues.get(queue).copied()
    }

    /// Waits for the end of a session of the hostile guest, and says why it ended.
    fn ended(&self) -> String {
        loop {
            match self.events.recv_timeout(PATIENCE).unwrap() {
                RegistryEvent::GuestDisconnected { name, reason } if name == "hostile" => return reason,
                _ => {}
            }
        }
    }

    fn finish(self) -> u64 {
        let rounds = self.bystander.finish();
        let other = self.registry.get("bystander").unwrap();
        assert_eq!((other.sessions, other.last_error), (1, None), "the other guest lost its session");
        self.registry.shutdown();
        self.devices.stop();
        rounds
    }
}

/// A session of the hostile guest with a driver that has said HELLO and made context 1. A ring that the case sets up by
/// itself does not run yet.
fn connect(scene: &Scene, queue: usize, case: &Case) -> Hostile {
    let mut hostile = Hostile::connect(&scene.socket);
    for other in (0..NUM_QUEUES).filter(|other| !case.untouched || *other != queue) {
        hostile.start(other, Place::of(other)).unwrap();
    }
    if !case.untouched || queue != CONTROLQ {
        begin_life(&mut hostile, 1);
        assert_done(&mut hostile, create_context(1).as_bytes());
    }
    hostile
}

fn begin_life(hostile: &mut Hostile, incarnation: u64) {
    assert_done(hostile, hello(incarnation).as_bytes());
}

fn assert_done(hostile: &mut Hostile, command: &[u8]) {
    let answer = hostile.command(CONTROLQ, command);
    let (head, _) = SvmResp::read_from_prefix(&answer).unwrap();
    assert_eq!((head.hdr.kind.get(), head.status.get()), (VIRTIO_GPU_RESP_OK_NODATA, 0));
}

/// Has the device look at a queue: at the event queue it looks when there is a record.
fn have_visited(hostile: &mut Hostile, queue: usize) {
    hostile.kick(queue);
    if queue == EVENTQ {
        assert_done(hostile, hdr(VIRTIO_GPU_CMD_CTX_DESTROY, 1).as_bytes());
    }
}

/// What came of a case: the lengths that came back, and whether the ring failed.
fn check(scene: &Scene, hostile: &mut Hostile, queue: usize, want: Want) {
    match want {
        Want::Ended => return assert_ne!(scene.ended(), "the VMM left"),
        Want::Latched => until("a failed ring", || scene.ring(queue)?.failed.then_some(())),
        Want::GivenBack(count) => {
            assert_eq!(come_back(hostile, queue, count), vec![0; count]);
            until("the count", || (scene.ring(queue)?.refused == count as u64).then_some(()));
        }
        Want::Answered(count) => {
            let lengths = come_back(hostile, queue, count);
            assert!(lengths.iter().all(|length| *length > 0), "{lengths:?}");
        }
        Want::Empty(count) => assert_eq!(come_back(hostile, queue, count), vec![0; count]),
        Want::Nothing => {
            // A round trip on another queue of the same thread: what was kicked before has been looked at.
            let other = if queue == CURSORQ { CONTROLQ } else { CURSORQ };
            assert!(!hostile.command(other, hdr(VIRTIO_GPU_CMD_UPDATE_CURSOR, 0).as_bytes()).is_empty());
            assert_eq!(hostile.take_used(queue), []);
        }
    }
    let status = scene.ring(queue).unwrap();
    assert_eq!(status.failed, want == Want::Latched, "{status:?}");
}

/// Lengths of as many chains as are expected.
fn come_back(hostile: &mut Hostile, queue: usize, count: usize) -> Vec<u32> {
    let mut lengths = Vec::new();
    until("chains that come back", || {
        lengths.extend(hostile.take_used(queue).into_iter().map(|(_, length)| length));
        (lengths.len() >= count).then_some(())
    });
    assert_eq!(lengths.len(), count);
    lengths
}

/// The guest's other queues go on.
fn check_others(hostile: &mut Hostile, queue: usize) {
    if queue != CURSORQ {
        assert!(!hostile.command(CURSORQ, hdr(VIRTIO_GPU_CMD_MOVE_CURSOR, 0).as_bytes()).is_empty());
    }
    if queue != CONTROLQ {
        assert_done(hostile, create_context(9).as_bytes());
    }
    if queue == CURSORQ {
        assert_record(hostile, 9);
    }
}

/// A context's end is told on the event queue.
fn assert_record(hostile: &mut Hostile, ctx_id: u32) {
    hostile.describe(hostile.place(EVENTQ).desc, &[(ANSWER, 4096, WRITE, 0)]);
    hostile.publish(EVENTQ, 0);
    hostile.kick(EVENTQ);
    assert_done(hostile, hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes());
    assert_eq!(come_back(hostile, EVENTQ, 1), [24 + 96]);
}

/// How rings that failed are made to run again.
#[derive(Clone, Copy, Debug)]
enum Recovery {
    /// The VMM stops all rings.
    Stop,
    /// The VMM resets the device.
    Reset,
    /// The VMM stops the one ring, and the driver's life goes on.
    StopOne,
}

fn recover(hostile: &mut Hostile, queue: usize, recovery: Recovery) {
    let which = match recovery {
        Recovery::StopOne => queue..queue + 1,
        Recovery::Stop | Recovery::Reset => 0..NUM_QUEUES,
    };
    if matches!(recovery, Recovery::Reset) {
        hostile.frontend.reset_device().unwrap();
        let features = hostile.frontend.get_features().unwrap();
        hostile.frontend.set_features(features).unwrap();
    }
    // Memory that a case took away is back.
    hostile.frontend.set_mem_table(&hostile.regions()).unwrap();
    for queue in which.clone() {
        hostile.stop(queue).unwrap();
    }
    for queue in which {
        hostile.start(queue, Place::of(queue)).unwrap();
    }
    begin_life(hostile, 2);
    works(hostile);
}

/// All three queues do what they are for.
fn works(hostile: &mut Hostile) {
    assert_done(hostile, create_context(5).as_bytes());
    assert!(!hostile.command(CURSORQ, hdr(VIRTIO_GPU_CMD_MOVE_CURSOR, 0).as_bytes()).is_empty());
    assert_record(hostile, 5);
}

/// No visit has cost more than it may: nearly all of a budget, and one chain.
fn check_budget(scene: &Scene) {
    for (queue, budget) in
        [(CONTROLQ, Budget::COMMANDS), (CURSORQ, Budget::COMMANDS), (EVENTQ, Budget::EVENTS)]
    {
        let status = scene.ring(queue).unwrap();
        assert!(
            status.most_descriptors <= budget.descriptors + budget.chain + 1,
            "queue {queue}: {status:?}"
        );
        assert!(status.most_chains <= budget.chains, "queue {queue}: {status:?}");
    }
}

fn run_case(scene: &Scene, queue: usize, case: &Case, recovery: Recovery) {
    let want = case.wants[queue];
    let mut hostile = connect(scene, queue, case);
    let set = (case.set_up)(&mut hostile, queue);
    assert!(set.is_ok() || want == Want::Ended, "{set:?}");
    if set.is_ok() && want != Want::Ended {
        let get = hdr(VIRTIO_GPU_CMD_GET_DISPLAY_INFO, 0);
        hostile.write(COMMAND, get.as_bytes());
        (case.act)(&mut hostile, queue);
        have_visited(&mut hostile, queue);
    }
    check(scene, &mut hostile, queue, want);
    scene.bystander.wait_for_a_round();
    if want == Want::Ended {
        drop(hostile);
        let mut next = Hostile::connect(&scene.socket);
        for queue in 0..NUM_QUEUES {
            next.start(queue, Place::of(queue)).unwrap();
        }
        begin_life(&mut next, 1);
        return works(&mut next);
    }
    if !case.spoils_all {
        check_others(&mut hostile, queue);
    }
    // The visit is over: another queue of its thread has been served since.
    let unread = if let Want::GivenBack(count) = want { count as u64 } else { 0 };
    assert!(case.spoils_all || scene.ring(queue).unwrap().refused == unread);
    check_budget(scene);
    let recovery = if case.spoils_all { Recovery::Stop } else { recovery };
    recover(&mut hostile, queue, recovery);
}

fn run(queue: usize) {
    let scene = Scene::start();
    let cases = cases::all();
    let recoveries = [Recovery::Stop, Recovery::Reset, Recovery::StopOne];
    let mut wrong = Vec::new();
    for (case, recovery) in cases.iter().zip(recoveries.into_iter().cycle()) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run_case(&scene, queue, case, recovery);
        }));
        if outcome.is_err() {
            wrong.push((case.name.clone(), recovery));
            // Each may have waited in vain.
            if wrong.len() == ENOUGH {
                break;
            }
        }
        scene.ended();
    }
    let rounds = scene.finish();
    println!("queue {queue}: {} cases, {rounds} rounds of the other guest meanwhile", cases.len());
    assert!(wrong.is_empty(), "{} of {} cases: {wrong:?}", wrong.len(), cases.len());
}

#[test]
fn hostile_control_queue_harms_only_itself() {
    run(CONTROLQ);
}

#[test]
fn hostile_cursor_queue_harms_only_itself() {
    run(CURSORQ);
}

#[test]
fn hostile_event_queue_harms_only_itself() {
    run(EVENTQ);
}

/// The index says by turns that nothing is new and that more is than there can be, until the device has looked at the
/// wrong moment.
#[test]
fn index_that_flaps_while_it_is_read_fails_the_ring() {
    let scene = Scene::start();
    let case = cases::all().swap_remove(0);
    for (queue, recovery) in (0..NUM_QUEUES).zip([Recovery::Stop, Recovery::Reset, Recovery::StopOne]) {
        let mut hostile = connect(&scene, queue, &case);
        have_visited(&mut hostile, queue);
        let (place, still) = (hostile.place(queue), hostile.avail(queue));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let flapping = &hostile;
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for index in [still.wrapping_add(place.size + 1), still] {
                        flapping.write(place.avail + 2, &index.to_le_bytes());
                    }
                }
            });
            until("a failed ring", || {
                flapping.kick(queue);
                scene.ring(queue)?.failed.then_some(())
            });
            stop.store(true, Ordering::Relaxed);
        });
        check_others(&mut hostile, queue);
        scene.bystander.wait_for_a_round();
        recover(&mut hostile, queue, recovery);
        drop(hostile);
        scene.ended();
    }
    scene.finish();
}

#[test]
fn cases_are_many_and_distinct() {
    let mut names: Vec<_> = cases::all().into_iter().map(|case| case.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), cases::all().len());
    println!("{} hostile cases x {NUM_QUEUES} queues", names.len());
    assert!(names.len() >= 120, "{}", names.len());
}

/// A chain of one command and room for its answer, from descriptor 0 on.
pub fn good_chain() -> [driver::Desc; 2] {
    [(COMMAND, 24, NEXT, 1), (ANSWER, 4096, WRITE, 0)]
}
