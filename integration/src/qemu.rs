//! Boots a guest: QEMU with the generic vhost-user device as a virtio-gpu, an unmodified Debian kernel, our initramfs.
//!
//! All programs of [`binaries::build_guest`] are in the guest's `/bin`. The console goes to a file; the second serial port is the command channel ([`channel`]), over QEMU's stdin and stdout,
//! so no socket can be left behind. A guest ends with its [`Guest`]: QEMU is killed and reaped on drop, and the kernel
//! kills it should this process die first.
//!
//! ```no_run
//! # use integration::{provision::Vm, qemu::{Guest, ROOT}};
//! # fn main() -> anyhow::Result<()> {
//! let vm = Vm::open()?;
//! let guest = Guest::builder("alpha").kernel(vm.cloud_kernel()?).vhost_user_gpu("/run/alpha.sock").boot(&vm)?;
//! let release = guest.check(ROOT, "uname -r")?;
//! let mut sleeper = guest.spawn(1000, "sleep 100")?;
//! sleeper.kill(9)?;
//! assert_eq!(sleeper.wait()?.signal, Some(9));
//! # Ok(()) }
//! ```
//!
//! `SVM_QEMU_ACCEL` chooses another accelerator than TCG, for example `kvm`.

pub mod channel;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::binaries;
use crate::initramfs::Initramfs;
use crate::ordinary::Ordinary;
use crate::provision::{Kernel, Vm};
use channel::{Channel, Command as GuestCommand, Output, Process};

/// Names another accelerator than the default.
pub const ACCELERATOR_VARIABLE: &str = "SVM_QEMU_ACCEL";
/// User id of root.
pub const ROOT: u32 = 0;

const DEFAULT_ACCELERATOR: &str = "tcg,thread=multi";
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// virtio-gpu's device type.
const VIRTIO_ID_GPU: u32 = 16;
/// controlq, cursorq, eventq.
const QUEUES: u32 = 3;
const QUEUE_SIZE: u32 = 256;
/// Config space that QEMU lets the guest see.
const CONFIG_BYTES: u32 = 128;

/// What a guest is made of.
#[derive(Debug)]
pub struct Builder {
    name: String,
    memory_mib: u32,
    cpus: u32,
    kernel: Option<Kernel>,
    files: Vec<(String, Vec<u8>)>,
    ordinary: Vec<(String, PathBuf)>,
    gpu: Option<PathBuf>,
    parameters: String,
    console: Option<PathBuf>,
    timeout: Duration,
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    name: String,
    channel: Arc<Channel>,
    pid: u32,
    pidfd: OwnedFd,
    threads: Vec<JoinHandle<()>>,
    release: String,
    console: PathBuf,
    /// Last: what QEMU uses goes after QEMU.
    _folder: TempDir,
}

impl Builder {
    /// Memory in MiB; 512 unless said.
    #[must_use]
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Processors; 1 unless said.
    #[must_use]
    pub fn smp(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The kernel, whose modules are loaded at boot; the cloud kernel unless said.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Puts a file into the guest; its folder is one of the root's.
    #[must_use]
    pub fn file(mut self, path: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((path.trim_start_matches('/').to_owned(), contents.into()));
        self
    }

    /// Puts dynamically linked programs into the guest, with all that they need.
    #[must_use]
    pub fn ordinary(mut self, programs: &Ordinary) -> Self {
        let files =
            programs.files().map(|(place, file)| (place.trim_start_matches('/').to_owned(), file.into()));
        self.ordinary.extend(files);
        self
    }

    /// Gives the guest a virtio-gpu whose backend listens on this socket.
    #[must_use]
    pub fn vhost_user_gpu(mut self, socket: impl Into<PathBuf>) -> Self {
        self.gpu = Some(socket.into());
        self
    }

    /// Appends to the kernel's command line.
    #[must_use]
    pub fn parameters(mut self, parameters: &str) -> Self {
        self.parameters.push(' ');
        self.parameters.push_str(parameters);
        self
    }

    /// Keeps the console's output in this file; otherwise it goes with the guest.
    #[must_use]
    pub fn serial_log(mut self, path: impl Into<PathBuf>) -> Self {
        self.console = Some(path.into());
        self
    }

    /// The longest that boot, a command, or anything else may keep the host waiting; 120 s unless said.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Starts QEMU and waits until the guest takes commands.
    ///
    /// # Errors
    /// Fails when a part cannot be provisioned or built, or the guest does not come up in time; the tail of its console
    /// is in the error.
    pub fn boot(self, vm: &Vm) -> Result<Guest> {
        let qemu = vm.qemu()?;
        let kernel = match self.kernel.clone() {
            Some(kernel) => kernel,
            None => vm.cloud_kernel()?,
        };
        let folder = tempfile::Builder::new().prefix("svm-guest-").tempdir()?;
        let initramfs = folder.path().join("initramfs");
        self.write_initramfs(&initramfs, &kernel, &vm.busybox()?)?;
        let console = self.console.clone().unwrap_or_else(|| folder.path().join("console"));
        let errors = folder.path().join("qemu-stderr");
        let mut command = qemu.command();
        command.args(self.arguments(&kernel.image, &initramfs, &console)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let (started, reaper) = start(command)?;
        let logs = vec![errors, console.clone()];
        let channel = Arc::new(Channel::new(self.name.clone(), started.requests, logs, self.timeout));
        let threads =
            vec![reaper(Arc::clone(&channel)), channel::read_events(Arc::clone(&channel), started.events)];
        let mut guest = Guest {
            name: self.name,
            channel,
            pid: started.pid,
            pidfd: started.pidfd,
            threads,
            release: String::new(),
            console,
            _folder: folder,
        };
        guest.release = guest.channel.wait_ready()?;
        // It is in the guest's memory by now.
        fs::remove_file(initramfs)?;
        Ok(guest)
    }

    fn write_initramfs(&self, path: &Path, kernel: &Kernel, busybox: &Path) -> Result<()> {
        let programs = binaries::build_guest()?;
        let mut archive = Initramfs::base(path, programs.get("guest-runner")?, busybox, kernel)?;
        for (name, program) in programs.iter().filter(|(name, _)| *name != "guest-runner") {
            archive.copy(&format!("bin/{name}"), program)?;
        }
        for (place, file) in &self.ordinary {
            archive.folders_of(place)?;
            archive.copy(place, file)?;
        }
        for (place, contents) in &self.files {
            archive.file(place, 0o644, contents)?;
        }
        archive.finish()?;
        Ok(())
    }

    fn arguments(&self, kernel: &Path, initramfs: &Path, console: &Path) -> Result<Vec<OsString>> {
        let accelerator = accelerator();
        let memory = format!("{}M", self.memory_mib);
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        add(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        add(&["-run-with", "exit-with-parent=on"]);
        add(&["-accel", &accelerator, "-cpu", "max", "-smp", &self.cpus.to_string(), "-m", &memory]);
        // Guest memory has to be a file that the backend can map.
        add(&["-object", &format!("memory-backend-memfd,id=memory,size={memory},share=on")]);
        add(&["-machine", "q35,memory-backend=memory"]);
        add(&["-kernel", text(kernel)?, "-initrd", text(initramfs)?]);
        // A kernel patches its code as it boots, and QEMU without KVM may have another processor run what was there: so
        // the others are brought up by init.
        let late = if self.cpus > 1 { " maxcpus=1 tsc=reliable" } else { "" };
        add(&["-append", &format!("console=ttyS0 panic=-1 rdinit=/init{late}{}", self.parameters)]);
        add(&[
            "-chardev",
            &format!("file,id=console,path={}", option_value(console)?),
            "-serial",
            "chardev:console",
        ]);
        add(&["-chardev", "stdio,id=commands,signal=off", "-serial", "chardev:commands"]);
        if let Some(socket) = &self.gpu {
            add(&["-chardev", &format!("socket,id=gpu,path={}", option_value(socket)?)]);
            let device = format!(
                "vhost-user-test-device-pci,chardev=gpu,virtio-id={VIRTIO_ID_GPU},num_vqs={QUEUES},\
                 config_size={CONFIG_BYTES},vq_size={QUEUE_SIZE}"
            );
            add(&["-device", &device]);
        }
        Ok(arguments)
    }
}

impl Guest {
    /// Begins a guest; the name is for messages.
    #[must_use]
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            memory_mib: 512,
            cpus: 1,
            kernel: None,
            files: Vec::new(),
            ordinary: Vec::new(),
            gpu: None,
            parameters: String::new(),
            console: None,
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// As given to the builder.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process id on this host.
    #[must_use]
    pub fn qemu_pid(&self) -> u32 {
        self.pid
    }

    /// The kernel's release.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// All that the console has shown.
    ///
    /// # Errors
    /// Fails when the log cannot be read.
    pub fn console(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.console)?).into_owned())
    }

    /// Starts a process as user `uid` and returns when it runs.
    ///
    /// # Errors
    /// Fails when it does not start, or the guest does not answer.
    pub fn spawn(&self, uid: u32, command: impl Into<GuestCommand>) -> Result<Process> {
        Channel::spawn(&self.channel, uid, command.into())
    }

    /// Runs a process to its end.
    ///
    /// # Errors
    /// Fails when it does not start or end; an exit status other than 0 is no error.
    pub fn run(&self, uid: u32, command: impl Into<GuestCommand>) -> Result<Output> {
        self.spawn(uid, command)?.wait()
    }

    /// Runs a process to its end and returns what it wrote to standard output.
    ///
    /// # Errors
    /// Fails also when the process does; what it wrote is in the error.
    pub fn check(&self, uid: u32, command: impl Into<GuestCommand>) -> Result<String> {
        let command = command.into();
        let said = command.to_string();
        let output = self.run(uid, command)?;
        ensure!(output.code == Some(0), "guest {}: `{said}` failed: {output}", self.name);
        Ok(output.stdout)
    }

    /// Switches the guest off and waits for QEMU's end.
    ///
    /// # Errors
    /// Fails when the guest does not switch off in time, or QEMU reports a failure.
    pub fn power_off(self) -> Result<()> {
        self.channel.power_off()?;
        let status = self.channel.wait_exit()?;
        ensure!(status.success(), "guest {}: QEMU ended with {status}", self.name);
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It has ended already when this fails.
        pidfd_send_signal(&self.pidfd, Signal::KILL).ok();
        for thread in self.threads.drain(..) {
            // A panic there was printed; the guest is gone in any case.
            drop(thread.join());
        }
    }
}

/// What guests are accelerated by, as QEMU has it.
#[must_use]
pub fn accelerator() -> String {
    std::env::var(ACCELERATOR_VARIABLE).unwrap_or_else(|_| DEFAULT_ACCELERATOR.into())
}

struct Started {
    pid: u32,
    pidfd: OwnedFd,
    requests: ChildStdin,
    events: ChildStdout,
}

/// Starts QEMU on a thread that lives as long as QEMU: the kernel ties `exit-with-parent` to the thread that forked.
/// Returned is also what makes that thread go on to reap.
fn start(mut command: Command) -> Result<(Started, impl FnOnce(Arc<Channel>) -> JoinHandle<()>)> {
    let (started_sender, started) = mpsc::channel();
    let (channel_sender, channel) = mpsc::channel::<Arc<Channel>>();
    let thread = std::thread::spawn(move || {
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                return drop(started_sender.send(Err(anyhow!(error).context("QEMU does not start"))));
            }
        };
        let parts = take_parts(&mut child);
        let failed = parts.is_err();
        drop(started_sender.send(parts));
        let channel = channel.recv();
        if failed || channel.is_err() {
            // Nobody else can end it now; when it has ended by itself, that is as good.
            drop(child.kill());
        }
        let status = child.wait();
        if let Ok(channel) = channel {
            channel.on_exit(status);
        }
    });
    let parts = started.recv().context("the thread that starts QEMU has ended")??;
    let hand_over = move |channel| {
        // The thread waits for it.
        drop(channel_sender.send(channel));
        thread
    };
    Ok((parts, hand_over))
}

fn take_parts(child: &mut std::process::Child) -> Result<Started> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("QEMU has no process id")?;
    Ok(Started {
        pid: child.id(),
        pidfd: pidfd_open(pid, PidfdFlags::empty())?,
        requests: child.stdin.take().context("QEMU has no stdin")?,
        events: child.stdout.take().context("QEMU has no stdout")?,
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// In the value of an option of QEMU, a comma is written twice.
fn option_value(path: &Path) -> Result<String> {
    Ok(text(path)?.replace(',', ",,"))
}
