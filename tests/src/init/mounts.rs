//! The file systems programs expect, and the folder shared with the build machine.
use crate::link::{SHARE, SHARE_TAG};
use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use std::ffi::CString;
use std::fs;

/// Mounts everything. The share comes with `cache=none`, so both sides see each other's writes at once.
pub fn all() -> Result<()> {
    let share = "trans=virtio,version=9p2000.L,cache=none,msize=512000";
    for (source, target, kind, options) in [
        ("devtmpfs", "/dev", "devtmpfs", ""),
        ("proc", "/proc", "proc", ""),
        ("sysfs", "/sys", "sysfs", ""),
        ("tmpfs", "/run", "tmpfs", "mode=755"),
        ("tmpfs", "/tmp", "tmpfs", "mode=1777"),
        ("devpts", "/dev/pts", "devpts", ""),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
        (SHARE_TAG, SHARE, "9p", share),
    ] {
        // sysfs has its mount points already and refuses new folders.
        if !fs::exists(target).unwrap_or(false) {
            fs::create_dir_all(target).with_context(|| format!("cannot create {target}"))?;
        }
        let options = CString::new(options).context("a mount option contains a zero byte")?;
        mount(source, target, kind, MountFlags::empty(), options.as_c_str())
            .or_else(|error| if error == rustix::io::Errno::BUSY { Ok(()) } else { Err(error) })
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    // Without it a memfd consists of 4 KiB folios, and what LUO does costs time per folio.
    fs::write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise")
        .context("cannot enable huge pages for shared memory")
}
