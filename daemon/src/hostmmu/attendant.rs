//! A GPU VM's attendant: a thread in the daemon that starts the worker when there is a job, hears its faults and
//! reports, and tells the core. It alone calls [`Events`] for this VM, and it holds no lock when it does.

use super::message::{self, MAX_MESSAGE, Report, Wait};
use super::process;
use super::uffd::{self, PageFault};
use super::vm::{Stopped, VmState};
use super::{Shared, Vm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::RecvFlags;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Child;
use std::sync::Arc;
use std::time::Instant;
use virtio_gpu_svm::addr::GpuAddr;
use virtio_gpu_svm::device::{Events, Fault, JobEnd, LedgerEntry, StopId, Ticket};

/// The worker, as its attendant knows it.
struct Worker {
    child: Child,
    socket: Arc<OwnedFd>,
    /// Comes with the first report.
    faults: Option<OwnedFd>,
}

/// The worker is gone, or speaks another language.
struct Gone;

/// See the text above.
pub struct Attendant {
    shared: Arc<Shared>,
    vm: Arc<Vm>,
    worker: Option<Worker>,
    buffer: Vec<u8>,
}

impl Attendant {
    /// For a VM that begins.
    pub fn new(shared: Arc<Shared>, vm: Arc<Vm>) -> Self {
        Self { shared, vm, worker: None, buffer: vec![0; MAX_MESSAGE] }
    }

    /// Attends until the VM is destroyed, and ends its worker.
    pub fn run(mut self) {
        loop {
            let (dying, wants_worker) = self.vm.with(|state| (state.dying, state.wants_worker()));
            if dying {
                break;
            }
            if wants_worker {
                self.start_worker();
            }
            self.tell_lost_jobs();
            if self.attend().is_err() {
                self.lose_worker();
            }
        }
        self.end_worker();
        // Whoever waits for a flush need not any more.
        self.vm.with(VmState::lose_worker);
        self.vm.passed.notify_all();
        let Self { shared, vm, .. } = self;
        let asid = vm.asid;
        shared.forget(asid);
        drop(vm);
        emit(&shared, |events| events.retired(shared.index, asid));
    }

    /// Waits for something to do, and does it.
    fn attend(&mut self) -> Result<(), Gone> {
        let (has_mail, alarm) = self.vm.with(|state| (state.has_mail(), state.next_alarm()));
        let ready = self.wait(has_mail, alarm).map_err(|error| {
            tracing::error!(asid = self.vm.asid.0, %error, "cannot wait for a worker");
            Gone
        })?;
        self.vm.hush();
        if ready {
            // Faults first: what the worker said before a fault is heard before the fault is told.
            let mut faults = vec![];
            if let Some(fd) = self.worker.as_ref().and_then(|worker| worker.faults.as_ref()) {
                uffd::read(fd, &mut faults).map_err(|_| Gone)?;
            }
            self.hear()?;
            for fault in faults {
                self.on_missing(fault);
            }
        }
        if has_mail {
            self.vm.with(VmState::deliver);
        }
        if alarm.is_some() {
            self.vm.with(VmState::expire);
        }
        Ok(())
    }

    /// Whether the worker has something to say.
    fn wait(&self, has_mail: bool, alarm: Option<Instant>) -> rustix::io::Result<bool> {
        let mut fds = vec![PollFd::new(&self.vm.bell, PollFlags::IN)];
        if let Some(worker) = &self.worker {
            let mail = if has_mail { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(worker.socket.as_fd(), PollFlags::IN | mail));
            fds.extend(worker.faults.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        }
        let left = alarm.map(|alarm| alarm.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        retry_on_intr(|| poll(&mut fds, timeout.as_ref()))?;
        Ok(fds.iter().skip(1).any(|fd| fd.revents().intersects(!PollFlags::OUT)))
    }

    /// Everything that the worker has said so far.
    fn hear(&mut self) -> Result<(), Gone> {
        while let Some(worker) = &mut self.worker {
            let (bytes, fd) = match message::receive(&worker.socket, &mut self.buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Gone),
                Ok(received) => received,
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Gone),
            };
            let (record, _) = self.buffer.get(..bytes).and_then(message::parse).ok_or(Gone)?;
            match Report::decode(record).ok_or(Gone)? {
                Report::Ready => worker.faults = Some(fd.ok_or(Gone)?),
                report => self.on_report(report),
            }
        }
        Ok(())
    }

    fn on_report(&self, report: Report) {
        match report {
            Report::Ready => {}
            Report::Thread { ring, tid } => self.vm.with(|state| state.add_thread(ring, tid)),
            Report::Denied { ring, addr, write } => {
                let stop = self.shared.new_stop(self.vm.asid);
                let stopped = self.vm.with(|state| state.park(ring, addr, write, stop, Wait::Denied));
                self.tell_fault(stop, stopped);
            }
            Report::Lost { addr } => {
                // Without a translation it was withdrawn meanwhile, and the access is an error of its job alone.
                if let Some(region) = self.vm.with(|state| state.region_at(GpuAddr(addr))) {
                    region.report_lost();
                }
            }
            Report::Done { ring, errno, packet, addr, access } => {
                let errno = i32::try_from(errno).unwrap_or(i32::MAX);
                let end = JobEnd { errno, packet, addr: GpuAddr(addr), access };
                if let Some((job, end)) = self.vm.with(|state| state.finish(ring, end)) {
                    self.tell(|events| events.job_done(self.shared.index, self.vm.asid, job, end));
                }
            }
            Report::Fenced { ticket } => self.on_passed(ticket),
        }
    }

    fn on_passed(&self, ticket: u64) {
        self.vm.with(|state| state.pass(ticket));
        self.vm.passed.notify_all();
        self.tell(|events| events.flushed(self.shared.index, self.vm.asid, Ticket(ticket)));
    }

    fn on_missing(&self, fault: PageFault) {
        let PageFault { tid, addr, write } = fault;
        let stop = self.shared.new_stop(self.vm.asid);
        let stopped = self.vm.with(|state| state.park_missing(tid, addr, write, stop));
        self.tell_fault(stop, stopped);
    }

    fn tell_fault(&self, stop: StopId, stopped: Option<Stopped>) {
        let Some(Stopped { job, addr, length_hint, access }) = stopped else { return };
        let asid = self.vm.asid;
        let addr = GpuAddr(addr);
        self.shared.record(LedgerEntry { label: self.vm.label.clone(), asid, page: addr.page(), access });
        let fault = Fault { asid, stop, job, addr, pages: 1, length_hint, access, engine: 0, level: 0 };
        self.tell(|events| events.fault(self.shared.index, fault));
    }

    fn tell_lost_jobs(&self) {
        for (job, end) in self.vm.with(VmState::take_lost_jobs) {
            self.tell(|events| events.job_done(self.shared.index, self.vm.asid, job, end));
        }
    }

    /// Tells the core, unless the VM is being destroyed.
    fn tell(&self, tell: impl FnOnce(&dyn Events)) {
        if !self.vm.with(|state| state.dying) {
            emit(&self.shared, tell);
        }
    }

    fn start_worker(&mut self) {
        match process::start(&self.shared.program, self.shared.info.va_bits) {
            Ok((child, socket)) => {
                let socket = Arc::new(socket);
                self.worker = Some(Worker { child, socket: Arc::clone(&socket), faults: None });
                self.vm.with(|state| state.attach(socket));
            }
            Err(error) => {
                self.shared
                    .log
                    .log(|| tracing::error!(asid = self.vm.asid.0, %error, "cannot start a worker"));
                self.lose_worker();
            }
        }
    }

    fn lose_worker(&mut self) {
        self.shared.log.log(|| {
            tracing::error!(
                device = self.shared.index,
                asid = self.vm.asid.0,
                "a worker is lost, and its jobs with it"
            );
        });
        self.end_worker();
        let last = self.vm.with(|state| {
            state.lose_worker();
            state.last_ticket()
        });
        self.on_passed(last);
        self.tell_lost_jobs();
    }

    /// Nothing of the VM is mapped anywhere after this.
    fn end_worker(&mut self) {
        let Some(Worker { mut child, .. }) = self.worker.take() else { return };
        // It may have ended before.
        child.kill().ok();
        match child.wait() {
            Ok(status) => tracing::debug!(asid = self.vm.asid.0, %status, "a worker ended"),
            Err(error) => tracing::error!(asid = self.vm.asid.0, %error, "cannot wait for a worker's end"),
        }
    }
}

/// A panic of whoever is told is its own: this thread has others to serve.
fn emit(shared: &Shared, tell: impl FnOnce(&dyn Events)) {
    let Some(events) = shared.events() else { return };
    if catch_unwind(AssertUnwindSafe(|| tell(&*events))).is_err() {
        tracing::error!(device = shared.index, "whoever is told of faults has panicked");
    }
}
