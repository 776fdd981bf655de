//! The guests that run on the lab's host, and what their serial ports tell.
mod console;
mod log;

use crate::architecture::Architecture;
use crate::host::{Host, PATIENCE, Process, Side};
use crate::link::SHARE;
use anyhow::{Context, Result, bail};
pub use console::{Console, PROMPT};
pub use log::{Load, Log};

/// Which of the two guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our own kernel, which checks registers, timers and all of its memory.
    Oracle,
    /// Linux with busybox: an ordinary guest.
    Linux,
}

impl Kind {
    /// As the demo's result names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Oracle => "oracle",
            Self::Linux => "linux",
        }
    }
}

/// A guest to start.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The VM's name.
    pub name: String,
    /// What runs in it.
    pub kind: Kind,
    /// RAM in MiB.
    pub memory: u32,
    /// Added to its command line.
    pub append: String,
    /// Further words of `vmm run`'s command line.
    pub options: Vec<String>,
}

impl Guest {
    /// An oracle.
    pub fn oracle(name: &str, memory: u32) -> Self {
        Self { name: name.into(), kind: Kind::Oracle, memory, append: String::new(), options: Vec::new() }
    }

    /// A busybox Linux.
    pub fn linux(name: &str, memory: u32) -> Self {
        Self { name: name.into(), kind: Kind::Linux, memory, append: String::new(), options: Vec::new() }
    }

    /// An oracle that leaves most of its processor to others, and takes a tenth of a second for a tick. An emulated x86_64 host has
    /// one processor, and each entry into a guest and exit from it costs half a millisecond: beside an oracle that never rests, a
    /// Linux guest took minutes to come up.
    pub fn resting_oracle(name: &str, memory: u32) -> Self {
        Self::oracle(name, memory).with("tick_ms=100 rest=4")
    }

    /// The same with a longer command line.
    pub fn with(mut self, append: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(append);
        self
    }

    /// The same with so many vCPUs. A Linux guest must find them all.
    pub fn cpus(self, cpus: u32) -> Self {
        let guest = match self.kind {
            Kind::Linux => self.with(&format!("lab.cpus={cpus}")),
            Kind::Oracle => self,
        };
        guest.option("cpus", &cpus.to_string())
    }

    /// The same with another option of `vmm run`.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.options.extend([format!("--{name}"), value.into()]);
        self
    }

    /// The same with another option of `vmm run` that has no value.
    pub fn flag(mut self, name: &str) -> Self {
        self.options.push(format!("--{name}"));
        self
    }

    /// Its serial port's log in the share.
    fn log_name(&self) -> String {
        format!("guest-{}.log", self.name)
    }

    /// `vmm run` with the options that make this guest.
    fn arguments(&self, architecture: Architecture) -> Vec<String> {
        let mut arguments = vec!["vmm".into(), "run".into(), "--name".into(), self.name.clone()];
        let mut option = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
        match self.kind {
            Kind::Oracle => {
                option("kernel", format!("{SHARE}/oracle"));
                option("append", self.append.trim().into());
            }
            Kind::Linux => {
                option("kernel", Host::image(Side::Newer));
                option("initrd", format!("{SHARE}/guest-initrd"));
                option("append", format!("{}{}", architecture.guest_command_line(), self.append));
            }
        }
        option("memory", format!("{}M", self.memory));
        if !self.options.iter().any(|option| option == "--serial") {
            option("serial", format!("file={SHARE}/{}", self.log_name()));
        }
        arguments.extend(self.options.iter().cloned());
        arguments
    }

    /// Starts it under a new `vmm run`.
    pub fn start(self, host: &mut Host) -> Result<Running> {
        self.start_with(host, &[])
    }

    /// The same with environment variables for `vmm run`.
    pub fn start_with(self, host: &mut Host, env: &[(&str, &str)]) -> Result<Running> {
        let arguments = self.arguments(host.config().architecture);
        let argv: Vec<_> = arguments.iter().map(String::as_str).collect();
        let log = Log::new(host.local(&self.log_name()));
        // The path is the test's, so an earlier guest of this name may have left lines behind.
        let _ = std::fs::remove_file(host.local(&self.log_name()));
        let process = host.spawn_with(&argv, env)?;
        Ok(Running { boot: host.boots(), guest: self, process, log })
    }
}

/// A guest that was started.
#[derive(Debug)]
pub struct Running {
    /// What it is.
    pub guest: Guest,
    /// The `vmm run` that was started for it. After a live update another process has taken over.
    pub process: Process,
    /// What it has said.
    pub log: Log,
    boot: u32,
}

impl Running {
    /// Waits until the guest has reported so many more times from now on. Fails on any damage.
    pub fn await_beats(&mut self, host: &mut Host, more: u64) -> Result<()> {
        self.log.read_on()?;
        let goal = self.log.beats + more;
        let what = format!("{more} signs of life of {}", self.guest.name);
        host.wait_until(&what, PATIENCE, |host| {
            self.log.read_on()?;
            self.check_unharmed()?;
            if self.log.beats >= goal {
                return Ok(Some(()));
            }
            if host.boots() == self.boot && host.has_ended(&self.process)? {
                let said = host.wait(&self.process)?;
                bail!("its `vmm run` has ended: {said}");
            }
            Ok(None)
        })
    }

    /// Waits until one of the loads in the guest has given so many more signs of life from now on. Fails on any damage.
    pub fn await_load(&mut self, host: &mut Host, load: &str, more: u64) -> Result<()> {
        let beats = |log: &Log| log.loads.get(load).map_or(0, |load| load.beats);
        self.log.read_on()?;
        let goal = beats(&self.log) + more;
        let what = format!("{more} signs of life of the load {load} in {}", self.guest.name);
        host.wait_until(&what, PATIENCE, |_| {
            self.log.read_on()?;
            self.check_unharmed()?;
            Ok((beats(&self.log) >= goal).then_some(()))
        })
    }

    /// Waits until the guest says that it ends itself.
    pub fn await_end(&mut self, host: &mut Host) -> Result<()> {
        let what = format!("the end of {}", self.guest.name);
        host.wait_until(&what, PATIENCE, |_| {
            self.log.read_on()?;
            Ok(self.log.end.is_some().then_some(()))
        })
    }

    /// Waits until the guest reports damage.
    pub fn await_damage(&mut self, host: &mut Host) -> Result<String> {
        let what = format!("damage of {}", self.guest.name);
        host.wait_until(&what, PATIENCE, |_| {
            self.log.read_on()?;
            Ok(self.log.damage.first().cloned())
        })
    }

    /// Fails when the guest has reported damage, or when something it said got lost.
    pub fn check_unharmed(&self) -> Result<()> {
        match self.log.damage.first() {
            None => Ok(()),
            Some(first) => bail!("{} was damaged ({} times), first: {first}", self.guest.name, self.log.damage.len()),
        }
    }

    /// Waits for the end of `vmm run` and gives its exit status.
    pub fn status(&self, host: &mut Host) -> Result<i32> {
        let ended = host.wait(&self.process)?;
        ended.code.with_context(|| format!("`vmm run` of {} did not end by itself: {ended}", self.guest.name))
    }
}

/// Waits until each of the guests has reported so many more times.
pub fn await_beats(host: &mut Host, guests: &mut [Running], more: u64) -> Result<()> {
    guests.iter_mut().try_for_each(|guest| guest.await_beats(host, more))
}
