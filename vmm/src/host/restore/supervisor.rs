//! The process that holds what was handed over, until the VMs run.
//!
//! It outlives whoever started it, and it outlives its work where a VM could not be restored: that VM's memory exists
//! only as long as this process holds its session and files. `NAME.kept` in the run folder tells the other verbs.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use kho_abi::document::header;
use kho_abi::document::index::{IndexEntryV2, IndexV2};
use kho_abi::document::timeline::{Phase, TimelineV3};
use kho_abi::{names, tokens};
use serde_json::{Value, json};

use super::vm_process::{End, VmProcess};
use crate::arch;
use crate::cli::{LogArgs, status};
use crate::control::interface::{RamFile, known_marks};
use crate::control::server::chain;
use crate::control::socket::{RunDir, SocketError, WorkLock};
use crate::fault::{self, Action};
use crate::handover::channel::{Handover, Memory};
use crate::handover::luo::{Device, IncomingSession, LuoError};
use crate::host::clock;
use crate::host::digest::digest;
use crate::host::kept::KeptVm;
use crate::host::proof::{self, Frames, ProofError};
use crate::host::report::{timeline_fields, with_fields};

/// How often a VM is started before it is kept.
const ATTEMPTS: u32 = 3;
/// How long to wait while another process uses `/dev/liveupdate`. Service managers use it early in boot, as we do.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// The supervisor's work.
pub struct Supervisor<'a> {
    /// Where VMs are found.
    pub dir: &'a RunDir,
    /// How the VMs are to log.
    pub log: LogArgs,
    /// Whether this process has no terminal or service manager behind it: the VMs' output then goes to files.
    pub detached: bool,
    /// The counter when init was reached.
    pub init_reached: u64,
    /// Whether the host's clock may be set.
    pub set_clock: bool,
    /// Tells what happens.
    pub relay: &'a dyn Fn(&Value),
}

/// What the last kernel handed over.
struct HandedOver {
    index: IndexV2,
    /// In the order of the index.
    sessions: Vec<Result<IncomingSession, LuoError>>,
    session: IncomingSession,
}

/// How it went with one VM.
struct Outcome {
    attempts: u32,
    timeline: TimelineV3,
    /// Whether its memory is where it was, in a word; None where the old kernel did not show where that is.
    frames: Option<&'static str>,
    result: Result<(), Kept>,
}

/// A VM that does not run, and all that is left of it.
struct Kept {
    reason: String,
    _session: Option<IncomingSession>,
    _files: Option<Files>,
}

/// A VM's files.
struct Files {
    state: OwnedFd,
    ram: Vec<OwnedFd>,
}

/// What the threads tell the main thread.
enum Message {
    Event(Value),
    Done(usize, Outcome),
}

impl Supervisor<'_> {
    /// Restores all VMs. Returns when nothing is left to hold: with VMs that are kept, that is never.
    pub fn supervise(&self, session: Option<IncomingSession>) -> anyhow::Result<u8> {
        let begun = Instant::now();
        self.dir.create()?;
        let lock = self.lock(session.is_some())?;
        let Some(HandedOver { index, sessions, session }) = self.retrieve(session)? else {
            (self.relay)(&json!({"event": "result", "result": "nothing", "vms": []}));
            return Ok(status::NOTHING_HANDED_OVER);
        };
        let mut timeline = index.timeline.clone();
        timeline.mark(Phase::InitReached, self.init_reached);
        timeline.mark(Phase::IndexRetrieved, arch::counter());
        (self.relay)(&json!({
            "event": "phase", "phase": Phase::IndexRetrieved.name(), "ms": elapsed_ms(begun),
            "counter": timeline.counter(Phase::IndexRetrieved), "vms": index.vms.len(), "kernel_from": index.kernel,
            "generation": index.generation,
        }));
        // Before any VM comes back, as what a VM is restored with reads this clock.
        let ms = [("ms".to_owned(), json!(elapsed_ms(begun)))].into_iter().collect();
        (self.relay)(&with_fields(clock::settle(&index, self.set_clock), ms));
        let outcomes = self.restore_all(begun, &index, sessions, &timeline);
        let result = result(&index, &timeline, &outcomes);
        if outcomes.iter().any(|outcome| outcome.result.is_err()) {
            (self.relay)(&result);
            // The memory of kept VMs lives as long as `outcomes`, the index as long as `session`.
            loop {
                std::thread::park();
            }
        }
        // The index last, and only when no VM needs it any more: it alone says which sessions there are. And as long as
        // its session can be retrieved or is held, the next `vmm update` knows that this one is not finished.
        session.finish()?;
        // Whoever reads the result may start the next update at once.
        drop(lock);
        (self.relay)(&result);
        Ok(status::DONE)
    }

    /// Only one process restores. One that holds the index already must not give up, as that would free it.
    fn lock(&self, insist: bool) -> Result<WorkLock, SocketError> {
        loop {
            match self.dir.exclusive("restore") {
                Err(SocketError::Busy { .. }) if insist => std::thread::sleep(Duration::from_millis(100)),
                other => return other,
            }
        }
    }

    /// Takes over the index and all sessions it names. `None` where nothing was handed over.
    fn retrieve(&self, session: Option<IncomingSession>) -> anyhow::Result<Option<HandedOver>> {
        let device = Device::open(DEVICE_PATIENCE)?;
        let session = match session.map_or_else(|| device.retrieve_session(names::INDEX_SESSION), Ok) {
            Err(LuoError::NotHandedOver { .. }) => return Ok(None),
            other => other?,
        };
        let index = match read_index(&session) {
            Ok(index) => index,
            Err(error) => {
                let error = error.context("the index of what was handed over cannot be read");
                tracing::error!("{error:#}: all of it is held here, nothing can be restored");
                (self.relay)(&json!({
                    "event": "result", "result": "failed", "error": format!("{error:#}"), "vms": [],
                    "help": "the memory that was handed over stays as it is until the next reboot",
                }));
                // To end would free the index, and let an update go ahead that loses the rest.
                loop {
                    std::thread::park();
                }
            }
        };
        let sessions = index.vms.iter().map(|vm| device.retrieve_session(&vm.session)).collect();
        // The device is free for others again here; the sessions outlive it.
        Ok(Some(HandedOver { index, sessions, session }))
    }

    /// All VMs at once, each in a thread of its own.
    fn restore_all(
        &self,
        begun: Instant,
        index: &IndexV2,
        sessions: Vec<Result<IncomingSession, LuoError>>,
        timeline: &TimelineV3,
    ) -> Vec<Outcome> {
        let (sender, inbox) = mpsc::channel();
        let mut outcomes: Vec<Option<Outcome>> = index.vms.iter().map(|_| None).collect();
        std::thread::scope(|scope| {
            for (number, (vm, session)) in index.vms.iter().zip(sessions).enumerate() {
                let sender = sender.clone();
                let mut timeline = timeline.clone();
                timeline.merge(&vm.marks);
                let (dir, log, detached) = (self.dir, self.log, self.detached);
                let work = Work {
                    dir,
                    log,
                    detached,
                    begun,
                    vm,
                    generation: index.generation,
                    timeline,
                    attempts: 0,
                    frames: None,
                    events: sender.clone(),
                };
                // In a slot, as a closure that finds no thread to run it would take the session with it, and the session
                // the guest's memory.
                let slot = Arc::new(Mutex::new(Some((work, session))));
                let (theirs, answer) = (Arc::clone(&slot), sender.clone());
                let thread = std::thread::Builder::new().name(format!("vm {}", vm.name));
                let spawned = thread.spawn_scoped(scope, move || carry_out(&theirs, number, &answer));
                if let Err(error) = spawned {
                    tracing::warn!(%error, vm = vm.name, "no thread to restore it in: the others wait meanwhile");
                    carry_out(&slot, number, &sender);
                }
            }
            drop(sender);
            for message in inbox {
                match message {
                    Message::Event(event) => (self.relay)(&event),
                    Message::Done(number, outcome) => {
                        if let Some(place) = outcomes.get_mut(number) {
                            *place = Some(outcome);
                        }
                    }
                }
            }
        });
        outcomes.into_iter().flatten().collect()
    }
}

/// One VM's work, until a thread takes it up.
type Slot<'a> = Mutex<Option<(Work<'a>, Result<IncomingSession, LuoError>)>>;

/// Does the work in the slot, unless another thread has.
fn carry_out(slot: &Slot<'_>, number: usize, sender: &Sender<Message>) {
    let work = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((work, session)) = work {
        drop(sender.send(Message::Done(number, work.carry_out(session))));
    }
}

/// How it went.
fn result(index: &IndexV2, timeline: &TimelineV3, outcomes: &[Outcome]) -> Value {
    let vms: Vec<Value> = index
        .vms
        .iter()
        .zip(outcomes)
        .map(|(vm, outcome)| {
            let (state, reason) = match &outcome.result {
                Ok(()) => ("running", None),
                Err(kept) => ("kept", Some(&kept.reason)),
            };
            let base = json!({
                "name": vm.name, "state": state, "reason": reason, "attempts": outcome.attempts,
                "document_bytes": vm.document_bytes, "frames": outcome.frames,
            });
            with_fields(base, timeline_fields(Some(&outcome.timeline)))
        })
        .collect();
    let kept = outcomes.iter().any(|outcome| outcome.result.is_err());
    let base = json!({
        "event": "result", "result": if kept { "kept" } else { "restored" }, "generation": index.generation,
        "kernel_from": index.kernel, "vms": vms,
    });
    // The host's own timeline too, which is all there is of an update without VMs.
    with_fields(base, timeline_fields(Some(timeline)))
}

fn read_index(session: &IncomingSession) -> anyhow::Result<IndexV2> {
    let file = File::from(session.retrieve(tokens::INDEX)?);
    let mut bytes = Vec::new();
    // The position of the retrieved file is where that of the preserved one was: at its start, as it was only written
    // to at given offsets. One byte more than allowed is enough to be refused.
    file.take(header::CAP as u64 + 1).read_to_end(&mut bytes).context("cannot read it")?;
    Ok(IndexV2::from_bytes(&bytes)?)
}

fn elapsed_ms(begun: Instant) -> f64 {
    (begun.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

/// The restoring of one VM.
struct Work<'a> {
    dir: &'a RunDir,
    log: LogArgs,
    detached: bool,
    begun: Instant,
    vm: &'a IndexEntryV2,
    generation: u64,
    timeline: TimelineV3,
    attempts: u32,
    frames: Option<&'static str>,
    events: Sender<Message>,
}

impl Work<'_> {
    fn tell(&self, event: Value) {
        let more = [("vm".to_owned(), json!(self.vm.name)), ("ms".to_owned(), json!(elapsed_ms(self.begun)))];
        drop(self.events.send(Message::Event(with_fields(event, more.into_iter().collect()))));
    }

    fn carry_out(mut self, session: Result<IncomingSession, LuoError>) -> Outcome {
        KeptVm::clear(self.dir, &self.vm.name);
        let result = match session {
            Ok(session) => self.restore(session),
            Err(error) => Err(Kept { reason: chain(&error), _session: None, _files: None }),
        };
        if let Err(kept) = &result {
            self.tell(json!({"event": "kept", "reason": kept.reason}));
            let note = KeptVm {
                name: self.vm.name.clone(),
                reason: kept.reason.clone(),
                pid: std::process::id(),
                attempts: self.attempts,
                memory: self.vm.ram.iter().map(|(_, size)| size).sum(),
                generation: self.generation,
            };
            if let Err(error) = note.write(self.dir) {
                tracing::error!(%error, vm = self.vm.name, "cannot leave a note that this VM is kept");
            }
        }
        Outcome { attempts: self.attempts, timeline: self.timeline, frames: self.frames, result }
    }

    fn restore(&mut self, session: IncomingSession) -> Result<(), Kept> {
        // Its process starts, decodes the document and opens what its devices need while the memory is retrieved: all of that takes
        // time, inside the blackout.
        let mut process = Some(self.start(1));
        let files = match self.retrieve(&session, process.as_ref()) {
            Ok(files) => files,
            Err(reason) => return Err(Kept { reason, _session: Some(session), _files: None }),
        };
        self.timeline.mark(Phase::FilesRetrieved, arch::counter());
        self.tell(json!({
            "event": "phase", "phase": Phase::FilesRetrieved.name(),
            "counter": self.timeline.counter(Phase::FilesRetrieved),
        }));
        if fault::requested("restore.memory-retrieved", Some(&self.vm.name)) == Some(Action::Flip)
            && let Some((memory, size)) = self.ram(&files).next()
            && let Err(error) = fault::spoil(memory, size)
        {
            tracing::error!(%error, "cannot spoil the memory");
        }
        if let Some(content) = self.vm.content
            && let Err(reason) = self.check_digest(content, &files)
        {
            return Err(Kept { reason, _session: Some(session), _files: Some(files) });
        }
        let mut reason = String::new();
        for attempt in 1..=ATTEMPTS {
            self.attempts = attempt;
            let started = process.take().unwrap_or_else(|| {
                self.start(attempt).inspect(|process| process.announce(&self.handover(attempt), &files.state))
            });
            reason = match started.map(|process| self.try_once(process, &files)) {
                Ok(Ok(())) => {
                    self.compare_frames(&files);
                    self.finish(session);
                    return Ok(());
                }
                Ok(Err(End::Refused(reason))) => {
                    return Err(Kept { reason, _session: Some(session), _files: Some(files) });
                }
                Ok(Err(End::Died(reason))) | Err(reason) => reason,
            };
            self.tell(json!({"event": "attempt-failed", "attempt": attempt, "reason": reason}));
        }
        let reason = format!("{ATTEMPTS} attempts failed, the last one: {reason}");
        Err(Kept { reason, _session: Some(session), _files: Some(files) })
    }

    fn start(&self, attempt: u32) -> Result<VmProcess, String> {
        VmProcess::start(self.dir, &self.vm.name, attempt, self.log, self.detached)
            .map_err(|error| format!("cannot start its process: {error}"))
    }

    fn handover(&self, attempt: u32) -> Handover {
        Handover { name: self.vm.name.clone(), attempt }
    }

    fn retrieve(
        &self,
        session: &IncomingSession,
        process: Option<&Result<VmProcess, String>>,
    ) -> Result<Files, String> {
        fault::at_vm("restore.files-retrieved", Some(&self.vm.name)).map_err(|error| error.to_string())?;
        // All of it before anything is judged, so that whatever can be kept is kept. A file that fails is lost.
        let state = session.retrieve(self.vm.state_token);
        if let (Ok(state), Some(Ok(process))) = (&state, process) {
            process.announce(&self.handover(1), state);
        }
        let ram: Vec<_> = self.vm.ram.iter().map(|&(token, _)| session.retrieve(token)).collect();
        let ram: Result<Vec<OwnedFd>, LuoError> = ram.into_iter().collect();
        match (state, ram) {
            (Ok(state), Ok(ram)) => Ok(Files { state, ram }),
            (Err(error), _) | (_, Err(error)) => Err(chain(&error)),
        }
    }

    fn try_once(&mut self, process: VmProcess, files: &Files) -> Result<(), End> {
        let ram = self.vm.ram.iter().map(|&(token, size)| RamFile { token, size }).collect();
        let marks = process.hand_over(&Memory::new(&self.timeline, ram), &files.ram)?;
        for (phase, counter) in known_marks(&marks) {
            self.timeline.mark(phase, counter);
        }
        self.tell(json!({"event": "running", "attempt": self.attempts, "blackout_ms": self.timeline.blackout_ms()}));
        Ok(())
    }

    /// Whether the memory is what it was when the guest was frozen: nothing has run in it yet.
    fn check_digest(&mut self, content: u64, files: &Files) -> Result<(), String> {
        let found = digest(self.ram(files)).map_err(|error| format!("its memory cannot be read: {error}"))?;
        self.timeline.mark(Phase::DigestChecked, arch::counter());
        self.tell(json!({
            "event": "phase", "phase": Phase::DigestChecked.name(),
            "counter": self.timeline.counter(Phase::DigestChecked),
        }));
        match found == content {
            true => Ok(()),
            false => {
                Err(format!("its memory is not what it was: its checksum was {content:#018x} and is {found:#018x}"))
            }
        }
    }

    fn ram<'a>(&self, files: &'a Files) -> impl Iterator<Item = (&'a OwnedFd, u64)> {
        files.ram.iter().zip(self.vm.ram.iter().map(|(_, size)| *size).collect::<Vec<_>>())
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
        self.tell(json!({"event": "frames", "result": word, "reason": reason, "took_ms": elapsed_ms(begun)}));
    }

    /// The VM runs, and has its memory open itself: the handover is over.
    fn finish(&self, session: IncomingSession) {
        if let Err(error) = session.finish() {
            // The session is closed all the same, which the kernel takes for the same.
            tracing::error!(error = %chain(&error), vm = self.vm.name, "cannot finish its session");
        }
    }
}
