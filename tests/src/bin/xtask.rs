//! `cargo xtask`: the developer's commands.
use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tests::architecture::{Accelerator, Architecture};
use tests::{bench, check, debian, demo, fuzz, kernels, products::Products, setup};

/// Developer's commands of kho-vmm. Each does its own set-up: on Debian as root it installs what is missing, elsewhere it
/// says what is missing and changes nothing.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Environment:
  KHO_VMM_KERNELS   folder with the lab's kernels (vmlinuz-VERSION-ARCH and config-VERSION-ARCH), before ~/.cache/kho-vmm
  KHO_VMM_RUST_SRC  archive (tar.xz) of the Rust library's sources, where rustup cannot add a target

Logs of the lab's hosts and guests are under target/lab.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Carry two guests from one host kernel to the next and back, and show their timelines
    Demo {
        /// Architecture of the host [default: this machine's]
        #[arg(long)]
        arch: Option<Architecture>,
        /// Write the result to this file
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// What runs the host [default: kvm where it offers nested virtualization, else tcg]
        #[arg(long)]
        accel: Option<Accelerator>,
    },
    /// Check everything: format, lints, licences, documentation, unit, property and end-to-end tests
    Test {
        /// Architecture of the host, or all of them [default: this machine's]
        #[arg(long, value_parser = selection())]
        arch: Option<&'static [Architecture]>,
        /// Also what takes long: fuzzing, every test and every release of Debian on every architecture, and larger numbers
        #[arg(long)]
        full: bool,
    },
    /// Run the end-to-end tests alone
    E2e {
        /// Architecture of the host, or all of them [default: this machine's]
        #[arg(long, value_parser = selection())]
        arch: Option<&'static [Architecture]>,
        /// Also what takes long: every test and every release of Debian on every architecture, and larger numbers
        #[arg(long)]
        full: bool,
        /// Only tests whose names contain one of these
        filters: Vec<String>,
    },
    /// Fuzz what decodes the files and the memory of others, each target for some seconds
    Fuzz {
        /// How long each target runs
        #[arg(long, default_value_t = fuzz::SECONDS)]
        seconds: u32,
        /// Only these targets
        targets: Vec<String>,
    },
    /// Measure what a live update takes with more and more vCPUs, phase by phase
    Bench {
        /// Architecture of the host [default: this machine's]
        #[arg(long)]
        arch: Option<Architecture>,
    },
    /// Make the disk images of Debian that guests boot, unless they are there
    Image {
        /// Architecture of the guests, or all of them [default: this machine's]
        #[arg(long, value_parser = selection())]
        arch: Option<&'static [Architecture]>,
    },
    /// Only set up this machine, build the lab's programs, and say where they are
    Setup {
        /// Architecture of the host, or all of them [default: this machine's]
        #[arg(long, value_parser = selection())]
        arch: Option<&'static [Architecture]>,
    },
}

/// The name of one architecture, or `all`.
fn selection() -> impl TypedValueParser<Value = &'static [Architecture]> {
    let names = Architecture::ALL.iter().map(|architecture| architecture.name()).chain(["all"]);
    PossibleValuesParser::new(names).map(|chosen| {
        let named = Architecture::ALL.iter().position(|architecture| architecture.name() == chosen);
        named.map_or(Architecture::ALL, |index| &Architecture::ALL[index..=index])
    })
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<bool> {
    let native = Architecture::native;
    let chosen = |arch: Option<&[Architecture]>| -> Result<Vec<Architecture>> {
        arch.map_or_else(|| Ok(vec![native()?]), |chosen| Ok(chosen.to_vec()))
    };
    match command {
        Command::Demo { arch, json, accel } => {
            let architecture = arch.map_or_else(native, Ok)?;
            setup::run(architecture)?;
            demo::run(&demo::Options { name: "demo".into(), architecture, accelerator: accel, json })
        }
        Command::Test { arch, full } => check::all(&chosen(arch)?, full).map(|()| true),
        Command::E2e { arch, full, filters } => check::end_to_end(&chosen(arch)?, full, &filters).map(|()| true),
        Command::Fuzz { seconds, targets } => fuzz::all(&targets, seconds).map(|()| true),
        Command::Bench { arch } => {
            let architecture = arch.map_or_else(native, Ok)?;
            setup::run(architecture)?;
            bench::run(architecture).map(|()| true)
        }
        Command::Image { arch } => {
            for architecture in chosen(arch)? {
                setup::for_images(architecture)?;
                for release in debian::releases() {
                    let image = debian::image(architecture, release)?;
                    println!("{}, Linux {}: {}", release.codename(), image.version, image.disk.display());
                }
            }
            Ok(true)
        }
        Command::Setup { arch } => {
            for architecture in chosen(arch)? {
                setup::run(architecture)?;
                let kernels = kernels::pair(architecture)?;
                let products = Products::build(architecture)?;
                println!("for {}:", architecture.name());
                for kernel in [&kernels.older, &kernels.newer] {
                    println!("  Linux {}: {}", kernel.version, kernel.image.display());
                }
                for program in [&products.vmm, &products.init, &products.load, &products.oracle] {
                    println!("  {}", program.display());
                }
            }
            Ok(true)
        }
    }
}
