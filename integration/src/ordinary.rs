//! Programs as users have them: compiled from C by this host's compiler, dynamically linked, with the C library, the
//! loader and whatever else they need, and `svm-agent run` to start them. For this host as they are; for a guest, whose
//! file system has none of it, as a list of files.

use crate::binaries::{Binaries, build_host};
use crate::provision::Vm;
use crate::qemu::channel::Process;
use crate::qemu::{Builder, Guest, ROOT};
use crate::story::qemu::wait_for_agent;
use crate::svmd::{Options, Svmd};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Where programs and our own libraries are in a guest.
const BIN: &str = "/bin";
/// For programs that are not started by `svm-agent run`.
const LIB: &str = "/lib";

/// Our libraries, as they are built and as they are installed.
const LIBRARIES: [(&str, &str); 2] =
    [("libsvm_alloc.so", "libsvm_alloc.so"), ("libgpusvm.so", "libgpusvm.so.0")];

/// Ordinary programs, and what they need.
pub struct Ordinary {
    folder: TempDir,
    /// Place in a guest, file here.
    files: BTreeMap<String, PathBuf>,
}

impl Ordinary {
    /// Begins with our shared libraries.
    ///
    /// # Errors
    /// They were not built, or `strip` is missing.
    pub fn new(programs: &Binaries) -> Result<Self> {
        let folder = open_folder()?;
        let mut ordinary = Self { folder, files: BTreeMap::new() };
        for (name, installed) in LIBRARIES {
            let stripped = ordinary.folder.path().join(installed);
            strip(programs.get(name)?, &stripped)?;
            ordinary.add(&format!("{LIB}/{installed}"), stripped)?;
        }
        Ok(ordinary)
    }

    /// Compiles a shared library `libNAME.so` of a file of C, for programs that load it or have it among their sources.
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub fn library(&mut self, name: &str, source: &Path) -> Result<PathBuf> {
        let file = format!("lib{name}.so");
        let library = self.folder.path().join(&file);
        let mut compiler = compiler();
        compiler.args(["-shared", "-fPIC", &format!("-Wl,-soname,{file}"), "-o"]).arg(&library).arg(source);
        run(&mut compiler)?;
        self.add(&format!("{LIB}/{file}"), library.clone())?;
        Ok(library)
    }

    /// Compiles a program of files of C, with the client library; it is called as the first of them.
    ///
    /// # Errors
    /// It does not compile, or there is no C compiler.
    pub fn compile(&mut self, sources: &[PathBuf]) -> Result<()> {
        let name = sources.first().and_then(|source| source.file_stem()?.to_str()).context("no source")?;
        let program = self.folder.path().join(name);
        let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-agent/c/include");
        let mut compiler = compiler();
        compiler
            .arg("-o")
            .arg(&program)
            .args(sources)
            .arg("-I")
            .arg(headers)
            .arg("-L")
            .arg(self.folder.path());
        // Not of those that do not use it.
        compiler
            .args(["-Wl,--as-needed", "-l:libgpusvm.so.0"])
            .arg(format!("-Wl,-rpath,{}", self.folder.path().display()));
        run(&mut compiler)?;
        self.add(&format!("{BIN}/{name}"), program)
    }

    /// Adds a program that cargo has built.
    ///
    /// # Errors
    /// `strip` or the loader is missing.
    pub fn program(&mut self, built: &Path) -> Result<()> {
        let name = built.file_name().and_then(|name| name.to_str()).context("a program without a name")?;
        let stripped = self.folder.path().join(name);
        strip(built, &stripped)?;
        self.add(&format!("{BIN}/{name}"), stripped)
    }

    /// The allocator library, for this host.
    pub fn allocator(&self) -> PathBuf {
        self.folder.path().join("libsvm_alloc.so")
    }

    /// Where the programs are on this host; other users may look into it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Everything by its place in a guest.
    pub fn files(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.files.iter().map(|(place, file)| (place.as_str(), file.as_path()))
    }

    /// A file with all that the loader loads for it.
    fn add(&mut self, place: &str, file: PathBuf) -> Result<()> {
        let mut command = Command::new(loader()?);
        command.arg("--list").arg(&file);
        let listed = run(&mut command)?;
        for library in listed.lines().filter_map(library_of) {
            // Ours have their own place.
            if !library.starts_with(self.folder.path()) {
                self.files.insert(library.to_str().context("not UTF-8")?.to_owned(), library);
            }
        }
        self.files.insert(place.to_owned(), file);
        Ok(())
    }
}

/// A guest with a daemon and an agent of its own, and ordinary programs.
pub struct Scene {
    /// The daemon, with two devices.
    pub svmd: Svmd,
    /// The guest.
    pub guest: Guest,
    /// The agent, started by root. Killed with the guest.
    pub agent: Process,
}

/// Longest wait for a guest whose programs do what they do and end.
pub const TIMEOUT: Duration = Duration::from_secs(240);

impl Scene {
    /// Compiles a program of `integration/programs`, boots the guest and waits until its agent serves.
    ///
    /// # Errors
    /// One of that fails.
    pub fn set(vm: &Vm, program: &str) -> Result<Self> {
        Self::build(vm, program, &of_one(program)?, |guest| guest)
    }

    /// As [`Self::set`], with these programs and an agent that trusts the processes of a user.
    ///
    /// # Errors
    /// As there.
    pub fn trusting(vm: &Vm, name: &str, programs: &Ordinary, uid: u32, timeout: Duration) -> Result<Self> {
        let trust = format!("trusted_uids = [{uid}]\n");
        Self::build(vm, name, programs, |guest| guest.timeout(timeout).file(TRUST, trust))
    }

    /// As [`Self::set`], with these programs. `before` is called while the guest has no agent.
    ///
    /// # Errors
    /// As there, and what `before` says.
    pub fn of<T>(
        vm: &Vm,
        name: &str,
        programs: &Ordinary,
        before: impl FnOnce(&Guest) -> Result<T>,
    ) -> Result<(Self, T)> {
        let (svmd, guest) = boot(vm, name, programs, |guest| guest)?;
        let found = before(&guest)?;
        Ok((Self::serve(svmd, guest)?, found))
    }

    fn build(
        vm: &Vm,
        name: &str,
        programs: &Ordinary,
        change: impl FnOnce(Builder) -> Builder,
    ) -> Result<Self> {
        let (svmd, guest) = boot(vm, name, programs, change)?;
        Self::serve(svmd, guest)
    }

    fn serve(svmd: Svmd, guest: Guest) -> Result<Self> {
        let agent = guest.spawn(ROOT, "svm-agent serve")?;
        wait_for_agent(&guest, &agent)?;
        Ok(Self { svmd, guest, agent })
    }
}

/// Where the agent reads whom it trusts.
const TRUST: &str = "/etc/svm-agent.toml";
/// Memory and processors of a scene's guest.
pub const SCENE: (u32, u32) = (1024, 2);

fn boot(
    vm: &Vm,
    name: &str,
    programs: &Ordinary,
    change: impl FnOnce(Builder) -> Builder,
) -> Result<(Svmd, Guest)> {
    let svmd = Svmd::launch(&Options::default())?;
    let (mib, cpus) = SCENE;
    let builder = Guest::builder(name).memory(mib).smp(cpus).timeout(TIMEOUT).ordinary(programs);
    let guest = change(builder).vhost_user_gpu(svmd.socket("vm0")).boot(vm)?;
    Ok((svmd, guest))
}

/// One program of `integration/programs`.
///
/// # Errors
/// It does not compile.
pub fn of_one(program: &str) -> Result<Ordinary> {
    let mut programs = Ordinary::new(&build_host(&[])?)?;
    programs.compile(&sources(program))?;
    Ok(programs)
}

/// Of a program of `integration/programs` that uses a device.
pub fn sources(program: &str) -> [PathBuf; 2] {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    [folder.join(format!("{program}.c")), folder.join("gpu.c")]
}

/// Of one that uses none.
pub fn source(program: &str) -> [PathBuf; 1] {
    let [source, _] = sources(program);
    [source]
}

/// A folder that processes of other users can enter.
///
/// # Errors
/// It cannot be made.
pub fn open_folder() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    Ok(folder)
}

/// The file in a line of the loader's list: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f12)`, or
/// `/lib64/ld-linux-x86-64.so.2 (0x7f34)`. The kernel's own has none.
fn library_of(line: &str) -> Option<PathBuf> {
    let (before, _address) = line.trim().rsplit_once(" (")?;
    let file = before.rsplit_once(" => ").map_or(before, |(_, file)| file);
    file.starts_with('/').then(|| file.into())
}

/// The loader of this host's programs.
fn loader() -> Result<&'static Path> {
    let known = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-x86-64.so.2"].map(Path::new);
    known.into_iter().find(|path| path.exists()).context("this host has no loader of the GNU C library")
}

/// With which warnings are errors.
fn compiler() -> Command {
    let mut compiler = Command::new("cc");
    compiler.args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]);
    compiler
}

/// What debuggers need is most of a file, and a guest has all of it in its memory.
fn strip(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(from)).map(drop)
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{program} is missing: install a C compiler and its tools (Debian: gcc libc6-dev)")
        }
        output => output.with_context(|| format!("{program} does not start"))?,
    };
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} fails ({}): {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_loaders_list() {
        let libc = "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2400000000)";
        assert_eq!(library_of(libc), Some("/lib/x86_64-linux-gnu/libc.so.6".into()));
        let loader = "\t/lib64/ld-linux-x86-64.so.2 (0x00007f2400200000)";
        assert_eq!(library_of(loader), Some("/lib64/ld-linux-x86-64.so.2".into()));
        for none in
            ["\tlinux-vdso.so.1 (0x00007ffd00000000)", "\tlibsvm.so => not found", "\tstatically linked", ""]
        {
            assert_eq!(library_of(none), None, "{none}");
        }
    }
}
