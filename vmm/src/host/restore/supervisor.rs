//! The restoring of all that was handed over, by processes that outlive whoever started them: a guardian that holds it, and its
//! worker. They outlive their work where a VM could not be restored, as that VM's memory exists only as long as its session and files
//! are held. `NAME.kept` in the run folder tells the other verbs.

use std::fs::File;
use std::io::Read;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use kho_abi::document::header;
use kho_abi::document::index::IndexV2;
use kho_abi::document::timeline::{Phase, TimelineV3};
use kho_abi::{names, tokens};
use serde_json::{Value, json};

use super::allowance::Allowance;
use super::guardian::{self, Role};
use super::keeper;
use super::work::{Common, Message, Outcome, Work};
use crate::arch;
use crate::cli::{LogArgs, status};
use crate::control::server::chain;
use crate::control::socket::{RunDir, SocketError, WorkLock};
use crate::fault::{self, Process};
use crate::handover::ledger::Ledger;
use crate::handover::luo::{Device, IncomingSession, LuoError};
use crate::host::clock;
use crate::host::report::{timeline_fields, with_fields};
use crate::host::signals::{self, Signals};

/// How long to wait while another process uses `/dev/liveupdate`. Service managers use it early in boot, as we do.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);
/// More VMs than an index has room for.
const MOST_VMS: usize = 16 << 10;

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
    /// When it was there.
    retrieved: u64,
}

impl Supervisor<'_> {
    /// Restores all VMs. Returns when nothing is left to hold: where VMs are kept, that may be never. It is called as long as this
    /// process has one thread.
    pub fn supervise(&self, signals: Signals, session: Option<IncomingSession>) -> anyhow::Result<u8> {
        let begun = Instant::now();
        self.dir.create()?;
        let lock = self.lock(session.is_some())?;
        // What can fail is done before there is anything to lose.
        let ledger = Ledger::new(MOST_VMS).context("cannot keep the record of who has run")?;
        let Some(handed_over) = self.retrieve(session)? else {
            (self.relay)(&json!({"event": "result", "result": "nothing", "vms": []}));
            return Ok(status::NOTHING_HANDED_OVER);
        };
        let holder = std::process::id();
        let status = match guardian::post(&ledger) {
            Role::Guardian(status) => {
                drop(handed_over);
                status
            }
            Role::Worker(attempt) => {
                // The guardian has the result; what goes wrong here is not yet one.
                return self.work(begun, signals, holder, handed_over, &ledger, Some(attempt)).or_else(|error| {
                    tracing::error!("{error:#}");
                    Ok(status::FAILED)
                });
            }
            Role::Alone => self.work(begun, signals, holder, handed_over, &ledger, Some(1))?,
            Role::Bereft => self.work(begun, signals, holder, handed_over, &ledger, None)?,
        };
        // Whoever reads the result may start the next update at once.
        drop(lock);
        if let Some(result) = ledger.last_word().context("cannot read how it went")? {
            (self.relay)(&serde_json::from_str(&result).context("cannot read how it went")?);
        }
        Ok(status)
    }

    /// Restores all VMs, or only keeps them, and leaves the result in the ledger.
    fn work(
        &self,
        begun: Instant,
        signals: Signals,
        holder: u32,
        handed_over: HandedOver,
        ledger: &Ledger,
        attempt: Option<u32>,
    ) -> anyhow::Result<u8> {
        // Whoever wants this process to end would end the VMs that are not running yet.
        let watch = signals.watch(|signal| {
            tracing::warn!("{} is ignored: guests' memory is held here that would be lost", signals::name(signal));
            true
        });
        if let Err(error) = watch {
            tracing::warn!(%error, "cannot watch for signals: they are held back");
        }
        // One that is not guarded is not to be harmed.
        let fault = |phase| attempt.map_or(Ok(()), |_| fault::at_attempt(Process::Restore, phase, None, attempt));
        fault(Phase::InitReached)?;
        let HandedOver { index, sessions, session, retrieved } = handed_over;
        let mut timeline = index.timeline.clone();
        timeline.mark(Phase::InitReached, self.init_reached);
        timeline.mark(Phase::IndexRetrieved, retrieved);
        let common = Arc::new(Common {
            dir: self.dir.clone(),
            log: self.log,
            detached: self.detached,
            begun,
            generation: index.generation,
            holder,
            allowance: Allowance::default(),
        });
        (self.relay)(&json!({
            "event": "phase", "phase": Phase::IndexRetrieved.name(), "ms": common.elapsed_ms(),
            "counter": timeline.counter(Phase::IndexRetrieved), "vms": index.vms.len(), "kernel_from": index.kernel,
            "generation": index.generation, "attempt": attempt,
        }));
        fault(Phase::IndexRetrieved)?;
        if attempt == Some(1) {
            // Before any VM comes back, as what a VM is restored with reads this clock.
            let ms = [("ms".to_owned(), json!(common.elapsed_ms()))].into_iter().collect();
            (self.relay)(&with_fields(clock::settle(&index, self.set_clock), ms));
        }
        let mut outcomes = self.restore_all(&common, &index, sessions, ledger, &timeline, attempt.is_some());
        if outcomes.iter().any(|outcome| outcome.fate.is_kept()) {
            (self.relay)(&result(&index, &timeline, &outcomes));
            outcomes = keeper::keep(self.dir, outcomes);
        }
        let result = result(&index, &timeline, &outcomes);
        // The index last, and only when no VM needs it any more: it alone says which sessions there are. And as long as
        // its session can be retrieved or is held, the next `vmm update` knows that this one is not finished.
        if let Err(error) = session.finish() {
            tracing::error!(error = %chain(&error), "cannot finish the session of the index");
        }
        ledger.set_last_word(&result.to_string()).context("cannot tell how it went")?;
        Ok(status::DONE)
    }

    /// Only one process restores. One that holds the index already must not give up, as that would free it.
    fn lock(&self, insist: bool) -> Result<WorkLock, SocketError> {
        loop {
            match self.dir.exclusive("restore") {
                Err(SocketError::Busy { .. }) if insist => thread::sleep(Duration::from_millis(100)),
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
                    thread::park();
                }
            }
        };
        let sessions = index.vms.iter().map(|vm| device.retrieve_session(&vm.session)).collect();
        // The device is free for others again here; the sessions outlive it.
        Ok(Some(HandedOver { index, sessions, session, retrieved: arch::counter() }))
    }

    /// All VMs at once, each in a thread of its own.
    fn restore_all(
        &self,
        common: &Arc<Common>,
        index: &IndexV2,
        sessions: Vec<Result<IncomingSession, LuoError>>,
        ledger: &Ledger,
        timeline: &TimelineV3,
        now: bool,
    ) -> Vec<Outcome> {
        let (sender, inbox) = mpsc::channel();
        let mut outcomes: Vec<Option<Outcome>> = index.vms.iter().map(|_| None).collect();
        thread::scope(|scope| {
            for (number, (vm, session)) in index.vms.iter().zip(sessions).enumerate() {
                let mut timeline = timeline.clone();
                timeline.merge(&vm.marks);
                let work = Work {
                    common: Arc::clone(common),
                    vm: vm.clone(),
                    timeline,
                    frames: None,
                    record: ledger.record(number),
                    events: sender.clone(),
                };
                // In a slot, as a closure that finds no thread to run it would take the session with it, and the session
                // the guest's memory.
                let slot = Arc::new(Mutex::new(Some((work, session))));
                let (theirs, answer) = (Arc::clone(&slot), sender.clone());
                let thread = thread::Builder::new().name(format!("vm {}", vm.name));
                let spawned = thread.spawn_scoped(scope, move || carry_out(&theirs, number, &answer, now));
                if let Err(error) = spawned {
                    tracing::warn!(%error, vm = vm.name, "no thread to restore it in: the others wait meanwhile");
                    carry_out(&slot, number, &sender, now);
                }
            }
            drop(sender);
            // Each work has a sender of its own, and comes with its outcome.
            let mut left = index.vms.len();
            while left > 0
                && let Ok(message) = inbox.recv()
            {
                match message {
                    Message::Event(event) => (self.relay)(&event),
                    Message::Done(number, outcome) => {
                        left -= 1;
                        if let Some(place) = outcomes.get_mut(number) {
                            *place = Some(*outcome);
                        }
                    }
                }
            }
        });
        outcomes.into_iter().flatten().collect()
    }
}

/// One VM's work, until a thread takes it up.
type Slot = Mutex<Option<(Work, Result<IncomingSession, LuoError>)>>;

/// Does the work in the slot, unless another thread has.
fn carry_out(slot: &Slot, number: usize, sender: &Sender<Message>, now: bool) {
    let work = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((work, session)) = work {
        let outcome = match now {
            _ if work.is_given_up() => work.given_up(),
            true => work.carry_out(session),
            false => work.keep(session),
        };
        drop(sender.send(Message::Done(number, Box::new(outcome))));
    }
}

/// How it went.
fn result(index: &IndexV2, timeline: &TimelineV3, outcomes: &[Outcome]) -> Value {
    let vms: Vec<Value> = outcomes.iter().map(Outcome::to_json).collect();
    let kept = outcomes.iter().any(|outcome| outcome.fate.is_kept());
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
