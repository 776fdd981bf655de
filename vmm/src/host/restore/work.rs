//! The restoring of one VM: from its session to the guest's first instruction.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use kho_abi::document::index::IndexEntryV2;
use kho_abi::document::timeline::{Phase, TimelineV3};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::allowance::Allowance;
use super::guardian;
use super::vm_process::{End, PATIENCE, VmProcess};
use crate::arch;
use crate::cli::LogArgs;
use crate::control::client::Client;
use crate::control::interface::{RamFile, known_marks};
use crate::control::server::chain;
use crate::control::socket::{Claim, RunDir};
use crate::fault::{self, Action, Process};
use crate::handover::channel::{Handover, Memory};
use crate::handover::ledger::Record;
use crate::handover::luo::{IncomingSession, LuoError};
use crate::host::digest::digest;
use crate::host::kept::KeptVm;
use crate::host::proof::{self, Frames, ProofError};
use crate::host::report::{timeline_fields, with_fields};

/// How often a VM is started before it is kept.
const ATTEMPTS: u32 = 3;
/// How often to look what has become of a process that is no child of this one.
const LOOK: Duration = Duration::from_millis(5);

/// What concerns all VMs of a live update.
pub struct Common {
    /// Where VMs are found.
    pub dir: RunDir,
    /// How the VMs are to log.
    pub log: LogArgs,
    /// Whether their output goes to files.
    pub detached: bool,
    /// When the restore began.
    pub begun: Instant,
    /// The live update's number.
    pub generation: u64,
    /// The process that holds the memory.
    pub holder: u32,
    /// How much memory it may retrieve.
    pub allowance: Allowance,
}

impl Common {
    /// Milliseconds since the restore began.
    pub fn elapsed_ms(&self) -> f64 {
        rounded_ms(self.begun.elapsed())
    }
}

fn rounded_ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// What the threads tell the main thread.
pub enum Message {
    /// Something has happened.
    Event(Value),
    /// It is over, for the VM of that number.
    Done(usize, Box<Outcome>),
}

/// How it went with one VM.
pub struct Outcome {
    /// The VM and its story.
    pub work: Work,
    /// What it has come to.
    pub fate: Fate,
}

/// What a VM has come to.
pub enum Fate {
    /// Its guest runs.
    Running,
    /// It does not, and its memory is kept.
    Kept(Kept),
    /// The operator has given it up.
    Discarded,
}

impl Fate {
    /// Whether it needs this process.
    pub fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }
}

impl Outcome {
    /// For programs.
    pub fn to_json(&self) -> Value {
        let (state, reason) = match &self.fate {
            Fate::Running => ("running", None),
            Fate::Kept(kept) => ("kept", Some(&kept.reason)),
            Fate::Discarded => ("discarded", None),
        };
        let base = json!({
            "name": self.work.vm.name, "state": state, "reason": reason, "attempts": self.work.attempts(),
            "document_bytes": self.work.vm.document_bytes, "frames": self.work.frames,
        });
        with_fields(base, timeline_fields(Some(&self.work.timeline)))
    }

    /// Tries again with what is left of it.
    pub fn try_again(self) -> Self {
        let Self { mut work, fate } = self;
        let result = match fate {
            Fate::Kept(Kept { session: Some(session), files, .. }) => work.restore(session, files, None),
            Fate::Kept(kept) => Err(kept),
            fate => return Self { work, fate },
        };
        work.outcome(result)
    }

    /// The files of a VM that is kept.
    pub fn retrieve_kept(&mut self) -> Result<&Files, String> {
        let Fate::Kept(Kept { reason, session, files }) = &mut self.fate else {
            return Err("it is not kept".to_owned());
        };
        if files.is_none() {
            let session = session.as_ref().ok_or_else(|| reason.clone())?;
            *files = Some(self.work.retrieve(session, None, 0).map_err(|(reason, _)| reason)?);
        }
        files.as_ref().ok_or_else(|| reason.clone())
    }

    /// Gives it up. Where that cannot be noted, it is kept as before: whoever comes after this process would start it.
    pub fn discard(self) -> (Self, io::Result<()>) {
        let Self { work, fate } = self;
        if let Err(error) = work.record.set_given_up() {
            return (Self { work, fate }, Err(error));
        }
        // Its files are closed before: what is still open when the session ends lives as long as that.
        if let Fate::Kept(Kept { session: Some(session), files, .. }) = fate {
            drop(files);
            work.finish(session);
        }
        (work.given_up(), Ok(()))
    }
}

/// A VM that does not run, and all that is left of it.
pub struct Kept {
    /// Why.
    pub reason: String,
    session: Option<IncomingSession>,
    /// Its files, where all of them could be retrieved.
    pub files: Option<Files>,
}

impl Kept {
    /// Of whose files none has been retrieved.
    pub fn untried(reason: String, session: Result<IncomingSession, LuoError>) -> Self {
        match session {
            Ok(session) => Self { reason, session: Some(session), files: None },
            Err(error) => Self { reason: chain(&error), session: None, files: None },
        }
    }
}

/// A VM's files.
pub struct Files {
    /// Its document is in it.
    pub state: OwnedFd,
    /// Its memory, in the order of the index.
    pub ram: Vec<OwnedFd>,
}

/// The restoring of one VM.
pub struct Work {
    /// What concerns all.
    pub common: Arc<Common>,
    /// What the index says of it.
    pub vm: IndexEntryV2,
    /// What is known of its live update so far.
    pub timeline: TimelineV3,
    /// Whether its memory is where it was, in a word; None where the old kernel did not show where that is.
    pub frames: Option<&'static str>,
    /// What outlives this process.
    pub record: Record,
    /// Who hears what happens.
    pub events: Sender<Message>,
}

impl Work {
    /// Tells what happens.
    fn tell(&self, event: Value) {
        let (name, ms) = (json!(self.vm.name), json!(self.common.elapsed_ms()));
        let more = [("vm".to_owned(), name), ("ms".to_owned(), ms)];
        drop(self.events.send(Message::Event(with_fields(event, more.into_iter().collect()))));
    }

    /// How often its process was started.
    pub fn attempts(&self) -> u32 {
        self.record.attempts().unwrap_or_default()
    }

    /// Restores it.
    pub fn carry_out(mut self, session: Result<IncomingSession, LuoError>) -> Outcome {
        let predecessor = self.record.process().ok().filter(|&pid| pid != 0);
        let result = match session {
            Ok(session) => self.restore(session, None, predecessor),
            Err(error) => Err(Kept::untried(String::new(), Err(error))),
        };
        self.outcome(result)
    }

    /// Does not even try, as that has killed whoever did.
    pub fn keep(mut self, session: Result<IncomingSession, LuoError>) -> Outcome {
        let result = match session {
            Ok(session) if self.record.has_run().is_ok_and(|has_run| has_run) => {
                let settled = self.take_over();
                self.conclude(settled, session, None)
            }
            session => {
                let reason = format!("the process that restores was killed {} times", guardian::ATTEMPTS);
                Err(Kept::untried(reason, session))
            }
        };
        self.outcome(result)
    }

    /// Whether it was given up, under a process that restored before this one and was killed.
    pub fn is_given_up(&self) -> bool {
        self.record.is_given_up().is_ok_and(|is_given_up| is_given_up)
    }

    /// Leaves it to nobody.
    pub fn given_up(self) -> Outcome {
        KeptVm::clear(&self.common.dir, &self.vm.name);
        Outcome { work: self, fate: Fate::Discarded }
    }

    fn outcome(self, result: Result<(), Kept>) -> Outcome {
        let (dir, name) = (&self.common.dir, &self.vm.name);
        match &result {
            Ok(()) => KeptVm::clear(dir, name),
            Err(kept) => {
                self.tell(json!({"event": "kept", "reason": kept.reason}));
                let note = KeptVm {
                    name: name.clone(),
                    reason: kept.reason.clone(),
                    pid: self.common.holder,
                    attempts: self.attempts(),
                    memory: self.vm.ram.iter().map(|(_, size)| size).sum(),
                    generation: self.common.generation,
                };
                if let Err(error) = note.write(dir) {
                    tracing::error!(%error, vm = name, "cannot leave a note that this VM is kept");
                }
            }
        }
        Outcome { work: self, fate: result.map_or_else(Fate::Kept, |()| Fate::Running) }
    }

    /// What has become of the VM under a process that restored it before this one and was killed: nothing, in which case this one
    /// begins anew; or it runs, or has, and never will again.
    fn settle_with(&mut self, predecessor: Option<u32>) -> Option<Result<(), String>> {
        let predecessor = predecessor?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Before the look at the ledger: whatever is there when nobody has the name any more, stays.
            let gone = Claim::take(&self.common.dir, &self.vm.name).is_ok();
            match self.record.has_run() {
                Ok(true) => return Some(self.take_over()),
                Ok(false) if gone => return None,
                Ok(false) if Instant::now() >= deadline => end(predecessor),
                Ok(false) => {}
                Err(error) => return Some(Err(format!("it is not known whether it has run: {error}"))),
            }
            thread::sleep(LOOK);
        }
    }

    /// Its guest runs already. What it says of its live update is all that is known of it.
    fn take_over(&mut self) -> Result<(), String> {
        let asked = Client::connect(&self.common.dir, &self.vm.name, PATIENCE).and_then(|mut client| client.status());
        match asked {
            Ok(status) => known_marks(&status.marks).into_iter().for_each(|(phase, counter)| {
                self.timeline.mark(phase, counter);
            }),
            Err(error) => tracing::warn!(error = %chain(&error), vm = self.vm.name, "it has run, and does not answer"),
        }
        self.tell_running();
        Ok(())
    }

    fn tell_running(&self) {
        let blackout = self.timeline.blackout_ms();
        self.tell(json!({"event": "running", "attempt": self.attempts(), "blackout_ms": blackout}));
    }

    fn restore(
        &mut self,
        session: IncomingSession,
        files: Option<Files>,
        predecessor: Option<u32>,
    ) -> Result<(), Kept> {
        if let Some(settled) = self.settle_with(predecessor) {
            return self.conclude(settled, session, files);
        }
        let first = self.attempts() + 1;
        // Its process starts, decodes the document and opens what its devices need while the memory is retrieved: all of that takes
        // time, inside the blackout.
        let mut process = Some(self.start(first));
        let retrieved = match files {
            Some(files) => {
                self.announce(process.as_ref(), first, &files.state);
                Ok(files)
            }
            None => self.retrieve(&session, process.as_ref(), first).and_then(|files| self.check(files)),
        };
        let files = match retrieved {
            Ok(files) => files,
            Err((reason, files)) => return Err(Kept { reason, session: Some(session), files }),
        };
        let mut reason = String::new();
        for attempt in first..first + ATTEMPTS {
            // One that was started by the predecessor may have got the name first.
            if let Some(settled) = self.settle_with(predecessor.filter(|_| attempt > first)) {
                return self.conclude(settled, session, Some(files));
            }
            let started = process.take().unwrap_or_else(|| {
                let started = self.start(attempt);
                self.announce(Some(&started), attempt, &files.state);
                started
            });
            reason = match started.map(|process| self.try_once(process, &files)) {
                Ok(Ok(())) => {
                    self.compare_frames(&files);
                    return self.conclude(Ok(()), session, Some(files));
                }
                Ok(Err(End::Refused(reason))) => return self.conclude(Err(reason), session, Some(files)),
                Ok(Err(End::Died(reason))) | Err(reason) => reason,
            };
            self.tell(json!({"event": "attempt-failed", "attempt": attempt, "reason": reason}));
        }
        self.conclude(Err(format!("{} attempts failed, the last one: {reason}", self.attempts())), session, Some(files))
    }

    /// The handover is over, or is kept.
    fn conclude(
        &self,
        outcome: Result<(), String>,
        session: IncomingSession,
        files: Option<Files>,
    ) -> Result<(), Kept> {
        if let Err(reason) = outcome {
            return Err(Kept { reason, session: Some(session), files });
        }
        // The VM has its memory open itself.
        self.finish(session);
        Ok(())
    }

    fn finish(&self, session: IncomingSession) {
        if let Err(error) = session.finish() {
            // The session is closed all the same, which the kernel takes for the same.
            tracing::error!(error = %chain(&error), vm = self.vm.name, "cannot finish its session");
        }
    }

    fn start(&self, attempt: u32) -> Result<VmProcess, String> {
        let Common { dir, log, detached, .. } = &*self.common;
        let note = |written: io::Result<()>| written.map_err(|error| format!("cannot note its attempts: {error}"));
        note(self.record.set_attempts(attempt))?;
        let process = VmProcess::start(dir, &self.vm.name, attempt, *log, *detached)
            .map_err(|error| format!("cannot start its process: {error}"))?;
        note(self.record.set_process(process.pid()))?;
        Ok(process)
    }

    fn announce(&self, process: Option<&Result<VmProcess, String>>, attempt: u32, state: &OwnedFd) {
        if let Some(Ok(process)) = process {
            process.announce(&Handover { name: self.vm.name.clone(), attempt }, state);
        }
    }

    fn retrieve(
        &mut self,
        session: &IncomingSession,
        process: Option<&Result<VmProcess, String>>,
        attempt: u32,
    ) -> Result<Files, (String, Option<Files>)> {
        fault::at_attempt(Process::Restore, Phase::FilesRetrieved, Some(&self.vm.name), Some(attempt))
            .map_err(|error| (error.to_string(), None))?;
        let memory = self.vm.ram.iter().map(|(_, size)| size).fold(0_u64, |sum, size| sum.saturating_add(*size));
        let grant = self.common.allowance.grant(memory).map_err(|reason| (reason, None))?;
        // All of it before anything is judged, so that whatever can be kept is kept. A file that fails is lost.
        let state = session.retrieve(self.vm.state_token);
        if let Ok(state) = &state {
            self.announce(process, attempt, state);
        }
        let ram: Vec<_> = self.vm.ram.iter().map(|&(token, _)| session.retrieve(token)).collect();
        drop(grant);
        let ram: Result<Vec<OwnedFd>, LuoError> = ram.into_iter().collect();
        let files = match (state, ram) {
            (Ok(state), Ok(ram)) => Files { state, ram },
            (Err(error), _) | (_, Err(error)) => return Err((chain(&error), None)),
        };
        self.reached(Phase::FilesRetrieved);
        let asked = fault::requested(Process::Restore, Phase::FilesRetrieved, Some(&self.vm.name), Some(attempt));
        if asked == Some(Action::Flip)
            && let Some((memory, size)) = self.ram(&files).next()
            && let Err(error) = fault::spoil(memory, size)
        {
            tracing::error!(%error, "cannot spoil the memory");
        }
        Ok(files)
    }

    fn reached(&mut self, phase: Phase) {
        let counter = arch::counter();
        self.timeline.mark(phase, counter);
        self.tell(json!({"event": "phase", "phase": phase.name(), "counter": counter}));
    }

    /// Whether the memory is what it was when the guest was frozen, where that is known: nothing has run in it yet.
    fn check(&mut self, files: Files) -> Result<Files, (String, Option<Files>)> {
        let Some(content) = self.vm.content else { return Ok(files) };
        let found = match digest(self.ram(&files)) {
            Ok(found) => found,
            Err(error) => return Err((format!("its memory cannot be read: {error}"), Some(files))),
        };
        self.reached(Phase::DigestChecked);
        let attempt = Some(self.attempts());
        if let Err(error) = fault::at_attempt(Process::Restore, Phase::DigestChecked, Some(&self.vm.name), attempt) {
            return Err((error.to_string(), Some(files)));
        }
        match found == content {
            true => Ok(files),
            false => {
                let reason =
                    format!("its memory is not what it was: its checksum was {content:#018x} and is {found:#018x}");
                Err((reason, Some(files)))
            }
        }
    }

    fn try_once(&mut self, process: VmProcess, files: &Files) -> Result<(), End> {
        let ram = self.vm.ram.iter().map(|&(token, size)| RamFile { token, size }).collect();
        let marks = process.hand_over(&Memory::new(&self.timeline, ram), &files.ram, &self.record)?;
        for (phase, counter) in known_marks(&marks) {
            self.timeline.mark(phase, counter);
        }
        self.tell_running();
        Ok(())
    }

    fn ram<'a>(&self, files: &'a Files) -> impl Iterator<Item = (&'a OwnedFd, u64)> + use<'a> {
        let sizes: Vec<u64> = self.vm.ram.iter().map(|(_, size)| *size).collect();
        files.ram.iter().zip(sizes)
    }

    /// Whether the memory is where it was. The guest runs meanwhile, whom that does not concern.
    fn compare_frames(&mut self, files: &Files) {
        let Some(before) = self.vm.frames else { return };
        let begun = Instant::now();
        let look = || {
            let mut frames = Frames::default();
            for (file, size) in self.ram(files) {
                frames.add(&proof::frames(file, size)?);
            }
            Ok(frames.checksum())
        };
        let found: Result<u64, ProofError> = look();
        let (word, reason) = match found {
            Ok(after) if after == before => ("same", None),
            Ok(_) => ("moved", Some("the next kernel has it in other frames".to_owned())),
            Err(error) => ("unknown", Some(chain(&error))),
        };
        if let Some(reason) = &reason {
            tracing::warn!(vm = self.vm.name, "where its memory is: {reason}");
        }
        self.frames = Some(word);
        let took_ms = rounded_ms(begun.elapsed());
        self.tell(json!({"event": "frames", "result": word, "reason": reason, "took_ms": took_ms}));
    }
}

/// Ends a process that is stuck before it is the VM, if it still is what it was.
fn end(pid: u32) {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_ours = command.split(|byte| *byte == 0).any(|word| word == b"--restore");
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|_| is_ours) else { return };
    if let Err(error) = kill_process(pid, Signal::KILL) {
        tracing::debug!(%error, "cannot kill a VM's process");
    }
}
