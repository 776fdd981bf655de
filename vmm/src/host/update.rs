//! `vmm update`: replaces the host's kernel while its VMs wait in memory.
//!
//! In order: check the host and the next kernel; load it; prepare every VM and preserve its files, while guests run;
//! write back the host's dirty pages; pause every guest and have its document written; write the index; reboot. Until
//! the reboot call everything can be undone, and whatever fails before is: guests run on, sessions are closed, the
//! image is unloaded. Should this process be killed, the kernel closes what it held, and the janitor does the rest.

pub mod check;
mod index;
mod janitor;
mod left_behind;
mod worker;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use kho_abi::document::index::{ClockV1, IndexV2};
use kho_abi::document::timeline::{Phase, TimelineV3};
use rustix::time::ClockId;
use serde_json::{Value, json};

use self::check::{Checked, check};
use self::index::IndexFile;
use self::janitor::Janitor;
use self::left_behind::LeftBehind;
use self::worker::{Command, Done, Worker};
use super::kexec::LoadedKernel;
use super::proof::{Map, NoMapError, Source};
use super::report::{self, Report, timeline_fields, with_fields};
use super::signals::{self, Signals};
use crate::arch;
use crate::cli::{UpdateArgs, status};
use crate::clock;
use crate::control::lease;
use crate::control::server::chain;
use crate::control::socket::RunDir;
use crate::fault::{self, Action, Process};
use crate::handover::luo;

/// What the main thread hears.
enum Message {
    /// A VM's worker has done what it was told, or has not.
    Vm(usize, Result<Done, anyhow::Error>),
    /// The host's dirty pages are written back.
    Synced,
    /// Somebody wants this to end.
    Signal(i32),
}

/// Carries out the verb.
pub fn update(dir: &RunDir, arguments: &UpdateArgs, started: u64) -> anyhow::Result<u8> {
    let (messages, inbox) = mpsc::channel();
    let signals = Signals::hold().context("cannot hold back signals")?;
    // Before the first thread, and before there is anything to be held.
    let janitor = Janitor::post(dir);
    let mut report = Report::new(arguments.json);
    report.phase(Phase::UpdateStarted, started, "live update started");
    report.doing("checking the host and the next kernel");
    let checked = check(dir, arguments)
        .map_err(anyhow::Error::from)
        .context("refused before any guest was touched, guests run on");
    let checked = checked.inspect_err(|error| report.result(failure("check", 0, &[], error), ""))?;

    let teller = messages.clone();
    signals.watch(move |signal| teller.send(Message::Signal(signal)).is_ok()).context("cannot watch for signals")?;
    let mut update = Update::new(arguments, checked, report, messages, inbox, started, janitor)?;
    let outcome = update.carry_out();
    // Here only when there was no reboot.
    let phase = update.phase;
    let (running, lost) = update.undo();
    update.report.release();
    let guests = guests(&running, &lost);
    match outcome {
        Ok(()) => {
            let (vms, text) = update.rehearsal();
            let result = json!({
                "event": "result", "result": "rehearsed", "generation": update.index.generation, "vms": vms,
            });
            update.report.result(result, &format!("rehearsed, nothing was changed: {guests}\n{text}"));
            Ok(status::DONE)
        }
        Err(error) => {
            let error = error.context(format!("the live update failed in phase {phase} and is undone, {guests}"));
            let result = failure(phase, update.index.generation, &running, &error);
            update.report.result(result, "");
            Err(error)
        }
    }
}

/// The last line for programs when it failed.
fn failure(phase: &str, generation: u64, running: &[String], error: &anyhow::Error) -> Value {
    json!({
        "event": "result", "result": "failed", "generation": generation, "phase": phase,
        "error": format!("{error:#}"), "running": running, "vms": [],
    })
}

/// Says which guests still run.
fn guests(running: &[String], lost: &[(String, String)]) -> String {
    let mut text = match running {
        [] if lost.is_empty() => "there are no guests".to_owned(),
        [] => "no guest is known to run".to_owned(),
        names => format!("guests run on: {}", names.join(", ")),
    };
    for (name, reason) in lost {
        text.push_str(&format!("; not confirmed: {name} ({reason})"));
    }
    text
}

/// An update under way.
struct Update<'arguments> {
    arguments: &'arguments UpdateArgs,
    report: Report,
    phase: &'static str,
    inbox: Receiver<Message>,
    messages: Sender<Message>,
    workers: Vec<Worker>,
    left_behind: Vec<LeftBehind>,
    /// What the next kernel is told.
    index: IndexV2,
    index_file: Option<IndexFile>,
    kernel: Option<LoadedKernel>,
    device: Option<Arc<luo::Device>>,
    /// What the proof reads.
    proof: Option<Source>,
    /// Keeps the VMs from thawing by themselves.
    lease: Option<OwnedFd>,
    checked: check::Files,
    /// Tidies up, should this process be killed.
    janitor: Janitor,
    /// Keeps others from updating or restoring meanwhile.
    _locks: check::Locks,
}

impl<'arguments> Update<'arguments> {
    fn new(
        arguments: &'arguments UpdateArgs,
        checked: Checked,
        report: Report,
        messages: Sender<Message>,
        inbox: Receiver<Message>,
        started: u64,
        janitor: Janitor,
    ) -> anyhow::Result<Self> {
        let Checked { files, device, frequency_hz, vms, left_behind, locks } = checked;
        let generation = vms.iter().map(|vm| vm.status.generation).max().unwrap_or_default() + 1;
        let mut timeline = TimelineV3::new(frequency_hz);
        timeline.mark(Phase::UpdateStarted, started);
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut workers = Vec::new();
        for (number, vm) in vms.into_iter().enumerate() {
            let teller = messages.clone();
            let tell = move |outcome| {
                // Nobody listening means that the process ends, and with it all that could be told.
                drop(teller.send(Message::Vm(number, outcome)));
            };
            workers.push(Worker::start(vm, frequency_hz, tell).context("cannot start a thread")?);
        }
        Ok(Self {
            arguments,
            report,
            phase: "start",
            inbox,
            messages,
            workers,
            left_behind,
            index: IndexV2 { generation, kernel, timeline, clock: None, vms: Vec::new() },
            index_file: None,
            kernel: None,
            proof: None,
            device: Some(Arc::new(device)),
            lease: None,
            checked: files,
            janitor,
            _locks: locks,
        })
    }

    /// All of it. Comes back with `Ok` only from a rehearsal.
    fn carry_out(&mut self) -> anyhow::Result<()> {
        self.fault(Phase::UpdateStarted)?;
        self.load()?;
        self.prepare()?;
        self.prove("guests run")?;
        self.leave_behind();
        self.sync()?;
        self.freeze()?;
        if self.arguments.prove {
            self.prove("guests are paused")?;
        }
        if self.arguments.digest {
            self.digest()?;
        }
        self.hand_over()?;
        if self.arguments.rehearse {
            return Ok(());
        }
        self.commit()
    }

    fn load(&mut self) -> anyhow::Result<()> {
        self.phase = "load";
        self.report.doing("loading the next kernel");
        let check::Files { kernel, initrd, command_line } = &self.checked;
        self.janitor.loads();
        self.kernel = Some(LoadedKernel::load(kernel, initrd.as_ref(), command_line)?);
        let image = self.arguments.next.kernel.display();
        self.reached(Phase::ImageLoaded, &format!("next kernel loaded: {image}"));
        self.fault(Phase::ImageLoaded)
    }

    fn prepare(&mut self) -> anyhow::Result<()> {
        self.phase = "prepare";
        let count = self.workers.len();
        self.report.doing(&format!("preserving the memory of {count} VM(s), guests run"));
        let device = self.device.take().context("the live update device is closed already")?;
        let (holder, handed_out) = lease::pair().context("cannot create a pipe")?;
        self.lease = Some(holder);
        for worker in &self.workers {
            let lease = handed_out.try_clone().context("cannot duplicate the lease")?;
            worker.tell(Command::Prepare { lease, device: Arc::clone(&device), limit: self.arguments.prepare_timeout });
        }
        // Only the VMs hold the read end from here on.
        drop(handed_out);
        self.collect(self.arguments.prepare_timeout, |update, number, done| {
            if let Done::Prepared(entry) = done {
                update.workers[number].entry = Some(entry);
            }
        })?;
        self.index.vms = self.workers.iter().filter_map(|worker| worker.entry.clone()).collect();
        let index_file = IndexFile::preserve(&device, count)?;
        // A draft, to find out now rather than inside the pause whether it can be written and fits.
        index_file.write(&self.index)?;
        self.index_file = Some(index_file);
        // The device is free for others again; the sessions outlive it.
        drop(device);
        let bytes: u64 = self.index.vms.iter().flat_map(|vm| &vm.ram).map(|(_, size)| size).sum();
        let text = match count {
            0 => "no VMs on this host: nothing but the kernel changes".to_owned(),
            _ => format!("{count} VM(s) prepared, {} preserved", report::bytes(bytes)),
        };
        self.reached(Phase::Prepared, &text);
        self.fault(Phase::Prepared)
    }

    /// Looks for every page of the guests' memory in the kernel's own map of what it would hand over. Where the kernel does not
    /// show that map, an update goes on without a proof, unless one is asked for.
    fn prove(&mut self, when: &str) -> anyhow::Result<()> {
        self.phase = "prove";
        if self.workers.is_empty() {
            return Ok(());
        }
        self.report.doing("looking for the guests' memory in the kernel's map");
        let start = Instant::now();
        let map = match self.map() {
            Ok(map) => Arc::new(map),
            Err(error) if self.arguments.prove => return Err(error.into()),
            Err(error) => {
                let reason = chain(&error);
                let event = json!({"event": "proof", "result": "none", "reason": reason});
                self.report.event(event, &format!("not proven that the guests' memory is preserved: {reason}"));
                return Ok(());
            }
        };
        for worker in &self.workers {
            worker.tell(Command::Prove(Arc::clone(&map)));
        }
        let mut all = 0;
        self.collect(self.arguments.timeout, |update, number, done| {
            if let (Done::Proven(proven), Some(entry)) = (done, &mut update.workers[number].entry) {
                all += proven.pages;
                entry.frames = Some(proven.frames);
            }
        })?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let event = json!({"event": "proof", "result": "proven", "pages": all, "when": when, "ms": ms});
        let text = format!(
            "proven: all {all} pages of the guests' memory are preserved, none is in scratch ({ms:.0} ms, {when})"
        );
        self.report.event(event, &text);
        Ok(())
    }

    /// Reads the kernel's map. It is looked for once, outside the pause.
    fn map(&mut self) -> Result<Map, NoMapError> {
        match &self.proof {
            Some(source) => source.map(),
            None => self.proof.insert(Source::find()?).map(),
        }
    }

    /// Takes the checksum of the guests' memory, which is complete and stands still now.
    fn digest(&mut self) -> anyhow::Result<()> {
        self.phase = "digest";
        for worker in &self.workers {
            worker.tell(Command::Digest);
        }
        self.collect(self.arguments.timeout, |update, number, done| {
            if let (Done::Digested { content, counter }, Some(entry)) = (done, &mut update.workers[number].entry) {
                entry.content = Some(content);
                entry.marks.mark(Phase::MemoryDigested, counter);
            }
        })?;
        self.report.phase(Phase::MemoryDigested, arch::counter(), "the checksum of all memory is taken");
        self.fault(Phase::MemoryDigested)
    }

    fn leave_behind(&mut self) {
        for vm in &mut self.left_behind {
            let announce = |name: &str| self.janitor.pauses(name);
            let (name, trouble) = (vm.name.clone(), vm.pause(announce).err());
            let event = json!({"event": "left-behind", "vm": name, "paused": trouble.is_none(), "reason": trouble});
            let text = match &trouble {
                None => format!("{name} is left behind: it is paused, and ends with this kernel"),
                Some(reason) => format!("{name} is left behind, and ends with this kernel as it is: {reason}"),
            };
            self.report.event(event, &text);
        }
    }

    /// kexec forgets the page cache, and reboot(2) does not write it back.
    fn sync(&mut self) -> anyhow::Result<()> {
        self.phase = "sync";
        self.report.doing("writing the host's file systems back");
        let teller = self.messages.clone();
        let thread = std::thread::Builder::new().name("sync".to_owned()).spawn(move || {
            rustix::fs::sync();
            drop(teller.send(Message::Synced));
        });
        thread.context("cannot start a thread")?;
        let deadline = Instant::now() + self.arguments.timeout;
        while !matches!(self.hear(deadline)?, Some(Message::Synced)) {
            if Instant::now() >= deadline {
                let limit = self.arguments.timeout.as_secs_f32();
                return Err(anyhow!("the file systems were not written back within {limit} s"));
            }
        }
        Ok(())
    }

    fn freeze(&mut self) -> anyhow::Result<()> {
        self.phase = "freeze";
        if !self.workers.is_empty() {
            self.report.doing("pausing all guests and handing them over");
        }
        // The blackout begins here. No output until it is over, one way or the other.
        self.report.hold();
        self.fault(Phase::PauseAsked)?;
        for worker in &self.workers {
            worker.tell(Command::Freeze { generation: self.index.generation, limit: self.arguments.timeout });
        }
        self.collect(self.arguments.timeout, |update, number, done| {
            if let (Done::Frozen { document_bytes, marks }, Some(entry)) = (done, &mut update.workers[number].entry) {
                entry.document_bytes = document_bytes;
                marks.into_iter().for_each(|(phase, counter)| entry.marks.mark(phase, counter));
            }
        })?;
        if !self.workers.is_empty() {
            let text = format!("{} guest(s) paused, documents written and found complete", self.workers.len());
            self.report.phase(Phase::DocumentWritten, arch::counter(), &text);
        }
        self.fault(Phase::DocumentWritten)
    }

    fn hand_over(&mut self) -> anyhow::Result<()> {
        self.phase = "hand over";
        self.index.vms = self.workers.iter().filter_map(|worker| worker.entry.clone()).collect();
        for vm in &mut self.index.vms {
            if fault::is_flipped(Process::Update, Phase::Preserved, Some(&vm.name)) {
                vm.ram.iter_mut().for_each(|(token, _)| *token ^= 1 << 32);
            }
        }
        self.reached(Phase::Preserved, "all is preserved");
        self.write_index()?;
        self.fault(Phase::Preserved)?;
        // A guest whose process died would come back, but its operator may have meant it to end; and a message that is
        // waiting may be a wish to stop.
        while let Ok(message) = self.inbox.try_recv() {
            self.judge(message)?;
        }
        match self.workers.iter().find(|worker| !worker.ended && worker.watch.is_closed()) {
            Some(worker) => Err(anyhow!("VM {} has ended after it was frozen", worker.name)),
            None => Ok(()),
        }
    }

    /// The point of no return.
    fn commit(&mut self) -> anyhow::Result<()> {
        self.phase = "reboot";
        let (counter, realtime_ns) = clock::read(ClockId::Realtime);
        self.index.clock = Some(ClockV1 { counter, realtime_ns });
        self.index.timeline.mark(Phase::RebootCalled, counter);
        self.write_index()?;
        self.fault(Phase::RebootCalled)?;
        let kernel = self.kernel.as_ref().context("no kernel is loaded")?;
        Err(kernel.boot().into())
    }

    fn write_index(&self) -> anyhow::Result<()> {
        self.index_file.as_ref().context("there is no index")?.write(&self.index)
    }

    /// Takes everything back. Guests first: they are what waits. Returns which guests run, and of which that is not
    /// known, with the reason.
    fn undo(&mut self) -> (Vec<String>, Vec<(String, String)>) {
        /// How long a VM has to confirm that its guest runs. It runs soon in any case: the lease is gone by then.
        const GRACE: Duration = Duration::from_secs(5);
        self.report.doing("undoing");
        for worker in &self.workers {
            worker.tell(Command::Undo);
        }
        let mut answers: BTreeMap<usize, Result<(), String>> = BTreeMap::new();
        let mut released = 0;
        let deadline = Instant::now() + GRACE;
        while released < self.workers.len() {
            match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Message::Vm(number, Ok(Done::Thawed(outcome)))) => {
                    answers.insert(number, outcome.map_err(|error| chain(&error)));
                }
                Ok(Message::Vm(_, Ok(Done::Released))) => released += 1,
                // What was on its way when it was called off.
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.lease = None;
        self.left_behind.iter_mut().for_each(LeftBehind::resume);
        self.index_file = None;
        self.kernel = None;
        self.janitor.done();
        let (mut running, mut lost) = (Vec::new(), Vec::new());
        for (number, worker) in self.workers.iter().enumerate().filter(|(_, worker)| !worker.ended) {
            match answers.remove(&number) {
                Some(Ok(())) => running.push(worker.name.clone()),
                Some(Err(reason)) => lost.push((worker.name.clone(), reason)),
                None => {
                    lost.push((worker.name.clone(), "it does not answer, and runs on as soon as it can".to_owned()))
                }
            }
        }
        (running, lost)
    }

    /// What a rehearsal has shown, for programs and for people.
    fn rehearsal(&self) -> (Vec<Value>, String) {
        let mut text = String::new();
        let mut values = Vec::new();
        for vm in &self.index.vms {
            let mut timeline = self.index.timeline.clone();
            timeline.merge(&vm.marks);
            let ram: u64 = vm.ram.iter().map(|(_, size)| size).sum();
            let pause = timeline.between_ms(Phase::PauseAsked, Phase::Preserved);
            let base = json!({
                "name": vm.name, "document_bytes": vm.document_bytes, "ram_bytes": ram, "pause_ms": pause,
            });
            values.push(with_fields(base, timeline_fields(Some(&timeline))));
            text.push_str(&format!(
                "{}: {} of memory, a document of {}\n{}",
                vm.name,
                report::bytes(ram),
                report::bytes(vm.document_bytes),
                report::timeline_text(&timeline)
            ));
        }
        (values, text)
    }

    fn reached(&mut self, phase: Phase, text: &str) {
        let counter = arch::counter();
        self.index.timeline.mark(phase, counter);
        self.report.phase(phase, counter, text);
    }

    /// Waits until every worker has done what it was told.
    fn collect(&mut self, limit: Duration, mut on_done: impl FnMut(&mut Self, usize, Done)) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        let mut waiting: Vec<usize> = (0..self.workers.len()).collect();
        while !waiting.is_empty() {
            match self.hear(deadline)? {
                Some(Message::Vm(number, Ok(done))) => {
                    waiting.retain(|&other| other != number);
                    match done {
                        Done::Ended => self.leave_out(number),
                        done => on_done(self, number, done),
                    }
                }
                Some(_) => {}
                None => {
                    let late: Vec<&str> = waiting.iter().map(|&number| self.workers[number].name.as_str()).collect();
                    return Err(anyhow!("VM {} took longer than {} s", late.join(", "), limit.as_secs_f32()));
                }
            }
        }
        Ok(())
    }

    /// A guest that has ended by itself has nothing to be carried over. The others go on.
    fn leave_out(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        worker.entry = None;
        if !std::mem::replace(&mut worker.ended, true) {
            let name = &worker.name;
            let text = format!("{name} has ended by itself, and takes no part any more");
            self.report.event(json!({"event": "ended", "vm": name}), &text);
        }
    }

    /// The next message, or `None` when there is none until `deadline`. What asks for an end is an error.
    fn hear(&self, deadline: Instant) -> anyhow::Result<Option<Message>> {
        match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(message) => self.judge(message).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("all threads have ended")),
        }
    }

    fn judge(&self, message: Message) -> anyhow::Result<Message> {
        match message {
            Message::Vm(number, Err(error)) => {
                let vm = format!("VM {}", self.workers[number].name);
                // Some errors name the VM themselves.
                Err(if error.to_string().contains(&vm) { error } else { error.context(vm) })
            }
            Message::Signal(signal) => Err(anyhow!("interrupted by {}", signals::name(signal))),
            other => Ok(other),
        }
    }

    /// Passes a point where a fault may be asked for. A stall still listens, as a slow step would.
    fn fault(&self, phase: Phase) -> anyhow::Result<()> {
        if fault::requested(Process::Update, phase, None, None) == Some(Action::Stall) {
            fault::tell_stall(Process::Update, phase);
            let deadline = Instant::now() + fault::STALL;
            while self.hear(deadline)?.is_some() {}
            return Ok(());
        }
        Ok(fault::at(Process::Update, phase, None)?)
    }
}
