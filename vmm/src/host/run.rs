//! `vmm run`: the process that a VM lives in, whether it starts from nothing or from what the last kernel handed over.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use kho_abi::document::timeline::{Phase, TimelineV3};
use rustix::io::FdFlags;

use crate::arch;
use crate::cli::{RunArgs, status};
use crate::config::VmConfig;
use crate::control::interface::marks;
use crate::control::lease::Lease;
use crate::control::server::{self, chain};
use crate::control::socket::{Claim, RunDir, SocketError};
use crate::fault::{self, Process};
use crate::handover::channel::{self, Arrivals, Arrived, Event};
use crate::handover::ledger::Record;
use crate::host::kept::KeptVm;
use crate::host::signals::{self, Signals};
use crate::vm::{Arriving, Ending, Vm, VmError};

/// Runs a VM until it ends.
pub fn run(dir: &RunDir, arguments: RunArgs) -> anyhow::Result<u8> {
    // Before any thread, so that all of them leave these signals to the one that awaits them.
    let signals = Signals::hold().context("cannot hold back signals")?;
    match arguments.restore {
        Some(descriptor) => restored(dir, descriptor, signals),
        None => cold(dir, arguments, signals),
    }
}

fn cold(dir: &RunDir, arguments: RunArgs, signals: Signals) -> anyhow::Result<u8> {
    let devices = arguments.devices();
    let RunArgs { name, kernel, initrd, append, cpus, memory, serial, .. } = arguments;
    let (Some(name), Some(kernel)) = (name, kernel) else { bail!("--name and --kernel are needed") };
    if KeptVm::read(dir, &name).is_some() {
        return Err(SocketError::Kept { name }.into());
    }
    let claim = Claim::take(dir, &name)?;
    // A restored guest does not wait: it knows its clock's rate already.
    arch::await_counter_calibration();
    let failed = format!("cannot start VM {name}");
    let vm = Vm::cold(VmConfig { name, kernel, initrd, append, cpus, memory, serial, devices }).context(failed)?;
    let lease = attend(&claim, &vm, signals)?;
    vm.run(Box::new(|_| {})).context("cannot run the guest")?;
    Ok(ended(&vm, &lease))
}

fn restored(dir: &RunDir, descriptor: i32, signals: Signals) -> anyhow::Result<u8> {
    let channel = adopt(descriptor).context("--restore is for `vmm restore` only")?;
    let mut arrivals = Arrivals::new(&channel);
    let (handover, state) = arrivals.handover()?;
    tracing::info!(vm = handover.name, attempt = handover.attempt, "restoring");
    let tell = |event| {
        if let Err(error) = channel::tell(&channel, &event) {
            tracing::error!(error = %chain(&error), "cannot tell the supervisor");
        }
    };
    let Built { claim, vm, record, lease } = match build(dir, &handover.name, &state, &mut arrivals, signals) {
        Ok(built) => built,
        Err(Unbuilt::Refused(error)) => {
            tell(Event::Refused { reason: format!("{error:#}") });
            tracing::error!("VM {} cannot be restored: {error:#}", handover.name);
            return Ok(status::RESTORE_REFUSED);
        }
        Err(Unbuilt::Failed(error)) => {
            tell(Event::Failed { reason: format!("{error:#}") });
            return Err(error);
        }
    };
    tell(Event::MachineBuilt);
    arrivals.go().context("nobody lets the guest run")?;
    fault::at(Process::Vm, Phase::FirstInstruction, None)?;
    let started = vm.run(Box::new(move |timeline: &TimelineV3| {
        // From here on the guest counts as running, for whoever restores now and for whoever does after it.
        if let Err(error) = record.set_ran() {
            // Then it must not: it would be started again from memory that it has changed.
            tracing::error!(%error, "cannot note that the guest runs");
            std::process::exit(i32::from(status::FAILED));
        }
        if let Err(error) = channel::tell(&channel, &Event::FirstInstruction { marks: marks(&timeline.marks) }) {
            tracing::warn!(error = %chain(&error), "cannot tell the supervisor that the guest runs");
        }
    }));
    started.context("cannot run the guest")?;
    let status = ended(&vm, &lease);
    drop(claim);
    Ok(status)
}

/// A VM that is all there and has not run yet.
struct Built {
    claim: Claim,
    vm: Vm,
    record: Record,
    lease: Lease,
}

/// Why a VM could not be built from what was handed over.
enum Unbuilt {
    /// It never will be.
    Refused(anyhow::Error),
    /// It may be another time.
    Failed(anyhow::Error),
}

impl From<VmError> for Unbuilt {
    fn from(error: VmError) -> Self {
        if error.is_refusal() { Self::Refused(error.into()) } else { Self::Failed(error.into()) }
    }
}

/// Everything that can fail, before the guest runs.
fn build(
    dir: &RunDir,
    name: &str,
    state: &OwnedFd,
    arrivals: &mut Arrivals<'_>,
    signals: Signals,
) -> Result<Built, Unbuilt> {
    let failed = |error: anyhow::Error| Unbuilt::Failed(error);
    let claim = Claim::take(dir, name).map_err(|error| failed(error.into()))?;
    let arriving = Arriving::new(state)?;
    if arriving.name() != name {
        return Err(Unbuilt::Refused(anyhow!("the document is that of a VM called {}", arriving.name())));
    }
    let Arrived { timeline, ram, record } = arrivals.memory().map_err(|error| failed(error.into()))?;
    let vm = arriving.restore(ram, timeline)?;
    let lease = attend(&claim, &vm, signals).map_err(failed)?;
    Ok(Built { claim, vm, record, lease })
}

/// Opens the VM to its operator: the socket, and the signals that ask it to end.
fn attend(claim: &Claim, vm: &Vm, signals: Signals) -> anyhow::Result<Lease> {
    let lease = server::serve(Arc::new(vm.clone()), claim.listen()?).context("cannot start the control thread")?;
    let stopped = vm.clone();
    let watch = signals.watch(move |signal| {
        tracing::info!(signal = signals::name(signal), "ending the VM");
        stopped.stop();
        true
    });
    watch.context("cannot watch for signals")?;
    Ok(lease)
}

/// Waits for the end, and turns it into an exit status.
fn ended(vm: &Vm, lease: &Lease) -> u8 {
    let ending = vm.wait();
    if vm.has_ended_prepared() {
        // A process that is gone could have been killed, and the live update would be called off. It comes to an end in any case.
        lease.await_release();
    }
    match ending {
        Ending::PowerOff => status::DONE,
        Ending::Reset => status::GUEST_RESET,
        Ending::TripleFault => {
            tracing::error!("the guest crashed with a triple fault");
            status::GUEST_TRIPLE_FAULT
        }
        Ending::Stopped => status::STOPPED,
        Ending::Failed(reason) => {
            tracing::error!(reason, "the VM failed");
            status::FAILED
        }
    }
}

/// Takes over a descriptor that this process was started with.
pub fn adopt_descriptor(descriptor: i32) -> anyhow::Result<OwnedFd> {
    if descriptor < 3 {
        bail!("file descriptor {descriptor} is not one to be handed over");
    }
    // SAFETY: only looked at here, to see whether it is open at all; fcntl fails where it is not.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC).context("no such file descriptor")?;
    // SAFETY: it is open, was opened for us by the process that started us, and nothing else in this process uses it:
    // this is called at most once, before any file of our own could have got that number.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn adopt(descriptor: i32) -> anyhow::Result<UnixStream> {
    Ok(UnixStream::from(adopt_descriptor(descriptor)?))
}
