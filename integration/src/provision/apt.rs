//! A private apt: downloads packages of a fixed Debian release into our own folder, whatever the host's release, without
//! root and without touching the host's package database.
//!
//! apt sees an empty database of installed packages, so it resolves all dependencies. The host's `Acquire` settings
//! (proxy, certificates, retries, date checks) are kept; its hooks and other index targets are not.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::mirror::Mirror;
use super::progress;

/// Release of guest kernels and libraries.
const RELEASE: &str = "trixie";
/// Where QEMU comes from: the release's own does not have the device.
const BACKPORTS: &str = "trixie-backports";

const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Says what is missing, before anything is tried.
const TOOLS: [(&str, &str); 4] =
    [("apt-get", "apt"), ("apt-cache", "apt"), ("apt-config", "apt"), ("dpkg-deb", "dpkg")];

/// A folder with apt's state, its package lists up to date.
#[derive(Debug)]
pub struct Apt {
    config: PathBuf,
    staging: PathBuf,
}

/// Downloaded packages, in a folder of their own: an apt-get whose parent was killed goes on for a while, and must not
/// add its packages to those of another.
#[derive(Debug)]
pub struct Packages(TempDir);

impl Apt {
    /// Prepares `folder` and fetches the package lists. Packages will go to `staging`.
    ///
    /// # Errors
    /// Fails when a tool, the keyring or the mirror is missing; the text says what to install or do.
    pub fn update(folder: &Path, staging: &Path) -> Result<Self> {
        for (tool, package) in TOOLS {
            ensure!(
                in_path(tool),
                "{tool} is missing: install the package {package} (provisioning of QEMU needs a Debian-like host), or \
                 set {} to a QEMU that has vhost-user-test-device-pci",
                super::QEMU_VARIABLE
            );
        }
        let apt = Self { config: folder.join("apt.conf"), staging: staging.to_owned() };
        for part in ["lists/partial", "state", "cache"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let mirror = Mirror::of_this_host()?;
        progress!("fetching package lists of {RELEASE} and {BACKPORTS}");
        fs::write(folder.join("status"), "")?;
        fs::write(folder.join("sources.list"), source_lines(&mirror))?;
        fs::write(&apt.config, configuration(folder)?)?;
        let mut command = apt.command("apt-get");
        command.args(["update", "-q", "--error-on=any"]);
        run(&mut command).with_context(|| {
            format!(
                "package lists of {RELEASE} and {BACKPORTS} cannot be fetched from {}: is the network up? \
                 {} names another mirror",
                mirror.uri,
                super::mirror::MIRROR_VARIABLE
            )
        })?;
        Ok(apt)
    }

    /// Downloads the packages, from backports where they are, and all that they depend on.
    ///
    /// # Errors
    /// Fails when apt does; its own words are in the error.
    pub fn fetch_with_dependencies(&self, packages: &[&str]) -> Result<Packages> {
        let folder = self.folder()?;
        let mut command = self.command("apt-get");
        command.arg("-o").arg(archives_option(folder.path()));
        command.args(["install", "-q", "-y", "--download-only", "--no-install-recommends", "-t", BACKPORTS]);
        command.args(packages);
        fetch(command, packages, folder)
    }

    /// Downloads the release's version of the packages alone.
    ///
    /// # Errors
    /// Fails when apt does; its own words are in the error.
    pub fn fetch_alone(&self, packages: &[&str]) -> Result<Packages> {
        let folder = self.folder()?;
        let mut command = self.command("apt-get");
        command.args(["download", "-q"]).current_dir(folder.path());
        command.args(packages.iter().map(|package| format!("{package}/{RELEASE}")));
        fetch(command, packages, folder)
    }

    /// What a metapackage of the release stands for: the first package that it depends on.
    ///
    /// # Errors
    /// Fails when the release has no such package.
    pub fn lookup_dependency(&self, metapackage: &str) -> Result<String> {
        let mut command = self.command("apt-cache");
        command.args(["depends", &format!("{metapackage}/{RELEASE}")]);
        let text = run(&mut command)?;
        let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        name.map(str::to_owned)
            .with_context(|| format!("package {metapackage} of {RELEASE} depends on nothing"))
    }

    fn folder(&self) -> Result<TempDir> {
        let folder = tempfile::Builder::new().prefix("packages-").tempdir_in(&self.staging)?;
        fs::create_dir(folder.path().join("partial"))?;
        Ok(folder)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

impl Packages {
    /// Unpacks them below `root`, deleting each when it is done, so that not everything takes room twice.
    ///
    /// # Errors
    /// Fails when a package does not unpack, for example because the disk is full.
    pub fn unpack(self, root: &Path) -> Result<()> {
        for package in self.files()? {
            run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(root))
                .with_context(|| format!("{} does not unpack", package.display()))?;
            fs::remove_file(package)?;
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(self.0.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                files.push(path);
            }
        }
        Ok(files)
    }
}

fn fetch(mut command: Command, packages: &[&str], folder: TempDir) -> Result<Packages> {
    let name = packages.join(", ");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("apt-get has no stdout")?;
    let lines = lines_of(stdout);
    let mut total = packages.len().to_string();
    let mut fetched = 0u32;
    let mut next_report = Instant::now() + PROGRESS_INTERVAL;
    loop {
        match lines.recv_timeout(next_report.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some((_, count)) = line.split_once(" upgraded, ") {
                    total = count.split(' ').next().unwrap_or_default().to_owned();
                }
                fetched += u32::from(line.starts_with("Get:"));
            }
            Err(RecvTimeoutError::Timeout) => {
                let megabytes = size_of_files(folder.path()) / 1_000_000;
                progress!("fetching {name} ... {fetched}/{total} packages, {megabytes} MB");
                next_report = Instant::now() + PROGRESS_INTERVAL;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "apt-get could not fetch {name} ({}): {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let megabytes = size_of_files(folder.path()) / 1_000_000;
    let packages = Packages(folder);
    progress!("fetched {name}: {} packages, {megabytes} MB", packages.files()?.len());
    Ok(packages)
}

/// Runs a command to its end and returns what it wrote to stdout.
///
/// # Errors
/// Fails with what the command wrote to stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("{command:?} does not start"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("{:?} failed ({}): {}", command.get_program(), output.status, words.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program can be called by its name.
pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Lines as they come; the receiver can do other things meanwhile.
fn lines_of(source: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(source).lines().map_while(io::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// With what is still being fetched, in `partial`.
fn size_of_files(folder: &Path) -> u64 {
    let files = [folder.to_owned(), folder.join("partial")];
    let entries = files.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|meta| meta.len())
        .sum()
}

fn archives_option(folder: &Path) -> String {
    format!("Dir::Cache::archives={}", folder.display())
}

fn source_lines(mirror: &Mirror) -> String {
    let options = format!("[arch=amd64 signed-by={}]", mirror.keyring.display());
    format!("deb {options} {0} {RELEASE} main\ndeb {options} {0} {BACKPORTS} main\n", mirror.uri)
}

fn configuration(folder: &Path) -> Result<String> {
    let at = |part: &str| folder.join(part).display().to_string();
    let mut text = String::new();
    let mut set = |key: &str, value: &str| text.push_str(&format!("{key} \"{value}\";\n"));
    set("Dir::State", &at("state"));
    set("Dir::State::status", &at("status"));
    set("Dir::State::lists", &at("lists"));
    set("Dir::Cache", &at("cache"));
    // Two parsed copies of the lists, 88 MB; parsing them again takes a second.
    set("Dir::Cache::pkgcache", "");
    set("Dir::Cache::srcpkgcache", "");
    set("Dir::Etc::sourcelist", &at("sources.list"));
    for part in ["main", "parts", "sourceparts", "preferences", "preferencesparts"] {
        set(&format!("Dir::Etc::{part}"), "/dev/null");
    }
    set("APT::Architecture", "amd64");
    set("APT::Architectures", "amd64");
    set("APT::Sandbox::User", "");
    // Our own lock guards all of it.
    set("Debug::NoLocking", "1");
    // The defaults wait for minutes where there is no network.
    set("Acquire::Retries", "2");
    set("Acquire::http::Timeout", "20");
    set("Acquire::https::Timeout", "20");
    let host = run(Command::new("apt-config").arg("dump"))?;
    let skipped = ["Acquire::IndexTargets", "Acquire::Changelogs", "Acquire::Languages"];
    for line in host.lines() {
        if line.starts_with("Acquire::") && !skipped.iter().any(|prefix| line.starts_with(prefix)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    text.push_str("Acquire::Languages \"none\";\n");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_name_both_suites_with_the_keyring() {
        let mirror = Mirror { uri: "http://mirror.test/debian".into(), keyring: "/k.gpg".into() };
        let expected = "deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian trixie main\n\
                        deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian trixie-backports main\n";
        assert_eq!(source_lines(&mirror), expected);
    }
}
