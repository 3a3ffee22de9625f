//! Jobs and asynchronous binds of a context: accepted, queued, started, ended. What may start when is decided by
//! [`crate::timeline`]; here it is done.
//!
//! A job whose ring is free and whose points are reached goes straight to its device, under the context's lock: the
//! device may report its end at once, from another thread, and that report must find it. Everything else is started by
//! [`Context::advance`], a slice at a time; of an end that sets very many free an engine does a few slices, and the host's
//! worker the rest.

use super::{After, Bind, Context, Error, Refused, State, add};
use crate::addr::GpuAddr;
use crate::device::{Access, Asid, Job, JobEnd, JobId};
use crate::event::{DoneJob, Waiting};
use crate::gpu_vm::State as VmState;
use crate::protocol::errno::{ECANCELED, EPIPE};
use crate::protocol::job::Packet;
use crate::protocol::limit::Limit;
use crate::sync::Arc;
use crate::timeline::{Item, Point, Timeline, Turn, Weight, Work};

/// What is started under one hold of the context's lock: jobs, and operations of binds.
const SLICE: usize = 64;

/// How a job or an asynchronous bind is launched.
#[derive(Debug)]
pub struct Launch {
    /// Where it has its turn.
    pub timeline: Timeline,
    /// The process' own value.
    pub user_data: u64,
    /// The point that it promises, or 0.
    pub signal: u64,
    /// Points that it waits for.
    pub waits: Vec<Point>,
}

impl Launch {
    fn turn(&self, id: JobId, bind: bool, weight: Weight) -> Turn {
        Turn { id, bind, user_data: self.user_data, signal: self.signal, weight }
    }
}

impl Context {
    /// Launches a job. Returns its id. PROTOCOL 5.4.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::Point`], [`Error::VmUnusable`], [`Error::TooManyJobs`], [`Error::Full`],
    /// [`Error::Device`].
    pub fn exec(self: &Arc<Self>, launch: Launch, packets: Vec<Packet>) -> Result<JobId, Error> {
        let mut after = After::default();
        let result = self.exec_locked(&mut self.lock(), launch, packets, &mut after);
        self.settle(after);
        result.inspect_err(|error| self.count_refusal(error))
    }

    fn exec_locked(
        &self,
        state: &mut State,
        launch: Launch,
        packets: Vec<Packet>,
        after: &mut After,
    ) -> Result<JobId, Error> {
        let (device, asid) = self.admit(state, &launch, true)?;
        let device = self.host.device_of(device);
        device.check_packets(&packets).map_err(Error::Device)?;
        let work = Work::Job(packets);
        let weight = work.weight(launch.waits.len());
        let held = state.timelines.hold(&self.quota, launch.timeline, weight)?;
        let (id, timeline) = (state.take_job_id(), launch.timeline);
        let turn = launch.turn(id, false, weight);
        match work {
            Work::Job(packets) if state.timelines.starts_at_once(timeline, &launch.waits) => {
                let job = Job { id, ring_idx: timeline.ring_idx, packets };
                device.submit(asid, job).map_err(Error::Device)?;
                state.timelines.start(timeline, turn, held);
                self.count_launched(state, timeline);
            }
            work => {
                let item = Item { turn, waits: launch.waits, work };
                state.timelines.queue(timeline, item, held);
                self.count_launched(state, timeline);
                self.advance(state, after);
            }
        }
        Ok(id)
    }

    /// Puts operations in their turn on a ring. Returns the id under which they end. PROTOCOL 5.3.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::Point`], [`Error::VmUnusable`] for a MAP, [`Error::TooManyJobs`],
    /// [`Error::TooManyQueued`], [`Error::Full`].
    pub fn bind_async(self: &Arc<Self>, launch: Launch, binds: Vec<Bind>) -> Result<JobId, Error> {
        let mut after = After::default();
        let result = self.bind_async_locked(&mut self.lock(), launch, binds, &mut after);
        self.settle(after);
        result.inspect_err(|error| self.count_refusal(error))
    }

    fn bind_async_locked(
        &self,
        state: &mut State,
        launch: Launch,
        binds: Vec<Bind>,
        after: &mut After,
    ) -> Result<JobId, Error> {
        self.admit(state, &launch, binds.iter().any(Bind::needs_usable))?;
        let limit = self.quota.limits().mappings;
        let operations = state.timelines.queued_operations().saturating_add(binds.len());
        if operations > usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(Error::TooManyQueued(limit));
        }
        let work = Work::Bind { binds, detached: None };
        let weight = work.weight(launch.waits.len());
        let held = state.timelines.hold(&self.quota, launch.timeline, weight)?;
        let (id, timeline) = (state.take_job_id(), launch.timeline);
        let item = Item { turn: launch.turn(id, true, weight), waits: launch.waits, work };
        state.timelines.queue(timeline, item, held);
        self.count_launched(state, timeline);
        self.advance(state, after);
        Ok(id)
    }

    fn count_launched(&self, state: &mut State, timeline: Timeline) {
        self.quota.note(Limit::Jobs, state.timelines.in_flight());
        if let Some(vm) = state.vms.get_mut(&timeline.vm_id) {
            vm.jobs = vm.jobs.saturating_add(1);
        }
        add(&mut state.counters.obtain().jobs_submitted, 1);
    }

    /// Checks what jobs and asynchronous binds have in common. Returns where they run.
    fn admit(&self, state: &State, launch: &Launch, needs_usable: bool) -> Result<(usize, Asid), Error> {
        let vm_id = launch.timeline.vm_id;
        let vm = state.vms.get(&vm_id).ok_or(Error::NoVm(vm_id))?;
        let is_alive = |vm_id| state.vms.contains_key(&vm_id);
        state
            .timelines
            .check(launch.timeline, launch.signal, &launch.waits, is_alive)
            .map_err(Error::Point)?;
        if needs_usable && vm.state != VmState::Usable {
            return Err(Error::VmUnusable(vm_id));
        }
        let limit = self.quota.limits().jobs;
        if state.timelines.in_flight() >= usize::try_from(limit).unwrap_or(usize::MAX) {
            return Err(Error::TooManyJobs(limit));
        }
        Ok((vm.device, vm.asid))
    }

    /// Starts what may start now, as much as one hold of the lock allows; whoever settles `after` does the rest.
    pub(super) fn advance(&self, state: &mut State, after: &mut After) {
        let mut spent = 0_usize;
        while spent < SLICE {
            let State { timelines, vms, .. } = &mut *state;
            let is_usable = |vm_id| vms.get(&vm_id).is_some_and(|vm| vm.state == VmState::Usable);
            let Some((timeline, turn, work)) = timelines.take_ready(is_usable) else { break };
            spent = spent.saturating_add(work.cost());
            self.carry_out(state, timeline, turn, work, after);
        }
        after.more |= state.timelines.has_ready();
    }

    /// Starts an item. What does not end here has been handed on, and is ended by whoever finishes it.
    fn carry_out(&self, state: &mut State, timeline: Timeline, turn: Turn, work: Work, after: &mut After) {
        match work {
            Work::Job(packets) => {
                let job = Job { id: turn.id, ring_idx: timeline.ring_idx, packets };
                if let Err(errno) = self.submit_queued(state, timeline.vm_id, job) {
                    self.end(state, turn.id, failed(errno, 0, 0), after);
                }
            }
            Work::Bind { binds, detached } => {
                state.lend_mappings(timeline.vm_id, turn.weight);
                let applied = match detached {
                    Some(op) if state.is_usable(timeline.vm_id) => {
                        Err(Refused::at(&binds, op, Error::Detached))
                    }
                    _ => self.bind_locked(state, timeline.vm_id, &binds, after),
                };
                let Err(refused) = applied else {
                    if !state.waits_for_pages(&self.host, timeline.vm_id, turn.id, &binds) {
                        self.end(state, turn.id, failed(0, 0, 0), after);
                    }
                    return;
                };
                state.settle_mappings(timeline.vm_id);
                self.count_refusal(&refused.error);
                let (errno, op, addr) = (refused.error.errno(), refused.op, refused.addr);
                // The end's record goes before the notice that the GPU VM is unusable: it is the more precise one.
                self.end(state, turn.id, failed(errno, op, addr), after);
                let dead = VmState::Unusable { errno, op, addr };
                self.spoil(state, timeline.vm_id, dead, after);
            }
        }
    }

    /// Hands a job that had to wait to its device. Fails with a positive errno.
    fn submit_queued(&self, state: &State, vm_id: u32, job: Job) -> Result<(), i32> {
        let Some(vm) = state.vms.get(&vm_id).filter(|_| state.is_usable(vm_id)) else { return Err(EPIPE) };
        let submitted = self.host.device_of(vm.device).submit(vm.asid, job);
        submitted.map_err(|error| Error::Device(error).errno())
    }

    /// A bind that waited for pages has them, or will never have them: errno, operation and GPU address.
    pub(crate) fn end_bind(&self, state: &mut State, id: JobId, end: (i32, u32, u64), after: &mut After) {
        let (errno, op, addr) = end;
        self.end(state, id, failed(errno, op, addr), after);
    }

    /// A started item has ended.
    pub(super) fn end(&self, state: &mut State, id: JobId, end: JobEnd, after: &mut After) {
        let State { timelines, vms, counters, waiting, faults, .. } = state;
        let mark = faults.mark();
        timelines.end(id, end, |timeline, turn, end| {
            let Some(vm) = vms.get_mut(&timeline.vm_id) else { return };
            vm.jobs = vm.jobs.saturating_sub(1);
            let counters = counters.obtain();
            let counter = if end.errno == 0 { &mut counters.jobs_done } else { &mut counters.jobs_failed };
            *counter = counter.saturating_add(1);
            waiting.push_back((mark, Waiting::Job(done(timeline, turn, vm.dev_id, end))));
            after.announce = true;
        });
    }
}

impl State {
    fn take_job_id(&mut self) -> JobId {
        let id = JobId(self.next_job);
        self.next_job = self.next_job.wrapping_add(1);
        id
    }
    fn is_usable(&self, vm_id: u32) -> bool {
        self.vms.get(&vm_id).is_some_and(|vm| vm.state == VmState::Usable)
    }
    /// What a queued bind had put by for its mappings is its GPU VM's now.
    fn lend_mappings(&mut self, vm_id: u32, weight: Weight) {
        if let Some((vm, put_by)) = self.vms.get_mut(&vm_id).zip(self.timelines.mappings_charge()) {
            vm.mappings_charge.take_from(put_by, weight.mappings);
        }
    }
    /// A bind that was refused has not used it.
    fn settle_mappings(&mut self, vm_id: u32) {
        if let Some(vm) = self.vms.get_mut(&vm_id) {
            vm.mappings_charge.shrink_to(vm.mappings.count());
        }
    }
    /// Ends everything of a GPU VM that has been taken out of the context.
    pub(super) fn cancel_jobs(&mut self, vm_id: u32, dev_id: u32) {
        self.populating.retain(|bind| bind.vm_id != vm_id);
        for (timeline, turn) in self.timelines.remove_vm(vm_id) {
            add(&mut self.counters.obtain().jobs_dropped, 1);
            let end = failed(ECANCELED, 0, 0);
            self.tell(Waiting::Job(done(timeline, turn, dev_id, end)));
        }
    }
}

fn done(timeline: Timeline, turn: Turn, dev_id: u32, end: JobEnd) -> DoneJob {
    let Turn { id, bind, user_data, signal, .. } = turn;
    DoneJob { bind, job_id: id.0, user_data, dev_id, timeline, point: signal, end }
}

fn failed(errno: i32, packet: u32, addr: u64) -> JobEnd {
    JobEnd { errno, packet, addr: GpuAddr(addr), access: Access::Read }
}
