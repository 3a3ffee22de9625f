//! Real guests under QEMU, one at a time. What a test lacks is said on stderr and fails it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use integration::provision::Vm;
use integration::qemu::{Guest, ROOT};

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
