//! Whole faults: a guest without a VMM, and a soft device without engines. Faults are raised by whoever counts, as an
//! engine would; binding goes into the device's own page table, and nobody is there to be resumed.
//!
//! What an engine does besides (the walk that misses, parking, going on) and what rings and wake-ups cost is not here.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::context::Context;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{Access, AddressModel, Asid, Device, Events, Fault, FaultModel, JobId, StopId};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::info::Counters;
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::*;
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::gpu::*;
use virtio_gpu_svm::protocol::request::*;
use virtio_gpu_svm::protocol::{MAX_RUNS, PAGE_SIZE};
use vm_memory::mmap::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

use super::workload::{MAPPINGS, Operation, WINDOWS, scrambled};

/// A of the first page.
pub const A: u64 = 0x7f00_0000_0000;
/// C of the first page.
pub const C: u64 = 0x10_0000_0000;
/// Pages that a fault binds at most: an operation has a window of its own.
pub const WINDOW: u64 = 16;
const WINDOW_BYTES: u64 = WINDOW * PAGE_SIZE;
/// Guest memory; every window of A is the same pages of it.
pub const GPA: u64 = 0x20_0000;
const MEMORY: u64 = 8 << 20;
/// The context.
pub const CTX: u32 = 1;
const ROOM: usize = 4096;

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

/// A context with one GPU VM that maps all windows at C.
pub struct Scene {
    host: Arc<Host>,
    guest: Arc<Guest>,
    asid: Asid,
    response: Vec<u8>,
    records: Vec<u8>,
}

impl Scene {
    /// With so many mappings, side by side.
    pub fn new(mappings: u64) -> Result<Self> {
        let mut scene = Self::bare(MEMORY)?;
        scene.map(mappings)?;
        Ok(scene)
    }

    /// Without a mapping, in a guest with so many bytes of memory.
    pub fn bare(memory_bytes: u64) -> Result<Self> {
        let config = SoftConfig {
            index: 0,
            name: "soft0".into(),
            engines: 1,
            va_bits: 48,
            fault_model: FaultModel::Replayable,
            address_model: AddressModel::Any,
            ledger: None,
            job_limit: None,
        };
        let host = Host::new(vec![SoftDevice::new(config) as Arc<dyn Device>]);
        let limits = Limits {
            contexts: 4096,
            pending_faults: 256,
            jobs: 256,
            mappings: 65_536,
            resources: 4096,
            fault_deadline_ms: 0,
            ..Limits::DEFAULT
        };
        let guest = host.open_guest("vm0", limits, &[0], Arc::new(Silent));
        let identity = RegionIdentity { inode: (0, 1), offset: 0, size: memory_bytes, gpa: GPA };
        let region = Region::new(identity, MmapRegion::new(usize::try_from(memory_bytes)?)?);
        guest.set_memory(Arc::new(MemoryTable::new(vec![region])?));
        let mut scene = Self { host, guest, asid: Asid(0), response: Vec::new(), records: Vec::new() };
        scene.begin()?;
        Ok(scene)
    }

    /// The context.
    pub fn context(&self) -> Result<Arc<Context>> {
        Ok(self.guest.context(CTX)?)
    }

    fn begin(&mut self) -> Result<()> {
        let hello = Hello {
            hdr: header(VIRTIO_GPU_CMD_SVM_HELLO, 0),
            incarnation: 1.into(),
            version: 0x1_0000.into(),
            reserved: 0.into(),
        };
        ensure!(self.control(hello.as_bytes()), "HELLO was refused");
        let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, CTX), ..CtxCreate::default() };
        ensure!(self.control(create.as_bytes()), "CTX_CREATE was refused");
        let reply = self.request(SVM_REQ_VM_CREATE, &[0; size_of::<VmCreate>() - size_of::<ReqHdr>()])?;
        let (reply, _) = VmCreateRsp::read_from_prefix(&reply).ok().context("VM_CREATE has no reply")?;
        self.asid = Asid(reply.asid.get());
        Ok(())
    }

    /// Another context, with a GPU VM that shows all windows. Returns what that is called on the device.
    fn process(&mut self, ctx_id: u32) -> Result<Asid> {
        let of_context = |mut command: Vec<u8>| {
            let (mut hdr, _) = CtrlHdr::read_from_prefix(&command).ok().context("a short command")?;
            hdr.ctx_id = ctx_id.into();
            hdr.write_to_prefix(&mut command).ok().context("a short command")?;
            Ok::<_, anyhow::Error>(command)
        };
        let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, ctx_id), ..CtxCreate::default() };
        ensure!(self.control(create.as_bytes()), "CTX_CREATE was refused");
        let create = submission(SVM_REQ_VM_CREATE, &[0; size_of::<VmCreate>() - size_of::<ReqHdr>()])?;
        ensure!(self.control(&of_context(create)?), "VM_CREATE was refused");
        let reply = self.response.get(size_of::<SvmResp>()..).unwrap_or_default();
        let (reply, _) = VmCreateRsp::read_from_prefix(reply).ok().context("VM_CREATE has no reply")?;
        let asid = Asid(reply.asid.get());
        let operation = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: (WINDOWS * WINDOW_BYTES).into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        let head = VmBind { vm_id: 1.into(), num_binds: 1.into(), ..VmBind::default() };
        let head = head.as_bytes().get(size_of::<ReqHdr>()..).unwrap_or_default();
        let bind = submission(SVM_REQ_VM_BIND, &[head, operation.as_bytes()].concat())?;
        ensure!(self.control(&of_context(bind)?), "VM_BIND was refused");
        Ok(asid)
    }

    fn map(&mut self, mappings: u64) -> Result<()> {
        let bytes = WINDOWS * WINDOW_BYTES / mappings;
        let operation = |n: u64| BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: (C + n * bytes).into(),
            range: bytes.into(),
            obj_offset: (A + n * bytes).into(),
            ..BindOp::default()
        };
        let operations: Vec<_> = (0..mappings).map(operation).collect();
        let head =
            VmBind { vm_id: 1.into(), num_binds: u32::try_from(mappings)?.into(), ..VmBind::default() };
        let head = head.as_bytes().get(size_of::<ReqHdr>()..).unwrap_or_default();
        self.request(SVM_REQ_VM_BIND, &[head, operations.as_bytes()].concat()).map(drop)
    }

    /// Makes the first pages of every window known.
    pub fn supply(&mut self, pages: u64) -> Result<()> {
        let runs: Vec<_> = (0..WINDOWS).map(|window| run_of(window, pages)).collect();
        for runs in runs.chunks(usize::try_from(MAX_RUNS)?) {
            let hdr = header(VIRTIO_GPU_CMD_SVM_SUPPLY, CTX);
            let head = Supply { hdr, num_runs: u32::try_from(runs.len())?.into(), reserved: 0.into() };
            ensure!(self.control(&[head.as_bytes(), runs.as_bytes()].concat()), "SUPPLY was refused");
        }
        Ok(())
    }

    /// Carries out a request of the process and returns its reply.
    fn request(&mut self, cmd: u32, body: &[u8]) -> Result<Vec<u8>> {
        ensure!(self.control(&submission(cmd, body)?), "request {cmd} was refused");
        Ok(self.response.get(size_of::<SvmResp>()..).unwrap_or_default().to_vec())
    }

    /// Carries out a command; whether its status is 0.
    pub fn control(&mut self, request: &[u8]) -> bool {
        self.guest.control(request, &mut self.response, ROOM);
        SvmResp::read_from_prefix(&self.response).is_ok_and(|(response, _)| response.status.get() == 0)
    }

    /// Answers a command.
    pub fn answer(&self, request: &[u8], response: &mut Vec<u8>, room: usize) {
        self.guest.control(request, response, room);
    }

    /// A job reads the first word of a window.
    pub fn raise(&self, window: u64) {
        let fault = Fault {
            asid: self.asid,
            stop: StopId(window),
            job: JobId(1),
            addr: GpuAddr(C + window * WINDOW_BYTES),
            pages: 1,
            length_hint: 8,
            access: Access::Read,
            engine: 0,
            level: 0,
        };
        self.host.fault(0, fault);
    }

    /// The cookie of the one fault whose record waits.
    fn take_cookie(&mut self) -> Option<u64> {
        let (_, record) = self.take_record()?;
        let (record, _) = FaultRecord::read_from_prefix(record).ok()?;
        Some(record.cookie.get())
    }

    /// The one record that waits, and what stands before it.
    fn take_record(&mut self) -> Option<(EventHdr, &[u8])> {
        self.guest.fill_events(&mut self.records, size_of::<EventHdr>() + EVENT_RECORD_BYTES);
        EventHdr::read_from_prefix(&self.records).ok()
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        self.host.stats().counters
    }

    /// Blob resources of the guest.
    pub fn resources(&self) -> usize {
        self.guest.status().resources
    }

    /// Pages of the GPU VM that have a translation.
    pub fn resident_pages(&self) -> u64 {
        self.host.device(0).map_or(0, |device| device.resident_pages(self.asid))
    }
}

/// A fault on a page that is known, in a window of which so many pages are.
pub struct Served {
    scene: Scene,
    pages: u64,
}

impl Served {
    /// See the type.
    pub fn boxed(pages: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::new(MAPPINGS)?;
        scene.supply(pages)?;
        Ok(Box::new(Self { scene, pages }))
    }
}

impl Operation for Served {
    fn run(&mut self, n: u64) -> bool {
        self.scene.raise(scrambled(n, WINDOWS));
        true
    }

    fn is_done(&self, count: u64) -> bool {
        self.scene.counters().faults_served_locally == count
            && self.scene.resident_pages() == count * self.pages
    }
}

/// A fault that the guest answers with so many pages.
pub struct Answered {
    scene: Scene,
    pages: u64,
    command: Vec<u8>,
}

impl Answered {
    /// See the type.
    pub fn boxed(pages: u64) -> Result<Box<dyn Operation>> {
        Ok(Box::new(Self { scene: Scene::new(MAPPINGS)?, pages, command: Vec::new() }))
    }
}

impl Operation for Answered {
    fn run(&mut self, n: u64) -> bool {
        let window = scrambled(n, WINDOWS);
        self.scene.raise(window);
        let Some(cookie) = self.scene.take_cookie() else { return false };
        let head = PageResponse {
            hdr: header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, CTX),
            cookie: cookie.into(),
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 1.into(),
        };
        self.command.clear();
        self.command.extend_from_slice(head.as_bytes());
        self.command.extend_from_slice(run_of(window, self.pages).as_bytes());
        self.scene.control(&self.command)
    }

    fn is_done(&self, count: u64) -> bool {
        self.scene.counters().faults_answered == count && self.scene.resident_pages() == count * self.pages
    }
}

/// Takes a page back that is known and bound, one mapping of so many.
pub struct Invalidated(Scene);

impl Invalidated {
    /// See the type.
    pub fn boxed(mappings: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::new(mappings)?;
        scene.supply(WINDOW)?;
        (0..WINDOWS).for_each(|window| scene.raise(window));
        Ok(Box::new(Self(scene)))
    }
}

impl Operation for Invalidated {
    fn run(&mut self, n: u64) -> bool {
        let command = Invalidate {
            hdr: header(VIRTIO_GPU_CMD_SVM_INVALIDATE, CTX),
            start: (A + scrambled(n, WINDOWS) * WINDOW_BYTES).into(),
            length: PAGE_SIZE.into(),
            event: INVAL_UNMAP.into(),
            reserved: 0.into(),
        };
        self.0.control(command.as_bytes())
    }

    fn is_done(&self, count: u64) -> bool {
        self.0.counters().invalidations == count && self.0.resident_pages() == WINDOWS * WINDOW - count
    }
}

/// A fault in each of many contexts at once, at one address; of the context that waits longest it is answered, and raised
/// in the next window.
pub struct Stormed {
    scene: Scene,
    /// Of each context what its GPU VM is called on the device, and the fault that waits.
    contexts: Vec<(Asid, Option<u64>)>,
}

impl Stormed {
    /// In so many contexts.
    pub fn boxed(contexts: u32) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::bare(MEMORY)?;
        let contexts = (0..contexts).map(|n| Ok((scene.process(CTX + 1 + n)?, None)));
        let contexts = contexts.collect::<Result<_>>()?;
        Ok(Box::new(Self { scene, contexts }))
    }
}

impl Operation for Stormed {
    fn run(&mut self, n: u64) -> bool {
        let count = self.contexts.len() as u64;
        let (index, window) = (n % count, n / count);
        let Some((asid, waiting)) = usize::try_from(index).ok().and_then(|n| self.contexts.get_mut(n)) else {
            return false;
        };
        let answered = waiting.take().is_none_or(|cookie| {
            let ctx_id = u32::try_from(index).unwrap_or(0) + CTX + 1;
            let head = PageResponse {
                hdr: header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, ctx_id),
                cookie: cookie.into(),
                code: PAGE_RESP_SUCCESS.into(),
                num_runs: 1.into(),
            };
            self.scene.control(&[head.as_bytes(), run_of(window - 1, 1).as_bytes()].concat())
        });
        self.scene.asid = *asid;
        self.scene.raise(window);
        *waiting = self.scene.take_cookie();
        answered && waiting.is_some()
    }
}

/// A context that is made and destroyed, and the record of its end.
pub struct Churned(Scene);

impl Churned {
    const CTX: u32 = CTX + 1;

    /// See the type.
    pub fn boxed() -> Result<Box<dyn Operation>> {
        Ok(Box::new(Self(Scene::bare(MEMORY)?)))
    }
}

impl Operation for Churned {
    fn run(&mut self, _: u64) -> bool {
        let create = CtxCreate { hdr: header(VIRTIO_GPU_CMD_CTX_CREATE, Self::CTX), ..CtxCreate::default() };
        let destroy = header(VIRTIO_GPU_CMD_CTX_DESTROY, Self::CTX);
        let scene = &mut self.0;
        scene.control(create.as_bytes())
            && scene.control(destroy.as_bytes())
            && scene.take_record().is_some_and(|(hdr, _)| hdr.num_records.get() == 1)
    }
}

/// The first pages of a window.
fn run_of(window: u64, pages: u64) -> PageRun {
    PageRun {
        va: (A + window * WINDOW_BYTES).into(),
        gpa: (GPA + window * WINDOW_BYTES % MEMORY).into(),
        pages: u32::try_from(pages).unwrap_or(0).into(),
        flags: 0.into(),
        as_of: 0.into(),
    }
}

/// A request of the process, as a command.
pub fn submission(cmd: u32, body: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(size_of::<ReqHdr>() + body.len())?;
    let hdr = header(VIRTIO_GPU_CMD_SUBMIT_3D, CTX);
    let submit = CmdSubmit { hdr, size: len.into(), padding: 0.into() };
    let request = ReqHdr { cmd: cmd.into(), len: len.into(), seqno: 1.into(), rsp_off: 0.into() };
    Ok([submit.as_bytes(), request.as_bytes(), body].concat())
}

/// The header of a command of the context, or of none.
pub fn header(kind: u32, ctx_id: u32) -> CtrlHdr {
    CtrlHdr { kind: kind.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() }
}
