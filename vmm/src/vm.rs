//! A running VM, as its control socket sees it: a machine, its vCPUs' threads, and the [`lifecycle`] that says what may be done with
//! it. Only the functions here move that, each under the one lock.

mod balloon;
mod lifecycle;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use kho_abi::document::machine::MachineV3;
use kho_abi::document::timeline::{Phase, TimelineV3};
use kho_abi::tokens;
use serde::Serialize;

use crate::arch::{self, ArchError};
use crate::config::{MachineConfig, VmConfig};
use crate::device::virtio::VirtioError;
use crate::device::virtio::balloon::BalloonError;
use crate::fault::{self, InjectedFault, Process};
use crate::machine::{Machine, MachineError, Parts};
use crate::memory::{MemoryError, Ram};
use crate::persist::{self, PersistError, StateFile};
use crate::vcpu::{BeforeRun, Vcpu, VcpuError, VcpuHandle};
use lifecycle::{Event, Lifecycle, Next};

/// How long a vCPU that has left the guest for good may take to say so.
const SAYING: Duration = Duration::from_secs(1);

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The machine is there, and has not run yet.
    Built,
    /// The guest runs.
    Running,
    /// The operator has paused the guest.
    Paused,
    /// The guest runs, or is paused by the operator, and its memory is about to be preserved for a live update.
    Prepared,
    /// The guest stands still and its document is written.
    Frozen,
    /// The guest is no more.
    Ended,
}

impl State {
    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Built => "built",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prepared => "prepared",
            Self::Frozen => "frozen",
            Self::Ended => "ended",
        }
    }
}

/// How a VM came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest's processor gave up.
    TripleFault,
    /// The operator stopped it.
    Stopped,
    /// KVM could not go on.
    Failed(String),
}

/// Why something cannot be done with a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The document.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The document is for another kind of host.
    #[error("the document is of a VM on {document}, and this host is {host}", host = arch::NAME)]
    Architecture {
        /// The document's architecture.
        document: String,
    },
    /// The memfds that came along are not those that the document names.
    #[error("the document's memory is not all there: {0}")]
    Files(String),
    /// It is not in a state in which this can be done.
    #[error("cannot {operation}: the VM is {state}", state = state.name())]
    State {
        /// What was asked for.
        operation: &'static str,
        /// What the VM is doing.
        state: State,
    },
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// A test asked for a failure.
    #[error("a step was made to fail")]
    Fault(#[from] InjectedFault),
}

impl VmError {
    /// Whether the document can never be restored here as it is, so that trying again is of no use.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Persist(_)
                | Self::Architecture { .. }
                | Self::Files(_)
                | Self::Machine(
                    MachineError::Config(_)
                        | MachineError::Arch(ArchError::Unfit(_) | ArchError::Missing(_))
                        | MachineError::Memory(MemoryError::Unfit(_))
                        | MachineError::Device(VirtioError::Unfit { .. })
                        | MachineError::Vcpu(VcpuError::State {
                            source: ArchError::Unfit(_) | ArchError::Missing(_),
                            ..
                        })
                )
        )
    }
}

/// What a VM hands over when it is prepared.
pub struct Prepared {
    /// Token of the state memfd.
    pub state_token: u64,
    /// The state memfd.
    pub state: OwnedFd,
    /// Token, size in bytes and memfd of each part of its RAM.
    pub ram: Vec<(u64, u64, OwnedFd)>,
}

/// What a VM tells once it is frozen.
pub struct Frozen {
    /// Size of its document.
    pub document_bytes: u64,
    /// When what was done.
    pub marks: Vec<(Phase, u64)>,
}

/// A VM of which all but its memory has arrived: its document is decoded, and what its devices need of this host is open.
pub struct Arriving {
    document: MachineV3,
    document_bytes: u64,
    parts: Parts,
}

impl Arriving {
    /// Takes in what another kernel or process has left of a VM in its state memfd.
    pub fn new(state: &OwnedFd) -> Result<Self, VmError> {
        let (document, document_bytes) = persist::read(state)?;
        if document.architecture != arch::NAME {
            return Err(VmError::Architecture { document: document.architecture });
        }
        let parts = Parts::open(persist::config(&document)?)?;
        Ok(Self { document, document_bytes, parts })
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.document.name
    }

    /// The VM, with its memory: token and memfd of each part. `timeline` is what is known of the update so far. Builds all and runs
    /// nothing: until [`Vm::run`] the same memory can be restored again.
    pub fn restore(self, ram: Vec<(u64, OwnedFd)>, mut timeline: TimelineV3) -> Result<Vm, VmError> {
        let Self { document, document_bytes, parts } = self;
        let ram = Ram::adopt(file_of_ranges(ram, &document)?, document.ram.clone()).map_err(MachineError::from)?;
        let (mut machine, mut vcpus) = Machine::new(parts, ram, Some(&document.vcpus))?;
        machine.restore(&mut vcpus, &document, timeline.frequency_hz)?;
        timeline.mark(Phase::MachineBuilt, arch::counter());
        let lifecycle = if document.paused { Lifecycle::paused() } else { Lifecycle::new() };
        let vm = Vm::assemble(machine, vcpus, lifecycle, document.generation, document_bytes, Some(timeline))?;
        fault::at(Process::Vm, Phase::MachineBuilt, None)?;
        Ok(vm)
    }
}

/// What an operator can know of a VM.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How many live updates it has been through.
    pub generation: u64,
    /// Bytes of the document it was restored from, or that was last written.
    pub document_bytes: u64,
    /// The marks of the last update.
    pub timeline: Option<TimelineV3>,
    /// Bytes of output of the serial port that nobody will read.
    pub serial_dropped: u64,
}

struct Control {
    lifecycle: Lifecycle,
    state_file: Option<StateFile>,
    generation: u64,
    document_bytes: u64,
    timeline: Option<TimelineV3>,
}

impl Control {
    /// Where an event leads, or why it is forbidden.
    fn after(&self, event: Event) -> Result<Next, VmError> {
        let forbidden = || VmError::State { operation: event.wish(), state: self.lifecycle.state() };
        self.lifecycle.after(event).ok_or_else(forbidden)
    }
}

struct Inner {
    machine: Machine,
    vcpus: Vec<VcpuHandle>,
    control: Mutex<Control>,
    ended: Condvar,
}

/// A handle to a running VM.
#[derive(Clone)]
pub struct Vm(Arc<Inner>);

impl Vm {
    /// A VM that boots.
    pub fn cold(config: VmConfig) -> Result<Self, VmError> {
        let parts = Parts::open(MachineConfig::from(&config))?;
        let ram = Ram::create(&config.name, config.memory).map_err(MachineError::from)?;
        let (machine, vcpus) = Machine::new(parts, ram, None)?;
        machine.boot(&config, &vcpus)?;
        Self::assemble(machine, vcpus, Lifecycle::new(), 0, 0, None)
    }

    fn assemble(
        machine: Machine,
        vcpus: Vec<Vcpu>,
        lifecycle: Lifecycle,
        generation: u64,
        document_bytes: u64,
        timeline: Option<TimelineV3>,
    ) -> Result<Self, VmError> {
        let control = Control { lifecycle, state_file: None, generation, document_bytes, timeline };
        let mut failed = None;
        let inner = Arc::new_cyclic(|inner: &Weak<Inner>| {
            let mut handles = Vec::new();
            for vcpu in vcpus {
                let inner = inner.clone();
                let on_ending = Arc::new(move |ending| {
                    if let Some(inner) = inner.upgrade() {
                        inner.end(ending);
                    }
                });
                match VcpuHandle::start(vcpu, machine.buses(), on_ending) {
                    Ok(handle) => handles.push(handle),
                    Err(error) => failed = Some(error),
                }
            }
            Inner { machine, vcpus: handles, control: Mutex::new(control), ended: Condvar::new() }
        });
        match failed {
            None => Ok(Self(inner)),
            Some(error) => Err(error.into()),
        }
    }

    /// Lets the guest run for the first time in this process, unless it was paused before a live update. `before_first_run` is called
    /// right before any vCPU enters the guest, with the timeline, which after a cold start has nothing in it but that; from then on
    /// the guest's memory changes.
    pub fn run(&self, before_first_run: Box<dyn FnOnce(&TimelineV3) + Send>) -> Result<(), VmError> {
        self.0.machine.start_devices()?;
        let mut control = self.0.control();
        let next = control.after(Event::Start)?;
        let restored = control.timeline.is_some();
        let inner = self.0.clone();
        let told = Arc::new(OnceLock::new());
        let telling = told.clone();
        let before: BeforeRun = Box::new(move || {
            let mut timeline = inner.control().timeline.clone().unwrap_or_else(|| TimelineV3::new(1));
            timeline.mark(Phase::FirstInstruction, arch::counter());
            before_first_run(&timeline);
            // Not earlier: they write to the guest's memory, from which the VM could be restored once more until now.
            inner.machine.start_virtio(restored);
            telling.get_or_init(|| ());
            if restored {
                inner.control().timeline = Some(timeline);
            }
        });
        control.lifecycle.enter(next);
        if !control.lifecycle.wants_to_run() {
            // It is as its operator left it. All that is said before it runs is said now, as it may be long until it does.
            drop(control);
            before();
            return Ok(());
        }
        // The first vCPU tells, and the others must not have changed the memory before that is done.
        let await_told = || {
            let told = told.clone();
            Box::new(move || {
                told.wait();
            }) as BeforeRun
        };
        let others = std::iter::repeat_with(await_told);
        for (vcpu, before) in self.0.vcpus.iter().zip(std::iter::once(before).chain(others)) {
            vcpu.run(restored, Some(before))?;
        }
        Ok(())
    }

    /// Blocks until the guest or the operator ends the VM.
    pub fn wait(&self) -> Ending {
        let mut control = self.0.control();
        loop {
            if let Some(ending) = control.lifecycle.ending() {
                return ending.clone();
            }
            control = self.0.ended.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether it has ended by itself under a live update, which has not been told of it yet.
    pub fn has_ended_prepared(&self) -> bool {
        self.0.control().lifecycle.has_ended_prepared()
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        let MachineConfig { name, cpus, memory, serial: _, devices: _ } = self.0.machine.config();
        let control = self.0.control();
        Status {
            name: name.clone(),
            state: control.lifecycle.state(),
            memory: *memory,
            cpus: *cpus,
            generation: control.generation,
            document_bytes: control.document_bytes,
            timeline: control.timeline.clone(),
            serial_dropped: self.0.machine.serial_dropped(),
        }
    }

    /// Pauses the guest. Pausing a paused one changes nothing.
    pub fn pause(&self) -> Result<(), VmError> {
        let mut control = self.0.control();
        let next = control.after(Event::Pause)?;
        if control.lifecycle.state() == State::Running {
            self.0.stop_vcpus()?;
        }
        control.lifecycle.enter(next);
        Ok(())
    }

    /// Lets a paused guest run. Resuming a running one changes nothing.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut control = self.0.control();
        let next = control.after(Event::Resume)?;
        if control.lifecycle.state() == State::Paused {
            self.0.start_vcpus()?;
        }
        control.lifecycle.enter(next);
        Ok(())
    }

    /// Ends it, whatever it is doing.
    pub fn stop(&self) {
        self.0.end(Ending::Stopped);
    }

    /// Gets everything ready to be preserved while the guest runs on.
    pub fn prepare(&self) -> Result<Prepared, VmError> {
        let mut control = self.0.control();
        let next = control.after(Event::Prepare)?;
        control.lifecycle.enter(next);
        // Under the lock, as is the release: whoever finds the VM prepared finds its memory held.
        self.0.machine.ram().discards().hold();
        drop(control);
        // Outside of the lock, as it may take seconds.
        let prepared = self.prepare_files();
        if prepared.is_err() {
            self.thaw()?;
        }
        prepared
    }

    fn prepare_files(&self) -> Result<Prepared, VmError> {
        let machine = &self.0.machine;
        machine.ram().populate().map_err(MachineError::from)?;
        machine.flush_devices()?;
        let state_file = StateFile::create(machine.config())?;
        let state = state_file
            .file()
            .try_clone()
            .map_err(|source| PersistError::File { operation: "duplicate the descriptor of", source })?;
        let ram = vec![(tokens::RAM_FIRST, machine.ram().size(), machine.ram_file()?)];
        fault::at(Process::Vm, Phase::Prepared, Some(&machine.config().name))?;
        let mut control = self.0.control();
        match control.lifecycle.state() {
            State::Prepared => control.state_file = Some(state_file),
            state => return Err(VmError::State { operation: Event::Prepare.wish(), state }),
        }
        Ok(Prepared { state_token: tokens::STATE, state, ram })
    }

    /// Makes the guest stand still and writes its document.
    pub fn freeze(&self, generation: u64) -> Result<Frozen, VmError> {
        let mut control = self.0.control();
        let next = control.after(Event::Freeze)?;
        let Some(state_file) = control.state_file.as_ref() else {
            return Err(VmError::State { operation: Event::Freeze.wish(), state: control.lifecycle.state() });
        };
        let running = control.lifecycle.wants_to_run();
        let frozen = self.0.freeze(state_file, generation, running);
        match frozen {
            Ok(frozen) => {
                control.lifecycle.enter(next);
                control.document_bytes = frozen.document_bytes;
                Ok(frozen)
            }
            Err(error) => {
                // What made the freeze fail says more than what may now fail because of it.
                let unfrozen = self.0.unfreeze(running);
                if let VmError::Vcpu(VcpuError::Ended { .. }) = &error {
                    // The guest was quicker. Whoever asked is to find it ended, which its vCPU is about to say.
                    drop(
                        self.0
                            .ended
                            .wait_timeout_while(control, SAYING, |control| control.lifecycle.ending().is_none()),
                    );
                } else if let Err(error) = unfrozen {
                    tracing::error!(%error, "the guest cannot go on");
                }
                Err(error)
            }
        }
    }

    /// Goes back to what it was before it was prepared.
    pub fn thaw(&self) -> Result<(), VmError> {
        let mut control = self.0.control();
        let next = control.after(Event::Thaw)?;
        let before = control.lifecycle.state();
        control.lifecycle.enter(next);
        if !matches!(before, State::Prepared | State::Frozen) {
            return Ok(());
        }
        control.state_file = None;
        self.0.machine.ram().discards().release();
        if before == State::Frozen {
            self.0.unfreeze(control.lifecycle.wants_to_run())?;
        }
        Ok(())
    }
}

impl Inner {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, ending: Ending) {
        let mut control = self.control();
        control.lifecycle.end(ending);
        self.ended.notify_all();
    }

    /// Signals all first and waits afterwards, so that many take as long as one.
    fn stop_vcpus(&self) -> Result<(), VmError> {
        for vcpu in &self.vcpus {
            vcpu.ask_to_pause()?;
        }
        for vcpu in &self.vcpus {
            vcpu.await_pause()?;
        }
        Ok(())
    }

    fn start_vcpus(&self) -> Result<(), VmError> {
        for vcpu in &self.vcpus {
            vcpu.run(true, None)?;
        }
        Ok(())
    }

    fn freeze(&self, state_file: &StateFile, generation: u64, running: bool) -> Result<Frozen, VmError> {
        let asked = arch::counter();
        let fault = |phase| fault::at(Process::Vm, phase, Some(&self.machine.config().name));
        fault(Phase::PauseAsked)?;
        if running {
            self.stop_vcpus()?;
        }
        let stopped = arch::counter();
        fault(Phase::VcpusStopped)?;
        self.machine.pause_devices()?;
        let devices_stopped = arch::counter();
        fault(Phase::DevicesStopped)?;
        let mut answers = Vec::new();
        for vcpu in &self.vcpus {
            answers.push(vcpu.save()?);
        }
        let mut states = Vec::new();
        for (answer, id) in answers.into_iter().zip(0..) {
            states.push(answer.recv().map_err(|_| VcpuError::Ended { id })??);
        }
        let document = self.machine.save(generation, !running, states)?;
        let document_bytes = state_file.write(&document)?;
        let written = arch::counter();
        if fault::is_flipped(Process::Vm, Phase::DocumentWritten, Some(&document.name)) {
            state_file.spoil(document_bytes)?;
        }
        fault(Phase::DocumentWritten)?;
        let marks = vec![
            (Phase::PauseAsked, asked),
            (Phase::VcpusStopped, stopped),
            (Phase::DevicesStopped, devices_stopped),
            (Phase::DocumentWritten, written),
        ];
        Ok(Frozen { document_bytes, marks })
    }

    fn unfreeze(&self, running: bool) -> Result<(), VmError> {
        self.machine.resume_devices();
        if running {
            self.start_vcpus()?;
        }
        Ok(())
    }
}

/// The one memfd that holds all RAM, as this version writes documents.
fn file_of_ranges(files: Vec<(u64, OwnedFd)>, document: &MachineV3) -> Result<OwnedFd, VmError> {
    let mut files = files.into_iter();
    let (Some((token, file)), None) = (files.next(), files.next()) else {
        return Err(VmError::Files("exactly one memfd holds a VM's memory".to_owned()));
    };
    match document.ram.iter().find(|range| range.token != token) {
        None => Ok(file),
        Some(range) => {
            Err(VmError::Files(format!("the range at {:#x} is in memfd {:#x}, not {token:#x}", range.gpa, range.token)))
        }
    }
}
