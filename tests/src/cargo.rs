//! Cargo, as the developer's commands call it: for this machine, and for an architecture's own targets.
use crate::architecture::Architecture;
use crate::paths;
use crate::setup::rust::{self, Support};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// What to build for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Static programs for Linux of that architecture.
    Linux(Architecture),
    /// The oracle guest.
    BareMetal(Architecture),
}

impl Target {
    fn architecture(self) -> Architecture {
        match self {
            Self::Linux(architecture) | Self::BareMetal(architecture) => architecture,
        }
    }

    /// As Rust says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux(architecture) => architecture.linux_target(),
            Self::BareMetal(architecture) => architecture.bare_metal_target(),
        }
    }

    /// The libraries that cargo builds where the toolchain has only their sources.
    fn libraries(self) -> &'static str {
        match self {
            Self::Linux(_) => "-Zbuild-std=std,panic_abort",
            Self::BareMetal(_) => "-Zbuild-std=core,compiler_builtins",
        }
    }

    /// Where cargo puts what it builds for the target.
    ///
    /// Not the usual folder, as whoever started this process may hold its lock. One per architecture, as libraries built from
    /// source ask for unstable features, and build scripts that look for those would run again with every change of target.
    pub fn folder(self) -> PathBuf {
        paths::target().join("lab-build").join(self.architecture().name())
    }

    /// `cargo` with a subcommand, which may consist of several words, for the target.
    pub fn cargo(self, subcommand: &[&str]) -> Result<Command> {
        let mut command = cargo();
        command.args(subcommand).args(["--target", self.name()]).env("CARGO_TARGET_DIR", self.folder());
        // Meant for the process that runs us, these would rebuild everything here or reach programs they are not meant for.
        command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS").env_remove("RUSTDOCFLAGS");
        if rust::support(self.name())? == Support::Sources {
            command.arg(self.libraries()).env("RUSTC_BOOTSTRAP", "1");
        }
        if let Self::Linux(architecture) = self {
            command.env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
            if !architecture.is_native() {
                let variable = format!("CARGO_TARGET_{}", self.name().to_uppercase().replace('-', "_"));
                let [(compiler, _), _] = architecture.cross_tools();
                command.env(format!("{variable}_LINKER"), compiler);
                command.env(format!("{variable}_RUNNER"), architecture.user_emulator().0);
            }
        }
        Ok(command)
    }
}

/// `cargo` in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::workspace());
    command
}
