//! A vCPU's registers: which of them travel, in which order they are written back, and what to do with one that the next kernel
//! does not know.

use kho_abi::document::aarch64::register_size;
use kvm_ioctls::VcpuFd;

use super::super::ArchError;
use super::ioctl;
use crate::registers::aarch64::class;
pub use crate::registers::aarch64::name;

/// A register as number and value.
pub type Register = (u64, Vec<u8>);

/// `KVM_REG_ARM64`, above the size.
const ARM64: u64 = 0x6 << 60;
const SIZE_U64: u64 = 3 << 52;
const SIZE_U512: u64 = 6 << 52;

/// KVM's number for a core register, which is the offset in `struct kvm_regs` counted in words.
pub const fn core(word: u64) -> u64 {
    ARM64 | SIZE_U64 | class::CORE << 16 | word
}

/// KVM's number for a system register.
pub const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    ARM64 | SIZE_U64 | class::SYSTEM << 16 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

/// The first general register, in which a kernel finds its device tree.
pub const X0: u64 = core(0);
/// The program counter.
pub const PC: u64 = core(0x40);
/// The processor's state: mode and interrupt masks.
pub const PSTATE: u64 = core(0x42);
/// Which vCPU this is. By it the GIC finds the vCPU.
pub const MPIDR_EL1: u64 = system(3, 0, 0, 0, 5);
/// Which lengths of vectors there are, written before SVE is finalized.
pub const SVE_VECTOR_LENGTHS: u64 = ARM64 | SIZE_U512 | class::SVE << 16 | 0xffff;

/// The counters. They travel as an offset that all vCPUs share: written as values they would stand still during the update, and
/// each by another amount. (KVM's numbers for the virtual counter and the virtual timer's compare value are exchanged.)
const COUNTERS: [u64; 4] =
    [system(3, 3, 14, 3, 2), system(3, 3, 14, 0, 1), system(3, 3, 14, 0, 5), system(3, 3, 14, 0, 6)];
const VIRTUAL_TIMER_CONTROL: u64 = system(3, 3, 14, 3, 1);
const PHYSICAL_TIMER_CONTROL: u64 = system(3, 3, 14, 2, 1);
/// In a timer's control register: it has fired. It follows from the counter.
const TIMER_STATUS: u64 = 1 << 2;

/// Whether a register says what the processor can do, and not what it is doing. All vCPUs agree in these, but for MPIDR.
fn is_identity(number: u64) -> bool {
    // CRn 0; of it, op1 2 is the selection of a cache.
    class::of(number) == class::SYSTEM && number >> 14 & 3 == 3 && number >> 7 & 0xf == 0 && number >> 11 & 7 != 2
}

/// When a register is written back, lower first.
fn rank(number: u64) -> u8 {
    match class::of(number) {
        // What the processor can do decides which other registers there are and which of their bits can be set. KVM checks it
        // against the host, so what the host lacks is found out first.
        _ if is_identity(number) => 0,
        // What the firmware offers, which the guest may have asked for already.
        class::FIRMWARE | class::FIRMWARE_BITMAP => 1,
        // A timer is turned on when all else of it is in place: it would else fire for a moment that is not its own.
        _ if matches!(number, VIRTUAL_TIMER_CONTROL | PHYSICAL_TIMER_CONTROL) => 3,
        // All else is only stored until the vCPU runs. The scalable registers are accessible, as SVE was finalized when the vCPU
        // was made; the breakpoints and the keys for pointer authentication come to life with the registers that turn them on,
        // none before KVM_RUN.
        _ => 2,
    }
}

/// The registers of a vCPU that travel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegisterList(Vec<u64>);

impl RegisterList {
    /// Asks KVM which registers it saves of this vCPU. It must have been initialized, and finalized where it has SVE.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, ArchError> {
        let mut numbers = ioctl::register_list(vcpu).map_err(ArchError::kvm("list the registers"))?;
        numbers.retain(|number| !COUNTERS.contains(number));
        if let Some(number) = numbers.iter().find(|number| register_size(**number).is_none()) {
            return Err(ArchError::Unfit(format!("KVM has a register {number:#x} of unknown size")));
        }
        Ok(Self(numbers))
    }

    /// Reads them all.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<Vec<Register>, ArchError> {
        self.0.iter().map(|&number| Ok((number, read(vcpu, number)?))).collect()
    }

    /// That this vCPU has all registers that were saved. One that it lacks may be missing where it was zero, and else is refused
    /// by name. One that only this vCPU has keeps its reset value.
    pub fn check(&self, saved: &[Register]) -> Result<(), ArchError> {
        let is_lost = |(number, value): &&Register| !self.0.contains(number) && value.iter().any(|&byte| byte != 0);
        let lost: Vec<_> = saved.iter().filter(is_lost).map(|(number, _)| name(*number)).collect();
        if lost.is_empty() {
            return Ok(());
        }
        Err(ArchError::Missing(format!("what the guest has in use: {}", lost.join(", "))))
    }

    /// Writes what the processor can do: this host's KVM may offer more than the guest knows, but not less. Must come before
    /// anything else is written, and may only come while no vCPU has run.
    pub fn restore_identity(&self, vcpu: &VcpuFd, saved: &[Register]) -> Result<(), ArchError> {
        self.check(saved)?;
        let mut refused = Vec::new();
        for (number, value) in saved.iter().filter(|(number, _)| is_identity(*number) && self.0.contains(number)) {
            if let Some(held) = write(vcpu, *number, value)? {
                refused.push(format!(
                    "{} {} (this host's is {})",
                    name(*number),
                    hexadecimal(value),
                    hexadecimal(&held)
                ));
            }
        }
        if refused.is_empty() {
            return Ok(());
        }
        Err(ArchError::Missing(format!("the processor that the guest knows: {}", refused.join(", "))))
    }

    /// Writes the others.
    pub fn restore(&self, vcpu: &VcpuFd, saved: &[Register]) -> Result<(), ArchError> {
        let mut ordered: Vec<_> = saved
            .iter()
            .filter(|(number, _)| self.0.contains(number) && !is_identity(*number) && *number != SVE_VECTOR_LENGTHS)
            .collect();
        ordered.sort_by_key(|(number, _)| rank(*number));
        for (number, value) in ordered {
            if let Some(held) = write(vcpu, *number, value)? {
                return Err(ArchError::Unfit(format!(
                    "KVM refuses {} for {}, which holds {}",
                    hexadecimal(value),
                    name(*number),
                    hexadecimal(&held)
                )));
            }
        }
        Ok(())
    }
}

/// Which of the registers are not what was written.
pub fn differences(wanted: &[Register], found: &[Register]) -> Vec<String> {
    let still = |(number, value): &Register| match (*number, <[u8; 8]>::try_from(value.as_slice())) {
        (VIRTUAL_TIMER_CONTROL | PHYSICAL_TIMER_CONTROL, Ok(value)) => {
            (u64::from_le_bytes(value) & !TIMER_STATUS).to_le_bytes().to_vec()
        }
        _ => value.clone(),
    };
    let value = |number: u64| found.iter().find(|(found, _)| *found == number);
    let differing = wanted.iter().filter_map(|wanted| {
        value(wanted.0)
            .map(|found| (wanted.0, still(wanted), still(found)))
            .filter(|(_, wanted, found)| wanted != found)
    });
    differing
        .map(|(number, wanted, found)| {
            format!("{}: {}, not {}", name(number), hexadecimal(&found), hexadecimal(&wanted))
        })
        .collect()
}

/// Reads one register.
pub fn read(vcpu: &VcpuFd, number: u64) -> Result<Vec<u8>, ArchError> {
    let Some(size) = register_size(number) else {
        return Err(ArchError::Unfit(format!("a register {number:#x} of unknown size")));
    };
    let mut value = vec![0; size];
    let read = vcpu.get_one_reg(number, &mut value);
    read.map_err(|error| ArchError::kvm(&format!("read {}", name(number)))(error))?;
    Ok(value)
}

/// Reads a register of 64 bits.
pub fn read_u64(vcpu: &VcpuFd, number: u64) -> Result<u64, ArchError> {
    let value = read(vcpu, number)?;
    let value = value.try_into().map_err(|_| ArchError::Unfit(format!("{} is not of 64 bits", name(number))))?;
    Ok(u64::from_le_bytes(value))
}

/// Writes a register of 64 bits.
pub fn write_u64(vcpu: &VcpuFd, number: u64, value: u64) -> Result<(), ArchError> {
    let written = vcpu.set_one_reg(number, &value.to_le_bytes());
    written.map(|_| ()).map_err(|error| ArchError::kvm(&format!("write {}", name(number)))(error))
}

/// Writes one register. Where KVM refuses the value, tells what the register holds instead; not where that is the value, as it
/// then is a constant.
fn write(vcpu: &VcpuFd, number: u64, value: &[u8]) -> Result<Option<Vec<u8>>, ArchError> {
    if register_size(number) != Some(value.len()) {
        return Err(ArchError::Unfit(format!("{} bytes for {}", value.len(), name(number))));
    }
    if vcpu.set_one_reg(number, value).is_ok() {
        return Ok(None);
    }
    let held = read(vcpu, number)?;
    Ok((held != value).then_some(held))
}

fn hexadecimal(value: &[u8]) -> String {
    let digits: String = value.iter().rev().map(|byte| format!("{byte:02x}")).collect();
    let digits = digits.trim_start_matches('0');
    format!("0x{}", if digits.is_empty() { "0" } else { digits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_comes_first_and_what_turns_timers_on_last() {
        const PSCI_VERSION: u64 = ARM64 | SIZE_U64 | class::FIRMWARE << 16;
        const ID_AA64PFR0_EL1: u64 = system(3, 0, 0, 4, 0);
        const CACHE_SELECTION: u64 = system(3, 2, 0, 0, 0);
        const COMPARE_VALUE: u64 = system(3, 3, 14, 2, 2);
        let mut order =
            [PHYSICAL_TIMER_CONTROL, COMPARE_VALUE, CACHE_SELECTION, core(0), PSCI_VERSION, ID_AA64PFR0_EL1];
        order.sort_by_key(|number| rank(*number));
        assert_eq!(
            order,
            [ID_AA64PFR0_EL1, PSCI_VERSION, COMPARE_VALUE, CACHE_SELECTION, core(0), PHYSICAL_TIMER_CONTROL]
        );
    }

    #[test]
    fn a_register_that_the_host_lacks_may_be_missing_where_it_was_zero_only() {
        let list = RegisterList(vec![core(0)]);
        assert!(list.check(&[(core(0), vec![1; 8]), (core(2), vec![0; 8])]).is_ok());
        let lost = list.check(&[(system(3, 0, 0, 4, 4), vec![1; 8]), (core(2), vec![9; 8])]).unwrap_err().to_string();
        assert!(lost.ends_with("in use: ID_AA64ZFR0_EL1, x1"), "{lost}");
    }

    #[test]
    fn a_timer_that_fires_meanwhile_is_no_difference_and_all_else_is() {
        let control = |value: u64| (VIRTUAL_TIMER_CONTROL, value.to_le_bytes().to_vec());
        assert!(differences(&[control(1)], &[control(5)]).is_empty());
        assert_eq!(differences(&[control(1)], &[control(4)]), ["CNTV_CTL_EL0: 0x0, not 0x1"]);
    }
}
