//! A VM's document: the root record of all its state.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::device::SerialV2;
use super::memory::RamRangeV1;
use super::node::Node;
use super::platform::PlatformState;
use super::record::{Reader, Record, from_node, read_node, to_node};
use super::vcpu::VcpuState;
use super::virtio::VirtioMmioV1;
use super::{DecodeError, DocumentError, EncodeError, Problem, fdt, header};
use crate::names;

/// The most RAM ranges of a VM.
pub const RAM_RANGES_MAX: usize = 64;
/// The most vCPUs of a VM. (The cap on the document's size is reached earlier by most.)
pub const VCPUS_MAX: usize = 1024;

/// What the operator asked for when the VM was first started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigV2 {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Where the serial port leads, in the words of the command line.
    pub serial: String,
    /// The virtio devices by slot: each its kind, and behind a colon the words of the command line, where it has any.
    pub devices: Vec<String>,
}

impl Record for ConfigV2 {
    const COMPATIBLE: &'static str = "kho-vmm,config-v2";

    fn encode(&self, node: Node) -> Node {
        let Self { cpus, memory, serial, devices } = self;
        node.with_u32("cpus", *cpus)
            .with_u64("memory", *memory)
            .with_str("serial", serial)
            .with_strings("devices", devices.iter().map(String::as_str))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            cpus: reader.u32("cpus")?,
            memory: reader.u64("memory")?,
            serial: reader.string("serial")?,
            devices: reader.strings("devices")?,
        })
    }
}

/// What the root of a machine calls itself that does not say whether its guest is paused: it runs.
const MACHINE_V2: &str = "kho-vmm,vm-v2";

/// A whole VM but the content of its RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineV3 {
    /// The VM's name.
    pub name: String,
    /// The architecture it runs on, as `uname -m` says it.
    pub architecture: String,
    /// How many updates the VM has been through, this one included.
    pub generation: u64,
    /// Whether the operator has paused the guest, so that it is not to run before somebody wants it to.
    pub paused: bool,
    /// What the operator asked for.
    pub config: ConfigV2,
    /// Guest RAM.
    pub ram: Vec<RamRangeV1>,
    /// Interrupt controllers, timers, clock.
    pub platform: PlatformState,
    /// The vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// The first serial port.
    pub serial: SerialV2,
    /// The virtio devices by slot, as many as the configuration names.
    pub virtio: Vec<VirtioMmioV1>,
}

impl Record for MachineV3 {
    const COMPATIBLE: &'static str = "kho-vmm,vm-v3";

    fn encode(&self, node: Node) -> Node {
        let Self { name, architecture, generation, paused, config, ram, platform, vcpus, serial, virtio } = self;
        let slots = virtio.iter().enumerate();
        let devices = Node::new(names::DEVICES)
            .with_child(serial.to_node(names::SERIAL))
            .with_children(slots.map(|(slot, device)| to_node(&format!("{}@{slot}", names::VIRTIO), device)));
        node.with_str("name", name)
            .with_str("architecture", architecture)
            .with_u64("generation", *generation)
            .with_u8("paused", (*paused).into())
            .with_child(to_node(names::CONFIG, config))
            .with_child(Node::new(names::MEMORY).with_children(ram.iter().map(RamRangeV1::to_node)))
            .with_child(platform.to_node())
            .with_child(Node::new(names::VCPUS).with_children(vcpus.iter().map(VcpuState::to_node)))
            .with_child(devices)
    }

    /// What needs no host to be known wrong is refused here, so that whoever holds a `MachineV3` that was decoded need
    /// not ask again: ranges of whole pages that overlap neither in the guest nor in their memfds and add up to the
    /// memory asked for, as many vCPUs and devices as asked for, one architecture throughout.
    fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        decode_machine(reader, |reader| reader.flag("paused"))
    }
}

/// The records in all children called `prefix@0`, `prefix@1`, and so on.
pub(super) fn decode_numbered<R: Record>(reader: &mut Reader<'_>, prefix: &str) -> Result<Vec<R>, DecodeError> {
    let mut next = 0_u32;
    reader.each(prefix, |reader| {
        if reader.unit_address() != Some(next.to_string().as_str()) {
            return Err(reader.invalid("number", format!("is not {next}, which comes next")));
        }
        next = next.saturating_add(1);
        reader.record()
    })
}

/// Reads a machine of any version; `paused` reads what differs.
fn decode_machine(
    reader: &mut Reader<'_>,
    paused: impl FnOnce(&mut Reader<'_>) -> Result<bool, DecodeError>,
) -> Result<MachineV3, DecodeError> {
    let name = reader.string("name")?;
    if !names::is_valid_vm_name(&name) {
        return Err(reader.invalid("name", "cannot be a VM's"));
    }
    let architecture = reader.string("architecture")?;
    let generation = reader.u64("generation")?;
    let paused = paused(reader)?;
    let config: ConfigV2 = reader.child(names::CONFIG)?;
    let ram = reader.group(names::MEMORY, |memory| decode_ram(memory, config.memory))?;
    let platform = reader.group(names::PLATFORM, PlatformState::decode)?;
    if platform.architecture() != architecture {
        return Err(reader.invalid("platform", format!("is of {}, not {architecture}", platform.architecture())));
    }
    let vcpus = reader.group(names::VCPUS, |vcpus| decode_vcpus(vcpus, config.cpus, &architecture))?;
    if platform.vcpus().is_some_and(|count| count != vcpus.len()) {
        return Err(reader.invalid("platform", format!("is not that of {} vCPUs", vcpus.len())));
    }
    let (serial, virtio) = reader.group(names::DEVICES, |devices| {
        let serial = devices.group(names::SERIAL, SerialV2::decode_any)?;
        let virtio: Vec<VirtioMmioV1> = decode_numbered(devices, names::VIRTIO)?;
        if virtio.len() != config.devices.len() {
            let reason = format!("devices are {}, {} were asked for", virtio.len(), config.devices.len());
            return Err(devices.invalid("virtio", reason));
        }
        Ok((serial, virtio))
    })?;
    Ok(MachineV3 { name, architecture, generation, paused, config, ram, platform, vcpus, serial, virtio })
}

/// Reads a machine of this version or the previous one.
fn decode_any(reader: &mut Reader<'_>) -> Result<MachineV3, DecodeError> {
    if reader.compatible()? == MACHINE_V2 { decode_machine(reader, |_| Ok(false)) } else { reader.record() }
}

fn decode_ram(memory: &mut Reader<'_>, asked_for: u64) -> Result<Vec<RamRangeV1>, DecodeError> {
    let ram: Vec<RamRangeV1> = memory.children(names::RANGE)?;
    if ram.len() > RAM_RANGES_MAX {
        return Err(memory.error(Problem::TooMany { what: "RAM ranges", max: RAM_RANGES_MAX }));
    }
    let mut by_address: Vec<_> = ram.iter().map(|range| (range.gpa, range.size)).collect();
    by_address.sort_unstable();
    for pair in by_address.windows(2) {
        if let [(gpa, size), (next, _)] = pair
            && next - gpa < *size
        {
            return Err(memory.invalid("RAM", format!("at {gpa:#x} overlaps that at {next:#x}")));
        }
    }
    let mut by_file: Vec<_> = ram.iter().map(|range| (range.token, range.offset, range.size)).collect();
    by_file.sort_unstable();
    for pair in by_file.windows(2) {
        if let [(token, offset, size), (next_token, next, _)] = pair
            && token == next_token
            && next - offset < *size
        {
            return Err(memory.invalid("RAM", format!("uses file {token:#x} twice at {next:#x}")));
        }
    }
    match ram.iter().try_fold(0_u64, |sum, range| sum.checked_add(range.size)) {
        Some(sum) if sum == asked_for && sum != 0 => Ok(ram),
        _ => Err(memory.invalid("RAM", format!("does not add up to the {asked_for:#x} bytes asked for"))),
    }
}

fn decode_vcpus(vcpus: &mut Reader<'_>, asked_for: u32, architecture: &str) -> Result<Vec<VcpuState>, DecodeError> {
    let states = vcpus.each(names::VCPU, VcpuState::decode)?;
    if states.len() > VCPUS_MAX {
        return Err(vcpus.error(Problem::TooMany { what: "vCPUs", max: VCPUS_MAX }));
    }
    if states.is_empty() || u32::try_from(states.len()) != Ok(asked_for) {
        return Err(vcpus.invalid("vCPUs", format!("are {}, {asked_for} were asked for", states.len())));
    }
    let mut ids = BTreeSet::new();
    for state in &states {
        if !ids.insert(state.id()) {
            return Err(vcpus.invalid("vCPU", format!("{} is there twice", state.id())));
        }
        if state.architecture() != architecture {
            return Err(
                vcpus.invalid("vCPU", format!("{} is of {}, not {architecture}", state.id(), state.architecture()))
            );
        }
    }
    Ok(states)
}

impl MachineV3 {
    /// The sealed document.
    ///
    /// # Errors
    /// When [`from_bytes`](Self::from_bytes) would refuse it: found out here, while the guest can still run on.
    pub fn to_bytes(&self) -> Result<Vec<u8>, EncodeError> {
        let root = to_node("", self);
        from_node::<Self>(&root)?;
        header::seal(&fdt::write(&root)?)
    }

    /// The VM that a sealed document describes, be it of this version or the previous one.
    ///
    /// # Errors
    /// When the seal is broken, the tree malformed, or anything in it missing, unknown or impossible.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DocumentError> {
        Ok(read_node(&fdt::read(header::open(bytes)?)?, decode_any)?)
    }
}
