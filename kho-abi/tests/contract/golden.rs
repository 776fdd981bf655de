//! Documents on disk, as a version that has been released wrote them.
//!
//! They are never written again: where one of these tests fails, the layout has changed, and needs a `compatible` and
//! a golden file of its own beside the old ones.

use std::fs;
use std::path::Path;

use kho_abi::document::index::IndexV2;
use kho_abi::document::machine::MachineV3;
use kho_abi::document::{fdt, header};

use crate::sample;

fn golden(file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(file);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn vm_v2_decodes_to_its_value() {
    let machines = [
        ("vm-v2-x86_64.bin", sample::machine()),
        ("vm-v2-aarch64.bin", sample::aarch64_machine()),
        ("vm-v2-serial-v2.bin", sample::machine_with_backlog()),
    ];
    for (file, machine) in machines {
        assert_eq!(MachineV3::from_bytes(&golden(file)).unwrap(), machine, "{file}");
    }
}

#[test]
fn vm_v3_decodes_to_its_value_and_encodes_to_its_bytes() {
    let machines = [
        ("vm-v3-x86_64.bin", sample::paused(sample::machine_with_backlog())),
        ("vm-v3-aarch64.bin", sample::paused(sample::aarch64_machine())),
    ];
    for (file, machine) in machines {
        assert_eq!(MachineV3::from_bytes(&golden(file)).unwrap(), machine, "{file}");
        assert!(machine.to_bytes().unwrap() == golden(file), "{file}");
    }
}

#[test]
fn documents_of_every_architecture_print_on_this_one() {
    for architecture in ["x86_64", "aarch64"] {
        let sealed = golden(&format!("vm-v3-{architecture}.bin"));
        let text = fdt::print(header::open(&sealed).unwrap()).unwrap();
        for part in [&format!("architecture = \"{architecture}\""), "platform {", "vcpu@0 {", "serial@3f8 {"] {
            assert!(text.contains(part), "no {part} in:\n{text}");
        }
    }
}

#[test]
fn index_v1_decodes_to_its_value() {
    assert_eq!(IndexV2::from_bytes(&golden("index-v1.bin")).unwrap(), sample::before_clock(sample::index()));
}

#[test]
fn index_v2_decodes_to_its_value() {
    assert_eq!(IndexV2::from_bytes(&golden("index-v2.bin")).unwrap(), sample::index());
}

#[test]
fn index_v2_encodes_to_its_bytes() {
    assert!(sample::index().to_bytes().unwrap() == golden("index-v2.bin"));
}

#[test]
fn index_v2_with_timeline_v2_decodes_to_its_value() {
    assert_eq!(IndexV2::from_bytes(&golden("index-v2-timeline-v2.bin")).unwrap(), sample::index_with_devices_stopped());
}

#[test]
fn index_v2_with_timeline_v2_encodes_to_its_bytes() {
    assert!(sample::index_with_devices_stopped().to_bytes().unwrap() == golden("index-v2-timeline-v2.bin"));
}

#[test]
fn index_v2_with_entry_v2_decodes_to_its_value() {
    assert_eq!(IndexV2::from_bytes(&golden("index-v2-entry-v2.bin")).unwrap(), sample::index_with_checksums());
}

#[test]
fn index_v2_with_entry_v2_encodes_to_its_bytes() {
    assert!(sample::index_with_checksums().to_bytes().unwrap() == golden("index-v2-entry-v2.bin"));
}
