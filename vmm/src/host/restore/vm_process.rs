//! The new process of a VM, from its start to the guest's first instruction.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use kho_abi::document::timeline::Phase;

use super::{inherit, vmm};
use crate::cli::LogArgs;
use crate::control::interface::Mark;
use crate::control::server::chain;
use crate::control::socket::RunDir;
use crate::fault::{self, InjectedFault, Process};
use crate::handover::channel::{self, ChannelError, Event, Events, Handover, Memory};
use crate::handover::ledger::Record;

/// How long a VM may take to run its first instruction. It takes a fraction of a second; one that is stuck is killed,
/// which is safe as long as it has not said that its guest runs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How it ends when the guest does not run.
pub enum End {
    /// This VM cannot be restored here: another process would say the same.
    Refused(String),
    /// The process ended; another one may have more luck.
    Died(String),
}

/// A process that waits for its VM. Dropped before it has one, it is ended.
pub struct VmProcess {
    name: String,
    attempt: u32,
    child: Option<Child>,
    channel: UnixStream,
}

impl VmProcess {
    /// Starts the process.
    pub fn start(dir: &RunDir, name: &str, attempt: u32, log: LogArgs, detached: bool) -> io::Result<Self> {
        let (channel, theirs) = UnixStream::pair()?;
        let mut command = vmm(log);
        command.args(["run", "--restore", &theirs.as_raw_fd().to_string()]);
        command.env(fault::ATTEMPT_VARIABLE, attempt.to_string()).env(fault::VM_VARIABLE, name);
        // Out of the reach of a Ctrl-C that is meant for a supervisor in the foreground.
        command.process_group(0);
        if detached {
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(dir.log(name))?;
            command.stdout(file.try_clone()?).stderr(file);
        } else {
            command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        }
        inherit(&mut command, theirs.as_raw_fd());
        let child = command.spawn()?;
        // Ours goes here, so that the end of the process is the end of the channel.
        drop(theirs);
        Ok(Self { name: name.to_owned(), attempt, child: Some(child), channel })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Tells it which VM it is to be, and gives it its state, so that it gets ready for the memory. Whether it has ended meanwhile
    /// shows when that is handed over.
    pub fn announce(&self, handover: &Handover, state: &OwnedFd) {
        if let Err(error) = channel::send_handover(&self.channel, handover, state) {
            tracing::warn!(error = %chain(&error), vm = handover.name, "cannot tell its process what it is to be");
        }
    }

    /// Hands the memory over and waits until the guest is about to run. Returns the marks that the process has set.
    pub fn hand_over(mut self, memory: &Memory, ram: &[OwnedFd], record: &Record) -> Result<Vec<Mark>, End> {
        let said = match channel::send_memory(&self.channel, memory, ram, record) {
            Ok(()) => self.listen(),
            // It has ended before it got that far, and may have said why.
            Err(error) if error.is_gone() => self.listen(),
            Err(error) => Err(End::Died(chain(&error))),
        };
        match said {
            Ok(marks) => {
                self.let_go();
                Ok(marks)
            }
            Err(End::Refused(reason)) => {
                // It ends by itself, with a message of its own.
                self.let_go();
                Err(End::Refused(reason))
            }
            Err(End::Died(reason)) => {
                // Waited for, not only told: as long as it lives it has the VM's name and memory.
                let status = self.end();
                // Before its end it may have got that far. Where that is not known, it counts as if.
                if record.has_run().unwrap_or(true) {
                    let reason = format!("its guest had begun to run when its process was ended: {reason} ({status})");
                    return Err(End::Refused(reason));
                }
                Err(End::Died(format!("{reason} ({status})")))
            }
        }
    }

    fn listen(&self) -> Result<Vec<Mark>, End> {
        let died = |error: ChannelError| End::Died(chain(&error));
        let deadline = Instant::now() + PATIENCE;
        let mut events = Events::new(&self.channel);
        let mut reason = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.channel
                .set_read_timeout(Some(left))
                .map_err(|source| died(ChannelError::Io { operation: "set a time-out on", source }))?;
            match events.next() {
                Ok(Some(Event::FirstInstruction { marks })) => {
                    if let Err(error) = self.fault(Phase::FirstInstruction) {
                        tracing::error!(%error, "it is too late for that");
                    }
                    return Ok(marks);
                }
                Ok(Some(Event::Refused { reason })) => return Err(End::Refused(reason)),
                Ok(Some(Event::Failed { reason: said })) => reason = Some(said),
                Ok(Some(Event::MachineBuilt)) => {
                    self.fault(Phase::MachineBuilt).map_err(|error| End::Died(error.to_string()))?;
                    channel::send_go(&self.channel).map_err(died)?;
                }
                Ok(None) => {
                    let unsaid = || "its process ended before the first instruction".to_owned();
                    return Err(End::Died(reason.unwrap_or_else(unsaid)));
                }
                Err(ChannelError::Io { source, .. })
                    if matches!(source.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Err(End::Died(format!("it was stuck for {} s", PATIENCE.as_secs())));
                }
                Err(error) => return Err(died(error)),
            }
        }
    }

    fn fault(&self, phase: Phase) -> Result<(), InjectedFault> {
        fault::at_attempt(Process::Restore, phase, Some(&self.name), Some(self.attempt))
    }

    /// Leaves a running VM to itself, and only notes its end.
    fn let_go(&mut self) {
        if let Some(mut child) = self.child.take() {
            let waiter = std::thread::Builder::new().name("reaper".to_owned()).spawn(move || {
                let status = child.wait();
                tracing::info!(process = child.id(), ?status, "a restored VM has ended");
            });
            if let Err(error) = waiter {
                tracing::warn!(%error, "cannot wait for a restored VM's end");
            }
        }
    }

    /// Ends the process and waits for its end.
    fn end(&mut self) -> String {
        let Some(mut child) = self.child.take() else { return "it has ended".to_owned() };
        if let Err(error) = child.kill() {
            tracing::debug!(%error, "cannot kill a VM's process");
        }
        match child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => format!("cannot wait for its end: {error}"),
        }
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.end();
        }
    }
}
