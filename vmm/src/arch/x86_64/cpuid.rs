//! What the guest is told about its processor: what KVM supports on this host, made true for one vCPU, less what would not
//! survive a live update.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use zerocopy::{FromBytes, IntoBytes};

use super::super::ArchError;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HYPER_THREADING: u32 = 1 << 28;
const EXTENDED1_ECX_SVM: u32 = 1 << 2;

/// Which registers of which (leaf, index) are sets of features: what a document has there, this host must offer.
const FEATURES: [(u32, u32, &[Register]); 9] = [
    (0x1, 0, &[Register::Ecx, Register::Edx]),
    (0x7, 0, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (0x7, 1, &[Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]),
    (0x7, 2, &[Register::Edx]),
    (0xd, 0, &[Register::Eax, Register::Edx]),
    (0xd, 1, &[Register::Eax, Register::Ecx, Register::Edx]),
    (0x4000_0001, 0, &[Register::Eax]),
    (0x8000_0001, 0, &[Register::Ecx, Register::Edx]),
    (0x8000_0008, 0, &[Register::Ebx]),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

/// The CPUID of a new vCPU.
pub fn for_vcpu(kvm: &Kvm, id: u32) -> Result<CpuId, ArchError> {
    let mut cpuid = supported(kvm)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                // APIC id and logical processors, then nested virtualization: its state is not carried over.
                entry.ebx = (entry.ebx & 0xffff) | (1 << 16) | (id << 24);
                entry.ecx &= !LEAF1_ECX_VMX;
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                entry.edx &= !LEAF1_EDX_HYPER_THREADING;
            }
            // Cache topology: one logical processor shares each cache, one core in the package.
            0x4 => entry.eax &= 0x3fff,
            // Extended topology: KVM hands out the host's; this guest has one thread and no further level.
            0xb | 0x1f => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, u32::from(entry.index == 0), entry.index & 0xff, id);
                if entry.index == 0 {
                    entry.ecx |= 1 << 8;
                }
            }
            0x8000_0001 => entry.ecx &= !EXTENDED1_ECX_SVM,
            0x8000_0008 => entry.ecx = 0,
            // SVM's own leaf.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, 0, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

fn supported(kvm: &Kvm) -> Result<CpuId, ArchError> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ArchError::kvm("read the supported CPUID"))?;
    // KVM leaves the bit out, as it depends on the interrupt controller being in the kernel, which it is here.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// As a payload of the document.
pub fn encode(cpuid: &CpuId) -> Vec<u8> {
    cpuid.as_slice().as_bytes().to_vec()
}

/// From a payload of the document.
pub fn decode(payload: &[u8]) -> Result<CpuId, ArchError> {
    let size = size_of::<kvm_cpuid_entry2>();
    if !payload.len().is_multiple_of(size) || payload.len() / size > KVM_MAX_CPUID_ENTRIES {
        return Err(ArchError::Unfit(format!("a CPUID of {} bytes", payload.len())));
    }
    let entries: Vec<_> =
        payload.chunks_exact(size).filter_map(|chunk| kvm_cpuid_entry2::read_from_bytes(chunk).ok()).collect();
    CpuId::from_entries(&entries).map_err(|_| ArchError::Unfit(format!("{} CPUID entries", entries.len())))
}

/// Refuses a CPUID with features that this host does not have: the guest may use them at any moment.
pub fn check(kvm: &Kvm, wanted: &CpuId) -> Result<(), ArchError> {
    let offered = supported(kvm)?;
    let missing = missing_features(wanted.as_slice(), offered.as_slice());
    if missing.is_empty() {
        return Ok(());
    }
    Err(ArchError::Unfit(format!("the processor lacks features that the guest was given: {}", missing.join(", "))))
}

fn missing_features(wanted: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Vec<String> {
    // Set by us or by the state of the vCPU, and not by the host.
    const LEAF1_ECX_OWN: u32 = LEAF1_ECX_HYPERVISOR | (1 << 27);
    let find = |entries: &[kvm_cpuid_entry2], leaf, index| {
        entries.iter().find(|entry| entry.function == leaf && entry.index == index).copied().unwrap_or_default()
    };
    let mut missing = Vec::new();
    for (leaf, index, registers) in FEATURES {
        let (wanted, offered) = (find(wanted, leaf, index), find(offered, leaf, index));
        for &register in registers {
            let own = if (leaf, register) == (1, Register::Ecx) { LEAF1_ECX_OWN } else { 0 };
            let lost = register.of(&wanted) & !register.of(&offered) & !own;
            if lost != 0 {
                missing.push(format!("leaf {leaf:#x}.{index} {register:?} bits {lost:#x}"));
            }
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    #[test]
    fn lost_feature_is_named_and_a_gained_one_is_none() {
        assert_eq!(missing_features(&[entry(1, 0b0110)], &[entry(1, 0b0010)]), ["leaf 0x1.0 Ecx bits 0x4"]);
        assert!(missing_features(&[entry(1, 0b0010)], &[entry(1, 0b0110)]).is_empty());
        assert!(missing_features(&[entry(1, LEAF1_ECX_HYPERVISOR)], &[]).is_empty());
    }

    #[test]
    fn cpuid_payload_of_odd_length_is_refused() {
        let cpuid = CpuId::from_entries(&[entry(1, 2), entry(7, 3)]).unwrap();
        let payload = encode(&cpuid);
        assert_eq!(decode(&payload).unwrap().as_slice(), cpuid.as_slice());
        assert!(decode(&payload[1..]).is_err());
    }
}
