//! QEMU's `vhost-user-gpu`: a 2D virtio-gpu device in a process of its own, which benches drive beside ours.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Vm, apt};

/// The package that has it, and those of the libraries that it asks for, one by one: with all that the package depends
/// on it would be 646 MB.
const PACKAGES: [&str; 20] = [
    "qemu-system-gui",
    "libatomic1",
    "libc6",
    "libdrm2",
    "libepoxy0",
    "libexpat1",
    "libgbm1",
    "libglib2.0-0t64",
    "libnuma1",
    "libpcre2-8-0",
    "libpixman-1-0",
    "libva-drm2",
    "libva2",
    "libvirglrenderer1",
    "libvulkan1",
    "libx11-6",
    "libxau6",
    "libxcb1",
    "libxdmcp6",
    "zlib1g",
];

/// QEMU's program, run where it was unpacked.
#[derive(Clone, Debug)]
pub struct VhostUserGpu {
    tree: PathBuf,
}

impl Vm {
    /// QEMU's `vhost-user-gpu` of the release.
    ///
    /// # Errors
    /// Fails when it cannot be provisioned.
    pub fn vhost_user_gpu(&self) -> Result<VhostUserGpu> {
        let tree = self.obtain("vhost-user-gpu", |store, tree| {
            store.apt()?.fetch_alone(&PACKAGES)?.unpack(tree)?;
            VhostUserGpu { tree: tree.to_owned() }.probe()
        })?;
        Ok(VhostUserGpu { tree })
    }
}

impl VhostUserGpu {
    /// A command that runs it; the caller adds its own arguments.
    #[must_use]
    pub fn command(&self) -> Command {
        let libraries = self.tree.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(self.program());
        command
    }

    fn program(&self) -> PathBuf {
        self.tree.join("usr/lib/qemu/vhost-user-gpu")
    }

    fn probe(&self) -> Result<()> {
        let text = apt::run(self.command().arg("--help")).context("a library of it is missing")?;
        ensure!(text.contains("--socket-path"), "{} takes no socket", self.program().display());
        Ok(())
    }
}
