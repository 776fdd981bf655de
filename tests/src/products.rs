//! What the lab runs, built from this workspace: `vmm`, its unit tests, PID 1 and the load as static programs, and the oracle guest.
use crate::architecture::Architecture;
use crate::cargo::Target;
use crate::run;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Set by `cargo xtask test` for its tests: all of this is built.
pub const BUILT: &str = "KHO_VMM_LAB_BUILT";
/// Selects the oracle for cargo.
pub const ORACLE: &[&str] = &["--package", "guest-kernel", "--bin", "oracle", "--features", "image", "--release"];

/// Paths of the built programs.
#[derive(Clone, Debug)]
pub struct Products {
    /// The monitor.
    pub vmm: PathBuf,
    /// PID 1 of the lab's host.
    pub init: PathBuf,
    /// The load inside Linux guests.
    pub load: PathBuf,
    /// The oracle guest's image.
    pub oracle: PathBuf,
}

fn programs(architecture: Architecture) -> PathBuf {
    let target = Target::Linux(architecture);
    target.folder().join(target.name()).join("lab")
}

fn built() -> bool {
    std::env::var_os(BUILT).is_some()
}

impl Products {
    /// Builds what has changed.
    pub fn build(architecture: Architecture) -> Result<Self> {
        let (programs, bare_metal) = (programs(architecture), Target::BareMetal(architecture));
        if !built() {
            let mut command = Target::Linux(architecture).cargo(&["build", "--quiet", "--profile", "lab"])?;
            command.args(["--package", "vmm", "--package", "tests"]);
            run::loudly(command.args(["--bin", "vmm", "--bin", "lab-init", "--bin", "lab-load"]))?;
            run::loudly(bare_metal.cargo(&["build", "--quiet"])?.args(ORACLE))?;
        }
        Ok(Self {
            vmm: programs.join("vmm"),
            init: programs.join("lab-init"),
            load: programs.join("lab-load"),
            oracle: bare_metal.folder().join(bare_metal.name()).join("release/oracle"),
        })
    }
}

/// `cargo` with a subcommand for the unit and property tests as an architecture's programs.
pub fn unit_testing(architecture: Architecture, subcommand: &[&str]) -> Result<Command> {
    let mut command = Target::Linux(architecture).cargo(subcommand)?;
    command.args(["--package", "kho-abi", "--package", "vmm", "--package", "guest-kernel"]);
    // Tests unwind in any case, but a library that cargo builds from source would be there twice, for either way of panicking.
    command.env("CARGO_PROFILE_LAB_PANIC", "unwind");
    Ok(command)
}

/// Builds the monitor's unit tests as a static program: some of them can only run in the lab's host.
pub fn unit_tests(architecture: Architecture) -> Result<PathBuf> {
    let path = programs(architecture).join("vmm-tests");
    if built() {
        return Ok(path);
    }
    let mut command = unit_testing(architecture, &["test", "--quiet", "--no-run", "--profile", "lab"])?;
    let said = run::quietly(command.args(["--message-format", "json-render-diagnostics"]))?;
    // Only cargo knows the name it has given them.
    let executable = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "vmm" && message["profile"]["test"] == true)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo does not say where it has put the monitor's unit tests")?;
    fs::copy(&executable, &path).with_context(|| format!("cannot copy {}", executable.display()))?;
    Ok(path)
}
