//! Running another architecture's programs on this machine as if they were its own, while an image is made.
use crate::architecture::Architecture;
use crate::{image, paths};
use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::path::{Path, PathBuf};

const FOLDER: &str = "/proc/sys/fs/binfmt_misc";
/// Debian's package of emulators that need no libraries, of which an image's folder has only those of its own architecture.
pub const PACKAGE: &str = "qemu-user-static";

/// An emulator of an architecture's programs that needs no libraries. Its name depends on Debian's release.
pub fn emulator(architecture: Architecture) -> Option<PathBuf> {
    let (name, _) = architecture.user_emulator();
    let found = [format!("{name}-static"), name.into()].into_iter().filter_map(|name| paths::program(&name));
    found.into_iter().find(|path| fs::read(path).is_ok_and(|bytes| image::is_static(&bytes)))
}

/// The emulator as the kernel knows it. Forgotten with its value.
pub struct Registration {
    entry: Option<PathBuf>,
}

impl Registration {
    /// Registers the emulator, unless it is this machine's architecture or somebody has done so already.
    pub fn of(architecture: Architecture) -> Result<Self> {
        let (name, _) = architecture.user_emulator();
        if architecture.is_native() || Path::new(FOLDER).join(name).exists() {
            return Ok(Self { entry: None });
        }
        let register = Path::new(FOLDER).join("register");
        if !register.exists() {
            mount("binfmt_misc", FOLDER, "binfmt_misc", MountFlags::empty(), None)
                .with_context(|| format!("cannot mount {FOLDER}"))?;
        }
        let path = emulator(architecture).with_context(|| format!("there is no static {name} on this machine"))?;
        let name = format!("kho-vmm-{}", architecture.name());
        let entry = Path::new(FOLDER).join(&name);
        if entry.exists() {
            // Left behind by a process that was killed.
            fs::write(&entry, "-1").with_context(|| format!("cannot remove {}", entry.display()))?;
        }
        let rule = rule(&name, machine(architecture), &path);
        fs::write(&register, rule).with_context(|| format!("cannot register {}", path.display()))?;
        Ok(Self { entry: Some(entry) })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // What is left behind is replaced the next time.
        let _ = self.entry.take().map(|entry| fs::write(entry, "-1"));
    }
}

/// The architecture's number in ELF headers.
fn machine(architecture: Architecture) -> u8 {
    match architecture {
        Architecture::X86_64 => 62,
        Architecture::Aarch64 => 183,
    }
}

/// What tells the kernel which programs are run by the emulator. `F` has it open the emulator now: in the image's folder there is none.
fn rule(name: &str, machine: u8, emulator: &Path) -> String {
    let magic = format!("\\x7fELF\\x02\\x01\\x01{}\\x02\\x00\\x{machine:02x}\\x00", "\\x00".repeat(9));
    // Programs and shared objects (2 and 3), of any operating system.
    let mask = format!("{}\\x00{}\\xfe\\xff\\xff\\xff", "\\xff".repeat(7), "\\xff".repeat(8));
    format!(":{name}:M::{magic}:{mask}:{}:F", emulator.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_and_mask_of_a_rule_cover_the_beginning_of_an_elf_header() {
        let rule = rule("name", 183, Path::new("/usr/bin/qemu-aarch64"));
        let parts: Vec<_> = rule.split(':').collect();
        assert_eq!(parts[4].replace("\\x7fELF", "\\x7f\\x45\\x4c\\x46").matches("\\x").count(), 20);
        assert_eq!(parts[5].matches("\\x").count(), 20);
        assert!(parts[4].ends_with("\\x02\\x00\\xb7\\x00"), "{rule}");
        assert_eq!(parts[6..], ["/usr/bin/qemu-aarch64", "F"]);
    }
}
