//! Real guests under QEMU, one at a time. What a test lacks is said on stderr and fails it.

mod crowd;
mod hostile;
mod killed_agent;
mod plain_pointers;

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use integration::demo::{Stage, VmmKind, show};
use integration::initramfs::FIRST_UID;
use integration::provision::{Kernel, Vm};
use integration::qemu::{Guest, ROOT};
use integration::story::Report;
use integration::svmd::{DeviceKind, Options, Svmd};
use serde_json::{Value, json};
use virtio_gpu_svm::protocol::{CAPSET_SVM, CAPSET_SVM_VERSION, SVM_MAGIC, SvmConfig, VERSION_MAJOR};
use zerocopy::FromBytes;

/// Guests take whole processors.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn qemu_boots_cloud_kernel() -> Result<()> {
    let _turn = one_at_a_time();
    let vm = Vm::open()?;
    let guest = Guest::builder("cloud").kernel(vm.cloud_kernel()?).boot(&vm)?;
    let release = guest.check(ROOT, "uname -r")?;
    ensure!(
        release.trim() == guest.release() && release.contains("-cloud-amd64"),
        "not the cloud kernel: {release}"
    );
    let modules = guest.check(ROOT, "lsmod")?;
    ensure!(modules.contains("uio_pci_generic"), "modules are not loaded: {modules}");
    guest.power_off()
}

#[test]
fn qemu_guest_runs_processes_side_by_side() -> Result<()> {
    let _turn = one_at_a_time();
    let vm = Vm::open()?;
    let guest = Guest::builder("many").boot(&vm)?;

    let users: Vec<u32> = (FIRST_UID..FIRST_UID + 8).collect();
    let mut echoes = Vec::new();
    for uid in &users {
        echoes.push(
            guest
                .spawn(*uid, ["sh", "-c", "id -u; id -G; while read -r line; do echo \"got $line\"; done"])?,
        );
    }
    let pids: HashSet<u32> = echoes.iter().map(|echo| echo.pid()).collect();
    ensure!(pids.len() == users.len(), "process ids are not distinct: {pids:?}");
    for (echo, uid) in echoes.iter_mut().zip(&users) {
        echo.write_line(&format!("ünï {uid}"))?;
        echo.wait_for_line(|line| (line == format!("got ünï {uid}")).then_some(()))?;
        echo.close_stdin()?;
        let output = echo.wait()?;
        ensure!(output.stdout == format!("{uid}\n{uid}\ngot ünï {uid}\n"), "user {uid}: {output}");
        ensure!(output.code == Some(0), "user {uid}: {output}");
    }

    let sleeper = guest.spawn(FIRST_UID, "sleep 1000")?;
    let output = guest.run(FIRST_UID, ["sh", "-c", "echo to the left; echo to the right >&2; exit 7"])?;
    ensure!(output.code == Some(7), "{output}");
    ensure!(output.stdout == "to the left\n" && output.stderr == "to the right\n", "{output}");
    sleeper.kill(9)?;
    ensure!(sleeper.wait()?.signal == Some(9), "the signal is not reported");
    // A descendant that keeps the pipes open delays nothing.
    let left_behind = guest.run(FIRST_UID, ["sh", "-c", "sleep 1000 & echo gone"])?;
    ensure!(left_behind.code == Some(0) && left_behind.stdout == "gone\n", "{left_behind}");
    let missing = guest.spawn(FIRST_UID, "no-such-program").map(|process| process.pid());
    ensure!(
        missing.is_err_and(|error| error.to_string().contains("no-such-program")),
        "a missing program started"
    );

    let numbers = guest.check(ROOT, "seq 1 20000")?;
    let expected: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    ensure!(numbers == expected, "{} bytes of output arrived, of {}", numbers.len(), expected.len());
    let bytes = guest.check(ROOT, ["printf", r"\376\377\0end"])?;
    ensure!(bytes == "\u{fffd}\u{fffd}\0end", "bytes that are not text: {bytes:?}");
    guest.power_off()
}

#[test]
fn qemu_canary_holds_free_memory() -> Result<()> {
    let _turn = one_at_a_time();
    let vm = Vm::open()?;
    let guest = Guest::builder("canary").memory(384).boot(&vm)?;
    let mut canary = guest.spawn(ROOT, "guest-canary")?;
    let filled = canary.ask("fill 64")?;
    let more = canary.ask("fill 16")?;
    let (filled, more) =
        (filled["bytes"].as_u64().context("bytes")?, more["bytes"].as_u64().context("bytes")?);
    ensure!(filled > 128 << 20 && more >= filled + (40 << 20), "filled {filled}, then {more}");
    let verified = canary.ask("verify")?;
    ensure!(verified["corrupt_bytes"] == 0 && verified["bytes"] == more, "{verified}");
    canary.close_stdin()?;
    ensure!(canary.wait()?.code == Some(0), "the canary failed");
    guest.power_off()
}

#[test]
fn qemu_ends_with_its_guest() -> Result<()> {
    let _turn = one_at_a_time();
    let vm = Vm::open()?;
    let guest = Guest::builder("dropped").boot(&vm)?;
    let process = guest.spawn(ROOT, "sleep 1000")?;
    let pid = guest.qemu_pid();
    drop(guest);
    ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "QEMU is still there");
    ensure!(process.wait().is_err(), "a process outlived its guest");
    Ok(())
}

#[test]
fn qemu_whose_fault_is_it() -> Result<()> {
    let _turn = one_at_a_time();
    let told = RefCell::new(String::new());
    let narrate = |line: &str| told.borrow_mut().extend([line, "\n"]);
    let stage =
        Stage { vmm: VmmKind::Qemu, device: DeviceKind::Soft, guests: 2, processes: 2, sabotage: None };
    let shown = show(stage, &narrate).and_then(|report| as_it_must_be(&report));
    shown.with_context(|| format!("-- the story so far --\n{}", told.borrow()))
}

#[test]
fn qemu_killed_agent_leaves_no_stray_write() -> Result<()> {
    let _turn = one_at_a_time();
    killed_agent::leaves_no_stray_write(&Vm::open()?)
}

#[test]
fn qemu_thousand_contexts_have_their_own_faults() -> Result<()> {
    let _turn = one_at_a_time();
    crowd::each_has_its_own_faults(&Vm::open()?)
}

#[test]
fn qemu_every_kind_of_memory_works_or_says_why_not() -> Result<()> {
    let _turn = one_at_a_time();
    plain_pointers::every_kind_of_memory(&Vm::open()?)
}

#[test]
fn qemu_processes_live_and_no_byte_is_stale() -> Result<()> {
    let _turn = one_at_a_time();
    plain_pointers::processes_live_and_no_byte_is_stale(&Vm::open()?)
}

#[test]
fn qemu_hostile_processes_reach_nothing_and_leave_nothing() -> Result<()> {
    let _turn = one_at_a_time();
    hostile::processes_reach_nothing_and_leave_nothing(&Vm::open()?)
}

fn as_it_must_be(report: &Report) -> Result<()> {
    ensure!(report.devices == 2 && report.peak_pending_vms == 8, "not all GPU VMs were pending: {report:?}");
    let faults = &report.faults;
    ensure!(faults.misrouted == 0 && faults.lost == 0 && report.data_mismatches == 0, "{report:?}");
    // The process that exits has a job in flight on each device, and one job touches what is not bound.
    ensure!(faults.dropped == 2 && faults.refused == 1 && faults.answered >= 8, "{report:?}");
    ensure!(report.holds(), "the ledgers do not agree: {report:?}");
    Ok(())
}

#[test]
fn qemu_stock_virtio_gpu_driver_lists_our_capset() -> Result<()> {
    let _turn = one_at_a_time();
    let vm = Vm::open()?;
    let kernel = vm.generic_kernel()?;
    let svmd = Svmd::launch(&Options::default())?;
    let looked = look_through_stock_driver(&vm, kernel, &svmd);
    looked.with_context(|| format!("-- svmd's log --\n{}", svmd.log()))
}

fn look_through_stock_driver(vm: &Vm, kernel: Kernel, svmd: &Svmd) -> Result<()> {
    let guest = Guest::builder("stock").kernel(kernel).vhost_user_gpu(svmd.socket("vm0")).boot(vm)?;
    let listed = format!(
        "[drm] cap set 0: id {CAPSET_SVM}, max-version {CAPSET_SVM_VERSION}, max-size {}",
        size_of::<SvmConfig>()
    );
    let log = guest.check(ROOT, "dmesg")?;
    ensure!(log.contains(&listed), "the driver does not say `{listed}`:\n{log}");

    // What udev does for the users of a desktop.
    guest.check(ROOT, "chmod 0666 /dev/dri/renderD128")?;
    let arguments = format!("guest-drm /dev/dri/renderD128 {CAPSET_SVM} {}", size_of::<SvmConfig>());
    let seen: Value = serde_json::from_str(&guest.check(FIRST_UID, arguments.as_str())?)?;
    let expected = json!({
        "3d_features": 1, "resource_blob": 1, "context_init": 1, "supported_capset_ids": 1u32 << CAPSET_SVM
    });
    ensure!(seen["parameters"] == expected, "{seen}");
    let bytes = from_hex(seen["capset"].as_str().context("capset")?)?;
    let capset = SvmConfig::read_from_bytes(&bytes).ok().context("the capset has another size")?;
    ensure!(capset.magic.get() == SVM_MAGIC && capset.version_major.get() == VERSION_MAJOR, "{capset:?}");
    ensure!(capset.num_devices.get() == 2, "{capset:?}");

    // Contexts and resources come and go with the process; the driver logs each command that the device refuses.
    let log = guest.check(ROOT, "dmesg")?;
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("*ERROR* response")).collect();
    ensure!(refused.is_empty(), "{refused:?}");
    guest.power_off()
}

fn from_hex(text: &str) -> Result<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?)).collect()
}
