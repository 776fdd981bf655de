//! Faults on demand: `KHO_VMM_FAULT` makes a process fail at a named point, so that tests can show what survives it.
//!
//! The variable is a comma-separated list of `POINT[/VM]=ACTION[@ATTEMPT]`. It is compiled in always: the binary that is
//! tested is the binary that is used, and whoever can set a root process's environment needs no help to break it.
//!
//! | point | process | when |
//! |---|---|---|
//! | `update.image-loaded` | `vmm update` | the next kernel is loaded, no VM has been touched |
//! | `update.memory-preserved` | `vmm update` | once per RAM file of a VM; `flip` leaves it out |
//! | `update.prepared` | `vmm update` | all VMs are preserved, guests run |
//! | `update.frozen` | `vmm update` | all guests are paused, their documents are written |
//! | `update.checked` | `vmm update` | once per VM, its document has been found complete; `flip` spoils it behind that check |
//! | `update.preserved` | `vmm update` | the index is written; next is the reboot |
//! | `vm.prepared`, `vm.document-written` | a VM | before it answers the request; the latter's `flip` spoils the document |
//! | `vm.machine-built` | a VM | rebuilt after a kexec, before its first instruction |
//! | `restore.files-retrieved` | `vmm restore` | once per VM, its files are about to be retrieved |
//! | `restore.memory-retrieved` | `vmm restore` | once per VM, its memory is there; `flip` spoils it |

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::time::Duration;

/// The variable that asks for faults.
pub const VARIABLE: &str = "KHO_VMM_FAULT";
/// Set by the restoring supervisor for a VM it starts: which attempt this is, counted from 1.
pub const ATTEMPT_VARIABLE: &str = "KHO_VMM_ATTEMPT";
/// Set by the restoring supervisor for a VM it starts: the VM's name.
pub const VM_VARIABLE: &str = "KHO_VMM_NAME";

/// How long a `stall` lasts: longer than a test's time-out, and yet it ends, so that what comes after can be seen too.
pub const STALL: Duration = Duration::from_secs(20);

/// What is to happen at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process kills itself with SIGKILL.
    Kill,
    /// The step fails.
    Fail,
    /// The step takes [`STALL`] longer.
    Stall,
    /// One byte of what was written is changed.
    Flip,
}

/// The error of a step that was made to fail.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE} asks for a failure at {0}")]
pub struct InjectedFault(String);

/// A list of faults that cannot be read. A test that asks for a fault and gets none would prove nothing, so this is
/// refused at the start of a process.
#[derive(Debug, thiserror::Error)]
#[error("'{entry}' in {VARIABLE} is no POINT[/VM]=ACTION[@ATTEMPT] with an action of kill, fail, stall or flip")]
pub struct FaultSyntaxError {
    entry: String,
}

/// One entry of the list.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    point: String,
    vm: Option<String>,
    action: Action,
    attempt: Option<u32>,
}

impl FromStr for Fault {
    type Err = FaultSyntaxError;

    fn from_str(entry: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (place, effect) = entry.split_once('=')?;
            let (point, vm) = place.split_once('/').map_or((place, None), |(point, vm)| (point, Some(vm)));
            let (action, attempt) = effect.split_once('@').map_or((effect, None), |(action, n)| (action, Some(n)));
            let action = match action {
                "kill" => Action::Kill,
                "fail" => Action::Fail,
                "stall" => Action::Stall,
                "flip" => Action::Flip,
                _ => return None,
            };
            let attempt = attempt.map(|number| number.parse().ok()).map_or(Some(None), |number| number.map(Some))?;
            let named = !point.is_empty() && vm.is_none_or(|vm| !vm.is_empty());
            named.then(|| Self { point: point.to_owned(), vm: vm.map(str::to_owned), action, attempt })
        };
        parse().ok_or_else(|| FaultSyntaxError { entry: entry.to_owned() })
    }
}

impl Fault {
    fn applies(&self, point: &str, vm: Option<&str>, attempt: Option<u32>) -> bool {
        self.point == point
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

/// What is asked for at `point`, as far as it concerns the VM of that name.
pub fn requested(point: &str, vm: Option<&str>) -> Option<Action> {
    // Read anew each time rather than kept in a global: points are passed a handful of times in a process's life.
    let list = std::env::var(VARIABLE).ok()?;
    let own_name = std::env::var(VM_VARIABLE).ok();
    let attempt = std::env::var(ATTEMPT_VARIABLE).ok().and_then(|number| number.parse().ok());
    let vm = vm.or(own_name.as_deref());
    parse(&list).ok()?.into_iter().find(|fault| fault.applies(point, vm, attempt)).map(|fault| fault.action)
}

/// Passes `point`, where the process may be made to die, to fail or to wait.
pub fn at(point: &str) -> Result<(), InjectedFault> {
    at_vm(point, None)
}

/// Passes `point` on behalf of the VM of that name.
pub fn at_vm(point: &str, vm: Option<&str>) -> Result<(), InjectedFault> {
    match requested(point, vm) {
        Some(Action::Kill) => kill_self(),
        Some(Action::Fail) => return Err(InjectedFault(point.to_owned())),
        Some(Action::Stall) => std::thread::sleep(STALL),
        Some(Action::Flip) | None => {}
    }
    Ok(())
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

    fn applies(list: &str, point: &str, vm: Option<&str>, attempt: Option<u32>) -> Option<Action> {
        parse(list).unwrap().into_iter().find(|fault| fault.applies(point, vm, attempt)).map(|fault| fault.action)
    }

    #[test]
    fn fault_applies_at_its_point_only() {
        let list = "update.prepared=kill, vm.machine-built=fail";
        assert_eq!(applies(list, "update.prepared", None, None), Some(Action::Kill));
        assert_eq!(applies(list, "vm.machine-built", None, Some(3)), Some(Action::Fail));
        assert_eq!(applies(list, "update.preserved", None, None), None);
        assert_eq!(applies("", "update.prepared", None, None), None);
    }

    #[test]
    fn fault_of_one_attempt_spares_the_others() {
        let list = "vm.machine-built=kill@1";
        assert_eq!(applies(list, "vm.machine-built", None, Some(1)), Some(Action::Kill));
        assert_eq!(applies(list, "vm.machine-built", None, Some(2)), None);
        assert_eq!(applies(list, "vm.machine-built", None, None), None);
    }

    #[test]
    fn fault_of_one_vm_spares_the_others() {
        let list = "update.checked/oracle=flip";
        assert_eq!(applies(list, "update.checked", Some("oracle"), None), Some(Action::Flip));
        assert_eq!(applies(list, "update.checked", Some("linux"), None), None);
        assert_eq!(applies(list, "update.checked", None, None), None);
    }

    #[test]
    fn list_that_cannot_be_read_is_refused() {
        for list in ["update.prepared", "=kill", "a=explode", "a=kill@", "a=kill@x", "a/=kill"] {
            assert!(parse(list).is_err(), "{list}");
        }
    }
}
