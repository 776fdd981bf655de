//! The whole state of a vCPU: made with the features that the guest knows, taken, and put back in an order that is safe.

use kho_abi::document::aarch64::VcpuV1;
use kvm_bindings::{
    KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, KVM_ARM_VCPU_PMU_V3_IRQ,
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA, KVM_ARM_VCPU_SVE, KVM_ARM_VCPU_TIMER_CTRL,
    KVM_ARM_VCPU_TIMER_IRQ_PTIMER, KVM_ARM_VCPU_TIMER_IRQ_VTIMER, KVM_CAP_ARM_PMU_V3, KVM_CAP_ARM_PSCI_0_2,
    KVM_CAP_ARM_PTRAUTH_ADDRESS, KVM_CAP_ARM_PTRAUTH_GENERIC, KVM_CAP_ARM_SVE, kvm_mp_state, kvm_vcpu_init,
};
use kvm_ioctls::{VcpuFd, VmFd};
use zerocopy::IntoBytes;

use super::super::{ArchError, payload_struct};
use super::ioctl::{self, Attribute, Attributes};
use super::registers::{self, Register, RegisterList};

/// The interrupt of the performance monitor: a private one, the usual of Arm's machines.
pub const PMU_INTERRUPT: u32 = 23;

const VIRTUAL_TIMER: (u32, u32) = (KVM_ARM_VCPU_TIMER_CTRL, KVM_ARM_VCPU_TIMER_IRQ_VTIMER);
const PHYSICAL_TIMER: (u32, u32) = (KVM_ARM_VCPU_TIMER_CTRL, KVM_ARM_VCPU_TIMER_IRQ_PTIMER);
const PMU: (u32, u32) = (KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_IRQ);
const STOLEN_TIME: (u32, u32) = (KVM_ARM_VCPU_PVTIME_CTRL, KVM_ARM_VCPU_PVTIME_IPA);
/// What KVM says where no address was set.
const NO_STOLEN_TIME: u64 = u64::MAX;

/// What a vCPU can be made with: a bit in `struct kvm_vcpu_init`, the capability that says that the host offers it, and its name.
/// Pointer authentication has two bits, of which KVM takes both or none.
const FEATURES: [(u32, u32, &str); 5] = [
    (1 << KVM_ARM_VCPU_PSCI_0_2, KVM_CAP_ARM_PSCI_0_2, "PSCI 0.2 or newer"),
    (1 << KVM_ARM_VCPU_PMU_V3, KVM_CAP_ARM_PMU_V3, "a performance monitor (PMUv3)"),
    (1 << KVM_ARM_VCPU_SVE, KVM_CAP_ARM_SVE, "scalable vectors (SVE)"),
    (1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_CAP_ARM_PTRAUTH_ADDRESS, "pointer authentication of addresses"),
    (1 << KVM_ARM_VCPU_PTRAUTH_GENERIC, KVM_CAP_ARM_PTRAUTH_GENERIC, "pointer authentication of data"),
];

/// The vCPU waits until another one turns it on.
const POWER_OFF: u32 = 1 << KVM_ARM_VCPU_POWER_OFF;
const SVE: u32 = 1 << KVM_ARM_VCPU_SVE;
const PMU_V3: u32 = 1 << KVM_ARM_VCPU_PMU_V3;

/// What this host offers of [`FEATURES`].
fn offered(vm: &VmFd) -> u32 {
    let offers = |capability: u32| vm.check_extension_raw(capability.into()) > 0;
    FEATURES.into_iter().filter(|(_, capability, _)| offers(*capability)).fold(0, |all, (bit, ..)| all | bit)
}

/// Refuses what the guest has and this host does not offer, by name.
fn check_features(wanted: u32, offered: u32) -> Result<(), ArchError> {
    let missing = wanted & !offered & !POWER_OFF;
    if missing == 0 {
        return Ok(());
    }
    let known = FEATURES.into_iter().filter(|(bit, ..)| missing & bit != 0);
    let mut names: Vec<_> = known.clone().map(|(.., name)| name.to_owned()).collect();
    let unknown = known.fold(missing, |missing, (bit, ..)| missing & !bit);
    if unknown != 0 {
        names.push(format!("vCPU features {unknown:#x}"));
    }
    Err(ArchError::Missing(names.join(", ")))
}

/// What has to be known of a vCPU, besides its fd, to take its state. Found out when the vCPU is made, and not in the pause.
#[derive(Debug)]
pub struct Processor {
    id: u32,
    features: u32,
    registers: RegisterList,
}

impl Processor {
    /// Makes a processor of a new vCPU: this host's, or in a restored VM the one that the guest knows. All but the first wait to
    /// be turned on.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd, id: u32, state: Option<&VcpuV1>) -> Result<Self, ArchError> {
        let offered = offered(vm);
        let features = match state {
            Some(state) => state.features,
            None => offered | if id == 0 { 0 } else { POWER_OFF },
        };
        check_features(features, offered)?;
        let mut init = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut init).map_err(ArchError::kvm("ask for the host's processor"))?;
        init.features[0] = features;
        vcpu.vcpu_init(&init).map_err(ArchError::kvm("initialize a vCPU"))?;
        if features & SVE != 0 {
            // The lengths decide how large the registers are, so they cannot be changed once SVE is finalized, and no register of
            // SVE can be accessed before.
            let lengths = state.and_then(|state| find(&state.registers, registers::SVE_VECTOR_LENGTHS));
            if let Some(lengths) = lengths {
                vcpu.set_one_reg(registers::SVE_VECTOR_LENGTHS, lengths).map_err(|_| {
                    ArchError::Missing("the lengths of scalable vectors that the guest knows".to_owned())
                })?;
            }
            vcpu.vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32)).map_err(ArchError::kvm("finalize SVE"))?;
        }
        let registers = RegisterList::of(vcpu)?;
        if let Some(state) = state {
            registers.restore_identity(vcpu, &state.registers)?;
        }
        Ok(Self { id, features, registers })
    }

    /// Gives the vCPU what needs the interrupt controller, which must have been started. Must come before the vCPU runs.
    pub fn connect(&self, vcpu: &VcpuFd, state: Option<&VcpuV1>) -> Result<(), ArchError> {
        if self.has_pmu() {
            let interrupt = state.and_then(|state| state.pmu_interrupt).unwrap_or(PMU_INTERRUPT);
            set(vcpu, PMU, &interrupt, "connect the performance monitor's interrupt")?;
            vcpu.request(Attribute::new(KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT))
                .map_err(ArchError::kvm("start the performance monitor"))?;
        }
        let Some(VcpuV1 { virtual_timer_interrupt, physical_timer_interrupt, stolen_time, .. }) = state else {
            return Ok(());
        };
        for (timer, wanted) in [(VIRTUAL_TIMER, virtual_timer_interrupt), (PHYSICAL_TIMER, physical_timer_interrupt)] {
            // All vCPUs share them, so the first has changed them for the others, too.
            if interrupt(vcpu, timer)? != *wanted {
                set(vcpu, timer, wanted, &format!("connect a timer to interrupt {wanted}"))?;
            }
        }
        match stolen_time {
            Some(_) if !vcpu.has_attribute(attribute(STOLEN_TIME)) => {
                Err(ArchError::Missing("a record of stolen time, which the guest uses".to_owned()))
            }
            Some(address) => set(vcpu, STOLEN_TIME, address, "say where stolen time is told"),
            None => Ok(()),
        }
    }

    /// Whether it has a performance monitor.
    pub fn has_pmu(&self) -> bool {
        self.features & PMU_V3 != 0
    }

    /// Its MPIDR, by which the GIC and the device tree know it.
    pub fn mpidr(&self, vcpu: &VcpuFd) -> Result<u64, ArchError> {
        registers::read_u64(vcpu, registers::MPIDR_EL1)
    }

    /// Takes the state. The vCPU must stand still, with no access to a device half done.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<VcpuV1, ArchError> {
        Ok(VcpuV1 {
            id: self.id,
            features: self.features,
            registers: self.registers.save(vcpu)?,
            mp_state: vcpu.get_mp_state().map_err(ArchError::kvm("read the MP state"))?.as_bytes().to_vec(),
            events: ioctl::events(vcpu).map_err(ArchError::kvm("read the pending events"))?.as_bytes().to_vec(),
            virtual_timer_interrupt: interrupt(vcpu, VIRTUAL_TIMER)?,
            physical_timer_interrupt: interrupt(vcpu, PHYSICAL_TIMER)?,
            pmu_interrupt: if self.has_pmu() { Some(interrupt(vcpu, PMU)?) } else { None },
            stolen_time: stolen_time(vcpu)?,
        })
    }

    /// Puts the state back. The counters' offset must have been set before, the interrupt controller must not yet have been put
    /// back: it finds vCPUs by a register of theirs.
    pub fn restore(&self, vcpu: &VcpuFd, state: &VcpuV1) -> Result<(), ArchError> {
        // The features, and what says what the processor can do, were given to the vCPU when it was made; what hangs on the
        // interrupt controller, when it was connected.
        let VcpuV1 {
            id,
            features: _,
            registers,
            mp_state,
            events,
            virtual_timer_interrupt: _,
            physical_timer_interrupt: _,
            pmu_interrupt: _,
            stolen_time: _,
        } = state;
        if *id != self.id {
            return Err(ArchError::Unfit(format!("vCPU {id} where {} belongs", self.id)));
        }
        let mp_state: kvm_mp_state = payload_struct("the MP state", mp_state)?;
        let events = payload_struct("the pending events", events)?;
        self.registers.check(registers)?;

        self.registers.restore(vcpu, registers)?;
        // Behind the registers: an SError that is pending is kept in one of them.
        ioctl::set_events(vcpu, &events).map_err(ArchError::kvm("write the pending events"))?;
        vcpu.set_mp_state(mp_state).map_err(ArchError::kvm("write the MP state"))?;
        if cfg!(debug_assertions) { self.check(vcpu, state) } else { Ok(()) }
    }

    /// Reads the state back and compares it with what was written.
    fn check(&self, vcpu: &VcpuFd, wanted: &VcpuV1) -> Result<(), ArchError> {
        let found = self.save(vcpu)?;
        let mut differences = registers::differences(&wanted.registers, &found.registers);
        let mut compare = |what: &str, same: bool| {
            if !same {
                differences.push(what.to_owned());
            }
        };
        compare("the MP state", wanted.mp_state == found.mp_state);
        compare("the pending events", wanted.events == found.events);
        compare("the virtual timer's interrupt", wanted.virtual_timer_interrupt == found.virtual_timer_interrupt);
        compare("the physical timer's interrupt", wanted.physical_timer_interrupt == found.physical_timer_interrupt);
        compare("the performance monitor's interrupt", wanted.pmu_interrupt == found.pmu_interrupt);
        compare("the address of stolen time", wanted.stolen_time == found.stolen_time);
        if differences.is_empty() {
            return Ok(());
        }
        Err(ArchError::Unfit(format!("vCPU {}, read back: {}", self.id, differences.join("; "))))
    }
}

fn find(registers: &[Register], number: u64) -> Option<&[u8]> {
    registers.iter().find(|(found, _)| *found == number).map(|(_, value)| value.as_slice())
}

fn attribute((group, number): (u32, u32)) -> Attribute {
    Attribute::new(group, number)
}

fn set<T: IntoBytes + zerocopy::Immutable>(
    vcpu: &VcpuFd,
    which: (u32, u32),
    value: &T,
    operation: &str,
) -> Result<(), ArchError> {
    vcpu.set_attribute(attribute(which), value).map_err(ArchError::kvm(operation))
}

/// The number of an interrupt that is an attribute.
fn interrupt(vcpu: &VcpuFd, which: (u32, u32)) -> Result<u32, ArchError> {
    vcpu.attribute(attribute(which)).map_err(ArchError::kvm("read the number of a vCPU's interrupt"))
}

fn stolen_time(vcpu: &VcpuFd) -> Result<Option<u64>, ArchError> {
    if !vcpu.has_attribute(attribute(STOLEN_TIME)) {
        return Ok(None);
    }
    let address = vcpu.attribute(attribute(STOLEN_TIME)).map_err(ArchError::kvm("read where stolen time is told"))?;
    Ok((address != NO_STOLEN_TIME).then_some(address))
}
