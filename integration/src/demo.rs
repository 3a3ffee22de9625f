//! `cargo demo`: sets the stage for the story on the kind of guests that was asked for, and tells it.

use crate::binaries;
use crate::frontend::Profile;
use crate::frontend::ram::{GuestRam, Layout};
use crate::frontend::vmm::Vmm;
use crate::ordinary::{Ordinary, open_folder};
use crate::provision::{Vm, progress};
use crate::story::host::{HostMachine, Programs};
use crate::story::qemu::QemuMachine;
use crate::story::{Machine, Plan, Report, Story};
use crate::svmd::{DeviceKind, Options, Svmd};
use anyhow::{Context, Result};
use std::path::Path;

/// Host devices of the story.
const DEVICES: usize = 2;
/// The small C program of the third act, from this package's folder.
const LIST: &str = "../guest-agent/c/examples/list.c";
/// Guest memory of a guest without QEMU.
const RAM_BYTES: u64 = 64 << 20;

/// How guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum VmmKind {
    /// Virtual machines under QEMU, with Debian's unmodified cloud kernel
    Qemu,
    /// No CPU: real sockets, rings, memory and processes, but no guest kernel
    Inproc,
    /// As inproc, but every doorbell and interrupt goes through a vCPU (needs /dev/kvm)
    Kvm,
}

/// What may be broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sabotage {
    /// Route the faults of two contexts to each other
    SwapAsid,
}

/// What the demo is to show.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// How guests run.
    pub vmm: VmmKind,
    /// Guests.
    pub guests: usize,
    /// Processes of each.
    pub processes: usize,
    /// What executes the jobs.
    pub device: DeviceKind,
    /// What is broken on purpose.
    pub sabotage: Option<Sabotage>,
}

impl VmmKind {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Inproc => "inproc",
            Self::Kvm => "kvm",
        }
    }
}

/// Builds what is needed, starts a daemon and guests, and tells the story.
///
/// # Errors
/// The stage cannot be set, or a step of the story cannot be made.
pub fn show(stage: Stage, narrate: &dyn Fn(&str)) -> Result<Report> {
    let features: &[&str] = if stage.sabotage.is_some() { &["daemon/sabotage"] } else { &[] };
    let programs = binaries::build_host(features)?;
    let vm = match stage.vmm {
        VmmKind::Qemu => Some(provision()?),
        VmmKind::Inproc | VmmKind::Kvm => None,
    };
    let names: Vec<String> = (1..=stage.guests).map(|n| format!("guest{n}")).collect();
    let folder = open_folder()?;
    let mut options =
        Options { guests: names.clone(), devices: DEVICES, kind: stage.device, ..Options::default() };
    if let Some(Sabotage::SwapAsid) = stage.sabotage {
        options.arguments = vec!["--sabotage".into(), "swap-asid".into()];
    }
    let daemon = Svmd::start(programs.get("svmd")?, folder.path(), &options)?;
    let mut ordinary = Ordinary::new(&programs)?;
    ordinary.compile(&[Path::new(env!("CARGO_MANIFEST_DIR")).join(LIST)])?;
    let machines = match &vm {
        Some(vm) => boot_all(vm, &names, &daemon, &ordinary)?,
        None => {
            let programs = Programs::of(&programs, &ordinary)?;
            start_all(stage.vmm, &names, &daemon, &programs, folder.path())?
        }
    };
    let plan = Plan {
        vmm: stage.vmm.name(),
        processes: stage.processes,
        devices: DEVICES,
        sabotaged: stage.sabotage.is_some(),
    };
    let report = Story::new(plan, &daemon, &machines, narrate).tell()?;
    drop(machines);
    daemon.stop()?;
    Ok(report)
}

/// Guests without QEMU.
fn start_all(
    vmm: VmmKind,
    names: &[String],
    daemon: &Svmd,
    programs: &Programs,
    folder: &Path,
) -> Result<Vec<Box<dyn Machine>>> {
    let host = |name: &String| {
        let ram = GuestRam::new(Layout::Flat { bytes: RAM_BYTES }, 1)?;
        let socket = daemon.socket(name);
        let vmm = match vmm {
            VmmKind::Kvm => Vmm::with_vcpu(&socket, &ram, Profile::Qemu)?,
            VmmKind::Inproc | VmmKind::Qemu => Vmm::without_cpu(&socket, &ram, Profile::CloudHypervisor)?,
        };
        let machine = HostMachine::start(name, vmm, folder, programs.clone())?;
        Ok(Box::new(machine) as Box<dyn Machine>)
    };
    names.iter().map(host).collect()
}

/// All that QEMU guests are made of, before anything is started.
fn provision() -> Result<Vm> {
    let obtain = || {
        let vm = Vm::open()?;
        vm.qemu()?;
        vm.cloud_kernel()?;
        binaries::build_guest()?;
        anyhow::Ok(vm)
    };
    obtain().context("QEMU guests cannot be had here (`--vmm inproc` shows the same story without them)")
}

/// Boots all guests at the same time.
fn boot_all(vm: &Vm, names: &[String], daemon: &Svmd, programs: &Ordinary) -> Result<Vec<Box<dyn Machine>>> {
    progress!("booting {} guests", names.len());
    std::thread::scope(|scope| {
        let boot = |name: &String| {
            let (name, socket) = (name.clone(), daemon.socket(name));
            scope.spawn(move || QemuMachine::boot(vm, &name, &socket, programs))
        };
        let booting: Vec<_> = names.iter().map(boot).collect();
        let join = |handle: std::thread::ScopedJoinHandle<'_, Result<QemuMachine>>| {
            let booted = handle.join().ok().context("a boot panicked")??;
            Ok(Box::new(booted) as Box<dyn Machine>)
        };
        booting.into_iter().map(join).collect()
    })
}
