//! Disk images of Debian with its own kernel, made once and cached: a guest that nobody has prepared for this monitor.
//!
//! mmdebstrap installs into an archive, `mke2fs -d` makes a file system of what is in it. That takes root, but no loop device.
pub mod emulation;
mod release;

use crate::architecture::Architecture;
use crate::setup::apt;
use crate::{kernels, paths, run};
use anyhow::{Context, Result, bail, ensure};
pub use release::{Release, releases};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What makes an image, with the Debian packages that bring it.
pub const TOOLS: &[(&str, &str)] = &[("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs")];
/// Counts up when images are made in another way that does not show in [`recipe`]: the older ones are not used any more.
const EDITION: u32 = 1;
/// Size of the file system in MiB; what is not used takes no room.
const SIZE: u32 = 512;
/// What is installed besides the kernel and what every Debian has.
const PACKAGES: &str = "systemd,systemd-sysv,udev,dbus,login,kmod,iproute2,initramfs-tools,zstd";
/// What a guest in the lab never reads.
const LEFT_OUT: &[&str] = &["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/i18n/*"];

/// The file that says what an image was made from.
const RECIPE: &str = "recipe";
/// The file that holds the release of its kernel.
const VERSION: &str = "version";

/// An image and what boots it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// An ext4 file system without partitions. Copy it before use.
    pub disk: PathBuf,
    /// The kernel that is installed in it.
    pub kernel: PathBuf,
    /// That kernel's own initramfs.
    pub initrd: PathBuf,
    /// The kernel's release.
    pub version: String,
}

/// What the kernel has to be told to boot an image from a VM's first disk.
pub const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda rw quiet";

/// Where the image of a release is kept: where the kernels are, when something may be added there, else in the user's cache.
fn folder(architecture: Architecture, release: Release) -> Result<PathBuf> {
    let kernels = kernels::folder().filter(|folder| fs::metadata(folder).is_ok_and(|it| !it.permissions().readonly()));
    let cache = kernels.map_or_else(paths::cache, Ok)?;
    Ok(cache.join(format!("debian-{}-{}", release.codename(), architecture.name())))
}

/// All that an image is made from but the archive's state. It lies beside the image, and one with another is made anew.
fn recipe(architecture: Architecture, release: Release) -> String {
    let [codename, debian, left_out] = [release.codename(), architecture.debian(), &LEFT_OUT.join(" ")];
    format!(
        "edition {EDITION}\nrelease {codename}\narchitecture {debian}\nsize {SIZE}M\npackages {PACKAGES}\nleft out {left_out}\n"
    )
}

/// An image that was made earlier.
pub fn cached(architecture: Architecture, release: Release) -> Result<Option<Image>> {
    let folder = folder(architecture, release)?;
    let file = |name: &str| folder.join(name);
    let made = fs::read_to_string(file(RECIPE)).is_ok_and(|found| found == recipe(architecture, release));
    if !made {
        return Ok(None);
    }
    let version = fs::read_to_string(file(VERSION)).context("an image says nothing of its kernel")?;
    Ok(Some(Image { disk: file("disk"), kernel: file("vmlinuz"), initrd: file("initrd"), version }))
}

/// The image of a release, which is made when there is none: some minutes.
pub fn image(architecture: Architecture, release: Release) -> Result<Image> {
    if let Some(image) = cached(architecture, release)? {
        return Ok(image);
    }
    make(architecture, release)?;
    cached(architecture, release)?.context("the image that was just made is not there")
}

fn make(architecture: Architecture, release: Release) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "an image of Debian can only be made by root");
    let target = folder(architecture, release)?;
    println!("making an image of Debian {} for {}: some minutes", release.codename(), architecture.name());
    let work = target.with_extension("new");
    for folder in [&work, &target] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
    }
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let root = work.join("root");
    install(architecture, release, &work.join("debian.sources"), &root)?;
    settle(&root)?;
    let version = take_kernel(&root, &work)?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-L", "debian", "-d"]).arg(&root).arg(work.join("disk"));
    run::quietly(command.arg(format!("{SIZE}M")))?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    write(&work.join(VERSION), &version)?;
    // The last file: without it the image is not whole.
    write(&work.join(RECIPE), &recipe(architecture, release))?;
    fs::rename(&work, &target).with_context(|| format!("cannot rename {}", work.display()))
}

/// Installs Debian into a folder, from the machine's own archive.
fn install(architecture: Architecture, release: Release, sources: &Path, root: &Path) -> Result<()> {
    let codename = apt::codename().context("this is not Debian, so it has no archive of Debian")?;
    let list = apt::sources_of(&codename, release.codename());
    if list.is_empty() {
        bail!("apt has no source of {codename}, so {} cannot be found through it", release.codename());
    }
    write(sources, &list)?;
    let debian = architecture.debian();
    let _emulation = emulation::Registration::of(architecture)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--variant=essential", "--format=tar"]);
    // The check looks for another package than the one whose emulator was just registered.
    command.args(["--skip=check/qemu", &format!("--architectures={debian}")]);
    command.arg(format!("--include={PACKAGES},linux-image-cloud-{debian}"));
    command.args(LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    // Not straight into a folder in the cache: apt's helpers are other users, who may not enter root's home.
    let archive = root.with_extension("tar");
    run::loudly(command.arg(release.codename()).arg(&archive).arg(sources))?;
    fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    run::quietly(Command::new("tar").args(["--numeric-owner", "-x", "-C"]).arg(root).arg("-f").arg(&archive))?;
    fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))
}

/// Sets the little that an installer would: names, the file system, root without a password.
fn settle(root: &Path) -> Result<()> {
    let in_root = |path: &str| root.join(path);
    write(&in_root("etc/hostname"), "debian\n")?;
    write(&in_root("etc/fstab"), "/dev/vda / ext4 defaults 0 0\n")?;
    // With one of its own, systemd does not take the first boot for an installation's first.
    write(&in_root("etc/machine-id"), "6b686f766d6d6b686f766d6d6b686f76\n")?;
    // Where nobody has asked for shadow passwords, they are in the list of users.
    for list in ["etc/passwd", "etc/shadow"].map(in_root) {
        let text = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        write(&list, &without_roots_password(&text))?;
    }
    // Newer than /usr, these say that there is no update to be followed up, which takes minutes in emulation.
    for stamp in ["etc/.updated", "var/.updated"] {
        write(&in_root(stamp), "")?;
    }
    Ok(())
}

fn without_roots_password(list: &str) -> String {
    let line = |line: &str| match line.strip_prefix("root:").and_then(|rest| rest.split_once(':')) {
        Some((_, rest)) => format!("root::{rest}\n"),
        None => format!("{line}\n"),
    };
    list.lines().map(line).collect()
}

/// Copies the kernel and its initramfs out of the folder, and gives the kernel's release.
fn take_kernel(root: &Path, target: &Path) -> Result<String> {
    let boot = root.join("boot");
    let entries = fs::read_dir(&boot).with_context(|| format!("cannot list {}", boot.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let version = names.filter_map(|name| name.strip_prefix("vmlinuz-").map(String::from)).max();
    let version = version.context("there is no kernel in the image")?;
    for (from, to) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")] {
        let from = boot.join(format!("{from}-{version}"));
        fs::copy(&from, target.join(to)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(version)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

impl Image {
    /// A copy for one guest, with further programs in it: each by its path in the guest.
    pub fn copy_to(&self, target: &Path, programs: &[(&str, &Path)]) -> Result<()> {
        run::quietly(Command::new("cp").arg("--sparse=always").arg(&self.disk).arg(target))?;
        for (path, program) in programs {
            let debugfs = |request: String| {
                let said = run::quietly(Command::new("debugfs").args(["-w", "-R", &request]).arg(target));
                said.with_context(|| format!("cannot put {path} into {}", target.display()))
            };
            debugfs(format!("write {} {path}", program.display()))?;
            debugfs(format!("set_inode_field {path} mode 0100755"))?;
            // debugfs succeeds whatever happens.
            let found = debugfs(format!("stat {path}"))?;
            ensure!(found.contains("Mode:  0755"), "{path} did not get into {}", target.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_loses_its_password() {
        let before = "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n";
        assert_eq!(without_roots_password(before), "root::19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n");
    }
}
