//! A vCPU as the rest of the program sees it: its state as one of any architecture's, and how it enters a kernel.

use kho_abi::document::aarch64::VcpuV1;
use kho_abi::document::vcpu::VcpuState;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::super::ArchError;
use super::boot::Entry;
use super::processor::{PMU_INTERRUPT, Processor};
use super::registers;

/// What has to be known of a vCPU, besides its fd, to take its state.
#[derive(Debug)]
pub struct VcpuArch(Processor);

impl VcpuArch {
    /// Makes a processor of a new vCPU: this host's, or in a restored VM the one that the guest knows. How many there are, the
    /// guest learns from the device tree.
    pub fn new(
        _kvm: &Kvm,
        vm: &VmFd,
        vcpu: &VcpuFd,
        (id, _cpus): (u32, u32),
        state: Option<&VcpuState>,
    ) -> Result<Self, ArchError> {
        let state = state.map(own).transpose()?;
        Ok(Self(Processor::new(vm, vcpu, id, state)?))
    }

    /// Gives the vCPU what needs the interrupt controller, which must have been started.
    pub fn connect(&self, vcpu: &VcpuFd, state: Option<&VcpuState>) -> Result<(), ArchError> {
        self.0.connect(vcpu, state.map(own).transpose()?)
    }

    /// Its MPIDR, by which the interrupt controller and the device tree know it.
    pub fn mpidr(&self, vcpu: &VcpuFd) -> Result<u64, ArchError> {
        self.0.mpidr(vcpu)
    }

    /// The private interrupt of its performance monitor, where it has one.
    pub fn pmu_interrupt(&self) -> Option<u32> {
        self.0.has_pmu().then_some(PMU_INTERRUPT)
    }

    /// Points the vCPU at a loaded kernel. What is not said here is as a reset leaves it.
    pub fn enter(&self, vcpu: &VcpuFd, entry: &Entry) -> Result<(), ArchError> {
        /// EL1 with a stack pointer of its own, all interrupts masked.
        const EL1H_MASKED: u64 = 0x3c5;
        let Entry { address, tree } = entry;
        registers::write_u64(vcpu, registers::PSTATE, EL1H_MASKED)?;
        registers::write_u64(vcpu, registers::X0, *tree)?;
        registers::write_u64(vcpu, registers::PC, *address)
    }

    /// Takes the state. The vCPU must stand still, with no access to a device of its own half done.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<VcpuState, ArchError> {
        Ok(VcpuState::Aarch64(Box::new(self.0.save(vcpu)?)))
    }

    /// Puts the state back. The counters' offset must have been set before, and the interrupt controller is put back behind.
    pub fn restore(&self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), ArchError> {
        self.0.restore(vcpu, own(state)?)
    }

    /// Nothing to announce: the guest's watchdogs go by a counter that ran on, and there is no word for a pause.
    pub fn announce_pause(&self, _vcpu: &VcpuFd) -> Result<(), ArchError> {
        Ok(())
    }

    /// Where the vCPU is and in which mode, for whoever has to find out why it got there.
    pub fn describe(&self, vcpu: &VcpuFd) -> String {
        let read = |number| registers::read_u64(vcpu, number);
        match (read(registers::PC), read(registers::PSTATE)) {
            (Ok(pc), Ok(pstate)) => format!("pc={pc:#x} pstate={pstate:#x}"),
            (Err(error), _) | (_, Err(error)) => format!("its registers cannot be read: {error}"),
        }
    }

    /// Whether there is no event that a processor which left the guest was about to deliver. KVM does not ask for that here.
    pub fn is_delivering_nothing(&self, _vcpu: &VcpuFd) -> bool {
        false
    }
}

fn own(state: &VcpuState) -> Result<&VcpuV1, ArchError> {
    match state {
        VcpuState::Aarch64(state) => Ok(state),
        other => Err(ArchError::foreign(other.architecture())),
    }
}
