//! The story: processes of several guests map the same CPU range to the same GPU range on every device, fault there at
//! the same time, and each reads results made of its own bytes only. Then one touches what it has unbound, one goes away
//! with jobs in flight, and the rest go on.
//!
//! One telling for every kind of guest: what differs between QEMU, a vCPU and no CPU at all is behind [`Machine`] and
//! [`Actor`] ([`host`], [`qemu`]). Each step is asked of the daemon, the agents or the processes; nothing is assumed.

pub mod host;
mod pointers;
pub mod qemu;
mod report;

pub use pointers::PlainPointers;
pub use report::{Faults, Report};

use crate::ledger::{self, Answered, Outcome, Touch};
use crate::svmd::Svmd;
use anyhow::{Context, Result, bail, ensure};
use guest_runner::story::{Geometry, Touch as Access};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_gpu_svm::protocol::PAGE_SIZE;
use virtio_gpu_svm::protocol::errno::EINVAL;

/// A: where every process has its memory.
pub const CPU_BASE: u64 = 0x7e00_0000_0000;
/// C: where every GPU VM shows it.
pub const GPU_BASE: u64 = 0x10_0000_0000;
/// How long a step may take under emulation.
const PATIENCE: Duration = Duration::from_secs(120);
const FIRST_UID: u32 = 1000;

/// A guest with an agent that holds its answers back.
pub trait Machine {
    /// The guest's name at the daemon.
    fn name(&self) -> &Arc<str>;
    /// Starts an ordinary program there, by `svm-agent run`, as an ordinary user.
    ///
    /// # Errors
    /// It does not start.
    fn start(&self, uid: u32, program: &[String]) -> Result<Box<dyn Actor>>;
    /// Starts the story's process there, as an ordinary user.
    ///
    /// # Errors
    /// It does not start.
    fn spawn(&self, uid: u32, arguments: &[String]) -> Result<Box<dyn Actor>>;
    /// The agent's socket, as processes see it.
    fn agent_socket(&self) -> String;
    /// Makes the agent hold its answers back, or lets them go.
    ///
    /// # Errors
    /// The agent does not answer.
    fn hold_answers(&self, hold: bool) -> Result<()>;
    /// The agent's ledger.
    ///
    /// # Errors
    /// The agent does not answer, or has forgotten some.
    fn answers(&self, devices: &[usize]) -> Result<Vec<Answered>>;
}

/// A process of the story. Commands and answers are lines.
pub trait Actor {
    /// Gives a command.
    ///
    /// # Errors
    /// The process is gone.
    fn tell(&mut self, command: &str) -> Result<()>;
    /// Waits for the next line that it writes.
    ///
    /// # Errors
    /// The process ended or writes none in time.
    fn line(&mut self) -> Result<String>;
    /// Waits for the answer to the oldest command without one.
    ///
    /// # Errors
    /// The process failed or does not answer in time.
    fn answer(&mut self) -> Result<Value>;
    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end, or not well.
    fn end(&mut self) -> Result<()>;
}

/// What is to be told.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How the guests run, for the report.
    pub vmm: &'static str,
    /// Processes of each guest.
    pub processes: usize,
    /// Host devices.
    pub devices: usize,
    /// The daemon misroutes on purpose: end after the first results.
    pub sabotaged: bool,
}

struct Process {
    guest: usize,
    name: String,
    ctx_id: u32,
    /// Devices on which its memory is bound.
    devices: Vec<usize>,
    geometry: Geometry,
    actor: Box<dyn Actor>,
}

/// The telling.
pub struct Story<'a> {
    plan: Plan,
    daemon: &'a Svmd,
    machines: &'a [Box<dyn Machine>],
    processes: Vec<Process>,
    /// What must have been raised so far.
    touches: Vec<Touch>,
    mismatches: u64,
    narrate: &'a dyn Fn(&str),
}

impl<'a> Story<'a> {
    /// A story on these machines, whose agents hold their answers back. `narrate` gets a line at a time.
    pub fn new(
        plan: Plan,
        daemon: &'a Svmd,
        machines: &'a [Box<dyn Machine>],
        narrate: &'a dyn Fn(&str),
    ) -> Self {
        Self { plan, daemon, machines, processes: vec![], touches: vec![], mismatches: 0, narrate }
    }

    /// Tells it.
    ///
    /// # Errors
    /// A step could not be made. What went wrong within the steps is in the report.
    pub fn tell(mut self) -> Result<Report> {
        let begin = Instant::now();
        self.map_all()?;
        self.fault_all()?;
        self.read_all("each process reads results computed from its own bytes")?;
        self.tell_routes()?;
        if !self.plan.sabotaged {
            self.touch_unbound()?;
            self.leave_with_jobs()?;
            self.go_on()?;
        }
        let (daemon, machines, narrate) = (self.daemon, self.machines, self.narrate);
        let (devices, sabotaged) = (self.plan.devices, self.plan.sabotaged);
        let mut report = self.report()?;
        if !sabotaged {
            report.plain_pointers = Some(pointers::tell(daemon, machines, devices, narrate)?);
        }
        report.seconds = begin.elapsed().as_secs_f64();
        Ok(report)
    }

    fn say(&self, line: impl AsRef<str>) {
        (self.narrate)(line.as_ref());
    }

    /// Act 1: the same A..B -> C..D everywhere, different contents, nothing resident.
    fn map_all(&mut self) -> Result<()> {
        self.say(format!(
            "{} guests of one daemon, {} processes in each, {} devices: a GPU VM for every process on every device",
            self.machines.len(),
            self.plan.processes,
            self.plan.devices
        ));
        self.say(
            "\nwho maps what: the same CPU range A..B to the same GPU range C..D, each with bytes of its own",
        );
        for (guest, machine) in self.machines.iter().enumerate() {
            for index in 0..self.plan.processes {
                let seed = (guest * self.plan.processes + index + 1) as u64 * 0x1_0001;
                let devices = u32::try_from(self.plan.devices)?;
                let geometry = Geometry { cpu: CPU_BASE, gpu: GPU_BASE, devices, seed };
                let arguments = [machine.agent_socket(), hex(CPU_BASE), hex(GPU_BASE), hex(seed)];
                let mut actor = machine.spawn(FIRST_UID + u32::try_from(index)?, &arguments)?;
                let mapped = ask(actor.as_mut(), "map")?;
                let ctx_id = number(&mapped, "/ctx_id")?;
                ensure!(number(&mapped, "/devices")? == self.plan.devices as u64, "it sees {mapped}");
                let name = format!("{} process {}", machine.name(), index + 1);
                let devices = (0..self.plan.devices).collect();
                let ctx_id = u32::try_from(ctx_id)?;
                self.processes.push(Process { guest, name, ctx_id, devices, geometry, actor });
                self.check_mapping(self.processes.len() - 1, &mapped)?;
            }
        }
        Ok(())
    }

    /// Asks the daemon what it holds for a process that has just mapped.
    fn check_mapping(&self, index: usize, mapped: &Value) -> Result<()> {
        let process = &self.processes[index];
        let context = self.context(process)?;
        let end = process.geometry.bytes();
        for vm in context["vms"].as_array().context("no GPU VMs")? {
            let mapping = &vm["mappings"][0];
            let ranges =
                ["cpu_start", "cpu_end", "gpu_start", "gpu_end"].map(|field| mapping[field].as_u64());
            let wanted = [CPU_BASE, CPU_BASE + end, GPU_BASE, GPU_BASE + end].map(Some);
            ensure!(ranges == wanted, "{} maps {mapping}", process.name);
            ensure!(vm["resident_pages"] == 0, "{} has resident pages: {vm}", process.name);
        }
        self.say(format!(
            "  {:<22} context {:<3} A {:#x}..{:#x} -> C {:#x}..{:#x}  asids {}, nothing resident",
            process.name,
            process.ctx_id,
            CPU_BASE,
            CPU_BASE + end,
            GPU_BASE,
            GPU_BASE + end,
            mapped["asids"],
        ));
        Ok(())
    }

    /// Act 2: every GPU VM faults, and only then is the first fault answered.
    fn fault_all(&mut self) -> Result<()> {
        self.each("launch 0")?;
        let vms = (self.processes.len() * self.plan.devices) as u64;
        self.until(
            |story| Ok(story.daemon.stat("/pending_vms")? == vms),
            "all GPU VMs have a fault pending",
        )?;
        let answered = self.daemon.stat("/counters/faults_answered")?;
        ensure!(answered == 0, "{answered} faults were answered before all were pending");
        self.say(format!(
            "\n{vms} GPU VMs have a fault pending at C..D, none is answered yet; whose is which?"
        ));
        for process in &self.processes {
            let context = self.context(process)?;
            self.say(format!("  {:<22} {} faults wait for it", process.name, context["pending_faults"]));
        }
        for index in 0..self.processes.len() {
            self.expect_round(index);
        }
        for machine in self.machines {
            machine.hold_answers(false)?;
        }
        Ok(())
    }

    /// Tells where the first fault of each GPU VM went, from the daemon's own account.
    fn tell_routes(&self) -> Result<()> {
        self.say("\nwhere the first fault of each GPU VM went");
        let recent = self.daemon.call("fault.recent", json!({ "limit": 1024 }))?;
        let faults = recent["faults"].as_array().context("no faults")?;
        for process in &self.processes {
            let context = self.context(process)?;
            for vm in context["vms"].as_array().context("no GPU VMs")? {
                let of_vm = |fault: &&Value| fault["device"] == vm["device"] && fault["asid"] == vm["asid"];
                let first = faults.iter().filter(of_vm).min_by_key(|fault| fault["time_ns"].as_u64());
                // With very many GPU VMs the daemon's account has forgotten the first ones.
                let Some(fault) = first else { continue };
                self.say(format!(
                    "  device {} asid {}: {} at C {:#x} -> {}, context {}, A {:#x}: {}",
                    vm["device"],
                    vm["asid"],
                    fault["access"].as_str().unwrap_or("?"),
                    number(fault, "/gpu_addr")?,
                    fault["guest"].as_str().unwrap_or("?"),
                    fault["ctx_id"],
                    number(fault, "/cpu_addr")?,
                    fault["outcome"].as_str().unwrap_or("?"),
                ));
            }
        }
        Ok(())
    }

    /// Waits for all jobs, and adds up what does not stand as it must.
    fn read_all(&mut self, title: &str) -> Result<()> {
        self.say(format!("\n{title}"));
        for process in &mut self.processes {
            process.actor.tell("results")?;
        }
        for index in 0..self.processes.len() {
            let answer = self.processes[index].actor.answer()?;
            let wrong = number(&answer, "/mismatches")?;
            self.mismatches += wrong;
            let errors = answer["errors"].as_array().context("no errors")?;
            if !self.plan.sabotaged {
                ensure!(errors.is_empty(), "{}: {errors:?}", self.processes[index].name);
            }
            self.say(format!(
                "  {:<22} {} of {} bytes are wrong",
                self.processes[index].name, wrong, answer["bytes"]
            ));
            for sum in answer["sums"].as_array().into_iter().flatten() {
                let (read, expected) = (sum["read"].as_str(), sum["expected"].as_str());
                let verdict = if read == expected { "its own" } else { "NOT ITS OWN" };
                self.say(format!("    device {}: sum {}, {verdict}", sum["device"], read.unwrap_or("?")));
            }
        }
        Ok(())
    }

    /// Act 3: one process unbinds on one device, touches C..D there, and gets an error in its own context.
    fn touch_unbound(&mut self) -> Result<()> {
        let name = self.processes[0].name.clone();
        self.say(format!("\n{name} unbinds C..D on device 0 and touches it"));
        let actor = self.processes[0].actor.as_mut();
        ask(actor, "unbind 0")?;
        let touched = ask(actor, "touch 0")?;
        ensure!(
            touched["errno"] == EINVAL && touched["addr"].as_u64() == Some(GPU_BASE),
            "the job should have failed with EINVAL at C: {touched}"
        );
        self.say(format!("  its job ends: {}", touched["text"].as_str().unwrap_or_default()));
        self.processes[0].devices.retain(|device| *device != 0);
        self.expect(0, 0, (0, Access::Read), Outcome::Refused);
        Ok(())
    }

    /// Act 4: one process exits with jobs in flight; its late faults are dropped and counted.
    fn leave_with_jobs(&mut self) -> Result<()> {
        let index = self.processes.len() - 1;
        let (guest, devices) = (self.processes[index].guest, self.plan.devices as u64);
        self.say(format!("\n{} exits with jobs in flight", self.processes[index].name));
        let before = self.daemon.stat("/counters/faults_dropped")?;
        self.machines[guest].hold_answers(true)?;
        ask(self.processes[index].actor.as_mut(), "strand")?;
        self.until(
            |story| Ok(number(&story.context(&story.processes[index])?, "/pending_faults")? == devices),
            "the faults of its jobs are pending",
        )?;
        self.processes[index].actor.tell("exit")?;
        self.processes[index].actor.end()?;
        let dropped = |story: &Self| anyhow::Ok(story.daemon.stat("/counters/faults_dropped")? - before);
        self.until(|story| Ok(dropped(story)? == devices), "its faults are dropped")?;
        self.until(|story| story.is_gone(&story.processes[index]), "its context is gone")?;
        self.say(format!("  {devices} late faults dropped and counted, its context is gone"));
        let late = self.processes[index].geometry.late();
        for device in 0..self.plan.devices {
            self.expect(index, device, (late, Access::Read), Outcome::Uncertain);
        }
        self.processes.pop();
        self.machines[guest].hold_answers(false)
    }

    /// Act 5: the rest go on. What they had resident is taken from them, and comes back without their guests.
    fn go_on(&mut self) -> Result<()> {
        for process in &self.processes {
            let params = json!({ "guest": self.guest_of(process), "ctx_id": process.ctx_id });
            self.daemon.call("context.evict", params)?;
        }
        for index in 0..self.processes.len() {
            self.expect_round(index);
        }
        self.each("launch 1")?;
        self.read_all("the rest go on: evicted, they fault again, and are served from what is known")?;
        for process in &mut self.processes {
            process.actor.tell("exit")?;
            process.actor.end()?;
        }
        Ok(())
    }

    /// Compares the three ledgers.
    fn report(self) -> Result<Report> {
        let devices: Vec<usize> = (0..self.plan.devices).collect();
        let raised = self.daemon.ledgers()?;
        let mut answered = vec![];
        for machine in self.machines {
            answered.extend(machine.answers(&devices)?);
        }
        let comparison = ledger::compare(&raised, &answered, &self.touches);
        let account = comparison.to_string().replace('\n', "\n  ");
        self.say(
            "\nevery fault as three ledgers have it: devices (below the router), agents, and what the jobs must touch",
        );
        self.say(format!("  {account}"));
        let bytes =
            Geometry { cpu: CPU_BASE, gpu: GPU_BASE, devices: u32::try_from(devices.len())?, seed: 0 }
                .bytes();
        Ok(Report {
            vmm: self.plan.vmm,
            guests: self.machines.len(),
            processes: self.plan.processes,
            devices: devices.len(),
            cpu_range: [hex(CPU_BASE), hex(CPU_BASE + bytes)],
            gpu_range: [hex(GPU_BASE), hex(GPU_BASE + bytes)],
            peak_pending_vms: self.daemon.stat("/peak_pending_vms")?,
            faults: Faults::from(&comparison),
            agrees: comparison.agrees(),
            data_mismatches: self.mismatches,
            plain_pointers: None,
            seconds: 0.0,
        })
    }

    fn each(&mut self, command: &str) -> Result<()> {
        for process in &mut self.processes {
            process.actor.tell(command)?;
        }
        for process in &mut self.processes {
            process.actor.answer()?;
        }
        Ok(())
    }

    /// A round's job touches its windows once on each device.
    fn expect_round(&mut self, index: usize) {
        for device in self.processes[index].devices.clone() {
            let touches = self.processes[index].geometry.touches(u32::try_from(device).unwrap_or(u32::MAX));
            for touch in touches {
                self.expect(index, device, touch, Outcome::Served);
            }
        }
    }

    fn expect(&mut self, index: usize, device: usize, (offset, access): (u64, Access), outcome: Outcome) {
        use virtio_gpu_svm::device::Access as DeviceAccess;
        let process = &self.processes[index];
        self.touches.push(Touch {
            guest: self.machines[process.guest].name().clone(),
            ctx_id: process.ctx_id,
            device,
            page: (GPU_BASE + offset) / PAGE_SIZE,
            cpu_page: (CPU_BASE + offset) / PAGE_SIZE,
            access: match access {
                Access::Read => DeviceAccess::Read,
                Access::Write => DeviceAccess::Write,
                Access::Atomic => DeviceAccess::Atomic,
            },
            outcome,
        });
    }

    fn guest_of(&self, process: &Process) -> &str {
        self.machines[process.guest].name()
    }

    fn context(&self, process: &Process) -> Result<Value> {
        let params = json!({ "guest": self.guest_of(process), "ctx_id": process.ctx_id });
        self.daemon.call("context.get", params)
    }

    fn is_gone(&self, process: &Process) -> Result<bool> {
        let contexts = self.daemon.call("context.list", json!({ "guest": self.guest_of(process) }))?;
        let contexts = contexts.as_array().or_else(|| contexts["contexts"].as_array()).context("no list")?;
        Ok(contexts.iter().all(|context| context["ctx_id"] != process.ctx_id))
    }

    fn until(&self, holds: impl Fn(&Self) -> Result<bool>, what: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !holds(self)? {
            if Instant::now() > deadline {
                let stats = self.daemon.call("stats.get", json!({}))?;
                bail!("waited in vain until {what}: {stats}\n{}", self.daemon.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn ask(actor: &mut dyn Actor, command: &str) -> Result<Value> {
    actor.tell(command)?;
    actor.answer()
}

fn number(value: &Value, pointer: &str) -> Result<u64> {
    value.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no number {pointer} in {value}"))
}

fn hex(address: u64) -> String {
    format!("{address:#x}")
}
