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

mod pending;
pub(crate) mod recent;
pub mod response;
pub mod router;
mod window;

use crate::addr::PageRange;
use crate::address_space::AddressSpace;
use crate::context::{After, Context, KEPT, Life, State, Vms, add, trim};
use crate::device::{Access, Fault, StopId, Verdict};
use crate::gpu_vm::{self, Behind, GpuVa};
use crate::info::FaultTrace;
use crate::memory::MemoryTable;
use crate::population;
use crate::protocol::errno::{ECANCELED, EFAULT, EINVAL, EPERM, EPIPE};
use crate::protocol::event::{
    FAULT_ATOMIC_ACCESS, FAULT_NOT_PRESENT, FAULT_WRITE_ACCESS, PERM_ATOMIC, PERM_READ, PERM_WRITE,
};
use crate::protocol::limit::Limit;
use crate::protocol::{PAGE_SHIFT, PAGE_SIZE};
use crate::seeded::{self, Bug};
use crate::sync::Arc;
use pending::NewPending;
use window::Window;

pub use pending::{Pending, PendingFaults, SHOWN_FAULTS};
pub use window::FAULT_AROUND_PAGES;
pub(crate) use window::{LONG_RUN, Pages, emptied};

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

/// Pages that are to be asked for before a job touches them.
pub(crate) struct Prefetch {
    pub(crate) vm_id: u32,
    pub(crate) range: PageRange,
    /// CPU page (A) behind the first.
    pub(crate) cpu_page: u64,
    /// Whether their mapping allows no write.
    pub(crate) readonly: bool,
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
        add(&mut state.counters.obtain().faults_raised, 1);
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
        if state.faults.join(vm_id, raised.page(), fault.stop, fault.access.perm()) {
            add(&mut state.counters.obtain().faults_coalesced, 1);
            return;
        }
        if self.own_room(state) == 0 || state.faults.reserve(self.generation, &self.quota).is_err() {
            if self.own_room(state) == 0 {
                self.quota.refuse(Limit::PendingFaults);
            } else {
                self.starve();
            }
            let (device, page) = (raised.device, raised.page());
            state.throttled.obtain().push_back(Throttled {
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
        let (raised_ns, raised_run) = (self.host.now_ns(), self.run_time());
        let pending = NewPending {
            vm_id,
            page: raised.page(),
            cpu_page: raised.cpu_page,
            pages: u16::try_from(pages).unwrap_or(u16::MAX),
            stop: Some(fault.stop),
            perm: fault.access.perm(),
            fault_type,
            level: fault.level,
            engine: fault.engine,
            length_hint: u32::try_from(hint).unwrap_or(u32::MAX),
            raised_ns,
            raised_run,
        };
        self.make_pending(state, &pending, after);
    }

    /// Asks for pages that no job waits for yet. Returns whether there was room.
    pub(crate) fn ask_ahead(&self, state: &mut State, prefetch: Prefetch, after: &mut After) -> bool {
        // Accesses that wait for their turn come first.
        if self.own_room(state) == 0 || state.has_throttled() {
            return false;
        }
        let Some(vm) = state.vms.get(&prefetch.vm_id) else { return false };
        if state.faults.reserve(self.generation, &self.quota).is_err() {
            self.starve();
            return false;
        }
        let perm = prefetch.perm(self.host.device_of(vm.device).as_ref());
        let pending = NewPending {
            vm_id: prefetch.vm_id,
            page: prefetch.range.start,
            cpu_page: prefetch.cpu_page,
            pages: u16::try_from(prefetch.range.pages()).unwrap_or(u16::MAX),
            stop: None,
            perm: u16::try_from(perm).unwrap_or(u16::MAX),
            fault_type: FAULT_NOT_PRESENT,
            level: 0,
            engine: 0,
            length_hint: population::length_hint(prefetch.range),
            raised_ns: self.host.now_ns(),
            raised_run: self.run_time(),
        };
        self.make_pending(state, &pending, after);
        true
    }

    fn make_pending(&self, state: &mut State, pending: &NewPending, after: &mut After) {
        let pages = u64::from(pending.pages);
        state.space.keep_leaf(pending.cpu_page);
        if pages > 1 {
            state.space.keep_leaf(pending.cpu_page.saturating_add(pages.saturating_sub(1)));
        }
        state.faults.insert(pending);
        self.quota.note(Limit::PendingFaults, state.faults.count());
        self.count_pending(state, pending.vm_id, true);
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
        let Some(taken) = state.faults.take(cookie) else { return };
        let pending = &taken.pending;
        // Pending faults end with their GPU VM at the latest; without one there is nobody to release.
        let Some(vm) = state.vms.get(&pending.vm_id) else { return };
        let (device, asid) = (vm.device, vm.asid);
        self.count_pending(state, pending.vm_id, false);
        let count = u64::try_from(taken.waiters().count()).unwrap_or(u64::MAX);
        let released = if seeded::on(Bug::WakeOne) { 1 } else { usize::MAX };
        for stop in taken.waiters().take(released) {
            after.resume(device, stop, verdict);
        }
        state.count(outcome, count);
        if !seeded::on(Bug::LoseWakeUp) {
            self.let_throttled_in(state, false, after);
        }
        state.vms.values_mut().for_each(|vm| vm.population.go_on());
        if pending.is_prefetch()
            && let Some(vm) = state.vms.get_mut(&pending.vm_id)
        {
            let hope =
                vm.state == gpu_vm::State::Usable && matches!(outcome, Outcome::Answered | Outcome::Dropped);
            vm.population.answered(hope.then(|| pending.range()));
        }
        after.more |= state.has_more();
        let now = self.host.now_ns();
        self.host.recent.push(FaultTrace {
            time_ns: pending.raised_ns(),
            guest: Arc::clone(&self.label.guest),
            ctx_id: self.ctx_id,
            device,
            asid: asid.0,
            cookie,
            gpu_addr: pending.page() << PAGE_SHIFT,
            cpu_addr: pending.cpu_page() << PAGE_SHIFT,
            access: perm_name(pending.perm()),
            outcome: outcome.name(),
            wait_ns: now.saturating_sub(pending.raised_ns()),
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
        if room == 0 || !state.has_throttled() {
            return;
        }
        let others = !turn && self.quota.starved.any();
        let mut of_guest = if others { 0 } else { self.quota.room(Limit::TotalPendingFaults) };
        while room > 0
            && let Some(first) = state.throttled.get().and_then(|list| list.front())
            && let Throttled { device, vm_id, page, access, stop } = *first
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
            state.throttled.obtain().pop_front();
            after.resume(device, stop, Verdict::Retry);
        }
        trim(state.throttled.obtain(), KEPT);
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
        page: u64,
    ) -> std::result::Result<(), i32> {
        let State { vms, space, memory, extents, .. } = state;
        let Some(vm) = vms.get(&vm_id) else { return Err(ECANCELED) };
        let Some(va) = vm.mappings.find(page) else { return Err(EINVAL) };
        let device = self.host.device_of(vm.device).as_ref();
        Window { device, asid: vm.asid, va, space, memory }.bind(page, extents)
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
        let counters = self.counters.obtain();
        let counter = match outcome {
            Outcome::ServedLocally => &mut counters.faults_served_locally,
            Outcome::Answered => &mut counters.faults_answered,
            Outcome::Refused => &mut counters.faults_refused,
            Outcome::Dropped => &mut counters.faults_dropped,
            Outcome::Throttled => &mut counters.faults_throttled,
        };
        add(counter, n);
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
