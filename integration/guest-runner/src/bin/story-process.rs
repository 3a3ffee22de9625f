//! An ordinary process of a guest in the story: connects to the agent, maps A..B to C..D on every device, launches jobs
//! on plain pointers, and judges what it reads. Commands come as lines on stdin, each is answered by one JSON object on a
//! line.

use guest_agent::client::{Arena, Client, Error, Job, Vm};
use guest_runner::churn;
use guest_runner::story::{Geometry, Memory};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::process::ExitCode;
use virtio_gpu_svm::protocol::errno;

const USAGE: &str = "usage: story-process SOCKET CPU GPU SEED    (addresses and seed in hex)
commands: map | launch ROUND | results | unbind DEVICE | touch DEVICE | strand | churn | exit
churn answers after its first round, goes on until the agent is gone, answers again, and ends the process.";

type Failure = Box<dyn std::error::Error>;

struct Process {
    geometry: Geometry,
    arena: Arena,
    vms: Vec<Vm>,
    /// What the memory must hold once the jobs launched so far have ended.
    expected: Memory,
    jobs: Vec<(u32, Job)>,
    /// Last: the connection outlives what hangs on it.
    client: Client,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("story-process: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, cpu, gpu, seed] = arguments.as_slice() else { return Err(USAGE.into()) };
    let hex = |text: &String| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    let (cpu, gpu, seed) = (hex(cpu)?, hex(gpu)?, hex(seed)?);
    let mut process = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let (command, argument) =
            (words.next().unwrap_or_default(), words.next().unwrap_or("0").parse::<u32>()?);
        let answer = match (command, &mut process) {
            ("map", None) => {
                let mapped = process.insert(Process::map(socket, cpu, gpu, seed)?);
                json!({ "ctx_id": mapped.client.ctx_id(), "devices": mapped.vms.len(),
                    "asids": mapped.vms.iter().map(Vm::asid).collect::<Vec<_>>() })
            }
            ("launch", Some(process)) => process.launch(argument.into())?,
            ("results", Some(process)) => process.results()?,
            ("unbind", Some(process)) => process.unbind(argument)?,
            ("touch", Some(process)) => process.touch(argument)?,
            ("strand", Some(process)) => process.strand()?,
            ("churn", Some(process)) => return process.churn(),
            // At once, with jobs in flight and everything still mapped.
            ("exit", _) => std::process::exit(0),
            _ => return Err(format!("{line:?} now? {USAGE}").into()),
        };
        say(&answer)?;
    }
    Ok(())
}

fn say(answer: &Value) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{answer}")?;
    out.flush()
}

impl Process {
    fn map(socket: &str, cpu: u64, gpu: u64, seed: u64) -> Result<Self, Failure> {
        let client = Client::connect(socket)?;
        let devices = u32::try_from(client.devices()?.len())?;
        let geometry = Geometry { cpu, gpu, devices, seed };
        let bytes = geometry.bytes();
        let arena = client.arena(usize::try_from(bytes)?, Some(usize::try_from(cpu)?))?;
        let expected = geometry.contents();
        arena.write(0, &expected.0);
        let vms = (0..devices).map(|device| client.vm(device)).collect::<Result<Vec<_>, _>>()?;
        for vm in &vms {
            vm.bind_userptr(gpu, arena.address(), bytes, 0)?;
        }
        Ok(Self { geometry, arena, vms, expected, jobs: Vec::new(), client })
    }
    /// Launches a round's job on each device that still shows the memory.
    fn launch(&mut self, round: u64) -> Result<Value, Failure> {
        for vm in &self.vms {
            let device = vm.dev_id();
            let job = vm.exec(0, &self.geometry.packets(device, round), round)?;
            self.geometry.apply(&mut self.expected, device, round);
            self.jobs.push((device, job));
        }
        Ok(json!({ "launched": self.vms.len() }))
    }
    /// Waits for the jobs, and compares every byte with what must stand there.
    fn results(&mut self) -> Result<Value, Failure> {
        let (mut errors, mut sums) = (Vec::new(), Vec::new());
        let mut found = Memory(vec![0; self.expected.0.len()]);
        let jobs: Vec<_> = self.jobs.drain(..).map(|(device, job)| (device, job.wait())).collect();
        self.arena.read(0, &mut found.0);
        for (device, ended) in jobs {
            match ended {
                Ok(()) => sums.push(json!({ "device": device,
                    "read": format!("{:016x}", self.geometry.sum_of(&found, device)),
                    "expected": format!("{:016x}", self.geometry.sum_of(&self.expected, device)) })),
                Err(error) => errors.push(format!("device {device}: {error}")),
            }
        }
        let mismatches = found.differing(&self.expected);
        Ok(json!({ "bytes": found.0.len(), "mismatches": mismatches, "sums": sums, "errors": errors }))
    }
    fn unbind(&mut self, device: u32) -> Result<Value, Failure> {
        self.vm(device)?.unbind(self.geometry.gpu, self.geometry.bytes())?;
        Ok(json!({ "unbound": device }))
    }
    /// Runs a job on what is not bound any more; says how it ended, and lets the device alone from now on.
    fn touch(&mut self, device: u32) -> Result<Value, Failure> {
        let job = self.vm(device)?.exec(0, &[self.geometry.read_window(0)], 0)?;
        let answer = match job.wait() {
            Ok(()) => json!({ "errno": 0 }),
            Err(Error::Job(error)) => {
                json!({ "errno": error.errno, "name": errno::name(error.errno), "addr": error.addr, "text": error.to_string() })
            }
            Err(other) => return Err(other.into()),
        };
        self.vms.retain(|vm| vm.dev_id() != device);
        Ok(answer)
    }
    /// Launches jobs on memory that no device has seen, and does not wait for them.
    fn strand(&mut self) -> Result<Value, Failure> {
        for vm in &self.vms {
            let job = vm.exec(1, &[self.geometry.read_window(self.geometry.late())], 0)?;
            self.jobs.push((vm.dev_id(), job));
        }
        Ok(json!({ "launched": self.vms.len() }))
    }
    /// Works without rest until it is cut off.
    fn churn(&self) -> Result<(), Failure> {
        let begun = || {
            let begun = json!({ "churning": self.client.ctx_id(), "arena_bytes": churn::LASTING_BYTES });
            // A host that does not read is gone, and this process with the guest.
            say(&begun).ok();
        };
        match churn::run(&self.client, &self.vms, begun) {
            (rounds, churn::End::CutOff(cause)) => {
                Ok(say(&json!({ "rounds": rounds, "cut_off": cause.to_string() }))?)
            }
            (_, wrong) => Err(wrong.into()),
        }
    }
    fn vm(&self, device: u32) -> Result<&Vm, Failure> {
        self.vms
            .iter()
            .find(|vm| vm.dev_id() == device)
            .ok_or_else(|| format!("no GPU VM on device {device}").into())
    }
}
