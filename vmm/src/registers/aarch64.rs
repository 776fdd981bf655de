//! The registers of aarch64, as the Arm manual calls them: a vCPU's under KVM's numbers for them, and those of a GICv3 under
//! their offsets (the GIC specification, IHI 0069).

mod system;

pub use system::system;

/// What a register belongs to (`KVM_REG_ARM_COPROC_MASK`).
pub mod class {
    pub const CORE: u64 = 0x10;
    pub const CACHE_SIZE: u64 = 0x11;
    pub const SYSTEM: u64 = 0x13;
    pub const FIRMWARE: u64 = 0x14;
    pub const SVE: u64 = 0x15;
    pub const FIRMWARE_BITMAP: u64 = 0x16;

    /// The class of the register of that number.
    pub fn of(number: u64) -> u64 {
        number >> 16 & 0xfff
    }
}

/// The name of the register that KVM calls `number`; what has none is told by its number.
pub fn name(number: u64) -> String {
    let index = number & 0xffff;
    match class::of(number) {
        class::CORE => core(index),
        class::CACHE_SIZE if index < 0x100 => format!("CCSIDR_EL1 {index:#x}"),
        class::SYSTEM => match system(index) {
            // KVM's numbers for these two are exchanged, by an old mistake that has become its ABI.
            name if name == "CNTVCT_EL0" => "CNTV_CVAL_EL0".to_owned(),
            name if name == "CNTV_CVAL_EL0" => "CNTVCT_EL0".to_owned(),
            name => name,
        },
        class::FIRMWARE => match index {
            0 => "PSCI version".to_owned(),
            1..=3 => format!("firmware workaround {index}"),
            _ => format!("firmware register {index:#x}"),
        },
        class::FIRMWARE_BITMAP => match index {
            0 => "standard firmware services".to_owned(),
            1 => "standard hypervisor services".to_owned(),
            2 => "vendor's hypervisor services".to_owned(),
            3 => "vendor's hypervisor services, continued".to_owned(),
            _ => format!("firmware feature bitmap {index:#x}"),
        },
        class::SVE => scalable(index),
        _ => format!("register {number:#x}"),
    }
}

/// A core register: its offset in `struct kvm_regs`, in words of 32 bits.
fn core(word: u64) -> String {
    let fixed = match word {
        0x3e => "sp",
        0x40 => "pc",
        0x42 => "pstate",
        0x44 => "SP_EL1",
        0x46 => "ELR_EL1",
        0x48 => "SPSR_EL1",
        0x4a => "SPSR_abt",
        0x4c => "SPSR_und",
        0x4e => "SPSR_irq",
        0x50 => "SPSR_fiq",
        0xd4 => "fpsr",
        0xd5 => "fpcr",
        0..0x3e if word.is_multiple_of(2) => return format!("x{}", word / 2),
        0x54..0xd4 if word.is_multiple_of(4) => return format!("v{}", (word - 0x54) / 4),
        _ => return format!("core register {word:#x}"),
    };
    fixed.to_owned()
}

/// A register of the scalable vector extension. Only the first slice of each exists: it is as long as any vector can be.
fn scalable(index: u64) -> String {
    match (index, index >> 5 & 0x1f, index & 0x1f) {
        (0..0x400, vector, 0) => format!("z{vector}"),
        (0x400..0x600, predicate, 0) if predicate < 16 => format!("p{predicate}"),
        (0x600, ..) => "ffr".to_owned(),
        (0xffff, ..) => "lengths of SVE vectors".to_owned(),
        _ => format!("SVE register {index:#x}"),
    }
}

/// Registers with one or more bits for each interrupt, the same in the distributor and in a redistributor's second frame: where
/// they begin, and how many bits.
const OF_INTERRUPTS: [(&str, u32, u32); 11] = [
    ("IGROUPR", 0x80, 1),
    ("ISENABLER", 0x100, 1),
    ("ICENABLER", 0x180, 1),
    ("ISPENDR", 0x200, 1),
    ("ICPENDR", 0x280, 1),
    ("ISACTIVER", 0x300, 1),
    ("ICACTIVER", 0x380, 1),
    ("IPRIORITYR", 0x400, 8),
    ("ICFGR", 0xc00, 2),
    ("IGRPMODR", 0xd00, 1),
    ("NSACR", 0xe00, 2),
];

/// How many interrupts have their bits there, those that no message brings.
const INTERRUPTS: u32 = 1024;

fn of_interrupts(prefix: &str, offset: u32) -> Option<String> {
    let within = |(_, base, bits): &&(_, u32, u32)| (*base..base + INTERRUPTS * bits / 8).contains(&offset);
    let (name, base, _) = OF_INTERRUPTS.iter().find(within)?;
    (offset.is_multiple_of(4)).then(|| format!("{prefix}_{name}{}", (offset - base) / 4))
}

/// The name of a word of a 64-bit register.
fn half(name: &str, offset: u32) -> String {
    match offset % 8 {
        0 => name.to_owned(),
        _ => format!("{name} (upper half)"),
    }
}

/// The name of the distributor's register at an offset.
pub fn distributor(offset: u32) -> String {
    match offset {
        0x0 => "GICD_CTLR".to_owned(),
        0x4 => "GICD_TYPER".to_owned(),
        0x8 => "GICD_IIDR".to_owned(),
        0xc => "GICD_TYPER2".to_owned(),
        0x10 => "GICD_STATUSR".to_owned(),
        0x6000..0x8000 if offset.is_multiple_of(4) => half(&format!("GICD_IROUTER{}", (offset - 0x6000) / 8), offset),
        _ => of_interrupts("GICD", offset).unwrap_or_else(|| format!("GICD {offset:#x}")),
    }
}

/// The name of a redistributor's register at an offset.
pub fn redistributor(offset: u32) -> String {
    /// The frame of the interrupts that belong to one vCPU.
    const PRIVATE: u32 = 0x1_0000;
    match offset {
        0x0 => "GICR_CTLR".to_owned(),
        0x4 => "GICR_IIDR".to_owned(),
        0x8 | 0xc => half("GICR_TYPER", offset),
        0x10 => "GICR_STATUSR".to_owned(),
        0x14 => "GICR_WAKER".to_owned(),
        0x70 | 0x74 => half("GICR_PROPBASER", offset),
        0x78 | 0x7c => half("GICR_PENDBASER", offset),
        _ => offset
            .checked_sub(PRIVATE)
            .and_then(|offset| of_interrupts("GICR", offset))
            .unwrap_or_else(|| format!("GICR {offset:#x}")),
    }
}

/// The name of the translation service's register at an offset.
pub fn translation_service(offset: u32) -> String {
    match offset {
        0x0 => "GITS_CTLR".to_owned(),
        0x4 => "GITS_IIDR".to_owned(),
        0x8 => "GITS_TYPER".to_owned(),
        0x80 => "GITS_CBASER".to_owned(),
        0x88 => "GITS_CWRITER".to_owned(),
        0x90 => "GITS_CREADR".to_owned(),
        0x100..0x140 if offset.is_multiple_of(8) => format!("GITS_BASER{}", (offset - 0x100) / 8),
        _ => format!("GITS {offset:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const U32: u64 = 2;
    const U64: u64 = 3;
    const U128: u64 = 4;

    fn number(size: u64, class: u64, index: u64) -> u64 {
        6 << 60 | size << 52 | class << 16 | index
    }

    fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
        number(U64, class::SYSTEM, op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2)
    }

    #[test]
    fn core_registers_are_told_by_their_place_in_the_struct() {
        let told: Vec<String> = [0, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x48, 0x50, 1, 0x52]
            .map(|word| name(number(U64, class::CORE, word)))
            .into();
        assert_eq!(
            told,
            [
                "x0",
                "x30",
                "sp",
                "pc",
                "pstate",
                "SP_EL1",
                "SPSR_EL1",
                "SPSR_fiq",
                "core register 0x1",
                "core register 0x52"
            ]
        );
        assert_eq!(name(number(U128, class::CORE, 0x54)), "v0");
        assert_eq!(name(number(U128, class::CORE, 0x54 + 4 * 31)), "v31");
        assert_eq!(name(number(U32, class::CORE, 0xd5)), "fpcr");
    }

    #[test]
    fn system_registers_are_told_as_the_manual_spells_them() {
        assert_eq!(name(system(3, 0, 1, 0, 0)), "SCTLR_EL1");
        assert_eq!(name(system(3, 0, 2, 0, 0)), "TTBR0_EL1");
        assert_eq!(name(system(2, 0, 0, 15, 4)), "DBGBVR15_EL1");
        assert_eq!(name(system(3, 3, 14, 11, 6)), "PMEVCNTR30_EL0");
        assert_eq!(name(system(3, 3, 14, 15, 7)), "PMCCFILTR_EL0");
        assert_eq!(name(system(3, 0, 1, 0, 7)), "S3_0_C1_C0_7");
        assert_eq!(name(number(U64, 0x17, 3)), format!("register {:#x}", number(U64, 0x17, 3)));
    }

    #[test]
    fn the_two_exchanged_numbers_are_told_by_what_they_hold() {
        // KVM_REG_ARM_TIMER_CNT and KVM_REG_ARM_TIMER_CVAL of the kernel's arch/arm64/include/uapi/asm/kvm.h.
        assert_eq!(name(system(3, 3, 14, 3, 2)), "CNTVCT_EL0");
        assert_eq!(name(system(3, 3, 14, 0, 2)), "CNTV_CVAL_EL0");
        assert_eq!(name(system(3, 3, 14, 3, 1)), "CNTV_CTL_EL0");
    }

    #[test]
    fn no_two_registers_share_a_name() {
        for class in
            [class::CORE, class::CACHE_SIZE, class::SYSTEM, class::FIRMWARE, class::FIRMWARE_BITMAP, class::SVE]
        {
            let names: BTreeSet<String> = (0..=0xffff).map(|index| name(number(U64, class, index))).collect();
            assert_eq!(names.len(), 0x1_0000, "class {class:#x}");
        }
        for name in [distributor, redistributor, translation_service] {
            let names: BTreeSet<String> = (0..0x2_0000).map(name).collect();
            assert_eq!(names.len(), 0x2_0000);
        }
    }

    #[test]
    fn the_interrupt_controllers_registers_are_told_by_offset() {
        let told = [0x0, 0x104, 0x420, 0x6108, 0x610c, 0xfff0].map(distributor);
        let names =
            ["GICD_CTLR", "GICD_ISENABLER1", "GICD_IPRIORITYR8", "GICD_IROUTER33", "GICD_IROUTER33 (upper half)"];
        assert_eq!(told[..5], names);
        assert_eq!(told[5], "GICD 0xfff0");
        assert_eq!(redistributor(0x74), "GICR_PROPBASER (upper half)");
        assert_eq!(redistributor(0x1_0300), "GICR_ISACTIVER0");
        assert_eq!(translation_service(0x108), "GITS_BASER1");
    }
}
