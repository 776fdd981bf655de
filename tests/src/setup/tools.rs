//! Developers' tools that `cargo xtask test` calls.
use crate::{paths, run};
use anyhow::Result;
use std::process::Command;

/// Whether cargo has the subcommand.
pub fn has(subcommand: &str) -> bool {
    run::quietly(Command::new("cargo").args([subcommand, "--version"])).is_ok()
}

/// Installs a cargo subcommand from its published source, unless it is there.
pub fn ensure(subcommand: &str) -> Result<()> {
    if has(subcommand) {
        return Ok(());
    }
    let package = format!("cargo-{subcommand}");
    println!("installing {package}: a few minutes");
    run::loudly(
        Command::new("cargo")
            .args(["install", "--quiet", "--locked", &package])
            .env("CARGO_TARGET_DIR", paths::target().join("tools")),
    )
}

/// Adds rustup's components for formatting and linting, unless they are there.
pub fn ensure_components() -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if !has(subcommand) {
            run::loudly(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}
