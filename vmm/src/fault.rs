//! Faults on demand: `KHO_VMM_FAULT` makes a process fail when it reaches a phase, so that tests can show what survives it.
//!
//! The variable is a comma-separated list of `PROCESS.PHASE[/VM]=ACTION[@ATTEMPT]`; [`POINTS`] has all that there is to ask for, and
//! `vmm faults` tells it to tests. It is compiled in always: the binary that is tested is the binary that is used, and whoever can set
//! a root process's environment needs no help to break it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::time::Duration;

use kho_abi::document::timeline::Phase;
use serde_json::{Value, json};

/// The variable that asks for faults.
pub const VARIABLE: &str = "KHO_VMM_FAULT";
/// Set by the restoring supervisor for a VM it starts: which attempt this is, counted from 1.
pub const ATTEMPT_VARIABLE: &str = "KHO_VMM_ATTEMPT";
/// Set by the restoring supervisor for a VM it starts: the VM's name.
pub const VM_VARIABLE: &str = "KHO_VMM_NAME";

/// How long a `stall` lasts: longer than a test's time-out, and yet it ends, so that what comes after can be seen too.
pub const STALL: Duration = Duration::from_secs(20);

/// A process that passes phases of a live update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// `vmm update`.
    Update,
    /// A VM's.
    Vm,
    /// The worker of `vmm restore --all`. An attempt is a VM's, or, for what concerns all, the guardian's.
    Restore,
}

impl Process {
    fn name(self) -> &'static str {
        match self {
            Self::Update => "update",
            Self::Vm => "vm",
            Self::Restore => "restore",
        }
    }
}

/// What is to happen at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process kills itself with SIGKILL.
    Kill,
    /// The step fails.
    Fail,
    /// The step takes [`STALL`] longer.
    Stall,
    /// Something of what was written is changed, or left out.
    Flip,
}

impl Action {
    const ALL: [Self; 4] = [Self::Kill, Self::Fail, Self::Stall, Self::Flip];

    fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Fail => "fail",
            Self::Stall => "stall",
            Self::Flip => "flip",
        }
    }
}

/// Where something can be made to happen, and what.
pub struct Point {
    process: Process,
    phase: Phase,
    actions: &'static [Action],
    /// What `flip` does there.
    flip: &'static str,
}

const fn point(process: Process, phase: Phase) -> Point {
    Point { process, phase, actions: &[Action::Kill, Action::Fail, Action::Stall], flip: "" }
}

const fn flipping(process: Process, phase: Phase, flip: &'static str) -> Point {
    Point { process, phase, actions: &Action::ALL, flip }
}

/// All of them: each phase of the timeline, in each of the processes that reach it.
pub const POINTS: [Point; 21] = [
    point(Process::Update, Phase::UpdateStarted),
    point(Process::Update, Phase::ImageLoaded),
    flipping(Process::Update, Phase::Prepared, "leaves a VM's memory out of what is handed over"),
    point(Process::Update, Phase::PauseAsked),
    flipping(Process::Update, Phase::DocumentWritten, "spoils a VM's document after it was found complete"),
    point(Process::Update, Phase::MemoryDigested),
    flipping(
        Process::Update,
        Phase::Preserved,
        "tells the next kernel of a VM's memory under a token that no session knows",
    ),
    point(Process::Update, Phase::RebootCalled),
    point(Process::Vm, Phase::Prepared),
    point(Process::Vm, Phase::PauseAsked),
    point(Process::Vm, Phase::VcpusStopped),
    point(Process::Vm, Phase::DevicesStopped),
    flipping(Process::Vm, Phase::DocumentWritten, "spoils the document before it is looked at"),
    point(Process::Restore, Phase::InitReached),
    point(Process::Restore, Phase::IndexRetrieved),
    flipping(Process::Restore, Phase::FilesRetrieved, "spoils a VM's memory"),
    point(Process::Restore, Phase::DigestChecked),
    point(Process::Vm, Phase::MachineBuilt),
    point(Process::Restore, Phase::MachineBuilt),
    point(Process::Vm, Phase::FirstInstruction),
    // Not to fail: whatever is done with the guest from then on is done to one that runs.
    Point {
        process: Process::Restore,
        phase: Phase::FirstInstruction,
        actions: &[Action::Kill, Action::Stall],
        flip: "",
    },
];

/// All that can be asked for, for tests.
pub fn to_json() -> Value {
    let one = |point: &Point| {
        let actions: Vec<&str> = point.actions.iter().map(|action| action.name()).collect();
        let flip = Some(point.flip).filter(|flip| !flip.is_empty());
        json!({"process": point.process.name(), "phase": point.phase.name(), "actions": actions, "flip": flip})
    };
    POINTS.iter().map(one).collect()
}

/// The error of a step that was made to fail.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE} asks for a failure at {}.{}", .0.name(), .1.name())]
pub struct InjectedFault(Process, Phase);

/// A list of faults that cannot be read. A test that asks for a fault and gets none would prove nothing, so this is
/// refused at the start of a process.
#[derive(Debug, thiserror::Error)]
#[error("'{entry}' in {VARIABLE} is no PROCESS.PHASE[/VM]=ACTION[@ATTEMPT] of those that `vmm faults` lists")]
pub struct FaultSyntaxError {
    entry: String,
}

/// One entry of the list.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    process: Process,
    phase: Phase,
    vm: Option<String>,
    action: Action,
    attempt: Option<u32>,
}

impl FromStr for Fault {
    type Err = FaultSyntaxError;

    fn from_str(entry: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (place, effect) = entry.split_once('=')?;
            let (name, vm) = place.split_once('/').map_or((place, None), |(name, vm)| (name, Some(vm)));
            let (action, attempt) = effect.split_once('@').map_or((effect, None), |(action, n)| (action, Some(n)));
            let (process, phase) = name.split_once('.')?;
            let point = POINTS.iter().find(|point| (point.process.name(), point.phase.name()) == (process, phase))?;
            let action = *point.actions.iter().find(|one| one.name() == action)?;
            let attempt = attempt.map(|number| number.parse().ok()).map_or(Some(None), |number| number.map(Some))?;
            let (process, phase) = (point.process, point.phase);
            vm.is_none_or(|vm| !vm.is_empty()).then(|| Self {
                process,
                phase,
                vm: vm.map(str::to_owned),
                action,
                attempt,
            })
        };
        parse().ok_or_else(|| FaultSyntaxError { entry: entry.to_owned() })
    }
}

impl Fault {
    fn applies(&self, process: Process, phase: Phase, vm: Option<&str>, attempt: Option<u32>) -> bool {
        (self.process, self.phase) == (process, phase)
            && self.vm.as_deref().is_none_or(|wanted| vm == Some(wanted))
            && self.attempt.is_none_or(|wanted| attempt == Some(wanted))
    }
}

fn parse(list: &str) -> Result<Vec<Fault>, FaultSyntaxError> {
    list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(Fault::from_str).collect()
}

/// Refuses a list that cannot be read.
pub fn check_syntax() -> Result<(), FaultSyntaxError> {
    parse(&std::env::var(VARIABLE).unwrap_or_default()).map(drop)
}

/// What is asked for when a process reaches a phase, as far as it concerns the VM of that name and that attempt. A VM that is being
/// restored knows both by itself.
pub fn requested(process: Process, phase: Phase, vm: Option<&str>, attempt: Option<u32>) -> Option<Action> {
    // Read anew each time rather than kept in a global: points are passed a handful of times in a process's life.
    let list = std::env::var(VARIABLE).ok()?;
    let own_name = std::env::var(VM_VARIABLE).ok();
    let own_attempt = std::env::var(ATTEMPT_VARIABLE).ok().and_then(|number| number.parse().ok());
    let (vm, attempt) = (vm.or(own_name.as_deref()), attempt.or(own_attempt));
    let faults = parse(&list).ok()?;
    faults.into_iter().find(|fault| fault.applies(process, phase, vm, attempt)).map(|fault| fault.action)
}

/// A process reaches a phase, on behalf of a VM or of all. It may be made to die, to fail or to wait.
pub fn at(process: Process, phase: Phase, vm: Option<&str>) -> Result<(), InjectedFault> {
    at_attempt(process, phase, vm, None)
}

/// The same at an attempt of which the process makes several.
pub fn at_attempt(process: Process, phase: Phase, vm: Option<&str>, attempt: Option<u32>) -> Result<(), InjectedFault> {
    match requested(process, phase, vm, attempt) {
        Some(Action::Kill) => kill_self(),
        Some(Action::Fail) => return Err(InjectedFault(process, phase)),
        Some(Action::Stall) => {
            tell_stall(process, phase);
            std::thread::sleep(STALL);
        }
        Some(Action::Flip) | None => {}
    }
    Ok(())
}

/// Whether something is to be changed when a process reaches a phase.
pub fn is_flipped(process: Process, phase: Phase, vm: Option<&str>) -> bool {
    requested(process, phase, vm, None) == Some(Action::Flip)
}

/// Says that a stall begins, for a test that waits for it.
pub fn tell_stall(process: Process, phase: Phase) {
    tracing::warn!("{VARIABLE} asks for a stall at {}.{}", process.name(), phase.name());
}

/// SIGKILL, which no destructor and no handler sees: what is left behind is what the kernel cleans up.
fn kill_self() {
    if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL) {
        tracing::error!(%error, "cannot kill this process");
    }
}

/// Changes one bit in the middle of a file of so many bytes, as bad memory would.
pub fn spoil(file: &OwnedFd, bytes: u64) -> io::Result<()> {
    let (file, mut byte, middle) = (File::from(file.try_clone()?), [0], bytes / 2);
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[byte[0] ^ 1], middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applies(list: &str, process: Process, phase: Phase, vm: Option<&str>, attempt: Option<u32>) -> Option<Action> {
        let faults = parse(list).unwrap();
        faults.into_iter().find(|fault| fault.applies(process, phase, vm, attempt)).map(|fault| fault.action)
    }

    #[test]
    fn fault_applies_at_its_point_only() {
        let list = "update.prepared=kill, vm.machine-built=fail";
        assert_eq!(applies(list, Process::Update, Phase::Prepared, None, None), Some(Action::Kill));
        assert_eq!(applies(list, Process::Vm, Phase::MachineBuilt, None, Some(3)), Some(Action::Fail));
        assert_eq!(applies(list, Process::Vm, Phase::Prepared, None, None), None);
        assert_eq!(applies("", Process::Update, Phase::Prepared, None, None), None);
    }

    #[test]
    fn fault_of_one_attempt_spares_the_others() {
        let at = |attempt| applies("vm.machine-built=kill@1", Process::Vm, Phase::MachineBuilt, None, attempt);
        assert_eq!([at(Some(1)), at(Some(2)), at(None)], [Some(Action::Kill), None, None]);
    }

    #[test]
    fn fault_of_one_vm_spares_the_others() {
        let list = "update.document-written/oracle=flip";
        let at = |vm| applies(list, Process::Update, Phase::DocumentWritten, vm, None);
        assert_eq!([at(Some("oracle")), at(Some("linux")), at(None)], [Some(Action::Flip), None, None]);
    }

    #[test]
    fn list_that_cannot_be_read_is_refused() {
        for list in [
            "update.prepared",
            "=kill",
            "update.prepared=explode",
            "update.prepared=kill@",
            "update.prepared=kill@x",
            "update.prepared/=kill",
            "update.never=kill",
            "update.image-loaded=flip",
            "restore.first-instruction=fail",
        ] {
            assert!(parse(list).is_err(), "{list}");
        }
    }

    #[test]
    fn every_phase_has_a_point_and_each_can_be_asked_for() {
        for phase in Phase::ALL {
            assert!(POINTS.iter().any(|point| point.phase == phase), "{}", phase.name());
        }
        for Point { process, phase, actions, .. } in &POINTS {
            for action in *actions {
                let entry = format!("{}.{}/a={}@2", process.name(), phase.name(), action.name());
                assert_eq!(applies(&entry, *process, *phase, Some("a"), Some(2)), Some(*action));
            }
        }
    }
}
