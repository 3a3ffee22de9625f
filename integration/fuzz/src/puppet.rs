//! A device without engines: the input raises its faults, ends its jobs and passes its checkpoints, all on one thread, so
//! that an input does the same each time. It keeps what it was told, and holds the core to the contract of
//! [`virtio_gpu_svm::device`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use virtio_gpu_svm::addr::{GpuAddr, PageRange};
use virtio_gpu_svm::device::{
    Access, AddressModel, Asid, Device, DeviceInfo, Error, Events, Extent, Fault, FaultModel, Flush, Job,
    JobEnd, JobId, LedgerEntry, StopId, Ticket, Verdict, VmLabel, operands,
};
use virtio_gpu_svm::host::Host;
use virtio_gpu_svm::protocol::job::{OPCODES, Packet};
use virtio_gpu_svm::quota::Charge;

/// Most pages of a group of page requests.
const MAX_GROUP: u64 = 8;

/// A translation.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub(crate) region: u64,
    pub(crate) gpa_page: u64,
    pub(crate) writable: bool,
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
    doing: Doing,
}

#[derive(Default)]
struct Told {
    alive: BTreeSet<Asid>,
    dying: Vec<Asid>,
    frozen: BTreeSet<Asid>,
    bound: BTreeMap<(Asid, u64), Bound>,
    jobs: Vec<Running>,
    resumed: BTreeSet<StopId>,
    /// Lost translations under running jobs that cannot fault.
    bared: BTreeSet<Asid>,
    stops: u64,
    busy: bool,
    tickets: u64,
    passed: u64,
    fails_in: Option<u8>,
}

impl Told {
    fn ticket(&mut self) -> Flush {
        if !self.busy {
            return Flush::Done;
        }
        self.tickets += 1;
        Flush::Pending(Ticket(self.tickets))
    }
    /// Counts a call that may fail, and fails when it is its turn.
    fn attempt(&mut self) -> Result<(), Error> {
        match self.fails_in.take() {
            Some(0) => Err(Error::OutOfMemory),
            left => {
                self.fails_in = left.map(|left| left - 1);
                Ok(())
            }
        }
    }
    /// The job at the head of a ring that is on an engine or may be.
    fn heads(&self) -> Vec<usize> {
        let mut rings = BTreeSet::new();
        let first = |(at, job): (usize, &Running)| {
            let head = rings.insert((job.asid, job.ring)) && !self.frozen.contains(&job.asid);
            head.then_some(at)
        };
        self.jobs.iter().enumerate().filter_map(first).collect()
    }
}

pub(crate) struct Puppet {
    index: usize,
    info: DeviceInfo,
    told: Mutex<Told>,
}

impl Puppet {
    pub(crate) fn new(index: usize, fault_model: FaultModel, address_model: AddressModel) -> Self {
        let info = DeviceInfo {
            name: format!("puppet{index}"),
            va_bits: 48,
            num_engines: 1,
            opcodes: OPCODES,
            fault_model,
            address_model,
            null_mappings: address_model == AddressModel::Any,
            exec: false,
        };
        Self { index, info, told: Mutex::default() }
    }
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether flushes stay pending until [`Puppet::pass`].
    pub(crate) fn set_busy(&self, busy: bool) -> bool {
        std::mem::replace(&mut self.told().busy, busy)
    }
    /// The call that may fail, counted from 0, that fails.
    pub(crate) fn fail_in(&self, calls: u8) {
        self.told().fails_in = Some(calls);
    }
    /// All checkpoints are passed.
    pub(crate) fn pass(&self, host: &Host) {
        let (asids, ticket) = {
            let mut told = self.told();
            told.passed = told.tickets;
            (told.alive.iter().copied().collect::<Vec<_>>(), Ticket(told.passed))
        };
        asids.into_iter().for_each(|asid| host.flushed(self.index, asid, ticket));
    }
    /// What was destroyed is let go.
    pub(crate) fn retire(&self, host: &Host) {
        let dying = std::mem::take(&mut self.told().dying);
        dying.into_iter().for_each(|asid| host.retired(self.index, asid));
    }
    /// Parks a job that runs. Not on devices that cannot.
    pub(crate) fn raise(&self, host: &Host, pick: usize, addr: u64, access: Access, hint: u64) {
        if self.info.fault_model != FaultModel::Replayable {
            return;
        }
        let end = 1 << self.info.va_bits;
        let addr = addr % end;
        let wish = if self.info.address_model == AddressModel::Identity { hint % MAX_GROUP } else { 0 };
        let pages = (wish + 1).min(end / 4096 - addr / 4096);
        let fault = {
            let mut told = self.told();
            let runs = |at: &usize| matches!(told.jobs[*at].doing, Doing::Runs);
            let heads: Vec<_> = told.heads().into_iter().filter(runs).collect();
            let Some(at) = pick.checked_rem(heads.len()).map(|pick| heads[pick]) else { return };
            told.stops += 1;
            let stop = StopId(told.stops);
            let job = &mut told.jobs[at];
            job.doing = Doing::Parked(stop);
            let (asid, job, addr) = (job.asid, job.id, GpuAddr(addr));
            Fault { asid, stop, job, addr, pages, length_hint: hint + 1, access, engine: 0, level: 0 }
        };
        host.fault(self.index, fault);
    }
    /// A job that runs ends, or one that a verdict ended.
    pub(crate) fn end(&self, host: &Host, pick: usize, errno: i32) {
        let (job, errno) = {
            let mut told = self.told();
            let may = |at: &usize| !matches!(told.jobs[*at].doing, Doing::Parked(_));
            let heads: Vec<_> = told.heads().into_iter().filter(may).collect();
            let Some(at) = pick.checked_rem(heads.len()).map(|pick| heads[pick]) else { return };
            let job = told.jobs.remove(at);
            let errno = if let Doing::Fails(verdict) = job.doing { verdict } else { errno };
            (job, errno)
        };
        let end = JobEnd { errno, packet: 0, addr: GpuAddr(0), access: Access::Read };
        host.job_done(self.index, job.asid, job.id, end);
    }

    /// Accesses that wait for a verdict.
    pub(crate) fn parked(&self) -> usize {
        self.told().jobs.iter().filter(|job| matches!(job.doing, Doing::Parked(_))).count()
    }
    /// Jobs of a GPU VM.
    pub(crate) fn jobs_of(&self, asid: u32) -> usize {
        self.told().jobs.iter().filter(|job| job.asid.0 == asid).count()
    }
    pub(crate) fn is_frozen(&self, asid: u32) -> bool {
        self.told().frozen.contains(&Asid(asid))
    }
    /// Whether translations were taken from under running jobs that cannot fault.
    pub(crate) fn is_bared(&self, asid: u32) -> bool {
        self.told().bared.contains(&Asid(asid))
    }
    /// Translations of a GPU VM, by GPU page.
    pub(crate) fn bound(&self, asid: u32) -> Vec<(u64, Bound)> {
        let told = self.told();
        told.bound
            .range((Asid(asid), 0)..=(Asid(asid), u64::MAX))
            .map(|((_, page), to)| (*page, *to))
            .collect()
    }
    /// Panics if anything is left of any GPU VM.
    pub(crate) fn assert_empty(&self) {
        let told = self.told();
        assert!(
            told.alive.is_empty() && told.dying.is_empty() && told.jobs.is_empty() && told.bound.is_empty(),
            "left on device {}: {:?} alive, {:?} dying, {} jobs, {} translations",
            self.index,
            told.alive,
            told.dying,
            told.jobs.len(),
            told.bound.len()
        );
    }
}

impl Device for Puppet {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }
    fn vm_create(&self, asid: Asid, _label: VmLabel, _tables: Charge) -> Result<(), Error> {
        let mut told = self.told();
        told.attempt()?;
        assert!(!told.dying.contains(&asid) && told.alive.insert(asid), "{asid:?} is in use");
        Ok(())
    }
    fn vm_destroy(&self, asid: Asid) {
        let mut told = self.told();
        assert!(told.alive.remove(&asid), "{asid:?} is destroyed twice");
        told.dying.push(asid);
        told.frozen.remove(&asid);
        told.bared.remove(&asid);
        told.jobs.retain(|job| job.asid != asid);
        told.bound.retain(|(of, _), _| *of != asid);
    }
    fn bind(&self, asid: Asid, addr: GpuAddr, extents: &[Extent]) -> Result<(), Error> {
        let mut told = self.told();
        told.attempt()?;
        if !told.alive.contains(&asid) {
            return Err(Error::NoVm(asid.0));
        }
        let mut page = addr.page();
        for extent in extents {
            let first = (extent.region.gpa().0 + extent.offset) / 4096;
            for gpa_page in first..first + extent.pages {
                let (region, writable) = (extent.region.id(), extent.writable);
                told.bound.insert((asid, page), Bound { region, gpa_page, writable });
                page += 1;
            }
        }
        Ok(())
    }
    fn bind_null(&self, asid: Asid, range: PageRange) -> Result<(), Error> {
        assert!(self.info.null_mappings, "null mappings on a device that has none");
        let mut told = self.told();
        told.attempt()?;
        told.bound.retain(|(of, page), _| *of != asid || !range.contains(*page));
        Ok(())
    }
    fn unbind(&self, asid: Asid, range: PageRange) -> Flush {
        let mut told = self.told();
        let runs = told.jobs.iter().any(|job| job.asid == asid) && !told.frozen.contains(&asid);
        if runs && self.info.fault_model == FaultModel::None {
            told.bared.insert(asid);
        }
        told.bound.retain(|(of, page), _| *of != asid || !range.contains(*page));
        told.ticket()
    }
    fn flush(&self, _asid: Asid) -> Flush {
        self.told().ticket()
    }
    fn has_flushed(&self, asid: Asid, ticket: Ticket) -> bool {
        let told = self.told();
        told.passed >= ticket.0 || !told.alive.contains(&asid)
    }
    fn drop_region(&self, asid: Asid, region: u64) {
        self.told().bound.retain(|(of, _), to| *of != asid || to.region != region);
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
        told.attempt()?;
        if !told.alive.contains(&asid) {
            return Err(Error::NoVm(asid.0));
        }
        told.jobs.push(Running { asid, ring: job.ring_idx, id: job.id, doing: Doing::Runs });
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
        if told.alive.contains(&asid) {
            told.frozen.insert(asid);
        }
        told.ticket()
    }
    fn ledger(&self) -> (Vec<LedgerEntry>, u64) {
        (Vec::new(), 0)
    }
}
