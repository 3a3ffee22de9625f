//! A guest on a device that does nothing by itself: tests raise its faults and pass its checkpoints, and look at what
//! it was told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::clock::{Manual, Source};
use virtio_gpu_svm::device::{
    Access, AddressModel, Asid, Device, DeviceInfo, Error, Events, Extent, Fault, FaultModel, Flush, Job,
    JobEnd, JobId, LedgerEntry, StopId, Ticket, Verdict, VmLabel,
};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_RECORD_BYTES, EventHdr, FaultRecord, NoticeRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::job::{OPCODES, Packet};
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::pages::Told as Pages;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::quota::Charge;
use vm_memory::mmap::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

/// Where guest memory begins.
pub const GPA: u64 = 0x10_0000;
/// Its bytes.
pub const MEMORY: u64 = 8 << 20;
/// A and C of the tests: differ, and neither is aligned to a leaf.
pub const A: u64 = 0x7f00_0001_0000;
pub const C: u64 = 0x4_0002_0000;

/// What the mock's tables take for each page.
pub const TABLE_BYTES: u64 = 4096;

/// What stands for the page of a null translation.
pub const NULL_PAGE: u64 = u64::MAX;

/// What the device was told, and what it holds.
#[derive(Default)]
pub struct Told {
    pub vms: BTreeMap<Asid, VmLabel>,
    /// (asid, GPU page) -> guest-physical page, writable.
    pub bound: BTreeMap<(Asid, u64), (u64, bool)>,
    pub resumed: Vec<(StopId, Verdict)>,
    pub jobs: Vec<(Asid, JobId)>,
    pub destroyed: Vec<Asid>,
    pub frozen: BTreeSet<Asid>,
    /// What is charged for `bound`, [`TABLE_BYTES`] a page.
    pub tables: BTreeMap<Asid, Charge>,
    /// Calls of `unbind`.
    pub unbinds: usize,
    /// While set, unbinding leaves engines with old translations until `pass`.
    pub busy: bool,
    /// Calls that may fail, so far.
    pub fallible: usize,
    /// The call, counted from 0, that fails for want of memory.
    pub fails_at: Option<usize>,
    /// While set, no GPU VM is taken.
    pub full: bool,
    tickets: u64,
    passed: u64,
}

impl Told {
    fn pages_of(&self, asid: Asid) -> u64 {
        self.bound.keys().filter(|(of, _)| *of == asid).count() as u64
    }
    /// Charges for pages before they are bound.
    fn charge(&mut self, asid: Asid, pages: impl Iterator<Item = u64>) -> Result<(), Error> {
        let new = pages.filter(|page| !self.bound.contains_key(&(asid, *page))).count() as u64;
        let bytes = (self.pages_of(asid) + new) * TABLE_BYTES;
        Ok(self.tables.get_mut(&asid).unwrap().resize(bytes)?)
    }
    fn give_back(&mut self, asid: Asid) {
        let bytes = self.pages_of(asid) * TABLE_BYTES;
        if let Some(charge) = self.tables.get_mut(&asid) {
            charge.shrink_to(bytes);
        }
    }
    fn runs_jobs(&self, asid: Asid) -> bool {
        self.jobs.iter().any(|(of, _)| *of == asid)
    }
}

/// Where a call stops until it is let go on, with the locks that its caller has in hand.
struct Gate {
    inside: Sender<()>,
    go: Receiver<()>,
}

impl Gate {
    /// Also what tells that a call has come, and what lets it go on.
    fn new() -> (Self, (Receiver<()>, Sender<()>)) {
        let ((inside, came), (leave, go)) = (channel(), channel());
        (Self { inside, go }, (came, leave))
    }
    fn pass(self) {
        self.inside.send(()).unwrap();
        self.go.recv().unwrap();
    }
}

pub struct MockDevice {
    info: DeviceInfo,
    index: usize,
    told: Mutex<Told>,
    gate: Mutex<Option<(Asid, Gate)>>,
    next_stop: AtomicU64,
}

impl MockDevice {
    pub fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }
    /// Raises a fault as an engine would, on this thread.
    pub fn raise(&self, host: &Host, asid: u32, addr: u64, access: Access) -> StopId {
        self.raise_long(host, asid, addr, access, 8)
    }
    /// The same, of a packet that is going to touch `length_hint` bytes.
    pub fn raise_long(&self, host: &Host, asid: u32, addr: u64, access: Access, length_hint: u64) -> StopId {
        self.raise_fault(host, asid, addr, access, (1, length_hint))
    }
    /// The same, of a group of page requests.
    pub fn raise_group(&self, host: &Host, asid: u32, addr: u64, access: Access, pages: u64) -> StopId {
        self.raise_fault(host, asid, addr, access, (pages, pages * 4096))
    }
    fn raise_fault(
        &self,
        host: &Host,
        asid: u32,
        addr: u64,
        access: Access,
        (pages, length_hint): (u64, u64),
    ) -> StopId {
        let stop = StopId(self.next_stop.fetch_add(1, Ordering::Relaxed));
        let fault = Fault {
            asid: Asid(asid),
            stop,
            job: JobId(1),
            addr: GpuAddr(addr),
            pages,
            length_hint,
            access,
            engine: 0,
            level: 0,
        };
        host.fault(self.index, fault);
        stop
    }
    /// The next `unbind` or `resident_pages` of a GPU VM says that it has come, and goes on when it is told so.
    pub fn close_gate(&self, asid: u32) -> (Receiver<()>, Sender<()>) {
        let (gate, ends) = Gate::new();
        *self.gate.lock().unwrap() = Some((Asid(asid), gate));
        ends
    }
    fn pass_gate(&self, asid: Asid) {
        let gate = self.gate.lock().unwrap().take_if(|(of, _)| *of == asid);
        if let Some((_, gate)) = gate {
            gate.pass();
        }
    }
    pub fn verdict(&self, stop: StopId) -> Option<Verdict> {
        let told = self.told();
        let verdicts: Vec<_> = told.resumed.iter().filter(|(s, _)| *s == stop).collect();
        assert!(verdicts.len() < 2, "resumed twice: {verdicts:?}");
        verdicts.first().map(|(_, verdict)| *verdict)
    }
    /// Guest-physical page behind a GPU address.
    pub fn bound(&self, asid: u32, addr: u64) -> Option<u64> {
        self.told().bound.get(&(Asid(asid), addr / 4096)).map(|(gpa_page, _)| *gpa_page)
    }
    /// All engines pass a checkpoint.
    pub fn pass(&self, host: &Host) {
        let (asids, ticket) = {
            let mut told = self.told();
            told.passed = told.tickets;
            (told.vms.keys().copied().collect::<Vec<_>>(), Ticket(told.passed))
        };
        asids.into_iter().for_each(|asid| host.flushed(self.index, asid, ticket));
    }
    /// The device lets go of what was destroyed.
    pub fn retire_all(&self, host: &Host) {
        let destroyed = std::mem::take(&mut self.told().destroyed);
        for asid in destroyed {
            self.told().vms.remove(&asid);
            self.told().tables.remove(&asid);
            host.retired(self.index, asid);
        }
    }
    pub fn end_job(&self, host: &Host, errno: i32) {
        let first = self.told().jobs[0].1;
        self.end(host, first.0, errno);
    }
    /// Jobs that it was given and has not ended, in the order in which they came.
    pub fn jobs(&self) -> Vec<u64> {
        self.told().jobs.iter().map(|(_, job)| job.0).collect()
    }
    /// A job that it was given ends.
    pub fn end(&self, host: &Host, job: u64, errno: i32) {
        let (asid, job) = {
            let mut told = self.told();
            let at = told.jobs.iter().position(|(_, id)| id.0 == job).unwrap();
            told.jobs.remove(at)
        };
        host.job_done(
            self.index,
            asid,
            job,
            JobEnd { errno, packet: 0, addr: GpuAddr(C), access: Access::Read },
        );
    }
    /// Counts a call that may fail, and fails if it is its turn.
    fn attempt(&self) -> Result<(), Error> {
        let mut told = self.told();
        told.fallible += 1;
        if told.fails_at == Some(told.fallible - 1) { Err(Error::OutOfMemory) } else { Ok(()) }
    }
    fn ticket(told: &mut Told) -> Flush {
        if !told.busy {
            return Flush::Done;
        }
        told.tickets += 1;
        Flush::Pending(Ticket(told.tickets))
    }
}

impl Device for MockDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn vm_create(&self, asid: Asid, label: VmLabel, tables: Charge) -> Result<(), Error> {
        self.attempt()?;
        let mut told = self.told();
        if told.full {
            return Err(Error::TooManyVms);
        }
        told.tables.insert(asid, tables);
        assert!(told.vms.insert(asid, label).is_none());
        Ok(())
    }
    fn vm_destroy(&self, asid: Asid) {
        let mut told = self.told();
        told.bound.retain(|(a, _), _| *a != asid);
        told.give_back(asid);
        told.destroyed.push(asid);
    }
    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        self.attempt()?;
        let mut page = addr.page();
        let pages = extents.iter().map(|extent| extent.pages).sum::<u64>();
        self.told().charge(asid, page..page + pages)?;
        for extent in extents {
            for n in 0..extent.pages {
                let gpa_page = extent.region.gpa().page() + extent.offset / 4096 + n;
                self.told().bound.insert((asid, page), (gpa_page, extent.writable));
                page += 1;
            }
        }
        Ok(())
    }
    fn bind_null(&self, asid: Asid, range: PageRange) -> Result<(), Error> {
        self.attempt()?;
        let mut told = self.told();
        told.charge(asid, range.start..range.end)?;
        for page in range.start..range.end {
            told.bound.insert((asid, page), (NULL_PAGE, true));
        }
        Ok(())
    }
    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        self.pass_gate(asid);
        let mut told = self.told();
        let must_be_frozen = self.info.fault_model == FaultModel::None && told.runs_jobs(asid);
        assert!(!must_be_frozen || told.frozen.contains(&asid), "unbound under the jobs of {asid:?}");
        told.unbinds += 1;
        told.bound.retain(|(a, page), _| *a != asid || !range.contains(*page));
        told.give_back(asid);
        Self::ticket(&mut told)
    }
    fn flush(&self, _asid: Asid) -> Flush {
        Self::ticket(&mut self.told())
    }
    fn has_flushed(&self, _asid: Asid, ticket: Ticket) -> bool {
        self.told().passed >= ticket.0
    }
    fn drop_region(&self, asid: Asid, _region_id: u64) {
        let mut told = self.told();
        told.bound.retain(|(a, _), _| *a != asid);
        told.give_back(asid);
    }
    fn table_bytes(&self, asid: Asid) -> u64 {
        self.told().tables.get(&asid).map_or(0, Charge::amount)
    }
    fn resident_pages(&self, asid: Asid) -> u64 {
        self.pass_gate(asid);
        self.told().bound.keys().filter(|(a, _)| *a == asid).count() as u64
    }
    fn resident_in(&self, asid: Asid, range: PageRange) -> u64 {
        self.told().bound.keys().filter(|(a, page)| *a == asid && range.contains(*page)).count() as u64
    }
    fn check_packets(&self, _packets: &[Packet]) -> Result<(), Error> {
        Ok(())
    }
    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error> {
        self.attempt()?;
        self.told().jobs.push((asid, job.id));
        Ok(())
    }
    fn resume(&self, stop: StopId, verdict: Verdict) {
        self.told().resumed.push((stop, verdict));
    }
    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush {
        let mut told = self.told();
        if frozen {
            told.frozen.insert(asid);
            return Self::ticket(&mut told);
        }
        told.frozen.remove(&asid);
        Flush::Done
    }
    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        (Vec::new(), 0)
    }
}

/// Where a guest is told of records.
#[derive(Default)]
pub struct Port(Mutex<Option<Gate>>);

impl Port {
    /// Who tells it next says that it has come, and goes on when it is told so.
    pub fn close_gate(&self) -> (Receiver<()>, Sender<()>) {
        let (gate, ends) = Gate::new();
        *self.0.lock().unwrap() = Some(gate);
        ends
    }
}

impl EventPort for Port {
    fn ready(&self) {
        let gate = self.0.lock().unwrap().take();
        gate.into_iter().for_each(Gate::pass);
    }
}

/// Time that stands still but when it is moved.
#[derive(Default)]
pub struct Clock {
    time: Manual,
    gate: Mutex<Option<Gate>>,
}

impl Source for Clock {
    fn now(&self) -> Duration {
        let gate = self.gate.lock().unwrap().take();
        gate.into_iter().for_each(Gate::pass);
        self.time.now()
    }
}

/// A host with two mock devices and one guest that has said HELLO.
pub struct World {
    pub host: Arc<Host>,
    clock: Arc<Clock>,
    pub devices: Vec<Arc<MockDevice>>,
    pub guest: Arc<Guest>,
    /// The answer to the last command.
    last: Mutex<Vec<u8>>,
}

pub const LIMITS: Limits = Limits {
    contexts: 16,
    pending_faults: 4,
    jobs: 4,
    mappings: 8,
    resources: 4,
    fault_deadline_ms: DEADLINE_MS,
    ..Limits::DEFAULT
};
/// Time stands still unless a test lets it pass.
pub const DEADLINE_MS: u32 = 20_000;

/// A device with all that a device may have.
pub fn device_info() -> DeviceInfo {
    DeviceInfo {
        name: "mock".into(),
        va_bits: 40,
        num_engines: 1,
        opcodes: OPCODES,
        fault_model: FaultModel::Replayable,
        address_model: AddressModel::Any,
        null_mappings: true,
        exec: false,
    }
}

impl World {
    pub fn new() -> Self {
        Self::with_limits(LIMITS)
    }
    pub fn with_limits(limits: Limits) -> Self {
        Self::on_devices(limits, [device_info(), device_info()])
    }
    pub fn on_devices(limits: Limits, infos: [DeviceInfo; 2]) -> Self {
        let device = |(index, info)| {
            let (told, next_stop) = (Mutex::default(), AtomicU64::new(1));
            Arc::new(MockDevice { info, index, told, gate: Mutex::default(), next_stop })
        };
        let devices: Vec<_> = (0..).zip(infos).map(device).collect();
        let clock = Arc::new(Clock::default());
        let all = devices.iter().map(|d| Arc::clone(d) as Arc<dyn Device>).collect();
        let host = Host::with_clock(all, Arc::clone(&clock) as Arc<dyn Source>);
        let guest = host.open_guest("g", limits, &[0, 1], Arc::new(Port::default()));
        let world = Self { host, clock, devices, guest, last: Mutex::default() };
        world.guest.set_memory(table(&[region(1, GPA, MEMORY)]));
        world.hello(1);
        world
    }
    /// The same host and devices, seen by another guest.
    pub fn beside(&self, guest: Arc<Guest>) -> Self {
        let (host, clock, devices) = (self.host.clone(), self.clock.clone(), self.devices.clone());
        Self { host, clock, devices, guest, last: Mutex::default() }
    }
    /// Lets the deadline of what was raised so far pass, and no more.
    pub fn let_deadline_pass(&self) {
        self.clock.time.advance(Duration::from_millis(DEADLINE_MS.into()));
    }
    /// Whoever looks at the clock next says that it has come, and goes on when it is told so. A guest that stops its own
    /// time or lets it go on does that with its lock in hand.
    pub fn close_gate_of_clock(&self) -> (Receiver<()>, Sender<()>) {
        let (gate, ends) = Gate::new();
        *self.clock.gate.lock().unwrap() = Some(gate);
        ends
    }
    /// Sends a command and returns the response.
    pub fn send(&self, request: &[u8]) -> Vec<u8> {
        let mut response = Vec::new();
        self.guest.control(request, &mut response, 4096);
        response.clone_into(&mut self.last.lock().unwrap());
        response
    }
    /// The limits that the answer to the last command names, and the reply in it, if there is one.
    pub fn named_limits(&self) -> (Option<Limit>, Option<Option<Limit>>) {
        let last = self.last.lock().unwrap();
        let (resp, reply) = SvmResp::read_from_prefix(&last).unwrap();
        let of_reply = RspHdr::read_from_prefix(reply).ok().map(|(reply, _)| reply.limit.get());
        (Limit::from_wire(resp.limit.get()), of_reply.map(Limit::from_wire))
    }
    /// Sends a command and returns its status.
    pub fn status(&self, request: &[u8]) -> i32 {
        let (resp, _) = SvmResp::read_from_prefix(&self.send(request)).unwrap();
        resp.status.get()
    }
    pub fn hello(&self, incarnation: u64) -> HelloResp {
        let cmd = Hello {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_HELLO, 0),
            incarnation: incarnation.into(),
            version: 0x1_0000.into(),
            reserved: 0.into(),
        };
        HelloResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap()
    }
    pub fn create_context(&self, ctx_id: u32) {
        let cmd = CtxCreate { hdr: hdr(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        assert_eq!(self.status(cmd.as_bytes()), 0);
    }
    pub fn destroy_context(&self, ctx_id: u32) {
        assert_eq!(self.status(hdr(VIRTIO_GPU_CMD_CTX_DESTROY, ctx_id).as_bytes()), 0);
    }
    /// One request as a submission; returns the whole response.
    pub fn submit_whole(&self, ctx_id: u32, cmd: u32, body: &[u8]) -> Vec<u8> {
        let len = size_of::<ReqHdr>() + body.len();
        let req = ReqHdr { cmd: cmd.into(), len: (len as u32).into(), seqno: 1.into(), rsp_off: 0.into() };
        let hdr = hdr(VIRTIO_GPU_CMD_SUBMIT_3D, ctx_id);
        let submit = CmdSubmit { hdr, size: (len as u32).into(), padding: 0.into() };
        self.send(&[submit.as_bytes(), req.as_bytes(), body].concat())
    }
    /// The same; returns status and reply.
    pub fn submit(&self, ctx_id: u32, cmd: u32, body: &[u8]) -> (i32, Vec<u8>) {
        let response = self.submit_whole(ctx_id, cmd, body);
        let (resp, reply) = SvmResp::read_from_prefix(&response).unwrap();
        (resp.status.get(), reply.to_vec())
    }
    /// Creates a GPU VM; returns (vm_id, asid).
    pub fn create_vm(&self, ctx_id: u32, dev_id: u32) -> (u32, u32) {
        let body = VmCreate { dev_id: dev_id.into(), ..VmCreate::default() };
        let (status, reply) = self.submit(ctx_id, SVM_REQ_VM_CREATE, &body.as_bytes()[16..]);
        assert_eq!(status, 0);
        let rsp = VmCreateRsp::read_from_bytes(&reply).unwrap();
        (rsp.vm_id.get(), rsp.asid.get())
    }
    pub fn bind(&self, ctx_id: u32, vm_id: u32, ops: &[BindOp]) -> i32 {
        let head = VmBind { vm_id: vm_id.into(), num_binds: (ops.len() as u32).into(), ..VmBind::default() };
        self.submit(ctx_id, SVM_REQ_VM_BIND, &[&head.as_bytes()[16..], ops.as_bytes()].concat()).0
    }
    pub fn exec(&self, ctx_id: u32, vm_id: u32) -> i32 {
        let head = Exec { vm_id: vm_id.into(), num_packets: 1.into(), ..Exec::default() };
        let packet = Packet::default();
        self.submit(ctx_id, SVM_REQ_EXEC, &[&head.as_bytes()[16..], packet.as_bytes()].concat()).0
    }
    /// A context with a GPU VM on device 0 that maps 64 pages of A at C; returns (vm_id, asid).
    pub fn mapped(&self, ctx_id: u32) -> (u32, u32) {
        self.create_context(ctx_id);
        let (vm_id, asid) = self.create_vm(ctx_id, 0);
        assert_eq!(self.bind(ctx_id, vm_id, &[map(C, A, 64)]), 0);
        (vm_id, asid)
    }
    /// With pages as a list where that is shorter, as for one alone.
    pub fn respond(&self, ctx_id: u32, cookie: u64, code: u32, runs: &[PageRun]) -> i32 {
        let hdr = hdr(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id);
        let Pages { num_runs, flags, bytes } = Pages::new(runs).unwrap();
        let cmd = PageResponse { hdr, cookie: cookie.into(), code: code.into(), num_runs, flags };
        self.status(&[cmd.as_bytes(), &bytes].concat())
    }
    /// As a list where that is shorter.
    pub fn supply(&self, ctx_id: u32, runs: &[PageRun]) -> i32 {
        let hdr = hdr(VIRTIO_GPU_CMD_SVM_SUPPLY, ctx_id);
        let Pages { num_runs, flags, bytes } = Pages::new(runs).unwrap();
        let cmd = Supply { hdr, num_runs, flags, ..Supply::default() };
        self.status(&[cmd.as_bytes(), &bytes].concat())
    }
    /// Invalidates and returns (seq, inval_done_seq of the response).
    pub fn invalidate(&self, ctx_id: u32, start: u64, length: u64) -> (u64, u64) {
        let cmd = Invalidate {
            hdr: hdr(VIRTIO_GPU_CMD_SVM_INVALIDATE, ctx_id),
            start: start.into(),
            length: length.into(),
            event: INVAL_UNMAP.into(),
            reserved: 0.into(),
        };
        let resp = InvalidateResp::read_from_bytes(&self.send(cmd.as_bytes())).unwrap();
        assert_eq!(resp.resp.status.get(), 0);
        (resp.seq.get(), resp.resp.inval_done_seq.get())
    }
    /// Cookies of the faults whose records wait.
    pub fn cookies(&self) -> Vec<u64> {
        faults(self).iter().map(|record| record.cookie.get()).collect()
    }
    /// All records that wait.
    pub fn records(&self) -> Vec<[u8; EVENT_RECORD_BYTES]> {
        let (mut all, mut buf) = (Vec::new(), Vec::new());
        loop {
            self.guest.fill_events(&mut buf, 300);
            if buf.is_empty() {
                return all;
            }
            let (hdr, rest) = EventHdr::read_from_prefix(&buf).unwrap();
            assert_eq!(rest.len(), hdr.num_records.get() as usize * EVENT_RECORD_BYTES);
            all.extend(
                rest.chunks(EVENT_RECORD_BYTES)
                    .map(|record| <[u8; EVENT_RECORD_BYTES]>::try_from(record).unwrap()),
            );
        }
    }
}

/// The fault records that wait.
pub fn faults(world: &World) -> Vec<FaultRecord> {
    let records = world.records();
    let faults = records.iter().map(|bytes| FaultRecord::read_from_bytes(bytes).unwrap());
    faults.filter(|record| record.kind.get() == EVENT_FAULT).collect()
}
/// All records that wait, as (kind, context, value).
pub fn notices(world: &World) -> Vec<(u32, u32, u64)> {
    let records = world.records();
    let notices = records.iter().map(|bytes| NoticeRecord::read_from_bytes(bytes).unwrap());
    notices.map(|notice| (notice.kind.get(), notice.ctx_id.get(), notice.value.get())).collect()
}
pub fn hdr(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}
pub fn map(gpu: u64, cpu: u64, pages: u64) -> BindOp {
    BindOp {
        op: BIND_OP_MAP_USERPTR.into(),
        addr: gpu.into(),
        range: (pages * 4096).into(),
        obj_offset: cpu.into(),
        ..BindOp::default()
    }
}
pub fn unmap(gpu: u64, pages: u64) -> BindOp {
    BindOp { op: BIND_OP_UNMAP.into(), addr: gpu.into(), range: (pages * 4096).into(), ..BindOp::default() }
}
pub fn run(va: u64, gpa: u64, pages: u32, as_of: u64) -> PageRun {
    PageRun { va: va.into(), gpa: gpa.into(), pages: pages.into(), flags: 0.into(), as_of: as_of.into() }
}
pub fn region(inode: u64, gpa: u64, size: u64) -> Arc<Region> {
    let identity = RegionIdentity { inode: (0, inode), offset: 0, size, gpa };
    Region::new(identity, MmapRegion::new(size as usize).unwrap())
}
pub fn table(regions: &[Arc<Region>]) -> Arc<MemoryTable> {
    Arc::new(MemoryTable::new(regions.to_vec()).unwrap())
}
