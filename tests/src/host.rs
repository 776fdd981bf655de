//! The lab's host: a machine in QEMU, its PID 1 at the other end of a virtio-serial port, and a folder shared with it.
pub mod capture;
mod lock;
mod qemu;
mod wire;

use crate::arch::counter_khz;
use crate::architecture::{Accelerator, Architecture};
use crate::kernels::{self, Kernels};
use crate::link::{Answer, Ask, Hello, RESTORE, Request, SHARE, Say, TAPS};
use crate::moment::Moment;
use crate::products::Products;
use crate::{image, paths};
use anyhow::{Context, Result, bail};
use qemu::Qemu;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use wire::Wire;

/// How long a boot, a kexec or any single program may take. Generous: only a hang should ever reach it.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// The flags of a network card that is not in use: only IFF_MULTICAST, which it has in use, too, and not IFF_UP.
const DOWN: &str = "0x1000";
/// Not all that is waited for tells of itself: the state of a VM, or the end of a process that PID 1 did not start.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How many of a log's last lines are shown after a failure.
const TAIL: usize = 60;

/// Which kernel of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The older one, which the host boots first.
    Older,
    /// The newer one.
    Newer,
}

impl Side {
    /// The other kernel.
    pub fn other(self) -> Self {
        match self {
            Self::Older => Self::Newer,
            Self::Newer => Self::Older,
        }
    }
}

/// What a host is made of.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Names the folder under `target/lab/ARCH` that keeps its logs.
    pub name: String,
    /// What it emulates.
    pub architecture: Architecture,
    /// What runs it.
    pub accelerator: Accelerator,
    /// RAM in MiB.
    pub memory: u32,
    /// Processors.
    pub cpus: u32,
    /// MiB of a disk of zeroes that outlives every kexec, `/dev/vda`; 0 for none.
    pub disk: u32,
    /// Taps, each plugged into a bridge with a network that outlives every kexec, as a switch would; none for no network at all.
    /// The build machine is 10.0.2.2 there.
    pub taps: Vec<String>,
    /// A disk image of the build machine of which the host gets a copy that outlives every kexec: the next disk after that.
    pub image: Option<PathBuf>,
    /// The two kernels it can run.
    pub kernels: Kernels,
    /// The programs it carries.
    pub products: Products,
}

impl HostConfig {
    /// A host with an accelerator as the environment asks, else as this machine has it. The memory is in MiB.
    pub fn new(name: &str, architecture: Architecture, memory: u32) -> Result<Self> {
        let accelerator = Accelerator::selected(architecture)?;
        Ok(Self {
            name: name.into(),
            architecture,
            accelerator,
            memory,
            cpus: architecture.host_cpus(accelerator),
            disk: 0,
            taps: Vec::new(),
            image: None,
            kernels: kernels::pair(architecture)?,
            products: Products::build(architecture)?,
        })
    }

    /// The same with a disk of so many MiB.
    pub fn with_disk(self, disk: u32) -> Self {
        Self { disk, ..self }
    }

    /// The same with a network, and taps of these names.
    pub fn with_taps(self, taps: &[&str]) -> Self {
        Self { taps: taps.iter().map(ToString::to_string).collect(), ..self }
    }

    /// The same with a copy of a disk image.
    pub fn with_image(self, image: &Path) -> Self {
        Self { image: Some(image.to_owned()), ..self }
    }

    fn folder(&self) -> PathBuf {
        paths::lab(self.architecture).join(&self.name)
    }
}

/// How a program in the host ended, and what it said.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit status, when it ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ended {
    /// Fails unless the program succeeded.
    pub fn success(self) -> Result<Self> {
        if self.code != Some(0) {
            bail!("a program in the host failed: {self}");
        }
        Ok(self)
    }

    /// The JSON values of its standard output, one per line.
    pub fn json_lines(&self) -> Result<Vec<serde_json::Value>> {
        json_lines(&self.stdout)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit status {code}")?,
            (None, Some(signal)) => write!(f, "ended by signal {signal}")?,
            (None, None) => write!(f, "ended")?,
        }
        write!(f, "\nstandard output:\n{}\nstandard error:\n{}", self.stdout.trim_end(), self.stderr.trim_end())
    }
}

/// The JSON values of a text, one per line.
pub fn json_lines(text: &str) -> Result<Vec<serde_json::Value>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}

/// A program started in the host.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its process id there.
    pub pid: i32,
    output: String,
}

/// A running host. Ends with its value.
pub struct Host {
    config: HostConfig,
    folder: PathBuf,
    qemu: Qemu,
    wire: Wire,
    hello: Hello,
    command_line: String,
    boots: u32,
    requests: u64,
    outputs: u32,
    answers: HashMap<u64, Answer>,
    exits: HashMap<i32, (Option<i32>, Option<i32>)>,
    kernel: Side,
    // Last, so that it is released only when QEMU has ended.
    _lock: lock::Lock,
}

impl Host {
    /// Runs `body` on a fresh host and ends the host. When that fails, or panics, the last lines of all logs are shown.
    pub fn with<T>(config: HostConfig, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let folder = config.folder();
        /// Shows the logs unless the body came to a good end.
        struct ShowLogs(Option<PathBuf>);
        impl Drop for ShowLogs {
            fn drop(&mut self) {
                if let Some(folder) = &self.0 {
                    show_logs(folder);
                }
            }
        }
        let mut show = ShowLogs(Some(folder));
        let mut host = Self::start(config)?;
        let result = body(&mut host)?;
        show.0 = None;
        Ok(result)
    }

    fn start(config: HostConfig) -> Result<Self> {
        let lock = lock::Lock::take()?;
        let folder = config.folder();
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
        }
        let share = folder.join("share");
        fs::create_dir_all(&share).with_context(|| format!("cannot create {}", share.display()))?;
        for (name, kernel) in [("kernel-older", &config.kernels.older), ("kernel-newer", &config.kernels.newer)] {
            copy(&kernel.image, &share.join(name))?;
        }
        copy(&config.products.oracle, &share.join("oracle"))?;
        image::host(config.architecture, &config.products, &share.join("initrd"))?;
        image::guest(config.architecture, &config.products, &share.join("guest-initrd"))?;
        let (listener, socket) = Wire::listen()?;
        let command_line = command_line(&config);
        let qemu = Qemu::start(&config, &folder, &socket.path().join("link"), &command_line)?;
        let wire = Wire::accept(listener, socket, &share, &folder.join("link.log"))?;
        let nobody = Hello { release: String::new(), init_counter: 0, command_line: String::new(), restore: None };
        let mut host = Self {
            config,
            folder,
            qemu,
            wire,
            hello: nobody,
            command_line,
            boots: 0,
            requests: 0,
            outputs: 0,
            answers: HashMap::new(),
            exits: HashMap::new(),
            kernel: Side::Older,
            _lock: lock,
        };
        host.await_boot(1)?;
        Ok(host)
    }

    /// What the host is made of.
    pub fn config(&self) -> &HostConfig {
        &self.config
    }

    /// What PID 1 said about itself after the last boot.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// How often the host has booted, kexecs included.
    pub fn boots(&self) -> u32 {
        self.boots
    }

    /// The kernel that runs.
    pub fn kernel(&self) -> Side {
        self.kernel
    }

    /// A kernel's version, as in the kernel cache.
    pub fn version(&self, side: Side) -> &str {
        match side {
            Side::Older => &self.config.kernels.older.version,
            Side::Newer => &self.config.kernels.newer.version,
        }
    }

    /// A file of the share, as the build machine sees it.
    pub fn local(&self, name: &str) -> PathBuf {
        self.folder.join("share").join(name)
    }

    /// What has passed between the host and the network behind it.
    pub fn traffic(&self) -> Result<Vec<capture::Frame>> {
        capture::read(&self.folder.join(qemu::CAPTURE))
    }

    /// The host's copy of the image it was given, as the build machine sees it. Another's as soon as the host has powered off.
    pub fn image_copy(&self) -> PathBuf {
        qemu::image_copy(&self.folder)
    }

    /// Where a kernel's image is in the host.
    pub fn image(side: Side) -> String {
        match side {
            Side::Older => format!("{SHARE}/kernel-older"),
            Side::Newer => format!("{SHARE}/kernel-newer"),
        }
    }

    /// The command line for the next kernel, under which PID 1 restores nothing.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// The command line for the next kernel, under which PID 1 restores by itself. `output` names the file in the share
    /// that receives what `vmm restore` says.
    pub fn restoring_command_line(&self, output: &str) -> String {
        format!("{} {RESTORE}={output}", self.command_line)
    }

    /// Waits until `check` has a value, looking again whenever the host said something or a shared file changed, and once a second.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut check: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let open = self.hear()?;
            if let Some(value) = check(self).with_context(|| format!("while waiting for {what}"))? {
                return Ok(value);
            }
            if !open {
                bail!("QEMU ended while waiting for {what}: {}", self.qemu.ending());
            }
            let now = Instant::now();
            if now >= deadline {
                bail!("waited {} s in vain for {what}", patience.as_secs());
            }
            if !self.wire.wait(LOOK_AGAIN.min(deadline - now))? {
                self.wire.nudge();
            }
        }
    }

    /// Takes in all that was said. False when the host is gone.
    fn hear(&mut self) -> Result<bool> {
        let (said, open) = self.wire.receive()?;
        for say in said {
            match say {
                Say::Hello(hello) => {
                    // Process ids start anew with the kernel.
                    self.exits.clear();
                    self.hello = hello;
                    self.boots += 1;
                }
                Say::Reply { id, answer } => {
                    self.answers.insert(id, answer);
                }
                Say::Exit { pid, code, signal } => {
                    self.exits.insert(pid, (code, signal));
                }
            }
        }
        Ok(open)
    }

    /// Waits for the given boot's first words.
    pub fn await_boot(&mut self, boot: u32) -> Result<()> {
        self.wait_until(&format!("PID 1 of boot {boot}"), PATIENCE, |host| Ok((host.boots >= boot).then_some(())))
    }

    /// Notes that the host has come to a kernel, and checks that this is so.
    pub fn arrived(&mut self, to: Side) -> Result<()> {
        self.kernel = to;
        let version = self.version(to);
        if !self.hello.release.starts_with(&format!("{version}.")) && self.hello.release != version {
            bail!("the host should run Linux {version} but runs {}", self.hello.release);
        }
        Ok(())
    }

    fn ask(&mut self, ask: Ask) -> Result<Answer> {
        self.requests += 1;
        let id = self.requests;
        let what = format!("the answer to {ask:?}");
        self.wire.send(&Request { id, ask })?;
        match self.wait_until(&what, PATIENCE, |host| Ok(host.answers.remove(&id)))? {
            Answer::Failed { reason } => bail!("the host could not: {reason}"),
            answer => Ok(answer),
        }
    }

    /// Starts a program with additional environment variables.
    pub fn spawn_with(&mut self, argv: &[&str], env: &[(&str, &str)]) -> Result<Process> {
        self.outputs += 1;
        let output = format!("process-{:03}-{}", self.outputs, argv.first().unwrap_or(&"none").replace('/', "-"));
        let argv = argv.iter().map(ToString::to_string).collect();
        let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        match self.ask(Ask::Spawn { argv, env, output: output.clone() })? {
            Answer::Started { pid } => Ok(Process { pid, output }),
            answer => bail!("unexpected answer {answer:?}"),
        }
    }

    /// Starts a program.
    pub fn spawn(&mut self, argv: &[&str]) -> Result<Process> {
        self.spawn_with(argv, &[])
    }

    /// The `vmm restore` that PID 1 started by itself, writing to `output`.
    pub fn restore_process(&self, output: &str) -> Result<Process> {
        let pid = self.hello.restore.context("PID 1 started no `vmm restore`")?;
        Ok(Process { pid, output: output.to_owned() })
    }

    /// What a program has written to standard output so far.
    pub fn stdout(&self, process: &Process) -> Result<String> {
        self.output(process, "out")
    }

    /// What a program has said on its standard error stream so far.
    pub fn stderr(&self, process: &Process) -> Result<String> {
        self.output(process, "err")
    }

    fn output(&self, process: &Process, stream: &str) -> Result<String> {
        let path = self.local(&format!("{}.{stream}", process.output));
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits for a program's end.
    pub fn wait(&mut self, process: &Process) -> Result<Ended> {
        let what = format!("the end of {}", process.output);
        let pid = process.pid;
        let (code, signal) = self.wait_until(&what, PATIENCE, |host| Ok(host.exits.remove(&pid)))?;
        let (stdout, stderr) = (self.output(process, "out")?, self.output(process, "err")?);
        Ok(Ended { code, signal, stdout, stderr })
    }

    /// How a program has ended, when it has.
    pub fn has_ended(&mut self, process: &Process) -> Result<bool> {
        self.hear()?;
        Ok(self.exits.contains_key(&process.pid))
    }

    /// Runs a program to its end.
    pub fn run(&mut self, argv: &[&str]) -> Result<Ended> {
        self.run_with(argv, &[])
    }

    /// Runs a program to its end with additional environment variables.
    pub fn run_with(&mut self, argv: &[&str], env: &[(&str, &str)]) -> Result<Ended> {
        let process = self.spawn_with(argv, env)?;
        self.wait(&process)
    }

    /// Sends a signal to any process of the host.
    pub fn signal(&mut self, pid: i32, signal: i32) -> Result<()> {
        self.ask(Ask::Signal { pid, signal }).map(|_| ())
    }

    /// A file of the host.
    pub fn read(&mut self, path: &str) -> Result<String> {
        match self.ask(Ask::Read { path: path.into() })? {
            Answer::Content { content } => Ok(content),
            answer => bail!("unexpected answer {answer:?}"),
        }
    }

    /// Bytes of the host's memory, by the name that /proc/meminfo has for them.
    pub fn memory(&mut self, name: &str) -> Result<u64> {
        let text = self.read("/proc/meminfo")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.strip_suffix(" kB"));
        let kibibytes: u64 = value.with_context(|| format!("/proc/meminfo does not tell {name}"))?.trim().parse()?;
        Ok(kibibytes << 10)
    }

    /// Writes a file of the host.
    pub fn write(&mut self, path: &str, content: &str) -> Result<()> {
        self.ask(Ask::Write { path: path.into(), content: content.into() }).map(|_| ())
    }

    /// The counter that runs on through kexecs, and its frequency in Hz.
    pub fn counter(&mut self) -> Result<(u64, f64)> {
        match self.ask(Ask::Counter)? {
            Answer::Counter { moment, frequency_hz } => Ok((moment.counter, frequency_hz)),
            answer => bail!("unexpected answer {answer:?}"),
        }
    }

    /// The counter together with the host's clocks.
    pub fn moment(&mut self) -> Result<Moment> {
        match self.ask(Ask::Counter)? {
            Answer::Counter { moment, .. } => Ok(moment),
            answer => bail!("unexpected answer {answer:?}"),
        }
    }

    /// Replaces the kernel with nothing handed over. Returns the milliseconds from the reboot call to the new PID 1.
    pub fn kexec(&mut self, to: Side) -> Result<f64> {
        let next = self.boots + 1;
        let ask = Ask::Kexec {
            kernel: Self::image(to),
            initrd: format!("{SHARE}/initrd"),
            command_line: self.command_line.clone(),
        };
        let Answer::Rebooting { counter } = self.ask(ask)? else { bail!("the kexec was not announced") };
        self.await_boot(next)?;
        self.arrived(to)?;
        let (_, frequency) = self.counter()?;
        Ok((self.hello.init_counter - counter) as f64 / frequency * 1e3)
    }

    /// Shuts the host down and waits for QEMU's end.
    ///
    /// Its network card is taken out of use before. Linux breaks a virtio device's queues as it shuts down, and one without commit
    /// 0d0eff39ceb3 ("virtio_ring: fix infinite loop in virtnet_poll_cleantx when device is broken") never leaves virtio_net's loop if a
    /// packet comes just then: the host of guests that still send would hang now and then instead of ending.
    pub fn power_off(&mut self) -> Result<()> {
        if !self.config.taps.is_empty() {
            self.write("/sys/class/net/eth0/flags", DOWN)?;
        }
        self.requests += 1;
        self.wire.send(&Request { id: self.requests, ask: Ask::PowerOff })?;
        self.qemu.wait(PATIENCE)
    }
}

/// The same for every kernel of a host, so that all count time alike.
fn command_line(config: &HostConfig) -> String {
    let HostConfig { architecture, accelerator, taps, .. } = config;
    // Warnings are shown: they say why a host is slow or its clock is off.
    let (console, own) = (architecture.console(), architecture.host_parameters(*accelerator, counter_khz()));
    let line = format!("console={console} loglevel=5 panic=-1 kho=on liveupdate=on {own}").trim().to_owned();
    if taps.is_empty() { line } else { format!("{line} {TAPS}={}", taps.join(",")) }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Prints the last lines of every log of a host: its console, QEMU's own words, its guests' serial ports, its programs' complaints.
fn show_logs(folder: &Path) {
    let list = |folder: &Path, end: &str| -> Vec<PathBuf> {
        let paths = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut files: Vec<_> = paths.filter(|path| path.extension().is_some_and(|found| found == end)).collect();
        files.sort();
        files
    };
    let share = folder.join("share");
    let logs = [list(folder, "log"), list(&share, "log"), list(&share, "err")];
    for log in logs.iter().flatten() {
        let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        if lines.is_empty() {
            continue;
        }
        eprintln!("--- {} (last {TAIL} of {} lines)", log.display(), lines.len());
        for line in &lines[lines.len().saturating_sub(TAIL)..] {
            eprintln!("{line}");
        }
    }
}
