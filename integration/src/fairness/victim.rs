//! The guest that is measured: one process, one operation at a time, each in turn.

use crate::frontend::Profile;
use crate::frontend::ram::{GuestRam, Layout};
use crate::frontend::raw::{RawGuest, RawVm, userptr};
use anyhow::{Result, ensure};
use guest_agent::client::packet;
use std::path::Path;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::control::{PageRun, Supply, SupplyResp, VIRTIO_GPU_CMD_SVM_SUPPLY};
use virtio_gpu_svm::protocol::gpu::CtrlHdr;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::{ReqHdr, SVM_REQ_VM_GET_PROPERTY, VmProperty, VmRef};
use zerocopy::IntoBytes;

const CONTEXT: u32 = 1;
const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// From one page that is touched to the next: no fault brings another one's page along.
const STRIDE: u64 = 64 * PAGE_SIZE;
/// Pages that are touched before all are taken back.
const PLACES: u64 = 512;
/// Where pages lie that are known before they are touched, and those that are not.
const KNOWN: u64 = 0;
const UNKNOWN: u64 = PLACES * STRIDE;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A command and its answer.
    Command,
    /// A job without memory, to the record of its end.
    Job,
    /// A job that faults on a page that the daemon knows.
    Served,
    /// A job that faults on a page that the guest is asked for.
    Answered,
}

impl Operation {
    const ALL: [Self; 4] = [Self::Command, Self::Job, Self::Served, Self::Answered];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Job => "job",
            Self::Served => "served",
            Self::Answered => "answered",
        }
    }
}

/// The guest.
pub struct Victim {
    guest: RawGuest,
    vm: RawVm,
    gpa: u64,
    /// The page that is touched next.
    place: u64,
    seq: u64,
}

impl Victim {
    /// Connects, and makes its process.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn connect(socket: &Path) -> Result<Self> {
        let ram = GuestRam::new(Layout::Flat { bytes: 48 << 20 }, 1)?;
        let mut guest = RawGuest::connect(socket, &ram, Profile::Qemu)?;
        guest.hello(1)?;
        guest.create_context(CONTEXT)?;
        let vm = guest.create_vm(CONTEXT, 0)?;
        ensure!(guest.bind(vm, &[userptr(C, A, 2 * PLACES * STRIDE)])? == 0, "the mapping is refused");
        let gpa = ram.take_pages(1)?[0] * PAGE_SIZE;
        let mut victim = Self { guest, vm, gpa, place: 0, seq: 0 };
        victim.supply()?;
        Ok(victim)
    }

    /// Times operations for so long, each in turn.
    ///
    /// # Errors
    /// One of them fails.
    pub fn run(&mut self, how_long: Duration) -> Result<Vec<(Operation, Vec<Duration>)>> {
        let mut samples: Vec<_> = Operation::ALL.map(|operation| (operation, vec![])).into();
        let begin = Instant::now();
        while begin.elapsed() < how_long {
            for (operation, samples) in &mut samples {
                let start = Instant::now();
                self.operate(*operation)?;
                samples.push(start.elapsed());
            }
            self.place += 1;
            if self.place == PLACES {
                self.seq = self.guest.invalidate(CONTEXT, A, 2 * PLACES * STRIDE)?;
                self.supply()?;
                self.place = 0;
            }
        }
        Ok(samples)
    }

    fn operate(&mut self, operation: Operation) -> Result<()> {
        let at = self.place * STRIDE;
        match operation {
            Operation::Command => self.ask(),
            Operation::Job => self.job(&Packet::default(), false),
            Operation::Served => self.job(&packet::fill(C + KNOWN + at, 8, 1), false),
            Operation::Answered => self.job(&packet::fill(C + UNKNOWN + at, 8, 1), true),
        }
    }

    fn ask(&mut self) -> Result<()> {
        let len = u32::try_from(size_of::<VmRef>())?.into();
        let hdr = ReqHdr { cmd: SVM_REQ_VM_GET_PROPERTY.into(), len, ..ReqHdr::default() };
        let ask = VmRef { hdr, vm_id: self.vm.vm_id.into(), ..VmRef::default() };
        self.guest.request::<VmProperty>(CONTEXT, &ask, &[]).map(drop)
    }

    fn job(&mut self, packet: &Packet, asks: bool) -> Result<()> {
        self.guest.exec(self.vm, 0, 0, &[*packet])?;
        if asks {
            let fault = self.guest.wait_fault(CONTEXT)?;
            let status = self.guest.answer(&fault, &[(fault.cpu_addr.get(), self.gpa)], self.seq)?;
            ensure!(status == 0, "the answer is refused: {status}");
        }
        let end = self.guest.wait_job(CONTEXT)?;
        ensure!(end.status.get() == 0, "the job failed: {}", end.status.get());
        Ok(())
    }

    /// Makes the pages known that are to be.
    fn supply(&mut self) -> Result<()> {
        let run = |place: u64| PageRun {
            va: (A + KNOWN + place * STRIDE).into(),
            gpa: self.gpa.into(),
            pages: 1.into(),
            as_of: self.seq.into(),
            ..PageRun::default()
        };
        let runs: Vec<_> = (0..PLACES).map(run).collect();
        let hdr =
            CtrlHdr { kind: VIRTIO_GPU_CMD_SVM_SUPPLY.into(), ctx_id: CONTEXT.into(), ..CtrlHdr::default() };
        let supply = Supply { hdr, num_runs: u16::try_from(runs.len())?.into(), ..Supply::default() };
        let answer: SupplyResp = self.guest.send(&supply, runs.as_bytes())?;
        ensure!(answer.resp.status.get() == 0, "the pages are refused: {answer:?}");
        Ok(())
    }
}
