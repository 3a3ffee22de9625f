//! A pending fault in one cache line: what an answer, a deadline and its record need.

use super::order::Place;
use crate::addr::PageRange;
use crate::device::StopId;
use crate::protocol::PAGE_SHIFT;
use crate::protocol::event::{PERM_ATOMIC, PERM_READ, PERM_WRITE};
use std::time::Duration;

/// Page numbers have fewer bits than their words; above them stand small things.
const PAGE_BITS: u32 = 64 - PAGE_SHIFT;
const PAGE: u64 = (1 << PAGE_BITS) - 1;
const BYTE_SHIFT: u32 = 56;
const PREFETCH: u64 = 1 << PAGE_BITS;
const HAS_FIRST: u64 = 1 << (PAGE_BITS + 1);
const ENDED: u64 = 1 << (PAGE_BITS + 2);

/// A fault that is going to wait for the guest.
#[derive(Debug)]
pub(crate) struct NewPending {
    /// The GPU VM in the context.
    pub(crate) vm_id: u32,
    /// GPU page (C): the first of `pages`.
    pub(crate) page: u64,
    /// CPU page (A) behind it; those behind the others follow.
    pub(crate) cpu_page: u64,
    /// Pages that are asked for. More than one are a group, with a record each, or a prefetch, with one in all.
    pub(crate) pages: u16,
    /// The access that is parked; none for a prefetch: the device is to have the pages before a job waits for them.
    pub(crate) stop: Option<StopId>,
    /// `PERM_*` of the access.
    pub(crate) perm: u16,
    /// `FAULT_*` type.
    pub(crate) fault_type: u8,
    /// Where the walk ended.
    pub(crate) level: u8,
    /// The engine.
    pub(crate) engine: u8,
    /// Bytes from the page on that the job is expected to touch.
    pub(crate) length_hint: u32,
    /// When it was raised.
    pub(crate) raised_ns: u64,
    /// The same on the guest's own clock.
    pub(crate) raised_run: Duration,
}

/// A fault that waits for the guest.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The first GPU page; above it what it is, and the engine.
    page: u64,
    /// The CPU page behind it; above it where the walk ended.
    cpu_page: u64,
    raised_ns: u64,
    /// Nanoseconds of the guest's own clock.
    pub(super) raised_run: u64,
    /// The access that it was raised for; of a prefetch, the first that joined.
    first: StopId,
    /// The lower half of its cookie.
    pub(super) number: u32,
    /// The GPU VM in the context.
    pub vm_id: u32,
    /// Its links in [`super::order`].
    pub(super) left: Place,
    pub(super) right: Place,
    /// Bytes from the page on that the job is expected to touch.
    pub length_hint: u32,
    pages: u16,
    /// Records of it that were written.
    reported: u8,
    /// From bit 0 on the accesses' rights, from bit 3 on those that the guest was told, from bit 6 on the `FAULT_*` type.
    rights: u8,
}
const _: () = assert!(size_of::<Pending>() == 64);

impl Pending {
    pub(super) fn new(new: &NewPending, number: u32) -> Self {
        let (prefetch, has_first) = if new.stop.is_none() { (PREFETCH, 0) } else { (0, HAS_FIRST) };
        let above = |byte: u8| u64::from(byte) << BYTE_SHIFT;
        Self {
            page: (new.page & PAGE) | prefetch | has_first | above(new.engine),
            cpu_page: (new.cpu_page & PAGE) | above(new.level),
            raised_ns: new.raised_ns,
            raised_run: nanos(new.raised_run),
            first: new.stop.unwrap_or(StopId(0)),
            number,
            vm_id: new.vm_id,
            left: Place::NONE,
            right: Place::NONE,
            length_hint: new.length_hint,
            pages: new.pages,
            reported: 0,
            rights: packed(new.perm) | (new.fault_type << 6),
        }
    }
    fn is(&self, what: u64) -> bool {
        self.page & what != 0
    }
    /// The first GPU page (C).
    pub fn page(&self) -> u64 {
        self.page & PAGE
    }
    /// The CPU page (A) behind it; those behind the others follow.
    pub fn cpu_page(&self) -> u64 {
        self.cpu_page & PAGE
    }
    /// Pages that are asked for. More than one are a group, with a record each, or a prefetch, with one in all.
    pub fn pages(&self) -> u64 {
        self.pages.into()
    }
    /// Its GPU pages.
    pub fn range(&self) -> PageRange {
        PageRange { start: self.page(), end: self.page().saturating_add(self.pages()) }
    }
    /// Whether no job was parked when it was raised: the device is to have the pages before one is.
    pub fn is_prefetch(&self) -> bool {
        self.is(PREFETCH)
    }
    /// The engine.
    pub fn engine(&self) -> u8 {
        u8::try_from(self.page >> BYTE_SHIFT).unwrap_or(u8::MAX)
    }
    /// Where the walk ended.
    pub fn level(&self) -> u8 {
        u8::try_from(self.cpu_page >> BYTE_SHIFT).unwrap_or(u8::MAX)
    }
    /// `FAULT_*` type.
    pub fn fault_type(&self) -> u8 {
        self.rights >> 6
    }
    /// `PERM_*` of the accesses.
    pub fn perm(&self) -> u16 {
        unpacked(self.rights)
    }
    /// `PERM_*` that the guest was told, and so all that its answer must grant; accesses that join later are repeated
    /// and ask again. None before the guest was told all: until then no answer can be honest.
    pub fn told(&self) -> Option<u16> {
        (self.reported() >= self.records()).then(|| unpacked(self.rights >> 3))
    }
    /// Records that tell the guest of it.
    pub fn records(&self) -> u64 {
        if self.is_prefetch() { 1 } else { self.pages() }
    }
    /// Records of it that were written.
    pub fn reported(&self) -> u64 {
        self.reported.into()
    }
    /// When it was raised.
    pub fn raised_ns(&self) -> u64 {
        self.raised_ns
    }
    /// Where it stands among others by page: GPU VM, first page.
    pub(super) fn key(&self) -> (u32, u64) {
        (self.vm_id, self.page())
    }
    /// The parked access that it was raised for; of a prefetch, the first that joined.
    pub(super) fn first(&self) -> Option<StopId> {
        self.is(HAS_FIRST).then_some(self.first)
    }
    /// An access is its first, unless it has one.
    pub(super) fn join_first(&mut self, stop: StopId) -> bool {
        let is_first = !self.is(HAS_FIRST);
        if is_first {
            (self.first, self.page) = (stop, self.page | HAS_FIRST);
        }
        is_first
    }
    /// Asks for more rights.
    pub(super) fn add_perm(&mut self, perm: u16) {
        self.rights |= packed(perm);
    }
    /// A record was written. Whether the guest knows all now.
    pub(super) fn tell(&mut self) -> bool {
        self.reported = self.reported.saturating_add(1);
        let all = self.reported() >= self.records();
        if all {
            self.rights |= (self.rights & 0b111) << 3;
        }
        all
    }
    /// It has ended, and stays in its place until the list is packed.
    pub(super) fn end(&mut self) {
        self.page |= ENDED;
    }
    pub(super) fn has_ended(&self) -> bool {
        self.is(ENDED)
    }
}

/// `PERM_*` in three bits.
fn packed(perm: u16) -> u8 {
    let bit = |flag: u32, to: u8| if u32::from(perm) & flag != 0 { to } else { 0 };
    bit(PERM_READ, 1) | bit(PERM_WRITE, 2) | bit(PERM_ATOMIC, 4)
}

fn unpacked(bits: u8) -> u16 {
    let flag = |bit: u8, flag: u32| if bits & bit != 0 { flag } else { 0 };
    u16::try_from(flag(1, PERM_READ) | flag(2, PERM_WRITE) | flag(4, PERM_ATOMIC)).unwrap_or(u16::MAX)
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
