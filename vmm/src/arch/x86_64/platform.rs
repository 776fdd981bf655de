//! What the vCPUs of a VM share: PICs, IOAPIC and PIT in the kernel, kvmclock, and where the devices are.

use std::sync::{Arc, Mutex};

use kho_abi::document::platform::PlatformState;
use kho_abi::document::platform::x86_64::PlatformV1;
use kho_abi::document::vcpu::VcpuState;
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME,
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data,
    kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use rustix::time::ClockId;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::super::{ArchError, payload_struct};
use super::{boot, counter, ioctl, power};
use crate::bus::Bus;
use crate::clock;
use crate::config::VmConfig;
use crate::config::device::DEVICES_MAX;
use crate::device::serial;
use crate::device::virtio::mmio;
use crate::machine::MachineError;
use crate::vcpu::Vcpu;

/// The pages that KVM needs on Intel to run real-mode code, in the hole below 4 GiB.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// Ports of the first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const SERIAL_INTERRUPT: u32 = 4;
/// Ports of the power and reset registers.
pub const POWER_PORT: u16 = 0x600;
/// Ports of the keyboard controller.
const KEYBOARD_PORT: u16 = 0x60;

/// Registers of the first virtio device, below the IOAPIC's; those of the others follow.
pub const VIRTIO: u64 = 0xfeb0_0000;
/// Interrupts of the virtio devices, by slot: pins of the IOAPIC that nothing else has.
pub const VIRTIO_INTERRUPTS: [u32; DEVICES_MAX] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22];

/// The shared part of a VM.
pub struct Platform;

impl Platform {
    /// Makes the interrupt controllers and timers of a VM. Must come before its vCPUs.
    pub fn new(kvm: &Kvm, vm: &VmFd, _cpus: u32) -> Result<Self, ArchError> {
        let required = [
            (Cap::Irqchip, "an interrupt controller in the kernel"),
            (Cap::Pit2, "a PIT"),
            (Cap::AdjustClock, "kvmclock"),
        ];
        for (capability, name) in required {
            if !kvm.check_extension(capability) {
                return Err(ArchError::Missing(name.to_owned()));
            }
        }
        // Exceptions and triple faults that are pending, but not yet injected, then show in the vCPU's events.
        for capability in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
            if vm.check_extension_raw(capability.into()) > 0 {
                let enable = kvm_enable_cap { cap: capability, args: [1, 0, 0, 0], ..Default::default() };
                vm.enable_cap(&enable).map_err(ArchError::kvm(&format!("enable capability {capability}")))?;
            }
        }
        // KVM's own default is the estimate that the kernel had made when KVM was initialized. Where the refined one differs from it
        // by more than KVM's tolerance, and the processor cannot scale the TSC, a vCPU's timers would never fire. Tried without a
        // look at KVM_CAP_VM_TSC_CONTROL: that says whether the TSC can be scaled, and kernels since 5.16 do this anyway.
        if let Err(error) = ioctl::use_host_tsc_frequency(vm) {
            tracing::warn!(%error, "KVM keeps its first estimate of the TSC's frequency; the guest's timers may suffer");
        }
        vm.set_identity_map_address(IDENTITY_MAP).map_err(ArchError::kvm("place the identity map"))?;
        vm.set_tss_address(TSS).map_err(ArchError::kvm("place the TSS"))?;
        vm.create_irq_chip().map_err(ArchError::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(ArchError::kvm("create the PIT"))?;
        Ok(Self)
    }

    /// Does what has to wait until all vCPUs are there: a new guest's have one TSC, to the cycle. KVM sees to that only for those
    /// that are made within a second of each other.
    pub fn complete(&mut self, vcpus: &[Vcpu], states: Option<&[VcpuState]>) -> Result<(), ArchError> {
        let (None, Some((first, others))) = (states, vcpus.split_first()) else { return Ok(()) };
        let Some(offset) = ioctl::tsc_offset(&first.fd) else { return Ok(()) };
        for vcpu in others {
            if ioctl::tsc_offset(&vcpu.fd) != Some(offset) {
                ioctl::set_tsc_offset(&vcpu.fd, offset).map_err(ArchError::kvm("set the TSC's offset"))?;
            }
        }
        Ok(())
    }

    /// Loads a kernel and points the first vCPU at it. The others wait for the guest to start them, by INIT and SIPI.
    pub fn boot(&self, memory: &GuestMemoryMmap, config: &VmConfig, vcpus: &[Vcpu]) -> Result<(), MachineError> {
        let Some(first) = vcpus.first() else { return Ok(()) };
        let entry = boot::load(memory, config)?;
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

    /// Connects the interrupt of the virtio device of a slot.
    pub fn connect_virtio(&self, vm: &VmFd, interrupt: &EventFd, slot: usize) -> Result<(), ArchError> {
        let pin = VIRTIO_INTERRUPTS.get(slot).ok_or_else(|| ArchError::Unfit(format!("there is no slot {slot}")))?;
        vm.register_irqfd(interrupt, *pin).map_err(ArchError::kvm("connect a virtio device's interrupt"))
    }

    /// Puts the devices where the guest expects them.
    pub fn place_devices(&self, ports: &mut Bus, _memory: &mut Bus, serial: Arc<Mutex<serial::Serial>>) {
        ports.insert(SERIAL_PORT.into(), serial::SIZE, serial);
        ports.insert(POWER_PORT.into(), power::SIZE, Arc::new(Mutex::new(power::Power)));
        ports.insert(KEYBOARD_PORT.into(), power::KEYBOARD_SIZE, Arc::new(Mutex::new(power::KeyboardController)));
    }

    /// Takes the state. The vCPUs must stand still.
    pub fn save(&self, vm: &VmFd) -> Result<PlatformState, ArchError> {
        let irqchip = |chip_id: u32| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(ArchError::kvm("read an interrupt controller"))?;
            Ok::<_, ArchError>(chip.as_bytes().to_vec())
        };
        let (clock_ns, at) = read_clock(vm)?;
        Ok(PlatformState::X86_64(PlatformV1 {
            pic_master: irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: irqchip(KVM_IRQCHIP_IOAPIC)?,
            pit2: vm.get_pit2().map_err(ArchError::kvm("read the PIT"))?.as_bytes().to_vec(),
            clock_ns,
            counter: at,
        }))
    }

    /// Puts back what must be there before the vCPUs' state, which is all of it. kvmclock goes on from where it was by as much as
    /// the TSC has counted since, so that the two agree after the pause as they did before. `frequency` is the TSC's in Hz as the
    /// previous kernel knew it: this one is too young to have measured it well.
    pub fn restore_before_vcpus(&mut self, vm: &VmFd, state: &PlatformState, frequency: u64) -> Result<(), ArchError> {
        let PlatformState::X86_64(state) = state else { return Err(ArchError::foreign(state.architecture())) };
        let PlatformV1 { pic_master, pic_slave, ioapic, pit2, clock_ns, counter: at } = state;
        for (chip_id, payload) in
            [(KVM_IRQCHIP_PIC_MASTER, pic_master), (KVM_IRQCHIP_PIC_SLAVE, pic_slave), (KVM_IRQCHIP_IOAPIC, ioapic)]
        {
            let chip: kvm_irqchip = payload_struct("an interrupt controller", payload)?;
            if chip.chip_id != chip_id {
                return Err(ArchError::Unfit(format!("interrupt controller {} where {chip_id} belongs", chip.chip_id)));
            }
            vm.set_irqchip(&chip).map_err(ArchError::kvm("write an interrupt controller"))?;
        }
        let pit: kvm_pit_state2 = payload_struct("the PIT", pit2)?;
        vm.set_pit2(&pit).map_err(ArchError::kvm("write the PIT"))?;
        set_clock(vm, *clock_ns, *at, frequency)
    }

    /// Puts back what needs the vCPUs' state: nothing.
    pub fn restore_after_vcpus(&self, _state: &PlatformState) -> Result<(), ArchError> {
        Ok(())
    }
}

/// Makes kvmclock what it is by now when it was `clock_ns` at the TSC `at` of `frequency` Hz.
fn set_clock(vm: &VmFd, clock_ns: u64, at: u64, frequency: u64) -> Result<(), ArchError> {
    const TRIES: usize = 3;
    const PRECISION_NS: u64 = 1_000_000;
    let expected = |now: u64| {
        let elapsed = now.checked_sub(at).ok_or_else(|| {
            ArchError::Unfit("the TSC is behind what it was: it did not run on through the kexec".to_owned())
        })?;
        let elapsed_ns = u128::from(elapsed) * 1_000_000_000 / u128::from(frequency.max(1));
        Ok::<u64, ArchError>(clock_ns.saturating_add(elapsed_ns as u64))
    };
    let mut off = 0;
    for _ in 0..TRIES {
        // The kernel adds what CLOCK_REALTIME has moved on since `realtime`, so that it does not matter when it gets to it. Were
        // somebody to set that clock just then, it would add that as well: so the result is looked at.
        let (now, realtime) = clock::read(ClockId::Realtime);
        let clock = kvm_clock_data { clock: expected(now)?, realtime, flags: KVM_CLOCK_REALTIME, ..Default::default() };
        vm.set_clock(&clock).map_err(ArchError::kvm("set kvmclock"))?;
        let (found, now) = read_clock(vm)?;
        off = found.abs_diff(expected(now)?);
        if off <= PRECISION_NS {
            return Ok(());
        }
    }
    tracing::warn!(off, "kvmclock is off by so many nanoseconds, even after {TRIES} tries");
    Ok(())
}

/// kvmclock in ns, and the raw TSC at that moment.
fn read_clock(vm: &VmFd) -> Result<(u64, u64), ArchError> {
    // Where the host's clock is not the TSC, or the kernel older than 5.16, KVM does not say at which TSC it has read its clock.
    // Then it was between two readings of ours; of several tries the one that was interrupted least is the best.
    const TRIES: usize = 5;
    let mut best = (u64::MAX, (0, 0));
    for _ in 0..TRIES {
        let before = counter();
        let clock = vm.get_clock().map_err(ArchError::kvm("read kvmclock"))?;
        if clock.flags & KVM_CLOCK_HOST_TSC != 0 {
            return Ok((clock.clock, clock.host_tsc));
        }
        let width = counter().wrapping_sub(before);
        if width < best.0 {
            best = (width, (clock.clock, before.wrapping_add(width / 2)));
        }
    }
    Ok(best.1)
}
