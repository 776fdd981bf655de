//! The command line: what can be asked for, and what is refused before anything is touched.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::config::SerialConfig;
use crate::config::block::{BlockConfig, BlockConfigError};
use crate::config::device::DeviceConfig;
use crate::config::net::NetConfig;
use crate::config::vsock::VsockConfig;

/// Exit statuses, as scripts rely on them.
pub mod status {
    /// Done; of `run`: the guest powered off.
    pub const DONE: u8 = 0;
    /// Failed; what was begun is undone.
    pub const FAILED: u8 = 1;
    /// The guest reset itself.
    pub const GUEST_RESET: u8 = 10;
    /// The guest crashed beyond its own handling.
    pub const GUEST_TRIPLE_FAULT: u8 = 11;
    /// The operator ended the VM.
    pub const STOPPED: u8 = 12;
    /// This VM cannot be restored here.
    pub const RESTORE_REFUSED: u8 = 20;
    /// The last kernel handed nothing over.
    pub const NOTHING_HANDED_OVER: u8 = 21;
    /// Some VMs were not restored.
    pub const KEPT: u8 = 22;
}

const EXIT_STATUSES: &str = "\
Exit status:
   0  done; of `run`: the guest powered off
   1  failed; whatever was begun is undone, and guests run on
   2  wrong usage; nothing was touched
  10  the guest reset itself (`run`)
  11  the guest crashed with a triple fault (`run`)
  12  the operator stopped the VM (`run`)
  20  this VM cannot be restored here (`run`, when started by `restore`)
  21  the last kernel handed nothing over (`restore`)
  22  some VMs could not be restored and are kept in memory (`restore`)

Environment:
  KHO_VMM_RUN_DIR       the folder of the VMs' sockets, instead of /run/vmm
  KHO_VMM_INIT_COUNTER  the raw counter (TSC, CNTVCT) at which init was reached, for the timeline (`restore`)
  KHO_VMM_FAULT         faults to inject, for tests: PROCESS.PHASE[/VM]=kill|fail|stall|flip[@ATTEMPT], comma-separated";

/// A virtual machine monitor whose guests outlive a change of the host's kernel
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXIT_STATUSES, after_help = "`vmm --help` tells the exit statuses.")]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// How to log
    #[command(flatten)]
    pub log: LogArgs,
}

/// What is logged, on the standard error stream.
#[derive(Clone, Copy, Debug, Args)]
pub struct LogArgs {
    /// How much to log, on the standard error stream
    #[arg(long = "log", global = true, value_name = "LEVEL", default_value = "warn")]
    pub level: LogLevel,
    /// How to log
    #[arg(long = "log-format", global = true, value_name = "FORMAT", default_value = "text")]
    pub format: LogFormat,
}

impl LogArgs {
    /// The same, as arguments for another `vmm`.
    pub fn arguments(self) -> Vec<String> {
        let level = self.level.to_possible_value().map(|value| format!("--log={}", value.get_name()));
        let format = self.format.to_possible_value().map(|value| format!("--log-format={}", value.get_name()));
        level.into_iter().chain(format).collect()
    }
}

/// How much to log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// And what looks wrong.
    Warn,
    /// And what happens.
    Info,
    /// And why.
    Debug,
    /// And everything else.
    Trace,
}

/// How to log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM and stay until it ends
    Run(Box<RunArgs>),
    /// Replace the host's kernel while its VMs wait in memory
    ///
    /// Preserves the memory of all VMs while they run, pauses them, and boots the next kernel by kexec. Whatever goes
    /// wrong before that is undone, and all guests run on. Under the next kernel, `vmm restore --all` brings them back.
    Update(UpdateArgs),
    /// Bring back the VMs that the last kernel handed over, or try again with one that could not be
    Restore(RestoreArgs),
    /// List the VMs of this host
    List(JsonArg),
    /// Show one VM, and the timeline of the live update it came through
    Status(StatusArgs),
    /// Tell whether a live update of this host could go ahead
    ///
    /// A line for each question: this host, its VMs, and with --kernel the next kernel, which is looked into. The exit status is 0
    /// only if an update could go ahead. Nothing is touched.
    Check(CheckArgs),
    /// Look into a document or an index, or into what this host was handed and is about to hand over
    Inspect(InspectArgs),
    /// Pause a VM's guest
    Pause(NameArg),
    /// Let a paused guest run on
    Resume(NameArg),
    /// End a VM, as if its power were cut
    Stop(NameArg),
    /// Write the memory and the document of a VM that could not be restored to a file
    ///
    /// The file is an ELF core dump: a segment for each range of the guest's memory, at its physical address, and the document as a
    /// note of `kho-vmm`. What is zero takes no room on the disk. The VM is kept as before.
    Rescue(RescueArgs),
    /// Give up a VM that could not be restored: its memory is lost, and the host has it back
    Discard(NameArg),
    /// Ask a VM's guest to give back so much of its memory
    ///
    /// The guest does so as far as it can, and takes memory back by itself before it runs out of it. Memory goes back to the host
    /// in whole pieces of 2 MiB, so that it may be less than the guest does without. `vmm status` shows both. The VM must have
    /// been started with --balloon.
    Balloon(BalloonArgs),
    /// List the faults that tests can ask for
    #[command(hide = true)]
    Faults,
}

/// `vmm run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of the VM: 1 to 48 letters, digits, - and _
    #[arg(long, value_parser = vm_name, required_unless_present = "restore")]
    pub name: Option<String>,
    /// Kernel of the guest: on x86_64 a bzImage, or an ELF file with a PVH entry point; on aarch64 an Image or Image.gz
    #[arg(long, value_name = "FILE", required_unless_present = "restore")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system of the guest
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Command line of the guest's kernel
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Number of virtual CPUs, from 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Memory of the guest: bytes, or with a suffix of K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub memory: u64,
    /// First serial port of the guest: stdio, file=PATH, socket=PATH or off
    ///
    /// With a socket one can attach (socat -,rawer UNIX-CONNECT:PATH) and detach; the newest client is the one. What the guest says
    /// while nobody is attached, or faster than it is read, is kept for whoever reads next, through live updates too: the last
    /// 64 KiB of it. `vmm status` tells how many bytes had to be dropped.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialConfig,
    /// Give the guest an entropy source
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a disk: a raw image, or a block device. Can be given more than once
    ///
    /// The image is locked against a second user. `readonly` keeps the guest from writing, `id` names the disk in the
    /// guest (/dev/disk/by-id/virtio-STR), `direct` bypasses the host's page cache.
    #[arg(long, value_name = "PATH[,readonly][,id=STR][,direct]", value_parser = disk)]
    pub disk: Vec<BlockConfig>,
    /// Plug the guest into a network by a tap of the host. Can be given more than once
    ///
    /// The tap exists already, and no other VM uses it: `ip tuntap add dev NAME mode tap`. `mac` is the guest's address;
    /// without it the address is derived from the VM's name, and so the same at every start. After a live update a tap of the
    /// same name has to be there before `vmm restore`; the guest is then asked to announce itself to the switches behind it.
    #[arg(long, value_name = "tap=NAME[,mac=XX:XX:XX:XX:XX:XX]")]
    pub net: Vec<NetConfig>,
    /// Give the guest a balloon, so that it can give memory back: what `vmm balloon` asks for, and what it has free anyway
    #[arg(long)]
    pub balloon: bool,
    /// Give the guest sockets to programs of this host (vsock): its number, 3 or more, and a UNIX socket's path in full
    ///
    /// A program on the host that connects to the UNIX socket and sends `CONNECT PORT` is connected to that port of the
    /// guest, once it has been answered `OK`. A guest that connects to port N of CID 2 reaches the program that listens on
    /// the UNIX socket PATH_N. A live update resets all connections; new ones work at once.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    pub vsock: Option<VsockConfig>,
    /// Build the VM from what arrives on this file descriptor (used by `vmm restore`)
    #[arg(long, value_name = "FD", hide = true, conflicts_with_all = ["name", "kernel", "initrd", "append", "cpus", "memory", "serial", "rng", "disk", "net", "balloon", "vsock"])]
    pub restore: Option<i32>,
}

impl RunArgs {
    /// The virtio devices in the order of their slots, by which the guest finds them: kind by kind, and those of a kind as they were
    /// given.
    pub fn devices(&self) -> Vec<DeviceConfig> {
        let rng = self.rng.then_some(DeviceConfig::Rng);
        let disks = self.disk.iter().cloned().map(DeviceConfig::Block);
        let networks = self.net.iter().cloned().map(DeviceConfig::Net);
        let balloon = self.balloon.then_some(DeviceConfig::Balloon);
        let vsock = self.vsock.clone().map(DeviceConfig::Vsock);
        rng.into_iter().chain(disks).chain(networks).chain(balloon).chain(vsock).collect()
    }
}

/// `vmm update`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("next_kernel").args(["kernel"]).required(true)))]
pub struct UpdateArgs {
    /// What it is to be replaced by
    #[command(flatten)]
    pub next: NextKernelArgs,
    /// Go on although this check fails, as `vmm check` names it. Can be given more than once
    ///
    /// What it is about is told by `vmm check`. Where the check is right, guests are lost: with another version of any of the formats the
    /// next kernel does not find them, without KVM it cannot run them, and a VM whose disk has gone cannot be restored.
    #[arg(long, value_name = "CHECK")]
    pub force: Vec<String>,
    /// Leave this VM behind: it is paused before the others, and ends with this kernel. Can be given more than once
    ///
    /// Should the update fail, it runs on as all others do.
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    pub skip: Vec<String>,
    /// Seconds that each phase may take before all is undone
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub timeout: Duration,
    /// Seconds that preserving the guests' memory may take; guests run meanwhile, and memory they have not used yet has to
    /// be filled in first
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub prepare_timeout: Duration,
    /// Look for every page of the guests' memory in the kernel's map of what it hands over, inside the pause, too
    ///
    /// Before the pause that is always done where the kernel shows its map, which takes root's rights and a kernel that is not locked
    /// down. With --prove an update that cannot be proven is refused.
    #[arg(long)]
    pub prove: bool,
    /// Take a checksum of all of the guests' memory inside the pause, and compare it under the next kernel before they run on
    ///
    /// It makes the pause longer by twice the time in which all memory can be read. A VM whose memory is not what it was is kept.
    #[arg(long)]
    pub digest: bool,
    /// Do everything but the reboot, undo it, and report how long each phase took
    #[arg(long)]
    pub rehearse: bool,
    /// Report in JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `vmm restore`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").args(["name", "all"]).required(true)))]
pub struct RestoreArgs {
    /// One VM that could not be restored before, after what was in the way is mended
    #[arg(value_parser = vm_name)]
    pub name: Option<String>,
    /// All VMs that were handed over
    #[arg(long)]
    pub all: bool,
    /// Report in JSON, one object per line
    #[arg(long)]
    pub json: bool,
    /// Leave this host's clock as it is
    ///
    /// The new kernel's clock comes from a real-time clock that knows seconds only. Unless this is given, or a time service keeps
    /// the clock already, it is set to what the old kernel's said plus what the counter has counted, where it is off by more
    /// than 10 ms.
    #[arg(long, requires = "all")]
    pub no_set_clock: bool,
    /// Do the work in this process, for a service manager, instead of in one of its own
    #[arg(long, requires = "all")]
    pub foreground: bool,
    /// Be the process that does the work (used by `vmm restore`)
    #[arg(long, hide = true, conflicts_with = "foreground")]
    pub supervise: bool,
    /// The index's session, retrieved already, on this file descriptor (used by `vmm update`)
    #[arg(long, value_name = "FD", hide = true, requires = "supervise")]
    pub index_session: Option<i32>,
}

/// `vmm check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The next kernel, as for `vmm update`
    #[command(flatten)]
    pub next: Option<NextKernelArgs>,
    /// Report in JSON
    #[arg(long)]
    pub json: bool,
}

/// The kernel that is to take over.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("next_command_line").args(["append", "reuse_cmdline"])))]
pub struct NextKernelArgs {
    /// The next kernel of this host
    // Whether it must be there is up to the verb.
    #[arg(long, value_name = "FILE", required = false)]
    pub kernel: PathBuf,
    /// Its initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line; must contain kho=on and liveupdate=on
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, requires = "kernel")]
    pub append: Option<String>,
    /// Give it the command line of the running kernel
    #[arg(long, requires = "kernel")]
    pub reuse_cmdline: bool,
}

/// `vmm inspect`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("subject").args(["file", "host", "diff"]).required(true)))]
pub struct InspectArgs {
    /// A VM's document, an index, a flattened device tree, or a dump that --save has written
    pub file: Option<PathBuf>,
    /// What the kernel of this host was handed, and what it is about to hand over
    #[arg(long)]
    pub host: bool,
    /// Only what it was handed
    #[arg(long, requires = "host")]
    pub incoming: bool,
    /// Only what it is about to hand over
    #[arg(long, requires = "host")]
    pub outgoing: bool,
    /// Write all of it into a folder, for a bug report; guests' memory is left out
    #[arg(long, value_name = "DIR", requires = "host")]
    pub save: Option<PathBuf>,
    /// What is not the same in two documents; the exit status is 1 when there is something
    #[arg(long, num_args = 2, value_names = ["ONE", "OTHER"])]
    pub diff: Option<Vec<PathBuf>>,
    /// As device tree source
    #[arg(long, requires = "file", conflicts_with = "json")]
    pub dts: bool,
    /// Report in JSON
    #[arg(long)]
    pub json: bool,
}

/// A verb that only lists.
#[derive(Debug, Args)]
pub struct JsonArg {
    /// Report in JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmm status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name of the VM
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// Report in JSON
    #[arg(long)]
    pub json: bool,
}

/// A verb about one VM.
#[derive(Debug, Args)]
pub struct NameArg {
    /// Name of the VM
    #[arg(value_parser = vm_name)]
    pub name: String,
}

/// `vmm rescue`.
#[derive(Debug, Args)]
pub struct RescueArgs {
    /// Name of the VM
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// The file, which must not be there yet
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// Report in JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmm balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// Name of the VM
    #[arg(value_parser = vm_name)]
    pub name: String,
    /// How much of its memory the guest is to do without: bytes, or with a suffix of K, M, G or T; 0 for nothing
    #[arg(value_parser = size_or_none)]
    pub size: u64,
}

fn vm_name(text: &str) -> Result<String, String> {
    if kho_abi::names::is_valid_vm_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a VM's name has 1 to 48 characters: letters, digits, - and _, the first a letter or digit".to_owned())
    }
}

/// A disk whose image is found from everywhere.
fn disk(text: &str) -> Result<BlockConfig, BlockConfigError> {
    text.parse::<BlockConfig>()?.absolute()
}

/// A size in bytes: a plain number, or one with a suffix of K, M, G or T (powers of 1024).
fn size(text: &str) -> Result<u64, String> {
    let expected = || "expected bytes, or a number with a suffix of K, M, G or T, such as 512M".to_owned();
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    // `parse` alone would let a sign through.
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(expected());
    }
    let number: u64 = digits.parse().map_err(|_| "more than 64 bits can hold".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("zero bytes".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err("more than 64 bits can hold".to_owned()),
    }
}

/// A size in bytes, or none.
fn size_or_none(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { size(text) }
}

/// A time-out: up to a day, as more than that is a slip of the finger.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected seconds, such as 30 or 0.5".to_owned())?;
    if seconds > 0.0 && seconds <= 86_400.0 {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("expected seconds, more than 0 and up to 86400".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_strictly() {
        for (text, bytes) in
            [("1", 1), ("4096", 4096), ("512M", 512 << 20), ("1G", 1 << 30), ("2t", 2 << 40), ("3k", 3072)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "0",
            "0G",
            "-1",
            "+1",
            "1.5G",
            "1GB",
            "1 G",
            "0x10",
            "G1",
            "16777216T",
            "99999999999999999999",
            "1é",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn timeouts_are_read_strictly() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "0", "-1", "nan", "inf", "1e9", "30s"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_in_the_order_given_kind_by_kind() {
        let line =
            "vmm run --name a --kernel k --balloon --net tap=t --disk /b,id=x --rng --disk /a,readonly --net tap=s";
        let Command::Run(arguments) = Cli::try_parse_from(line.split(' ')).unwrap().command else { panic!("{line}") };
        let devices: Vec<_> = arguments.devices().iter().map(ToString::to_string).collect();
        assert_eq!(devices, ["rng", "block:/b,id=x", "block:/a,readonly", "net:tap=t", "net:tap=s", "balloon"]);
    }

    #[test]
    fn run_needs_name_and_kernel_unless_it_restores() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("vmm run --name a --kernel k --append --x --memory 1G").is_ok());
        assert!(parse("vmm run --restore 3").is_ok());
        assert!(parse("vmm balloon a 0").is_ok());
        let next = |line: &str| match parse(line).unwrap().command {
            Command::Check(arguments) => arguments.next.map(|next| next.kernel),
            _ => panic!("{line}"),
        };
        assert_eq!((next("vmm check"), next("vmm check --kernel k")), (None, Some("k".into())));
        for line in [
            "vmm run --kernel k",
            "vmm run --name a",
            "vmm run --name a/b --kernel k",
            "vmm run --name a --kernel k --memory 1X",
            "vmm run --name a --kernel k --serial tty",
            "vmm run --name a --kernel k --disk a.img,ro",
            "vmm run --name a --kernel k --net t",
            "vmm run --restore 3 --name a",
            "vmm balloon a",
            "vmm balloon a -1",
            "vmm balloon a 0M",
            "vmm restore",
            "vmm update",
            "vmm update --initrd i",
            "vmm check --initrd i",
            "vmm update --kernel k --append x --reuse-cmdline",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
