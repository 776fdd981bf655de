//! Where things are: the workspace, its target folder, the kernel cache, programs on PATH.
use crate::architecture::Architecture;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(path) => workspace().join(path),
        None => workspace().join("target"),
    }
}

/// Logs and shared folders of the lab's hosts of an architecture.
pub fn lab(architecture: Architecture) -> PathBuf {
    target().join("lab").join(architecture.name())
}

/// The folder for what this project keeps between builds of one user.
pub fn cache() -> Result<PathBuf> {
    let home = std::env::var_os("HOME").context("HOME is not set, so there is no ~/.cache")?;
    Ok(PathBuf::from(home).join(".cache/kho-vmm"))
}

/// A program on PATH, or in the folders where administrators' programs live.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/bin", "/usr/bin", "/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}
