//! From the loader (EL1, no translation) to Rust with translation and caches on.

use core::arch::global_asm;

use super::{exceptions, memory};
use crate::irq_cell::IrqCell;

/// Everything the oracle keeps lies on it, the copies of all vector registers too, and is moved there as it is put together.
const STACK: usize = 512 << 10;

#[repr(C, align(16))]
struct Stack([u8; STACK]);

// In a cell, as all that is written to: a plain static is among the constants.
static BOOT_STACK: IrqCell<Stack> = IrqCell::new(Stack([0; STACK]));

global_asm!(
    ".pushsection .boot, \"ax\", @progbits",
    // The header of Documentation/arch/arm64/booting.rst.
    ".global image_header",
    "image_header:",
    "b image_entry",
    ".long 0",
    ".quad 0x200000",   // text offset, as the linker script has it
    ".quad image_size", // with what is not in the file
    ".quad 2",          // little-endian, pages of 4 KiB
    ".quad 0, 0, 0",
    ".ascii \"ARM\\x64\"",
    ".long 0",
    "image_entry:",
    "msr daifset, #15",
    // Loaded elsewhere, nothing in here is where it should be: stop where a debugger sees it.
    "adr x1, image_header",
    "ldr x2, ={header}",
    "2: cmp x1, x2",
    "b.ne 2b",
    "ldr x1, ={attributes}",
    "msr mair_el1, x1",
    "ldr x1, ={control}",
    "mrs x2, id_aa64mmfr0_el1", // the size of physical addresses; 48 bits are the most without further features
    "and x2, x2, #7",
    "mov x3, #5",
    "cmp x2, x3",
    "csel x2, x2, x3, lo",
    "bfi x1, x2, #32, #3",
    "msr tcr_el1, x1",
    "adrp x1, boot_table",
    "msr ttbr0_el1, x1",
    "tlbi vmalle1",
    "dsb sy",
    "isb",
    "mrs x1, sctlr_el1",
    "mov x2, #0x1005", // translation, data cache, instruction cache
    "orr x1, x1, x2",
    "bic x1, x1, #2", // no faults for unaligned data
    "msr sctlr_el1, x1",
    "isb",
    // Only now, as what is written with caches off may not be seen with caches on.
    "ldr x1, =bss_start",
    "ldr x2, =bss_end",
    "3: stp xzr, xzr, [x1], #16",
    "cmp x1, x2",
    "b.lo 3b",
    "msr spsel, #1",
    "ldr x1, ={stack} + {stack_size}",
    "mov sp, x1",
    "mov x29, xzr",
    "mov x30, xzr",
    "b {main}",
    ".ltorg",
    ".popsection",
    // The first tables, a constant, as nothing can be written safely yet: 512 GiB one to one, the first GiB devices.
    ".pushsection .rodata.boot_table, \"a\", @progbits",
    ".balign 4096",
    "boot_table:",
    ".quad {device}",
    ".set gib, 1",
    ".rept 511",
    ".quad {ram} + (gib << 30)",
    ".set gib, gib + 1",
    ".endr",
    ".popsection",
    header = sym image_header,
    attributes = const memory::ATTRIBUTES,
    control = const memory::TRANSLATION_CONTROL,
    device = const memory::DEVICE_BLOCK,
    ram = const memory::RAM_BLOCK,
    stack = sym BOOT_STACK,
    stack_size = const STACK,
    main = sym main,
);

unsafe extern "C" {
    fn image_header();
}

extern "C" fn main(devicetree: u64) -> ! {
    exceptions::load();
    let boot = memory::read_devicetree(devicetree);
    crate::oracle::run(&boot)
}
