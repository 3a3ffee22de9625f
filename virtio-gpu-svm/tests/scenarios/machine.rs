//! A device without threads: the scenario says when it takes a step. What it is given it executes for real, through the
//! translations that it was told and on guest memory, so that results are right or wrong and not only said to be.
//!
//! It holds the core to its side of the contract: a parked access is resumed once, and no asid is used twice at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::{
    Access, AddressModel, Asid, Device, DeviceInfo, Error, Events, Extent, Fault, FaultModel, Flush, Job,
    JobEnd, JobId, LedgerEntry, StopId, Ticket, Verdict, VmLabel, operands,
};
use virtio_gpu_svm::host::Host;
use virtio_gpu_svm::memory::Region;
use virtio_gpu_svm::protocol::errno::{EFAULT, EPERM};
use virtio_gpu_svm::protocol::job::{OP_ATOMIC_ADD, OP_COPY, OPCODES, Packet};
use virtio_gpu_svm::quota::Charge;
use vm_memory::{Bytes, VolatileMemory};

/// Pages that a group of page requests asks for at most.
const GROUP: u64 = 3;
const WORD: u64 = 8;

/// A translation.
struct Page {
    region: Arc<Region>,
    offset: u64,
    writable: bool,
}

enum Doing {
    Runs,
    Parked(StopId),
    Fails(i32),
}

struct Running {
    asid: Asid,
    ring: u32,
    id: JobId,
    packets: Vec<Packet>,
    /// The packet under way, and bytes of it that are done.
    at: usize,
    done: u64,
    touched: (GpuAddr, Access),
    doing: Doing,
}

#[derive(Default)]
struct Told {
    alive: BTreeMap<Asid, VmLabel>,
    dying: Vec<Asid>,
    frozen: BTreeSet<Asid>,
    bound: BTreeMap<(Asid, u64), Page>,
    jobs: Vec<Running>,
    raised: u64,
    resumed: BTreeSet<StopId>,
    busy: bool,
    tickets: u64,
    passed: u64,
    /// Whose call fails for want of memory, and after how many of them.
    fails: Option<(VmLabel, u32)>,
}

impl Told {
    fn ticket(&mut self) -> Flush {
        if !self.busy {
            return Flush::Done;
        }
        self.tickets += 1;
        Flush::Pending(Ticket(self.tickets))
    }
    /// Counts a call that may fail for this owner, and fails when it is its turn.
    fn attempt(&mut self, label: &VmLabel) -> Result<(), Error> {
        match &mut self.fails {
            Some((whose, left)) if whose == label => {
                if *left > 0 {
                    *left -= 1;
                    return Ok(());
                }
                self.fails = None;
                Err(Error::OutOfMemory)
            }
            _ => Ok(()),
        }
    }
    fn attempt_for(&mut self, asid: Asid) -> Result<(), Error> {
        let label = self.alive.get(&asid).ok_or(Error::NoVm(asid.0))?.clone();
        self.attempt(&label)
    }
    /// Heads of rings that can take a step.
    fn ready(&self) -> Vec<usize> {
        let mut rings = BTreeSet::new();
        let head = |(at, job): (usize, &Running)| {
            let first = rings.insert((job.asid, job.ring));
            let goes = !matches!(job.doing, Doing::Parked(_)) && !self.frozen.contains(&job.asid);
            (first && goes).then_some(at)
        };
        self.jobs.iter().enumerate().filter_map(head).collect()
    }
}

/// What became of a step.
enum Step {
    Goes,
    Raises(Fault),
    Ends(Asid, JobId, JobEnd),
}

/// The device.
pub struct Machine {
    index: usize,
    info: DeviceInfo,
    told: Mutex<Told>,
}

impl Machine {
    pub fn new(index: usize, fault_model: FaultModel, address_model: AddressModel) -> Self {
        let info = DeviceInfo {
            name: format!("machine{index}"),
            va_bits: 48,
            num_engines: 1,
            opcodes: OPCODES,
            fault_model,
            address_model,
            null_mappings: false,
            exec: false,
        };
        Self { index, info, told: Mutex::default() }
    }
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }
    pub fn is_ready(&self) -> bool {
        !self.told().ready().is_empty()
    }
    pub fn has_unpassed(&self) -> bool {
        let told = self.told();
        told.passed < told.tickets
    }
    pub fn has_dying(&self) -> bool {
        !self.told().dying.is_empty()
    }
    /// Whether engines are late with their checkpoints from now on; whether they were.
    pub fn set_busy(&self, busy: bool) -> bool {
        std::mem::replace(&mut self.told().busy, busy)
    }
    /// The call for this owner behind so many others fails.
    pub fn fail_after(&self, label: VmLabel, calls: u32) {
        self.told().fails = Some((label, calls));
    }
    /// Whose GPU VM it is, as the device was told: alive, or until it has retired.
    pub fn owner(&self, asid: u32) -> Option<VmLabel> {
        self.told().alive.get(&Asid(asid)).cloned()
    }
    pub fn raised(&self) -> u64 {
        self.told().raised
    }
    /// Accesses that wait for a verdict.
    pub fn parked(&self) -> usize {
        self.told().jobs.iter().filter(|job| matches!(job.doing, Doing::Parked(_))).count()
    }
    /// Translations of a GPU VM: GPU page, guest-physical page, whether it may be written.
    pub fn bound(&self, asid: u32) -> Vec<(u64, u64, bool)> {
        let told = self.told();
        let of = told.bound.range((Asid(asid), 0)..=(Asid(asid), u64::MAX));
        of.map(|((_, page), to)| (*page, (to.region.gpa().0 + to.offset) / 4096, to.writable)).collect()
    }
    /// All checkpoints are passed.
    pub fn pass(&self, host: &Host) {
        let (asids, ticket) = {
            let mut told = self.told();
            told.passed = told.tickets;
            (told.alive.keys().copied().collect::<Vec<_>>(), Ticket(told.passed))
        };
        asids.into_iter().for_each(|asid| host.flushed(self.index, asid, ticket));
    }
    /// What was destroyed is let go.
    pub fn retire(&self, host: &Host) {
        let dying = std::mem::take(&mut self.told().dying);
        dying.into_iter().for_each(|asid| host.retired(self.index, asid));
    }
    /// One job takes a step: a packet, or as far as its translations go.
    pub fn step(&self, host: &Host, pick: usize) {
        let step = {
            let mut told = self.told();
            let ready = told.ready();
            let Some(at) = pick.checked_rem(ready.len()).map(|pick| ready[pick]) else { return };
            self.advance(&mut told, at)
        };
        match step {
            Step::Goes => {}
            Step::Raises(fault) => host.fault(self.index, fault),
            Step::Ends(asid, job, end) => host.job_done(self.index, asid, job, end),
        }
    }
    fn advance(&self, told: &mut Told, at: usize) -> Step {
        let Told { bound, jobs, raised, .. } = told;
        let job = &mut jobs[at];
        let errno = match job.doing {
            Doing::Fails(errno) => Some(errno),
            Doing::Runs => match job.packets.get(job.at) {
                None => Some(0),
                Some(packet) => match execute(packet, &mut job.done, |addr, access| {
                    translate(bound, job.asid, addr, access)
                }) {
                    Ok(()) => {
                        (job.at, job.done) = (job.at + 1, 0);
                        (job.at == job.packets.len()).then_some(0)
                    }
                    Err(miss) => {
                        job.touched = (GpuAddr(miss.addr), miss.access);
                        if self.info.fault_model == FaultModel::None {
                            Some(if miss.present { EPERM } else { EFAULT })
                        } else {
                            *raised += 1;
                            let stop = StopId(*raised);
                            job.doing = Doing::Parked(stop);
                            return Step::Raises(self.fault(job, stop, miss));
                        }
                    }
                },
            },
            Doing::Parked(_) => unreachable!("a parked job is not ready"),
        };
        let Some(errno) = errno else { return Step::Goes };
        let job = jobs.remove(at);
        let (addr, access) = job.touched;
        let packet = u32::try_from(job.at).unwrap();
        Step::Ends(job.asid, job.id, JobEnd { errno, packet, addr, access })
    }
    fn fault(&self, job: &Running, stop: StopId, miss: Miss) -> Fault {
        let pages = if self.info.address_model == AddressModel::Identity { GROUP } else { 1 };
        Fault {
            asid: job.asid,
            stop,
            job: job.id,
            addr: GpuAddr(miss.addr),
            pages,
            length_hint: miss.left,
            access: miss.access,
            engine: 0,
            level: 0,
        }
    }
    /// Panics if anything is left of any GPU VM. Then forgets what it has kept to check the core.
    pub fn assert_empty(&self) {
        let mut told = self.told();
        assert!(told.alive.is_empty(), "GPU VMs left on device {}: {:?}", self.index, told.alive);
        let left = (told.dying.len(), told.jobs.len(), told.bound.len(), told.frozen.len());
        assert_eq!(left, (0, 0, 0, 0), "dying, jobs, translations and frozen on device {}", self.index);
        told.resumed = BTreeSet::new();
        (told.fails, told.busy) = (None, false);
    }
}

/// An access without a translation.
struct Miss {
    addr: u64,
    access: Access,
    /// There is one, without the right.
    present: bool,
    /// Bytes of the packet from there on.
    left: u64,
}

fn translate(
    bound: &BTreeMap<(Asid, u64), Page>,
    asid: Asid,
    addr: u64,
    access: Access,
) -> Result<(Arc<Region>, u64), bool> {
    let page = bound.get(&(asid, addr / 4096)).ok_or(false)?;
    if access != Access::Read && !page.writable {
        return Err(true);
    }
    Ok((Arc::clone(&page.region), page.offset + addr % 4096))
}

/// Word by word from `done` on.
fn execute(
    packet: &Packet,
    done: &mut u64,
    translate: impl Fn(u64, Access) -> Result<(Arc<Region>, u64), bool>,
) -> Result<(), Miss> {
    let copies = packet.opcode.get() == OP_COPY;
    let adds = packet.opcode.get() == OP_ATOMIC_ADD;
    let bytes = if adds { WORD } else { packet.len.get() };
    let place =
        |addr, access, left| translate(addr, access).map_err(|present| Miss { addr, access, present, left });
    while *done < bytes {
        let left = bytes - *done;
        let value = if copies {
            let (region, at) = place(packet.src.get() + *done, Access::Read, left)?;
            load(&region, at)
        } else {
            packet.value.get()
        };
        let access = if adds { Access::Atomic } else { Access::Write };
        let (region, at) = place(packet.dst.get() + *done, access, left)?;
        let before = if adds { load(&region, at) } else { 0 };
        store(&region, at, before.wrapping_add(value));
        *done += WORD;
    }
    Ok(())
}

fn load(region: &Region, at: u64) -> u64 {
    region.mapping().as_volatile_slice().read_obj(usize::try_from(at).unwrap()).unwrap()
}

fn store(region: &Region, at: u64, value: u64) {
    region.mapping().as_volatile_slice().write_obj(value, usize::try_from(at).unwrap()).unwrap();
}

impl Device for Machine {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn vm_create(&self, asid: Asid, label: VmLabel, _tables: Charge) -> Result<(), Error> {
        let mut told = self.told();
        told.attempt(&label)?;
        let free = !told.dying.contains(&asid) && told.alive.insert(asid, label).is_none();
        assert!(free, "{asid:?} is in use");
        Ok(())
    }
    fn vm_destroy(&self, asid: Asid) {
        let mut told = self.told();
        assert!(told.alive.remove(&asid).is_some(), "{asid:?} is destroyed twice");
        told.dying.push(asid);
        told.frozen.remove(&asid);
        told.jobs.retain(|job| job.asid != asid);
        told.bound.retain(|(of, _), _| *of != asid);
    }
    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        let mut told = self.told();
        told.attempt_for(asid)?;
        let mut page = addr.page();
        for extent in extents {
            for n in 0..extent.pages {
                let (region, writable) = (Arc::clone(extent.region), extent.writable);
                told.bound.insert((asid, page), Page { region, offset: extent.offset + n * 4096, writable });
                page += 1;
            }
        }
        Ok(())
    }
    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        let mut told = self.told();
        told.bound.retain(|(of, page), _| *of != asid || !range.contains(*page));
        told.ticket()
    }
    fn flush(&self, _asid: Asid) -> Flush {
        self.told().ticket()
    }
    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        let told = self.told();
        told.passed >= ticket.0 || !told.alive.contains_key(&asid)
    }
    fn drop_region(&self, asid: Asid, region: u64) {
        self.told().bound.retain(|(of, _), to| *of != asid || to.region.id() != region);
    }
    fn resident_pages(&self, asid: Asid) -> u64 {
        self.resident_in(asid, PageRange { start: 0, end: u64::MAX })
    }
    fn resident_in(&self, asid: Asid, range: PageRange) -> u64 {
        let told = self.told();
        let pages = told.bound.range((asid, range.start)..(asid, range.end.max(range.start)));
        pages.map(|_| 1_u64).sum()
    }
    fn check_packets(&self, packets: &[Packet]) -> Result<(), Error> {
        operands::check(packets, 1 << self.info.va_bits)
    }
    fn submit(&self, asid: Asid, job: Job) -> Result<(), Error> {
        let mut told = self.told();
        told.attempt_for(asid)?;
        let Job { id, ring_idx: ring, packets } = job;
        let touched = (GpuAddr(0), Access::Read);
        told.jobs.push(Running { asid, ring, id, packets, at: 0, done: 0, touched, doing: Doing::Runs });
        Ok(())
    }
    fn resume(&self, stop: StopId, verdict: Verdict) {
        let mut told = self.told();
        assert!(told.resumed.insert(stop), "{stop:?} is resumed twice");
        let parked = |job: &&mut Running| matches!(job.doing, Doing::Parked(at) if at == stop);
        if let Some(job) = told.jobs.iter_mut().find(parked) {
            job.doing = match verdict {
                Verdict::Retry => Doing::Runs,
                Verdict::Fail(errno) => Doing::Fails(errno),
            };
        }
    }
    fn set_frozen(&self, asid: Asid, frozen: bool) -> Flush {
        let mut told = self.told();
        if !frozen {
            told.frozen.remove(&asid);
            return Flush::Done;
        }
        if told.alive.contains_key(&asid) {
            told.frozen.insert(asid);
        }
        told.ticket()
    }
    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        (Vec::new(), 0)
    }
}
