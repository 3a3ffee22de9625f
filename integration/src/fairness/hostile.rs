//! Guests at their limits, one kind of hostility each. Each has a thread of this process with the lowest priority, and
//! goes on until it is told to stop.

use crate::frontend::Profile;
use crate::frontend::ram::{GuestRam, Layout};
use crate::frontend::raw::{DESC_F_NEXT, Descriptor, RawGuest, RawVm, Record, unmap, userptr};
use crate::svmd::Svmd;
use anyhow::{Context, Result, ensure};
use guest_agent::client::packet;
use guest_agent::driver::Transport;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use virtio_gpu_svm::protocol::job::Packet;
use virtio_gpu_svm::protocol::request::BindOp;
use virtio_gpu_svm::protocol::{CONTROLQ, MAX_BINDS, MAX_RINGS, PAGE_SIZE};

const A: u64 = 0x7000_0000_0000;
const C: u64 = 0x20_0000_0000;
/// `limits.mappings`, unless told otherwise.
const MAPPINGS: u64 = 65_536;
/// Addresses that a whole process may have.
const EVERYTHING: u64 = 1 << 44;
/// Contexts of guests that have many.
const CONTEXTS: u32 = 1000;
/// Rings of each that have an endless job: with so many contexts, as many as `limits.total_jobs` lets there be.
const BUSY_RINGS: u32 = 16;
/// Packets of each ring that faults: with those of all contexts about what `limits.queue_bytes` lets there be.
const PACKETS: u32 = 192;
/// Contexts that fault.
const FAULTING: u32 = 64;
/// The lowest priority.
const NICE: i32 = 19;

/// What the company does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Hostility {
    /// Nothing: there is none.
    None,
    /// Endless jobs of 1000 contexts, as many as a guest may have.
    Jobs,
    /// Faults of 64 contexts on all rings, as many as may be pending, answered late and raised again.
    Faults,
    /// 65,536 mappings made and unmapped.
    Binds,
    /// All of a process invalidated that has 65,536 mappings.
    Invalidate,
    /// Malformed chains.
    Kicks,
    /// VMMs that come and go.
    Sessions,
    /// All contexts listed by a client of the control socket, beside a guest with very many of them.
    Status,
    /// Contexts with GPU VMs, all dropped by the HELLO of the next incarnation.
    Hello,
    /// All of them at once.
    Everything,
}

impl Hostility {
    const EACH: [Self; 8] = [
        Self::Jobs,
        Self::Faults,
        Self::Binds,
        Self::Invalidate,
        Self::Kicks,
        Self::Sessions,
        Self::Status,
        Self::Hello,
    ];

    /// For people, and for guests.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Jobs => "jobs",
            Self::Faults => "faults",
            Self::Binds => "binds",
            Self::Invalidate => "invalidate",
            Self::Kicks => "kicks",
            Self::Sessions => "sessions",
            Self::Status => "status",
            Self::Hello => "hello",
            Self::Everything => "everything",
        }
    }
}

/// Names of the guests that there may be.
pub fn guests() -> impl Iterator<Item = String> {
    Hostility::EACH.iter().map(|hostility| hostility.name().to_owned())
}

/// Hostile guests at work.
pub struct Crowd {
    ending: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Crowd {
    /// Makes them, and returns when all have what they need and go on.
    ///
    /// # Errors
    /// One of them cannot be made.
    pub fn gather(daemon: &Svmd, hostility: Hostility) -> Result<Self> {
        let kinds: Vec<_> = match hostility {
            Hostility::None => vec![],
            Hostility::Everything => Hostility::EACH.to_vec(),
            one => vec![one],
        };
        let ending = Arc::new(AtomicBool::new(false));
        let mut threads = vec![];
        for kind in kinds {
            let mut hostile = Hostile::new(daemon, kind)?;
            let ending = Arc::clone(&ending);
            threads.push(std::thread::spawn(move || {
                // Its own time is not what is measured.
                rustix::process::nice(NICE).context("nice")?;
                while !ending.load(Ordering::Relaxed) {
                    hostile.annoy()?;
                }
                Ok(())
            }));
        }
        Ok(Self { ending, threads })
    }

    /// Ends them.
    ///
    /// # Errors
    /// One of them has found something that it did not expect.
    pub fn disperse(self) -> Result<()> {
        self.ending.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a hostile guest panicked"))??;
        }
        Ok(())
    }
}

/// One hostile guest.
struct Hostile {
    kind: Hostility,
    socket: PathBuf,
    ram: Arc<GuestRam>,
    gpa: u64,
    guest: Option<RawGuest>,
    vms: Vec<RawVm>,
    /// Those that have not ended yet, where that matters.
    jobs: usize,
    control: BufReader<UnixStream>,
    incarnation: u64,
}

impl Hostile {
    fn new(daemon: &Svmd, kind: Hostility) -> Result<Self> {
        let socket = daemon.socket(kind.name());
        let ram = GuestRam::new(Layout::Flat { bytes: 48 << 20 }, 1)?;
        let gpa = ram.take_pages(1)?[0] * PAGE_SIZE;
        let mut guest = RawGuest::connect(&socket, &ram, Profile::Qemu)?;
        guest.hello(1)?;
        let control = BufReader::new(UnixStream::connect(daemon.socket("control").with_extension("sock"))?);
        let (guest, incarnation) = (Some(guest), 1);
        let mut hostile = Self { kind, socket, ram, gpa, guest, vms: vec![], jobs: 0, control, incarnation };
        hostile.prepare()?;
        Ok(hostile)
    }

    fn guest(&mut self) -> Result<&mut RawGuest> {
        self.guest.as_mut().context("not connected")
    }

    fn prepare(&mut self) -> Result<()> {
        match self.kind {
            Hostility::Jobs => {
                self.make_contexts(CONTEXTS)?;
                self.flood_jobs()
            }
            Hostility::Faults => {
                self.make_contexts(FAULTING)?;
                self.flood_faults()
            }
            Hostility::Binds | Hostility::Invalidate => {
                self.make_contexts(1)?;
                self.bind_all()
            }
            Hostility::Status => self.make_contexts(CONTEXTS),
            Hostility::Sessions => {
                self.guest = None;
                Ok(())
            }
            Hostility::Kicks | Hostility::Hello | Hostility::None | Hostility::Everything => Ok(()),
        }
    }

    /// One round of what it does.
    fn annoy(&mut self) -> Result<()> {
        match self.kind {
            // The jobs run by themselves.
            Hostility::Jobs | Hostility::None | Hostility::Everything => {
                std::thread::sleep(Duration::from_millis(10));
                Ok(())
            }
            Hostility::Faults => self.answer_faults(),
            Hostility::Binds => {
                let vm = self.vms[0];
                let all = unmap(C, MAPPINGS * 2 * PAGE_SIZE);
                ensure!(self.guest()?.bind(vm, &[all])? == 0, "an unmap is refused");
                self.bind_all()
            }
            Hostility::Invalidate => self.guest()?.invalidate(1, A, EVERYTHING).map(drop),
            Hostility::Kicks => self.kick(),
            Hostility::Sessions => {
                let mut guest = RawGuest::connect(&self.socket, &self.ram_of_one_session()?, Profile::Qemu)?;
                guest.hello(1).map(drop)
            }
            Hostility::Status => self.list_contexts(),
            Hostility::Hello => {
                self.make_contexts(64)?;
                self.incarnation += 1;
                let incarnation = self.incarnation;
                self.vms.clear();
                self.guest()?.hello(incarnation).map(drop)
            }
        }
    }

    /// Rings are made for good, so each connection needs memory of its own.
    fn ram_of_one_session(&self) -> Result<Arc<GuestRam>> {
        GuestRam::new(Layout::Flat { bytes: 48 << 20 }, self.incarnation)
    }

    fn make_contexts(&mut self, count: u32) -> Result<()> {
        for ctx_id in 1..=count {
            let guest = self.guest()?;
            guest.create_context(ctx_id)?;
            let vm = guest.create_vm(ctx_id, 0)?;
            self.vms.push(vm);
        }
        Ok(())
    }

    /// Walks along a list that leads to itself.
    fn flood_jobs(&mut self) -> Result<()> {
        let (ram, gpa) = (Arc::clone(&self.ram), self.gpa);
        ram.store(gpa, C)?;
        for vm in self.vms.clone() {
            let guest = self.guest()?;
            ensure!(guest.bind(vm, &[userptr(C, A, PAGE_SIZE)])? == 0, "a mapping is refused");
            for ring in 0..BUSY_RINGS {
                guest.exec(vm, ring, 0, &[packet::chase(C + 64, C, u64::MAX, 0)])?;
            }
        }
        // The first of each faults, and joins or finds what was answered.
        let mut left = self.vms.len();
        while left > 0 {
            let guest = self.guest()?;
            let fault = guest.wait_record(|record| match record {
                Record::Fault(fault) => Some(*fault),
                _ => None,
            })?;
            guest.answer(&fault, &[(fault.cpu_addr.get(), gpa)], 0)?;
            left -= 1;
        }
        Ok(())
    }

    fn flood_faults(&mut self) -> Result<()> {
        let bytes = u64::from(MAX_RINGS * PACKETS) * 16 * PAGE_SIZE;
        for vm in self.vms.clone() {
            let guest = self.guest()?;
            ensure!(guest.bind(vm, &[userptr(C, A, bytes)])? == 0, "a mapping is refused");
            for ring in 0..MAX_RINGS {
                let page = |n: u32| C + u64::from(ring * PACKETS + n) * 16 * PAGE_SIZE;
                let packets: Vec<Packet> = (0..PACKETS).map(|n| packet::fill(page(n), 8, 1)).collect();
                guest.exec(vm, ring, 0, &packets)?;
            }
        }
        self.jobs = self.vms.len() * usize::try_from(MAX_RINGS)?;
        Ok(())
    }

    fn answer_faults(&mut self) -> Result<()> {
        let (gpa, mut ended) = (self.gpa, 0);
        let guest = self.guest()?;
        for record in guest.take_records()? {
            match record {
                Record::Fault(fault) => guest.answer(&fault, &[(fault.cpu_addr.get(), gpa)], 0).map(drop)?,
                Record::Job(_) => ended += 1,
                Record::Notice(_) => {}
            }
        }
        guest.vmm().wait(Duration::from_millis(1))?;
        self.jobs = self.jobs.saturating_sub(ended);
        if self.jobs > 0 {
            return Ok(());
        }
        for vm in self.vms.clone() {
            ensure!(self.guest()?.bind(vm, &[unmap(C, EVERYTHING)])? == 0, "an unmap is refused");
        }
        self.flood_faults()
    }

    fn bind_all(&mut self) -> Result<()> {
        let map = |n: u64| userptr(C + n * 2 * PAGE_SIZE, A + n * 2 * PAGE_SIZE, PAGE_SIZE);
        let ops: Vec<BindOp> = (0..MAPPINGS).map(map).collect();
        let vm = self.vms[0];
        for part in ops.chunks(usize::try_from(MAX_BINDS)?) {
            ensure!(self.guest()?.bind(vm, part)? == 0, "a mapping is refused");
        }
        Ok(())
    }

    /// Chains that lead in a circle, as many as a ring takes.
    fn kick(&mut self) -> Result<()> {
        let guest = self.guest()?;
        let ring = guest.control_ring();
        let addr = ring.request();
        ring.write_descriptor(0, Descriptor { addr, len: 64, flags: DESC_F_NEXT, next: 0 })?;
        for _ in 0..32 {
            ring.publish(0)?;
        }
        guest.vmm().notify(CONTROLQ)?;
        let mut back = 0;
        while back < 32 {
            match guest.control_ring().take_used()? {
                Some(_) => back += 1,
                None => _ = guest.vmm().wait(Duration::from_secs(10))?,
            }
        }
        Ok(())
    }

    fn list_contexts(&mut self) -> Result<()> {
        let request = r#"{"jsonrpc":"2.0","id":1,"method":"context.list"}"#;
        writeln!(self.control.get_mut(), "{request}")?;
        let mut answer = String::new();
        self.control.read_line(&mut answer)?;
        ensure!(answer.contains("contexts"), "an answer of {} bytes", answer.len());
        Ok(())
    }
}
