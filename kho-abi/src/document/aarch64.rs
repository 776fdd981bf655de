//! What an aarch64 machine consists of: the registers that KVM lists, each under KVM's number for it, and the interrupt
//! controller's, each under its offset.
//!
//! Here a register is bytes. Which ones there are depends on the kernel, so it is for whoever hands them to KVM to judge
//! what they say.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::vec::Vec;

use super::DecodeError;
use super::device::RtcV1;
use super::node::Node;
use super::record::{Reader, Record, to_node};
use crate::names;

/// The architecture's name in documents.
pub const NAME: &str = "aarch64";

/// Where a register's number tells its size, as the power of two of its bytes (`KVM_REG_SIZE_SHIFT`).
const SIZE_SHIFT: u32 = 52;
/// The width of that field.
const SIZE_MASK: u64 = 0xf;
/// The power of two of the largest register: 2048 bits, a scalable vector.
const SIZE_MAX: u64 = 8;
/// A register's number in the list.
const NUMBER: usize = 8;
/// The size of an entry of 32 bits under a number of 32 bits.
const WORD: usize = 8;
/// The size of an entry of 64 bits under a number of 32 bits.
const DOUBLE_WORD: usize = 12;

/// The size in bytes of the register that KVM calls `number`; none where no register is that large.
pub fn register_size(number: u64) -> Option<usize> {
    let power = number >> SIZE_SHIFT & SIZE_MASK;
    (power <= SIZE_MAX).then_some(1 << power)
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuV1 {
    /// The vCPU's number, as for `KVM_CREATE_VCPU`.
    pub id: u32,
    /// What the vCPU was made with: the first word of `features` in `struct kvm_vcpu_init`.
    pub features: u32,
    /// The registers of `KVM_GET_REG_LIST` as number and value, the value in the order of bytes in which KVM gives it.
    pub registers: Vec<(u64, Vec<u8>)>,
    /// `struct kvm_mp_state`.
    pub mp_state: Vec<u8>,
    /// `struct kvm_vcpu_events`.
    pub events: Vec<u8>,
    /// The interrupt of the virtual timer.
    pub virtual_timer_interrupt: u32,
    /// The interrupt of the physical timer.
    pub physical_timer_interrupt: u32,
    /// The interrupt of the performance monitor, where the vCPU has one.
    pub pmu_interrupt: Option<u32>,
    /// The guest physical address of the record of stolen time, where there is one.
    pub stolen_time: Option<u64>,
}

impl Record for VcpuV1 {
    const COMPATIBLE: &'static str = "kho-vmm,aarch64-vcpu-v1";

    fn encode(&self, node: Node) -> Node {
        let Self {
            id,
            features,
            registers,
            mp_state,
            events,
            virtual_timer_interrupt,
            physical_timer_interrupt,
            pmu_interrupt,
            stolen_time,
        } = self;
        let mut list = Vec::with_capacity(registers.len() * 2 * NUMBER);
        for (number, value) in registers {
            list.extend_from_slice(&number.to_be_bytes());
            list.extend_from_slice(value);
        }
        node.with_u32("id", *id)
            .with_u32("features", *features)
            .with_bytes("registers", list)
            .with_bytes("mp-state", mp_state.as_slice())
            .with_bytes("events", events.as_slice())
            .with_u32("virtual-timer-interrupt", *virtual_timer_interrupt)
            .with_u32("physical-timer-interrupt", *physical_timer_interrupt)
            .with_optional_u32("pmu-interrupt", *pmu_interrupt)
            .with_optional_u64("stolen-time", *stolen_time)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            id: reader.u32("id")?,
            features: reader.u32("features")?,
            registers: decode_registers(reader)?,
            mp_state: reader.bytes("mp-state")?,
            events: reader.bytes("events")?,
            virtual_timer_interrupt: reader.u32("virtual-timer-interrupt")?,
            physical_timer_interrupt: reader.u32("physical-timer-interrupt")?,
            pmu_interrupt: reader.optional_u32("pmu-interrupt")?,
            stolen_time: reader.optional_u64("stolen-time")?,
        })
    }
}

/// The list of registers: each number says how long the value behind it is.
fn decode_registers(reader: &mut Reader<'_>) -> Result<Vec<(u64, Vec<u8>)>, DecodeError> {
    let bytes = reader.bytes("registers")?;
    let mut rest = bytes.as_slice();
    let mut registers = Vec::new();
    while let Some((number, behind)) = rest.split_first_chunk::<NUMBER>() {
        let number = u64::from_be_bytes(*number);
        let Some(size) = register_size(number) else {
            return Err(reader.invalid("registers", format!("has {number:#x}, larger than any register")));
        };
        let Some((value, behind)) = behind.split_at_checked(size) else {
            return Err(reader.invalid("registers", format!("ends within the value of {number:#x}")));
        };
        registers.push((number, value.to_vec()));
        rest = behind;
    }
    if !rest.is_empty() {
        return Err(reader.invalid("registers", "ends within a number"));
    }
    distinct(reader, "registers", registers.iter().map(|(number, _)| *number))?;
    Ok(registers)
}

/// What the vCPUs share: the counter and the interrupt controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatformV1 {
    /// What is taken from the host's counter to give both of the guest's.
    pub counter_offset: u64,
    /// The host's counter when the guest stood still.
    pub counter: u64,
    /// The counter's frequency in Hz, which the guest reads in CNTFRQ_EL0.
    pub counter_frequency: u64,
    /// The interrupt controller.
    pub gic: GicV1,
    /// The real-time clock.
    pub rtc: RtcV1,
}

impl Record for PlatformV1 {
    const COMPATIBLE: &'static str = "kho-vmm,aarch64-platform-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { counter_offset, counter, counter_frequency, gic, rtc } = self;
        node.with_u64("counter-offset", *counter_offset)
            .with_u64("counter", *counter)
            .with_u64("counter-frequency", *counter_frequency)
            .with_child(to_node(names::GIC, gic))
            .with_child(to_node(names::RTC, rtc))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            counter_offset: reader.u64("counter-offset")?,
            counter: reader.u64("counter")?,
            counter_frequency: reader.u64("counter-frequency")?,
            gic: reader.child(names::GIC)?,
            rtc: reader.child(names::RTC)?,
        })
    }
}

/// A GICv3: what its distributor, redistributors and translation service hold outside of guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GicV1 {
    /// The distributor's registers as offset and value.
    pub distributor: Vec<(u32, u32)>,
    /// The levels of the shared interrupts' lines: for each 32 of them, the first one's number and a bit for each.
    pub lines: Vec<(u32, u32)>,
    /// What belongs to one vCPU each.
    pub redistributors: Vec<RedistributorV1>,
    /// The interrupt translation service, where there is one.
    pub its: Option<ItsV1>,
}

impl Record for GicV1 {
    const COMPATIBLE: &'static str = "kho-vmm,gic-v3-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { distributor, lines, redistributors, its } = self;
        node.with_bytes("distributor", encode_words(distributor))
            .with_bytes("lines", encode_words(lines))
            .with_children(redistributors.iter().map(RedistributorV1::to_node))
            .with_children(its.iter().map(|its| to_node(names::ITS, its)))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            distributor: decode_words(reader, "distributor")?,
            lines: decode_words(reader, "lines")?,
            redistributors: reader.children(names::REDISTRIBUTOR)?,
            its: reader.optional_child(names::ITS)?,
        })
    }
}

/// What a GICv3 has for one vCPU: its redistributor and its CPU interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedistributorV1 {
    /// The vCPU's MPIDR_EL1.
    pub mpidr: u64,
    /// The redistributor's registers as offset and value.
    pub registers: Vec<(u32, u32)>,
    /// The CPU interface's registers as encoding and value.
    pub cpu_interface: Vec<(u32, u64)>,
    /// The levels of the private interrupts' lines, one bit each.
    pub lines: u32,
}

impl RedistributorV1 {
    /// The node `redistributor@<mpidr>`.
    pub fn to_node(&self) -> Node {
        to_node(&format!("{}@{:x}", names::REDISTRIBUTOR, self.mpidr), self)
    }
}

impl Record for RedistributorV1 {
    const COMPATIBLE: &'static str = "kho-vmm,gic-v3-redistributor-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { mpidr, registers, cpu_interface, lines } = self;
        node.with_u64("mpidr", *mpidr)
            .with_bytes("registers", encode_words(registers))
            .with_bytes("cpu-interface", encode_double_words(cpu_interface))
            .with_u32("lines", *lines)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let redistributor = Self {
            mpidr: reader.u64("mpidr")?,
            registers: decode_words(reader, "registers")?,
            cpu_interface: decode_double_words(reader, "cpu-interface")?,
            lines: reader.u32("lines")?,
        };
        if reader.unit_address() != Some(&format!("{:x}", redistributor.mpidr)) {
            return Err(reader.invalid("mpidr", "is not the one in the node's name"));
        }
        Ok(redistributor)
    }
}

/// An interrupt translation service: its registers. Its tables are in guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ItsV1 {
    /// Its registers as offset and value.
    pub registers: Vec<(u32, u64)>,
}

impl Record for ItsV1 {
    const COMPATIBLE: &'static str = "kho-vmm,gic-v3-its-v1";

    fn encode(&self, node: Node) -> Node {
        let Self { registers } = self;
        node.with_bytes("registers", encode_double_words(registers))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { registers: decode_double_words(reader, "registers")? })
    }
}

fn encode_words(entries: &[(u32, u32)]) -> Vec<u8> {
    entries.iter().flat_map(|(number, value)| [number.to_be_bytes(), value.to_be_bytes()]).flatten().collect()
}

fn decode_words(reader: &mut Reader<'_>, name: &'static str) -> Result<Vec<(u32, u32)>, DecodeError> {
    let entries: Vec<_> = reader
        .entries::<WORD>(name)?
        .iter()
        .map(|&[a, b, c, d, ref value @ ..]| (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes(*value)))
        .collect();
    distinct(reader, name, entries.iter().map(|(number, _)| u64::from(*number)))?;
    Ok(entries)
}

fn encode_double_words(entries: &[(u32, u64)]) -> Vec<u8> {
    let mut list = Vec::with_capacity(entries.len() * DOUBLE_WORD);
    for (number, value) in entries {
        list.extend_from_slice(&number.to_be_bytes());
        list.extend_from_slice(&value.to_be_bytes());
    }
    list
}

fn decode_double_words(reader: &mut Reader<'_>, name: &'static str) -> Result<Vec<(u32, u64)>, DecodeError> {
    let entries: Vec<_> = reader
        .entries::<DOUBLE_WORD>(name)?
        .iter()
        .map(|&[a, b, c, d, ref value @ ..]| (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(*value)))
        .collect();
    distinct(reader, name, entries.iter().map(|(number, _)| u64::from(*number)))?;
    Ok(entries)
}

/// Refuses a list that says two things of one register: which of them would count?
fn distinct(
    reader: &Reader<'_>,
    name: &'static str,
    mut numbers: impl Iterator<Item = u64>,
) -> Result<(), DecodeError> {
    let mut seen = BTreeSet::new();
    match numbers.find(|&number| !seen.insert(number)) {
        Some(number) => Err(reader.invalid(name, format!("has {number:#x} twice"))),
        None => Ok(()),
    }
}
