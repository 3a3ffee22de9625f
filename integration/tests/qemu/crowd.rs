//! A thousand contexts of one guest, all of which fault at the same address, and what each of them costs as they get more.

use anyhow::{Context, Result, ensure};
use integration::initramfs::FIRST_UID;
use integration::provision::Vm;
use integration::qemu::{Guest, ROOT};
use integration::story::qemu::{AGENT_SOCKET, wait_for_agent};
use integration::svmd::{Options, Svmd};
use serde_json::{Value, json};

/// Contexts, one after the other.
const SIZES: [u64; 4] = [1, 10, 100, 1000];
/// Times that all of them fault.
const ROUNDS: u64 = 3;

pub fn each_has_its_own_faults(vm: &Vm) -> Result<()> {
    let svmd = Svmd::launch(&Options { devices: 1, ..Options::default() })?;
    let told = act(vm, &svmd);
    told.with_context(|| format!("-- svmd --\n{}", svmd.log()))
}

fn act(vm: &Vm, svmd: &Svmd) -> Result<()> {
    let guest = Guest::builder("crowd").memory(512).smp(2).vhost_user_gpu(svmd.socket("vm0")).boot(vm)?;
    let most = SIZES.last().copied().unwrap_or_default();
    // One user may have half of what is not root's.
    let all = 2 * most + 16;
    let serve = format!("svm-agent serve --max-clients {all} --max-clients-per-user {most}");
    let agent = guest.spawn(ROOT, serve.as_str())?;
    wait_for_agent(&guest, &agent)?;
    let mut crowd = guest.spawn(FIRST_UID, format!("guest-crowd {AGENT_SOCKET}"))?;
    let mut faults = 0;
    for size in SIZES {
        let joined = seconds(&crowd.ask(&format!("grow {size}"))?)?;
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            let faulted = crowd.ask("fault")?;
            ensure!(faulted["contexts"] == size && faulted["wrong"] == 0, "{size} contexts: {faulted}");
            best = best.min(seconds(&faulted)?);
            faults += size;
        }
        println!(
            "{size} contexts: joined in {joined:.2} s, {:.0} us for each one's fault",
            best * 1e6 / size as f64
        );
    }
    ensure!(svmd.stat("/gpu_vms")? == most, "{} GPU VMs", svmd.stat("/gpu_vms")?);
    // The agent tells a device of a page once: a context's fault is its first, or it is served from what is known.
    let counter = |name: &str| svmd.stat(&format!("/counters/{name}"));
    let (answered, served) = (counter("faults_answered")?, counter("faults_served_locally")?);
    ensure!(answered >= most && answered + served == faults, "{answered} and {served} of {faults} faults");

    crowd.close_stdin()?;
    ensure!(crowd.wait()?.code == Some(0), "{}", crowd.output());
    let status: Value = serde_json::from_str(&guest.check(ROOT, "svm-agent status --json")?)?;
    agent.kill(15)?;
    ensure!(agent.wait()?.code == Some(0), "the agent: {}", agent.output());
    let contexts = svmd.call("context.list", json!({ "guest": "vm0" }))?;
    ensure!(
        contexts["contexts"] == json!([]),
        "contexts are left: {contexts}; the agent's status was {status}"
    );
    ensure!(svmd.stat("/gpu_vms")? == 0, "GPU VMs are left");
    guest.power_off()
}

fn seconds(answer: &Value) -> Result<f64> {
    answer["seconds"].as_f64().with_context(|| format!("no time: {answer}"))
}
