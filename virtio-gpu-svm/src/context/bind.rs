//! Operations of a VM_BIND on a context's GPU VM: all take effect or none. PROTOCOL 5.3.
//!
//! The mappings change first, as drm_gpuvm says, and are undone if the whole is refused; then translations go, and what
//! must be resident is wanted ([`crate::population`]). Asynchronous ones come here in their turn (`jobs`).

use super::{After, Context, Error, State};
use crate::addr::PageRange;
use crate::device::{Flush, Verdict};
use crate::fault::Outcome;
use crate::gpu_vm::{Backing, Change, GpuVa, State as VmState};
use crate::invalidation::{ONE_BY_ONE, bounded};
use crate::population::{self, hold, lacks_faults, take_away};
use crate::protocol::limit::Limit;
use crate::sync::Arc;

/// One checked operation of a VM_BIND.
#[derive(Clone, Debug)]
pub enum Bind {
    /// Map.
    Map(GpuVa),
    /// Map, and make resident.
    MapImmediate(GpuVa),
    /// Make resident what is mapped there.
    Prefetch(PageRange),
    /// Unmap.
    Unmap(PageRange),
    /// Unmap every mapping of a blob resource.
    UnmapAll(u32),
}

impl Bind {
    /// What must be made resident; `all` that is mapped where the device has no faults.
    pub(crate) fn to_populate(&self, all: bool) -> Option<PageRange> {
        match self {
            Self::MapImmediate(va) => Some(va.range),
            Self::Map(va) => all.then_some(va.range),
            // There, or wanted already.
            Self::Prefetch(range) => (!all).then_some(*range),
            Self::Unmap(_) | Self::UnmapAll(_) => None,
        }
    }
    /// The GPU pages where it maps a blob of this id.
    pub fn maps_blob(&self, resource_id: u32) -> Option<PageRange> {
        let (Self::Map(va) | Self::MapImmediate(va)) = self else { return None };
        let maps = matches!(&va.backing, Backing::Blob(blob, _) if blob.resource_id == resource_id);
        maps.then_some(va.range)
    }
    /// An operation without effect.
    pub const NOTHING: Self = Self::Unmap(PageRange { start: 0, end: 0 });

    /// Whether it is refused in an unusable GPU VM.
    pub fn needs_usable(&self) -> bool {
        match self {
            Self::Map(_) | Self::MapImmediate(_) | Self::Prefetch(_) => true,
            Self::Unmap(_) | Self::UnmapAll(_) => false,
        }
    }
    /// The GPU pages that it names.
    pub(crate) fn range(&self) -> Option<PageRange> {
        match self {
            Self::Map(va) | Self::MapImmediate(va) => Some(va.range),
            Self::Unmap(range) | Self::Prefetch(range) => Some(*range),
            Self::UnmapAll(_) => None,
        }
    }
}

/// A vector of operations that was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Index of the operation that it is about.
    pub op: u32,
    /// The GPU address that it is about, or 0.
    pub addr: u64,
    /// Why.
    pub error: Error,
}

impl Refused {
    pub(super) fn at(binds: &[Bind], op: usize, error: Error) -> Self {
        let addr = binds.get(op).and_then(Bind::range).map_or(0, PageRange::start_addr);
        Self { op: u32::try_from(op).unwrap_or(u32::MAX), addr, error }
    }
    /// A mirror window has pages in `busy`, which operations would take out of it: names the first that would, as far
    /// as few questions to the device tell.
    fn busy(binds: &[Bind], busy: PageRange, is_resident: impl Fn(PageRange) -> bool) -> Self {
        let touching = |(op, bind): (usize, &Bind)| Some((op, bind.range()?.intersect(busy)?));
        let mut parts = binds.iter().enumerate().filter_map(touching);
        let first = parts.clone().next();
        let found = parts.by_ref().take(ONE_BY_ONE).find(|(_, part)| is_resident(*part)).or(first);
        let (op, part) = found.unwrap_or((0, busy));
        Self { addr: part.start_addr(), ..Self::at(binds, op, Error::MirrorBusy) }
    }
}

impl Context {
    /// Carries out operations, all or none. PROTOCOL 5.3.
    ///
    /// # Errors
    /// [`Error::NoVm`], [`Error::VmUnusable`] for a MAP, [`Error::TooManyMappings`], [`Error::Full`],
    /// [`Error::MirrorBusy`].
    pub fn bind(self: &Arc<Self>, vm_id: u32, binds: &[Bind]) -> Result<(), Refused> {
        let mut after = After::default();
        let result = self.bind_locked(&mut self.lock(), vm_id, binds, &mut after);
        self.settle(after);
        result.inspect_err(|refused| self.count_refusal(&refused.error))
    }

    pub(super) fn bind_locked(
        &self,
        state: &mut State,
        vm_id: u32,
        binds: &[Bind],
        after: &mut After,
    ) -> Result<(), Refused> {
        let limit = self.quota.limits().mappings;
        let most = usize::try_from(limit).unwrap_or(usize::MAX);
        let refused = |op, error| Refused::at(binds, op, error);
        let vm = state.vms.get_mut(&vm_id).ok_or(refused(0, Error::NoVm(vm_id)))?;
        if vm.state != VmState::Usable
            && let Some(op) = binds.iter().position(Bind::needs_usable)
        {
            return Err(refused(op, Error::VmUnusable(vm_id)));
        }
        let (device, asid) = (self.host.device_of(vm.device).as_ref(), vm.asid);
        let all_resident = lacks_faults(device);
        let (mut change, mut wanted) = (Change::default(), Vec::new());
        // The operations since which there is too much: a later one may make room again.
        let (mut over, mut over_all, mut over_pages) = (None, None, None);
        let most_of_all = vm.mappings_charge.most();
        for (op, bind) in binds.iter().enumerate() {
            match bind {
                Bind::Map(va) | Bind::MapImmediate(va) => vm.mappings.map(va.clone(), &mut change),
                Bind::Unmap(range) => vm.mappings.unmap(*range, &mut change),
                Bind::UnmapAll(resource_id) => vm.mappings.unmap_blob(*resource_id, &mut change),
                Bind::Prefetch(_) => {}
            }
            over = over.or(Some(op)).filter(|_| vm.mappings.len() > most);
            over_all = over_all.or(Some(op)).filter(|_| vm.mappings.count() > most_of_all);
            let beyond = all_resident && vm.mappings.pages() > population::MAX_POPULATED_PAGES;
            over_pages = over_pages.or(Some(op)).filter(|_| beyond);
            wanted.extend(bind.to_populate(all_resident));
        }
        if let Some(op) = over {
            vm.mappings.undo(change);
            return Err(refused(op, Error::TooManyMappings(limit)));
        }
        if let Some(op) = over_pages {
            vm.mappings.undo(change);
            return Err(refused(op, Error::TooManyPages(population::MAX_POPULATED_PAGES)));
        }
        let (mut carved, mut zapped) = (Vec::new(), Vec::new());
        change.out_of_mirrors(|range| carved.push(range));
        let is_resident = |range| device.resident_in(asid, range) > 0;
        if let Some(busy) = bounded(carved).into_iter().find(|range| is_resident(*range)) {
            vm.mappings.undo(change);
            return Err(Refused::busy(binds, busy, is_resident));
        }
        // The last thing that can be refused. Unless others have taken the room meanwhile, it is the operation since which
        // there is too much.
        if let Err(full) = vm.mappings_charge.resize(vm.mappings.count()) {
            vm.mappings.undo(change);
            return Err(refused(over_all.unwrap_or(0), Error::Full(full)));
        }
        self.quota.note(Limit::Mappings, vm.mappings.len());
        change.zapped(|range| zapped.push(range));
        let zapped = PageRange::merge(zapped);
        // What engines still have in hand is theirs for one slice; who frees memory invalidates and waits.
        let (Flush::Done | Flush::Pending(_)) = take_away(device, vm, zapped.clone());
        if all_resident && !wanted.is_empty() {
            let (Flush::Done | Flush::Pending(_)) = hold(device, vm);
        }
        vm.population.want(wanted);
        // A fault whose mapping is gone is raised again, and judged by what stands there then.
        for cookie in state.faults.cookies_in(vm_id, &zapped) {
            self.end_pending(state, cookie, Outcome::Dropped, Verdict::Retry, after);
        }
        after.more |= state.has_more();
        Ok(())
    }

    /// Unmaps a blob resource from every GPU VM of the context, now and for binds that are queued.
    pub(crate) fn unmap_blob(self: &Arc<Self>, resource_id: u32) {
        let vms: Vec<u32> = {
            let mut state = self.lock();
            state.timelines.detach(resource_id);
            state.vms.keys().copied().collect()
        };
        for vm_id in vms {
            match self.bind(vm_id, &[Bind::UnmapAll(resource_id)]) {
                // The session may end meanwhile, and the GPU VM with it.
                Ok(()) | Err(Refused { error: Error::NoVm(_), .. }) => {}
                Err(refused) => unreachable!("an unmap was refused: {}", refused.error),
            }
        }
    }
}
