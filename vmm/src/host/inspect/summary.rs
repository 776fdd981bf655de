//! What a file is about, before all that is in it: a VM's document, an index, a KHO FDT. One that is of another version, or damaged,
//! says why it has none, and its tree is shown all the same.

use anyhow::Result;
use kho_abi::document::header::Kind;
use kho_abi::document::index::IndexV2;
use kho_abi::document::machine::MachineV3;
use kho_abi::document::timeline::TimelineV3;
use kho_abi::kernel::root::Root;
use serde_json::{Map, Value, json};

use super::Outline;
use crate::host::report;

/// The summary of a file's bytes.
pub fn of(bytes: &[u8]) -> (Outline, Value) {
    let made = match bytes {
        _ if bytes.starts_with(&Kind::Machine.magic()) => machine(bytes),
        _ if bytes.starts_with(&Kind::Index.magic()) => index(bytes),
        _ => root(bytes),
    };
    made.unwrap_or_else(|error| {
        let reason = format!("{error:#}");
        (Outline::new("summary", format!("none, as it does not decode: {reason}")), json!({"unreadable": reason}))
    })
}

fn machine(bytes: &[u8]) -> Result<(Outline, Value)> {
    let machine = MachineV3::from_bytes(bytes)?;
    let memory: u64 = machine.ram.iter().map(|range| range.size).sum();
    let ranges = machine.ram.iter().map(|range| {
        let place = format!("at {:#x}, {:#x} of file {:#x}", range.gpa, range.offset, range.token);
        Outline::memory(place, range.size)
    });
    let (vcpus, devices) = (machine.vcpus.len(), machine.virtio.len());
    let title = format!("VM {}, {}, live update number {}", machine.name, machine.architecture, machine.generation);
    let outline = Outline::new("summary", title)
        .with(Outline::new("memory", report::bytes(memory)).with_all(ranges))
        .with(Outline::new("vCPUs", vcpus.to_string()))
        .with(Outline::new("devices", format!("a serial port, {devices} virtio devices")));
    let json = json!({
        "name": machine.name, "architecture": machine.architecture, "generation": machine.generation,
        "memory_bytes": memory, "vcpus": vcpus, "virtio_devices": devices,
    });
    Ok((outline, json))
}

fn index(bytes: &[u8]) -> Result<(Outline, Value)> {
    let index = IndexV2::from_bytes(bytes)?;
    let title = format!("live update number {}, written under Linux {}", index.generation, index.kernel);
    let (mut outline, mut vms) = (Outline::new("summary", title), Vec::new());
    for vm in &index.vms {
        let mut timeline = index.timeline.clone();
        timeline.merge(&vm.marks);
        let memory: u64 = vm.ram.iter().map(|(_, size)| size).sum();
        let (lines, phases) = self::timeline(&timeline);
        let document = format!("a document of {}", report::bytes(vm.document_bytes));
        outline =
            outline.with(Outline::memory(format!("VM {}", vm.name), memory).with_value(&document).with_all(lines));
        vms.push(json!({
            "name": vm.name, "session": vm.session, "memory_bytes": memory, "document_bytes": vm.document_bytes,
            "phases": phases,
        }));
    }
    Ok((outline, json!({"generation": index.generation, "kernel": index.kernel, "vms": vms})))
}

/// A line per phase that was reached, with what it took.
fn timeline(timeline: &TimelineV3) -> (Vec<Outline>, Value) {
    let phases = timeline.phases();
    let lines = phases.iter().map(|(phase, ms)| Outline::new(phase.name(), format!("{ms:.1} ms"))).collect();
    let phases: Map<String, Value> = phases.iter().map(|(phase, ms)| (phase.name().to_owned(), json!(ms))).collect();
    (lines, phases.into())
}

/// Integers in a KHO FDT are in the byte order of the machine, unlike those of any other.
fn root(bytes: &[u8]) -> Result<(Outline, Value)> {
    let root = Root::decode(bytes, "/")?;
    let subtree = |name: &str, address: u64, size: Option<u64>| {
        let size = size.map_or_else(String::new, |size| format!(", {}", report::bytes(size)));
        Outline::new(name, format!("at {address:#x}{size}"))
    };
    let outline = Outline::new("summary", format!("what a kernel hands over, {}", root.version.name()))
        .with(Outline::new("map of preserved memory", format!("at {:#x}", root.memory_map)))
        .with_all(root.subtrees.iter().map(|found| subtree(&found.name, found.address, found.size)));
    let subtrees: Map<String, Value> = root
        .subtrees
        .iter()
        .map(|found| (found.name.clone(), json!({"address": found.address, "bytes": found.size})))
        .collect();
    Ok((outline, json!({"version": root.version.name(), "memory_map": root.memory_map, "subtrees": subtrees})))
}

#[cfg(test)]
mod tests {
    use kho_abi::kernel::root::{Subtree, Version};

    use super::*;

    fn golden(name: &str) -> Vec<u8> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        std::fs::read(path).unwrap()
    }

    #[test]
    fn documents_of_both_architectures_are_summed_up_on_either() {
        for architecture in ["x86_64", "aarch64"] {
            let (outline, json) = of(&golden(&format!("vm-v3-{architecture}.bin")));
            assert_eq!(json["architecture"], architecture);
            let text = outline.to_text();
            assert!(text.contains("  memory: ") && text.contains("  vCPUs: 2\n"), "{text}");
        }
    }

    #[test]
    fn an_index_tells_what_each_phase_took() {
        let (outline, json) = of(&golden("index-v2-timeline-v2.bin"));
        assert_eq!(json["vms"][0]["session"], "kho-vmm.golden-1");
        assert!(json["vms"][0]["phases"]["vcpus-stopped"].is_number(), "{json}");
        assert!(outline.to_text().contains("    vcpus-stopped: "), "{}", outline.to_text());
    }

    #[test]
    fn the_kernels_own_tree_is_read_in_its_own_byte_order() {
        let luo = Subtree { name: "LUO".into(), address: 0x1000, size: Some(48) };
        let root = Root { version: Version::V4, memory_map: 0x2000, subtrees: vec![luo] };
        let text = of(&root.encode().unwrap()).0.to_text();
        assert!(text.contains("kho-v4") && text.contains("LUO: at 0x1000, 48 bytes"), "{text}");
    }

    #[test]
    fn what_does_not_decode_says_why() {
        let (outline, json) = of(b"nothing");
        assert!(outline.to_text().contains("none, as it does not decode") && json["unreadable"].is_string());
    }
}
