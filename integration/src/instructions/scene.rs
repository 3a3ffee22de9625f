//! Whole faults: a guest without a VMM, and a soft device without engines. Faults are raised by whoever counts, as an
//! engine would; binding goes into the device's own page table, and nobody is there to be resumed.
//!
//! What an engine does besides (the walk that misses, parking, going on) and what rings and wake-ups cost is not here.

use std::sync::Arc;

use anyhow::Result;
use virtio_gpu_svm::context::Context;
use virtio_gpu_svm::device::Asid;
use virtio_gpu_svm::info::Counters;
use virtio_gpu_svm::protocol::control::{
    PAGE_RESP_SUCCESS, PageResponse, PageRun, VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE,
};
use virtio_gpu_svm::protocol::event::{EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::request::{BIND_OP_MAP_USERPTR, BindOp};
use virtio_gpu_svm::protocol::{MAX_RUNS, PAGE_SIZE};
use zerocopy::{FromBytes, IntoBytes};

use crate::library::{GPA, Library, Process};
use crate::wire;

use super::workload::{MAPPINGS, Operation, WINDOWS, scrambled};

/// A of the first page.
pub const A: u64 = 0x7f00_0000_0000;
/// C of the first page.
pub const C: u64 = 0x10_0000_0000;
/// Pages that a fault binds at most: an operation has a window of its own.
pub const WINDOW: u64 = 16;
const WINDOW_BYTES: u64 = WINDOW * PAGE_SIZE;
/// Guest memory; every window of A is the same pages of it.
const MEMORY: u64 = 8 << 20;
/// The context.
pub const CTX: u32 = 1;
/// A context with one GPU VM that maps all windows at C.
pub struct Scene {
    library: Library,
    process: Process,
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
        let mut library = Library::new(memory_bytes)?;
        let process = library.create_process(CTX)?;
        Ok(Self { library, process, records: Vec::new() })
    }

    /// The context.
    pub fn context(&self) -> Result<Arc<Context>> {
        Ok(self.library.guest().context(CTX)?)
    }

    /// Another context, with a GPU VM that shows all windows.
    fn process(&mut self, ctx_id: u32) -> Result<Process> {
        let process = self.library.create_process(ctx_id)?;
        let operation = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: C.into(),
            range: (WINDOWS * WINDOW_BYTES).into(),
            obj_offset: A.into(),
            ..BindOp::default()
        };
        self.library.control(&wire::bind(ctx_id, process.vm_id, &[operation]))?;
        Ok(process)
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
        self.library.control(&wire::bind(CTX, self.process.vm_id, &operations)).map(drop)
    }

    /// Makes the first pages of every window known.
    pub fn supply(&mut self, pages: u64) -> Result<()> {
        let runs: Vec<_> = (0..WINDOWS).map(|window| run_of(window, pages)).collect();
        for runs in runs.chunks(usize::try_from(MAX_RUNS)?) {
            self.library.control(&wire::supply(CTX, runs))?;
        }
        Ok(())
    }

    /// Carries out a command; whether its status is 0.
    pub fn control(&mut self, request: &[u8]) -> bool {
        self.library.control(request).is_ok()
    }

    /// Answers a command.
    pub fn answer(&self, request: &[u8], response: &mut Vec<u8>, room: usize) {
        self.library.guest().control(request, response, room);
    }

    /// A job reads the first word of a window.
    pub fn raise(&self, window: u64) {
        self.library.raise(self.process, window, C + window * WINDOW_BYTES);
    }

    /// The cookie of the one fault whose record waits.
    fn take_cookie(&mut self) -> Option<u64> {
        let (_, record) = self.take_record()?;
        let (record, _) = FaultRecord::read_from_prefix(record).ok()?;
        Some(record.cookie.get())
    }

    /// The one record that waits, and what stands before it.
    fn take_record(&mut self) -> Option<(EventHdr, &[u8])> {
        self.library.guest().fill_events(&mut self.records, size_of::<EventHdr>() + EVENT_RECORD_BYTES);
        EventHdr::read_from_prefix(&self.records).ok()
    }

    /// What has been counted.
    pub fn counters(&self) -> Counters {
        self.library.host().stats().counters
    }

    /// Blob resources of the guest.
    pub fn resources(&self) -> usize {
        self.library.guest().status().resources
    }

    /// Pages of the GPU VM that have a translation.
    pub fn resident_pages(&self) -> u64 {
        let device = self.library.host().device(0);
        device.map_or(0, |device| device.resident_pages(Asid(self.process.asid)))
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
            hdr: wire::header(VIRTIO_GPU_CMD_SVM_PAGE_RESPONSE, CTX),
            cookie: cookie.into(),
            code: PAGE_RESP_SUCCESS.into(),
            num_runs: 1.into(),
            flags: 0.into(),
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
pub struct Invalidated {
    scene: Scene,
    /// By window.
    commands: Vec<Vec<u8>>,
}

impl Invalidated {
    /// See the type.
    pub fn boxed(mappings: u64) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::new(mappings)?;
        scene.supply(WINDOW)?;
        (0..WINDOWS).for_each(|window| scene.raise(window));
        let command = |window| wire::invalidate(CTX, A + window * WINDOW_BYTES, PAGE_SIZE);
        Ok(Box::new(Self { scene, commands: (0..WINDOWS).map(command).collect() }))
    }
}

impl Operation for Invalidated {
    fn run(&mut self, n: u64) -> bool {
        let window = usize::try_from(scrambled(n, WINDOWS)).unwrap_or(usize::MAX);
        self.commands.get(window).is_some_and(|command| self.scene.control(command))
    }

    fn is_done(&self, count: u64) -> bool {
        self.scene.counters().invalidations == count
            && self.scene.resident_pages() == WINDOWS * WINDOW - count
    }
}

/// A fault in each of many contexts at once, at one address; of the context that waits longest it is answered, and raised
/// in the next window.
pub struct Stormed {
    scene: Scene,
    /// And the fault of each that waits.
    processes: Vec<(Process, Option<u64>)>,
}

impl Stormed {
    /// In so many contexts.
    pub fn boxed(contexts: u32) -> Result<Box<dyn Operation>> {
        let mut scene = Scene::bare(MEMORY)?;
        let processes = (0..contexts).map(|n| Ok((scene.process(CTX + 1 + n)?, None)));
        let processes = processes.collect::<Result<_>>()?;
        Ok(Box::new(Self { scene, processes }))
    }
}

impl Operation for Stormed {
    fn run(&mut self, n: u64) -> bool {
        let count = self.processes.len() as u64;
        let (index, window) = (n % count, n / count);
        let Some((process, waiting)) = usize::try_from(index).ok().and_then(|n| self.processes.get_mut(n))
        else {
            return false;
        };
        let answered = waiting.take().is_none_or(|cookie| {
            self.scene.control(&wire::answer(process.ctx_id, cookie, &[run_of(window - 1, 1)]))
        });
        self.scene.library.raise(*process, window, C + window * WINDOW_BYTES);
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
        let scene = &mut self.0;
        scene.control(&wire::create_context(Self::CTX))
            && scene.control(&wire::destroy_context(Self::CTX))
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
