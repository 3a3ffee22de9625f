//! The serving process of the agent is killed while jobs write into pinned memory of processes. A canary holds all memory
//! that the guest has free, takes what the dead leave behind, and must never find a byte that it did not write itself:
//! the keeper gives pages back only when no engine can reach them.
//!
//! Debian's cloud kernel does not know `page_poison`, so nobody watches a page between the moment when it is let go and
//! the moment when the canary takes it. That gap is kept short: the canary takes pages over and over from the kill until
//! the agent serves again.
//!
//! A second guest with an agent of its own has jobs and faults in flight all the while, and must not notice. In the first
//! guest a program lives on whose memory came from the first agent that was killed: it keeps what it has, hears what to
//! do, and gets a context of the new agent for the asking.
//!
//! To see it fail: with `self.arenas.clear()` as the first statement of `Keeper::cleanse`, before the device is reset, stray
//! writes were found in four of four tries, at the first to fifth kill. With the same line between reset and QUIET none was
//! found: svmd stops this guest's engines before it acknowledges that the rings have stopped, and drops its contexts before
//! they run again, so QUIET is the second of two barriers.

use anyhow::{Context, Result, ensure};
use integration::binaries::build_host;
use integration::initramfs::FIRST_UID;
use integration::ordinary::{Ordinary, sources};
use integration::provision::Vm;
use integration::qemu::channel::Process;
use integration::qemu::{Guest, ROOT};
use integration::story::qemu::{AGENT_SOCKET, wait_for_agent};
use integration::story::{CPU_BASE, GPU_BASE};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const KILLS: usize = 10;
/// Processes under load. Every second one is killed with the agent, if it has not ended by itself before.
const PROCESSES: u32 = 4;
/// Processes of the guest beside, and GPU VMs of each.
const BESIDE: u32 = 2;
const VMS: u64 = 2;
/// Left free for the kernel and for what starts later, in MiB.
const RESERVE_MIB: u32 = 24;
/// What the processes under load need, in MiB.
const LOAD_MIB: u32 = 40;
const PATIENCE: Duration = Duration::from_secs(60);
/// Holds answers back and lets them go, until told to stop; ends with answers let go.
const HOLD_AND_RELEASE: &str =
    "until [ -e /tmp/enough ]; do svm-agent hold; svm-agent release; done >/dev/null 2>&1; true";

struct Scene {
    svmd: Svmd,
    guest: Guest,
    /// The keeper, which lives through it all.
    keeper: Process,
    survivor: Survivor,
    beside: Beside,
}

/// A program that was started by `svm-agent run` before the first kill.
struct Survivor {
    process: Process,
    /// It has heard that its context is gone.
    told: bool,
}

/// A guest whose agent nobody kills.
struct Beside {
    guest: Guest,
    agent: Process,
    processes: Vec<Process>,
    ctx_ids: Vec<u64>,
    jobs_done: u64,
}

/// What works while the agent is killed.
struct Load {
    processes: Vec<Process>,
    holder: Process,
    /// Of arenas that stay.
    arena_bytes: u64,
}

pub fn leaves_no_stray_write(vm: &Vm) -> Result<()> {
    let mut programs = Ordinary::new(&build_host(&[])?)?;
    programs.compile(&sources("survivor")[..1])?;
    let svmd = Svmd::launch(&Options { guests: vec!["vm0".into(), "vm1".into()], ..Options::default() })?;
    let beside = Beside::boot(vm, &svmd)?;
    let builder = Guest::builder("killed").memory(320).smp(2).ordinary(&programs);
    let guest = builder.vhost_user_gpu(svmd.socket("vm0")).boot(vm)?;
    let keeper = guest.spawn(ROOT, "svm-agent serve")?;
    wait_for_agent(&guest, &keeper)?;
    let survivor = Survivor::start(&guest)?;
    let mut scene = Scene { svmd, guest, keeper, survivor, beside };
    for kill in 1..=KILLS {
        let killed = scene.kill_under_load().and_then(|()| scene.beside.check(&scene.svmd));
        killed.with_context(|| scene.circumstances(kill))?;
    }
    let Scene { svmd: _svmd, guest, keeper, survivor, beside } = scene;
    survivor.end()?;
    beside.end()?;
    keeper.kill(15)?;
    let ended = keeper.wait()?;
    ensure!(ended.code == Some(0), "the keeper: {ended}");
    guest.power_off()
}

impl Scene {
    fn kill_under_load(&mut self) -> Result<()> {
        let mut canary = self.guest.spawn(ROOT, "guest-canary")?;
        // Most of it before there is load, which takes the processors.
        fill(&mut canary, RESERVE_MIB + LOAD_MIB)?;
        let load = self.load()?;
        let filled = fill(&mut canary, RESERVE_MIB)?;
        self.wait_for_progress()?;

        let dropped = self.svmd.stat("/counters/jobs_dropped")?;
        let serving = self.serving()?;
        self.kill(serving, &load)?;
        // Takes what the dead leave, as they leave it.
        until("the agent serves again", || {
            fill(&mut canary, RESERVE_MIB)?;
            Ok(self.guest.run(ROOT, "svm-agent status --json")?.code == Some(0))
        })?;
        load.wait_for_ends()?;

        ensure!(self.serving()? != serving, "it was not killed");
        self.check_nothing_left()?;
        ensure!(self.svmd.stat("/counters/jobs_dropped")? > dropped, "no job was in flight");
        let refilled = fill(&mut canary, RESERVE_MIB)?;
        ensure!(
            refilled >= filled + load.arena_bytes / 2,
            "{filled} bytes, then {refilled}: arenas still pinned"
        );

        self.compute()?;
        self.survivor.check()?;
        let verified = canary.ask("verify")?;
        ensure!(verified["corrupt_bytes"] == 0 && verified["bytes"] == refilled, "{verified}");
        canary.close_stdin()?;
        ensure!(canary.wait()?.code == Some(0), "the canary failed");
        Ok(())
    }

    /// Processes that write and fault without rest, all of them past their first round.
    fn load(&self) -> Result<Load> {
        let mut processes = vec![];
        let mut arena_bytes = 0;
        for index in 0..PROCESSES {
            let process = mapped_process(&self.guest, index)?;
            process.write_line("churn")?;
            processes.push(process);
        }
        for process in &mut processes {
            let churning = answer(process)?;
            arena_bytes +=
                churning["arena_bytes"].as_u64().with_context(|| format!("no bytes: {churning}"))?;
        }
        let holder = self.guest.spawn(ROOT, ["sh", "-c", HOLD_AND_RELEASE])?;
        Ok(Load { processes, holder, arena_bytes })
    }

    /// Jobs end and faults are answered after this was called, so they do while the canary holds the memory.
    fn wait_for_progress(&self) -> Result<()> {
        let now = || {
            let (mut jobs, mut faults) = (0, 0);
            for ctx_id in self.contexts()? {
                let counters = counters(&self.svmd, "vm0", ctx_id)?;
                jobs += number(&counters, "jobs_done")?;
                faults += number(&counters, "faults_answered")?;
            }
            anyhow::Ok((jobs, faults))
        };
        let (jobs, faults) = now()?;
        until("jobs end and faults are answered", || {
            let (later_jobs, later_faults) = now()?;
            Ok(later_jobs >= jobs + 16 && later_faults >= faults + 64)
        })
    }

    /// Contexts of this guest at the daemon.
    fn contexts(&self) -> Result<Vec<u64>> {
        let listed = self.svmd.call("context.list", json!({ "guest": "vm0" }))?;
        let contexts = listed["contexts"].as_array().with_context(|| format!("no contexts: {listed}"))?;
        contexts.iter().map(|context| number(context, "ctx_id")).collect()
    }

    fn serving(&self) -> Result<u32> {
        // The brackets keep the shell and grep from finding themselves.
        let script = "grep -ls 'serve-for-keepe[r]' /proc/[0-9]*/cmdline";
        let found = self.guest.run(ROOT, ["sh", "-c", script])?.stdout;
        let pid = found.trim().strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/cmdline"));
        pid.and_then(|pid| pid.parse().ok()).with_context(|| format!("not one serving process: {found:?}"))
    }

    /// Kills the serving process, then every second process.
    fn kill(&self, serving: u32, load: &Load) -> Result<()> {
        let mut script = format!("kill -9 {serving}");
        for process in load.processes.iter().step_by(2) {
            script.push_str(&format!(" {}", process.pid()));
        }
        script.push_str("; touch /tmp/enough");
        self.guest.check(ROOT, ["sh", "-c", &script]).map(drop)
    }

    /// The daemon has dropped every context of the dead.
    fn check_nothing_left(&self) -> Result<()> {
        self.guest.check(ROOT, "rm /tmp/enough")?;
        let contexts = self.contexts()?;
        ensure!(contexts.is_empty(), "contexts are left: {contexts:?}");
        let guest = self.svmd.guest("vm0")?["status"].take();
        ensure!(guest["contexts"] == 0 && guest["retiring"] == 0 && guest["pending_faults"] == 0, "{guest}");
        ensure!(self.svmd.stat("/gpu_vms")? == u64::from(BESIDE) * VMS, "GPU VMs are left");
        Ok(())
    }

    /// New processes get right results from the new serving process.
    fn compute(&self) -> Result<()> {
        let mut processes = [mapped_process(&self.guest, 0)?, mapped_process(&self.guest, 1)?];
        for process in &mut processes {
            process.ask("launch 0")?;
        }
        for process in &mut processes {
            let results = process.ask("results")?;
            let devices = results["sums"].as_array().map(Vec::len);
            ensure!(results["mismatches"] == 0 && devices == Some(2), "{results}");
            process.write_line("exit")?;
            ensure!(process.wait()?.code == Some(0), "{}", process.output());
        }
        Ok(())
    }

    fn circumstances(&self, kill: usize) -> String {
        format!("kill {kill}\n-- svm-agent --\n{}\n-- svmd --\n{}", self.keeper.output(), self.svmd.log())
    }
}

impl Survivor {
    fn start(guest: &Guest) -> Result<Self> {
        let process = guest.spawn(FIRST_UID + PROCESSES, "svm-agent run -- survivor")?;
        let mut survivor = Self { process, told: false };
        for command in ["whole", "join", "sum"] {
            survivor.succeeds(command)?;
        }
        Ok(survivor)
    }

    /// It has all its memory, and gets what a new program would; of what is gone it hears once what to do.
    fn check(&mut self) -> Result<()> {
        if !self.told {
            self.told = true;
            self.fails("sum", "connect again")?;
            self.succeeds("leave")?;
            self.fails("join", "svm-agent run")?;
            // Standard error comes by another way than answers.
            until("the library says what to do", || {
                Ok(self.process.output().stderr.contains("start the program again"))
            })?;
        }
        self.succeeds("whole")?;
        self.succeeds("connect")
    }

    fn succeeds(&mut self, command: &str) -> Result<()> {
        let told = self.process.ask(command)?;
        ensure!(told["status"] == 0, "{command}: {told}");
        Ok(())
    }

    fn fails(&mut self, command: &str, remedy: &str) -> Result<()> {
        let told = self.process.ask(command)?;
        let says = told["why"].as_str().is_some_and(|why| why.contains(remedy));
        ensure!(told["status"].as_i64() < Some(0) && says, "{command}: {told}");
        Ok(())
    }

    fn end(self) -> Result<()> {
        self.process.close_stdin()?;
        let ended = self.process.wait()?;
        ensure!(ended.code == Some(0), "{ended}");
        Ok(())
    }
}

impl Beside {
    fn boot(vm: &Vm, svmd: &Svmd) -> Result<Self> {
        let guest = Guest::builder("beside").memory(256).vhost_user_gpu(svmd.socket("vm1")).boot(vm)?;
        let agent = guest.spawn(ROOT, "svm-agent serve")?;
        wait_for_agent(&guest, &agent)?;
        let (mut processes, mut ctx_ids) = (vec![], vec![]);
        for index in 0..BESIDE {
            let mut process = mapped_process(&guest, index)?;
            process.write_line("churn")?;
            ctx_ids.push(number(&answer(&mut process)?, "churning")?);
            processes.push(process);
        }
        Ok(Self { guest, agent, processes, ctx_ids, jobs_done: 0 })
    }

    /// Nothing has failed, nothing was lost, and it goes on.
    fn check(&mut self, svmd: &Svmd) -> Result<()> {
        for process in &self.processes {
            let output = process.output();
            ensure!(output.code.is_none() && output.signal.is_none(), "beside: {output}");
        }
        let before = self.jobs_done;
        until("jobs of the guest beside end", || {
            let mut done = 0;
            for ctx_id in &self.ctx_ids {
                let counters = counters(svmd, "vm1", *ctx_id)?;
                for none in ["jobs_failed", "jobs_dropped", "faults_refused", "faults_dropped"] {
                    ensure!(number(&counters, none)? == 0, "beside, {none}: {counters}");
                }
                done += number(&counters, "jobs_done")?;
            }
            self.jobs_done = done;
            Ok(done > before)
        })
    }

    fn end(self) -> Result<()> {
        self.agent.kill(15)?;
        let ended = self.agent.wait()?;
        // Said each time when a serving process begins.
        let lives = ended.stderr.matches("serving processes at").count();
        ensure!(ended.code == Some(0) && lives == 1, "the agent beside: {ended}");
        for process in &self.processes {
            let ended = process.wait()?;
            let last: Value = serde_json::from_str(ended.stdout.lines().last().unwrap_or_default())?;
            // Only now, and after work whose every byte was checked.
            let cut_off = last["cut_off"].is_string() && last["rounds"].as_u64() > Some(0);
            ensure!(ended.code == Some(0) && cut_off, "beside: {ended}");
        }
        self.guest.power_off()
    }
}

impl Load {
    fn wait_for_ends(&self) -> Result<()> {
        for (index, process) in self.processes.iter().enumerate() {
            let ended = process.wait()?;
            let cut_off = ended.code == Some(0) && ended.stdout.contains("cut_off");
            ensure!(cut_off || (index % 2 == 0 && ended.signal == Some(9)), "{ended}");
        }
        ensure!(self.holder.wait()?.code == Some(0), "{}", self.holder.output());
        Ok(())
    }
}

/// A process that has its memory mapped.
fn mapped_process(guest: &Guest, index: u32) -> Result<Process> {
    let seed = 0x1_0001 * (index + 1);
    let arguments = format!("story-process {AGENT_SOCKET} {CPU_BASE:x} {GPU_BASE:x} {seed:x}");
    let mut process = guest.spawn(FIRST_UID + index, arguments)?;
    process.ask("map")?;
    Ok(process)
}

/// What the daemon has counted of a context.
fn counters(svmd: &Svmd, guest: &str, ctx_id: u64) -> Result<Value> {
    Ok(svmd.call("context.get", json!({ "guest": guest, "ctx_id": ctx_id }))?["counters"].take())
}

fn number(of: &Value, name: &str) -> Result<u64> {
    of[name].as_u64().with_context(|| format!("no number {name}: {of}"))
}

fn fill(canary: &mut Process, reserve_mib: u32) -> Result<u64> {
    let filled = canary.ask(&format!("fill {reserve_mib}"))?;
    filled["bytes"].as_u64().with_context(|| format!("not filled: {filled}"))
}

fn answer(process: &mut Process) -> Result<Value> {
    process.wait_for_line(|line| serde_json::from_str(line).ok())
}

fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        ensure!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
