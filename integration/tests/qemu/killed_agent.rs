//! The serving process of the agent is killed while jobs write into pinned memory of processes. A canary holds all memory
//! that the guest has free, takes what the dead leave behind, and must never find a byte that it did not write itself:
//! the keeper gives pages back only when no engine can reach them.
//!
//! Debian's cloud kernel does not know `page_poison`, so nobody watches a page between the moment when it is let go and
//! the moment when the canary takes it. That gap is kept short: the canary takes pages over and over from the kill until
//! the agent serves again.
//!
//! To see it fail: with `self.arenas.clear()` as the first statement of `Keeper::cleanse`, before the device is reset, stray
//! writes were found in four of four tries, at the first to fifth kill. With the same line between reset and QUIET none was
//! found: svmd stops this guest's engines before it acknowledges that the rings have stopped, and drops its contexts before
//! they run again, so QUIET is the second of two barriers.

use anyhow::{Context, Result, ensure};
use integration::initramfs::FIRST_UID;
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
}

/// What works while the agent is killed.
struct Load {
    processes: Vec<Process>,
    holder: Process,
    /// Of arenas that stay.
    arena_bytes: u64,
}

pub fn leaves_no_stray_write(vm: &Vm) -> Result<()> {
    let svmd = Svmd::launch(&Options::default())?;
    let builder = Guest::builder("killed").memory(288).smp(2);
    let guest = builder.vhost_user_gpu(svmd.socket("vm0")).boot(vm)?;
    let keeper = guest.spawn(ROOT, "svm-agent serve")?;
    wait_for_agent(&guest, &keeper)?;
    let scene = Scene { svmd, guest, keeper };
    for kill in 1..=KILLS {
        scene.kill_under_load().with_context(|| scene.circumstances(kill))?;
    }
    scene.keeper.kill(15)?;
    let ended = scene.keeper.wait()?;
    ensure!(ended.code == Some(0), "the keeper: {ended}");
    scene.guest.power_off()
}

impl Scene {
    fn kill_under_load(&self) -> Result<()> {
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
            let process = self.process(index)?;
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

    /// A process that has its memory mapped.
    fn process(&self, index: u32) -> Result<Process> {
        let seed = 0x1_0001 * (index + 1);
        let arguments = format!("story-process {AGENT_SOCKET} {CPU_BASE:x} {GPU_BASE:x} {seed:x}");
        let mut process = self.guest.spawn(FIRST_UID + index, arguments)?;
        process.ask("map")?;
        Ok(process)
    }

    /// Jobs end and faults are answered after this was called, so they do while the canary holds the memory.
    fn wait_for_progress(&self) -> Result<()> {
        let now = || anyhow::Ok((self.counter("jobs_done")?, self.counter("faults_answered")?));
        let (jobs, faults) = now()?;
        until("jobs end and faults are answered", || {
            let (later_jobs, later_faults) = now()?;
            Ok(later_jobs >= jobs + 16 && later_faults >= faults + 64)
        })
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
        let contexts = self.svmd.call("context.list", json!({ "guest": "vm0" }))?;
        ensure!(contexts["contexts"] == json!([]), "contexts are left: {contexts}");
        let guest = self.svmd.guest("vm0")?["status"].take();
        ensure!(guest["contexts"] == 0 && guest["retiring"] == 0 && guest["pending_faults"] == 0, "{guest}");
        ensure!(self.svmd.stat("/gpu_vms")? == 0, "GPU VMs are left");
        Ok(())
    }

    /// New processes get right results from the new serving process.
    fn compute(&self) -> Result<()> {
        let mut processes = [self.process(0)?, self.process(1)?];
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

    fn counter(&self, name: &str) -> Result<u64> {
        self.svmd.stat(&format!("/counters/{name}"))
    }

    fn circumstances(&self, kill: usize) -> String {
        format!("kill {kill}\n-- svm-agent --\n{}\n-- svmd --\n{}", self.keeper.output(), self.svmd.log())
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
