//! A vCPU and its thread: runs the guest, brings its accesses to the buses, stands still when told to.
//!
//! The thread is either parked, waiting for a command, or runs the guest. To pause it, its `immediate_exit` byte is set and a
//! signal sent: KVM then returns from the guest, or does not enter it, after it has finished a port or memory access of the guest
//! that was half done. So a parked vCPU's state is always whole.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kho_abi::document::vcpu::VcpuState;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::arch::{ArchError, VcpuArch};
use crate::bus::{Bus, Request};
use crate::vm::Ending;

/// How long a vCPU may take to leave the guest. It takes microseconds; a host that is out of CPUs may take longer.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong with a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// Its state could not be read or written.
    #[error("vCPU {id}: cannot {operation} its state")]
    State {
        /// Which vCPU.
        id: u32,
        /// "take" or "put back".
        operation: &'static str,
        /// Why not.
        source: ArchError,
    },
    /// Its thread could not be started or signalled.
    #[error("vCPU {id}: cannot {operation}")]
    Thread {
        /// Which vCPU.
        id: u32,
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// It did not stop in time.
    #[error("vCPU {id} did not leave the guest within {} s", PAUSE_TIMEOUT.as_secs())]
    Timeout {
        /// Which vCPU.
        id: u32,
    },
    /// Its thread is gone.
    #[error("vCPU {id} has ended")]
    Ended {
        /// Which vCPU.
        id: u32,
    },
}

/// A vCPU that no thread runs yet.
pub struct Vcpu {
    /// Its number.
    pub id: u32,
    /// KVM's handle.
    pub fd: VcpuFd,
    /// What this architecture needs to know of it.
    pub arch: VcpuArch,
}

impl Vcpu {
    fn save(&self) -> Result<VcpuState, VcpuError> {
        self.arch.save(&self.fd).map_err(|source| VcpuError::State { id: self.id, operation: "take", source })
    }

    fn restore(&self, state: &VcpuState) -> Result<(), VcpuError> {
        self.arch.restore(&self.fd, state).map_err(|source| VcpuError::State {
            id: self.id,
            operation: "put back",
            source,
        })
    }
}

/// Puts the states of all vCPUs back, each on a thread of its own, so that many take about as long as one.
pub fn restore_all(vcpus: &mut [Vcpu], states: &[VcpuState]) -> Result<(), VcpuError> {
    let mut pairs = vcpus.iter_mut().zip(states);
    let Some((first, first_state)) = pairs.next() else { return Ok(()) };
    thread::scope(|scope| {
        let mut others = Vec::new();
        for (vcpu, state) in pairs {
            let id = vcpu.id;
            let thread = thread::Builder::new()
                .name(format!("restore-vcpu{id}"))
                .spawn_scoped(scope, move || vcpu.restore(state))
                .map_err(|source| VcpuError::Thread { id, operation: "start a thread to restore it", source })?;
            others.push((id, thread));
        }
        let first = first.restore(first_state);
        others
            .into_iter()
            .fold(first, |result, (id, thread)| result.and(thread.join().unwrap_or(Err(VcpuError::Ended { id }))))
    })
}

/// What is called on the vCPU's thread right before it enters the guest.
pub type BeforeRun = Box<dyn FnOnce() + Send>;
/// What is called on a vCPU's thread when the guest has ended, or ended the machine.
pub type OnEnding = Arc<dyn Fn(Ending) + Send + Sync>;

enum Command {
    Run { announce_pause: bool, before: Option<BeforeRun> },
    Save(Sender<Result<VcpuState, VcpuError>>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Parked,
    Running,
    Ended,
}

/// Where the thread is, for whoever waits for it.
struct Progress {
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Progress {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        *self.phase() = phase;
        self.changed.notify_all();
    }
}

/// The `immediate_exit` byte in the memory that a vCPU shares with KVM.
struct ImmediateExit(NonNull<AtomicU8>);

// SAFETY: it points into the vCPU's kvm_run mapping, which lives until the `Vcpu` is dropped. The thread owns the `Vcpu` and hands
// it back only through its join handle, which `VcpuHandle` holds beside this and never joins. Accesses are atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(NonNull::from(&mut fd.get_kvm_run().immediate_exit).cast())
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the pointer is valid, see above; a u8 may be accessed as an AtomicU8, and KVM reads it as one byte.
        unsafe { self.0.as_ref() }
    }

    fn set(&self, value: bool) {
        self.byte().store(value.into(), Ordering::SeqCst);
    }

    fn is_set(&self) -> bool {
        self.byte().load(Ordering::SeqCst) != 0
    }
}

/// A vCPU with a thread of its own.
pub struct VcpuHandle {
    id: u32,
    commands: Sender<Command>,
    progress: Arc<Progress>,
    immediate_exit: Arc<ImmediateExit>,
    thread: JoinHandle<Vcpu>,
}

/// Address spaces of the guest.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped devices.
    pub memory: Arc<Bus>,
}

extern "C" fn interrupt_run(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuHandle {
    /// Starts the thread, parked.
    pub fn start(mut vcpu: Vcpu, buses: Buses, on_ending: OnEnding) -> Result<Self, VcpuError> {
        let id = vcpu.id;
        let failed = |operation| move |source| VcpuError::Thread { id, operation, source };
        // The handler does nothing: that a signal arrives is what makes KVM return.
        register_signal_handler(SIGRTMIN(), interrupt_run)
            .map_err(|error| failed("handle its signal")(std::io::Error::from_raw_os_error(error.errno())))?;
        let progress = Arc::new(Progress { phase: Mutex::new(Phase::Parked), changed: Condvar::new() });
        let immediate_exit = Arc::new(ImmediateExit::of(&mut vcpu.fd));
        let (commands, receiver) = mpsc::channel();
        let runner =
            Runner { vcpu, buses, on_ending, progress: progress.clone(), immediate_exit: immediate_exit.clone() };
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || runner.serve(receiver))
            .map_err(failed("start its thread"))?;
        Ok(Self { id, commands, progress, immediate_exit, thread })
    }

    fn send(&self, command: Command) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Ended { id: self.id })
    }

    /// Lets a parked vCPU run. `before` is called on its thread right before it enters the guest.
    pub fn run(&self, announce_pause: bool, before: Option<BeforeRun>) -> Result<(), VcpuError> {
        // Here and not on the thread, so that a pause that is asked for next is neither lost nor taken for done.
        let mut phase = self.progress.phase();
        if *phase == Phase::Ended {
            return Err(VcpuError::Ended { id: self.id });
        }
        self.immediate_exit.set(false);
        *phase = Phase::Running;
        drop(phase);
        self.send(Command::Run { announce_pause, before })
    }

    /// Asks it to leave the guest, and does not wait.
    pub fn ask_to_pause(&self) -> Result<(), VcpuError> {
        self.immediate_exit.set(true);
        self.thread.kill(SIGRTMIN()).map_err(|error| VcpuError::Thread {
            id: self.id,
            operation: "signal its thread",
            source: std::io::Error::from_raw_os_error(error.errno()),
        })
    }

    /// Waits until it stands still.
    pub fn await_pause(&self) -> Result<(), VcpuError> {
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        let mut phase = self.progress.phase();
        loop {
            match *phase {
                Phase::Parked => return Ok(()),
                Phase::Ended => return Err(VcpuError::Ended { id: self.id }),
                Phase::Running => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VcpuError::Timeout { id: self.id });
            }
            (phase, _) = self.progress.changed.wait_timeout(phase, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks a parked vCPU for its state; the answer comes through the channel.
    pub fn save(&self) -> Result<Receiver<Result<VcpuState, VcpuError>>, VcpuError> {
        let (reply, answer) = mpsc::channel();
        self.send(Command::Save(reply))?;
        Ok(answer)
    }
}

/// The thread's side.
struct Runner {
    vcpu: Vcpu,
    buses: Buses,
    on_ending: OnEnding,
    progress: Arc<Progress>,
    immediate_exit: Arc<ImmediateExit>,
}

impl Runner {
    fn serve(mut self, commands: Receiver<Command>) -> Vcpu {
        while let Ok(command) = commands.recv() {
            match command {
                Command::Save(reply) => {
                    // Whoever asked may have given up.
                    let _ = reply.send(self.vcpu.save());
                }
                Command::Run { announce_pause, before } => {
                    if announce_pause && let Err(error) = self.vcpu.arch.announce_pause(&self.vcpu.fd) {
                        tracing::warn!(%error, vcpu = self.vcpu.id, "the guest is not told that it was paused");
                    }
                    if let Some(before) = before {
                        before();
                    }
                    if let Some(ending) = self.run() {
                        self.progress.set(Phase::Ended);
                        (self.on_ending)(ending);
                        break;
                    }
                    self.progress.set(Phase::Parked);
                }
            }
        }
        self.vcpu
    }

    /// Runs the guest until a pause is asked for (None) or it ends.
    fn run(&mut self) -> Option<Ending> {
        // Values of KVM_EXIT_SYSTEM_EVENT.
        const SHUTDOWN: u32 = 1;
        const RESET: u32 = 2;
        let Buses { ports, memory } = &self.buses;
        loop {
            let request = match self.vcpu.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => ports.write(port.into(), data),
                Ok(VcpuExit::IoIn(port, data)) => {
                    ports.read(port.into(), data);
                    None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => memory.write(address, data),
                Ok(VcpuExit::MmioRead(address, data)) => {
                    memory.read(address, data);
                    None
                }
                Ok(VcpuExit::SystemEvent(SHUTDOWN, _)) => Some(Request::PowerOff),
                Ok(VcpuExit::SystemEvent(RESET, _)) => Some(Request::Reset),
                Ok(VcpuExit::Shutdown) => {
                    let vcpu = self.vcpu.arch.describe(&self.vcpu.fd);
                    tracing::error!(id = self.vcpu.id, vcpu, "triple fault");
                    return Some(Ending::TripleFault);
                }
                Ok(VcpuExit::InternalError) => match internal_error(&mut self.vcpu) {
                    Some(ending) => return Some(ending),
                    None => None,
                },
                Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
                Ok(exit) => {
                    return Some(Ending::Failed(format!("vCPU {}: KVM stopped the guest: {exit:?}", self.vcpu.id)));
                }
                Err(error) => match error.errno() {
                    libc::EINTR if self.immediate_exit.is_set() => return None,
                    libc::EINTR | libc::EAGAIN => None,
                    _ => {
                        return Some(Ending::Failed(format!(
                            "vCPU {}: KVM cannot run the guest: {error}",
                            self.vcpu.id
                        )));
                    }
                },
            };
            match request {
                None => {}
                Some(Request::PowerOff) => return Some(Ending::PowerOff),
                Some(Request::Reset) => return Some(Ending::Reset),
            }
        }
    }
}

/// The end of a guest that KVM cannot run on for a reason of its own (`KVM_EXIT_INTERNAL_ERROR`); None where it can.
fn internal_error(vcpu: &mut Vcpu) -> Option<Ending> {
    // SAFETY: all members of the union are numbers, for which any bits are valid. After this exit it is this one that KVM has filled in.
    let error = unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.internal };
    let Vcpu { id, fd, arch } = vcpu;
    let what = match error.suberror {
        KVM_INTERNAL_ERROR_DELIVERY_EV if arch.is_delivering_nothing(fd) => return None,
        KVM_INTERNAL_ERROR_DELIVERY_EV => "it touches a device in the delivery of an event",
        KVM_INTERNAL_ERROR_EMULATION => "an instruction cannot be emulated",
        KVM_INTERNAL_ERROR_SIMUL_EX => "two exceptions came at once",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the processor left it for a reason that KVM does not know",
        _ => "an internal error",
    };
    let (suberror, vcpu) = (error.suberror, arch.describe(fd));
    // They mean something to those who know KVM.
    let data = error.data.get(..error.ndata as usize).unwrap_or(&error.data);
    Some(Ending::Failed(format!(
        "vCPU {id}: KVM cannot run the guest on: {what} (suberror {suberror}, data {data:x?}); {vcpu}"
    )))
}
