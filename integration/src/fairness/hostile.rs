//! Guests at their limits, one kind of hostility each.

use crate::frontend::Profile;
use crate::frontend::ram::{GuestRam, Layout};
use crate::frontend::raw::{DESC_F_NEXT, Descriptor, RawGuest, RawVm, Record, unmap, userptr};
use crate::svmd::Svmd;
use anyhow::{Context, Result, ensure};
use guest_agent::client::packet;
use guest_agent::driver::Transport;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
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
/// Packets of each ring that faults: those of all and `limits.total_jobs` jobs are what `limits.queue_bytes` lets there be.
const PACKETS: u32 = 64;
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
    /// One guest at all its limits: endless jobs and faults of 1000 contexts, all its mappings and records, and, one
    /// after the other, what is done to one ring.
    Limits,
    /// A guest of each kind, all at once.
    Everything,
}

impl Hostility {
    const EACH: [Self; 9] = [
        Self::Jobs,
        Self::Faults,
        Self::Binds,
        Self::Invalidate,
        Self::Kicks,
        Self::Sessions,
        Self::Status,
        Self::Hello,
        Self::Limits,
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
            Self::Limits => "limits",
            Self::Everything => "everything",
        }
    }
}

/// Names of the guests that there may be.
pub fn guests() -> impl Iterator<Item = String> {
    Hostility::EACH.iter().map(|hostility| hostility.name().to_owned())
}

/// Hostile guests at work, each in a process of its own: what they do to their own memory disturbs nobody's.
pub struct Crowd {
    processes: Vec<Child>,
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
        let mut crowd = Self { processes: vec![] };
        for kind in kinds {
            // This program, also where another one has been built in its place.
            let mut process = Command::new("/proc/self/exe")
                .args([HOSTILE, kind.name()])
                .arg(daemon.folder())
                .stdout(Stdio::piped())
                .spawn()?;
            let said = process.stdout.take().context("no pipe")?;
            crowd.processes.push(process);
            let mut line = String::new();
            BufReader::new(said).read_line(&mut line)?;
            ensure!(line == READY, "the hostile guest {:?} cannot be made", kind.name());
        }
        Ok(crowd)
    }

    /// Stops them where they are, or lets them go on.
    ///
    /// # Errors
    /// One of them has ended: it has found something that it did not expect, and said what.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        for process in &mut self.processes {
            ensure!(process.try_wait()?.is_none(), "a hostile guest has ended");
            kill_process(Pid::from_child(process), signal)?;
        }
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // One that has ended already is reported by `signal`.
            process.kill().ok();
            process.wait().ok();
        }
    }
}

/// First argument of a program of this crate that is to be a hostile guest; who calls [`run`](super::run) must look for it.
pub const HOSTILE: &str = "hostile-guest";
/// What a hostile process says when it begins.
const READY: &str = "ready\n";

/// Is a hostile guest until it is killed; the arguments are those behind [`HOSTILE`].
///
/// # Errors
/// The arguments are wrong, or the daemon did something that it did not expect.
pub fn be_hostile(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let (kind, folder) = arguments.next().zip(arguments.next()).context("usage: KIND FOLDER")?;
    let kind = Hostility::EACH.iter().find(|known| kind == known.name());
    let (kind, folder) = (*kind.context("no such hostile guest")?, Path::new(&folder));
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("prctl")?;
    let mut hostile = Hostile::new(folder, kind)?;
    // Its own time is not what is measured.
    rustix::process::nice(NICE).context("nice")?;
    print!("{READY}");
    std::io::stdout().flush()?;
    loop {
        hostile.annoy()?;
    }
}

/// One hostile guest.
struct Hostile {
    kind: Hostility,
    socket: PathBuf,
    ram: Arc<GuestRam>,
    gpa: u64,
    guest: Option<RawGuest>,
    contexts: u32,
    /// GPU VMs that fault, and how many jobs of them have not ended.
    faulting: Vec<RawVm>,
    jobs: usize,
    /// The GPU VM that has all the mappings.
    bound: Option<RawVm>,
    control: BufReader<UnixStream>,
    incarnation: u64,
}

impl Hostile {
    fn new(folder: &Path, kind: Hostility) -> Result<Self> {
        let socket = folder.join(kind.name()).with_extension("sock");
        let ram = GuestRam::new(Layout::Flat { bytes: 48 << 20 }, 1)?;
        let gpa = ram.take_pages(1)?[0] * PAGE_SIZE;
        let mut guest = RawGuest::connect(&socket, &ram, Profile::Qemu)?;
        guest.hello(1)?;
        let mut hostile = Self {
            kind,
            socket,
            ram,
            gpa,
            guest: Some(guest),
            contexts: 0,
            faulting: vec![],
            jobs: 0,
            bound: None,
            control: BufReader::new(UnixStream::connect(folder.join("control.sock"))?),
            incarnation: 1,
        };
        hostile.prepare()?;
        Ok(hostile)
    }

    fn guest(&mut self) -> Result<&mut RawGuest> {
        self.guest.as_mut().context("not connected")
    }

    fn prepare(&mut self) -> Result<()> {
        match self.kind {
            Hostility::Jobs => self.flood_jobs(CONTEXTS),
            Hostility::Faults => {
                self.faulting = self.make_vms(FAULTING)?;
                self.flood_faults()
            }
            Hostility::Binds | Hostility::Invalidate => self.bind_all(),
            Hostility::Limits => {
                self.bind_all()?;
                self.faulting = self.make_vms(FAULTING)?;
                self.flood_faults()?;
                self.flood_jobs(CONTEXTS - FAULTING * MAX_RINGS / BUSY_RINGS)
            }
            Hostility::Status => self.make_vms(CONTEXTS).map(drop),
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
            Hostility::Faults => {
                self.answer_faults()?;
                self.guest()?.vmm().wait(Duration::from_millis(1))?;
                Ok(())
            }
            Hostility::Binds => self.bind_anew(),
            Hostility::Invalidate => self.invalidate(),
            Hostility::Kicks => self.kick(),
            Hostility::Sessions => {
                let mut guest = RawGuest::connect(&self.socket, &self.ram_of_one_session()?, Profile::Qemu)?;
                guest.hello(1).map(drop)
            }
            Hostility::Status => self.list_contexts(),
            Hostility::Hello => {
                self.make_vms(64)?;
                self.contexts = 0;
                self.incarnation += 1;
                let incarnation = self.incarnation;
                self.guest()?.hello(incarnation).map(drop)
            }
            Hostility::Limits => {
                self.answer_faults()?;
                self.bind_anew()?;
                self.invalidate()?;
                self.kick()?;
                self.list_contexts()
            }
        }
    }

    /// Rings are made for good, so each connection needs memory of its own.
    fn ram_of_one_session(&self) -> Result<Arc<GuestRam>> {
        GuestRam::new(Layout::Flat { bytes: 48 << 20 }, self.incarnation)
    }

    /// So many contexts more, with a GPU VM each.
    fn make_vms(&mut self, count: u32) -> Result<Vec<RawVm>> {
        let mut vms = vec![];
        for _ in 0..count {
            self.contexts += 1;
            let ctx_id = self.contexts;
            self.guest()?.create_context(ctx_id)?;
            vms.push(self.guest()?.create_vm(ctx_id, 0)?);
        }
        Ok(vms)
    }

    /// Walks along lists that lead to themselves, in so many contexts.
    fn flood_jobs(&mut self, contexts: u32) -> Result<()> {
        let (ram, gpa) = (Arc::clone(&self.ram), self.gpa);
        ram.store(gpa, C)?;
        let vms = self.make_vms(contexts)?;
        let guest = self.guest()?;
        for vm in &vms {
            ensure!(guest.bind(*vm, &[userptr(C, A, PAGE_SIZE)])? == 0, "a mapping is refused");
            for ring in 0..BUSY_RINGS {
                guest.exec(*vm, ring, 0, &[packet::chase(C + 64, C, u64::MAX, 0)])?;
            }
        }
        // The first of each faults, and the others join or find what was answered.
        for vm in &vms {
            let fault = guest.wait_fault(vm.ctx_id)?;
            guest.answer(&fault, &[(fault.cpu_addr.get(), gpa)], 0)?;
        }
        Ok(())
    }

    fn flood_faults(&mut self) -> Result<()> {
        let bytes = u64::from(MAX_RINGS * PACKETS) * 16 * PAGE_SIZE;
        for vm in self.faulting.clone() {
            let guest = self.guest()?;
            ensure!(guest.bind(vm, &[userptr(C, A, bytes)])? == 0, "a mapping is refused");
            for ring in 0..MAX_RINGS {
                let page = |n: u32| C + u64::from(ring * PACKETS + n) * 16 * PAGE_SIZE;
                let packets: Vec<Packet> = (0..PACKETS).map(|n| packet::fill(page(n), 8, 1)).collect();
                guest.exec(vm, ring, 0, &packets)?;
            }
        }
        self.jobs = self.faulting.len() * usize::try_from(MAX_RINGS)?;
        Ok(())
    }

    /// Answers what there is; when the last job has ended, all begins anew.
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
        self.jobs = self.jobs.saturating_sub(ended);
        if self.jobs > 0 {
            return Ok(());
        }
        for vm in self.faulting.clone() {
            ensure!(self.guest()?.bind(vm, &[unmap(C, EVERYTHING)])? == 0, "an unmap is refused");
        }
        self.flood_faults()
    }

    fn bind_all(&mut self) -> Result<()> {
        let vm = match self.bound {
            Some(vm) => vm,
            None => self.make_vms(1)?[0],
        };
        self.bound = Some(vm);
        let map = |n: u64| userptr(C + n * 2 * PAGE_SIZE, A + n * 2 * PAGE_SIZE, PAGE_SIZE);
        let ops: Vec<BindOp> = (0..MAPPINGS).map(map).collect();
        for part in ops.chunks(usize::try_from(MAX_BINDS)?) {
            ensure!(self.guest()?.bind(vm, part)? == 0, "a mapping is refused");
        }
        Ok(())
    }
    fn bind_anew(&mut self) -> Result<()> {
        let vm = self.bound.context("nothing is bound")?;
        ensure!(self.guest()?.bind(vm, &[unmap(C, EVERYTHING)])? == 0, "an unmap is refused");
        self.bind_all()
    }
    fn invalidate(&mut self) -> Result<()> {
        let vm = self.bound.context("nothing is bound")?;
        self.guest()?.invalidate(vm.ctx_id, A, EVERYTHING).map(drop)
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
