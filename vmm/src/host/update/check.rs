//! What is checked before an update touches anything: the next kernel, its command line, this host, its VMs.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::left_behind::LeftBehind;
use crate::arch;
use crate::cli::{NextKernelArgs, UpdateArgs};
use crate::control::client::{Client, ClientError};
use crate::control::interface::{MachineState, MachineStatus};
use crate::control::socket::{RunDir, SocketError, WorkLock};
use crate::handover::luo::{Device, LuoError};
use crate::host::check::{Finding, NAMES, Verdict, machines, next_kernel, strays, this_host};
use crate::host::kept::KeptVm;
use crate::host::restore;

/// How long to wait while another process uses `/dev/liveupdate`, which takes it moments.
const DEVICE_PATIENCE: Duration = Duration::from_secs(3);

/// Why an update is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A file of the next kernel cannot be read.
    #[error("cannot read the next kernel's {what} {}", path.display())]
    Unreadable {
        /// Which one.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No command line was given.
    #[error("the next kernel has no command line")]
    NoCommandLine,
    /// A check fails, and is not forced.
    #[error("{}: {}", finding.check, finding.found)]
    Failed {
        /// The check.
        finding: Finding,
    },
    /// There is nothing of that name to force.
    #[error("{name} is no check that could be forced")]
    UnknownCheck {
        /// The name.
        name: String,
    },
    /// The command line cannot be passed on.
    #[error("the next kernel's command line contains a NUL")]
    CommandLineNul,
    /// VMs of the last update are still kept.
    #[error("VM {names} of the last live update is not restored, its memory is kept by process {pid}")]
    Kept {
        /// Which.
        names: String,
        /// By whom.
        pid: u32,
    },
    /// The last update was not followed by a restore.
    #[error("the VMs of the last live update had not been restored: process {pid} does that now")]
    Unrestored {
        /// The process that does.
        pid: u32,
    },
    /// The last update was not followed by a restore, and that cannot be begun.
    #[error("the VMs of the last live update had not been restored, and that cannot be started")]
    UnrestoredStuck {
        /// Why.
        source: io::Error,
    },
    /// The live update orchestrator does not let us.
    #[error("this host is not ready for a live update")]
    Luo(#[from] LuoError),
    /// The run folder, or another process at work.
    #[error("this host's VMs cannot be updated now")]
    Socket(#[from] SocketError),
    /// A VM does not answer.
    #[error("not all VMs of this host can be updated")]
    Client(#[from] ClientError),
    /// A VM is doing something else.
    #[error("VM {name} is {}: only running and paused ones can be updated", state.name())]
    State {
        /// The VM.
        name: String,
        /// What it does.
        state: MachineState,
    },
}

impl CheckError {
    /// What the operator can do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NoCommandLine => {
                "--reuse-cmdline gives it that of the running kernel, --append one of its own".to_owned()
            }
            Self::Failed { finding } => return finding.help.clone(),
            Self::UnknownCheck { .. } => format!("there are {}", NAMES.join(", ")),
            Self::Kept { .. } => {
                "`vmm list` tells the reasons; a further update would lose that memory, so it is refused until the \
                 process that keeps it has ended"
                    .to_owned()
            }
            Self::Unrestored { .. } => "update again when `vmm list` shows them running".to_owned(),
            _ => return None,
        })
    }
}

/// The files of the next kernel.
pub struct Files {
    /// Its image.
    pub kernel: File,
    /// Its initial RAM file system.
    pub initrd: Option<File>,
    /// Its command line.
    pub command_line: CString,
}

/// Keep other updates and restores away while they live.
pub struct Locks {
    _update: WorkLock,
    _restore: WorkLock,
}

/// A VM that will take part.
pub struct Candidate {
    /// What it says about itself.
    pub status: MachineStatus,
    /// The connection to it.
    pub client: Client,
}

/// A host that is ready.
pub struct Checked {
    /// The next kernel.
    pub files: Files,
    /// The live update orchestrator.
    pub device: Device,
    /// Counts per second of the counter that runs on through a kexec.
    pub frequency_hz: u64,
    /// The VMs.
    pub vms: Vec<Candidate>,
    /// Those that do not take part.
    pub left_behind: Vec<LeftBehind>,
    /// Keep others away.
    pub locks: Locks,
}

/// Checks all that can be known beforehand.
pub fn check(dir: &RunDir, arguments: &UpdateArgs) -> Result<Checked, CheckError> {
    if let Some(name) = arguments.force.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(CheckError::UnknownCheck { name: name.clone() });
    }
    refuse(next_kernel::check(&arguments.next), &arguments.force)?;
    let kernel = open("image", &arguments.next.kernel)?;
    let initrd = arguments.next.initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
    let command_line = command_line(&arguments.next)?;
    refuse(this_host::settings(), &arguments.force)?;
    arch::await_counter_calibration();
    let frequency_hz = arch::counter_frequency();
    dir.create()?;
    let update = dir.exclusive("update")?;
    let kept = KeptVm::all(dir);
    if let Some(KeptVm { pid, .. }) = kept.first() {
        let names: Vec<&str> = kept.iter().map(|vm| vm.name.as_str()).collect();
        return Err(CheckError::Kept { names: names.join(", "), pid: *pid });
    }
    let restore = dir.exclusive("restore")?;
    let device = Device::open(DEVICE_PATIENCE)?;
    // LUO has no way to ask whether something waits to be retrieved, other than to retrieve it.
    match device.retrieve_session(kho_abi::names::INDEX_SESSION) {
        Err(LuoError::NotHandedOver { .. }) => {}
        Err(error) => return Err(error.into()),
        Ok(session) => {
            // Something does, and now it is ours to hold: to let go of it would free all of it. So a process that
            // outlives this one gets it, and does what should have been done after the last update.
            drop((device, restore));
            return Err(match restore::supervise_session(session) {
                Ok(pid) => CheckError::Unrestored { pid },
                Err(source) => CheckError::UnrestoredStuck { source },
            });
        }
    }
    let vms = candidates(dir, arguments)?;
    refuse(machines::check(dir, &arguments.skip), &arguments.force)?;
    refuse(strays::check(dir), &arguments.force)?;
    let left_behind = arguments.skip.iter().map(|name| LeftBehind::new(dir, name, arguments.timeout)).collect();
    let files = Files { kernel, initrd, command_line };
    Ok(Checked { files, device, frequency_hz, vms, left_behind, locks: Locks { _update: update, _restore: restore } })
}

fn open(what: &'static str, path: &Path) -> Result<File, CheckError> {
    let failed = |source| CheckError::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    Ok(file)
}

/// Stops at what `vmm check` would call not ok, in its words.
fn refuse(findings: Vec<Finding>, forced: &[String]) -> Result<(), CheckError> {
    for finding in findings.into_iter().filter(|finding| finding.verdict == Verdict::Failure) {
        if !forced.iter().any(|name| name == finding.check) {
            return Err(CheckError::Failed { finding });
        }
        tracing::warn!(check = finding.check, "forced, although {}", finding.found);
    }
    Ok(())
}

fn command_line(arguments: &NextKernelArgs) -> Result<CString, CheckError> {
    let text = match &arguments.append {
        Some(text) => text.clone(),
        None if arguments.reuse_cmdline => {
            let path = Path::new("/proc/cmdline");
            let running = fs::read_to_string(path);
            running.map(|text| reusable(&text)).map_err(|source| CheckError::Unreadable {
                what: "command line in",
                path: path.to_owned(),
                source,
            })?
        }
        None => return Err(CheckError::NoCommandLine),
    };
    CString::new(text).map_err(|_| CheckError::CommandLineNul)
}

/// The running kernel's command line, without what its boot loader said about itself.
fn reusable(text: &str) -> String {
    let words = text.split_whitespace().filter(|word| !word.starts_with("BOOT_IMAGE="));
    words.collect::<Vec<_>>().join(" ")
}

/// Every VM of this host takes part, as one that does not dies with the kernel; so whoever leaves one out has to name it.
fn candidates(dir: &RunDir, arguments: &UpdateArgs) -> Result<Vec<Candidate>, CheckError> {
    let UpdateArgs { timeout: limit, skip, .. } = arguments;
    let names = dir.names("sock");
    if let Some(name) = skip.iter().find(|name| !names.contains(name)) {
        return Err(ClientError::NotThere { name: name.clone() }.into());
    }
    let mut vms = Vec::new();
    for name in names.into_iter().filter(|name| !skip.contains(name)) {
        let connected = Client::connect(dir, &name, *limit)
            .and_then(|mut client| Ok(Candidate { status: client.status()?, client }));
        let vm = match connected {
            Ok(vm) => vm,
            Err(error) if error.is_gone() => continue,
            Err(error) => return Err(error.into()),
        };
        match vm.status.state {
            MachineState::Running | MachineState::Paused => vms.push(vm),
            // Its end is on its way: nothing is left to carry over.
            MachineState::Ended => {}
            state => return Err(CheckError::State { name, state }),
        }
    }
    Ok(vms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reused_command_line_says_nothing_of_the_boot_loader() {
        assert_eq!(reusable("BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1  kho=on\n"), "root=/dev/vda1 kho=on");
    }

    fn arguments(append: Option<&str>) -> UpdateArgs {
        UpdateArgs {
            next: NextKernelArgs {
                kernel: PathBuf::from("/nonexistent"),
                initrd: None,
                append: append.map(str::to_owned),
                reuse_cmdline: false,
            },
            force: Vec::new(),
            skip: Vec::new(),
            prove: false,
            digest: false,
            timeout: Duration::from_secs(1),
            prepare_timeout: Duration::from_secs(1),
            rehearse: false,
            json: false,
        }
    }

    #[test]
    fn only_what_is_forced_is_let_through() {
        let findings = || next_kernel::check(&arguments(Some("quiet")).next);
        let failed = |names: &[&str]| {
            let forced: Vec<String> = names.iter().map(ToString::to_string).collect();
            match refuse(findings(), &forced) {
                Err(CheckError::Failed { finding }) => finding.check,
                Err(error) => panic!("{error}"),
                Ok(()) => "nothing",
            }
        };
        assert_eq!(failed(&[]), "next-kernel");
        assert_eq!(failed(&["next-kernel"]), "next-cmdline");
        assert_eq!(failed(&["next-kernel", "next-cmdline"]), "nothing");
        assert!(findings().iter().all(|finding| NAMES.contains(&finding.check)));
    }

    #[test]
    fn what_is_forced_must_be_a_check() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, "").unwrap();
        let mut arguments = arguments(Some("quiet"));
        (arguments.next.kernel, arguments.force) = (image, vec!["all".to_owned()]);
        let refused = check(&RunDir::at(folder.path()), &arguments).err().unwrap();
        assert!(matches!(&refused, CheckError::UnknownCheck { name } if name == "all"));
        assert!(refused.help().is_some_and(|help| help.contains("next-cmdline")));
    }

    #[test]
    fn missing_image_is_refused_before_anything_else() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("vmm"));
        let refused = check(&dir, &arguments(Some("kho=on liveupdate=on"))).err().unwrap();
        assert!(matches!(&refused, CheckError::Failed { finding } if finding.check == "next-kernel"), "{refused}");
        assert!(refused.to_string().contains("/nonexistent"), "{refused}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
