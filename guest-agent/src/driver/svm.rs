//! The device's commands, answers and records over its queues.
//!
//! Owns the rings, the DMA pages of commands in flight and the event buffers. Any thread may issue commands; one thread
//! pumps: it waits for the interrupt, hands answers to those who wait for them, and returns records. Commands that are
//! posted ([`SvmDevice::post`]) come back through the pump, so that the pumping thread itself can answer faults. What
//! finds no room in the ring waits in the lines of `backlog`: neither a storm of faults nor many small commands can keep
//! another command out, no user another one's, and no context another one's answers.
//!
//! The device answers control commands in order and none of them waits in it (PROTOCOL 4), so room in the ring comes
//! back within the time of the commands that are there. The commands themselves are in `commands`.

use super::dma::{DmaRegion, PAGE_BYTES, Segment};
use super::transport::Transport;
use super::virtqueue::{QueueAddresses, QueueLayout, Used, Virtqueue};
use super::{Error, Result};
use backlog::Backlog;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::control::{
    HelloResp, InvalidateResp, SvmResp, VIRTIO_GPU_CMD_SVM_HELLO, VIRTIO_GPU_CMD_SVM_INVALIDATE,
};
use virtio_gpu_svm::protocol::event::{
    EVENT_BIND_DONE, EVENT_FAULT, EVENT_INVAL_DONE, EVENT_JOB_DONE, EVENT_RECORD_BYTES, EventHdr,
    FaultRecord, JobRecord, NoticeRecord,
};
use virtio_gpu_svm::protocol::gpu::CtrlHdr;
use virtio_gpu_svm::protocol::{CONTROLQ, EVENTQ, NUM_QUEUES};
use zerocopy::FromBytes;

mod backlog;
mod commands;

/// How long an answer is waited for. Commands never wait in the device, so this only bounds how long a dead daemon goes
/// unnoticed.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// How the rings are made. Sizes are powers of two up to 256 and not above what the device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RingConfig {
    /// Descriptors of the control queue.
    pub control_size: u16,
    /// Descriptors of the cursor queue, which is set up and never used.
    pub cursor_size: u16,
    /// Descriptors of the event queue, and pages of event buffers.
    pub event_size: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_IN_ORDER` was negotiated.
    pub in_order: bool,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self { control_size: 256, cursor_size: 16, event_size: 64, event_idx: false, in_order: false }
    }
}

/// Where the rings stand in DMA memory: the three queues, the event buffers, then the pages of commands.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    config: RingConfig,
    queues: [QueueLayout; NUM_QUEUES],
}

impl Rings {
    /// Bytes of DMA memory that serve well: room for the largest command beside many small ones.
    pub const BYTES: usize = 4 << 20;

    /// Lays out the rings.
    ///
    /// # Errors
    /// [`Error::Setup`] for sizes that do not work.
    pub fn new(config: RingConfig) -> Result<Self> {
        let queues = [
            QueueLayout::at(0, config.control_size)?,
            QueueLayout::at(QueueLayout::BYTES, config.cursor_size)?,
            QueueLayout::at(2 * QueueLayout::BYTES, config.event_size)?,
        ];
        Ok(Self { config, queues })
    }

    /// How they are made.
    pub fn config(&self) -> RingConfig {
        self.config
    }

    /// Device addresses of the queues, in their order, for the transport to tell the device.
    ///
    /// # Errors
    /// When `dma` is too small.
    pub fn addresses(&self, dma: &DmaRegion) -> Result<[QueueAddresses; NUM_QUEUES]> {
        let [control, cursor, event] = &self.queues;
        Ok([control.addresses(dma)?, cursor.addresses(dma)?, event.addresses(dma)?])
    }

    fn event_buffers(&self) -> std::ops::Range<usize> {
        let first = NUM_QUEUES * QueueLayout::BYTES / PAGE_BYTES;
        first..first + usize::from(self.config.event_size)
    }
}

/// An answer: its head, and all its bytes.
#[derive(Clone, Debug)]
pub struct Response {
    /// The part that every answer has.
    pub head: SvmResp,
    bytes: Vec<u8>,
}

impl Response {
    /// 0 or a negative errno.
    pub fn status(&self) -> i32 {
        self.head.status.get()
    }

    /// What follows the head.
    pub fn tail(&self) -> &[u8] {
        self.bytes.get(size_of::<SvmResp>()..).unwrap_or_default()
    }

    /// The answer as `T`, which opens with the head.
    fn parse<T: FromBytes>(&self, kind: u32) -> Result<T> {
        T::read_from_prefix(&self.bytes).map(|(value, _)| value).map_err(|_| Error::ShortResponse {
            kind,
            got: self.bytes.len(),
            need: size_of::<T>(),
        })
    }

    /// The answer to a posted HELLO.
    ///
    /// # Errors
    /// [`Error::ShortResponse`].
    pub fn hello(&self) -> Result<HelloResp> {
        self.parse(VIRTIO_GPU_CMD_SVM_HELLO)
    }
}

/// A record of the event queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device fault that waits for an answer.
    Fault(FaultRecord),
    /// The end of a job or an asynchronous bind.
    Job(JobRecord),
    /// Anything else; the kind may be unknown.
    Notice(NoticeRecord),
}

impl Event {
    /// The context that it is about; 0: none.
    pub fn ctx_id(&self) -> u32 {
        match self {
            Self::Fault(fault) => fault.ctx_id.get(),
            Self::Job(job) => job.ctx_id.get(),
            Self::Notice(notice) => notice.ctx_id.get(),
        }
    }
}

/// A command that is posted: its answer comes back through the pump.
#[derive(Clone, Debug)]
pub struct Posted {
    /// Names its answer.
    pub token: u64,
    /// Its bytes.
    pub request: Vec<u8>,
    /// Most bytes of its answer.
    pub response_len: usize,
}

/// The answer to a posted command.
#[derive(Clone, Debug)]
pub struct Completion {
    /// As given to [`SvmDevice::post`].
    pub token: u64,
    /// The answer.
    pub response: Response,
}

/// What one turn of the pump brought.
#[derive(Debug, Default)]
pub struct Pump {
    /// Records, each with the daemon epoch of its buffer.
    pub events: Vec<(u64, Event)>,
    /// When the first of their buffers was found in the ring.
    pub found: Option<Instant>,
    /// Answers to posted commands.
    pub completions: Vec<Completion>,
    /// A daemon epoch other than that of the last HELLO was seen: the daemon has lost this guest's state.
    pub foreign_epoch: Option<u64>,
}

enum Waiter {
    Call(SyncSender<Response>),
    Posted(u64),
}

struct InFlight {
    waiter: Waiter,
    kind: u32,
    ctx_id: u32,
    pages: Vec<usize>,
    /// Pages that the answer is in.
    answer: Vec<usize>,
}

struct Command {
    serial: u64,
    waiter: Waiter,
    kind: u32,
    ctx_id: u32,
    request: Vec<u8>,
    response_len: usize,
}

impl Command {
    /// Of the ring's memory, its answer's included.
    fn pages(&self) -> usize {
        pages_for(self.request.len()) + pages_for(self.response_len)
    }
}

struct Control {
    queue: Virtqueue,
    in_flight: HashMap<u16, InFlight>,
    free_pages: Vec<usize>,
    /// Commands that wait for room.
    backlog: Backlog,
    next_serial: u64,
    broken: bool,
}

impl Control {
    /// Puts a command at the end of its line; its serial number.
    fn line_up(&mut self, waiter: Waiter, request: Vec<u8>, response_len: usize) -> u64 {
        let (kind, ctx_id) = command_number(&request);
        let serial = self.next_serial;
        self.next_serial += 1;
        self.backlog.push(Command { serial, waiter, kind, ctx_id, request, response_len });
        serial
    }
}

/// Sequences of a context's invalidations.
#[derive(Clone, Copy, Default)]
struct Progress {
    accepted: u64,
    done: u64,
}

struct Events {
    queue: Virtqueue,
    /// Buffer page of each head.
    buffers: HashMap<u16, usize>,
}

/// The device.
pub struct SvmDevice {
    transport: Arc<dyn Transport>,
    dma: Arc<DmaRegion>,
    /// Rings and pages of the control queue. Sections are short; none waits.
    control: Mutex<Control>,
    /// The event queue; only the pump takes it.
    events: Mutex<Events>,
    /// Daemon epoch of the last HELLO's answer; 0 before.
    epoch: AtomicU64,
    /// How far the invalidations of each context are.
    progress: Mutex<HashMap<u32, Progress>>,
    progressed: Condvar,
    command_pages: usize,
    control_size: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a short section leaves counters at worst; the rings' own checks stay in force.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SvmDevice {
    /// Takes over queues that the device has been told of ([`Rings::addresses`]) and that are empty, and posts the
    /// event buffers. Nothing is sent before the first command.
    ///
    /// # Errors
    /// When the region is too small for the rings, or the transport fails.
    pub fn new(transport: Arc<dyn Transport>, dma: Arc<DmaRegion>, rings: &Rings) -> Result<Self> {
        let [control, _, event] = rings.queues;
        let RingConfig { event_idx, in_order, .. } = rings.config;
        let buffers = rings.event_buffers();
        let free_pages: Vec<usize> = (buffers.end..dma.num_pages()).collect();
        if free_pages.len() < 8 {
            return Err(Error::Setup("DMA memory is too small for the rings"));
        }
        let device = Self {
            transport,
            control: Mutex::new(Control {
                queue: Virtqueue::new(dma.clone(), control, event_idx, in_order)?,
                in_flight: HashMap::new(),
                backlog: Backlog::default(),
                next_serial: 0,
                broken: false,
                free_pages: free_pages.clone(),
            }),
            events: Mutex::new(Events {
                queue: Virtqueue::new(dma.clone(), event, event_idx, in_order)?,
                buffers: HashMap::new(),
            }),
            dma,
            epoch: AtomicU64::new(0),
            progress: Mutex::new(HashMap::new()),
            progressed: Condvar::new(),
            command_pages: free_pages.len(),
            control_size: usize::from(rings.config.control_size),
        };
        device.post_event_buffers(buffers)?;
        Ok(device)
    }

    fn post_event_buffers(&self, pages: std::ops::Range<usize>) -> Result<()> {
        let mut events = lock(&self.events);
        for page in pages {
            self.post_event_buffer(&mut events, page)?;
        }
        let kick = events.queue.publish()?;
        drop(events);
        if kick { self.notify(EVENTQ) } else { Ok(()) }
    }

    fn post_event_buffer(&self, events: &mut Events, page: usize) -> Result<()> {
        let address = self.dma.address(page * PAGE_BYTES)?;
        let segment = Segment { address, len: 4096 };
        if let Some(head) = events.queue.add(&[], &[segment])? {
            events.buffers.insert(head, page);
        }
        Ok(())
    }

    fn notify(&self, queue: u16) -> Result<()> {
        self.transport.notify(queue).map_err(|source| Error::Transport { what: "doorbell", source })
    }

    /// Daemon epoch that the last HELLO was answered with; 0 before.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    // Progress of invalidations.

    fn note_done(&self, ctx_id: u32, seq: u64) {
        // Of a context that has ended nothing is kept.
        if let Some(known) = lock(&self.progress).get_mut(&ctx_id) {
            known.done = known.done.max(seq);
        }
        self.progressed.notify_all();
    }

    /// A context has ended for good.
    pub fn forget(&self, ctx_id: u32) {
        lock(&self.control).backlog.forget(ctx_id);
        lock(&self.progress).remove(&ctx_id);
    }

    /// A context is about to begin: nothing is known of it but whose its commands are.
    fn begin(&self, ctx_id: u32, line: u32) {
        lock(&self.control).backlog.assign(ctx_id, line);
        lock(&self.progress).insert(ctx_id, Progress::default());
    }

    /// Sequence of the last invalidation of `ctx_id` that the device has accepted. Known before any later answer is
    /// handed out, so an answer that raced with an invalidation finds its sequence here.
    pub fn accepted(&self, ctx_id: u32) -> u64 {
        lock(&self.progress).get(&ctx_id).map_or(0, |progress| progress.accepted)
    }

    /// Notes the sequence of an accepted invalidation, on the pump's thread.
    fn note_accepted(&self, ctx_id: u32, response: &Response) {
        if let Ok(accepted) = response.parse::<InvalidateResp>(VIRTIO_GPU_CMD_SVM_INVALIDATE)
            && let Some(known) = lock(&self.progress).get_mut(&ctx_id)
        {
            known.accepted = known.accepted.max(accepted.seq.get());
        }
    }

    /// Waits until invalidations of `ctx_id` up to `seq` are done: no engine uses what they withdrew. False: `give_up`
    /// said so first; it is asked every now and then, with no lock held: it may take locks under which [`Self::accepted`]
    /// is called.
    pub fn wait_done(&self, ctx_id: u32, seq: u64, give_up: impl Fn() -> bool) -> bool {
        let done = |progress: &HashMap<u32, Progress>| {
            progress.get(&ctx_id).is_some_and(|progress| progress.done >= seq)
        };
        while !done(&lock(&self.progress)) {
            if give_up() {
                return false;
            }
            let progress = lock(&self.progress);
            // Looked at again under the lock that the condition changes under, else the wake-up may be missed.
            if !done(&progress) {
                drop(self.progressed.wait_timeout(progress, Duration::from_millis(100)));
            }
        }
        true
    }

    // The queue.

    /// Sends `head` and `body` as one command and waits for its answer, of at most `response_len` bytes. Some other
    /// thread must pump.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Timeout`], [`Error::Broken`], or what the transport says. A refusal by the device
    /// is not an error here but the answer's status.
    pub fn call(&self, head: &[u8], body: &[u8], response_len: usize) -> Result<Response> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (kind, _) = command_number(head);
        let serial = self.send(Waiter::Call(sender), [head, body].concat(), response_len)?;
        match receiver.recv_timeout(ANSWER_DEADLINE) {
            Ok(response) => Ok(response),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Broken),
            Err(RecvTimeoutError::Timeout) => {
                // Not to be carried out after its caller was told that it was not.
                lock(&self.control).backlog.withdraw(serial);
                Err(Error::Timeout { kind, seconds: ANSWER_DEADLINE.as_secs() })
            }
        }
    }

    /// Sends a command whose answer the pump returns under `token`. Never waits.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Broken`], or what the transport says.
    pub fn post(&self, token: u64, request: Vec<u8>, response_len: usize) -> Result<()> {
        self.post_all(vec![Posted { token, request, response_len }])
    }

    /// Sends commands whose answers the pump returns, with one doorbell for all that find room. Never waits.
    ///
    /// # Errors
    /// As [`Self::post`]; none is sent if one is too large.
    pub fn post_all(&self, posted: Vec<Posted>) -> Result<()> {
        for command in &posted {
            self.check_size(command.request.len(), command.response_len)?;
        }
        let mut control = self.usable()?;
        for Posted { token, request, response_len } in posted {
            control.line_up(Waiter::Posted(token), request, response_len);
        }
        self.ring(control)
    }

    fn send(&self, waiter: Waiter, request: Vec<u8>, response_len: usize) -> Result<u64> {
        self.check_size(request.len(), response_len)?;
        let mut control = self.usable()?;
        let serial = control.line_up(waiter, request, response_len);
        self.ring(control)?;
        Ok(serial)
    }

    fn usable(&self) -> Result<MutexGuard<'_, Control>> {
        let control = lock(&self.control);
        if control.broken { Err(Error::Broken) } else { Ok(control) }
    }

    /// Moves what waits into the ring, as far as there is room, and tells the device.
    fn ring(&self, mut control: MutexGuard<'_, Control>) -> Result<()> {
        let kick = self.flush_backlog(&mut control)?;
        drop(control);
        if kick { self.notify(CONTROLQ) } else { Ok(()) }
    }

    fn check_size(&self, request: usize, response: usize) -> Result<()> {
        if pages_for(request) + pages_for(response) > self.command_pages.min(self.control_size) {
            return Err(Error::TooLarge { request, response });
        }
        Ok(())
    }

    fn flush_backlog(&self, control: &mut Control) -> Result<bool> {
        loop {
            let room = control.free_pages.len().min(control.queue.free_descriptors());
            let Some(command) = control.backlog.pop_if(|command| command.pages() <= room) else { break };
            self.enqueue(control, command)?;
        }
        control.queue.publish()
    }

    /// Puts a command into the ring, which has room for it.
    fn enqueue(&self, control: &mut Control, command: Command) -> Result<()> {
        let request_pages = pages_for(command.request.len());
        let at = control.free_pages.len() - command.pages();
        let pages = control.free_pages.split_off(at);
        let (question, answer) = pages.split_at(request_pages);
        let readable = self.segments(question, command.request.len())?;
        let writable = self.segments(answer, command.response_len)?;
        for (page, chunk) in question.iter().zip(command.request.chunks(PAGE_BYTES)) {
            self.dma.memory().write(page * PAGE_BYTES, chunk)?;
        }
        let answer = answer.to_vec();
        if let Some(head) = control.queue.add(&readable, &writable)? {
            let Command { waiter, kind, ctx_id, .. } = command;
            control.in_flight.insert(head, InFlight { waiter, kind, ctx_id, pages, answer });
        }
        Ok(())
    }

    fn segments(&self, pages: &[usize], len: usize) -> Result<Vec<Segment>> {
        let mut left = len;
        let mut segments = Vec::with_capacity(pages.len());
        for page in pages {
            let bytes = left.min(PAGE_BYTES);
            left -= bytes;
            let too_large = Error::TooLarge { request: len, response: 0 };
            let len = u32::try_from(bytes).map_err(|_| too_large)?;
            segments.push(Segment { address: self.dma.address(page * PAGE_BYTES)?, len });
        }
        Ok(segments)
    }

    // The pump.

    /// Takes what the device has used; if there is nothing, and a `timeout`, waits for an interrupt, at most that long, and
    /// looks once more. One thread at a time.
    ///
    /// # Errors
    /// A protocol violation or a failed transport: the device is not used any more, and all who wait get
    /// [`Error::Broken`].
    pub fn pump(&self, timeout: Duration) -> Result<Pump> {
        let pumped = self.pump_once(timeout);
        if pumped.is_err() {
            self.close();
        }
        pumped
    }

    fn pump_once(&self, timeout: Duration) -> Result<Pump> {
        let mut pump = Pump::default();
        if self.harvest(&mut pump)? || timeout.is_zero() {
            return Ok(pump);
        }
        let control_ready = lock(&self.control).queue.arm()?;
        let events_ready = lock(&self.events).queue.arm()?;
        if !control_ready && !events_ready {
            self.transport.wait(timeout).map_err(|source| Error::Transport { what: "interrupt", source })?;
        }
        self.harvest(&mut pump)?;
        Ok(pump)
    }

    /// Ends the use of the device: everybody who waits, and every later command, gets [`Error::Broken`]. For when nobody
    /// will pump any more.
    pub fn close(&self) {
        let mut control = lock(&self.control);
        control.broken = true;
        control.in_flight.clear();
        control.backlog.clear();
    }

    /// True if anything was there.
    fn harvest(&self, pump: &mut Pump) -> Result<bool> {
        let mut control = lock(&self.control);
        let mut answered = false;
        while let Some(used) = control.queue.take_used()? {
            answered = true;
            self.on_answer(&mut control, used, pump)?;
        }
        let kick = if answered { self.flush_backlog(&mut control)? } else { false };
        drop(control);
        if kick {
            self.notify(CONTROLQ)?;
        }
        Ok(self.harvest_events(pump)? | answered)
    }

    fn on_answer(&self, control: &mut Control, used: Used, pump: &mut Pump) -> Result<()> {
        let Some(command) = control.in_flight.remove(&used.head) else {
            return Err(Error::Broken);
        };
        let got = usize::try_from(used.len).unwrap_or(usize::MAX);
        let mut bytes = vec![0; got.min(command.answer.len() * PAGE_BYTES)];
        for (page, chunk) in command.answer.iter().zip(bytes.chunks_mut(PAGE_BYTES)) {
            self.dma.memory().read(page * PAGE_BYTES, chunk)?;
        }
        control.free_pages.extend(command.pages);
        let kind = command.kind;
        let (head, _) = SvmResp::read_from_prefix(&bytes).map_err(|_| Error::ShortResponse {
            kind,
            got,
            need: size_of::<SvmResp>(),
        })?;
        self.note_epoch(kind, &head, pump);
        let response = Response { head, bytes };
        // Of the context that was asked about: an answer's header names one only to commands with a fence (PROTOCOL 2.4).
        if command.ctx_id != 0 {
            self.note_done(command.ctx_id, head.inval_done_seq.get());
        }
        if kind == VIRTIO_GPU_CMD_SVM_INVALIDATE && response.status() == 0 {
            self.note_accepted(command.ctx_id, &response);
        }
        match command.waiter {
            // Whoever called may have given up; then nobody wants the answer.
            Waiter::Call(sender) => drop(sender.try_send(response)),
            Waiter::Posted(token) => pump.completions.push(Completion { token, response }),
        }
        Ok(())
    }

    fn note_epoch(&self, kind: u32, head: &SvmResp, pump: &mut Pump) {
        let epoch = head.daemon_epoch.get();
        if kind == VIRTIO_GPU_CMD_SVM_HELLO && head.status.get() == 0 {
            self.epoch.store(epoch, Ordering::Release);
            pump.foreign_epoch = None;
        } else if self.epoch() != 0 && epoch != self.epoch() {
            pump.foreign_epoch = Some(epoch);
        }
    }

    fn harvest_events(&self, pump: &mut Pump) -> Result<bool> {
        let mut events = lock(&self.events);
        let mut any = false;
        while let Some(used) = events.queue.take_used()? {
            any = true;
            pump.found.get_or_insert_with(Instant::now);
            let Some(page) = events.buffers.remove(&used.head) else {
                return Err(Error::Broken);
            };
            let mut bytes = vec![0; usize::try_from(used.len).unwrap_or(0).min(PAGE_BYTES)];
            self.dma.memory().read(page * PAGE_BYTES, &mut bytes)?;
            self.on_events(&bytes, pump);
            self.post_event_buffer(&mut events, page)?;
        }
        let kick = events.queue.publish()?;
        drop(events);
        if kick {
            self.notify(EVENTQ)?;
        }
        Ok(any)
    }

    fn on_events(&self, bytes: &[u8], pump: &mut Pump) {
        let Ok((header, records)) = EventHdr::read_from_prefix(bytes) else { return };
        let epoch = header.daemon_epoch.get();
        if self.epoch() != 0 && epoch != self.epoch() {
            pump.foreign_epoch = Some(epoch);
        }
        let count = usize::try_from(header.num_records.get()).unwrap_or(usize::MAX);
        for record in records.chunks_exact(EVENT_RECORD_BYTES).take(count) {
            let Ok(notice) = NoticeRecord::read_from_bytes(record) else { continue };
            let event = match notice.kind.get() {
                EVENT_FAULT => FaultRecord::read_from_bytes(record).ok().map(Event::Fault),
                EVENT_JOB_DONE | EVENT_BIND_DONE => JobRecord::read_from_bytes(record).ok().map(Event::Job),
                _ => Some(Event::Notice(notice)),
            };
            if let Some(event) = event {
                self.note_event(&event);
                pump.events.push((epoch, event));
            }
        }
    }

    fn note_event(&self, event: &Event) {
        if let Event::Notice(notice) = event
            && notice.kind.get() == EVENT_INVAL_DONE
        {
            self.note_done(notice.ctx_id.get(), notice.value.get());
        }
    }
}

/// Number and context of a command.
fn command_number(request: &[u8]) -> (u32, u32) {
    CtrlHdr::read_from_prefix(request).map_or((0, 0), |(hdr, _)| (hdr.kind.get(), hdr.ctx_id.get()))
}

fn pages_for(bytes: usize) -> usize {
    bytes.div_ceil(PAGE_BYTES)
}
