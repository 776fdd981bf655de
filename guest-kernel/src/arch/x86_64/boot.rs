//! From the PVH entry (32-bit, no paging) to Rust in long mode.

use core::arch::global_asm;

use super::{memory, tables};
use crate::irq_cell::IrqCell;

/// The size of a CPU's main stack.
pub const STACK: usize = 64 << 10;
/// The descriptors of 64-bit code and of data, accessed already, so that the CPU never writes to the table.
pub const CODE: u64 = 0x00af_9b00_0000_ffff;
/// See [`CODE`].
pub const DATA: u64 = 0x00cf_9300_0000_ffff;

#[repr(C, align(16))]
struct Stack([u8; STACK]);

// In a cell, as all that is written to: a plain static is among the constants.
static BOOT_STACK: IrqCell<Stack> = IrqCell::new(Stack([0; STACK]));

global_asm!(
    ".pushsection .note.xen, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18", // name's size, value's size, XEN_ELFNOTE_PHYS32_ENTRY
    ".asciz \"Xen\"",
    ".long pvh_entry",
    ".popsection",
    ".pushsection .boot, \"ax\", @progbits",
    ".code32",
    ".global pvh_entry",
    "pvh_entry:",
    "cld",
    "cli",
    // A loader need not clear what is not in the file. Above it are our only other writable bytes, so nothing is lost.
    "mov edi, offset bss_start",
    "mov ecx, offset bss_end",
    "sub ecx, edi",
    "xor eax, eax",
    "rep stosb",
    // The first 4 GiB, one to one, in pages of 2 MiB: present, writable, accessed, dirty, large.
    "mov edi, offset {directories}",
    "mov eax, 0xe3",
    "mov ecx, 2048",
    "2:",
    "mov [edi], eax",
    "add eax, 0x200000",
    "add edi, 8",
    "dec ecx",
    "jnz 2b",
    "mov edi, offset {pointers}",
    "mov eax, offset {directories} + 0x23",
    "mov ecx, 4",
    "3:",
    "mov [edi], eax",
    "add eax, 0x1000",
    "add edi, 8",
    "dec ecx",
    "jnz 3b",
    "mov edi, offset {root}",
    "mov eax, offset {pointers} + 0x23",
    "mov [edi], eax",
    "mov cr3, edi",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "mov ecx, 0xc0000080", // EFER.LME
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, 0x80010033", // PG, WP, NE, ET, MP, PE
    "mov cr0, eax",
    "lgdt [boot_gdt_pointer]",
    "mov esp, offset {stack} + {stack_size}",
    "push 8",
    "mov eax, offset long_mode",
    "push eax",
    "retf",
    "boot_gdt_pointer:",
    ".word 31",
    ".long boot_gdt",
    ".balign 8",
    "boot_gdt:",
    ".quad 0, {code}, {data}, 0x00cf9b000000ffff", // the last is 32-bit code, on the way of other CPUs
    ".code64",
    "long_mode:",
    "mov eax, 16",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov edi, ebx",
    "xor ebp, ebp",
    "mov rsp, offset {stack} + {stack_size}",
    "call {main}",
    "ud2",
    ".popsection",
    root = sym memory::ROOT,
    pointers = sym memory::POINTERS,
    directories = sym memory::DIRECTORIES,
    code = const CODE,
    data = const DATA,
    stack = sym BOOT_STACK,
    stack_size = const STACK,
    main = sym main,
);

extern "sysv64" fn main(start_info: u32) -> ! {
    tables::load();
    let boot = memory::read_start_info(start_info);
    crate::oracle::run(&boot)
}
