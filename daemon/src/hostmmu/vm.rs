//! A GPU VM as the daemon keeps it: plain state under one lock, and the orders that follow from its changes.
//!
//! Orders are handed to the socket under that lock and without waiting, because their order must be that of the changes;
//! what the socket does not take at once waits in the outbox until the attendant can send it.
//!
//! *Attached* is a VM whose worker is there and that is not frozen: only then does the worker map what the translations
//! say. Freezing unmaps everything and keeps the translations; whoever then touches memory is parked by the kernel, and
//! nobody is told. So a frozen VM needs no checkpoints: its worker has no translation.

use super::clock::Clock;
use super::message::{self, Order, Wait};
use super::translations::{Run, Translations};
use super::worker::LOWEST;
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SendFlags;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::operands::Operands;
use virtio_gpu_svm::device::{Access, Error, Extent, Flush, Job, JobEnd, JobId, StopId, Ticket, Verdict};
use virtio_gpu_svm::memory::Region;
use virtio_gpu_svm::protocol::errno::{ECANCELED, ETIMEDOUT};
use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, Packet};
use virtio_gpu_svm::protocol::{PAGE_SHIFT, PAGE_SIZE};
use virtio_gpu_svm::quota::Charge;

/// Whether there is a worker.
enum Life {
    /// Not yet: nobody has submitted a job.
    Idle,
    /// At the other end of this socket.
    Up(Arc<OwnedFd>),
    /// It is gone, or could not be started. Jobs end with ECANCELED.
    Lost,
}

/// A parked access.
#[derive(Clone, Copy)]
struct Parked {
    /// `None` if it faulted while the VM was frozen, and nobody was told.
    stop: Option<StopId>,
    addr: u64,
    access: Access,
    wait: Wait,
    /// Decided while the VM was frozen.
    decided: Option<Verdict>,
}

/// A job that the worker has, or will have.
struct Queued {
    id: JobId,
    packets: Arc<[Packet]>,
}

#[derive(Default)]
struct Ring {
    queue: VecDeque<Queued>,
    /// How many of the queue the worker has.
    sent: usize,
    parked: Option<Parked>,
    /// How the front job ends, if it was not to go on.
    doom: Option<(i32, u64, Access)>,
    /// The front job's time.
    clock: Clock,
    /// The front job was stopped, because its time is over.
    expired: bool,
}

/// A message that is not sent yet.
struct Letter {
    order: Order,
    packets: Arc<[Packet]>,
    region: Option<Arc<Region>>,
}

/// See the text above.
pub struct VmState {
    life: Life,
    frozen: bool,
    /// Being destroyed: nothing is accepted or told any more.
    pub dying: bool,
    va_end: u64,
    translations: Translations,
    /// What translations name.
    regions: HashMap<u64, Arc<Region>>,
    /// Regions whose file the worker has.
    shared: HashSet<u64>,
    rings: BTreeMap<u32, Ring>,
    /// Rings by thread.
    threads: HashMap<u32, u32>,
    /// How long a job may take.
    job_limit: Option<Duration>,
    /// When the attendant looks at clocks next; not later than any of them is due.
    alarm: Option<Instant>,
    /// The attendant must learn of an alarm that is nearer than it knows.
    alarm_is_news: bool,
    issued: u64,
    passed: u64,
    outbox: VecDeque<Letter>,
}

/// An access that the core is to be told of.
pub struct Stopped {
    /// Whose job.
    pub job: JobId,
    /// See [`virtio_gpu_svm::device::Fault`].
    pub addr: u64,
    /// See [`virtio_gpu_svm::device::Fault`].
    pub length_hint: u64,
    /// See [`virtio_gpu_svm::device::Fault`].
    pub access: Access,
}

impl VmState {
    /// Empty, without a worker; `budget` is how many runs of pages it may have, and `tables` is for them.
    pub fn new(va_end: u64, budget: usize, job_limit: Option<Duration>, tables: Charge) -> Self {
        Self {
            life: Life::Idle,
            frozen: false,
            dying: false,
            va_end,
            translations: Translations::new(budget, tables),
            regions: HashMap::new(),
            shared: HashSet::new(),
            rings: BTreeMap::new(),
            threads: HashMap::new(),
            job_limit,
            alarm: None,
            alarm_is_news: false,
            issued: 0,
            passed: 0,
            outbox: VecDeque::new(),
        }
    }

    /// Whether a worker is to be started.
    pub fn wants_worker(&self) -> bool {
        matches!(self.life, Life::Idle) && self.rings.values().any(|ring| !ring.queue.is_empty())
    }

    /// Whether orders wait until the socket takes them.
    pub fn has_mail(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether the attendant has something to do that it does not hear of otherwise.
    pub fn wants_attendant(&self) -> bool {
        let lost = matches!(self.life, Life::Lost) && !self.rings.is_empty();
        lost || self.wants_worker() || self.has_mail() || self.alarm_is_news
    }

    /// When [`VmState::expire`] is to be called at the latest; the attendant knows from now on.
    pub fn next_alarm(&mut self) -> Option<Instant> {
        self.alarm_is_news = false;
        self.alarm
    }

    /// The ticket of the last fence.
    pub fn last_ticket(&self) -> u64 {
        self.issued
    }

    /// Pages with a translation.
    pub fn resident_pages(&self) -> u64 {
        self.translations.pages()
    }

    /// Bytes that its translations are charged.
    pub fn table_bytes(&self) -> u64 {
        self.translations.bytes()
    }

    /// Pages of the range with a translation.
    pub fn resident_in(&self, range: PageRange) -> u64 {
        self.translations.resident_in(range)
    }

    /// The region that an address is translated to.
    pub fn region_at(&self, addr: GpuAddr) -> Option<Arc<Region>> {
        let run = self.translations.lookup(addr.page())?;
        self.regions.get(&run.region).cloned()
    }

    fn attached(&self) -> bool {
        matches!(self.life, Life::Up(_)) && !self.frozen
    }

    /// A worker has been started: it gets all that has happened so far.
    pub fn attach(&mut self, socket: Arc<OwnedFd>) {
        self.life = Life::Up(socket);
        self.catch_up();
        self.deliver();
    }

    /// There is no worker any more, or none could be started.
    pub fn lose_worker(&mut self) {
        self.life = Life::Lost;
        self.alarm = None;
        self.outbox.clear();
        self.passed = self.issued;
    }

    /// Jobs that can only end with ECANCELED, in order; none while there may be a worker.
    pub fn take_lost_jobs(&mut self) -> Vec<(JobId, JobEnd)> {
        if !matches!(self.life, Life::Lost) {
            return vec![];
        }
        let end = JobEnd { errno: ECANCELED, packet: 0, addr: GpuAddr(0), access: Access::Read };
        let rings = std::mem::take(&mut self.rings);
        rings.into_values().flat_map(|ring| ring.queue).map(|job| (job.id, end)).collect()
    }

    /// Adds translations, for all extents or none.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] for addresses that no process can have.
    ///
    /// # Panics
    /// If an extent is not within its region, or the range not within the space.
    pub fn bind(&mut self, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        if addr.0 < LOWEST {
            return Err(Error::OutOfMemory);
        }
        let mut page = addr.page();
        for extent in extents {
            self.assert_inside(page, extent);
            let region = extent.region.id();
            self.regions.entry(region).or_insert_with(|| Arc::clone(extent.region));
            let run = Run { pages: extent.pages, region, offset: extent.offset, writable: extent.writable };
            self.translations.insert(page, run);
            self.map(page, run);
            page += extent.pages;
        }
        self.keep_budget();
        self.deliver();
        Ok(())
    }

    /// Lets go of the oldest runs, if there are too many.
    fn keep_budget(&mut self) {
        while let Some(range) = self.translations.evict() {
            self.unmap(range);
        }
    }

    /// The core has checked both; what is behind a region in its file may be another guest's.
    fn assert_inside(&self, page: u64, extent: &Extent) {
        let bytes = extent.pages.checked_mul(PAGE_SIZE);
        let last = bytes.and_then(|bytes| extent.offset.checked_add(bytes));
        let end = page.checked_add(extent.pages);
        assert!(
            last.is_some_and(|last| last <= extent.region.size() && extent.offset.is_multiple_of(PAGE_SIZE))
                && end.is_some_and(|end| end <= self.va_end >> PAGE_SHIFT),
            "extent {:#x}+{:#x} pages at page {page:#x} leaves its region or the space",
            extent.offset,
            extent.pages
        );
    }

    /// Drops translations.
    pub fn unbind(&mut self, range: PageRange) -> Flush {
        if let Some(covered) = self.translations.remove(range) {
            self.unmap(covered);
            // A run that was cut is two.
            self.keep_budget();
            self.fence();
            self.deliver();
        }
        self.flush()
    }

    /// Drops a region's translations and the region; what to wait for.
    pub fn drop_region(&mut self, region: u64) -> Flush {
        if self.regions.remove(&region).is_none() {
            return Flush::Done;
        }
        for range in self.translations.remove_region(region) {
            self.unmap(range);
        }
        if self.shared.remove(&region) {
            self.send(Order::Forget { id: region });
        }
        self.fence();
        self.deliver();
        self.flush()
    }

    /// What must be passed before everything unbound so far is surely unused.
    pub fn flush(&self) -> Flush {
        if self.passed < self.issued { Flush::Pending(Ticket(self.issued)) } else { Flush::Done }
    }

    /// Whether a ticket has been passed.
    pub fn has_flushed(&self, ticket: Ticket) -> bool {
        ticket.0 <= self.passed
    }

    /// The worker has passed a fence.
    pub fn pass(&mut self, ticket: u64) {
        self.passed = self.passed.max(ticket);
    }

    /// Stops jobs at their next access, or lets them go on.
    pub fn set_frozen(&mut self, frozen: bool) -> Flush {
        if frozen != self.frozen {
            self.frozen = frozen;
            if frozen {
                self.send(Order::Unmap { addr: LOWEST, bytes: self.va_end - LOWEST });
                self.fence();
            } else {
                self.catch_up();
            }
            self.set_clocks();
            self.deliver();
        }
        self.flush()
    }

    /// Queues a job.
    pub fn submit(&mut self, job: Job) {
        let queued = Queued { id: job.id, packets: job.packets.into() };
        self.rings.entry(job.ring_idx).or_default().queue.push_back(queued);
        if self.attached() {
            self.send_jobs();
            self.set_clock(job.ring_idx);
            self.deliver();
        }
    }

    /// Decides about a parked access.
    pub fn resume(&mut self, stop: StopId, verdict: Verdict) {
        let parked = |ring: &Ring| ring.parked.is_some_and(|parked| parked.stop == Some(stop));
        let Some((index, ring)) = self.rings.iter_mut().find(|(_, ring)| parked(ring)) else { return };
        let index = *index;
        if let Some(parked) = &mut ring.parked {
            parked.decided = Some(verdict);
        }
        if !self.frozen {
            self.release(index);
            self.deliver();
        }
    }

    /// A ring has a thread.
    pub fn add_thread(&mut self, ring: u32, tid: u32) {
        self.threads.insert(tid, ring);
        self.set_clock(ring);
    }

    /// The kernel has parked a thread.
    pub fn park_missing(&mut self, tid: u32, addr: u64, write: bool, stop: StopId) -> Option<Stopped> {
        let ring = *self.threads.get(&tid)?;
        self.park(ring, addr, write, stop, Wait::Missing)
    }

    /// A thread is parked. Whether and what the core is told.
    pub fn park(&mut self, index: u32, addr: u64, write: bool, stop: StopId, wait: Wait) -> Option<Stopped> {
        let frozen = self.frozen;
        // Who was parked by a freeze may be heard of when it is over.
        let mapped = self.translations.lookup(addr >> PAGE_SHIFT).is_some_and(|run| run.writable || !write);
        let ring = self.rings.get_mut(&index)?;
        if let Some(parked) = &mut ring.parked {
            // It was woken by something else and is parked again: the same stop.
            parked.wait = wait;
            return None;
        }
        let front = ring.queue.front()?;
        let (length_hint, access) = hint(&front.packets, addr, write);
        let job = front.id;
        let decided = match (ring.expired, frozen || mapped) {
            // It touched this before it learnt that it was stopped.
            (true, _) => Some(Verdict::Fail(ETIMEDOUT)),
            (false, true) => Some(Verdict::Retry),
            (false, false) => None,
        };
        let told = decided.is_none();
        ring.parked = Some(Parked { stop: told.then_some(stop), addr, access, wait, decided });
        self.set_clock(index);
        if !told && !frozen {
            self.release(index);
            self.deliver();
        }
        told.then_some(Stopped { job, addr, length_hint, access })
    }

    /// The front job of a ring ended, as the worker sees it.
    pub fn finish(&mut self, ring: u32, mut end: JobEnd) -> Option<(JobId, JobEnd)> {
        let state = self.rings.get_mut(&ring)?;
        let job = state.queue.pop_front()?;
        state.sent = state.sent.saturating_sub(1);
        state.parked = None;
        if let Some((errno, addr, access)) = state.doom.take() {
            (end.errno, end.addr, end.access) = (errno, GpuAddr(addr), access);
        }
        (state.clock, state.expired) = (Clock::default(), false);
        if state.queue.is_empty() {
            self.rings.remove(&ring);
        }
        self.set_clock(ring);
        Some((job.id, end))
    }

    /// Stops jobs whose time is over, and sets the next alarm.
    pub fn expire(&mut self) {
        let Some(limit) = self.job_limit else { return };
        let now = Instant::now();
        if self.alarm.is_none_or(|alarm| alarm > now) {
            return;
        }
        let is_over = |ring: &Ring| ring.clock.due(limit).is_some_and(|due| due <= now);
        let over: Vec<_> =
            self.rings.iter().filter(|(_, ring)| is_over(ring)).map(|(index, _)| *index).collect();
        for index in over {
            let Some(ring) = self.rings.get_mut(&index) else { continue };
            ring.expired = true;
            if let Some(job) = ring.queue.front().map(|job| job.id) {
                self.send(Order::Stop { ring: index, job: job.0 });
            }
            self.set_clock(index);
        }
        self.alarm = self.rings.values().filter_map(|ring| ring.clock.due(limit)).min();
        self.deliver();
    }

    fn set_clocks(&mut self) {
        let rings: Vec<_> = self.rings.keys().copied().collect();
        rings.into_iter().for_each(|index| self.set_clock(index));
    }

    /// Lets a ring's clock run while its thread is at a job. An alarm that is too early is left as it is: it costs the
    /// attendant one look in a job's time, an alarm for each job would cost a wake-up for each.
    fn set_clock(&mut self, index: u32) {
        let Some(limit) = self.job_limit else { return };
        let started = self.attached() && self.threads.values().any(|of| *of == index);
        let Some(ring) = self.rings.get_mut(&index) else { return };
        ring.clock.set(started && ring.sent > 0 && ring.parked.is_none() && !ring.expired, Instant::now());
        if let Some(due) = ring.clock.due(limit)
            && self.alarm.is_none_or(|alarm| alarm > due)
        {
            (self.alarm, self.alarm_is_news) = (Some(due), true);
        }
    }

    /// Sends what the socket takes.
    pub fn deliver(&mut self) {
        let Life::Up(socket) = &self.life else { return };
        while let Some(Letter { order, packets, region }) = self.outbox.front() {
            let file = region.as_ref().and_then(|region| region.mapping().file_offset());
            let fd = file.map(|file| file.file().as_fd());
            if message::send(socket.as_fd(), &order.encode(), packets, fd, SendFlags::DONTWAIT).is_err() {
                // Full, or nobody is there: the attendant finds out which.
                return;
            }
            self.outbox.pop_front();
        }
    }

    /// Tells the worker everything that it must know when it is attached.
    fn catch_up(&mut self) {
        if !self.attached() {
            return;
        }
        let runs: Vec<_> = self.translations.iter().collect();
        for (page, run) in runs {
            self.map(page, run);
        }
        self.send_jobs();
        let decided = |ring: &Ring| ring.parked.is_some_and(|parked| parked.decided.is_some());
        let released: Vec<_> =
            self.rings.iter().filter(|(_, r)| decided(r)).map(|(index, _)| *index).collect();
        for ring in released {
            self.release(ring);
        }
    }

    fn release(&mut self, index: u32) {
        let Some(ring) = self.rings.get_mut(&index) else { return };
        let Some(Parked { addr, access, wait, decided: Some(verdict), .. }) = ring.parked.take() else {
            return;
        };
        let mut stopped = None;
        if let Verdict::Fail(errno) = verdict {
            ring.doom = Some((errno, addr, access));
            stopped = ring.queue.front().map(|job| job.id.0);
        }
        self.set_clock(index);
        if let Some(job) = stopped {
            self.send(Order::Stop { ring: index, job });
        }
        self.send(Order::Resume { ring: index, wait, abandon: stopped.is_some() });
    }

    fn send_jobs(&mut self) {
        let mut unsent = vec![];
        for (index, ring) in &mut self.rings {
            let new = ring.queue.iter().skip(ring.sent);
            unsent.extend(
                new.map(|job| (Order::Job { ring: *index, job: job.id.0 }, Arc::clone(&job.packets))),
            );
            ring.sent = ring.queue.len();
        }
        for (order, packets) in unsent {
            self.outbox.push_back(Letter { order, packets, region: None });
        }
    }

    fn map(&mut self, page: u64, run: Run) {
        if !self.attached() {
            return;
        }
        let Some(region) = self.regions.get(&run.region) else { return };
        let start = region.mapping().file_offset().map_or(0, |file| file.start());
        if self.shared.insert(run.region) {
            let (order, region) = (Order::Region { id: run.region }, Some(Arc::clone(region)));
            self.outbox.push_back(Letter { order, packets: Arc::default(), region });
        }
        self.send(Order::Map {
            addr: page << PAGE_SHIFT,
            bytes: run.pages << PAGE_SHIFT,
            region: run.region,
            offset: start + run.offset,
            writable: run.writable,
        });
    }

    fn unmap(&mut self, range: PageRange) {
        if self.attached() {
            self.send(Order::Unmap {
                addr: range.start_addr(),
                bytes: range.end_addr() - range.start_addr(),
            });
        }
    }

    /// A ticket for everything that was ordered before.
    fn fence(&mut self) {
        if matches!(self.life, Life::Up(_)) {
            self.issued += 1;
            self.send(Order::Fence { ticket: self.issued });
        }
    }

    fn send(&mut self, order: Order) {
        if matches!(self.life, Life::Up(_)) {
            self.outbox.push_back(Letter { order, packets: Arc::default(), region: None });
        }
    }
}

/// What a job is going to touch from `addr` on, and how: from the first of its packets that names the address.
fn hint(packets: &[Packet], addr: u64, write: bool) -> (u64, Access) {
    for packet in packets {
        let Operands { dst, src, len, .. } = Operands::of(packet);
        let left = |start: u64| start.saturating_add(len.max(1)).checked_sub(addr).filter(|_| start <= addr);
        if write && packet.opcode.get() == OP_ATOMIC_ADD && dst == addr {
            return (8, Access::Atomic);
        }
        if let Some(left @ 1..) = left(if write { dst } else { src }) {
            return (left, if write { Access::Write } else { Access::Read });
        }
    }
    (1, if write { Access::Write } else { Access::Read })
}

#[cfg(test)]
mod tests;
