//! Guest sockets in the file system: where they may be made, how, and when one may be removed.
//!
//! A socket is made once per guest and listens until the guest is removed; sessions come and go without touching it.
//! Only two things are ever unlinked: a socket that nobody listens on, before ours takes its place, and our own. The
//! check and the taking of a path happen under a lock on the folder, so that two daemons cannot both find the other's
//! fresh socket dead.

use crate::registry::AddError;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, fchmod, flock, open, statat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Connections that wait while a session is live.
const BACKLOG: i32 = 16;
/// Mode of a socket that is for the daemon's own user.
pub const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// How long a folder may be locked by others before that is an error.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Folders below which guest sockets may be made.
#[derive(Clone, Debug, Default)]
pub struct RuntimeDirs(Vec<PathBuf>);

impl RuntimeDirs {
    /// Resolves the folders. One that does not exist allows nothing.
    pub fn new(dirs: &[PathBuf]) -> Self {
        Self(dirs.iter().filter_map(|dir| fs::canonicalize(dir).ok()).collect())
    }

    /// The path with its folder resolved, if it lies below a runtime folder.
    ///
    /// # Errors
    /// [`AddError::SocketOutsideRuntimeDirs`], [`AddError::Io`].
    pub fn resolve(&self, path: &Path) -> Result<PathBuf, AddError> {
        let outside = || AddError::SocketOutsideRuntimeDirs(path.to_owned());
        let name = path.file_name().ok_or_else(outside)?;
        let folder = folder_of(path);
        match fs::canonicalize(folder) {
            Ok(folder) if self.allow(&folder) => Ok(folder.join(name)),
            Ok(_) => Err(outside()),
            Err(source) => {
                // A folder that is missing below a runtime folder is worth a better answer than "outside".
                let existing = folder.ancestors().find_map(|a| fs::canonicalize(a).ok());
                if existing.is_some_and(|a| self.allow(&a)) {
                    Err(AddError::Io { action: "find the folder of", path: path.to_owned(), source })
                } else {
                    Err(outside())
                }
            }
        }
    }

    fn allow(&self, folder: &Path) -> bool {
        self.0.iter().any(|dir| folder.starts_with(dir))
    }
}

/// The folder of a path; the current one for a bare name.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The folder of a socket that is to be made, locked against other daemons while this lives.
#[derive(Debug)]
pub struct Folder {
    _locked: OwnedFd,
}

impl Folder {
    /// Locks the folder of a path. May take a second, while others hold it.
    ///
    /// # Errors
    /// [`AddError::Io`].
    pub fn lock(path: &Path) -> Result<Self, AddError> {
        let failed = |action, source: io::Error| AddError::Io { action, path: path.to_owned(), source };
        let folder = path.parent().unwrap_or(Path::new("/"));
        let folder = open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed("open the folder of", e.into()))?;
        lock(&folder).map_err(|e| failed("lock the folder of", e))?;
        Ok(Self { _locked: folder })
    }
}

/// A listening socket that is ours while this lives.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    /// Its path and what was made there, so that only that is removed. `None`: inherited, not ours to remove.
    made: Option<(PathBuf, (u64, u64))>,
}

impl ListeningSocket {
    /// Makes a socket with mode 0600 at a path that [`RuntimeDirs::resolve`] gave, in its folder.
    ///
    /// # Errors
    /// [`AddError::SocketInUse`], [`AddError::Io`].
    pub fn make(path: &Path, folder: &Folder) -> Result<Self, AddError> {
        Self::make_with(path, folder, PRIVATE)
    }

    fn make_with(path: &Path, _folder: &Folder, mode: Mode) -> Result<Self, AddError> {
        let failed = |action, source: io::Error| AddError::Io { action, path: path.to_owned(), source };
        clear(path)?;

        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|e| failed("create", e.into()))?;
        // Linux gives the file the mode of the socket (less the umask), so there is no moment in which others may
        // connect, whatever umask the process has.
        fchmod(&socket, mode).map_err(|e| failed("set the mode of", e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| failed("name", e.into()))?;
        bind(&socket, &address).map_err(|e| failed("bind", e.into()))?;
        let stat = statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| {
            // Under the folder's lock it is still the one that was just made; should it not go, it is dead.
            fs::remove_file(path).ok();
            failed("look at", e.into())
        })?;
        let made = Self {
            listener: UnixListener::from(socket),
            made: Some((path.to_owned(), (stat.st_dev, stat.st_ino))),
        };
        listen(&made.listener, BACKLOG).map_err(|e| failed("listen on", e.into()))?;
        Ok(made)
    }

    /// Makes a socket at a path that the operator named at the start, wherever it is, with this mode less the umask.
    ///
    /// # Errors
    /// [`AddError::SocketInUse`], [`AddError::Io`].
    pub fn make_anywhere(path: &Path, mode: Mode) -> Result<Self, AddError> {
        let missing = |source| AddError::Io { action: "find the folder of", path: path.to_owned(), source };
        let folder = fs::canonicalize(folder_of(path)).map_err(missing)?;
        let name = path.file_name().ok_or_else(|| missing(io::ErrorKind::InvalidInput.into()))?;
        let path = folder.join(name);
        Self::make_with(&path, &Folder::lock(&path)?, mode)
    }

    /// The listening socket for a tokio runtime, within which this must be called.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn to_tokio(&self) -> io::Result<tokio::net::UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    }

    /// Takes over a listening socket that was inherited.
    pub fn inherited(listener: OwnedFd) -> Self {
        Self { listener: UnixListener::from(listener), made: None }
    }

    /// The listening socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ListeningSocket {
    /// Unlinks the path if it is still what was made there.
    fn drop(&mut self) {
        let Some((path, made)) = &self.made else { return };
        let now = statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW);
        if now.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == *made)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(?path, %error, "cannot remove a guest's socket");
        }
    }
}

/// Takes the folder's lock without waiting for ever: anybody who may read the folder may hold it.
fn lock(folder: &OwnedFd) -> io::Result<()> {
    for _ in 0..LOCK_TRIES {
        match flock(folder.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            other => return Ok(other?),
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Removes a dead socket from the path; anything else there is left alone.
fn clear(path: &Path) -> Result<(), AddError> {
    let failed = |action, source| AddError::Io { action, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed("look at", e)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(AddError::SocketInUse(path.to_owned())),
        Ok(_) => {}
    }
    if is_dead(path).map_err(|e| failed("look at", e))? {
        fs::remove_file(path).map_err(|e| failed("remove the dead socket", e))
    } else {
        Err(AddError::SocketInUse(path.to_owned()))
    }
}

/// Whether nobody listens any more. Whoever has not answered yet may do so, and is not waited for.
fn is_dead(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let tried = SocketAddrUnix::new(path).and_then(|address| connect(&socket, &address));
    Ok(tried == Err(rustix::io::Errno::CONNREFUSED))
}
