//! The vectors: every exception saves what it interrupted and goes to one function.

use core::arch::naked_asm;

use super::cpu::write_register;
use super::interrupts;

/// What was interrupted.
#[repr(C)]
pub struct Frame {
    /// x0 to x30.
    pub x: [u64; 31],
    /// The number of the vector, 0 to 15.
    pub vector: u64,
    /// Where it goes on.
    pub elr: u64,
    /// The flags and masks it goes on with.
    pub spsr: u64,
}

/// Puts the vectors in place.
pub fn load() {
    write_register!("vbar_el1", vectors as *const () as u64);
}

/// 16 entries of 128 bytes. Interrupts of the code that holds registers come with the other stack pointer selected, so that it
/// may hold any value.
#[unsafe(naked)]
#[unsafe(link_section = ".text.vectors")]
extern "C" fn vectors() {
    naked_asm!(
        ".balign 2048",
        "exception_vectors:",
        ".set vector, 0",
        ".rept 16",
        ".balign 128",
        "sub sp, sp, #272",
        "stp x0, x1, [sp]",
        "mov x0, #vector",
        "b exception_common",
        ".set vector, vector + 1",
        ".endr",
        "exception_common:",
        "stp x2, x3, [sp, #16]",
        "stp x4, x5, [sp, #32]",
        "stp x6, x7, [sp, #48]",
        "stp x8, x9, [sp, #64]",
        "stp x10, x11, [sp, #80]",
        "stp x12, x13, [sp, #96]",
        "stp x14, x15, [sp, #112]",
        "stp x16, x17, [sp, #128]",
        "stp x18, x19, [sp, #144]",
        "stp x20, x21, [sp, #160]",
        "stp x22, x23, [sp, #176]",
        "stp x24, x25, [sp, #192]",
        "stp x26, x27, [sp, #208]",
        "stp x28, x29, [sp, #224]",
        "stp x30, x0, [sp, #240]",
        "mrs x0, elr_el1",
        "mrs x1, spsr_el1",
        "stp x0, x1, [sp, #256]",
        "mov x0, sp",
        "bl {handle}",
        "ldp x0, x1, [sp, #256]",
        "msr elr_el1, x0",
        "msr spsr_el1, x1",
        "ldp x2, x3, [sp, #16]",
        "ldp x4, x5, [sp, #32]",
        "ldp x6, x7, [sp, #48]",
        "ldp x8, x9, [sp, #64]",
        "ldp x10, x11, [sp, #80]",
        "ldp x12, x13, [sp, #96]",
        "ldp x14, x15, [sp, #112]",
        "ldp x16, x17, [sp, #128]",
        "ldp x18, x19, [sp, #144]",
        "ldp x20, x21, [sp, #160]",
        "ldp x22, x23, [sp, #176]",
        "ldp x24, x25, [sp, #192]",
        "ldp x26, x27, [sp, #208]",
        "ldp x28, x29, [sp, #224]",
        "ldr x30, [sp, #240]",
        "ldp x0, x1, [sp]",
        "add sp, sp, #272",
        "eret",
        handle = sym interrupts::handle,
    )
}
