//! The emulator that the lab runs on: the machine's own where that is new enough, else a newer one, unpacked beside it.
use crate::architecture::Architecture;
use crate::setup::apt;
use crate::{paths, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest QEMU that is good enough, and why.
pub const OLDEST: [u32; 3] = [10, 0, 2];
const WHY: &str = "older ones do not intercept XSETBV under SVM, so a guest inside the emulated host dies of an inconsistent XSAVE \
                   area";

/// Where Debian has newer ones, the nearest suite first.
const SUITES: [&str; 3] = ["trixie", "forky", "sid"];

/// Whether a version is not too old.
pub fn is_new_enough(version: &[u32]) -> bool {
    version >= &OLDEST
}

/// The numbers in front of a Debian package's version.
fn numbers(version: &str) -> Vec<u32> {
    // It may begin with an epoch.
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    upstream.split(['.', '+', '-', '~']).map_while(|part| part.parse().ok()).collect()
}

/// How to start the emulator of an architecture. Fails, with the reason, when there is none that is good enough.
pub fn command(architecture: Architecture) -> Result<Command> {
    let (program, package) = architecture.qemu();
    let own = match paths::program(program) {
        None => format!("{program} is not installed (Debian's package {package})"),
        Some(_) => {
            let version = version(Command::new(program))?;
            if is_new_enough(&version) {
                return Ok(Command::new(program));
            }
            let show = |version: &[u32]| version.iter().map(u32::to_string).collect::<Vec<_>>().join(".");
            format!("{program} is version {}, but the lab needs {} or newer: {WHY}", show(&version), show(&OLDEST))
        }
    };
    match unpacked(architecture)? {
        Some(command) => Ok(command),
        None => bail!(own),
    }
}

fn version(mut command: Command) -> Result<[u32; 3]> {
    let text = run::quietly(command.arg("--version"))?;
    parse_version(&text).with_context(|| format!("QEMU does not say its version: {text}"))
}

fn parse_version(text: &str) -> Option<[u32; 3]> {
    let version = text.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
    let mut numbers = version.split('.').map(|part| part.parse().ok());
    Some([numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)])
}

fn folder(architecture: Architecture) -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("qemu-{}", architecture.name())))
}

/// The emulator from [`unpack`]: started by the loader and with the libraries that came with it, as the machine's are too old.
fn unpacked(architecture: Architecture) -> Result<Option<Command>> {
    let root = folder(architecture)?;
    let program = root.join("usr/bin").join(architecture.qemu().0);
    if !program.exists() {
        return Ok(None);
    }
    let (loader, libraries) = match std::env::consts::ARCH {
        "aarch64" => ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
        _ => ("usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
    };
    let libraries = root.join(libraries);
    let mut command = Command::new(root.join(loader));
    command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command.arg("--library-path").arg(format!("{0}:{0}/pulseaudio", libraries.display())).arg(program);
    for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
        command.arg("-L").arg(root.join(data));
    }
    Ok(Some(command))
}

/// Whether apt, with the machine's own sources, would install a version that is new enough.
pub fn is_offered(package: &str) -> bool {
    apt::candidate(package).is_some_and(|version| is_new_enough(&numbers(&version)))
}

/// Fetches an emulator that is new enough, with all that it needs, and unpacks it. Nothing is installed.
pub fn unpack(architecture: Architecture, codename: &str) -> Result<()> {
    let (_, package) = architecture.qemu();
    let target = folder(architecture)?;
    for name in SUITES {
        let Some(suite) = apt::Suite::open(codename, name)? else { continue };
        if suite.versions(package)?.iter().any(|version| is_new_enough(&numbers(version))) {
            return unpack_from(&suite, package, &target);
        }
    }
    bail!("none of {} has a {package} that is new enough: {WHY}", SUITES.join(", "))
}

fn unpack_from(suite: &apt::Suite, package: &str, target: &Path) -> Result<()> {
    println!("unpacking {package} from {} into {}", suite.name(), target.display());
    // Into another folder first, so that what is there is whole.
    let partial = target.with_extension("partial");
    if partial.exists() {
        std::fs::remove_dir_all(&partial).with_context(|| format!("cannot empty {}", partial.display()))?;
    }
    suite.unpack_with_dependencies(package, &partial)?;
    if target.exists() {
        std::fs::remove_dir_all(target).with_context(|| format!("cannot replace {}", target.display()))?;
    }
    std::fs::rename(&partial, target).with_context(|| format!("cannot move {} into place", partial.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_qemu_says() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n"), Some([10, 0, 2]));
        assert_eq!(parse_version("QEMU emulator version 11.1\n"), Some([11, 1, 0]));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn versions_of_packages_are_compared_by_their_numbers() {
        assert!(!is_new_enough(&numbers("1:7.2+dfsg-7+deb12u18+b3")));
        assert!(is_new_enough(&numbers("1:10.0.13+ds-0+deb13u1")));
        assert!(is_new_enough(&numbers("11.1.3+ds-1")));
    }
}
