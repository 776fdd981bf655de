//! What is checked before an update touches anything: the next kernel, its command line, this host, its VMs.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::arch;
use crate::cli::UpdateArgs;
use crate::control::client::{Client, ClientError};
use crate::control::interface::{MachineState, MachineStatus};
use crate::control::socket::{RunDir, SocketError, WorkLock};
use crate::handover::luo::{Device, LuoError};
use crate::host::kept::KeptVm;
use crate::host::restore;

/// How long to wait while another process uses `/dev/liveupdate`, which takes it moments.
const DEVICE_PATIENCE: Duration = Duration::from_secs(3);

/// What the next kernel's command line must say, or it will not look for what is handed over.
const NEEDED: [&str; 2] = ["kho", "liveupdate"];

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
    /// The next kernel would ignore what is handed over.
    #[error(
        "the next kernel's command line does not contain {parameter}=on: it would not look for what is handed over, \
             and all guests would be lost"
    )]
    CommandLine {
        /// The missing parameter.
        parameter: &'static str,
    },
    /// The command line cannot be passed on.
    #[error("the next kernel's command line contains a NUL")]
    CommandLineNul,
    /// No KVM.
    #[error("cannot open /dev/kvm")]
    Kvm {
        /// Why.
        source: kvm_ioctls::Error,
    },
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
            Self::CommandLine { .. } => "add `kho=on liveupdate=on` to --append".to_owned(),
            Self::Kvm { .. } => "load the module kvm_intel or kvm_amd, and run vmm as root".to_owned(),
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
    /// Keep others away.
    pub locks: Locks,
}

/// Checks all that can be known beforehand.
pub fn check(dir: &RunDir, arguments: &UpdateArgs) -> Result<Checked, CheckError> {
    let kernel = open("image", &arguments.kernel)?;
    let initrd = arguments.initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
    let command_line = command_line(arguments)?;
    kvm_ioctls::Kvm::new().map_err(|source| CheckError::Kvm { source })?;
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
    let vms = candidates(dir, arguments.timeout)?;
    let files = Files { kernel, initrd, command_line };
    Ok(Checked { files, device, frequency_hz, vms, locks: Locks { _update: update, _restore: restore } })
}

fn open(what: &'static str, path: &Path) -> Result<File, CheckError> {
    let failed = |source| CheckError::Unreadable { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    Ok(file)
}

fn command_line(arguments: &UpdateArgs) -> Result<CString, CheckError> {
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
    if let Some(parameter) = NEEDED.into_iter().find(|parameter| !is_on(&text, parameter)) {
        return Err(CheckError::CommandLine { parameter });
    }
    CString::new(text).map_err(|_| CheckError::CommandLineNul)
}

/// The running kernel's command line, without what its boot loader said about itself.
fn reusable(text: &str) -> String {
    let words = text.split_whitespace().filter(|word| !word.starts_with("BOOT_IMAGE="));
    words.collect::<Vec<_>>().join(" ")
}

/// Whether a kernel parameter is switched on; the last mention counts, and none after `--` does.
fn is_on(command_line: &str, parameter: &str) -> bool {
    let words = command_line.split_whitespace().take_while(|word| *word != "--");
    let values = words.filter_map(|word| word.split_once('=')).filter(|(name, _)| *name == parameter);
    values.last().is_some_and(|(_, value)| matches!(value, "on" | "1" | "y" | "Y"))
}

/// Every VM of this host takes part: one that did not would die with the kernel.
fn candidates(dir: &RunDir, limit: Duration) -> Result<Vec<Candidate>, CheckError> {
    let mut vms = Vec::new();
    for name in dir.names("sock") {
        let connected = Client::connect(dir, &name, limit)
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
    fn parameter_counts_as_the_kernel_counts_it() {
        for line in ["kho=on", "quiet kho=on x=y", "kho=off kho=on", "kho=1"] {
            assert!(is_on(line, "kho"), "{line}");
        }
        for line in ["", "kho", "kho=off", "kho=on kho=off", "xkho=on", "kho=one", "-- kho=on"] {
            assert!(!is_on(line, "kho"), "{line}");
        }
    }

    #[test]
    fn reused_command_line_says_nothing_of_the_boot_loader() {
        assert_eq!(reusable("BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1  kho=on\n"), "root=/dev/vda1 kho=on");
    }

    fn arguments(append: Option<&str>) -> UpdateArgs {
        UpdateArgs {
            kernel: PathBuf::from("/nonexistent"),
            initrd: None,
            append: append.map(str::to_owned),
            reuse_cmdline: false,
            timeout: Duration::from_secs(1),
            prepare_timeout: Duration::from_secs(1),
            rehearse: false,
            json: false,
        }
    }

    #[test]
    fn command_line_without_handover_is_refused() {
        assert!(matches!(command_line(&arguments(None)), Err(CheckError::NoCommandLine)));
        for (line, missing) in [("quiet", "kho"), ("kho=on", "liveupdate"), ("liveupdate=on", "kho")] {
            match command_line(&arguments(Some(line))) {
                Err(CheckError::CommandLine { parameter }) => assert_eq!(parameter, missing),
                other => panic!("{other:?}"),
            }
        }
        assert!(command_line(&arguments(Some("kho=on liveupdate=on"))).is_ok());
    }

    #[test]
    fn missing_image_is_refused_before_anything_else() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&folder.path().join("vmm"));
        let refused = check(&dir, &arguments(Some("kho=on liveupdate=on"))).err().unwrap();
        assert!(matches!(refused, CheckError::Unreadable { what: "image", .. }));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
