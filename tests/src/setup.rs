//! What the lab needs from the machine: finding out what is missing, and bringing it where that can be done.
pub mod apt;
pub mod rust;
pub mod tools;

use crate::architecture::Architecture;
use crate::debian::emulation;
use crate::kernels::{self, build};
use crate::{debian, emulator, image, paths};
use anyhow::{Context, Result, bail};
use rust::Support;
use std::path::Path;

/// Something the machine lacks.
struct Need {
    what: String,
    how: String,
    kind: Kind,
}

/// How a lack is made good.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// QEMU, which has to be new enough.
    Qemu(&'static str),
    Package(&'static str),
    /// The busybox of another architecture.
    Busybox,
    /// A target of Rust.
    Target(&'static str),
    Kernels,
}

/// What a kernel's build calls, and what it includes, with the packages that bring them.
const KERNEL_TOOLS: &[(&str, &str)] = &[
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("xz", "xz-utils"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/opensslv.h", "libssl-dev"),
];

/// Makes this machine ready for making images of Debian. Quick when it is ready already.
pub fn for_images(architecture: Architecture) -> Result<()> {
    let needs = |architecture: Architecture| {
        let mut needs = missing(debian::TOOLS, "to make images of Debian");
        if !architecture.is_native() && emulation::emulator(architecture).is_none() {
            needs.push(Need {
                what: format!(
                    "a static {}, to install {}'s packages",
                    architecture.user_emulator().0,
                    architecture.name()
                ),
                how: format!("install QEMU's emulators of single programs (Debian: {})", emulation::PACKAGE),
                kind: Kind::Package(emulation::PACKAGE),
            });
        }
        Ok(needs)
    };
    bring(architecture, needs(architecture)?, needs)
}

/// Makes this machine ready for fuzzing: libFuzzer is built from its sources. Quick when it is ready already.
pub fn for_fuzzing() -> Result<()> {
    let needs = |_| Ok(missing(&[("c++", "g++")], "to build libFuzzer"));
    let native = Architecture::native()?;
    bring(native, needs(native)?, needs)
}

/// What runs programs of another architecture, when it is missing.
fn user_emulator(architecture: Architecture) -> Option<Need> {
    let (emulator, package) = architecture.user_emulator();
    (!architecture.is_native() && paths::program(emulator).is_none()).then(|| Need {
        what: format!("{emulator}, to run programs for {}", architecture.name()),
        how: format!("install QEMU's emulators of single programs (Debian: {package})"),
        kind: Kind::Package(package),
    })
}

fn needs(architecture: Architecture) -> Result<Vec<Need>> {
    let mut needs = Vec::new();
    let (_, package) = architecture.qemu();
    if let Err(reason) = emulator::command(architecture) {
        let oldest = emulator::OLDEST.map(|number| number.to_string()).join(".");
        let how = format!("install QEMU {oldest} or newer (Debian: {package})");
        needs.push(Need { what: format!("{reason:#}"), how, kind: Kind::Qemu(package) });
    }
    if let Err(reason) = image::busybox(architecture) {
        let (how, kind) = if architecture.is_native() {
            ("install a static busybox (Debian: busybox-static)".into(), Kind::Package("busybox-static"))
        } else {
            let [folder, debian] =
                [image::foreign_busybox(architecture)?.display().to_string(), architecture.debian().into()];
            (format!("unpack Debian's package busybox-static for {debian} to {folder} (`dpkg -x`)"), Kind::Busybox)
        };
        needs.push(Need { what: format!("{reason:#}"), how, kind });
    }
    if !architecture.is_native() {
        needs.extend(user_emulator(architecture));
        needs.extend(missing(&architecture.cross_tools(), &format!("to build for {}", architecture.name())));
    }
    for target in [architecture.linux_target(), architecture.bare_metal_target()] {
        if rust::support(target)? == Support::Missing {
            needs.push(Need {
                what: format!("the Rust toolchain cannot build for {target}"),
                how: format!(
                    "run `rustup target add {target}`, or `rustup component add rust-src`, or name an archive of the library's \
                     sources of exactly this toolchain's version in {}",
                    rust::ARCHIVE
                ),
                kind: Kind::Target(target),
            });
        }
    }
    if kernels::cached(architecture)?.is_none() {
        needs.extend(missing(KERNEL_TOOLS, "to build kernels"));
        let (major, minor) = kernels::OLDEST;
        needs.push(Need {
            what: format!("two kernels of {major}.{minor} or newer with the configuration in resources/kernels"),
            how:
                "unpack two kernel sources, run resources/kernels/build.sh for each with ~/.cache/kho-vmm as its last \
                  argument, or name a folder that holds such kernels in KHO_VMM_KERNELS"
                    .into(),
            kind: Kind::Kernels,
        });
    }
    Ok(needs)
}

/// What the machine lacks of some programs on PATH and files, each with the package that brings it.
fn missing(tools: &[(&str, &'static str)], purpose: &str) -> Vec<Need> {
    let found =
        |name: &str| if name.starts_with('/') { Path::new(name).exists() } else { paths::program(name).is_some() };
    let need = |&(name, package): &(&str, &'static str)| Need {
        what: format!("{name}, {purpose}"),
        how: format!("install Debian's package {package}, or what brings it elsewhere"),
        kind: Kind::Package(package),
    };
    tools.iter().filter(|(name, _)| !found(name)).map(need).collect()
}

/// Makes this machine ready for the lab. Quick when it is ready already. Where it may not install anything it changes
/// nothing, says what is missing, and fails.
pub fn run(architecture: Architecture) -> Result<()> {
    bring(architecture, needs(architecture)?, needs)
}

/// Brings what is missing, and looks again.
fn bring(
    architecture: Architecture,
    needs: Vec<Need>,
    again: impl Fn(Architecture) -> Result<Vec<Need>>,
) -> Result<()> {
    if needs.is_empty() {
        return Ok(());
    }
    let codename = apt::codename().filter(|_| rustix::process::geteuid().is_root());
    let Some(codename) = codename else {
        eprintln!("This machine lacks:");
        for need in &needs {
            eprintln!("  - {}\n    {}", need.what, need.how);
        }
        bail!("set-up installs by itself only as root on Debian; nothing was changed");
    };
    let packages: Vec<_> = needs
        .iter()
        .filter_map(|need| match need.kind {
            Kind::Package(package) => Some(package),
            _ => None,
        })
        .collect();
    apt::update()?;
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    for need in &needs {
        match need.kind {
            Kind::Package(_) => {}
            Kind::Qemu(package) if emulator::is_offered(package) => apt::install(&[package])?,
            Kind::Qemu(_) => emulator::unpack(architecture, &codename)?,
            Kind::Busybox => busybox(architecture, &codename)?,
            Kind::Target(target) => rust::install(target, &codename)?,
            Kind::Kernels => build::missing(architecture, &codename)?,
        }
    }
    match again(architecture)?.first() {
        Some(need) => bail!("still missing after set-up: {}; {}", need.what, need.how),
        None => Ok(()),
    }
}

/// Fetches and unpacks the package of another architecture. Nothing is installed, and dpkg hears of no foreign architecture.
fn busybox(architecture: Architecture, codename: &str) -> Result<()> {
    let debian = architecture.debian();
    let suite = apt::Suite::open_for(codename, codename, Some(debian))?
        .with_context(|| format!("this machine's mirror has no packages of {codename} for {debian}"))?;
    suite.unpack("busybox-static", &image::foreign_busybox(architecture)?)
}
