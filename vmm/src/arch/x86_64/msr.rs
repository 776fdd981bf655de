//! Model-specific registers: which of them travel, in which order they are written back, and what to do with one that the next
//! kernel does not know.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::super::ArchError;
use super::cpuid::Vendor;

/// The TSC itself travels as an offset: written as a value it would stand still during the update, and KVM would take near
/// equal writes on several vCPUs for an attempt to synchronize them.
const IA32_TSC: u32 = 0x10;
/// Written last, behind the TSC offset and the LAPIC: a deadline in the past fires at once, and one that is set before its timer
/// is in deadline mode is lost.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The features that a guest turned on in its processor; others depend on it.
const IA32_MISC_ENABLE: u32 = 0x1a0;

/// The MSRs that can be read from a vCPU with its CPUID set.
#[derive(Clone, Debug, Default)]
pub struct MsrList(Vec<u32>);

impl MsrList {
    /// Asks KVM which MSRs it saves, and finds out which of them this vCPU has.
    pub fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, ArchError> {
        let list = kvm.get_msr_index_list().map_err(ArchError::kvm("list the MSRs"))?;
        let mut indices: Vec<u32> = list.as_slice().iter().copied().filter(|&index| index != IA32_TSC).collect();
        loop {
            let mut msrs = entries(indices.iter().map(|&index| (index, 0)))?;
            let read = vcpu.get_msrs(&mut msrs).map_err(ArchError::kvm("read the MSRs"))?;
            if read == indices.len() {
                return Ok(Self(indices));
            }
            // KVM stops at the first that it cannot read.
            indices.remove(read);
        }
    }

    /// Reads them all.
    pub fn save(&self, vcpu: &VcpuFd) -> Result<Vec<(u32, u64)>, ArchError> {
        let mut msrs = entries(self.0.iter().map(|&index| (index, 0)))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(ArchError::kvm("read the MSRs"))?;
        match self.0.get(read) {
            None => Ok(msrs.as_slice().iter().map(|entry| (entry.index, entry.data)).collect()),
            Some(index) => Err(ArchError::Unfit(format!("MSR {index:#x} could be read before and now cannot"))),
        }
    }
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, ArchError> {
    let entries: Vec<_> = msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries)
        .map_err(|_| ArchError::Unfit(format!("{} MSRs are more than KVM takes", entries.len())))
}

/// Writes the MSRs back. One that this kernel refuses is skipped where it already has the value, as it then was at its reset
/// value or is a read-only constant; any other refusal is an error that names the MSR.
pub fn restore(vcpu: &VcpuFd, saved: &[(u32, u64)]) -> Result<(), ArchError> {
    let rank = |index: u32| match index {
        IA32_MISC_ENABLE => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    };
    let mut ordered: Vec<_> = saved.iter().copied().filter(|&(index, _)| index != IA32_TSC).collect();
    ordered.sort_by_key(|&(index, _)| rank(index));
    let mut rest = ordered.as_slice();
    while let Some(&(first, _)) = rest.first() {
        let msrs = entries(rest.iter().copied())?;
        let written = vcpu.set_msrs(&msrs).map_err(ArchError::kvm(&format!("write the MSRs from {first:#x} on")))?;
        let Some(&(refused, value)) = rest.get(written) else { break };
        let mut current = entries([(refused, 0)].into_iter())?;
        let known = vcpu.get_msrs(&mut current).map_err(ArchError::kvm(&format!("read MSR {refused:#x}")))? == 1;
        let held = known.then(|| current.as_slice()[0].data);
        match held {
            Some(held) if held == value => {}
            None if value == 0 => {}
            Some(held) => {
                return Err(ArchError::Unfit(format!(
                    "KVM refuses the value {value:#x} for MSR {refused:#x}, which holds {held:#x}"
                )));
            }
            None => {
                return Err(ArchError::Unfit(format!(
                    "MSR {refused:#x} with the value {value:#x} is unknown to this KVM"
                )));
            }
        }
        rest = &rest[written + 1..];
    }
    Ok(())
}

/// What of an MSR's value a processor of that vendor has. AMD's know SYSENTER in 32-bit code only and have half of its stack and
/// entry point. Linux writes whole addresses all the same; emulated processors may keep them, but KVM puts back what is real.
pub fn seen(index: u32, value: u64, vendor: Vendor) -> u64 {
    const IA32_SYSENTER_ESP: u32 = 0x175;
    const IA32_SYSENTER_EIP: u32 = 0x176;
    match (vendor, index) {
        (Vendor::Amd, IA32_SYSENTER_ESP | IA32_SYSENTER_EIP) => value & u64::from(u32::MAX),
        _ => value,
    }
}

/// Whether an MSR may differ between two reads of a vCPU that does not run: it counts time, or tells what the kernel takes
/// the TSC's frequency for, which each kernel estimates anew (the document's own figure is compared with a tolerance).
pub fn is_volatile(index: u32) -> bool {
    const IA32_MPERF: u32 = 0xe7;
    const IA32_APERF: u32 = 0xe8;
    const HYPERV_VP_RUNTIME: u32 = 0x4000_0010;
    const HYPERV_TIME_REF_COUNT: u32 = 0x4000_0020;
    const HYPERV_TSC_FREQUENCY: u32 = 0x4000_0022;
    matches!(
        index,
        IA32_TSC
            | IA32_TSC_DEADLINE
            | IA32_MPERF
            | IA32_APERF
            | HYPERV_VP_RUNTIME
            | HYPERV_TIME_REF_COUNT
            | HYPERV_TSC_FREQUENCY
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_half_of_sysenters_addresses_counts_and_only_on_amd() {
        const ADDRESS: u64 = 0xffff_fe37_0dbd_b000;
        for index in [0x175, 0x176] {
            assert_eq!(seen(index, ADDRESS, Vendor::Amd), 0x0dbd_b000);
            assert_eq!(seen(index, ADDRESS, Vendor::Other), ADDRESS);
        }
        assert_eq!(seen(0x174, ADDRESS, Vendor::Amd), ADDRESS);
    }
}
