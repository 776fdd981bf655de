//! Debian's package tool: what the machine's own sources offer, and other suites of the very same archives.
use crate::{paths, run};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where apt keeps its lists of sources.
const SOURCES: &str = "/etc/apt/sources.list.d";

/// Whether this is Debian, and if so its codename.
pub fn codename() -> Option<String> {
    codename_in(&fs::read_to_string("/etc/os-release").ok()?)
}

fn codename_in(release: &str) -> Option<String> {
    let value = |key: &str| {
        let line = release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    value("ID").filter(|id| id == "debian")?;
    value("VERSION_CODENAME")
}

/// The text of all lists of sources, by file name.
fn lists() -> Vec<(String, String)> {
    let entries = fs::read_dir(SOURCES).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = entries.chain([PathBuf::from("/etc/apt/sources.list")]).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let name = path.file_name()?.to_string_lossy().into_owned();
        (name.ends_with(".sources") || name.ends_with(".list")).then_some(())?;
        Some((name, fs::read_to_string(path).ok()?))
    };
    paths.into_iter().filter_map(read).collect()
}

/// The machine's own entries for `codename` itself, rewritten for another suite of the same archive: so they keep its
/// mirror, its components and its keys. The result is in the newer of apt's two formats.
fn rewritten(lists: &[(String, String)], codename: &str, suite: &str) -> String {
    let mut stanzas: Vec<String> = Vec::new();
    for (name, text) in lists {
        let found = if name.ends_with(".sources") {
            text.split("\n\n").filter_map(|stanza| rewritten_stanza(stanza, codename, suite)).collect::<Vec<_>>()
        } else {
            text.lines().filter_map(|line| rewritten_line(line, codename, suite)).collect()
        };
        for stanza in found {
            if !stanzas.contains(&stanza) {
                stanzas.push(stanza);
            }
        }
    }
    stanzas.join("\n")
}

fn rewritten_stanza(stanza: &str, codename: &str, suite: &str) -> Option<String> {
    let field = |line: &str, name: &str| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    };
    let lines = || stanza.lines().filter(|line| !line.starts_with('#'));
    let disabled = lines().any(|line| field(line, "Enabled").is_some_and(|value| value == "no"));
    let types = lines().find_map(|line| field(line, "Types"))?;
    let suites = lines().find_map(|line| field(line, "Suites"))?;
    let binary = types.split_whitespace().any(|kind| kind == "deb");
    if disabled || !binary || !suites.split_whitespace().any(|name| name == codename) {
        return None;
    }
    let rewritten = lines().filter(|line| !line.trim().is_empty()).map(|line| match line {
        _ if field(line, "Types").is_some() => "Types: deb\n".to_owned(),
        _ if field(line, "Suites").is_some() => format!("Suites: {suite}\n"),
        line => format!("{line}\n"),
    });
    Some(rewritten.collect())
}

fn rewritten_line(line: &str, codename: &str, suite: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb")?;
    rest.starts_with([' ', '\t', '[']).then_some(())?;
    let (options, rest) = match rest.trim_start().strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split('#').next()?.split_whitespace();
    let (address, name) = (words.next()?, words.next()?);
    if name != codename {
        return None;
    }
    let components = words.collect::<Vec<_>>().join(" ");
    let mut stanza = format!("Types: deb\nURIs: {address}\nSuites: {suite}\nComponents: {components}\n");
    for (key, value) in options.split_whitespace().filter_map(|option| option.split_once('=')) {
        let key = match key {
            "signed-by" => "Signed-By",
            "arch" => "Architectures",
            "trusted" => "Trusted",
            _ => continue,
        };
        stanza.push_str(&format!("{key}: {}\n", value.replace(',', " ")));
    }
    Some(stanza)
}

/// The machine's own sources of `codename`, rewritten for another release and for any architecture. Empty when there are none.
pub fn sources_of(codename: &str, release: &str) -> String {
    without_architectures(&rewritten(&lists(), codename, release))
}

/// What the machine's own entries are limited to does not hold for another architecture.
fn without_architectures(sources: &str) -> String {
    sources.lines().filter(|line| !line.starts_with("Architectures:")).map(|line| format!("{line}\n")).collect()
}

/// The suites that may hold a package too new for `codename`, the nearest first.
pub fn suites(codename: &str) -> Vec<String> {
    let mut suites = vec![codename.to_owned(), format!("{codename}-backports")];
    for suite in ["trixie-backports", "forky", "sid"] {
        if !suites.iter().any(|known| known == suite) {
            suites.push(suite.to_owned());
        }
    }
    suites
}

/// Brings apt's knowledge up to date.
pub fn update() -> Result<()> {
    run::loudly(Command::new("apt-get").args(["-q", "update"]))
}

/// Installs packages.
pub fn install(packages: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-y", "--no-install-recommends", "install"]).args(packages);
    run::loudly(command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()))
}

/// The version of a package that apt would install by default.
pub fn candidate(package: &str) -> Option<String> {
    let text = run::quietly(Command::new("apt-cache").args(["policy", package])).ok()?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?;
    Some(line.trim().to_owned()).filter(|version| version != "(none)")
}

/// Another suite, or another architecture's part of one, of the machine's archives: looked at without touching the machine's
/// own sources.
pub struct Suite {
    name: String,
    folder: PathBuf,
    architecture: Option<&'static str>,
}

impl Suite {
    /// Fetches the suite's list of packages; None when the archives do not have such a suite.
    pub fn open(codename: &str, name: &str) -> Result<Option<Self>> {
        Self::open_for(codename, name, None)
    }

    /// The same for packages of another architecture, as Debian says it.
    pub fn open_for(codename: &str, name: &str, architecture: Option<&'static str>) -> Result<Option<Self>> {
        let folder = paths::cache()?.join("apt").join(architecture.unwrap_or_default()).join(name);
        for part in ["lists/partial", "archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let suite = Self { name: name.to_owned(), folder, architecture };
        let list = suite.folder.join("suite.sources");
        let mut text = rewritten(&lists(), codename, name);
        if architecture.is_some() {
            text = without_architectures(&text);
        }
        fs::write(&list, text).with_context(|| format!("cannot write {}", list.display()))?;
        let found = run::quietly(suite.tool("apt-get").args(["-q", "update"])).is_ok();
        Ok(found.then_some(suite))
    }

    /// The suite's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let mut option = |key: &str, path: &Path| {
            command.arg("-o").arg(format!("{key}={}", path.display()));
        };
        option("Dir::Etc::SourceList", &self.folder.join("suite.sources"));
        option("Dir::Etc::SourceParts", Path::new("/dev/null"));
        option("Dir::State::Lists", &self.folder.join("lists"));
        option("Dir::Cache", &self.folder);
        if let Some(architecture) = self.architecture {
            command.args(["-o", &format!("APT::Architecture={architecture}")]);
            command.args(["-o", &format!("APT::Architectures={architecture}")]);
        }
        // As root apt would else drop to a user who may not enter root's cache.
        command.args(["-o", "APT::Sandbox::User=root"]);
        command
    }

    /// The names of the suite's packages that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = run::quietly(self.tool("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(String::from).collect())
    }

    /// The versions of a package in the suite.
    pub fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = run::quietly(self.tool("apt-cache").args(["madison", package]))?;
        Ok(text.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect())
    }

    /// Downloads a package (with `=version`, that very one) and unpacks its files into `target`. Nothing is installed.
    pub fn unpack(&self, package: &str, target: &Path) -> Result<()> {
        let folder = self.folder.join("download");
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        run::loudly(self.tool("apt-get").args(["-q", "download", package]).current_dir(&folder))?;
        let entry = fs::read_dir(&folder)
            .with_context(|| format!("cannot list {}", folder.display()))?
            .flatten()
            .next()
            .with_context(|| format!("apt downloaded nothing for {package}"))?;
        run::loudly(Command::new("dpkg").arg("-x").arg(entry.path()).arg(target))?;
        fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))
    }

    /// Downloads a package and all that it needs, down to the C library, and unpacks it into `target`. Nothing is installed.
    pub fn unpack_with_dependencies(&self, package: &str, target: &Path) -> Result<()> {
        // To a machine on which nothing is installed everything is missing.
        let status = self.folder.join("nothing-installed");
        fs::write(&status, "").with_context(|| format!("cannot write {}", status.display()))?;
        let mut fetch = self.tool("apt-get");
        fetch.args(["-o", &format!("Dir::State::status={}", status.display())]);
        run::loudly(fetch.args(["-q", "-y", "--no-install-recommends", "--download-only", "install", package]))?;
        let archives = self.folder.join("archives");
        let entries = fs::read_dir(&archives).with_context(|| format!("cannot list {}", archives.display()))?;
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension() == Some("deb".as_ref()))
        {
            run::loudly(Command::new("dpkg").arg("-x").arg(&path).arg(target))?;
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_a_codename_here() {
        let debian = "PRETTY_NAME=\"x\"\nID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(codename_in(debian).as_deref(), Some("bookworm"));
        assert_eq!(codename_in("ID=fedora\nVERSION_CODENAME=\n"), None);
    }

    #[test]
    fn a_stanza_keeps_its_mirror_and_keys_and_changes_its_suite() {
        let list = "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /key.gpg\n\nTypes: deb\nURIs: http://mirror.example/security\n\
                    Suites: bookworm-security\nComponents: main\n";
        let expected =
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: sid\nComponents: main\nSigned-By: /key.gpg\n";
        assert_eq!(rewritten(&[("debian.sources".into(), list.into())], "bookworm", "sid"), expected);
    }

    #[test]
    fn a_one_line_source_becomes_a_stanza() {
        let list = "# deb http://old.example bookworm main\n\
                    deb [arch=amd64,i386 signed-by=/key.gpg] http://mirror.example/debian bookworm main contrib # ours\n\
                    deb-src http://mirror.example/debian bookworm main\n";
        let expected = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\n\
                        Components: main contrib\nArchitectures: amd64 i386\nSigned-By: /key.gpg\n";
        assert_eq!(rewritten(&[("sources.list".into(), list.into())], "bookworm", "bookworm-backports"), expected);
    }

    #[test]
    fn disabled_and_foreign_stanzas_are_left_alone() {
        let list = "Enabled: no\nTypes: deb\nURIs: http://a.example\nSuites: bookworm\nComponents: main\n\n\
                    Types: deb\nURIs: http://b.example\nSuites: nodistro\nComponents: main\n";
        assert_eq!(rewritten(&[("a.sources".into(), list.into())], "bookworm", "sid"), "");
    }
}
