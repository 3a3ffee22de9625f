//! Target: a guest's whole life, on three devices that the input plays (faults with any address, with the CPU's own,
//! none at all). Commands carry mutations, memory comes and goes, the guest is frozen, reset and greeted again.
//!
//! After each step: every fault raised has ended or waits; every job has ended or is in flight; limits hold; a GPU VM's
//! queues stand still exactly while it must, and something is wanted or asked meanwhile; what is in flight can move; a
//! device holds only pages that the process has now, with its rights, in memory that is there. At the end, nothing is
//! left of anything.

use crate::input::Input;
use crate::puppet::{Bound, Puppet};
use crate::script::{self, CONTEXTS, GPA, REGION};
use crate::shadow::Shadow;
use crate::{exclusive, must};
use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use virtio_gpu_svm::clock::{Manual, Source};
use virtio_gpu_svm::device::{Access, AddressModel, Device, FaultModel};
use virtio_gpu_svm::guest::{EventPort, Guest};
use virtio_gpu_svm::host::{Host, Limits};
use virtio_gpu_svm::info::{ContextStatus, MappingStatus, VmStatus};
use virtio_gpu_svm::memory::{MemoryTable, Region, RegionIdentity};
use virtio_gpu_svm::protocol::control::{VIRTIO_GPU_CMD_SVM_HELLO, VIRTIO_GPU_CMD_SVM_INVALIDATE};
use virtio_gpu_svm::protocol::event::{EVENT_FAULT, EVENT_RECORD_BYTES, EventHdr, FaultRecord};
use virtio_gpu_svm::protocol::gpu::{
    CtrlHdr, VIRTIO_GPU_CMD_CTX_CREATE, VIRTIO_GPU_CMD_CTX_DESTROY, VIRTIO_GPU_CMD_RESOURCE_UNREF,
};
use vm_memory::mmap::MmapRegion;
use zerocopy::FromBytes;

/// Steps of one input at most.
const STEPS: usize = 96;
/// Records that the guest keeps to answer them.
const OPEN: usize = 16;
/// Small, so that they are met; and no more faults than are shown.
const LIMITS: Limits = Limits {
    contexts: 3,
    pending_faults: 5,
    jobs: 6,
    mappings: 8,
    resources: 3,
    fault_deadline_ms: 1,
    ..Limits::DEFAULT
};

static REGIONS: LazyLock<Mutex<[Arc<Region>; 3]>> = LazyLock::new(|| {
    let region = |(inode, gpa)| {
        let identity = RegionIdentity { inode: (0, inode), offset: 0, size: REGION, gpa };
        Region::new(identity, must(MmapRegion::new(must(usize::try_from(REGION)))))
    };
    // The third stands where the first does, at another time.
    Mutex::new([(1, GPA), (2, GPA + 2 * REGION), (3, GPA)].map(region))
});

struct Silent;

impl EventPort for Silent {
    fn ready(&self) {}
}

struct Life<'a> {
    host: Arc<Host>,
    guest: Arc<Guest>,
    devices: [Arc<Puppet>; 3],
    regions: &'a [Arc<Region>; 3],
    shadow: Shadow,
    open: Vec<FaultRecord>,
    clock: Arc<Manual>,
}

/// Lives one life.
///
/// # Panics
/// If one of the module's statements does not hold.
pub fn run(bytes: &[u8]) {
    let regions = exclusive(&REGIONS);
    let mut input = Input::new(bytes);
    let mut life = Life::begin(&regions);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        life.step(&mut input);
        life.check();
    }
    life.end();
}

impl<'a> Life<'a> {
    fn begin(regions: &'a [Arc<Region>; 3]) -> Self {
        use {AddressModel::*, FaultModel::*};
        let devices = [(0, Replayable, Any), (1, None, Any), (2, Replayable, Identity)]
            .map(|(index, faults, addresses)| Arc::new(Puppet::new(index, faults, addresses)));
        let clock = Arc::new(Manual::default());
        let all = devices.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let host = Host::with_clock(all, Arc::clone(&clock) as Arc<dyn Source>);
        let guest = host.open_guest("fuzz", LIMITS, &[0, 1, 2], Arc::new(Silent));
        let shadow = Shadow::default();
        let mut life = Self { host, guest, devices, regions, shadow, open: Vec::new(), clock };
        life.set_memory(0b11);
        life.command(&script::hello(1), usize::MAX);
        life.command(&script::create_context(1), usize::MAX);
        life
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.u8();
        let mut command = match step & 0x1f {
            0 => script::hello(u64::from(input.below(4))),
            1 => script::create_context(script::ctx_id(input)),
            2 => script::destroy_context(script::ctx_id(input)),
            3 => script::create_blob(input),
            4 => script::resource(input),
            5 => script::question(input),
            6..=11 => script::submit(input),
            12 | 13 => self.supply(input),
            14 | 15 => script::invalidate(input),
            16 | 17 => match self.answer(input) {
                Some(answer) => answer,
                None => return,
            },
            18 => input.take(usize::from(step) & 0x3f).to_vec(),
            other => return self.act(other, input),
        };
        let mut room = usize::MAX;
        if step & 0x80 != 0 {
            let (at, with) = (usize::from(input.u16()), input.u8());
            if let Some(at) = at.checked_rem(command.len()) {
                command[at] ^= with;
            }
        }
        if step & 0x40 != 0 {
            room = usize::from(input.u8()) * 4;
        }
        self.command(&command, room);
    }

    /// What is not a command.
    fn act(&mut self, step: u8, input: &mut Input<'_>) {
        match step {
            19 | 20 => self.raise(input),
            21 => {
                let errno = if input.flag() { 0 } else { 5 };
                self.device(input).end(&self.host, usize::from(input.u8()), errno);
            }
            22 | 23 => self.fetch(input),
            24 => drop(self.device(input).set_busy(input.flag())),
            25 => self.pass(input.flag()),
            26 if !self.guest.is_frozen() => self.waits(|life| life.guest.freeze()),
            26 => self.guest.thaw(),
            27 => self.set_memory(input.u8()),
            28 => {
                let device = input.index(4).filter(|device| *device < 3);
                // Of a context that is not there, nothing is dropped.
                self.guest.evict(script::ctx_id(input), device).ok();
                self.host.work_off();
            }
            29 => self.device(input).fail_in(input.u8() % 16),
            30 => {
                self.guest.reset();
                self.shadow.reset();
            }
            _ if input.below(8) == 0 => {
                self.clock.advance(Duration::from_millis(LIMITS.fault_deadline_ms.into()));
                self.host.expire_faults();
                self.host.work_off();
            }
            _ => {}
        }
    }

    fn device(&self, input: &mut Input<'_>) -> &Puppet {
        let [any, no_faults, identity] = &self.devices;
        match input.below(3) {
            0 => any,
            1 => no_faults,
            _ => identity,
        }
    }

    /// Carries out a command as a session does.
    fn command(&mut self, command: &[u8], room: usize) {
        let kind = CtrlHdr::read_from_prefix(command).map_or(0, |(hdr, _)| hdr.kind.get());
        if kind != VIRTIO_GPU_CMD_SVM_HELLO && self.guest.is_frozen() {
            self.guest.thaw();
        }
        let mut answer = Vec::new();
        self.shadow.before(command);
        // The shadow must learn of these whether they were accepted.
        let told = [
            VIRTIO_GPU_CMD_CTX_CREATE,
            VIRTIO_GPU_CMD_CTX_DESTROY,
            VIRTIO_GPU_CMD_SVM_HELLO,
            VIRTIO_GPU_CMD_SVM_INVALIDATE,
        ];
        let room = if told.contains(&kind) { usize::MAX } else { room };
        let mut act = |life: &mut Self| life.guest.control(command, &mut answer, room.min(4096));
        if kind == VIRTIO_GPU_CMD_RESOURCE_UNREF {
            self.waits(act)
        } else {
            act(self)
        }
        assert!(answer.len() <= room, "{} bytes in a room of {room}", answer.len());
        self.shadow.after(command, &answer);
    }
    /// Does what waits for engines: they pass everything at once meanwhile.
    fn waits(&mut self, act: impl FnOnce(&mut Self)) {
        let busy = self.devices.each_ref().map(|device| device.set_busy(false));
        self.pass(true);
        act(self);
        for (device, busy) in self.devices.iter().zip(busy) {
            device.set_busy(busy);
        }
    }
    fn pass(&self, retire: bool) {
        for device in &self.devices {
            device.pass(&self.host);
            if retire {
                device.retire(&self.host);
            }
        }
    }
    fn set_memory(&mut self, which: u8) {
        let chosen = |n: usize| which >> n & 1 != 0 && !(n == 2 && which & 1 != 0);
        let regions = (0..3).filter(|n| chosen(*n)).map(|n| Arc::clone(&self.regions[n])).collect();
        let table = Arc::new(must(MemoryTable::new(regions)));
        self.waits(|life| life.guest.set_memory(table));
    }

    fn seq(&self, ctx_id: u32) -> u64 {
        self.guest.contexts().iter().find(|c| c.ctx_id == ctx_id).map_or(0, |c| c.inval_seq)
    }
    fn supply(&self, input: &mut Input<'_>) -> Vec<u8> {
        let ctx_id = script::ctx_id(input);
        let seq = self.seq(ctx_id);
        let runs: Vec<_> = (0..=input.below(3)).map(|_| script::run(input, None, seq)).collect();
        script::supply(ctx_id, &runs)
    }
    fn raise(&self, input: &mut Input<'_>) {
        let access = match input.below(3) {
            0 => Access::Read,
            1 => Access::Write,
            _ => Access::Atomic,
        };
        let (pick, addr) = (usize::from(input.u8()), script::c(input));
        let (offset, hint) = (u64::from(input.u8()), u64::from(input.u32()));
        self.device(input).raise(&self.host, pick, addr | offset, access, hint);
    }
    fn fetch(&mut self, input: &mut Input<'_>) {
        let (mut buf, room) = (Vec::new(), usize::from(input.u8()) * 8);
        self.guest.fill_events(&mut buf, room);
        assert!(buf.len() <= room, "{} bytes of records in a room of {room}", buf.len());
        let Ok((hdr, rest)) = EventHdr::read_from_prefix(&buf) else {
            let fits = room >= size_of::<EventHdr>() + EVENT_RECORD_BYTES;
            return assert!(!(fits && self.guest.has_events()), "no record where one was said to wait");
        };
        let records = rest.chunks_exact(EVENT_RECORD_BYTES);
        assert_eq!(u32::try_from(records.len()), Ok(hdr.num_records.get()));
        let faults = records.filter_map(|record| FaultRecord::read_from_bytes(record).ok());
        self.open.extend(faults.filter(|record| record.kind.get() == EVENT_FAULT));
        let excess = self.open.len().saturating_sub(OPEN);
        self.open.drain(..excess);
    }
    /// Answers a record that was fetched, or none that is known.
    fn answer(&mut self, input: &mut Input<'_>) -> Option<Vec<u8>> {
        let at = input.index(self.open.len())?;
        let record = if input.below(8) == 0 { self.open[at] } else { self.open.remove(at) };
        let ctx_id = record.ctx_id.get();
        let code = [0, 0, 0, 0, 0, 1, 1, 2][usize::from(input.u8() & 7)];
        let (seq, cookie) = (self.seq(ctx_id), record.cookie.get());
        let first = (input.below(8) != 0).then(|| record.cpu_addr.get());
        let mut runs = Vec::new();
        if code == 0 {
            runs.push(script::run(input, first, seq));
            runs.extend((0..input.below(3)).map(|_| script::run(input, None, seq)));
        }
        Some(script::response(ctx_id, cookie, code, &runs))
    }
}

/// What must hold between steps.
impl Life<'_> {
    fn check(&self) {
        let contexts = self.guest.contexts();
        let stats = self.host.stats();
        let waiting = |vm: &VmStatus| vm.faults.iter().map(|fault| fault.waiters).sum::<usize>();
        let waiters: usize = contexts.iter().flat_map(|context| &context.vms).map(waiting).sum();
        let jobs: usize = contexts.iter().map(|context| context.jobs).sum();
        let n = stats.counters;
        let ended = n.faults_served_locally
            + n.faults_answered
            + n.faults_refused
            + n.faults_dropped
            + n.faults_throttled;
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        assert_eq!(n.faults_raised, ended + count(waiters), "faults raised, and ended or waiting: {n:?}");
        assert_eq!(
            n.jobs_submitted,
            n.jobs_done + n.jobs_failed + n.jobs_dropped + count(jobs),
            "jobs submitted, and ended or in flight: {n:?}"
        );
        let parked: usize = self.devices.iter().map(|device| device.parked()).sum();
        assert_eq!(parked, waiters, "accesses parked on devices, and faults that wait");
        let pending = contexts.iter().flat_map(|context| &context.vms).filter(|vm| vm.pending_faults > 0);
        assert_eq!(stats.pending_vms, pending.count(), "GPU VMs with a fault that waits");
        assert!(contexts.len() + self.guest.status().retiring <= must(usize::try_from(LIMITS.contexts)));
        assert!(self.guest.status().resources <= must(usize::try_from(LIMITS.resources)));
        let memory = self.guest.memory();
        let regions: HashSet<u64> = memory.regions().iter().map(|region| region.id()).collect();
        for context in &contexts {
            self.check_context(context);
            for vm in &context.vms {
                self.check_vm(context, vm, &regions);
            }
        }
    }

    fn check_context(&self, context: &ContextStatus) {
        let limit = |limit: u32| usize::try_from(limit).unwrap_or(0);
        assert!(context.pending_faults <= limit(LIMITS.pending_faults), "{} faults", context.pending_faults);
        assert!(context.jobs <= limit(LIMITS.jobs), "{} jobs", context.jobs);
        assert!(context.inval_done_seq <= context.inval_seq);
        let wanted = context.vms.iter().any(|vm| vm.wanted_pages > 0);
        assert!(!wanted || context.pending_faults > 0, "wanted, and nobody will ever see to it: {context:?}");
        let on_devices: usize = context.vms.iter().map(|vm| self.devices[vm.device].jobs_of(vm.asid)).sum();
        let moves = on_devices > 0 || context.pending_faults > 0;
        assert!(context.jobs == 0 || moves, "in flight, and nobody will ever end it: {context:?}");
    }

    fn check_vm(&self, context: &ContextStatus, vm: &VmStatus, regions: &HashSet<u64>) {
        assert!(vm.mappings.len() <= usize::try_from(LIMITS.mappings).unwrap_or(0));
        assert!(!vm.held || vm.wanted_pages > 0 || vm.pending_faults > 0, "held for nothing: {vm:?}");
        let stands = self.devices[vm.device].is_frozen(vm.asid);
        let must_stand = self.guest.is_frozen() || vm.held;
        assert_eq!(stands, must_stand, "queues that stand still, and must: {vm:?}");
        // Jobs of a GPU VM that became unusable go on, and find that it is.
        let bared = self.devices[vm.device].is_bared(vm.asid);
        assert!(!bared || vm.state == "unusable", "translations were taken from under running jobs: {vm:?}");
        for (page, bound) in self.devices[vm.device].bound(vm.asid) {
            assert!(regions.contains(&bound.region), "page {page:#x} is in memory that is gone");
            if self.devices[vm.device].info().address_model == AddressModel::Identity {
                self.check_page(context, page, page, bound);
                continue;
            }
            let addr = page * 4096;
            let over = |mapping: &&MappingStatus| (mapping.gpu_start..mapping.gpu_end).contains(&addr);
            let Some(mapping) = vm.mappings.iter().find(over) else {
                panic!("page {page:#x} has a translation and no mapping: {vm:?}");
            };
            assert!(!(mapping.readonly && bound.writable), "page {page:#x} of {mapping:?} may be written");
            if let Some(cpu_start) = mapping.cpu_start {
                let cpu_page = (cpu_start + (addr - mapping.gpu_start)) / 4096;
                self.check_page(context, page, cpu_page, bound);
            }
        }
    }

    fn check_page(&self, context: &ContextStatus, page: u64, cpu_page: u64, bound: Bound) {
        let Bound { gpa_page, writable, .. } = bound;
        assert!(
            self.shadow.allows(context.ctx_id, cpu_page, gpa_page, writable),
            "context {} has {gpa_page:#x} at {page:#x} (write: {writable}), which its process has not at {cpu_page:#x}",
            context.ctx_id
        );
    }

    /// Ends everything, and looks for what is left.
    fn end(mut self) {
        self.waits(|_| ());
        self.check();
        for context in self.guest.contexts() {
            assert_eq!(context.inval_done_seq, context.inval_seq, "everything was passed: {context:?}");
        }
        for ctx_id in 1..=u32::from(CONTEXTS) {
            self.command(&script::destroy_context(ctx_id), usize::MAX);
        }
        self.pass(true);
        assert_eq!(self.guest.status().retiring, 0, "contexts that do not retire");
        self.waits(|life| life.guest.close());
        for device in &self.devices {
            device.assert_empty();
        }
        for device in self.host.devices() {
            assert_eq!((device.gpu_vms, device.retiring), (0, 0), "asids that do not come back: {device:?}");
        }
        assert_eq!(self.host.stats().pending_vms, 0);
        assert_eq!(self.host.stats().guests, 0);
    }
}
