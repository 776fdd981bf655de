//! What differs between two documents, in the field's terms: which register of which vCPU.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use kho_abi::document::fdt;
use kho_abi::document::node::Node;
use serde::Serialize;

use super::document::{open, shown, text};
use super::parts::{self, Part, WORD};

/// Something that is not the same in two documents.
#[derive(Clone, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Difference {
    /// The node.
    path: String,
    /// What of it: a property, or a part of one.
    what: String,
    /// In the first; None where it is missing.
    one: Option<String>,
    /// In the second.
    other: Option<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "missing".to_owned());
        let path = if self.path.is_empty() { "/" } else { &self.path };
        write!(formatter, "{path} {}: {} | {}", self.what, shown(&self.one), shown(&self.other))
    }
}

/// All that is not the same.
pub fn diff(one: &[u8], other: &[u8]) -> Result<Vec<Difference>> {
    let mut differences = Vec::new();
    compare(&fdt::read(open(one)?.1)?, &fdt::read(open(other)?.1)?, "", &mut differences);
    Ok(differences)
}

fn compare(one: &Node, other: &Node, path: &str, differences: &mut Vec<Difference>) {
    let names: BTreeSet<&String> = one.properties.keys().chain(other.properties.keys()).collect();
    // A struct and its successor may travel side by side: what both hold is told once.
    let mut told = BTreeSet::new();
    for name in names.into_iter().filter(|name| one.property(name) != other.property(name)) {
        for (what, one, other) in parted(one, other, name) {
            let difference = Difference { path: path.to_owned(), what, one, other };
            if told.insert(difference.clone()) {
                differences.push(difference);
            }
        }
    }
    let names: BTreeSet<&String> = one.children.iter().chain(&other.children).map(|child| &child.name).collect();
    for name in names {
        let path = format!("{path}/{name}");
        match (one.child(name), other.child(name)) {
            (Some(one), Some(other)) => compare(one, other, &path, differences),
            (one, _) => {
                let there = |there: bool| there.then(|| "there".to_owned());
                let (one, other) = (there(one.is_some()), there(one.is_none()));
                differences.push(Difference { path, what: "node".to_owned(), one, other });
            }
        }
    }
}

/// What differs, with its value in one and in the other.
type Told = (String, Option<String>, Option<String>);

/// What of a property differs. Where its parts have names, they are paired by them, wherever they are: two kernels need not list
/// their registers in the same order.
fn parted(one: &Node, other: &Node, property: &str) -> Vec<Told> {
    let (Some(old), Some(new)) = (one.property(property), other.property(property)) else {
        return vec![(property.to_owned(), one.property(property).map(shown), other.property(property).map(shown))];
    };
    let (Some(one), Some(other)) = (parts::of(one, property), parts::of(other, property)) else {
        return match old.len() == new.len() && old.len() > WORD && (text(old).is_none() || text(new).is_none()) {
            true => words(property, old, new),
            false => vec![(property.to_owned(), Some(shown(old)), Some(shown(new)))],
        };
    };
    let by_name = |parts: &[Part]| -> BTreeMap<String, Vec<u8>> {
        parts.iter().map(|part| (part.name.clone(), part.value.clone())).collect()
    };
    let (old, new) = (by_name(&one), by_name(&other));
    let names = one.iter().chain(other.iter().filter(|part| !old.contains_key(&part.name))).map(|part| &part.name);
    let pairs = names.map(|name| (name, old.get(name), new.get(name))).filter(|(_, one, other)| one != other);
    pairs
        .flat_map(|(name, one, other)| match (one, other) {
            (Some(one), Some(other)) if one.len() == other.len() && one.len() > LONGEST_NUMBER => {
                words(name, one, other)
            }
            (one, other) => vec![(name.clone(), one.map(|value| number(value)), other.map(|value| number(value)))],
        })
        .collect()
}

/// The bytes of a number that people can compare.
const LONGEST_NUMBER: usize = 16;

/// A number with the lowest byte first.
fn number(bytes: &[u8]) -> String {
    match bytes.len() {
        0..=LONGEST_NUMBER => {
            format!("{:#x}", bytes.iter().rev().fold(0_u128, |value, byte| value << 8 | u128::from(*byte)))
        }
        _ => shown(bytes),
    }
}

/// Which words differ in two values of one size.
fn words(name: &str, one: &[u8], other: &[u8]) -> Vec<Told> {
    let words = one.chunks(WORD).zip(other.chunks(WORD)).enumerate().filter(|(_, (one, other))| one != other);
    let told =
        |(index, (one, other))| (format!("{name} at byte {}", index * WORD), Some(number(one)), Some(number(other)));
    words.map(told).collect()
}

#[cfg(test)]
mod tests {
    use kho_abi::document::header;

    use super::super::document::COMPATIBLE;
    use super::*;

    fn sealed(node: &Node) -> Vec<u8> {
        header::seal(&fdt::write(node).unwrap()).unwrap()
    }

    fn machine(rax: u64, devices: &[&str]) -> Node {
        let regs: Vec<u8> = [rax, 2, 3].iter().flat_map(|value| value.to_le_bytes()).collect();
        let vcpu = Node::new("vcpu@0")
            .with_str(COMPATIBLE, "kho-vmm,x86_64-vcpu-v1")
            .with_bytes("regs", regs)
            .with_u32("id", 0);
        Node::new("")
            .with_str("compatible", "kho-vmm,vm-v3")
            .with_str("name", "a")
            .with_child(vcpu)
            .with_children(devices.iter().map(|name| Node::new(*name)))
    }

    #[test]
    fn differences_are_told_by_register_and_node() {
        let differences = diff(&sealed(&machine(1, &["rng"])), &sealed(&machine(9, &["disk"]))).unwrap();
        let told: Vec<String> = differences.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["/disk node: missing | there", "/rng node: there | missing", "/vcpu@0 rax: 0x1 | 0x9"]);
        let same = sealed(&machine(1, &[]));
        assert_eq!(diff(&same, &same).unwrap(), []);
    }

    fn golden(name: &str) -> Node {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        fdt::read(open(&std::fs::read(path).unwrap()).unwrap().1).unwrap()
    }

    /// What is told when properties of that node are changed.
    fn told(document: &str, path: &[&str], change: impl Fn(&mut BTreeMap<String, Vec<u8>>)) -> Vec<String> {
        let (one, mut other) = (golden(document), golden(document));
        let mut node = &mut other;
        for name in path {
            node = node.children.iter_mut().find(|child| child.name == *name).unwrap();
        }
        change(&mut node.properties);
        let differences = diff(&sealed(&one), &sealed(&other)).unwrap();
        differences.iter().map(ToString::to_string).collect()
    }

    /// What is told when all bits of one byte of a property change.
    fn told_of_byte(document: &str, path: &[&str], property: &str, byte: usize) -> String {
        let told = told(document, path, |properties| {
            let byte = &mut properties.get_mut(property).unwrap()[byte];
            *byte = !*byte;
        });
        assert_eq!(told.len(), 1, "{told:?}");
        told[0].clone()
    }

    const X86_64: &str = "vm-v3-x86_64.bin";
    const AARCH64: &str = "vm-v3-aarch64.bin";
    const VCPU: [&str; 2] = ["vcpus", "vcpu@1"];

    #[test]
    fn a_document_does_not_differ_from_itself() {
        for name in [X86_64, AARCH64, "vm-v2-x86_64.bin", "vm-v2-aarch64.bin"] {
            let document = sealed(&golden(name));
            assert_eq!(diff(&document, &document).unwrap(), [], "{name}");
        }
    }

    #[test]
    fn every_payload_of_a_vcpu_of_x86_64_is_told_in_the_fields_terms() {
        let changed = |property: &str, byte: usize| {
            let told = told_of_byte(X86_64, &VCPU, property, byte);
            told.strip_prefix("/vcpus/vcpu@1 ").unwrap().split_once(": ").unwrap().0.to_owned()
        };
        let cases = [
            ("regs", 128, "rip"),
            ("sregs", 12, "cs selector"),
            ("sregs", 6 * 24 + 8, "tr limit"),
            ("sregs", 8 * 24 + 16, "idt base"),
            ("sregs", 8 * 24 + 32, "cr0"),
            ("sregs", 8 * 24 + 32 + 40, "efer"),
            ("sregs", 8 * 24 + 32 + 56, "sregs at byte 280"),
            ("xsave", 24, "mxcsr"),
            ("xsave", 160 + 15 * 16 + 3, "xmm15"),
            ("xsave", 513, "XSTATE_BV"),
            ("xsave", 576, "xsave at byte 576"),
            ("debug-registers", 40, "dr7"),
            ("lapic", 0x80, "LAPIC TPR"),
            ("lapic", 0x231, "LAPIC IRR3"),
            ("lapic", 0x320, "LAPIC LVT timer"),
            ("lapic", 0x324, "lapic at byte 804"),
            ("mp-state", 0, "mp-state"),
            ("events", 8, "interrupt injected"),
            ("events", 16, "SIPI vector"),
            ("events", 60, "exception payload"),
            ("msrs", 11, "IA32_TSC"),
            ("msrs", 16, "STAR"),
        ];
        for (property, byte, name) in cases {
            assert_eq!(changed(property, byte), name, "byte {byte} of {property}");
        }
    }

    #[test]
    fn the_platform_of_x86_64_is_told_in_the_fields_terms() {
        let cases = [
            ("ioapic", 24 + 8, "IOAPIC redirection 1: "),
            ("pic-slave", 2, "PIC slave IMR: "),
            ("pit2", 24 + 15, "PIT channel 1 gate: "),
            ("pit2", 76, "pit2 at byte 76: "),
        ];
        for (property, byte, name) in cases {
            let told = told_of_byte(X86_64, &["platform"], property, byte);
            assert!(told.starts_with(&format!("/platform {name}")), "{told}");
        }
    }

    #[test]
    fn msrs_are_paired_by_index() {
        let told = told(X86_64, &VCPU, |properties| {
            let msrs = properties.get_mut("msrs").unwrap();
            // The list is turned round, STAR changes, and the last becomes one that has no name.
            let mut entries: Vec<Vec<u8>> = msrs.chunks(12).map(Vec::from).collect();
            entries[1][11] = 7;
            entries[2][0] = 0x5b;
            *msrs = entries.into_iter().rev().flatten().collect();
        });
        assert_eq!(
            told,
            [
                "/vcpus/vcpu@1 STAR: 0x8000000000000000 | 0x8000000000000007",
                "/vcpus/vcpu@1 MSR_KVM_ASYNC_PF_EN: 0x0 | missing",
                "/vcpus/vcpu@1 msr 0x5b564d02: missing | 0x0",
            ]
        );
    }

    #[test]
    fn what_two_structs_hold_is_told_once() {
        let document = |cr3: u64| {
            let registers: Vec<u8> =
                (0_u64..35).map(|word| if word == 30 { cr3 } else { 0 }).flat_map(u64::to_le_bytes).collect();
            let vcpu = Node::new("vcpu@0").with_str(COMPATIBLE, "kho-vmm,x86_64-vcpu-v1");
            sealed(
                &Node::new("").with_child(vcpu.with_bytes("sregs", registers.clone()).with_bytes("sregs2", registers)),
            )
        };
        let differences = diff(&document(0x1000), &document(0x2000)).unwrap();
        let told: Vec<String> = differences.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["/vcpu@0 cr3: 0x1000 | 0x2000"]);
    }

    #[test]
    fn the_registers_of_a_vcpu_of_aarch64_are_told_as_the_manual_spells_them() {
        // Where in the list each value begins.
        let cases = [
            (8, "x0: 0xccaf9275583b1e01 | 0xccaf9275583b1efe"),
            (24, "v0: 0xb5987b5e412407eacdb093765"),
            (48, "fpsr: 0x5a3d2003 | 0x5a3d20fc"),
            (60, "ID_AA64PFR0_EL1: "),
            (76, "CNTVCT_EL0: "),
            (92, "PSCI version: "),
            (117, "lengths of SVE vectors at byte 8: "),
        ];
        for (byte, name) in cases {
            let told = told_of_byte(AARCH64, &VCPU, "registers", byte);
            assert!(told.starts_with(&format!("/vcpus/vcpu@1 {name}")), "{told}");
        }
        let events = |byte: usize| told_of_byte(AARCH64, &VCPU, "events", byte);
        assert!(events(2).contains(" external data abort pending: 0x43 | 0xbc"));
        assert!(events(8).contains(" SError syndrome: "));
    }

    #[test]
    fn registers_are_paired_by_number() {
        let told = told(AARCH64, &VCPU, |properties| {
            let registers = properties.get_mut("registers").unwrap();
            // x0 moves to the end with another value, and SCTLR_EL1 comes before it.
            let mut x0: Vec<u8> = registers.drain(..16).collect();
            x0[8..].copy_from_slice(&9_u64.to_le_bytes());
            registers.extend_from_slice(&0x6030_0000_0013_c080_u64.to_be_bytes());
            registers.extend_from_slice(&5_u64.to_le_bytes());
            registers.extend(x0);
        });
        let told: Vec<&str> = told.iter().map(|told| told.strip_prefix("/vcpus/vcpu@1 ").unwrap()).collect();
        assert_eq!(told, ["x0: 0xccaf9275583b1e01 | 0x9", "SCTLR_EL1: missing | 0x5"]);
    }

    #[test]
    fn the_interrupt_controller_of_aarch64_is_told_by_register() {
        let gic = ["platform", "gic"];
        assert_eq!(told_of_byte(AARCH64, &gic, "distributor", 7), "/platform/gic GICD_IIDR: 0x4b00243b | 0x4b0024c4");
        assert!(told_of_byte(AARCH64, &gic, "distributor", 31).contains(" GICD_IROUTER33: 0x1 | 0xfe"));
        assert!(told_of_byte(AARCH64, &gic, "lines", 12).contains(" lines of interrupts from 64 on: "));
        let redistributor = ["platform", "gic", "redistributor@80000001"];
        let told = |property: &str, byte: usize| {
            let told = told_of_byte(AARCH64, &redistributor, property, byte);
            told.strip_prefix("/platform/gic/redistributor@80000001 ").unwrap().to_owned()
        };
        assert_eq!(told("registers", 15), "GICR_PROPBASER: 0x4005018f | 0x40050170");
        assert_eq!(told("registers", 31), "GICR_ISACTIVER0: 0x8000000 | 0x80000ff");
        assert_eq!(told("cpu-interface", 35), "ICC_PMR_EL1: 0xf0 | 0xf");
        let its = told_of_byte(AARCH64, &["platform", "gic", "its"], "registers", 11);
        assert_eq!(its, "/platform/gic/its GITS_CBASER: 0x9800000040010000 | 0x98000000400100ff");
    }

    #[test]
    fn lists_that_no_machine_writes_are_told_as_bytes() {
        let cut = told(AARCH64, &VCPU, |properties| properties.get_mut("registers").unwrap().truncate(20));
        assert_eq!(cut.len(), 1);
        assert!(cut[0].starts_with("/vcpus/vcpu@1 registers: "), "{cut:?}");
        // One MSR twice: which of them would be meant?
        let twice = told(X86_64, &VCPU, |properties| properties.get_mut("msrs").unwrap().copy_within(0..4, 12));
        assert_eq!(twice.len(), 1);
        assert!(twice[0].starts_with("/vcpus/vcpu@1 msrs at byte 8: "), "{twice:?}");
    }
}
