//! A running emulator: its command line, its end.
use super::HostConfig;
use super::capture::FRAME_KEPT;
use crate::architecture::Accelerator;
use crate::link::{PORT, SHARE_TAG};
use crate::{emulator, run};
use anyhow::{Context, Result, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The file in a host's folder with the frames that its network has seen.
pub const CAPTURE: &str = "network.pcap";

/// Where a host's copy of a disk image is.
pub fn image_copy(folder: &Path) -> PathBuf {
    folder.join("image")
}

fn add_disk(command: &mut Command, id: &str, image: &Path) {
    // It has to outlive the host's kernel, not this machine's.
    let drive = format!("if=none,id={id},format=raw,cache=unsafe,file={}", image.display());
    command.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={id}")]);
}

/// A running emulator. Dies with its value, and with the thread that started it.
pub struct Qemu {
    child: Child,
}

impl Qemu {
    /// Starts it. Its console goes to `console.log` in `folder`, its own words to `qemu.log`.
    pub fn start(config: &HostConfig, folder: &Path, socket: &Path, command_line: &str) -> Result<Self> {
        if config.accelerator == Accelerator::Kvm && Accelerator::detect(config.architecture) != Accelerator::Kvm {
            bail!("this machine's KVM does not offer nested virtualization: use --accel tcg");
        }
        let mut command = emulator::command(config.architecture)?;
        let words = File::create(folder.join("qemu.log")).context("cannot create qemu.log")?;
        command.stdin(Stdio::null()).stdout(words.try_clone().context("cannot duplicate qemu.log")?).stderr(words);
        command.args(config.architecture.machine(config.accelerator));
        command.args(["-smp", &config.cpus.to_string(), "-m", &format!("{}M", config.memory)]);
        command.args(["-nodefaults", "-nographic", "-no-reboot"]);
        command.args(["-serial", &format!("file:{}", folder.join("console.log").display())]);
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("socket,id=lab,path={}", socket.display())]);
        command.args(["-device", &format!("virtserialport,chardev=lab,name={PORT}")]);
        let share = folder.join("share");
        command.arg("-virtfs");
        command
            .arg(format!("local,path={},mount_tag={SHARE_TAG},security_model=none,multidevs=remap", share.display()));
        command.args(["-device", "virtio-rng-pci"]);
        if config.disk > 0 {
            let image = folder.join("disk.img");
            let made = File::create(&image).and_then(|file| file.set_len(u64::from(config.disk) << 20));
            made.with_context(|| format!("cannot make {}", image.display()))?;
            add_disk(&mut command, "disk", &image);
        }
        if let Some(image) = &config.image {
            let copy = image_copy(folder);
            run::quietly(Command::new("cp").arg("--sparse=always").args([image, &copy]))?;
            add_disk(&mut command, "image", &copy);
        }
        if !config.taps.is_empty() {
            command.args(["-netdev", "user,id=network,ipv6=off"]);
            // No boot ROM: nobody boots from it.
            command.args(["-device", "virtio-net-pci,netdev=network,romfile="]);
            let file = folder.join(CAPTURE);
            let capture = format!("filter-dump,id=capture,netdev=network,maxlen={FRAME_KEPT},file={}", file.display());
            command.args(["-object", &capture]);
        }
        command.arg("-kernel").arg(&config.kernels.older.image).arg("-initrd").arg(share.join("initrd"));
        command.args(["-append", command_line]);
        // SAFETY: between fork and exec the closure makes a single system call and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command.spawn().with_context(|| format!("cannot start {}", config.architecture.qemu().0))?;
        Ok(Self { child })
    }

    /// How it ended, in words.
    pub fn ending(&mut self) -> String {
        match self.child.try_wait() {
            Ok(Some(status)) => format!("{status}"),
            Ok(None) => "it closed the link but still runs".into(),
            Err(error) => format!("its status is unknown ({error})"),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.child.try_wait().context("cannot wait for QEMU")?.is_none() {
            if Instant::now() > deadline {
                bail!("waited {} s in vain for QEMU to end", patience.as_secs());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
