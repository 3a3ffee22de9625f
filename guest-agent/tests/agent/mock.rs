//! A device played by a thread: answers control commands from real rings and delivers records, as a test tells it to.

use crate::ring::{Chain, DeviceRing, memory, region};
use guest_agent::driver::virtqueue::QueueAddresses;
use guest_agent::driver::{DmaRegion, RingConfig, Rings, SvmDevice, Transport};
use rustix::fs::MemfdFlags;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::*;
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OP_NOP, OPCODES, Packet};
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{CONTROLQ, CURSORQ, EVENTQ, NUM_QUEUES, PAGE_SIZE};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A page answer that the device took or refused.
#[derive(Clone, Debug)]
pub struct Answered {
    pub ctx_id: u32,
    pub cookie: u64,
    pub code: u32,
    pub runs: Vec<PageRun>,
    pub status: i32,
}

/// What a host device says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub va_bits: u32,
    pub fault_model: u32,
    pub address_model: u32,
    pub opcodes: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { va_bits: 48, fault_model: 0, address_model: 0, opcodes: OPCODES }
    }
}

/// A job that was launched where the test plays the engines.
#[derive(Clone, Debug)]
pub struct Launch {
    pub ctx_id: u32,
    pub job_id: u64,
    pub user_data: u64,
    pub packets: Vec<Packet>,
    /// Mappings of its GPU VM, the latest last.
    pub mappings: Vec<BindOp>,
}

/// A GPU VM, as far as it is played.
#[derive(Clone, Debug)]
pub struct PlayedVm {
    pub dev_id: u32,
    pub mappings: Vec<BindOp>,
}

/// What a test may look at and set.
pub struct Script {
    pub epoch: u64,
    pub incarnation: u64,
    /// Host devices.
    pub devices: u32,
    /// Those of them that are not as usual, by their id.
    pub shapes: HashMap<u32, Shape>,
    /// GPU VMs by context and id.
    pub vms: HashMap<(u32, u32), PlayedVm>,
    /// The test plays the engines: jobs wait in `launched` until it ends them.
    pub played: bool,
    pub launched: VecDeque<Launch>,
    /// Contexts that HELLO says are still retiring.
    pub retiring: u32,
    /// Contexts alive, and the sequence of their last invalidation.
    pub contexts: HashMap<u32, u64>,
    pub answers: Vec<Answered>,
    /// Answers to refuse with `refusal`.
    pub refuse_answers: u32,
    pub refusal: i32,
    /// Commands are not looked at; events go on.
    pub stalled: bool,
    /// CTX_DESTROY is followed by CONTEXT_RETIRED only when the test says so.
    pub hold_retired: bool,
    /// INVALIDATE is done only when the test says so.
    pub hold_done: bool,
    pub pending: HashSet<u64>,
    pub submissions: Vec<Vec<u8>>,
    /// Context, first address and bytes of each invalidation.
    pub invalidated: Vec<(u32, u64, u64)>,
    /// What happened, in order.
    pub log: Vec<String>,
    /// Write a used entry that no device may write.
    pub break_rings: bool,
    /// The state is lost; only HELLO works.
    pub lost: bool,
    /// Contexts that may be alive.
    pub max_contexts: usize,
    next_cookie: u64,
    records: VecDeque<Vec<u8>>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            epoch: 77,
            incarnation: 0,
            devices: 2,
            shapes: HashMap::new(),
            vms: HashMap::new(),
            played: false,
            launched: VecDeque::new(),
            retiring: 0,
            contexts: HashMap::new(),
            answers: Vec::new(),
            refuse_answers: 0,
            refusal: -11,
            stalled: false,
            hold_retired: false,
            hold_done: false,
            pending: HashSet::new(),
            submissions: Vec::new(),
            invalidated: Vec::new(),
            log: Vec::new(),
            break_rings: false,
            lost: false,
            max_contexts: usize::MAX,
            next_cookie: 100,
            records: VecDeque::new(),
        }
    }
}

impl Script {
    /// Records that are not in a buffer of the driver's yet.
    pub fn undelivered(&self) -> usize {
        self.records.len()
    }

    pub fn notice(&mut self, kind: u32, ctx_id: impl Into<u32>, value: u64) {
        let notice = NoticeRecord {
            kind: kind.into(),
            ctx_id: ctx_id.into().into(),
            value: value.into(),
            ..NoticeRecord::default()
        };
        self.records.push_back(notice.as_bytes().to_vec());
    }

    /// Raises a fault and returns its cookie.
    pub fn fault(&mut self, ctx_id: impl Into<u32>, cpu_addr: u64) -> u64 {
        let cookie = self.cookie();
        self.fault_record(ctx_id, cookie, cpu_addr, (FAULT_LAST_PAGE, 4096));
        cookie
    }

    /// A name for a fault.
    pub fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.pending.insert(self.next_cookie);
        self.next_cookie
    }

    /// One record of a fault.
    pub fn fault_record(
        &mut self,
        ctx_id: impl Into<u32>,
        cookie: u64,
        cpu_addr: u64,
        (flags, length_hint): (u32, u32),
    ) {
        let record = FaultRecord {
            kind: EVENT_FAULT.into(),
            ctx_id: ctx_id.into().into(),
            cookie: cookie.into(),
            flags: flags.into(),
            length_hint: length_hint.into(),
            perm: PERM_READ.into(),
            addr: (cpu_addr + 0x1000_0000).into(),
            cpu_addr: cpu_addr.into(),
            ..FaultRecord::default()
        };
        self.records.push_back(record.as_bytes().to_vec());
    }

    /// The daemon forgets everything.
    pub fn lose_state(&mut self) {
        self.epoch += 1;
        self.lost = true;
        self.contexts.clear();
        self.pending.clear();
        self.log.push("lost".into());
    }

    fn answer(&mut self, request: &[u8]) -> Vec<u8> {
        let hdr = CtrlHdr::read_from_prefix(request).unwrap().0;
        let (kind, ctx_id) = (hdr.kind.get(), hdr.ctx_id.get());
        if self.lost && kind != VIRTIO_GPU_CMD_SVM_HELLO {
            return self.head(ctx_id, -32).as_bytes().to_vec();
        }
        match kind {
            VIRTIO_GPU_CMD_SVM_HELLO => self.hello(request),
            VIRTIO_GPU_CMD_SVM_GET_DEVICE => self.device(request),
            VIRTIO_GPU_CMD_CTX_CREATE if self.contexts.len() >= self.max_contexts => {
                let limit = Limit::Contexts.to_wire().into();
                SvmResp { limit, ..self.head(ctx_id, -28) }.as_bytes().to_vec()
            }
            VIRTIO_GPU_CMD_CTX_CREATE => {
                self.contexts.insert(ctx_id, 0);
                self.log.push(format!("create {ctx_id}"));
                self.head(ctx_id, 0).as_bytes().to_vec()
            }
            VIRTIO_GPU_CMD_CTX_DESTROY => {
                self.contexts.remove(&ctx_id);
                self.vms.retain(|(owner, _), _| *owner != ctx_id);
                self.log.push(format!("destroy {ctx_id}"));
                if !self.hold_retired {
                    self.notice(EVENT_CONTEXT_RETIRED, ctx_id, 0);
                }
                self.head(ctx_id, 0).as_bytes().to_vec()
            }
            VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE => self.page_response(request),
            VIRTIO_GPU_CMD_SVM_INVALIDATE => self.invalidate(ctx_id, request),
            VIRTIO_GPU_CMD_SUBMIT_3D => self.submit(ctx_id, request),
            other => panic!("command {other:#x}"),
        }
    }

    fn head(&self, ctx_id: u32, status: i32) -> SvmResp {
        let kind = if status == 0 { VIRTIO_GPU_RESP_OK_NODATA } else { VIRTIO_GPU_RESP_ERR_UNSPEC };
        SvmResp {
            hdr: CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() },
            status: status.into(),
            daemon_epoch: self.epoch.into(),
            ..SvmResp::default()
        }
    }

    fn hello(&mut self, request: &[u8]) -> Vec<u8> {
        let hello = Hello::read_from_bytes(request).unwrap();
        self.incarnation = hello.incarnation.get();
        self.lost = false;
        self.contexts.clear();
        self.log.push("hello".into());
        let (num_devices, retiring) = (self.devices.into(), self.retiring.into());
        HelloResp { resp: self.head(0, 0), num_devices, retiring, ..HelloResp::default() }.as_bytes().to_vec()
    }

    fn device(&self, request: &[u8]) -> Vec<u8> {
        let dev_id = GetDevice::read_from_bytes(request).unwrap().dev_id;
        if dev_id.get() >= self.devices {
            return self.head(0, -2).as_bytes().to_vec();
        }
        let mut device = GetDeviceResp { resp: self.head(0, 0), dev_id, ..GetDeviceResp::default() };
        device.name[..4].copy_from_slice(b"mock");
        let shape = self.shapes.get(&dev_id.get()).copied().unwrap_or_default();
        device.va_bits = shape.va_bits.into();
        device.fault_model = shape.fault_model.into();
        device.address_model = shape.address_model.into();
        device.opcodes = shape.opcodes.into();
        device.as_bytes().to_vec()
    }

    fn page_response(&mut self, request: &[u8]) -> Vec<u8> {
        let (answer, told) = PageResponse::read_from_prefix(request).unwrap();
        let runs = match answer.flags.get() {
            0 => <[PageRun]>::ref_from_bytes(told).unwrap().to_vec(),
            SUPPLY_LIST => runs_of_list(told),
            flags => panic!("flags {flags:#x}"),
        };
        assert_eq!(runs.len(), usize::from(answer.num_runs.get()));
        let (ctx_id, cookie) = (answer.hdr.ctx_id.get(), answer.cookie.get());
        let seq = self.contexts.get(&ctx_id).copied().unwrap_or(0);
        let old = runs.iter().any(|run| run.as_of.get() < seq);
        let status = if !self.pending.contains(&cookie) {
            -22
        } else if old {
            -11
        } else if self.refuse_answers > 0 {
            self.refuse_answers -= 1;
            self.refusal
        } else {
            self.pending.remove(&cookie);
            0
        };
        self.answers.push(Answered { ctx_id, cookie, code: answer.code.get(), runs, status });
        SupplyResp { resp: self.head(ctx_id, status), ..SupplyResp::default() }.as_bytes().to_vec()
    }

    fn invalidate(&mut self, ctx_id: u32, request: &[u8]) -> Vec<u8> {
        let range = Invalidate::read_from_bytes(request).unwrap();
        self.invalidated.push((ctx_id, range.start.get(), range.length.get()));
        let seq = self.contexts.get_mut(&ctx_id).expect("a context");
        *seq += 1;
        let seq = *seq;
        self.log.push(format!("invalidate {ctx_id}"));
        if !self.hold_done {
            self.notice(EVENT_INVAL_DONE, ctx_id, seq);
        }
        InvalidateResp { resp: self.head(ctx_id, 0), seq: seq.into(), ..InvalidateResp::default() }
            .as_bytes()
            .to_vec()
    }

    /// Plays just enough of a GPU: NOPs end well, other packets with EFAULT.
    fn submit(&mut self, ctx_id: u32, request: &[u8]) -> Vec<u8> {
        let (_, payload) = CmdSubmit::read_from_prefix(request).unwrap();
        self.submissions.push(payload.to_vec());
        let mut response = self.head(ctx_id, 0).as_bytes().to_vec();
        let Ok((req, _)) = ReqHdr::read_from_prefix(payload) else { return response };
        let hdr = |len: usize, ret: i32| RspHdr {
            len: (len as u32).into(),
            seqno: req.seqno,
            ret: ret.into(),
            ..RspHdr::default()
        };
        match req.cmd.get() {
            SVM_REQ_VM_CREATE => {
                let dev_id = VmCreate::read_from_prefix(payload).unwrap().0.dev_id.get();
                match self.create_vm(ctx_id, dev_id) {
                    Ok((vm_id, va_bits)) => {
                        let (vm_id, asid, va_bits) = (vm_id.into(), 9.into(), va_bits.into());
                        let rsp =
                            VmCreateRsp { hdr: hdr(32, 0), vm_id, asid, va_bits, ..VmCreateRsp::default() };
                        response.extend_from_slice(rsp.as_bytes());
                    }
                    Err(errno) => response.extend_from_slice(hdr(16, errno).as_bytes()),
                }
            }
            SVM_REQ_VM_DESTROY => {
                let vm_id = VmRef::read_from_prefix(payload).unwrap().0.vm_id.get();
                let known = self.vms.remove(&(ctx_id, vm_id)).is_some();
                response.extend_from_slice(hdr(16, if known { 0 } else { -2 }).as_bytes());
            }
            SVM_REQ_EXEC => {
                let job_id = self.exec(ctx_id, payload);
                response.extend_from_slice(ExecRsp { hdr: hdr(24, 0), job_id: job_id.into() }.as_bytes());
            }
            SVM_REQ_VM_BIND => {
                let (bind, lists) = VmBind::read_from_prefix(payload).unwrap();
                let ops = &lists[bind.num_waits.get() as usize * size_of::<FencePoint>()..];
                let ops = <[BindOp]>::ref_from_bytes(ops).unwrap();
                let in_turn = bind.flags.get() & VM_BIND_ASYNC != 0;
                let job_id = if in_turn { self.submissions.len() as u64 } else { 0 };
                if in_turn {
                    self.end_bind(ctx_id, job_id, &bind, ops);
                } else if let Some(vm) = self.vms.get_mut(&(ctx_id, bind.vm_id.get())) {
                    vm.mappings.extend_from_slice(ops);
                }
                response.extend_from_slice(VmBindRsp { hdr: hdr(24, 0), job_id: job_id.into() }.as_bytes());
            }
            _ => response.extend_from_slice(hdr(16, 0).as_bytes()),
        }
        response
    }

    /// A GPU VM's id and address bits, or a negative errno. Where engines are played, a context has one on each device.
    fn create_vm(&mut self, ctx_id: u32, dev_id: u32) -> Result<(u32, u32), i32> {
        if dev_id >= self.devices {
            return Err(-2);
        }
        let has_one = self.vms.iter().any(|((owner, _), vm)| (*owner, vm.dev_id) == (ctx_id, dev_id));
        if self.played && has_one {
            return Err(-17);
        }
        let vm_id = (1..).find(|vm_id| !self.vms.contains_key(&(ctx_id, *vm_id))).unwrap();
        self.vms.insert((ctx_id, vm_id), PlayedVm { dev_id, mappings: Vec::new() });
        Ok((vm_id, self.shapes.get(&dev_id).copied().unwrap_or_default().va_bits))
    }

    fn exec(&mut self, ctx_id: u32, payload: &[u8]) -> u64 {
        let (exec, lists) = Exec::read_from_prefix(payload).unwrap();
        let packets = &lists[exec.num_waits.get() as usize * size_of::<FencePoint>()..];
        let packets = <[Packet]>::ref_from_bytes(packets).unwrap().to_vec();
        let mappings = self.vms.get(&(ctx_id, exec.vm_id.get())).map(|vm| vm.mappings.clone());
        let (job_id, user_data) = (self.submissions.len() as u64, exec.user_data.get());
        let mappings = mappings.unwrap_or_default();
        let launch = Launch { ctx_id, job_id, user_data, packets, mappings };
        if self.played {
            self.launched.push_back(launch);
        } else {
            let packet = launch.packets[0];
            let failure = (packet.opcode.get() != OP_NOP).then_some((-14, 0, packet.dst.get(), PERM_WRITE));
            self.end_job(&launch, failure);
        }
        job_id
    }

    /// Ends a job, well or with a negative errno, the packet, the address and the access.
    pub fn end_job(&mut self, launch: &Launch, failure: Option<(i32, u32, u64, u32)>) {
        let (status, packet, addr, perm) = failure.unwrap_or_default();
        let job = JobRecord {
            kind: EVENT_JOB_DONE.into(),
            ctx_id: launch.ctx_id.into(),
            job_id: launch.job_id.into(),
            user_data: launch.user_data.into(),
            status: status.into(),
            packet: packet.into(),
            addr: addr.into(),
            perm: perm.into(),
            ..JobRecord::default()
        };
        self.records.push_back(job.as_bytes().to_vec());
    }
}

/// What cannot be mapped in turn.
pub const FULL: u64 = 0xf_0000;

impl Script {
    /// A bind in turn fails at an operation on [`FULL`], and its GPU VM with it.
    fn end_bind(&mut self, ctx_id: u32, job_id: u64, bind: &VmBind, ops: &[BindOp]) {
        let failed = ops.iter().position(|op| op.addr.get() == FULL);
        let status = if failed.is_some() { -28 } else { 0 };
        let end = JobRecord {
            kind: EVENT_BIND_DONE.into(),
            ctx_id: ctx_id.into(),
            job_id: job_id.into(),
            user_data: bind.user_data,
            vm_id: bind.vm_id,
            status: status.into(),
            packet: (failed.unwrap_or(0) as u32).into(),
            addr: failed.map_or(0, |_| FULL).into(),
            ring_idx: bind.ring_idx,
            point: bind.signal,
            ..JobRecord::default()
        };
        self.records.push_back(end.as_bytes().to_vec());
        if failed.is_some() {
            self.notice(EVENT_CONTEXT_LOST, ctx_id, bind.vm_id.get().into());
        }
    }
}

/// A counting signal.
#[derive(Default)]
struct Signal {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Signal {
    fn raise(&self) {
        *self.count.lock().unwrap() += 1;
        self.changed.notify_all();
    }

    fn take(&self, timeout: Duration) -> bool {
        let waited =
            self.changed.wait_timeout_while(self.count.lock().unwrap(), timeout, |count| *count == 0);
        let mut count = waited.unwrap().0;
        std::mem::take(&mut *count) > 0
    }
}

struct Queues {
    control: DeviceRing,
    events: DeviceRing,
    buffers: VecDeque<Chain>,
}

/// The device; running while it has queues.
pub struct Mock {
    kick: Signal,
    call: Signal,
    script: Mutex<Script>,
    queues: Mutex<Option<Queues>>,
    ended: Mutex<bool>,
    doorbells: AtomicUsize,
}

impl Mock {
    /// A device without queues, and its thread.
    pub fn start() -> (Arc<Self>, JoinHandle<()>) {
        let mock = Arc::new(Self {
            kick: Signal::default(),
            call: Signal::default(),
            script: Mutex::new(Script::default()),
            queues: Mutex::new(None),
            ended: Mutex::new(false),
            doorbells: AtomicUsize::new(0),
        });
        let device = mock.clone();
        let thread = std::thread::spawn(move || device.play());
        (mock, thread)
    }

    pub fn end(&self) {
        *self.ended.lock().unwrap() = true;
        self.kick.raise();
    }

    /// Doorbells of the control queue so far.
    pub fn doorbells(&self) -> usize {
        self.doorbells.load(Ordering::Relaxed)
    }

    /// The driver sets the queues, or takes them away.
    pub fn set_queues(&self, queues: Option<(Arc<DmaRegion>, [QueueAddresses; NUM_QUEUES], bool)>) {
        let made = queues.map(|(memory, addresses, event_idx)| Queues {
            control: DeviceRing::new(memory.clone(), addresses[usize::from(CONTROLQ)], event_idx),
            events: DeviceRing::new(memory, addresses[usize::from(EVENTQ)], event_idx),
            buffers: VecDeque::new(),
        });
        *self.queues.lock().unwrap() = made;
    }

    /// Changes the script and lets the device act on it.
    pub fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        let result = change(&mut self.script.lock().unwrap());
        self.kick.raise();
        result
    }

    pub fn look(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// The answer to a fault that the device has taken, once it is there.
    pub fn answered(&self, cookie: u64) -> Answered {
        let find = || {
            let script = self.look();
            script.answers.iter().find(|answer| answer.cookie == cookie && answer.status == 0).cloned()
        };
        eventually("an answer", || find().is_some());
        find().unwrap()
    }

    fn play(&self) {
        while !*self.ended.lock().unwrap() {
            self.kick.take(Duration::from_millis(20));
            let mut queues = self.queues.lock().unwrap();
            let Some(queues) = queues.as_mut() else { continue };
            let mut script = self.script.lock().unwrap();
            let mut interrupt = false;
            while let Some(chain) = (!script.stalled).then(|| queues.control.pop()).flatten() {
                let answer = script.answer(&chain.readable);
                interrupt |= queues.control.push(&chain, &answer);
            }
            if std::mem::take(&mut script.break_rings) {
                interrupt |= queues.control.push_raw(9999, 0, 1);
            }
            while let Some(chain) = queues.events.pop() {
                queues.buffers.push_back(chain);
            }
            while !script.records.is_empty() && !queues.buffers.is_empty() {
                let count = script.records.len().min(42);
                let header = EventHdr {
                    num_records: (count as u32).into(),
                    daemon_epoch: script.epoch.into(),
                    ..EventHdr::default()
                };
                let mut bytes = header.as_bytes().to_vec();
                bytes.extend(script.records.drain(..count).flatten());
                let buffer = queues.buffers.pop_front().unwrap();
                interrupt |= queues.events.push(&buffer, &bytes);
            }
            drop(script);
            if interrupt {
                self.call.raise();
            }
        }
    }
}

/// The way to the mock.
pub struct MockTransport(pub Arc<Mock>);

impl Transport for MockTransport {
    fn notify(&self, queue: u16) -> io::Result<()> {
        assert_ne!(queue, CURSORQ);
        if queue == CONTROLQ {
            self.0.doorbells.fetch_add(1, Ordering::Relaxed);
        }
        self.0.kick.raise();
        Ok(())
    }

    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        Ok(self.0.call.take(timeout))
    }
}

/// A running mock with a driver on it.
pub fn device() -> (Arc<Mock>, Arc<SvmDevice>) {
    device_with(true)
}

/// The same; without `event_idx` every publication of commands rings.
pub fn device_with(event_idx: bool) -> (Arc<Mock>, Arc<SvmDevice>) {
    let (mock, _thread) = Mock::start();
    let (fd, addresses) = memory(Rings::BYTES / 4096);
    let driver = region(&fd, &addresses);
    let config = RingConfig { event_idx, ..RingConfig::default() };
    let rings = Rings::new(config).unwrap();
    mock.set_queues(Some((region(&fd, &addresses), rings.addresses(&driver).unwrap(), event_idx)));
    let transport = Arc::new(MockTransport(mock.clone()));
    let device = SvmDevice::new(transport, driver, &rings).unwrap();
    (mock, Arc::new(device))
}

/// A file of `len` zeros, as an arena.
pub fn file(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("mock-arena", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// Runs of one page each.
fn runs_of_list(told: &[u8]) -> Vec<PageRun> {
    let (list, entries) = PageList::read_from_prefix(told).unwrap();
    let entries = <[U64]>::ref_from_bytes(entries).unwrap();
    let run = |(n, entry): (u64, &U64)| PageRun {
        va: (list.va.get() + n * PAGE_SIZE).into(),
        gpa: (entry.get() & !(PAGE_SIZE - 1)).into(),
        pages: 1.into(),
        flags: u32::from(entry.get() & 1 != 0).into(),
        as_of: list.as_of,
    };
    (0..).zip(entries).map(run).collect()
}
