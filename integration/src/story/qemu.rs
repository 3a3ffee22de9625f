//! Guests under QEMU: unmodified kernels, `svm-agent` as root, processes with uids of their own.

use super::{Actor, Machine};
use crate::ledger::Answered;
use crate::ordinary::Ordinary;
use crate::provision::Vm;
use crate::qemu::channel::Process;
use crate::qemu::{Guest, ROOT};
use anyhow::{Context, Result, ensure};
use guest_agent::agent::LedgerReport;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where the agent listens in the guest.
pub const AGENT_SOCKET: &str = "/run/svm-agent.sock";

/// How long the agent may take to serve.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// A guest and its agent.
pub struct QemuMachine {
    name: Arc<str>,
    guest: Guest,
    /// Killed with the guest.
    _agent: Process,
}

impl QemuMachine {
    /// Boots a guest with these programs on the daemon's socket and starts an agent that holds its answers back.
    ///
    /// # Errors
    /// It does not boot, or the agent does not come up; the console's tail is in the error.
    pub fn boot(vm: &Vm, name: &str, socket: &Path, programs: &Ordinary) -> Result<Self> {
        let builder = Guest::builder(name).kernel(vm.cloud_kernel()?).vhost_user_gpu(socket);
        let guest = builder.ordinary(programs).boot(vm)?;
        // Without randomness, programs are at the same addresses: then only the context tells them apart.
        guest.check(ROOT, ["sh", "-c", "echo 0 > /proc/sys/kernel/randomize_va_space"])?;
        let agent = guest.spawn(ROOT, "svm-agent serve --hold-answers")?;
        wait_for_agent(&guest, &agent)?;
        Ok(Self { name: name.into(), guest, _agent: agent })
    }
    /// The guest.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }
}

impl Machine for QemuMachine {
    fn name(&self) -> &Arc<str> {
        &self.name
    }
    fn spawn(&self, uid: u32, arguments: &[String]) -> Result<Box<dyn Actor>> {
        let mut argv = vec!["story-process".to_owned()];
        argv.extend_from_slice(arguments);
        Ok(Box::new(QemuActor(self.guest.spawn(uid, argv)?)))
    }
    fn start(&self, uid: u32, program: &[String]) -> Result<Box<dyn Actor>> {
        let mut argv = ["svm-agent", "run", "--"].map(str::to_owned).to_vec();
        argv.extend_from_slice(program);
        Ok(Box::new(QemuActor(self.guest.spawn(uid, argv)?)))
    }
    fn agent_socket(&self) -> String {
        AGENT_SOCKET.into()
    }
    fn hold_answers(&self, hold: bool) -> Result<()> {
        self.guest.check(ROOT, if hold { "svm-agent hold" } else { "svm-agent release" }).map(drop)
    }
    fn answers(&self, devices: &[usize]) -> Result<Vec<Answered>> {
        Answered::by_agent(&self.name, devices, || {
            let text = self.guest.check(ROOT, "svm-agent ledger --json")?;
            serde_json::from_str::<LedgerReport>(&text).with_context(|| format!("ledger: {text}"))
        })
    }
}

/// Waits until `agent` serves processes.
///
/// # Errors
/// It does not; what it wrote is in the error.
pub fn wait_for_agent(guest: &Guest, agent: &Process) -> Result<()> {
    let deadline = Instant::now() + AGENT_PATIENCE;
    while guest.run(ROOT, "svm-agent status --json")?.code != Some(0) {
        ensure!(
            Instant::now() < deadline,
            "svm-agent of {} does not come up: {}",
            guest.name(),
            agent.output()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

struct QemuActor(Process);

impl Actor for QemuActor {
    fn tell(&mut self, command: &str) -> Result<()> {
        self.0.write_line(command)
    }
    fn line(&mut self) -> Result<String> {
        self.0.wait_for_line(|line| Some(line.to_owned()))
    }
    fn answer(&mut self) -> Result<Value> {
        self.0.wait_for_line(|line| serde_json::from_str(line).ok())
    }
    fn end(&mut self) -> Result<()> {
        let output = self.0.wait()?;
        ensure!(output.code == Some(0), "{output}");
        Ok(())
    }
}
