//! The VMs of this host, as far as they can be looked at without being disturbed: what they say of themselves, and what the kernel
//! shows of their processes.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Finding;
use crate::control::client::Client;
use crate::control::interface::{MachineState, MachineStatus};
use crate::control::socket::RunDir;
use crate::host::{control_group, report};
use crate::memory::SEALS;

/// How long a VM has to answer.
const PATIENCE: Duration = Duration::from_secs(10);
const CHECK: &str = "vm";

/// What the next kernel does once per folio when it takes memory over, measured on an emulated host; a real one is faster. One of
/// 2 MiB has more to be done than a page, but 512 pages have far more.
const MICROSECONDS_PER_HUGE_FOLIO: u64 = 92;
const MICROSECONDS_PER_PAGE: u64 = 8;
const HUGE: u64 = 2 << 20;
const KIB: u64 = 1 << 10;

/// A line per VM that is not left out, and what is wrong with it, and whether there is memory for what is missing of theirs.
pub fn check(dir: &RunDir, skipped: &[String]) -> Vec<Finding> {
    let (mut findings, mut holes) = (Vec::new(), 0);
    for name in dir.names("sock").into_iter().filter(|name| !skipped.contains(name)) {
        match Client::connect(dir, &name, PATIENCE).and_then(|mut client| client.status()) {
            Ok(vm) => match vm.state {
                MachineState::Running | MachineState::Paused => match Seen::of(&vm) {
                    Ok(seen) => {
                        holes += seen.holes();
                        findings.extend(seen.findings(&vm));
                    }
                    Err(error) => findings.push(Finding::failure(
                        CHECK,
                        format!("{name}: its process {} cannot be looked at: {error}", vm.pid),
                        "run vmm as root",
                    )),
                },
                MachineState::Ended => {}
                state => findings.push(Finding::failure(
                    CHECK,
                    format!("{name} is {}: only running and paused ones can be updated", state.name()),
                    "wait until it is done",
                )),
            },
            Err(error) if error.is_gone() => {}
            Err(error) => {
                let help = error.help().unwrap_or_else(|| format!("`vmm status {name}`; `vmm stop {name}` ends it"));
                findings.push(Finding::failure(CHECK, format!("{name} does not answer: {error}"), help));
            }
        }
    }
    if let Some(available) = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available) {
        findings.push(memory(holes, available));
    }
    findings
}

/// Bytes that the kernel could still give out for memory that is preserved. That cannot be where the next kernel begins (KHO's
/// scratch), which is lent to others meanwhile, as other memory for large devices is (CMA): it would have to be moved out of there.
fn available(meminfo: &str) -> Option<u64> {
    let line = |name| kibibytes(meminfo.lines().find_map(|line| line.strip_prefix(name))?);
    Some(line("MemAvailable:")?.saturating_sub(line("CmaFree:").unwrap_or(0)))
}

/// "  123 kB", in bytes.
fn kibibytes(text: &str) -> Option<u64> {
    text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(KIB)
}

/// Memory that is preserved has no holes any more.
fn memory(holes: u64, available: u64) -> Finding {
    const CHECK: &str = "memory";
    let [needed, free] = [holes, available].map(report::bytes);
    if holes <= available {
        return Finding::ok(CHECK, format!("{needed} are needed to fill the holes in guests' memory, {free} are free"));
    }
    Finding::failure(
        CHECK,
        format!("{needed} are needed to fill the holes in guests' memory, and only {free} are free"),
        "free memory, or stop a guest",
    )
}

/// A disk image that a VM has open.
struct Disk {
    path: PathBuf,
    /// Why it could not be opened again under the next kernel.
    trouble: Option<&'static str>,
}

/// What the kernel shows of a VM's process.
struct Seen {
    size: u64,
    /// How much of it there is.
    filled: u64,
    /// How its process has it mapped. A guest that was just restored has not touched all of it yet.
    mapped: Mapped,
    sealed: bool,
    disks: Vec<Disk>,
    /// The least that a control group of it still lets it have.
    left: Option<(PathBuf, u64)>,
}

impl Seen {
    fn of(vm: &MachineStatus) -> io::Result<Self> {
        let process = Path::new("/proc").join(vm.pid.to_string());
        let (mut ram, mut disks) = (None, Vec::new());
        for entry in fs::read_dir(process.join("fd"))?.flatten() {
            // One that is closed meanwhile is no memory and no disk.
            let (Ok(target), path) = (fs::read_link(entry.path()), entry.path()) else { continue };
            let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).unwrap_or_default();
            if is_locked(&info) {
                disks.push(disk(&path, target));
            // After a live update a memfd has lost its name.
            } else if target.to_string_lossy().ends_with(" (deleted)") {
                let Ok(file) = File::open(&path) else { continue };
                let sealable = rustix::fs::fcntl_get_seals(&file).is_ok();
                if sealable && file.metadata()?.size() == vm.memory {
                    ram = Some((file, target));
                }
            }
        }
        let (ram, name) =
            ram.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it has no guest's memory open"))?;
        let metadata = ram.metadata()?;
        let smaps = fs::read_to_string(process.join("smaps"))?;
        Ok(Self {
            size: metadata.size(),
            filled: metadata.blocks() * 512,
            mapped: Mapped::read(&smaps, &name.to_string_lossy()),
            sealed: rustix::fs::fcntl_get_seals(ram.as_fd())? == SEALS,
            disks,
            left: control_group::least_left(&process),
        })
    }

    fn holes(&self) -> u64 {
        self.size.saturating_sub(self.filled)
    }

    fn findings(&self, vm: &MachineStatus) -> Vec<Finding> {
        let (name, mut findings) = (&vm.name, Vec::new());
        let (huge, small) = self.mapped.folios(self.filled);
        let milliseconds = (huge * MICROSECONDS_PER_HUGE_FOLIO + small * MICROSECONDS_PER_PAGE) / 1000;
        let mut found = format!("{name}: {}, {} of memory", vm.state.name(), report::bytes(self.size));
        if self.holes() > 0 {
            found.push_str(&format!(", {} of it holes", report::bytes(self.holes())));
        }
        found.push_str(&format!(", the rest in about {} folios, taken over in about {milliseconds} ms", huge + small));
        findings.push(Finding::ok(CHECK, found));
        if !self.sealed {
            findings.push(Finding::failure(
                "vm-seals",
                format!("{name}: its memory does not have the seals that it was made with"),
                format!("this is not as `vmm run` leaves it: `vmm stop {name}` and start it anew"),
            ));
        }
        for Disk { path, trouble } in &self.disks {
            findings.extend(trouble.map(|trouble| {
                let help = format!("put the image back where it was, or power {name} off before the update");
                Finding::failure("vm-disk", format!("{name}: its disk {} {trouble}", path.display()), help)
            }));
        }
        if let Some((group, left)) = self.left.as_ref().filter(|(_, left)| *left < self.holes()) {
            findings.push(Finding::failure(
                "vm-cgroup",
                format!(
                    "{name}: {} of its memory are holes, and its control group {} has {} left",
                    report::bytes(self.holes()),
                    group.display(),
                    report::bytes(*left)
                ),
                "raise its memory.max",
            ));
        }
        findings
    }
}

/// Images are locked against a second user, and nothing else that a VM has open is.
fn is_locked(info: &str) -> bool {
    info.lines().any(|line| line.starts_with("lock:") && line.contains("OFDLCK"))
}

fn disk(descriptor: &Path, path: PathBuf) -> Disk {
    let same = |open: &fs::Metadata, there: &fs::Metadata| (open.dev(), open.ino()) == (there.dev(), there.ino());
    let trouble = match (fs::metadata(descriptor), fs::metadata(&path)) {
        (Ok(open), Ok(there)) if !same(&open, &there) => Some("is no longer what is at that path"),
        // Block devices are in such a file system, too, and come back with the next kernel.
        (Ok(open), Ok(_)) => (open.is_file() && lost_with_the_kernel(&path))
            .then_some("is on a file system in memory, which ends with this kernel"),
        _ => Some("cannot be opened again"),
    };
    Disk { path, trouble }
}

/// Whether a file is in memory that nobody hands over.
fn lost_with_the_kernel(path: &Path) -> bool {
    // Linux's include/uapi/linux/magic.h
    const RAMFS: i64 = 0x8584_58f6;
    const TMPFS: i64 = 0x0102_1994;
    rustix::fs::statfs(path).is_ok_and(|system| matches!(system.f_type, RAMFS | TMPFS))
}

/// What of a file is in a process's page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mapped {
    /// Bytes in all.
    all: u64,
    /// Those in pages of 2 MiB.
    huge: u64,
}

impl Mapped {
    /// From `/proc/PID/smaps`.
    fn read(smaps: &str, name: &str) -> Self {
        let (mut ours, mut mapped) = (false, Self::default());
        for line in smaps.lines() {
            match line.split_once(':') {
                Some((key, value)) if key.chars().all(|character| character.is_alphanumeric() || character == '_') => {
                    let bytes = kibibytes(value).filter(|_| ours).unwrap_or_default();
                    match key {
                        "Rss" => mapped.all += bytes,
                        "ShmemPmdMapped" => mapped.huge += bytes,
                        _ => {}
                    }
                }
                _ => ours = line.ends_with(name),
            }
        }
        mapped
    }

    /// How many folios of 2 MiB and how many of a page so many bytes are in, if all of it is like what is mapped.
    fn folios(self, bytes: u64) -> (u64, u64) {
        let huge = u128::from(bytes) * u128::from(self.huge) / u128::from(self.all.max(1));
        let huge = u64::try_from(huge).unwrap_or(bytes).min(bytes);
        (huge / HUGE, (bytes - huge) / rustix::param::page_size() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn holes_must_fit_into_what_is_free() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available("MemAvailable:    2048 kB\nCmaFree:   1024 kB\n"), Some(1 << 20));
        assert_eq!(available("MemAvailable:    2048 kB\nCmaFree:   4096 kB\n"), Some(0));
        assert_eq!(available("MemTotal:  9 kB\nCmaFree:   4096 kB\n"), None);
        assert_eq!(memory(1 << 20, 2 << 20).verdict, Verdict::Ok);
        let finding = memory(3 << 20, 2 << 20);
        assert_eq!(finding.verdict, Verdict::Failure);
        assert!(finding.found.contains("3 MiB") && finding.found.contains("2 MiB"), "{finding}");
    }

    #[test]
    fn folios_are_reckoned_from_what_is_mapped_of_the_guests_memory_alone() {
        let smaps = "7f00-7f80 rw-s 0 00:01 5  /memfd:kho-vmm:a (deleted)\nSize: 64 kB\nRss: 4104 kB\nShmemPmdMapped:  4096 kB\nVmFlags: rd wr\n\
                     7f90-7fa0 rw-s 0 00:01 6  /memfd:kho-vmm:ab (deleted)\nRss: 2048 kB\nShmemPmdMapped:  2048 kB\n\
                     7fb0-7fc0 rw-p 0 00:00 0\nRss: 8 kB\nShmemPmdMapped:  8 kB\n";
        let mapped = Mapped::read(smaps, "/memfd:kho-vmm:a (deleted)");
        assert_eq!(mapped, Mapped { all: 4104 << 10, huge: 4 << 20 });
        assert_eq!(mapped.folios(4104 << 10), (2, 8192 / rustix::param::page_size() as u64));
        assert_eq!(mapped.folios(2 * (4104 << 10)).0, 4);
        assert_eq!(Mapped::read(smaps, "/memfd:kho-vmm:b (deleted)").folios(8 << 20).0, 0);
    }

    #[test]
    fn disks_that_have_gone_or_go_with_the_kernel_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, "").unwrap();
        let file = File::open(&path).unwrap();
        let descriptor = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
        let trouble = || disk(&descriptor, path.clone()).trouble;
        assert_eq!(trouble().is_some(), lost_with_the_kernel(&path));
        fs::remove_file(&path).unwrap();
        assert_eq!(trouble(), Some("cannot be opened again"));
        fs::write(&path, "").unwrap();
        let other = File::open(&path).unwrap();
        assert_ne!(other.metadata().unwrap().ino(), 0);
        assert!(trouble().is_some());
        assert!(is_locked("pos:\t0\nlock:\t1: OFDLCK  ADVISORY  WRITE -1 00:2a:5 0 EOF\n") && !is_locked("pos:\t0\n"));
    }
}
