//! A process' memory on a device: at its own addresses where the device has room for them, else in windows.
//!
//! A device with fewer address bits than a process shows it at other addresses: each window is a range of the process'
//! addresses and where the device has it. Windows are chosen once, from where arenas stand and where the kernel puts the
//! next ones; [`Mirror::device_address`] says of each pointer whether it is in one.

use super::arena::Reservation;
use super::{Client, Device, Error, Result, Vm};
use crate::driver::dma::PAGE_BYTES;
use std::ops::{Deref, Range};
use virtio_gpu_svm::protocol::LEAF_SIZE;
use virtio_gpu_svm::protocol::request::{BIND_CPU_ADDR_MIRROR, BIND_OP_MAP, BindOp};

/// Addresses of a process are below `1 << 47`, unless it asks for others.
const USER_ADDRESS_BITS: u32 = 47;
/// [`Device::fault_model`]: none, and so no mirror.
const WITHOUT_FAULTS: u32 = 2;
/// [`Device::address_model`]: CPU addresses as they are, and no others.
const IDENTITY_ONLY: u32 = 1;

/// A range of a process' addresses that a device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address in the process (A).
    pub cpu: u64,
    /// First address on the device (C).
    pub gpu: u64,
    /// Bytes.
    pub len: u64,
}

impl Window {
    pub(super) fn cpu_address(&self, gpu: u64) -> Option<u64> {
        let within = gpu.checked_sub(self.gpu).filter(|within| *within < self.len)?;
        Some(self.cpu.wrapping_add(within))
    }
}

/// This process' memory on a device, and the GPU VM that shows it: launches are [`Vm`]'s.
///
/// What is no arena stays out of reach. Dropping it leaves the GPU VM to the context; [`Self::end`] destroys it.
#[derive(Debug)]
pub struct Mirror {
    vm: Vm,
    device: Device,
}

impl Deref for Mirror {
    type Target = Vm;

    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl Mirror {
    pub(super) fn create(client: &Client, device: Device) -> Result<Self> {
        let windows = choose(&device)?;
        let op = |window: &Window| BindOp {
            op: BIND_OP_MAP.into(),
            flags: BIND_CPU_ADDR_MIRROR.into(),
            addr: window.gpu.into(),
            range: window.len.into(),
            obj_offset: window.cpu.wrapping_sub(window.gpu).into(),
            ..BindOp::default()
        };
        let mut vm = client.vm(device.dev_id)?;
        match vm.bind(&windows.iter().map(op).collect::<Vec<_>>()) {
            Ok(()) => {
                vm.shown = windows.into();
                Ok(Self { vm, device })
            }
            Err(error) => {
                // The bind's error is the one that matters; if this fails too, the GPU VM ends with the context.
                vm.destroy().ok();
                Err(error)
            }
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What of the process' addresses the device shows, and where, by CPU address.
    pub fn windows(&self) -> &[Window] {
        &self.vm.shown
    }

    /// Whether every address is the same on both sides.
    pub fn is_identity(&self) -> bool {
        self.vm.shown.iter().all(|window| window.cpu == window.gpu)
    }

    /// Where the device sees a pointer.
    ///
    /// # Errors
    /// [`Error::OutOfReach`] where it is in no window.
    pub fn device_address<T: ?Sized>(&self, pointer: *const T) -> Result<u64> {
        // Any address of a process fits.
        let cpu = u64::try_from(pointer.addr()).unwrap_or(u64::MAX);
        self.device_address_of(cpu)
    }

    /// As [`Self::device_address`], of an address that is a number already.
    ///
    /// # Errors
    /// As [`Self::device_address`].
    pub fn device_address_of(&self, cpu: u64) -> Result<u64> {
        let holds = |window: &&Window| cpu.checked_sub(window.cpu).is_some_and(|within| within < window.len);
        match self.vm.shown.iter().find(holds) {
            Some(window) => Ok(cpu.wrapping_sub(window.cpu).wrapping_add(window.gpu)),
            None => Err(Error::OutOfReach { address: cpu, device: self.device.name.clone() }),
        }
    }

    /// What has to be added to pointers near this one to have them on the device, modulo 2^64: 0 where addresses are the
    /// same. For [`packet::chase`](super::packet::chase), whose links are the process' own.
    ///
    /// # Errors
    /// As [`Self::device_address`].
    pub fn link_offset<T: ?Sized>(&self, pointer: *const T) -> Result<u64> {
        let cpu = u64::try_from(pointer.addr()).unwrap_or(u64::MAX);
        Ok(self.device_address_of(cpu)?.wrapping_sub(cpu))
    }

    /// The process' address that the device sees at `gpu`, for people who read a [`JobError`](super::JobError).
    pub fn cpu_address(&self, gpu: u64) -> Option<u64> {
        self.vm.shown.iter().find_map(|window| window.cpu_address(gpu))
    }

    /// Destroys the GPU VM; its jobs end as cancelled. The device can be mirrored again then.
    ///
    /// # Errors
    /// What the device says.
    pub fn end(self) -> Result<()> {
        self.vm.destroy()
    }
}

/// Whether a device can mirror at all.
pub(super) fn can_mirror(device: &Device) -> bool {
    device.fault_model != WITHOUT_FAULTS
}

fn choose(device: &Device) -> Result<Vec<Window>> {
    if !can_mirror(device) {
        return Err(Error::NoFaults { device: device.name.clone() });
    }
    let identity = |bits: u32| vec![Window { cpu: 0, gpu: 0, len: 1 << bits }];
    if device.va_bits >= USER_ADDRESS_BITS {
        return Ok(identity(USER_ADDRESS_BITS));
    }
    let used = arenas().map_err(Error::Maps)?;
    let next = Reservation::new(None, PAGE_BYTES).map(|reservation| reservation.at())?;
    let next = u64::try_from(next).unwrap_or(u64::MAX);
    let space = 1u64 << device.va_bits;
    let below = |address: u64| address < space;
    if below(next) && used.iter().all(|range| below(range.end - 1)) {
        return Ok(identity(device.va_bits));
    }
    let windows = (device.address_model != IDENTITY_ONLY).then(|| plan(&used, next, space)).flatten();
    windows.ok_or_else(|| Error::DoesNotFit {
        device: device.name.clone(),
        va_bits: device.va_bits,
        used: used.iter().map(|range| range.end - range.start).sum(),
    })
}

/// Where this process has memory that may be an arena: shared and writable, by address.
fn arenas() -> std::io::Result<Vec<Range<u64>>> {
    Ok(parse_maps(&std::fs::read_to_string("/proc/self/maps")?))
}

fn parse_maps(maps: &str) -> Vec<Range<u64>> {
    let range = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let range = hex(start)?..hex(end)?;
        let shared = fields.next()?.as_bytes();
        (shared.get(1) == Some(&b'w') && shared.get(3) == Some(&b's') && !range.is_empty()).then_some(range)
    };
    maps.lines().filter_map(range).collect()
}

/// Chooses windows for what is used and for what comes next, which the kernel puts below `next`. `used` is sorted. `None`:
/// they do not fit.
///
/// Windows are whole leaves of 2 MiB and keep an address' place in its leaf, for large pages. The first leaf of the device
/// stays empty, so that 0 is nobody's address there either. What is close together shares a window, since links of a list
/// take one offset; half of the space is kept for growth.
fn plan(used: &[Range<u64>], next: u64, space: u64) -> Option<Vec<Window>> {
    let mut clusters = clusters(used, next);
    let room = space.checked_sub(LEAF_SIZE)?;
    join_close_ones(&mut clusters, room / 2);
    let taken: u64 = clusters.iter().map(|cluster| cluster.end - cluster.start).sum();
    let spare = room.checked_sub(taken)? / LEAF_SIZE * LEAF_SIZE;
    // Downwards from where the next ones come.
    let growing = clusters.iter().position(|cluster| cluster.contains(&next))?;
    let floor = growing.checked_sub(1).and_then(|below| clusters.get(below)).map_or(LEAF_SIZE, |c| c.end);
    if let Some(cluster) = clusters.get_mut(growing) {
        cluster.start = cluster.start.saturating_sub(spare).max(floor.min(cluster.start));
    }
    let mut gpu = LEAF_SIZE;
    let window = |cluster: Range<u64>| {
        let window = Window { cpu: cluster.start, gpu, len: cluster.end - cluster.start };
        gpu += window.len;
        window
    };
    Some(clusters.into_iter().map(window).collect())
}

/// Whole leaves around each range and around `next`; those that touch are one. Sorted.
fn clusters(used: &[Range<u64>], next: u64) -> Vec<Range<u64>> {
    let leaf = |address: u64| address / LEAF_SIZE * LEAF_SIZE;
    let whole = |range: &Range<u64>| {
        leaf(range.start)..range.end.checked_next_multiple_of(LEAF_SIZE).unwrap_or(leaf(u64::MAX))
    };
    let mut leaves: Vec<Range<u64>> =
        used.iter().chain(std::iter::once(&(next..next + 1))).map(whole).collect();
    leaves.sort_by_key(|range| range.start);
    let mut clusters: Vec<Range<u64>> = Vec::new();
    for range in leaves {
        match clusters.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => clusters.push(range),
        }
    }
    clusters
}

/// Joins neighbours, those with the smallest gap first, while all together take at most `most` bytes.
fn join_close_ones(clusters: &mut Vec<Range<u64>>, most: u64) {
    loop {
        let taken: u64 = clusters.iter().map(|cluster| cluster.end - cluster.start).sum();
        let gaps = clusters.windows(2).map(|pair| match pair {
            [low, high] => high.start - low.end,
            _ => u64::MAX,
        });
        let Some((index, gap)) = gaps.enumerate().min_by_key(|(_, gap)| *gap) else { return };
        if taken.saturating_add(gap) > most {
            return;
        }
        let high = clusters.remove(index + 1);
        if let Some(low) = clusters.get_mut(index) {
            low.end = high.end;
        }
    }
}

#[cfg(test)]
mod tests;
