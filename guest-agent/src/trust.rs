//! Which users' processes are trusted with more than their own memory: what the operator writes into a file.
//!
//! Without a file nobody is. The file is root's alone, because whoever may write it may have GPUs write to any memory.
//!
//! ```toml
//! trusted_uids = [1000]
//! ```

use serde::Deserialize;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the file is unless the operator names another one; it need not be there.
pub const DEFAULT_TRUST_FILE: &str = "/etc/svm-agent.toml";
/// Bytes that the file may have.
const MAX_BYTES: u64 = 64 << 10;

/// Why a file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Others than root can change it.
    #[error(
        "{} decides who is trusted, so it must be a file of root's that nobody else may write to: \
         `chown root` and `chmod go-w` it",
        path.display()
    )]
    NotRoots {
        /// The file.
        path: PathBuf,
    },
    /// It has another form.
    #[error("{} does not say `trusted_uids = [..]` and no more", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: toml::de::Error,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrustFile {
    trusted_uids: Vec<u32>,
}

/// Who is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// Users whose processes are.
    pub uids: Vec<u32>,
    /// The file that says so.
    pub file: Option<PathBuf>,
}

impl Trust {
    /// Reads the file that the operator named, or the one at [`DEFAULT_TRUST_FILE`] if it is there.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(named: Option<&Path>) -> Result<Self, Error> {
        match Self::read(named.unwrap_or(Path::new(DEFAULT_TRUST_FILE))) {
            Err(Error::Read { source, .. })
                if named.is_none() && source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(Self::default())
            }
            read => read,
        }
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let unreadable = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() || metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            return Err(Error::NotRoots { path: path.to_owned() });
        }
        let mut text = String::new();
        file.take(MAX_BYTES).read_to_string(&mut text).map_err(unreadable)?;
        let file: TrustFile =
            toml::from_str(&text).map_err(|source| Error::Form { path: path.to_owned(), source })?;
        Ok(Self { uids: file.trusted_uids, file: Some(path.to_owned()) })
    }

    /// Whether a user's processes are trusted.
    pub fn covers(&self, uid: u32) -> bool {
        self.uids.contains(&uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lacking::lacking;
    use std::os::unix::fs::PermissionsExt;

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    /// Only root can make a file of root's.
    fn is_root(what: &str) -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            lacking(&format!("{what} (needs root)"));
        }
        root
    }

    #[test]
    fn file_of_roots_says_who_is_trusted() {
        if !is_root("file of root's says who is trusted") {
            return;
        }
        let file = file("# the shared machine's users\ntrusted_uids = [0, 1000]\n", 0o644);
        let trust = Trust::load(Some(file.path())).unwrap();
        assert_eq!(trust, Trust { uids: vec![0, 1000], file: Some(file.path().to_owned()) });
        assert!(trust.covers(1000) && !trust.covers(1001) && !Trust::default().covers(0));
    }

    #[test]
    fn file_that_others_may_write_to_is_refused() {
        for mode in [0o664, 0o646, 0o622] {
            let refused = Trust::load(Some(file("trusted_uids = [1]", mode).path())).unwrap_err();
            assert!(matches!(refused, Error::NotRoots { .. }), "{mode:o}");
            assert!(refused.to_string().contains("chmod go-w"), "{refused}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Trust::load(Some(folder.path())), Err(Error::NotRoots { .. })));
        if is_root("file of another user is refused") {
            let file = file("trusted_uids = [1]", 0o600);
            std::os::unix::fs::chown(file.path(), Some(1), None).unwrap();
            assert!(matches!(Trust::load(Some(file.path())), Err(Error::NotRoots { .. })));
        }
    }

    #[test]
    fn file_of_another_form_is_refused() {
        if !is_root("file of another form is refused") {
            return;
        }
        for text in ["", "trusted_uids = 1", "trusted_uids = [-1]", "trusted_uids = []\nother = 1", "trusted"]
        {
            let refused = Trust::load(Some(file(text, 0o600).path()));
            assert!(matches!(refused, Err(Error::Form { .. })), "{text:?}");
        }
        assert_eq!(Trust::load(Some(file("trusted_uids = []", 0o600).path())).unwrap().uids, [0; 0]);
    }

    #[test]
    fn file_that_is_named_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let absent = Trust::load(Some(&folder.path().join("none.toml")));
        assert!(matches!(absent, Err(Error::Read { .. })));
    }
}
