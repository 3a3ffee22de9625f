//! A guest that sends commands byte by byte and waits for each answer. Its event buffers are few and small, and it
//! reads them when it is asked to.

use super::super::ram::GuestRam;
use super::super::vmm::Vmm;
use super::super::{Profile, RingAddresses};
use super::{DESC_F_WRITE, Descriptor, RawRing};
use anyhow::{Context, Result, bail, ensure};
use guest_agent::driver::Transport;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::control::{Hello, HelloResp, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO};
use virtio_gpu_svm::protocol::event::{
    EVENT_BIND_DONE, EVENT_FAULT, EVENT_JOB_DONE, EVENT_RECORD_BYTES, EventHdr, FaultRecord, JobRecord,
    NoticeRecord,
};
use virtio_gpu_svm::protocol::gpu::{CmdSubmit, CtrlHdr, VIRTIO_GPU_CMD_SUBMIT_3D};
use virtio_gpu_svm::protocol::limit::Limit;
use virtio_gpu_svm::protocol::{CONTROLQ, CURSORQ, EVENTQ, NUM_QUEUES, VERSION_MAJOR, VERSION_MINOR};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How long an answer or record may take. Nothing here depends on how long it really takes.
const PATIENCE: Duration = Duration::from_secs(20);
const EVENT_BUFFERS: u16 = 16;
/// Records that an event buffer has room for.
pub const RECORDS_PER_BUFFER: usize = 10;
const EVENT_BUFFER_BYTES: u64 = (size_of::<EventHdr>() + RECORDS_PER_BUFFER * EVENT_RECORD_BYTES) as u64;
const RING_SIZE: u16 = 64;

/// A record of the event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A fault.
    Fault(FaultRecord),
    /// The end of a job or an asynchronous bind.
    Job(JobRecord),
    /// Anything else.
    Notice(NoticeRecord),
}

/// A guest whose driver does as it is told.
pub struct RawGuest {
    vmm: Vmm,
    control: RawRing,
    cursor: RawRing,
    events: RawRing,
    /// Guest-physical address of the event buffers.
    buffers: u64,
    /// Event buffers that the device does not have.
    spare: Vec<u16>,
    /// Whether it gets them back as soon as they are read.
    recycle: bool,
    /// Where paused rings go on.
    bases: [u16; NUM_QUEUES],
    records: Vec<Record>,
}

impl RawGuest {
    /// Connects without a CPU, and lets the rings run.
    ///
    /// # Errors
    /// As the VMM's.
    pub fn connect(socket: &Path, ram: &Arc<GuestRam>, profile: Profile) -> Result<Self> {
        Self::over(Vmm::without_cpu(socket, ram, profile)?)
    }

    /// Sets up rings in a VMM's guest memory, and lets them run.
    ///
    /// # Errors
    /// No guest memory is left, or the daemon refused.
    pub fn over(vmm: Vmm) -> Result<Self> {
        let mut guest = Self::without_event_buffers(vmm)?;
        guest.recycle = true;
        guest.post_event_buffers(usize::from(EVENT_BUFFERS))?;
        Ok(guest)
    }

    /// The same without buffers for events: none comes but into those that are posted, and each is used once.
    ///
    /// # Errors
    /// As [`Self::over`].
    pub fn without_event_buffers(vmm: Vmm) -> Result<Self> {
        let ram = vmm.ram().clone();
        let ring = || RawRing::new(&ram, RING_SIZE);
        let (control, cursor, events) = (ring()?, ring()?, ring()?);
        let buffers = ram.take_dma(u64::from(EVENT_BUFFERS) * EVENT_BUFFER_BYTES)?;
        let spare = (0..EVENT_BUFFERS).collect();
        let (recycle, bases, records) = (false, [0; NUM_QUEUES], vec![]);
        let guest = Self { vmm, control, cursor, events, buffers, spare, recycle, bases, records };
        guest.vmm.start_queues(&guest.rings())?;
        Ok(guest)
    }

    /// Gives the device `count` buffers for events, of [`RECORDS_PER_BUFFER`] records each.
    ///
    /// # Errors
    /// It has that many already.
    pub fn post_event_buffers(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let index = self.spare.pop().context("the device has all event buffers")?;
            let addr = self.buffers + u64::from(index) * EVENT_BUFFER_BYTES;
            let len = u32::try_from(EVENT_BUFFER_BYTES)?;
            self.events.write_descriptor(index, Descriptor { addr, len, flags: DESC_F_WRITE, next: 0 })?;
            self.events.publish(index)?;
        }
        Ok(self.vmm.notify(EVENTQ)?)
    }

    fn rings(&self) -> [RingAddresses; NUM_QUEUES] {
        [self.control.addresses(), self.cursor.addresses(), self.events.addresses()]
    }

    /// Stops the rings, as a VMM does that pauses its guest.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn pause(&mut self) -> Result<()> {
        self.bases = self.vmm.stop_queues()?;
        Ok(())
    }

    /// Lets paused rings go on where they were.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn resume(&mut self) -> Result<()> {
        self.vmm.resume_queues(&self.rings(), self.bases)
    }

    /// Starts the rings, which were stopped, from nothing, as a driver does that begins anew. What the old one had not
    /// read is forgotten.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn begin_anew(&mut self) -> Result<()> {
        for ring in [&mut self.control, &mut self.cursor, &mut self.events] {
            ring.clear()?;
        }
        self.records.clear();
        self.spare = (0..EVENT_BUFFERS).collect();
        self.vmm.start_queues(&self.rings())?;
        if self.recycle { self.post_event_buffers(usize::from(EVENT_BUFFERS)) } else { Ok(()) }
    }

    /// The VMM.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// The control queue's ring, to be written by hand.
    pub fn control_ring(&mut self) -> &mut RawRing {
        &mut self.control
    }

    /// Sends bytes as one command of the control queue, with `room` bytes for the answer.
    ///
    /// # Errors
    /// No answer comes.
    pub fn command(&mut self, request: &[u8], room: u32) -> Result<Vec<u8>> {
        exchange(&self.vmm, &mut self.control, CONTROLQ, request, room)
    }

    /// The same on the cursor queue.
    ///
    /// # Errors
    /// No answer comes.
    pub fn cursor_command(&mut self, request: &[u8], room: u32) -> Result<Vec<u8>> {
        exchange(&self.vmm, &mut self.cursor, CURSORQ, request, room)
    }

    /// Rings the control queue's doorbell and waits for the device to give back the chain `head`. Returns how many bytes
    /// it wrote.
    ///
    /// # Errors
    /// It does not come back.
    pub fn kick_and_wait(&mut self, head: u16) -> Result<u32> {
        self.vmm.notify(CONTROLQ)?;
        wait_used(&self.vmm, &mut self.control, head)
    }

    /// Sends a command of a fixed form, and its tail.
    ///
    /// # Errors
    /// No answer comes, or a shorter one.
    pub fn send<T: FromBytes>(&mut self, head: &(impl IntoBytes + Immutable), tail: &[u8]) -> Result<T> {
        let request = [head.as_bytes(), tail].concat();
        let answer = self.command(&request, u32::try_from(size_of::<T>().max(size_of::<SvmResp>()))?)?;
        let (value, _) = T::read_from_prefix(&answer)
            .map_err(|_| anyhow::anyhow!("an answer of {} bytes: {answer:02x?}", answer.len()))?;
        Ok(value)
    }

    /// Opens a driver's life.
    ///
    /// # Errors
    /// The device refused.
    pub fn hello(&mut self, incarnation: u64) -> Result<HelloResp> {
        let hdr = CtrlHdr { kind: VIRTIO_GPU_CMD_SVM_HELLO.into(), ..CtrlHdr::default() };
        let version = u32::from(VERSION_MAJOR) << 16 | u32::from(VERSION_MINOR);
        let hello =
            Hello { hdr, incarnation: incarnation.into(), version: version.into(), reserved: 0.into() };
        let answer: HelloResp = self.send(&hello, &[])?;
        ensure!(answer.resp.status.get() == 0, "HELLO is refused: {answer:?}");
        Ok(answer)
    }

    /// Sends requests of a process. The answer is the head and the reply area.
    ///
    /// # Errors
    /// No answer comes.
    pub fn submit(&mut self, ctx_id: u32, payload: &[u8], reply_room: usize) -> Result<(SvmResp, Vec<u8>)> {
        let hdr =
            CtrlHdr { kind: VIRTIO_GPU_CMD_SUBMIT_3D.into(), ctx_id: ctx_id.into(), ..CtrlHdr::default() };
        let submit = CmdSubmit { hdr, size: u32::try_from(payload.len())?.into(), padding: 0.into() };
        let request = [submit.as_bytes(), payload].concat();
        let answer = self.command(&request, u32::try_from(size_of::<SvmResp>() + reply_room)?)?;
        let (head, reply) = SvmResp::read_from_prefix(&answer)
            .map_err(|_| anyhow::anyhow!("an answer of {} bytes", answer.len()))?;
        Ok((head, reply.to_vec()))
    }

    /// Sends one request of a process. The answer is its reply.
    ///
    /// # Errors
    /// No answer comes, or none for this request.
    pub fn request<T>(
        &mut self,
        ctx_id: u32,
        request: &(impl IntoBytes + Immutable),
        tail: &[u8],
    ) -> Result<T>
    where
        T: FromBytes + KnownLayout + Immutable,
    {
        let payload = [request.as_bytes(), tail].concat();
        let (head, reply) = self.submit(ctx_id, &payload, size_of::<T>())?;
        let limit = Limit::from_wire(head.limit.get()).map_or("no limit", Limit::name);
        ensure!(head.status.get() == 0, "the payload is refused: {} ({limit})", head.status.get());
        let (value, _) = T::read_from_prefix(&reply).map_err(|_| anyhow::anyhow!("a reply of {reply:?}"))?;
        Ok(value)
    }

    /// Takes the next record that `wanted` picks. Those before it are kept.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_record<T>(&mut self, wanted: impl Fn(&Record) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.collect_records()?;
            for index in 0..self.records.len() {
                if let Some(value) = wanted(&self.records[index]) {
                    self.records.remove(index);
                    return Ok(value);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no such record; there are {:?}", self.records);
            self.vmm.wait(left)?;
        }
    }

    /// The next fault of a context.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_fault(&mut self, ctx_id: u32) -> Result<FaultRecord> {
        self.wait_record(|record| match record {
            Record::Fault(fault) if fault.ctx_id.get() == ctx_id => Some(*fault),
            _ => None,
        })
    }

    /// The next end of a job of a context.
    ///
    /// # Errors
    /// None comes.
    pub fn wait_job(&mut self, ctx_id: u32) -> Result<JobRecord> {
        self.wait_record(|record| match record {
            Record::Job(job) if job.ctx_id.get() == ctx_id => Some(*job),
            _ => None,
        })
    }

    /// Takes all records that nobody has waited for so far, in the order in which they came.
    ///
    /// # Errors
    /// The device wrote what is no event buffer.
    pub fn take_records(&mut self) -> Result<Vec<Record>> {
        self.collect_records()?;
        Ok(std::mem::take(&mut self.records))
    }

    /// Records that nobody has waited for so far.
    ///
    /// # Errors
    /// The device wrote what is no event buffer.
    pub fn unclaimed_records(&mut self) -> Result<&[Record]> {
        self.collect_records()?;
        Ok(&self.records)
    }

    fn collect_records(&mut self) -> Result<()> {
        let mut taken = 0;
        while let Some((head, len)) = self.events.take_used()? {
            let head =
                u16::try_from(head).ok().filter(|head| *head < EVENT_BUFFERS).context("event buffer")?;
            ensure!(u64::from(len) <= EVENT_BUFFER_BYTES, "{len} bytes in an event buffer");
            let mut bytes = vec![0; len as usize];
            self.vmm.ram().read(self.buffers + u64::from(head) * EVENT_BUFFER_BYTES, &mut bytes)?;
            self.parse_records(&bytes)?;
            self.spare.push(head);
            taken += 1;
        }
        if self.recycle && taken > 0 { self.post_event_buffers(taken) } else { Ok(()) }
    }

    fn parse_records(&mut self, bytes: &[u8]) -> Result<()> {
        let Ok((header, records)) = EventHdr::read_from_prefix(bytes) else {
            bail!("no event header: {bytes:?}")
        };
        let count = header.num_records.get() as usize;
        ensure!(records.len() == count * EVENT_RECORD_BYTES, "{count} records in {} bytes", records.len());
        for record in records.chunks(EVENT_RECORD_BYTES) {
            let (kind, _) = zerocopy::little_endian::U32::read_from_prefix(record)
                .map_err(|_| anyhow::anyhow!("a short record"))?;
            let read = |_| anyhow::anyhow!("a short record");
            self.records.push(match kind.get() {
                EVENT_FAULT => Record::Fault(FaultRecord::read_from_bytes(record).map_err(|_| read(()))?),
                EVENT_JOB_DONE | EVENT_BIND_DONE => {
                    Record::Job(JobRecord::read_from_bytes(record).map_err(|_| read(()))?)
                }
                _ => Record::Notice(NoticeRecord::read_from_bytes(record).map_err(|_| read(()))?),
            });
        }
        Ok(())
    }
}

fn exchange(vmm: &Vmm, ring: &mut RawRing, queue: u16, request: &[u8], room: u32) -> Result<Vec<u8>> {
    ring.publish_command(request, room, 0xee)?;
    vmm.notify(queue)?;
    let len = wait_used(vmm, ring, 0)?;
    ensure!(len <= room, "the device wrote {len} bytes where there was room for {room}");
    ring.read_response(len)
}

fn wait_used(vmm: &Vmm, ring: &mut RawRing, head: u16) -> Result<u32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some((id, len)) = ring.take_used()? {
            ensure!(id == u32::from(head), "the device gives back chain {id}, not {head}");
            return Ok(len);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "the device does not answer");
        vmm.wait(left)?;
    }
}
