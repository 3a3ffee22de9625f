//! landlock: which files this thread, and all that it starts, may touch. Sockets can be made and removed below the
//! runtime folders, what a worker is loaded from can be read and executed, and there is nothing else.
//!
//! What landlock does not know (all kernels to 6.18): looking at a file (`stat`), and connecting to a socket by its path.

#![expect(unsafe_code, reason = "landlock has no safe wrapper")]

use super::{Measure, Profile};
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::{Mode, OFlags, open};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_SOCK: u64 = 1 << 9;
/// What takes making, replacing and removing a socket in a folder that is locked meanwhile.
const SOCKETS: u64 = READ_DIR | REMOVE_FILE | MAKE_SOCK;
/// Rights to files that version 1 knows; each later version in this list knows one more.
const FILE_RIGHTS: u32 = 13;
const FILE_RIGHTS_SINCE: [i64; 3] = [2, 3, 5];
/// `LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP`, and the version that knows them.
const NET_RIGHTS: (u64, i64) = (0b11, 4);
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL`, and the version that knows them.
const SCOPES: (u64, i64) = (0b11, 6);

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: u32 = 1;

/// `struct landlock_ruleset_attr`. The kernel takes a longer one than it knows if the rest is zero.
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scopes: u64,
}

/// Gives up all files but those of the profile.
pub fn restrict(profile: &Profile) -> [Measure; 2] {
    let (files, scopes) = ("files (landlock)", "others' processes (landlock)");
    let version = match version() {
        Ok(version) => version,
        Err(error) => {
            let lacking = |name| Measure::lacking(name, format!("the kernel has no landlock: {error}"));
            return [lacking(files), lacking(scopes)];
        }
    };
    if let Err(error) = enter(profile, version) {
        return [files, scopes].map(|name| Measure::lacking(name, error.to_string()));
    }
    let allowed = if profile.workers {
        "sockets below the runtime folders; reading and executing what svmd itself was loaded from"
    } else {
        "sockets below the runtime folders"
    };
    let files = Measure::in_force(files, format!("only {allowed} (version {version})"));
    let scopes = if version >= SCOPES.1 {
        Measure::in_force(scopes, "no signals, no abstract sockets".into())
    } else {
        Measure::lacking(scopes, format!("landlock version {version} has no scopes (Linux 6.12 has)"))
    };
    [files, scopes]
}

fn enter(profile: &Profile, version: i64) -> Result<()> {
    let later = FILE_RIGHTS_SINCE.iter().filter(|since| **since <= version).count();
    let known = FILE_RIGHTS.saturating_add(u32::try_from(later).unwrap_or(0));
    let ruleset = create(&Ruleset {
        files: 1u64.wrapping_shl(known).wrapping_sub(1),
        net: if version >= NET_RIGHTS.1 { NET_RIGHTS.0 } else { 0 },
        scopes: if version >= SCOPES.1 { SCOPES.0 } else { 0 },
    })?;
    for folder in &profile.folders {
        allow(&ruleset, folder, SOCKETS)?;
    }
    if profile.workers {
        allow_workers(&ruleset)?;
    }
    // SAFETY: takes a descriptor and flags, and no memory.
    let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    checked(done).map(drop)
}

/// What starting this program again takes. Libraries by folder, so that an upgrade of one does not end the making of
/// GPU VMs.
fn allow_workers(ruleset: &OwnedFd) -> Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    // By the link, which also leads to a program that was replaced meanwhile.
    allow(ruleset, Path::new("/proc/self/exe"), EXECUTE | READ_FILE)?;
    for folder in library_folders(&fs::read_to_string("/proc/self/maps")?, &program) {
        allow(ruleset, &folder, EXECUTE | READ_FILE)?;
    }
    allow(ruleset, Path::new("/etc/ld.so.cache"), READ_FILE)?;
    allow(ruleset, Path::new("/etc/ld.so.preload"), READ_FILE)?;
    // A worker's standard output.
    allow(ruleset, Path::new("/dev/null"), READ_FILE | WRITE_FILE)
}

/// Folders of the files, other than the program, whose code this process has mapped.
fn library_folders(maps: &str, program: &Path) -> BTreeSet<PathBuf> {
    let mapped = maps.lines().filter_map(|line| {
        let rights = line.split_ascii_whitespace().nth(1)?;
        let path = line.find('/').and_then(|start| line.get(start..)).map(Path::new)?;
        (rights.contains('x') && path != program).then_some(path)
    });
    mapped.filter_map(Path::parent).map(Path::to_owned).collect()
}

/// Nothing can be done with what is not there, so nothing needs to be allowed.
fn allow(ruleset: &OwnedFd, path: &Path, rights: u64) -> Result<()> {
    let place = match open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(place) => place,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(explained("find", path, error.into())),
    };
    // `struct landlock_path_beneath_attr` is packed.
    let mut rule = [0u8; size_of::<u64>() + size_of::<RawFd>()];
    let (first, second) = rule.split_at_mut(size_of::<u64>());
    first.copy_from_slice(&rights.to_ne_bytes());
    second.copy_from_slice(&place.as_raw_fd().to_ne_bytes());
    let (number, raw) = (libc::SYS_landlock_add_rule, ruleset.as_raw_fd());
    // SAFETY: the kernel reads the 12 bytes of a rule of this type, which is what `rule` has.
    let done = unsafe { libc::syscall(number, raw, PATH_BENEATH, rule.as_ptr(), 0u32) };
    checked(done).map(drop).map_err(|error| explained("allow", path, error))
}

fn explained(action: &str, path: &Path, error: Error) -> Error {
    Error::new(error.kind(), format!("cannot {action} {path:?}: {error}"))
}

fn version() -> Result<i64> {
    let (number, nothing) = (libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>());
    // SAFETY: asked for the version, the kernel takes no memory.
    checked(unsafe { libc::syscall(number, nothing, 0usize, VERSION) })
}

fn create(ruleset: &Ruleset) -> Result<OwnedFd> {
    let (number, pointer) = (libc::SYS_landlock_create_ruleset, std::ptr::from_ref(ruleset));
    // SAFETY: the kernel reads as many bytes as it is told, which are those of `ruleset`.
    let made = checked(unsafe { libc::syscall(number, pointer, size_of::<Ruleset>(), 0u32) })?;
    let raw = RawFd::try_from(made).map_err(|_| Error::from(ErrorKind::InvalidData))?;
    // SAFETY: the kernel has just made this descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn checked(result: i64) -> Result<i64> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_folder_and_the_program_is_none() {
        let maps = "55e0-55e1 r-xp 00000000 fe:00 42                  /opt/a b/svmd\n\
                    7f00-7f01 r--p 00000000 fe:00 43                  /usr/lib/locale/locale-archive\n\
                    7f01-7f02 r-xp 00000000 fe:00 44                  /usr/lib/x/libc.so.6\n\
                    7f02-7f03 r-xp 00000000 fe:00 45                  /usr/lib/x/ld.so\n\
                    7f03-7f04 r-xp 00000000 00:00 0                   [vdso]\n";
        let folders = library_folders(maps, Path::new("/opt/a b/svmd"));
        assert_eq!(folders, BTreeSet::from([PathBuf::from("/usr/lib/x")]));
    }
}
