//! Initramfs images: the lab host's and the busybox guest's.
use crate::architecture::Architecture;
use crate::products::Products;
use crate::{paths, run};
use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of an image.
enum Content {
    Folder,
    Program(Vec<u8>),
    Link(String),
}

/// An initramfs under construction: files by their path, which sorts a folder before what it contains.
#[derive(Default)]
struct Image {
    files: BTreeMap<String, Content>,
}

impl Image {
    fn add(&mut self, path: &str, content: Content) {
        for (position, _) in path.match_indices('/') {
            self.files.entry(path[..position].to_owned()).or_insert(Content::Folder);
        }
        self.files.insert(path.to_owned(), content);
    }

    fn add_program(&mut self, path: &str, source: &Path) -> Result<()> {
        let bytes = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.add(path, Content::Program(bytes));
        Ok(())
    }

    /// Busybox under every name it answers to, so that scripts find their commands.
    fn add_busybox(&mut self, architecture: Architecture) -> Result<()> {
        let busybox = busybox(architecture)?;
        self.add_program("bin/busybox", &busybox)?;
        let mut applets = if architecture.is_native() {
            Command::new(&busybox)
        } else {
            let mut emulator = Command::new(architecture.user_emulator().0);
            emulator.arg(&busybox);
            emulator
        };
        for applet in run::quietly(applets.arg("--list"))?.split_whitespace() {
            if applet != "busybox" {
                self.add(&format!("bin/{applet}"), Content::Link("busybox".into()));
            }
        }
        Ok(())
    }

    fn pack(self, target: &Path) -> Result<()> {
        let mut archive = Vec::new();
        for (inode, (path, content)) in (1..).zip(&self.files) {
            let (kind, permissions, bytes) = match content {
                Content::Folder => (ModeFileType::Directory, 0o755, &[][..]),
                Content::Program(bytes) => (ModeFileType::Regular, 0o755, &bytes[..]),
                Content::Link(goal) => (ModeFileType::Symlink, 0o777, goal.as_bytes()),
            };
            let entry = Builder::new(path).ino(inode).mode(permissions).set_mode_file_type(kind).nlink(1);
            let size = u32::try_from(bytes.len()).with_context(|| format!("{path} is too large for an initramfs"))?;
            let mut writer = entry.write(&mut archive, size);
            writer.write_all(bytes).with_context(|| format!("cannot pack {path}"))?;
            writer.finish().with_context(|| format!("cannot pack {path}"))?;
        }
        trailer(&mut archive).context("cannot end the initramfs")?;
        fs::write(target, archive).with_context(|| format!("cannot write {}", target.display()))
    }
}

/// The initramfs of the lab's host: PID 1, `vmm`, a shell, and the other end of guests' loads.
pub fn host(architecture: Architecture, products: &Products, target: &Path) -> Result<()> {
    let mut image = Image::default();
    image.add_program("init", &products.init)?;
    image.add_program("bin/vmm", &products.vmm)?;
    image.add_program("bin/lab-load", &products.load)?;
    image.add_busybox(architecture)?;
    for folder in ["data", "dev", "proc", "sys", "run", "tmp", "share"] {
        image.add(folder, Content::Folder);
    }
    image.pack(target)
}

/// The initramfs of the Linux guest: busybox, a script that watches for damage, and the load.
pub fn guest(architecture: Architecture, products: &Products, target: &Path) -> Result<()> {
    let mut image = Image::default();
    image.add_busybox(architecture)?;
    image.add_program("bin/lab-load", &products.load)?;
    image.add_program("init", &paths::workspace().join("resources/initramfs/guest-init.sh"))?;
    for folder in ["data", "dev", "proc", "sys", "tmp"] {
        image.add(folder, Content::Folder);
    }
    image.pack(target)
}

/// An empty ext4 file system of so many MiB.
pub fn file_system(target: &Path, mib: u32) -> Result<()> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    run::quietly(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(target).arg(format!("{mib}M")))?;
    Ok(())
}

/// A statically linked busybox for `architecture`: this machine's own, or what set-up has brought.
pub fn busybox(architecture: Architecture) -> Result<PathBuf> {
    let busybox = if architecture.is_native() {
        paths::program("busybox").context("there is no busybox on this machine")?
    } else {
        let folder = foreign_busybox(architecture)?;
        // Debian's package has moved it from one folder to the other.
        let found =
            ["bin/busybox", "usr/bin/busybox"].map(|path| folder.join(path)).into_iter().find(|path| path.is_file());
        found.with_context(|| format!("there is no busybox for {} on this machine", architecture.name()))?
    };
    let bytes = fs::read(&busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    if !is_static(&bytes) {
        bail!("{} is not statically linked, so it cannot run in an initramfs", busybox.display());
    }
    Ok(busybox)
}

/// Where Debian's package of busybox for another architecture is unpacked.
pub fn foreign_busybox(architecture: Architecture) -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("busybox-{}", architecture.name())))
}

/// Whether a 64-bit little-endian ELF program names no interpreter.
pub fn is_static(elf: &[u8]) -> bool {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, size: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    };
    let headers = || -> Option<(usize, usize, u64)> {
        Some((usize::try_from(number(0x20, 8)?).ok()?, usize::try_from(number(0x36, 2)?).ok()?, number(0x38, 2)?))
    };
    let Some((start, size, count)) = headers().filter(|_| elf.starts_with(b"\x7fELF\x02\x01")) else { return false };
    (0..count).all(|index| {
        usize::try_from(index)
            .ok()
            .and_then(|index| number(start.checked_add(index.checked_mul(size)?)?, 4))
            .is_some_and(|kind| kind != u64::from(INTERPRETER))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_and_no_program_at_all_are_not_static() {
        let this_test = std::env::current_exe().expect("a test has an executable");
        assert!(!is_static(&fs::read(this_test).expect("it can be read")));
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(b"\x7fELF\x02\x01"));
    }

    #[test]
    fn folders_are_packed_before_what_they_contain() {
        let mut image = Image::default();
        image.add("a/b/c", Content::Link("d".into()));
        assert_eq!(image.files.keys().collect::<Vec<_>>(), ["a", "a/b", "a/b/c"]);
    }
}
