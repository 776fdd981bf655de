//! What an x86_64 machine's payloads consist of: the structs of the kernel's `arch/x86/include/uapi/asm/kvm.h`.

use kho_abi::document::node::Node;

use super::{Cutter, Part};
use crate::registers::x86_64 as registers;

const GENERAL: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
];

/// The parts of a vCPU's property.
pub fn vcpu(node: &Node, cutter: Cutter<'_>) -> Option<Vec<Part>> {
    let parts = match cutter.property {
        "cpuid" => cpuid(cutter),
        "regs" => cutter.fields(GENERAL, 8),
        "sregs" => special(cutter).gap(32),
        "sregs2" => special(cutter).field("sregs2 flags", 8).fields(numbered("pdptr", 4), 8),
        "xsave" => xsave(node.property("cpuid").unwrap_or_default(), cutter),
        "xcrs" => control(cutter),
        "debug-registers" => cutter.fields(numbered("dr", 4), 8).fields(["dr6", "dr7", "debug-registers flags"], 8),
        "lapic" => (0..cutter.rest.len()).step_by(0x10).fold(cutter, |cutter, offset| match registers::lapic(offset) {
            Some(name) => cutter.field(name, 4).gap(12),
            None => cutter.gap(16),
        }),
        "mp-state" => cutter.field("mp-state", 4),
        "events" => events(cutter),
        "msrs" => return cutter.entries(8, registers::msr),
        _ => return None,
    };
    Some(parts.finish())
}

/// The parts of the platform's property.
pub fn platform(cutter: Cutter<'_>) -> Option<Vec<Part>> {
    let parts = match cutter.property {
        "pic-master" => pic("PIC master", cutter),
        "pic-slave" => pic("PIC slave", cutter),
        "ioapic" => cutter
            .field("IOAPIC base", 8)
            .fields(["IOAPIC IOREGSEL", "IOAPIC ID", "IOAPIC IRR"], 4)
            .gap(4)
            .fields(numbered("IOAPIC redirection ", 24), 8),
        "pit2" => (0..3).fold(cutter, channel).field("PIT flags", 4),
        _ => return None,
    };
    Some(parts.finish())
}

fn numbered(prefix: &str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{prefix}{number}"))
}

fn prefixed(prefix: &str, names: &[&str]) -> impl Iterator<Item = String> {
    names.iter().map(move |name| format!("{prefix} {name}"))
}

/// The 32 bits at a place; zero where there are none.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The size of `struct kvm_cpuid_entry2`.
const CPUID_ENTRY: usize = 40;

fn cpuid(cutter: Cutter<'_>) -> Cutter<'_> {
    const FIELDS: [&str; 10] =
        ["function", "index", "flags", "eax", "ebx", "ecx", "edx", "padding 0", "padding 1", "padding 2"];
    cutter.rest.chunks_exact(CPUID_ENTRY).fold(cutter, |cutter, entry| {
        cutter.fields(prefixed(&format!("CPUID {:#x}.{:x}", word(entry, 0), word(entry, 4)), &FIELDS), 4)
    })
}

/// What `struct kvm_sregs` and `struct kvm_sregs2` have in common.
fn special(cutter: Cutter<'_>) -> Cutter<'_> {
    let cutter = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"].into_iter().fold(cutter, segment);
    let cutter = ["gdt", "idt"].into_iter().fold(cutter, table);
    cutter.fields(["cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"], 8)
}

/// `struct kvm_segment`.
fn segment<'a>(cutter: Cutter<'a>, name: &str) -> Cutter<'a> {
    const ATTRIBUTES: [&str; 10] = ["type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding"];
    cutter
        .field(format!("{name} base"), 8)
        .field(format!("{name} limit"), 4)
        .field(format!("{name} selector"), 2)
        .fields(prefixed(name, &ATTRIBUTES), 1)
}

/// `struct kvm_dtable`.
fn table<'a>(cutter: Cutter<'a>, name: &str) -> Cutter<'a> {
    cutter.field(format!("{name} base"), 8).field(format!("{name} limit"), 2).field(format!("{name} padding"), 6)
}

/// `struct kvm_xcrs`.
fn control(cutter: Cutter<'_>) -> Cutter<'_> {
    const ROOM: u32 = 16;
    let bytes = cutter.rest;
    let count = word(bytes, 0).min(ROOM) as usize;
    (0..count).fold(cutter.gap(8), |cutter, entry| {
        let number = word(bytes, 8 + entry * 16);
        cutter.gap(8).field(format!("XCR{number}"), 8)
    })
}

/// `struct kvm_xsave`: the area of XSAVE in its standard form. Where each component is depends on the processor, and is what CPUID
/// tells the guest in leaf 0xd.
fn xsave<'a>(cpuid: &[u8], cutter: Cutter<'a>) -> Cutter<'a> {
    const LEAF: u32 = 0xd;
    let components = cpuid.chunks_exact(CPUID_ENTRY).filter(|entry| word(entry, 0) == LEAF && word(entry, 4) >= 2);
    let mut components: Vec<_> = components
        .map(|entry| (word(entry, 16) as usize, word(entry, 12) as usize, word(entry, 4)))
        // A size of zero: it does not exist. At zero: it is not in the area, but among what only a kernel saves.
        .filter(|(offset, size, _)| *size != 0 && *offset != 0)
        .collect();
    components.sort_unstable();
    let legacy = cutter
        .fields(["fcw", "fsw"], 2)
        .field("ftw", 1)
        .gap(1)
        .field("fop", 2)
        .fields(["fip", "fdp"], 8)
        .fields(["mxcsr", "mxcsr_mask"], 4)
        .fields(numbered("st", 8), 16)
        .fields(numbered("xmm", 16), 16)
        .gap(96)
        .fields(["XSTATE_BV", "XCOMP_BV"], 8);
    components.into_iter().fold(legacy, |cutter, (offset, size, number)| match offset.checked_sub(cutter.at) {
        Some(gap) => component(number, size, cutter.gap(gap)),
        None => cutter,
    })
}

/// A component of the area of XSAVE.
fn component(number: u32, size: usize, cutter: Cutter<'_>) -> Cutter<'_> {
    let end = cutter.at.saturating_add(size);
    let cutter = match (number, size) {
        (2, 256) => cutter.fields((0..16).map(|register| format!("ymm{register} (upper half)")), 16),
        (3, _) => cutter.fields(numbered("bnd", 4), 16),
        (4, _) => cutter.fields(["bndcfgu", "bndstatus"], 8),
        (5, 64) => cutter.fields(numbered("k", 8), 8),
        (6, 512) => cutter.fields((0..16).map(|register| format!("zmm{register} (upper half)")), 32),
        (7, 1024) => cutter.fields((16..32).map(|register| format!("zmm{register}")), 64),
        (9, _) => cutter.field("pkru", 4),
        (17, _) => cutter.field("TILECFG", size),
        (18, 8192) => cutter.fields(numbered("tmm", 8), 1024),
        (19, 128) => cutter.fields((16..32).map(|register| format!("r{register}")), 8),
        _ => cutter.field(format!("XSAVE component {number}"), size),
    };
    let gap = end.saturating_sub(cutter.at);
    cutter.gap(gap)
}

/// `struct kvm_vcpu_events`.
fn events(cutter: Cutter<'_>) -> Cutter<'_> {
    cutter
        .fields(prefixed("exception", &["injected", "number", "has an error code", "pending"]), 1)
        .field("exception error code", 4)
        .fields(prefixed("interrupt", &["injected", "number", "soft", "shadow"]), 1)
        .fields(prefixed("NMI", &["injected", "pending", "masked"]), 1)
        .gap(1)
        .fields(["SIPI vector", "events flags"], 4)
        .fields(["SMM", "SMI pending", "SMM inside NMI", "INIT latched"], 1)
        .field("triple fault pending", 1)
        .gap(26)
        .field("exception has a payload", 1)
        .field("exception payload", 8)
}

/// `struct kvm_pic_state`.
fn pic<'a>(name: &str, cutter: Cutter<'a>) -> Cutter<'a> {
    const FIELDS: [&str; 16] = [
        "last IRR",
        "IRR",
        "IMR",
        "ISR",
        "added priority",
        "interrupt base",
        "selected register",
        "poll",
        "special mask",
        "initialization state",
        "automatic EOI",
        "rotation on automatic EOI",
        "special fully nested mode",
        "ICW4 expected",
        "ELCR",
        "ELCR mask",
    ];
    cutter.fields(prefixed(name, &FIELDS), 1)
}

/// `struct kvm_pit_channel_state`.
fn channel(cutter: Cutter<'_>, number: usize) -> Cutter<'_> {
    const STATE: [&str; 10] = [
        "count latched",
        "status latched",
        "status",
        "read state",
        "write state",
        "write latch",
        "access mode",
        "mode",
        "BCD",
        "gate",
    ];
    let name = format!("PIT channel {number}");
    cutter
        .field(format!("{name} count"), 4)
        .field(format!("{name} latched count"), 2)
        .fields(prefixed(&name, &STATE), 1)
        .field(format!("{name} count load time"), 8)
}

#[cfg(test)]
mod tests {
    use super::super::of;
    use super::*;

    fn vcpu(property: &str, words: impl IntoIterator<Item = u32>) -> Node {
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        Node::new("vcpu@0").with_str("compatible", "kho-vmm,x86_64-vcpu-v1").with_bytes(property, bytes)
    }

    fn names(node: &Node, property: &str) -> Vec<String> {
        of(node, property).unwrap().into_iter().map(|part| part.name).collect()
    }

    #[test]
    fn components_of_xsave_are_where_cpuid_says() {
        let leaf = |number: u32, size: u32, offset: u32| [0xd, number, 1, size, offset, 0, 0, 0, 0, 0];
        // One that does not exist, and one that only a kernel saves.
        let leaves = [
            leaf(0, 7, 1096),
            leaf(9, 8, 1088),
            leaf(2, 256, 576),
            leaf(5, 64, 1024),
            leaf(3, 0, 960),
            leaf(11, 16, 0),
        ];
        let node = vcpu("cpuid", leaves.concat()).with_bytes("xsave", vec![0; 1100]);
        let parts = of(&node, "xsave").unwrap();
        let at = |byte: usize| {
            let mut end = 0;
            let part = parts.iter().find(|part| {
                end += part.value.len();
                byte < end
            });
            part.unwrap().name.as_str()
        };
        let told = [0, 32, 415, 416, 512, 528, 576, 576 + 255, 832, 1024, 1087, 1088, 1092, 1099].map(at);
        assert_eq!(
            told,
            [
                "fcw",
                "st0",
                "xmm15",
                "xsave at byte 416",
                "XSTATE_BV",
                "xsave at byte 528",
                "ymm0 (upper half)",
                "ymm15 (upper half)",
                "xsave at byte 832",
                "k0",
                "k7",
                "pkru",
                "xsave at byte 1092",
                "xsave at byte 1096"
            ]
        );
    }

    #[test]
    fn components_that_overlap_lose_no_byte() {
        let leaf = |number: u32, size: u32, offset: u32| [0xd, number, 1, size, offset, 0, 0, 0, 0, 0];
        let leaves = [leaf(2, 256, 0x10), leaf(5, u32::MAX, u32::MAX), leaf(6, 64, 600), leaf(7, u32::MAX, 601)];
        let node = vcpu("cpuid", leaves.concat()).with_bytes("xsave", vec![0; 1000]);
        let sizes = of(&node, "xsave").unwrap().into_iter().map(|part| part.value.len());
        assert_eq!(sizes.sum::<usize>(), 1000);
    }

    #[test]
    fn extended_control_registers_are_told_by_number() {
        let node = vcpu("xcrs", [1, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(names(&node, "xcrs"), ["xcrs at byte 0", "xcrs at byte 8", "XCR0", "xcrs at byte 24"]);
    }

    #[test]
    fn cpuid_is_told_by_leaf() {
        let node = vcpu("cpuid", [[0xd, 2, 1, 4, 5, 6, 7, 0, 0, 0], [0x8000_0001, 0, 0, 4, 5, 6, 7, 0, 0, 0]].concat());
        let names = names(&node, "cpuid");
        assert_eq!([&names[3], &names[16]], ["CPUID 0xd.2 eax", "CPUID 0x80000001.0 edx"]);
    }

    #[test]
    fn a_struct_of_an_older_kernel_is_told_as_far_as_it_goes() {
        assert_eq!(names(&vcpu("regs", [1, 0, 2]), "regs"), ["rax", "rbx"]);
        assert_eq!(names(&vcpu("regs", []), "regs"), [""; 0]);
    }
}
