//! What an aarch64 machine's payloads consist of: registers under KVM's numbers for them, and the interrupt controller's under
//! their offsets.

use kho_abi::document::aarch64::register_size;

use super::{Cutter, Part};
use crate::registers::aarch64 as registers;

/// The parts of a vCPU's property.
pub fn vcpu(cutter: Cutter<'_>) -> Option<Vec<Part>> {
    let parts = match cutter.property {
        "registers" => return list(cutter),
        "mp-state" => cutter.field("mp-state", 4),
        // `struct kvm_vcpu_events` of the kernel's arch/arm64/include/uapi/asm/kvm.h.
        "events" => cutter
            .fields(["SError pending", "SError has a syndrome", "external data abort pending"], 1)
            .gap(5)
            .field("SError syndrome", 8),
        _ => return None,
    };
    Some(parts.finish())
}

/// Registers as number, highest byte first, and value, lowest byte first. The number tells how long the value is.
fn list(mut cutter: Cutter<'_>) -> Option<Vec<Part>> {
    while !cutter.rest.is_empty() {
        let number = u64::from_be_bytes(cutter.take(8).try_into().ok()?);
        let size = register_size(number)?;
        let value = cutter.take(size).to_vec();
        if value.len() < size {
            return None;
        }
        cutter.parts.push(Part { name: registers::name(number), value });
    }
    Some(cutter.parts)
}

/// The parts of the GIC's property.
pub fn gic(cutter: Cutter<'_>) -> Option<Vec<Part>> {
    match cutter.property {
        "distributor" => cutter.entries(4, registers::distributor),
        "lines" => cutter.entries(4, |first| format!("lines of interrupts from {first} on")),
        _ => None,
    }
}

/// The parts of a redistributor's property.
pub fn redistributor(cutter: Cutter<'_>) -> Option<Vec<Part>> {
    match cutter.property {
        "registers" => cutter.entries(4, registers::redistributor),
        // KVM wants them encoded as they are in instructions.
        "cpu-interface" => cutter.entries(8, |encoding| registers::system(encoding.into())),
        _ => None,
    }
}

/// The parts of the ITS's property.
pub fn translation_service(cutter: Cutter<'_>) -> Option<Vec<Part>> {
    match cutter.property {
        "registers" => cutter.entries(8, registers::translation_service),
        _ => None,
    }
}
