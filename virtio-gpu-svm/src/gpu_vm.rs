//! The C side: the mappings of one GPU VM, with drm_gpuvm's split and merge.
//!
//! Owned by [`crate::context::Context`], under its lock. Mappings never overlap. A change is a walk over what it
//! overlaps ([`Mappings::map`], [`Mappings::unmap`]), which emits the steps of `__drm_gpuvm_sm_map`: N unmaps, at most
//! two remaps, one map. Each change can be undone, so that a vector of operations takes effect whole or not at all;
//! the ranges whose translations must go are collected in the [`Change`] and zapped by the caller at the end.
//!
//! # The cases of drm_gpuvm's documentation
//! `a`, `b`: objects; `a+1`: object a from its page 1 on. Tests bear the numbers (`case_NN`).
//! ```text
//!         1: keep       2             3             4: keep       5             6: keep
//!   old   |--a--|       |--a--|       |--a--|       |-a-|         |---a---|     |---a---|
//!   req   |--a--|       |-a+9-|       |--b--|       |---a---|     |-b-|         |-a-|
//!   new   |--a--|       |-a+9-|       |--b--|       |---a---|     |-b-|a+1|     |-a-|a+1|
//!
//!         7             8: keep       9             10: keep      11            12: keep
//!   old   |---a---|     |---a---|     |---a---|     |---a---|     |-----a-----| |-----a-----|
//!   req       |-b-|         |a+1|         |---b---|     |--a+1--|     |-b-|         |a+1|
//!   new   |-a-|-b-|     |-a-|a+1|     |-a-|---b---| |-a-|--a+1--| |-a-|-b-|a+2| |-a-|a+1|a+2|
//!
//!         13: keep      14: keep      15
//!   old       |a+1|         |a+1|         |---a---|
//!   req   |---a---|     |-----a-----| |---b---|
//!   new   |---a---|     |-----a-----| |---b---|a+1|
//! ```
//! In 4, 13 and 14 translations are kept only if the object is the same and contiguous, as drawn; the kernel's text
//! says that an identical mapping (1) may get no step at all, its code emits an unmap (kept) and a map, and so do we.
//!
//! The walk for advice ([`Mappings::split`]) splits at the two edges and neither unmaps nor merges; mappings that have an
//! object are passed over:
//! ```text
//!         16            17                     18                     19            20
//!   old   |-----a-----| |--a--|--b--|--c--|    |--a--|--b--|--c--|    |--a--|--b--|   (nothing)
//!   range     |---|        |-------------|     |---------------|      |-----------|   |-------|
//!   new   |-a-|=a=|-a-| |a|=a=|--b--|=c=|c|    |--a--|--b--|=c=|c|    |--a--|--b--|   (nothing)
//!   steps remap, map    remap, map, map, remap remap, map             none            none
//! ```

mod shown;

use crate::addr::PageRange;
use crate::device::{AddressModel, Asid, DeviceInfo};
use crate::population::Population;
use crate::protocol::{GUEST_VA_END, PAGE_SHIFT};
use crate::quota::Charge;
use crate::resource::Blob;
use crate::sync::Arc;
use shown::Shown;
use std::collections::{BTreeMap, BTreeSet};

/// What stands behind a mapping.
#[derive(Clone, Debug)]
pub enum Backing {
    /// The process' CPU pages from this page number on (A).
    Userptr(u64),
    /// A mirror window: the CPU page is the GPU page and this much, wherever the mapping begins.
    Mirror(i64),
    /// A blob resource, from this page of it on.
    Blob(Arc<Blob>, u64),
    /// Nothing: reads as zero, writes are swallowed.
    Null,
}

impl Backing {
    /// The backing `pages` further.
    fn advanced(&self, pages: u64) -> Self {
        match self {
            Self::Userptr(page) => Self::Userptr(page.wrapping_add(pages)),
            Self::Mirror(offset) => Self::Mirror(*offset),
            Self::Blob(blob, page) => Self::Blob(Arc::clone(blob), page.wrapping_add(pages)),
            Self::Null => Self::Null,
        }
    }
    /// Whether no object stands behind it.
    fn is_objectless(&self) -> bool {
        match self {
            Self::Userptr(_) | Self::Mirror(_) | Self::Null => true,
            Self::Blob(..) => false,
        }
    }
    /// drm_gpuvm's `keep`: translations of an overlapped mapping may stay, because the request maps the same object
    /// contiguously. Object-less mappings never keep.
    fn keeps(&self, offset_in_request: i128, request: &Self) -> bool {
        match (self, request) {
            (Self::Blob(old, old_page), Self::Blob(new, new_page)) => {
                Arc::ptr_eq(old, new)
                    && i128::from(*old_page) == i128::from(*new_page).saturating_add(offset_in_request)
            }
            _ => false,
        }
    }
}

/// What stands behind one page of a mapping.
#[derive(Clone, Copy, Debug)]
pub enum Behind<'a> {
    /// A CPU page of the process.
    Cpu(u64),
    /// A page of a blob resource.
    Blob(&'a Arc<Blob>, u64),
    /// Nothing.
    Null,
}

/// A mapping C..D (drm_gpuvm calls it a `gpuva`).
#[derive(Clone, Debug)]
pub struct GpuVa {
    /// Its GPU pages.
    pub range: PageRange,
    /// What stands behind its first page.
    pub backing: Backing,
    /// Whether the GPU may only read.
    pub readonly: bool,
}

impl GpuVa {
    /// The part of it in `range`, which must lie inside.
    fn part(&self, range: PageRange) -> Self {
        let skipped = range.start.saturating_sub(self.range.start);
        Self { range, backing: self.backing.advanced(skipped), readonly: self.readonly }
    }
    /// What sticks out left of `within`, what lies in it, what sticks out right.
    fn parts(&self, within: PageRange) -> (Option<Self>, Self, Option<Self>) {
        let left = PageRange { start: self.range.start, end: within.start };
        let right = PageRange { start: within.end, end: self.range.end };
        let stick_out = |range: PageRange| (range.pages() > 0).then(|| self.part(range));
        (stick_out(left), self.part(within), stick_out(right))
    }
    /// What stands behind one of its pages.
    #[inline]
    pub fn behind(&self, page: u64) -> Behind<'_> {
        let further = page.saturating_sub(self.range.start);
        match &self.backing {
            Backing::Userptr(cpu) => Behind::Cpu(cpu.wrapping_add(further)),
            Backing::Mirror(offset) => Behind::Cpu(page.wrapping_add_signed(*offset)),
            Backing::Blob(blob, at) => Behind::Blob(blob, at.wrapping_add(further)),
            Backing::Null => Behind::Null,
        }
    }
    /// The CPU pages that it shows.
    pub fn cpu_range(&self) -> Option<PageRange> {
        let Behind::Cpu(start) = self.behind(self.range.start) else { return None };
        Some(PageRange { start, end: start.saturating_add(self.range.pages()) })
    }
}

/// One step of a change, in drm_gpuvm's words.
#[derive(Clone, Debug)]
pub enum SmStep {
    /// A mapping goes whole. `keep`: its translations may stay.
    Unmap {
        /// It.
        va: GpuVa,
        /// Whether its translations may stay.
        keep: bool,
    },
    /// A mapping is cut; what sticks out stays.
    Remap {
        /// What sticks out left.
        prev: Option<GpuVa>,
        /// What sticks out right.
        next: Option<GpuVa>,
        /// What was cut.
        va: GpuVa,
        /// Whether the translations of the part cut away may stay.
        keep: bool,
    },
    /// A mapping comes.
    Map(GpuVa),
}

/// Everything that a vector of operations has done so far; undoes it, or tells what to zap.
#[derive(Debug, Default)]
pub struct Change {
    steps: Vec<SmStep>,
}

impl Change {
    /// Ranges whose translations must go.
    pub fn zapped(&self, mut zap: impl FnMut(PageRange)) {
        self.taken(|_, range| zap(range));
    }
    /// Ranges that were taken out of mirror windows.
    pub fn out_of_mirrors(&self, mut tell: impl FnMut(PageRange)) {
        self.taken(|va, range| {
            if matches!(va.backing, Backing::Mirror(_)) {
                tell(range)
            }
        });
    }
    /// What was taken from which mapping, unless its translations may stay.
    fn taken(&self, mut tell: impl FnMut(&GpuVa, PageRange)) {
        for step in &self.steps {
            match step {
                SmStep::Unmap { va, keep: false } => tell(va, va.range),
                SmStep::Remap { prev, next, va, keep: false } => {
                    let start = prev.as_ref().map_or(va.range.start, |p| p.range.end);
                    let end = next.as_ref().map_or(va.range.end, |n| n.range.start);
                    tell(va, PageRange { start, end });
                }
                SmStep::Unmap { .. } | SmStep::Remap { .. } | SmStep::Map(_) => {}
            }
        }
    }
}

/// The mappings of one GPU VM.
#[derive(Debug, Default)]
pub struct Mappings {
    by_start: BTreeMap<u64, GpuVa>,
    /// (resource, first page) of those that show a blob.
    of_blobs: BTreeSet<(u32, u64)>,
    /// Those that show CPU pages.
    shown: Shown,
    pages: u64,
}

impl Mappings {
    /// What a new GPU VM has. A device without mappings of its own sees the process' whole address space, and that is a
    /// mirror window with offset 0.
    pub fn of_new_vm(device: &DeviceInfo) -> Self {
        let end = 1_u64.checked_shl(device.va_bits).unwrap_or(u64::MAX).min(GUEST_VA_END);
        let whole = PageRange { start: 0, end: end >> PAGE_SHIFT };
        let mut mappings = Self::default();
        if device.address_model == AddressModel::Identity {
            mappings.insert(GpuVa { range: whole, backing: Backing::Mirror(0), readonly: false });
        }
        mappings
    }
    /// How many.
    pub fn len(&self) -> usize {
        self.by_start.len()
    }
    /// The same, as it is charged for.
    pub fn count(&self) -> u64 {
        u64::try_from(self.by_start.len()).unwrap_or(u64::MAX)
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }
    /// By rising GPU address.
    pub fn iter(&self) -> impl Iterator<Item = &GpuVa> {
        self.by_start.values()
    }
    /// The mapping that holds a GPU page.
    pub fn find(&self, page: u64) -> Option<&GpuVa> {
        self.by_start.range(..=page).next_back().map(|(_, va)| va).filter(|va| va.range.contains(page))
    }
    /// The first mapping that has a page in a range.
    pub fn first_in(&self, range: PageRange) -> Option<&GpuVa> {
        let at_start = self.find(range.start);
        at_start.or_else(|| self.by_start.range(range.start..range.end).next().map(|(_, va)| va))
    }
    /// GPU pages that show any of these CPU pages, in no order.
    pub fn showing(&self, cpu: PageRange) -> Vec<PageRange> {
        self.shown.of(cpu)
    }
    /// Pages of all mappings.
    pub fn pages(&self) -> u64 {
        self.pages
    }
    /// Maps over whatever is there.
    pub fn map(&mut self, request: GpuVa, change: &mut Change) {
        self.cut(request.range, Some(&request), change);
        self.insert(request.clone());
        change.steps.push(SmStep::Map(request));
    }
    /// Unmaps whatever is there.
    pub fn unmap(&mut self, range: PageRange, change: &mut Change) {
        self.cut(range, None, change);
    }
    /// Unmaps every mapping of a blob resource.
    pub fn unmap_blob(&mut self, resource_id: u32, change: &mut Change) {
        let starts: Vec<u64> = self
            .of_blobs
            .range((resource_id, 0)..=(resource_id, u64::MAX))
            .map(|(_, start)| *start)
            .collect();
        for start in starts {
            if let Some(range) = self.by_start.get(&start).map(|va| va.range) {
                self.unmap(range, change);
            }
        }
    }
    /// Splits object-less mappings at the edges of a range, so that advice about the range has mappings of its own.
    /// Nothing is unmapped or merged, and translations stay.
    pub fn split(&mut self, range: PageRange, change: &mut Change) {
        for edge in [range.start, range.end] {
            let inside = self.find(edge).filter(|va| va.range.start < edge && va.backing.is_objectless());
            let Some(va) = inside.cloned() else { continue };
            let Some(within) = va.range.intersect(range) else { continue };
            let (prev, map, next) = va.parts(within);
            self.replace(&va, prev.iter().chain(&next).chain([&map]));
            change.steps.push(SmStep::Remap { prev, next, va, keep: true });
            change.steps.push(SmStep::Map(map));
        }
    }
    /// Undoes a change that was made last.
    pub fn undo(&mut self, change: Change) {
        for step in change.steps.into_iter().rev() {
            match step {
                SmStep::Map(va) => self.remove(&va),
                SmStep::Unmap { va, .. } => self.insert(va),
                SmStep::Remap { prev, next, va, .. } => {
                    for part in [prev, next].iter().flatten() {
                        self.remove(part);
                    }
                    self.insert(va);
                }
            }
        }
    }
    /// The walk of `__drm_gpuvm_sm_map` and `__drm_gpuvm_sm_unmap` over what a request overlaps.
    fn cut(&mut self, range: PageRange, request: Option<&GpuVa>, change: &mut Change) {
        let first = self.find(range.start).map_or(range.start, |va| va.range.start);
        let overlapped: Vec<GpuVa> =
            self.by_start.range(first..range.end).map(|(_, va)| va.clone()).collect();
        for va in overlapped {
            let keep = request.is_some_and(|request| {
                let offset = i128::from(va.range.start).saturating_sub(i128::from(range.start));
                va.readonly == request.readonly && va.backing.keeps(offset, &request.backing)
            });
            let prev = (va.range.start < range.start)
                .then(|| va.part(PageRange { start: va.range.start, end: range.start }));
            let next = (range.end < va.range.end)
                .then(|| va.part(PageRange { start: range.end, end: va.range.end }));
            self.remove(&va);
            for part in [&prev, &next].into_iter().flatten() {
                self.insert(part.clone());
            }
            change.steps.push(match (prev, next) {
                (None, None) => SmStep::Unmap { va, keep },
                (prev, next) => SmStep::Remap { prev, next, va, keep },
            });
        }
    }
    fn replace<'a>(&mut self, va: &GpuVa, parts: impl Iterator<Item = &'a GpuVa>) {
        self.remove(va);
        parts.for_each(|part| self.insert(part.clone()));
    }
    fn insert(&mut self, va: GpuVa) {
        if let Backing::Blob(blob, _) = &va.backing {
            self.of_blobs.insert((blob.resource_id, va.range.start));
        }
        if let Some(cpu) = va.cpu_range() {
            self.shown.insert(cpu, va.range.start);
        }
        self.pages = self.pages.saturating_add(va.range.pages());
        let replaced = self.by_start.insert(va.range.start, va);
        assert!(replaced.is_none(), "mappings overlap: {replaced:?}");
    }
    fn remove(&mut self, va: &GpuVa) {
        let removed = self.by_start.remove(&va.range.start);
        let Some(removed) = removed else { panic!("no mapping at {:#x}", va.range.start) };
        if let Backing::Blob(blob, _) = &removed.backing {
            self.of_blobs.remove(&(blob.resource_id, removed.range.start));
        }
        if let Some(cpu) = removed.cpu_range() {
            self.shown.remove(cpu, removed.range.start);
        }
        self.pages = self.pages.saturating_sub(removed.range.pages());
    }
}

/// Whether a GPU VM works (panthor's states).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Works.
    Usable,
    /// Something could not be undone; only UNMAP, DESTROY and GET_PROPERTY work.
    Unusable {
        /// Positive errno.
        errno: i32,
        /// The bind operation that it is about, or 0.
        op: u32,
        /// The GPU address it is about, or 0.
        addr: u64,
    },
}

/// The GPU VM of one context on one device.
#[derive(Debug)]
pub struct GpuVm {
    /// The host device.
    pub device: usize,
    /// The guest's number of that device.
    pub dev_id: u32,
    /// Its id in fault reports.
    pub asid: Asid,
    /// Whether it works.
    pub state: State,
    /// C..D -> what.
    pub mappings: Mappings,
    /// Jobs in flight.
    pub jobs: usize,
    /// Faults that wait for the guest.
    pub pending_faults: usize,
    /// What is to be on the device before a job touches it.
    pub population: Population,
    /// Of the GPU VM itself; its retirement gives it back.
    pub charge: Charge,
    /// Of its mappings.
    pub mappings_charge: Charge,
}

#[cfg(test)]
mod tests;
