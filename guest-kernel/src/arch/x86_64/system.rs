//! Model-specific registers, control registers, segment registers, descriptor tables.

use super::{cpu, cpuid, number, pvclock, registers};
use crate::console::damage;

const EFER: u32 = 0xc000_0080;
const LSTAR: u32 = 0xc000_0082;
const EFER_SYSCALL: u64 = 1;

/// Those that are given a value of ours, and then those that only have to keep theirs.
const CHOSEN: [(&str, u32, u64); 12] = [
    ("sysenter-cs", 0x174, 0x0000_0010),
    ("sysenter-esp", 0x175, 0x1234_5678),
    ("sysenter-eip", 0x176, 0x1357_9bdf),
    // Write-combining and write-protected where there were copies of the first half, which the page tables use.
    ("pat", 0x277, 0x0007_0501_0007_0406),
    ("star", 0xc000_0081, 0x0023_0008_89ab_cdef),
    ("lstar", LSTAR, 0xffff_8123_4567_89ab),
    ("cstar", 0xc000_0083, 0xffff_8fed_cba9_8765),
    ("sfmask", 0xc000_0084, 0x0004_7700),
    ("fs-base", 0xc000_0100, 0x0000_5a5a_1234_5670),
    // The code that holds registers finds its data through it.
    ("gs-base", 0xc000_0101, 0),
    ("kernel-gs-base", 0xc000_0102, 0xffff_c001_d00d_f00d),
    ("tsc-aux", 0xc000_0103, 0x7ab5_c0de),
];
/// Those that are the same on all CPUs.
const SHARED: [&str; 4] = ["sysenter-cs", "pat", "star", "sfmask"];
const KEPT: [(&str, u32); 5] = [
    ("efer", EFER),
    ("apic-base", 0x1b),
    ("tsc-adjust", 0x3b),
    ("mtrr-default", 0x2ff),
    ("kvm-system-time", pvclock::SYSTEM_TIME),
];

const MSRS: usize = CHOSEN.len() + KEPT.len();
const CONTROLS: [&str; 6] = ["cr0", "cr2", "cr3", "cr4", "cr8", "xcr0"];
const SELECTORS: [&str; 8] = ["cs", "ds", "es", "ss", "fs", "gs", "tr", "ldtr"];

/// No page fault ever comes, so CR2 keeps what it is given.
const CR2: u64 = 0x0000_7ead_beef_1000;
const CR4_DEBUG_EXTENSIONS: u64 = 1 << 3;
const CR4_GLOBAL_PAGES: u64 = 1 << 7;

/// All of it as it was at the start.
pub struct System {
    msrs: [Option<(&'static str, u32, u64)>; MSRS],
    controls: [u64; 6],
    selectors: [u16; 8],
    tables: [(u16, u64); 2],
    has_xsave: bool,
}

impl System {
    /// Sets all and remembers it.
    pub fn new(has_clock: bool) -> Self {
        cpu::write_msr(EFER, cpu::read_msr(EFER) | EFER_SYSCALL);
        cpu::write_cr4(cpu::read_cr4() | CR4_DEBUG_EXTENSIONS | CR4_GLOBAL_PAGES);
        cpu::write_cr2(CR2 ^ (number() as u64) << 12);
        // Selectors before bases: to load FS or GS clears the base.
        let selectors = cpu::read_selectors();
        let mut msrs = [None; MSRS];
        let chosen = CHOSEN.iter().filter(|(name, ..)| *name != "tsc-aux" || cpuid::has_rdtscp());
        for (entry, (name, msr, value)) in msrs.iter_mut().zip(chosen) {
            // What a CPU has to itself differs from the others', so that none is taken for another's.
            let value = match *name {
                "gs-base" => registers::own_base(),
                name if SHARED.contains(&name) => *value,
                _ => *value ^ (number() as u64) << 4,
            };
            cpu::write_msr(*msr, value);
            // A CPU may keep fewer bits than were written; it has to keep those.
            *entry = Some((*name, *msr, cpu::read_msr(*msr)));
        }
        let kept = KEPT.iter().filter(|(name, _)| match *name {
            "tsc-adjust" => cpuid::has_tsc_adjust(),
            "mtrr-default" => cpuid::has_mtrr(),
            "kvm-system-time" => has_clock,
            _ => true,
        });
        for (entry, (name, msr)) in msrs[CHOSEN.len()..].iter_mut().zip(kept) {
            *entry = Some((*name, *msr, cpu::read_msr(*msr)));
        }
        let mut system = System {
            msrs,
            controls: [0; 6],
            selectors,
            tables: cpu::read_table_registers(),
            has_xsave: cpuid::has_xsave(),
        };
        system.controls = system.read_controls();
        system
    }

    fn read_controls(&self) -> [u64; 6] {
        let xcr0 = if self.has_xsave { cpu::read_xcr0() } else { 0 };
        [cpu::read_cr0(), cpu::read_cr2(), cpu::read_cr3(), cpu::read_cr4(), cpu::read_cr8(), xcr0]
    }

    /// Control and segment registers: cheap, as most need no exit.
    pub fn check_controls(&mut self) {
        let found = self.read_controls();
        for ((name, expected), found) in CONTROLS.iter().zip(self.controls).zip(found) {
            if expected != found {
                damage("control", format_args!("name={name} expected={expected:#x} found={found:#x}"));
            }
        }
        self.controls = found;
        let found = cpu::read_selectors();
        for ((name, expected), found) in SELECTORS.iter().zip(self.selectors).zip(found) {
            if expected != found {
                damage("segment", format_args!("name={name} expected={expected:#x} found={found:#x}"));
            }
        }
        self.selectors = found;
        let found = cpu::read_table_registers();
        for ((name, (limit, base)), (found_limit, found_base)) in ["gdtr", "idtr"].iter().zip(self.tables).zip(found) {
            if (limit, base) != (found_limit, found_base) {
                damage(
                    "segment",
                    format_args!(
                        "name={name} expected={base:#x} found={found_base:#x} expected_limit={limit:#x} found_limit={found_limit:#x}"
                    ),
                );
            }
        }
        self.tables = found;
    }

    /// Model-specific registers; what is wrong is put right.
    pub fn check_msrs(&self) {
        for (name, msr, expected) in self.msrs.iter().flatten() {
            let found = cpu::read_msr(*msr);
            if found != *expected {
                damage("msr", format_args!("name={name} expected={expected:#018x} found={found:#018x}"));
                cpu::write_msr(*msr, *expected);
            }
        }
    }

    /// Changes an MSR: for the self-test.
    pub fn strike_msr() {
        cpu::write_msr(LSTAR, 0);
    }

    /// Changes a control register: for the self-test.
    pub fn strike_control() {
        cpu::write_cr2(0);
    }
}
