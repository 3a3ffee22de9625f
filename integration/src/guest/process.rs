//! A process of a simulated guest: its address space, its context, its jobs.

use crate::frontend::ram::GuestRam;
use anyhow::{Context, Result, bail, ensure};
use guest_agent::agent::{Agent, ContextKey, EventSink, Owner};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno;
use virtio_gpu_svm::protocol::event::{EVENT_BIND_DONE, EVENT_JOB_DONE, EVENT_RECORD_BYTES, JobRecord};
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{
    BIND_CPU_ADDR_MIRROR, BIND_OP_MAP, BIND_OP_MAP_USERPTR, BIND_OP_UNMAP, BindOp, Exec, ExecRsp, FencePoint,
    ReqHdr, SVM_REQ_EXEC, SVM_REQ_VM_BIND, SVM_REQ_VM_CREATE, VM_BIND_ASYNC, VmBind, VmBindRsp, VmCreate,
    VmCreateRsp,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How long a job may take; only what hangs takes as long.
const JOB_PATIENCE: Duration = Duration::from_secs(120);

/// A process' GPU VM on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuVm {
    /// Its id in the context.
    pub vm_id: u32,
    /// Its id in the device's fault reports.
    pub asid: u32,
}

/// A place on a timeline: of whom it waits, and what it promises.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn<'a> {
    /// The ring.
    pub ring_idx: u32,
    /// Points that must be reached before.
    pub waits: &'a [FencePoint],
    /// The point that is reached afterwards, or 0.
    pub signal: u64,
}

/// A process.
pub struct SimulatedProcess {
    agent: Arc<Agent>,
    ram: Arc<GuestRam>,
    key: ContextKey,
    /// Page number of the process -> guest-physical address.
    pages: BTreeMap<u64, u64>,
    vms: BTreeMap<u32, GpuVm>,
    jobs: Receiver<JobRecord>,
}

/// Sorts out the ends of jobs; a process hears of its own only.
struct JobSink(Sender<JobRecord>);

impl EventSink for JobSink {
    fn push(&self, record: &[u8; EVENT_RECORD_BYTES]) {
        if let Ok(job) = JobRecord::read_from_bytes(record)
            && [EVENT_JOB_DONE, EVENT_BIND_DONE].contains(&job.kind.get())
        {
            // A process that has gone does not wait for its jobs.
            self.0.send(job).ok();
        }
    }
}

impl SimulatedProcess {
    pub(super) fn new(agent: &Arc<Agent>, ram: &Arc<GuestRam>, name: &str) -> Result<Self> {
        let (sender, jobs) = channel();
        let owner = Owner { name: name.into(), ..Owner::default() };
        let key = agent.create_context(owner, Arc::new(JobSink(sender)))?;
        let (agent, ram) = (agent.clone(), ram.clone());
        Ok(Self { agent, ram, key, pages: BTreeMap::new(), vms: BTreeMap::new(), jobs })
    }

    /// Its context at the daemon.
    pub fn ctx_id(&self) -> u32 {
        self.key.ctx_id()
    }

    /// Makes memory at its CPU addresses `[va, va + bytes)`. Returns what names it.
    ///
    /// # Errors
    /// The agent refused.
    pub fn map_memory(&mut self, va: u64, bytes: u64) -> Result<u64> {
        let arena = self.agent.create_arena(self.key, va, bytes)?;
        self.pages.extend((va / PAGE_SIZE..).zip(arena.pages));
        Ok(arena.id)
    }

    /// Gives memory back; on return no engine uses it.
    ///
    /// # Errors
    /// The agent refused.
    pub fn unmap_memory(&mut self, arena: u64, va: u64, bytes: u64) -> Result<()> {
        self.agent.free_arena(self.key, arena)?;
        self.pages.retain(|page, _| !(va..va + bytes).contains(&(page * PAGE_SIZE)));
        Ok(())
    }

    /// Writes to its own memory.
    ///
    /// # Errors
    /// It has none there: a real process would have got a signal.
    pub fn write(&self, va: u64, bytes: &[u8]) -> Result<()> {
        self.each_page(va, bytes.len(), |gpa, range| self.ram.write(gpa, &bytes[range]))
    }

    /// Reads its own memory.
    ///
    /// # Errors
    /// It has none there.
    pub fn read(&self, va: u64, bytes: &mut [u8]) -> Result<()> {
        self.each_page(va, bytes.len(), |gpa, range| self.ram.read(gpa, &mut bytes[range]))
    }

    /// Reads a word of its own memory.
    ///
    /// # Errors
    /// It has none there.
    pub fn read_word(&self, va: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(va, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn each_page(
        &self,
        va: u64,
        len: usize,
        mut act: impl FnMut(u64, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let at = va + done as u64;
            let page = self.pages.get(&(at / PAGE_SIZE));
            let gpa = page.with_context(|| format!("the process has no memory at {at:#x}"))? + at % PAGE_SIZE;
            let end = len.min(done + usize::try_from(PAGE_SIZE - at % PAGE_SIZE)?);
            act(gpa, done..end)?;
            done = end;
        }
        Ok(())
    }

    /// Creates its GPU VM on a device.
    ///
    /// # Errors
    /// The device refused.
    pub fn create_vm(&mut self, dev_id: u32) -> Result<GpuVm> {
        let hdr = header::<VmCreate>(SVM_REQ_VM_CREATE, 0)?;
        let request = VmCreate { hdr, dev_id: dev_id.into(), ..VmCreate::default() };
        let reply: VmCreateRsp = self.request(&request, &[])?;
        let vm = GpuVm { vm_id: reply.vm_id.get(), asid: reply.asid.get() };
        self.vms.insert(dev_id, vm);
        Ok(vm)
    }

    /// Its GPU VM on a device.
    ///
    /// # Errors
    /// It has none.
    pub fn vm(&self, dev_id: u32) -> Result<GpuVm> {
        self.vms.get(&dev_id).copied().with_context(|| format!("no GPU VM on device {dev_id}"))
    }

    /// Shows its memory A..B at C..D of its GPU VM: `[va, va + bytes)` at `gpu_addr`.
    ///
    /// # Errors
    /// The device refused.
    pub fn bind(&self, dev_id: u32, gpu_addr: u64, va: u64, bytes: u64) -> Result<()> {
        let op = BindOp {
            op: BIND_OP_MAP_USERPTR.into(),
            addr: gpu_addr.into(),
            range: bytes.into(),
            obj_offset: va.into(),
            ..BindOp::default()
        };
        self.vm_bind(dev_id, op)
    }

    /// Mirrors its addresses: CPU address = GPU address + `offset`, for `bytes` from `gpu_addr`.
    ///
    /// # Errors
    /// The device refused.
    pub fn mirror(&self, dev_id: u32, gpu_addr: u64, offset: i64, bytes: u64) -> Result<()> {
        let op = BindOp {
            op: BIND_OP_MAP.into(),
            flags: BIND_CPU_ADDR_MIRROR.into(),
            addr: gpu_addr.into(),
            range: bytes.into(),
            obj_offset: offset.cast_unsigned().into(),
            ..BindOp::default()
        };
        self.vm_bind(dev_id, op)
    }

    /// Takes a range out of its GPU VM.
    ///
    /// # Errors
    /// The device refused.
    pub fn unbind(&self, dev_id: u32, gpu_addr: u64, bytes: u64) -> Result<()> {
        let op = BindOp {
            op: BIND_OP_UNMAP.into(),
            addr: gpu_addr.into(),
            range: bytes.into(),
            ..BindOp::default()
        };
        self.vm_bind(dev_id, op)
    }

    fn vm_bind(&self, dev_id: u32, op: BindOp) -> Result<()> {
        let hdr = header::<VmBind>(SVM_REQ_VM_BIND, size_of::<BindOp>())?;
        let vm_id = self.vm(dev_id)?.vm_id.into();
        let request = VmBind { hdr, vm_id, num_binds: 1.into(), ..VmBind::default() };
        self.request::<VmBindRsp>(&request, op.as_bytes()).map(drop)
    }

    /// Launches a job. Returns its id.
    ///
    /// # Errors
    /// The device refused.
    pub fn exec(&self, dev_id: u32, ring_idx: u32, user_data: u64, packets: &[Packet]) -> Result<u64> {
        self.exec_in_turn(dev_id, Turn { ring_idx, ..Turn::default() }, user_data, packets)
    }

    /// Launches a job that waits for points and promises one. Returns its id.
    ///
    /// # Errors
    /// The device refused.
    pub fn exec_in_turn(
        &self,
        dev_id: u32,
        turn: Turn<'_>,
        user_data: u64,
        packets: &[Packet],
    ) -> Result<u64> {
        let lists = [turn.waits.as_bytes(), packets.as_bytes()].concat();
        let request = Exec {
            hdr: header::<Exec>(SVM_REQ_EXEC, lists.len())?,
            vm_id: self.vm(dev_id)?.vm_id.into(),
            ring_idx: turn.ring_idx.into(),
            num_packets: u32::try_from(packets.len())?.into(),
            num_waits: u32::try_from(turn.waits.len())?.into(),
            user_data: user_data.into(),
            signal: turn.signal.into(),
        };
        Ok(self.request::<ExecRsp>(&request, &lists)?.job_id.get())
    }

    /// As [`Self::bind`], in turn with what else is on a ring. Returns the id under which it ends.
    ///
    /// # Errors
    /// The device refused.
    pub fn bind_in_turn(&self, dev_id: u32, turn: Turn<'_>, ops: &[BindOp]) -> Result<u64> {
        let lists = [turn.waits.as_bytes(), ops.as_bytes()].concat();
        let request = VmBind {
            hdr: header::<VmBind>(SVM_REQ_VM_BIND, lists.len())?,
            vm_id: self.vm(dev_id)?.vm_id.into(),
            num_binds: u32::try_from(ops.len())?.into(),
            flags: VM_BIND_ASYNC.into(),
            ring_idx: turn.ring_idx.into(),
            num_waits: u32::try_from(turn.waits.len())?.into(),
            signal: turn.signal.into(),
            ..VmBind::default()
        };
        Ok(self.request::<VmBindRsp>(&request, &lists)?.job_id.get())
    }

    /// A point of its GPU VM on a device.
    ///
    /// # Errors
    /// It has none.
    pub fn point(&self, dev_id: u32, ring_idx: u32, seqno: u64) -> Result<FencePoint> {
        let vm_id = self.vm(dev_id)?.vm_id.into();
        Ok(FencePoint { vm_id, ring_idx: ring_idx.into(), seqno: seqno.into() })
    }

    /// Waits for the next job or asynchronous bind of this process to end, well or not.
    ///
    /// # Errors
    /// None ends.
    pub fn wait_job(&self) -> Result<JobRecord> {
        let waited = self.jobs.recv_timeout(JOB_PATIENCE);
        waited.with_context(|| format!("no job of context {} ends", self.ctx_id()))
    }

    /// Waits for the next job to end, which must be well.
    ///
    /// # Errors
    /// None ends, or not well.
    pub fn finish_job(&self) -> Result<JobRecord> {
        let job = self.wait_job()?;
        let (status, addr) = (job.status.get(), job.addr.get());
        ensure!(
            status == 0,
            "a job of context {} ends with {} in packet {} at {addr:#x}",
            self.ctx_id(),
            errno::name(status),
            job.packet.get()
        );
        Ok(job)
    }

    /// Ends the process, whatever it has in flight.
    pub fn exit(self) {
        self.agent.destroy_context(self.key);
    }

    fn request<T: FromBytes>(&self, request: &(impl IntoBytes + Immutable), tail: &[u8]) -> Result<T> {
        let payload = [request.as_bytes(), tail].concat();
        let response = self.agent.submit(self.key, &payload, size_of::<T>())?;
        if response.status() != 0 {
            bail!("the device refuses with {}", errno::name(response.status()));
        }
        let (reply, _) = T::read_from_prefix(response.tail())
            .map_err(|_| anyhow::anyhow!("a reply of {} bytes", response.tail().len()))?;
        Ok(reply)
    }
}

/// The header of a request with `tail` bytes behind its fixed part.
fn header<T>(cmd: u32, tail: usize) -> Result<ReqHdr> {
    let len = u32::try_from(size_of::<T>() + tail)?;
    Ok(ReqHdr { cmd: cmd.into(), len: len.into(), ..ReqHdr::default() })
}
