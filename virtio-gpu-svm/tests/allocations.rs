//! How often the heap is asked while nothing grows: by a request that changes nothing, a job, a fault that is served, one
//! that the guest answers, pages that are supplied and withdrawn. Counted on the thread that does it, once the lists have
//! the room that they keep.
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    reason = "an allocator that counts; a failed step is a failed test"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{Access, Asid, Device, Events, Fault, JobId, StopId};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits, RECENT_FAULTS};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_NOP, Packet};
use virtio_gpu_svm::protocol::request::*;
use vm_memory::mmap::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
    /// What is held: blocks, and their bytes as glibc's allocator counts them. Negative where another thread's are freed.
    static HELD: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count() {
    // A thread that ends has no cell any more; nobody counts it.
    ASKED.try_with(|asked| asked.set(asked.get() + 1)).ok();
}

/// So many blocks more are held, of this size: a word before each, and 16 bytes a step.
fn hold(blocks: i64, size: usize) {
    let bytes = i64::try_from((size + 8).next_multiple_of(16).max(32)).unwrap();
    let more = |held: &Cell<(i64, i64)>| held.set((held.get().0 + blocks, held.get().1 + blocks * bytes));
    HELD.try_with(more).ok();
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        hold(1, layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is this one's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        hold(1, layout.size());
        // SAFETY: as for `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, old: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        hold(-1, layout.size());
        hold(1, bytes);
        // SAFETY: `old` came from `System` with this layout, since all of ours do.
        unsafe { System.realloc(old, layout, bytes) }
    }
    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        hold(-1, layout.size());
        // SAFETY: as for `realloc`.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// How often the heap was asked by this.
fn asked(act: impl FnOnce()) -> u64 {
    let before = ASKED.get();
    act();
    ASKED.get() - before
}

const A: u64 = 0x7f00_0000_0000;
const C: u64 = 0x10_0000_0000;
const GPA: u64 = 0x20_0000;
const BYTES: u64 = 4 << 20;
/// Operations until lists have the room that they keep.
const WARM: u64 = 64;
/// What a job asks for: the list of its packets, itself on the device, and, where it is the only one of its ring, the list
/// of what runs there.
const JOB: u64 = 3;
/// Most bytes of a context without anything, with its share of the tables that hold it.
const CONTEXT_BYTES: i64 = 480;
/// The same of a GPU VM without a mapping; its block in the context and the one on the device.
const VM_BYTES: i64 = 832;
/// Faults of a context that wait at once, and the most bytes of one, with its share of what they make together.
const PENDING: u64 = 64;
const PENDING_BYTES: i64 = 78;
/// Operations that are counted together.
const COUNTED: u64 = 256;

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

/// A context with one GPU VM, on a soft device whose one engine this thread is, when it wants to be.
struct Scene {
    host: Arc<Host>,
    device: Arc<SoftDevice>,
    guest: Arc<Guest>,
    asid: Asid,
    response: Vec<u8>,
    records: Vec<u8>,
}

fn header(kind: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: 1.into(), ..CtrlHdr::default() }
}

/// A request of the process, as a command; without its header, which is put in front.
fn submission(cmd: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<ReqHdr>() + body.len()).unwrap();
    let submit = CmdSubmit { hdr: header(VIRTIO_GPU_CMD_SUBMIT_3D), size: len.into(), padding: 0.into() };
    let request = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
    [submit.as_bytes(), request.as_bytes(), body].concat()
}

fn body<T: IntoBytes + zerocopy::Immutable>(request: &T) -> &[u8] {
    request.as_bytes().get(size_of::<ReqHdr>()..).unwrap()
}

impl Scene {
    fn new() -> Self {
        let device = SoftDevice::new(SoftConfig::default());
        let host = Host::new(vec![Arc::clone(&device) as Arc<dyn Device>]);
        let events: std::sync::Weak<Host> = Arc::downgrade(&host);
        device.start(events);
        let guest = host.open_guest("vm0", Limits::DEFAULT, &[0], Arc::new(Silent));
        let identity = RegionIdentity { inode: (0, 1), offset: 0, size: BYTES, gpa: GPA };
        let region = Region::new(identity, MmapRegion::new(usize::try_from(BYTES).unwrap()).unwrap());
        guest.set_memory(Arc::new(MemoryTable::new(vec![region]).unwrap()));
        let mut scene =
            Self { host, device, guest, asid: Asid(0), response: Vec::new(), records: Vec::new() };
        let hdr = CtrlHdr { ctx_id: 0.into(), ..header(VIRTIO_GPU_CMD_SVM_HELLO) };
        let hello = Hello { hdr, incarnation: 1.into(), version: 0x1_0000.into(), reserved: 0.into() };
        scene.send(hello.as_bytes());
        let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE), ..CtxCreate::default() };
        scene.send(create.as_bytes());
        scene.send(&submission(SVM_REQ_VM_CREATE, body(&VmCreate::default())));
        let (reply, _) = VmCreateRsp::read_from_prefix(&scene.response[size_of::<SvmResp>()..]).unwrap();
        scene.asid = Asid(reply.asid.get());
        let map = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: BYTES.into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        let bind = VmBind { vm_id: 1.into(), num_binds: 1.into(), ..VmBind::default() };
        scene.send(&submission(SVM_REQ_VM_BIND, &[body(&bind), map.as_bytes()].concat()));
        scene
    }
    /// Carries out a command, which must succeed.
    fn send(&mut self, request: &[u8]) {
        self.guest.control(request, &mut self.response, 4096);
        let (response, _) = SvmResp::read_from_prefix(&self.response).unwrap();
        assert_eq!(response.status.get(), 0);
    }
    fn raise(&self, page: u64) {
        let fault = Fault {
            asid: self.asid,
            stop: StopId(u64::MAX - page),
            job: JobId(1),
            addr: GpuAddr(C + page * PAGE_SIZE),
            pages: 1,
            length_hint: 8,
            access: Access::Read,
            engine: 0,
            level: 0,
        };
        self.host.fault(0, fault);
    }
    /// The record that waits.
    fn record(&mut self) -> &[u8] {
        self.guest.fill_events(&mut self.records, size_of::<EventHdr>() + EVENT_RECORD_BYTES);
        EventHdr::read_from_prefix(&self.records).map_or(&[], |(_, records)| records)
    }
    fn runs(page: u64, pages: u32) -> PageRun {
        PageRun {
            va: (A + page * PAGE_SIZE).into(),
            gpa: (GPA + page * PAGE_SIZE).into(),
            pages: pages.into(),
            flags: 0.into(),
            as_of: 0.into(),
        }
    }
}

/// What an operation asks for, once nothing grows: of so many, in all.
fn steady(mut act: impl FnMut(u64)) -> u64 {
    (0..WARM).for_each(&mut act);
    asked(|| (WARM..WARM + COUNTED).for_each(&mut act))
}

#[test]
fn request_that_changes_nothing_allocates_nothing() {
    let mut scene = Scene::new();
    let property = submission(SVM_REQ_VM_GET_PROPERTY, body(&VmRef { vm_id: 1.into(), ..VmRef::default() }));
    assert_eq!(steady(|_| scene.send(&property)), 0);
}

#[test]
fn served_fault_allocates_nothing() {
    let mut scene = Scene::new();
    supply_all(&mut scene);
    // The list of the last faults is full, and a page has its table.
    (0..RECENT_FAULTS as u64).for_each(|_| scene.raise(0));
    assert_eq!(steady(|n| scene.raise(n)), 0);
}

#[test]
fn answered_fault_allocates_nothing() {
    let mut scene = Scene::new();
    // So that leaf, tables and the list of the last faults are there.
    scene.send(&supply(&[Scene::runs(1023, 1), Scene::runs(511, 1)]));
    (0..RECENT_FAULTS as u64).for_each(|_| scene.raise(1023));
    scene.raise(511);
    let mut command = Vec::new();
    let answer = |page| {
        scene.raise(page);
        let cookie = FaultRecord::read_from_prefix(scene.record()).unwrap().0.cookie;
        let head = PageResponse {
            hdr: header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE),
            cookie,
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 1.into(),
            flags: 0.into(),
        };
        command.clear();
        command.extend_from_slice(head.as_bytes());
        command.extend_from_slice(Scene::runs(page, 1).as_bytes());
        scene.send(&command);
    };
    assert_eq!(steady(answer), 0);
}

#[test]
fn supplied_pages_of_known_leaves_allocate_nothing() {
    let mut scene = Scene::new();
    scene.send(&supply(&[Scene::runs(1023, 1), Scene::runs(511, 1)]));
    let commands: Vec<_> =
        (0..WARM + COUNTED).map(|n| supply(&[Scene::runs(n, 1), Scene::runs(512 + n, 1)])).collect();
    assert_eq!(steady(|n| scene.send(&commands[usize::try_from(n).unwrap()])), 0);
}

#[test]
fn invalidated_page_allocates_the_list_of_where_it_is_shown() {
    let mut scene = Scene::new();
    supply_all(&mut scene);
    (0..RECENT_FAULTS as u64).for_each(|n| scene.raise(n % 511));
    let commands: Vec<_> = (0..WARM + COUNTED)
        .map(|page| Invalidate {
            hdr: header(VIRTIO_GPU_CMD_SVM_INVALIDATE),
            start: (A + page * PAGE_SIZE).into(),
            length: PAGE_SIZE.into(),
            event: INVAL_UNMAP.into(),
            reserved: 0.into(),
        })
        .collect();
    assert_eq!(steady(|n| scene.send(commands[usize::try_from(n).unwrap()].as_bytes())), COUNTED);
}

#[test]
fn job_allocates_what_it_owns_and_its_place_on_a_ring() {
    let mut scene = Scene::new();
    let device = Arc::clone(&scene.device);
    let engine = std::thread::spawn(move || device.run_engine(0));
    let exec = Exec { vm_id: 1.into(), num_packets: 1.into(), ..Exec::default() };
    let packet = Packet { opcode: OP_NOP.into(), ..Packet::default() };
    let command = submission(SVM_REQ_EXEC, &[body(&exec), packet.as_bytes()].concat());
    let mut allocated = || {
        steady(|_| {
            scene.send(&command);
            while scene.record().is_empty() {
                std::thread::yield_now();
            }
        })
    };
    // A record is out before its engine has left the ring: now and then the next job finds the ring still there, and waits in
    // a list that is made for it.
    let tries: Vec<_> = (0..16).map(|_| allocated()).take_while(|count| *count != JOB * COUNTED).collect();
    scene.device.shutdown();
    engine.join().unwrap();
    assert!(tries.len() < 16 && tries.iter().all(|count| *count > JOB * COUNTED), "{tries:?}");
}

fn supply(runs: &[PageRun]) -> Vec<u8> {
    let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY);
    let head = Supply { hdr, num_runs: u16::try_from(runs.len()).unwrap().into(), ..Supply::default() };
    [head.as_bytes(), runs.as_bytes()].concat()
}

fn supply_all(scene: &mut Scene) {
    // Not as large leaves.
    scene.send(&supply(&[Scene::runs(0, 511), Scene::runs(512, 511)]));
}

/// What operations hold afterwards: blocks and bytes of [`COUNTED`] of them, in all.
fn held(mut act: impl FnMut(u64)) -> (i64, i64) {
    (0..WARM).for_each(&mut act);
    let before = HELD.get();
    (WARM..WARM + COUNTED).for_each(&mut act);
    let after = HELD.get();
    (after.0 - before.0, after.1 - before.1)
}

/// A command of another context than the scene's.
fn of_context(n: u64, mut command: Vec<u8>) -> Vec<u8> {
    let (mut header, _) = CtrlHdr::read_from_prefix(&command).unwrap();
    header.ctx_id = u32::try_from(2 + n).unwrap().into();
    header.write_to_prefix(&mut command).unwrap();
    command
}

/// What is held may be no more than this many bytes each, and tables of all of them that have grown.
fn assert_held(what: &str, (blocks, bytes): (i64, i64), most_blocks: i64, most_bytes: i64) {
    let count = i64::try_from(COUNTED).unwrap();
    println!("{what}: {blocks} blocks and {bytes} bytes of {count}");
    assert!(blocks <= most_blocks * count + count / 4, "{what}: {blocks} blocks of {count}");
    assert!(bytes <= most_bytes * count, "{what}: {bytes} bytes of {count}");
}

#[test]
fn idle_processes_hold_what_they_have() {
    let mut scene = Scene::new();
    let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE), ..CtxCreate::default() };
    let contexts = held(|n| scene.send(&of_context(n, create.as_bytes().to_vec())));
    assert_held("a context", contexts, 1, CONTEXT_BYTES);
    let create = submission(SVM_REQ_VM_CREATE, body(&VmCreate::default()));
    let vms = held(|n| scene.send(&of_context(n, create.clone())));
    assert_held("a GPU VM", vms, 2, VM_BYTES);
}

#[test]
fn pending_faults_hold_their_entries() {
    let mut scene = Scene::new();
    let before = HELD.get();
    (0..PENDING).for_each(|page| scene.raise(page));
    let pending = (HELD.get().0 - before.0, HELD.get().1 - before.1);
    println!("{PENDING} pending faults: {} blocks and {} bytes", pending.0, pending.1);
    // Counters, the table and its list, the leaf of their pages, and the list of contexts that have something to tell.
    assert!(pending.0 <= 5, "{} blocks", pending.0);
    assert!(pending.1 <= PENDING_BYTES * i64::try_from(PENDING).unwrap(), "{} bytes", pending.1);
    // Told or not, they take the same.
    while !scene.record().is_empty() {}
    assert!(HELD.get().1 - before.1 <= pending.1 + 1024);
}
