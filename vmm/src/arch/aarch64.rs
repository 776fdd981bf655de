//! aarch64: a machine of what Linux' generic platform needs, described to the guest by a device tree.

mod boot;
mod counter;
mod fdt;
mod gic;
mod ioctl;
mod its;
#[cfg(test)]
mod kvm_tests;
pub mod platform;
mod processor;
mod registers;
mod rtc;
pub mod vcpu;

use std::arch::asm;

use kvm_ioctls::{Kvm, VmFd};

use super::ArchError;

/// The architecture's name, as in `uname -m`.
pub const NAME: &str = "aarch64";

/// Where RAM begins: below are the interrupt controller and the devices.
pub const RAM_START: u64 = 1 << 30;

/// The raw counter, CNTVCT_EL0. It runs on through a kexec.
pub fn counter() -> u64 {
    let value;
    // SAFETY: reading the counter has no side effect, and Linux lets user space do it. The barrier keeps the read from being
    // done earlier than what is before it.
    unsafe { asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack, preserves_flags)) };
    value
}

/// The counter's frequency in Hz, which the machine itself states.
pub fn counter_frequency() -> u64 {
    let value: u64;
    // SAFETY: reading the frequency has no side effect, and Linux lets user space do it.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Nothing to wait for: nobody has to measure the counter.
pub fn await_counter_calibration() {}

/// RAM as (guest physical address, size) pairs.
pub fn memory_layout(size: u64) -> Vec<(u64, u64)> {
    vec![(RAM_START, size)]
}

/// Makes a VM whose guest physical addresses reach `end`.
pub fn create_vm(kvm: &Kvm, end: u64) -> Result<VmFd, ArchError> {
    let size = address_bits(end, u32::try_from(kvm.get_host_ipa_limit()).unwrap_or(0))?;
    kvm.create_vm_with_ipa_size(size).map_err(ArchError::kvm("create a VM"))
}

/// How many bits the guest's physical addresses get on a host that offers up to `limit`, where 0 stands for a host that does not
/// know any other number than its own, and for that number.
fn address_bits(end: u64, limit: u32) -> Result<u32, ArchError> {
    // KVM's own number. More costs another level of translation, so it is only for guests that have so much memory.
    const DEFAULT: u32 = 40;
    let needed = u64::BITS - end.saturating_sub(1).leading_zeros();
    let offered = if limit == 0 { DEFAULT } else { limit };
    if needed > offered {
        return Err(ArchError::Missing(format!("guest physical addresses of {needed} bits, only of {offered}")));
    }
    Ok(if limit == 0 { 0 } else { needed.max(DEFAULT).min(limit) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_runs_at_its_frequency() {
        let (first, frequency) = (counter(), counter_frequency());
        std::thread::sleep(std::time::Duration::from_millis(50));
        let ran = counter() - first;
        // A machine that is busy wakes us late, and never early.
        assert!(ran >= frequency / 20 - frequency / 1000, "{ran} at {frequency} Hz");
    }

    #[test]
    fn memory_begins_above_the_devices() {
        assert_eq!(memory_layout(64 << 20), [(RAM_START, 64 << 20)]);
    }

    #[test]
    fn addresses_have_more_bits_only_where_a_guest_needs_them() {
        const GIB: u64 = 1 << 30;
        assert_eq!(address_bits(2 * GIB, 48).unwrap(), 40);
        assert_eq!(address_bits(1 << 40, 48).unwrap(), 40);
        assert_eq!(address_bits((1 << 40) + GIB, 48).unwrap(), 41);
        assert_eq!(address_bits(2 * GIB, 36).unwrap(), 36);
        assert_eq!(address_bits(2 * GIB, 0).unwrap(), 0);
        for (end, limit) in [((1 << 36) + GIB, 36), ((1 << 40) + GIB, 40), ((1 << 40) + GIB, 0)] {
            assert!(matches!(address_bits(end, limit), Err(ArchError::Missing(_))), "{end:#x} of {limit} bits");
        }
    }
}
