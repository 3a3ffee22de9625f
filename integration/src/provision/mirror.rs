//! Finds the Debian mirror that this host already uses, in its own apt sources, so that no host name stands in the code
//! and a site's mirror or proxy is honoured.
//!
//! Reads both forms of apt sources (one-line `.list` and deb822 `.sources`). A mirror is an enabled `deb` entry with
//! component `main` and a plain Debian suite; security and third-party archives do not qualify.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Names a mirror where the host's own sources name none, for example on another distribution.
pub const MIRROR_VARIABLE: &str = "SVM_DEBIAN_MIRROR";

const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.pgp", "/usr/share/keyrings/debian-archive-keyring.gpg"];

/// Code names and aliases of Debian releases.
const RELEASES: [&str; 11] = [
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// A Debian archive and the keys that sign it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// As apt writes it; may also be `mirror+file:` or `file:`.
    pub uri: String,
    /// Keyring with Debian's archive keys.
    pub keyring: PathBuf,
}

/// One enabled source of binary packages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<PathBuf>,
}

impl Mirror {
    /// Looks the mirror up in `/etc/apt`, or takes it from [`MIRROR_VARIABLE`].
    ///
    /// # Errors
    /// Fails when no entry qualifies or Debian's keyring is not installed; the text says what to do.
    pub fn of_this_host() -> Result<Self> {
        let sources = read_sources(Path::new("/etc/apt"));
        let (uri, signed_by) = match std::env::var(MIRROR_VARIABLE) {
            Ok(uri) => (uri, None),
            Err(_) => choose(&sources).context(format!(
                "no Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d; set {MIRROR_VARIABLE} to the \
                 URL of one (its path usually ends in /debian)"
            ))?,
        };
        let candidates = KEYRINGS.iter().map(PathBuf::from).chain(signed_by);
        match candidates.into_iter().find(|path| path.is_file()) {
            Some(keyring) => Ok(Self { uri, keyring }),
            None => bail!("Debian's archive keys are missing: install the package debian-archive-keyring"),
        }
    }
}

fn read_sources(etc_apt: &Path) -> Vec<Source> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(folder) = fs::read_dir(etc_apt.join("sources.list.d")) {
        files.extend(folder.flatten().map(|entry| entry.path()));
        files.sort();
    }
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(text.lines().filter_map(parse_line)),
            Some("sources") => sources.extend(parse_deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [signed-by=/path arch=amd64] URI SUITE COMPONENT...`
fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (inside, after) = options.split_once(']')?;
        signed_by =
            inside.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(PathBuf::from);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

/// Stanzas of `Key: value` lines; a line that starts with white space continues the one before.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let mut source = Source::default();
        let mut binary = false;
        let mut enabled = true;
        let mut key = String::new();
        for line in stanza {
            let value = match line.split_once(':') {
                Some((name, value)) if !line.starts_with([' ', '\t']) => {
                    key = name.trim().to_ascii_lowercase();
                    value
                }
                _ => line,
            };
            let words = value.split_whitespace().map(str::to_owned);
            match key.as_str() {
                "types" => binary |= value.split_whitespace().any(|kind| kind == "deb"),
                "enabled" => enabled = !matches!(value.trim(), "no" | "false" | "0"),
                "uris" => source.uris.extend(words),
                "suites" => source.suites.extend(words),
                "components" => source.components.extend(words),
                // A key may also stand here in full; only a path is of use.
                "signed-by" if value.trim().starts_with('/') => {
                    source.signed_by = words.map(PathBuf::from).next();
                }
                _ => {}
            }
        }
        if binary && enabled {
            sources.push(source);
        }
    }
    sources
}

/// The best source: a path that ends in `debian` first, since others also use Debian's suite names.
fn choose(sources: &[Source]) -> Option<(String, Option<PathBuf>)> {
    let qualifies = |source: &&Source| {
        source.components.iter().any(|component| component == "main")
            && source.suites.iter().any(|suite| is_release(suite))
    };
    let all = sources
        .iter()
        .filter(qualifies)
        .flat_map(|source| source.uris.iter().map(|uri| (uri.clone(), source.signed_by.clone())));
    all.max_by_key(|(uri, _)| uri.trim_end_matches('/').ends_with("/debian"))
}

fn is_release(suite: &str) -> bool {
    let base = suite.strip_suffix("-updates").or_else(|| suite.strip_suffix("-backports")).unwrap_or(suite);
    RELEASES.contains(&base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_stanza_is_read_and_security_is_passed_over() {
        let text = "Types: deb\n# a comment\nURIs: http://security.test/debian-security\nSuites: bookworm-security\n\
                    Components: main\n\nTypes: deb deb-src\nURIs: http://mirror.test/debian\nSuites: bookworm\n \
                    bookworm-updates\nComponents: main\nSigned-By: /keys/debian.gpg\n";
        let chosen = choose(&parse_deb822(text));
        assert_eq!(chosen, Some(("http://mirror.test/debian".into(), Some("/keys/debian.gpg".into()))));
    }

    #[test]
    fn one_line_source_with_options_is_read() {
        let source =
            parse_line("deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian/ trixie main contrib");
        let chosen = choose(source.as_slice());
        assert_eq!(chosen, Some(("http://mirror.test/debian/".into(), Some("/k.gpg".into()))));
    }

    #[test]
    fn disabled_foreign_and_source_only_entries_do_not_qualify() {
        let text = "Types: deb\nEnabled: no\nURIs: http://a.test/debian\nSuites: trixie\nComponents: main\n\n\
                    Types: deb-src\nURIs: http://b.test/debian\nSuites: trixie\nComponents: main\n\n\
                    Types: deb\nURIs: http://c.test/debian\nSuites: nodistro\nComponents: main\n";
        assert_eq!(choose(&parse_deb822(text)), None);
        assert_eq!(parse_line("deb-src http://mirror.test/debian trixie main"), None);
        assert_eq!(parse_line("# deb http://mirror.test/debian trixie main"), None);
    }

    #[test]
    fn debian_path_is_preferred_to_a_third_party_of_the_same_suite() {
        let lines = "deb http://other.test/repo stable main\ndeb http://mirror.test/debian bookworm main";
        let sources: Vec<Source> = lines.lines().filter_map(parse_line).collect();
        assert_eq!(choose(&sources).map(|(uri, _)| uri), Some("http://mirror.test/debian".into()));
    }
}
