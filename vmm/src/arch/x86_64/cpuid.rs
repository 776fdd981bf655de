//! What the guest is told about its processor: what KVM supports on this host, made true for one vCPU, less what would not
//! survive a live update.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use zerocopy::{FromBytes, IntoBytes};

use super::super::ArchError;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HYPER_THREADING: u32 = 1 << 28;
const EXTENDED1_ECX_CMP_LEGACY: u32 = 1 << 1;
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

/// The CPUID of a new vCPU, one of `cpus`.
pub fn for_vcpu(kvm: &Kvm, id: u32, cpus: u32) -> Result<CpuId, ArchError> {
    let entries = tailor(supported(kvm)?.as_slice(), id, cpus);
    CpuId::from_entries(&entries).map_err(|_| ArchError::Unfit(format!("{} CPUID entries", entries.len())))
}

/// Makes what the host supports true for one vCPU: the guest has one package, in it `cpus` cores of one thread each, whose
/// APIC ids are their numbers and which share the cache of the last level.
fn tailor(supported: &[kvm_cpuid_entry2], id: u32, cpus: u32) -> Vec<kvm_cpuid_entry2> {
    // So many bits of an APIC id say which core it is, and so many ids the package has room for.
    let core_bits = cpus.max(1).next_power_of_two().trailing_zeros();
    let ids = 1 << core_bits;
    let several = cpus > 1;
    let mut tailored = Vec::new();
    for mut entry in supported.iter().copied() {
        match entry.function {
            0x1 => {
                // Nested virtualization is not offered: its state is not carried over.
                entry.ebx = (entry.ebx & 0xffff) | (ids << 16) | (id << 24);
                entry.ecx &= !LEAF1_ECX_VMX;
                entry.ecx |= LEAF1_ECX_HYPERVISOR;
                entry.edx = with_bit(entry.edx, LEAF1_EDX_HYPER_THREADING, several);
            }
            0x4 | 0x8000_001d => {
                const LAST_LEVEL: u32 = 3;
                let sharing = if entry.eax >> 5 & 7 == LAST_LEVEL { ids } else { 1 };
                entry.eax = (entry.eax & 0x3fff) | ((sharing - 1) << 14);
                // Where Intel has the number of cores, AMD has nothing.
                if entry.function == 0x4 {
                    entry.eax |= (ids - 1) << 26;
                }
            }
            // Extended topology: KVM hands out the host's, or none. One index for each level, and one that ends the list.
            0xb | 0x1f if entry.index != 0 => continue,
            0xb | 0x1f => {
                let (end, threads, cores) = (0, 1, 2);
                for (index, kind, shift, count) in [(0, threads, 0, 1), (1, cores, core_bits, cpus), (2, end, 0, 0)] {
                    tailored.push(kvm_cpuid_entry2 {
                        index,
                        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                        eax: shift,
                        ebx: count,
                        ecx: kind << 8 | index,
                        edx: id,
                        ..entry
                    });
                }
                continue;
            }
            0x8000_0001 => {
                entry.ecx = with_bit(entry.ecx & !EXTENDED1_ECX_SVM, EXTENDED1_ECX_CMP_LEGACY, several);
            }
            0x8000_0008 => entry.ecx = core_bits << 12 | (cpus.max(1) - 1),
            // SVM's own leaf.
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            // Another list of the levels, which says no more than 0xb, and less where a guest finds both.
            0x8000_0026 => continue,
            _ => {}
        }
        tailored.push(entry);
    }
    tailored
}

fn with_bit(register: u32, bit: u32, set: bool) -> u32 {
    if set { register | bit } else { register & !bit }
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

/// Whose processor the guest knows, as far as it makes a difference to what its state means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD, or Hygon, whose processors are AMD's.
    Amd,
    /// Any other.
    Other,
}

impl Vendor {
    /// The vendor in a CPUID.
    pub fn of(cpuid: &CpuId) -> Self {
        let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0);
        let name = leaf.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat());
        match name.as_deref() {
            Some(b"AuthenticAMD" | b"HygonGenuine") => Self::Amd,
            _ => Self::Other,
        }
    }
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
    // Set by us or by the state of the vCPU, and not by the host: so are what says that there are several vCPUs.
    const LEAF1_ECX_OWN: u32 = LEAF1_ECX_HYPERVISOR | (1 << 27);
    let find = |entries: &[kvm_cpuid_entry2], leaf, index| {
        entries.iter().find(|entry| entry.function == leaf && entry.index == index).copied().unwrap_or_default()
    };
    let mut missing = Vec::new();
    for (leaf, index, registers) in FEATURES {
        let (wanted, offered) = (find(wanted, leaf, index), find(offered, leaf, index));
        for &register in registers {
            let own = match (leaf, register) {
                (1, Register::Ecx) => LEAF1_ECX_OWN,
                (1, Register::Edx) => LEAF1_EDX_HYPER_THREADING,
                (0x8000_0001, Register::Ecx) => EXTENDED1_ECX_CMP_LEGACY,
                _ => 0,
            };
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
    fn what_says_that_there_are_several_vcpus_need_not_be_offered() {
        let wanted = kvm_cpuid_entry2 { function: 1, edx: LEAF1_EDX_HYPER_THREADING, ..Default::default() };
        assert!(missing_features(&[wanted], &[entry(1, 0)]).is_empty());
        assert!(missing_features(&[entry(0x8000_0001, EXTENDED1_ECX_CMP_LEGACY)], &[]).is_empty());
    }

    #[test]
    fn topology_is_one_package_of_as_many_cores_as_there_are_vcpus() {
        let level3 = kvm_cpuid_entry2 { function: 4, index: 3, eax: 0xfc03_c163, ..Default::default() };
        let level1 = kvm_cpuid_entry2 { function: 4, index: 0, eax: 0xfc03_c121, ..Default::default() };
        let host = [entry(1, 0), level1, level3, entry(0xb, 0), entry(0x8000_0001, 0), entry(0x8000_0008, 0)];
        let find = |entries: &[kvm_cpuid_entry2], function, index| {
            *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
        };
        let guest = tailor(&host, 5, 6);
        // Six cores need three bits, which have room for eight.
        let first = find(&guest, 1, 0);
        assert_eq!((first.ebx >> 24, first.ebx >> 16 & 0xff), (5, 8));
        assert_ne!(first.edx & LEAF1_EDX_HYPER_THREADING, 0);
        let [l1, l3] = [find(&guest, 4, 0).eax, find(&guest, 4, 3).eax];
        assert_eq!((l1 >> 26, l1 >> 14 & 0xfff, l3 >> 26, l3 >> 14 & 0xfff), (7, 0, 7, 7));
        let levels = [0, 1, 2].map(|index| find(&guest, 0xb, index));
        assert_eq!(levels.map(|level| (level.eax, level.ebx, level.ecx >> 8)), [(0, 1, 1), (3, 6, 2), (0, 0, 0)]);
        assert!(levels.iter().all(|level| level.edx == 5 && level.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
        assert_eq!(find(&guest, 0x8000_0008, 0).ecx, 3 << 12 | 5);

        let alone = tailor(&host, 0, 1);
        assert_eq!(find(&alone, 1, 0).edx & LEAF1_EDX_HYPER_THREADING, 0);
        assert_eq!(find(&alone, 0x8000_0001, 0).ecx & EXTENDED1_ECX_CMP_LEGACY, 0);
        assert_eq!(find(&alone, 0xb, 1).ebx, 1);
    }

    #[test]
    fn vendor_is_the_one_in_the_first_leaf() {
        let of = |name: &[u8; 12]| {
            let part = |at: usize| u32::from_le_bytes(std::array::from_fn(|index| name[at + index]));
            let first = kvm_cpuid_entry2 { ebx: part(0), edx: part(4), ecx: part(8), ..Default::default() };
            Vendor::of(&CpuId::from_entries(&[entry(1, 2), first]).unwrap())
        };
        assert_eq!(
            (of(b"AuthenticAMD"), of(b"HygonGenuine"), of(b"GenuineIntel")),
            (Vendor::Amd, Vendor::Amd, Vendor::Other)
        );
        assert_eq!(Vendor::of(&CpuId::from_entries(&[]).unwrap()), Vendor::Other);
    }

    #[test]
    fn cpuid_payload_of_odd_length_is_refused() {
        let cpuid = CpuId::from_entries(&[entry(1, 2), entry(7, 3)]).unwrap();
        let payload = encode(&cpuid);
        assert_eq!(decode(&payload).unwrap().as_slice(), cpuid.as_slice());
        assert!(decode(&payload[1..]).is_err());
    }
}
