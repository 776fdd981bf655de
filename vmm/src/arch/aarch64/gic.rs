//! The GICv3: made before the vCPUs, started after them, taken and put back.
//!
//! Its state is in four places: the distributor, a redistributor and a CPU interface for each vCPU, the translation service
//! ([`its`](super::its)), and tables in guest RAM, into which KVM writes what it has cached when it is asked to.

use kho_abi::document::aarch64::{GicV1, RedistributorV1};
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES,
    KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    VGIC_LEVEL_INFO_LINE_LEVEL, kvm_create_device, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::ArchError;
use super::ioctl::{Attribute, Attributes};
use super::its::Its;

/// Where the guest finds the distributor.
pub const DISTRIBUTOR: u64 = 0x0800_0000;
/// How much of the guest's address space it takes.
pub const DISTRIBUTOR_SIZE: u64 = 64 << 10;
/// Where the guest finds the redistributors, one behind the other.
pub const REDISTRIBUTORS: u64 = 0x080a_0000;
/// How much of the guest's address space each takes.
pub const REDISTRIBUTOR_SIZE: u64 = 128 << 10;
/// How many interrupts there are, those that belong to one vCPU each included.
pub const INTERRUPTS: u32 = 128;
/// The first interrupt that the vCPUs share.
pub const FIRST_SHARED: u32 = 32;

/// Registers of the distributor that do not belong to an interrupt.
mod gicd {
    pub const CTLR: u32 = 0x0;
    pub const TYPER: u32 = 0x4;
    pub const IIDR: u32 = 0x8;
    pub const TYPER2: u32 = 0xc;
    pub const STATUSR: u32 = 0x10;
}

/// Registers of a redistributor that do not belong to an interrupt.
mod gicr {
    pub const CTLR: u32 = 0x0;
    pub const IIDR: u32 = 0x4;
    pub const TYPER: u32 = 0x8;
    pub const STATUSR: u32 = 0x10;
    pub const WAKER: u32 = 0x14;
    pub const PROPBASER: u32 = 0x70;
    pub const PENDBASER: u32 = 0x78;
    /// The frame of the interrupts that belong to this vCPU.
    pub const PRIVATE: u32 = 0x1_0000;
}

/// Registers with one or more bits for each interrupt: where they begin, and how many bits. The same in the distributor and in
/// the redistributor's second frame.
const GROUP: (u32, u32) = (0x80, 1);
const ENABLE: (u32, u32) = (0x100, 1);
const PENDING: (u32, u32) = (0x200, 1);
/// What is written here is off; zeros in ENABLE change nothing.
const DISABLE: (u32, u32) = (0x180, 1);
const ACTIVE: (u32, u32) = (0x300, 1);
const PRIORITY: (u32, u32) = (0x400, 8);
const CONFIGURATION: (u32, u32) = (0xc00, 2);
/// Which vCPU gets the interrupt; of the distributor only.
const ROUTER: (u32, u32) = (0x6000, 64);

/// What says how an interrupt is to be treated, before any of them is made pending: KVM puts an interrupt that becomes pending
/// into its vCPU's queue then and there, and not at all while it is to be treated as disabled.
const TREATMENT: [(u32, u32); 4] = [GROUP, CONFIGURATION, PRIORITY, ENABLE];
/// What has become of an interrupt.
const PROGRESS: [(u32, u32); 2] = [PENDING, ACTIVE];

/// Registers of the CPU interface, encoded as KVM wants them.
mod icc {
    const fn encoding(op1: u32, crn: u32, crm: u32, op2: u32) -> u32 {
        3 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
    }
    pub const SRE_EL1: u32 = encoding(0, 12, 12, 5);
    pub const CTLR_EL1: u32 = encoding(0, 12, 12, 4);
    pub const IGRPEN0_EL1: u32 = encoding(0, 12, 12, 6);
    pub const IGRPEN1_EL1: u32 = encoding(0, 12, 12, 7);
    pub const PMR_EL1: u32 = encoding(0, 4, 6, 0);
    pub const BPR0_EL1: u32 = encoding(0, 12, 8, 3);
    pub const BPR1_EL1: u32 = encoding(0, 12, 12, 3);

    /// The first of the four registers of active priorities of each group.
    const AP0R: u32 = encoding(0, 12, 8, 4);
    const AP1R: u32 = encoding(0, 12, 9, 0);

    /// The registers of a CPU interface in the order in which they are written. How many there are for active priorities depends
    /// on how many bits a priority has, which CTLR tells.
    pub fn registers(ctlr: u64) -> Vec<u32> {
        let priority_bits = (ctlr >> 8 & 7) + 1;
        let active = match priority_bits {
            7.. => 4,
            6 => 2,
            _ => 1,
        };
        // SRE says that the others are there at all; CTLR says how many bits a priority has.
        let mut registers = vec![SRE_EL1, CTLR_EL1, IGRPEN0_EL1, IGRPEN1_EL1, PMR_EL1, BPR0_EL1, BPR1_EL1];
        registers.extend((0..active).flat_map(|index| [AP0R + index, AP1R + index]));
        registers
    }
}

/// The offsets of the words that hold `bits` for each interrupt of `interrupts`.
fn words((base, bits): (u32, u32), interrupts: std::ops::Range<u32>) -> impl Iterator<Item = u32> {
    (interrupts.start * bits / 8..interrupts.end * bits / 8).step_by(4).map(move |offset| base + offset)
}

/// The distributor's registers that must be what they were, as they cannot be written.
const FIXED_OF_DISTRIBUTOR: [u32; 2] = [gicd::TYPER, gicd::TYPER2];

/// The distributor's registers that are written before its lines have their levels.
fn treatment_of_distributor() -> Vec<u32> {
    // IIDR says which revision of KVM's own implementation the guest has, and with it what other registers mean. CTLR before
    // anything can be pending: nothing is queued while the distributor is off, and nothing queues it later.
    let mut registers = vec![gicd::IIDR, gicd::CTLR, gicd::STATUSR];
    let shared = || FIRST_SHARED..INTERRUPTS;
    registers.extend(words(ROUTER, shared()));
    registers.extend(TREATMENT.into_iter().flat_map(|register| words(register, shared())));
    registers
}

/// The distributor's registers that are written when its lines have their levels.
fn progress_of_distributor() -> Vec<u32> {
    PROGRESS.into_iter().flat_map(|register| words(register, FIRST_SHARED..INTERRUPTS)).collect()
}

/// A redistributor's registers that must be what they were.
const FIXED_OF_REDISTRIBUTOR: [u32; 3] = [gicr::IIDR, gicr::TYPER, gicr::TYPER + 4];

/// A redistributor's registers that are written before its lines have their levels.
fn treatment_of_redistributor() -> Vec<u32> {
    // Where the tables are can only be told while LPIs are off, which CTLR turns on.
    let tables = [gicr::PROPBASER, gicr::PROPBASER + 4, gicr::PENDBASER, gicr::PENDBASER + 4];
    let mut registers = tables.to_vec();
    registers.extend([gicr::CTLR, gicr::STATUSR, gicr::WAKER]);
    let private = TREATMENT.into_iter().flat_map(|register| words(register, 0..FIRST_SHARED));
    registers.extend(private.map(|offset| gicr::PRIVATE + offset));
    registers
}

/// A redistributor's registers that are written when its lines have their levels.
fn progress_of_redistributor() -> Vec<u32> {
    let private = PROGRESS.into_iter().flat_map(|register| words(register, 0..FIRST_SHARED));
    private.map(|offset| gicr::PRIVATE + offset).collect()
}

/// A VM's interrupt controller.
pub struct Gic {
    device: DeviceFd,
    its: Option<Its>,
}

impl Gic {
    /// Makes it, with a translation service where the host offers one, and says where the guest finds it. Must come before the
    /// vCPUs.
    pub fn new(vm: &VmFd, cpus: u32) -> Result<Self, ArchError> {
        let mut create = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, ..Default::default() };
        let device = vm.create_device(&mut create).map_err(|error| match error.errno() {
            libc::ENODEV => ArchError::Missing("a GICv3".to_owned()),
            _ => ArchError::kvm("create a GICv3")(error),
        })?;
        // One region with room for exactly as many as there are vCPUs: `index`, which is 0, is in the lowest bits.
        let region = u64::from(cpus) << 52 | REDISTRIBUTORS;
        for (kind, address) in
            [(KVM_VGIC_V3_ADDR_TYPE_DIST, DISTRIBUTOR), (KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, region)]
        {
            device
                .set_attribute(Attribute::new(KVM_DEV_ARM_VGIC_GRP_ADDR, kind), &address)
                .map_err(ArchError::kvm(&format!("place the interrupt controller at {address:#x}")))?;
        }
        device
            .set_attribute(Attribute::new(KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0_u64), &INTERRUPTS)
            .map_err(ArchError::kvm(&format!("have {INTERRUPTS} interrupts")))?;
        Ok(Self { device, its: Its::new(vm)? })
    }

    /// Starts it, which all vCPUs must be there for.
    pub fn init(&self) -> Result<(), ArchError> {
        self.device
            .request(Attribute::new(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT))
            .map_err(ArchError::kvm("start the interrupt controller"))?;
        self.its.as_ref().map_or(Ok(()), Its::init)
    }

    /// Whether it translates messages to interrupts.
    pub fn has_its(&self) -> bool {
        self.its.is_some()
    }

    /// Its translation service.
    #[cfg(test)]
    pub fn its(&self) -> Option<&Its> {
        self.its.as_ref()
    }

    /// Takes the state of the GIC of vCPUs with these MPIDRs, and makes KVM write what it has cached of the tables in guest RAM
    /// back there: the vCPUs must stand still, and guest RAM must not yet be taken for final.
    pub fn save(&self, mpidrs: &[u64]) -> Result<GicV1, ArchError> {
        self.device
            .request(Attribute::new(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES))
            .map_err(ArchError::kvm("write the pending LPIs into the guest's tables"))?;
        Ok(GicV1 {
            distributor: self.take(
                Part::Distributor,
                FIXED_OF_DISTRIBUTOR.into_iter().chain(treatment_of_distributor()).chain(progress_of_distributor()),
            )?,
            lines: self.take(Part::Lines(0), (FIRST_SHARED..INTERRUPTS).step_by(32))?,
            redistributors: mpidrs.iter().map(|&mpidr| self.save_redistributor(mpidr)).collect::<Result<_, _>>()?,
            its: self.its.as_ref().map(Its::save).transpose()?,
        })
    }

    fn save_redistributor(&self, mpidr: u64) -> Result<RedistributorV1, ArchError> {
        let registers =
            FIXED_OF_REDISTRIBUTOR.into_iter().chain(treatment_of_redistributor()).chain(progress_of_redistributor());
        let interface = Part::Interface(mpidr);
        let ctlr: u64 = self.read(interface, icc::CTLR_EL1)?;
        Ok(RedistributorV1 {
            mpidr,
            registers: self.take(Part::Redistributor(mpidr), registers)?,
            cpu_interface: self.take(interface, icc::registers(ctlr).into_iter())?,
            lines: self.read(Part::Lines(mpidr), 0)?,
        })
    }

    /// Puts the state back, into a GIC that was started and not used. The vCPUs' registers must have been put back before: by
    /// MPIDR an interrupt finds its vCPU. So must guest RAM, where the tables are. All is checked before anything is written.
    pub fn restore(&self, state: &GicV1, mpidrs: &[u64]) -> Result<(), ArchError> {
        let GicV1 { distributor, lines, redistributors, its } = state;
        let distributor = Plan::new(
            Part::Distributor,
            distributor,
            &FIXED_OF_DISTRIBUTOR,
            treatment_of_distributor(),
            progress_of_distributor(),
        )?;
        distributor.check(self)?;
        let levels = (FIRST_SHARED..INTERRUPTS).step_by(32).collect();
        let lines = Plan::new(Part::Lines(0), lines, &[], levels, vec![])?;
        if redistributors.len() != mpidrs.len() {
            return Err(ArchError::Unfit(format!(
                "{} redistributors for {} vCPUs",
                redistributors.len(),
                mpidrs.len()
            )));
        }
        let plans = mpidrs.iter().map(|mpidr| self.plan_redistributor(redistributors, *mpidr));
        let plans = plans.collect::<Result<Vec<_>, _>>()?;
        let its = match (&self.its, its) {
            (Some(its), Some(state)) => Some(its.plan(state)?),
            (None, None) => None,
            (Some(_), None) => return Err(ArchError::Unfit("the guest knows of no ITS, this host has one".to_owned())),
            (None, Some(_)) => return Err(ArchError::Missing("an ITS, which the guest knows of".to_owned())),
        };

        // The distributor first: while it is off, nothing that becomes pending is queued.
        distributor.write_treatment(self)?;
        lines.write_treatment(self)?;
        distributor.write_progress(self)?;
        for (mpidr, registers, cpu_interface, lines) in &plans {
            // KVM's come with the interrupts between vCPUs turned on, which the guest may have turned off.
            for offset in words(DISABLE, 0..FIRST_SHARED) {
                self.write(Part::Redistributor(*mpidr), gicr::PRIVATE + offset, &u32::MAX)?;
            }
            registers.write_treatment(self)?;
            self.write(Part::Lines(*mpidr), 0, lines)?;
            registers.write_progress(self)?;
            cpu_interface.write_treatment(self)?;
        }
        // Behind the redistributors, which say where the pending table is that the translations are looked up in.
        if let (Some(device), Some(plan)) = (&self.its, its) {
            device.restore(plan)?;
        }
        if cfg!(debug_assertions) { self.check(state, mpidrs) } else { Ok(()) }
    }

    fn plan_redistributor(
        &self,
        redistributors: &[RedistributorV1],
        mpidr: u64,
    ) -> Result<(u64, Plan<u32>, Plan<u64>, u32), ArchError> {
        let Some(state) = redistributors.iter().find(|redistributor| redistributor.mpidr == mpidr) else {
            return Err(ArchError::Unfit(format!("no redistributor for the vCPU with MPIDR {mpidr:#x}")));
        };
        let RedistributorV1 { mpidr, registers, cpu_interface, lines } = state;
        let registers = Plan::new(
            Part::Redistributor(*mpidr),
            registers,
            &FIXED_OF_REDISTRIBUTOR,
            treatment_of_redistributor(),
            progress_of_redistributor(),
        )?;
        registers.check(self)?;
        let ctlr = cpu_interface.iter().find(|(register, _)| *register == icc::CTLR_EL1);
        let order = icc::registers(ctlr.map_or(0, |(_, value)| *value));
        let cpu_interface = Plan::new(Part::Interface(*mpidr), cpu_interface, &[], order, vec![])?;
        Ok((*mpidr, registers, cpu_interface, *lines))
    }

    /// Reads the state back and compares it with what was written.
    fn check(&self, wanted: &GicV1, mpidrs: &[u64]) -> Result<(), ArchError> {
        let found = self.save(mpidrs)?;
        if found == *wanted {
            return Ok(());
        }
        let mut differences = differences("the distributor", &wanted.distributor, &found.distributor);
        differences.extend(self::differences("the shared lines", &wanted.lines, &found.lines));
        for (wanted, found) in mpidrs.iter().filter_map(|mpidr| {
            let of = |gic: &'_ GicV1| gic.redistributors.iter().find(|found| found.mpidr == *mpidr).cloned();
            of(wanted).zip(of(&found))
        }) {
            let name = format!("the redistributor of {:#x}", wanted.mpidr);
            differences.extend(self::differences(&name, &wanted.registers, &found.registers));
            differences.extend(self::differences(&name, &wanted.cpu_interface, &found.cpu_interface));
            differences.extend(self::differences(&name, &[(0, wanted.lines)], &[(0, found.lines)]));
        }
        if let (Some(wanted), Some(found)) = (&wanted.its, &found.its) {
            differences.extend(self::differences("the ITS", &wanted.registers, &found.registers));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(ArchError::Unfit(format!("the interrupt controller, read back: {}", differences.join("; "))))
    }

    fn take<T: Word>(&self, part: Part, registers: impl Iterator<Item = u32>) -> Result<Vec<(u32, T)>, ArchError> {
        registers.map(|register| Ok((register, self.read(part, register)?))).collect()
    }

    fn read<T: Word>(&self, part: Part, register: u32) -> Result<T, ArchError> {
        let read = self.device.attribute(part.attribute(register));
        read.map_err(|error| ArchError::kvm(&format!("read {register:#x} of {part}"))(error))
    }

    fn write<T: Word>(&self, part: Part, register: u32, value: &T) -> Result<(), ArchError> {
        let written = self.device.set_attribute(part.attribute(register), value);
        written.map_err(|error| ArchError::kvm(&format!("write {value:#x} to {register:#x} of {part}"))(error))
    }
}

/// Which registers differ, and how.
fn differences<T: Word>(part: &str, wanted: &[(u32, T)], found: &[(u32, T)]) -> Vec<String> {
    let value = |register: u32| found.iter().find(|(found, _)| *found == register).map(|(_, value)| *value);
    let differing = wanted.iter().filter_map(|&(register, wanted)| {
        value(register).filter(|&found| found != wanted).map(|found| (register, wanted, found))
    });
    differing.map(|(register, wanted, found)| format!("{register:#x} of {part}: {found:#x}, not {wanted:#x}")).collect()
}

/// A register's value: 32 or 64 bits.
pub trait Word: Copy + PartialEq + std::fmt::LowerHex + FromBytes + IntoBytes + Immutable {}
impl Word for u32 {}
impl Word for u64 {}

/// A part of the GIC that KVM gives access to. Those of one vCPU name it by its MPIDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Distributor,
    Redistributor(u64),
    Interface(u64),
    /// The levels of interrupt lines; those that the vCPUs share have them with any.
    Lines(u64),
}

impl Part {
    fn attribute(self, register: u32) -> Attribute {
        let (group, mpidr, register) = match self {
            Self::Distributor => (KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, register),
            Self::Redistributor(mpidr) => (KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, mpidr, register),
            Self::Interface(mpidr) => (KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, mpidr, register),
            Self::Lines(mpidr) => {
                let level = VGIC_LEVEL_INFO_LINE_LEVEL << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
                (KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, mpidr, level | register)
            }
        };
        // In MPIDR_EL1 the fourth part of the affinity is above the three others with a gap; KVM wants them in a row.
        let affinity = (mpidr >> 32 & 0xff) << 24 | mpidr & 0xff_ffff;
        Attribute::new(group, affinity << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | u64::from(register))
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Distributor => write!(formatter, "the distributor"),
            Self::Redistributor(mpidr) => write!(formatter, "the redistributor of {mpidr:#x}"),
            Self::Interface(mpidr) => write!(formatter, "the CPU interface of {mpidr:#x}"),
            Self::Lines(mpidr) => write!(formatter, "the interrupt lines of {mpidr:#x}"),
        }
    }
}

/// The registers of one part in the order in which they are written.
struct Plan<T> {
    part: Part,
    fixed: Vec<(u32, T)>,
    treatment: Vec<(u32, T)>,
    progress: Vec<(u32, T)>,
}

impl<T: Word> Plan<T> {
    /// `saved` must hold those registers and no others.
    fn new(
        part: Part,
        saved: &[(u32, T)],
        fixed: &[u32],
        treatment: Vec<u32>,
        progress: Vec<u32>,
    ) -> Result<Self, ArchError> {
        let known = fixed.len() + treatment.len() + progress.len();
        let mut values = Values { part: part.to_string(), saved };
        let plan =
            Self { part, fixed: values.of(fixed)?, treatment: values.of(&treatment)?, progress: values.of(&progress)? };
        values.are(known)?;
        Ok(plan)
    }

    fn check(&self, gic: &Gic) -> Result<(), ArchError> {
        for (register, wanted) in &self.fixed {
            let found: T = gic.read(self.part, *register)?;
            if found != *wanted {
                return Err(ArchError::Unfit(format!(
                    "{register:#x} of {} is {found:#x}, the guest knows {wanted:#x}",
                    self.part
                )));
            }
        }
        Ok(())
    }

    fn write_treatment(&self, gic: &Gic) -> Result<(), ArchError> {
        self.treatment.iter().try_for_each(|(register, value)| gic.write(self.part, *register, value))
    }

    fn write_progress(&self, gic: &Gic) -> Result<(), ArchError> {
        self.progress.iter().try_for_each(|(register, value)| gic.write(self.part, *register, value))
    }
}

/// Registers as they were saved, looked up in the order in which they are wanted.
pub struct Values<'a, T> {
    /// What they belong to.
    pub part: String,
    /// Each by its offset.
    pub saved: &'a [(u32, T)],
}

impl<T: Word> Values<'_, T> {
    /// Those at `registers`, in that order.
    pub fn of(&mut self, registers: &[u32]) -> Result<Vec<(u32, T)>, ArchError> {
        let value = |register: &u32| self.saved.iter().find(|(saved, _)| saved == register).copied();
        let missing = |register: &u32| ArchError::Unfit(format!("{register:#x} of {} is missing", self.part));
        registers.iter().map(|register| value(register).ok_or_else(|| missing(register))).collect()
    }

    /// That there are no more than `known`.
    pub fn are(&self, known: usize) -> Result<(), ArchError> {
        if self.saved.len() == known {
            return Ok(());
        }
        Err(ArchError::Unfit(format!("{} has {} registers, {known} are known", self.part, self.saved.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_addressed_by_all_four_levels_of_affinity() {
        let attribute = Part::Redistributor(0x12_8000_0000 | 0x34_5607).attribute(gicr::WAKER);
        assert_eq!((attribute.group, attribute.number), (KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, 0x1234_5607_0000_0014));
    }

    #[test]
    fn the_bits_of_a_priority_say_how_many_registers_of_active_ones_there_are() {
        let active = |priority_bits: u64| icc::registers((priority_bits - 1) << 8).len() - 7;
        assert_eq!([active(5), active(6), active(7)], [2, 4, 8]);
    }

    #[test]
    fn every_interrupt_has_its_bits_in_one_place() {
        let shared: Vec<_> = words(ENABLE, FIRST_SHARED..INTERRUPTS).collect();
        assert_eq!(shared, [0x104, 0x108, 0x10c]);
        assert_eq!(words(PRIORITY, FIRST_SHARED..INTERRUPTS).count(), 96 / 4);
        assert_eq!(words(ROUTER, FIRST_SHARED..INTERRUPTS).next(), Some(0x6100));
        assert_eq!(words(CONFIGURATION, 0..FIRST_SHARED).collect::<Vec<_>>(), [0xc00, 0xc04]);
    }
}
