//! A fault's life: raised by a device, routed to its owner, served from what is known or asked of the guest, and ended
//! exactly once.
//!
//! ```text
//!   raised --+-- page known ------------------------------------> served locally
//!            +-- no mapping, no right, GPU VM unusable -----------> refused
//!            +-- owner gone -------------------------------------> dropped
//!            +-- too many pending -------------------------------> throttled (raised again later)
//!            +-- pending --+-- answer SUCCESS -------------------> answered
//!                          +-- answer INVALID, FAILURE ----------> refused (who joined a prefetch: raised again)
//!                          +-- mapping, GPU VM or context gone --> dropped
//! ```
//! The table of pending faults lives in the context, under its lock, together with the address space: so an answer
//! cannot pass between "is the page known?" and "then it is pending".

pub(crate) mod recent;
pub mod response;
pub mod router;
mod window;

use crate::address_space::AddressSpace;
use crate::context::{After, Context, KEPT, Life, State, Vms, trim};
use crate::device::{Access, Asid, Fault, StopId, Verdict};
use crate::few::Few;
use crate::gpu_vm::{self, Behind, GpuVa};
use crate::info::{FaultTrace, PendingStatus};
use crate::memory::MemoryTable;
use crate::numbered::Numbered;
use crate::population;
use crate::protocol::errno::{ECANCELED, EFAULT, EINVAL, EPERM, EPIPE};
use crate::protocol::event::{
    FAULT_ATOMIC_ACCESS, FAULT_NOT_PRESENT, FAULT_WRITE_ACCESS, PERM_ATOMIC, PERM_READ, PERM_WRITE,
};
use crate::protocol::limit::Limit;
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::quota::{Charge, Full};
use crate::seeded::{self, Bug};
use crate::sync::Arc;
use crate::{addr::PageRange, event::Waiting};
use std::collections::BTreeMap;
use std::time::Duration;
use window::Window;

pub use window::FAULT_AROUND_PAGES;
pub(crate) use window::{Pages, emptied};

/// Most pending faults of a GPU VM that are shown one by one.
pub const SHOWN_FAULTS: usize = 16;
/// Most pages of a group that are asked for together; a device that asks for more gets the rest by asking again.
const MAX_GROUP_PAGES: u64 = 32;

/// How a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// From what was known.
    ServedLocally,
    /// By the guest's answer.
    Answered,
    /// As an error of the job; of a prefetch that was only advice, as nobody's.
    Refused,
    /// Its owner, GPU VM or mapping was gone.
    Dropped,
    /// To be raised again: too many were pending, or it had joined a group that was refused for another page.
    Throttled,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::ServedLocally => "served-locally",
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Dropped => "dropped",
            Self::Throttled => "throttled",
        }
    }
}

/// A fault that waits for the guest.
#[derive(Debug)]
pub struct Pending {
    /// Names it in the answer.
    pub cookie: u64,
    /// The GPU VM in the context.
    pub vm_id: u32,
    /// The host device.
    pub device: usize,
    /// As the device reported.
    pub asid: Asid,
    /// GPU page (C): the first of `pages`.
    pub page: u64,
    /// CPU page (A) behind it; those behind the others follow.
    pub cpu_page: u64,
    /// Pages that are asked for. More than one are a group, with a record each, or a prefetch, with one in all.
    pub pages: u64,
    /// Whether no job waits for it: the device is to have the pages before one does.
    pub prefetch: bool,
    /// Records of it that were written.
    pub reported: u64,
    /// `PERM_*` of the accesses.
    pub perm: u16,
    /// `PERM_*` that the guest was told, and so all that its answer must grant; accesses that join later are repeated
    /// and ask again. None before the guest was told all: until then no answer can be honest.
    pub told: Option<u16>,
    /// `FAULT_*` type.
    pub fault_type: u8,
    /// Where the walk ended.
    pub level: u8,
    /// The engine.
    pub engine: u8,
    /// Bytes from the page on that the job is expected to touch.
    pub length_hint: u32,
    /// When it was raised.
    pub raised_ns: u64,
    /// The same on the guest's own clock.
    pub raised_run: Duration,
    /// Parked accesses: the first one, unless it is a prefetch, and those that joined.
    pub waiters: Few<StopId>,
}

impl Pending {
    /// Its GPU pages.
    pub fn range(&self) -> PageRange {
        PageRange { start: self.page, end: self.page.saturating_add(self.pages) }
    }
    /// Records that tell the guest of it.
    pub fn records(&self) -> u64 {
        if self.prefetch { 1 } else { self.pages }
    }
    fn status(&self, now_ns: u64) -> PendingStatus {
        PendingStatus {
            cookie: self.cookie,
            gpu_addr: self.page << PAGE_SHIFT,
            cpu_addr: self.cpu_page << PAGE_SHIFT,
            pages: self.pages,
            access: perm_name(self.perm),
            prefetch: self.prefetch,
            told: self.told.is_some(),
            waiters: self.waiters.len(),
            wait_ns: now_ns.saturating_sub(self.raised_ns),
        }
    }
    /// The number of the record that is written next; with the last one the guest knows all.
    pub(crate) fn next_report(&mut self) -> u64 {
        let nth = self.reported;
        self.reported = nth.saturating_add(1);
        if self.reported >= self.records() {
            self.told = Some(self.perm);
        }
        nth
    }
}

/// Pages that are to be asked for before a job touches them.
pub(crate) struct Prefetch {
    pub(crate) vm_id: u32,
    pub(crate) range: PageRange,
    /// CPU page (A) behind the first.
    pub(crate) cpu_page: u64,
    /// Whether their mapping allows no write.
    pub(crate) readonly: bool,
}

/// The faults of one context that wait for the guest.
#[derive(Debug, Default)]
pub struct PendingFaults {
    by_cookie: Numbered<u64, Pending>,
    /// (GPU VM, first GPU page) -> cookie; those of one GPU VM do not overlap.
    by_page: BTreeMap<(u32, u64), u64>,
    next: u32,
    charge: Charge,
}

impl PendingFaults {
    /// None; the charge is for those to come.
    pub fn new(charge: Charge) -> Self {
        Self { charge, ..Self::default() }
    }
    /// Has room for one more in the guest.
    ///
    /// # Errors
    /// [`Full`].
    fn reserve(&mut self) -> std::result::Result<(), Full> {
        self.charge.grow(1)
    }
    /// How many records.
    pub fn count(&self) -> usize {
        self.by_cookie.len()
    }
    /// The pending fault of a cookie.
    pub fn get(&self, cookie: u64) -> Option<&Pending> {
        self.by_cookie.get(&cookie)
    }
    /// The same, to be changed.
    pub fn get_mut(&mut self, cookie: u64) -> Option<&mut Pending> {
        self.by_cookie.get_mut(&cookie)
    }
    /// The pending fault that asks for a page.
    fn covering(&self, vm_id: u32, page: u64) -> Option<&Pending> {
        let (_, cookie) = self.by_page.range((vm_id, 0)..=(vm_id, page)).next_back()?;
        self.by_cookie.get(cookie).filter(|pending| pending.range().contains(page))
    }
    fn joined(&mut self, vm_id: u32, page: u64) -> Option<&mut Pending> {
        let cookie = self.covering(vm_id, page)?.cookie;
        self.by_cookie.get_mut(&cookie)
    }
    /// Pages from `page` on that nobody has asked for: behind what covers it, up to what is asked for next.
    pub(crate) fn free_from(&self, vm_id: u32, page: u64) -> PageRange {
        let start = self.covering(vm_id, page).map_or(page, |pending| pending.range().end);
        let next = self.by_page.range((vm_id, start)..=(vm_id, u64::MAX)).next();
        PageRange { start, end: next.map_or(u64::MAX, |((_, page), _)| *page) }
    }
    /// Makes pending what there was room for ([`Self::reserve`]). Cookies carry the generation of their context and are
    /// not used again while one is pending.
    fn insert(&mut self, generation: u64, mut pending: Pending) -> u64 {
        let cookie = loop {
            self.next = self.next.wrapping_add(1);
            let cookie = (generation << 32) | u64::from(self.next);
            // After four thousand million faults one of the first may still be pending.
            if !self.by_cookie.contains_key(&cookie) {
                break cookie;
            }
        };
        pending.cookie = cookie;
        self.by_page.insert((pending.vm_id, pending.page), cookie);
        self.by_cookie.insert(cookie, pending);
        cookie
    }
    /// Ends the pending fault of a cookie.
    pub fn take(&mut self, cookie: u64) -> Option<Pending> {
        let pending = self.by_cookie.remove(&cookie)?;
        self.by_page.remove(&(pending.vm_id, pending.page));
        self.charge.shrink(1);
        if self.by_cookie.is_empty() && self.by_cookie.capacity() > KEPT {
            self.by_cookie = Numbered::default();
        }
        Some(pending)
    }
    /// Those of a GPU VM that have waited longest, for people.
    pub fn oldest(&self, vm_id: u32, now_ns: u64) -> Vec<PendingStatus> {
        let mut of_vm: Vec<_> = self.by_cookie.values().filter(|p| p.vm_id == vm_id).collect();
        of_vm.sort_unstable_by_key(|p| (p.raised_ns, p.cookie));
        of_vm.into_iter().take(SHOWN_FAULTS).map(|p| p.status(now_ns)).collect()
    }
    /// CPU pages that are waited for, of each fault the first and the last; one may come up more than once.
    pub fn cpu_pages(&self) -> impl Iterator<Item = u64> {
        let ends = |p: &Pending| [p.cpu_page, p.cpu_page.saturating_add(p.pages.saturating_sub(1))];
        self.by_cookie.values().flat_map(ends)
    }
    /// Pending faults that were raised at `run` of the guest's own time or before: cookie, GPU VM, GPU page.
    pub fn raised_until(&self, run: Duration) -> Vec<(u64, u32, u64)> {
        let old = self.by_cookie.values().filter(|pending| pending.raised_run <= run);
        old.map(|pending| (pending.cookie, pending.vm_id, pending.page)).collect()
    }
    /// Cookies of a GPU VM's pending faults in ranges of it, which are sorted and apart.
    pub fn cookies_in(&self, vm_id: u32, ranges: &[PageRange]) -> Vec<u64> {
        let hit = |asked: PageRange| {
            let before = ranges.partition_point(|range| range.start < asked.end);
            let last = before.checked_sub(1).and_then(|at| ranges.get(at));
            last.is_some_and(|range| range.intersect(asked).is_some())
        };
        let inside = |p: &&Pending| p.vm_id == vm_id && hit(p.range());
        self.by_cookie.values().filter(inside).map(|p| p.cookie).collect()
    }
}

impl Access {
    /// `PERM_*` on the wire.
    pub fn perm(self) -> u16 {
        let bits = match self {
            Self::Read => PERM_READ,
            Self::Write => PERM_WRITE,
            Self::Atomic => PERM_WRITE | PERM_ATOMIC,
        };
        u16::try_from(bits).unwrap_or(u16::MAX)
    }
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic",
        }
    }
    fn writes(self) -> bool {
        self != Self::Read
    }
}

/// What can be done about a fault right now.
enum Resolution {
    /// Bind and let it go on.
    Serve,
    /// Only the guest knows. `FAULT_*` type.
    Ask(u8),
    /// An error of the job: positive errno.
    Refuse(i32),
    /// Nobody is concerned any more.
    Gone,
}

/// A fault that has been routed.
struct Raised<'a> {
    device: usize,
    vm_id: u32,
    fault: &'a Fault,
    /// The CPU page shown there; 0 where there is none.
    cpu_page: u64,
    /// The end of the mapping there.
    end: u64,
}

/// A parked access beyond a limit of pending faults. It was counted as throttled, and is raised again when there is
/// room.
#[derive(Clone, Copy)]
pub struct Throttled {
    device: usize,
    vm_id: u32,
    page: u64,
    access: Access,
    stop: StopId,
}

impl Throttled {
    /// The GPU VM that it belongs to.
    pub fn vm_id(&self) -> u32 {
        self.vm_id
    }
}

impl Raised<'_> {
    fn page(&self) -> u64 {
        self.fault.addr.page()
    }
}

impl Context {
    /// A device reported a fault of this context's GPU VM. Runs on the engine's thread where the lock is free: what is known
    /// is served here, and else the record is written to the guest from here.
    pub(crate) fn on_fault(
        &self,
        state: &mut State,
        device: usize,
        vm_id: u32,
        fault: &Fault,
        after: &mut After,
    ) {
        let mut raised = Raised { device, vm_id, fault, cpu_page: 0, end: 0 };
        state.counters.faults_raised = state.counters.faults_raised.saturating_add(1);
        let State { vms, space, memory, extents, life, .. } = &mut *state;
        let found = find(vms, *life, vm_id, raised.page());
        let resolution = match found {
            Ok(va) => {
                (raised.cpu_page, raised.end) = (shown_page(va, raised.page()), va.range.end);
                match resolve(va, raised.page(), fault.access, space, memory) {
                    Resolution::Serve => {
                        let device = self.host.device_of(device).as_ref();
                        let window = Window { device, asid: fault.asid, va, space, memory };
                        match window.bind(raised.page(), extents) {
                            Ok(()) => Resolution::Serve,
                            Err(errno) => Resolution::Refuse(errno),
                        }
                    }
                    other => other,
                }
            }
            Err(resolution) => {
                raised.cpu_page = state.cpu_page(vm_id, raised.page());
                resolution
            }
        };
        let ended = match resolution {
            Resolution::Serve => Some((Outcome::ServedLocally, Verdict::Retry)),
            Resolution::Refuse(errno) => Some((Outcome::Refused, Verdict::Fail(errno))),
            Resolution::Gone => Some((Outcome::Dropped, Verdict::Fail(ECANCELED))),
            Resolution::Ask(fault_type) => {
                self.ask(state, &raised, fault_type, after);
                None
            }
        };
        if let Some((outcome, verdict)) = ended {
            after.resume(device, fault.stop, verdict);
            self.trace(state, &raised, outcome);
        }
        self.let_throttled_in(state, false, after);
    }

    /// Makes the fault pending, or joins it to the one that is pending for its page.
    fn ask(&self, state: &mut State, raised: &Raised, fault_type: u8, after: &mut After) {
        let (fault, vm_id) = (raised.fault, raised.vm_id);
        if let Some(pending) = state.faults.joined(vm_id, raised.page()) {
            pending.waiters.push(fault.stop);
            // Of several pages the answer must grant what the first one needs, and this may be another: it asks again.
            if pending.pages == 1 && !pending.prefetch {
                pending.perm |= fault.access.perm();
            }
            state.counters.faults_coalesced = state.counters.faults_coalesced.saturating_add(1);
            return;
        }
        if self.own_room(state) == 0 || state.faults.reserve().is_err() {
            if self.own_room(state) == 0 {
                self.quota.refuse(Limit::PendingFaults);
            } else {
                self.starve();
            }
            let (device, page) = (raised.device, raised.page());
            state.throttled.push_back(Throttled {
                device,
                vm_id,
                page,
                access: fault.access,
                stop: fault.stop,
            });
            self.trace(state, raised, Outcome::Throttled);
            return;
        }
        let hint = fault.length_hint.saturating_add(fault.addr.0 & (PAGE_SIZE - 1));
        let hint = hint.min(raised.end.saturating_sub(raised.page()) << PAGE_SHIFT);
        let pages = state.pages_of_group(raised);
        let pending = Pending {
            cookie: 0,
            vm_id,
            device: raised.device,
            asid: fault.asid,
            page: raised.page(),
            cpu_page: raised.cpu_page,
            pages,
            prefetch: false,
            reported: 0,
            perm: fault.access.perm(),
            told: None,
            fault_type,
            level: fault.level,
            engine: fault.engine,
            length_hint: u32::try_from(hint).unwrap_or(u32::MAX),
            raised_ns: self.host.now_ns(),
            raised_run: self.run_time(),
            waiters: Few::one(fault.stop),
        };
        self.make_pending(state, pending, after);
    }

    /// Asks for pages that no job waits for yet. Returns whether there was room.
    pub(crate) fn ask_ahead(&self, state: &mut State, prefetch: Prefetch, after: &mut After) -> bool {
        // Accesses that wait for their turn come first.
        if self.own_room(state) == 0 || !state.throttled.is_empty() {
            return false;
        }
        let Some(vm) = state.vms.get(&prefetch.vm_id) else { return false };
        if state.faults.reserve().is_err() {
            self.starve();
            return false;
        }
        let perm = prefetch.perm(self.host.device_of(vm.device).as_ref());
        let pending = Pending {
            cookie: 0,
            vm_id: prefetch.vm_id,
            device: vm.device,
            asid: vm.asid,
            page: prefetch.range.start,
            cpu_page: prefetch.cpu_page,
            pages: prefetch.range.pages(),
            prefetch: true,
            reported: 0,
            perm: u16::try_from(perm).unwrap_or(u16::MAX),
            told: None,
            fault_type: FAULT_NOT_PRESENT,
            level: 0,
            engine: 0,
            length_hint: population::length_hint(prefetch.range),
            raised_ns: self.host.now_ns(),
            raised_run: self.run_time(),
            waiters: Few::default(),
        };
        self.make_pending(state, pending, after);
        true
    }

    fn make_pending(&self, state: &mut State, pending: Pending, after: &mut After) {
        let vm_id = pending.vm_id;
        let last = pending.cpu_page.saturating_add(pending.pages.saturating_sub(1));
        state.space.keep_leaf(pending.cpu_page);
        if pending.pages > 1 {
            state.space.keep_leaf(last);
        }
        let cookie = state.faults.insert(self.generation, pending);
        self.quota.note(Limit::PendingFaults, state.faults.count());
        state.waiting.push_back(Waiting::Fault(cookie));
        self.count_pending(state, vm_id, true);
        after.announce = true;
    }

    /// Ends a pending fault: releases everything that waits for it, counts and traces it, and lets a throttled one in.
    pub(crate) fn end_pending(
        &self,
        state: &mut State,
        cookie: u64,
        outcome: Outcome,
        verdict: Verdict,
        after: &mut After,
    ) {
        let Some(pending) = state.faults.take(cookie) else { return };
        self.count_pending(state, pending.vm_id, false);
        if pending.told.is_none() {
            state.waiting.retain(|waiting| *waiting != Waiting::Fault(cookie));
        }
        let count = u64::try_from(pending.waiters.len()).unwrap_or(u64::MAX);
        let released = if seeded::on(Bug::WakeOne) { 1 } else { usize::MAX };
        for stop in pending.waiters.iter().take(released) {
            after.resume(pending.device, *stop, verdict);
        }
        state.count(outcome, count);
        if !seeded::on(Bug::LoseWakeUp) {
            self.let_throttled_in(state, false, after);
        }
        state.vms.values_mut().for_each(|vm| vm.population.go_on());
        if pending.prefetch
            && let Some(vm) = state.vms.get_mut(&pending.vm_id)
        {
            let hope =
                vm.state == gpu_vm::State::Usable && matches!(outcome, Outcome::Answered | Outcome::Dropped);
            vm.population.answered(hope.then(|| pending.range()));
        }
        after.more |= state.has_more();
        let now = self.host.now_ns();
        self.host.recent.push(FaultTrace {
            time_ns: pending.raised_ns,
            guest: Arc::clone(&self.label.guest),
            ctx_id: self.ctx_id,
            device: pending.device,
            asid: pending.asid.0,
            cookie,
            gpu_addr: pending.page << PAGE_SHIFT,
            cpu_addr: pending.cpu_page << PAGE_SHIFT,
            access: perm_name(pending.perm),
            outcome: outcome.name(),
            wait_ns: now.saturating_sub(pending.raised_ns),
        });
    }

    /// Lets as many throttled accesses go on as there is room for, and those in front of them that need none any more.
    ///
    /// Called after every change that makes room or could have made a page known by a fault. So none is forgotten: one
    /// that was let go on either faults again, which leads here, or its page was bound, and that led here too, or its GPU
    /// VM is gone, and that led here as well.
    ///
    /// Where the guest's own room is what lacks, or other contexts wait for it, the context gets in line; `turn` says
    /// that its turn has come.
    pub(crate) fn let_throttled_in(&self, state: &mut State, turn: bool, after: &mut After) {
        let mut room = self.own_room(state);
        if room == 0 || state.throttled.is_empty() {
            return;
        }
        let others = !turn && self.quota.starved.any();
        let mut of_guest = if others { 0 } else { self.quota.room(Limit::TotalPendingFaults) };
        while room > 0
            && let Some(Throttled { device, vm_id, page, access, stop }) = state.throttled.front().copied()
        {
            if matches!(state.resolve(vm_id, page, access), Resolution::Ask(_)) {
                if of_guest == 0 {
                    self.starve();
                    break;
                }
                room = room.saturating_sub(1);
                of_guest = of_guest.saturating_sub(1);
                after.let_in = true;
            }
            state.throttled.pop_front();
            after.resume(device, stop, Verdict::Retry);
        }
        trim(&mut state.throttled, KEPT);
    }
    /// How many more faults may be pending in the context.
    fn own_room(&self, state: &State) -> usize {
        let limit = usize::try_from(self.quota.limits().pending_faults).unwrap_or(usize::MAX);
        limit.saturating_sub(state.faults.count())
    }
    /// Gets in line for the guest's room.
    fn starve(&self) {
        self.quota.starved.enter(&self.starved, &self.me);
    }

    /// Counts and traces a fault that did not become pending.
    fn trace(&self, state: &mut State, raised: &Raised, outcome: Outcome) {
        state.count(outcome, 1);
        self.host.recent.push(FaultTrace {
            time_ns: self.host.now_ns(),
            guest: Arc::clone(&self.label.guest),
            ctx_id: self.ctx_id,
            device: raised.device,
            asid: raised.fault.asid.0,
            cookie: 0,
            gpu_addr: raised.fault.addr.page_start().0,
            cpu_addr: raised.cpu_page << PAGE_SHIFT,
            access: raised.fault.access.name(),
            outcome: outcome.name(),
            wait_ns: 0,
        });
    }

    /// Keeps the count of GPU VMs that have a pending fault.
    fn count_pending(&self, state: &mut State, vm_id: u32, more: bool) {
        let Some(vm) = state.vms.get_mut(&vm_id) else { return };
        let before = vm.pending_faults;
        vm.pending_faults = if more { before.saturating_add(1) } else { before.saturating_sub(1) };
        match (before, vm.pending_faults) {
            (0, 1..) => self.host.pending_vms.enter(),
            (1.., 0) => self.host.pending_vms.leave(),
            _ => {}
        }
    }

    /// Binds the known pages around a page.
    pub(crate) fn bind_around(
        &self,
        state: &mut State,
        vm_id: u32,
        asid: Asid,
        page: u64,
    ) -> std::result::Result<(), i32> {
        let State { vms, space, memory, extents, .. } = state;
        let Some(vm) = vms.get(&vm_id) else { return Err(ECANCELED) };
        let Some(va) = vm.mappings.find(page) else { return Err(EINVAL) };
        let device = self.host.device_of(vm.device).as_ref();
        Window { device, asid, va, space, memory }.bind(page, extents)
    }
}

/// The mapping that a fault is about, or what is to be done without one.
fn find(vms: &Vms, life: Life, vm_id: u32, page: u64) -> std::result::Result<&GpuVa, Resolution> {
    let Some(vm) = vms.get(&vm_id).filter(|_| life == Life::Alive) else {
        return Err(Resolution::Gone);
    };
    if vm.state != gpu_vm::State::Usable {
        return Err(Resolution::Refuse(EPIPE));
    }
    vm.mappings.find(page).ok_or(Resolution::Refuse(EINVAL))
}

/// What can be done about an access to a page of a mapping.
fn resolve(va: &GpuVa, page: u64, access: Access, space: &AddressSpace, memory: &MemoryTable) -> Resolution {
    if access.writes() && va.readonly {
        return Resolution::Refuse(EPERM);
    }
    match va.behind(page) {
        Behind::Null => Resolution::Serve,
        Behind::Blob(blob, at) => match blob.gpa_page(at).and_then(|gpa_page| memory.lookup(gpa_page, 1)) {
            Some(_) => Resolution::Serve,
            None => Resolution::Refuse(EFAULT),
        },
        Behind::Cpu(cpu_page) => match (space.lookup(cpu_page), access) {
            (None, _) => Resolution::Ask(FAULT_NOT_PRESENT),
            (Some(known), Access::Write) if known.readonly => Resolution::Ask(FAULT_WRITE_ACCESS),
            (Some(known), Access::Atomic) if known.readonly => Resolution::Ask(FAULT_ATOMIC_ACCESS),
            (Some(_), _) => Resolution::Serve,
        },
    }
}

/// The CPU page shown at a GPU page, for traces and for who is asked; 0 where there is none.
fn shown_page(va: &GpuVa, page: u64) -> u64 {
    match va.behind(page) {
        Behind::Cpu(cpu_page) => cpu_page,
        Behind::Blob(..) | Behind::Null => 0,
    }
}

impl State {
    fn resolve(&self, vm_id: u32, page: u64, access: Access) -> Resolution {
        match find(&self.vms, self.life, vm_id, page) {
            Ok(va) => resolve(va, page, access, &self.space, &self.memory),
            Err(resolution) => resolution,
        }
    }
    /// Of the pages that a device asks for together, those from the first on that must be asked of the guest, in one
    /// mapping, and that nobody has asked for.
    fn pages_of_group(&self, raised: &Raised) -> u64 {
        let (first, asked) = (raised.page(), raised.fault.pages.clamp(1, MAX_GROUP_PAGES));
        if asked == 1 {
            return 1;
        }
        let end = first.saturating_add(asked).min(raised.end);
        let end = end.min(self.faults.free_from(raised.vm_id, first).end);
        let must_ask =
            |page: &u64| matches!(self.resolve(raised.vm_id, *page, raised.fault.access), Resolution::Ask(_));
        let following = (first.saturating_add(1)..end).take_while(must_ask).count();
        u64::try_from(following).unwrap_or(0).saturating_add(1)
    }
    /// The CPU page shown at a GPU page; 0 where there is none.
    fn cpu_page(&self, vm_id: u32, page: u64) -> u64 {
        let va = self.vms.get(&vm_id).and_then(|vm| vm.mappings.find(page));
        va.map_or(0, |va| shown_page(va, page))
    }
    fn count(&mut self, outcome: Outcome, n: u64) {
        let counter = match outcome {
            Outcome::ServedLocally => &mut self.counters.faults_served_locally,
            Outcome::Answered => &mut self.counters.faults_answered,
            Outcome::Refused => &mut self.counters.faults_refused,
            Outcome::Dropped => &mut self.counters.faults_dropped,
            Outcome::Throttled => &mut self.counters.faults_throttled,
        };
        *counter = counter.saturating_add(n);
    }
}

fn perm_name(perm: u16) -> &'static str {
    match u32::from(perm) {
        p if p & PERM_ATOMIC != 0 => Access::Atomic.name(),
        p if p & PERM_WRITE != 0 => Access::Write.name(),
        _ => Access::Read.name(),
    }
}

/// A device's refusal as an errno.
pub(crate) fn device_errno(error: crate::device::Error) -> i32 {
    use crate::device::Error;
    match error {
        Error::NoVm(_) | Error::VmExists(_) => ECANCELED,
        Error::OutOfMemory => crate::protocol::errno::ENOMEM,
        Error::Unsupported => crate::protocol::errno::EOPNOTSUPP,
        Error::TooManyVms | Error::OverQuota(_) => crate::protocol::errno::ENOSPC,
        Error::UnknownOpcode { .. } | Error::BadOperand { .. } => EINVAL,
    }
}
