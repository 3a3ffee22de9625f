//! The library without rings: a guest whose commands are calls, and a soft device without a running engine (unless one is
//! started), whose faults are raised by whoever measures. What is measured with it says that it is in process.

use crate::wire;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use std::thread::JoinHandle;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::soft::{SoftConfig, SoftDevice};
use virtio_gpu_svm::device::{Access, Asid, Device, Events, Fault, JobId, StopId};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::SvmResp;
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::request::VmCreateRsp;
use virtio_gpu_svm::protocol::{MAX_RESPONSE_BYTES, errno};
use vm_memory::mmap::MmapRegion;
use zerocopy::FromBytes;

/// Where guest memory begins: as leaves do.
pub const GPA: u64 = 0x20_0000;
/// As much as anybody here asks for.
const MANY: u32 = 1 << 20;
/// Bytes that a call may fill with records.
const RECORDS: usize = size_of::<EventHdr>() + 64 * EVENT_RECORD_BYTES;

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

/// A guest that is called.
pub struct Library {
    device: Arc<SoftDevice>,
    engine: Option<JoinHandle<()>>,
    host: Arc<Host>,
    guest: Arc<Guest>,
    response: Vec<u8>,
    records: Vec<u8>,
}

/// A process: its context, its GPU VM on device 0, and what the device calls that.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// The context.
    pub ctx_id: u32,
    /// The GPU VM.
    pub vm_id: u32,
    /// Its id on the device.
    pub asid: u32,
}

impl Library {
    /// A guest with so much memory, of which nothing is touched.
    ///
    /// # Errors
    /// The host has no address space left, or HELLO is refused.
    pub fn new(memory: u64) -> Result<Self> {
        let device = SoftDevice::new(SoftConfig::default());
        let host = Host::new(vec![Arc::clone(&device) as Arc<dyn Device>]);
        let limits = Limits {
            contexts: MANY,
            gpu_vms: MANY,
            resources: MANY,
            total_mappings: MANY,
            table_bytes: 1 << 40,
            total_pending_faults: MANY,
            fault_deadline_ms: 0,
            ..Limits::DEFAULT
        };
        let guest = host.open_guest("vm0", limits, &[0], Arc::new(Silent));
        let identity = RegionIdentity { inode: (0, 1), offset: 0, size: memory, gpa: GPA };
        let region = Region::new(identity, MmapRegion::new(usize::try_from(memory)?)?);
        guest.set_memory(Arc::new(MemoryTable::new(vec![region])?));
        let mut library = Self { device, engine: None, host, guest, response: vec![], records: vec![] };
        library.control(&wire::hello(1))?;
        Ok(library)
    }

    /// Carries out a command that must be accepted; its reply.
    ///
    /// # Errors
    /// It is refused.
    pub fn control(&mut self, command: &[u8]) -> Result<&[u8]> {
        self.guest.control(command, &mut self.response, MAX_RESPONSE_BYTES);
        let (head, reply) = SvmResp::ref_from_prefix(&self.response).ok().context("a short answer")?;
        let status = head.status.get();
        ensure!(status == 0, "a command is refused: {}", errno::name(status));
        Ok(reply)
    }

    /// Gives the device its engine, which lets go of what is destroyed.
    pub fn start_engine(&mut self) {
        let events: Arc<dyn Events> = self.host.clone();
        self.device.start(Arc::downgrade(&events));
        let device = Arc::clone(&self.device);
        self.engine = Some(std::thread::spawn(move || device.run_engine(0)));
    }

    /// Creates a context with a GPU VM.
    ///
    /// # Errors
    /// It is refused.
    pub fn create_process(&mut self, ctx_id: u32) -> Result<Process> {
        self.control(&wire::create_context(ctx_id))?;
        let reply = self.control(&wire::create_vm(ctx_id))?;
        let (reply, _) = VmCreateRsp::read_from_prefix(reply).ok().context("a short reply")?;
        Ok(Process { ctx_id, vm_id: reply.vm_id.get(), asid: reply.asid.get() })
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }
    /// The guest.
    pub fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    /// An engine reads a word, and is parked.
    pub fn raise(&self, process: Process, stop: u64, addr: u64) {
        let fault = Fault {
            asid: Asid(process.asid),
            stop: StopId(stop),
            job: JobId(1),
            addr: GpuAddr(addr),
            pages: 1,
            length_hint: 8,
            access: Access::Read,
            engine: 0,
            level: 0,
        };
        self.host.fault(0, fault);
    }

    /// Takes all records, and hands out those of faults. How many records there were.
    ///
    /// # Errors
    /// A record is short.
    pub fn take_records(&mut self, mut fault: impl FnMut(FaultRecord)) -> Result<usize> {
        let mut count = 0;
        // What an engine or a command has left to the housekeeper, which nobody else is here.
        self.host.work_off();
        loop {
            self.guest.fill_events(&mut self.records, RECORDS);
            let Ok((_, records)) = EventHdr::read_from_prefix(&self.records) else { return Ok(count) };
            if records.is_empty() {
                return Ok(count);
            }
            for record in records.chunks_exact(EVENT_RECORD_BYTES) {
                let record = FaultRecord::read_from_bytes(record).ok().context("a short record")?;
                count += 1;
                if record.kind.get() == EVENT_FAULT {
                    fault(record);
                }
            }
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            self.device.shutdown();
            // A panic of it was told already.
            engine.join().ok();
        }
    }
}
