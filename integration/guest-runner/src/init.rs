//! Pid 1: brings the guest up and down.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use guest_runner::MODULES;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::{RebootCommand, finit_module, reboot};

/// Argument that makes this program the server of the command channel.
pub const SERVE: &str = "serve";

/// File systems: type, place, mode of the place afterwards.
const MOUNTS: [(&str, &str, u32); 6] = [
    ("proc", "/proc", 0o555),
    ("sysfs", "/sys", 0o555),
    ("devtmpfs", "/dev", 0o755),
    ("tmpfs", "/dev/shm", 0o1777),
    ("tmpfs", "/run", 0o755),
    ("tmpfs", "/tmp", 0o1777),
];

/// Runs the guest from boot to power-off.
///
/// # Errors
/// Fails when it is not pid 1, or cannot switch off.
pub fn run() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("starts as the first process of a guest only"));
    }
    if let Err(error) = bring_up() {
        eprintln!("guest-runner: {error}");
    }
    rustix::fs::sync();
    Ok(reboot(RebootCommand::PowerOff)?)
}

fn bring_up() -> io::Result<()> {
    for (kind, place, mode) in MOUNTS {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None)?;
        if kind == "tmpfs" {
            fs::set_permissions(place, Permissions::from_mode(mode))?;
        }
    }
    load_modules()?;
    bring_up_processors()?;
    let server = Command::new("/init")
        .arg(SERVE)
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .spawn()?;
    let server = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if Some(pid) == server => {
                eprintln!("guest-runner: the command channel has ended ({status:?})");
                return Ok(());
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Those that the kernel was told to leave.
fn bring_up_processors() -> io::Result<()> {
    for entry in fs::read_dir("/sys/devices/system/cpu")? {
        let online = entry?.path().join("online");
        // The first has no such file, and of other things there it says something else.
        if online.parent().is_some_and(is_processor)
            && fs::read_to_string(&online).is_ok_and(|text| text == "0\n")
        {
            fs::write(&online, "1")?;
        }
    }
    Ok(())
}

/// Whether a folder is that of a processor: `cpu3`, not `cpufreq`.
fn is_processor(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix("cpu").is_some_and(|number| number.parse::<u32>().is_ok())
}

fn load_modules() -> io::Result<()> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(MODULES)? {
        paths.push(entry?.path());
    }
    paths.sort();
    for path in paths {
        let loaded = finit_module(File::open(&path)?, c"", 0);
        loaded
            .map_err(|errno| io::Error::other(format!("module {} does not load: {errno}", path.display())))?;
    }
    Ok(())
}
