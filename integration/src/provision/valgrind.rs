//! valgrind: the machine's own, else Debian's, unpacked and run where it lies.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::{Vm, apt};

const PROGRAM: &str = "valgrind";

/// A valgrind that runs on this host.
#[derive(Clone, Debug)]
pub struct Valgrind {
    program: PathBuf,
    /// Where its tools are, unless it knows.
    library: Option<PathBuf>,
}

impl Vm {
    /// The valgrind of this machine, or one that is fetched.
    ///
    /// # Errors
    /// Fails when there is none and none can be provisioned.
    pub fn valgrind(&self) -> Result<Valgrind> {
        let installed = Valgrind { program: PROGRAM.into(), library: None };
        if apt::in_path(PROGRAM) && installed.probe().is_ok() {
            return Ok(installed);
        }
        let in_tree = |tree: &Path| Valgrind {
            // Past the package's script, which names the installed place.
            program: tree.join("usr/bin/valgrind.bin"),
            library: Some(tree.join("usr/libexec/valgrind")),
        };
        let tree = self.obtain(PROGRAM, |store, tree| {
            // Alone: its tools are static, and its launcher takes this machine's libc. That libc's symbols
            // (libc6-dbg) are what checks of memory need; who counts instructions names no symbol.
            store.apt()?.fetch_alone(&[PROGRAM])?.unpack(tree)?;
            in_tree(tree).probe()
        })?;
        Ok(in_tree(&tree))
    }
}

impl Valgrind {
    /// A command that runs it; the caller adds a tool and a program.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(library) = &self.library {
            command.env("VALGRIND_LIB", library);
        }
        command
    }

    /// What it says that it is.
    ///
    /// # Errors
    /// Fails when it does not run.
    pub fn version(&self) -> Result<String> {
        Ok(apt::run(self.command().arg("--version"))?.trim().to_owned())
    }

    /// Whether it runs a program to its end.
    fn probe(&self) -> Result<()> {
        let version = self.version()?;
        ensure!(version.starts_with("valgrind-"), "{version:?} is no version of valgrind");
        apt::run(self.command().args(["--tool=none", "true"])).map(drop)
    }
}
