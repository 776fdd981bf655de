//! The timeline of an update: when each phase was reached, by a counter that runs on through a kexec.
//!
//! No clock of the kernel's does: CLOCK_MONOTONIC starts anew, CLOCK_REALTIME comes back from an RTC with a resolution
//! of a second. So marks are raw values of the CPU's counter (TSC, CNTVCT), together with its frequency.

use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use super::node::Node;
use super::record::{COMPATIBLE, Reader, Record};
use super::{DecodeError, Problem};

/// The phases of a live update, in the order in which they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The operator's request has arrived.
    UpdateStarted,
    /// The next kernel is loaded.
    ImageLoaded,
    /// All that is preserved while the guest runs, is.
    Prepared,
    /// The VM was asked to pause: the blackout begins.
    PauseAsked,
    /// No vCPU runs any more.
    VcpusStopped,
    /// No device works any more, and what would be lost with the old kernel is durable.
    DevicesStopped,
    /// The document is in its memfd.
    DocumentWritten,
    /// All of the guest's memory has been read for its checksum, where one was asked for.
    MemoryDigested,
    /// All is preserved, the index included.
    Preserved,
    /// The last moment of the old kernel's user space.
    RebootCalled,
    /// The first moment of the new kernel's user space.
    InitReached,
    /// The index is back.
    IndexRetrieved,
    /// The VM's files are back.
    FilesRetrieved,
    /// All of the guest's memory has been read again, and has the checksum that it had.
    DigestChecked,
    /// The machine is whole again.
    MachineBuilt,
    /// The guest runs: the blackout ends.
    FirstInstruction,
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; 16] = [
        Self::UpdateStarted,
        Self::ImageLoaded,
        Self::Prepared,
        Self::PauseAsked,
        Self::VcpusStopped,
        Self::DevicesStopped,
        Self::DocumentWritten,
        Self::MemoryDigested,
        Self::Preserved,
        Self::RebootCalled,
        Self::InitReached,
        Self::IndexRetrieved,
        Self::FilesRetrieved,
        Self::DigestChecked,
        Self::MachineBuilt,
        Self::FirstInstruction,
    ];

    /// The phase's name in documents and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UpdateStarted => "update-started",
            Self::ImageLoaded => "image-loaded",
            Self::Prepared => "prepared",
            Self::PauseAsked => "pause-asked",
            Self::VcpusStopped => "vcpus-stopped",
            Self::DevicesStopped => "devices-stopped",
            Self::DocumentWritten => "document-written",
            Self::MemoryDigested => "memory-digested",
            Self::Preserved => "preserved",
            Self::RebootCalled => "reboot-called",
            Self::InitReached => "init-reached",
            Self::IndexRetrieved => "index-retrieved",
            Self::FilesRetrieved => "files-retrieved",
            Self::DigestChecked => "digest-checked",
            Self::MachineBuilt => "machine-built",
            Self::FirstInstruction => "first-instruction",
        }
    }

    /// The phase of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

/// A name that no phase has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no phase has this name")]
pub struct UnknownPhase;

impl FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(name: &str) -> Result<Self, UnknownPhase> {
        Self::from_name(name).ok_or(UnknownPhase)
    }
}

/// Marks of one update.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TimelineV3 {
    /// Counts per second; 0 where it is not known, and then no times can be told.
    pub frequency_hz: u64,
    /// The counter at each phase that was reached. [`mark`](Self::mark) keeps them in order, one per phase; so does
    /// encoding, with the last one where there are several.
    pub marks: Vec<(Phase, u64)>,
}

impl TimelineV3 {
    /// A timeline without marks.
    pub fn new(frequency_hz: u64) -> Self {
        Self { frequency_hz, marks: Vec::new() }
    }

    /// Notes that `phase` was reached at `counter`, instead of an earlier note of it: a phase may be tried again.
    pub fn mark(&mut self, phase: Phase, counter: u64) {
        self.marks.retain(|(marked, _)| *marked != phase);
        let position = self.marks.partition_point(|(marked, _)| *marked < phase);
        self.marks.insert(position, (phase, counter));
    }

    /// Takes over the marks of another timeline of the same host.
    pub fn merge(&mut self, other: &Self) {
        for &(phase, counter) in &other.marks {
            self.mark(phase, counter);
        }
    }

    /// The counter when `phase` was reached.
    pub fn counter(&self, phase: Phase) -> Option<u64> {
        self.marks.iter().rev().find(|(marked, _)| *marked == phase).map(|(_, counter)| *counter)
    }

    /// Milliseconds between two phases; negative where `to` was reached before `from`. `None` where one of them was
    /// not reached or the frequency is not known.
    pub fn between_ms(&self, from: Phase, to: Phase) -> Option<f64> {
        Some(self.milliseconds(self.counter(from)?, self.counter(to)?)).filter(|_| self.frequency_hz != 0)
    }

    /// How long the guest did not run, in milliseconds: from the request to pause until its first instruction.
    pub fn blackout_ms(&self) -> Option<f64> {
        self.between_ms(Phase::PauseAsked, Phase::FirstInstruction)
    }

    /// The phases that were reached, in order, each with the milliseconds since the one before; the first with 0.
    /// Empty where the frequency is not known.
    pub fn phases(&self) -> Vec<(Phase, f64)> {
        if self.frequency_hz == 0 {
            return Vec::new();
        }
        let mut previous = None;
        Phase::ALL
            .into_iter()
            .filter_map(|phase| {
                let counter = self.counter(phase)?;
                let since = self.milliseconds(previous.unwrap_or(counter), counter);
                previous = Some(counter);
                Some((phase, since))
            })
            .collect()
    }

    fn milliseconds(&self, from: u64, to: u64) -> f64 {
        // Subtracted as integers first: a counter may be beyond what an f64 holds to the last digit.
        let counts = if to >= from { (to - from) as f64 } else { -((from - to) as f64) };
        counts * 1000.0 / self.frequency_hz as f64
    }
}

/// What timelines call themselves that have only phases which that version knows.
const TIMELINE_V1: &str = "kho-vmm,timeline-v1";
const TIMELINE_V2: &str = "kho-vmm,timeline-v2";

/// The first version that knows a phase.
fn version(phase: Phase) -> &'static str {
    match phase {
        Phase::MemoryDigested | Phase::DigestChecked => TimelineV3::COMPATIBLE,
        Phase::DevicesStopped => TIMELINE_V2,
        _ => TIMELINE_V1,
    }
}

impl TimelineV3 {
    /// The node called `name`: of the oldest version that holds all there is, so that who knows only that can read it.
    pub fn to_node(&self, name: &str) -> Node {
        // The versions' names are in their order.
        let version = self.marks.iter().map(|(phase, _)| version(*phase)).max().unwrap_or(TIMELINE_V1);
        self.encode(Node::new(name).with_str(COMPATIBLE, version))
    }

    /// Reads a node of this version or an earlier one.
    ///
    /// # Errors
    /// When it is of none, or does not decode.
    pub fn decode_any(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let versions = [TIMELINE_V1, TIMELINE_V2, Self::COMPATIBLE];
        let found = reader.compatible()?;
        match versions.iter().find(|version| **version == found) {
            Some(known) => decode_phases(reader, |phase| version(phase) <= *known),
            None => Err(reader.error(Problem::Incompatible { expected: versions.join(" or "), found })),
        }
    }
}

fn decode_phases(reader: &mut Reader<'_>, known: impl Fn(Phase) -> bool) -> Result<TimelineV3, DecodeError> {
    let mut timeline = TimelineV3::new(reader.u64("frequency-hz")?);
    for phase in Phase::ALL.into_iter().filter(|phase| known(*phase)) {
        if let Some(counter) = reader.optional_u64(phase.name())? {
            timeline.mark(phase, counter);
        }
    }
    Ok(timeline)
}

impl Record for TimelineV3 {
    const COMPATIBLE: &'static str = "kho-vmm,timeline-v3";

    fn encode(&self, node: Node) -> Node {
        let Self { frequency_hz, marks } = self;
        marks.iter().fold(node.with_u64("frequency-hz", *frequency_hz), |node, (phase, counter)| {
            node.with_u64(phase.name(), *counter)
        })
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        decode_phases(reader, |_| true)
    }
}
