//! aarch64: the generic timer's counter.
use std::arch::asm;

/// The raw counter that runs on through a kexec: here the virtual counter, whose offset is zero for a host.
pub fn counter() -> u64 {
    let value: u64;
    // SAFETY: Linux lets user space read the virtual counter; that touches neither memory nor flags. The barrier keeps the
    // processor from reading it ahead of its turn.
    unsafe { asm!("isb", "mrs {value}, cntvct_el0", value = out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}
