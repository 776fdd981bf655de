//! The Varlink interface of a VM: its methods, what they return, and how they fail.
//!
//! These are wire types. They change by adding a new interface version, or a field of a reply that may be absent, never in any
//! other way: an old `vmm` may have to talk to a VM that a newer one started, and the other way round.

use std::fmt;
use std::os::fd::OwnedFd;

use kho_abi::document::timeline::{Phase, TimelineV3};
use serde::{Deserialize, Serialize};
use zlink::introspect;

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub enum MachineState {
    /// The guest runs.
    Running,
    /// The operator has paused the guest.
    Paused,
    /// The guest runs, its memory is being preserved for a live update.
    Prepared,
    /// The guest is paused and its document is written, for a live update.
    Frozen,
    /// The guest has ended, the process is about to.
    Ended,
}

impl MachineState {
    /// The state's name, as it is shown and as it is on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prepared => "prepared",
            Self::Frozen => "frozen",
            Self::Ended => "ended",
        }
    }
}

impl From<crate::vm::State> for MachineState {
    fn from(state: crate::vm::State) -> Self {
        use crate::vm::State;
        match state {
            State::Running => Self::Running,
            // Nobody has paused it, but an operator knows what that means.
            State::Built | State::Paused => Self::Paused,
            State::Prepared => Self::Prepared,
            State::Frozen => Self::Frozen,
            State::Ended => Self::Ended,
        }
    }
}

/// When a phase of a live update was reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
pub struct Mark {
    /// The phase's name.
    pub phase: String,
    /// The host's raw counter at that moment.
    pub counter: u64,
}

/// Marks in wire form.
pub fn marks(marks: &[(Phase, u64)]) -> Vec<Mark> {
    marks.iter().map(|&(phase, counter)| Mark { phase: phase.name().to_owned(), counter }).collect()
}

/// Marks from the wire; one of a phase this version does not know is left out, as it is only a measurement.
pub fn known_marks(marks: &[Mark]) -> Vec<(Phase, u64)> {
    marks.iter().filter_map(|mark| Some((Phase::from_name(&mark.phase)?, mark.counter))).collect()
}

/// A VM, as `Status` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct MachineStatus {
    /// The VM's name.
    pub name: String,
    /// What it is doing.
    pub state: MachineState,
    /// The process it lives in.
    pub pid: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How many live updates of its host it has been through.
    pub generation: u64,
    /// Size of the document it was restored from, 0 where it was not.
    pub document_bytes: u64,
    /// Counts per second of the counter behind `marks`.
    pub counter_hz: Option<u64>,
    /// The phases of the live update it came through last.
    pub marks: Vec<Mark>,
    /// Bytes of output of the serial port that nobody will read; not told by a VM of a version before this was counted.
    #[serde(default)]
    pub serial_dropped: Option<u64>,
}

impl MachineStatus {
    /// The timeline of the live update it came through last.
    pub fn timeline(&self) -> Option<TimelineV3> {
        let frequency_hz = self.counter_hz?;
        Some(TimelineV3 { frequency_hz, marks: known_marks(&self.marks) })
    }
}

impl From<crate::vm::Status> for MachineStatus {
    fn from(status: crate::vm::Status) -> Self {
        let crate::vm::Status { name, state, memory, cpus, generation, document_bytes, timeline, serial_dropped } =
            status;
        Self {
            name,
            state: state.into(),
            pid: std::process::id(),
            memory,
            cpus,
            generation,
            document_bytes,
            counter_hz: timeline.as_ref().map(|timeline| timeline.frequency_hz),
            marks: timeline.map(|timeline| marks(&timeline.marks)).unwrap_or_default(),
            serial_dropped: Some(serial_dropped),
        }
    }
}

/// One of a VM's RAM files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::CustomType)]
pub struct RamFile {
    /// The number under which the document names it.
    pub token: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// What `Prepare` returns, beside the files themselves: the state file first, then those of `ram` in its order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct PreparedFiles {
    /// The number under which the state file is to be preserved.
    pub state_token: u64,
    /// The RAM files.
    pub ram: Vec<RamFile>,
}

/// What `Freeze` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, introspect::Type)]
pub struct FrozenDocument {
    /// Bytes written into the state file.
    pub document_bytes: u64,
    /// When the pause was asked for, the vCPUs stood still, and the document was written.
    pub marks: Vec<Mark>,
}

/// How a method fails.
#[derive(Clone, Debug, PartialEq, Eq, zlink::ReplyError, introspect::ReplyError)]
#[zlink(interface = "org.kho-vmm.Machine1")]
pub enum MachineError {
    /// The VM is not in a state for it, or the attempt failed; the VM is as it was before.
    OperationFailed {
        /// The operation.
        operation: String,
        /// Why, with all causes.
        reason: String,
    },
    /// `Prepare` came without the one file descriptor that is its lease.
    LeaseMissing {
        /// How many came.
        count: u32,
    },
}

// By hand, as zlink's derive passes on the attributes that thiserror would want.
impl fmt::Display for MachineError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OperationFailed { operation, reason } => write!(out, "{operation}: {reason}"),
            Self::LeaseMissing { count } => {
                write!(out, "prepare needs exactly one file, the read end of a pipe, and came with {count}")
            }
        }
    }
}

impl std::error::Error for MachineError {}

/// The client's side of the interface.
#[zlink::proxy("org.kho-vmm.Machine1")]
pub trait MachineProxy {
    /// What the VM is and does.
    async fn status(&mut self) -> zlink::Result<Result<MachineStatus, MachineError>>;
    /// Pauses the guest.
    async fn pause(&mut self) -> zlink::Result<Result<(), MachineError>>;
    /// Lets a paused guest run on.
    async fn resume(&mut self) -> zlink::Result<Result<(), MachineError>>;
    /// Ends the VM.
    async fn stop(&mut self) -> zlink::Result<Result<(), MachineError>>;
    /// Readies the VM for being preserved, while its guest runs.
    #[zlink(return_fds)]
    async fn prepare(
        &mut self,
        #[zlink(fds)] lease: Vec<OwnedFd>,
    ) -> zlink::Result<(Result<PreparedFiles, MachineError>, Vec<OwnedFd>)>;
    /// Pauses the guest and writes its document.
    async fn freeze(&mut self, generation: u64) -> zlink::Result<Result<FrozenDocument, MachineError>>;
    /// Takes back prepare and freeze.
    async fn thaw(&mut self) -> zlink::Result<Result<(), MachineError>>;
}
