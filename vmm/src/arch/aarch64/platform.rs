//! What the vCPUs of a VM share: the interrupt controller, the counters' offset, the real-time clock, and where the devices are.

use std::sync::{Arc, Mutex, PoisonError};

use kho_abi::document::platform::PlatformState;
use kho_abi::document::platform::aarch64::PlatformV1;
use kho_abi::document::vcpu::VcpuState;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::super::ArchError;
use super::boot::{self, Machine};
use super::gic::Gic;
use super::rtc::{self, Rtc};
use super::{counter, counter_frequency};
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::device::serial::{self, Serial};
use crate::device::virtio::mmio;
use crate::machine::MachineError;
use crate::vcpu::Vcpu;

/// Registers of the serial port.
pub const SERIAL: u64 = 0x0900_0000;
/// Interrupt of the serial port, counted among those that the vCPUs share.
pub const SERIAL_INTERRUPT: u32 = 1;
/// Registers of the real-time clock.
pub const RTC: u64 = 0x0901_0000;
/// Interrupt of the real-time clock, counted like the serial port's.
pub const RTC_INTERRUPT: u32 = 2;

/// Registers of the first virtio device; those of the others follow.
pub const VIRTIO: u64 = 0x0a00_0000;
/// Interrupt of the first virtio device, counted like the serial port's; those of the others follow.
pub const VIRTIO_INTERRUPT: u32 = 16;

/// The shared part of a VM.
pub struct Platform {
    gic: Gic,
    mpidrs: Vec<u64>,
    counter_offset: u64,
    rtc: Arc<Mutex<Rtc>>,
}

impl Platform {
    /// Makes the interrupt controller of a VM. Must come before its vCPUs.
    pub fn new(_kvm: &Kvm, vm: &VmFd, cpus: u32) -> Result<Self, ArchError> {
        // A new guest's counters begin at zero; a restored one gets its own offset back.
        let counter_offset = counter();
        counter::set_offset(vm, counter_offset)?;
        Ok(Self { gic: Gic::new(vm, cpus)?, mpidrs: Vec::new(), counter_offset, rtc: Arc::default() })
    }

    /// Starts the interrupt controller, which has to wait until all vCPUs are there.
    pub fn complete(&mut self, vcpus: &[Vcpu], states: Option<&[VcpuState]>) -> Result<(), ArchError> {
        self.gic.init()?;
        for (index, vcpu) in vcpus.iter().enumerate() {
            let state = states.and_then(|states| states.get(index));
            vcpu.arch.connect(&vcpu.fd, state)?;
            self.mpidrs.push(vcpu.arch.mpidr(&vcpu.fd)?);
        }
        Ok(())
    }

    /// Loads a kernel and points the first vCPU at it. The others wait until the guest turns them on.
    pub fn boot(&self, memory: &GuestMemoryMmap, config: &VmConfig, vcpus: &[Vcpu]) -> Result<(), MachineError> {
        let Some(first) = vcpus.first() else { return Ok(()) };
        let machine =
            Machine { mpidrs: &self.mpidrs, has_its: self.gic.has_its(), pmu_interrupt: first.arch.pmu_interrupt() };
        let entry = boot::load(memory, config, &machine)?;
        first.arch.enter(&first.fd, &entry)?;
        Ok(())
    }

    /// Connects the serial port's interrupt.
    pub fn connect_serial(&self, vm: &VmFd, interrupt: &EventFd) -> Result<(), ArchError> {
        vm.register_irqfd(interrupt, SERIAL_INTERRUPT).map_err(ArchError::kvm("connect the serial port's interrupt"))
    }

    /// Where the guest finds the virtio device of a slot.
    pub fn virtio_address(slot: usize) -> u64 {
        VIRTIO + slot as u64 * mmio::SIZE
    }

    /// The interrupt of the virtio device of a slot.
    pub fn virtio_interrupt(slot: usize) -> u32 {
        VIRTIO_INTERRUPT + slot as u32
    }

    /// Connects the interrupt of the virtio device of a slot.
    pub fn connect_virtio(&self, vm: &VmFd, interrupt: &EventFd, slot: usize) -> Result<(), ArchError> {
        vm.register_irqfd(interrupt, Self::virtio_interrupt(slot))
            .map_err(ArchError::kvm("connect a virtio device's interrupt"))
    }

    /// Puts the devices where the guest expects them.
    pub fn place_devices(&self, _ports: &mut Bus, memory: &mut Bus, serial: Arc<Mutex<Serial>>) {
        memory.insert(SERIAL, serial::SIZE, serial);
        memory.insert(RTC, rtc::SIZE, self.rtc.clone());
    }

    /// Takes the state. The vCPUs must stand still; what the interrupt controller keeps in guest RAM is written there.
    pub fn save(&self, _vm: &VmFd) -> Result<PlatformState, ArchError> {
        Ok(PlatformState::Aarch64(PlatformV1 {
            counter_offset: self.counter_offset,
            counter: counter(),
            counter_frequency: counter_frequency(),
            gic: self.gic.save(&self.mpidrs)?,
            rtc: self.rtc.lock().unwrap_or_else(PoisonError::into_inner).save(),
        }))
    }

    /// Puts back what must be there before the vCPUs' state: the counters that their timers depend on.
    pub fn restore_before_vcpus(&mut self, vm: &VmFd, state: &PlatformState, _frequency: u64) -> Result<(), ArchError> {
        let PlatformV1 { counter_offset, counter: then, counter_frequency: frequency, gic: _, rtc: _ } = own(state)?;
        counter::check(*then, counter(), *frequency, counter_frequency())?;
        counter::set_offset(vm, *counter_offset)?;
        self.counter_offset = *counter_offset;
        Ok(())
    }

    /// Puts back what needs the vCPUs' state: the interrupt controller, which finds a vCPU by one of its registers.
    pub fn restore_after_vcpus(&self, state: &PlatformState) -> Result<(), ArchError> {
        let PlatformV1 { counter_offset: _, counter: _, counter_frequency: _, gic, rtc } = own(state)?;
        self.gic.restore(gic, &self.mpidrs)?;
        self.rtc.lock().unwrap_or_else(PoisonError::into_inner).restore(rtc);
        Ok(())
    }
}

fn own(state: &PlatformState) -> Result<&PlatformV1, ArchError> {
    match state {
        PlatformState::Aarch64(state) => Ok(state),
        other => Err(ArchError::foreign(other.architecture())),
    }
}
