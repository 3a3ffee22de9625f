//! What a GPU VM is to have on its device before a job touches it: ranges that were prefetched or bound at once, and on
//! a device without faults all that is mapped.
//!
//! *Wanted* ranges are worked off in slices under the context's lock: known pages are bound, unknown ones are asked of
//! the guest by prefetch faults, which are faults like others but that no job waits for; when one has ended, its range is
//! wanted again. On a device with faults all this is advice: what does not come, comes by a fault.
//!
//! A GPU VM on a device without faults is *held* while anything is wanted: its queues are stopped before a translation
//! goes, and go on when everything is there again, as xe's preempt fences and KFD's eviction do it. What nobody can
//! provide makes it unusable. PROTOCOL 5.3.

use crate::addr::{GpuAddr, PageRange};
use crate::address_space::LEAF_PAGES;
use crate::context::{After, Bind, Context, KEPT, State};
use crate::device::{Device, Extent, FaultModel, Flush, JobId, ScatteredPage};
use crate::fault::{self, LONG_RUN, Pages, Prefetch};
use crate::gpu_vm::{self, Behind, GpuVm};
use crate::host::Host;
use crate::invalidation::bounded;
use crate::memory::{MemoryTable, Region};
use crate::protocol::PAGE_SHIFT;
use crate::protocol::errno::{EFAULT, EPIPE};
use crate::protocol::event::{PERM_READ, PERM_WRITE};
use crate::quota::Charge;
use crate::seeded::{self, Bug};
use crate::sync::{Arc, preempt};

/// Pages of all mappings of a GPU VM on a device without faults: 4 GiB. Each of them is walked when memory changes.
pub const MAX_POPULATED_PAGES: u64 = 1 << 20;
/// Pages that one VM_BIND may ask to be made resident: 256 MiB.
pub const MAX_PREFETCH_PAGES: u64 = 1 << 16;
/// Pages that are looked at while the context's lock is held once.
const SLICE_PAGES: u64 = 8 * LEAF_PAGES;
/// What a step costs at least, in pages: it may call the device.
const STEP_PAGES: u64 = 64;
/// Ranges that are wanted one by one.
const MAX_WANTED: usize = 1 << 14;
/// Ranges that a GPU VM may want without being charged for them: so there is always one.
const FREE_RANGES: u64 = 4;
const RANGE_BYTES: u64 = 16;
const _: () = assert!(size_of::<PageRange>() == 16);
/// Pages that one prefetch fault asks for.
const ASK_PAGES: u64 = LEAF_PAGES;
/// Prefetch faults of one GPU VM that wait for the guest at once.
const MAX_ASKED: usize = 4;

/// What a GPU VM still wants on its device.
#[derive(Debug, Default)]
pub struct Population {
    /// Sorted and apart; worked off from the last one.
    wanted: Vec<PageRange>,
    /// Prefetch faults that wait for the guest.
    asked: usize,
    /// Nothing can be done before a fault of the context has ended.
    stalled: bool,
    held: bool,
    /// Whether the device has no faults: every page that is mapped is wanted, with the right to write if its mapping has
    /// it, and large leaves as a whole, since to bind a part of one drops its rest.
    all: bool,
    /// Of the room of `wanted`, beyond [`FREE_RANGES`].
    charge: Charge,
}

impl Population {
    /// Of a new GPU VM on a device; the charge is for what it will want.
    pub fn of_new_vm(device: &dyn Device, charge: Charge) -> Self {
        Self { all: lacks_faults(device), charge, ..Self::default() }
    }
    /// What the charge must be.
    pub fn weigh(&self) -> u64 {
        let ranges = u64::try_from(self.wanted.capacity()).unwrap_or(u64::MAX);
        ranges.saturating_sub(FREE_RANGES).saturating_mul(RANGE_BYTES)
    }
    /// Bytes that it is charged.
    pub fn bytes(&self) -> u64 {
        self.charge.amount()
    }
    /// Pages of the ranges that are still wanted; those that the guest was asked for are not among them.
    pub fn wanted_pages(&self) -> u64 {
        self.wanted.iter().map(|range| range.pages()).fold(0, u64::saturating_add)
    }
    /// Whether the queues are stopped until everything is there.
    pub fn is_held(&self) -> bool {
        self.held
    }
    /// Whether nothing is wanted or waited for.
    pub fn is_complete(&self) -> bool {
        self.wanted.is_empty() && self.asked == 0
    }
    /// Wants ranges; what of them is mapped when their turn comes counts.
    pub fn want(&mut self, ranges: impl IntoIterator<Item = PageRange>) {
        let mut wanted = std::mem::take(&mut self.wanted);
        let leaves = |range: PageRange| PageRange {
            start: range.start & !(LEAF_PAGES.saturating_sub(1)),
            end: range.end.checked_next_multiple_of(LEAF_PAGES).unwrap_or(range.end),
        };
        let ranges = ranges.into_iter().filter(|range| range.pages() > 0);
        let whole = self.all && !seeded::on(Bug::BindPart);
        wanted.extend(ranges.map(|range| if whole { leaves(range) } else { range }));
        self.wanted = PageRange::merge(wanted);
        self.wanted.shrink_to_fit();
        if self.wanted.len() > MAX_WANTED {
            self.coarsen(MAX_WANTED);
        }
        if self.charge.resize(self.weigh()).is_err() {
            self.coarsen(usize::try_from(FREE_RANGES).unwrap_or(1));
            self.charge.shrink_to(self.weigh());
        }
    }
    /// Everything that was wanted is done with.
    fn done(&mut self) {
        self.wanted = Vec::new();
        self.charge.shrink_to(0);
    }
    /// There are too many ranges. Where all that is mapped is wanted, what lies between them may be as well; else it is
    /// advice, and some of it is dropped.
    fn coarsen(&mut self, most: usize) {
        let whole = self.wanted.first().zip(self.wanted.last());
        let whole = whole.map(|(first, last)| PageRange { start: first.start, end: last.end });
        if self.all {
            self.wanted = whole.into_iter().collect();
        } else {
            self.wanted.truncate(most);
            self.wanted.shrink_to_fit();
        }
    }
    /// A prefetch fault has ended; its range is wanted again if there is hope.
    pub(crate) fn answered(&mut self, again: Option<PageRange>) {
        self.asked = self.asked.saturating_sub(1);
        self.want(again);
    }
    /// There is room for another prefetch fault.
    pub(crate) fn go_on(&mut self) {
        self.stalled = false;
    }
    fn can_go_on(&self) -> bool {
        if self.wanted.is_empty() { self.held && !self.waits_for_answers() } else { !self.stalled }
    }
    /// Whether pages are missing that the guest was asked for.
    fn waits_for_answers(&self) -> bool {
        self.asked > 0 && !seeded::on(Bug::ReleaseAsked)
    }
    /// What was wanted before `page` in the last range is done with.
    fn advance(&mut self, page: u64) {
        if let Some(last) = self.wanted.last_mut() {
            last.start = page;
            if last.pages() == 0 {
                self.drop_last();
            }
        }
    }
    fn drop_last(&mut self) {
        self.wanted.pop();
        if self.wanted.is_empty() {
            self.done();
        }
    }
}

/// An asynchronous bind that has been applied and ends when its GPU VM has all that it wants.
#[derive(Debug)]
pub(crate) struct Populating {
    pub(crate) vm_id: u32,
    pub(crate) id: JobId,
    /// Operations with the GPU pages that they name, to say which one failed.
    pub(crate) operations: Vec<(u32, PageRange)>,
}

impl Populating {
    fn operation_at(&self, page: u64) -> Option<u32> {
        self.operations.iter().find(|(_, range)| range.contains(page)).map(|(op, _)| *op)
    }
}

/// Whether jobs of a device must find everything bound.
pub(crate) fn lacks_faults(device: &dyn Device) -> bool {
    device.info().fault_model == FaultModel::None
}

/// Drops the translations of ranges, [`bounded`]; what was between them goes too.
///
/// With faults, it is faulted in again. Without, the queues are stopped first, and whatever of it is mapped is wanted
/// again.
pub(crate) fn take_away(device: &dyn Device, vm: &mut GpuVm, ranges: Vec<PageRange>) -> Flush {
    let ranges = bounded(ranges);
    let refill = lacks_faults(device) && vm.state == gpu_vm::State::Usable && !ranges.is_empty();
    let mut flush = Flush::Done;
    if refill {
        if seeded::on(Bug::UnbindBeforeHold) {
            ranges.iter().for_each(|range| _ = device.unbind(vm.asid, *range));
            preempt();
        }
        flush = hold(device, vm);
        vm.population.want(ranges.iter().copied());
    }
    for range in ranges {
        // A later ticket says all that an earlier one of this GPU VM says.
        if let Flush::Pending(ticket) = device.unbind(vm.asid, range) {
            flush = Flush::Pending(ticket);
        }
    }
    flush
}

/// Stops the queues of a GPU VM until everything that is wanted is there.
pub(crate) fn hold(device: &dyn Device, vm: &mut GpuVm) -> Flush {
    vm.population.held = true;
    device.set_frozen(vm.asid, true)
}

/// What was found for a bind.
struct Found<'a, 'm> {
    extents: &'a mut Vec<Extent<'m>>,
    /// The first of them.
    pages: Vec<ScatteredPage>,
}

/// What is to be done next for a GPU VM.
enum Step<'m> {
    /// Nothing is wanted.
    Nothing,
    /// Bind the extents that were collected here.
    Bind(PageRange),
    /// Bind the pages of a region that were collected here.
    BindPages(PageRange, &'m Arc<Region>),
    /// Bind nothing here.
    BindNull(PageRange),
    /// Ask the guest.
    Ask(Prefetch),
    /// Somebody waits for these pages already.
    Skip(PageRange),
    /// Nothing is mapped there: done with.
    Hole,
    /// Nobody can say where this page is.
    Lost(PageRange),
}

impl Context {
    /// Lets the GPU VMs look for what they want: what was taken away elsewhere may be had again.
    pub(crate) fn refill(self: &Arc<Self>) {
        let mut after = After::default();
        after.more = self.lock().has_more();
        self.settle(after);
    }

    /// Works off a slice of what the GPU VMs of the context want, and ends binds that have all they asked for. `after`
    /// says whether there is more.
    pub(crate) fn populate(&self, state: &mut State, after: &mut After) {
        self.populate_slice(state, after);
        self.end_populated(state, after);
    }

    /// Ends the binds that wait for pages no more.
    pub(crate) fn end_populated(&self, state: &mut State, after: &mut After) {
        while let Some(at) = state.populating.iter().position(|bind| state.is_over(bind)) {
            let bind = state.populating.swap_remove(at);
            let end = match state.vms.get(&bind.vm_id).map(|vm| vm.state) {
                Some(gpu_vm::State::Unusable { errno, addr, .. }) => {
                    match bind.operation_at(addr >> PAGE_SHIFT) {
                        Some(op) => (errno, op, addr),
                        None => (EPIPE, 0, 0),
                    }
                }
                Some(gpu_vm::State::Usable) | None => (0, 0, 0),
            };
            self.end_bind(state, bind.id, end, after);
        }
    }

    fn populate_slice(&self, state: &mut State, after: &mut After) {
        let next = state.vms.iter().find(|(_, vm)| vm.population.can_go_on());
        let Some(vm_id) = next.map(|(vm_id, _)| *vm_id) else { return };
        after.more = true;
        let memory = Arc::clone(&state.memory);
        let mut extents = fault::emptied(std::mem::take(&mut state.extents));
        self.take_steps(state, vm_id, &memory, &mut extents, after);
        extents.clear();
        extents.shrink_to(KEPT);
        state.extents = fault::emptied(extents);
    }

    /// Takes steps until the slice is over or nothing more can be done now. The list of extents is empty between two.
    fn take_steps<'m>(
        &self,
        state: &mut State,
        vm_id: u32,
        memory: &'m MemoryTable,
        extents: &mut Vec<Extent<'m>>,
        after: &mut After,
    ) {
        let mut left = SLICE_PAGES;
        let mut found = Found { extents, pages: Vec::new() };
        while left > 0 {
            found.extents.clear();
            let step = state.next_step(vm_id, left, memory, &mut found);
            let result = self.take_step(state, vm_id, step, &found, after);
            let Some(vm) = state.vms.get_mut(&vm_id) else { return };
            let done = match result {
                Ok(Some(done)) => done,
                Ok(None) => return,
                Err((range, _)) if !vm.population.all => range,
                Err((range, errno)) => return self.make_unusable(state, vm_id, errno, range.start, after),
            };
            if done.pages() > 0 {
                vm.population.advance(done.end);
            }
            left = left.saturating_sub(done.pages().max(STEP_PAGES));
        }
    }

    /// The pages that are done with; none when nothing more can be done now.
    fn take_step(
        &self,
        state: &mut State,
        vm_id: u32,
        step: Step,
        found: &Found,
        after: &mut After,
    ) -> Result<Option<PageRange>, (PageRange, i32)> {
        let Some(vm) = state.vms.get_mut(&vm_id) else { return Ok(None) };
        let device = self.host.device_of(vm.device);
        let failed = |range, error| (range, fault::device_errno(error));
        match step {
            Step::Nothing => {
                if vm.population.held && !vm.population.waits_for_answers() {
                    self.release(state, vm_id);
                }
                Ok(None)
            }
            // A part of a large leaf that is bound again would drop its rest.
            Step::Bind(range) | Step::BindPages(range, _) | Step::BindNull(range)
                if !vm.population.all && device.resident_in(vm.asid, range) == range.pages() =>
            {
                Ok(Some(range))
            }
            Step::Bind(range) => {
                let bound = device.bind(vm.asid, GpuAddr(range.start_addr()), found.extents);
                bound.map(|()| Some(range)).map_err(|error| failed(range, error))
            }
            Step::BindPages(range, region) => {
                let pages = usize::try_from(range.pages()).ok().and_then(|count| found.pages.get(..count));
                let (addr, pages) = (GpuAddr(range.start_addr()), pages.unwrap_or_default());
                let bound = device.bind_pages(vm.asid, addr, region, pages);
                bound.map(|()| Some(range)).map_err(|error| failed(range, error))
            }
            Step::BindNull(range) => {
                let bound = device.bind_null(vm.asid, range);
                bound.map(|()| Some(range)).map_err(|error| failed(range, error))
            }
            Step::Skip(range) => Ok(Some(range)),
            Step::Hole => Ok(Some(PageRange { start: 0, end: 0 })),
            Step::Lost(range) => Err((range, EFAULT)),
            Step::Ask(prefetch) => {
                let range = prefetch.range;
                let asked = vm.population.asked < MAX_ASKED && self.ask_ahead(state, prefetch, after);
                let Some(vm) = state.vms.get_mut(&vm_id) else { return Ok(None) };
                if !asked {
                    vm.population.stalled = true;
                    return Ok(None);
                }
                vm.population.asked = vm.population.asked.saturating_add(1);
                Ok(Some(range))
            }
        }
    }

    /// Whether the device of a GPU VM has no faults.
    pub(crate) fn lacks_faults(&self, state: &State, vm_id: u32) -> bool {
        let vm = state.vms.get(&vm_id);
        vm.is_some_and(|vm| lacks_faults(self.host.device_of(vm.device).as_ref()))
    }

    /// Lets the queues of a GPU VM go on, unless the guest's rings are stopped.
    fn release(&self, state: &mut State, vm_id: u32) {
        let frozen = state.frozen;
        let Some(vm) = state.vms.get_mut(&vm_id) else { return };
        vm.population.held = false;
        if !frozen || seeded::on(Bug::RunFrozen) {
            let (Flush::Done | Flush::Pending(_)) = self.host.device_of(vm.device).set_frozen(vm.asid, false);
        }
    }

    /// Nothing is wanted of an unusable GPU VM any more; its jobs go on and find that it is.
    pub(crate) fn give_up_population(&self, state: &mut State, vm_id: u32) {
        let Some(vm) = state.vms.get_mut(&vm_id) else { return };
        vm.population.done();
        if vm.population.held {
            self.release(state, vm_id);
        }
    }
}

impl State {
    /// Whether something can be done for a GPU VM that wants pages, or for a bind that waited for them.
    pub(crate) fn has_more(&self) -> bool {
        self.vms.values().any(|vm| vm.population.can_go_on())
            || self.populating.iter().any(|bind| self.is_over(bind))
    }
    /// An asynchronous bind has been applied: whether it ends only when its GPU VM has what it wants.
    pub(crate) fn waits_for_pages(&mut self, host: &Host, vm_id: u32, id: JobId, binds: &[Bind]) -> bool {
        let Some(vm) = self.vms.get(&vm_id).filter(|vm| !vm.population.is_complete()) else { return false };
        let all = lacks_faults(host.device_of(vm.device).as_ref());
        let wanted = |(op, bind): (u32, &Bind)| Some((op, bind.to_populate(all)?));
        let operations: Vec<_> = (0..).zip(binds).filter_map(wanted).collect();
        let waits = !operations.is_empty();
        if waits {
            self.populating.push(Populating { vm_id, id, operations });
        }
        waits
    }
    /// The operation that wants a page, of those that are waited for; else 0.
    pub(crate) fn operation_at(&self, vm_id: u32, page: u64) -> u32 {
        let mut binds = self.populating.iter().filter(|bind| bind.vm_id == vm_id);
        binds.find_map(|bind| bind.operation_at(page)).unwrap_or(0)
    }
    /// Whether a bind waits for pages no more: they are there, or will never be.
    fn is_over(&self, bind: &Populating) -> bool {
        let vm = self.vms.get(&bind.vm_id);
        vm.is_none_or(|vm| vm.population.is_complete() || vm.state != gpu_vm::State::Usable)
    }

    /// Finds what to do about the beginning of the last wanted range; for a bind, collects at most `most` pages and a
    /// leaf.
    fn next_step<'m>(
        &mut self,
        vm_id: u32,
        most: u64,
        memory: &'m MemoryTable,
        found: &mut Found<'_, 'm>,
    ) -> Step<'m> {
        let Self { vms, space, faults, .. } = self;
        let Some(GpuVm { mappings, population, .. }) = vms.get_mut(&vm_id) else { return Step::Nothing };
        let Some(range) = population.wanted.last().copied() else { return Step::Nothing };
        let mapped = mappings.first_in(range).and_then(|va| Some((va, va.range.intersect(range)?)));
        let Some((va, part)) = mapped else {
            population.drop_last();
            return Step::Hole;
        };
        population.advance(part.start);
        let slice_end = part.start.saturating_add(most).checked_next_multiple_of(LEAF_PAGES);
        let slice = PageRange { start: part.start, end: part.end.min(slice_end.unwrap_or(part.end)) };
        if matches!(va.behind(slice.start), Behind::Null) {
            return Step::BindNull(slice);
        }
        // Without faults a write must find its right: a page that is known without it is asked for.
        let all = population.all;
        let will_do = |extent: &Extent| !all || va.readonly || extent.writable;
        let mut pages = Pages::of(va, space, memory);
        if let Some((count, region)) = pages.scattered(slice, all && !va.readonly, &mut found.pages) {
            let end = slice.start.saturating_add(count as u64);
            return Step::BindPages(PageRange { start: slice.start, end }, region);
        }
        // Pages of a process that are not in one piece were found above, next time again; those of a blob are only found here.
        let least = if matches!(va.behind(slice.start), Behind::Cpu(_)) { LONG_RUN } else { 1 };
        let at = pages.collect(slice, will_do, least, found.extents);
        if at > slice.start {
            return Step::Bind(PageRange { start: slice.start, end: at });
        }
        let first = PageRange { start: slice.start, end: slice.start.saturating_add(1) };
        let free = faults.free_from(vm_id, slice.start);
        if free.start > slice.start {
            return Step::Skip(PageRange { start: slice.start, end: free.start.min(part.end) });
        }
        let Behind::Cpu(cpu_page) = va.behind(slice.start) else { return Step::Lost(first) };
        let end = part.end.min(free.end).min(slice.start.saturating_add(ASK_PAGES));
        let mut next_known = pages.next_known(PageRange { start: slice.start, end });
        while next_known < end && !pages.extent(next_known, 1).is_some_and(|extent| will_do(&extent)) {
            next_known = pages.next_known(PageRange { start: next_known, end });
        }
        Step::Ask(Prefetch {
            vm_id,
            range: PageRange { start: first.start, end: next_known },
            cpu_page,
            readonly: va.readonly,
        })
    }
}

impl Prefetch {
    /// `PERM_*` that the guest's answer must grant. Without faults a write must find the right for it; with, it asks
    /// again.
    pub(crate) fn perm(&self, device: &dyn Device) -> u32 {
        if lacks_faults(device) && !self.readonly { PERM_READ | PERM_WRITE } else { PERM_READ }
    }
}

/// What a prefetch fault says of its bytes, within the field of its record.
pub(crate) fn length_hint(range: PageRange) -> u32 {
    u32::try_from(range.pages() << PAGE_SHIFT).unwrap_or(u32::MAX)
}
