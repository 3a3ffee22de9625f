//! Hostile processes in a real guest, beside a victim whose memory they are after and a canary that holds what is free.
//!
//! One user's processes die by SIGKILL at any moment of a life with jobs in flight; another user's try to read, join, cut
//! and bring what the victim has. `SVM_SEED` repeats their draws, `SVM_HOSTILE_SECONDS` gives them longer.

use anyhow::{Context, Result, ensure};
use integration::initramfs::FIRST_UID;
use integration::provision::Vm;
use integration::qemu::channel::Process;
use integration::qemu::{Guest, ROOT};
use integration::story::qemu::{AGENT_SOCKET, wait_for_agent};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const SECONDS: u64 = 15;
const MEMORY_MIB: u32 = 320;
/// Left free for the kernel and for what starts later, in MiB.
const RESERVE_MIB: u32 = 24;
/// What hostile processes need, in MiB.
const LOAD_MIB: u32 = 72;
/// How long what the last of them leave may take to go.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn processes_reach_nothing_and_leave_nothing(vm: &Vm) -> Result<()> {
    let number = |name: &str, other: u64| std::env::var(name).map_or(Ok(other), |text| text.parse());
    let seconds = number("SVM_HOSTILE_SECONDS", SECONDS)?;
    let seed = number("SVM_SEED", guest_agent::driver::new_incarnation())?;
    println!("SVM_SEED={seed} SVM_HOSTILE_SECONDS={seconds}");
    let svmd = Svmd::launch(&Options::default())?;
    let builder = Guest::builder("hostile").memory(MEMORY_MIB).smp(2).vhost_user_gpu(svmd.socket("vm0"));
    let guest = builder.timeout(Duration::from_secs(seconds + 120)).boot(vm)?;
    let agent = guest.spawn(ROOT, "svm-agent serve")?;
    wait_for_agent(&guest, &agent)?;
    let acted = act(&guest, &svmd, seed, seconds);
    acted.with_context(|| {
        format!("SVM_SEED={seed}\n-- svm-agent --\n{}\n-- svmd --\n{}", agent.output(), svmd.log())
    })?;
    agent.kill(15)?;
    let ended = agent.wait()?;
    ensure!(ended.code == Some(0) && !ended.stderr.contains("panicked"), "the agent: {ended}");
    // Said when a serving process had to be replaced.
    ensure!(ended.stderr.matches("serving processes at").count() == 1, "the agent: {ended}");
    ensure!(!svmd.log().contains("panic"), "svmd: {}", svmd.log());
    guest.power_off()
}

fn act(guest: &Guest, svmd: &Svmd, seed: u64, seconds: u64) -> Result<()> {
    let mut victim = guest.spawn(FIRST_UID, format!("guest-hostile victim {AGENT_SOCKET}"))?;
    let victim_has: Value = victim.wait_for_line(|line| serde_json::from_str(line).ok())?;
    check(&mut victim)?;
    let mut canary = guest.spawn(ROOT, "guest-canary")?;
    let filled = fill(&mut canary, RESERVE_MIB + LOAD_MIB)?;

    let (pid, address) = (victim.pid(), &victim_has["address"]);
    let dying = format!("guest-hostile die {AGENT_SOCKET} {seed} {seconds}");
    let reaching = |draws: u64| {
        format!("guest-hostile reach {AGENT_SOCKET} {} {seconds} {pid} {address}", seed.wrapping_add(draws))
    };
    // Of the user whose processes die too: what they have open it may open.
    let hostile = [
        guest.spawn(FIRST_UID + 1, dying)?,
        guest.spawn(FIRST_UID + 1, reaching(1))?,
        guest.spawn(FIRST_UID + 2, reaching(2))?,
    ];
    let over = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < over {
        check(&mut victim)?;
        // Takes what the dead leave, as they leave it.
        fill(&mut canary, RESERVE_MIB + LOAD_MIB)?;
    }
    let [died, first, second] = hostile.map(|process| told(&process));
    let (died, reached) = (died?, [first?, second?]);
    println!("{died}\n{}\n{}", reached[0], reached[1]);
    ensure!(died["failed"] == 0 && died["killed"].as_u64() > Some(seconds), "{died}");
    for loot in &reached {
        for nothing in ["secrets", "reached", "joined", "taken", "opened"] {
            ensure!(loot[nothing] == 0, "{nothing}: {loot}");
        }
        for something in ["words", "refused", "rounds"] {
            ensure!(loot[something].as_u64() > Some(0), "{something}: {loot}");
        }
    }

    only_victim_is_left(guest, svmd, &victim_has)?;
    check(&mut victim)?;
    let refilled = fill(&mut canary, RESERVE_MIB)?;
    ensure!(refilled > filled, "{filled} bytes, then {refilled}: memory of the dead is still held");
    let verified = canary.ask("verify")?;
    ensure!(verified["corrupt_bytes"] == 0 && verified["bytes"] == refilled, "{verified}");
    for process in [&canary, &victim] {
        process.close_stdin()?;
        let ended = process.wait()?;
        ensure!(ended.code == Some(0), "{ended}");
    }
    Ok(())
}

/// The victim's bytes are as they were, for it and for its devices.
fn check(victim: &mut Process) -> Result<()> {
    let told = victim.ask("check")?;
    ensure!(told["wrong"] == 0 && told["wrong_sums"] == 0 && told["devices"] == 2, "the victim: {told}");
    Ok(())
}

fn told(process: &Process) -> Result<Value> {
    let ended = process.wait()?;
    ensure!(ended.code == Some(0), "{ended}");
    let last = ended.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("it says {ended}"))
}

fn fill(canary: &mut Process, reserve_mib: u32) -> Result<u64> {
    let filled = canary.ask(&format!("fill {reserve_mib}"))?;
    filled["bytes"].as_u64().with_context(|| format!("not filled: {filled}"))
}

/// Of all contexts and all pinned memory, with the agent and with the daemon.
fn only_victim_is_left(guest: &Guest, svmd: &Svmd, victim: &Value) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status: Value = serde_json::from_str(&guest.check(ROOT, "svm-agent status --json")?)?;
        let contexts = status["contexts"].as_array().context("no contexts")?;
        let ids: Vec<&Value> = contexts.iter().map(|context| &context["ctx_id"]).collect();
        let theirs = svmd.guest("vm0")?["status"].take();
        let gone = ids == [&victim["ctx_id"]] && status["pinned_bytes"] == victim["bytes"];
        if gone && theirs["contexts"] == 1 && theirs["retiring"] == 0 && theirs["pending_faults"] == 0 {
            let contexts = svmd.call("context.list", json!({ "guest": "vm0" }))?;
            let count = contexts["contexts"].as_array().map(Vec::len);
            ensure!(count == Some(1) && svmd.stat("/gpu_vms")? == 2, "{contexts}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left: {status}; svmd has {theirs}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
