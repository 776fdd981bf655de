//! The registers of x86_64 that have numbers: MSRs, as the processors' manuals and the hypervisors' interfaces call them, and what
//! a LAPIC has at each offset.

/// The name of the MSR with that index; what has none here is told by its index.
pub fn msr(index: u32) -> String {
    let name = match index {
        0x10 => "IA32_TSC",
        0x11 => "MSR_KVM_WALL_CLOCK",
        0x12 => "MSR_KVM_SYSTEM_TIME",
        0x17 => "IA32_PLATFORM_ID",
        0x1b => "IA32_APIC_BASE",
        0x34 => "MSR_SMI_COUNT",
        0x3a => "IA32_FEATURE_CONTROL",
        0x3b => "IA32_TSC_ADJUST",
        0x48 => "IA32_SPEC_CTRL",
        0x8b => "IA32_BIOS_SIGN_ID",
        0x9e => "IA32_SMBASE",
        0xce => "MSR_PLATFORM_INFO",
        0xcf => "IA32_CORE_CAPABILITIES",
        0xe1 => "IA32_UMWAIT_CONTROL",
        0xe7 => "IA32_MPERF",
        0xe8 => "IA32_APERF",
        0xfe => "IA32_MTRRCAP",
        0x10a => "IA32_ARCH_CAPABILITIES",
        0x122 => "IA32_TSX_CTRL",
        0x140 => "MSR_MISC_FEATURES_ENABLES",
        0x174 => "IA32_SYSENTER_CS",
        0x175 => "IA32_SYSENTER_ESP",
        0x176 => "IA32_SYSENTER_EIP",
        0x179 => "IA32_MCG_CAP",
        0x17a => "IA32_MCG_STATUS",
        0x17b => "IA32_MCG_CTL",
        0x1a0 => "IA32_MISC_ENABLE",
        0x1c4 => "IA32_XFD",
        0x1c5 => "IA32_XFD_ERR",
        0x1d9 => "IA32_DEBUGCTL",
        0x250 => "IA32_MTRR_FIX64K_00000",
        0x258 => "IA32_MTRR_FIX16K_80000",
        0x259 => "IA32_MTRR_FIX16K_A0000",
        0x277 => "IA32_PAT",
        0x2ff => "IA32_MTRR_DEF_TYPE",
        0x345 => "IA32_PERF_CAPABILITIES",
        0x38d => "IA32_FIXED_CTR_CTRL",
        0x38e => "IA32_PERF_GLOBAL_STATUS",
        0x38f => "IA32_PERF_GLOBAL_CTRL",
        0x390 => "IA32_PERF_GLOBAL_OVF_CTRL",
        0x3f1 => "IA32_PEBS_ENABLE",
        0x3f2 => "MSR_PEBS_DATA_CFG",
        0x480 => "IA32_VMX_BASIC",
        0x481 => "IA32_VMX_PINBASED_CTLS",
        0x482 => "IA32_VMX_PROCBASED_CTLS",
        0x483 => "IA32_VMX_EXIT_CTLS",
        0x484 => "IA32_VMX_ENTRY_CTLS",
        0x485 => "IA32_VMX_MISC",
        0x486 => "IA32_VMX_CR0_FIXED0",
        0x487 => "IA32_VMX_CR0_FIXED1",
        0x488 => "IA32_VMX_CR4_FIXED0",
        0x489 => "IA32_VMX_CR4_FIXED1",
        0x48a => "IA32_VMX_VMCS_ENUM",
        0x48b => "IA32_VMX_PROCBASED_CTLS2",
        0x48c => "IA32_VMX_EPT_VPID_CAP",
        0x48d => "IA32_VMX_TRUE_PINBASED_CTLS",
        0x48e => "IA32_VMX_TRUE_PROCBASED_CTLS",
        0x48f => "IA32_VMX_TRUE_EXIT_CTLS",
        0x490 => "IA32_VMX_TRUE_ENTRY_CTLS",
        0x491 => "IA32_VMX_VMFUNC",
        0x560 => "IA32_RTIT_OUTPUT_BASE",
        0x561 => "IA32_RTIT_OUTPUT_MASK_PTRS",
        0x570 => "IA32_RTIT_CTL",
        0x571 => "IA32_RTIT_STATUS",
        0x572 => "IA32_RTIT_CR3_MATCH",
        0x600 => "IA32_DS_AREA",
        0x6a0 => "IA32_U_CET",
        0x6a2 => "IA32_S_CET",
        0x6a4 => "IA32_PL0_SSP",
        0x6a5 => "IA32_PL1_SSP",
        0x6a6 => "IA32_PL2_SSP",
        0x6a7 => "IA32_PL3_SSP",
        0x6a8 => "IA32_INTERRUPT_SSP_TABLE_ADDR",
        0x6e0 => "IA32_TSC_DEADLINE",
        0xd90 => "IA32_BNDCFGS",
        0xda0 => "IA32_XSS",
        0x4000_0000 => "HV_X64_MSR_GUEST_OS_ID",
        0x4000_0001 => "HV_X64_MSR_HYPERCALL",
        0x4000_0002 => "HV_X64_MSR_VP_INDEX",
        0x4000_0003 => "HV_X64_MSR_RESET",
        0x4000_0010 => "HV_X64_MSR_VP_RUNTIME",
        0x4000_0020 => "HV_X64_MSR_TIME_REF_COUNT",
        0x4000_0021 => "HV_X64_MSR_REFERENCE_TSC",
        0x4000_0022 => "HV_X64_MSR_TSC_FREQUENCY",
        0x4000_0023 => "HV_X64_MSR_APIC_FREQUENCY",
        0x4000_0073 => "HV_X64_MSR_VP_ASSIST_PAGE",
        0x4000_0080 => "HV_X64_MSR_SCONTROL",
        0x4000_0105 => "HV_X64_MSR_CRASH_CTL",
        0x4000_0106 => "HV_X64_MSR_REENLIGHTENMENT_CONTROL",
        0x4000_0107 => "HV_X64_MSR_TSC_EMULATION_CONTROL",
        0x4000_0108 => "HV_X64_MSR_TSC_EMULATION_STATUS",
        0x4000_0118 => "HV_X64_MSR_TSC_INVARIANT_CONTROL",
        0x4b56_4d00 => "MSR_KVM_WALL_CLOCK_NEW",
        0x4b56_4d01 => "MSR_KVM_SYSTEM_TIME_NEW",
        0x4b56_4d02 => "MSR_KVM_ASYNC_PF_EN",
        0x4b56_4d03 => "MSR_KVM_STEAL_TIME",
        0x4b56_4d04 => "MSR_KVM_PV_EOI_EN",
        0x4b56_4d05 => "MSR_KVM_POLL_CONTROL",
        0x4b56_4d06 => "MSR_KVM_ASYNC_PF_INT",
        0x4b56_4d07 => "MSR_KVM_ASYNC_PF_ACK",
        0x4b56_4d08 => "MSR_KVM_MIGRATION_CONTROL",
        0xc000_0080 => "IA32_EFER",
        0xc000_0081 => "STAR",
        0xc000_0082 => "LSTAR",
        0xc000_0083 => "CSTAR",
        0xc000_0084 => "FMASK",
        0xc000_0100 => "FS_BASE",
        0xc000_0101 => "GS_BASE",
        0xc000_0102 => "KERNEL_GS_BASE",
        0xc000_0103 => "TSC_AUX",
        0xc000_0104 => "TSC_RATIO",
        0xc000_0300 => "PERF_CNTR_GLOBAL_STATUS",
        0xc000_0301 => "PERF_CNTR_GLOBAL_CTL",
        0xc000_0302 => "PERF_CNTR_GLOBAL_STATUS_CLR",
        0xc001_0015 => "HWCR",
        0xc001_011f => "VIRT_SPEC_CTRL",
        0xc001_0114 => "VM_CR",
        0xc001_0117 => "VM_HSAVE_PA",
        0xc001_0140 => "OSVW_ID_LENGTH",
        0xc001_0141 => "OSVW_STATUS",
        0xc001_1029 => "DE_CFG",
        _ => return numbered_msr(index),
    };
    name.to_owned()
}

/// The name of an MSR of which there are many.
fn numbered_msr(index: u32) -> String {
    let pair = |base: u32, names: [&str; 2]| (names[(index - base) as usize % 2].to_owned(), (index - base) / 2);
    match index {
        0xc1..0xc9 => format!("IA32_PMC{}", index - 0xc1),
        0x186..0x18e => format!("IA32_PERFEVTSEL{}", index - 0x186),
        0x200..0x220 => {
            let (name, number) = pair(0x200, ["IA32_MTRR_PHYSBASE", "IA32_MTRR_PHYSMASK"]);
            format!("{name}{number}")
        }
        0x268..0x270 => format!("IA32_MTRR_FIX4K_{:X}", 0xc_0000 + (index - 0x268) * 0x8000),
        0x280..0x2a0 => format!("IA32_MC{}_CTL2", index - 0x280),
        0x309..0x30d => format!("IA32_FIXED_CTR{}", index - 0x309),
        0x400..0x480 => {
            let register = ["CTL", "STATUS", "ADDR", "MISC"][(index % 4) as usize];
            format!("IA32_MC{}_{register}", (index - 0x400) / 4)
        }
        0x4c1..0x4c9 => format!("IA32_A_PMC{}", index - 0x4c1),
        0x4000_0090..0x4000_00a0 => format!("HV_X64_MSR_SINT{}", index - 0x4000_0090),
        0x4000_00b0..0x4000_00b8 => {
            let (name, number) = pair(0x4000_00b0, ["CONFIG", "COUNT"]);
            format!("HV_X64_MSR_STIMER{number}_{name}")
        }
        0x4000_0100..0x4000_0105 => format!("HV_X64_MSR_CRASH_P{}", index - 0x4000_0100),
        0xc001_0000..0xc001_0004 => format!("EVNTSEL{}", index - 0xc001_0000),
        0xc001_0004..0xc001_0008 => format!("PERFCTR{}", index - 0xc001_0004),
        0xc001_0200..0xc001_020c => {
            let (name, number) = pair(0xc001_0200, ["PERF_CTL", "PERF_CTR"]);
            format!("{name}{number}")
        }
        _ => format!("msr {index:#x}"),
    }
}

/// The name of the LAPIC's register at an offset.
pub fn lapic(offset: usize) -> Option<String> {
    let name = match offset {
        0x20 => "ID",
        0x30 => "version",
        0x80 => "TPR",
        0x90 => "APR",
        0xa0 => "PPR",
        0xb0 => "EOI",
        0xc0 => "RRD",
        0xd0 => "LDR",
        0xe0 => "DFR",
        0xf0 => "SVR",
        0x280 => "ESR",
        0x2f0 => "LVT CMCI",
        0x300 => "ICR",
        0x310 => "ICR (upper half)",
        0x320 => "LVT timer",
        0x330 => "LVT thermal sensor",
        0x340 => "LVT performance counters",
        0x350 => "LVT LINT0",
        0x360 => "LVT LINT1",
        0x370 => "LVT error",
        0x380 => "initial count",
        0x390 => "current count",
        0x3e0 => "divide configuration",
        0x100..0x280 if offset.is_multiple_of(0x10) => {
            let set = ["ISR", "TMR", "IRR"][(offset - 0x100) / 0x80];
            return Some(format!("LAPIC {set}{}", offset % 0x80 / 0x10));
        }
        _ => return None,
    };
    Some(format!("LAPIC {name}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn msrs_are_told_by_name_where_they_have_one() {
        let told = [0x10, 0x6e0, 0xc000_0080, 0xc000_0082, 0x4b56_4d01, 0x203, 0x26f, 0x409, 0x1234].map(msr);
        let names = ["IA32_TSC", "IA32_TSC_DEADLINE", "IA32_EFER", "LSTAR", "MSR_KVM_SYSTEM_TIME_NEW"];
        assert_eq!(told[..5], names);
        assert_eq!(told[5..], ["IA32_MTRR_PHYSMASK1", "IA32_MTRR_FIX4K_F8000", "IA32_MC2_STATUS", "msr 0x1234"]);
    }

    #[test]
    fn no_two_msrs_share_a_name() {
        for base in [0, 0x4000_0000, 0x4b56_4d00, 0xc000_0000, 0xc001_0000] {
            let names: BTreeSet<String> = (base..base + 0x2000).map(msr).collect();
            assert_eq!(names.len(), 0x2000, "from {base:#x} on");
        }
    }

    #[test]
    fn the_lapics_registers_are_told_by_offset() {
        let told = [0x80, 0x100, 0x1f0, 0x200, 0x320, 0x40].map(|offset| lapic(offset).unwrap_or_default());
        assert_eq!(told, ["LAPIC TPR", "LAPIC ISR0", "LAPIC TMR7", "LAPIC IRR0", "LAPIC LVT timer", ""]);
    }
}
