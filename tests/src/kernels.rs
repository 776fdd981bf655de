//! The kernel cache: images of the lab's host kernel, each with the configuration it was built from.
pub mod build;
mod config;

use crate::architecture::Architecture;
use crate::paths;
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

/// One kernel of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The upstream series, such as `7.3`.
    pub version: String,
    /// The image.
    pub image: PathBuf,
}

/// The two newest kernels: the ones a host is updated between.
#[derive(Clone, Debug)]
pub struct Kernels {
    /// The second newest.
    pub older: Kernel,
    /// The newest.
    pub newer: Kernel,
}

/// The oldest series whose handover the monitor speaks.
pub const OLDEST: (u32, u32) = (7, 2);

/// A series as numbers, for comparing.
pub fn series(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The folder that somebody has named for kernels.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os("KHO_VMM_KERNELS").map(PathBuf::from)
}

/// The folders that may hold kernels, the first to be preferred.
fn folders() -> Result<Vec<PathBuf>> {
    Ok(folder().into_iter().chain([paths::cache()?]).collect())
}

/// The two newest cached kernels, when there are two that honour our configuration.
pub fn cached(architecture: Architecture) -> Result<Option<Kernels>> {
    let mut found: Vec<((u32, u32), Kernel)> = Vec::new();
    let wanted = config::fragments(architecture)?;
    for folder in folders()? {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(version) = name
                .strip_prefix("vmlinuz-")
                .and_then(|rest| rest.strip_suffix(architecture.name())?.strip_suffix('-'))
                .map(String::from)
            else {
                continue;
            };
            let Some(numbers) = series(&version).filter(|numbers| *numbers >= OLDEST) else { continue };
            let config = folder.join(format!("config-{version}-{}", architecture.name()));
            let Ok(config) = fs::read_to_string(&config) else { continue };
            let known = found.iter().any(|(other, _)| *other == numbers);
            if !known && config::unmet(&wanted, &config).is_empty() {
                found.push((numbers, Kernel { version, image: entry.path() }));
            }
        }
    }
    found.sort_by_key(|(numbers, _)| *numbers);
    let mut newest = found.into_iter().rev().map(|(_, kernel)| kernel);
    Ok(newest.next().zip(newest.next()).map(|(newer, older)| Kernels { older, newer }))
}

/// The two kernels, which set-up has put into the cache.
pub fn pair(architecture: Architecture) -> Result<Kernels> {
    cached(architecture)?.context("the kernel cache does not hold two kernels: run `cargo xtask setup`")
}
