//! Building the kernels that the cache lacks, from Debian's source packages.
use super::{OLDEST, cached, config, folders, series};
use crate::architecture::Architecture;
use crate::setup::apt;
use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

/// Builds those of the two newest series that Debian has the source of and the cache has no image of.
pub fn missing(architecture: Architecture, codename: &str) -> Result<()> {
    let target = writable_folder()?;
    let mut offered: BTreeMap<(u32, u32), (Rc<apt::Suite>, String)> = BTreeMap::new();
    for name in apt::suites(codename) {
        let Some(suite) = apt::Suite::open(codename, &name)? else { continue };
        let suite = Rc::new(suite);
        for package in suite.names("linux-source-")? {
            let Some(numbers) = package.strip_prefix("linux-source-").and_then(series) else { continue };
            if numbers >= OLDEST {
                offered.entry(numbers).or_insert_with(|| (suite.clone(), package));
            }
        }
    }
    for ((major, minor), (suite, package)) in offered.into_iter().rev().take(2) {
        let version = format!("{major}.{minor}");
        if honours(architecture, &version)? {
            continue;
        }
        build(architecture, &version, &suite, &package, &target)?;
    }
    if cached(architecture)?.is_none() {
        let (major, minor) = OLDEST;
        bail!("Debian's suites do not offer two kernel sources from {major}.{minor} on that honour resources/kernels");
    }
    Ok(())
}

fn honours(architecture: Architecture, version: &str) -> Result<bool> {
    let wanted = config::fragments(architecture)?;
    let name = format!("{version}-{}", architecture.name());
    Ok(folders()?.iter().any(|folder| {
        folder.join(format!("vmlinuz-{name}")).is_file()
            && fs::read_to_string(folder.join(format!("config-{name}")))
                .is_ok_and(|config| config::unmet(&wanted, &config).is_empty())
    }))
}

/// The first folder of the cache that can be written to.
fn writable_folder() -> Result<PathBuf> {
    for folder in folders()? {
        let probe = folder.join(".writable");
        if fs::create_dir_all(&folder).is_ok() && fs::write(&probe, "").is_ok() {
            fs::remove_file(&probe).with_context(|| format!("cannot remove {}", probe.display()))?;
            return Ok(folder);
        }
    }
    bail!("no folder for kernels can be written to")
}

fn build(architecture: Architecture, version: &str, suite: &apt::Suite, package: &str, target: &Path) -> Result<()> {
    println!(
        "building Linux {version} for {} from {package} in {}: ten minutes and more",
        architecture.name(),
        suite.name()
    );
    let work = paths::cache()?.join(format!("build-{version}"));
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    let source = work.join("source");
    fs::create_dir_all(&source).with_context(|| format!("cannot create {}", source.display()))?;
    suite.unpack(package, &work)?;
    let archive = work.join(format!("usr/src/{package}.tar.xz"));
    run::loudly(Command::new("tar").arg("-C").arg(&source).arg("--strip-components=1").arg("-xf").arg(&archive))?;
    let script = paths::workspace().join("resources/kernels/build.sh");
    run::loudly(Command::new(script).args([architecture.name(), version]).arg(&source).arg(target))?;
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    let config = target.join(format!("config-{version}-{}", architecture.name()));
    let config = fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let unmet = config::unmet(&config::fragments(architecture)?, &config);
    if !unmet.is_empty() {
        bail!("Linux {version} does not honour {}", unmet.join(", "));
    }
    Ok(())
}
