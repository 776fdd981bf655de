//! Rust's targets: whether the toolchain can build for one, and the ways to make it.
use super::apt;
use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names an archive of the library's sources, for machines that rustup cannot serve.
pub const ARCHIVE: &str = "KHO_VMM_RUST_SRC";

/// How code for a target can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The toolchain has the target's libraries.
    Libraries,
    /// It has the libraries' sources, from which cargo builds them.
    Sources,
    /// Not at all.
    Missing,
}

/// How it can be built here.
pub fn support(target: &str) -> Result<Support> {
    let libraries = run::quietly(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))?;
    if Path::new(libraries.trim()).is_dir() {
        return Ok(Support::Libraries);
    }
    Ok(if has_sources(&sources()?) { Support::Sources } else { Support::Missing })
}

/// Where cargo looks for the library's sources.
fn sources() -> Result<PathBuf> {
    let root = run::quietly(Command::new("rustc").args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(root.trim()).join("lib/rustlib/src/rust"))
}

fn has_sources(folder: &Path) -> bool {
    folder.join("library/core/src/lib.rs").is_file()
}

fn version() -> Result<String> {
    let text = run::quietly(Command::new("rustc").arg("--version"))?;
    Ok(text.split_whitespace().nth(1).with_context(|| format!("rustc does not say its version: {text}"))?.to_owned())
}

/// Makes the toolchain able to build for a target.
pub fn install(target: &str, codename: &str) -> Result<()> {
    if support(target)? != Support::Missing {
        // The sources that were brought for one target serve the others too.
        return Ok(());
    }
    let (version, sources) = (version()?, sources()?);
    let mut tried = Vec::new();
    match run::quietly(Command::new("rustup").args(["target", "add", target])) {
        Ok(_) => return Ok(()),
        Err(error) => tried.push(format!("rustup target add {target}: {error:#}")),
    }
    fs::create_dir_all(&sources).with_context(|| format!("cannot create {}", sources.display()))?;
    match std::env::var_os(ARCHIVE) {
        Some(archive) => {
            let mut tar = Command::new("tar");
            match run::quietly(tar.arg("-C").arg(&sources).arg("-xJf").arg(&archive)) {
                Ok(_) if has_sources(&sources) => {
                    println!("unpacked Rust's library sources from {}", Path::new(&archive).display());
                    return Ok(());
                }
                Ok(_) => tried.push(format!("{ARCHIVE}: the archive holds no library/core")),
                Err(error) => tried.push(format!("{ARCHIVE}: {error:#}")),
            }
        }
        None => tried.push(format!("{ARCHIVE}: not set")),
    }
    match from_debian(codename, &version, &sources) {
        Ok(()) => return Ok(()),
        Err(error) => tried.push(format!("Debian's rust-src: {error:#}")),
    }
    bail!("no way to build for {target} with Rust {version}:\n  - {}", tried.join("\n  - "))
}

/// Debian's package of exactly the toolchain's version, from whichever suite still has it.
fn from_debian(codename: &str, version: &str, sources: &Path) -> Result<()> {
    let mut seen = Vec::new();
    for name in apt::suites(codename) {
        let Some(suite) = apt::Suite::open(codename, &name)? else { continue };
        for offered in suite.versions("rust-src")? {
            let upstream = offered.split(['+', '-', '~']).next().unwrap_or_default();
            if upstream != version {
                seen.push(format!("{upstream} in {name}"));
                continue;
            }
            let folder = paths::cache()?.join(format!("rust-src-{version}"));
            suite.unpack(&format!("rust-src={offered}"), &folder)?;
            let library = folder.join(format!("usr/src/rustc-{version}/library"));
            let link = sources.join("library");
            return std::os::unix::fs::symlink(&library, &link)
                .with_context(|| format!("cannot link {} to {}", link.display(), library.display()));
        }
    }
    bail!(
        "the package is needed in version {version}, found: {}",
        if seen.is_empty() { "none".into() } else { seen.join(", ") }
    )
}
