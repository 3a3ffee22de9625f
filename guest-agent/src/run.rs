//! `svm-agent run`: executes a program with libsvm_alloc.so before its C library.
//!
//! Everything that would make the loader ignore the library is found before, because the loader says nothing then: a
//! static program, one with other rights than its caller, one for another machine.

use crate::complain;
use clap::Args;
use guest_agent::client::SOCKET_VARIABLE;
use rustix::process::{getegid, geteuid};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// As shells have it.
const EXIT_CANNOT: u8 = 126;
const EXIT_ABSENT: u8 = 127;

const LIBRARY: &str = "libsvm_alloc.so";
/// Where loaders look by themselves.
const LOADER_PATH: [&str; 6] = [
    "/usr/local/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
];
/// Scripts whose interpreter is a script; the kernel allows as many.
const MAX_SCRIPTS: usize = 5;
/// Most bytes of a first line of a script, as the kernel has it.
const MAX_SCRIPT_LINE: usize = 256;
/// `S_ISUID` and `S_ISGID`.
const SETUID: u32 = 0o4000;
const SETGID: u32 = 0o2000;

#[derive(Args)]
pub struct RunArgs {
    /// Bring the program's memory into the reach of GPUs as it comes, not only when the program first asks for a device
    #[arg(long)]
    early: bool,
    /// The same, and end the program where memory cannot be had from the agent, instead of going on with memory that GPUs
    /// do not reach
    #[arg(long)]
    require: bool,
    /// The library [default: libsvm_alloc.so beside this program, in ../lib, or where the loader looks]
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// The agent's socket for processes [default: what SVM_AGENT_SOCKET names, or /run/svm-agent.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The program and its arguments
    #[arg(value_name = "PROGRAM", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("no program {0:?} is there: name its path, or a folder in PATH has to have it")]
    Absent(OsString),
    #[error("cannot read {path}, so it is not known whether the library can be loaded with it")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("cannot execute {path}")]
    Exec { path: PathBuf, source: io::Error },
    #[error(
        "{0} is linked statically, so its malloc cannot be replaced: link it dynamically; or run it without `svm-agent run`, and let it make what GPUs use by svm_map of libgpusvm (Client::arena in Rust)"
    )]
    Static(PathBuf),
    #[error("{0} is no program for this machine (64-bit x86): build it for x86-64")]
    Foreign(PathBuf),
    #[error(
        "{0} runs with other rights than its caller's (setuid, setgid or capabilities), and the loader loads no library for a caller then: run it as that user, or take the rights off a copy"
    )]
    Privileged(PathBuf),
    #[error("{0} interprets itself through more scripts than the kernel follows")]
    Scripts(PathBuf),
    #[error("no {LIBRARY} in {}: install it there (guest-agent/install), or name it with --library", list(.0))]
    NoLibrary(Vec<PathBuf>),
    #[error("there is no library at {path}: name libsvm_alloc.so with --library")]
    LibraryUnreadable { path: PathBuf, source: io::Error },
    #[error(
        "the loader takes no library whose path has a colon or a blank in it: {0:?}; name another one with --library"
    )]
    LibraryName(PathBuf),
}

type Result<T> = std::result::Result<T, Error>;

fn list(folders: &[PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Executes the program; returns only where that fails.
pub fn run(args: &RunArgs) -> ExitCode {
    let error = match prepare(args) {
        Ok(mut command) => {
            let path = PathBuf::from(command.get_program());
            Error::Exec { path, source: command.exec() }
        }
        Err(error) => error,
    };
    complain(&error);
    let absent = matches!(error, Error::Absent(_));
    ExitCode::from(if absent { EXIT_ABSENT } else { EXIT_CANNOT })
}

fn prepare(args: &RunArgs) -> Result<Command> {
    let (name, arguments) = args.command.split_first().ok_or(Error::Absent(OsString::new()))?;
    let program = find_program(name)?;
    check_program(&program)?;
    let library = find_library(args.library.as_deref())?;
    let mut command = Command::new(&program);
    // The name that the caller gave it, as shells do.
    command.arg0(name).args(arguments).env("LD_PRELOAD", preload(&library)?);
    if args.require {
        command.env("SVM_ALLOC", "require");
    } else if args.early {
        command.env("SVM_ALLOC", "early");
    }
    if let Some(socket) = &args.socket {
        command.env(SOCKET_VARIABLE, std::path::absolute(socket).unwrap_or_else(|_| socket.clone()));
    }
    Ok(command)
}

/// Before what the caller has there already: whoever comes first serves malloc.
fn preload(library: &Path) -> Result<OsString> {
    let mut list = library.as_os_str().to_owned();
    if list.as_bytes().iter().any(|byte| *byte == b':' || byte.is_ascii_whitespace()) {
        return Err(Error::LibraryName(library.to_owned()));
    }
    if let Some(before) = std::env::var_os("LD_PRELOAD").filter(|before| !before.is_empty()) {
        list.push(":");
        list.push(before);
    }
    Ok(list)
}

// The program.

fn find_program(name: &OsStr) -> Result<PathBuf> {
    let executable = |path: &PathBuf| {
        let metadata = path.metadata();
        metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return if path.exists() { Ok(path) } else { Err(Error::Absent(name.to_owned())) };
    }
    let folders = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let found = std::env::split_paths(&folders).map(|folder| folder.join(name)).find(executable);
    found.ok_or_else(|| Error::Absent(name.to_owned()))
}

/// Whether the loader will load a library for it; of a script, for its interpreter.
fn check_program(path: &Path) -> Result<()> {
    let mut path = path.to_owned();
    for _ in 0..MAX_SCRIPTS {
        let unreadable = |source| Error::Unreadable { path: path.clone(), source };
        let file = File::open(&path).map_err(unreadable)?;
        let mut head = [0; MAX_SCRIPT_LINE];
        let len = read_up_to(&file, &mut head, 0).map_err(unreadable)?;
        let head = head.get(..len).unwrap_or_default();
        match interpreter(head) {
            Some(next) => path = next,
            None => {
                check_rights(&path, &file)
                    .map_err(unreadable)?
                    .then_some(())
                    .ok_or_else(|| Error::Privileged(path.clone()))?;
                return match is_dynamic(&file, head).map_err(unreadable)? {
                    Some(true) => Ok(()),
                    Some(false) => Err(Error::Static(path)),
                    None => Err(Error::Foreign(path)),
                };
            }
        }
    }
    Err(Error::Scripts(path))
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(u64::try_from(len).unwrap_or(u64::MAX))) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Of a script: what its first line names.
fn interpreter(head: &[u8]) -> Option<PathBuf> {
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let name = line.trim_ascii().split(|byte| byte.is_ascii_whitespace()).next()?;
    (!name.is_empty()).then(|| PathBuf::from(OsString::from_vec(name.to_vec())))
}

/// Whether it runs with its caller's rights and no others.
fn check_rights(path: &Path, file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    let mode = metadata.permissions().mode();
    let user = mode & SETUID != 0 && metadata.uid() != geteuid().as_raw();
    let group = mode & SETGID != 0 && metadata.gid() != getegid().as_raw();
    let mut value = [0u8; 64];
    // Root has them anyway. A file system without attributes has no capabilities.
    let capable =
        !geteuid().is_root() && rustix::fs::getxattr(path, "security.capability", &mut value[..]).is_ok();
    Ok(!(user || group || capable))
}

/// Whether an ELF file for this machine asks for a loader. `None`: it is no such file.
fn is_dynamic(file: &File, head: &[u8]) -> io::Result<Option<bool>> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    let half = |bytes: &[u8], at: usize| {
        let field = bytes.get(at..at.saturating_add(2))?;
        field.try_into().ok().map(u16::from_le_bytes)
    };
    if head.get(..6) != Some(&[0x7f, b'E', b'L', b'F', CLASS_64, LITTLE_ENDIAN])
        || half(head, 18) != Some(X86_64)
    {
        return Ok(None);
    }
    let offset = head.get(32..40).and_then(|field| field.try_into().ok()).map(u64::from_le_bytes);
    let (Some(offset), Some(size), Some(count)) = (offset, half(head, 54), half(head, 56)) else {
        return Ok(None);
    };
    for index in 0..u64::from(count) {
        let mut kind = [0; 4];
        let at = offset.saturating_add(index * u64::from(size));
        if read_up_to(file, &mut kind, at)? == kind.len() && u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}

// The library.

fn find_library(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = named {
        let unreadable = |source| Error::LibraryUnreadable { path: path.to_owned(), source };
        File::open(path).map_err(unreadable)?;
        // The program may change its folder before it executes another one.
        return std::path::absolute(path).map_err(unreadable);
    }
    let folders = library_folders();
    let found = folders.iter().map(|folder| folder.join(LIBRARY)).find(|path| path.is_file());
    found.ok_or(Error::NoLibrary(folders))
}

fn library_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let program = std::env::current_exe().ok();
    if let Some(beside) = program.as_deref().and_then(Path::parent) {
        folders.push(beside.to_owned());
        folders.extend(beside.parent().map(|prefix| prefix.join("lib")));
    }
    let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&named).filter(|folder| folder.is_absolute()));
    folders.extend(LOADER_PATH.map(PathBuf::from));
    folders
}
