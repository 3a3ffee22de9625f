//! Writes the file system that a guest boots into: a cpio archive of the "newc" kind, as the kernel unpacks it.
//!
//! [`Initramfs::base`] has what every guest needs: the runner as `/init`, busybox with its commands, users, modules.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::provision::Kernel;

/// The first of the [`USERS`] ordinary users.
pub const FIRST_UID: u32 = 1000;
/// Ordinary users in `/etc/passwd`, each with a group of its own.
pub const USERS: u32 = 64;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub struct Initramfs<W: Write> {
    out: W,
    position: u64,
    inode: u32,
    folders: HashSet<String>,
}

struct Entry<'a> {
    path: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl Initramfs<BufWriter<File>> {
    /// Begins an archive with what every guest needs.
    ///
    /// # Errors
    /// Fails when a part cannot be read or the archive not written.
    pub fn base(path: &Path, runner: &Path, busybox: &Path, kernel: &Kernel) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut archive = Self::new(BufWriter::new(file));
        for folder in ["bin", "dev", "etc", "modules", "proc", "run", "sys", "tmp"] {
            archive.directory(folder)?;
        }
        // The kernel opens it for pid 1, before anything is mounted.
        archive.character_device("dev/console", 0o600, (5, 1))?;
        archive.copy("init", runner)?;
        archive.copy("bin/busybox", busybox)?;
        for command in busybox_commands(busybox)? {
            archive.symlink(&format!("bin/{command}"), "busybox")?;
        }
        let (mut passwd, mut group) =
            (String::from("root:x:0:0::/tmp:/bin/sh\n"), String::from("root:x:0:\n"));
        for uid in FIRST_UID..FIRST_UID + USERS {
            passwd.push_str(&format!("user{uid}:x:{uid}:{uid}::/tmp:/bin/sh\n"));
            group.push_str(&format!("user{uid}:x:{uid}:\n"));
        }
        archive.file("etc/passwd", 0o644, passwd.as_bytes())?;
        archive.file("etc/group", 0o644, group.as_bytes())?;
        for module in &kernel.modules {
            let name = module.file_name().unwrap_or_default().to_string_lossy();
            archive.copy(&format!("modules/{name}"), module)?;
        }
        Ok(archive)
    }
}

impl<W: Write> Initramfs<W> {
    /// Begins an empty archive.
    pub fn new(out: W) -> Self {
        Self { out, position: 0, inode: 0, folders: HashSet::new() }
    }

    /// Adds a folder; its parent comes first.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.folders.insert(path.to_owned());
        self.entry(&Entry { path, mode: DIRECTORY | 0o755, device: (0, 0), data: &[] })
    }

    /// Adds the folders that lead to `path` and are not there yet.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn folders_of(&mut self, path: &str) -> io::Result<()> {
        for (end, _) in path.match_indices('/') {
            let folder = path.get(..end).unwrap_or_default();
            if !self.folders.contains(folder) {
                self.directory(folder)?;
            }
        }
        Ok(())
    }

    /// Adds a file with these contents.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(&Entry { path, mode: REGULAR | mode, device: (0, 0), data })
    }

    /// Adds a copy of a file of this host, executable if it is.
    ///
    /// # Errors
    /// Fails when the file cannot be read or the archive not written.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let data = fs::read(from).with_context(|| format!("{} cannot be read", from.display()))?;
        let executable = fs::metadata(from)?.permissions().mode() & 0o111 != 0;
        Ok(self.file(path, if executable { 0o755 } else { 0o644 }, &data)?)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(&Entry { path, mode: SYMLINK | 0o777, device: (0, 0), data: target.as_bytes() })
    }

    /// Adds a character device with its major and minor number.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn character_device(&mut self, path: &str, mode: u32, device: (u32, u32)) -> io::Result<()> {
        self.entry(&Entry { path, mode: CHARACTER | mode, device, data: &[] })
    }

    /// Ends the archive and hands the writer back, flushed.
    ///
    /// # Errors
    /// Fails when the archive cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(&Entry { path: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] })?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// A header of 13 numbers in 8 hex digits each, the name with its NUL, the data; both padded to 4 bytes.
    fn entry(&mut self, entry: &Entry<'_>) -> io::Result<()> {
        let too_long = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(entry.data.len()).map_err(too_long)?;
        let name_size = u32::try_from(entry.path.len() + 1).map_err(too_long)?;
        self.inode += 1;
        let (uid, gid, links, mtime, check) = (0, 0, 1, 0, 0);
        let (major, minor) = entry.device;
        let header =
            [self.inode, entry.mode, uid, gid, links, mtime, size, 0, 0, major, minor, name_size, check];
        self.write(b"070701")?;
        for number in header {
            self.write(format!("{number:08x}").as_bytes())?;
        }
        self.write(entry.path.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(entry.data)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        while !self.position.is_multiple_of(4) {
            self.write(&[0])?;
        }
        Ok(())
    }
}

/// The commands that busybox answers to: its own list.
fn busybox_commands(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{} does not run ({})", busybox.display(), output.status);
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(list.lines().filter(|command| *command != "busybox").map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_entry_has_the_bytes_of_the_newc_format() {
        let mut archive = Initramfs::new(Vec::new());
        archive.file("a/b", 0o644, b"hello").unwrap();
        let bytes = archive.finish().unwrap();
        // 13 numbers: inode, mode, uid, gid, links, mtime, size, 4 device numbers, name size, check.
        let fields = concat!(
            "070701", "00000001", "000081a4", "00000000", "00000000", "00000001", "00000000", "00000005",
            "00000000", "00000000", "00000000", "00000000", "00000004", "00000000"
        );
        assert_eq!(&bytes[..110], fields.as_bytes());
        assert_eq!(&bytes[110..124], b"a/b\0\0\0hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
