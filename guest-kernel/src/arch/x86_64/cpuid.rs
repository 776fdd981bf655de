//! The CPU's description of itself: what it has, and that it stays the same.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use crate::console::damage;

const KVM_BASE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const CLOCKSOURCE2: u32 = 1 << 3;

fn leaf(leaf: u32, index: u32) -> CpuidResult {
    __cpuid_count(leaf, index)
}

/// The highest leaf of the group that begins at `base`, or None if there is no such group.
fn last_of(base: u32) -> Option<u32> {
    let last = leaf(base, 0).eax;
    (last >= base && last < base + 0x1000).then_some(last)
}

fn is_hypervisor() -> bool {
    leaf(1, 0).ecx & 1 << 31 != 0
}

pub fn has_kvm_clock() -> bool {
    let signature = leaf(KVM_BASE, 0);
    is_hypervisor()
        && [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).as_flattened() == b"KVMKVMKVM\0\0\0"
        && leaf(KVM_FEATURES, 0).eax & CLOCKSOURCE2 != 0
}

/// The number of this CPU's interrupt controller.
pub fn initial_apic_id() -> u32 {
    if has_x2apic() && last_of(0).is_some_and(|last| last >= 0xb) && leaf(0xb, 0).ebx != 0 {
        return leaf(0xb, 0).edx;
    }
    leaf(1, 0).ebx >> 24
}

pub fn has_x2apic() -> bool {
    leaf(1, 0).ecx & 1 << 21 != 0
}

pub fn has_deadline_timer() -> bool {
    leaf(1, 0).ecx & 1 << 24 != 0
}

pub fn has_xsave() -> bool {
    leaf(1, 0).ecx & 1 << 26 != 0
}

pub fn has_mtrr() -> bool {
    leaf(1, 0).edx & 1 << 12 != 0
}

pub fn has_tsc_adjust() -> bool {
    last_of(0).is_some_and(|last| last >= 7) && leaf(7, 0).ebx & 1 << 1 != 0
}

pub fn has_rdtscp() -> bool {
    last_of(0x8000_0000).is_some_and(|last| last >= 0x8000_0001) && leaf(0x8000_0001, 0).edx & 1 << 27 != 0
}

/// What XCR0 may hold.
pub fn extended_state() -> u64 {
    let parts = leaf(0xd, 0);
    u64::from(parts.edx) << 32 | u64::from(parts.eax)
}

/// The size and the place of a part of the extended state.
pub fn extended_part(bit: u32) -> (usize, usize) {
    let part = leaf(0xd, bit);
    (part.eax as usize, part.ebx as usize)
}

/// The counter's frequency, where the CPU says it.
pub fn counter_khz() -> Option<u64> {
    if last_of(0)? < 0x15 {
        return None;
    }
    let ratio = leaf(0x15, 0);
    let hz = u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax.max(1));
    (hz >= 1_000_000).then_some(hz / 1000)
}

#[derive(Clone, Copy)]
struct Entry {
    leaf: u32,
    index: u32,
    registers: [u32; 4],
}

/// All leaves as they were at the start.
pub struct Snapshot {
    entries: [Entry; 160],
    count: usize,
}

impl Snapshot {
    /// Reads all. To be called when the control registers have their final values, as some bits repeat them.
    pub fn new() -> Self {
        let mut snapshot = Snapshot { entries: [Entry { leaf: 0, index: 0, registers: [0; 4] }; 160], count: 0 };
        let hypervisor = is_hypervisor().then_some(KVM_BASE);
        for base in [Some(0), hypervisor, Some(0x8000_0000)].into_iter().flatten() {
            let Some(last) = last_of(base) else { continue };
            for number in base..=last {
                for index in 0..indices(number) {
                    snapshot.add(number, index);
                }
            }
        }
        snapshot
    }

    fn add(&mut self, leaf: u32, index: u32) {
        if self.count < self.entries.len() {
            self.entries[self.count] = Entry { leaf, index, registers: read(leaf, index) };
            self.count += 1;
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Compares one of them.
    pub fn check(&mut self, number: usize) {
        let Some(entry) = self.entries[..self.count].get_mut(number) else { return };
        let found = read(entry.leaf, entry.index);
        for ((name, expected), found) in ["eax", "ebx", "ecx", "edx"].iter().zip(entry.registers).zip(found) {
            if expected != found {
                damage(
                    "cpuid",
                    format_args!(
                        "leaf={:#x} index={} register={name} expected={expected:#010x} found={found:#010x}",
                        entry.leaf, entry.index
                    ),
                );
            }
        }
        entry.registers = found;
    }

    /// Changes what is expected: for the self-test.
    pub fn strike(&mut self) {
        self.entries[1].registers[3] ^= 1 << 4;
    }
}

/// How many indices of a leaf are looked at.
const fn indices(leaf: u32) -> u32 {
    match leaf {
        0x4 | 0x8000_001d => 5,
        0x7 | 0x14 | 0x17 | 0x18 | 0x1d => 3,
        0xb | 0x1f | 0x8000_0026 => 3,
        0xd => 20,
        0xf | 0x10 | 0x12 => 4,
        _ => 1,
    }
}

/// A leaf, less what may differ from one moment or CPU to the next: APIC ids, copies of control registers, and the size
/// of the extended state that is enabled.
fn read(number: u32, index: u32) -> [u32; 4] {
    let CpuidResult { mut eax, mut ebx, mut ecx, mut edx } = leaf(number, index);
    match (number, index) {
        (1, _) => {
            ebx &= 0x00ff_ffff;
            ecx &= !(1 << 27);
        }
        (7, 0) => ecx &= !(1 << 4),
        (0xb | 0x1f | 0x8000_0026, _) => edx = 0,
        (0xd, 0 | 1) => ebx = 0,
        (0x8000_001e, _) => (eax, ebx, ecx) = (0, 0, 0),
        _ => {}
    }
    [eax, ebx, ecx, edx]
}
