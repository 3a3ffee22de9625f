//! Gets QEMU and its programs, guest kernels and valgrind from Debian's own package mirrors, without root, and keeps them
//! below `target/vm`.
//!
//! Each piece is a folder that appears by one rename when it is complete, with a stamp that names the recipe it was made
//! by; another recipe, or no stamp, makes it anew. Downloads happen in a staging folder that is emptied first, so nothing
//! partial ever counts. A file lock lets one process work while others wait.
//!
//! [`QEMU_VARIABLE`] names a QEMU to use instead, if it has the device.

pub mod mirror;

mod apt;
mod modules;
mod valgrind;
mod vhost_user_gpu;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

use crate::binaries;
use apt::Apt;
pub use valgrind::Valgrind;
pub use vhost_user_gpu::VhostUserGpu;

/// Names a `qemu-system-x86_64` to be used instead of the provisioned one.
pub const QEMU_VARIABLE: &str = "SVM_QEMU";

/// Raise it when the way a piece is made changes.
const RECIPE: &str = "svm-vm recipe 1\n";
const DEVICE: &str = "vhost-user-test-device-pci";
/// Parts of the packages that no guest needs.
const UNNEEDED: [&str; 10] = [
    "etc",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/bash-completion",
    "usr/share/doc",
    "usr/share/icons",
    "usr/share/initramfs-tools",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/perl5",
];

/// Writes a progress line to stderr, past the test harness' capture.
macro_rules! progress {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        // One write, so that lines of several threads stay whole. Progress that nobody can read is no reason to fail.
        std::io::stderr().write_all(format!("vm: {}\n", format_args!($($argument)*)).as_bytes()).ok();
    }};
}
pub(crate) use progress;

/// The store of pieces. Cheap to open; each method provisions what it returns.
#[derive(Debug)]
pub struct Vm {
    root: PathBuf,
    apt: OnceLock<Apt>,
}

/// A QEMU that runs on this host.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    arguments: Vec<PathBuf>,
    modules: Option<PathBuf>,
}

/// A guest kernel and the modules to load, in order.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bootable image.
    pub image: PathBuf,
    /// Uncompressed modules, in load order.
    pub modules: Vec<PathBuf>,
}

impl Vm {
    /// The store below the target folder of this build.
    ///
    /// # Errors
    /// Fails when the folder cannot be made.
    pub fn open() -> Result<Self> {
        Self::at(&binaries::target_folder()?.join("vm"))
    }

    /// The store at `root`.
    ///
    /// # Errors
    /// Fails when the folder cannot be made.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("folder {} cannot be made", root.display()))?;
        Ok(Self { root: root.to_owned(), apt: OnceLock::new() })
    }

    /// QEMU 11.1 with the generic vhost-user device, or the one that [`QEMU_VARIABLE`] names.
    ///
    /// # Errors
    /// Fails when it cannot be provisioned, or the named one lacks the device.
    pub fn qemu(&self) -> Result<Qemu> {
        if let Some(program) = std::env::var_os(QEMU_VARIABLE) {
            let qemu = Qemu { program: PathBuf::from(program), arguments: Vec::new(), modules: None };
            qemu.probe().with_context(|| format!("QEMU named by {QEMU_VARIABLE} is not usable"))?;
            return Ok(qemu);
        }
        let tree = self.obtain("qemu", |store, tree| {
            store.apt()?.fetch_with_dependencies(&["qemu-system-x86"])?.unpack(tree)?;
            prune(tree)?;
            Qemu::in_tree(tree).probe()
        })?;
        Ok(Qemu::in_tree(&tree))
    }

    /// Debian's unmodified cloud kernel with `uio_pci_generic`.
    ///
    /// # Errors
    /// Fails when it cannot be provisioned.
    pub fn cloud_kernel(&self) -> Result<Kernel> {
        self.kernel("linux-image-cloud-amd64", &["uio_pci_generic"])
    }

    /// Debian's unmodified generic kernel with the stock `virtio_gpu` driver.
    ///
    /// # Errors
    /// Fails when it cannot be provisioned.
    pub fn generic_kernel(&self) -> Result<Kernel> {
        self.kernel("linux-image-amd64", &["virtio_gpu"])
    }

    /// A statically linked busybox.
    ///
    /// # Errors
    /// Fails when it cannot be provisioned.
    pub fn busybox(&self) -> Result<PathBuf> {
        let folder = self.obtain("busybox", |store, folder| {
            let tree = tempfile::tempdir_in(store.staging())?;
            store.apt()?.fetch_alone(&["busybox-static"])?.unpack(tree.path())?;
            fs::rename(tree.path().join("usr/bin/busybox"), folder.join("busybox"))?;
            Ok(())
        })?;
        Ok(folder.join("busybox"))
    }

    fn kernel(&self, metapackage: &str, wanted: &[&str]) -> Result<Kernel> {
        let busybox = self.busybox()?;
        let folder = self.obtain(metapackage, |store, folder| {
            let package = store.apt()?.lookup_dependency(metapackage)?;
            let tree = tempfile::tempdir_in(store.staging())?;
            store.apt()?.fetch_alone(&[&package])?.unpack(tree.path())?;
            fs::rename(find_kernel_image(&tree.path().join("boot"))?, folder.join("vmlinuz"))?;
            let modules = modules::closure(&tree.path().join("usr/lib/modules"), wanted, &busybox)?;
            fs::create_dir(folder.join("modules"))?;
            for (position, module) in modules.iter().enumerate() {
                let name = format!("modules/{position:02}-{}.ko", module.name);
                fs::write(folder.join(name), &module.image)?;
            }
            Ok(())
        })?;
        let mut modules = Vec::new();
        for entry in fs::read_dir(folder.join("modules"))? {
            modules.push(entry?.path());
        }
        modules.sort();
        Ok(Kernel { image: folder.join("vmlinuz"), modules })
    }

    /// Returns the folder of a piece, making it first where it is missing or made by another recipe.
    fn obtain(&self, piece: &str, make: impl FnOnce(&Self, &Path) -> Result<()>) -> Result<PathBuf> {
        let folder = self.root.join(piece);
        if is_complete(&folder) {
            return Ok(folder);
        }
        let _lock = self.lock()?;
        if is_complete(&folder) {
            return Ok(folder);
        }
        let started = std::time::Instant::now();
        progress!("provisioning {piece} in {}", self.root.display());
        // Whatever stands in staging was left by a process that died: we hold the lock.
        remove_folder(&self.staging())?;
        remove_folder(&folder)?;
        let new = self.staging().join("piece");
        fs::create_dir_all(&new)?;
        make(self, &new).with_context(|| format!("{piece} cannot be provisioned"))?;
        fs::write(new.join("stamp"), RECIPE)?;
        fs::rename(&new, &folder)?;
        remove_folder(&self.staging())?;
        progress!("provisioned {piece} in {:.1} s", started.elapsed().as_secs_f64());
        Ok(folder)
    }

    /// Lists are fetched once per store, and only when something has to be made.
    fn apt(&self) -> Result<&Apt> {
        if let Some(apt) = self.apt.get() {
            return Ok(apt);
        }
        let apt = Apt::update(&self.root.join("apt"), &self.staging())?;
        Ok(self.apt.get_or_init(|| apt))
    }

    fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// Held until the file is dropped.
    fn lock(&self) -> Result<File> {
        let file = File::create(self.root.join("lock"))?;
        if file.try_lock().is_err() {
            progress!("waiting for another process that provisions {}", self.root.display());
            file.lock()?;
        }
        Ok(file)
    }
}

impl Qemu {
    fn in_tree(tree: &Path) -> Self {
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        let arguments = vec![
            "--library-path".into(),
            libraries.clone(),
            tree.join("usr/bin/qemu-system-x86_64"),
            "-L".into(),
            tree.join("usr/share/qemu"),
            "-L".into(),
            tree.join("usr/share/seabios"),
        ];
        let program = libraries.join("ld-linux-x86-64.so.2");
        Self { program, arguments, modules: Some(libraries.join("qemu")) }
    }

    /// A command that runs it; the caller adds QEMU's own arguments.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    /// Asks for the one device that is needed: a list of all may abort on modules of another QEMU.
    fn probe(&self) -> Result<()> {
        let text = apt::run(self.command().args(["-device", &format!("{DEVICE},help")]))?;
        ensure!(
            text.contains("virtio-id"),
            "this QEMU has no user-creatable {DEVICE}: version 11.1 or newer is needed"
        );
        Ok(())
    }
}

fn is_complete(folder: &Path) -> bool {
    fs::read_to_string(folder.join("stamp")).is_ok_and(|stamp| stamp == RECIPE)
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("folder {} cannot be removed", folder.display()))
        }
        _ => Ok(()),
    }
}

fn prune(tree: &Path) -> Result<()> {
    for part in UNNEEDED {
        remove_folder(&tree.join(part))?;
    }
    for entry in fs::read_dir(tree.join("usr/bin"))? {
        let entry = entry?;
        if entry.file_name() != "qemu-system-x86_64" {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn find_kernel_image(boot: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(boot)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("no kernel image in the package")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn piece_is_made_once_and_anew_when_its_stamp_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Vm::at(folder.path()).unwrap();
        let made = std::cell::Cell::new(0);
        let obtain = || {
            store.obtain("piece", |_, new| {
                made.set(made.get() + 1);
                Ok(fs::write(new.join("content"), "x")?)
            })
        };
        let piece = obtain().unwrap();
        obtain().unwrap();
        assert_eq!(made.get(), 1);
        fs::remove_file(piece.join("stamp")).unwrap();
        obtain().unwrap();
        assert_eq!(made.get(), 2);
    }

    #[test]
    fn piece_that_fails_half_way_does_not_count_as_done() {
        let folder = tempfile::tempdir().unwrap();
        let store = Vm::at(folder.path()).unwrap();
        let failed = store.obtain("piece", |_, new| {
            fs::write(new.join("half"), "x")?;
            anyhow::bail!("the network is down")
        });
        assert!(failed.is_err());
        assert!(!folder.path().join("piece").exists());
        let piece = store.obtain("piece", |_, _| Ok(())).unwrap();
        assert!(!piece.join("half").exists());
    }
}
