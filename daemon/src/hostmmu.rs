//! The device `hostmmu`: a worker process per GPU VM, whose host page tables are the GPU's page tables.
//!
//! A GPU address is the worker's own address. Guest memory is mapped there from its file; what has no translation is
//! registered with userfaultfd, so that the CPU's own page fault parks the thread of the packet, and the kernel tells
//! the daemon. `unbind` is the kernel's munmap, with its TLB shootdown; a flush is over when the worker has said so.
//!
//! ```text
//! Device methods -> vm (state, orders) --socket--> worker: main thread (mmap, release)
//! Events <- attendant <--------------- userfaultfd, socket --- worker: a thread per ring (packets)
//! ```
//!
//! Lives in the daemon and not in the library, because it takes processes, sockets and threads.
//!
//! # Locks
//! The table of VMs: a lookup at a time. A VM's state: see `vm`. Never two at once; Events are called with neither, and
//! only by attendants. [`Device::drop_region`] waits for the worker and must not be called by an attendant, that is, from
//! within [`Events`].

mod attendant;
mod clock;
mod message;
mod process;
mod translations;
mod uffd;
mod vm;
pub mod worker;

pub use process::ARGUMENT;
pub use uffd::CALLS as CALLS_OF_WORKERS;

use crate::log_budget::LogBudget;
use attendant::Attendant;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::ledger::Ledger;
use virtio_gpu_svm::device::{
    AddressModel, Asid, Device, DeviceInfo, Error, Events, Extent, FaultModel, Flush, Job, LedgerEntry,
    StopId, Ticket, Verdict, VmLabel, operands,
};
use virtio_gpu_svm::protocol::job::{OPCODES, Packet};
use virtio_gpu_svm::quota::Charge;
use vm::VmState;

/// Most address bits: a worker's own image, heap and stacks are above.
pub const MAX_VA_BITS: u32 = 46;
/// Runs of pages that a worker maps at once; each may cost two of the 65,530 mappings that a process may have.
pub const DEFAULT_BUDGET: usize = 32_000;
/// Bits of a stop's number below the asid.
const STOP_BITS: u32 = 44;

/// What a device is to be.
#[derive(Clone, Debug)]
pub struct HostMmuConfig {
    /// Its index on this host, as it is named in events.
    pub index: usize,
    /// For people; at most 32 bytes.
    pub name: String,
    /// GPU addresses are below `1 << va_bits`; at most [`MAX_VA_BITS`].
    pub va_bits: u32,
    /// Keep a record of this many faults.
    pub ledger: Option<usize>,
    /// The program that is a worker when called with [`ARGUMENT`].
    pub program: PathBuf,
    /// Runs of pages that a worker maps at once.
    pub budget: usize,
    /// How long a job may be on its thread in all, semaphores included; then it ends with -ETIMEDOUT.
    pub job_limit: Option<Duration>,
    /// GPU VMs, and so workers, at once; one counts until it has retired.
    pub workers: usize,
}

/// A GPU VM.
struct Vm {
    asid: Asid,
    label: VmLabel,
    state: Mutex<VmState>,
    /// A fence was passed, or the worker is gone.
    passed: Condvar,
    /// Wakes the attendant.
    bell: OwnedFd,
}

/// What a device and its attendants have in common.
/// Lines of the log that the workers of a device may cause in a minute.
const LOG_LINES: u32 = 60;

struct Shared {
    index: usize,
    info: DeviceInfo,
    program: PathBuf,
    budget: usize,
    job_limit: Option<Duration>,
    workers: usize,
    events: OnceLock<Weak<dyn Events>>,
    vms: Mutex<HashMap<Asid, Arc<Vm>>>,
    /// A VM has retired.
    retired: Condvar,
    ledger: Option<Mutex<Ledger>>,
    stops: AtomicU64,
    /// Lines of the log that its workers may cause.
    log: LogBudget,
}

/// See the text above.
pub struct HostMmuDevice(Arc<Shared>);

/// Whether this machine can have such a device.
///
/// # Errors
/// The kernel has no userfaultfd with what is needed.
pub fn probe() -> std::io::Result<()> {
    let refused = |error| std::io::Error::other(format!("hostmmu needs userfaultfd of Linux 5.18: {error}"));
    uffd::create().map(drop).map_err(refused)
}

impl HostMmuDevice {
    /// A device without GPU VMs.
    ///
    /// # Errors
    /// The kernel has no userfaultfd with what is needed.
    pub fn new(config: HostMmuConfig) -> std::io::Result<Arc<Self>> {
        let HostMmuConfig { index, name, va_bits, ledger, program, budget, job_limit, workers } = config;
        assert!((22..=MAX_VA_BITS).contains(&va_bits), "a worker with {va_bits} address bits");
        probe()?;
        let info = DeviceInfo {
            name,
            va_bits,
            num_engines: 1,
            opcodes: OPCODES,
            fault_model: FaultModel::Replayable,
            address_model: AddressModel::Any,
            null_mappings: false,
            exec: false,
        };
        let log = LogBudget::new(format!("workers of device {}", info.name), LOG_LINES);
        Ok(Arc::new(Self(Arc::new(Shared {
            index,
            info,
            program,
            budget,
            job_limit,
            workers,
            events: OnceLock::new(),
            vms: Mutex::default(),
            retired: Condvar::new(),
            ledger: ledger.map(|capacity| Mutex::new(Ledger::new(capacity))),
            stops: AtomicU64::new(1),
            log,
        }))))
    }

    /// Says who is told. The device does not keep its owner alive.
    ///
    /// # Panics
    /// If it was started before.
    pub fn start(&self, events: Weak<dyn Events>) {
        assert!(self.0.events.set(events).is_ok(), "device {} was started twice", self.0.index);
    }

    /// Destroys every GPU VM and waits until their workers are gone.
    pub fn shutdown(&self) {
        let mut vms = self.0.vms();
        for vm in vms.values() {
            vm.destroy();
        }
        while !vms.is_empty() {
            vms = self.0.retired.wait(vms).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn live(&self, asid: Asid) -> Result<Arc<Vm>, Error> {
        self.0.vm(asid).filter(|vm| !vm.with(|state| state.dying)).ok_or(Error::NoVm(asid.0))
    }
}

impl Shared {
    fn vms(&self) -> MutexGuard<'_, HashMap<Asid, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vm(&self, asid: Asid) -> Option<Arc<Vm>> {
        self.vms().get(&asid).cloned()
    }

    fn forget(&self, asid: Asid) {
        let vm = self.vms().remove(&asid);
        drop(vm);
        self.retired.notify_all();
    }

    fn events(&self) -> Option<Arc<dyn Events>> {
        self.events.get().and_then(Weak::upgrade)
    }

    /// A stop names its GPU VM, so that no table of stops is needed.
    fn new_stop(&self, asid: Asid) -> StopId {
        let number = self.stops.fetch_add(1, Ordering::Relaxed) & ((1 << STOP_BITS) - 1);
        StopId(u64::from(asid.0) << STOP_BITS | number)
    }

    fn record(&self, entry: LedgerEntry) {
        if let Some(ledger) = &self.ledger {
            ledger.lock().unwrap_or_else(PoisonError::into_inner).push(entry);
        }
    }
}

impl Vm {
    fn with<R>(&self, change: impl FnOnce(&mut VmState) -> R) -> R {
        change(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, VmState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change, and wakes the attendant if it has to do with it.
    fn change<R>(&self, change: impl FnOnce(&mut VmState) -> R) -> R {
        let (result, wanted) = self.with(|state| (change(state), state.wants_attendant()));
        if wanted {
            self.ring_bell();
        }
        result
    }

    fn ring_bell(&self) {
        // Fails only if it has rung 2^64 - 2 times unheard.
        rustix::io::write(&self.bell, &1u64.to_ne_bytes()).ok();
    }

    fn hush(&self) {
        // Fails if it has not rung.
        rustix::io::read(&self.bell, &mut [0u8; 8]).ok();
    }

    fn destroy(&self) {
        self.with(|state| state.dying = true);
        self.ring_bell();
    }
}

impl Device for HostMmuDevice {
    fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    fn vm_create(&self, asid: Asid, label: VmLabel, tables: Charge) -> Result<(), Error> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|_| Error::OutOfMemory)?;
        let va_end = 1u64.wrapping_shl(self.0.info.va_bits);
        let state = Mutex::new(VmState::new(va_end, self.0.budget, self.0.job_limit, tables));
        let vm = Arc::new(Vm { asid, label, state, passed: Condvar::new(), bell });
        let mut vms = self.0.vms();
        if vms.contains_key(&asid) {
            return Err(Error::VmExists(asid.0));
        }
        if vms.len() >= self.0.workers {
            return Err(Error::TooManyVms);
        }
        let attendant = Attendant::new(Arc::clone(&self.0), Arc::clone(&vm));
        let thread = std::thread::Builder::new().name(format!("{}/{}", self.0.info.name, asid.0));
        thread.spawn(move || attendant.run()).map_err(|_| Error::OutOfMemory)?;
        vms.insert(asid, vm);
        Ok(())
    }

    fn vm_destroy(&self, asid: Asid) {
        if let Some(vm) = self.0.vm(asid) {
            vm.destroy();
        }
    }

    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        assert_eq!(addr, addr.page_start(), "bind at an address within a page");
        self.live(asid)?.change(|state| state.bind(addr, extents))
    }

    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        self.0.vm(asid).map_or(Flush::Done, |vm| vm.change(|state| state.unbind(range)))
    }

    fn flush(&self, asid: Asid) -> Flush {
        self.0.vm(asid).map_or(Flush::Done, |vm| vm.with(|state| state.flush()))
    }

    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        self.0.vm(asid).is_none_or(|vm| vm.with(|state| state.has_flushed(ticket)))
    }

    fn drop_region(&self, asid: Asid, region_id: u64) {
        let Some(vm) = self.0.vm(asid) else { return };
        let Flush::Pending(ticket) = vm.change(|state| state.drop_region(region_id)) else { return };
        let mut state = vm.lock();
        while !state.has_flushed(ticket) {
            state = vm.passed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn resident_pages(&self, asid: Asid) -> u64 {
        self.0.vm(asid).map_or(0, |vm| vm.with(|state| state.resident_pages()))
    }

    fn table_bytes(&self, asid: Asid) -> u64 {
        self.0.vm(asid).map_or(0, |vm| vm.with(|state| state.table_bytes()))
    }

    fn resident_in(&self, asid: Asid, range: PageRange) -> u64 {
        self.0.vm(asid).map_or(0, |vm| vm.with(|state| state.resident_in(range)))
    }

    fn check_packets(&self, packets: &[Packet]) -> Result<(), Error> {
        operands::check(packets, 1u64.wrapping_shl(self.0.info.va_bits))
    }

    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error> {
        self.live(asid)?.change(|state| state.submit(job));
        Ok(())
    }

    fn resume(&self, stop: StopId, verdict: Verdict) {
        let asid = u32::try_from(stop.0 >> STOP_BITS).unwrap_or(0);
        if let Some(vm) = self.0.vm(Asid(asid)) {
            vm.change(|state| state.resume(stop, verdict));
        }
    }

    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush {
        self.0.vm(asid).map_or(Flush::Done, |vm| vm.change(|state| state.set_frozen(frozen)))
    }

    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        let Some(ledger) = &self.0.ledger else { return (Vec::new(), 0) };
        ledger.lock().unwrap_or_else(PoisonError::into_inner).snapshot()
    }
}
